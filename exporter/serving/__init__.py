"""Serving: model repositories of engines for inference servers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names

if TYPE_CHECKING:
    from .triton_repository import PackageRequest, package

__all__ = ["PackageRequest", "package"]

__getattr__ = lazy_names(globals(), {"PackageRequest": "triton_repository", "package": "triton_repository"})
