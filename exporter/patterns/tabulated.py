"""A pattern given by a finite table of the pairs that it can show, for patterns that were read rather than written."""

from __future__ import annotations

import base64
import functools
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest
from .base import Bounds, Counts, Pattern, counts_of, whole
from .lengths import Integers, Interval, Lengths, Structure


@dataclass(frozen=True)
class Tabulated(Pattern):
    """Pairs are looked up in the smallest text that shows all that a `Structure` without a tail can show.

    A pair of a longer text is moved towards the start by whole periods, the distance cut where it no longer matters,
    until it lies in the table.

    Attributes:
        period: Tokens after which the pattern repeats, 1 or more.
        near: Distance in tokens from which on all distances of one sign are alike.
        first: Tokens at the start of the text that are not like others.
        data: bool (size, size) packed into bits in C order, zlib-compressed, in base 64; `Tabulated.of` makes it.
    """

    period: int
    near: int
    first: int
    data: str

    def __post_init__(self) -> None:
        whole("Tabulated", "period", self.period, 1)
        whole("Tabulated", "near", self.near, 0)
        whole("Tabulated", "first", self.first, 0)
        _unpacked(self.data, self.size)

    @classmethod
    def of(cls, structure: Structure, seen: npt.NDArray[np.bool_]) -> Tabulated:
        """Make a pattern of the first pairs of a text.

        Args:
            structure: What the pattern depends on; it has no tail.
            seen: bool (size, size) with the `size` of that structure, whether each query sees each key.

        Raises:
            InvalidRequest: the structure has a tail, or the array another shape.
        """
        size = table_size(structure)
        if structure.tail or seen.shape != (size, size):
            raise InvalidRequest(f"Tabulated.of: {structure} and {seen.shape}: takes ({size}, {size}), and no tail")
        packed = zlib.compress(np.packbits(seen.astype(np.bool_)).tobytes(), 9)
        return cls(structure.period, structure.near, structure.head, base64.b64encode(packed).decode("ascii"))

    @property
    def size(self) -> int:
        """Tokens of the text that shows all that the pattern can show."""
        return table_size(Structure(self.period, self.near, self.first))

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        query, key = np.maximum(query, 0), np.maximum(key, 0)
        near = np.abs(key - query) < self.near
        lower = np.minimum(query, key)
        moved = np.maximum(lower - self.first, 0) // self.period * self.period
        # Beyond `near`, and where distance does not matter at all, the earlier of the two moves first, the other after.
        early = self._reduced(lower, 0)
        late = self._reduced(np.maximum(query, key), early + self.near if self.near else 0)
        row = np.where(near, query - moved, np.where(query <= key, early, late))
        column = np.where(near, key - moved, np.where(query <= key, late, early))
        return counts_of(_unpacked(self.data, self.size)[row, column])

    def _reduced(self, position: Integers, least: Integers | int) -> Integers:
        """The first position from `least` on that stands for `position`, unless that is in the head itself."""
        least = np.maximum(least, self.first)
        return np.where(position < least, position, least + (position - least) % self.period)

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        # Exact where all pairs of a rectangle are of one kind, which most are if there is no period.
        beyond = (rows.first >= self.first) & (keys.first >= self.first) & (self.period == 1)
        apart = (keys.first - rows.last >= self.near) | (rows.first - keys.last >= self.near)
        known = beyond & (apart if self.near else np.True_)
        value = self._count(rows.first, keys.first, lengths)
        return np.where(known, value, np.int32(0)), np.where(known, value, np.int32(1))

    def _depends_on(self) -> Structure:
        return Structure(self.period, self.near, self.first)

    def _special_lengths(self) -> Iterable[int]:
        return (self.first, self.near, self.period if self.period > 1 else 0)

    def _words(self) -> str:
        words = [f"distances up to {self.near - 1}"] if self.near > 1 else []
        words += [f"a period of {self.period}"] if self.period > 1 else []
        words += [f"the first {self.first}"] if self.first else []
        return f"a table of pairs ({', '.join(words) or 'all alike'})"


def table_size(structure: Structure) -> int:
    """Tokens of the text that shows all that a structure without a tail can show."""
    return structure.head + structure.near + 2 * structure.period + 1


@functools.lru_cache(maxsize=64)
def _unpacked(data: str, size: int) -> npt.NDArray[np.bool_]:
    expected = -(-size * size // 8)
    try:
        # decompressobj stops at the size that is expected, whatever the text would expand to.
        raw = zlib.decompressobj().decompress(base64.b64decode(data, validate=True), expected + 1)
    except (ValueError, TypeError, zlib.error) as error:
        raise InvalidRequest(f"Tabulated: data is not zlib-compressed base 64: {error}") from None
    if len(raw) != expected:
        raise InvalidRequest(f"Tabulated: data must hold {size} × {size} bits, got {len(raw)} bytes")
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=size * size).reshape(size, size).astype(np.bool_)
