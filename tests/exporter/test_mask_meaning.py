"""What mask functions mean: those of transformers, those that only look like them, and fingerprints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from longspan.exporter.families.mask_meaning import HORIZON, chunk_size, fingerprint, is_local, meaning, read_pattern
from longspan.exporter.patterns import Window
from longspan.exporter.patterns.systems import chunked_causal
from transformers import masking_utils as stock

START = torch.tensor([0, 1, 3])


@pytest.mark.parametrize("window", [1, 2, 8, 511, 4096, 32768])
def test_causal_windows_count_a_tokens_own_position(window: int) -> None:
    assert read_pattern(stock.sliding_window_causal_mask_function(window), START) == Window(window - 1, 0)


@pytest.mark.parametrize("window", [1, 64, 4096])
def test_bidirectional_windows_do_not(window: int) -> None:
    assert read_pattern(stock.sliding_window_bidirectional_mask_function(window), START) == Window(window, window)


@pytest.mark.parametrize("size", [2, 8, 100, 8192])
def test_chunks_that_begin_after_the_padding(size: int) -> None:
    assert read_pattern(stock.chunked_causal_mask_function(size, START), START) == chunked_causal(size)


def test_words_for_what_is_found() -> None:
    assert meaning(Window(-1, 0)) == "every query sees all keys up to its own"
    assert meaning(Window(3, 1)) == "a query sees 3 keys before and 1 after its own"
    assert meaning(chunked_causal(8)) == "a query sees the keys up to its own within chunks of 8"
    assert chunk_size(chunked_causal(8)) == 8 and is_local(chunked_causal(8)) and is_local(Window(3, 1))
    assert not chunk_size(Window(3, 1)) and not is_local(Window(3, -1))


def test_chunks_that_ignore_the_padding_are_another_pattern() -> None:
    assert read_pattern(stock.chunked_causal_mask_function(8, torch.zeros_like(START)), START) is None


@pytest.mark.parametrize(
    "function, pattern",
    [
        (stock.causal_mask_function, Window(-1, 0)),
        (stock.bidirectional_mask_function, Window(-1, -1)),
        (stock.sliding_window_causal_mask_function(2 * HORIZON), Window(-1, 0)),
    ],
    ids=["causal", "full", "beyond the horizon"],
)
def test_unbounded_patterns(function: Any, pattern: Window) -> None:
    assert read_pattern(function, START) == pattern and not is_local(pattern)


def test_a_window_that_a_model_builds_by_union() -> None:
    union = stock.or_masks(stock.sliding_window_causal_mask_function(8), lambda b, h, q, k: (k > q) & (k - q < 4))
    assert read_pattern(union, START, use_vmap=True) == Window(7, 3)


def window(q: Any, k: Any) -> Any:
    return (k <= q) & (k > q - 8)


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: window(q, k) & ((q - k) % 2 == 0),
        lambda b, h, q, k: window(q, k) | (k == 0),
        lambda b, h, q, k: window(q, k) & (q != 9),
        lambda b, h, q, k: (q // 8 == k // 8) & (q >= 0),
        lambda b, h, q, k: window(q, k) | ((b == 2) & (q == k + 8)),
        lambda b, h, q, k: (k > q) & (k < q),
        stock.packed_sequence_mask_function(torch.zeros(3, 5)),
    ],
    ids=[
        "dilated",
        "global token",
        "one row differs",
        "blocks both ways",
        "one batch entry differs",
        "empty",
        "packed",
    ],
)
def test_near_misses_are_none_of_ours(function: Any) -> None:
    assert read_pattern(function, START) is None


def test_fingerprints_tell_constants_apart_and_tensors_not() -> None:
    windows = [fingerprint(stock.sliding_window_causal_mask_function(size)) for size in (8, 8, 9)]
    assert windows[0] == windows[1] != windows[2]
    chunks = [fingerprint(stock.chunked_causal_mask_function(8, start)) for start in (START, START + 1)]
    assert chunks[0] == chunks[1]
    assert fingerprint(stock.causal_mask_function) != fingerprint(stock.bidirectional_mask_function)
