"""SlidingWindowAttention as torch ops, and their translation to ONNX.

``torch.ops.longspan.sliding_window_attention`` returns Y, ``torch.ops.longspan.sliding_window_attention_lse`` returns
(Y, lse). Both run on any device through `torch_blocked`, trace as one opaque call (no guard on a dynamic size), and
export to one ONNX node ``longspan::SlidingWindowAttention``::

    torch.onnx.export(model, args, dynamo=True, custom_translation_table=onnx_translation_table())

They are for inference: neither has a derivative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from ..definition import DOMAIN
from ..errors import InvalidOperands
from ..torch_support import node_translation, torch_schema
from .definition import SLIDING_WINDOW_ATTENTION, Attributes
from .torch_blocked import Operands, blocked_attention

_INPUTS = tuple(tensor.name.lower() for tensor in SLIDING_WINDOW_ATTENTION.inputs)


def _run(*inputs: torch.Tensor | None, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
    operands, attributes = _split(inputs, keywords)
    return blocked_attention(operands, attributes)


def _fake(*inputs: torch.Tensor | None, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of (Y, lse). Sizes that vary are only multiplied and divided, never compared, so none is specialised."""
    operands, attributes = _split(inputs, keywords)
    q, v = operands.q, operands.v
    if q.dim() not in (3, 4) or not q.dim() == operands.k.dim() == v.dim():
        raise InvalidOperands(
            f"Q, K, V have {q.dim()}, {operands.k.dim()}, {v.dim()} dimensions: all must be 3-D or all 4-D"
        )
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.dim() == 4:
        y = q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))
        return y, q.new_empty(q.shape[:3], dtype=accumulate)
    heads, kv_heads = attributes.q_num_heads, attributes.kv_num_heads
    if heads < 1 or kv_heads < 1:
        raise InvalidOperands("3-D inputs need q_num_heads and kv_num_heads of 1 or more")
    for name, tensor, count in (("Q", q, heads), ("K", operands.k, kv_heads), ("V", v, kv_heads)):
        channels = tensor.shape[2]
        if isinstance(channels, int) and channels % count:
            raise InvalidOperands(f"{name} has {channels} channels, which {count} heads do not divide")
    y = q.new_empty((q.shape[0], q.shape[1], heads * (v.shape[2] // kv_heads)))
    return y, q.new_empty((q.shape[0], heads, q.shape[1]), dtype=accumulate)


def _split(inputs: tuple[torch.Tensor | None, ...], keywords: dict[str, Any]) -> tuple[Operands, Attributes]:
    tensors: dict[str, Any] = dict(zip(_INPUTS, inputs, strict=False))
    tensors |= {name: keywords.pop(name) for name in _INPUTS if name in keywords}
    return Operands(**tensors), Attributes.from_mapping(keywords)


def _register(name: str, outputs: int) -> Any:
    pick: Callable[[tuple[torch.Tensor, torch.Tensor]], Any] = (lambda both: both[0]) if outputs == 1 else tuple
    op = torch.library.custom_op(
        f"{DOMAIN}::{name}",
        lambda *inputs, **keywords: pick(_run(*inputs, **keywords)),
        mutates_args=(),
        schema=torch_schema(SLIDING_WINDOW_ATTENTION, outputs),
    )
    op.register_fake(lambda *inputs, **keywords: pick(_fake(*inputs, **keywords)))
    return op


_attention = _register("sliding_window_attention", 1)
_attention_lse = _register("sliding_window_attention_lse", 2)


def sliding_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    nonpad_kv_seqlen: torch.Tensor | None = None,
    global_mask: torch.Tensor | None = None,
    global_q: torch.Tensor | None = None,
    global_k: torch.Tensor | None = None,
    global_v: torch.Tensor | None = None,
    band_bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    span_ramp: float = 32.0,
) -> torch.Tensor:
    """Attend to a band of keys around each query, and to and from global tokens.

    Args:
        q: (B, H_q, S_q, D) or (B, S_q, H_q·D); float16, bfloat16, float32, or float64 (computed in float64).
        k: (B, H_kv, S_k, D) or (B, S_k, H_kv·D).
        v: (B, H_kv, S_k, D_v) or (B, S_k, H_kv·D_v).
        attn_mask: bool (B, S_k), True = attend.
        nonpad_kv_seqlen: int64 (B,), number of valid keys; query row i then stands at ``nonpad_kv_seqlen - S_q + i``.
        global_mask: bool (B, S_k), tokens that see all keys and that all queries see.
        global_q: Like q; with global_k and global_v the projections for the rows of global tokens.
        global_k: Like k.
        global_v: Like v.
        band_bias: (1|B, 1|H_q, 1|S_q, left + right + 1), added to the scores of the band.
        sinks: (H_q,), extra logit in the denominator.
        spans: float32 (H_q,), learned span per head, in keys.
        left_window_size: Band keys before the query's own, inclusive; -1 unbounded.
        right_window_size: Band keys after the query's own, inclusive; -1 unbounded.
        dilation: Step between band keys: one value, or one per query head.
        is_causal: A query never sees keys after its own position.
        scale: Factor of q·k; 1/sqrt(D) when None.
        softcap: Scores become softcap·tanh(score/softcap) when positive.
        q_num_heads: Query heads; needed for 3-D inputs.
        kv_num_heads: Key and value heads; needed for 3-D inputs.
        span_ramp: Length of the soft ramp after each span, in keys.

    Returns:
        Y, shaped like q with D_v for D, in the type of q. Rows without any allowed key are zero.

    Raises:
        InvalidOperands: a shape, type or attribute contradicts the definition.
    """
    # fmt: off
    return _attention(  # type: ignore[no-any-return]
        q, k, v, attn_mask, nonpad_kv_seqlen, global_mask, global_q, global_k, global_v, band_bias, sinks, spans,
        left_window_size=left_window_size, right_window_size=right_window_size, dilation=_ints(dilation),
        is_causal=int(is_causal), scale=scale, softcap=softcap, q_num_heads=q_num_heads, kv_num_heads=kv_num_heads,
        span_ramp=span_ramp,
    )
    # fmt: on


def sliding_window_attention_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dilation: int | Sequence[int] = 1, **keywords: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sliding_window_attention` with its log-sum-exp.

    Args:
        q: As in `sliding_window_attention`.
        k: As in `sliding_window_attention`.
        v: As in `sliding_window_attention`.
        dilation: As in `sliding_window_attention`.
        **keywords: The other keyword arguments of `sliding_window_attention`.

    Returns:
        Y, and lse (B, H_q, S_q), the log of each row's softmax denominator in float32 (float64 for a float64 q);
        -inf for rows without any allowed key or sink.

    Raises:
        InvalidOperands: a shape, type or attribute contradicts the definition.
    """
    if "is_causal" in keywords:
        keywords["is_causal"] = int(keywords["is_causal"])
    return _attention_lse(q, k, v, dilation=_ints(dilation), **keywords)  # type: ignore[no-any-return]


def _ints(dilation: int | Sequence[int]) -> list[int]:
    return [dilation] if isinstance(dilation, int) else [int(step) for step in dilation]


def onnx_translation_table() -> dict[Any, Callable[..., Any]]:
    """Entries for ``torch.onnx.export(custom_translation_table=...)``: each op becomes one node.

    ``scale`` is always written on the node where the head size is known.
    """
    return {
        torch.ops.longspan.sliding_window_attention.default: node_translation(
            SLIDING_WINDOW_ATTENTION, 1, _known_scale
        ),
        torch.ops.longspan.sliding_window_attention_lse.default: node_translation(
            SLIDING_WINDOW_ATTENTION, 2, _known_scale
        ),
    }


def _known_scale(q: ir.Value, attributes: dict[str, Any]) -> dict[str, Any]:
    if attributes.get("scale") is not None or q.shape is None or not isinstance(q.shape[-1], int):
        return {}
    heads = 1 if len(q.shape) == 4 else attributes["q_num_heads"]
    return {"scale": 1.0 / math.sqrt(q.shape[-1] // heads)}
