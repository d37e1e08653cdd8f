"""The plot of a benchmark: latency and memory over length."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import EnvironmentLacks
from ..reports.page import COLORS
from .report import OK, BenchReport, Row
from .statistics import duration
from .variants import TITLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = {"kernel": "o", "body": "s", "dense": "^", "stock": "D", "engine": "P"}
_STYLES = {name: (COLORS[name], marker) for name, marker in _MARKERS.items()}
_INK, _FAINT = "#222222", "#6b6b6b"
_LABEL_LINE = 0.043
"""Height of one line of a label at the right edge, in axes heights."""


def draw(report: BenchReport, path: Path) -> None:
    """Draw latency (median, with a band from p10 to p90) and peak memory over length, both axes logarithmic.

    Args:
        report: What to draw; variants without any measurement are left out.
        path: PNG file to write.

    Raises:
        EnvironmentLacks: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    with _figure(report) as figure:
        _titles(figure, report)
        figure.savefig(path, dpi=200)


def draw_svg(report: BenchReport) -> str:
    """The same as an ``<svg>`` element for a page, without the titles, which the page has.

    Raises:
        EnvironmentLacks: matplotlib is not installed.
    """
    text = io.StringIO()
    # Ids that are drawn anew each time would make equal pages differ.
    with _figure(report, {"svg.hashsalt": "longspan", "svg.fonttype": "path"}) as figure:
        figure.set_size_inches(12.4, 4.5)
        figure.subplots_adjust(top=0.93, bottom=0.125)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


@contextlib.contextmanager
def _figure(report: BenchReport, settings: dict[str, Any] | None = None) -> Iterator[Any]:
    """The figure with both panels; matplotlib's settings last as long as the context."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EnvironmentLacks(
            "the plot needs matplotlib, which is not installed; next step: pip install 'longspan[report]'"
        ) from error
    style: Any = {"font.size": 9.5, "axes.edgecolor": _FAINT, "text.color": _INK, "axes.labelcolor": _INK}
    with rc_context(style | (settings or {})):
        # No pyplot: it would keep the figure and choose a backend for the whole process.
        figure = Figure(figsize=(12.4, 5.2), facecolor="white")
        FigureCanvasAgg(figure)
        latency, memory = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.072, right=0.885, top=0.80, bottom=0.115, wspace=0.53)
        series = {name: [row for row in report.rows if row.variant == name and row.status == OK] for name in TITLES}
        series = {name: rows for name, rows in series.items() if rows}
        _latency_panel(latency, series, report)
        _memory_panel(memory, series, report)
        yield figure


def _titles(figure: Any, report: BenchReport) -> None:
    settings = report.settings
    figure.text(0.072, 0.935, f"{report.model}: {report.attention}", size=13, weight="bold")
    threads = f"{settings.threads} threads" if settings.threads else "default threads"
    figure.text(
        0.072,
        0.89,
        f"{report.machine.short}; {settings.providers[0]}, {threads}, batch {settings.batch}; {report.created[:10]}",
        color=_FAINT,
    )


def _latency_panel(axes: Axes, series: dict[str, list[Row]], report: BenchReport) -> None:
    ends = {}
    for name, rows in series.items():
        lengths = [row.length for row in rows]
        statistics = [row.latency for row in rows if row.latency is not None]
        medians = [latency.median for latency in statistics]
        _line(axes, name, lengths, medians)
        axes.fill_between(
            lengths,
            [latency.p10 for latency in statistics],
            [latency.p90 for latency in statistics],
            color=_STYLES[name][0],
            alpha=0.18,
            linewidth=0,
        )
        ends[name] = (lengths[-1], medians[-1], duration(medians[-1]))
    _finish(axes, report, "Latency per run: median, band p10–p90", "latency [ms]")
    _label_ends(axes, ends, report)
    _mark_crossovers(axes, series, report)


def _memory_panel(axes: Axes, series: dict[str, list[Row]], report: BenchReport) -> None:
    ends = {}
    for name, rows in series.items():
        lengths = [row.length for row in rows]
        peaks = [(row.peak_rss_bytes or 0) / 2**20 for row in rows]
        _line(axes, name, lengths, peaks)
        ends[name] = (lengths[-1], peaks[-1], f"{peaks[-1]:,.0f} MiB")
    _finish(axes, report, "Peak memory of the process", "peak resident memory [MiB]")
    _label_ends(axes, ends, report)


def _line(axes: Axes, name: str, lengths: list[int], values: list[float]) -> None:
    color, marker = _STYLES[name]
    axes.plot(
        lengths,
        values,
        color=color,
        marker=marker,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.8,
        linewidth=2.4 if name == "kernel" else 1.6,
        zorder=4 if name == "kernel" else 3,
    )


def _finish(axes: Axes, report: BenchReport, title: str, label: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    lengths = report.settings.lengths
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.12)
    axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    low, high = axes.get_ylim()
    # Less than a decade shows no power of ten, or only one, so ticks between them are labelled as well.
    steps = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0) if high / low > 4 else tuple(range(1, 10))
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=steps, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, loc="left", size=10.5, color=_INK)
    axes.set_xlabel("sequence length [tokens]")
    axes.set_ylabel(label)
    axes.grid(which="major", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=_FAINT, labelcolor=_INK, which="both")


def _label_ends(axes: Axes, ends: dict[str, tuple[int, float, str]], report: BenchReport) -> None:
    """Name each line at the right edge, pushed apart where values are close, with what ended it early."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    wanted = {name: (math.log(value) - low) / (high - low) for name, (_, value, _) in ends.items()}
    longest = report.settings.lengths[-1]
    texts = {}
    for name, (length, _, text) in ends.items():
        ended = "" if length == longest else f" at {length:,}\nthen {_first_bad(report, name, length)}"
        texts[name] = f"{TITLES[name]}\n{text}{ended}"
    heights = _spread(wanted, {name: _LABEL_LINE * (text.count("\n") + 1.4) for name, text in texts.items()})
    for name, (length, value, _) in ends.items():
        axes.annotate(
            texts[name],
            xy=(length, value),
            xytext=(1.025, heights[name]),
            textcoords="axes fraction",
            color=_STYLES[name][0],
            weight="bold" if name == report.reference else "normal",
            va="center",
            size=9,
            linespacing=1.05,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _STYLES[name][0], "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4},
        )


