"""Which GPU kernels are wanted: read from a graph's nodes, or described by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..plugins.definition import Operator
from ..plugins.gpu.variants import KernelSite, NoKernel
from ..plugins.registry import operator, operators
from .errors import InvalidRequest
from .sites.record import longspan_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

FLAGS = ("causal", "exclude_self", "softcap", "lse", "lists_per_head", "tf32")
"""Features of a site that are not inputs."""

_LISTS = ("kv_num_blocks", "full_kv_num_blocks")


@dataclass(frozen=True)
class GraphSites:
    """The sites of a graph, as GPU kernels see them.

    Attributes:
        sites: By name of the node, in graph order.
        refused: Why a node has no GPU kernel, by its name.
    """

    sites: dict[str, KernelSite]
    refused: dict[str, str]


def graph_sites(model: ir.Model) -> GraphSites:
    """Read the sites of a graph whose values have shapes and types."""
    sites, refused = {}, {}
    for node in longspan_nodes(model):
        try:
            sites[node.name or ""] = _site(node)
        except NoKernel as error:
            refused[node.name or ""] = str(error)
    return GraphSites(sites, refused)


def _site(node: ir.Node) -> KernelSite:
    definition = operator(node.op_type)
    inputs = {
        tensor.name: value
        for tensor, value in zip(definition.inputs, node.inputs, strict=False)
        if value is not None
    }  # fmt: skip
    attributes = _attributes(node, definition)
    q, k, v = (_dimensions(inputs[name], name) for name in "QKV")
    if len(q) == 4:
        heads, kv_heads, head_size, v_head_size = q[1], k[1], q[3], v[3]
    else:
        heads, kv_heads = attributes.get("q_num_heads", 0), attributes.get("kv_num_heads", 0)
        head_size, v_head_size = _quotient(q[2], heads), _quotient(v[2], kv_heads)
    for name, size in (("H_q", heads), ("H_kv", kv_heads), ("D", head_size), ("D_v", v_head_size)):
        if not isinstance(size, int) or size < 1:
            raise NoKernel(
                f"its {name} is {size or 'unknown'}: kernels are compiled for numbers of heads and head sizes"
            )
    second = [inputs[name].shape for name in _LISTS if name in inputs]
    return KernelSite(
        operator=definition.name, dtype=_dtype(inputs["Q"]), head_size=head_size, v_head_size=v_head_size,
        heads=heads, kv_heads=kv_heads, inputs=tuple(inputs), attributes=attributes,
        lse=len(node.outputs) > 1 and bool(node.outputs[1].name),
        # One list for all heads only where the graph says so.
        lists_per_head=bool(second) and not all(shape is not None and shape[1] == 1 for shape in second),
    )  # fmt: skip


def _attributes(node: ir.Node, definition: Operator) -> dict[str, Any]:
    known = {attribute.name for attribute in definition.attributes}
    return {name: attribute.value for name, attribute in node.attributes.items() if name in known}


def _dimensions(value: ir.Value, name: str) -> list[Any]:
    if value.shape is None or len(value.shape) not in (3, 4):
        raise NoKernel(f"the graph does not say how many axes its {name} has")
    return [dimension if isinstance(dimension, int) else None for dimension in value.shape]


def _quotient(width: int | None, heads: int) -> int | None:
    return width // heads if width and heads else None


def _dtype(value: ir.Value) -> str:
    names = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
    kind = value.dtype.name if value.dtype is not None else "unknown"
    return names.get(kind, kind.lower())


@dataclass(frozen=True)
class Wanted:
    """Sites described by hand: every combination of what the lists hold.

    Attributes:
        operators: Names.
        dtypes: T.
        head_sizes: (D, D_v).
        groups: Query heads per key head.
        features: Optional inputs, and members of `FLAGS`.
        attributes: Of the nodes: dilation, q_block_size, kv_block_size; an operator without one ignores it.
    """

    operators: Sequence[str]
    dtypes: Sequence[str]
    head_sizes: Sequence[tuple[int, int]]
    groups: Sequence[int] = (1,)
    features: Sequence[str] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def sites(self) -> list[KernelSite]:
        """Every combination.

        Raises:
            InvalidRequest: there is no such operator or feature, or no kernel for a combination.
        """
        found = []
        for name, dtype, (size, v_size), group in itertools.product(
            self.operators, self.dtypes, self.head_sizes, self.groups
        ):
            try:
                found.append(self._site(_operator(name), dtype, size, v_size, group))
            except NoKernel as error:
                raise InvalidRequest(str(error)) from error
        return found

    def _site(self, definition: Operator, dtype: str, size: int, v_size: int, group: int) -> KernelSite:
        known = {attribute.name for attribute in definition.attributes}
        optional = [tensor.name for tensor in definition.inputs if tensor.optional]
        flags = [flag for flag in FLAGS if {"causal": "is_causal"}.get(flag, flag) in {*known, "lse", "tf32"}]
        flags += ["lists_per_head"] if any(tensor.name in _LISTS for tensor in definition.inputs) else []
        for feature in self.features:
            if feature not in (*optional, *flags):
                raise InvalidRequest(
                    f"--features {feature}: {definition.name} has no such feature; allowed: "
                    f"{', '.join(optional + flags)}"
                )
        features = set(self.features)
        attributes = {name: value for name, value in self.attributes.items() if name in known}
        attributes |= {
            f"is_{flag}" if flag == "causal" else flag: 1 for flag in ("causal", "exclude_self") if flag in features
        }
        # Which cap it is is no matter of the kernel.
        attributes |= {"softcap": 1.0} if "softcap" in features else {}
        steps = attributes.get("dilation", [1])
        heads = len(steps) if len(set(steps)) > 1 else group
        if heads % group:
            raise NoKernel(f"--dilation for {heads} query heads: not a multiple of --group {group}")
        return KernelSite(
            operator=definition.name, dtype=dtype, head_size=size, v_head_size=v_size, heads=heads,
            kv_heads=heads // group,
            inputs=tuple(t.name for t in definition.inputs if not t.optional or t.name in features),
            attributes=attributes, lse="lse" in features, lists_per_head="lists_per_head" in features,
            allow_tf32="tf32" in features,
        )  # fmt: skip


def _operator(name: str) -> Operator:
    names = {definition.name.lower(): definition for definition in operators()}
    key = name.replace("-", "").replace("_", "").lower()
    if key not in names:
        allowed: Iterable[str] = (definition.name for definition in operators())
        raise InvalidRequest(f"--operator {name}: no such operator; allowed: {', '.join(allowed)}")
    return names[key]
