"""Attention over a mask of queries times keys: how the papers write it, and what tests compare the patterns with."""

from __future__ import annotations

import torch


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """``softmax(q·kᵀ/√D)·v`` over the allowed pairs; zero where a query has none.

    Args:
        q: (B, H, S, D).
        k: (B, H_kv, S, D); query heads in order share key heads.
        v: (B, H_kv, S, D).
        allowed: bool (B|1, H|1, S, S), True = the query sees the key.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), dim=-1)
    return weights.nan_to_num(0) @ v
