"""Judge what was measured: when it is measured, and again later, under other tolerances, without a rerun."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import InvalidRequest
from .hull import Hull, excess, merge, smallest_common, smallest_rtol
from .inputs import numpy_type
from .report import CaseReport, CheckReport, Judged, OutputReport
from .tolerances import FACTOR, Overrides, Scale, identity_tolerance, lowering_tolerance

ORIGINAL = "original model"
"""What stands where a path would, for the pattern in torch against the original model."""


def judge_output(output: OutputReport, overrides: Overrides) -> OutputReport:
    """The same measurement under the tolerances that the user gave, or else the derived ones.

    A comparison whose tolerance is None is reported only, and stays so.
    """
    given = overrides.of(output.name)
    ingredients = (output.torch_error, output.magnitude, numpy_type(output.dtype), Scale(output.terms, output.depth))
    rtol, lowering = given or (0.0, lowering_tolerance(*ingredients))
    approximation = output.approximation
    if approximation is not None and approximation.tolerance is not None:
        identity = given[1] if given else identity_tolerance(*ingredients)
        approximation = Judged(approximation.error, identity, rtol)
    return dataclasses.replace(
        output,
        lowering={path: Judged(judged.error, lowering, rtol) for path, judged in output.lowering.items()},
        approximation=approximation,
    )


def judge(report: CheckReport, overrides: Overrides) -> CheckReport:
    """A check judged again; exact for every tolerance, because the report holds the hull of the errors.

    The sites keep their derived tolerances: what the user gives is for outputs.

    Raises:
        InvalidRequest: `overrides` name an output that the report does not have.
    """
    names = list(dict.fromkeys(output.name for case in report.cases for output in case.outputs))
    if names:
        overrides.check(names)
    elif overrides:
        raise InvalidRequest("--judge: the report holds no comparison that could be judged; next step: run the check")
    cases = tuple(
        dataclasses.replace(case, outputs=tuple(judge_output(output, overrides) for output in case.outputs))
        for case in report.cases
    )
    return dataclasses.replace(report, cases=cases, rtol=dict(overrides.rtol), atol=dict(overrides.atol))


FAR = 16.0
"""How many times what rounding explains torch's error in an engine's type must be to be called something else."""


def weak_verdicts(cases: Iterable[CaseReport], overrides: Overrides) -> tuple[str, ...]:
    """What a reader must know of tolerances that prove little: one line for each output with such, for its worst case.

    A tolerance is twice torch's own error in the engine's type. Rounding makes that error as large as the one in the
    model's own type times the ratio of the roundoffs. Where it is many times larger, torch did not round, but overflow,
    cancel, or choose otherwise (another expert, another block), and an engine that is right is no nearer to the
    tolerance than one that is broken.
    """
    worst: dict[str, tuple[float, str]] = {}
    for case in cases:
        for output in case.outputs:
            if output.explained is None or not math.isfinite(output.torch_error) or overrides.of(output.name):
                continue
            floor = Scale(output.terms, output.depth).floor(numpy_type(output.dtype), output.magnitude)
            explained = max(output.explained, floor)
            times = output.torch_error / explained if explained else 0.0
            if times > max(FAR, worst.get(output.name, (0.0, ""))[0]):
                allowed = FACTOR * output.torch_error + floor
                what = f"torch itself is off by {output.torch_error:.3g} in {output.dtype}"
                text = (
                    f"{output.name} at {case.case}: {what}, where rounding explains {explained:.3g}; the tolerance of "
                    f"{allowed:.3g} that follows from it proves little, and the type may not suit the model; next "
                    "step: another type, or --atol"
                )
                worst[output.name] = times, text
    return tuple(text for _, text in worst.values())


@dataclass(frozen=True)
class MinimumTolerance:
    """The smallest tolerances under which one output passes in every case.

    Attributes:
        output: Output name.
        path: A path, or `ORIGINAL`.
        atol: With no relative tolerance; infinite where a value is missing or not finite.
        rtol: With no absolute tolerance; infinite also where a zero came out as something else.
        common: As both at once, ``atol = rtol``, for values around 1 the usual choice.
        passed: Whether the output passed in every case as it was judged.
    """

    output: str
    path: str
    atol: float
    rtol: float
    common: float
    passed: bool


def minimum_tolerances(report: CheckReport) -> tuple[MinimumTolerance, ...]:
    """The smallest tolerances that would pass, per output and path, over all cases that are judged."""
    found: dict[tuple[str, str], list[Judged]] = {}
    for case in report.cases:
        for output in case.outputs:
            for path, judged in output.lowering.items():
                found.setdefault((output.name, path), []).append(judged)
            if output.approximation is not None and output.approximation.tolerance is not None:
                found.setdefault((output.name, ORIGINAL), []).append(output.approximation)
    return tuple(_minimum(output, path, judged) for (output, path), judged in sorted(found.items()))


def _minimum(output: str, path: str, judged: list[Judged]) -> MinimumTolerance:
    passed = all(one.passed for one in judged)
    if any(math.isinf(one.error.max_abs) for one in judged):
        return MinimumTolerance(output, path, math.inf, math.inf, math.inf, passed)
    hull: Hull = merge([one.error.hull for one in judged])
    return MinimumTolerance(output, path, excess(hull, 0.0), smallest_rtol(hull), smallest_common(hull), passed)
