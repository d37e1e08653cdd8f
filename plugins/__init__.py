"""Operators of the ``longspan`` domain: definitions, reference maths, kernels and runtime glue."""

from __future__ import annotations

from .definition import DOMAIN, OPSET_VERSION, Operator
from .errors import InvalidLibrary, InvalidOperands, LibraryMissing, PluginError
from .library import ort_library_path, plugin_library_major, tensorrt_library_path
from .registry import operator, operators

__all__ = [
    "DOMAIN",
    "OPSET_VERSION",
    "InvalidLibrary",
    "InvalidOperands",
    "LibraryMissing",
    "Operator",
    "PluginError",
    "operator",
    "operators",
    "ort_library_path",
    "plugin_library_major",
    "tensorrt_library_path",
]
