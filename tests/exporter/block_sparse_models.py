"""Small models that call BlockSparseAttention, and the files of factories for them."""

from __future__ import annotations

from pathlib import Path

from longspan.exporter.patterns import Blocked, Causal, Columns, Pattern, Tokens, Window, to_json

BLOCK = 8

PATTERN: Pattern = Blocked(BLOCK, Window(1, 0) | Columns(Tokens(first=1))) & Causal()
"""The query's own block, the one before it, and block 0; causal."""

_FACTORY = '''
import torch
from longspan.plugins.block_sparse_attention.torch_op import block_sparse_attention

BLOCK = 8


def lists_for(rows):
    row = torch.arange(rows, dtype=torch.int32)
    slot = torch.arange(3, dtype=torch.int32)
    blocks = torch.where(slot == 0, 0, torch.clamp(row[:, None] - 2, min=0) + slot)
    counts = torch.clamp(row + 1, max=3)
    return counts[None, None], blocks[None, None].to(torch.int32)


class Layer(torch.nn.Module):
    def __init__(self, fixed):
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)
        self.fixed = fixed

    def forward(self, hidden, attention_mask):
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)
        rows = (hidden.shape[1] + BLOCK - 1) // BLOCK
        full_counts, full = lists_for(self.fixed if self.fixed else rows)
        y = block_sparse_attention(
            q, k, v, torch.zeros_like(full_counts), full[..., :0], full_counts, full,
            attn_mask=attention_mask.bool(), is_causal=True, q_block_size=BLOCK, kv_block_size=BLOCK,
            q_num_heads=2, kv_num_heads=2, pattern={pattern!r},
        )
        return hidden + y


class Two(torch.nn.Module):
    def __init__(self, fixed=0):
        super().__init__()
        self.first, self.second = Layer(fixed), Layer(fixed)

    def forward(self, hidden, attention_mask):
        return self.second(self.first(hidden, attention_mask), attention_mask)


def inputs():
    return {{"hidden": torch.randn(2, 30, 32), "attention_mask": torch.ones(2, 30, dtype=torch.int64)}}


def computed():
    return Two(), inputs()


def fixed():
    return Two(fixed=4), inputs()


class Routed(torch.nn.Module):
    """Each row of blocks sees its own block, and the one whose tokens score highest: the text decides."""

    def __init__(self):
        super().__init__()
        self.qkv, self.route = torch.nn.Linear(32, 96), torch.nn.Linear(32, 1)

    def forward(self, hidden, attention_mask):
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)
        length = hidden.shape[1]
        rows = (length + BLOCK - 1) // BLOCK
        score = torch.nn.functional.pad(self.route(hidden)[..., 0], (0, rows * BLOCK - length))
        best = score.reshape(-1, rows, BLOCK).amax(-1).argmax(-1)[:, None]
        own = torch.arange(rows)[None].expand(best.shape[0], -1)
        full = torch.stack([own, best.expand(-1, rows)], -1)[:, None].to(torch.int32)
        counts = torch.where(own == best, 1, 2)[:, None].to(torch.int32)
        return hidden + block_sparse_attention(
            q, k, v, torch.zeros_like(counts), full[..., :0], counts, full, attn_mask=attention_mask.bool(),
            q_block_size=BLOCK, kv_block_size=BLOCK, q_num_heads=2, kv_num_heads=2,
        )


class TwoRouted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Routed(), Routed()

    def forward(self, hidden, attention_mask):
        return self.second(self.first(hidden, attention_mask), attention_mask)


def routed():
    return TwoRouted(), inputs()
'''


def write_factory(folder: Path, pattern: str = to_json(PATTERN)) -> Path:
    """Write a file with factories: lists ``computed`` from the length, ``fixed`` for 32 tokens, ``routed`` by the text.

    Args:
        folder: Where to write.
        pattern: What each site records.
    """
    file = folder / "block_sparse_model.py"
    file.write_text(_FACTORY.format(pattern=pattern))
    return file
