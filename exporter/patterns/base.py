"""What every pattern can do, and how patterns are put together.

A pattern says how often the query at position q counts the key at position k in its softmax: 0 is never, 1 is what
attention usually does, and more than 1 is what BigBird does with its first block. ``A | B`` is the larger of two
numbers, ``A & B`` the smaller, ``A + B`` their sum, ``~A`` is 1 where A is 0 and 0 elsewhere, and ``A * 3`` counts three
times what A counts once.
"""

from __future__ import annotations

import abc
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest
from .lengths import Integers, Interval, Lengths, Structure

Counts = npt.NDArray[np.int32]
Bounds = tuple[Counts, Counts]

_STRIP = 1 << 22
"""Pairs that are enumerated at once: 16 MiB of counts."""


class Pattern(abc.ABC):
    """Which keys each query counts, and how often; a value: immutable, comparable, hashable.

    Positions are absolute (``Lengths.queries``, ``Lengths.keys``); no pattern knows of rows, batches or padding.
    """

    kinds: ClassVar[dict[str, type[Pattern]]] = {}
    """Every concrete pattern by the name of its class, which is its ``kind`` in JSON."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.__name__.startswith("_"):
            Pattern.kinds[cls.__name__] = cls

    @abc.abstractmethod
    def multiplicity(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        """How often each query counts each key; this is the definition of the pattern.

        Positions beyond the text may be asked about; what is said about them means nothing.

        Args:
            query: int64, absolute positions of queries.
            key: int64, positions of keys; the two broadcast.
            lengths: The lengths that the question is about.

        Returns:
            int32 of the broadcast shape.

        Raises:
            InvalidRequest: heads differ (ask each ``head(h)``), or the pattern is for other lengths.
        """

    @abc.abstractmethod
    def bounds(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        """Bounds of the multiplicity over rectangles of queries and keys, without enumerating them.

        Where both bounds are equal the rectangle is known; elsewhere it may still be constant.

        Args:
            rows: Runs of query positions inside the text.
            keys: Runs of key positions inside the text; shapes broadcast.
            lengths: The lengths that the question is about.

        Returns:
            int32 lower and upper bounds, of the broadcast shape.
        """

    @property
    @abc.abstractmethod
    def structure(self) -> Structure | None:
        """What the pattern depends on where its length is open; None where there is no such finite list."""

    @property
    @abc.abstractmethod
    def thresholds(self) -> tuple[int, ...]:
        """Lengths in tokens at or right after which a pattern shows something that shorter texts do not, ascending."""

    @abc.abstractmethod
    def describe(self) -> str:
        """The pattern in words."""

    @property
    def heads(self) -> int:
        """Query heads after which the pattern repeats; 1 where all heads are alike."""
        return math.lcm(*(part.heads for part in self.parts))

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """Patterns that this one is made of."""
        return ()

    def head(self, index: int) -> Pattern:
        """The pattern of one query head."""
        return self

    def allowed(self, query: Integers, key: Integers, lengths: Lengths) -> npt.NDArray[np.bool_]:
        """Whether each query counts each key at all; arguments as for `multiplicity`."""
        return self.multiplicity(query, key, lengths) > 0

    def by_head(self) -> tuple[Pattern, ...]:
        """The pattern of each of the `heads` heads."""
        return tuple(self.head(index) for index in range(self.heads))

    def dense(self, lengths: Lengths) -> Counts:
        """int32 (heads, seq_q, seq_k), the multiplicity of every pair; for tests and small pictures."""
        query, key = lengths.queries()[:, None], lengths.keys()[None, :]
        shape = (lengths.seq_q, lengths.seq_k)
        return np.stack([np.broadcast_to(each.multiplicity(query, key, lengths), shape) for each in self.by_head()])

    def strips(self, lengths: Lengths) -> Iterator[Counts]:
        """Yield int32 (heads, some rows, seq_k) from top to bottom, so that no more than a strip is ever in memory."""
        keys, queries = lengths.keys()[None, :], lengths.queries()
        rows = max(1, _STRIP // max(1, lengths.seq_k * self.heads))
        heads = self.by_head()
        for first in range(0, lengths.seq_q, rows):
            strip = queries[first : first + rows, None]
            shape = (len(strip), lengths.seq_k)
            yield np.stack([np.broadcast_to(each.multiplicity(strip, keys, lengths), shape) for each in heads])

    def __or__(self, other: Pattern) -> Pattern:
        return Union(_flat(Union, self, other))

    def __and__(self, other: Pattern) -> Pattern:
        return Intersection(_flat(Intersection, self, other))

    def __add__(self, other: Pattern) -> Pattern:
        return Sum(_flat(Sum, self, other))

    def __mul__(self, times: int) -> Pattern:
        return Repeated(self, times)

    def __rmul__(self, times: int) -> Pattern:
        return Repeated(self, times)

    def __invert__(self) -> Pattern:
        return Not(self)

    def __str__(self) -> str:
        return self.describe()


def _flat(kind: type[Any], *patterns: Pattern) -> tuple[Pattern, ...]:
    """Operands of one associative operator, nested ones of the same kind opened."""
    return tuple(itertools.chain.from_iterable(p.of if type(p) is kind else (p,) for p in patterns))  # type: ignore[attr-defined]


def counts_of(seen: npt.NDArray[np.bool_]) -> Counts:
    """Whether, as how often."""
    return seen.astype(np.int32)


class _Composite(Pattern):
    """A pattern made of others, all of which matter wherever it is asked about."""

    def _with(self, parts: Iterable[Pattern]) -> Pattern:
        raise NotImplementedError

    def head(self, index: int) -> Pattern:
        return self if self.heads == 1 else self._with(part.head(index) for part in self.parts)

    @property
    def structure(self) -> Structure | None:
        joined: Structure | None = Structure()
        for part in self.parts:
            own = part.structure
            joined = None if own is None or joined is None else joined.joined(own)
        return joined

    @property
    def thresholds(self) -> tuple[int, ...]:
        return tuple(sorted({threshold for part in self.parts for threshold in part.thresholds}))


@dataclass(frozen=True)
class _Operator(_Composite):
    """An associative operator of two or more patterns.

    Attributes:
        of: The operands.
    """

    of: tuple[Pattern, ...]

    _word: ClassVar[str]
    _combine: ClassVar[Callable[[Any, Any], Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", tuple(self.of))
        _some_patterns(type(self).__name__, self.of)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return self.of

    def _with(self, parts: Iterable[Pattern]) -> Pattern:
        return type(self)(tuple(parts))

    def multiplicity(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        combined: Counts = functools.reduce(self._combine, (p.multiplicity(query, key, lengths) for p in self.of))
        return combined

    def bounds(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        # Each operator grows with either operand, so it maps bounds to bounds.
        lower, upper = zip(*(part.bounds(rows, keys, lengths) for part in self.of), strict=True)
        return functools.reduce(self._combine, lower), functools.reduce(self._combine, upper)

    def describe(self) -> str:
        return self._word.join(_in_brackets(part) for part in self.of)


@dataclass(frozen=True)
class Union(_Operator):
    """The larger of the operands' multiplicities: ``A | B``."""

    _word = " ∪ "
    _combine = np.maximum


