"""Block lists of masks that follow no rule: for one length, or for the longest that the mask can be asked about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.nn.attention import flex_attention as flex

from ...patterns import BlockLists, Explicit, Lengths, Pattern, PerHead, build_lists, to_json
from .mask_mods import Grids, MaskValues
from .score_mods import Sizes

_LARGEST_RECORD = 2048
"""Tokens up to which the pattern of frozen lists is recorded beside them."""


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


def frozen_lists(grids: Grids, block_size: tuple[int, int], cut: bool) -> FrozenLists:
    """The lists of all that a mask leaves.

    Args:
        grids: What it leaves.
        block_size: Queries and keys in a block.
        cut: Whether shorter texts may take their beginning.
    """
    _, _, queries, keys = grids.seen.shape
    lengths = Lengths(queries, keys)
    seen = grids.seen[:1] if grids.alike_in_batch else grids.seen
    seen = seen[:, :1] if grids.alike_in_heads else seen
    tall, wide = block_size
    if tall >= flex._LARGE_SPARSE_BLOCK_SIZE:
        tall = wide = flex._DEFAULT_SPARSE_BLOCK_SIZE
    patterns = [_by_head(tuple(Explicit.of(grid) for grid in entry)) for entry in seen]
    lists = [build_lists(pattern, lengths, tall, wide, heads=seen.shape[1]) for pattern in patterns]
    record = to_json(patterns[0]) if len(patterns) == 1 and max(queries, keys) <= _LARGEST_RECORD else ""
    return FrozenLists(_stacked(lists), queries, keys, (tall, wide), cut, record)


def _by_head(patterns: tuple[Pattern, ...]) -> Pattern:
    return patterns[0] if len(patterns) == 1 else PerHead(patterns)


def own_lists(mask: flex.BlockMask, sizes: Sizes) -> FrozenLists:
    """The lists of a BlockMask as they are, with masks where its mask_mod hides some pairs of a partial block."""
    tall, wide = mask.BLOCK_SIZE
    arrays: dict[str, npt.NDArray[Any]] = {
        name: tensor.numpy().astype(np.int32)
        for name in BlockLists.ARRAYS[:4]
        if (tensor := getattr(mask, name)) is not None
    }
    counts, indices = arrays["kv_num_blocks"], arrays["kv_indices"]
    if "full_kv_num_blocks" not in arrays:
        arrays["full_kv_num_blocks"] = np.zeros_like(counts)
        arrays["full_kv_indices"] = np.zeros((*counts.shape, 0), np.int32)
    ids = np.full(indices.shape, -1, np.int32)
    masks: dict[bytes, int] = {}
    for b, h, row in np.ndindex(counts.shape):
        for slot in range(counts[b, h, row]):
            query, key = row * tall + np.arange(tall), indices[b, h, row, slot] * wide + np.arange(wide)
            # Beyond the text nothing is asked, and nothing matters.
            query, key = np.minimum(query, sizes.queries - 1), np.minimum(key, sizes.keys - 1)
            seen = MaskValues(mask.mask_mod, b).grid(h, query, key)
            if not seen.all():
                packed = np.packbits(seen, axis=-1, bitorder="little").tobytes()
                ids[b, h, row, slot] = masks.setdefault(packed, len(masks))
    if masks:
        arrays["block_mask_ids"] = ids
        arrays["block_masks"] = np.frombuffer(b"".join(masks), np.uint8).reshape(-1, tall, -(-wide // 8))
    return FrozenLists(arrays, sizes.queries, sizes.keys, (tall, wide))


def _stacked(lists: Sequence[BlockLists]) -> dict[str, npt.NDArray[Any]]:
    """The lists of batch entries as one, each mask once."""
    masks: dict[bytes, int] = {}
    arrays: dict[str, list[npt.NDArray[Any]]] = {}
    for each in lists:
        numbers = [masks.setdefault(mask.tobytes(), len(masks)) for mask in each.block_masks]
        own = {name: getattr(each, name) for name in BlockLists.ARRAYS[:4]}
        # The last number is found by -1, which stays.
        own["block_mask_ids"] = np.array([*numbers, -1], np.int32)[each.block_mask_ids]
        for name, array in own.items():
            arrays.setdefault(name, []).append(array)
    stacked = {name: _joined(parts, -1 if name == "block_mask_ids" else 0) for name, parts in arrays.items()}
    if not masks:
        del stacked["block_mask_ids"]
        return stacked
    packed = np.frombuffer(b"".join(masks), np.uint8)
    stacked["block_masks"] = packed.reshape(-1, *lists[0].block_masks.shape[1:])
    return stacked


def _joined(parts: Sequence[npt.NDArray[Any]], nothing: int) -> npt.NDArray[Any]:
    """Arrays one after the other, their last axis filled up to the longest where it holds slots."""
    if parts[0].ndim < 4:
        return np.concatenate(parts)
    width = max(part.shape[-1] for part in parts)
    fill = [np.pad(part, [(0, 0)] * 3 + [(0, width - part.shape[-1])], constant_values=nothing) for part in parts]
    return np.concatenate(fill)
