"""Element types of values: which operands of a node share one, and a graph in which every float is float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from ....plugins.definition import DOMAIN
from ....plugins.registry import operator, operators
from ...errors import ExportFailed
from ..graphs.refusals import STANDARD

FLOAT = ir.DataType.FLOAT
FLOATS = frozenset((ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16))
"""The types that are converted into one another. float64 is none of them: who asked for it meant it."""

GUARD = "longspan.clamp"
"""Key of the metadata of the nodes that keep a value within the narrow type's range, so that they can be taken out."""

_OPERANDS = "operands"  # names the inputs of a prepared longspan node, which has no empty ones
_BIASES = ("band_bias", "distance_bias", "sinks")
_DTYPE_ATTRIBUTES = ("to", "dtype", "output_dtype")


@dataclass(frozen=True)
class Slots:
    """The types of a node's operands, where they are floats.

    Attributes:
        inputs: Per input: ``"node"`` has the node's type, ``"float32"`` is always float32, ``""`` is no float.
        outputs: Per output, the same.
        allowed: Types that the node may have.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    allowed: frozenset[ir.DataType]


def is_float(value: ir.Value | None) -> bool:
    """Whether a value is a tensor, or holds tensors, of a type that is converted."""
    return value is not None and value.type is not None and value.dtype in FLOATS


def is_tensor(value: ir.Value) -> bool:
    """Whether a value is a tensor, and no sequence of them or an optional one."""
    return isinstance(value.type, ir.TensorType | ir.SparseTensorType)


def touches_floats(node: ir.Node) -> bool:
    """Whether a node has a floating-point operand or result."""
    return any(is_float(value) for value in (*node.inputs, *node.outputs))


def slots_of(node: ir.Node, opset: int) -> Slots:
    """The types of a node's operands.

    Args:
        node: Its values have types.
        opset: Version of the standard domain.

    Raises:
        ExportFailed: nobody says which operands of this operator share a type.
    """
    if node.domain == DOMAIN:
        return _longspan_slots(node)
    if node.domain not in STANDARD:
        raise _unsupported(node)
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        raise _unsupported(node) from None
    variables = {constraint.type_param_str: constraint for constraint in schema.type_constraints}
    used: set[str] = set()

    def slots(values: Any, formals: Any, tied: Callable[[str], bool]) -> tuple[str, ...]:
        found = []
        for index, value in enumerate(values):
            name = formals[min(index, len(formals) - 1)].type_str
            if not is_float(value):
                found.append("")
            elif name in variables and tied(name):
                used.add(name)
                found.append("node")
            else:
                found.append("float32")
        return tuple(found)

    inputs = slots(node.inputs, schema.inputs, lambda name: True)
    bound = set(used)
    outputs = slots(node.outputs, schema.outputs, bound.__contains__)
    allowed = frozenset(
        dtype
        for dtype, text in (
            (ir.DataType.FLOAT, "tensor(float)"),
            (ir.DataType.FLOAT16, "tensor(float16)"),
            (ir.DataType.BFLOAT16, "tensor(bfloat16)"),
        )
        if all(text in variables[name].allowed_type_strs for name in used)
    )
    return Slots(inputs, outputs, allowed)


def _longspan_slots(node: ir.Node) -> Slots:
    if node.op_type not in {definition.name for definition in operators()}:
        raise _unsupported(node)
    definition = operator(node.op_type)
    types = {tensor.name: "node" if tensor.dtype == "T" else "float32" for tensor in definition.inputs}
    named = node.attributes[_OPERANDS].as_strings() if _OPERANDS in node.attributes else list(types)
    return Slots(
        tuple(types[name] if is_float(value) else "" for name, value in zip(named, node.inputs, strict=False)),
        tuple(
            "node" if tensor.dtype == "T" else "float32"
            for tensor, _ in zip(definition.outputs, node.outputs, strict=False)
        ),
        FLOATS,
    )


def adds_to_scores(node: ir.Node, index: int) -> bool:
    """Whether an input of a node is a bias of attention: the lowest number of a type means what any lower one does."""
    if node.domain != DOMAIN:
        return False
    named = node.attributes.get(_OPERANDS)
    name = named.as_strings()[index] if named is not None else operator(node.op_type).inputs[index].name
    return name in _BIASES


def _unsupported(node: ir.Node) -> ExportFailed:
    return ExportFailed(
        f"precision: node {node.name!r} is {node.domain or 'ai.onnx'}::{node.op_type}, of which nothing says which of "
        "its operands share a type; allowed: operators of standard ONNX and of longspan, and others that have a "
        "function in the model; next step: convert before such nodes are made, or give the graph a function for it"
    )


def graphs_of(model: ir.Model) -> Iterator[ir.Graph]:
    """The graph and those nested in its nodes."""
    yield model.graph
    yield from model.graph.subgraphs()


def constant_of(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The numbers of an initializer or of a Constant node."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Constant" and "value" in producer.attributes:
        # onnx-ir's function would rename the tensor, which the model that was cloned shares.
        return producer.attributes["value"].as_tensor().numpy()
    tensor = ir.convenience.get_const_tensor(value)
    return tensor.numpy() if tensor is not None else None


def is_constant(value: ir.Value) -> bool:
    """Whether a value is an initializer or the result of a Constant node."""
    producer = value.producer()
    return value.is_initializer() or (producer is not None and producer.op_type == "Constant")


def set_dtype(value: ir.Value, dtype: ir.DataType) -> None:
    """Give a value, which may be a sequence, another element type; models share types, so it is a new one."""
    value.type = _with_dtype(value.type, dtype)


def _with_dtype(kind: Any, dtype: ir.DataType) -> Any:
    if isinstance(kind, ir.TensorType | ir.SparseTensorType):
        return type(kind)(dtype, denotation=kind.denotation)
    return type(kind)(_with_dtype(kind.elem_type, dtype), denotation=kind.denotation)


def promote(model: ir.Model) -> None:
    """Make every float16 and bfloat16 value float32, in place, and take out the casts between the three.

    Nothing is lost: float32 holds both. What an earlier conversion added is gone afterwards, so that types are decided
    anew.
    """
    for graph in list(graphs_of(model)):
        for node in list(graph):
            _promote_attributes(node)
            if node.domain in STANDARD and node.op_type in ("Cast", "CastLike"):
                _promote_cast(graph, node)
            elif GUARD in node.metadata_props and node.op_type == "Where":
                _bypass(graph, node, node.inputs[1])
        for node in reversed(list(graph)):
            unused = not any(value.uses() or value.is_graph_output() for value in node.outputs)
            if GUARD in node.metadata_props and unused:
                graph.remove(node, safe=True)
    for graph in graphs_of(model):
        for value in [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]:
            if is_float(value) and value.dtype != FLOAT:
                set_dtype(value, FLOAT)
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype in FLOATS - {FLOAT}:
                value.const_value = widened(value.const_value)


def widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A float16 or bfloat16 tensor as float32."""
    return ir.Tensor(tensor.numpy().astype(np.float32), name=tensor.name)


