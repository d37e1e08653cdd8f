"""Measure how far one output is from another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..manifest import InputRecord, OutputRecord
from ..sources.base import BATCH, SEQUENCE
from .hull import Hull, excess, upper_hull
from .inputs import Feed

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Error:
    """Difference of two outputs over the elements that were compared.

    Attributes:
        max_abs: Largest absolute difference; infinite where a value is not finite and should be, or shapes differ.
        rms: Root of the mean square of the difference.
        cosine: Cosine of the angle between the two, over all elements together; 1 for two zeros.
        hull: Corners (absolute reference, absolute error) that decide under which tolerances the two agree.
        note: What is wrong, where it is not a number: shapes, values that are not finite, a failure to run.
    """

    max_abs: float
    rms: float
    cosine: float
    hull: Hull = ()
    note: str = ""

    @classmethod
    def failure(cls, note: str) -> Error:
        """The error of an output that is not there."""
        return cls(np.inf, np.inf, 0.0, (), note)

    def excess(self, rtol: float = 0.0) -> float:
        """Smallest absolute tolerance under which the two agree together with the relative tolerance `rtol`."""
        return excess(self.hull, rtol) if np.isfinite(self.max_abs) else np.inf


def measure(got: Array, oracle: Array, where: Array | None = None) -> Error:
    """Compare `got` with `oracle`, in float64.

    Args:
        got: Any type and shape.
        oracle: Any type and shape.
        where: Truth values that broadcast to the shape of `oracle`: elements to compare; None for all.
    """
    if got.shape != oracle.shape:
        return Error.failure(f"shape {list(got.shape)} instead of {list(oracle.shape)}")
    first, second = got.astype(np.float64), oracle.astype(np.float64)
    if where is not None:
        chosen = np.broadcast_to(where, oracle.shape)
        first, second = first[chosen], second[chosen]
    if not first.size:
        return Error(0.0, 0.0, 1.0)
    if not np.isfinite(second).all():
        return Error.failure(f"{np.count_nonzero(~np.isfinite(second))} values of the oracle are not finite")
    if not np.isfinite(first).all():
        return Error.failure(f"{np.count_nonzero(~np.isfinite(first))} values are not finite")
    difference = np.abs(first - second)
    return Error(
        max_abs=float(difference.max()),
        rms=float(np.sqrt(np.mean(np.square(difference)))),
        cosine=_cosine(first, second),
        hull=upper_hull(np.abs(second).ravel(), difference.ravel()),
    )


def _cosine(first: Array, second: Array) -> float:
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.vdot(first, second)) / norms if norms else float(np.array_equal(first, second))


def token_mask(feed: Feed, inputs: Sequence[InputRecord]) -> Array | None:
    """(batch, sequence) truth values, True where there is a token; None for a model without a padding mask."""
    for record in inputs:
        if record.role == "padding_mask" and feed[record.name].ndim == 2:
            return np.not_equal(feed[record.name], 0)
    return None


def meaningful(output: OutputRecord, tokens: Array | None) -> Array | None:
    """Elements of an output that a user reads, shaped to broadcast to it; None for all.

    With a sequence dimension: those of tokens. Without one: those of rows that begin with a token, because models pool
    the first one, and what a padded one holds is nobody's promise.
    """
    if tokens is None or BATCH not in output.shape:
        return None
    shape = [1] * len(output.shape)
    batch = output.shape.index(BATCH)
    shape[batch] = tokens.shape[0]
    if SEQUENCE not in output.shape:
        return tokens[:, 0].reshape(shape)
    sequence = output.shape.index(SEQUENCE)
    shape[sequence] = tokens.shape[1]
    return (tokens if batch < sequence else tokens.T).reshape(shape)
