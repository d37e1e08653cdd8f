"""Say what TensorRT's parser does not take in words that it takes; the graph computes the same in any runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .refusals import STANDARD

if TYPE_CHECKING:
    import onnx_ir as ir

HISTOGRAM_UP_TO = 1024
"""Most entries of a vector that numbers are scattered into by comparing each with each: experts of a mixture."""


def without_loop_conditions(model: ir.Model) -> None:
    """Take from each Loop with a trip count, in place, a condition that is never false.

    With both, TensorRT warns that scan outputs may have the wrong shape, and keeps a recurrence for the condition.
    """
    import onnx_ir as ir

    for node in model.graph.all_nodes():
        if node.op_type != "Loop" or node.domain not in STANDARD or None in node.inputs[:2]:
            continue
        body = node.attributes["body"].as_graph()
        condition, kept = node.inputs[1], body.outputs[0].producer()
        constant = ir.convenience.get_const_tensor(condition) if condition is not None else None
        passed_on = kept is not None and kept.op_type == "Identity" and kept.inputs[0] is body.inputs[1]
        if constant is not None and bool(constant.numpy()) and kept is not None and passed_on:
            node.replace_input_with(1, None)
            # Without the condition, TensorRT's parser does not know the body's input for it either.
            always = ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(True))], name=kept.name)
            always.outputs[0].name = f"{kept.outputs[0].name}_always"
            body.insert_before(kept, always)
            kept.outputs[0].replace_all_uses_with(always.outputs[0], replace_graph_outputs=True)
            body.remove(kept, safe=True)


def counted_by_comparison(model: ir.Model) -> None:
    """Replace, in place, each ScatterElements that adds to a short vector; TensorRT's has no reductions.

    Mixtures of experts count the tokens of each expert so: entry e becomes ``data[e] + sum of updates[i] where
    indices[i] = e``, N x E comparisons for N tokens.
    """
    for node in list(model.graph):
        if _adds_to_short_vector(node):
            _compare(model, node)


def _adds_to_short_vector(node: ir.Node) -> bool:
    if node.op_type != "ScatterElements" or node.domain not in STANDARD or "reduction" not in node.attributes:
        return False
    data, indices = node.inputs[0], node.inputs[1]
    if node.attributes["reduction"].as_string() != "add" or data is None or indices is None:
        return False
    size = data.shape[0] if data.shape is not None and len(data.shape) == 1 else None
    return isinstance(size, int) and size <= HISTOGRAM_UP_TO and data.dtype is not None


def _compare(model: ir.Model, node: ir.Node) -> None:
    import numpy as np
    import onnx_ir as ir
    from onnx_ir import tape

    data, indices, updates = node.inputs
    assert data is not None and data.shape is not None and data.dtype is not None
    size = int(data.shape[0])  # type: ignore[arg-type]
    new = tape.Tape()

    def constant(value: list[int] | int) -> ir.Value:
        return new.op("Constant", [], {"value": ir.tensor(np.array(value, np.int64))})

    indices = new.op("Cast", [indices], {"to": int(ir.DataType.INT64)})
    # -1 is the last entry.
    indices = new.op(
        "Where", [new.op("Less", [indices, constant(0)]), new.op("Add", [indices, constant(size)]), indices]
    )
    column = constant([1])
    hit = new.op("Equal", [new.op("Unsqueeze", [indices, column]), constant(list(range(size)))])
    zero = new.op("Constant", [], {"value": ir.tensor(np.zeros((), data.dtype.numpy()))})
    terms = new.op("Where", [hit, new.op("Unsqueeze", [updates, column]), zero])
    total = new.op("Add", [data, new.op("ReduceSum", [terms, constant([0])], {"keepdims": 0})])
    for number, added in enumerate(new.nodes):
        added.name = f"{node.name}/{added.op_type}_{number}"
        added.outputs[0].name = f"{node.name}/{added.op_type.lower()}_{number}"
    total.dtype, total.shape = data.dtype, data.shape
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], new.nodes, [node.outputs[0]], [total])
