"""The block lists of a `BlockTable` in torch operations, so that a traced graph computes them from its own length.

Written apart from `BlockTable.lists` and tested to be equal to it. Nothing here compares a size with a number, so that
`torch.export` keeps every dimension open; the index arithmetic grows with the square of the number of blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .base import Pattern
from .block_lists import BlockLists
from .block_table import FULL, BlockKinds, BlockTable, Width
from .fast_lists import build_lists
from .lengths import Lengths

_TRACED: weakref.WeakKeyDictionary[Any, dict[Any, dict[str, torch.Tensor]]] = weakref.WeakKeyDictionary()
"""Lists of each trace that is under way, so that a model's layers share them."""


def traced_lists(table: BlockTable, seq_q: int, seq_k: int, heads: int, device: Any) -> dict[str, torch.Tensor]:
    """The list inputs of BlockSparseAttention.

    Within one trace, equal arguments give the same tensors: a model computes its lists once, not once a layer.

    Args:
        table: The pattern.
        seq_q: Queries, at positions from 0 on; may be symbolic.
        seq_k: Keys; may be symbolic.
        heads: Query heads of the attention.
        device: Where the lists are wanted.

    Returns:
        int32 lists by the names of the operator's inputs, with masks where any block needs one; equal to
        ``table.lists(Lengths(seq_q, seq_k), heads)``.
    """
    lengths = tuple(str(length.node.expr) if isinstance(length, torch.SymInt) else length for length in (seq_q, seq_k))
    return _shared((table, lengths, heads, str(device)), lambda: _lists(table, seq_q, seq_k, heads, device))


def constant_lists(pattern: Pattern, lengths: Lengths, size: int, heads: int, device: Any) -> dict[str, torch.Tensor]:
    """The list inputs of BlockSparseAttention for one pair of lengths; a trace that needs them takes them as constants.

    Args:
        pattern: Any pattern.
        lengths: The lengths.
        size: Tokens in a block.
        heads: Query heads of the attention.
        device: Where the lists are wanted.

    Raises:
        InvalidRequest: the pattern is for other lengths.
    """

    def make() -> dict[str, torch.Tensor]:
        lists = _built(pattern, lengths, size, heads).inputs()
        return {name: torch.from_numpy(array).to(device) for name, array in lists.items()}

    return _shared((pattern, lengths, size, heads, str(device)), make)


@functools.lru_cache(maxsize=16)
def _built(pattern: Pattern, lengths: Lengths, size: int, heads: int) -> BlockLists:
    lists = build_lists(pattern, lengths, size, size, heads=heads)
    # torch wants arrays that it may write to.
    return dataclasses.replace(lists, block_masks=lists.block_masks.copy())


def _shared(key: Any, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What `make` returns, once per trace."""
    mode = get_proxy_mode()
    if mode is None:
        return make()
    made = _TRACED.setdefault(mode.tracer, {})
    if key not in made:
        made[key] = make()
    return made[key]


def _lists(table: BlockTable, seq_q: int, seq_k: int, heads: int, device: Any) -> dict[str, torch.Tensor]:
    size = table.kinds.size
    columns = _count(seq_k, size)
    rows = columns if _same(seq_q, seq_k) else _count(seq_q, size)
    numbers = _numbers(table.kinds, rows, columns, torch.sym_max(seq_q, seq_k), device)
    entries = table.entries.swapaxes(1, 2)[list(table.entries_of(heads))]
    found = torch.from_numpy(entries).to(device)[:, :, numbers]
    counts, blocks, ids = _slots(found, found >= 0, table.partial, columns)
    full_counts, full_blocks, _ = _slots(found, found == FULL, table.full, columns)
    lists = {
        "kv_num_blocks": counts,
        "kv_indices": blocks,
        "full_kv_num_blocks": full_counts,
        "full_kv_indices": full_blocks,
    }
    if not len(table.masks):
        return lists
    return {**lists, "block_mask_ids": ids, "block_masks": torch.from_numpy(table.masks.copy()).to(device)}


def _same(one: int, other: int) -> bool:
    """Whether two sizes are equal, as far as is known without a guard."""
    if isinstance(one, torch.SymInt) and isinstance(other, torch.SymInt):
        return bool(one.node.expr == other.node.expr)
    return isinstance(one, int) and isinstance(other, int) and one == other


def _count(length: int, size: int) -> int:
    """Blocks of a text.

    A symbolic number of blocks is made one that torch knows nothing of but a bound: from a quotient it would derive
    guards (``n // 64 != 1``) that not every length fulfils.
    """
    blocks = (length + size - 1) // size
    if isinstance(length, int):
        return blocks
    count: int = torch.scalar_tensor(blocks, dtype=torch.int64).item()
    torch._check(count >= 1)
    return count


def _numbers(kinds: BlockKinds, rows: int, columns: int, text: int, device: Any) -> torch.Tensor:
    """`BlockKinds.numbers`."""
    length, text = text, (text + kinds.unit - 1) // kinds.unit * kinds.unit
    blocks = (text + kinds.size - 1) // kinds.size
    phase = (blocks * kinds.size - text) // (kinds.size // kinds.phases)
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    pair = _place(kinds, row, blocks)[:, None] * kinds.places + _place(kinds, column, blocks)
    if kinds.tail:
        pair = pair + phase * kinds.places**2
    if kinds.near:
        pair = pair * kinds.distances + (column - row[:, None]).clamp(-kinds.near, kinds.near) + kinds.near
    for limit in kinds.limits:
        # The length as a value: as a size, it would be compared while tracing.
        pair = pair + (torch.scalar_tensor(length, dtype=torch.int64, device=device) > limit) * kinds.count_each
    return pair


def _place(kinds: BlockKinds, block: torch.Tensor, blocks: int) -> torch.Tensor:
    place = block.clamp(max=kinds.head) * kinds.period + block % kinds.period
    if not kinds.tail:
        return place
    return place * (kinds.tail + 1) + (blocks - 1 - block).clamp(max=kinds.tail)


def _slots(
    found: torch.Tensor, listed: torch.Tensor, width: Width, columns: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts (1, H, rows), and blocks and entries (1, H, rows, slots), of those of (H, L, rows, columns) listed."""
    levels, device = found.shape[1], found.device
    counts = listed.sum((1, 3), dtype=torch.int32)
    block = torch.arange(columns, device=device)
    total = columns * levels
    # Keys are unique, so that what is listed comes first in the order of its block and level, whoever sorts.
    places = [block * levels + level for level in range(levels)]
    ranked = torch.cat([torch.where(listed[:, each], place, place + total) for each, place in enumerate(places)], -1)
    slots = torch.arange(width.slots(columns), device=device)
    place = ranked.sort(-1).values.index_select(-1, slots.clamp(max=total - 1))
    read = slots < counts[..., None]
    place = torch.where(read, place, 0)
    block, level = place // levels, place % levels
    entries = torch.where(read, torch.cat(found.unbind(1), -1).gather(-1, block + level * columns), -1)
    return counts[None], block.to(torch.int32)[None], entries.to(torch.int32)[None]
