"""One node without a function body, which only the operator library can run, and how exact its results must be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from longspan.plugins import operator, ort_library_path
from onnx import TensorProto, helper

Array = npt.NDArray[Any]

DTYPES: dict[str, npt.DTypeLike] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
_ONNX_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "bool": TensorProto.BOOL,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
}
EPS32 = float(np.finfo(np.float32).eps)


def node_model(
    operands: Mapping[str, Array],
    attributes: Mapping[str, Any],
    dtype: str = "float32",
    lse: bool = True,
    *,
    name: str = "SlidingWindowAttention",
) -> onnx.ModelProto:
    """Model of the node with float32 graph inputs and outputs, cast to `dtype` around it (numpy has no bfloat16)."""
    definition = operator(name)
    types = {tensor.name: tensor.dtype for tensor in definition.inputs}
    names = [tensor.name if tensor.name in operands else "" for tensor in definition.inputs]
    while not names[-1]:
        names.pop()
    casts, values, inputs = [], [], []
    for formal in names:
        value = formal
        if formal:
            kind = TensorProto.FLOAT if types[formal] == "T" else _ONNX_TYPES[types[formal]]
            shape = [f"{formal}_{axis}" for axis in range(operands[formal].ndim)]
            inputs.append(helper.make_tensor_value_info(formal, kind, shape))
            if types[formal] == "T" and dtype != "float32":
                value = f"{formal}_T"
                casts.append(helper.make_node("Cast", [formal], [value], to=_ONNX_TYPES[dtype]))
        values.append(value)
    node = helper.make_node(
        definition.name, values, ["Y_T", "lse"] if lse else ["Y_T"], domain=definition.domain, **attributes
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
    operands: Mapping[str, Array],
    attributes: Mapping[str, Any],
    dtype: str = "float32",
    lse: bool = True,
    *,
    name: str = "SlidingWindowAttention",
) -> list[Array]:
    """[Y, lse] or [Y] of the kernel, in float32."""
    feeds = rounded(operands, dtype)
    return list(session(node_model(operands, attributes, dtype, lse, name=name)).run(None, feeds))


def isas() -> list[str]:
    """The instruction sets that this machine has, as the library names them when it refuses an unknown one."""
    operands = {name: np.zeros((1, 1, 1, 1)) for name in ("Q", "K", "V")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGSPAN_CPU_ISA", "none")
        with pytest.raises(Exception, match="this machine has") as caught:
            session(node_model(operands, {}))
    return str(caught.value).split("this machine has ")[1].split(";")[0].split(", ")


def assert_close(
    got: Sequence[Array], want: Sequence[Array], values: Mapping[str, Array], attributes: Mapping[str, Any], dtype: str
) -> None:
    """Compare [Y, lse] within what float32 arithmetic and rounding to `dtype` allow.

    Rounding moves a score by less than a few eps * |q| |k| scale. A score that is off by e moves Y by up to
    2 e max|v|, and the lse by up to e.

    Args:
        got: Of the kernel.
        want: Of the reference in float64.
        values: The operands, as `rounded` returns them.
        attributes: Of the node.
        dtype: Of the node.
    """
    values = {name: np.where(np.isfinite(array), array, 0) for name, array in values.items()}  # masked, or no weight
    heads = attributes.get("q_num_heads", 1)
    size = values["Q"].shape[-1] // (heads if values["Q"].ndim == 3 else 1)

    def norm(name: str) -> float:
        arrays = (values[key] for key in (name, f"global_{name}") if key in values)
        return max(float(np.linalg.norm(array.reshape(-1, size), axis=1).max(initial=0)) for array in arrays)

    def largest(*names: str) -> float:
        return max((float(np.abs(values[key]).max(initial=0)) for key in names if key in values), default=0.0)

    score = abs(attributes.get("scale", size**-0.5)) * norm("Q") * norm("K")
    score += largest("band_bias", "distance_bias", "sinks")
    error = EPS32 * (4 + 2 * score)
    unit = EPS32 if dtype == "float32" else float(np.finfo(np.float16).eps if dtype == "float16" else 2**-8)
    np.testing.assert_allclose(got[0], want[0], rtol=unit, atol=2 * error * largest("V", "global_V") + 2.0**-25)
    np.testing.assert_allclose(got[1], want[1], rtol=4 * EPS32, atol=error)
