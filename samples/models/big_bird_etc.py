"""BigBird (Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences"), with random blocks and in both forms.

Section 2 joins three sets of keys, counted in blocks (appendix D): blocks on each side of the query's own, r blocks at
random, and global ones that see and are seen by all. In the *internal* form (ITC) the first and the last block of the
text are global; in the *extended* form (ETC) global tokens of their own stand before the text. The published models
take r = 3 for ITC and r = 0 for ETC (appendix E).

``transformers`` draws random blocks in training only; here they are drawn once, and are the same ever after. They
fix the length of the text. ETC without them takes any length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from eager import masked_attention
from longspan.exporter import attention
from longspan.exporter.patterns import Blocked, Explicit, Global, Pattern, PerHead, Shifted, Tokens, Window
from torch import nn


@dataclass
class Config:
    """Sizes, and which attention.

    Attributes:
        block: Tokens in a block.
        side: Blocks on each side of the query's own.
        random: r, random blocks per block of queries and head.
        global_tokens: Tokens before the text (ETC); 0 makes the first and the last block global (ITC).
        length: Tokens of the text, where there are random blocks.
        eager: Compute attention with a mask of length × length instead.
    """

    block: int = 16
    side: int = 1
    random: int = 2
    global_tokens: int = 0
    length: int = 192
    vocabulary: int = 256
    max_position_embeddings: int = 2048
    width: int = 64
    heads: int = 4
    layers: int = 2
    eager: bool = False


def draw(config: Config, seed: int) -> torch.Tensor:
    """Random blocks, bool (heads, blocks, blocks): of each row, r blocks that it does not see anyway."""
    generator, blocks = torch.Generator().manual_seed(seed), config.length // config.block
    drawn = torch.zeros(config.heads, blocks, blocks, dtype=torch.bool)
    for head in range(config.heads):
        for row in range(blocks):
            rest = [
                block
                for block in range(blocks)
                if abs(block - row) > config.side and (config.global_tokens or not {row, block} & {0, blocks - 1})
            ]
            chosen = torch.randperm(len(rest), generator=generator)[: config.random]
            drawn[head, row, [rest[index] for index in chosen]] = True
    return drawn


def pattern(config: Config, drawn: torch.Tensor | None) -> Pattern:
    """Window, global and random blocks; in ETC blocks are counted after the global tokens."""
    blocks: Pattern = Window(config.side, config.side)
    if not config.global_tokens:
        blocks |= Global(Tokens(first=1, last=1))
    if drawn is not None:
        blocks |= PerHead(tuple(Explicit.of(head.numpy()) for head in drawn))
    text = Blocked(config.block, blocks)
    return Global(config.global_tokens) | Shifted(config.global_tokens, text) if config.global_tokens else text


def allowed(config: Config, drawn: torch.Tensor | None, length: int) -> torch.Tensor:
    """The same as a mask, bool (1, heads, length, length): queries and keys, global tokens first."""
    text = length - config.global_tokens
    blocks = -(-text // config.block)
    sees = torch.zeros(config.heads, blocks, blocks, dtype=torch.bool) if drawn is None else drawn.clone()
    for row in range(blocks):
        sees[:, row, max(0, row - config.side) : row + config.side + 1] = True
    if not config.global_tokens:
        for end in (0, blocks - 1):
            sees[:, end] = sees[:, :, end] = True
    mask = torch.ones(config.heads, length, length, dtype=torch.bool)
    tiles = sees.repeat_interleave(config.block, 1).repeat_interleave(config.block, 2)[:, :text, :text]
    mask[:, config.global_tokens :, config.global_tokens :] = tiles
    return mask[None]


class Layer(nn.Module):
    """Attention and a feed-forward network, each normed after its residual connection."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.config, self.drawn = config, draw(config, layer) if config.random else None
        self.pattern = pattern(config, self.drawn)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.ff = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in range(2))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Map (B, S, width) to the same; mask is bool (B, S), False at padding."""
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        if self.config.eager:
            y = masked_attention(q, k, v, allowed(self.config, self.drawn, length) & mask[:, None, None])
        else:
            y = attention(q, k, v, self.pattern, padding=mask)
        x = self.norms[0](x + self.out(y.transpose(1, 2).reshape(batch, length, width)))
        return self.norms[1](x + self.ff(x))


class BigBird(nn.Module):
    """Vectors of tokens, with learned positions and, in ETC, learned global tokens before them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.max_position_embeddings, config.width)
        self.extra = nn.Parameter(torch.randn(config.global_tokens, config.width))
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.layers))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Encode tokens.

        Args:
            input_ids: int64 (B, S).
            attention_mask: int64 (B, S), 0 at padding.

        Returns:
            (B, S, width), without the global tokens.
        """
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        mask, first = attention_mask != 0, self.config.global_tokens
        if first:
            x = torch.cat([self.extra.expand(x.shape[0], -1, -1), x], dim=1)
            mask = torch.cat([mask.new_ones(mask.shape[0], first), mask], dim=1)
        for layer in self.layers:
            x = layer(x, mask)
        return x[:, first:]


def itc() -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, Any]]:
    """Random blocks, and the ends of the text global: one length, any batch."""
    config = Config()
    ids = torch.arange(2 * config.length).view(2, -1) % config.vocabulary
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return BigBird(config), inputs, {name: {0: torch.export.Dim("batch")} for name in inputs}


def etc() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Global tokens before the text, and no random blocks: any length."""
    config = Config(global_tokens=20, random=0)
    ids = torch.arange(2 * 150).view(2, 150) % config.vocabulary
    return BigBird(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
