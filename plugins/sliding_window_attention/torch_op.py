"""SlidingWindowAttention as torch ops, and their translation to ONNX.

``torch.ops.longspan.sliding_window_attention`` returns Y, ``torch.ops.longspan.sliding_window_attention_lse`` returns
(Y, lse). Both run on any device through `torch_blocked`, trace as one opaque call (no guard on a dynamic size), and
export to one ONNX node ``longspan::SlidingWindowAttention`` with `torch_ops.onnx_translation_table`. They are for
inference: neither has a derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..attention.torch_execution import empty_outputs
from ..torch_support import register_ops, translations
from .definition import SLIDING_WINDOW_ATTENTION, Attributes
from .torch_blocked import Operands, blocked_attention


def _run(tensors: dict[str, Any], keywords: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return blocked_attention(Operands(**tensors), Attributes.from_mapping(keywords))


def _fake(tensors: dict[str, Any], keywords: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_outputs(tensors["q"], tensors["k"], tensors["v"], Attributes.from_mapping(keywords))


_OPS = _attention, _attention_lse = register_ops(SLIDING_WINDOW_ATTENTION, "sliding_window_attention", _run, _fake)

TRANSLATIONS = translations(SLIDING_WINDOW_ATTENTION, _OPS)


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
    pattern: str = "",
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
        pattern: JSON of the pattern that the band came from; the ONNX node carries it as metadata.

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
        span_ramp=span_ramp, pattern=pattern,
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
