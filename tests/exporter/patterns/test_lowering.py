"""Which operator a pattern is lowered to, and that a band says what its pattern says."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from longspan.exporter.patterns import (
    All,
    Blocked,
    Causal,
    Chunked,
    Columns,
    Empty,
    Global,
    Lengths,
    Pattern,
    PerHead,
    Random,
    Repeated,
    Rows,
    Shifted,
    Strided,
    Tokens,
    Window,
    lower_pattern,
    systems,
    window_pattern,
)
from longspan.plugins.sliding_window_attention.definition import Attributes
from longspan.plugins.sliding_window_attention.reference import sliding_window_attention

from .strategies import any_lengths, sides, small, token_sets

BANDS: st.SearchStrategy[Pattern] = st.recursive(
    st.builds(Window, sides, sides, st.integers(1, 4))
    | st.sampled_from([Causal(), All(), Empty(), Strided(3)])
    | st.builds(Global, st.integers(0, 3))
    | st.builds(Global, token_sets(), st.booleans(), st.booleans()),
    lambda parts: st.one_of(
        st.builds(lambda a, b: a | b, parts, parts),
        st.builds(lambda a, b: a & b, parts, parts),
        st.builds(lambda a: a & Causal(), parts),
        st.builds(Blocked, small, parts),
        st.builds(PerHead, st.lists(parts, min_size=1, max_size=2).map(tuple)),
    ),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(BANDS, any_lengths())
def test_a_band_says_what_its_pattern_says(pattern: Pattern, lengths: Lengths) -> None:
    lowering = lower_pattern(pattern)
    if lowering.operator == "BlockSparseAttention":
        assert lowering.reason.startswith("not one band: ")
        return
    Attributes.from_mapping(lowering.attributes)
    again = window_pattern(lowering.attributes, lowering.global_tokens or Tokens())
    shape = (pattern.heads, lengths.seq_q, lengths.seq_k)
    np.testing.assert_array_equal(np.broadcast_to(again.dense(lengths), shape), pattern.dense(lengths))


def band(left: int, right: int, *dilation: int, causal: bool = False) -> dict[str, Any]:
    sizes = {"left_window_size": left, "right_window_size": right}
    return {**sizes, "dilation": list(dilation or (1,)), "is_causal": int(causal)}


@pytest.mark.parametrize(
    "pattern, attributes, tokens",
    [
        (Window(4, 4), band(4, 4), None),
        (Window(4, 4) & Causal(), band(4, 0, causal=True), None),
        (Causal() & Window(8, 3, 2) & Window(10, -1), band(5, 0, 2, causal=True), None),
        (Causal(), band(-1, 0, causal=True), None),
        (Strided(5) & Causal(), band(-1, 0, 5, causal=True), None),
        (Strided(4) & Strided(6), band(-1, -1, 12), None),
        (Window(4, 0) | Window(0, 3), band(4, 3), None),
        (Window(4, 0) | Strided(2) & Window(2, 0), band(4, 0, causal=True), None),
        (Window(4, 4) | Global(2), band(4, 4), Tokens(first=2)),
        ((Window(4, 4) | Global(2)) & Causal(), band(4, 0, causal=True), Tokens(first=2)),
        (Global(2) & Causal() | Window(4, 0), band(4, 0, causal=True), Tokens(first=2)),
        (Window(4, 0) | Global(2), band(4, 0), Tokens(first=2)),
        (Window(1, 1) | Blocked(8, Global(1)), band(1, 1), Tokens(first=8)),
        (Window(1, 1) | Global(1) | Global((5, 9)), band(1, 1), Tokens(first=1, at=(5, 9))),
        (Window(1, 1) | Rows(Tokens(first=3)) | Columns(Tokens(first=3)), band(1, 1), Tokens(first=3)),
        (systems.longformer(8, global_tokens=1, dilation=(1, 2)), band(4, 4, 1, 2), Tokens(first=1)),
        (systems.atrous_attention(3), band(-1, -1, 3), None),
        (All() | Global(3), band(-1, -1), None),
        (Repeated(Window(1, 1), 1), band(1, 1), None),
        (Shifted(0, Window(1, 1)), band(1, 1), None),
        (Blocked(1, Window(1, 1)), band(1, 1), None),
    ],
    ids=lambda value: value.describe() if isinstance(value, Pattern) else "",
)
def test_one_band(pattern: Pattern, attributes: dict[str, Any], tokens: Tokens | None) -> None:
    lowering = lower_pattern(pattern)
    assert lowering.operator == "SlidingWindowAttention" and lowering.reason.startswith("one band")
    assert lowering.attributes == attributes and lowering.global_tokens == tokens


@pytest.mark.parametrize(
    "pattern, words",
    [
        (Window(4, 4) | Strided(8), "window of 4 left, 4 right or every 8 tokens from the query is none"),
        (Window(4, 4) | Global(2, rows=False), "not those that every query sees"),
        ((Window(4, 4) | Global(2)) & Window(9, 9), "cuts global tokens"),
        (Window(4, 2) | Global(2) & Causal(), "only a part of .* is causal"),
        (Global(2), "no band at all"),
        (Empty(), "it is empty"),
        (Chunked(8) & Causal(), "ends at blocks"),
        (systems.big_bird(8, 3), "counts keys more than once"),
        (Window(1, 1) | Blocked(4, Global(Tokens(last=1))), "from the end of the text"),
        (PerHead((Window(4, 4), Window(8, 8))), "heads 0 and 1 differ in more than their dilation"),
        (PerHead((Window(4, 4), Window(4, 4) | Global(1))), "heads 0 and 1 differ"),
        (Window(2, 2) * 2, "more than once"),
        (Random(2), "2 random keys, seed 0 is none"),
        (~Causal(), "not causal is none"),
        (Shifted(2, Window(1, 1)), "is none"),
    ],
    ids=lambda value: value.describe() if isinstance(value, Pattern) else "",
)
def test_near_misses_need_lists(pattern: Pattern, words: str) -> None:
    lowering = lower_pattern(pattern)
    assert lowering.operator == "BlockSparseAttention" and lowering.global_tokens is None
    assert re.search(words, lowering.reason)
    assert set(lowering.attributes) == {"q_block_size", "kv_block_size"}


def test_block_size_and_heads() -> None:
    bird = lower_pattern(systems.big_bird(16, 3))
    assert bird.attributes == {"q_block_size": 16, "kv_block_size": 16} and "blocks of 16" in bird.reason
    assert lower_pattern(systems.big_bird(16, 3), block_size=32).attributes["q_block_size"] == 32
    dilated = systems.sliding_window(4, 4, dilation=(1, 2))
    assert lower_pattern(dilated, heads=5).attributes["dilation"] == [1, 2, 1, 2, 1]
    assert lower_pattern(Window(4, 4), heads=5).attributes["dilation"] == [1]


def test_the_operator_sees_what_the_pattern_says() -> None:
    length = 14
    pattern = systems.longformer(4, dilation=(1, 3)) | Global(Tokens(first=1, last=1))
    lowering = lower_pattern(pattern)
    assert lowering.global_tokens is not None
    lengths = Lengths.of(length)
    zeros, values = np.zeros((1, 2, length, 4)), np.broadcast_to(np.eye(length), (1, 2, length, length))
    mask = lowering.global_tokens.contain(lengths.keys(), lengths)[None]
    out, _ = sliding_window_attention(
        zeros, zeros, values, attributes=Attributes.from_mapping(lowering.attributes), global_mask=mask
    )
    np.testing.assert_array_equal(out[0] > 0, pattern.dense(lengths) > 0)


def test_the_page_says_what_happens() -> None:
    page = Path(__file__).parents[3] / "docs" / "patterns.md"
    failed, tried = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert tried >= 7 and not failed
