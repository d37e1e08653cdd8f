"""``.pt2`` files: programs that torch.export has traced already."""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ExportFailed, InvalidRequest
from ..manifest import SourceRecord, sha256_of
from .base import Source, SourceRequest, record_input

# What torch.export.save writes for a program of plain tensors.
_MEMBER = re.compile(
    r"[^/]+/(models/[\w.-]+\.json|data/(weights|constants)/([a-z]+_\d+|[\w.-]+_config\.json)"
    r"|data/sample_inputs/[\w.-]+\.pt|archive_format|archive_version|byteorder|version|\.data/\w+|\.format_version)"
)
_PLAIN_TENSOR = re.compile(r"(weight|tensor)_\d+")

# What symbolic shapes are made of, as sympy prints them: Add(Symbol('s27', integer=True), Integer(1)).
_SYMBOL = re.compile(r"[a-z]{1,4}\d+")
_TEXT = re.compile(r"[a-z]{1,4}\d+|[-+]?\d+(\.\d*)?(e[-+]?\d+)?")
_FUNCTIONS = frozenset(
    (
        *(
            "Symbol",
            "Integer",
            "Rational",
            "Float",
            "Add",
            "Mul",
            "Pow",
            "Max",
            "Min",
            "Abs",
            "Mod",
            "floor",
            "ceiling",
        ),
        *("Eq", "Ne", "Ge", "Gt", "Le", "Lt", "Equality", "Unequality", "StrictLessThan", "StrictGreaterThan"),
        *("LessThan", "GreaterThan", "And", "Or", "Not", "FloorDiv", "CleanDiv", "CeilDiv", "PythonMod", "LShift"),
        *("ModularIndexing", "Where", "RShift", "CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "ToFloat"),
        *("ceiling", "TruncToFloat", "IntTrueDiv", "FloatTrueDiv", "FloatPow", "PowByNatural", "Identity"),
    )
)
_ARITHMETIC = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
    ast.Load, ast.keyword,
)  # fmt: skip


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
    pickled = False
    try:
        refuse_code(path)
    except InvalidRequest:
        if not request.allow_pickle:
            raise
        pickled = True

    import torch

    from ...plugins import torch_ops  # noqa: F401  (registers the ops that the file may call)

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
        pickled_weights=pickled,
    )
    records = {name: record_input(name, value) for name, value in examples.items()}
    return Source(record, program, examples, None, records, _max_length(program, examples))


def _max_length(program: Any, examples: dict[str, Any]) -> int | None:
    """Upper bound that the trace put on dimension 1 of the first input; None when there is none."""
    import torch

    first = next(iter(examples))
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == first)
    size = value.shape[1] if value.dim() > 1 else None
    if not isinstance(size, torch.SymInt):
        return None
    limits = program.range_constraints.get(size.node.expr)
    upper = None if limits is None else limits.upper
    # Unbounded dimensions have an infinity of torch's own, or the largest integer.
    return int(upper) if upper is not None and upper.is_Integer and int(upper) < 2**31 else None


def refuse_code(path: Path) -> None:
    """Check that loading the file runs no code of its own.

    torch.export.load unpickles what the archive's own tables call pickled or custom, falls back to unrestricted
    unpickling of the example inputs, loads compiled libraries, and evaluates the text of symbolic shapes. So the file
    may hold what an exported program consists of and nothing else, its tables may name plain tensors only, and its
    shapes may be arithmetic only.

    Raises:
        InvalidRequest: something in the file could run code.
        ExportFailed: the file is not a ``.pt2`` archive.
    """
    import torch

    advice = "which can run any code; if you trust this file, add --allow-pickle"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.endswith("archive_format") for name in names):
                raise InvalidRequest(f"{path}: is in torch.export's old format, a pickle, {advice}")
            for name in names:
                if not _MEMBER.fullmatch(name):
                    raise InvalidRequest(f"{path}: holds {name}, which is no part of a plain program and {advice[6:]}")
            for table in (name for name in names if name.endswith("_config.json")):
                for tensor, payload in json.loads(archive.read(table))["config"].items():
                    if payload["use_pickle"] or not _PLAIN_TENSOR.fullmatch(str(payload["path_name"])):
                        raise InvalidRequest(f"{path}: stores {tensor} as a pickle, {advice}")
            for graph in (name for name in names if "/models/" in name):
                for expression in _expressions(json.loads(archive.read(graph))):
                    if not _is_arithmetic(expression):
                        raise InvalidRequest(f"{path}: has a shape that is more than arithmetic, {advice}")
            for sample in (name for name in names if "/sample_inputs/" in name):
                try:
                    torch.load(io.BytesIO(archive.read(sample)), weights_only=True)
                except Exception as error:
                    raise InvalidRequest(f"{path}: its example inputs hold a pickle, {advice}") from error
    except (zipfile.BadZipFile, AttributeError, KeyError, TypeError, ValueError) as error:
        # An InvalidRequest is a ValueError too.
        if isinstance(error, InvalidRequest):
            raise
        raise ExportFailed(f"{path}: is not a .pt2 archive ({error}); write one with torch.export.save") from error


def _expressions(value: Any) -> Iterator[Any]:
    """Every symbolic shape in a serialized graph."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "expr_str":
                yield item
            else:
                yield from _expressions(item)
    elif isinstance(value, list):
        for item in value:
            yield from _expressions(item)


def _is_arithmetic(expression: Any) -> bool:
    """Whether a text consists of symbols, numbers, operators and known functions; sympy evaluates it as Python."""
    try:
        tree = ast.parse(expression, mode="eval")
    except (SyntaxError, TypeError, ValueError):
        return False
    return all(
        isinstance(node, _ARITHMETIC)
        or (isinstance(node, ast.Name) and (_SYMBOL.fullmatch(node.id) or node.id in _FUNCTIONS))
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS)
        or (isinstance(node, ast.Constant) and _is_plain_constant(node.value))
        for node in ast.walk(tree)
    )


def _is_plain_constant(value: Any) -> bool:
    return isinstance(value, (bool, int, float)) or (isinstance(value, str) and bool(_TEXT.fullmatch(value)))
