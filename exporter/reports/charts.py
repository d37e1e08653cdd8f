"""Charts as inline SVG: errors over length, and ratios with their intervals. No library and no script is needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 12, 40
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")

Scale = Callable[[float], float]
"""From a value to its place in the picture."""


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        x: Length in tokens, 1 or more.
        y: Error; 0 stands on the axis, infinity at the top edge.
        passed: Whether it is within its tolerance; drawn as a cross where not.
        title: What a pointer over it shows.
    """

    x: float
    y: float
    passed: bool
    title: str


@dataclass(frozen=True)
class Series:
    """Measurements that belong together.

    Attributes:
        label: Its name, printed in its colour.
        color: Any CSS colour.
        marker: ``"circle"``, ``"square"`` or ``"triangle"``.
        points: In any order; the largest at each length are joined by a line.
    """

    label: str
    color: str
    marker: str
    points: tuple[Point, ...]


def error_chart(series: Sequence[Series], tolerance: Sequence[tuple[float, float]], label: str) -> str:
    """Errors over length, both axes logarithmic, with what is allowed as a band.

    Args:
        series: What to draw.
        tolerance: (length, largest error that passes), lengths ascending; empty for no band.
        label: What the picture shows, for those who do not see it.
    """
    lengths = [point.x for one in series for point in one.points] or [1.0]
    values = [point.y for one in series for point in one.points] + [allowed for _, allowed in tolerance]
    values = [value for value in values if 0 < value < math.inf] or [1e-9, 1.0]
    low, high = math.floor(math.log10(min(values)) - 0.15), math.ceil(math.log10(max(values)) + 0.15)
    x_low, x_high = math.log2(min(lengths)) - 0.35, math.log2(max(lengths)) + 0.35

    def across(length: float) -> float:
        return _LEFT + (math.log2(length) - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def down(value: float) -> float:
        if value <= 0:
            return _HEIGHT - _BOTTOM
        if math.isinf(value):
            return _TOP
        return _TOP + (high - math.log10(value)) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">',
        *_band([(across(length), down(allowed)) for length, allowed in tolerance]),
        *_grid(low, high, down),
        *_lengths(x_low, x_high, across),
    ]
    # The first one last, on top of the others: its markers are the smallest.
    for one in reversed(series):
        parts += _drawn(one, across, down)
    return "".join([*parts, "</svg>"])


def _band(edge: Sequence[tuple[float, float]]) -> list[str]:
    if not edge:
        return []
    # To both sides of the plot, so that one length alone has a band as well.
    edge = [(_LEFT, edge[0][1]), *edge, (_WIDTH - _RIGHT, edge[-1][1])]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
    bottom = _HEIGHT - _BOTTOM
    return [
        f'<polygon points="{_LEFT},{bottom} {line} {_WIDTH - _RIGHT},{bottom}" class="allowed"/>',
        f'<polyline points="{line}" class="limit"/>',
        f'<text x="{_WIDTH - _RIGHT - 4}" y="{edge[-1][1] - 5:.1f}" class="allowed-label">allowed</text>',
    ]


def _grid(low: int, high: int, down: Scale) -> list[str]:
    step = max(1, math.ceil((high - low) / 6))
    parts = []
    for power in range(low, high + 1, step):
        y = down(10.0**power)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        name = f"10{str(power).translate(_SUPERSCRIPT)}"
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" class="tick end">{name}</text>')
    bottom = _HEIGHT - _BOTTOM
    parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}" class="axis"/>')
    return parts


def _lengths(low: float, high: float, across: Scale) -> list[str]:
    powers = range(math.ceil(low), math.floor(high) + 1)
    step = max(1, math.ceil(len(powers) / 8))
    parts = []
    for power in list(powers)[:: -step if len(powers) > 1 else 1]:
        x = across(2.0**power)
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_HEIGHT - _BOTTOM}" y2="{_HEIGHT - _BOTTOM + 4}" class="axis"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 17}" class="tick mid">{2**power:,}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    return [*parts, f'<text x="{middle}" y="{_HEIGHT - 5}" class="tick mid">length [tokens]</text>']


