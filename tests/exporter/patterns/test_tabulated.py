"""A table of pairs says what the pattern that it was made from says, at every length."""

from __future__ import annotations

import numpy as np
import pytest
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.patterns import (
    All,
    Causal,
    Chunked,
    Columns,
    Empty,
    Fixed,
    Global,
    Lengths,
    Pattern,
    Rows,
    Strided,
    Structure,
    Tabulated,
    Tokens,
    Window,
    build_lists,
    enumerate_lists,
    from_json,
    to_json,
)
from longspan.exporter.patterns.block_table import block_table
from longspan.exporter.patterns.tabulated import table_size

PATTERNS: list[Pattern] = [
    Empty(),
    All(),
    Causal(),
    Window(5, 2),
    Window(3, 0, 4),
    Strided(5) & Causal(),
    Fixed(6, 2) & Causal(),
    Global(7) | Window(2, 2),
    (Global(3) | Window(4, 1) | Chunked(8, 1, 0)) & Causal(),
    Window(3, 3) | Columns(Tokens(period=6, residues=(1,))) | Rows(Tokens(period=4, residues=(2, 3))),
]


def table_of(pattern: Pattern) -> Tabulated:
    structure = pattern.structure
    assert structure is not None
    return Tabulated.of(structure, pattern.dense(Lengths.of(table_size(structure)))[0] > 0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_it_is_the_pattern_at_every_length(pattern: Pattern) -> None:
    table = table_of(pattern)
    size = table.size
    lengths = [Lengths.of(length) for length in (1, 2, size - 1, size, size + 1, 2 * size + 3, 97)]
    for each in (*lengths, Lengths(50, 130), Lengths(31, 90, 59)):
        assert np.array_equal(table.dense(each), pattern.dense(each)), each
    assert from_json(to_json(table)) == table
    assert build_lists(table, Lengths.of(101), 16, 16) == enumerate_lists(table, Lengths.of(101), 16, 16)
    lists = block_table(table, 16).lists(Lengths.of(131))
    assert np.array_equal(lists.multiplicity(), pattern.dense(Lengths.of(131)))


def test_far_pairs_are_looked_up_and_not_enumerated() -> None:
    pattern = Window(5, 2)
    query, key = np.full(3, 10**9), 10**9 + np.array([-5, -6, 2])
    assert table_of(pattern).allowed(query, key, Lengths.of(2 * 10**9)).tolist() == [True, False, True]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="no tail"):
        Tabulated.of(Structure(tail=1), np.zeros((3, 3), np.bool_))
    with pytest.raises(InvalidRequest, match=r"takes \(4, 4\)"):
        Tabulated.of(Structure(near=1), np.zeros((3, 3), np.bool_))
    with pytest.raises(InvalidRequest, match="not zlib-compressed"):
        Tabulated(1, 0, 0, "AAAA")
    good = table_of(Window(5, 2))
    with pytest.raises(InvalidRequest, match="must hold 16 × 16 bits"):
        Tabulated(good.period, good.near + 7, good.first, good.data)
