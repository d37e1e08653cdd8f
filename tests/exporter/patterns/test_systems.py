"""Published patterns against their formulas, written pair by pair from the papers and from the code that runs them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.patterns import Lengths, Pattern, build_lists, from_json, systems, to_json

Formula = Callable[[int, int], bool]


def dense(formula: Formula, length: int) -> npt.NDArray[np.int32]:
    return np.array([[formula(q, k) for k in range(length)] for q in range(length)], np.int32).reshape(length, length)


def strided_near(q: int, k: int) -> bool:
    return max(0, q - 4) <= k <= q


def strided_far(q: int, k: int) -> bool:
    return k <= q and (q - k) % 4 == 0


def fixed_near(q: int, k: int) -> bool:
    return k <= q and k // 4 == q // 4


def fixed_far(q: int, k: int) -> bool:
    return k <= q and k % 4 in (2, 3)


@pytest.mark.parametrize(
    "pattern, formulas",
    [
        (systems.sliding_window(3, 1), [lambda q, k: q - 3 <= k <= q + 1]),
        (
            systems.sliding_window(2, 2, dilation=(1, 3)),
            [lambda q, k: abs(q - k) <= 2, lambda q, k: abs(q - k) in (0, 3, 6)],
        ),
        (systems.longformer(4, global_tokens=2), [lambda q, k: abs(q - k) <= 2 or q < 2 or k < 2]),
        (systems.longformer(4), [lambda q, k: abs(q - k) <= 2]),
        (systems.chunked_causal(5), [lambda q, k: k <= q and q // 5 == k // 5]),
        (systems.sparse_transformer_strided(4), [lambda q, k: strided_near(q, k) or strided_far(q, k)]),
        (systems.sparse_transformer_strided(4, heads=4), [strided_near, strided_near, strided_far, strided_far]),
        (systems.sparse_transformer_fixed(4, 2), [lambda q, k: fixed_near(q, k) or fixed_far(q, k)]),
        (systems.sparse_transformer_fixed(4, 2, heads=2), [fixed_near, fixed_far]),
        (systems.local_attention(3), [lambda q, k: abs(q - k) <= 3]),
        (systems.atrous_attention(3), [lambda q, k: abs(q - k) % 3 == 0]),
        (systems.local_atrous_attention(3), [lambda q, k: abs(q - k) <= 3 or abs(q - k) % 3 == 0]),
    ],
)
@pytest.mark.parametrize("length", [1, 4, 5, 16, 19])
def test_token_patterns(pattern: Pattern, formulas: list[Formula], length: int) -> None:
    wanted = np.stack([dense(formula, length) for formula in formulas])
    np.testing.assert_array_equal(pattern.dense(Lengths.of(length)), wanted)


@pytest.mark.parametrize("heads, stride, alike", [(4, 3, False), (2, 8, False), (3, 4, True), (16, 4, False)])
def test_phi3_small(heads: int, stride: int, alike: bool) -> None:
    pattern = systems.phi3_small(2, local_blocks=2, stride=stride, heads=heads, alike=alike)
    length, step = 39, max(1, stride // heads)
    got = pattern.dense(Lengths.of(length))
    for head in range(heads):
        shift = 0 if alike else head * step

        def seen(q: int, k: int, shift: int = shift) -> bool:
            return k <= q and (q // 2 - k // 2 < 2 or (k // 2 + shift + 1) % stride == 0)

        np.testing.assert_array_equal(got[head % len(got)], dense(seen, length))
    assert pattern.heads == (1 if alike else min(heads, stride))


def counted_rows(blocks: int, random: int) -> list[list[int]]:
    """Key blocks of each row as transformers concatenates them in evaluation."""
    last, drawn = blocks - 1, [0] * random
    rows = [list(range(blocks)), [0, 1, 2, last, *drawn]]
    rows += [[0, i - 1, i, i + 1, *drawn, last] for i in range(2, blocks - 2)]
    return [*rows, [0, last - 2, last - 1, last, *drawn], list(range(blocks))]


@pytest.mark.parametrize("blocks", [6, 7, 12, 30])
@pytest.mark.parametrize("random", [0, 1, 3])
def test_big_bird_in_evaluation(blocks: int, random: int) -> None:
    pattern, size = systems.big_bird(4, random), 4
    wanted = np.zeros((blocks, blocks), int)
    for row, keys in enumerate(counted_rows(blocks, random)):
        np.add.at(wanted[row], keys, 1)
    np.testing.assert_array_equal(
        pattern.dense(Lengths.of(blocks * size))[0], np.kron(wanted, np.ones((size, size), int))
    )
    lists = build_lists(pattern, Lengths.of(blocks * size), size, size)
    listed = [lists.full_kv_indices[0, 0, r, : lists.full_kv_num_blocks[0, 0, r]].tolist() for r in range(blocks)]
    assert listed == [sorted(keys) for keys in counted_rows(blocks, random)]
    assert not lists.kv_num_blocks.any()


def test_big_bird_attends_in_full_to_short_texts() -> None:
    pattern = systems.big_bird_of_any_length(4, 2)
    assert 36 in pattern.thresholds and from_json(to_json(pattern)) == pattern
    assert (pattern.dense(Lengths.of(36)) == 1).all() and (pattern.dense(Lengths.of(35)) == 1).all()
    for length in (37, 40, 61):
        wanted = systems.big_bird(4, 2).dense(Lengths.of(length))
        np.testing.assert_array_equal(pattern.dense(Lengths.of(length)), wanted)
        assert wanted[0, 4, 0] == 3


def test_itc_draws_blocks_that_are_not_seen_anyway() -> None:
    pattern = systems.big_bird_itc(4, random=2, heads=3, seed=7)
    lengths, blocks = Lengths.of(48), 12
    masks = pattern.dense(lengths)[:, ::4, ::4]
    assert masks.max() == 1 and len({mask.tobytes() for mask in masks}) == 3
    assert masks[:, [0, -1]].all() and masks[:, :, [0, -1]].all()
    for row in range(1, blocks - 1):
        near = {0, row - 1, row, row + 1, blocks - 1}
        assert masks[:, row, sorted(near)].all()
        assert (masks[:, row].sum(1) == len(near) + 2).all()
    causal = systems.big_bird_itc(4, random=2, heads=3, seed=7, causal=True).dense(lengths)
    np.testing.assert_array_equal(causal, np.tril(pattern.dense(lengths)))


def test_etc_counts_its_blocks_after_the_global_tokens() -> None:
    mask = systems.big_bird_etc(4, 3, random=1).dense(Lengths.of(43))[0]
    assert mask[:3].all() and mask[:, :3].all()
    blocks = mask[3:, 3:][::4, ::4]
    np.testing.assert_array_equal(mask[3:, 3:], np.kron(blocks, np.ones((4, 4), int)))
    assert (blocks.sum(1) == [3] + [4] * 8 + [3]).all()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: systems.longformer(5), "must be even"),
        (lambda: systems.big_bird_itc(4, window=2), "window = 2: must be an odd number"),
        (lambda: systems.sparse_transformer_strided(4, heads=3), "heads = 3"),
        (lambda: systems.big_bird(0), "size = 0"),
        (lambda: systems.phi3_small(stride=0), "stride = 0"),
    ],
)
def test_what_is_out_of_range(make: Callable[[], Pattern], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        make()
