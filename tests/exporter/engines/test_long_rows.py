"""Which rows of blocks a body computes apart, and what the graph must say for that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from longspan.exporter.engines import BuildRequest
from longspan.exporter.engines.graphs.body_graph import body_graph
from longspan.exporter.engines.graphs.long_rows import RowWidths, choose, find_long_rows
from longspan.exporter.engines.graphs.prepare import prepare
from longspan.exporter.patterns import Blocked, Global, Lengths, Pattern, Random, UpTo, Window, build_lists, to_json
from longspan.exporter.patterns.systems import big_bird, longformer, sparse_transformer_strided
from longspan.plugins.block_sparse_attention.long_rows import LongRows
from longspan.plugins.torch_support import PATTERN

from .prepared_graphs import PADDINGS, feed_of, graph_of, run
from .rtx import rtx
from .test_rtx_builds import shapes_of, unexpected

pytestmark = pytest.mark.usefixtures("one_thread")

ROUNDING = 32 * float(np.finfo(np.float32).eps)
LONGEST = 160
BIG_BIRD = LongRows(1, 1, 6, up_to=7, known_to=40)
"""Of the small model: blocks 0 (twice), before, own, after and last; texts of up to seven blocks see all."""


def site_names(graph: ir.Model) -> list[str]:
    return [node.name or "" for node in graph.graph if node.domain == "longspan"]


def test_bigbird_computes_its_first_and_last_row_apart() -> None:
    graph = graph_of("bigbird")
    assert find_long_rows(graph, {"sequence": LONGEST}) == dict.fromkeys(site_names(graph), BIG_BIRD)
    prepared = prepare(graph, BuildRequest("tensorrt-rtx"), (), longest={"sequence": LONGEST})
    for site in prepared.sites:
        assert site.ladder[-1].reason == (
            "standard ONNX, which the runtime compiles as any other part of the network; at most 6 blocks in a row, "
            "the first 1 and the last 1 rows of blocks apart, texts of 7 rows or fewer as wide as their lists"
        )


@pytest.mark.parametrize("batch", [2, 3])
def test_it_computes_what_the_bundle_does_at_every_length(batch: int) -> None:
    graph = graph_of("bigbird")
    body = body_graph(graph, long_rows=dict.fromkeys(site_names(graph), BIG_BIRD))
    onnx.checker.check_model(ir.to_proto(body), full_check=True)
    lengths = [*range(1, 45), 63, 64, 65, 101, LONGEST]
    feeds = [feed_of(graph, length, PADDINGS[k % len(PADDINGS)]) for k, length in enumerate(lengths)]
    feeds = [{name: np.resize(array, (batch, array.shape[1])) for name, array in feed.items()} for feed in feeds]
    for length, mine, right in zip(lengths, run(body, feeds), run(graph, feeds), strict=True):
        assert np.isfinite(mine).all()
        assert float(np.abs(mine - right).max()) <= ROUNDING * float(np.abs(right).max()), length


def test_a_width_that_is_too_small_would_be_noticed() -> None:
    graph = graph_of("bigbird")
    body = body_graph(graph, long_rows=dict.fromkeys(site_names(graph), LongRows(1, 1, 5, up_to=7)))
    feeds = [feed_of(graph, length, "none") for length in (28, LONGEST)]
    short, long = (np.abs(a - b).max() for a, b in zip(run(body, feeds), run(graph, feeds), strict=True))
    assert short < 1e-4 and long > 1e-2


@pytest.mark.parametrize("capability", ["SM80", "SM89"])
def test_tensorrt_rtx_builds_it(capability: str, tmp_path: Path) -> None:
    graph = graph_of("bigbird")
    body = body_graph(graph, long_rows=dict.fromkeys(site_names(graph), BIG_BIRD))
    built = rtx(body, tmp_path, shapes_of(body, LONGEST), capability)
    assert built.parsed and built.bytes > 10_000, built.errors
    assert not built.errors and not unexpected(built)


GRAPH = """<ir_version: 10, opset_import: ["" : 20, "longspan" : 1]>
    graph (float[batch,2,sequence,8] q, float[batch,2,sequence,8] k, int64[batch,sequence] ids)
    => (float[batch,2,sequence,8] y) {{
        zero = Constant <value = int64 {{0}}> () one = Constant <value = int64 {{1}}> ()
        two = Constant <value = int64 {{2}}> () four = Constant <value = int64 {{4}}> ()
        shape = Shape (q) at = Constant <value = int64 {{2}}> () tokens = Gather (shape, at)
        three = Constant <value = int64 {{3}}> () more = Add (tokens, three) rows = Div (more, four)
        row = Range (zero, rows, one) column = Constant <value = int64[1] {{1}}> () down = Unsqueeze (row, column)
        is_first = Equal (row, zero) in_first = Equal (down, zero)
        {counts}
        is_slot_0 = Equal (row, zero) near = Where (is_slot_0, zero, down) slots = Where (in_first, row, near)
        lists = Constant <value = int64[2] {{0, 1}}> ()
        counts4 = Unsqueeze (counts, lists) full_count = Cast <to = 6> (counts4)
        slots4 = Unsqueeze (slots, lists) full = Cast <to = 6> (slots4)
        none = Sub (full_count, full_count)
        from = Constant <value = int64[1] {{0}}> () axis = Constant <value = int64[1] {{3}}> ()
        partial = Slice (full, from, from, axis)
        [site] y = longspan.BlockSparseAttention <q_block_size = 4, kv_block_size = 4>
            (q, k, k, none, partial, full_count, full)
    }}"""
TWO_PER_ROW = "counts = Where (is_first, rows, two)"
"""Row 0 lists every block, all others block 0 and their own."""

STAR: Pattern = Blocked(4, Window(0, 0) | Global(1))


def star(counts: str = TWO_PER_ROW, pattern: Pattern | None = STAR) -> ir.Model:
    """A graph of one site whose lists follow from the length."""
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(GRAPH.format(counts=counts)))
    model = ir.serde.deserialize_model(proto)
    (site,) = (node for node in model.graph if node.domain == "longspan")
    if pattern is not None:
        site.metadata_props[PATTERN] = to_json(pattern)
    return model


def test_lists_that_agree_with_the_pattern_are_believed() -> None:
    assert find_long_rows(star(), {"sequence": LONGEST}) == {"site": LongRows(1, 0, 2, known_to=40)}


SUM = """every = ReduceSum <keepdims = 0> (ids) nothing = Sub (every, every)
    shown = Add (rows, nothing) counts = Where (is_first, shown, two)"""
LONGER = """late = Constant <value = int64 {39}> () is_late = Equal (row, late)
    more_there = Where (is_late, three, two) counts = Where (is_first, rows, more_there)"""


@pytest.mark.parametrize(
    ("counts", "pattern", "longest"),
    [
        pytest.param(TWO_PER_ROW, None, LONGEST, id="no pattern"),
        pytest.param(TWO_PER_ROW, STAR, None, id="no longest text"),
        pytest.param(TWO_PER_ROW, Blocked(4, Window(0, 0)), LONGEST, id="another pattern"),
        pytest.param(TWO_PER_ROW, Blocked(4, Window(0, 0) | Global(2)), LONGEST, id="more long rows"),
        pytest.param(SUM, STAR, LONGEST, id="from what the text says"),
        pytest.param(LONGER, STAR, LONGEST, id="other lists in the longest text alone"),
        pytest.param(TWO_PER_ROW, STAR, 8, id="nothing gained"),
    ],
)
def test_other_sites_keep_the_width_of_their_lists(counts: str, pattern: Pattern | None, longest: int | None) -> None:
    assert find_long_rows(star(counts, pattern), {} if longest is None else {"sequence": longest}) == {}


def test_lists_that_the_model_is_given_are_not_believed() -> None:
    text = """<ir_version: 10, opset_import: ["" : 20, "longspan" : 1]>
        graph (float[b,2,s,8] q, int32[1,1,r] c, int32[1,1,r,w] i, int32[1,1,r] d, int32[1,1,r,x] j)
        => (float[b,2,s,8] y) {
            [site] y = longspan.BlockSparseAttention <q_block_size = 4, kv_block_size = 4> (q, q, q, c, i, d, j)
        }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    model.graph.node("site").metadata_props[PATTERN] = to_json(STAR)
    assert find_long_rows(model, {"s": LONGEST}) == {}


