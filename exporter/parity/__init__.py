"""Prove that a bundle computes what its model does.

Two errors are kept apart. The *approximation error* is what the pattern costs: the intercepted model against the
original one, both in torch and in float64. The *lowering error* is what the runtime adds: each path through it against
the same intercepted model in float64.
"""

from __future__ import annotations

from .cases import Case
from .checker import check
from .judging import MinimumTolerance, judge, minimum_tolerances
from .report import CaseReport, CheckReport, OutputReport, PathReport, SitesReport
from .saved import load
from .tolerances import Overrides

__all__ = [
    "Case",
    "CaseReport",
    "CheckReport",
    "MinimumTolerance",
    "OutputReport",
    "Overrides",
    "PathReport",
    "SitesReport",
    "check",
    "judge",
    "load",
    "minimum_tolerances",
]
