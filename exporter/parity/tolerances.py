"""How much error a float runtime may have: derived per output and input, never a habit such as 1e-5.

Rounding error depends on the number type, on how many terms are summed, on how deep the model is, and on how strongly
it amplifies (its conditioning), so one constant is too strict for one model and blind for another. What is known for
every single input is how far torch itself, in the same type, is from the float64 oracle: that run has the same terms,
depth and conditioning and differs only in the order of its sums. A runtime is therefore allowed

    tolerance = FACTOR · torch's own largest error  +  (u + a · sqrt(terms)) · sqrt(depth) · largest magnitude

The first part is FlashAttention's criterion ("not worse than twice the same-type reference"). The second keeps it from
vanishing where torch happens to round exactly (short inputs, few outputs). Random rounding errors grow as the square
root of the number of roundings (Higham and Mary, 2019, "A new approach to probabilistic rounding error analysis").
Every layer rounds its result to the type, whose unit roundoff (half the machine epsilon) is u, and takes sums, which
are accumulated in float32 or better, with the unit roundoff a. `terms` is the longest such sum, the larger of the width
of a layer and of the keys that a query sees, so it grows with the length up to the window; `depth` is the number of
attention sites.

An engine may compute in another type than the bundle's. Its yardstick is then torch in that type, with parameters
rounded to it; and u is the roundoff of that type where it is the coarser one, because what an output of float32 holds
was rounded to the engine's type on the way.

Two float64 runs of one formula (the original model and the intercepted one) differ by the same amplification times the
unit roundoff of float64, so their tolerance is the same sum with torch's error scaled by the ratio of the two
roundoffs. Where the formula is not the same they differ by many orders of magnitude more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import InvalidRequest
from ..sites.record import AttentionSite
from .inputs import numpy_type

FACTOR = 2.0
"""A runtime may be this many times as wrong as torch in the same type."""


_NUMPY_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Scale:
    """What a model's rounding errors grow with, at one length.

    Attributes:
        terms: Terms of the longest sum in a layer.
        depth: Layers that follow one another.
    """

    terms: int
    depth: int

    @classmethod
    def of(cls, sites: Sequence[AttentionSite], width: int, length: int) -> Scale:
        """The scale of a model with `sites` and layers of `width` channels for inputs of `length` tokens."""
        return cls(max(width, *(site.kind.keys(site, length) for site in sites)), len(sites))

    def floor(self, dtype: np.dtype[Any], magnitude: float) -> float:
        """Expected size of accumulated rounding, for values up to `magnitude` in a type."""
        roundoff = unit_roundoff(dtype)
        accumulated = min(roundoff, unit_roundoff(np.dtype(np.float32))) * math.sqrt(self.terms)
        return (roundoff + accumulated) * math.sqrt(self.depth) * magnitude


def unit_roundoff(dtype: np.dtype[Any]) -> float:
    """Half the distance from 1 to the next larger number of a type; 0 for integers and truth values."""
    if dtype == np.bool_ or np.issubdtype(dtype, np.integer):
        return 0.0
    return float(ml_dtypes.finfo(dtype).eps) / 2  # type: ignore[no-untyped-call]


def numpy_name(dtype: str) -> str:
    """Name that numpy has for a type that engines call ``"fp32"``, ``"fp16"`` or ``"bf16"``."""
    return _NUMPY_NAMES[dtype]


def computed_in(output: str, path: str) -> str:
    """The type whose roundoff an output bears: the coarser of its own and that which a path computes in.

    Args:
        output: numpy's name of the output's type; integers and truth values are not rounded.
        path: numpy's name of the path's type; empty for the output's own.
    """
    own = unit_roundoff(numpy_type(output))
    return path if own and path and unit_roundoff(numpy_type(path)) > own else output


def lowering_tolerance(torch_error: float, magnitude: float, dtype: np.dtype[Any], scale: Scale) -> float:
    """Largest absolute error that a runtime may have against the float64 oracle.

    Where torch itself overflows it says nothing about rounding, so only the second part counts.

    Args:
        torch_error: Largest absolute error of torch in `dtype` against the oracle.
        magnitude: Largest absolute value of the oracle.
        dtype: Type of the output.
        scale: What rounding errors grow with.
    """
    return FACTOR * (torch_error if math.isfinite(torch_error) else 0.0) + scale.floor(dtype, magnitude)


def identity_tolerance(torch_error: float, magnitude: float, dtype: np.dtype[Any], scale: Scale) -> float:
    """Largest absolute difference of two float64 runs of the same formula.

    Args:
        torch_error: Largest absolute error of torch in `dtype` against the oracle; measures the amplification.
        magnitude: Largest absolute value of the oracle.
        dtype: Type of the output.
        scale: What rounding errors grow with.
    """
    double = np.dtype(np.float64)
    roundoff = unit_roundoff(dtype)
    measured = roundoff > 0 and math.isfinite(torch_error)
    amplified = FACTOR * torch_error * unit_roundoff(double) / roundoff if measured else 0.0
    return amplified + scale.floor(double, magnitude)


@dataclass(frozen=True)
class Overrides:
    """Tolerances that the user gave, by output; the key ``""`` is for every other output.

    An output for which either is given is judged as Polygraphy and numpy do: ``|error| <= atol + rtol·|oracle|``, the
    one that is not given being 0; the derived tolerance does not count then.
    """

    rtol: Mapping[str, float] = field(default_factory=dict)
    atol: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, rtol: Iterable[str], atol: Iterable[str]) -> Overrides:
        """Parse ``[output:]value`` texts.

        Raises:
            InvalidRequest: a value is not a number of 0 or more.
        """
        return cls(
            rtol=dict(_parse("--rtol", text) for text in rtol), atol=dict(_parse("--atol", text) for text in atol)
        )

    def __bool__(self) -> bool:
        """Whether any tolerance was given."""
        return bool(self.rtol or self.atol)

    def check(self, outputs: Sequence[str]) -> None:
        """Refuse names that are not among `outputs`.

        Raises:
            InvalidRequest: there is no such output.
        """
        for option, values in (("--rtol", self.rtol), ("--atol", self.atol)):
            unknown = sorted(set(values) - {"", *outputs})
            if unknown:
                raise InvalidRequest(f"{option} {unknown[0]}: no such output; allowed: {', '.join(outputs)}")

    def of(self, output: str) -> tuple[float, float] | None:
        """(rtol, atol) for an output, or None where the derived tolerance counts."""
        found = [values.get(output, values.get("")) for values in (self.rtol, self.atol)]
        if found == [None, None]:
            return None
        return found[0] or 0.0, found[1] or 0.0


def _parse(option: str, text: str) -> tuple[str, float]:
    output, _, value = text.rpartition(":")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise InvalidRequest(
            f"{option} {text}: must be [output:]number, the number finite and 0 or more, e.g. {option} 1e-5"
        )
    return output, number
