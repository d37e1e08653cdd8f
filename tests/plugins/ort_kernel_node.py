"""One SlidingWindowAttention node without a function body, which only the operator library can run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from longspan.plugins import operator, ort_library_path
from onnx import TensorProto, helper

Array = npt.NDArray[Any]

DTYPES: dict[str, npt.DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
_ONNX_TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
_FIXED = {
    "attn_mask": TensorProto.BOOL,
    "global_mask": TensorProto.BOOL,
    "nonpad_kv_seqlen": TensorProto.INT64,
    "spans": TensorProto.FLOAT,
}


def node_model(
    operands: Mapping[str, Array], attributes: Mapping[str, Any], dtype: str = "float32", lse: bool = True
) -> onnx.ModelProto:
    """Model of the node with float32 graph inputs and outputs, cast to `dtype` around it (numpy has no bfloat16)."""
    definition = operator("SlidingWindowAttention")
    names = [tensor.name if tensor.name in operands else "" for tensor in definition.inputs]
    while not names[-1]:
        names.pop()
    casts, formal, inputs = [], [], []
    for name in names:
        if name:
            kind = _FIXED.get(name, TensorProto.FLOAT)
            shape = [f"{name}_{axis}" for axis in range(operands[name].ndim)]
            inputs.append(helper.make_tensor_value_info(name, kind, shape))
        if name and name not in _FIXED and dtype != "float32":
            casts.append(helper.make_node("Cast", [name], [f"{name}_T"], to=_ONNX_TYPES[dtype]))
            name = f"{name}_T"
        formal.append(name)
    node = helper.make_node(
        definition.name, formal, ["Y_T", "lse"] if lse else ["Y_T"], domain=definition.domain, **attributes
    )
    back = helper.make_node("Cast", ["Y_T"], ["Y"], to=TensorProto.FLOAT)
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("Y", "lse")[: 1 + lse]]
    graph = helper.make_graph([*casts, node, back], "node", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(definition.domain, definition.version)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def session(model: onnx.ModelProto, threads: int = 2) -> ort.InferenceSession:
    """Session with the operator library."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(ort_library_path())
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # nodes that fail are part of the tests
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def rounded(operands: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """The operands as the node sees them: floating-point ones rounded to `dtype`, in float32."""
    return {
        name: array
        if array.dtype.kind != "f"
        else array.astype(np.float32)
        if name == "spans"
        else array.astype(DTYPES[dtype]).astype(np.float32)
        for name, array in operands.items()
    }


def run_node(
    operands: Mapping[str, Array], attributes: Mapping[str, Any], dtype: str = "float32", lse: bool = True
) -> list[Array]:
    """[Y, lse] or [Y] of the kernel, in float32."""
    feeds = rounded(operands, dtype)
    return list(session(node_model(operands, attributes, dtype, lse)).run(None, feeds))
