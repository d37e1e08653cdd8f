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
    from .bundle import Bundle
    from .inspection import inspect
    from .parity import check
    from .pattern_attention import attention
    from .pipeline import export
    from .sources import SourceRequest
    from .throughput import bench

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
    "attention",
    "bench",
    "check",
    "export",
    "inspect",
]

# Each name is imported when it is first used: torch and onnxruntime take seconds to import. No module bears the name of
# a function of this package, because importing it would put the module in the function's place.
_LAZY = {
    "Bundle": "bundle",
    "SourceRequest": "sources",
    "attention": "pattern_attention",
    "bench": "throughput",
    "check": "parity",
    "export": "pipeline",
    "inspect": "inspection",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value
