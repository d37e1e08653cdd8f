"""Block lists from block coordinates: only blocks that are neither known to be empty nor to be full are looked into.

Three savings, none of which changes a bit of the result. `Pattern.bounds` decides most blocks without enumerating them.
Of the others, those that `Pattern.structure` promises to be alike are enumerated once. Heads with equal patterns are
done once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .base import Pattern
from .block_lists import NO_WIDTHS, BlockLists, Listings, Widths, check_sizes, heads_of
from .lengths import Integers, Interval, Lengths

_STRIP = 1 << 20
"""Blocks that are decided at once."""

_CHUNK = 1 << 22
"""Pairs that are enumerated at once."""

_FULL, _NOTHING = -1, -2


def build_lists(
    pattern: Pattern,
    lengths: Lengths,
    q_block_size: int = 128,
    kv_block_size: int = 128,
    *,
    heads: int | None = None,
    widths: Widths = NO_WIDTHS,
) -> BlockLists:
    """Make the block lists of a pattern.

    Args:
        pattern: The pattern.
        lengths: For which lengths; row r of blocks begins at position ``offset + r · q_block_size``.
        q_block_size: Queries in a row of blocks.
        kv_block_size: Keys in a block.
        heads: Query heads; needed where the pattern has fewer, and heads differ.
        widths: Slots of the lists.

    Raises:
        InvalidRequest: sizes are out of range, the widths too small, or the pattern is for other lengths.
    """
    check_sizes(q_block_size, kv_block_size)
    grid = _Grid(lengths, q_block_size, kv_block_size)
    patterns = heads_of(pattern, heads)
    listings = Listings(lengths, q_block_size, kv_block_size, len(patterns))
    of_pattern: dict[Pattern, list[int]] = {}
    for head, own in enumerate(patterns):
        of_pattern.setdefault(own, []).append(head)
    for own, alike in of_pattern.items():
        _list(own, grid, alike, listings)
    return listings.lists(widths)


@dataclass(frozen=True)
class _Grid:
    """The blocks of one pair of lengths.

    Attributes:
        lengths: The lengths.
        size_q: Queries in a row of blocks.
        size_k: Keys in a block.
    """

    lengths: Lengths
    size_q: int
    size_k: int

    def rows(self, row: Integers) -> Interval:
        """Positions of the queries in rows of blocks."""
        first = self.lengths.offset + row * self.size_q
        return Interval(first, np.minimum(first + self.size_q, self.lengths.offset + self.lengths.seq_q) - 1)

    def columns(self, block: Integers) -> Interval:
        """Positions of the keys in blocks."""
        first = block * self.size_k
        return Interval(first, np.minimum(first + self.size_k, self.lengths.seq_k) - 1)


def _list(pattern: Pattern, grid: _Grid, heads: list[int], listings: Listings) -> None:
    """Add the listings of one pattern for the heads that have it."""
    rows, columns = -(-grid.lengths.seq_q // grid.size_q), -(-grid.lengths.seq_k // grid.size_k)
    if not columns:
        return
    block = np.arange(columns)[None, :]
    strip = max(1, _STRIP // columns)
    if pattern.structure is None:
        # Patterns without a rule look at every pair of a strip to bound it.
        strip = max(1, min(strip, _CHUNK // (grid.size_q * grid.lengths.seq_k)))
    for first in range(0, rows, strip):
        row = np.arange(first, min(rows, first + strip))[:, None]
        lower, upper = pattern.bounds(grid.rows(row), grid.columns(block), grid.lengths)
        for level in range(1, int(lower.max()) + 1):
            r, c = np.nonzero((lower == upper) & (lower >= level))
            for head in heads:
                listings.add(head, first + r, c, level, _FULL)
        r, c = np.nonzero(lower < upper)
        if not len(r):
            continue
        example, kind = _alike(pattern, grid, first + r, c)
        table = _looked_into(pattern, grid, first + r[example], c[example], listings)
        for level in range(table.shape[1]):
            mask = table[kind, level]
            listed = mask != _NOTHING
            for head in heads:
                listings.add(head, first + r[listed], c[listed], level + 1, mask[listed])


def _alike(pattern: Pattern, grid: _Grid, row: Integers, block: Integers) -> tuple[Integers, Integers]:
    """One block of each kind, and the kind of each block, by what the pattern says that it depends on."""
    structure = pattern.structure
    if structure is None:
        everyone = np.arange(len(row))
        return everyone, everyone
    queries, keys = grid.rows(row), grid.columns(block)
    q, k = queries.first, keys.first
    end = -(-grid.lengths.text // structure.tail_unit) * structure.tail_unit
    # Beyond the clamped distances, every pair of the block is farther than `near`.
    distance = np.clip(k - q, 1 - grid.size_k - structure.near, grid.size_q - 1 + structure.near)
    code = np.zeros(len(row), np.int64)
    for part in (
        q % structure.period,
        k % structure.period,
        distance,
        np.minimum(q, structure.head),
        np.minimum(k, structure.head),
        np.minimum(end - grid.size_q - q, structure.tail),
        np.minimum(end - grid.size_k - k, structure.tail),
        # The last blocks may be cut off, and what is cut off does not decide whether they are full.
        queries.last - q,
        keys.last - k,
    ):
        values, number = np.unique(part, return_inverse=True)
        # Numbered anew each time, so that the code stays below blocks · values.
        code = np.unique(code * len(values) + number, return_inverse=True)[1]
    _, example, kind = np.unique(code, return_index=True, return_inverse=True)
    return example, kind


def _looked_into(pattern: Pattern, grid: _Grid, row: Integers, block: Integers, listings: Listings) -> Integers:
    """Enumerate blocks.

    Returns:
        int64 (blocks, largest multiplicity), for each listing the number of its mask, `_FULL` or `_NOTHING`.
    """
    found: list[list[int]] = []
    queries, keys = grid.rows(row), grid.columns(block)
    chunk = max(1, _CHUNK // (grid.size_q * grid.size_k))
    across, down = np.arange(grid.size_k)[None, None, :], np.arange(grid.size_q)[None, :, None]
    for first in range(0, len(row), chunk):
        part = slice(first, first + chunk)
        q = queries.first[part, None, None] + down
        k = keys.first[part, None, None] + across
        counts = pattern.multiplicity(q, k, grid.lengths)
        inside = (q <= queries.last[part, None, None]) & (k <= keys.last[part, None, None])
        least = np.where(inside, counts, np.iinfo(np.int32).max).min((1, 2))
        most = np.where(inside, counts, 0).max((1, 2))
        found += [
            [_FULL if level <= low else listings.mask(own >= level) for level in range(1, high + 1)]
            for own, low, high in zip(counts, least.tolist(), most.tolist(), strict=True)
        ]
    width = max(map(len, found), default=0)
    return np.array([own + [_NOTHING] * (width - len(own)) for own in found], np.int64).reshape(len(found), width)
