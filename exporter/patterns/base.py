"""What every pattern can do.

A pattern says how often the query at position q counts the key at position k in its softmax: 0 is never, 1 is what
attention usually does, and more than 1 is what BigBird does with its first block.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest
from .lengths import Integers, Interval, Lengths, Structure

if TYPE_CHECKING:
    from ...plugins.attention.operands import Shapes
    from ...plugins.definition import Cost

Counts = npt.NDArray[np.int32]
Bounds = tuple[Counts, Counts]

_STRIP = 1 << 22
"""Pairs that are enumerated at once: 16 MiB of counts."""


class Pattern(abc.ABC):
    """Which keys each query counts, and how often; a value: immutable, comparable, hashable.

    Positions are absolute (`Lengths.queries`, `Lengths.keys`); no pattern knows of batches or padding. ``A | B`` is the
    larger of two multiplicities, ``A & B`` the smaller, ``A + B`` their sum, ``~A`` is 1 where A is 0 and 0 elsewhere,
    and ``A * 3`` counts three times what A counts once.

    A concrete pattern is a frozen dataclass, and has `_count`, `_bound`, `_depends_on`, `_special_lengths`, `_words`.
    """

    kinds: ClassVar[dict[str, type[Pattern]]] = {}
    """Every concrete pattern by the name of its class, which is its ``kind`` in JSON."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.__name__.startswith("_"):
            Pattern.kinds[cls.__name__] = cls

    def multiplicity(self, query: npt.ArrayLike, key: npt.ArrayLike, lengths: Lengths) -> Counts:
        """How often each query counts each key; this is the definition of the pattern.

        Positions beyond the text may be asked about; what is said about them means nothing.

        Args:
            query: Absolute positions of queries.
            key: Positions of keys; the two broadcast.
            lengths: The lengths that the question is about.

        Returns:
            int32 of the broadcast shape.

        Raises:
            InvalidRequest: heads differ (ask each `head`), or the pattern is for other lengths.
        """
        query, key = np.asarray(query, np.int64), np.asarray(key, np.int64)
        counts = self._count(query, key, lengths)
        return np.broadcast_to(counts, np.broadcast_shapes(query.shape, key.shape))

    def allowed(self, query: npt.ArrayLike, key: npt.ArrayLike, lengths: Lengths) -> npt.NDArray[np.bool_]:
        """Whether each query counts each key at all; arguments as for `multiplicity`."""
        return self.multiplicity(query, key, lengths) > 0

    def bounds(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        """Bounds of the multiplicity over rectangles of queries and keys, without enumerating them.

        Where both bounds are equal the rectangle is known; elsewhere it may be constant all the same.

        Args:
            rows: Runs of query positions inside the text.
            keys: Runs of key positions inside the text; shapes broadcast.
            lengths: The lengths that the question is about.

        Returns:
            int32 lower and upper bounds, of the broadcast shape.

        Raises:
            InvalidRequest: as for `multiplicity`.
        """
        shape = np.broadcast_shapes(rows.first.shape, keys.first.shape)
        lower, upper = self._bound(rows, keys, lengths)
        return np.broadcast_to(lower, shape), np.broadcast_to(upper, shape)

    @property
    def structure(self) -> Structure | None:
        """What the pattern depends on where its length is open; None where there is no such finite list."""
        return self._depends_on()

    @property
    def thresholds(self) -> tuple[int, ...]:
        """Lengths in tokens right after which a text shows something that shorter ones do not, ascending."""
        return tuple(sorted({int(length) for length in self._special_lengths() if length > 0}))

    def describe(self) -> str:
        """The pattern in words."""
        return self._words()

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """Patterns that this one is made of."""
        return ()

    @property
    def heads(self) -> int:
        """Query heads after which the pattern repeats; 1 where all heads are alike."""
        return math.lcm(*(part.heads for part in self.parts))

    def head(self, index: int) -> Pattern:
        """The pattern of one query head; its own `heads` is 1."""
        return self

    def by_head(self) -> tuple[Pattern, ...]:
        """The pattern of each of the `heads` heads."""
        return tuple(self.head(index) for index in range(self.heads))

    def dense(self, lengths: Lengths) -> Counts:
        """int32 (heads, seq_q, seq_k), the multiplicity of every pair; for tests and small pictures."""
        return np.concatenate([np.zeros((self.heads, 0, lengths.seq_k), np.int32), *self.strips(lengths)], axis=1)

    def strips(self, lengths: Lengths) -> Iterator[Counts]:
        """Yield int32 (heads, some rows, seq_k) from top to bottom, so that no more than a strip is ever in memory."""
        keys, queries, heads = lengths.keys()[None, :], lengths.queries(), self.by_head()
        rows = max(1, _STRIP // max(1, lengths.seq_k * len(heads)))
        for first in range(0, lengths.seq_q, rows):
            strip = queries[first : first + rows, None]
            yield np.stack([each.multiplicity(strip, keys, lengths) for each in heads])

    def terms(self, lengths: Lengths, heads: int | None = None) -> int:
        """Query-key pairs that the softmaxes of all heads count; a key that is counted twice is two.

        Args:
            lengths: For which lengths.
            heads: Query heads; None is those after which the pattern repeats.
        """
        from .cost import terms

        return terms(self, lengths, heads)

    def density(self, lengths: Lengths) -> float:
        """The share of all query-key pairs that are counted, each once however often; 0 where there are no pairs."""
        from .cost import density

        return density(self, lengths)

    def cost(self, shapes: Shapes, *, offset: int = 0, element_size: int = 4) -> Cost:
        """Work of one execution that computes nothing but what the pattern counts: a floor for every kernel.

        Args:
            shapes: Sizes of the execution.
            offset: Keys that earlier calls left in a cache.
            element_size: Bytes per element.
        """
        from .cost import cost

        return cost(self, shapes, offset=offset, element_size=element_size)

    @abc.abstractmethod
    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        """`multiplicity`, of any shape that broadcasts to the one wanted."""

    @abc.abstractmethod
    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        """`bounds`, of any shapes that broadcast to the one wanted."""

    @abc.abstractmethod
    def _depends_on(self) -> Structure | None:
        """`structure`."""

    @abc.abstractmethod
    def _special_lengths(self) -> Iterable[int]:
        """`thresholds`, in any order, repeated or not."""

    @abc.abstractmethod
    def _words(self) -> str:
        """`describe`."""

    def __or__(self, other: Pattern) -> Pattern:
        from .operators import Union

        return Union(_operands(Union, self, other))

    def __and__(self, other: Pattern) -> Pattern:
        from .operators import Intersection

        return Intersection(_operands(Intersection, self, other))

    def __add__(self, other: Pattern) -> Pattern:
        from .operators import Sum

        return Sum(_operands(Sum, self, other))

    def __mul__(self, times: int) -> Pattern:
        from .operators import Repeated

        return Repeated(self, times)

    __rmul__ = __mul__

    def __invert__(self) -> Pattern:
        from .operators import Not

        return Not(self)

    def __str__(self) -> str:
        return self.describe()


def _operands(kind: type[Any], *patterns: Pattern) -> tuple[Pattern, ...]:
    """The operands of an associative operator, those of the same operator opened."""
    return tuple(part for pattern in patterns for part in (pattern.parts if type(pattern) is kind else (pattern,)))


def counts_of(seen: npt.NDArray[np.bool_]) -> Counts:
    """Once where a pair is seen."""
    return np.asarray(seen).astype(np.int32)


def whole(kind: str, name: str, value: object, least: int) -> None:
    """Check that a field is a whole number of `least` or more.

    Raises:
        InvalidRequest: it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InvalidRequest(f"{kind}: {name} = {value!r}: must be a whole number of {least} or more")


def some_patterns(kind: str, parts: tuple[object, ...]) -> None:
    """Check that a pattern is made of patterns, at least one.

    Raises:
        InvalidRequest: it is not.
    """
    wrong = [part for part in parts if not isinstance(part, Pattern)]
    if wrong or not parts:
        raise InvalidRequest(f"{kind}: must be made of patterns, got {wrong[0]!r}" if wrong else f"{kind}: of nothing")
