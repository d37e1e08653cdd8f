"""Small models that call flex_attention, one for each kind of mask and score_mod.

Each function without arguments here is a factory for ``file.py:factory``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention, or_masks

CHANNELS = 32
LENGTH = 75
DOCUMENTS = 120

Mod = Callable[..., Any]


class Attention(nn.Module):
    """Self-attention by flex_attention; its weights make it far from uniform."""

    def __init__(
        self,
        mask: Callable[[Attention], Mod] | None = None,
        score: Callable[[Attention], Mod] | None = None,
        *,
        heads: int = 4,
        kv_heads: int = 4,
        block: int | tuple[int, int] = 16,
        batched: bool = False,
        told: int | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.mask, self.score, self.heads, self.kv_heads, self.block = mask, score, heads, kv_heads, block
        self.arguments, self.batched, self.told = arguments, batched, told
        self.size = CHANNELS // heads
        self.query = nn.Linear(CHANNELS, CHANNELS)
        self.key = nn.Linear(CHANNELS, kv_heads * self.size)
        self.value = nn.Linear(CHANNELS, kv_heads * self.size)
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25, 0.125, 0.0625]))
        self.table = nn.Parameter(torch.randn(4, 2 * DOCUMENTS - 1))
        self.register_buffer("document", torch.arange(DOCUMENTS) // 23)
        self.register_buffer("documents", torch.arange(DOCUMENTS) // torch.tensor([[23], [40]]))
        with torch.no_grad():
            self.query.weight *= 4

    def forward(self, x: torch.Tensor, padding: torch.Tensor | None = None) -> Any:
        """(B, S, C) in and out; `padding` is bool (B, S)."""
        self.padding = padding
        batch, length, _ = x.shape

        def split(projected: torch.Tensor, heads: int) -> torch.Tensor:
            return projected.view(batch, length, heads, self.size).transpose(1, 2)

        query = split(self.query(x), self.heads)
        key, value = (split(each(x), self.kv_heads) for each in (self.key, self.value))
        mask = None
        if self.mask is not None:
            entries = batch if padding is not None or self.batched else None
            mask = create_block_mask(self.mask(self), entries, self.told, length, length, x.device, self.block)
        result = flex_attention(
            query,
            key,
            value,
            score_mod=None if self.score is None else self.score(self),
            block_mask=mask,
            enable_gqa=self.heads != self.kv_heads,
            **self.arguments,
        )
        output, *lse = result if isinstance(result, tuple) else (result,)
        return (output.transpose(1, 2).flatten(2), *lse)


class Stack(nn.Module):
    """Attention layers, one after the other."""

    def __init__(self, *layers: Attention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)[0]
        return x


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def band(left: int, right: int) -> Mod:
    return lambda b, h, q, k: (k >= q - left) & (k <= q + right)


def prefix(count: int) -> Mod:
    return lambda b, h, q, k: k < count


def strided(stride: int) -> Mod:
    return lambda b, h, q, k: (q - k) % stride == 0


def fixed(stride: int, summary: int) -> Mod:
    return lambda b, h, q, k: (q // stride == k // stride) | (k % stride >= stride - summary)


def dilated(b: Any, h: Any, q: Any, k: Any) -> Any:
    return ((q - k) % 3 == 0) & ((q - k).abs() <= 24)


def uneven(b: Any, h: Any, q: Any, k: Any) -> Any:
    """A mask without a name: half of a window, of a comb, by parity."""
    return (k <= q) & ((q - k < 11) | ((q + 2 * k) % 6 == 1))


def per_head(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (k <= q) & (q - k <= 4 * (h + 1))


def heads_by_kind(b: Any, h: Any, q: Any, k: Any) -> Any:
    return torch.where(h < 2, (q - k).abs() <= 5, (k <= q) & (q % 8 == k % 8))


def documents(layer: Attention) -> Mod:
    return lambda b, h, q, k: (layer.document[q] == layer.document[k]) & (q >= k)


def documents_by_entry(layer: Attention) -> Mod:
    return lambda b, h, q, k: layer.documents[b, q] == layer.documents[b, k]


def softcap(layer: Attention) -> Mod:
    return lambda s, b, h, q, k: 5.0 * torch.tanh(s / 5.0)


def alibi(layer: Attention) -> Mod:
    return lambda s, b, h, q, k: s + layer.slopes[h] * (k - q)


def alibi_in_float_buffers(layer: Attention) -> Mod:
    return lambda s, b, h, q, k: s - (q - k).abs() * layer.slopes[h]


def relative_table(layer: Attention) -> Mod:
    return lambda s, b, h, q, k: s + layer.table[h, k - q + DOCUMENTS - 1]


def buckets(layer: Attention) -> Mod:
    """T5's idea: distances share a value beyond some."""
    return lambda s, b, h, q, k: s + layer.table[h, (q - k).clamp(-9, 9) + 9]


def everything(layer: Attention) -> Mod:
    """Scale, then softcap, then bias: the operator's order."""
    return lambda s, b, h, q, k: 4.0 * torch.tanh(s * 1.5 / 4.0) + layer.slopes[h] * (k - q)