def _first_bad(report: BenchReport, name: str, after: int) -> str:
    return next(row.status for row in report.rows if row.variant == name and row.length > after)


def _spread(wanted: dict[str, float], sizes: dict[str, float]) -> dict[str, float]:
    """Centres close to the wanted ones, in the same order, so that labels of these sizes do not overlap."""
    names = sorted(wanted, key=lambda name: wanted[name])
    centres = [wanted[name] for name in names]
    for _ in range(500):
        moved = False
        # Not above the panel, where its title stands.
        centres[-1] = min(centres[-1], 1.0 - sizes[names[-1]] / 2)
        for index in range(len(centres) - 1):
            apart = (sizes[names[index]] + sizes[names[index + 1]]) / 2
            lack = apart - (centres[index + 1] - centres[index])
            if lack > 1e-6:
                centres[index] -= lack / 2
                centres[index + 1] += lack / 2
                moved = True
        if not moved:
            break
    return dict(zip(names, centres, strict=True))


def _mark_crossovers(axes: Axes, series: dict[str, list[Row]], report: BenchReport) -> None:
    marked = [found for found in report.crossovers if found.kind == "from" and found.baseline in series]
    texts = {True: 0, False: 0}
    for found in sorted(marked, key=lambda one: one.tokens or 0):
        assert found.tokens is not None
        color = _STYLES[found.baseline][0]
        axes.axvline(found.tokens, color=color, linestyle=(0, (2, 2)), linewidth=1.1, zorder=2)
        # Curves rise to the right, so what is free is the upper left and the lower right.
        right = found.tokens**2 > report.settings.lengths[0] * report.settings.lengths[-1]
        step = 0.115 * texts[right]
        texts[right] += 1
        axes.annotate(
            f"faster than {TITLES[found.baseline]}\nfrom about {found.tokens:,} tokens",
            xy=(found.tokens, 0.02 + step if right else 0.98 - step),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if right else 4, 0),
            textcoords="offset points",
            ha="right" if right else "left",
            va="bottom" if right else "top",
            color=color,
            size=8.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0},
            zorder=5,
        )
