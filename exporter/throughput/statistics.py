"""Statistics of samples, and the length from which one curve stays below another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def percentile(samples: Sequence[float], percent: float) -> float:
    """Percentile with linear interpolation between the two nearest ranks (numpy's default; Hyndman and Fan's type 7).

    Args:
        samples: One value or more, in any order.
        percent: 0 to 100.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    rank = (len(ordered) - 1) * percent / 100.0
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def drift(samples: Sequence[float]) -> float | None:
    """Median of the first quarter of a series over that of its last quarter, minus 1; None below 12 values.

    Above 0 the series began slow: the warm-up was too short. Below 0 it ended slow: heat, or a neighbour.
    """
    quarter = len(samples) // 4
    if quarter < 3:
        return None
    return percentile(samples[:quarter], 50) / percentile(samples[-quarter:], 50) - 1


@dataclass(frozen=True)
class Latency:
    """Latency of one variant at one length, in milliseconds.

    Attributes:
        runs: Samples that the other values are taken from.
        spread: (p90 - p10) / median, without a unit.
    """

    runs: int
    median: float
    minimum: float
    maximum: float
    p10: float
    p90: float
    p99: float
    spread: float

    @classmethod
    def of(cls, samples_ms: Sequence[float]) -> Latency:
        """Summarise samples, in milliseconds."""
        p10, median, p90, p99 = (percentile(samples_ms, percent) for percent in (10, 50, 90, 99))
        spread = (p90 - p10) / median if median else 0.0
        return cls(len(samples_ms), median, min(samples_ms), max(samples_ms), p10, p90, p99, spread)


@dataclass(frozen=True)
class Crossover:
    """From which length a curve is faster than a baseline.

    Attributes:
        baseline: Name of the baseline.
        kind: ``"always"`` (at every length measured for both), ``"from"`` (from `tokens` on), ``"never"`` (not at the
            longest length measured for both), or ``"unknown"`` (no length was measured for both).
        tokens: The crossover, interpolated and rounded up to a token; None unless `kind` is ``"from"``.
        shortest: Shortest length measured for both; None when unknown.
        longest: Longest length measured for both; None when unknown.
        speedup_at_longest: Baseline's median over ours at `longest`; None when unknown.
    """

    baseline: str
    kind: str
    tokens: int | None
    shortest: int | None
    longest: int | None
    speedup_at_longest: float | None


def crossover(baseline: str, ours: Mapping[int, float], theirs: Mapping[int, float]) -> Crossover:
    """The shortest length from which `ours` is below `theirs` at every longer measured length.

    Between the last measured length where `ours` is not below and the next one, both curves are taken as power laws of
    the length, so the logarithm of their ratio is interpolated linearly over the logarithm of the length.

    Args:
        baseline: Name for the result.
        ours: Median latency by length.
        theirs: The same of the baseline; only lengths in both count.
    """
    lengths = sorted(set(ours) & set(theirs))
    if not lengths:
        return Crossover(baseline, "unknown", None, None, None, None)
    ratios = [theirs[length] / ours[length] for length in lengths]
    slower = [index for index, ratio in enumerate(ratios) if ratio <= 1.0]
    kind, tokens = "always", None
    if slower and slower[-1] == len(lengths) - 1:
        kind = "never"
    elif slower:
        kind = "from"
        last = slower[-1]
        begin, end = math.log(lengths[last]), math.log(lengths[last + 1])
        low, high = math.log(ratios[last]), math.log(ratios[last + 1])
        # The tiny slack keeps a crossover that is exactly a whole number from being rounded up to the next.
        tokens = math.ceil(math.exp(begin + (end - begin) * -low / (high - low)) - 1e-6)
    return Crossover(baseline, kind, tokens, lengths[0], lengths[-1], ratios[-1])


def next_latency(measured: Mapping[int, float], length: int, exponent: float) -> float | None:
    """Predict a median from shorter lengths; None when there are none.

    Args:
        measured: Median by length.
        length: Length to predict at.
        exponent: Power of the length with which the last measured value grows.
    """
    shorter = [known for known in measured if known < length]
    if not shorter:
        return None
    last = max(shorter)
    return float(measured[last] * (length / last) ** exponent)


def duration(milliseconds: float) -> str:
    """Three significant digits in milliseconds, or in seconds from one second."""
    return f"{milliseconds / 1e3:,.3g} s" if milliseconds >= 1e3 else f"{milliseconds:.3g} ms"
