"""Block lists for open lengths: those of `build_lists` at every length, in numpy, in torch and in a traced graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.patterns import (
    All,
    Blocked,
    BlockLists,
    Causal,
    Columns,
    Explicit,
    Lengths,
    Pattern,
    PerHead,
    RandomBlocks,
    Rows,
    Strided,
    Structure,
    Tokens,
    UpTo,
    Window,
    build_lists,
    systems,
)
from longspan.exporter.patterns.base import Bounds, Counts, counts_of
from longspan.exporter.patterns.block_table import BlockTable, block_table
from longspan.exporter.patterns.block_table_torch import traced_lists
from longspan.exporter.patterns.lengths import Integers, Interval
from longspan.exporter.patterns.regimes import common_structure

from .strategies import patterns

PROPERTY = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)

# One of each kind: with a head, a tail, a tail that ends inside a block, periods that blocks divide and do not, heads,
# multiplicities, lists that grow with the length and lists that do not.
PATTERNS: dict[str, Pattern] = {
    "strided": systems.sparse_transformer_strided(24),
    "strided heads": systems.sparse_transformer_strided(24, heads=4),
    "fixed": systems.sparse_transformer_fixed(20, 3),
    "atrous": systems.local_atrous_attention(7),
    "phi-3-small": systems.phi3_small(16, local_blocks=2, stride=3, heads=4),
    "big bird": systems.big_bird(16, 3),
    "big bird etc": systems.big_bird_etc(16, 5),
    "tail": Rows(Tokens(last=5)) | Window(9, 2),
    "tail beyond a limit": UpTo(40, All(), Rows(Tokens(last=5)) | Window(9, 2)),
    "steps": Window(8, 8, 16),
    "bounded": Window(20, 3) | Columns(Tokens(at=(2, 40))),
    "all": All(),
    "limits": UpTo(40, All(), Window(9, 0) | UpTo(90, Causal(), systems.big_bird(16, 3))),
    "limits of a head": PerHead((Window(5, 0), UpTo(30, Causal(), Window(2, 2)))),
    "limits in blocks": systems.big_bird_of_any_length(16, 2),
    "uncounted": PerHead((Causal(), All() & ~All())),
}


def masks_of(lists: BlockLists) -> np.ndarray:
    """The mask of each slot of the partial list; those of slots that are not read are zero."""
    padded = np.concatenate([lists.block_masks, np.zeros((1, *lists.block_masks.shape[1:]), np.uint8)])
    return padded[lists.block_mask_ids]


def check(table: BlockTable, lengths: Lengths, heads: int | None = None) -> None:
    """The lists of one length: numpy's against those built for that length, and torch's against numpy's."""
    lists = table.lists(lengths, heads)
    built = build_lists(table.pattern, lengths, table.kinds.size, table.kinds.size, heads=heads)
    whole = lengths.seq_q % table.kinds.size == 0 and lengths.seq_k % table.kinds.size == 0
    if whole:
        for counts in ("kv_num_blocks", "full_kv_num_blocks"):
            assert np.array_equal(getattr(lists, counts), getattr(built, counts))
        for ours, theirs in zip(
            (lists.kv_indices, lists.full_kv_indices, masks_of(lists)),
            (built.kv_indices, built.full_kv_indices, masks_of(built)),
            strict=True,
        ):
            width = theirs.shape[3]
            assert np.array_equal(ours[:, :, :, :width], theirs)
    else:
        assert np.array_equal(lists.multiplicity(), built.multiplicity())
    assert (lists.kv_num_blocks <= lists.kv_indices.shape[-1]).all()
    assert (lists.full_kv_num_blocks <= lists.full_kv_indices.shape[-1]).all()
    if lengths.seq_q and lengths.seq_k:
        traced = traced_lists(table, lengths.seq_q, lengths.seq_k, heads or table.pattern.heads, "cpu")
        assert set(traced) == set(lists.inputs())
        for name, array in lists.inputs().items():
            assert traced[name].numpy().dtype == array.dtype
            assert np.array_equal(traced[name].numpy(), array), name


@PROPERTY
@given(patterns, st.integers(1, 8) | st.just(16), st.integers(1, 80))
def test_any_pattern_at_any_length(pattern: Pattern, size: int, length: int) -> None:
    try:
        table = block_table(pattern, size)
    except InvalidRequest as error:
        assert common_structure(pattern) is None or "kinds" in str(error)
        return
    check(table, Lengths.of(length))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("size", [16, 10])
def test_published_patterns(name: str, size: int) -> None:
    table = block_table(PATTERNS[name], size)
    # Below, at and beyond the longest text that the table was made from.
    longest = table.kinds.longest * size
    edges = [edge for limit in table.kinds.limits for edge in (limit, limit + 1)]
    for length in (1, size - 1, size, size + 1, *edges, longest - 3, longest + size, longest + 2 * size + 5):
        check(table, Lengths.of(length))
    check(table, Lengths.of(3 * size + 1), 2 * PATTERNS[name].heads)


