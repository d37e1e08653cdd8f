"""How long the texts are that a pattern is asked about, where its queries stand, and what a pattern depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Lengths:
    """The rectangle of queries and keys that a pattern is asked about.

    Attributes:
        seq_q: Query rows.
        seq_k: Keys.
        offset: Absolute position of query row 0: keys that earlier calls left in a cache.

    Raises:
        InvalidRequest: a number is negative.
    """

    seq_q: int
    seq_k: int
    offset: int = 0

    def __post_init__(self) -> None:
        if min(self.seq_q, self.seq_k, self.offset) < 0:
            raise InvalidRequest(
                f"seq_q = {self.seq_q}, seq_k = {self.seq_k}, offset = {self.offset}: must be 0 or more"
            )

    @classmethod
    def of(cls, length: int) -> Lengths:
        """Self-attention over `length` tokens."""
        return cls(length, length)

    @property
    def text(self) -> int:
        """Tokens of the text, from the end of which some patterns count."""
        return max(self.seq_k, self.offset + self.seq_q)

    def queries(self) -> Integers:
        """int64 (seq_q,), the absolute position of each query row."""
        return np.arange(self.offset, self.offset + self.seq_q)

    def keys(self) -> Integers:
        """int64 (seq_k,), the position of each key."""
        return np.arange(self.seq_k)


@dataclass(frozen=True)
class Interval:
    """Many runs of consecutive positions.

    Attributes:
        first: int64, the first position of each run; any shape.
        last: int64, the last, itself included; at least `first`.
    """

    first: Integers
    last: Integers


@dataclass(frozen=True)
class Structure:
    """All that a pattern depends on: a promise by which a pattern of any length has finitely many kinds of pairs.

    How often the query at position q counts the key at position k is a function of ``q % period``, ``k % period``,
    ``clamp(k - q, -near, near)``, ``min(q, head)``, ``min(k, head)``, ``min(end - 1 - q, tail)`` and
    ``min(end - 1 - k, tail)``, where ``end`` is `Lengths.text` rounded up to a multiple of `tail_unit`. The length
    enters nowhere else.

    Attributes:
        period: Tokens after which it repeats; 1 or more.
        near: Distance in tokens from which on all distances of one sign are alike.
        head: Tokens at the start of the text that are not like others.
        tail: Tokens at the end of the text that are not like others.
        tail_unit: What the text's length is rounded up to, before the tail is counted from it.
    """

    period: int = 1
    near: int = 0
    head: int = 0
    tail: int = 0
    tail_unit: int = 1

    def joined(self, other: Structure) -> Structure | None:
        """What a pattern made of two depends on; None where they count their tails from different ends."""
        tails = {each.tail_unit for each in (self, other) if each.tail}
        if len(tails) > 1:
            return None
        return Structure(
            math.lcm(self.period, other.period),
            max(self.near, other.near),
            max(self.head, other.head),
            max(self.tail, other.tail),
            tails.pop() if tails else 1,
        )

    def scaled(self, size: int) -> Structure:
        """What a pattern of blocks of `size` tokens depends on, token by token."""
        return Structure(
            self.period * size, self.near * size, self.head * size, self.tail * size, self.tail_unit * size
        )
