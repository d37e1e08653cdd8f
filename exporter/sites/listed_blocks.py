"""What block lists say: how many pairs they count, what computing them takes, and how they look.

The lists are those of one text, as a graph computed them or a pattern asks for them. Everything is counted in tiles of
one listing each; listings whose tiles must be equal are evaluated once, so that the cost depends on how many different
tiles there are and not on the length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ...plugins.block_sparse_attention.definition import Attributes, ListBounds, check_lists
from ..patterns import BlockLists, Lengths, Pattern

Counts = npt.NDArray[np.int32]
Array = npt.NDArray[Any]

_TILES = 1 << 22
"""Pairs of the tiles that are evaluated at once."""

_PAIRS = 1 << 26
"""Pairs of all heads that differ, up to which lists and a pattern are compared without leaving a row out."""

_ROWS = 32
"""Rows of blocks that are compared beyond that: spread over the text, the first and the last among them."""


@dataclass(frozen=True, eq=False)
class ListedBlocks:
    """The lists of one text, with all that forbids pairs in them.

    Attributes:
        attributes: The node's attributes.
        seq_q: Query rows.
        seq_k: Keys.
        lists: ``kv_num_blocks`` and the other list inputs of the operator by name, the first axis (batch) left out.
        optional: ``attn_mask`` (S_k,), ``nonpad_kv_seqlen`` (), ``q_positions`` (1|H, S_q), ``k_positions`` (1|H_kv,
            S_k), ``distance_bias`` (1|H, S_q + S_k - 1), as far as the node has them.
    """

    attributes: Attributes
    seq_q: int
    seq_k: int
    lists: Mapping[str, Array]
    optional: Mapping[str, Array]

    @classmethod
    def of_pattern(cls, lists: BlockLists) -> ListedBlocks:
        """The lists that a pattern asks for."""
        attributes = Attributes(q_block_size=lists.q_block_size, kv_block_size=lists.kv_block_size)
        arrays = {name: array if name == "block_masks" else array[0] for name, array in lists.inputs().items()}
        return cls(attributes, lists.lengths.seq_q, lists.lengths.seq_k, arrays, {})

    def check(self) -> None:
        """Check the values of the lists.

        Raises:
            InvalidOperands: one is out of range; the message names the row.
        """
        # The text's batch axis is put back: messages name it.
        lists = {name: array[None] for name, array in self.lists.items() if name != "block_masks"}
        masks = len(self.lists["block_masks"]) if "block_masks" in self.lists else 0
        check_lists(lists, ListBounds(self.attributes.kv_blocks(self.seq_k), masks))

    @cached_property
    def keys(self) -> npt.NDArray[np.bool_]:
        """The keys that padding leaves, (S_k,): those that the graph adds to fill a block are none of the text."""
        valid = np.asarray(self.optional.get("attn_mask", np.ones(self.seq_k, np.bool_)), np.bool_).copy()
        valid[int(self.optional.get("nonpad_kv_seqlen", self.seq_k)) :] = False
        return valid

    @cached_property
    def rows(self) -> npt.NDArray[np.bool_]:
        """The queries that stand for tokens of the text, (S_q,)."""
        return self.keys if self.seq_q == self.seq_k else np.ones(self.seq_q, np.bool_)

    @cached_property
    def heads(self) -> int:
        """Heads that differ, as far as the shapes tell; 1 where all are alike."""
        per_head = [self.lists["kv_num_blocks"], *(self.optional[name] for name in _PER_HEAD if name in self.optional)]
        return max(len(array) for array in per_head)

    @property
    def pairs(self) -> int:
        """Pairs of the text's queries and keys, of one head."""
        return int(self.rows.sum()) * int(self.keys.sum())

    def computed(self, head: int) -> int:
        """Pairs of all blocks that a head lists: what a kernel computes; what lies beyond the last key is left out."""
        row, block, _ = self._listings(head)
        height = np.minimum(self.attributes.q_block_size, self.seq_q - row * self.attributes.q_block_size)
        width = np.minimum(self.attributes.kv_block_size, self.seq_k - block * self.attributes.kv_block_size)
        return int((height * width).sum())

    def terms(self, head: int) -> int:
        """Pairs that a head's softmaxes count, in rows of the text; a key that is listed twice counts twice."""
        if head not in self._terms:
            self._terms[head] = self._count(head)
        return self._terms[head]

    @cached_property
    def _terms(self) -> dict[int, int]:
        """Terms of the heads that were asked about."""
        return {}

    def _count(self, head: int) -> int:
        row, block, mask = self._listings(head)
        if not len(row):
            return 0
        rows = self._kind(self.rows, self.attributes.q_block_size)[row]
        keys = self._kind(self.keys, self.attributes.kv_block_size)[block]
        alike = np.stack([mask, rows, keys, *self._relation(row, block)])
        _, first, times = np.unique(alike, axis=1, return_index=True, return_counts=True)
        size = self.attributes.q_block_size * self.attributes.kv_block_size
        step = max(1, _TILES // size)
        total = 0
        for begin in range(0, len(first), step):
            some = first[begin : begin + step]
            tiles = self._tiles(head, row[some], block[some], mask[some])
            tiles &= self._rows_of(row[some])[:, :, None]
            total += int((tiles.sum((1, 2)) * times[begin : begin + step]).sum())
        return total

    def multiplicity(self, head: int, row: int) -> Counts:
        """int32 (rows of the block, S_k), how often each query of a row of blocks counts each key."""
        tall, wide = self.attributes.q_block_size, self.attributes.kv_block_size
        rows, blocks, masks = self._listings(head)
        mine = rows == row
        tiles = self._tiles(head, rows[mine], blocks[mine], masks[mine])
        counts = np.zeros((tall, self.attributes.kv_blocks(self.seq_k), wide), np.int32)
        for block, tile in zip(blocks[mine], tiles, strict=True):
            counts[:, block] += tile
        return counts.reshape(tall, -1)[: min(tall, self.seq_q - row * tall), : self.seq_k]

    def coverage(self, head: int, unit: int, cells: int) -> npt.NDArray[np.float64]:
        """(cells, cells), the share of each cell's existing pairs that is counted; a cell is `unit` tokens each way.

        Cells beyond the text are 0.
        """
        tall, wide = self.attributes.q_block_size, self.attributes.kv_block_size
        rows, blocks, masks = self._listings(head)
        inside = (rows * tall < unit * cells) & (blocks * wide < unit * cells)
        seen = np.zeros(cells * cells)
        # A block that is listed twice is seen once, so its listings are taken together, a row of blocks at a time.
        for row in np.unique(rows[inside]).tolist():
            mine = inside & (rows == row)
            named, place = np.unique(blocks[mine], return_inverse=True)
            tiles = np.zeros((len(named), tall, wide), np.bool_)
            np.logical_or.at(tiles, place, self._tiles(head, rows[mine], blocks[mine], masks[mine]))
            down = (row * tall + np.arange(tall)) // unit
            starts = np.flatnonzero(np.diff(down, prepend=-1))
            sums = np.add.reduceat(tiles, starts, axis=1, dtype=np.int64)
            across = (named[:, None] * wide + np.arange(wide)) // unit
            cell = down[starts][None, :, None] * cells + across[:, None, :]
            shown = (down[starts] < cells)[None, :, None] & (across < cells)[:, None, :]
            seen += np.bincount(cell[shown], weights=sums[shown], minlength=cells * cells)
        counted = seen.reshape(cells, cells)
        shown_k = np.bincount(np.arange(self.seq_k) // unit, minlength=cells)[:cells]
        shown_q = np.bincount(np.arange(self.seq_q) // unit, minlength=cells)[:cells]
        size = shown_q[:, None] * shown_k[None, :]
        share: npt.NDArray[np.float64] = np.divide(counted, size, out=np.zeros_like(counted), where=size > 0)
        return share

    def differs_from(self, pattern: Pattern) -> str:
        """Where the lists count a pair otherwise than a pattern does, in words; empty where they do not.

        What the node's attributes and padding forbid is forbidden in the pattern as well. Of long texts `_ROWS` rows of
        blocks are compared.

        Raises:
            InvalidRequest: the pattern is for other lengths.
        """
        if pattern not in self._differences:
            self._differences[pattern] = self._difference(pattern)
        return self._differences[pattern]

    def _difference(self, pattern: Pattern) -> str:
        lengths = Lengths(self.seq_q, self.seq_k)
        rows = np.arange(self.attributes.q_blocks(self.seq_q))
        total = self.heads if self.heads > 1 else pattern.heads
        if total * self.seq_q * self.seq_k > _PAIRS:
            rows = np.unique(np.linspace(0, len(rows) - 1, _ROWS).round().astype(np.int64))
        tall = self.attributes.q_block_size
        for head in range(total):
            own = pattern.head(head)
            for row in rows.tolist():
                query = np.arange(row * tall, min((row + 1) * tall, self.seq_q))
                wanted = own.multiplicity(query[:, None], lengths.keys()[None, :], lengths)
                wanted = wanted * self._allowed(head % self.heads, query, lengths.keys())
                got = self.multiplicity(head % self.heads, row)
                wrong = np.argwhere((wanted != got) & self.rows[query][:, None])
                if len(wrong):
                    q, k = (int(place) for place in wrong[0])
                    of_head = f"head {head}, " if total > 1 else ""
                    return (
                        f"{of_head}query {query[q]}, key {k}: counted {got[q, k]} times by the lists, "
                        f"{wanted[q, k]} by the pattern"
                    )
        return ""

    def _listings(self, head: int) -> tuple[Array, Array, Array]:
        """Row of blocks, key block and mask (-1 for none) of each listing of a head."""
        if head in self._listed:
            return self._listed[head]
        found = []
        for counts_name, indices_name in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
            counts, indices = self._of_head(counts_name, head), self._of_head(indices_name, head)
            row, slot = np.nonzero(np.arange(indices.shape[-1]) < counts[:, None])
            masked = counts_name == "kv_num_blocks" and "block_mask_ids" in self.lists
            mask = self._of_head("block_mask_ids", head)[row, slot] if masked else np.full(len(row), -1)
            found.append((row, indices[row, slot], mask))
        row, block, mask = (np.concatenate(part).astype(np.int64) for part in zip(*found, strict=True))
        return self._listed.setdefault(head, (row, block, mask))

    @cached_property
    def _differences(self) -> dict[Pattern, str]:
        """What comparisons found, for the layers that share lists and a pattern."""
        return {}

    @cached_property
    def _listed(self) -> dict[int, tuple[Array, Array, Array]]:
        """The listings of the heads that were asked about."""
        return {}

    def _of_head(self, name: str, head: int) -> Array:
        array = self.lists[name]
        return np.asarray(array[head % len(array)])

    def _kind(self, valid: npt.NDArray[np.bool_], size: int) -> Array:
        """A number for each block, the same for blocks with the same tokens in them."""
        blocks = -(-len(valid) // size)
        padded = np.zeros(blocks * size, np.bool_)
        padded[: len(valid)] = valid
        return np.asarray(np.unique(padded.reshape(blocks, size), axis=0, return_inverse=True)[1]).reshape(-1)

    def _relation(self, row: Array, block: Array) -> list[Array]:
        """What else decides how a tile looks: nothing, the distance of its corners, or its very place."""
        if "q_positions" in self.optional:
            return [row, block]
        tall, wide = self.attributes.q_block_size, self.attributes.kv_block_size
        distance = block * wide - row * tall
        if "distance_bias" in self.optional:
            return [distance]
        if self.attributes.is_causal or self.attributes.exclude_self:
            offset = abs(self._offset)
            return [np.clip(distance, -wide - offset, tall + offset)]
        return []

    def _tiles(self, head: int, row: Array, block: Array, mask: Array) -> npt.NDArray[np.bool_]:
        """The pairs of each listing that are allowed, (n, BQ, BK)."""
        tall, wide = self.attributes.q_block_size, self.attributes.kv_block_size
        query, key = row[:, None] * tall + np.arange(tall), block[:, None] * wide + np.arange(wide)
        tiles = np.ones((len(row), tall, wide), np.bool_)
        masked = mask >= 0
        if masked.any():
            bits = np.unpackbits(self.lists["block_masks"][mask[masked]], axis=-1, count=wide, bitorder="little")
            tiles[masked] = bits.astype(np.bool_)
        tiles &= (query < self.seq_q)[:, :, None] & (key < self.seq_k)[:, None, :]
        query, key = np.minimum(query, self.seq_q - 1), np.minimum(key, self.seq_k - 1)
        tiles &= self._allowed(head, query, key)
        return tiles

    def _rows_of(self, row: Array) -> npt.NDArray[np.bool_]:
        tall = self.attributes.q_block_size
        query = row[:, None] * tall + np.arange(tall)
        return self.rows[np.minimum(query, self.seq_q - 1)] & (query < self.seq_q)

    @property
    def _offset(self) -> int:
        """Absolute position of query row 0."""
        return int(self.optional["nonpad_kv_seqlen"]) - self.seq_q if "nonpad_kv_seqlen" in self.optional else 0

    def _allowed(self, head: int, query: Array, key: Array) -> npt.NDArray[np.bool_]:
        """What the node itself allows, whatever is listed, (…, queries, keys); query rows and keys by index."""
        query, key = query[..., :, None], key[..., None, :]
        allowed = np.broadcast_to(self.keys[key], np.broadcast_shapes(query.shape, key.shape)).copy()
        q_position, k_position = query + self._offset, key
        if "q_positions" in self.optional:
            given_q, given_k = self.optional["q_positions"], self.optional["k_positions"]
            # As many key heads as there are groups of query heads.
            group = head * len(given_k) // max(self.heads, len(given_k))
            q_position, k_position = given_q[head % len(given_q)][query], given_k[group][key]
        if self.attributes.is_causal:
            allowed &= k_position <= q_position
        if self.attributes.exclude_self:
            allowed &= k_position != q_position
        if "distance_bias" in self.optional:
            bias = self.optional["distance_bias"]
            allowed &= ~np.isneginf(bias[head % len(bias)].astype(np.float64))[key - query + self.seq_q - 1]
        return allowed


_PER_HEAD = ("q_positions", "k_positions", "distance_bias")