@dataclass(frozen=True)
class Intersection(_Operator):
    """The smaller of the operands' multiplicities: ``A & B``."""

    _word = " ∩ "
    _combine = np.minimum


@dataclass(frozen=True)
class Sum(_Operator):
    """The sum of the operands' multiplicities: ``A + B``."""

    _word = " + "
    _combine = np.add


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
        _some_patterns("Repeated", self.parts)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return (self.of,)

    def _with(self, parts: Iterable[Pattern]) -> Pattern:
        return Repeated(*parts, self.times)

    def multiplicity(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return self.of.multiplicity(query, key, lengths) * np.int32(self.times)

    def bounds(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        lower, upper = self.of.bounds(rows, keys, lengths)
        return lower * np.int32(self.times), upper * np.int32(self.times)

    def describe(self) -> str:
        return f"{self.times} × {_in_brackets(self.of)}"


@dataclass(frozen=True)
class Not(_Composite):
    """Once every pair that `of` does not count: ``~A``."""

    of: Pattern

    def __post_init__(self) -> None:
        _some_patterns("Not", self.parts)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return (self.of,)

    def _with(self, parts: Iterable[Pattern]) -> Pattern:
        return Not(*parts)

    def multiplicity(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return counts_of(self.of.multiplicity(query, key, lengths) == 0)

    def bounds(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        lower, upper = self.of.bounds(rows, keys, lengths)
        return counts_of(upper == 0), counts_of(lower == 0)

    def describe(self) -> str:
        return f"not {_in_brackets(self.of)}"


@dataclass(frozen=True)
class Blocked(_Composite):
    """A pattern of blocks: queries and keys of `size` tokens each see each other as those of `of` do.

    Blocks are counted from position 0; the last block of a text may be shorter.

    Attributes:
        size: Tokens in a block.
        of: The pattern that block numbers follow; its lengths are numbers of blocks.
    """

    size: int
    of: Pattern

    def __post_init__(self) -> None:
        whole("Blocked", "size", self.size, 1)
        _some_patterns("Blocked", self.parts)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return (self.of,)

    def _with(self, parts: Iterable[Pattern]) -> Pattern:
        return Blocked(self.size, *parts)

    def _lengths(self, lengths: Lengths) -> Lengths:
        first, end = lengths.offset // self.size, -(-(lengths.offset + lengths.seq_q) // self.size)
        return Lengths(end - first, -(-lengths.seq_k // self.size), first)

    def multiplicity(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return self.of.multiplicity(query // self.size, key // self.size, self._lengths(lengths))

    def bounds(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        rows, keys = (Interval(each.first // self.size, each.last // self.size) for each in (rows, keys))
        return self.of.bounds(rows, keys, self._lengths(lengths))

    @property
    def structure(self) -> Structure | None:
        inner = self.of.structure
        return None if inner is None else inner.scaled(self.size)

    @property
    def thresholds(self) -> tuple[int, ...]:
        return tuple(sorted({self.size, *(self.size * threshold for threshold in self.of.thresholds)}))

    def describe(self) -> str:
        return f"blocks of {self.size}: {_in_brackets(self.of)}"


@dataclass(frozen=True)
class PerHead(_Composite):
    """One pattern for each query head; head h takes number ``h % len(of)``.

    Attributes:
        of: The patterns.
    """

    of: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "of", tuple(self.of))
        _some_patterns("PerHead", self.of)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        return self.of

    @property
    def heads(self) -> int:
        if all(part == self.of[0] for part in self.of):
            return self.of[0].heads
        return math.lcm(len(self.of), *(part.heads for part in self.of))

    def head(self, index: int) -> Pattern:
        return self.of[index % len(self.of)].head(index)

    def multiplicity(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return self._only().multiplicity(query, key, lengths)

    def bounds(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        return self._only().bounds(rows, keys, lengths)

    def _only(self) -> Pattern:
        if self.heads > 1:
            raise InvalidRequest(
                f"{self.describe()}: heads differ, so one query counts a key in several ways; next step: ask the pattern "
                "of each head, pattern.head(h)"
            )
        return self.head(0)

    def describe(self) -> str:
        if self.heads == 1:
            return self.head(0).describe()
        return "; ".join(f"head {index}: {part.describe()}" for index, part in enumerate(self.of))


class _Derived(Pattern):
    """A pattern that is short for another one."""

    @property
    @abc.abstractmethod
    def expanded(self) -> Pattern:
        """The pattern that it is short for."""

    @property
    def heads(self) -> int:
        return self.expanded.heads

    def head(self, index: int) -> Pattern:
        return self if self.heads == 1 else self.expanded.head(index)

    def multiplicity(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return self.expanded.multiplicity(query, key, lengths)

    def bounds(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        return self.expanded.bounds(rows, keys, lengths)

    @property
    def structure(self) -> Structure | None:
        return self.expanded.structure

    @property
    def thresholds(self) -> tuple[int, ...]:
        return self.expanded.thresholds


def _in_brackets(pattern: Pattern) -> str:
    words = pattern.describe()
    compound = isinstance(pattern, (_Operator, Repeated, Blocked, PerHead)) and len(words.split()) > 1
    return f"({words})" if compound else words


def _some_patterns(kind: str, parts: tuple[object, ...]) -> None:
    wrong = [part for part in parts if not isinstance(part, Pattern)]
    if wrong or not parts:
        raise InvalidRequest(f"{kind}: is made of patterns, got {wrong[0]!r}" if wrong else f"{kind}: of no patterns")


def whole(kind: str, name: str, value: object, least: int) -> None:
    """Check that a field is a whole number of `least` or more.

    Raises:
        InvalidRequest: it is not.
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise InvalidRequest(f"{kind}: {name} = {value!r}: must be a whole number of {least} or more")
