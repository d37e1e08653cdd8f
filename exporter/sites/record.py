"""Attention sites: the records that rewriting, reporting and checking read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...plugins.definition import DOMAIN, Operator
from ...plugins.registry import operator
from .block_sparse import COMPUTED, FIXED, GIVEN, LISTS
from .kind import SiteKind, SweepLengths
from .kinds import kind_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..patterns import Pattern

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
        pattern_json: JSON of the pattern that the site was made from (`patterns.from_json`); empty where unknown. It is
            what was asked for; what the site computes, its node and its lists say.
        lists: Where block lists come from: ``"fixed"`` in the file, ``"given"`` as inputs of the model, or
            ``"computed"`` in the graph; empty for operators without.
    """

    node: str
    layer: str
    operator: str
    inputs: tuple[str, ...]
    attributes: dict[str, Any]
    recognised_by: str
    ladder: tuple[Rung, ...] = ()
    pattern_json: str = ""
    lists: str = ""

    @property
    def definition(self) -> Operator:
        """Definition of the site's operator."""
        return operator(self.operator)

    @property
    def kind(self) -> SiteKind:
        """What is particular to sites of this operator."""
        return kind_of(self.operator)

    @property
    def recorded(self) -> Pattern | None:
        """The pattern that the site was made from; None where none is recorded that this version can read."""
        from .recorded_pattern import read

        return read(self.pattern_json)

    @property
    def pattern(self) -> str:
        """The pattern in words, e.g. ``"256 left, 256 right, dilation 2, causal"``."""
        return self.kind.words(self)

    @property
    def short_pattern(self) -> tuple[str, str]:
        """The pattern in one or two words, and its sizes: ``("causal window", "4095+0")``."""
        return self.kind.short(self)

    @property
    def heads(self) -> str:
        """Query heads, and key heads where they differ; empty where the node leaves them to its 4-D inputs."""
        query, key = (self.attributes.get(name, 0) for name in ("q_num_heads", "kv_num_heads"))
        return "" if not query else f"{query}" if query == key else f"{query} / {key}"

    @property
    def reach(self) -> int:
        """Largest distance in tokens between a query and a key, global tokens apart; -1 where there is no bound."""
        return self.kind.reach(self)

    def sweep(self, always_global: int = 0) -> SweepLengths:
        """Lengths around which the site's behaviour changes.

        Args:
            always_global: First tokens that a conversion made global: a text outgrows its window as many tokens later.
        """
        return self.kind.sweep(self, always_global)


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
    from ...plugins.torch_support import PATTERN

    definition = operator(node.op_type)
    present = zip(definition.inputs, node.inputs, strict=False)
    return AttentionSite(
        node=node.name or "",
        layer=_layer(node),
        operator=node.op_type,
        inputs=tuple(formal.name for formal, value in present if value is not None),
        attributes={name: _plain(attribute.value) for name, attribute in node.attributes.items()},
        recognised_by=recognised_by,
        pattern_json=node.metadata_props.get(PATTERN, ""),
        lists=_lists(definition, node),
    )


def _lists(definition: Operator, node: ir.Node) -> str:
    """Where the block lists of a node come from; the farthest from the file of those that it has."""
    import onnx_ir as ir

    names = [tensor.name for tensor in definition.inputs]
    values = [value for name, value in zip(names, node.inputs, strict=False) if name in LISTS and value is not None]
    if not values:
        return ""
    changing = [value for value in values if ir.convenience.get_const_tensor(value) is None]
    if any(value.producer() is not None for value in changing):
        return COMPUTED
    return GIVEN if changing else FIXED


def _layer(node: ir.Node) -> str:
    """The innermost module scope that torch.onnx recorded, without the levels that the exporter itself adds."""
    import ast

    recorded = node.metadata_props.get(_SCOPES, "[]")
    scopes = [scope for scope in ast.literal_eval(recorded) if scope not in _EXPORTER_LEVELS]
    # The last scope is the operator call itself.
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value
