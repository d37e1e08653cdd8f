"""What a conversion to another precision did: the records that reports and manifests read."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Kept:
    """A node that stays float32.

    Attributes:
        node: Its name.
        operator: Its operator.
        reason: Why it stays.
    """

    node: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Clamped:
    """A value whose finite numbers are kept within the narrow type's range; infinities stay what they are.

    Attributes:
        value: Its name.
        lowest: The lowest number of a constant; None for a value that the graph computes.
        bound: What they are clamped to, with either sign.
    """

    value: str
    lowest: float | None
    bound: float

    @property
    def in_words(self) -> str:
        """One line for a user."""
        if self.lowest is not None:
            return f"{self.value!r} holds {self.lowest:.4g}; it becomes {-self.bound:.5g}"
        return f"{self.value!r} is clamped to ±{self.bound:.5g}: a mask beyond that went into it"


@dataclass(frozen=True)
class Precision:
    """A converted graph, and what was done.

    Attributes:
        model: The strongly typed graph.
        dtype: Its precision.
        narrow: Number of nodes that compute in that type, by operator; all floating-point nodes for fp32.
        kept: Nodes that stay float32 (none are listed for fp32).
        double: Names of nodes of float64, which are left alone.
        casts: Number of casts between float types, one for each value and type.
        clamped: Values that are kept within range.
        coarse: The largest rounding error of a trained tensor in parts of its largest number, for those too small for
            the type: where that is more than the type's roundoff.
    """

    model: ir.Model = dataclasses.field(repr=False)
    dtype: str
    narrow: Mapping[str, int]
    kept: tuple[Kept, ...]
    double: tuple[str, ...]
    casts: int
    clamped: tuple[Clamped, ...]
    coarse: Mapping[str, float]

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever asked for the type should know of it, a line each: numbers that it does not hold."""
        lines = [clamped.in_words for clamped in self.clamped]
        lines += [
            f"{self.dtype}: the numbers in {name!r} are so small that rounding takes up to {error:.1%} of the largest"
            for name, error in self.coarse.items()
        ]
        if self.double:
            lines.append(f"nodes that stay in float64: {len(self.double)}, the first is {self.double[0]!r}")
        return tuple(lines)

    @property
    def kept_in_fp32(self) -> dict[str, int]:
        """Number of nodes that stay float32, by reason, the most frequent first."""
        return dict(collections.Counter(kept.reason for kept in self.kept).most_common())
