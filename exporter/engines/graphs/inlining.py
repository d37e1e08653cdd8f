"""Put the function bodies of attention sites in their place, in the form that TensorRT builds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from ....plugins.definition import DOMAIN, PACK_ATTRIBUTE, PACK_ID_ATTRIBUTE
from ....plugins.errors import InvalidOperands
from ....plugins.functions import fixed_size_body
from ...errors import ExportFailed

if TYPE_CHECKING:
    import onnx_ir as ir

    from ....plugins.block_sparse_attention.long_rows import LongRows

NOTHING_KNOWN: Mapping[str, LongRows] = MappingProxyType({})
"""All rows of blocks have the width of the lists."""


def inline_other_functions(model: ir.Model) -> None:
    """Inline, in place, the model-local functions of all other domains: TensorRT ignores their overloads."""
    _inline(model, lambda function: function.domain != DOMAIN)


def inline_sites(model: ir.Model, sites: Sequence[ir.Node], long_rows: Mapping[str, LongRows] = NOTHING_KNOWN) -> None:
    """Replace ``longspan`` nodes, in place, by the nodes of their function bodies.

    Each node and value of a body gets the name of the site before its own, ``SITE/OPERATOR_NUMBER``: TensorRT names
    layers after nodes, and reports failures by them.

    Args:
        model: Has no functions of other domains that call ``longspan`` operators; the names of its nodes are unique.
        sites: Nodes of the model's graph, or of graphs nested in it.
        long_rows: Rows of blocks that are computed apart, by the name of the site's node.

    Raises:
        ExportFailed: a node contradicts its operator's definition, or the model's opset is too old for bodies.
    """
    bodies: dict[ir.OperatorIdentifier, ir.Function] = {}
    for node in sites:
        body = _named_body(node, model.opset_imports.get("", 0), long_rows.get(node.name or ""))
        bodies[body.identifier()] = body
    model.functions.update(bodies)
    _inline(model, lambda function: bodies.get(function.identifier()) is function)


def _named_body(node: ir.Node, opset: int, long_rows: LongRows | None) -> ir.Function:
    """The body of a site as a function of its own, which the node, changed in place, calls."""
    import onnx_ir as ir

    for deployment in (PACK_ATTRIBUTE, PACK_ID_ATTRIBUTE):
        node.attributes.pop(deployment, None)
    try:
        body = fixed_size_body(node, opset, long_rows)
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
    return ir.Function(
        body.domain, body.name, node.overload, graph=body.graph, attributes=list(body.attributes.values())
    )


def _inline(model: ir.Model, wanted: Callable[[ir.Function], bool]) -> None:
    from onnx_ir.passes.common import InlinePass

    InlinePass(criteria=wanted)(model)
