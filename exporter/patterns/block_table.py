"""Block lists for every length at once: a finite table of the blocks that a pattern can show.

A pattern with a `Structure`, or with one on each side of some lengths (`regimes`), has finitely many kinds of blocks:
what a block holds depends on which of the first blocks it stands in, on its row's and column's number modulo the
period, on the distance between the two up to where all are alike, and on which of the last blocks it is. `BlockTable`
numbers these kinds (`BlockKinds`), enumerates the pattern at lengths that show each of them, and keeps what a block of
each kind is listed as. The lists of any length are then arithmetic on row and column numbers, one look-up, and a sort:
`BlockTable.lists` in numpy, and `block_table_torch.traced_lists` in torch operations, which trace with an open length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest
from .base import Pattern
from .block_lists import BlockLists, check_sizes
from .lengths import Integers, Interval, Lengths, Structure
from .regimes import common_structure, limits_of, rules_of

UNLISTED = -2
"""Entry of a kind of block that is not listed."""

FULL = -1
"""Entry of a kind of block that is listed whole; entries from 0 on are numbers of masks."""

_UNSEEN = -3
_MEMBERS = 2
_STRIP = 1 << 21
_LARGEST_TABLE = 1 << 21
_LARGEST_TEXT = 1 << 10
_LARGEST_CHECK = 1 << 23


@dataclass(frozen=True)
class BlockKinds:
    """How blocks of one size are numbered by kind.

    Attributes:
        size: Tokens in a block, of queries as of keys.
        head: Blocks at the start of the text that are unlike others.
        period: Blocks after which the others repeat.
        near: Distance in blocks from which on all distances of one sign are alike.
        tail: Blocks at the end of the text that are unlike others; 0 where the length enters nowhere.
        unit: Tokens that the text's length is rounded up to, before the tail is counted from it.
        limits: Lengths in tokens, ascending, beyond each of which blocks are of other kinds.
    """

    size: int
    head: int
    period: int
    near: int
    tail: int
    unit: int
    limits: tuple[int, ...] = ()

    @classmethod
    def of(cls, structure: Structure, size: int, limits: tuple[int, ...] = ()) -> BlockKinds:
        """The kinds of blocks of `size` tokens that a structure of tokens leaves on each side of the limits."""
        # Blocks at distance d hold token distances from (d - 1)·size + 1 on.
        near = -(-(structure.near - 1) // size) + 1 if structure.near else 0
        # The end of the text may lie anywhere in its block that a common divisor of unit and size allows.
        tail = -(-(structure.tail + size - math.gcd(structure.tail_unit, size)) // size) if structure.tail else 0
        period = structure.period // math.gcd(structure.period, size)
        return cls(size, -(-structure.head // size), period, near, tail, structure.tail_unit if tail else 1, limits)

    @property
    def phases(self) -> int:
        """Places in its block where the text may end, as far as that matters."""
        return self.size // math.gcd(self.unit, self.size) if self.tail else 1

    @property
    def places(self) -> int:
        """Kinds of rows, which are those of columns."""
        return (self.head + 1) * self.period * (self.tail + 1)

    @property
    def distances(self) -> int:
        """Kinds of distances between a row and a column."""
        return 2 * self.near + 1

    @property
    def count_each(self) -> int:
        """Kinds of blocks between two limits; some of the numbers stand for kinds that no length has."""
        return self.phases * self.places**2 * self.distances

    @property
    def count(self) -> int:
        """Kinds of blocks in all."""
        return self.count_each * (len(self.limits) + 1)

    @property
    def longest(self) -> int:
        """Blocks of a text that, with all shorter ones, shows every kind that one rule has, and rows with all of them.

        Take a row of a longer text. Of the columns before it, near it on both sides, and after it, those beyond `head`,
        `near` and `tail` can be left out, a period at a time, without changing the kinds of the others.
        """
        cut = math.lcm(self.period * self.size, self.unit) // self.size if self.tail else self.period
        return self.head + 2 * self.near + self.tail + 2 * self.period + cut + 1

    def texts(self, rule: int) -> Iterator[Lengths]:
        """Lengths that show every kind of block of a rule, from short to long, as far as the rule holds."""
        end, step = self.longest * self.size, self.unit if self.tail else self.size
        if rule < len(self.limits):
            # Rounded up, so that the text ends as its blocks are numbered.
            end = min(end, -(-self.limits[rule] // step) * step)
        for length in range(step, end + 1, step) if self.tail else (end,):
            yield Lengths.of(length)

    def numbers(self, lengths: Lengths, rule: int | None = None) -> Integers:
        """int64 (rows, columns), the kind of each block of a text.

        Args:
            lengths: The text.
            rule: Between which limits it is; None is where it lies.
        """
        if rule is None:
            rule = sum(lengths.text > limit for limit in self.limits)
        text = -(-lengths.text // self.unit) * self.unit
        blocks = -(-text // self.size)
        phase = (blocks * self.size - text) // (self.size // self.phases)
        row = self._place(np.arange(-(-lengths.seq_q // self.size)), blocks)[:, None]
        column = self._place(np.arange(-(-lengths.seq_k // self.size)), blocks)[None, :]
        between = np.arange(column.shape[1])[None, :] - np.arange(row.shape[0])[:, None]
        pair = ((rule * self.phases + phase) * self.places + row) * self.places + column
        number: Integers = pair * self.distances + np.clip(between, -self.near, self.near) + self.near
        return number

    def _place(self, block: Integers, blocks: int) -> Integers:
        place: Integers = np.minimum(block, self.head) * self.period + block % self.period
        return place * (self.tail + 1) + np.minimum(blocks - 1 - block, self.tail)


@dataclass(frozen=True)
class Width:
    """Slots that a list needs at any length.

    Attributes:
        period: Columns after which blocks far from the row repeat.
        listings: Listings of one such period; 0 bounds the list whatever the length.
        more: Slots beyond those of all periods.
    """

    period: int
    listings: int
    more: int

    def slots(self, columns: int) -> int:
        """Slots for `columns` blocks of keys, which may be symbolic."""
        periods = (columns + self.period - 1) // self.period
        # A bounded width is no function of a symbolic number.
        return periods * self.listings + self.more if self.listings else self.more


@dataclass(frozen=True, eq=False)
class BlockTable:
    """The block lists of a pattern at every length; `block_table` makes it.

    Attributes:
        pattern: The pattern.
        kinds: How blocks are numbered.
        entries: int32 (P, kinds, L): what a block of each kind is listed as, for each different pattern of a head;
            `UNLISTED`, `FULL`, or the number of a mask. Its t-th entry is its t-th listing.
        head_entries: For each of the pattern's heads, which of the P is its.
        masks: uint8 (M, size, ceil(size / 8)), the masks as BlockSparseAttention takes them.
        partial: Slots of the list of partial blocks.
        full: Slots of the list of full blocks.
    """

    pattern: Pattern
    kinds: BlockKinds
    entries: npt.NDArray[np.int32]
    head_entries: tuple[int, ...]
    masks: npt.NDArray[np.uint8]
    partial: Width
    full: Width

    def lists(self, lengths: Lengths, heads: int | None = None) -> BlockLists:
        """The block lists of one length, of `heads` query heads; one list where all heads are alike.

        In the last row and column a block may be partial that `enumerate_lists` finds full, because the keys that its
        mask hides do not exist. Otherwise the two differ in the numbers of masks and in free slots.

        Raises:
            InvalidRequest: queries do not begin at position 0.
        """
        if lengths.offset:
            raise InvalidRequest(f"a block table is for queries from position 0 on, not {lengths.offset}")
        found = self.entries[:, self.kinds.numbers(lengths)]
        if (found == _UNSEEN).any():
            raise AssertionError(f"{self.pattern}: {lengths} shows a kind of block that no shorter text did")
        counts, blocks, ids = _slots(found, found >= 0, self.partial)
        full_counts, full_blocks, _ = _slots(found, found == FULL, self.full)
        order = list(self.entries_of(heads))
        return BlockLists(
            lengths,
            self.kinds.size,
            self.kinds.size,
            counts[None, order],
            blocks[None, order],
            full_counts[None, order],
            full_blocks[None, order],
            ids[None, order],
            self.masks,
        )

    def entries_of(self, heads: int | None = None) -> tuple[int, ...]:
        """Which of the P entries each head's lists come from; one where all heads are alike."""
        if len(self.head_entries) == 1:
            return self.head_entries
        count = len(self.head_entries) if heads is None else heads
        return tuple(self.head_entries[head % len(self.head_entries)] for head in range(count))


