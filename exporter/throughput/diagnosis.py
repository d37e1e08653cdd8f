"""What the numbers say, and whether they can be trusted: plain sentences, each with its number."""

from __future__ import annotations

import math

from .report import BenchReport, Row

BUSY = 0.25
"""Share of the cores in use by other processes above which the machine counts as busy."""

UNSTEADY = 0.1
"""Spread within a measurement, and difference between rounds, above which it is pointed out."""

DRIFTING = 0.05
"""Difference between the beginning and the end of a series above which it is pointed out, if the spread of the series
does not explain it."""

_PARTS = {"attention": "attention", "matmul": "matrix products", "other": "other operators"}


def diagnose(report: BenchReport) -> tuple[str, ...]:
    """What bounds the bundle at the longest measured length, how well it uses the machine, and how it grows."""
    found = []
    for variant in ("kernel", "body"):
        rows = [row for row in report.rows if row.variant == variant and row.latency is not None]
        if not rows:
            continue
        longest = rows[-1]
        found += [line for line in (_bound(longest), _efficiency(longest), _cores(longest, report)) if line]
        if variant == report.reference and len(rows) > 1:
            found.append(_growth(rows[0], longest))
    return tuple(found)


def shares(row: Row) -> dict[str, float]:
    """Parts of the profiled run, in words, that add up to 1; empty where it was not profiled."""
    run = row.time_us.get("run", 0)
    if not run:
        return {}
    parts = {words: row.time_us[part] / run for part, words in _PARTS.items()}
    return parts | {"the runtime between them": max(0.0, 1 - sum(parts.values()))}


def attention_gflops(row: Row) -> float | None:
    """Speed of the attention sites, from the definition's operations, the median and attention's share of a run."""
    share = shares(row).get("attention", 0.0)
    if not share or not row.attention_flops or row.latency is None:
        return None
    return row.attention_flops / (share * row.latency.median * 1e6)


def _bound(row: Row) -> str:
    parts = shares(row)
    if not parts:
        return ""
    listed = ", ".join(f"{words} {share:.0%}" for words, share in parts.items())
    largest = max(parts, key=lambda words: parts[words])
    rest = 1 - parts["attention"]
    without = f"; with attention for free it would be {1 / rest:.3g}x as fast" if rest > 0 else ""
    return f"{row.title} at {row.length:,} tokens is bound by {largest}: {listed} of a run{without}"


def _efficiency(row: Row) -> str:
    speed = attention_gflops(row)
    if speed is None:
        return ""
    text = f"{row.title}: attention reaches {speed:,.3g} GFLOP/s at {row.length:,} tokens"
    if not row.sgemm_gflops:
        return text
    return (
        f"{text}, {speed / row.sgemm_gflops:.0%} of the {row.sgemm_gflops:,.3g} of a large float32 matrix product in "
        "the same process"
    )


def _cores(row: Row, report: BenchReport) -> str:
    """Where cores stood idle although the runtime could have used them all."""
    threads = report.settings.threads or report.machine.physical_cores
    if row.cores_used is None or threads < 2 or row.cores_used > 0.75 * threads:
        return ""
    return (
        f"{row.title} at {row.length:,} tokens kept {row.cores_used:.2g} of {threads} threads busy: too little work to "
        "share, or no core was free"
    )


def _growth(shortest: Row, longest: Row) -> str:
    assert shortest.latency is not None and longest.latency is not None
    stretch = math.log(longest.length / shortest.length)
    time = math.log(longest.latency.median / shortest.latency.median) / stretch
    text = (
        f"{longest.title}: from {shortest.length:,} to {longest.length:,} tokens the time grows with the length to the "
        f"power {time:.2f}"
    )
    working = [_working_set(row) for row in (shortest, longest)]
    if min(working) < 1 << 20:
        return f"{text} (1 is linear)"
    memory = math.log(working[1] / working[0]) / stretch
    return (
        f"{text}, memory beyond the loaded model to the power {memory:.2f} ({working[0] / 2**20:,.0f} to "
        f"{working[1] / 2**20:,.0f} MiB); 1 is linear"
    )


def _working_set(row: Row) -> int:
    return (row.peak_rss_bytes or 0) - (row.session_rss_bytes or 0)


def weaknesses(report: BenchReport) -> tuple[str, ...]:
    """What weakens the numbers: other processes, spread, drift, too few samples."""
    measured = [row for row in report.rows if row.latency is not None]
    notes = [*_disturbance(report, measured), *_spread(measured), *_drift(measured)]
    cut = [row for row in measured if row.cut_short]
    if cut:
        notes.append(
            f"{len(cut)} measurements have fewer than {report.settings.iterations} runs or "
            f"{report.settings.duration_s:g} s, because --time-limit ended them"
        )
    few = [row for row in measured if row.latency is not None and row.latency.runs < 100]
    if few:
        notes.append(f"p99 lies between the two slowest runs where there are fewer than 100 ({len(few)} measurements)")
    return tuple(notes)


def _disturbance(report: BenchReport, measured: list[Row]) -> list[str]:
    cores = report.machine.logical_cores
    disturbed = [row for row in measured if (row.others_cores or 0.0) > BUSY * cores]
    if not disturbed:
        return []
    most = max(row.others_cores or 0.0 for row in disturbed)
    return [
        f"the machine was busy: during {len(disturbed)} of {len(measured)} measurements other processes took up to "
        f"{most:.1f} of {cores} cores; repeat when it is idle"
    ]


def _spread(measured: list[Row]) -> list[str]:
    notes = []
    spreads = [(row.latency.spread, row) for row in measured if row.latency is not None]
    wide = sorted((pair for pair in spreads if pair[0] > UNSTEADY), key=lambda pair: -pair[0])
    if wide:
        names = ", ".join(f"{row.title} at {row.length:,} ({spread:.0%})" for spread, row in wide[:3])
        more = f" and {len(wide) - 3} more" if len(wide) > 3 else ""
        notes.append(
            f"{len(wide)} of {len(measured)} measurements spread by more than {UNSTEADY:.0%}, too wide to trust "
            f"differences of that size: {names}{more}"
        )
    apart = [
        row
        for row in measured
        if len(row.round_medians_ms) > 1 and max(row.round_medians_ms) > (1 + UNSTEADY) * min(row.round_medians_ms)
    ]
    if apart:
        notes.append(f"medians differ between rounds by more than {UNSTEADY:.0%} in {len(apart)} measurements")
    return notes


def _drift(measured: list[Row]) -> list[str]:
    notes = []
    drifts = [
        (row.drift, row)
        for row in measured
        if row.drift is not None and row.latency is not None and abs(row.drift) > max(DRIFTING, row.latency.spread / 2)
    ]
    for slow_start, what in (
        (True, "began slower than they ended, so the warm-up was too short; raise --warm-up"),
        (False, "ended slower than they began: heat, or another process"),
    ):
        found = [pair for pair in drifts if (pair[0] > 0) == slow_start]
        if found:
            most, row = max(found, key=lambda pair: abs(pair[0]))
            notes.append(
                f"{len(found)} of {len(measured)} measurements {what} (most: {row.title} at {row.length:,} tokens, by "
                f"{abs(most):.0%})"
            )
    return notes