def test_lists_in_the_file_are_read() -> None:
    lists = build_lists(STAR, Lengths.of(LONGEST), 4, 4).inputs()
    text = """<ir_version: 10, opset_import: ["" : 20, "longspan" : 1]>
        graph (float[b,2,160,8] q, int32[1,1,r] c, int32[1,1,r,w] i, int32[1,1,r] d, int32[1,1,r,x] j)
        => (float[b,2,160,8] y) {
            [site] y = longspan.BlockSparseAttention <q_block_size = 4, kv_block_size = 4> (q, q, q, c, i, d, j)
        }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    site = model.graph.node("site")
    for number, (name, array) in enumerate(lists.items()):
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        model.graph.register_initializer(value)
        site.replace_input_with(3 + number, value)
    del model.graph.inputs[1:]
    assert find_long_rows(model, {}) == {"site": LongRows(1, 0, 2, known_to=40)}


def widths_of(pattern: Pattern, block: int, longest: int) -> dict[int, RowWidths]:
    widths = {}
    for length in range(block, longest + 1, block):
        lists = build_lists(pattern, Lengths.of(length), block, block)
        widths[length // block] = RowWidths.of(lists.kv_num_blocks, lists.full_kv_num_blocks)
    return widths


@pytest.mark.parametrize(
    ("pattern", "block", "chosen"),
    [
        (big_bird(16, 3), 16, LongRows(1, 1, 8, known_to=64)),
        (Blocked(16, UpTo(11, Window(-1, -1), Window(1, 1) | Global(2))), 16, LongRows(2, 0, 5, up_to=11, known_to=64)),
        (longformer(64, global_tokens=1), 16, LongRows(1, 0, 6, known_to=64)),
        (sparse_transformer_strided(16), 16, None),
        (Window(-1, -1), 16, None),
        (Window(16, 16), 16, None),
    ],
    ids=str,
)
def test_rows_are_chosen_by_what_is_left_to_compute(pattern: Pattern, block: int, chosen: LongRows | None) -> None:
    widths = widths_of(pattern, block, 1024)
    assert choose(widths) == chosen
    if chosen is None:
        return
    for rows, lists in widths.items():
        if rows > chosen.up_to:
            assert lists.rows[chosen.first : max(rows - chosen.last, chosen.first)].max(initial=0) <= chosen.width


def test_a_pattern_that_promises_nothing_is_asked_at_every_length_or_not_at_all() -> None:
    drawn = Blocked(4, Window(0, 0) | Global(1) | Random(1, 7))
    assert drawn.structure is None
    from longspan.exporter.engines.graphs.long_rows import _lengths

    asked = _lengths(drawn, 4, 4, LONGEST)
    assert asked is not None and {-(-length // 4) for length in asked} == set(range(1, LONGEST // 4 + 1))
    assert _lengths(drawn, 4, 4, 8192) is None
    few = _lengths(STAR, 4, 4, 65_536)
    assert few is not None and len(few) < 200 and few[-1] == 65_536