def _slots(
    found: npt.NDArray[np.int32], listed: npt.NDArray[np.bool_], width: Width
) -> tuple[npt.NDArray[np.int32], ...]:
    """Counts (P, rows), and blocks and entries (P, rows, slots), of those entries (P, rows, columns, L) listed."""
    patterns, rows, columns, levels = found.shape
    flat = listed.reshape(patterns, rows, columns * levels)
    counts = flat.sum(-1, dtype=np.int32)
    slots = np.arange(width.slots(columns) if columns else 0)
    # Stable: what is listed comes first, in the order of its block and level.
    place = np.argsort(~flat, axis=-1, kind="stable")[..., np.minimum(slots, columns * levels - 1)]
    read = slots < counts[..., None]
    blocks = np.where(read, place // levels, 0).astype(np.int32)
    entries = np.take_along_axis(found.reshape(flat.shape), place, -1)
    return counts, blocks, np.where(read, entries, -1).astype(np.int32)


@functools.lru_cache(maxsize=64)
def block_table(pattern: Pattern, size: int) -> BlockTable:
    """The table of a pattern in blocks of `size` tokens, proved and checked.

    All enumerated blocks of a kind must be listed alike, and at some longer and shorter lengths the table must say what
    the pattern says of every pair.

    Raises:
        InvalidRequest: the pattern has no such table, one that is too large, or a `structure` that is wrong; the
            message says why.
    """
    check_sizes(size, size)
    kinds = block_kinds(pattern, size)
    by_head = pattern.by_head()
    different = list(dict.fromkeys(by_head))
    masks: dict[bytes, int] = {}
    found = [_entries(each, kinds, masks) for each in different]
    levels = max(each.shape[1] for each in found)
    entries = np.stack([_deepened(each, levels) for each in found])
    packed = np.frombuffer(b"".join(masks), np.uint8).reshape(len(masks), size, -(-size // 8))
    head_entries = tuple(different.index(each) for each in by_head) if len(different) > 1 else (0,)
    widths = _width(entries >= 0, kinds), _width(entries == FULL, kinds)
    table = BlockTable(pattern, kinds, entries, head_entries, packed, *widths)
    for entry, each in zip(entries, different, strict=True):
        _check(each, entry, kinds, packed)
    return table


def block_kinds(pattern: Pattern, size: int) -> BlockKinds:
    """The kinds of blocks that a `block_table` has; cheap, unlike the table.

    Raises:
        InvalidRequest: there is no table, or one that is too large; the message says why.
    """
    structure = common_structure(pattern)
    if structure is None:
        raise InvalidRequest(
            f"{_named(pattern)}: its block lists cannot be computed where the length is open: they follow no rule "
            "that holds at every length (drawn at random, given pair by pair, or counted from two different ends); "
            "next step: fix the sequence length (dynamic_shapes without a Dim for it)"
        )
    kinds = BlockKinds.of(structure, size, limits_of(pattern))
    if kinds.count > _LARGEST_TABLE or kinds.longest > _LARGEST_TEXT:
        raise InvalidRequest(
            f"{_named(pattern)}: blocks of {size} are of {kinds.count:,} kinds, seen in texts of {kinds.longest:,} "
            f"blocks; allowed: {_LARGEST_TABLE:,} kinds and {_LARGEST_TEXT:,} blocks. The pattern repeats after "
            f"{structure.period} tokens, and distances matter up to {structure.near}; next step: a larger block size, "
            "one that divides the period, or a fixed sequence length"
        )
    return kinds


def _entries(pattern: Pattern, kinds: BlockKinds, masks: dict[bytes, int]) -> npt.NDArray[np.int32]:
    """int32 (kinds, L) of a pattern whose heads are alike; numbers of new masks are added to `masks`."""
    entries = np.full((kinds.count, 1), _UNSEEN, np.int32)
    members = np.zeros(kinds.count, np.int64)
    rules = rules_of(pattern, kinds.limits)
    texts = [(rule, lengths) for rule in range(len(rules)) for lengths in kinds.texts(rule)]
    for rule, lengths in texts:
        own = rules[rule]
        numbers = kinds.numbers(lengths, rule)
        rows, columns = np.nonzero(members[numbers] < _MEMBERS)
        step = max(1, _STRIP // kinds.size**2)
        for first in range(0, len(rows), step):
            row, column = rows[first : first + step], columns[first : first + step]
            number = numbers[row, column]
            found = _listings(own, row, column, lengths, kinds.size, masks)
            levels = max(entries.shape[1], found.shape[1])
            entries, found = _deepened(entries, levels), _deepened(found, levels)
            new = entries[number, 0] == _UNSEEN
            entries[number[new]] = found[new]
            unlike = np.flatnonzero((entries[number] != found).any(1))
            if len(unlike):
                raise InvalidRequest(
                    f"{_named(pattern)}: its structure, {own.structure}, makes block row {row[unlike[0]]}, column "
                    f"{column[unlike[0]]} of {lengths.seq_k} tokens equal to another that it differs from; next step: "
                    "correct the pattern's _depends_on"
                )
            np.add.at(members, number, 1)
    return entries


def _deepened(entries: npt.NDArray[np.int32], levels: int) -> npt.NDArray[np.int32]:
    return np.pad(entries, ((0, 0), (0, levels - entries.shape[1])), constant_values=UNLISTED)


def _listings(
    pattern: Pattern, row: Integers, column: Integers, lengths: Lengths, size: int, masks: dict[bytes, int]
) -> npt.NDArray[np.int32]:
    """int32 (blocks, L), what each block is listed as; those that bounds tell are not enumerated."""
    first, text = (row * size, column * size), lengths.text
    query, key = (Interval(each, np.minimum(each + size, text) - 1) for each in first)
    lower, upper = pattern.bounds(query, key, lengths)
    level = np.arange(1, int(upper.max(initial=1)) + 1)
    listings = np.where(level <= lower[:, None], FULL, UNLISTED).astype(np.int32)
    (open_,) = np.nonzero(lower != upper)
    token = np.arange(size)
    queries, keys = first[0][open_, None, None] + token[:, None], first[1][open_, None, None] + token
    exists = (queries < text) & (keys < text)
    counts = np.where(exists, pattern.multiplicity(queries, keys, lengths), 0)
    for each in level:
        seen = counts >= each
        some, full = seen.any((1, 2)), (seen | ~exists).all((1, 2))
        listings[open_, each - 1] = np.where(full, FULL, UNLISTED)
        partial = np.flatnonzero(some & ~full)
        packed = np.packbits(seen[partial], axis=-1, bitorder="little")
        listings[open_[partial], each - 1] = [masks.setdefault(mask.tobytes(), len(masks)) for mask in packed]
    return listings


def _width(listed: npt.NDArray[np.bool_], kinds: BlockKinds) -> Width:
    """Slots for those entries (P, kinds, L) that are in one list."""
    counts = listed.sum(-1)
    # Of the kinds, those of columns that are neither near, nor at the start, nor at the end.
    rules = len(kinds.limits) + 1
    shape = (len(counts) * rules * kinds.phases * kinds.places, kinds.head + 1, kinds.period, kinds.tail + 1, -1)
    far = counts.reshape(shape)[:, -1, :, -1][..., [0, -1]].reshape(len(counts), rules, -1, kinds.period, 2).sum(3)
    # A rule for short texts lists no more than what its texts, all of which are looked at below, need.
    grows = [*(limit > kinds.longest * kinds.size for limit in kinds.limits), True]
    listings = int(far[:, grows].max(initial=0))
    more = 0
    for rule in range(rules):
        for lengths in kinds.texts(rule):
            numbers = kinds.numbers(lengths, rule)
            needed = counts[:, numbers].cumsum(-1)
            periods = -(-np.arange(1, numbers.shape[1] + 1) // kinds.period)
            more = max(more, int((needed - listings * periods).max(initial=0)))
    return Width(kinds.period, listings, more)


def _check(pattern: Pattern, entries: npt.NDArray[np.int32], kinds: BlockKinds, packed: npt.NDArray[np.uint8]) -> None:
    """Compare entries with the pattern, pair by pair, at lengths that they were not taken from."""
    size = kinds.size
    unlisted_full = np.stack([np.zeros((size, size), np.uint8), np.ones((size, size), np.uint8)])
    tiles = np.concatenate([unlisted_full, np.unpackbits(packed, axis=-1, count=size, bitorder="little")])
    long = kinds.longest * size
    around = (edge for limit in kinds.limits for edge in (limit, limit + 1))
    for length in (1, size + 1, *around, long + size // 2 + 1, long + kinds.unit):
        if not 0 < length**2 <= _LARGEST_CHECK:
            continue
        lengths = Lengths.of(length)
        blocks = tiles[entries[kinds.numbers(lengths)] + 2].sum(2, dtype=np.int32)
        rows, columns = blocks.shape[:2]
        counts = blocks.swapaxes(1, 2).reshape(rows * size, columns * size)[:length, :length]
        if not np.array_equal(counts, pattern.dense(lengths)[0]):
            raise InvalidRequest(
                f"{_named(pattern)}: its structure, {common_structure(pattern)}, does not say what it counts in "
                f"{length} tokens; next step: correct the pattern's _depends_on"
            )


def _named(pattern: Pattern) -> str:
    words = pattern.describe()
    return words if len(words) <= 120 else words[:119] + "…"
