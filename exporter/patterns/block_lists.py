"""Block lists: the form of a pattern that BlockSparseAttention takes, for one pair of lengths.

A block pair that a query block counts m times is listed m times. The t-th listing stands for the pairs that are counted
t times or more: it goes to the full list where those are all pairs of the block, and to the partial list, with a mask,
where they are some. Within a list the blocks of a row ascend, and listings of one block stand side by side.

Pairs beyond the end of the text do not exist: they do not decide whether a block is full. In a mask they hold whatever
the pattern says of their positions, which keeps the masks of the last blocks equal to those before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest
from .base import Pattern
from .lengths import Integers, Lengths

_STRIP = 1 << 22


@dataclass(frozen=True, eq=False)
class BlockLists:
    """The block lists of a pattern, as BlockSparseAttention takes them.

    Attributes:
        lengths: The lengths that they are for.
        q_block_size: Queries in a row of blocks, BQ.
        kv_block_size: Keys in a block, BK.
        kv_num_blocks: int32 (1, H, nQ), partial blocks of each row; H is 1 where heads are alike.
        kv_indices: int32 (1, H, nQ, W), their key blocks; 0 beyond the number.
        full_kv_num_blocks: int32 (1, H, nQ), full blocks of each row.
        full_kv_indices: int32 (1, H, nQ, W'), their key blocks; 0 beyond the number.
        block_mask_ids: int32 (1, H, nQ, W), mask of each partial block; -1 beyond the number.
        block_masks: uint8 (M, BQ, ceil(BK / 8)), each mask once, in the order in which the lists need them; bit c % 8
            of byte c // 8 is column c.
    """

    lengths: Lengths
    q_block_size: int
    kv_block_size: int
    kv_num_blocks: npt.NDArray[np.int32]
    kv_indices: npt.NDArray[np.int32]
    full_kv_num_blocks: npt.NDArray[np.int32]
    full_kv_indices: npt.NDArray[np.int32]
    block_mask_ids: npt.NDArray[np.int32]
    block_masks: npt.NDArray[np.uint8]

    ARRAYS = (
        "kv_num_blocks",
        "kv_indices",
        "full_kv_num_blocks",
        "full_kv_indices",
        "block_mask_ids",
        "block_masks",
    )
    """Names of the arrays, which are those of the operator's inputs, in their order."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLists):
            return NotImplemented
        sizes = ("lengths", "q_block_size", "kv_block_size")
        return all(getattr(self, name) == getattr(other, name) for name in sizes) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in self.ARRAYS
        )

    __hash__ = None  # type: ignore[assignment]

    def inputs(self) -> dict[str, npt.NDArray[Any]]:
        """The operator's inputs by name; without masks where no block needs one."""
        names = self.ARRAYS if len(self.block_masks) else self.ARRAYS[:4]
        return {name: getattr(self, name) for name in names}

    @property
    def heads(self) -> int:
        """Heads that have lists of their own."""
        return int(self.kv_num_blocks.shape[1])

    @property
    def listed_pairs(self) -> int:
        """Pairs of all blocks listed, of all heads: what a kernel computes, padding of the last blocks left out."""
        rows = _sizes(self.lengths.seq_q, self.q_block_size)
        columns = _sizes(self.lengths.seq_k, self.kv_block_size)
        pairs = 0
        for counts, indices in (
            (self.kv_num_blocks, self.kv_indices),
            (self.full_kv_num_blocks, self.full_kv_indices),
        ):
            if indices.shape[-1]:
                read = np.arange(indices.shape[-1]) < counts[..., None]
                pairs += int(((columns[indices] * read).sum(-1) * rows).sum())
        return pairs

    def terms(self) -> Integers:
        """int64 (H, rows of blocks, key blocks), pairs of the text that each block counts, listings added up."""
        size_q, size_k = self.q_block_size, self.kv_block_size
        rows, columns = _sizes(self.lengths.seq_q, size_q), _sizes(self.lengths.seq_k, size_k)
        counted = np.zeros((self.heads, len(rows), len(columns)), np.int64)
        head, row, slot = np.nonzero(np.arange(self.full_kv_indices.shape[-1]) < self.full_kv_num_blocks[0, ..., None])
        block = self.full_kv_indices[0, head, row, slot]
        np.add.at(counted, (head, row, block), rows[row] * columns[block])
        head, row, slot = np.nonzero(np.arange(self.kv_indices.shape[-1]) < self.kv_num_blocks[0, ..., None])
        block, mask = self.kv_indices[0, head, row, slot], self.block_mask_ids[0, head, row, slot]
        # What a mask counts, by whether the block is cut off by the end of the text.
        if len(mask):
            sides = [(tall, wide) for tall in (size_q, int(rows[-1])) for wide in (size_k, int(columns[-1]))]
            by_cut = np.stack([self._counted_by_masks(*side) for side in sides])
            np.add.at(counted, (head, row, block), by_cut[2 * (rows[row] < size_q) + (columns[block] < size_k), mask])
        return counted

    def _counted_by_masks(self, rows: int, columns: int) -> Integers:
        """int64 (M,), pairs of the first rows and columns that each mask allows."""
        found = np.zeros(len(self.block_masks), np.int64)
        step = max(1, _STRIP // (self.q_block_size * self.kv_block_size))
        for first in range(0, len(found), step):
            bits = np.unpackbits(
                self.block_masks[first : first + step, :rows], axis=-1, count=columns, bitorder="little"
            )
            found[first : first + step] = bits.sum((1, 2), dtype=np.int64)
        return found

    def multiplicity(self) -> npt.NDArray[np.int32]:
        """int32 (H, seq_q, seq_k), how often each query counts each key; what the lists say, for tests and pictures."""
        size_q, size_k = self.q_block_size, self.kv_block_size
        rows, columns = self.kv_num_blocks.shape[2], -(-self.lengths.seq_k // size_k)
        counted = np.zeros((self.heads, rows, size_q, columns, size_k), np.int32)
        masks = np.unpackbits(self.block_masks, axis=-1, count=size_k, bitorder="little")
        for head, row in np.ndindex(self.heads, rows):
            for slot in range(self.full_kv_num_blocks[0, head, row]):
                counted[head, row, :, self.full_kv_indices[0, head, row, slot]] += 1
            for slot in range(self.kv_num_blocks[0, head, row]):
                mask = self.block_mask_ids[0, head, row, slot]
                counted[head, row, :, self.kv_indices[0, head, row, slot]] += 1 if mask < 0 else masks[mask]
        pairs = counted.reshape(self.heads, rows * size_q, columns * size_k)
        return pairs[:, : self.lengths.seq_q, : self.lengths.seq_k]


@dataclass(frozen=True)
class Widths:
    """Slots that the lists have, where more are wanted than the longest row needs.

    Attributes:
        partial: W; None is what is needed.
        full: W'; None is what is needed.
    """

    partial: int | None = None
    full: int | None = None


NO_WIDTHS = Widths()
"""As many slots as the longest row needs."""


class Listings:
    """Collects listings in any order and makes block lists of them; masks that are equal are kept once."""

    def __init__(self, lengths: Lengths, q_block_size: int, kv_block_size: int, heads: int) -> None:
        """Collect for `heads` heads."""
        check_sizes(q_block_size, kv_block_size)
        self.lengths, self.sizes, self.heads = lengths, (q_block_size, kv_block_size), heads
        self.rows = -(-lengths.seq_q // q_block_size)
        self._masks: dict[bytes, int] = {}
        self._found: list[tuple[Integers, Integers, Integers, Integers, Integers]] = []

    def mask(self, seen: npt.NDArray[np.bool_]) -> int:
        """Number of a mask, bool (BQ, BK)."""
        packed = np.packbits(seen, axis=-1, bitorder="little").tobytes()
        return self._masks.setdefault(packed, len(self._masks))

    def add(
        self, head: int, row: npt.ArrayLike, block: npt.ArrayLike, level: npt.ArrayLike, mask: npt.ArrayLike
    ) -> None:
        """Take in listings of one head.

        Args:
            head: The head.
            row: Row of blocks of each listing.
            block: Its key block.
            level: Its place among the listings of that block, from 1.
            mask: Number of its mask, or -1 for a full block; the arguments broadcast.
        """
        arrays = np.broadcast_arrays(np.int64(head), row, block, level, mask)
        self._found.append(tuple(array.reshape(-1).astype(np.int64) for array in arrays))  # type: ignore[arg-type]

    def lists(self, widths: Widths) -> BlockLists:
        """The block lists.

        Raises:
            InvalidRequest: a row needs more slots than it is to have.
        """
        empty = (np.zeros(0, np.int64),) * 5
        head, row, block, level, mask = (np.concatenate(part) for part in zip(empty, *self._found, strict=True))
        order = np.lexsort((level, block, row, head))
        head, row, block, mask = head[order], row[order], block[order], mask[order]
        mask, kept = self._renumbered(mask)
        partial, full = mask >= 0, mask < 0
        count, (indices, ids) = self._slots(
            head[partial], row[partial], widths.partial, "partial", (block[partial], 0), (mask[partial], -1)
        )
        full_count, (full_indices,) = self._slots(head[full], row[full], widths.full, "full", (block[full], 0))
        return BlockLists(self.lengths, *self.sizes, count, indices, full_count, full_indices, ids, kept)

    def _renumbered(self, mask: Integers) -> tuple[Integers, npt.NDArray[np.uint8]]:
        """Masks numbered in the order of their first use, and those that are used."""
        size_q, size_k = self.sizes
        width = -(-size_k // 8)
        used, first = np.unique(mask[mask >= 0], return_index=True)
        used = used[np.argsort(first)]
        number = np.full(len(self._masks) + 1, -1)
        number[used] = np.arange(len(used))
        packed = list(self._masks)
        raw = b"".join(packed[index] for index in used)
        return number[mask], np.frombuffer(raw, np.uint8).reshape(len(used), size_q, width)

    def _slots(
        self, head: Integers, row: Integers, width: int | None, kind: str, *values: tuple[Integers, int]
    ) -> tuple[npt.NDArray[np.int32], list[npt.NDArray[np.int32]]]:
        """Counts per row, and each array of values put into slots; listings are sorted by head and row."""
        place = head * self.rows + row
        counts = np.bincount(place, minlength=self.heads * self.rows)
        longest = int(counts.max(initial=0))
        if width is not None and width < longest:
            h, r = divmod(int(counts.argmax()), self.rows)
            raise InvalidRequest(
                f"head {h}, row of blocks {r} lists {longest} {kind} blocks: more than the {width} slots asked for"
            )
        width = longest if width is None else width
        before = np.concatenate(([0], np.cumsum(counts)))[:-1]
        slot = np.arange(len(place)) - before[place]
        shape = (1, self.heads, self.rows, width)
        filled = []
        for value, nothing in values:
            array = np.full((self.heads * self.rows, width), nothing, np.int32)
            array[place, slot] = value
            filled.append(array.reshape(shape))
        return counts.reshape(shape[:3]).astype(np.int32), filled


def heads_of(pattern: Pattern, heads: int | None) -> tuple[Pattern, ...]:
    """The patterns that need lists of their own.

    Args:
        pattern: The pattern.
        heads: Query heads of the attention; None leaves it at those after which the pattern repeats.

    Returns:
        One pattern where all heads are alike, else one per query head.
    """
    if pattern.heads == 1:
        return (pattern.head(0),)
    return tuple(pattern.head(index) for index in range(pattern.heads if heads is None else heads))


def enumerate_lists(
    pattern: Pattern,
    lengths: Lengths,
    q_block_size: int = 128,
    kv_block_size: int = 128,
    *,
    heads: int | None = None,
    widths: Widths = NO_WIDTHS,
) -> BlockLists:
    """Make block lists by asking the pattern about every pair: slow, simple, and what `build_lists` is tested against.

    Args:
        pattern: The pattern.
        lengths: For which lengths; query row r of blocks begins at position ``offset + r · q_block_size``.
        q_block_size: Queries in a row of blocks.
        kv_block_size: Keys in a block.
        heads: Query heads; needed where the pattern has fewer, and heads differ.
        widths: Slots of the lists.

    Raises:
        InvalidRequest: sizes are out of range, the widths too small, or the pattern is for other lengths.
    """
    patterns = heads_of(pattern, heads)
    listings = Listings(lengths, q_block_size, kv_block_size, len(patterns))
    for head, own in enumerate(patterns):
        for row, block, counts, inside in _blocks(own, lengths, q_block_size, kv_block_size):
            for level in range(1, int(inside.max()) + 1):
                full = bool((inside >= level).all())
                listings.add(head, row, block, level, -1 if full else listings.mask(counts >= level))
    return listings.lists(widths)


def _blocks(pattern: Pattern, lengths: Lengths, size_q: int, size_k: int) -> Iterator[tuple[int, int, Any, Any]]:
    """Each block's row, column, (BQ, BK) counts, and those of them that exist."""
    columns = -(-lengths.seq_k // size_k)
    key = np.arange(columns * size_k)[None, :]
    for row in range(-(-lengths.seq_q // size_q)):
        query = lengths.offset + row * size_q + np.arange(size_q)[:, None]
        strip = np.broadcast_to(pattern.multiplicity(query, key, lengths), (size_q, key.size))
        rows = min(size_q, lengths.seq_q - row * size_q)
        for block in range(columns):
            counts = strip[:, block * size_k : (block + 1) * size_k]
            yield row, block, counts, counts[:rows, : lengths.seq_k - block * size_k]


def check_sizes(q_block_size: int, kv_block_size: int) -> None:
    """Check block sizes.

    Raises:
        InvalidRequest: one is below 1.
    """
    if min(q_block_size, kv_block_size) < 1:
        raise InvalidRequest(f"q_block_size = {q_block_size}, kv_block_size = {kv_block_size}: must be 1 or more")


def _sizes(length: int, block: int) -> Integers:
    """Tokens in each block of a text."""
    return np.minimum(block, length - np.arange(0, length, block))
