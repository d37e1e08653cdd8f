"""Patterns without a formula: drawn at random, or given pair by pair."""

from __future__ import annotations

import base64
import functools
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest
from .base import Bounds, Counts, Pattern, counts_of, some_patterns, whole
from .lengths import Integers, Interval, Lengths
from .members import Empty
from .operators import Blocked, Derived

_ODD = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Random(Pattern):
    """Each query counts `count` different keys, drawn at random.

    What is drawn depends on the seed, the query's position and the number of keys, and on nothing else: it is the same
    on every machine and in every version of numpy. Where fewer keys are left, all are taken.

    Attributes:
        count: Keys per query.
        seed: Which draw; heads get patterns of different seeds.
        but: Keys that are not drawn from, because the query sees them anyway; its heads are alike.
    """

    count: int
    seed: int = 0
    but: Pattern | None = None

    def __post_init__(self) -> None:
        whole("Random", "count", self.count, 0)
        whole("Random", "seed", self.seed, 0)
        some_patterns("Random", self.parts or (Empty(),))
        if self.but is not None and self.but.heads > 1:
            raise InvalidRequest("Random: `but` differs between heads; next step: one Random per head")

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The pattern whose keys are not drawn."""
        return () if self.but is None else (self.but,)

    def _drawn(self, queries: Integers, lengths: Lengths) -> npt.NDArray[np.bool_]:
        """Bool (queries, seq_k)."""
        keys = lengths.keys()[None, :]
        rank = _scrambled(_scrambled(np.uint64(self.seed), queries[:, None]), keys)
        taken = (self.but or Empty()).allowed(queries[:, None], keys, lengths)
        # The largest number is kept for keys that must not be drawn.
        rank = np.where(taken, np.iinfo(np.uint64).max, rank >> np.uint64(1))
        if self.count < lengths.seq_k:
            chosen = np.argpartition(rank, self.count, axis=1)[:, : self.count]
        else:
            chosen = np.broadcast_to(keys, rank.shape)
        drawn = np.zeros(rank.shape, np.bool_)
        np.put_along_axis(drawn, chosen, True, axis=1)
        return drawn & ~taken

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        if not lengths.seq_k:
            return np.zeros((), np.int32)
        rows, row = np.unique(query, return_inverse=True)
        drawn = self._drawn(rows, lengths)[row.reshape(query.shape), np.clip(key, 0, lengths.seq_k - 1)]
        return counts_of(drawn & (key >= 0) & (key < lengths.seq_k))

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        # Exact, by counting what is drawn in each rectangle.
        first, last = int(rows.first.min()), int(rows.last.max())
        return _counted(self._drawn(np.arange(first, last + 1), lengths), rows, keys, first)

    def _depends_on(self) -> None:
        return None

    def _special_lengths(self) -> Iterable[int]:
        # A longer text has a key that is not drawn.
        return (self.count, *(self.but.thresholds if self.but is not None else ()))

    def _words(self) -> str:
        but = f" outside ({self.but.describe()})" if self.but is not None else ""
        return f"{self.count} random keys{but}, seed {self.seed}"


@dataclass(frozen=True)
class RandomBlocks(Derived):
    """Each block of queries counts `count` different blocks of keys, drawn at random (BigBird, section 2).

    Attributes:
        block: Tokens in a block.
        count: Blocks of keys per block of queries.
        seed: Which draw; heads get patterns of different seeds.
        but: The pattern of blocks that are not drawn from; positions and lengths in it are numbers of blocks.
    """

    block: int
    count: int
    seed: int = 0
    but: Pattern | None = None

    def __post_init__(self) -> None:
        whole("RandomBlocks", "block", self.block, 1)
        Random(self.count, self.seed, self.but)

    @property
    def parts(self) -> tuple[Pattern, ...]:
        """The pattern whose blocks are not drawn."""
        return () if self.but is None else (self.but,)

    @property
    def heads(self) -> int:
        """All heads draw alike."""
        return 1

    @property
    def expanded(self) -> Blocked:
        """A random pattern of blocks."""
        return Blocked(self.block, Random(self.count, self.seed, self.but))

    def _words(self) -> str:
        but = f" outside ({self.but.describe()})" if self.but is not None else ""
        return f"{self.count} random blocks of {self.block}{but}, seed {self.seed}"


@dataclass(frozen=True)
class Explicit(Pattern):
    """A pattern given pair by pair, for one pair of lengths; `Explicit.of` makes it from an array.

    Attributes:
        seq_q: Query positions, from 0.
        seq_k: Keys.
        data: uint8 (seq_q, seq_k) of multiplicities in C order, zlib-compressed, in base 64.
    """

    seq_q: int
    seq_k: int
    data: str

    def __post_init__(self) -> None:
        whole("Explicit", "seq_q", self.seq_q, 0)
        whole("Explicit", "seq_k", self.seq_k, 0)
        self._array()

    @classmethod
    def of(cls, multiplicity: npt.ArrayLike) -> Explicit:
        """Make a pattern of an array.

        Args:
            multiplicity: (seq_q, seq_k), bool or whole numbers 0 … 255.

        Raises:
            InvalidRequest: the array is not one of these.
        """
        array = np.asarray(multiplicity)
        if (
            array.ndim != 2
            or array.dtype.kind not in "bui"
            or (array.size and not 0 <= array.min() <= array.max() < 256)
        ):
            raise InvalidRequest(
                f"Explicit.of: got {array.dtype} of shape {array.shape}: must be (queries, keys), bool or whole "
                "numbers 0 … 255; one pattern per head makes a PerHead"
            )
        packed = zlib.compress(np.ascontiguousarray(array, np.uint8).tobytes(), 9)
        return cls(array.shape[0], array.shape[1], base64.b64encode(packed).decode("ascii"))

    def _array(self) -> npt.NDArray[np.uint8]:
        return _unpacked(self.seq_q, self.seq_k, self.data)

    def _checked(self, lengths: Lengths) -> npt.NDArray[np.uint8]:
        if (lengths.offset + lengths.seq_q, lengths.seq_k) != (self.seq_q, self.seq_k):
            raise InvalidRequest(
                f"an explicit pattern of {self.seq_q} queries and {self.seq_k} keys says nothing about "
                f"{lengths.offset + lengths.seq_q} and {lengths.seq_k}"
            )
        return self._array()

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        array = self._checked(lengths)
        inside = (query >= 0) & (query < self.seq_q) & (key >= 0) & (key < self.seq_k)
        if not array.size:
            return counts_of(inside)
        return array[np.clip(query, 0, self.seq_q - 1), np.clip(key, 0, self.seq_k - 1)].astype(np.int32) * inside

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        # Exact where a rectangle holds zeros only or one pair only, else the array's extremes.
        array = self._checked(lengths)
        largest = int(array.max(initial=0))
        first, last = int(rows.first.min()), int(rows.last.max())
        part = array[first : last + 1]
        every, some = _counted(part == largest, rows, keys, first)[0], _counted(part > 0, rows, keys, first)[1]
        return every * np.int32(largest), some * np.int32(largest)

    def _depends_on(self) -> None:
        return None

    def _special_lengths(self) -> Iterable[int]:
        # The one length.
        return (self.seq_k,)

    def _words(self) -> str:
        return f"an explicit mask of {self.seq_q} queries and {self.seq_k} keys"


@functools.lru_cache(maxsize=16)
def _unpacked(seq_q: int, seq_k: int, data: str) -> npt.NDArray[np.uint8]:
    """What `Explicit` holds, read-only."""
    size = seq_q * seq_k
    try:
        # Never more than is expected, whatever the text would expand to.
        raw = zlib.decompressobj().decompress(base64.b64decode(data, validate=True), size + 1)
    except (ValueError, zlib.error) as error:
        raise InvalidRequest(f"Explicit: data is not zlib-compressed base 64: {error}") from None
    if len(raw) != size:
        raise InvalidRequest(
            f"Explicit: data does not hold seq_q · seq_k = {size} multiplicities, but {len(raw)} or more"
        )
    return np.frombuffer(raw, np.uint8).reshape(seq_q, seq_k)


def _scrambled(state: npt.NDArray[np.uint64] | np.uint64, values: Integers) -> npt.NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) of a state and a number; uint64 arithmetic wraps."""
    with np.errstate(over="ignore"):
        mixed = (state ^ values.astype(np.uint64)) + _ODD
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        scrambled: npt.NDArray[np.uint64] = mixed ^ (mixed >> np.uint64(31))
        return scrambled


def _counted(seen: npt.NDArray[np.bool_], rows: Interval, keys: Interval, first_row: int) -> Bounds:
    """Whether all, and whether any, of each rectangle is true; from one two-dimensional running sum."""
    total = np.zeros((seen.shape[0] + 1, seen.shape[1] + 1), np.int64)
    total[1:, 1:] = seen.cumsum(0).cumsum(1)
    top, bottom = rows.first - first_row, rows.last - first_row + 1
    left, right = keys.first, keys.last + 1
    inside = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    return counts_of(inside == (bottom - top) * (right - left)), counts_of(inside > 0)
