"""Random lengths and patterns for property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
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
    Lengths,
    Not,
    Pattern,
    PerHead,
    Random,
    RandomBlocks,
    Repeated,
    Rows,
    Shifted,
    Spans,
    Strided,
    Tokens,
    UpTo,
    Window,
)

block_sizes = st.integers(1, 12) | st.sampled_from([16, 24, 64])
sides = st.integers(-1, 12)
small = st.integers(1, 9)


@st.composite
def any_lengths(draw: st.DrawFn) -> Lengths:
    """Below, at and above what the members can be told apart by; half of them those of self-attention."""
    seq_k = draw(st.integers(0, 80))
    if draw(st.booleans()):
        return Lengths.of(seq_k)
    return Lengths(draw(st.integers(0, 40)), seq_k, draw(st.integers(0, 20)))


@st.composite
def token_sets(draw: st.DrawFn) -> Tokens:
    period = draw(st.integers(0, 9))
    return Tokens(
        first=draw(st.integers(0, 5)),
        last=draw(st.integers(0, 5)),
        at=tuple(draw(st.lists(st.integers(0, 30), max_size=3))),
        period=period,
        residues=tuple(draw(st.lists(st.integers(0, period - 1), min_size=1, max_size=3))) if period else (),
    )


members: st.SearchStrategy[Pattern] = st.one_of(
    st.builds(Window, sides, sides, st.integers(1, 5)),
    st.sampled_from([Causal(), All(), Empty()]),
    st.builds(Rows, token_sets()),
    st.builds(Columns, token_sets()),
    st.builds(Global, token_sets(), st.booleans(), st.booleans()),
    st.builds(Chunked, small, st.integers(-1, 2), st.integers(-1, 2)),
    st.builds(Strided, small),
    small.flatmap(lambda stride: st.builds(Fixed, st.just(stride), st.integers(0, stride))),
    st.builds(Random, st.integers(0, 4), st.integers(0, 3), st.none() | st.builds(Window, sides, sides)),
    st.builds(RandomBlocks, small, st.integers(0, 3), st.integers(0, 3), st.none() | st.just(Window(1, 1))),
    st.builds(Spans, st.lists(st.floats(-3, 9), min_size=1, max_size=2).map(tuple), st.floats(0.5, 4)),
)


def combined(parts: st.SearchStrategy[Pattern]) -> st.SearchStrategy[Pattern]:
    return st.one_of(
        st.builds(lambda a, b: a | b, parts, parts),
        st.builds(lambda a, b: a & b, parts, parts),
        st.builds(lambda a, b: a + b, parts, parts),
        st.builds(Not, parts),
        st.builds(Repeated, parts, st.integers(0, 3)),
        st.builds(Blocked, small, parts),
        st.builds(Shifted, small, parts),
        st.builds(UpTo, st.integers(0, 60), parts, parts),
        st.builds(PerHead, st.lists(parts, min_size=1, max_size=2).map(tuple)),
    )


patterns: st.SearchStrategy[Pattern] = st.recursive(members, combined, max_leaves=5)


def explicit_for(lengths: Lengths) -> st.SearchStrategy[Pattern]:
    """Explicit patterns of some lengths, of all densities."""
    shape = (lengths.offset + lengths.seq_q, lengths.seq_k)

    def drawn(seed: int, largest: int) -> Pattern:
        return Explicit.of(np.random.default_rng(seed).integers(0, largest + 1, shape))

    return st.builds(drawn, st.integers(0, 100), st.integers(0, 2))
