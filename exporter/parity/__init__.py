"""Prove that a bundle computes what its model does.

Two errors are kept apart. The *approximation error* is what the pattern costs: the intercepted model against the
original one, both in torch and in float64. The *lowering error* is what the runtime adds: each path through it against
the same intercepted model in float64.
"""

from __future__ import annotations

from .cases import Case
from .checker import check
from .report import CaseReport, CheckReport, OutputReport, PathReport

__all__ = ["Case", "CaseReport", "CheckReport", "OutputReport", "PathReport", "check"]
