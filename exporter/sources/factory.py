"""``file.py:factory``: a function that returns a module and example inputs."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import ExportFailed, InvalidRequest
from ..manifest import InputRecord, SourceRecord, fixed_length, sha256_of
from .base import Source, SourceRequest, max_length, record_input

if TYPE_CHECKING:
    import torch

_CONTRACT = "must return (module, example_inputs: dict of tensors) or (module, example_inputs, dynamic_shapes)"


def load_factory(request: SourceRequest) -> Source:
    """Call the factory.

    The module's parameters are what the factory makes them; torch's generator is seeded before the call. Without
    dynamic shapes, dimension 0 of every input is the batch and dimension 1 the sequence; with them, these two are open
    only where they say so.

    Raises:
        InvalidRequest: the file or the function does not exist, or an option does not apply.
        ExportFailed: the factory fails or returns something else than its contract says.
    """
    import torch

    file, _, name = request.location.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InvalidRequest(f"{path}: no such file; give file.py:factory")
    if request.random_weights or request.inputs:
        raise InvalidRequest(f"{path}: --random-weights and --inputs do not apply: the factory decides both")
    factory = getattr(_import(path), name, None)
    if not callable(factory):
        raise InvalidRequest(f"{path}: has no function {name!r}; give file.py:factory")
    torch.manual_seed(request.seed)
    try:
        result = factory()
    except (Exception, SystemExit) as error:
        raise ExportFailed(f"{request.location}: the factory raised {type(error).__name__}: {error}") from error
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise ExportFailed(f"{request.location}: returned {type(result).__name__}; it {_CONTRACT}")
    module, examples, *rest = result
    if not isinstance(module, torch.nn.Module) or not _is_tensor_dict(examples):
        raise ExportFailed(f"{request.location}: returned other types; it {_CONTRACT}")
    record = SourceRecord(
        kind="factory",
        location=request.location,
        model_class=f"{type(module).__module__}.{type(module).__qualname__}",
        files={path.name: sha256_of(path)},
        seed=request.seed,
    )
    shapes = rest[0] if rest else None
    records = {key: _as_fixed(record_input(key, value), value, shapes) for key, value in examples.items()}
    return Source(
        record, module.eval(), examples, shapes, records, fixed_length(records.values()) or max_length(module)
    )


def _as_fixed(record: InputRecord, example: torch.Tensor, dynamic_shapes: Any) -> InputRecord:
    """The record, with the sizes of those dimensions that the user's dynamic shapes do not vary."""
    if not isinstance(dynamic_shapes, Mapping):
        return record
    given = dynamic_shapes.get(record.name) or {}
    varies = dict(enumerate(given)) if isinstance(given, Sequence) else given
    shape = tuple(
        name if _may_vary(varies.get(axis)) else size
        for axis, (name, size) in enumerate(zip(record.shape, example.shape, strict=True))
    )
    return dataclasses.replace(record, shape=shape)


def _may_vary(dimension: Any) -> bool:
    """Whether a dimension of ``dynamic_shapes`` is open: a Dim or ``Dim.AUTO``, unlike None, a size, ``Dim.STATIC``."""
    import torch

    return not (dimension is None or isinstance(dimension, int) or dimension is torch.export.Dim.STATIC)


def _is_tensor_dict(value: Any) -> bool:
    import torch

    return isinstance(value, dict) and bool(value) and all(isinstance(item, torch.Tensor) for item in value.values())


def _import(path: Path) -> ModuleType:
    """Import the file under its own name, with its folder importable meanwhile as for a script."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    module = importlib.util.module_from_spec(specification)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    sys.modules[path.stem] = module
    try:
        # Compiled from the text whose hash is recorded: a cached .pyc beside it could hold anything.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise ExportFailed(f"{path}: importing it raised {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    return module