@pytest.mark.parametrize("name", PATTERNS)
def test_queries_and_keys_of_different_number(name: str) -> None:
    table = block_table(PATTERNS[name], 16)
    for seq_q, seq_k in ((1, 90), (40, 17), (96, 48), (0, 20), (20, 0)):
        check(table, Lengths(seq_q, seq_k))


def test_lists_of_bounded_patterns_do_not_grow() -> None:
    table = block_table(systems.longformer(64), 16)
    assert (table.partial.slots(1000), table.full.slots(1000)) == (2, 3)
    table = block_table(systems.longformer(64, global_tokens=16), 16)
    assert table.full.listings == 1
    # One block in every eight: the list is as long as that, not as long as the text.
    table = block_table(Strided(128) & Causal(), 16)
    assert table.partial.slots(800) == 100


def test_all_members_of_a_kind_are_compared() -> None:
    with pytest.raises(InvalidRequest, match=r"block row .* correct the pattern's _depends_on"):
        block_table(Wrong(Structure(period=1, near=1)), 8)


def test_what_the_enumerated_texts_do_not_show_is_found_in_longer_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"does not say what it counts in \d+ tokens"):
        block_table(Late(36), 8)


@pytest.mark.parametrize(
    "pattern",
    [
        RandomBlocks(16, 2),
        Explicit.of(np.ones((4, 4), np.bool_)),
        Rows(Tokens(last=3)) | Blocked(16, Rows(Tokens(last=1))),
    ],
    ids=["random", "explicit", "two ends"],
)
def test_patterns_without_a_rule_are_refused(pattern: Pattern) -> None:
    with pytest.raises(InvalidRequest, match="fix the sequence length"):
        block_table(pattern, 16)


def test_tables_that_are_too_large_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="a larger block size"):
        block_table(Window(20_000, 0) | Strided(9973), 16)


def test_queries_in_the_middle_of_a_text_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="position 0"):
        block_table(All(), 16).lists(Lengths(1, 5, 4))


class Lists(torch.nn.Module):
    """Computes the lists of each table twice, as a model of two layers does."""

    def __init__(self, tables: list[BlockTable]) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        def layer() -> list[torch.Tensor]:
            return [
                tensor
                for table in self.tables
                for tensor in traced_lists(table, x.shape[1], x.shape[1], table.pattern.heads, x.device).values()
            ]

        return [torch.maximum(one, two) for one, two in zip(layer(), layer(), strict=True)]


def test_a_traced_graph_computes_them_from_its_own_length(tmp_path: Path) -> None:
    tables = [block_table(PATTERNS[name], 16) for name in ("strided heads", "tail beyond a limit")]
    shapes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}}
    example, model = torch.zeros(2, 150), Lists(tables).eval()
    with torch.no_grad():
        program = torch.onnx.export(
            model, (example,), dynamic_shapes=shapes, dynamo=True, opset_version=20, verbose=False
        )
    assert [str(size) for size in program.model.graph.inputs[0].shape] == ["batch", "sequence"]
    # Layers share one computation: each list is sorted once.
    assert sum(node.op_type == "TopK" for node in program.model.graph) == 2 * len(tables)
    program.save(tmp_path / "lists.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "lists.onnx", providers=["CPUExecutionProvider"])
    for length in (1, 16, 17, 150, 163, 512):
        wanted = [array for table in tables for array in table.lists(Lengths.of(length)).inputs().values()]
        for want, found in zip(wanted, session.run(None, {"x": np.zeros((3, length), np.float32)}), strict=True):
            assert found.dtype == want.dtype
            assert np.array_equal(found, want), length


@dataclass(frozen=True)
class Wrong(Pattern):
    """Depends on the period of 3 that its structure hides."""

    promised: Structure

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return counts_of((query % 3 == 0) & (key >= 0))

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        return np.zeros((), np.int32), np.ones((), np.int32)

    def _depends_on(self) -> Structure:
        return self.promised

    def _special_lengths(self) -> Iterable[int]:
        return ()

    def _words(self) -> str:
        return "a wrong promise"


@dataclass(frozen=True)
class Late(Pattern):
    """Begins to differ after some tokens, of which its structure says nothing."""

    start: int

    def _count(self, query: Integers, key: Integers, lengths: Lengths) -> Counts:
        return counts_of((query >= self.start) & (key >= 0))

    def _bound(self, rows: Interval, keys: Interval, lengths: Lengths) -> Bounds:
        return np.zeros((), np.int32), np.ones((), np.int32)

    def _depends_on(self) -> Structure:
        return Structure()

    def _special_lengths(self) -> Iterable[int]:
        return (self.start,)

    def _words(self) -> str:
        return "a late start"
