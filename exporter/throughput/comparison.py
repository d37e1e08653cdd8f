"""Compare two benchmarks row by row: the ratio of medians with a bootstrap interval, and what is a regression."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest
from .report import BenchReport, Row

Rounds = Sequence[Sequence[float]]
"""Samples, one sequence per round."""

RESAMPLES = 10_000
CONFIDENCE = 0.95
REGRESSION = 0.05


def bootstrap_medians(rounds: Rounds, resamples: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Medians of bootstrap resamples (Efron 1979), drawn without making the resamples.

    The k-th smallest of n values that are drawn with replacement from n sorted ones is the one at ``floor(n·u)``,
    where u is the k-th smallest of n uniform numbers, which follows Beta(k, n − k + 1). So a median costs one number
    (two, for an even count: given u, the next one is ``u + (1 − u)·Beta(1, n − k)``), whatever n is, and the result
    has exactly the distribution that resampling would give.

    Samples of one process resemble each other more than those of the next process. With several rounds the rounds are
    therefore resampled first, as clusters (Davison and Hinkley 1997, section 3.8), then the samples of those chosen.

    Args:
        rounds: Samples, one sequence per round, each of one sample or more.
        resamples: Medians to draw.
        generator: Source of randomness.

    Returns:
        (resamples,) medians.
    """
    chosen: Counter[tuple[int, ...]] = Counter()
    picks = generator.integers(0, len(rounds), (resamples, len(rounds)))
    for pick in np.sort(picks, axis=1).tolist():
        chosen[tuple(pick)] += 1
    parts = []
    for pick, count in chosen.items():
        pooled = np.sort(np.array(list(itertools.chain.from_iterable(rounds[index] for index in pick)), np.float64))
        parts.append(_medians(pooled, count, generator))
    # In order of the combinations until here; two reports are resampled independently of each other.
    medians = np.concatenate(parts)
    generator.shuffle(medians)
    return medians


def _medians(ordered: npt.NDArray[np.float64], count: int, generator: np.random.Generator) -> npt.NDArray[np.float64]:
    """Medians of `count` resamples of sorted values."""
    size = len(ordered)
    rank = (size + 1) // 2
    lower = generator.beta(rank, size - rank + 1, count)
    values: npt.NDArray[np.float64] = ordered[np.minimum((size * lower).astype(np.int64), size - 1)]
    if size % 2:
        return values
    upper = lower + (1 - lower) * generator.beta(1, size - rank, count)
    return (values + ordered[np.minimum((size * upper).astype(np.int64), size - 1)]) / 2


@dataclass(frozen=True)
class Ratio:
    """How long something takes now, relative to before.

    Attributes:
        ratio: Median now over median before; above 1 is slower.
        low: Lower end of the percentile interval.
        high: Upper end.
    """

    ratio: float
    low: float
    high: float


def ratio_of_medians(
    now: Rounds, before: Rounds, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Ratio:
    """The ratio of two medians with its percentile bootstrap interval.

    Args:
        now: Samples of the one, per round.
        before: Samples of the other, per round.
        resamples: Bootstrap resamples.
        confidence: Share of the resampled ratios inside the interval.
        seed: Seed of the resampling; the same samples and seed give the same interval.
    """
    generator = np.random.default_rng(seed)
    ratios = bootstrap_medians(now, resamples, generator) / bootstrap_medians(before, resamples, generator)
    tail = (1 - confidence) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail))
    medians = [float(np.median(list(itertools.chain.from_iterable(rounds)))) for rounds in (now, before)]
    return Ratio(medians[0] / medians[1], float(low), float(high))


@dataclass(frozen=True)
class ComparedRow:
    """One row of two reports.

    Attributes:
        variant: Key of `variants.TITLES`.
        length: Tokens.
        batch: Sequences.
        ratio: Now over before.
        low: Lower end of the interval.
        high: Upper end.
        verdict: ``"regressed"`` (the whole interval is beyond the threshold), ``"slower"`` (the whole interval is above
            1), ``"faster"`` (below 1) or ``"same"`` (it holds 1).
    """

    variant: str
    length: int
    batch: int
    ratio: float
    low: float
    high: float
    verdict: str


@dataclass(frozen=True)
class BenchComparison:
    """A benchmark against an earlier one.

    Attributes:
        other: The file of the earlier one.
        created: When it was measured, UTC, ISO 8601.
        threshold: Slowdown that is a regression, as a fraction.
        confidence: Of the intervals.
        rows: Rows that both have.
        missing: Rows that were measured before and are not now, with why.
        differences: What else differs, each with both values.
        within_process: Whether either has one round only, so that intervals hold nothing of what differs between
            processes.
    """

    other: str
    created: str
    threshold: float
    confidence: float
    rows: tuple[ComparedRow, ...]
    missing: tuple[str, ...]
    differences: tuple[str, ...]
    within_process: bool

    @property
    def regressions(self) -> tuple[ComparedRow, ...]:
        """Rows whose whole interval is beyond the threshold."""
        return tuple(row for row in self.rows if row.verdict == "regressed")


