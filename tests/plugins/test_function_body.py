from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from longspan.plugins.functions import attach_function_bodies
from longspan.plugins.sliding_window_attention.definition import SLIDING_WINDOW_ATTENTION

from .sliding_window_cases import CASES, Array, Case, expected

TYPES = {name: ir.DataType.FLOAT for name in ("Q", "K", "V")}


def site(
    operands: dict[str, Array],
    attributes: dict[str, Any],
    dtype: ir.DataType = ir.DataType.FLOAT,
    opset: int = 18,
    lse: bool = True,
) -> ir.Model:
    """Model of one node, every axis of its inputs dynamic."""
    kinds = {"attn_mask": "BOOL", "global_mask": "BOOL", "nonpad_kv_seqlen": "INT64", "spans": "FLOAT"}
    inputs = {}
    for name, array in operands.items():
        kind = ir.DataType[kinds[name]] if name in kinds else dtype
        shape = [f"{name}_{axis}" for axis in range(array.ndim)]
        inputs[name] = ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))
    formal = [inputs.get(tensor.name) for tensor in SLIDING_WINDOW_ATTENTION.inputs]
    outputs = [
        ir.Value(name="Y", type=ir.TensorType(dtype), shape=ir.Shape([f"Y_{a}" for a in range(operands["Q"].ndim)])),
        ir.Value(name="lse", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["l0", "l1", "l2"])),
    ][: 1 + lse]
    node = ir.Node(
        "longspan", "SlidingWindowAttention", formal, ir.convenience.convert_attributes(attributes), outputs=outputs
    )
    graph = ir.Graph(
        list(inputs.values()), outputs, nodes=[node], opset_imports={"": opset, "longspan": 1}, name="site"
    )
    return ir.Model(graph, ir_version=10)


def session(model: ir.Model, **options: Any) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 2
    for name, value in options.items():
        setattr(settings, name, value)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"])


def feeds(operands: dict[str, Array], dtype: Any = np.float32) -> dict[str, Array]:
    return {
        name: array.astype(np.float32 if name == "spans" else dtype) if array.dtype == np.float64 else array
        for name, array in operands.items()
    }


@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: Case, layout: str) -> None:
    operands = case.operands(layout)
    want_y, want_lse = expected(case, layout)
    for lse in (True, False):
        model = site(operands, case.node_attributes(layout), lse=lse)
        attach_function_bodies(model)
        got = session(model).run(None, feeds(operands))
        np.testing.assert_allclose(got[0], want_y, rtol=0, atol=5e-6)
        if lse:
            np.testing.assert_allclose(got[1], want_lse, rtol=0, atol=5e-6)
