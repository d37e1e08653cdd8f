"""Tile sizes of a kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut.

    Attributes:
        block_m: Rows of a tile: queries times heads that share a key head.
        block_n: Keys of a tile.
        num_warps: Warps of a block.
        num_stages: Stages of software pipelining.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def padded(size: int) -> int:
    """Width of the tile that holds rows of `size` elements: the next power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())
