"""Fixtures of the tests of serving."""

from .engines import ort_bundle, plugin_library, served

__all__ = ["ort_bundle", "plugin_library", "served"]
