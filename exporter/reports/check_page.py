"""A check as one HTML page: the verdict first, then what it rests on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..masks import scale_for
from ..parity.judging import ORIGINAL, minimum_tolerances
from ..parity.report import CaseReport, CheckReport, Judged, PathReport, describe_first_off
from ..parity.report import ratio as over_tolerance
from ..sites.kind import GLOBAL, PARTLY, SEEN, Unknown
from ..sites.record import AttentionSite
from .charts import Point, Series, error_chart
from .masks_svg import GLOBAL_COLOR, PARTLY_COLOR, SEEN_COLOR, mask_svgs
from .page import COLORS, markup, number, percent, render

_CELLS = 48
_STYLES = {"kernel": (COLORS["kernel"], "circle"), "function body": (COLORS["body"], "square")}
_ENGINE_STYLE = (COLORS["engine"], "circle")
_SHOWN_FAILURES = 3
_MASK_KINDS = {
    SEEN: (SEEN_COLOR, "seen"),
    PARTLY: (PARTLY_COLOR, "seen in part"),
    GLOBAL: (GLOBAL_COLOR, "global token, here the first"),
}


def check_page(report: CheckReport) -> str:
    """The page, as HTML text; it needs no other file, no network and no script."""
    return render(
        "check.html",
        report=report,
        model=report.source.model_class.rpartition(".")[2],
        failures=report.failures,
        shown=_SHOWN_FAILURES,
        first_off=[line for path in report.paths if (line := describe_first_off(report, path.name))],
        compared=sum(1 for case in report.cases if case.outputs),
        ran=[path for path in report.paths if path.ran],
        tiles=_tiles(report),
        lowering_charts=[_lowering_chart(report, name) for name in _outputs(report)],
        approximation_charts=[chart for name in _outputs(report) if (chart := _approximation_chart(report, name))],
        colors={path.name: _STYLES.get(path.name, _ENGINE_STYLE)[0] for path in report.paths}
        | {ORIGINAL: COLORS["original"]},
        original=ORIGINAL,
        minimum=minimum_tolerances(report),
        patterns=_patterns(report.sites),
        mask_kinds=_MASK_KINDS,
        ladders=_ladders(report.sites),
        over=over_tolerance,
        finite=math.isfinite,
        given=_given(report),
    )


def _outputs(report: CheckReport) -> list[str]:
    return list(dict.fromkeys(output.name for case in report.cases for output in case.outputs))


def _tiles(report: CheckReport) -> list[tuple[str, str, str]]:
    """(label, value, more) of the figures at the top."""
    compared = [case for case in report.cases if case.outputs]
    skipped = len(report.cases) - len(compared)
    limit = "" if report.max_length is None else f"of {report.max_length:,} tokens accepted"
    tiles = [
        ("cases compared", str(len(compared)), f"{skipped} skipped" if skipped else "none skipped"),
        ("longest input", f"{report.checked_length:,}", limit),
    ]
    tiles += [_path_tile(report, path) for path in report.paths]
    approximations = [o.approximation for case in report.cases for o in case.outputs if o.approximation is not None]
    if approximations and report.faithful:
        worst = max(approximations, key=over_tolerance)
        tiles.append(("original model", "same mathematics", f"float64, at most {number(worst.error.max_abs)} apart"))
    elif approximations:
        lowest = min(judged.error.cosine for judged in approximations)
        tiles.append(("original model", f"cosine ≥ {lowest:.4f}", f"approximated: {report.approximation}"))
    return tiles


def _path_tile(report: CheckReport, path: PathReport) -> tuple[str, str, str]:
    if not path.ran:
        return path.name, "not run", path.reason
    worst = report.worst(path.name)
    times = 0.0 if worst is None else over_tolerance(worst[1].lowering[path.name])
    value = "–" if worst is None else f"{percent(times)} of tolerance" if times <= 1 else "beyond tolerance"
    return path.name, value, f"{path.what_ran}, {path.runtime}"


def _title(case: CaseReport, what: str, judged: Judged) -> str:
    return f"{case.case}: {what}: {judged}"


def _lowering_chart(report: CheckReport, name: str) -> dict[str, Any]:
    found = [(case, output) for case in report.cases for output in case.outputs if output.name == name]
    series = []
    for path in (path.name for path in report.paths if path.ran):
        color, marker = _STYLES.get(path, _ENGINE_STYLE)
        points = [
            Point(case.case.length, output.lowering[path].error.max_abs, output.lowering[path].passed,
                  _title(case, path, output.lowering[path]))
            for case, output in found
            if path in output.lowering
        ]  # fmt: skip
        series.append(Series(path, color, marker, tuple(points)))
    allowed = [
        (case, judged)
        for case, output in found
        for judged in output.lowering.values()
        if not judged.rtol and judged.tolerance
    ]
    return _chart(name, series, allowed, f"lowering error of {name} over length")


def _approximation_chart(report: CheckReport, name: str) -> dict[str, Any] | None:
    found = [
        (case, output.approximation)
        for case in report.cases
        for output in case.outputs
        if output.name == name and output.approximation is not None
    ]
    if not found:
        return None
    points = [
        Point(case.case.length, judged.error.max_abs, judged.passed, _title(case, ORIGINAL, judged))
        for case, judged in found
    ]
    series = [Series(ORIGINAL, COLORS["original"], "triangle", tuple(points))]
    # A band over all lengths would say that an approximation is judged where it is only reported.
    all_judged = all(judged.tolerance is not None for _, judged in found)
    allowed = [(case, judged) for case, judged in found if all_judged and not judged.rtol and judged.tolerance]
    return _chart(name, series, allowed, f"approximation error of {name} over length")


def _chart(
    name: str, series: Sequence[Series], allowed: Sequence[tuple[CaseReport, Judged]], label: str
) -> dict[str, Any]:
    smallest: dict[float, float] = {}
    for case, judged in allowed:
        assert judged.tolerance is not None
        length = case.case.length
        smallest[length] = min(smallest.get(length, math.inf), judged.tolerance)
    return {"name": name, "series": series, "svg": markup(error_chart(series, sorted(smallest.items()), label))}


def _patterns(sites: Sequence[AttentionSite]) -> list[dict[str, Any]]:
    """Each distinct mask with its pictures and the layers that have it; all at one scale, to be compared.

    A report has no graph, so block lists are drawn from the pattern that was recorded, where one was.
    """
    groups: dict[tuple[str, str, bool], list[AttentionSite]] = {}
    for site in sites:
        groups.setdefault((site.operator, site.pattern, "global_mask" in site.inputs), []).append(site)
    scale = scale_for(max((group[0].kind.picture_width(group[0]) for group in groups.values()), default=0), _CELLS)
    found = []
    for group in groups.values():
        try:
            pictures, reason = group[0].kind.picture(group[0], None, scale, 1), ""
        except Unknown as error:
            pictures, reason = [], str(error)
        found.append(
            {
                "site": group[0],
                "layers": [site.layer or site.node for site in group],
                "pictures": [markup(svg) for svg in mask_svgs(pictures)],
                "reason": reason,
                "kinds": {kind for picture in pictures for kind in np.unique(picture).tolist()},
                "scale": scale,
            }
        )
    return found


def _ladders(sites: Sequence[AttentionSite]) -> list[dict[str, Any]]:
    """Each distinct lowering ladder with the sites that share it."""
    groups: dict[Any, list[AttentionSite]] = {}
    for site in sites:
        groups.setdefault(site.ladder, []).append(site)
    return [{"rungs": ladder, "sites": group} for ladder, group in groups.items()]


def _given(report: CheckReport) -> str:
    """The tolerances that the user gave, as they stand on a command line."""
    values = [
        f"--{option} {f'{output}:' if output else ''}{value:g}"
        for option, by_output in (("rtol", report.rtol), ("atol", report.atol))
        for output, value in by_output.items()
    ]
    return " ".join(values)
