"""Operators of the ``longspan`` domain: definitions, reference maths, kernels and runtime glue."""

from __future__ import annotations

from .definition import DOMAIN, OPSET_VERSION, Operator
from .errors import InvalidOperands, LibraryMissing, PluginError
from .library import ort_library_path
from .registry import operator, operators

__all__ = [
    "DOMAIN",
    "OPSET_VERSION",
    "InvalidOperands",
    "LibraryMissing",
    "Operator",
    "PluginError",
    "operator",
    "operators",
    "ort_library_path",
]
