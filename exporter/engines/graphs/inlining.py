"""Put the function bodies of attention sites in their place, in the form that TensorRT builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ....plugins.definition import DOMAIN, PACK_ATTRIBUTE, PACK_ID_ATTRIBUTE
from ....plugins.errors import InvalidOperands
from ....plugins.functions import fixed_size_body
from ...errors import ExportFailed

if TYPE_CHECKING:
    import onnx_ir as ir


def inline_other_functions(model: ir.Model) -> None:
    """Inline, in place, the model-local functions of all other domains: TensorRT ignores their overloads."""
    _inline(model, lambda function: function.domain != DOMAIN)


def inline_site(model: ir.Model, node: ir.Node) -> None:
    """Replace a ``longspan`` node, in place, by the nodes of its function body.

    Each node and value of the body gets the name of the site before its own, ``SITE/OPERATOR_NUMBER``: TensorRT names
    layers after nodes, and reports failures by them.

    Args:
        model: Has no functions of other domains that call ``longspan`` operators.
        node: A node of the model's graph, or of a graph nested in it.

    Raises:
        ExportFailed: the node contradicts its operator's definition, or the model's opset is too old for bodies.
    """
    import onnx_ir as ir

    for deployment in (PACK_ATTRIBUTE, PACK_ID_ATTRIBUTE):
        node.attributes.pop(deployment, None)
    try:
        body = fixed_size_body(node, model.opset_imports.get("", 0))
    except InvalidOperands as error:
        raise ExportFailed(f"{node.op_type} {node.name!r} has no function body: {error}") from error
    for number, inner in enumerate(body.all_nodes()):
        inner.name = f"{node.name}/{inner.op_type}_{number}"
        for output in inner.outputs:
            output.name = f"{node.name}/{output.name}"
        for attribute in inner.attributes.values():
            if not attribute.is_ref() and attribute.type == ir.AttributeType.GRAPH:
                for formal in attribute.as_graph().inputs:
                    formal.name = f"{node.name}/{formal.name}"
    node.overload = f"inlined {node.name}"
    single = ir.Function(
        body.domain, body.name, node.overload, graph=body.graph, attributes=list(body.attributes.values())
    )
    model.functions[single.identifier()] = single
    _inline(model, lambda function: function is single)


def _inline(model: ir.Model, wanted: Callable[[ir.Function], bool]) -> None:
    from onnx_ir.passes.common import InlinePass

    InlinePass(criteria=wanted)(model)


def without_loop_conditions(model: ir.Model) -> None:
    """Take from each Loop with a trip count, in place, a condition that is never false.

    With both, TensorRT warns that scan outputs may have the wrong shape, and keeps a recurrence for the condition.
    """
    import onnx_ir as ir

    for node in model.graph.all_nodes():
        if node.op_type != "Loop" or node.domain not in ("", "ai.onnx") or None in node.inputs[:2]:
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
