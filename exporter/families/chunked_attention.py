"""Causal attention within chunks (Llama 4) as causal attention of many short rows.

Chunks are counted from a row's first token, so left padding moves their boundaries, differently in each row. Each row
is therefore rotated to begin with its first token, cut into chunks, which become rows of a larger batch, and put back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..patterns import Causal, Chunked, to_json
from .attention_interface import banded_attention


@dataclass(frozen=True)
class ChunkLayout:
    """How the tokens of a batch are cut into chunks; made once and used by every layer.

    Attributes:
        size: Tokens in a chunk, as the model has it.
        rows: Chunks of all rows together.
        length: Tokens in each, `size` or the length of a text that is shorter.
        gather: int64 (rows · length,), the token of the flattened batch that stands at each place.
        valid: bool (rows, length), whether it is a token to attend to.
        back: int64 (B · S,), the place of each token.
    """

    size: int
    rows: Any
    length: Any
    gather: torch.Tensor
    valid: torch.Tensor
    back: torch.Tensor

    @classmethod
    def of(cls, padding: torch.Tensor, size: int) -> ChunkLayout:
        """Lay out a batch.

        Args:
            padding: bool (B, S), True = attend.
            size: Tokens in a chunk.
        """
        batch, total = padding.shape
        # A text that is shorter than a chunk must not pay for a whole one.
        length = torch.sym_min(size, total)
        # At least one, which torch.export cannot see by itself: it bounds the two sides of a division apart.
        count = torch.sym_max(1, (total + length - 1) // length)
        start = (padding.to(torch.int64).cumsum(-1) == 0).sum(-1, keepdim=True)
        row = torch.arange(batch, device=padding.device)[:, None]
        token = start + torch.arange(count * length, device=padding.device)[None, :]
        gather = (row * total + token.clamp(max=total - 1)).reshape(-1)
        valid = padding.reshape(-1).index_select(0, gather) & (token < total).reshape(-1)
        place = (torch.arange(total, device=padding.device)[None, :] - start).clamp(min=0)
        back = (row * (count * length) + place).reshape(-1)
        return cls(size, batch * count, length, gather, valid.reshape(batch * count, length), back)


def chunked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, layout: ChunkLayout, **keywords: Any
) -> torch.Tensor:
    """Attend causally within chunks.

    Args:
        query: (B, H_q, S, D).
        key: (B, H_kv, S, D).
        value: (B, H_kv, S, D_v).
        layout: The chunks.
        keywords: Further keyword arguments of `banded_attention`.

    Returns:
        (B, S, H_q, D_v). Rows of the tokens that pad a row on the left hold what its first token has.
    """
    batch, heads, length, _ = query.shape

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        heads, width = tensor.shape[1], tensor.shape[3]
        tokens = tensor.transpose(1, 2).reshape(batch * length, heads * width).index_select(0, layout.gather)
        return tokens.reshape(layout.rows, layout.length, heads, width).transpose(1, 2)

    output = banded_attention(
        *(cut(tensor) for tensor in (query, key, value)),
        padding=layout.valid,
        left=layout.size - 1,
        right=0,
        # The node sees chunks only; what that is in the text is recorded for those who cost and draw it.
        pattern=to_json(Chunked(layout.size) & Causal()),
        **keywords,
    )
    width = value.shape[3]
    tokens = output.reshape(layout.rows * layout.length, heads * width).index_select(0, layout.back)
    return tokens.reshape(batch, length, heads, width)
