"""The patterns that all others are made of, and those that are short for a common combination."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import InvalidRequest
from .base import Bounds, Counts, Pattern, counts_of, whole
from .lengths import Integers, Interval, Lengths, Structure
from .operators import Blocked, Derived, PerHead
from .tokens import Tokens


@dataclass(frozen=True)
class Empty(Pattern):
    """No query counts any key."""

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return np.zeros((), np.int32)

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        return np.zeros((), np.int32), np.zeros((), np.int32)

    def _depends_on(self) -> Structure:
        return Structure()

    def _special_lengths(self) -> Iterable[int]:
        return ()

    def _words(self) -> str:
        return "nothing"


@dataclass(frozen=True)
class Window(Pattern):
    """Keys ``q - left·dilation, …, q - dilation, q, q + dilation, …, q + right·dilation`` of query q.

    The band of SlidingWindowAttention. With unbounded sides and a dilation it is the strided pattern of Sparse
    Transformer, and Su's "atrous" attention.

    Attributes:
        left: Keys before the query's own; -1 is no bound.
        right: Keys after the query's own; -1 is no bound.
        dilation: Step between keys, 1 or more.
    """

    left: int
    right: int
    dilation: int = 1

    def __post_init__(self) -> None:
        whole("Window", "left", self.left, -1)
        whole("Window", "right", self.right, -1)
        whole("Window", "dilation", self.dilation, 1)

    @property
    def bounded(self) -> bool:
        """Whether a query sees a limited number of keys."""
        return self.left >= 0 and self.right >= 0

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """Tokens to the farthest key before and after a query; None is no bound."""
        left, right = (None if side < 0 else side * self.dilation for side in (self.left, self.right))
        return left, right

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        distance = key - query
        left, right = self.reach
        seen = np.ones(distance.shape, np.bool_) if self.dilation == 1 else distance % self.dilation == 0
        if left is not None:
            seen &= distance >= -left
        if right is not None:
            seen &= distance <= right
        return counts_of(seen)

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        # Exact: a rectangle holds every distance between its extremes.
        nearest, farthest = keys.first - rows.last, keys.last - rows.first
        left, right = self.reach
        lowest = nearest if left is None else np.maximum(nearest, -left)
        highest = farthest if right is None else np.minimum(farthest, right)
        # Rounded inwards to multiples of the dilation.
        some = -(-lowest // self.dilation) <= highest // self.dilation
        alike = nearest == farthest if self.dilation > 1 else np.True_
        return counts_of(some & (lowest == nearest) & (highest == farthest) & alike), counts_of(some)

    def _depends_on(self) -> Structure:
        near = max((bound + 1 for bound in self.reach if bound is not None), default=0)
        return Structure(period=self.dilation, near=near)

    def _special_lengths(self) -> Iterable[int]:
        # A longer text has a key that is hidden by a bound, or a distance that is a whole dilation.
        return (*(bound + 1 for bound in self.reach if bound is not None), self.dilation if self.dilation > 1 else 0)

    def _words(self) -> str:
        if (self.left, self.right, self.dilation) == (-1, -1, 1):
            return "every key"
        if (self.left, self.right, self.dilation) == (-1, 0, 1):
            return "keys up to the query's own"
        sides = [f"{'all' if size < 0 else size} {side}" for size, side in ((self.left, "left"), (self.right, "right"))]
        step = [f"every {self.dilation} tokens"] if self.dilation > 1 else []
        return f"window of {', '.join(sides + step)}"


class _Stripes(Pattern):
    """Whole rows or columns of the tokens in a set."""

    tokens: Tokens

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, Tokens):
            raise InvalidRequest(f"{type(self).__name__}: tokens = {self.tokens!r}: must be Tokens(…)")

    def _depends_on(self) -> Structure:
        return self.tokens.structure

    def _special_lengths(self) -> Iterable[int]:
        return self.tokens.thresholds


@dataclass(frozen=True)
class Rows(_Stripes):
    """The queries at some positions see every key.

    Attributes:
        tokens: The positions.
    """

    tokens: Tokens

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return counts_of(self.tokens.contain(query, lengths))

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        every, some = self.tokens.bounds(rows, lengths)
        return counts_of(every), counts_of(some)

    def _words(self) -> str:
        return f"rows of tokens {self.tokens.describe()}"


@dataclass(frozen=True)
class Columns(_Stripes):
    """Every query sees the keys at some positions.

    Attributes:
        tokens: The positions.
    """

    tokens: Tokens

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return counts_of(self.tokens.contain(key, lengths))

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        every, some = self.tokens.bounds(keys, lengths)
        return counts_of(every), counts_of(some)

    def _words(self) -> str:
        return f"columns of tokens {self.tokens.describe()}"


@dataclass(frozen=True)
class All(Derived):
    """Every query counts every key once."""

    @property
    def expanded(self) -> Window:
        """A window without bounds."""
        return Window(-1, -1)

    def _words(self) -> str:
        return "every key"


@dataclass(frozen=True)
class Causal(Derived):
    """No query counts a key after its own position."""

    @property
    def expanded(self) -> Window:
        """A window that is bounded on the right only."""
        return Window(-1, 0)

    def _words(self) -> str:
        return "causal"


@dataclass(frozen=True)
class Global(Derived):
    """Tokens that see every key and that every query sees (Longformer, section 3.1; BigBird-ITC, section 2).

    Attributes:
        tokens: Which: `Tokens`, how many at the start of the text, or their positions.
        rows: Whether they see every key.
        columns: Whether every query sees them.
    """

    tokens: Tokens | int | tuple[int, ...]
    rows: bool = True
    columns: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", self.which)

    @property
    def which(self) -> Tokens:
        """The tokens, as a set of positions."""
        if isinstance(self.tokens, Tokens):
            return self.tokens
        return Tokens(first=self.tokens) if isinstance(self.tokens, int) else Tokens(at=tuple(self.tokens))

    @property
    def expanded(self) -> Pattern:
        """Rows, columns, or both."""
        rows, columns = Rows(self.which), Columns(self.which)
        if self.rows and self.columns:
            return rows | columns
        return rows if self.rows else columns if self.columns else Empty()

    def _words(self) -> str:
        if self.rows and self.columns:
            return f"global tokens {self.which.describe()}"
        return self.expanded.describe()


@dataclass(frozen=True)
class Strided(Derived):
    """Keys at distances that are multiples of `stride`, in both directions (Sparse Transformer, section 4.2, A(2)).

    Attributes:
        stride: Tokens, 1 or more.
    """

    stride: int

    def __post_init__(self) -> None:
        whole("Strided", "stride", self.stride, 1)

    @property
    def expanded(self) -> Window:
        """A dilated window without bounds."""
        return Window(-1, -1, self.stride)

    def _words(self) -> str:
        return f"every {self.stride} tokens from the query"


@dataclass(frozen=True)
class Chunked(Derived):
    """Keys in the query's own chunk and in some chunks around it, chunks counted from position 0.

    Attributes:
        size: Tokens in a chunk.
        before: Chunks before the query's own; -1 is no bound.
        after: Chunks after it; -1 is no bound.
    """

    size: int
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        whole("Chunked", "size", self.size, 1)
        whole("Chunked", "before", self.before, -1)
        whole("Chunked", "after", self.after, -1)

    @property
    def expanded(self) -> Blocked:
        """A window of whole blocks."""
        return Blocked(self.size, Window(self.before, self.after))

    def _special_lengths(self) -> Iterable[int]:
        return (self.size, *((side + 1) * self.size for side in (self.before, self.after) if side >= 0))

    def _words(self) -> str:
        around = [
            f"{'all' if count < 0 else count} {side}"
            for count, side in ((self.before, "before"), (self.after, "after"))
            if count
        ]
        return f"chunks of {self.size}{', the own and ' * bool(around)}{' and '.join(around)}"


@dataclass(frozen=True)
class Fixed(Derived):
    """Keys in the query's own block, and the last `summary` of every block (Sparse Transformer, section 4.2).

    Attributes:
        stride: Tokens in a block.
        summary: Keys at the end of each block that all queries see; 0 … stride.
    """

    stride: int
    summary: int = 1

    def __post_init__(self) -> None:
        whole("Fixed", "stride", self.stride, 1)
        whole("Fixed", "summary", self.summary, 0)
        if self.summary > self.stride:
            raise InvalidRequest(f"Fixed: summary = {self.summary}: must be at most the stride, {self.stride}")

    @property
    def expanded(self) -> Pattern:
        """The block, and the columns that summarise it."""
        if not self.summary:
            return Chunked(self.stride)
        summary = tuple(range(self.stride - self.summary, self.stride))
        return Chunked(self.stride) | Columns(Tokens(period=self.stride, residues=summary))

    def _words(self) -> str:
        return f"blocks of {self.stride} and the last {self.summary} of every block"


@dataclass(frozen=True)
class Spans(Derived):
    """Keys of non-zero weight under adaptive spans (Sukhbaatar et al. 2019, section 2.2), in both directions.

    The weight at distance x is ``clamp((ramp + span - x) / ramp, 0, 1)``.

    Attributes:
        spans: Learned span of each query head, in keys; may be fractions.
        ramp: Length of the soft ramp, positive.
    """

    spans: tuple[float, ...]
    ramp: float = 32.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple(float(span) for span in self.spans))
        if not self.spans or not all(math.isfinite(span) for span in self.spans):
            raise InvalidRequest(f"Spans: spans = {self.spans}: takes one finite number per head")
        if not (math.isfinite(self.ramp) and self.ramp > 0):
            raise InvalidRequest(f"Spans: ramp = {self.ramp}: must be positive and finite")

    @property
    def expanded(self) -> PerHead:
        """One window per head."""
        reaches = [math.ceil(self.ramp + span) - 1 for span in self.spans]
        return PerHead(tuple(Window(reach, reach) if reach >= 0 else Empty() for reach in reaches))

    def _words(self) -> str:
        return f"spans of {', '.join(f'{span:g}' for span in self.spans)} keys and a ramp of {self.ramp:g}"
