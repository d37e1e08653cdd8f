"""Turn a float32 graph into a strongly typed one of another precision, with islands that stay float32.

In a strongly typed graph the types in the file are those that are computed in: nothing is left to a builder's flags.
What computes in which type, and why, is in `rules.py`; how it is decided for a node in `plan.py`.
See ``docs/precision.md``.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from ....plugins.definition import DOMAIN, PACK_ATTRIBUTE, PACK_ID_ATTRIBUTE
from ....plugins.functions import attach_function_bodies
from ...errors import ExportFailed, InvalidRequest
from ..graphs.inlining import inline_other_functions
from .lowering import Lowering
from .plan import plan_precision
from .record import Clamped, Kept, Precision
from .values import is_float, promote

__all__ = ["DTYPES", "MINIMUM_OPSET", "Clamped", "Kept", "Precision", "convert_precision"]

DTYPES: Mapping[str, ir.DataType] = {
    "fp32": ir.DataType.FLOAT,
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
"""The element type of each precision."""

MINIMUM_OPSET = 20
"""Oldest opset that is converted: IsInf and Gelu have the types that are needed from then on."""

_MAKE_SEQUENCES = ("SequenceConstruct", "SequenceInsert", "SequenceErase", "SequenceEmpty", "SplitToSequence")


def convert_precision(model: ir.Model, dtype: str, *, convert_io: bool = False) -> Precision:
    """Convert a graph to a precision.

    float16 and bfloat16 that it has already are taken as float32 first, so that the result does not depend on the
    precision that the graph comes in, and converting twice changes nothing. float64 is left alone.

    Args:
        model: A graph of opset 20 or later, with ``longspan`` nodes or without. It is not changed; the result shares
            the weights that stay as they are. Functions of other domains are inlined. Function bodies of ``longspan``
            nodes compute in float32 inside, whatever their operands are; a graph whose bodies were inlined before has
            their products in the narrow type as well, and their softmax in float32.
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        convert_io: Give the graph's own floating-point inputs and outputs that type too. They keep theirs otherwise, so
            that an engine can take the place of the model that it was made from.

    Raises:
        InvalidRequest: there is no such precision.
        ExportFailed: the graph is too old; a value has no type; an operator is unknown; a trained tensor has numbers
            beyond the range of `dtype`.
    """
    if dtype not in DTYPES:
        raise InvalidRequest(f"precision {dtype!r}: allowed: {', '.join(DTYPES)}")
    opset = model.opset_imports.get("", 0)
    if opset < MINIMUM_OPSET:
        raise ExportFailed(
            f"precision: the graph uses opset {opset}; allowed: {MINIMUM_OPSET} or later; next step: export again, or "
            f"use onnx.version_converter.convert_version(model, {MINIMUM_OPSET})"
        )
    prepared = model.clone()
    inline_other_functions(prepared)
    _infer_types(prepared)
    bodies = any(domain == DOMAIN for domain, *_ in prepared.functions)
    for identifier in [identifier for identifier in prepared.functions if identifier[0] == DOMAIN]:
        del prepared.functions[identifier]
    interface = [*prepared.graph.inputs, *prepared.graph.outputs]
    declared = [DTYPES[dtype] if convert_io and is_float(value) else value.dtype for value in interface]
    _drop_kernels_of_other_types(prepared, DTYPES[dtype])
    promote(prepared)
    inputs = len(prepared.graph.inputs)
    lowering = Lowering(prepared, plan_precision(prepared, DTYPES[dtype]), DTYPES[dtype])
    lowering.run(declared[:inputs], declared[inputs:])
    if bodies:
        attach_function_bodies(prepared)
    return lowering.result(dtype)


def _drop_kernels_of_other_types(model: ir.Model, dtype: ir.DataType) -> None:
    """Take the GPU kernels, in place, off the ``longspan`` nodes whose type is going to be another."""
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN and node.inputs[0] is not None and node.inputs[0].dtype != dtype:
            for attribute in (PACK_ATTRIBUTE, PACK_ID_ATTRIBUTE):
                node.attributes.pop(attribute, None)


def _infer_types(model: ir.Model) -> None:
    """Give every value a type, in place.

    Raises:
        ExportFailed: shape inference does not find one.
    """

    def untyped() -> list[ir.Node]:
        return [node for node in model.graph.all_nodes() if any(v.name and v.type is None for v in node.outputs)]

    without = untyped()
    if without:
        from onnx_ir.passes.common import ShapeInferencePass

        ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    for node in without:
        for value in node.outputs:
            if node.op_type in _MAKE_SEQUENCES and isinstance(value.type, ir.TensorType):
                # The pass of onnx-ir 1.1 takes what is in a sequence for the sequence.
                value.type, value.shape = ir.SequenceType(value.type), None
    missing = untyped()
    if missing:
        named = ", ".join(f"{node.domain or 'ai.onnx'}::{node.op_type} {node.name!r}" for node in missing[:3])
        raise ExportFailed(
            f"precision: the results of {len(missing)} nodes have no type ({named}): nothing says whether they are "
            "floats; next step: give the graph value_info for them, or a function for the operator"
        )
