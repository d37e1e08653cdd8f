"""What is read from mask_mods, and that it is not read from near misses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from longspan.exporter.families.flex.mask_mods import Grids, MaskValues, Reach, read_pattern
from longspan.exporter.patterns import (
    All,
    Blocked,
    Causal,
    Chunked,
    Columns,
    Empty,
    Fixed,
    Global,
    Lengths,
    Pattern,
    PerHead,
    Tabulated,
    Tokens,
    Window,
)

READINGS: dict[str, tuple[Any, Pattern]] = {
    "all": (lambda b, h, q, k: q == q, All()),
    "none": (lambda b, h, q, k: q < 0, Empty()),
    "causal": (lambda b, h, q, k: q >= k, Causal()),
    "window": (lambda b, h, q, k: (q >= k) & (q - k < 4096), Window(4095, 0)),
    "both sides": (lambda b, h, q, k: (q - k).abs() <= 63, Window(63, 63)),
    "dilated": (lambda b, h, q, k: ((q - k) % 4 == 0) & ((q - k).abs() <= 32), Window(8, 8, 4)),
    "prefix": (lambda b, h, q, k: (k <= q) | (k < 37), Causal() | Columns(Tokens(first=37))),
    "first tokens": (
        lambda b, h, q, k: (k <= q) & ((q - k < 256) | (k < 4)),
        (Window(255, 0) | Columns(Tokens(first=4))) & Causal(),
    ),
    "global": (lambda b, h, q, k: ((q - k).abs() <= 16) | (q < 8) | (k < 8), Window(16, 16) | Global(8)),
    "chunks": (lambda b, h, q, k: (q // 48 == k // 48) & (k <= q), Chunked(48) & Causal()),
    "whole chunks": (lambda b, h, q, k: q // 64 == k // 64, Chunked(64)),
    "stairs": (lambda b, h, q, k: k <= (q // 32 + 1) * 32 - 1, Chunked(32, before=-1)),
    "fixed": (lambda b, h, q, k: (k <= q) & ((q // 16 == k // 16) | (k % 16 >= 14)), Fixed(16, 2) & Causal()),
}


@pytest.mark.parametrize("name", READINGS)
def test_masks_with_a_name(name: str) -> None:
    mask, pattern = READINGS[name]
    assert read_pattern(MaskValues(mask), 1) == pattern


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, q, k: (q + k) % 7 != 0,
        lambda b, h, q, k: (q * q + k) % 11 == 3,
        lambda b, h, q, k: (k <= q) & (q - k != 500),
        lambda b, h, q, k: (k <= q) & ((q - k < 11) | ((q + 2 * k) % 6 == 1)),
        lambda b, h, q, k: (k <= q) & ((q - k < 20) | (k < 9)) & (k != 5),
    ],
)
def test_masks_without_a_name_become_tables(mask: Any) -> None:
    pattern = read_pattern(MaskValues(mask), 1)
    assert isinstance(pattern, Tabulated)
    for length in (1, 40, 700):
        token = np.arange(length)
        wanted = MaskValues(mask).grid(0, token, token)
        assert np.array_equal(pattern.dense(Lengths.of(length))[0] > 0, wanted)


def test_heads_of_their_own() -> None:
    reach = torch.tensor([2, 5, 2])
    pattern = read_pattern(MaskValues(lambda b, h, q, k: (q - k).abs() <= reach[h]), 3)
    assert pattern == PerHead((Window(2, 2), Window(5, 5), Window(2, 2)))


def test_blocks_of_blocks() -> None:
    """Phi-3-small: local blocks and every eighth, shifted by head; far too long a period for a table of tokens."""

    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & ((q // 64 - k // 64 < 16) | ((k // 64 + h + 1) % 8 == 0))

    pattern = read_pattern(MaskValues(mask), 2)
    assert pattern is not None
    assert all(isinstance(part, Blocked) for head in pattern.by_head() for part in head.parts[:1])
    token = np.arange(1300)
    for head in (0, 1):
        assert np.array_equal(
            pattern.head(head).dense(Lengths.of(1300))[0] > 0, MaskValues(mask).grid(head, token, token)
        )


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, q, k: ((q - k) & (q - k - 1)) == 0,
        lambda b, h, q, k: k <= q // 2,
        lambda b, h, q, k: (k <= q) & (q != 12345),
        lambda b, h, q, k: (q - k).abs() <= 40_000,
    ],
    ids=["powers of two", "half", "one query", "beyond the horizon"],
)
def test_near_misses(mask: Any) -> None:
    assert read_pattern(MaskValues(mask), 1) is None


def test_one_pair_that_differs_is_seen() -> None:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q - k < 100) & ~((q == 77) & (k == 50))

    assert read_pattern(MaskValues(mask), 1) != Window(99, 0)


def test_a_text_that_ends() -> None:
    """Known up to its own length only, as a mask that closes over the length is."""
    token = np.arange(200)
    grids = Grids((np.abs(token[:, None] - token) <= 7)[None, None])
    assert read_pattern(grids, 1, Reach(100, endless=False)) == Window(7, 7)


def test_a_mask_that_reads_a_tensor() -> None:
    document = torch.arange(300) // 70
    with pytest.raises(IndexError):
        read_pattern(MaskValues(lambda b, h, q, k: document[q] == document[k]), 1)
