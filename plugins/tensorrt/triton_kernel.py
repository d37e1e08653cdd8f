"""The attention kernels as TensorRT launches them for an ahead-of-time plugin.

TensorRT passes the plugin's inputs, then numbers as int32, then its outputs, and nothing else. So everything that the
node fixes is a constant here, and what may exceed int32, the strides of Q, K, V and Y, is computed from the lengths.
The attention itself is that of the operators' own ``triton_kernel.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..block_sparse_attention.triton_kernel import block_sparse_forward
from ..sliding_window_attention.triton_kernel import window_forward


@triton.jit
def _strides(length, HEADS: tl.constexpr, SIZE: tl.constexpr, JOINED: tl.constexpr):
    """Elements from one batch entry, head and row to the next of (B, H, S, size), or joined of (B, S, H · size)."""
    row = tl.full([], HEADS * SIZE if JOINED else SIZE, tl.int64)
    head = tl.full([], SIZE, tl.int64)
    if not JOINED:
        head = length.to(tl.int64) * SIZE
    return length.to(tl.int64) * (HEADS * SIZE), head, row


@triton.jit
def window_entry(
    q, k, v, attn_mask, nonpad_kv_seqlen, band_bias, sinks, spans,
    batches, seq_q, seq_k, tiles, bias_batch, bias_head, bias_row,
    y, lse,
    HEADS: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr,
    RAMP: tl.constexpr, JOINED: tl.constexpr, GROUP: tl.constexpr, FOLD: tl.constexpr, DILATIONS: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """SlidingWindowAttention without global tokens: `window_forward` of whole rows."""
    q_batch, q_head, q_row = _strides(seq_q, HEADS, D, JOINED)
    k_batch, k_head, k_row = _strides(seq_k, HEADS // GROUP, D, JOINED)
    v_batch, v_head, v_row = _strides(seq_k, HEADS // GROUP, D_V, JOINED)
    y_batch, y_head, y_row = _strides(seq_q, HEADS, D_V, JOINED)
    left = tl.full([], LEFT, tl.int32)
    window_forward(
        q, k, v, attn_mask, nonpad_kv_seqlen, None, None, None, band_bias, sinks, spans, y, lse, None, None, None,
        batches, HEADS, seq_q, seq_k, tiles, 1, left, tl.full([], RIGHT, tl.int32), left,
        tl.full([], SCALE, tl.float32), tl.full([], CAP, tl.float32), tl.full([], RAMP, tl.float32),
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, y_batch, y_head, y_row,
        bias_batch, bias_head, bias_row, GROUP, FOLD, DILATIONS, CAUSAL, SOFTCAP, D, D_V, WIDTH, WIDTH_V, BLOCK_M,
        BLOCK_N, PRECISION, False,
    )  # fmt: skip


@triton.jit
def block_sparse_entry(
    q, k, v, kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, block_mask_ids, block_masks, attn_mask,
    nonpad_kv_seqlen, sinks, q_positions, k_positions, distance_bias,
    batches, seq_q, seq_k, width, full_width, masks,
    counts_batch, counts_head, indices_batch, indices_head,
    full_counts_batch, full_counts_head, full_indices_batch, full_indices_head,
    q_positions_batch, q_positions_head, k_positions_batch, k_positions_head, bias_head,
    y, lse,
    HEADS: tl.constexpr, SCALE: tl.constexpr, CAP: tl.constexpr, JOINED: tl.constexpr,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, GROUP: tl.constexpr, FOLD: tl.constexpr, CAUSAL: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BlockSparseAttention: `block_sparse_forward` of whole rows, in their own order, since nothing ran before."""
    q_batch, q_head, q_row = _strides(seq_q, HEADS, D, JOINED)
    k_batch, k_head, k_row = _strides(seq_k, HEADS // GROUP, D, JOINED)
    v_batch, v_head, v_row = _strides(seq_k, HEADS // GROUP, D_V, JOINED)
    y_batch, y_head, y_row = _strides(seq_q, HEADS, D_V, JOINED)
    block_sparse_forward(
        q, k, v, kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, block_mask_ids, block_masks,
        attn_mask, nonpad_kv_seqlen, sinks, q_positions, k_positions, distance_bias, None, y, lse, None, None,
        batches, HEADS, seq_q, seq_k, width, full_width, masks, 1,
        tl.full([], SCALE, tl.float32), tl.full([], CAP, tl.float32), 0, 0,
        q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, y_batch, y_head, y_row,
        counts_batch, counts_head, indices_batch, indices_head,
        full_counts_batch, full_counts_head, full_indices_batch, full_indices_head,
        q_positions_batch, q_positions_head, k_positions_batch, k_positions_head, bias_head,
        Q_BLOCK, KV_BLOCK, GROUP, FOLD, CAUSAL, EXCLUDE_SELF, SOFTCAP, D, D_V, WIDTH, WIDTH_V, BLOCK_M, BLOCK_N,
        PRECISION, False,
    )  # fmt: skip
