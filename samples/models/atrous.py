"""Local, atrous and sparse self-attention (Su Jianlin 2019, "Born to save: from standard to sparse attention").

The article, https://kexue.fm/archives/6853, thins out self-attention in two ways and then joins them: *local* keeps
distances of at most k, *atrous* those that are multiples of k, and *sparse self-attention* all distances that are
either, which leaves attention dense nearby and thin far away. A distance that is both (0, k, -k) counts once. One
softmax runs over all of them, where Child et al. 2019 may give each set heads of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from eager import masked_attention
from longspan.exporter import attention
from longspan.exporter.patterns import Causal, Pattern, Strided, Window
from torch import nn


@dataclass
class Config:
    """Sizes, and which attention.

    Attributes:
        kind: ``"local"``, ``"atrous"`` or ``"sparse"``.
        rate: k, tokens.
        causal: Whether keys after the query are hidden; the article calls it ``mask_right``.
        eager: Compute attention with the article's mask of length × length instead.
    """

    kind: str = "sparse"
    rate: int = 8
    causal: bool = False
    vocabulary: int = 256
    max_position_embeddings: int = 2048
    width: int = 64
    heads: int = 4
    layers: int = 2
    eager: bool = False


def pattern(config: Config) -> Pattern:
    """Distances up to k, multiples of k, or both."""
    local, atrous = Window(config.rate, config.rate), Strided(config.rate)
    both = {"local": local, "atrous": atrous, "sparse": local | atrous}[config.kind]
    return both & Causal() if config.causal else both


def allowed(config: Config, length: int) -> torch.Tensor:
    """The same as a mask, bool (length, length), distance by distance."""
    distance = torch.arange(length) - torch.arange(length)[:, None]
    local, atrous = distance.abs() <= config.rate, distance.abs() % config.rate == 0
    both = {"local": local, "atrous": atrous, "sparse": local | atrous}[config.kind]
    return both & (distance <= 0) if config.causal else both


class Layer(nn.Module):
    """Attention and a feed-forward network, each normed after its residual connection."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.pattern = config, pattern(config)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.ff = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.ReLU(), nn.Linear(4 * config.width, config.width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map (B, S, width) to the same; mask is bool (B, S), False at padding."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        if self.config.eager:
            y = masked_attention(q, k, v, allowed(self.config, length) & mask[:, None, None])
        else:
            y = attention(q, k, v, self.pattern, padding=mask)
        x = self.norms[0](x + self.out(y.transpose(1, 2).reshape(batch, length, width)))
        return self.norms[1](x + self.ff(x))


class Encoder(nn.Module):
    """Vectors of tokens, with learned positions."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.max_position_embeddings, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Encode tokens.

        Args:
            input_ids: int64 (B, S).
            attention_mask: int64 (B, S), 0 at padding.

        Returns:
            (B, S, width).
        """
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            x = layer(x, attention_mask != 0)
        return x


def local() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Distances of at most k."""
    return _example(Config(kind="local"))


def atrous() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Distances that are multiples of k."""
    return _example(Config(kind="atrous"))


def sparse() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Both."""
    return _example(Config(kind="sparse"))


def sparse_causal() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Both, without the keys after the query."""
    return _example(Config(kind="sparse", causal=True))


def _example(config: Config) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    ids = torch.arange(2 * 150).view(2, 150) % config.vocabulary
    return Encoder(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
