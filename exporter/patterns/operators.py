"""Patterns made of patterns."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import InvalidRequest
from .base import Bounds, Counts, Pattern, counts_of, some_patterns, whole
from .lengths import Integers, Interval, Lengths, Structure


class _Composite(Pattern):
    """A pattern made of others, all of which matter wherever it is asked about."""

    def _with(self, parts: tuple[Pattern, ...]) -> Pattern:
        raise NotImplementedError

    def head(self, index: int) -> Pattern:
        return self if self.heads == 1 else self._with(tuple(part.head(index) for part in self.parts))

    def _depends_on(self) -> Structure | None:
        joined: Structure | None = Structure()
        for part in self.parts:
            own = part.structure
            joined = None if own is None or joined is None else joined.joined(own)
        return joined

    def _special_lengths(self) -> Iterable[int]:
        return (threshold for part in self.parts for threshold in part.thresholds)


@dataclass(frozen=True)
class _Operator(_Composite):
    """An associative operator of patterns.

    Attributes:
        of: The operands.
    """

    of: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", tuple(self.of))
        some_patterns(type(self).__name__, self.of)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return self.of

    def _with(self, parts: tuple[Pattern, ...]) -> Pattern:
        return type(self)(parts)

    def _combined(self, one: Counts, other: Counts) -> Counts:
        raise NotImplementedError

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return functools.reduce(self._combined, (part.multiplicity(query, key, lengths) for part in self.of))

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        # Each operator grows with either operand, so it maps bounds to bounds.
        lower, upper = zip(*(part.bounds(rows, keys, lengths) for part in self.of), strict=True)
        return functools.reduce(self._combined, lower), functools.reduce(self._combined, upper)


@dataclass(frozen=True)
class Union(_Operator):
    """The larger of the operands' multiplicities: ``A | B``."""

    def _combined(self, one: Counts, other: Counts) -> Counts:
        return np.maximum(one, other)

    def _words(self) -> str:
        return " or ".join(_in_brackets(part) for part in self.of)


@dataclass(frozen=True)
class Intersection(_Operator):
    """The smaller of the operands' multiplicities: ``A & B``."""

    def _combined(self, one: Counts, other: Counts) -> Counts:
        return np.minimum(one, other)

    def _words(self) -> str:
        return " and ".join(_in_brackets(part) for part in self.of)


@dataclass(frozen=True)
class Sum(_Operator):
    """The sum of the operands' multiplicities: ``A + B``."""

    def _combined(self, one: Counts, other: Counts) -> Counts:
        return one + other

    def _words(self) -> str:
        return " plus ".join(_in_brackets(part) for part in self.of)


@dataclass(frozen=True)
class Repeated(_Composite):
    """What `of` counts, `times` as often: ``A * times``.

    Attributes:
        of: The pattern.
        times: 0 or more.
    """

    of: Pattern
    times: int

    def __post_init__(self) -> None:
        whole("Repeated", "times", self.times, 0)
        some_patterns("Repeated", self.parts)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The pattern that is repeated."""
        return (self.of,)

    def _with(self, parts: tuple[Pattern, ...]) -> Pattern:
        return Repeated(parts[0], self.times)

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return self.of.multiplicity(query, key, lengths) * np.int32(self.times)

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        lower, upper = self.of.bounds(rows, keys, lengths)
        return lower * np.int32(self.times), upper * np.int32(self.times)

    def _words(self) -> str:
        return f"{self.times} times {_in_brackets(self.of)}"


@dataclass(frozen=True)
class Not(_Composite):
    """Once every pair that `of` does not count: ``~A``.

    Attributes:
        of: The pattern.
    """

    of: Pattern

    def __post_init__(self) -> None:
        some_patterns("Not", self.parts)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The pattern that is turned round."""
        return (self.of,)

    def _with(self, parts: tuple[Pattern, ...]) -> Pattern:
        return Not(parts[0])

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return counts_of(self.of.multiplicity(query, key, lengths) == 0)

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        lower, upper = self.of.bounds(rows, keys, lengths)
        return counts_of(upper == 0), counts_of(lower == 0)

    def _words(self) -> str:
        return f"not {_in_brackets(self.of)}"


