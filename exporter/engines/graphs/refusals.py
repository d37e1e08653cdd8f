"""Find what TensorRT's parser must not see, before it sees it: it may end the process, or compute something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ...errors import ExportFailed

if TYPE_CHECKING:
    import onnx_ir as ir

STANDARD = ("", "ai.onnx")

_ATTENTION_INPUTS = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")


def refuse_unknown_operators(model: ir.Model, domains: Sequence[str] = STANDARD) -> None:
    """Refuse nodes of other domains than the standard one.

    Args:
        model: A graph whose functions are inlined.
        domains: Those that are allowed.

    Raises:
        ExportFailed: there are some; the message names them.
    """
    found = [
        f"node {node.name!r} is {node.domain}::{node.op_type}"
        for node in model.graph.all_nodes()
        if node.domain not in domains
    ]
    if found:
        raise ExportFailed(
            f"{_listed(found)}: TensorRT has no such operator, takes the node for a plugin, and may end the process; "
            "allowed: standard ONNX, and operators with a function in the model; next step: export the model without "
            "this operator, or give the graph a function for it"
        )


def refuse_misread_nodes(model: ir.Model) -> None:
    """Refuse nodes of standard ONNX that TensorRT reads as something else, or not at all.

    TensorRT's Attention layer has no window, no lengths, no softcap and no cache, and its scatter no reductions. The
    parser drops a window and lengths without a word; the others it refuses, in words of its own source.

    Raises:
        ExportFailed: there are some; the message names them with the reasons.
    """
    found = []
    for node in model.graph.all_nodes():
        look = _LOOKS.get(node.op_type) if node.domain in STANDARD else None
        reason = look(node) if look is not None else None
        if reason is not None:
            found.append(f"node {node.name!r} is {node.op_type} {reason}")
    if found:
        raise ExportFailed(
            f"{_listed(found)}; next step: export the model from PyTorch with longspan export, which makes longspan "
            "operators of attention, or rewrite the node in operators that TensorRT has"
        )


def _attention(node: ir.Node) -> str | None:
    present = {
        name for name, value in zip(_ATTENTION_INPUTS, node.inputs, strict=False) if value is not None
    }  # fmt: skip
    for name in ("left_window_size", "right_window_size"):
        if (size := _int(node, name, -1)) >= 0:
            return f"with {name} {size}: TensorRT ignores windows without a word and computes dense attention"
    if "nonpad_kv_seqlen" in present:
        return "with nonpad_kv_seqlen: TensorRT ignores lengths without a word and computes with all keys"
    softcap = node.attributes.get("softcap")
    if softcap is not None and softcap.as_float() != 0.0:
        return f"with softcap {softcap.as_float():g}, which TensorRT's Attention layer does not have"
    if "softmax_precision" in node.attributes:
        return "with softmax_precision, which TensorRT's Attention layer does not take"
    if "past_key" in present or any(output.name for output in node.outputs[1:]):
        return "with a cache or further outputs, which TensorRT's Attention layer does not have"
    if "attn_mask" in present and _int(node, "is_causal", 0):
        return "with is_causal and attn_mask, of which TensorRT's Attention layer takes one"
    return None


def _scatter(node: ir.Node) -> str | None:
    reduction = node.attributes.get("reduction")
    if reduction is None or reduction.as_string() == "none":
        return None
    return f"with reduction {reduction.as_string()!r}: TensorRT scatters without reductions"


def _int(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


_LOOKS: dict[str, Callable[[ir.Node], str | None]] = {
    "Attention": _attention,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
}


def _listed(found: Sequence[str], most: int = 3) -> str:
    return "; ".join(found[:most]) + (f" (and {len(found) - most} more)" if len(found) > most else "")
