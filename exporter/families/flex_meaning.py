"""What one call of flex_attention computes, told from the functions that it was given in several runs of the model."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.nn.attention import flex_attention as flex

from ..errors import ExportFailed
from ..patterns import BlockLists, Explicit, Lengths, Pattern, PerHead, build_lists
from .mask_mods import MaskMod, MaskValues, Reach, Seen, read_pattern
from .score_mods import ScoreMod, ScoreParts, Sizes, hides, read_score_mod

_LONGEST_TABLE = 1 << 15
_LARGEST_RECORD = 2048
"""Tokens up to which the pattern of frozen lists is recorded beside them."""

_FIX = "fix the sequence length (dynamic_shapes without a Dim for it)"


@dataclass(frozen=True)
class Call:
    """One call of flex_attention in one run.

    Attributes:
        layer: The module that calls.
        sizes: Sizes of the call.
        mask_mod: The mask function.
        score_mod: The score function, if any.
        block_size: Queries and keys in a block of the BlockMask.
        asked: Batch entries and heads that the BlockMask was made for; 1 stands for all.
        lists: The BlockMask, where it was made before or from lists of the model's own.
        listed: Its mask function, restricted to the blocks that it lists.
        mask_reads_inputs: Whether mask_mod reads what is computed from the inputs.
        score_reads_inputs: Whether score_mod does.
    """

    layer: str
    sizes: Sizes
    mask_mod: MaskMod
    score_mod: ScoreMod | None
    block_size: tuple[int, int]
    asked: tuple[int, int]
    lists: Any
    listed: MaskMod | None
    mask_reads_inputs: bool
    score_reads_inputs: bool

    def ask_at_its_ends(self) -> None:
        """Call both functions for the corners of the text; they raise what the attention itself would have raised."""
        last = np.array([[0, 0, 1, 1], [0, 1, 0, 1]]) * np.array([[self.sizes.queries - 1], [self.sizes.keys - 1]])
        for entry, head in itertools.product({0, self.sizes.batch - 1}, {0, self.sizes.heads - 1}):
            MaskValues(self.mask_mod, entry).pairs(head, *last)
            if self.score_mod is not None:
                MaskValues(hides(self.score_mod), entry).pairs(head, *last)


@dataclass(frozen=True, eq=False)
class FrozenLists:
    """Block lists that follow no rule.

    Attributes:
        arrays: Inputs of BlockSparseAttention by name; the first axis is the batch where entries differ, else 1.
        seq_q: Queries that they are for.
        seq_k: Keys that they are for.
        block_size: Queries and keys in a block.
        cut: Whether their beginning holds for shorter texts.
        pattern: JSON of the pattern; empty where there is none, or one too long to write down.
    """

    arrays: dict[str, npt.NDArray[Any]]
    seq_q: int
    seq_k: int
    block_size: tuple[int, int]
    cut: bool = False
    pattern: str = ""


@dataclass(frozen=True, eq=False)
class Meaning:
    """What one call computes.

    Attributes:
        layer: The module that calls.
        score: What is done to the scores.
        pattern: Which keys a query sees, where that is a pattern.
        frozen: Its block lists, where it is not.
        block_size: Block size that the model chose; None where queries and keys have different ones.
        padding: Whether keys are hidden besides, by a mask that is computed from the inputs: the diagonal of mask_mod.
    """

    layer: str
    score: ScoreParts
    pattern: Pattern | None = None
    frozen: FrozenLists | None = None
    block_size: int | None = None
    padding: bool = False


def read_meaning(calls: Sequence[Call], redrawn: Sequence[Call], open_length: bool) -> Meaning:
    """What a call computes.

    Args:
        calls: The same call in several runs, of different lengths and batch sizes.
        redrawn: The same call in runs on inputs that were drawn at random.
        open_length: Whether the exported model is to accept any length.

    Raises:
        ExportFailed: it is nothing that the operators compute; the message says what was seen.
    """
    first = calls[0]
    score = _score(calls)
    tall, wide = first.block_size
    size = tall if tall == wide and tall < flex._LARGE_SPARSE_BLOCK_SIZE else None
    common: dict[str, Any] = {"layer": first.layer, "score": score, "block_size": size}
    if any(call.lists is not None and not _listed_as_meant(call) for call in calls):
        return Meaning(**common, frozen=_own_lists(first, open_length, score))
    masks = [_mask(call, score) for call in calls]
    for call in (*calls, *redrawn):
        _refuse_narrow_mask(call)
    if any(call.mask_reads_inputs or (score.hides and call.score_reads_inputs) for call in calls):
        return Meaning(**common, pattern=_under_padding(calls, redrawn, score), padding=True)
    pattern = _pattern(calls, masks)
    if pattern is not None:
        return Meaning(**common, pattern=pattern)
    return Meaning(**common, frozen=_frozen(calls, masks, open_length))


def combined(mask_mod: MaskMod, score_mod: ScoreMod | None, score: ScoreParts) -> MaskMod:
    """The mask of a call: its mask_mod, and the pairs that its score_mod does not hide."""
    if score_mod is None or not score.hides:
        return mask_mod
    left = hides(score_mod)
    return lambda b, h, q, k: mask_mod(b, h, q, k) & left(b, h, q, k)


def _mask(call: Call, score: ScoreParts) -> MaskMod:
    return combined(call.mask_mod, call.score_mod, score)


def _score(calls: Sequence[Call]) -> ScoreParts:
    first = calls[0]
    if first.score_mod is None:
        return ScoreParts()
    parts = {read_score_mod(call.score_mod, call.mask_mod, call.sizes, call.layer) for call in calls if call.score_mod}
    # Whether it hides a pair, or heads differ, may show at some lengths only.
    joined = {ScoreParts(part.factor, part.softcap) for part in parts}
    if len(joined) > 1:
        raise ExportFailed(
            f"{first.layer}: the score_mod multiplies or bounds scores differently at other lengths; allowed: factors "
            f"and softcaps that are constants; next step: {_FIX}"
        )
    some = joined.pop()
    bias = any(part.bias for part in parts)
    if bias and any(call.score_reads_inputs for call in calls):
        raise ExportFailed(
            f"{first.layer}: the score_mod adds a bias and reads a tensor that is computed from the model's inputs, so "
            "that the bias may be another for other inputs; allowed: constants, parameters and buffers; next step: "
            "compute what it adds from those"
        )
    return ScoreParts(
        some.factor, some.softcap, bias, any(part.by_head for part in parts), any(part.hides for part in parts)
    )


def _grid(call: Call, mask: MaskMod, batch: int, head: int) -> Seen:
    return MaskValues(mask, batch).grid(head, np.arange(call.sizes.queries), np.arange(call.sizes.keys))


def _refuse_narrow_mask(call: Call) -> None:
    """Refuse a mask_mod that differs where its BlockMask was told that all are alike.

    Raises:
        ExportFailed: the blocks of the first batch entry or head would be those of all.
    """
    for axis, (made, size) in enumerate(zip(call.asked, (call.sizes.batch, call.sizes.heads), strict=True)):
        if made != 1 or size == 1 or call.lists is not None:
            continue
        for index in range(1, size):
            entry, head = (index, 0) if axis == 0 else (0, index)
            if not np.array_equal(_grid(call, call.mask_mod, entry, head), _grid(call, call.mask_mod, 0, 0)):
                name, argument = (("batch entries", "B"), ("heads", "H"))[axis]
                raise ExportFailed(
                    f"{call.layer}: the mask_mod differs between {name}, and its BlockMask was made with "
                    f"{argument}=None: compiled, flex_attention takes the blocks of the first for all; next step: "
                    f"create_block_mask with {argument}={size}"
                )


def _listed_as_meant(call: Call) -> bool:
    """Whether the lists of a BlockMask leave what its mask_mod allows, and no more."""
    assert call.listed is not None
    batch, heads = call.lists.kv_num_blocks.shape[:2]
    return all(
        np.array_equal(_grid(call, call.listed, b, h), _grid(call, call.mask_mod, b, h))
        for b in range(batch)
        for h in range(heads)
    )


def _pattern(calls: Sequence[Call], masks: Sequence[MaskMod]) -> Pattern | None:
    """The pattern that all runs follow; None where there is none, or batch entries differ."""
    if not all(_alike_in_batch(call, mask) for call, mask in zip(calls, masks, strict=True)):
        return None
    longest = max(range(len(calls)), key=lambda run: min(calls[run].sizes.queries, calls[run].sizes.keys))
    # First as a function of indices alone; then as one that knows the length, and may be asked about no more than that.
    tokens = min(calls[longest].sizes.queries, calls[longest].sizes.keys)
    for run, reach in ((0, Reach()), (longest, Reach(tokens // 2, endless=False))):
        if not reach.endless and (len(calls) < 2 or reach.far < 8):
            continue
        try:
            pattern = read_pattern(masks[run], calls[run].sizes.heads, reach)
        except (IndexError, RuntimeError):  # It reads a tensor that ends.
            continue
        if pattern is not None and all(_follows(pattern, *each) for each in zip(calls, masks, strict=True)):
            return pattern
    return None


def _alike_in_batch(call: Call, mask: MaskMod) -> bool:
    sizes = call.sizes
    for head in range(sizes.heads):
        wanted = _grid(call, mask, 0, head)
        if not all(np.array_equal(_grid(call, mask, entry, head), wanted) for entry in range(1, sizes.batch)):
            return False
    return True


def _follows(pattern: Pattern, call: Call, mask: MaskMod) -> bool:
    lengths = Lengths(call.sizes.queries, call.sizes.keys)
    query, key = lengths.queries()[:, None], lengths.keys()[None, :]
    return all(
        np.array_equal(_grid(call, mask, 0, head), pattern.head(head).allowed(query, key, lengths))
        for head in range(call.sizes.heads)
    )


def _under_padding(calls: Sequence[Call], redrawn: Sequence[Call], score: ScoreParts) -> Pattern:
    """The pattern of a mask that hides keys besides, as the inputs say.

    Raises:
        ExportFailed: the mask is something else.
    """
    bare = [_in_any_entry(_mask(call, score), call.sizes.batch) for call in calls]
    alone = [dataclasses.replace(call, sizes=dataclasses.replace(call.sizes, batch=1)) for call in calls]
    pattern = _pattern(alone, bare)
    if pattern is None or not all(_hides_keys(pattern, call, _mask(call, score)) for call in (*calls, *redrawn)):
        raise ExportFailed(
            f"{calls[0].layer}: the mask_mod reads a tensor that is computed from the model's inputs, and does more "
            "with it than to hide keys: which blocks of keys a query needs is then known only after all its pairs were "
            "looked at; allowed: a mask of positions, & padding[b, kv_idx]; next step: documents and prefixes as "
            "constants (buffers), or block lists as inputs of the model (torch.ops.longspan.block_sparse_attention)"
        )
    return pattern


def _in_any_entry(mask: MaskMod, batch: int) -> MaskMod:
    """Whether any batch entry has a pair: all that is seen without padding, where every key is in some entry."""

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        found = mask(b, h, q, k)
        for entry in range(1, batch):
            found = found | mask(b + entry, h, q, k)
        return found

    return seen


def _hides_keys(pattern: Pattern, call: Call, mask: MaskMod) -> bool:
    """Whether a mask is a pattern, of those keys that see themselves."""
    sizes = call.sizes
    if sizes.queries != sizes.keys:
        return False
    lengths = Lengths.of(sizes.keys)
    token = lengths.keys()
    for entry in range(sizes.batch):
        valid = MaskValues(mask, entry).pairs(0, token, token)
        for head in range(sizes.heads):
            wanted = pattern.head(head).allowed(token[:, None], token[None, :], lengths) & valid
            if not np.array_equal(_grid(call, mask, entry, head), wanted):
                return False
    return True


def _frozen(calls: Sequence[Call], masks: Sequence[MaskMod], open_length: bool) -> FrozenLists:
    """Lists of a mask that follows no rule: of the one length, or cut from the longest that its tensors allow."""
    first, mask = calls[0], masks[0]
    if not open_length:
        return _explicit(first, mask, first.sizes, cut=False)
    same = all(_same_where_both(first, mask, call, other) for call, other in zip(calls, masks, strict=True))
    limit = _limit(mask, first.sizes.heads) if same else 0
    if not same or limit >= _LONGEST_TABLE:
        raise ExportFailed(
            f"{first.layer}: the mask_mod follows no rule that holds at every length"
            + ("" if same else ": the same pair of tokens is seen in a text of one length and hidden in another")
            + "; allowed: what depends on distances, on a period, and on the first tokens; or what is read from a "
            f"tensor of the model; next step: {_FIX}"
        )
    sizes = Sizes(first.sizes.batch, first.sizes.heads, limit, limit)
    return _explicit(first, mask, sizes, cut=True)


def _same_where_both(call: Call, mask: MaskMod, other: Call, other_mask: MaskMod) -> bool:
    sizes = call.sizes, other.sizes
    query = np.arange(min(each.queries for each in sizes))
    key = np.arange(min(each.keys for each in sizes))
    return all(
        np.array_equal(MaskValues(each, batch).grid(head, query, key), MaskValues(mask, batch).grid(head, query, key))
        for each in (other_mask,)
        for batch in range(min(each.batch for each in sizes))
        for head in range(call.sizes.heads)
    )


def _limit(mask: MaskMod, heads: int) -> int:
    """Tokens of the longest text that a mask_mod can be asked about; `_LONGEST_TABLE` where there is no end."""

    def reads(length: int) -> bool:
        last = np.array([length - 1])
        try:
            for head in range(heads):
                MaskValues(mask).pairs(head, last, last)
        except (IndexError, RuntimeError):
            return False
        return True

    low, high = 1, _LONGEST_TABLE
    if reads(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reads(middle) else (low, middle)
    return low


def _explicit(call: Call, mask: MaskMod, sizes: Sizes, cut: bool) -> FrozenLists:
    lengths = Lengths(sizes.queries, sizes.keys)
    entries = sizes.batch if not _alike_in_batch(call, mask) else 1
    grids = [[_grid_of(mask, sizes, entry, head) for head in range(sizes.heads)] for entry in range(entries)]
    if all(np.array_equal(grid, rows[0]) for rows in grids for grid in rows):
        grids = [rows[:1] for rows in grids]
    tall, wide = call.block_size
    if tall >= flex._LARGE_SPARSE_BLOCK_SIZE:
        tall = wide = flex._DEFAULT_SPARSE_BLOCK_SIZE
    patterns = [PerHead(tuple(Explicit.of(grid) for grid in rows)) for rows in grids]
    lists = [build_lists(pattern, lengths, tall, wide, heads=len(grids[0])) for pattern in patterns]
    record = ""
    if entries == 1 and max(sizes.queries, sizes.keys) <= _LARGEST_RECORD:
        from ..patterns import to_json

        record = to_json(patterns[0] if len(grids[0]) > 1 else patterns[0].of[0])
    return FrozenLists(_stacked(lists), sizes.queries, sizes.keys, (tall, wide), cut, record)


def _grid_of(mask: MaskMod, sizes: Sizes, entry: int, head: int) -> Seen:
    return MaskValues(mask, entry).grid(head, np.arange(sizes.queries), np.arange(sizes.keys))


def _stacked(lists: Sequence[BlockLists]) -> dict[str, npt.NDArray[Any]]:
    """The lists of batch entries as one, each mask once."""
    masks: dict[bytes, int] = {}
    arrays: dict[str, list[npt.NDArray[Any]]] = {}
    for each in lists:
        number = np.array([masks.setdefault(mask.tobytes(), len(masks)) for mask in each.block_masks] + [-1], np.int32)
        own = {name: getattr(each, name) for name in BlockLists.ARRAYS[:4]}
        own["block_mask_ids"] = number[each.block_mask_ids]
        for name, array in own.items():
            arrays.setdefault(name, []).append(array)
    stacked = {name: _joined(parts, -1 if name == "block_mask_ids" else 0) for name, parts in arrays.items()}
    if not masks:
        del stacked["block_mask_ids"]
        return stacked
    shape = lists[0].block_masks.shape[1:]
    stacked["block_masks"] = np.frombuffer(b"".join(masks), np.uint8).reshape(-1, *shape)
    return stacked


def _joined(parts: Sequence[npt.NDArray[Any]], nothing: int) -> npt.NDArray[Any]:
    """Arrays one after the other, their last axis filled up to the longest where it holds slots."""
    if parts[0].ndim < 4:
        return np.concatenate(parts)
    width = max(part.shape[-1] for part in parts)
    fill = [np.pad(part, [(0, 0)] * 3 + [(0, width - part.shape[-1])], constant_values=nothing) for part in parts]
    return np.concatenate(fill)


def _own_lists(call: Call, open_length: bool, score: ScoreParts) -> FrozenLists:
    """The lists of a BlockMask as they are, with masks where its mask_mod hides some pairs of a partial block."""
    if open_length:
        raise ExportFailed(
            f"{call.layer}: its BlockMask has block lists of its own, for {call.sizes.queries} queries and "
            f"{call.sizes.keys} keys; allowed: that length; next step: {_FIX}"
        )
    if call.mask_reads_inputs or call.score_reads_inputs or score.hides:
        raise ExportFailed(
            f"{call.layer}: its BlockMask has block lists of its own, and pairs are hidden besides by the inputs or by "
            "the score_mod; allowed: lists with a mask_mod of constants; next step: create_block_mask"
        )
    tall, wide = call.block_size
    mask = call.lists
    arrays = {name: getattr(mask, name) for name in BlockLists.ARRAYS[:4]}
    arrays = {name: None if tensor is None else tensor.numpy().astype(np.int32) for name, tensor in arrays.items()}
    counts, indices = arrays["kv_num_blocks"], arrays["kv_indices"]
    if arrays["full_kv_num_blocks"] is None:
        arrays["full_kv_num_blocks"] = np.zeros_like(counts)
        arrays["full_kv_indices"] = np.zeros((*counts.shape, 0), np.int32)
    ids = np.full(indices.shape, -1, np.int32)
    masks: dict[bytes, int] = {}
    for b, h, row in np.ndindex(counts.shape):
        for slot in range(counts[b, h, row]):
            query, key = row * tall + np.arange(tall), indices[b, h, row, slot] * wide + np.arange(wide)
            query, key = np.minimum(query, call.sizes.queries - 1), np.minimum(key, call.sizes.keys - 1)
            seen = MaskValues(call.mask_mod, b).grid(h, query, key)
            if not seen.all():
                packed = np.packbits(seen, axis=-1, bitorder="little").tobytes()
                ids[b, h, row, slot] = masks.setdefault(packed, len(masks))
    if masks:
        arrays["block_mask_ids"] = ids
        arrays["block_masks"] = np.frombuffer(b"".join(masks), np.uint8).reshape(-1, tall, -(-wide // 8))
    return FrozenLists(arrays, call.sizes.queries, call.sizes.keys, (tall, wide))
