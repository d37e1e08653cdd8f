"""Costs and distant views against counting pairs one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.patterns import (
    All,
    Blocked,
    Causal,
    Chunked,
    Columns,
    Empty,
    Lengths,
    Pattern,
    PerHead,
    Random,
    RandomBlocks,
    Strided,
    Tokens,
    Window,
    block_of,
    build_lists,
    shares,
    systems,
)
from longspan.plugins.attention.operands import Shapes
from longspan.plugins.sliding_window_attention.definition import band_pairs

from .strategies import any_lengths, block_sizes, patterns

PROPERTY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@PROPERTY
@given(patterns, any_lengths(), block_sizes, block_sizes)
def test_blocks_count_what_their_pairs_count(pattern: Pattern, lengths: Lengths, size_q: int, size_k: int) -> None:
    counts = pattern.dense(lengths)
    assert pattern.terms(lengths) == counts.sum()
    assert pattern.density(lengths) == ((counts > 0).mean() if counts.size else 0)
    rows, columns = (np.arange(0, length, size) for length, size in ((lengths.seq_q, size_q), (lengths.seq_k, size_k)))
    wanted = counts
    if counts.size:
        wanted = np.add.reduceat(np.add.reduceat(counts, rows, axis=1), columns, axis=2)
        np.testing.assert_array_equal(build_lists(pattern, lengths, size_q, size_k).terms(), wanted)


def test_long_texts_are_counted_exactly() -> None:
    length = 100_003
    assert Window(256, 200).terms(Lengths.of(length)) == band_pairs(length, length, 256, 200)
    assert Window(50, 3, 7).terms(Lengths(999, length, 5000)) == band_pairs(999, length, 50, 3, 7, 5000)
    assert Causal().terms(Lengths.of(length)) == length * (length + 1) // 2
    blocks = 1000
    bird = systems.big_bird(64, 3).terms(Lengths.of(64 * blocks))
    middle = 5 * (blocks - 4) + 2 * 4 + 3 * (blocks - 2)
    assert bird == 64 * 64 * (2 * blocks + middle)


def test_heads_that_are_alike_are_counted_as_often_as_there_are() -> None:
    lengths, both = Lengths.of(10), PerHead((Causal(), All()))
    assert All().terms(lengths, 8) == 800
    assert both.terms(lengths) == 155 and both.terms(lengths, 4) == 310 and both.terms(lengths, 3) == 210
    assert both.density(lengths) == 155 / 200


def test_cost_counts_repeated_keys_as_often_as_they_are_computed() -> None:
    shapes = Shapes("bhsd", batch=2, q_num_heads=4, kv_num_heads=2, seq_q=10, seq_k=10, head_size=8, v_head_size=16)
    pattern = All() + Columns(Tokens(first=1))
    work = pattern.cost(shapes)
    assert work.pairs == 2 * 4 * 110 and work.flops == 2 * work.pairs * (8 + 16)
    assert work.bytes == 2 * 10 * (4 + 2) * (8 + 16) * 4
    assert pattern.density(Lengths.of(10)) == 1
    last = Shapes("bhsd", 1, 1, 1, seq_q=1, seq_k=10, head_size=8, v_head_size=8)
    assert Window(3, 0).cost(last, offset=9).pairs == 4


def test_from_afar() -> None:
    np.testing.assert_array_equal(shares(Causal(), 6, 2)[0], np.tril(np.full((3, 3), 1.0), -1) + np.eye(3) * 0.75)
    np.testing.assert_array_equal(shares(Chunked(4) * 3, 8, 4)[0], np.eye(2))
    np.testing.assert_array_equal(shares(Strided(2), 5, 4)[0], [[0.5, 0.5], [0.5, 1]])
    assert shares(PerHead((All(), Empty())), 8, 4).tolist() == [[[1, 1], [1, 1]], [[0, 0], [0, 0]]]
    assert shares(All(), 0, 4).shape == (1, 0, 0)
    with pytest.raises(InvalidRequest, match="unit = 0"):
        shares(All(), 8, 0)


@pytest.mark.parametrize(
    "pattern, size",
    [
        (Window(5, 5), 64),
        (Strided(128), 128),
        (Strided(100), 100),
        (Strided(7), 56),
        (Strided(256) & Causal(), 128),
        (Strided(131), 64),
        (systems.big_bird(64, 3), 64),
        (systems.big_bird(16), 16),
        (systems.big_bird(8), 64),
        (systems.phi3_small(64, heads=4), 64),
        (systems.chunked_causal(8192), 128),
        (Blocked(48, Window(1, 1)) | Chunked(72), 24),
        (Blocked(131, Causal()), 64),
        (RandomBlocks(32, 3), 32),
        (Random(3), 64),
    ],
)
def test_block_sizes_follow_the_period(pattern: Pattern, size: int) -> None:
    assert block_of(pattern) == size
