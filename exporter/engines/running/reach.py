"""Which batches and lengths an engine takes, and in which of its optimization profiles inputs run."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ...manifest import Manifest
from ...sources.base import BATCH, SEQUENCE
from ..profiles import Profile, Shape


@dataclass(frozen=True)
class Reach:
    """Batches and lengths that a profile admits, both ends included.

    Attributes:
        batches: Fewest and most rows.
        lengths: Shortest and longest text.
    """

    batches: tuple[int, int]
    lengths: tuple[int, int]

    @classmethod
    def of(cls, profile: Profile, manifest: Manifest) -> Reach:
        """That of a profile; where a model has no such dimension, one row and any length."""
        batches, lengths = (profile.sizes(symbol, manifest.inputs) for symbol in (BATCH, SEQUENCE))
        fixed = manifest.fixed_length
        any_length = (1, manifest.max_length or sys.maxsize) if fixed is None else (fixed, fixed)
        return cls(
            (1, 1) if batches is None else (batches[0], batches[2]),
            any_length if lengths is None else (lengths[0], lengths[2]),
        )

    def holds(self, length: int) -> bool:
        """Whether texts of this length lie within it."""
        return self.lengths[0] <= length <= self.lengths[1]

    def nearest(self, batches: Sequence[int]) -> tuple[int, ...]:
        """The batches that come nearest to these, each once."""
        low, high = self.batches
        return tuple(dict.fromkeys(min(max(batch, low), high) for batch in batches))

    @property
    def own_lengths(self) -> tuple[int, ...]:
        """Both ends and the middle, ascending."""
        low, high = self.lengths
        return tuple(sorted({low, (low + high) // 2, high}))


def in_words(reaches: Sequence[Reach], of: Callable[[Reach], tuple[int, int]]) -> str:
    """Ranges of several profiles, e.g. ``"1 to 512 or 513 to 4,096"``."""
    found = dict.fromkeys(of(reach) for reach in reaches)
    return " or ".join(f"{low:,}" if low == high else f"{low:,} to {high:,}" for low, high in found)


def profile_for(profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int | None:
    """Index of the profile to run inputs of these shapes in; None where none admits them.

    Of several it is the one that spans the least, whose kernels were chosen for sizes closest to these; 0 for an
    engine without profiles.
    """
    if not profiles:
        return 0
    admitting = [index for index, profile in enumerate(profiles) if profile.admits(shapes)]
    return min(admitting, key=lambda index: _span(profiles[index]), default=None)


def _span(profile: Profile) -> float:
    return math.prod(
        1.0 + high - low for shapes in profile.inputs.values() for low, high in zip(shapes.min, shapes.max, strict=True)
    )
