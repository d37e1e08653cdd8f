"""Engines: what a bundle becomes for one runtime and one architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names
from .request import BuildRequest

if TYPE_CHECKING:
    from .builder import build
    from .manifest import Engine, EngineManifest
    from .onnxruntime.session import open_ort_session

__all__ = ["BuildRequest", "Engine", "EngineManifest", "build", "open_ort_session"]

__getattr__ = lazy_names(
    globals(),
    {"Engine": "manifest", "EngineManifest": "manifest", "build": "builder", "open_ort_session": "onnxruntime.session"},
)
