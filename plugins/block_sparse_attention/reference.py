"""Dense reference of BlockSparseAttention, written from the definition alone.

It counts for every query and key how many listings hold the pair, and shares no code with any backend; use it for
small sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..attention.operands import check_lengths
from .definition import Attributes, ListBounds, check_lists, infer_shapes

Array = npt.NDArray[Any]


def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    kv_num_blocks: Array,
    kv_indices: Array,
    full_kv_num_blocks: Array,
    full_kv_indices: Array,
    *,
    attributes: Attributes,
    block_mask_ids: Array | None = None,
    block_masks: Array | None = None,
    attn_mask: Array | None = None,
    nonpad_kv_seqlen: Array | None = None,
    sinks: Array | None = None,
    q_positions: Array | None = None,
    k_positions: Array | None = None,
    distance_bias: Array | None = None,
    dtype: npt.DTypeLike = np.float64,
) -> tuple[Array, Array]:
    """Compute (Y, lse) in `dtype`, with the shapes of `docs/operators.md`.

    Args:
        q: (B, H_q, S_q, D) or (B, S_q, H_q·D); k, v, the lists and the optional inputs as in the definition.
        attributes: The node's attributes.
        dtype: numpy type of the arithmetic and of both results: float64, or float32.

    Raises:
        InvalidOperands: a shape, or a value of the lists or of nonpad_kv_seqlen, contradicts the definition.
    """
    lists = {
        "kv_num_blocks": kv_num_blocks, "kv_indices": kv_indices,
        "full_kv_num_blocks": full_kv_num_blocks, "full_kv_indices": full_kv_indices,
    }  # fmt: skip
    optional = {
        "block_mask_ids": block_mask_ids, "block_masks": block_masks, "attn_mask": attn_mask,
        "nonpad_kv_seqlen": nonpad_kv_seqlen, "sinks": sinks, "q_positions": q_positions, "k_positions": k_positions,
        "distance_bias": distance_bias,
    }  # fmt: skip
    given = {"Q": q, "K": k, "V": v, **lists, **{name: x for name, x in optional.items() if x is not None}}
    shapes = infer_shapes({name: array.shape for name, array in given.items()}, attributes)
    if block_mask_ids is not None:
        lists["block_mask_ids"] = block_mask_ids
    masks = np.zeros((0, 0, 0), np.uint8) if block_masks is None else block_masks
    check_lists(lists, ListBounds(attributes.kv_blocks(shapes.seq_k), len(masks)))
    if nonpad_kv_seqlen is not None:
        check_lengths([int(length) for length in nonpad_kv_seqlen], shapes.seq_k)

    number: Callable[[Any], Any] = np.dtype(dtype).type
    q4, k4, v4 = _heads(q, shapes.q_num_heads), _heads(k, shapes.kv_num_heads), _heads(v, shapes.kv_num_heads)
    out = np.zeros((shapes.batch, shapes.q_num_heads, shapes.seq_q, shapes.v_head_size), dtype)
    lse = np.full(shapes.lse, -np.inf, dtype)
    scale = 1.0 / np.sqrt(shapes.head_size) if attributes.scale is None else attributes.scale
    row, key = np.arange(shapes.seq_q), np.arange(shapes.seq_k)
    for b in range(shapes.batch):
        length = shapes.seq_k if nonpad_kv_seqlen is None else int(nonpad_kv_seqlen[b])
        offset = 0 if nonpad_kv_seqlen is None else length - shapes.seq_q
        valid = (key < length) & (np.ones(shapes.seq_k, bool) if attn_mask is None else attn_mask[b].astype(bool))
        for h in range(shapes.q_num_heads):
            group = h * shapes.kv_num_heads // shapes.q_num_heads
            q_position = row + offset if q_positions is None else _pick(q_positions, b, h).astype(np.int64)
            k_position = key if k_positions is None else _pick(k_positions, b, group).astype(np.int64)
            allowed = np.broadcast_to(valid, (shapes.seq_q, shapes.seq_k)).copy()
            if attributes.is_causal:
                allowed &= k_position[None, :] <= q_position[:, None]
            if attributes.exclude_self:
                allowed &= k_position[None, :] != q_position[:, None]
            count = allowed * _listings({**given, "block_masks": masks}, attributes, b, h, shapes.seq_q, shapes.seq_k)
            with np.errstate(invalid="ignore"):  # padded keys may be NaN; their scores are not used
                scores = (q4[b, h].astype(dtype) @ k4[b, group].astype(dtype).T) * number(scale)
            if attributes.softcap > 0:
                scores = attributes.softcap * np.tanh(scores / attributes.softcap)
            if distance_bias is not None:
                bias = distance_bias[h if distance_bias.shape[0] > 1 else 0].astype(dtype)
                scores = scores + bias[key[None, :] - row[:, None] + shapes.seq_q - 1]
            sink = None if sinks is None else number(sinks[h])
            for i in row:
                seen = (count[i] > 0) & (scores[i] != -np.inf)
                top = max([*scores[i][seen], -np.inf if sink is None else sink], default=-np.inf)
                if top == -np.inf:
                    continue
                terms = count[i][seen] * np.exp(scores[i][seen] - top)
                total = terms.sum() + (0 if sink is None else np.exp(sink - top))
                out[b, h, i] = (terms / total) @ v4[b, group][seen].astype(dtype)
                lse[b, h, i] = top + np.log(total)
    if shapes.layout == "bsd":
        out = out.transpose(0, 2, 1, 3).reshape(shapes.output)
    return out, lse


def _listings(given: dict[str, Array], attributes: Attributes, b: int, h: int, seq_q: int, seq_k: int) -> Array:
    """How many listings hold each (query, key) of one batch entry and head: int64 (S_q, S_k)."""
    tall, wide = attributes.q_block_size, attributes.kv_block_size
    rows, columns = attributes.q_blocks(seq_q), attributes.kv_blocks(seq_k)
    count = np.zeros((rows * tall, columns * wide), np.int64)
    for kind in ("kv", "full_kv"):
        counts, indices = _pick(given[f"{kind}_num_blocks"], b, h), _pick(given[f"{kind}_indices"], b, h)
        for r in range(rows):
            for slot in range(int(counts[r])):
                tile = np.ones((tall, wide), np.int64)
                if kind == "kv" and "block_mask_ids" in given:
                    mask = int(_pick(given["block_mask_ids"], b, h)[r, slot])
                    if mask >= 0:
                        bits = np.unpackbits(given["block_masks"][mask], axis=1, bitorder="little")
                        tile = bits[:, :wide].astype(np.int64)
                c = int(indices[r, slot])
                count[r * tall : (r + 1) * tall, c * wide : (c + 1) * wide] += tile
    return count[:seq_q, :seq_k]


def _pick(array: Array, b: int, h: int) -> Array:
    """One batch entry and head of an array whose first two axes may be 1."""
    return np.asarray(array[b if array.shape[0] > 1 else 0][h if array.shape[1] > 1 else 0])


def _heads(array: Array, count: int) -> Array:
    """(B, S, H·D) as (B, H, S, D); 4-D arrays as they are."""
    if array.ndim == 4:
        return array
    return array.reshape(array.shape[0], array.shape[1], count, array.shape[2] // count).transpose(0, 2, 1, 3)