def causal_by_score(layer: Attention) -> Mod:
    return lambda s, b, h, q, k: torch.where(q >= k, s + layer.slopes[h] * (k - q), -float("inf"))


def of(mask: Mod) -> Callable[[Attention], Mod]:
    """A mask that reads nothing of the layer."""
    return lambda layer: mask


CASES: dict[str, tuple[Callable[[], Attention], str]] = {
    "dense": (Attention, "SlidingWindowAttention"),
    "causal": (lambda: Attention(of(causal)), "SlidingWindowAttention"),
    "window": (lambda: Attention(of(and_masks(causal, band(12, 12)))), "SlidingWindowAttention"),
    "symmetric window": (lambda: Attention(of(band(9, 9))), "SlidingWindowAttention"),
    "dilated": (lambda: Attention(of(dilated)), "SlidingWindowAttention"),
    "global": (
        lambda: Attention(of(lambda b, h, q, k: ((q - k).abs() <= 6) | (q < 3) | (k < 3))),
        "SlidingWindowAttention",
    ),
    "window, sinks": (
        lambda: Attention(of(and_masks(causal, or_masks(band(10, 0), prefix(4))))),
        "BlockSparseAttention",
    ),
    "prefix": (lambda: Attention(of(or_masks(causal, prefix(19)))), "BlockSparseAttention"),
    "chunks": (lambda: Attention(of(lambda b, h, q, k: (q // 24 == k // 24) & (q >= k))), "BlockSparseAttention"),
    "strided": (lambda: Attention(of(and_masks(causal, or_masks(band(8, 0), strided(8))))), "BlockSparseAttention"),
    "fixed": (lambda: Attention(of(and_masks(causal, fixed(16, 2)))), "BlockSparseAttention"),
    "uneven": (lambda: Attention(of(uneven)), "BlockSparseAttention"),
    "per head": (lambda: Attention(of(per_head), told=4), "BlockSparseAttention"),
    "heads by kind": (lambda: Attention(of(heads_by_kind), told=4), "BlockSparseAttention"),
    "documents": (lambda: Attention(documents), "BlockSparseAttention"),
    "softcap": (lambda: Attention(of(causal), softcap), "SlidingWindowAttention"),
    "softcap, strided": (
        lambda: Attention(of(and_masks(causal, or_masks(band(8, 0), strided(8)))), softcap),
        "BlockSparseAttention",
    ),
    "alibi": (lambda: Attention(of(causal), alibi), "BlockSparseAttention"),
    "alibi, window": (lambda: Attention(of(and_masks(causal, band(12, 0))), alibi), "SlidingWindowAttention"),
    "alibi, dense": (lambda: Attention(None, alibi_in_float_buffers), "BlockSparseAttention"),
    "relative table": (lambda: Attention(of(band(9, 30)), relative_table), "SlidingWindowAttention"),
    "relative table, fixed": (lambda: Attention(of(fixed(16, 2)), relative_table), "BlockSparseAttention"),
    "buckets, dilated": (lambda: Attention(of(dilated), buckets), "SlidingWindowAttention"),
    "everything": (lambda: Attention(of(or_masks(causal, prefix(5))), everything), "BlockSparseAttention"),
    "causal by score": (lambda: Attention(None, causal_by_score), "BlockSparseAttention"),
    "grouped queries": (lambda: Attention(of(and_masks(causal, band(7, 0))), kv_heads=2), "SlidingWindowAttention"),
    "grouped, strided": (
        lambda: Attention(of(and_masks(causal, strided(5))), alibi, kv_heads=1),
        "BlockSparseAttention",
    ),
    "own scale": (lambda: Attention(of(causal), scale=0.7), "SlidingWindowAttention"),
    "oblong blocks": (lambda: Attention(of(uneven), block=(32, 8)), "BlockSparseAttention"),
}
"""A model of each kind, and the operator that it becomes."""


def stack() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A window with ALiBi, then Sparse Transformer's strided pattern with a softcap, with grouped queries."""
    window = Attention(of(and_masks(causal, band(12, 0))), alibi)
    sparse = Attention(of(and_masks(causal, or_masks(band(8, 0), strided(8)))), softcap, kv_heads=2)
    return Stack(window, sparse), {"x": torch.randn(2, LENGTH, CHANNELS)}


def padded() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A window whose mask_mod hides padding as well, as an input says."""

    def mask(layer: Attention) -> Mod:
        return lambda b, h, q, k: (q - k).abs().le(9) & layer.padding[b, k]

    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[1, 60:] = False
    return Attention(mask), {"x": torch.randn(2, LENGTH, CHANNELS), "padding": padding}


def packed() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Several documents in a row, as an input says: causal within each."""

    def mask(layer: Attention) -> Mod:
        return lambda b, h, q, k: (layer.padding[b, q] == layer.padding[b, k]) & (q >= k)

    numbers = torch.arange(LENGTH) // torch.tensor([[23], [40]])
    return Attention(mask, alibi), {"x": torch.randn(2, LENGTH, CHANNELS), "padding": numbers}


def documents_of_a_buffer() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Documents in a buffer of 120 tokens: lists for as many."""
    return Attention(documents), {"x": torch.randn(2, LENGTH, CHANNELS)}
