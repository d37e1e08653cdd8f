"""Time a bundle against what it replaces; the names are imported when first used, because trials pass through here."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .benchmark import bench
    from .report import BenchReport
    from .settings import BenchSettings

__all__ = ["BenchReport", "BenchSettings", "bench"]

_LAZY = {"BenchReport": "report", "BenchSettings": "settings", "bench": "benchmark"}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
