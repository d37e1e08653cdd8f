"""Give every operator of the ``longspan`` domain in a model its function body, so that any ONNX runtime can run it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TypeVar

import onnx_ir as ir

from .attention.function_body import AttentionSignature
from .block_sparse_attention import function as block_sparse_attention
from .block_sparse_attention.long_rows import LongRows
from .definition import DOMAIN, OPSET_VERSION
from .errors import InvalidOperands
from .registry import operator
from .sliding_window_attention import function as sliding_window_attention

MINIMUM_OPSET = 18
"""Oldest version of the standard domain that the bodies can be written in."""

_OVERLOADS_SINCE = 10  # ONNX IR version

_Body = tuple[AttentionSignature, Callable[[int], ir.Function]]  # of one node; the function builds it for an opset
_S = TypeVar("_S", bound=AttentionSignature)


def _bodies(
    signature_of: Callable[[ir.Node], _S], function_body: Callable[[_S, int], ir.Function]
) -> Callable[[ir.Node], _Body]:
    def body(node: ir.Node) -> _Body:
        signature = signature_of(node)
        return signature, lambda opset: function_body(signature, opset)

    return body


_OPERATORS = {
    "BlockSparseAttention": _bodies(block_sparse_attention.Signature.of, block_sparse_attention.function_body),
    "SlidingWindowAttention": _bodies(sliding_window_attention.Signature.of, sliding_window_attention.function_body),
}


def attach_function_bodies(model: ir.Model) -> None:
    """Set the overload of every ``longspan`` node and add the function of each overload that occurs.

    Functions of the domain that no node calls any more are removed, so repeating the call changes nothing.

    Args:
        model: Changed in place. IR version and opset imports are raised as far as functions need it.

    Raises:
        InvalidOperands: a node names no known operator or contradicts its definition, or the model's opset is below 18.
    """
    nodes = [node for node in _all_nodes(model) if node.domain == DOMAIN]
    if not nodes:
        return
    opset = model.opset_imports.get("", 0)
    _check_opset(opset)
    functions: dict[ir.OperatorIdentifier, ir.Function] = {}
    for node in nodes:
        signature, build = _body(node)
        write_out(node)
        node.overload = signature.overload
        if node.op_identifier() not in functions:
            functions[node.op_identifier()] = build(opset)
    for identifier in [identifier for identifier in model.functions if identifier[0] == DOMAIN]:
        del model.functions[identifier]
    model.functions.update(functions)
    model.opset_imports[DOMAIN] = OPSET_VERSION
    model.ir_version = max(model.ir_version, _OVERLOADS_SINCE)


def write_out(node: ir.Node) -> None:
    """Write a node, in place, so that every consumer of it and of its body understands it.

    Absent inputs at the end are cut off: TensorRT-RTX wants as many on the node as on the function. A single number
    becomes a list where the definition has a list: a body refers to an attribute by its type. Defaults are written out:
    `onnx.inliner` does not know the default values of a function's attributes.
    """
    while node.inputs and node.inputs[-1] is None:
        node.resize_inputs(len(node.inputs) - 1)
    for definition in operator(node.op_type).attributes:
        attribute = node.attributes.get(definition.name)
        if attribute is not None and attribute.type == ir.AttributeType.INT and definition.kind == "ints":
            node.attributes[definition.name] = ir.AttrInt64s(definition.name, [attribute.as_int()])
        if attribute is None and definition.default is not None:
            [node.attributes[definition.name]] = ir.convenience.convert_attributes(
                {definition.name: definition.default}
            )


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Nodes of the graph and of all functions, nested graphs included."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def signature_of(node: ir.Node) -> AttentionSignature:
    """What the body of a ``longspan`` node is specialised for.

    Raises:
        InvalidOperands: the node names no known operator or contradicts its definition.
    """
    return _body(node)[0]


def fixed_size_body(node: ir.Node, opset: int, long_rows: LongRows | None = None) -> ir.Function:
    """Build the body of a ``longspan`` node in which every size follows from shapes, for one node to be inlined.

    TensorRT builds nothing else. `attach_function_bodies` prefers a form that looks at the lists, where that one is
    faster.

    Args:
        node: Its attributes and inputs are written, in place, as `attach_function_bodies` writes them.
        opset: The model's version of the standard domain.
        long_rows: What is known of the lists of a BlockSparseAttention at every length: all other rows are computed at
            a width of their own. None computes all rows at the width of the lists.

    Raises:
        InvalidOperands: the node names no known operator or contradicts its definition, or the opset is below 18.
    """
    _check_opset(opset)
    signature = signature_of(node)
    write_out(node)
    if isinstance(signature, block_sparse_attention.Signature):
        fixed = dataclasses.replace(signature, even=True, long_rows=long_rows)
        return block_sparse_attention.function_body(fixed, opset)
    return _body(node)[1](opset)


def _check_opset(opset: int) -> None:
    if opset < MINIMUM_OPSET:
        raise InvalidOperands(
            f"the model uses opset {opset}; allowed for function bodies: {MINIMUM_OPSET} or later; next step: export "
            f"with a later opset, or use onnx.version_converter.convert_version(model, {MINIMUM_OPSET})"
        )


def _body(node: ir.Node) -> _Body:
    if node.op_type not in _OPERATORS:
        raise InvalidOperands(
            f"node {node.name!r} is {DOMAIN}::{node.op_type}, which has no function body; there are: "
            f"{', '.join(_OPERATORS)}"
        )
    return _OPERATORS[node.op_type](node)
