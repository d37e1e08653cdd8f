"""Everything that MODEL may be: a Hugging Face model, a factory in a Python file, an exported program."""

from __future__ import annotations

from pathlib import Path

from .base import Source, SourceRequest
from .weights import refuse_non_finite

__all__ = ["Source", "SourceRequest", "load_source"]


def load_source(request: SourceRequest) -> Source:
    """Load the model that `request` names.

    Raises:
        InvalidRequest: the location does not exist, is of no known kind, or the options do not fit it.
        EnvironmentLacks: a package that this kind of model needs is not installed.
        ExportFailed: the model exists and cannot be loaded, or its weights are not finite.
    """
    source = _load(request)
    refuse_non_finite(request.location, source.model)
    return source


def _load(request: SourceRequest) -> Source:
    location = request.location
    if Path(location).suffix == ".pt2":
        from .program import load_program

        return load_program(request)
    path, separator, _ = location.rpartition(":")
    if separator and path.endswith(".py"):
        from .factory import load_factory

        return load_factory(request)
    from .huggingface import load_huggingface

    return load_huggingface(request)