def _drawn(one: Series, across: Scale, down: Scale) -> list[str]:
    largest: dict[float, float] = {}
    for point in one.points:
        largest[point.x] = max(largest.get(point.x, 0.0), point.y)
    line = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in sorted(largest.items()))
    parts = [f'<polyline points="{line}" fill="none" stroke="{one.color}" stroke-width="1.4" opacity="0.75"/>']
    for point in one.points:
        x, y = across(point.x), down(point.y)
        if point.passed:
            shape, style = _marker(one.marker, x, y), _style(one)
        else:
            shape, style = _cross(x, y), f'stroke="{one.color}" stroke-width="2.6"'
        parts.append(f"<g {style}>{shape}<title>{escape(point.title)}</title></g>")
    return parts


def _style(one: Series) -> str:
    """Squares are hollow, so that a circle at the same place shows."""
    if one.marker == "square":
        return f'fill="#fff" stroke="{one.color}" stroke-width="1.4"'
    return f'fill="{one.color}" stroke="#fff" stroke-width="0.8"'


def _marker(kind: str, x: float, y: float) -> str:
    if kind == "square":
        return f'<rect x="{x - 4.2:.1f}" y="{y - 4.2:.1f}" width="8.4" height="8.4"/>'
    if kind == "triangle":
        return f'<path d="M{x:.1f} {y - 4.4:.1f}l4.4 7.6h-8.8z"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.1"/>'


def _cross(x: float, y: float) -> str:
    return f'<path d="M{x - 4.5:.1f} {y - 4.5:.1f}l9 9m0 -9l-9 9" fill="none"/>'


@dataclass(frozen=True)
class Interval:
    """A ratio with its interval.

    Attributes:
        label: What was compared.
        low: Lower end.
        ratio: The estimate.
        high: Upper end.
        color: Any CSS colour.
    """

    label: str
    low: float
    ratio: float
    high: float
    color: str


def interval_chart(intervals: Sequence[Interval], limit: float, label: str) -> str:
    """Ratios with their intervals, one below the other, around 1; beyond `limit` is a regression.

    Args:
        intervals: What to draw, from the top.
        limit: Where a regression begins.
        label: What the picture shows, for those who do not see it.
    """
    width, row, left, top = 920, 24, 240, 26
    height = top + row * len(intervals) + 10
    low = min([0.9, *(one.low for one in intervals)])
    high = max([1.1, limit * 1.02, *(one.high for one in intervals)])
    margin = 0.04 * (high - low)
    low, high = low - margin, high + margin

    def across(ratio: float) -> float:
        return left + (ratio - low) / (high - low) * (width - left - 20)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">',
        f'<rect x="{across(limit):.1f}" y="{top - 6}" width="{width - 20 - across(limit):.1f}" '
        f'height="{height - top}" class="regressed"/>',
        f'<text x="{across(limit) + 5:.1f}" y="14" class="tick">regression, from {limit:.3g}</text>',
        f'<text x="{across(1.0):.1f}" y="14" class="tick mid">1</text>',
        f'<line x1="{across(1.0):.1f}" x2="{across(1.0):.1f}" y1="{top - 6}" y2="{height - 6}" class="axis"/>',
    ]
    for index, one in enumerate(intervals):
        y = top + row * index + row / 2 - 4
        text = f"{one.label}: {one.ratio:.3f} ({one.low:.3f} … {one.high:.3f})"
        parts.append(
            f'<g><text x="{left - 10}" y="{y + 4:.1f}" class="tick end">{escape(one.label)}</text>'
            f'<line x1="{across(one.low):.1f}" x2="{across(one.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{one.color}" stroke-width="3"/><circle cx="{across(one.ratio):.1f}" cy="{y:.1f}" r="5" '
            f'fill="{one.color}" stroke="#fff"/><title>{escape(text)}</title></g>'
        )
    return "".join([*parts, "</svg>"])
