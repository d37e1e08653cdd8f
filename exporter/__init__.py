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
from .lazy import lazy_names

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

__getattr__ = lazy_names(
    globals(),
    {
        "Bundle": "bundle",
        "SourceRequest": "sources",
        "attention": "pattern_attention",
        "bench": "throughput",
        "check": "parity",
        "export": "pipeline",
        "inspect": "inspection",
    },
)
