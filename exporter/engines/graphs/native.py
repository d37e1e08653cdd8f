"""TensorRT's own Attention layer, for sites whose window leaves out no key at any length that the engine takes.

The layer is one fused kernel and has no window, so that it is right for dense attention only: sites without a window,
and windows as wide as the longest text of the profiles. The layer exists in the narrow types only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from ....plugins.attention.function_body import node_attributes, node_inputs
from ....plugins.sliding_window_attention.definition import SLIDING_WINDOW_ATTENTION, Attributes
from ...errors import ExportFailed
from ...kernel_sites import graph_sites
from ...sites.record import longspan_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

    from ....plugins.gpu.variants import KernelSite

OPSET = 23
"""First version of the standard domain with Attention."""

HEAD_SIZES = range(16, 257, 8)
"""Head sizes with a kernel in TensorRT-RTX 1.7, for each of its compute capabilities."""


def native_sites(model: ir.Model, dtype: str, longest: Mapping[str, int]) -> dict[str, str | None]:
    """Which sites the Attention layer can compute.

    Args:
        model: A bundle's graph.
        dtype: What is built: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        longest: Largest size, over all profiles, of the graph's symbolic dimensions.

    Returns:
        For each site None, or why its function body is built instead.
    """
    sites = graph_sites(model)
    return {
        node.name or "": sites.refused.get(node.name or "")
        or _refusal(node, sites.sites[node.name or ""], dtype, longest)
        for node in longspan_nodes(model)
    }


def _refusal(node: ir.Node, site: KernelSite, dtype: str, longest: Mapping[str, int]) -> str | None:
    if node.op_type != SLIDING_WINDOW_ATTENTION.name:
        return "TensorRT's Attention layer has no block lists"
    if dtype == "fp32":
        return "TensorRT's Attention layer has no kernel for fp32"
    more = [name for name in site.inputs if name not in ("Q", "K", "V", "attn_mask")]
    if more or site.lse:
        return f"TensorRT's Attention layer has no {more[0] if more else 'lse'}"
    attributes = Attributes.from_mapping(node_attributes(node))
    if attributes.softcap:
        return "TensorRT's Attention layer has no softcap"
    if site.head_size != site.v_head_size or site.head_size not in HEAD_SIZES:
        return (
            f"head sizes {site.head_size} and {site.v_head_size}: TensorRT's Attention layer takes one head size, a "
            f"multiple of 8 from {HEAD_SIZES[0]} to {HEAD_SIZES[-1]}"
        )
    if set(attributes.dilation) != {1}:
        return "TensorRT's Attention layer has no dilation"
    q, k = (_length(node, index) for index in (0, 1))
    if attributes.is_causal and (q is None or q != k):
        return "the graph does not say that there are as many queries as keys, and it is causal"
    sides = [attributes.left_window_size, *([] if attributes.is_causal else [attributes.right_window_size])]
    bounded = [size for size in sides if size >= 0]
    most = k if isinstance(k, int) else longest.get(k or "")
    if bounded and (most is None or q != k or min(bounded) < most - 1):
        keys = "an unknown number of" if most is None or q != k else f"up to {most:,}"
        return f"its window of {min(bounded):,} neighbours leaves out keys: texts have {keys} tokens"
    return None


def _length(node: ir.Node, index: int) -> int | str | None:
    """Size of the sequence axis of Q or K, or its symbol."""
    value = node.inputs[index]
    if value is None or value.shape is None:
        return None
    size = value.shape[len(value.shape) - 2]
    return size if isinstance(size, int) else size.value


def write_native(model: ir.Model, nodes: Collection[str]) -> None:
    """Replace sites, in place, by Attention and what it lacks.

    Rows that see no key become zero, and masked keys and values, which may hold NaN, are set to zero before: both as
    the operator defines it. A causal site with padding gets a mask of length x length, made once for all sites that
    share their padding: the layer takes a mask or is causal.

    Args:
        model: In the type to build; it has no other sites and no other functions than these. Its opset is raised to 23.
        nodes: Sites that `native_sites` allows.

    Raises:
        ExportFailed: a node of the graph does not exist in opset 23.
    """
    sites = [node for node in longspan_nodes(model) if node.name in nodes]
    if not sites:
        return
    model.functions.clear()  # the sites' own; raising the opset would inline them
    _raise_opset(model)
    masks: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value]] = {}
    for node in sites:
        _replace(model, node, masks)
    model.opset_imports.pop(SLIDING_WINDOW_ATTENTION.domain, None)


def _raise_opset(model: ir.Model) -> None:
    if model.opset_imports.get("", 0) >= OPSET:
        return
    from onnxscript import version_converter

    before = model.opset_imports[""]
    try:
        version_converter.convert_version(model, OPSET)
    except Exception as error:  # whatever an adapter of some operator raises
        raise ExportFailed(f"the graph cannot be raised from opset {before} to {OPSET}: {error}") from error
    if model.opset_imports[""] != OPSET:
        raise ExportFailed(
            f"the graph stays at opset {model.opset_imports['']}; TensorRT's Attention layer needs {OPSET}; next step: "
            "export from PyTorch again"
        )


class _Nodes:
    """Nodes that take the place of a site, named after it."""

    def __init__(self, site: str) -> None:
        from onnx_ir import tape

        self._site, self.tape = site, tape.Tape()

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        value: ir.Value = self.tape.op(op_type, inputs, attributes)
        number = len(self.nodes) - 1
        self.nodes[-1].name = f"{self._site}/{op_type}_{number}"
        value.name = f"{self._site}/{op_type.lower()}_{number}"
        return value

    def constant(self, numbers: Any, dtype: Any = None) -> ir.Value:
        import numpy as np
        import onnx_ir as ir

        return self("Constant", value=ir.tensor(np.array(numbers, dtype or np.int64)))

    @property
    def nodes(self) -> list[ir.Node]:
        """In order."""
        return list(self.tape.nodes)


def _replace(model: ir.Model, node: ir.Node, masks: dict[tuple[ir.Value, bool], tuple[ir.Value, ir.Value]]) -> None:
    import onnx_ir as ir

    inputs, attributes = node_inputs(node, SLIDING_WINDOW_ATTENTION), Attributes.from_mapping(node_attributes(node))
    q, k, v = (inputs[name] for name in "QKV")
    assert q.shape is not None and q.dtype is not None
    joined = len(q.shape) == 3
    new = _Nodes(node.name or "")
    settings: dict[str, Any] = {} if attributes.scale is None else {"scale": float(attributes.scale)}
    if joined:
        settings |= {"q_num_heads": attributes.q_num_heads, "kv_num_heads": attributes.kv_num_heads}
    padding = inputs.get("attn_mask")
    if padding is None:
        y = new("Attention", q, k, v, is_causal=int(attributes.is_causal), **settings)
    else:
        key = (padding, attributes.is_causal)
        if key not in masks:
            masks[key] = _masks(new, padding, attributes.is_causal)
        mask, seen = masks[key]
        axes = new.constant([2] if joined else [1, 3])
        flags = new("Unsqueeze", padding, axes)
        zero = new.constant(0, q.dtype.numpy())
        k, v = (new("Where", flags, x, zero) for x in (k, v))
        y = new("Where", new("Unsqueeze", seen, axes), new("Attention", q, k, v, mask, **settings), zero)
    y.dtype, y.shape = q.dtype, node.outputs[0].shape
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], new.nodes, [node.outputs[0]], [y])


def _masks(new: _Nodes, padding: ir.Value, causal: bool) -> tuple[ir.Value, ir.Value]:
    """What the layer takes, (B, 1, S or 1, S); and whether a row sees any key, (B, S) or (B, 1)."""
    zero, one = new.constant(0), new.constant(1)
    length = new("Squeeze", new("Shape", padding, start=1, end=2))
    position = new("Range", zero, length, one)
    first = new("ReduceMin", new("Where", padding, position, length), new.constant([1]), keepdims=1)
    mask = new("Unsqueeze", padding, new.constant([1, 2]))
    if not causal:
        return mask, new("Less", first, length)
    lower = new("GreaterOrEqual", new("Unsqueeze", position, new.constant([1])), position)
    return new("And", mask, lower), new("GreaterOrEqual", position, first)
