"""BlockSparseAttention as torch ops.

``torch.ops.longspan.block_sparse_attention`` returns Y, ``torch.ops.longspan.block_sparse_attention_lse`` returns
(Y, lse). Both run on any device through `torch_blocked`, trace as one opaque call (no guard on a dynamic size), and
export to one ONNX node ``longspan::BlockSparseAttention`` with `torch_ops.onnx_translation_table`. They are for
inference: neither has a derivative.
"""

from __future__ import annotations

from typing import Any

import torch

from ..attention.torch_execution import empty_outputs
from ..torch_support import register_ops, translations
from .definition import BLOCK_SPARSE_ATTENTION, DEFAULT_BLOCK, Attributes
from .torch_blocked import Operands, blocked_attention


def _run(tensors: dict[str, Any], keywords: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return blocked_attention(Operands(**tensors), Attributes.from_mapping(keywords))


def _fake(tensors: dict[str, Any], keywords: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_outputs(tensors["q"], tensors["k"], tensors["v"], Attributes.from_mapping(keywords))


_OPS = _attention, _attention_lse = register_ops(BLOCK_SPARSE_ATTENTION, "block_sparse_attention", _run, _fake)

TRANSLATIONS = translations(BLOCK_SPARSE_ATTENTION, _OPS)


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    kv_indices: torch.Tensor,
    full_kv_num_blocks: torch.Tensor,
    full_kv_indices: torch.Tensor,
    *,
    block_mask_ids: torch.Tensor | None = None,
    block_masks: torch.Tensor | None = None,
    attn_mask: torch.Tensor | None = None,
    nonpad_kv_seqlen: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    q_positions: torch.Tensor | None = None,
    k_positions: torch.Tensor | None = None,
    distance_bias: torch.Tensor | None = None,
    q_block_size: int = DEFAULT_BLOCK,
    kv_block_size: int = DEFAULT_BLOCK,
    is_causal: bool = False,
    exclude_self: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    q_num_heads: int = 0,
    kv_num_heads: int = 0,
    pattern: str = "",
) -> torch.Tensor:
    """Attend from each row of blocks of queries to the blocks of keys that its lists name.

    With n_q = ceil(S_q / q_block_size) rows of blocks and ceil(S_k / kv_block_size) blocks of keys:

    Args:
        q: (B, H_q, S_q, D) or (B, S_q, H_q·D); float16, bfloat16, float32, or float64 (computed in float64).
        k: (B, H_kv, S_k, D) or (B, S_k, H_kv·D).
        v: (B, H_kv, S_k, D_v) or (B, S_k, H_kv·D_v).
        kv_num_blocks: int32 (1|B, 1|H_q, n_q), partial blocks of each row.
        kv_indices: int32 (1|B, 1|H_q, n_q, W), the blocks; of each list the first kv_num_blocks are read.
        full_kv_num_blocks: int32 (1|B, 1|H_q, n_q), full blocks of each row.
        full_kv_indices: int32 (1|B, 1|H_q, n_q, W_full), the blocks.
        block_mask_ids: int32, like kv_indices: which of block_masks a partial block has; -1 for none.
        block_masks: uint8 (M, q_block_size, ceil(kv_block_size / 8)); bit c % 8 of byte c // 8 is column c.
        attn_mask: bool (B, S_k), True = attend.
        nonpad_kv_seqlen: int64 (B,), number of valid keys; query row i then stands at ``nonpad_kv_seqlen - S_q + i``.
        sinks: (H_q,), extra logit in the denominator.
        q_positions: int32 (1|B, 1|H_q, S_q), positions that is_causal and exclude_self compare.
        k_positions: int32 (1|B, 1|H_kv, S_k), the same for keys.
        distance_bias: (1|H_q, S_q + S_k - 1); entry k - i + S_q - 1 is added to the score of row i and key k.
        q_block_size: Queries in a row of blocks.
        kv_block_size: Keys in a block.
        is_causal: A query never sees keys after its own position.
        exclude_self: A query never sees the key at its own position.
        scale: Factor of q·k; 1/sqrt(D) when None.
        softcap: Scores become softcap·tanh(score/softcap) when positive.
        q_num_heads: Query heads; needed for 3-D inputs.
        kv_num_heads: Key and value heads; needed for 3-D inputs.
        pattern: JSON of the pattern that the lists came from; the ONNX node carries it as metadata.

    Returns:
        Y, shaped like q with D_v for D, in the type of q. Rows without any allowed key are zero.

    Raises:
        InvalidOperands: a shape, a type, an attribute or a value of the lists contradicts the definition.
    """
    # fmt: off
    return _attention(  # type: ignore[no-any-return]
        q, k, v, kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, block_mask_ids, block_masks,
        attn_mask, nonpad_kv_seqlen, sinks, q_positions, k_positions, distance_bias, q_block_size=q_block_size,
        kv_block_size=kv_block_size, is_causal=int(is_causal), exclude_self=int(exclude_self), scale=scale,
        softcap=softcap, q_num_heads=q_num_heads, kv_num_heads=kv_num_heads, pattern=pattern,
    )
    # fmt: on


def block_sparse_attention_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_num_blocks: torch.Tensor,
    kv_indices: torch.Tensor,
    full_kv_num_blocks: torch.Tensor,
    full_kv_indices: torch.Tensor,
    **keywords: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_sparse_attention` with its log-sum-exp.

    Args:
        q: As in `block_sparse_attention`, like the other tensors.
        k: Keys.
        v: Values.
        kv_num_blocks: Partial blocks of each row.
        kv_indices: The blocks.
        full_kv_num_blocks: Full blocks of each row.
        full_kv_indices: The blocks.
        **keywords: The keyword arguments of `block_sparse_attention`.

    Returns:
        Y, and lse (B, H_q, S_q), the log of each row's softmax denominator in float32 (float64 for a float64 q);
        -inf for rows without any allowed key or sink.

    Raises:
        InvalidOperands: a shape, a type, an attribute or a value of the lists contradicts the definition.
    """
    for flag in keywords.keys() & {"is_causal", "exclude_self"}:
        keywords[flag] = int(keywords[flag])
    return _attention_lse(  # type: ignore[no-any-return]
        q, k, v, kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, **keywords
    )
