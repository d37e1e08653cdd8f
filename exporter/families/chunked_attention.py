"""Causal attention within chunks (Llama 4) as causal attention of many short rows.

Chunks are counted from a row's first token, so left padding moves their boundaries, differently in each row. Each row
is therefore rotated to begin with its first token, cut into chunks, which become rows of a larger batch, and put back.
"""

from __future__ import annotations

from typing import Any

import torch

from .attention_interface import banded_attention


def chunked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    padding: torch.Tensor | None,
    size: int,
    **keywords: Any,
) -> torch.Tensor:
    """Attend causally within chunks of `size` tokens.

    Args:
        query: (B, H_q, S, D).
        key: (B, H_kv, S, D).
        value: (B, H_kv, S, D_v).
        padding: bool (B, S), True = attend; None without padding.
        size: Tokens in a chunk.
        keywords: Further keyword arguments of `banded_attention`.

    Returns:
        (B, S, H_q, D_v). Rows of the tokens that pad a row on the left hold what its first token has.
    """
    batch, _, length, _ = query.shape
    if padding is None:
        padding = query.new_ones((batch, length), dtype=torch.bool)
    # A text that is shorter than a chunk must not pay for a whole one.
    chunk = torch.sym_min(size, length)
    # At least one, which torch.export cannot see by itself: it bounds the two sides of a division apart.
    count = torch.sym_max(1, (length + chunk - 1) // chunk)
    start = (padding.to(torch.int64).cumsum(-1) == 0).sum(-1, keepdim=True)
    row = torch.arange(batch, device=query.device)[:, None]
    token = start + torch.arange(count * chunk, device=query.device)[None, :]
    gather = (row * length + token.clamp(max=length - 1)).reshape(-1)
    valid = padding.reshape(-1).index_select(0, gather) & (token < length).reshape(-1)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        heads, width = tensor.shape[1], tensor.shape[3]
        tokens = tensor.transpose(1, 2).reshape(batch * length, heads * width).index_select(0, gather)
        return tokens.reshape(batch * count, chunk, heads, width).transpose(1, 2)

    output = banded_attention(
        cut(query),
        cut(key),
        cut(value),
        padding=valid.reshape(batch * count, chunk),
        left=size - 1,
        right=0,
        **keywords,
    )
    heads, width = query.shape[1], value.shape[3]
    slot = (torch.arange(length, device=query.device)[None, :] - start).clamp(min=0)
    back = (row * (count * chunk) + slot).reshape(-1)
    tokens = output.reshape(batch * count * chunk, heads * width).index_select(0, back)
    return tokens.reshape(batch, length, heads, width)
