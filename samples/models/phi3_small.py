"""Block-sparse attention as in Phi-3-small (Abdin et al. 2024, "Phi-3 Technical Report", section 2).

The 7-billion-parameter model alternates layers of dense attention with layers of block sparsity, in which each head
sees the last blocks and, further back, every few blocks a stripe; stripes differ between heads, so that together they
cover the whole text. Four queries share a key (GQA). The stripes are those of the model's published code
(``blocksparse_block_size`` 64, ``…_num_local_blocks`` 16, ``…_vert_stride`` 8, ``…_homo_head_pattern`` false): head h
has block k in a stripe where ``(k + h · step + 1) mod stride = 0`` with ``step = max(1, stride // heads)``.

The feed-forward network is the model's gated GELU, positions are rotary. Its muP multipliers are left out: they scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from eager import masked_attention
from longspan.exporter import attention
from longspan.exporter.patterns import Causal, Pattern, systems
from torch import nn


@dataclass
class Config:
    """Sizes, and which attention.

    Attributes:
        block: Tokens in a block.
        local_blocks: Blocks up to the query's own, itself included.
        stride: Blocks from stripe to stripe.
        dense_every: One of so many layers is dense, the last of them.
        limit: Bound on what enters the gated GELU.
        eager: Compute attention with a mask of length × length instead.
    """

    block: int = 16
    local_blocks: int = 2
    stride: int = 4
    dense_every: int = 2
    vocabulary: int = 256
    max_position_embeddings: int = 8192
    width: int = 64
    heads: int = 8
    key_heads: int = 2
    layers: int = 2
    rope_base: float = 1e6
    limit: float = 20.0
    eager: bool = False


def pattern(config: Config, layer: int) -> Pattern:
    """The pattern of a layer."""
    if layer % config.dense_every == config.dense_every - 1:
        return Causal()
    return systems.phi3_small(config.block, local_blocks=config.local_blocks, stride=config.stride, heads=config.heads)


def allowed(config: Config, layer: int, length: int) -> torch.Tensor:
    """The same as a mask, bool (1, heads, length, length), as the model's published code makes it block by block."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if layer % config.dense_every == config.dense_every - 1:
        return causal.expand(1, config.heads, length, length)
    blocks = -(-length // config.block)
    q, k = torch.arange(blocks)[:, None], torch.arange(blocks)
    step = max(1, config.stride // config.heads)
    head_masks = []
    for head in range(config.heads):
        vertical = (k + head * step + 1) % config.stride == 0
        head_masks.append((q >= k) & ((q - k < config.local_blocks) | vertical))
    tiles = torch.stack(head_masks).repeat_interleave(config.block, 1).repeat_interleave(config.block, 2)
    return (tiles[:, :length, :length] & causal)[None]


class Attention(nn.Module):
    """Grouped-query attention, dense or block-sparse."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.pattern = config, layer, pattern(config, layer)
        self.size = config.width // config.heads
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.key_heads) * self.size)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Attend within (B, S, width); mask is bool (B, S), False at padding."""
        batch, length, width = x.shape
        heads = self.qkv(x).view(batch, length, -1, self.size).transpose(1, 2)
        q, k, v = heads.split([self.config.heads, self.config.key_heads, self.config.key_heads], dim=1)
        q, k = rotated(q, self.config.rope_base), rotated(k, self.config.rope_base)
        if self.config.eager:
            y = masked_attention(q, k, v, allowed(self.config, self.layer, length) & mask[:, None, None])
        else:
            y = attention(q, k, v, self.pattern, padding=mask)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def rotated(x: torch.Tensor, base: float) -> torch.Tensor:
    """Rotary embedding of (B, H, S, D)."""
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angle = torch.arange(x.shape[2], dtype=x.dtype, device=x.device)[:, None] * speed
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()], dim=-1)


class FeedForward(nn.Module):
    """The gated GELU: ``a·σ(1.702·a) · (b + 1)`` with a and b bounded, interleaved."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.limit = config.limit
        self.up = nn.Linear(config.width, 8 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, S, width) to the same."""
        a, b = self.up(x).unflatten(-1, (-1, 2)).unbind(-1)
        a, b = a.clamp(max=self.limit), b.clamp(-self.limit, self.limit)
        return self.down(a * torch.sigmoid(1.702 * a) * (b + 1))


class Layer(nn.Module):
    """Attention and feed-forward network, each on what a norm returns."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention, self.ff = Attention(config, layer), FeedForward(config)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map (B, S, width) to the same; mask is bool (B, S), False at padding."""
        x = x + self.attention(self.norms[0](x), mask)
        return x + self.ff(self.norms[1](x))


class Phi3Small(nn.Module):
    """A language model: logits of the next token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Compute logits.

        Args:
            input_ids: int64 (B, S).
            attention_mask: int64 (B, S), 0 at padding.

        Returns:
            (B, S, vocabulary).
        """
        x = self.tokens(input_ids)
        for layer in self.layers:
            x = layer(x, attention_mask != 0)
        return self.norm(x) @ self.tokens.weight.T


def small() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Stripes that differ between heads."""
    config = Config()
    ids = torch.arange(2 * 150).view(2, 150) % config.vocabulary
    return Phi3Small(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
