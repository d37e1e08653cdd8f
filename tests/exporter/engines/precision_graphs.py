"""Small graphs to convert to a precision, and what became of them."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from longspan.exporter.engines.precision.conversion import Precision, convert_precision

from .rounding import FLOAT

FLOAT16, BFLOAT16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
TYPES = {"fp16": FLOAT16, "bf16": BFLOAT16}
EPS = {"fp16": 2.0**-10, "bf16": 2.0**-7}  # from 1 to the next number

Initializers = dict[str, Any]


def graph(text: str, opset: int = 20, functions: str = "", **initializers: Any) -> ir.Model:
    """A model of ONNX's textual syntax; arrays given by name are its initializers."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}, "longspan" : 1, "custom" : 1]> agraph {text} {functions}'
    )
    for name, array in initializers.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return ir.from_proto(model)


def converted(model: ir.Model, dtype: str, **options: Any) -> Precision:
    """A conversion that is checked for what every one must be: valid, repeatable, without a cast twice."""
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = convert_precision(model, dtype, **options)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    proto = ir.to_proto(result.model)
    onnx.checker.check_model(proto, full_check=True)
    assert all(value.type is not None for node in result.model.graph.all_nodes() for value in node.outputs)
    again = convert_precision(result.model, dtype, **options)
    assert ir.to_proto(again.model).SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)
    casts = collections.Counter((cast.inputs[0], cast.outputs[0].dtype) for cast in float_casts(result.model))
    assert all(count == 1 for count in casts.values())
    assert all(cast.inputs[0].dtype != cast.outputs[0].dtype for cast in float_casts(result.model))  # type: ignore[union-attr]
    assert result.casts == len(list(float_casts(result.model)))
    return result


def float_casts(model: ir.Model) -> Iterator[ir.Node]:
    floats = (FLOAT, FLOAT16, BFLOAT16)
    for node in model.graph.all_nodes():
        if node.op_type == "Cast" and node.inputs[0].dtype in floats and node.outputs[0].dtype in floats:  # type: ignore[union-attr]
            yield node


def computed_in(model: ir.Model) -> dict[str, ir.DataType | None]:
    """The type in which the node that makes each value computes: that of its first float operand."""
    found = {}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            floats = [v.dtype for v in node.inputs if v is not None and v.dtype in (FLOAT, FLOAT16, BFLOAT16)]
            found[value.name or ""] = floats[0] if floats else value.dtype
    return found


def reasons(result: Precision) -> dict[str, str]:
    return {kept.node: kept.reason for kept in result.kept}


RNG = np.random.default_rng(7)
WEIGHT = RNG.standard_normal((8, 8)).astype(np.float32)


def infer(model: ir.Model) -> ir.Model:
    """The graph with the types of all values."""
    return convert_precision(model, "fp32").model
