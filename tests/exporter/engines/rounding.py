"""Run a strongly typed graph with the rounding that its types say, which ONNX Runtime's CPU provider does not do.

That provider has few kernels for float16 and none for bfloat16. It computes the others in float32, and casts at the
ends of a run of nodes, not between them: ``Sqrt(Mul(x, x))`` in float16 of 300 comes out as 300 there, and as infinity
on hardware. So every node of a narrow type gets casts of its own here, to float32 before it and back behind it:
products and sums accumulate in float32, as tensor cores do, and each result is rounded to the type that the graph gives
it. The runtime keeps casts that stand in the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from longspan.plugins import LibraryMissing, ort_library_path

FLOAT = ir.DataType.FLOAT
NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TYPELESS = ("Cast", "Loop", "If", "Scan", "Constant")  # nodes that round nothing, or only what they are told to


def explicitly_rounded(model: ir.Model) -> ir.Model:
    """A copy in which nodes compute in float32 and casts round."""
    copy = model.clone()
    for graph in [copy.graph, *copy.graph.subgraphs()]:
        for node in list(graph):
            if node.op_type in _TYPELESS:
                continue
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype in NARROW:
                    node.replace_input_with(index, _cast(graph, node, value, FLOAT, before=True))
            for value in node.outputs:
                if value.dtype in NARROW:
                    narrow = value.dtype
                    value.type = ir.TensorType(FLOAT)
                    _replace(value, _cast(graph, node, value, narrow, before=False))
    return copy


def rounded_everywhere(model: ir.Model, dtype: ir.DataType) -> ir.Model:
    """A float32 graph as it is when every float of it has a narrow type, with no islands: what must go wrong."""
    copy = model.clone()
    for graph in [copy.graph, *copy.graph.subgraphs()]:
        for value in graph.initializers.values():
            if value.const_value is not None and value.dtype == FLOAT:
                with np.errstate(over="ignore"):
                    narrow = value.const_value.numpy().astype(dtype.numpy())
                value.const_value = ir.tensor(narrow.astype(np.float32), name=value.name)
        for node in list(graph):
            for value in node.outputs:
                if node.op_type not in ("Loop", "If", "Scan", "Constant") and value.dtype == FLOAT:
                    narrow_value = _cast(graph, node, value, dtype, before=False)
                    wide = _cast(graph, narrow_value.producer(), narrow_value, FLOAT, before=False)
                    _replace(value, wide)
                    narrow_value.producer().replace_input_with(0, value)  # type: ignore[union-attr]
    return copy


def _replace(value: ir.Value, by: ir.Value) -> None:
    """Let everything but `by` itself read `by`, under the name of a graph output."""
    value.replace_all_uses_with(by, replace_graph_outputs=True)
    producer = by.producer()
    assert producer is not None
    if producer.inputs[0] is by:
        producer.replace_input_with(0, value)
    if by.is_graph_output():
        value.name, by.name = f"{value.name}_exact", value.name


def _cast(graph: ir.Graph, node: ir.Node | None, value: ir.Value, dtype: ir.DataType, before: bool) -> ir.Value:
    assert node is not None
    cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))])
    cast.outputs[0].name = f"{value.name}_{id(cast)}"
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(dtype), value.shape
    (graph.insert_before if before else graph.insert_after)(node, cast)
    return cast.outputs[0]


def run_rounded(model: ir.Model, feed: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Outputs of a strongly typed graph by name, in float64."""
    return run(explicitly_rounded(model), feed)


def run(model: ir.Model, feed: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Outputs by name, in float64; ``longspan`` nodes run the kernel where the library is there."""
    session = session_of(model)
    names = [value.name for value in session.get_outputs()]
    return {
        name: np.asarray(value, np.float64) for name, value in zip(names, session.run(None, dict(feed)), strict=True)
    }


def session_of(model: ir.Model) -> onnxruntime.InferenceSession:
    """A session of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    with contextlib.suppress(LibraryMissing):  # function bodies run
        options.register_custom_ops_library(ort_library_path())
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
