"""Everything that MODEL may be: a Hugging Face model, a factory in a Python file, an exported program."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .base import FACTORY, PROGRAM, Source, SourceRequest, file_of, form_of
from .weights import refuse_non_finite

__all__ = ["Source", "SourceRequest", "load_source"]


def load_source(request: SourceRequest) -> Source:
    """Load the model that `request` names.

    Raises:
        InvalidRequest: the location does not exist, is of no known kind, or the options do not fit it.
        EnvironmentLacks: a package that this kind of model needs is not installed.
        ExportFailed: the model exists and cannot be loaded, or its weights are not finite.
    """
    # Known before the model's own code runs, which may change the working folder.
    location = _lasting(request.location)
    source = _load(request)
    refuse_non_finite(request.location, source.model)
    return dataclasses.replace(source, record=dataclasses.replace(source.record, location=location))


def _lasting(location: str) -> str:
    """The location as it is understood from any working folder; a hub id stays as it is."""
    file = Path(file_of(location))
    return f"{file.absolute()}{location.removeprefix(file_of(location))}" if file.exists() else location


def _load(request: SourceRequest) -> Source:
    form = form_of(request.location)
    if form == PROGRAM:
        from .program import load_program

        return load_program(request)
    if form == FACTORY:
        from .factory import load_factory

        return load_factory(request)
    from .huggingface import load_huggingface

    return load_huggingface(request)
