"""Sets of positions: the tokens that are global, summarise a block, or stand at the end of the text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest
from .base import whole
from .lengths import Integers, Interval, Lengths, Structure


@dataclass(frozen=True)
class Tokens:
    """Positions: those of every clause below, together.

    Attributes:
        first: How many at the start of the text.
        last: How many at its end.
        at: Single positions.
        period: Tokens after which `residues` repeat; 0 without them.
        residues: Positions modulo `period`.

    Raises:
        InvalidRequest: a number is out of range, or `period` and `residues` do not come together.
    """

    first: int = 0
    last: int = 0
    at: tuple[int, ...] = ()
    period: int = 0
    residues: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("first", "last", "period"):
            whole("Tokens", name, getattr(self, name), 0)
        for name in ("at", "residues"):
            object.__setattr__(self, name, tuple(sorted({int(position) for position in getattr(self, name)})))
        if bool(self.period) != bool(self.residues):
            raise InvalidRequest("Tokens: period and residues come together")
        if self.at and self.at[0] < 0:
            raise InvalidRequest(f"Tokens: position {self.at[0]}: must be 0 or more; `last` counts from the end")
        if self.residues and not (self.residues[0] >= 0 and self.residues[-1] < self.period):
            raise InvalidRequest(f"Tokens: residues {self.residues}: must lie in 0 … {self.period - 1}")

    def contain(self, position: Integers, lengths: Lengths) -> npt.NDArray[np.bool_]:
        """Whether each position is one of them.

        Args:
            position: int64, any shape.
            lengths: The lengths of the text, from the end of which `last` counts.

        Returns:
            bool of the same shape.
        """
        found = np.asarray((position >= 0) & (position < self.first))
        if self.last:
            found |= position >= lengths.text - self.last
        if self.at:
            found |= np.isin(position, self.at)
        if self.period:
            found |= np.isin(position % self.period, self.residues)
        return found

    def bounds(self, runs: Interval, lengths: Lengths) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Whether all positions of a run are among them, and whether any is; runs lie inside the text."""
        members = self.contain(np.arange(lengths.text), lengths)
        before = np.concatenate(([0], np.cumsum(members)))
        inside = before[runs.last + 1] - before[runs.first]
        return inside == runs.last + 1 - runs.first, inside > 0

    @property
    def structure(self) -> Structure:
        """What the set depends on where the length is open."""
        return Structure(
            period=max(1, self.period), head=max(self.first, *(at + 1 for at in self.at), 0), tail=self.last
        )

    @property
    def thresholds(self) -> tuple[int, ...]:
        """Lengths right after which there is a token outside the first ones, or before the last."""
        return tuple(sorted({*(n for n in (self.first, self.last, self.period) if n), *(at + 1 for at in self.at)}))

    def joined(self, other: Tokens) -> Tokens:
        """The positions of both."""
        period = math.lcm(max(1, self.period), max(1, other.period)) if self.period or other.period else 0
        residues = [
            r + start
            for each in (self, other)
            if each.period
            for r in each.residues
            for start in range(0, period, each.period)
        ]
        first = max(self.first, other.first)
        return Tokens(first, max(self.last, other.last), (*self.at, *other.at), period, tuple(residues))

    def widened(self, size: int) -> Tokens | None:
        """The tokens in blocks of `size` at these positions; None where the length decides which they are."""
        if self.last:
            return None
        at, residues = (
            tuple(p * size + token for p in positions for token in range(size))
            for positions in (self.at, self.residues)
        )
        return Tokens(self.first * size, 0, at, self.period * size, residues)

    def describe(self) -> str:
        """The set in words."""
        words = []
        if self.first:
            words.append(f"the first {self.first}" if self.first > 1 else "the first")
        if self.last:
            words.append(f"the last {self.last}" if self.last > 1 else "the last")
        if self.at:
            words.append("at " + _shortened(self.at))
        if self.period:
            words.append(f"at {_shortened(self.residues)} of every {self.period}")
        return ", ".join(words) or "none"


def _shortened(positions: tuple[int, ...]) -> str:
    split = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
    runs = [f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in split]
    return ", ".join(runs if len(runs) <= 6 else [*runs[:5], f"... ({len(positions)} in all)"])
