"""Block lists: the fast builder against the one that asks about every pair, and both against the pattern."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.patterns import (
    Blocked,
    BlockLists,
    Causal,
    Columns,
    Empty,
    Lengths,
    Pattern,
    PerHead,
    Random,
    Rows,
    Strided,
    Tokens,
    Widths,
    Window,
    build_lists,
    enumerate_lists,
)
from longspan.plugins.block_sparse_attention.definition import Attributes
from longspan.plugins.block_sparse_attention.reference import block_sparse_attention

from .strategies import any_lengths, block_sizes, explicit_for, members, patterns

PROPERTY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def check(pattern: Pattern, lengths: Lengths, size_q: int, size_k: int) -> BlockLists:
    """Both builders agree bit by bit, and the lists say what the pattern says."""
    lists = build_lists(pattern, lengths, size_q, size_k)
    assert lists == enumerate_lists(pattern, lengths, size_q, size_k)
    np.testing.assert_array_equal(lists.multiplicity(), pattern.dense(lengths))
    return lists


@PROPERTY
@given(patterns, any_lengths(), block_sizes, block_sizes)
def test_the_fast_builder_is_the_slow_one(pattern: Pattern, lengths: Lengths, size_q: int, size_k: int) -> None:
    check(pattern, lengths, size_q, size_k)


@settings(PROPERTY, max_examples=100)
@given(st.data(), any_lengths(), block_sizes, block_sizes)
def test_with_explicit_parts(data: st.DataObject, lengths: Lengths, size_q: int, size_k: int) -> None:
    explicit, other = data.draw(explicit_for(lengths)), data.draw(members)
    check(data.draw(st.sampled_from([explicit, explicit & other, explicit + other])), lengths, size_q, size_k)


@pytest.mark.parametrize("length", [63, 64, 65, 127, 128, 129, 191, 200])
@pytest.mark.parametrize("size_q, size_k", [(64, 64), (64, 32), (24, 40)])
def test_around_thresholds(length: int, size_q: int, size_k: int) -> None:
    window = Window(63, 0) | Columns(Tokens(first=3))
    blocks = Blocked(64, Window(1, 1) + Columns(Tokens(first=1)) * 2)
    for pattern in (window, blocks, Strided(64) & Causal(), PerHead((window, blocks))):
        check(pattern, Lengths.of(length), size_q, size_k)


def test_a_block_of_two_multiplicities_is_listed_once_for_each() -> None:
    pattern = Window(-1, -1) + Columns(Tokens(first=1)) * 2
    lists = check(pattern, Lengths.of(8), 4, 4)
    assert lists.full_kv_indices.tolist() == [[[[0, 1], [0, 1]]]]
    assert lists.kv_indices.tolist() == [[[[0, 0], [0, 0]]]]
    assert lists.block_mask_ids.tolist() == [[[[0, 0], [0, 0]]]]
    assert lists.block_masks.tolist() == [[[1], [1], [1], [1]]]


def test_equal_masks_are_kept_once_also_at_the_end_of_the_text() -> None:
    lists = check(Causal(), Lengths.of(100), 16, 16)
    assert lists.block_masks.shape == (1, 16, 2)
    assert lists.kv_num_blocks.tolist() == [[[1] * 7]]
    # The last rows are full where they exist: a window that ends behind the text hides nothing of it.
    assert not check(Window(-1, 15), Lengths.of(17), 16, 16).block_masks[0].all()
    assert check(Window(-1, 15), Lengths.of(16), 16, 16).inputs().keys() == {
        "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    }  # fmt: skip


def test_blocks_that_the_structure_calls_alike_are_looked_into_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    pattern = (Strided(16) | Window(3, 0)) & Causal()
    count = type(pattern)._count

    def counting(self: Pattern, *question: Any) -> Any:
        result = count(self, *question)
        asked.append(result.size)
        return result

    monkeypatch.setattr(type(pattern), "_count", counting)
    lists = build_lists(pattern, Lengths.of(1600), 16, 16)
    # The diagonal, what the window reaches below it, and all the rest.
    assert len(lists.block_masks) == 3 and sum(asked) == 3 * 16 * 16
    assert int(lists.kv_num_blocks.sum()) == 100 * 101 // 2


def test_widths() -> None:
    window, lengths = Window(4, 0), Lengths.of(16)
    wide = build_lists(window, lengths, 4, 4, widths=Widths(partial=5, full=3))
    assert wide.kv_indices.shape == wide.block_mask_ids.shape == (1, 1, 4, 5)
    assert wide.full_kv_indices.shape == (1, 1, 4, 3)
    assert (wide.block_mask_ids[0, 0, :, 2:] == -1).all()
    np.testing.assert_array_equal(wide.multiplicity(), window.dense(lengths))
    with pytest.raises(InvalidRequest, match="row of blocks 1 lists 2 partial blocks: more than the 1 slots"):
        build_lists(window, lengths, 4, 4, widths=Widths(partial=1))


def test_heads() -> None:
    lengths, pattern = Lengths.of(9), PerHead((Window(1, 1), Causal()))
    assert build_lists(Window(1, 1), lengths, 4, 4, heads=6).heads == 1
    assert build_lists(pattern, lengths, 4, 4).heads == 2
    lists = build_lists(pattern, lengths, 4, 4, heads=5)
    np.testing.assert_array_equal(lists.multiplicity(), pattern.dense(lengths)[[0, 1, 0, 1, 0]])


def test_lengths_of_nothing() -> None:
    for lengths in (Lengths.of(0), Lengths(0, 5), Lengths(5, 0)):
        for pattern in (Causal(), Empty(), Random(2)):
            lists = check(pattern, lengths, 4, 4)
            assert lists.kv_num_blocks.shape == (1, 1, -(-lengths.seq_q // 4))


def test_pairs_listed() -> None:
    # Rows of 4, 4, 2 queries; each lists its own block of 4, 4, 2 keys and the whole first one.
    lists = build_lists(Blocked(4, Window(0, 0) | Columns(Tokens(first=1))), Lengths.of(10), 4, 4)
    assert lists.listed_pairs == 16 + (16 + 16) + (4 + 8)


def test_sizes_are_checked() -> None:
    for build in (build_lists, enumerate_lists):
        with pytest.raises(InvalidRequest, match="q_block_size = 0"):
            build(Causal(), Lengths.of(4), 0, 4)


@pytest.mark.parametrize(
    "pattern",
    [
        Window(3, 2) | Rows(Tokens(last=1)),
        PerHead((Causal(), Blocked(3, Window(1, 0)) + Columns(Tokens(first=2)) * 2)),
    ],
)
def test_the_operator_reads_the_lists_as_they_are_meant(pattern: Pattern) -> None:
    lengths = Lengths.of(13)
    lists = build_lists(pattern, lengths, 4, 5)
    zeros = np.zeros((1, 2, 13, 4))
    values = np.broadcast_to(np.eye(13), (1, 2, 13, 13))
    attributes = Attributes(q_block_size=4, kv_block_size=5)
    out, lse = block_sparse_attention(zeros, zeros, values, attributes=attributes, **lists.inputs())
    # With equal scores and the identity as V, a weight times the denominator is the multiplicity.
    counted = out[0] * np.exp(lse[0])[..., None]
    np.testing.assert_allclose(counted, np.broadcast_to(pattern.dense(lengths), (2, 13, 13)), atol=1e-12)


@pytest.mark.parametrize(
    "pattern",
    [
        Causal(),
        Window(20, 0),
        Strided(16) & Causal(),
        Blocked(16, Window(1, 1) | Columns(Tokens(first=1))),
        PerHead((Window(9, 9) | Rows(Tokens(first=2)), Random(3, seed=1))),
    ],
    ids=str,
)
def test_the_lists_are_those_of_flex_attention(pattern: Pattern) -> None:
    # At a whole number of blocks; FlexAttention counts pairs beyond the text as hidden, so that its last blocks differ.
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    lengths = Lengths.of(96)
    dense = torch.from_numpy(pattern.dense(lengths) > 0)
    mask = create_block_mask(lambda b, h, q, k: dense[h, q, k], None, len(dense), 96, 96, "cpu", BLOCK_SIZE=(32, 16))
    lists = build_lists(pattern, lengths, 32, 16)
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        count = getattr(lists, counts)
        np.testing.assert_array_equal(count, getattr(mask, counts).numpy())
        listed = np.arange(getattr(lists, indices).shape[-1]) < count[..., None]
        theirs = getattr(mask, indices).numpy()[..., : listed.shape[-1]]
        np.testing.assert_array_equal(getattr(lists, indices)[listed], theirs[listed])
