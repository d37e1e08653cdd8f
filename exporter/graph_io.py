"""Name a graph's inputs and dimensions, write it, and read back what was really written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ExportFailed
from .manifest import InputRecord, OutputRecord
from .sources.base import BATCH, SEQUENCE

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

EXTERNAL_DATA_BYTES = 1 << 30
"""Weights above this size go to a file beside the model; protobuf itself ends at 2 GiB."""


def name_dimensions(model: ir.Model) -> None:
    """Rename the symbols of the graph: the first input's dimension 0 is the batch, its dimension 1 the sequence."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for symbol, wanted in zip(value.shape or (), (BATCH, SEQUENCE), strict=False):
            if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None and wanted not in names.values():
                names.setdefault(symbol.value, wanted)
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                [names.get(d.value or "", d.value) if isinstance(d, ir.SymbolicDim) else d for d in value.shape]
            )


def save_model(model: ir.Model, path: Path, external_data_bytes: int = EXTERNAL_DATA_BYTES) -> None:
    """Write `path`, and ``<path>.data`` beside it where the weights are larger than `external_data_bytes`."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > external_data_bytes else None)


def read_interface(
    path: Path, drawn: Mapping[str, InputRecord]
) -> tuple[tuple[InputRecord, ...], tuple[OutputRecord, ...]]:
    """Read the inputs and outputs of a written file and check that batch and sequence vary.

    Args:
        path: The ONNX file.
        drawn: How to draw each input, by name.

    Raises:
        ExportFailed: a dimension that should vary is fixed, or the file has an input that nobody described.
    """
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    inputs = []
    for value in graph.input:
        if value.name not in drawn:
            raise ExportFailed(f"the graph has an input {value.name!r} that the model does not take")
        record = drawn[value.name]
        shape = _shape(value)
        for wanted, got in zip(record.shape, shape, strict=True):
            if isinstance(wanted, str) and not isinstance(got, str):
                raise ExportFailed(
                    f"input {value.name}: tracing fixed the {wanted} dimension to {got}; the model compares or "
                    "branches on it; look for such code, or give dynamic_shapes that allow it"
                )
        inputs.append(InputRecord(record.name, _dtype(value), shape, record.role, record.low, record.high))
    return tuple(inputs), tuple(OutputRecord(v.name, _dtype(v), _shape(v)) for v in graph.output)


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _dtype(value: onnx.ValueInfoProto) -> str:
    import onnx

    return str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