def differences(now: BenchReport, before: BenchReport) -> list[str]:
    """What differs so that the times are not of the same thing: machine, model, or how it was run."""
    pairs: dict[str, tuple[Any, Any]] = {
        "processor": (now.machine.cpu, before.machine.cpu),
        "logical cores": (now.machine.logical_cores, before.machine.logical_cores),
        "vector instructions": (now.machine.isa, before.machine.isa),
        "model": (now.identity, before.identity),
        "attention": (now.attention, before.attention),
        "threads": (now.settings.threads, before.settings.threads),
        "providers": (now.settings.providers, before.settings.providers),
        "global tokens": (now.settings.global_tokens, before.settings.global_tokens),
    }
    if now.settings.engine and before.settings.engine:
        pairs["engine"] = (now.settings.engine, before.settings.engine)
    return [f"{name}: {_words(new)}, was {_words(old)}" for name, (new, old) in pairs.items() if new != old]


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def check_comparable(now: BenchReport, before: BenchReport, other: str, force: bool) -> None:
    """Refuse to compare what cannot be compared.

    Raises:
        InvalidRequest: machine, model or settings differ, and `force` is off.
    """
    found = differences(now, before)
    if found and not force:
        raise InvalidRequest(
            f"--compare {other}: was not measured on the same thing: {'; '.join(found)}; next step: measure both on "
            "one machine, or compare anyway with --force-compare"
        )


def compare(now: BenchReport, before: BenchReport, other: str, threshold: float = REGRESSION) -> BenchComparison:
    """Compare every row that both reports measured.

    Args:
        now: The newer report.
        before: The report to compare with.
        other: Its file, for the record.
        threshold: Slowdown that is a regression, as a fraction.

    Raises:
        InvalidRequest: no row was measured in both.
    """
    new, old = _measured(now), _measured(before)
    rows = tuple(_compared(key, new[key], old[key], threshold) for key in new if key in old)
    if not rows:
        raise InvalidRequest(
            f"--compare {other}: has no row of the same variant, length and batch; it has "
            f"{', '.join(_name(*key) for key in old) or 'none that was measured'}; next step: give the same --lengths "
            "and --batch"
        )
    asked = {(row.variant, row.length, now.settings.batch): row for row in now.rows}
    return BenchComparison(
        other=other,
        created=before.created,
        threshold=threshold,
        confidence=CONFIDENCE,
        rows=rows,
        missing=tuple(
            f"{_name(*key)}: {asked[key].status}: {asked[key].reason}" for key in old if key not in new and key in asked
        ),
        differences=(*differences(now, before), *_versions(now, before)),
        within_process=any(len(samples) < 2 for key in new if key in old for samples in (new[key], old[key])),
    )


def _measured(report: BenchReport) -> dict[tuple[str, int, int], Rounds]:
    return {
        (row.variant, row.length, report.settings.batch): row.samples_ns
        for row in report.rows
        if row.samples_ns and row.latency is not None
    }


def _compared(key: tuple[str, int, int], now: Rounds, before: Rounds, threshold: float) -> ComparedRow:
    found = ratio_of_medians(now, before)
    if found.low > 1 + threshold:
        verdict = "regressed"
    else:
        verdict = "slower" if found.low > 1 else "faster" if found.high < 1 else "same"
    return ComparedRow(*key, found.ratio, found.low, found.high, verdict)


def _name(variant: str, length: int, batch: int) -> str:
    return f"{Row(variant, length, '').title} at {batch} x {length:,} tokens"


def _versions(now: BenchReport, before: BenchReport) -> list[str]:
    """Packages of other versions: what a comparison may be about, so never a reason to refuse it."""
    new, old = now.machine.versions, before.machine.versions
    names = [name for name in {**new, **old} if new.get(name) != old.get(name)]
    return [f"{name}: {new.get(name, 'none')}, was {old.get(name, 'none')}" for name in names]


def describe(row: ComparedRow) -> str:
    """One sentence, e.g. ``"longspan kernel at 1 x 4,096 tokens: 1.08 times as long (1.06 … 1.10): regressed"``."""
    return (
        f"{_name(row.variant, row.length, row.batch)}: {row.ratio:.3f} times as long "
        f"({row.low:.3f} … {row.high:.3f}): {row.verdict}"
    )
