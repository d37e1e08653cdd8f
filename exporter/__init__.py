"""Longspan's Python API: trace a model, replace its attention, prove the result equal and time it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .conversion import Conversion
from .errors import (
    BundleCorrupted,
    EnvironmentLacks,
    ExporterError,
    ExportFailed,
    FallbackRan,
    InvalidRequest,
    NothingReplaced,
)

if TYPE_CHECKING:
    from .bench import bench
    from .bundle import Bundle
    from .check import check
    from .export import export
    from .inspect import inspect
    from .sources import SourceRequest

__all__ = [
    "Bundle",
    "BundleCorrupted",
    "Conversion",
    "EnvironmentLacks",
    "ExportFailed",
    "ExporterError",
    "FallbackRan",
    "InvalidRequest",
    "NothingReplaced",
    "SourceRequest",
    "bench",
    "check",
    "export",
    "inspect",
]

# Each name is imported when it is first used: torch and onnxruntime take seconds to import.
_LAZY = {
    "Bundle": "bundle",
    "SourceRequest": "sources",
    "bench": "bench",
    "check": "check",
    "export": "export",
    "inspect": "inspect",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