def _promote_attributes(node: ir.Node) -> None:
    if node.domain not in STANDARD:
        return
    for name, attribute in list(node.attributes.items()):
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in FLOATS - {FLOAT}:
            node.attributes[name] = ir.AttrTensor(name, widened(attribute.as_tensor()))
            if node.op_type == "Constant":
                node.outputs[0].const_value = node.attributes[name].as_tensor()
        integer = attribute.type == ir.AttributeType.INT
        if integer and name in _DTYPE_ATTRIBUTES and attribute.as_int() in FLOATS - {FLOAT}:
            node.attributes[name] = ir.AttrInt64(name, int(FLOAT))


def _promote_cast(graph: ir.Graph, node: ir.Node) -> None:
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    if not is_float(result) and node.op_type == "Cast":
        return
    if is_float(source) and is_float(result):
        _bypass(graph, node, source)
    elif node.op_type == "CastLike" and result.dtype is not None:
        to = FLOAT if is_float(result) else result.dtype
        cast = ir.Node("", "Cast", [source], [ir.AttrInt64("to", int(to))], name=node.name)
        cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = result.name, ir.TensorType(to), result.shape
        graph.insert_before(node, cast)
        result.replace_all_uses_with(cast.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _bypass(graph: ir.Graph, node: ir.Node, source: ir.Value | None) -> None:
    """Take out a node that passes `source` on, in place; graph outputs keep their names."""
    result = node.outputs[0]
    assert source is not None
    if result.is_graph_output():
        inside = source.producer() is not None and source.graph is graph and not source.is_graph_output()
        if inside and not is_constant(source):
            source.name = result.name
        else:
            same = ir.Node("", "Identity", [source], name=node.name)
            same.outputs[0].name, same.outputs[0].type, same.outputs[0].shape = result.name, source.type, result.shape
            graph.insert_before(node, same)
            source = same.outputs[0]
    result.replace_all_uses_with(source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
