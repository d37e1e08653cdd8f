"""``.pt2`` files: programs that torch.export has traced already."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

from ..errors import ExportFailed, InvalidRequest
from ..manifest import SourceRecord, sha256_of
from .base import Source, SourceRequest, record_input

_PLAIN_PREFIXES = ("weight_", "tensor_")


def load_program(request: SourceRequest) -> Source:
    """Load a program whose attention calls longspan operators; their dynamic dimensions are those of its trace.

    Raises:
        InvalidRequest: the file does not exist, holds pickles that are not allowed, or an option does not apply.
        ExportFailed: the file is not a program, or its inputs are not tensors given by name or position.
    """
    path = Path(request.location)
    if not path.is_file():
        raise InvalidRequest(f"{path}: no such file; give a .pt2 file that torch.export.save wrote")
    if request.random_weights or request.inputs:
        raise InvalidRequest(f"{path}: --random-weights and --inputs do not apply to a program that is traced already")
    if not request.allow_pickle:
        refuse_pickles(path)

    import torch

    from ...plugins.sliding_window_attention import torch_op  # noqa: F401  (registers the ops that the file may call)

    try:
        program = torch.export.load(path)
    except Exception as error:
        raise ExportFailed(f"{path}: torch.export.load failed: {type(error).__name__}: {error}") from error
    if program.example_inputs is None:
        raise ExportFailed(f"{path}: has no example inputs; save it with torch.export.save from a fresh trace")
    names = program.graph_signature.user_inputs
    args, kwargs = program.example_inputs
    values = [*args, *kwargs.values()]
    if len(names) != len(values) or not all(isinstance(value, torch.Tensor) for value in values):
        raise ExportFailed(f"{path}: takes nested inputs; allowed: tensors, each given by name or position")
    examples = dict(zip([str(name) for name in names], values, strict=True))
    record = SourceRecord(
        kind="program",
        location=request.location,
        model_class="torch.export.ExportedProgram",
        files={path.name: sha256_of(path)},
        seed=request.seed,
        pickled_weights=request.allow_pickle,
    )
    records = {name: record_input(name, value) for name, value in examples.items()}
    return Source(record, program, examples, None, records, max_length=None)


def refuse_pickles(path: Path) -> None:
    """Check that loading the file runs no pickled code.

    torch.export.load unpickles what the archive's own tables call pickled or custom, and falls back to unrestricted
    unpickling of the example inputs, so all three are looked at first.

    Raises:
        InvalidRequest: something in the file could run code.
        ExportFailed: the file is not a ``.pt2`` archive.
    """
    import torch

    advice = "pickles can run any code; if you trust this file, add --allow-pickle"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.endswith("/archive_format") or name == "archive_format" for name in names):
                raise InvalidRequest(f"{path}: is in torch.export's old format, which is pickled; {advice}")
            tables = [n for n in names if n.endswith("_config.json") and ("/weights/" in n or "/constants/" in n)]
            for table in tables:
                for name, payload in json.loads(archive.read(table))["config"].items():
                    plain = str(payload["path_name"]).startswith(_PLAIN_PREFIXES)
                    if payload["use_pickle"] or not plain:
                        raise InvalidRequest(f"{path}: stores {name} as a pickle; {advice}")
            for sample in (name for name in names if "/sample_inputs/" in name):
                try:
                    torch.load(io.BytesIO(archive.read(sample)), weights_only=True)
                except Exception as error:
                    raise InvalidRequest(f"{path}: its example inputs hold more than tensors; {advice}") from error
    except (zipfile.BadZipFile, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ExportFailed(f"{path}: is not a .pt2 archive ({error}); write one with torch.export.save") from error
