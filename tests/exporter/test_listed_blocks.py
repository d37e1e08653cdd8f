"""What block lists are said to count, against the denominators of the reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from longspan.exporter.patterns import (
    Causal,
    Chunked,
    Global,
    Lengths,
    Pattern,
    PerHead,
    RandomBlocks,
    Window,
    build_lists,
)
from longspan.exporter.sites.listed_blocks import ListedBlocks
from longspan.plugins import InvalidOperands
from longspan.plugins.block_sparse_attention.definition import Attributes

from ..plugins.block_sparse_cases import CASES, Array, Case, expected

LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "block_mask_ids")


def listed(case: Case, operands: dict[str, Array], b: int) -> ListedBlocks:
    """The lists of one batch entry."""
    one = {name: array[b if len(array) > 1 else 0] for name, array in operands.items() if name != "block_masks"}
    if "distance_bias" in operands:
        one["distance_bias"] = operands["distance_bias"]
    lists = {name: one[name] for name in LISTS if name in one}
    if "block_masks" in operands:
        lists["block_masks"] = operands["block_masks"]
    optional = ("attn_mask", "nonpad_kv_seqlen", "q_positions", "k_positions", "distance_bias")
    return ListedBlocks(
        Attributes.from_mapping(case.node_attributes("bhsd")),
        case.seq_q,
        case.keys,
        lists,
        {name: one[name] for name in optional if name in one},
    )


def counted_by_the_reference(case: Case, operands: dict[str, Array]) -> Array:
    """(B, H, S_q), the terms of each row's denominator: with equal scores it is their number."""
    flat = {name: np.zeros_like(array) if name in ("Q", "K", "V") else array for name, array in operands.items()}
    flat.pop("sinks", None)
    if "distance_bias" in flat:
        flat["distance_bias"] = np.where(np.isneginf(flat["distance_bias"]), -np.inf, 0.0)
    return np.asarray(np.exp(expected(case, "bhsd", flat)[1]).round().astype(np.int64))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_terms_are_those_of_the_reference(case: Case) -> None:
    operands = case.operands("bhsd")
    wanted = counted_by_the_reference(case, operands)
    for b in range(case.batch):
        lists = listed(case, operands, b)
        lists.check()
        assert case.heads % lists.heads == 0
        for head in range(case.heads):
            own = head * lists.heads // case.heads
            rows = wanted[b, head][lists.rows]
            assert lists.terms(own) == rows.sum()
            strips = [lists.multiplicity(own, row) for row in range(lists.attributes.q_blocks(case.seq_q))]
            np.testing.assert_array_equal(np.concatenate(strips).sum(1), wanted[b, head])


def test_computed_pairs_are_those_of_whole_blocks_that_exist() -> None:
    case = next(case for case in CASES if case.name == "every block")
    assert listed(case, case.operands("bhsd"), 0).computed(0) == case.seq_q * case.keys
    twice = dataclasses.replace(case, density=1.0, repeats=1)
    # Every block stands in both lists.
    assert listed(twice, twice.operands("bhsd"), 0).computed(0) == 2 * case.seq_q * case.keys


PATTERNS: list[Pattern] = [
    Window(5, 0),
    Window(3, 3) | Global(1),
    Chunked(8) & Causal(),
    PerHead((Window(2, 2), Window(-1, 0, 3))),
    RandomBlocks(8, 2, seed=1) + Global(8),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("length", [1, 7, 8, 40, 61])
def test_lists_of_a_pattern_count_what_the_pattern_does(pattern: Pattern, length: int) -> None:
    lengths = Lengths.of(length)
    lists = ListedBlocks.of_pattern(build_lists(pattern, lengths, 8, 4))
    counts = pattern.dense(lengths)
    assert [lists.terms(head) for head in range(lists.heads)] == counts.sum((1, 2)).tolist()
    assert lists.differs_from(pattern) == ""
    assert pattern.terms(lengths, 4) == 4 // len(counts) * counts.sum()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_picture_of_lists_shows_the_share_of_each_cell(pattern: Pattern) -> None:
    lengths = Lengths.of(45)
    lists = ListedBlocks.of_pattern(build_lists(pattern, lengths, 8, 16))
    for head in range(lists.heads):
        counted = np.zeros((48, 48))
        counted[:45, :45] = pattern.head(head).dense(lengths)[0] > 0
        size = np.zeros((48, 48))
        size[:45, :45] = 1
        counted, size = (array.reshape(12, 4, 12, 4).sum((1, 3)) for array in (counted, size))
        np.testing.assert_array_equal(lists.coverage(head, 4, 12), counted / np.maximum(size, 1))
        # A picture that shows only the beginning, and one with room beyond the text.
        np.testing.assert_array_equal(lists.coverage(head, 4, 5), (counted / size)[:5, :5])
        beyond = lists.coverage(head, 4, 16)
        assert not beyond[12:].any() and not beyond[:, 12:].any()


def test_a_pattern_that_the_lists_do_not_have_is_named_with_its_first_pair() -> None:
    lists = ListedBlocks.of_pattern(build_lists(Window(4, 4), Lengths.of(30), 8, 8))
    assert lists.differs_from(Window(4, 3)) == "query 0, key 4: counted 1 times by the lists, 0 by the pattern"
    assert lists.differs_from(Window(5, 4)) == "query 5, key 0: counted 0 times by the lists, 1 by the pattern"
    assert "head 1, query 0, key 4" in lists.differs_from(PerHead((Window(4, 4), Window(4, 3))))


def test_what_the_node_forbids_is_no_difference() -> None:
    lists = ListedBlocks.of_pattern(build_lists(Chunked(8), Lengths.of(20), 8, 8))
    causal = dataclasses.replace(lists, attributes=dataclasses.replace(lists.attributes, is_causal=True))
    assert causal.differs_from(Chunked(8)) == causal.differs_from(Chunked(8) & Causal()) == ""
    padded = dataclasses.replace(lists, optional={"attn_mask": np.arange(20) < 17})
    assert padded.differs_from(Chunked(8)) == "" and padded.terms(0) == 64 + 64 + 1


def test_of_a_long_text_some_rows_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.exporter.sites.listed_blocks._PAIRS", 1000)
    lists = ListedBlocks.of_pattern(build_lists(Window(4, 4), Lengths.of(400), 8, 8))
    assert lists.differs_from(Window(4, 4)) == ""
    assert "query" in lists.differs_from(Window(4, 3))


def test_lists_out_of_range_are_refused() -> None:
    lists = ListedBlocks.of_pattern(build_lists(Window(4, 4), Lengths.of(30), 8, 8))
    wrong = dict(lists.lists)
    wrong["kv_indices"] = wrong["kv_indices"] + 4
    with pytest.raises(InvalidOperands, match=r"kv_indices\[batch 0, head 0, row 0, slot 0\] = 4"):
        dataclasses.replace(lists, lists=wrong).check()
