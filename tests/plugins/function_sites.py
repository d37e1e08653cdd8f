"""Models of one node with its function body, and how to run them in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from longspan.plugins import operator

Array = npt.NDArray[Any]


def value(name: str, dtype: ir.DataType, rank: int | None) -> ir.Value:
    shape = None if rank is None else ir.Shape([f"{name}_{axis}" for axis in range(rank)])
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)


def types(op_type: str, dtype: ir.DataType = ir.DataType.FLOAT) -> dict[str, ir.DataType]:
    """Element type of every input of an operator, with `dtype` for its T."""
    named = {"T": dtype, "float32": ir.DataType.FLOAT}
    return {
        tensor.name: named.get(tensor.dtype) or ir.DataType[tensor.dtype.upper()] for tensor in operator(op_type).inputs
    }


def site(
    operands: dict[str, Array],
    attributes: dict[str, Any],
    dtype: ir.DataType = ir.DataType.FLOAT,
    opset: int = 18,
    lse: bool = True,
    op_type: str = "SlidingWindowAttention",
    static: Collection[str] = (),
) -> ir.Model:
    """Model of one node; every axis of its inputs is dynamic but for those called in `static`."""
    elements = types(op_type, dtype)
    inputs = {name: value(name, elements[name], array.ndim) for name, array in operands.items()}
    for name in static:
        inputs[name].shape = ir.Shape(operands[name].shape)
    outputs = [value("Y", dtype, operands["Q"].ndim), value("lse", ir.DataType.FLOAT, 3)][: 1 + lse]
    nodes = [node(inputs, attributes, outputs, op_type)]
    return ir.Model(graph(list(inputs.values()), nodes, outputs, opset), ir_version=9)


def node(
    inputs: dict[str, ir.Value],
    attributes: dict[str, Any],
    outputs: list[ir.Value],
    op_type: str = "SlidingWindowAttention",
) -> ir.Node:
    formal = [inputs.get(tensor.name) for tensor in operator(op_type).inputs]
    return ir.Node("longspan", op_type, formal, ir.convenience.convert_attributes(attributes), outputs=outputs)


def with_float_interface(model: ir.Model, dtype: ir.DataType) -> None:
    """Let the graph convert Y and the inputs of `dtype`: onnxruntime's Python interface takes no bfloat16 arrays."""
    casts = []
    main = model.graph.node(0)
    for index, formal in enumerate(main.inputs):
        if formal is not None and formal.dtype == dtype:
            formal.dtype = ir.DataType.FLOAT
            casts.append(ir.Node("", "Cast", [formal], [ir.AttrInt64("to", int(dtype))], name=f"cast_{index}"))
            main.replace_input_with(index, casts[-1].outputs[0])
            casts[-1].outputs[0].shape = formal.shape
    y = main.outputs[0]
    y.name = "half"
    back = ir.Node("", "Cast", [y], [ir.AttrInt64("to", 1)], outputs=[value("Y", ir.DataType.FLOAT, len(y.shape))])
    model.graph.insert_before(main, casts)
    model.graph.append(back)
    model.graph.outputs[0] = back.outputs[0]


def graph(inputs: list[ir.Value], nodes: list[ir.Node], outputs: list[ir.Value], opset: int = 18) -> ir.Graph:
    return ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": opset, "longspan": 1}, name="site")


def session(model: ir.Model | onnx.ModelProto, **options: Any) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 2
    for name, setting in options.items():
        setattr(settings, name, setting)
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    return ort.InferenceSession(proto.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def feeds(operands: dict[str, Array], dtype: Any = np.float32) -> dict[str, Array]:
    return {
        name: array.astype(np.float32 if name == "spans" else dtype) if array.dtype == np.float64 else array
        for name, array in operands.items()
    }


def value_sizes(model: ir.Model | onnx.ModelProto, inputs: dict[str, Array], folder: Path) -> list[int]:
    """Elements of every value that a run produces, nested graphs included, once per time that it is produced."""
    running = session(
        model,
        enable_profiling=True,
        profile_file_prefix=str(folder / "profile"),
        graph_optimization_level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    )
    running.run(None, inputs)
    events = json.loads(Path(running.end_profiling()).read_text())
    sizes = [
        int(np.prod(shape))
        for event in events
        for described in event.get("args", {}).get("output_type_shape", [])
        for shape in described.values()
    ]
    assert len(sizes) > 3
    return sizes
