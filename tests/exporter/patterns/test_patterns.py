"""Patterns: what each counts, what it promises about itself, and that it survives JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.patterns import (
    All,
    Blocked,
    Causal,
    Chunked,
    Columns,
    Empty,
    Explicit,
    Fixed,
    Global,
    Interval,
    Lengths,
    Pattern,
    PerHead,
    Random,
    RandomBlocks,
    Rows,
    Shifted,
    Spans,
    Strided,
    Structure,
    Tokens,
    UpTo,
    Window,
    from_json,
    to_json,
)
from longspan.plugins.sliding_window_attention.definition import Attributes
from longspan.plugins.sliding_window_attention.reference import sliding_window_attention

from .strategies import any_lengths, explicit_for, patterns

PROPERTY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.mark.parametrize(
    "pattern, formula",
    [
        (Window(2, 1), lambda q, k, n: q - 2 <= k <= q + 1),
        (Window(2, -1, 3), lambda q, k, n: k >= q - 6 and (k - q) % 3 == 0),
        (Causal(), lambda q, k, n: k <= q),
        (All(), lambda q, k, n: 1),
        (Empty(), lambda q, k, n: 0),
        (Strided(4), lambda q, k, n: (q - k) % 4 == 0),
        (Fixed(5, 2), lambda q, k, n: q // 5 == k // 5 or k % 5 >= 3),
        (Chunked(4, 1, 2), lambda q, k, n: q // 4 - 1 <= k // 4 <= q // 4 + 2),
        (Global(2), lambda q, k, n: q < 2 or k < 2),
        (UpTo(8, All(), Window(1, 0)), lambda q, k, n: n <= 8 or q - 1 <= k <= q),
        (Global((3, 7)), lambda q, k, n: q in (3, 7) or k in (3, 7)),
        (Global(Tokens(last=2), columns=False), lambda q, k, n: q >= n - 2),
        (Global(Tokens(last=2), rows=False), lambda q, k, n: k >= n - 2),
        (Global(2, rows=False, columns=False), lambda q, k, n: 0),
        (Columns(Tokens(period=3, residues=(1,), at=(5,))), lambda q, k, n: k % 3 == 1 or k == 5),
        (Rows(Tokens(first=1, last=1)), lambda q, k, n: q in (0, n - 1)),
        (
            Blocked(3, Global(Tokens(first=1, last=1))),
            lambda q, k, n: q // 3 in (0, (n - 1) // 3) or k // 3 in (0, (n - 1) // 3),
        ),
        (Shifted(4, Chunked(3)), lambda q, k, n: min(q, k) >= 4 and (q - 4) // 3 == (k - 4) // 3),
        (Window(1, 1) | Causal(), lambda q, k, n: k <= q + 1),
        ((Window(3, 3) + Causal()) & ~Window(0, 0), lambda q, k, n: q != k and (abs(q - k) <= 3 or k <= q)),
        (
            Window(3, 3) + 2 * Causal() + Strided(2),
            lambda q, k, n: (abs(q - k) <= 3) + 2 * (k <= q) + ((q - k) % 2 == 0),
        ),
    ],
    ids=lambda value: value.describe() if isinstance(value, Pattern) else "",
)
@pytest.mark.parametrize("length", [1, 2, 5, 12, 13])
def test_multiplicities(pattern: Pattern, formula: Callable[[int, int, int], int], length: int) -> None:
    wanted = [[int(formula(q, k, length)) for k in range(length)] for q in range(length)]
    assert pattern.dense(Lengths.of(length)).tolist() == [wanted]


def test_queries_stand_where_the_cache_ends() -> None:
    lengths = Lengths(3, 10, offset=7)
    np.testing.assert_array_equal(Window(2, 0).dense(lengths)[0], Window(2, 0).dense(Lengths.of(10))[0, 7:])
    pattern = Blocked(4, Window(1, 0)) & ~Columns(Tokens(last=2))
    np.testing.assert_array_equal(pattern.dense(lengths)[0], pattern.dense(Lengths.of(10))[0, 7:])


@pytest.mark.parametrize("spans, ramp", [((0.0, 2.0), 3.0), ((1.25, -4.0), 2.5), ((-2.0, 1.0), 1.0)])
def test_spans_are_the_keys_to_which_the_operator_gives_weight(spans: tuple[float, ...], ramp: float) -> None:
    length = 12
    zeros, values = np.zeros((1, 2, length, 4)), np.broadcast_to(np.eye(length), (1, 2, length, length))
    out, _ = sliding_window_attention(
        zeros,
        zeros,
        values,
        attributes=Attributes(left_window_size=length, right_window_size=length, span_ramp=ramp),
        spans=np.array(spans, np.float32),
    )
    np.testing.assert_array_equal(Spans(spans, ramp).dense(Lengths.of(length)) > 0, out[0] > 0)


def test_random_keys_are_few_new_and_always_the_same() -> None:
    near = Window(1, 1)
    drawn, lengths = Random(3, seed=5, but=near), Lengths.of(40)
    mask = drawn.dense(lengths)[0]
    assert (mask.sum(1) == 3).all() and mask.max() == 1
    assert not (mask * near.dense(lengths)[0]).any()
    assert not np.array_equal(mask, Random(3, seed=6, but=near).dense(lengths)[0])
    # Drawn by SplitMix64, here in whole numbers of Python, and not by a generator of numpy that may change.
    for query in range(40):
        ranks = {key: scrambled(scrambled(5, query), key) >> 1 for key in range(40) if abs(key - query) > 1}
        assert sorted(ranks, key=ranks.__getitem__)[:3] == sorted(np.flatnonzero(mask[query]), key=ranks.__getitem__)
    # All keys are drawn about as often.
    often = Random(8).dense(Lengths(2000, 32))[0].sum(0)
    assert abs(often - 500).max() < 6 * (2000 * 0.25 * 0.75) ** 0.5


def scrambled(state: int, value: int) -> int:
    mixed = ((state ^ value) + 0x9E3779B97F4A7C15) % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)


def test_where_few_keys_are_left_all_are_drawn() -> None:
    mask = Random(10, but=Window(0, 0)).dense(Lengths.of(4))[0]
    np.testing.assert_array_equal(mask, 1 - np.eye(4))
    assert Random(3).dense(Lengths(2, 0)).shape == (1, 2, 0)


def test_blocks_are_drawn_whole() -> None:
    mask = RandomBlocks(4, 2, seed=3).dense(Lengths.of(22))[0]
    blocks = np.kron(mask[::4, ::4], np.ones((4, 4), int))[:22, :22]
    np.testing.assert_array_equal(mask, blocks)
    assert (mask[::4, ::4].sum(1) == 2).all()


def test_explicit() -> None:
    array = np.array([[0, 1, 2], [3, 0, 255]])
    pattern = Explicit.of(array)
    np.testing.assert_array_equal(pattern.dense(Lengths(2, 3))[0], array)
    np.testing.assert_array_equal(pattern.dense(Lengths(1, 3, offset=1))[0], array[1:])
    assert pattern.multiplicity([[-1], [2]], [[0, 3]], Lengths(2, 3)).sum() == 0
    with pytest.raises(InvalidRequest, match="2 queries and 3 keys says nothing about 2 and 4"):
        pattern.dense(Lengths(2, 4))
    for wrong in (np.zeros(3, bool), np.full((2, 2), 256), np.full((2, 2), -1), np.zeros((2, 2))):
        with pytest.raises(InvalidRequest, match=r"Explicit\.of"):
            Explicit.of(wrong)


def test_heads() -> None:
    pattern = PerHead((Window(1, 1), Causal(), Empty())) | PerHead((Empty(), Strided(2)))
    lengths = Lengths.of(5)
    assert pattern.heads == 6
    np.testing.assert_array_equal(pattern.dense(lengths)[3], (Window(1, 1) | Strided(2)).dense(lengths)[0])
    np.testing.assert_array_equal(pattern.dense(lengths)[5], Strided(2).dense(lengths)[0])
    with pytest.raises(InvalidRequest, match="heads differ"):
        pattern.multiplicity(0, 0, lengths)
    assert PerHead((Causal(), Causal())).heads == 1
    assert PerHead((Causal(), Causal())).multiplicity(1, 0, lengths) == 1
    assert Blocked(2, PerHead((Causal(), Empty()))).head(1) == Blocked(2, Empty())


def reduced(structure: Structure, lengths: Lengths) -> np.ndarray:
    """The number of each pair's kind, by what the structure says that a multiplicity depends on."""
    q, k = np.broadcast_arrays(lengths.queries()[:, None], lengths.keys()[None, :])
    end = -(-lengths.text // structure.tail_unit) * structure.tail_unit
    parts = (
        q % structure.period,
        k % structure.period,
        np.clip(k - q, -structure.near, structure.near),
        np.minimum(q, structure.head),
        np.minimum(k, structure.head),
        np.minimum(end - 1 - q, structure.tail),
        np.minimum(end - 1 - k, structure.tail),
    )
    kinds = np.unique(np.stack([part.ravel() for part in parts]), axis=1, return_inverse=True)[1]
    return np.asarray(kinds).reshape(q.shape)


@PROPERTY
@given(patterns, any_lengths())
def test_a_pattern_depends_on_nothing_but_its_structure(pattern: Pattern, lengths: Lengths) -> None:
    for own, counts in zip(pattern.by_head(), pattern.dense(lengths), strict=True):
        if own.structure is None or not counts.size:
            continue
        kinds = reduced(own.structure, lengths)
        of_kind = np.zeros(kinds.max() + 1, int)
        of_kind[kinds] = counts
        np.testing.assert_array_equal(of_kind[kinds], counts)


@PROPERTY
@given(st.data(), any_lengths())
def test_bounds_hold_and_single_pairs_are_known(data: st.DataObject, lengths: Lengths) -> None:
    if not lengths.seq_q or not lengths.seq_k:
        return
    pattern = data.draw(patterns | explicit_for(lengths))

    def runs(first: int, length: int) -> tuple[int, int]:
        ends = data.draw(st.tuples(st.integers(0, length - 1), st.integers(0, length - 1)))
        return first + min(ends), first + max(ends)

    rows, keys = runs(lengths.offset, lengths.seq_q), runs(0, lengths.seq_k)
    for own, counts in zip(pattern.by_head(), pattern.dense(lengths), strict=True):
        inside = counts[rows[0] - lengths.offset : rows[1] - lengths.offset + 1, keys[0] : keys[1] + 1]
        lower, upper = own.bounds(interval(*rows), interval(*keys), lengths)
        assert lower[0] <= inside.min() and inside.max() <= upper[0]


def interval(first: int, last: int) -> Interval:
    return Interval(np.array([first]), np.array([last]))


@pytest.mark.parametrize(
    "pattern",
    [
        Window(5, 3), Window(2, -1, 3), Rows(Tokens(first=3, last=2)), Columns(Tokens(period=5, residues=(1, 2))),
        Chunked(4, 1), Random(3, 1, Window(1, 1)), Blocked(3, Global(1)), Explicit.of(np.eye(20)[:, ::-1] > 0),
    ],
    ids=lambda pattern: pattern.describe(),
)  # fmt: skip
def test_bounds_of_members_are_exact(pattern: Pattern) -> None:
    # Compositions may be conservative; if members were, lists would cost more than the blocks in question.
    lengths = Lengths.of(20)
    counts = pattern.dense(lengths)[0]
    for top, bottom, left, right in np.random.default_rng(0).integers(0, 20, (300, 4)):
        rows, keys = sorted((top, bottom)), sorted((left, right))
        inside = counts[rows[0] : rows[1] + 1, keys[0] : keys[1] + 1]
        lower, upper = pattern.bounds(interval(*rows), interval(*keys), lengths)
        assert (lower[0], upper[0]) == (inside.min(), inside.max())


@PROPERTY
@given(patterns)
def test_json_and_back(pattern: Pattern) -> None:
    again = from_json(to_json(pattern))
    assert again == pattern and hash(again) == hash(pattern)
    assert again.describe() == pattern.describe()


def test_json_is_readable() -> None:
    text = to_json((Window(2, 0) | Global(1)) & Causal())
    assert json.loads(text) == {
        "kind": "Intersection",
        "of": [
            {
                "kind": "Union",
                "of": [
                    {"kind": "Window", "left": 2, "right": 0},
                    {"kind": "Global", "tokens": {"kind": "Tokens", "first": 1}},
                ],
            },
            {"kind": "Causal"},
        ],
    }
    explicit = Explicit.of(np.arange(6).reshape(2, 3))
    assert from_json(to_json(explicit)) == explicit


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON|levels deep"),
        ("[" * 100 + "]" * 100, "levels deep"),
        ("3", "is no pattern"),
        ('{"kind": "Tokens"}', "is no pattern"),
        ('{"kind": "Derived"}', "kind must be one of All, "),
        ('{"kind": "Window"}', "is no Window: .*left"),
        ('{"kind": "Window", "left": 1, "right": 1, "wide": 2}', "is no Window: .*wide"),
        ('{"kind": "Window", "left": "1", "right": 1}', "left = '1': must be a whole number of -1 or more"),
        ('{"kind": "Window", "left": -2, "right": 1}', "left = -2"),
        ('{"kind": "Union", "of": []}', "Union: of nothing"),
        ('{"kind": "Union", "of": [1]}', "must be made of patterns, got 1"),
        ('{"kind": "Not", "of": {"kind": "Tokens"}}', "must be made of patterns"),
        ('{"kind": "Rows", "tokens": 3}', "tokens = 3: must be Tokens"),
        ('{"kind": "Global", "tokens": "x"}', "is no Global"),
        ('{"kind": "Columns", "tokens": {"kind": "Tokens", "period": 2}}', "come together"),
        ('{"kind": "Columns", "tokens": {"kind": "Tokens", "period": 2, "residues": [2]}}', "must lie in 0 … 1"),
        ('{"kind": "Fixed", "stride": 2, "summary": 3}', "at most the stride, 2"),
        ('{"kind": "Spans", "spans": []}', "one finite number per head"),
        ('{"kind": "Spans", "spans": [1], "ramp": 0}', "ramp = 0: must be positive"),
        ('{"kind": "Explicit", "seq_q": 1, "seq_k": 1, "data": "?"}', "base 64"),
        ('{"kind": "Explicit", "seq_q": 1, "seq_k": 2, "data": "eJxjAAAAAQAB"}', "does not hold"),
        ('{"kind": "Repeated", "of": {"kind": "All"}, "times": true}', "times = True"),
        (
            '{"kind": "Random", "count": 1, "but": {"kind": "PerHead", "of": [{"kind": "All"}, {"kind": "Empty"}]}}',
            "but",
        ),
    ],
)
def test_what_is_no_pattern(text: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        from_json(text)


@pytest.mark.parametrize(
    "pattern, words",
    [
        (Window(2, 0) & Causal(), "window of 2 left, 0 right and causal"),
        (Strided(8) | Window(-1, 3, 2), "every 8 tokens from the query or window of all left, 3 right, every 2 tokens"),
        (Global(Tokens(first=1, last=2)), "global tokens the first, the last 2"),
        (Columns(Tokens(at=(1, 2, 3, 9))), "columns of tokens at 1 to 3, 9"),
        (Chunked(8, 1), "chunks of 8, the own and 1 before"),
        (Chunked(8), "chunks of 8"),
        (Blocked(64, Window(1, 1) | Global(1)) + Causal() * 2, "(blocks of 64: (window of 1 left, 1 right or global tokens the first)) plus (2 times causal)"),  # noqa: E501
        (PerHead((Causal(), ~Causal())), "head 0: causal; head 1: not causal"),
    ],
)  # fmt: skip
def test_words(pattern: Pattern, words: str) -> None:
    # Also where a terminal shows no more than ASCII.
    assert pattern.describe() == str(pattern) == words and words.isascii()


@pytest.mark.parametrize(
    "pattern, thresholds",
    [
        (Window(4, 0), (1, 5)),
        (Window(4, 2, 3), (3, 7, 13)),
        (All(), ()),
        (Window(8, -1) | Global(3), (3, 9)),
        (Chunked(16, 1), (16, 32)),
        (Blocked(8, Global(Tokens(first=1, last=1)) | Window(1, 1)), (8, 16)),
        (Shifted(5, Window(1, 1)), (5, 7)),
        # What changes the short pattern beyond the limit, or the long one below it, nobody sees.
        (UpTo(9, Window(4, 20), Window(7, 10)), (5, 9, 11)),
    ],
)
def test_thresholds(pattern: Pattern, thresholds: tuple[int, ...]) -> None:
    assert pattern.thresholds == thresholds


def test_texts_up_to_the_first_window_threshold_are_dense() -> None:
    window = Window(4, 6)
    assert window.dense(Lengths.of(5)).all() and not window.dense(Lengths.of(6)).all()


def test_lengths_are_checked() -> None:
    with pytest.raises(InvalidRequest, match="seq_q = -1"):
        Lengths(-1, 3)


def test_importing_patterns_imports_no_framework() -> None:
    code = "import sys, longspan.exporter.patterns; print({'torch', 'onnx', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