@dataclass(frozen=True)
class Blocked(_Composite):
    """A pattern of blocks: queries and keys of `size` tokens each see each other as those of `of` do.

    Blocks are counted from position 0; the last block of a text may be shorter.

    Attributes:
        size: Tokens in a block.
        of: The pattern that block numbers follow; lengths in it are numbers of blocks.
    """

    size: int
    of: Pattern

    def __post_init__(self) -> None:
        whole("Blocked", "size", self.size, 1)
        some_patterns("Blocked", self.parts)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The pattern of block numbers."""
        return (self.of,)

    def _with(self, parts: tuple[Pattern, ...]) -> Pattern:
        return Blocked(self.size, parts[0])

    def _lengths(self, lengths: Lengths) -> Lengths:
        first, end = lengths.offset // self.size, -(-(lengths.offset + lengths.seq_q) // self.size)
        return Lengths(end - first, -(-lengths.seq_k // self.size), first)

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return self.of.multiplicity(query // self.size, key // self.size, self._lengths(lengths))

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        rows, keys = (Interval(each.first // self.size, each.last // self.size) for each in (rows, keys))
        return self.of.bounds(rows, keys, self._lengths(lengths))

    def _depends_on(self) -> Structure | None:
        inner = self.of.structure
        return None if inner is None else inner.scaled(self.size)

    def _special_lengths(self) -> Iterable[int]:
        return (self.size, *(self.size * threshold for threshold in self.of.thresholds))

    def _words(self) -> str:
        return f"blocks of {self.size}: {_in_brackets(self.of)}"


@dataclass(frozen=True)
class Shifted(_Composite):
    """A pattern of the text from position `by` on; the tokens before it count nothing and are counted by none.

    Attributes:
        by: Tokens before the pattern begins.
        of: The pattern; its position 0 is the text's position `by`.
    """

    by: int
    of: Pattern

    def __post_init__(self) -> None:
        whole("Shifted", "by", self.by, 0)
        some_patterns("Shifted", self.parts)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The pattern that is moved."""
        return (self.of,)

    def _with(self, parts: tuple[Pattern, ...]) -> Pattern:
        return Shifted(self.by, parts[0])

    def _lengths(self, lengths: Lengths) -> Lengths:
        first, end = (max(0, position - self.by) for position in (lengths.offset, lengths.offset + lengths.seq_q))
        return Lengths(end - first, max(0, lengths.seq_k - self.by), first)

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        inside = (query >= self.by) & (key >= self.by)
        query, key = np.maximum(query - self.by, 0), np.maximum(key - self.by, 0)
        return self.of.multiplicity(query, key, self._lengths(lengths)) * inside

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        every = (rows.first >= self.by) & (keys.first >= self.by)
        some = (rows.last >= self.by) & (keys.last >= self.by)
        if not some.any():
            return counts_of(some), counts_of(some)
        # A rectangle before the text begins is asked about as if it lay at its beginning, and then not believed.
        inner = self._lengths(lengths)
        rows, keys = (
            Interval(np.maximum(each.first - self.by, 0), np.maximum(each.last - self.by, 0)) for each in (rows, keys)
        )
        lower, upper = self.of.bounds(rows, keys, inner)
        return lower * every, upper * some

    def _depends_on(self) -> Structure | None:
        inner = self.of.structure
        if inner is None or (inner.tail and self.by % inner.tail_unit):
            return None
        return Structure(inner.period, inner.near, self.by + inner.head, inner.tail, inner.tail_unit)

    def _special_lengths(self) -> Iterable[int]:
        return (self.by, *(self.by + threshold for threshold in self.of.thresholds))

    def _words(self) -> str:
        return f"from token {self.by} on: {_in_brackets(self.of)}"


@dataclass(frozen=True)
class PerHead(_Composite):
    """One pattern for each query head; head h takes number ``h % len(of)``.

    Attributes:
        of: The patterns.
    """

    of: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", tuple(self.of))
        some_patterns("PerHead", self.of)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The patterns."""
        return self.of

    @property
    def heads(self) -> int:
        """Query heads after which the pattern repeats; 1 where all heads are alike."""
        if all(part == self.of[0] for part in self.of):
            return self.of[0].heads
        return math.lcm(len(self.of), *(part.heads for part in self.of))

    def head(self, index: int) -> Pattern:
        """The pattern of one query head."""
        return self.of[index % len(self.of)].head(index)

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return self._only().multiplicity(query, key, lengths)

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        return self._only().bounds(rows, keys, lengths)

    def _only(self) -> Pattern:
        if self.heads > 1:
            raise InvalidRequest(
                f"{self.describe()}: heads differ, so there is no one answer for a query and a key; next step: ask the "
                "pattern of each head, pattern.head(h)"
            )
        return self.head(0)

    def _words(self) -> str:
        if self.heads == 1:
            return self.head(0).describe()
        return "; ".join(f"head {index}: {part.describe()}" for index, part in enumerate(self.of))


@dataclass(frozen=True)
class UpTo(_Composite):
    """One pattern for short texts and another for longer ones.

    Attributes:
        limit: Longest text, in tokens, that is short.
        short: The pattern of short texts.
        long: The pattern of the others.
    """

    limit: int
    short: Pattern
    long: Pattern

    def __post_init__(self) -> None:
        whole("UpTo", "limit", self.limit, 0)
        some_patterns("UpTo", self.parts)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The two patterns."""
        return self.short, self.long

    def _with(self, parts: tuple[Pattern, ...]) -> Pattern:
        return UpTo(self.limit, *parts)

    def _of(self, lengths: Lengths) -> Pattern:
        return self.short if lengths.text <= self.limit else self.long

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return self._of(lengths).multiplicity(query, key, lengths)

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        return self._of(lengths).bounds(rows, keys, lengths)

    def _depends_on(self) -> Structure | None:
        # The length itself, which no structure says, unless the two are one.
        return self.short.structure if self.short == self.long else None

    def _special_lengths(self) -> Iterable[int]:
        short = (threshold for threshold in self.short.thresholds if threshold < self.limit)
        return (self.limit, *short, *(threshold for threshold in self.long.thresholds if threshold > self.limit))

    def _words(self) -> str:
        return f"up to {self.limit}, {_in_brackets(self.short)}; beyond, {_in_brackets(self.long)}"


class Derived(Pattern):
    """A pattern that is short for another one."""

    @property
    def expanded(self) -> Pattern:
        """The pattern that it is short for."""
        raise NotImplementedError

    @property
    def heads(self) -> int:
        """Query heads after which the pattern repeats."""
        return self.expanded.heads

    def head(self, index: int) -> Pattern:
        """The pattern of one query head."""
        return self if self.heads == 1 else self.expanded.head(index)

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return self.expanded.multiplicity(query, key, lengths)

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        return self.expanded.bounds(rows, keys, lengths)

    def _depends_on(self) -> Structure | None:
        return self.expanded.structure

    def _special_lengths(self) -> Iterable[int]:
        return self.expanded.thresholds


def _in_brackets(pattern: Pattern) -> str:
    compound = isinstance(pattern, (Union, Intersection, Sum, Repeated, Blocked, Shifted, UpTo)) or pattern.heads > 1
    return f"({pattern.describe()})" if compound else pattern.describe()
