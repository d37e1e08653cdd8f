"""Sparse Transformer (Child, Gray, Radford, Sutskever 2019, "Generating Long Sequences with Sparse Transformers").

Section 4.3 factorises causal attention into two sets of keys. *Strided*: ``A(1) = {t, t+1, …, i}`` with
``t = max(0, i - l)``, and ``A(2) = {j : (i - j) mod l = 0}``. *Fixed*: ``A(1) = {j : ⌊j/l⌋ = ⌊i/l⌋}``, and
``A(2) = {j : j mod l ∈ {l - c, …, l - 1}}``. Section 5.1 integrates them in three ways, of which two are here:
*merged*, where each head attends to both sets at once, and *heads*, where one half of the heads has A(1) and the other
A(2); the third gives the sets to layers in turn.

Section 5.2 is the residual block, section 5.3 the embeddings of row and column. Recomputation and half precision
(5.4 to 5.6) concern training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from eager import masked_attention
from longspan.exporter import attention
from longspan.exporter.patterns import Causal, Chunked, Columns, Pattern, PerHead, Strided, Tokens, Window
from torch import nn


@dataclass
class Config:
    """Sizes, and which attention.

    Attributes:
        kind: ``"strided"`` or ``"fixed"``.
        form: ``"merged"`` or ``"heads"``.
        stride: l, tokens; positions are embedded as rows of this length.
        summary: c of fixed attention, tokens at the end of each block that all later ones see.
        eager: Compute attention with the paper's mask of length × length instead.
    """

    kind: str = "strided"
    form: str = "merged"
    stride: int = 32
    summary: int = 4
    vocabulary: int = 256
    max_position_embeddings: int = 4096
    width: int = 64
    heads: int = 4
    layers: int = 2
    eager: bool = False


def pattern(config: Config) -> Pattern:
    """The two sets of section 4.3, in each head or in a half of the heads each."""
    stride, ends = config.stride, tuple(range(config.stride - config.summary, config.stride))
    if config.kind == "strided":
        first, second = Window(stride, 0), Strided(stride) & Causal()
    else:
        first, second = Chunked(stride) & Causal(), Columns(Tokens(period=stride, residues=ends)) & Causal()
    half = config.heads // 2
    return first | second if config.form == "merged" else PerHead((first,) * half + (second,) * half)


def allowed(config: Config, length: int) -> torch.Tensor:
    """The same as a mask, bool (1, heads, length, length), from the formulas of section 4.3."""
    i, j, stride = torch.arange(length)[:, None], torch.arange(length), config.stride
    if config.kind == "strided":
        first, second = (i - stride).clamp(min=0) <= j, (i - j) % stride == 0
    else:
        first, second = j // stride == i // stride, j % stride >= stride - config.summary
    half = config.heads // 2
    sets = [first | second] * config.heads if config.form == "merged" else [first] * half + [second] * half
    return torch.stack([keys & (j <= i) for keys in sets])[None]


class SparseAttention(nn.Module):
    """Multi-head attention of section 5.1."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.pattern = config, pattern(config)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attend within (B, S, width); mask is bool (B, S), False at padding."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        if self.config.eager:
            y = masked_attention(q, k, v, allowed(self.config, length) & mask[:, None, None])
        else:
            y = attention(q, k, v, self.pattern, padding=mask)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class ResidualBlock(nn.Module):
    """Section 5.2: ``a(H) = attention(norm(H))``, ``b(H) = ff(norm(H + a(H)))``, and the block adds both."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = SparseAttention(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))
        self.ff = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )
        # So that the sum of all blocks keeps its scale whatever their number N: 1/√(2N).
        with torch.no_grad():
            for last in (self.attention.out, self.ff[2]):
                last.weight /= (2 * config.layers) ** 0.5

    def forward(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map (B, S, width) to the same; mask is bool (B, S), False at padding."""
        a = self.attention(self.norms[0](h), mask)
        return h + a + self.ff(self.norms[1](h + a))


class SparseTransformer(nn.Module):
    """A language model: logits of the next token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.rows = nn.Embedding(-(-config.max_position_embeddings // config.stride), config.width)
        self.columns = nn.Embedding(config.stride, config.width)
        self.blocks = nn.ModuleList(ResidualBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Compute logits.

        Args:
            input_ids: int64 (B, S).
            attention_mask: int64 (B, S), 0 at padding.

        Returns:
            (B, S, vocabulary).
        """
        position, stride = torch.arange(input_ids.shape[1], device=input_ids.device), self.config.stride
        h = self.tokens(input_ids) + self.rows(position // stride) + self.columns(position % stride)
        for block in self.blocks:
            h = block(h, attention_mask != 0)
        return self.out(self.norm(h))


def strided() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Both sets in every head."""
    return _example(Config(kind="strided"))


def strided_heads() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """One set in each half of the heads."""
    return _example(Config(kind="strided", form="heads"))


def fixed() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Both sets in every head."""
    return _example(Config(kind="fixed"))


def fixed_heads() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """One set in each half of the heads."""
    return _example(Config(kind="fixed", form="heads"))


def _example(config: Config) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    ids = torch.arange(2 * 150).view(2, 150) % config.vocabulary
    return SparseTransformer(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
