"""Attention sites: the records that rewriting, reporting and checking read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..plugins.definition import DOMAIN, Operator
from ..plugins.registry import operator

if TYPE_CHECKING:
    import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"
_EXPORTER_LEVELS = ("", "model")


@dataclass(frozen=True)
class Rung:
    """One step of the lowering ladder at a site.

    Attributes:
        lowering: ``"standard op"``, ``"contrib op"``, ``"longspan kernel"`` or ``"function body"``.
        chosen: Whether the site is lowered this way.
        reason: Why, or why not.
    """

    lowering: str
    chosen: bool
    reason: str


@dataclass(frozen=True)
class AttentionSite:
    """One attention in a model's graph.

    Attributes:
        node: Name of the node in the graph.
        layer: Name of the PyTorch module it was traced from; empty where unknown.
        operator: Name of the operator, e.g. ``"SlidingWindowAttention"``.
        inputs: Formal names of the inputs that are present, in order.
        attributes: The node's attributes, as plain JSON values.
        recognised_by: How the site was found, e.g. ``"family longformer"``.
        ladder: The rungs that were considered, from the most standard to the most general.
    """

    node: str
    layer: str
    operator: str
    inputs: tuple[str, ...]
    attributes: dict[str, Any]
    recognised_by: str
    ladder: tuple[Rung, ...] = ()

    @property
    def definition(self) -> Operator:
        """Definition of the site's operator."""
        return operator(self.operator)

    @property
    def pattern(self) -> str:
        """The band in words, e.g. ``"256 left, 256 right, dilation 2, causal"``."""
        sides = ("left_window_size", "left"), ("right_window_size", "right")
        words = [f"{size if (size := self.attributes.get(name, -1)) >= 0 else 'all'} {side}" for name, side in sides]
        dilation = self.attributes.get("dilation", [1])
        if max(dilation) > 1:
            words.append(f"dilation {'/'.join(str(step) for step in dilation)}")
        if self.attributes.get("is_causal", 0):
            words.append("causal")
        return ", ".join(words)

    @property
    def heads(self) -> str:
        """Query heads, and key heads where they differ; empty where the node leaves them to its 4-D inputs."""
        query, key = (self.attributes.get(name, 0) for name in ("q_num_heads", "kv_num_heads"))
        return "" if not query else f"{query}" if query == key else f"{query} / {key}"

    @property
    def reach(self) -> int:
        """Largest distance in tokens between a query and a key of its band; -1 when unbounded."""
        sides = (self.attributes.get("left_window_size", -1), self.attributes.get("right_window_size", -1))
        return -1 if min(sides) < 0 else max(sides) * max(self.attributes.get("dilation", [1]))


@dataclass(frozen=True)
class StandardSite:
    """One attention that stays as the stock exporter makes it.

    Attributes:
        layer: Name of the PyTorch module.
        reason: Why it is not replaced, e.g. ``"full attention: every query sees all keys up to its own"``.
    """

    layer: str
    reason: str


def longspan_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Nodes of the ``longspan`` domain in the main graph, in graph order."""
    return (node for node in model.graph if node.domain == DOMAIN)


def find_sites(model: ir.Model, recognised_by: str) -> tuple[AttentionSite, ...]:
    """Read the attention sites of a graph that contains ``longspan`` nodes."""
    return tuple(_site(node, recognised_by) for node in longspan_nodes(model))


def _site(node: ir.Node, recognised_by: str) -> AttentionSite:
    definition = operator(node.op_type)
    present = zip(definition.inputs, node.inputs, strict=False)
    return AttentionSite(
        node=node.name or "",
        layer=_layer(node),
        operator=node.op_type,
        inputs=tuple(formal.name for formal, value in present if value is not None),
        attributes={name: _plain(attribute.value) for name, attribute in node.attributes.items()},
        recognised_by=recognised_by,
    )


def _layer(node: ir.Node) -> str:
    """The innermost module scope that torch.onnx recorded, without the levels that the exporter itself adds."""
    import ast

    recorded = node.metadata_props.get(_SCOPES, "[]")
    scopes = [scope for scope in ast.literal_eval(recorded) if scope not in _EXPORTER_LEVELS]
    # The last scope is the operator call itself.
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value
