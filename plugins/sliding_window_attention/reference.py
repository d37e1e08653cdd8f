"""Dense reference of SlidingWindowAttention, written from the definition alone.

It forms every S_q x S_k score, rule by rule, and shares no code with any backend; use it for small sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..attention.operands import Shapes, check_lengths
from .definition import Attributes, infer_shapes

Array = npt.NDArray[Any]


def sliding_window_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    attributes: Attributes,
    attn_mask: Array | None = None,
    nonpad_kv_seqlen: Array | None = None,
    global_mask: Array | None = None,
    global_q: Array | None = None,
    global_k: Array | None = None,
    global_v: Array | None = None,
    band_bias: Array | None = None,
    sinks: Array | None = None,
    spans: Array | None = None,
    dtype: npt.DTypeLike = np.float64,
) -> tuple[Array, Array]:
    """Compute (Y, lse) in `dtype`, with the shapes of `docs/operators.md`.

    Args:
        q: (B, H_q, S_q, D) or (B, S_q, H_q·D); k, v and the optional inputs as in the definition.
        attributes: The node's attributes.
        dtype: numpy type of the arithmetic and of both results: float64, or float32.

    Raises:
        InvalidOperands: a shape, or a value of nonpad_kv_seqlen, contradicts the definition.
    """
    given = {
        "Q": q, "K": k, "V": v, "attn_mask": attn_mask, "nonpad_kv_seqlen": nonpad_kv_seqlen,
        "global_mask": global_mask, "global_Q": global_q, "global_K": global_k, "global_V": global_v,
        "band_bias": band_bias, "sinks": sinks, "spans": spans,
    }  # fmt: skip
    shapes = infer_shapes({name: array.shape for name, array in given.items() if array is not None}, attributes)
    if nonpad_kv_seqlen is not None:
        check_lengths([int(length) for length in nonpad_kv_seqlen], shapes.seq_k)
    q4, k4, v4 = (_heads(array.astype(dtype), count) for array, count in _with_heads(shapes, q, k, v))
    gq4, gk4, gv4 = q4, k4, v4
    if global_q is not None and global_k is not None and global_v is not None:
        separate = _with_heads(shapes, global_q, global_k, global_v)
        gq4, gk4, gv4 = (_heads(array.astype(dtype), count) for array, count in separate)

    out = np.zeros((shapes.batch, shapes.q_num_heads, shapes.seq_q, shapes.v_head_size), dtype)
    lse = np.full(shapes.lse, -np.inf, dtype)
    scale = attributes.scale if attributes.scale is not None else 1.0 / np.sqrt(shapes.head_size)
    for b in range(shapes.batch):
        length = shapes.seq_k if nonpad_kv_seqlen is None else int(nonpad_kv_seqlen[b])
        offset = 0 if nonpad_kv_seqlen is None else length - shapes.seq_q
        position = offset + np.arange(shapes.seq_q)
        key = np.arange(shapes.seq_k)
        valid = (key < length) & (np.ones(shapes.seq_k, bool) if attn_mask is None else attn_mask[b].astype(bool))
        is_global = np.zeros(shapes.seq_k, bool) if global_mask is None else global_mask[b].astype(bool)
        inside = (position >= 0) & (position < shapes.seq_k)
        row_global = inside & is_global[np.clip(position, 0, max(shapes.seq_k - 1, 0))] if shapes.seq_k else inside
        allowed = np.broadcast_to(valid, (shapes.seq_q, shapes.seq_k)).copy()
        if attributes.is_causal:
            allowed &= key[None, :] <= position[:, None]
        for h in range(shapes.q_num_heads):
            group = h * shapes.kv_num_heads // shapes.q_num_heads
            in_band, index = _band(position, key, attributes, h)
            for row_kind, rows in (("local", ~row_global), ("global", row_global)):
                if not rows.any():
                    continue
                queries, keys, values = (q4, k4, v4) if row_kind == "local" else (gq4, gk4, gv4)
                with np.errstate(invalid="ignore"):  # padded keys may be NaN; their scores are not used
                    scores = (queries[b, h][rows] @ keys[b, group].T) * dtype_of(dtype)(scale)
                if attributes.softcap > 0:
                    scores = attributes.softcap * np.tanh(scores / attributes.softcap)
                weight = np.ones_like(scores)
                if row_kind == "global":
                    see = allowed[rows]
                else:
                    see = allowed[rows] & (in_band[rows] | is_global[None, :])
                    if band_bias is not None:
                        bias = _pick(band_bias, b, h).astype(dtype)
                        bias = np.broadcast_to(bias, (shapes.seq_q, bias.shape[-1]))[rows]
                        columns = np.clip(index[rows], 0, bias.shape[-1] - 1)
                        scores = scores + np.where(in_band[rows], np.take_along_axis(bias, columns, 1), 0)
                    if spans is not None:
                        distance = np.abs(position[rows][:, None] - key[None, :])
                        ramp = (attributes.span_ramp + dtype_of(dtype)(spans[h]) - distance) / attributes.span_ramp
                        weight = np.where(is_global[None, :], 1, np.clip(ramp, 0, 1)).astype(dtype)
                sink = None if sinks is None else dtype_of(dtype)(sinks[h])
                out[b, h][rows], lse[b, h][rows] = _softmax_rows(
                    scores, see & (weight > 0), weight, values[b, group], sink
                )
    if shapes.layout == "bsd":
        out = out.transpose(0, 2, 1, 3).reshape(shapes.output)
    return out, lse


def dtype_of(dtype: npt.DTypeLike) -> Any:
    """Scalar constructor of `dtype`."""
    return np.dtype(dtype).type


def _with_heads(shapes: Shapes, q: Array, k: Array, v: Array) -> tuple[tuple[Array, int], ...]:
    """Each of Q, K, V with its number of heads."""
    return (q, shapes.q_num_heads), (k, shapes.kv_num_heads), (v, shapes.kv_num_heads)


def _heads(array: Array, count: int) -> Array:
    """(B, S, H·D) as (B, H, S, D); 4-D arrays as they are."""
    if array.ndim == 4:
        return array
    return array.reshape(array.shape[0], array.shape[1], count, array.shape[2] // count).transpose(0, 2, 1, 3)


def _pick(bias: Array, b: int, h: int) -> Array:
    """The (1|S_q, W) bias of one batch entry and head."""
    per_batch: Array = bias[b if bias.shape[0] > 1 else 0]
    return np.asarray(per_batch[h if per_batch.shape[0] > 1 else 0])


def _band(position: Array, key: Array, attributes: Attributes, h: int) -> tuple[Array, Array]:
    """Whether each (row, key) lies in the band of head `h`, and at which index."""
    step = attributes.dilation[h if len(attributes.dilation) > 1 else 0]
    difference = key[None, :] - position[:, None]
    steps = difference // step
    in_band = difference % step == 0
    if attributes.left_window_size >= 0:
        in_band &= steps >= -attributes.left_window_size
    if attributes.right_window_size >= 0:
        in_band &= steps <= attributes.right_window_size
    return in_band, steps + max(attributes.left_window_size, 0)


def _softmax_rows(scores: Array, see: Array, weight: Array, values: Array, sink: Any) -> tuple[Array, Array]:
    """Weighted softmax over the allowed keys of each row, and its log denominator."""
    output = np.zeros((scores.shape[0], values.shape[1]), scores.dtype)
    lse = np.full(scores.shape[0], -np.inf, scores.dtype)
    for row in range(scores.shape[0]):
        seen = see[row] & (scores[row] != -np.inf)
        logits = scores[row][seen]
        factors = weight[row][seen]
        top = max([*logits, -np.inf if sink is None else sink], default=-np.inf)
        if top == -np.inf:
            continue
        terms = factors * np.exp(logits - top)
        total = terms.sum() + (0 if sink is None else np.exp(sink - top))
        output[row] = (terms / total) @ values[seen]
        lse[row] = top + np.log(total)
    return output, lse
