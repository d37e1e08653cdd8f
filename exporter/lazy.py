"""Names of a package that are imported when they are first used: torch and onnxruntime take seconds to import."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: dict[str, Any], modules: Mapping[str, str]) -> Callable[[str], object]:
    """Make the ``__getattr__`` of a package.

    No module may bear the name of what is imported from it: importing it would put the module in its place.

    Args:
        package: The package's ``globals()``; a name is kept there once it was imported.
        modules: The module that has each name, relative to the package.
    """

    def get(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{modules[name]}", package["__name__"]), name)
        package[name] = value
        return value

    return get
