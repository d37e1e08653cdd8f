"""A benchmark as one HTML page: the answer first, then numbers, plots and what weakens them."""

from __future__ import annotations

from typing import Any

from ..errors import EnvironmentLacks
from ..throughput.comparison import BenchComparison, ComparedRow
from ..throughput.comparison import describe as describe_compared
from ..throughput.diagnosis import attention_gflops, shares
from ..throughput.report import BenchReport, Row, describe_crossover
from ..throughput.statistics import duration
from ..throughput.variants import TITLES
from .charts import Interval, interval_chart
from .page import COLORS, markup, render

_PART_COLORS = {
    "attention": "#0072b2",
    "matrix products": "#e69f00",
    "other operators": "#8f9aa5",
    "the runtime between them": "#d5dade",
}


def bench_page(report: BenchReport, plot: bool = True) -> str:
    """The page, as HTML text; it needs no other file, no network and no script.

    Args:
        report: What was measured.
        plot: Whether to draw the plot; without matplotlib the page has none.
    """
    settings = report.settings
    return render(
        "bench.html",
        report=report,
        titles=TITLES,
        colors=COLORS,
        plot=_plot(report) if plot else None,
        crossovers=[describe_crossover(found, report.reference) for found in report.crossovers],
        headline=_headline(report),
        comparison=report.comparison,
        comparison_chart=None if report.comparison is None else _comparison_chart(report.comparison),
        describe_compared=describe_compared,
        profiles=_profiles(report),
        part_colors=_PART_COLORS,
        gflops=attention_gflops,
        settings={
            "lengths": ", ".join(f"{length:,}" for length in settings.lengths),
            "batch": settings.batch,
            "threads": settings.threads or "ONNX Runtime's choice",
            "providers": ", ".join(settings.providers),
            "warm-up": f"{settings.warm_up_ms:g} ms",
            "samples": f"at least {settings.iterations} and {settings.duration_s:g} s",
            "rounds": settings.rounds,
            "global tokens": settings.global_tokens or 0,
            "seed": settings.seed,
        },
    )


def _plot(report: BenchReport) -> Any:
    from ..throughput.plot import draw_svg

    if not any(row.latency for row in report.rows):
        return None
    try:
        return markup(draw_svg(report))
    except EnvironmentLacks:
        return None


def _headline(report: BenchReport) -> list[tuple[str, str, str]]:
    """(label, value, more) of the figures at the top: the speedups, then the reference at the longest length."""
    tiles = []
    for found in report.crossovers:
        if found.speedup_at_longest is None:
            continue
        when = {"always": "at every length", "never": "nowhere faster"}.get(
            found.kind, f"from {found.tokens or 0:,} tokens"
        )
        tiles.append(
            (f"against {TITLES[found.baseline]}", f"{found.speedup_at_longest:.3g}x", f"at {found.longest:,}; {when}")
        )
    own = [row for row in report.rows if row.variant == report.reference and row.latency is not None]
    if own:
        last = own[-1]
        assert last.latency is not None and last.tokens_per_s is not None
        label = f"{TITLES[report.reference]}, {last.length:,} tokens"
        tiles.append((label, duration(last.latency.median), f"{last.tokens_per_s:,.0f} tokens/s"))
        tiles.append(("peak memory", f"{(last.peak_rss_bytes or 0) / 2**20:,.0f} MiB", f"at {last.length:,} tokens"))
    return tiles


def _profiles(report: BenchReport) -> list[tuple[Row, list[tuple[str, float]]]]:
    """Each measured row of the bundle with the parts of its profiled run."""
    rows = [row for row in report.rows if row.variant in ("kernel", "body") and row.time_us]
    return [
        (row, list(shares(row).items())) for row in sorted(rows, key=lambda row: (row.variant != "kernel", row.length))
    ]


def _comparison_chart(comparison: BenchComparison) -> Any:
    def label(row: ComparedRow) -> str:
        return f"{TITLES[row.variant]}, {row.length:,} tokens"

    intervals = [Interval(label(row), row.low, row.ratio, row.high, COLORS[row.variant]) for row in comparison.rows]
    return markup(interval_chart(intervals, 1 + comparison.threshold, f"times relative to {comparison.other}"))
