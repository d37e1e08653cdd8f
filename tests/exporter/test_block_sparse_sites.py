"""Sites of block lists: words, lengths to check, lowering; costs and pictures that are read from the graph."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from longspan.cli.main import run
from longspan.exporter import SourceRequest, check, export, inspect
from longspan.exporter.bundle import MODEL_FILE, Bundle
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.inspection import Inspection, SiteReport, _checked
from longspan.exporter.lowering import lower
from longspan.exporter.masks import Scale
from longspan.exporter.parity.cases import sweep_lengths
from longspan.exporter.parity.junit import to_junit
from longspan.exporter.parity.report import CheckReport
from longspan.exporter.patterns import (
    Causal,
    Chunked,
    Explicit,
    Lengths,
    Pattern,
    PerHead,
    Window,
    build_lists,
    to_json,
)
from longspan.exporter.pictures import panels
from longspan.exporter.reports.check_page import check_page
from longspan.exporter.sites.graph import SiteGraph, Sizes
from longspan.exporter.sites.groups import in_words
from longspan.exporter.sites.kind import PARTLY, SEEN, UNSEEN, Unknown
from longspan.exporter.sites.listed_blocks import ListedBlocks
from longspan.exporter.sites.record import AttentionSite
from longspan.exporter.throughput.roofline import AttentionWork

from .block_sparse_models import BLOCK, PATTERN, write_factory

pytestmark = pytest.mark.usefixtures("one_thread")

LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


def site(pattern: Pattern | None = None, *more: str, lists: str = "computed", **attributes: Any) -> AttentionSite:
    inputs = ("Q", "K", "V", *LISTS, *more)
    record = "" if pattern is None else to_json(pattern)
    return AttentionSite("node", "layer.0", "BlockSparseAttention", inputs, attributes, "family x", (), record, lists)


@pytest.fixture(scope="module")
def factory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_factory(tmp_path_factory.mktemp("factory"))


@pytest.fixture(scope="module")
def computed(factory: Path) -> Inspection:
    return inspect(f"{factory}:computed", length=100)


@pytest.fixture(scope="module")
def bundle(factory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(f"{factory}:computed", tmp_path_factory.mktemp("block sparse") / "bundle").path


@pytest.fixture(scope="module")
def report(bundle: Path, kernel_library: str) -> CheckReport:
    return check(bundle, max_length=80, sites=True, require_kernel=True)


def test_words() -> None:
    assert site(q_block_size=64, kv_block_size=32).pattern == "blocks of 64 x 32, lists computed in the model"
    assert site(lists="fixed", is_causal=1).pattern == "blocks of 128 x 128, lists fixed in the model, causal"
    everything = site(None, "q_positions", "k_positions", lists="given", exclude_self=1)
    assert everything.pattern == (
        "blocks of 128 x 128, lists given to the model, without the query itself, at given positions"
    )
    assert (
        site(Window(3, 1), q_block_size=8, kv_block_size=8).pattern == "window of 3 left, 1 right, in blocks of 8 x 8"
    )
    assert site(is_causal=1, kv_block_size=64).short_pattern == ("causal block sparse", "128x64")
    assert site().reach == -1


def test_a_record_that_cannot_be_read_is_none() -> None:
    unknown = dataclasses.replace(site(), pattern_json='{"kind": "of a later version"}')
    assert unknown.recorded is None and "lists computed" in unknown.pattern


def test_lengths_stand_around_the_blocks_and_the_thresholds_of_the_pattern() -> None:
    blind = site(q_block_size=16, kv_block_size=64).sweep()
    assert {15, 16, 17, 63, 64, 65, 512, 1024, 1025} <= blind.lengths and not blind.edges
    # A window of 100 keys on the left: 101 tokens still see everything.
    known = site(Window(100, 0), q_block_size=64, kv_block_size=64).sweep()
    assert {63, 64, 65, 101, 102, 127, 128, 129, 256} <= known.lengths and known.edges == {1, 2, 101, 102}
    for lengths in (blind.lengths, known.lengths):
        assert any(length % 16 for length in lengths if length > 200)
    assert sweep_lengths([site(Window(100, 0), q_block_size=64, kv_block_size=64)], 110) == (
        1, 2, 63, 64, 65, 101, 102, 110,
    )  # fmt: skip


def test_a_pattern_of_many_thresholds_is_met_at_some() -> None:
    many = PerHead(tuple(Window(10 * side, 0) for side in range(1, 40)))
    edges = site(many, q_block_size=8, kv_block_size=8).sweep().edges
    assert len(edges) == 16 and {1, 391} <= edges


@pytest.mark.parametrize(
    ("more", "attributes", "standard", "contrib"),
    [
        ((), {}, "S x S mask only", "causal only"),
        (("sinks",), {"is_causal": 1}, "no sinks", "SparseAttention has no sinks"),
        (("block_mask_ids", "block_masks"), {"is_causal": 1}, "S x S mask only", "no masks inside blocks"),
        (("block_mask_ids", "block_masks"), {}, "S x S mask only", "no masks inside blocks"),
        (
            (),
            {"is_causal": 1, "softcap": 2.0, "exclude_self": 1},
            "S x S",
            "way to leave out the query itself, softcap",
        ),
        ((), {"is_causal": 1}, "S x S mask only", "wants a cache"),
    ],
)
def test_every_rung_above_is_refused_with_its_reason(
    more: tuple[str, ...], attributes: dict[str, Any], standard: str, contrib: str
) -> None:
    first, second, kernel, body = lower(site(None, *more, **attributes)).ladder
    assert standard in first.reason and contrib in second.reason
    assert not first.chosen and not second.chosen and kernel.chosen and body.chosen


def test_costs_are_those_of_the_lists_that_the_graph_computes(computed: Inspection) -> None:
    counts = PATTERN.dense(Lengths.of(100))[0]
    for one in computed.sites:
        assert one.site.lists == "computed" and one.site.pattern_json == to_json(PATTERN)
        assert (one.heads, one.kv_heads, one.head_size, one.v_head_size) == (2, 2, 16, 16)
        assert one.density == pytest.approx(counts.sum() / 100**2) and one.length == 100 and one.notes == ()
        # 13 rows of blocks, the last with 4 queries and its own block with 4 keys: 1, 2, 3, 3 … blocks each.
        listed = 8 * 8 * (1 + 2 + 10 * 3) + 4 * (8 + 8 + 4)
        assert one.flops == 2 * listed * 2 * (16 + 16) and one.dense_flops == 2 * 100**2 * 2 * (16 + 16)
        assert one.saved == pytest.approx(1 - listed / 100**2)


def test_a_bundle_says_what_its_model_did(bundle: Path, computed: Inspection) -> None:
    again = inspect(bundle, length=100)
    assert again.sites == computed.sites
    data = json.loads(again.to_json())
    assert "graph" not in data and data["sites"][0]["pattern"].endswith("in blocks of 8 x 8")
    assert data["sites"][0]["site"]["lists"] == "computed"


def test_pictures_are_drawn_from_the_lists_to_scale(computed: Inspection) -> None:
    first = computed.sites[0].site
    (cells,) = first.kind.picture(first, computed.graph, Scale(32, 8), 0)
    lists = np.tri(32, dtype=bool) & ~np.tri(32, k=-2, dtype=bool)
    lists[:, 0] = True
    wanted = np.where(lists, SEEN, UNSEEN)
    # The own block is cut by the diagonal.
    np.fill_diagonal(wanted, PARTLY)
    np.testing.assert_array_equal(cells, wanted)
    drawn, scale = panels(computed, 32)
    assert [panel.title for panel in drawn] == ["first", "second"]
    # The thresholds of the pattern are one block and two: four times as many tokens show it all.
    assert scale.length == 8 * BLOCK
    seen = PATTERN.dense(Lengths.of(scale.length))[0].reshape(32, 2, 32, 2).sum((1, 3))
    np.testing.assert_array_equal(drawn[0].cells, np.where(seen == 4, SEEN, np.where(seen > 0, PARTLY, UNSEEN)))


def test_heads_of_their_own_are_drawn_and_named_one_by_one() -> None:
    class Lists(SiteGraph):
        def __init__(self) -> None:
            pass

        def listed(self, site: AttentionSite, length: int) -> ListedBlocks:
            return ListedBlocks.of_pattern(build_lists(pattern, Lengths.of(length), 8, 8, heads=4))

    pattern = PerHead((Window(8, 0), Window(16, 0)))
    two = site(pattern, q_block_size=8, kv_block_size=8)
    report = SiteReport(two, 4, 4, 8, 8, 0.1, 1, 10, 0.9, 100)
    drawn, scale = panels(Inspection("x", "model", "M", False, 100, None, 0, "", (report,), (), graph=Lists()), 24)
    assert [(panel.title, panel.pattern) for panel in drawn] == [
        ("layer 0, heads 0,2", "window of 8 left, 0 right, in blocks of 8 x 8"),
        ("layer 0, heads 1,3", "window of 16 left, 0 right, in blocks of 8 x 8"),
    ]
    assert scale.unit == 2 and (drawn[0].cells[20] != UNSEEN).sum() == 5 and (drawn[1].cells[20] != UNSEEN).sum() == 9


def test_lists_that_are_fixed_are_counted_for_their_own_length(factory: Path) -> None:
    found = inspect(f"{factory}:fixed", length=1000)
    for one in found.sites:
        assert one.site.lists == "fixed" and one.length == 32
        assert one.density == pytest.approx(PATTERN.dense(Lengths.of(32)).sum() / 32**2)
        assert one.notes == ("its lists are fixed for 32 tokens; what is said of it is for those, not for 1,000",)
    graph, first = found.graph, found.sites[0].site
    assert graph is not None
    fits = first.kind.work(first, graph, 30, 0)
    assert (fits.length, fits.notes, fits.terms) == (30, (), 2 * PATTERN.dense(Lengths.of(30)).sum())


def test_lists_that_the_text_decides_on_are_those_of_a_drawn_text(factory: Path) -> None:
    """Those of the second layer come after the attention of the first, which therefore runs as well."""
    found = inspect(f"{factory}:routed", length=64)
    assert [one.site.lists for one in found.sites] == ["computed", "computed"]
    for one in found.sites:
        # Eight rows of two blocks each, but one whose own block is the best.
        assert one.density == pytest.approx(15 / 64) and one.saved == pytest.approx(49 / 64)
    drawn = [one.site.kind.picture(one.site, found.graph, Scale(8, 8), 0)[0] for one in found.sites]
    for cells in drawn:
        assert (cells == SEEN).sum() == 15 and (np.diag(cells) == SEEN).all()
        assert ((cells == SEEN).sum(0) == 8).sum() == 1


def test_lists_that_are_not_the_pattern_recorded_are_found_out(computed: Inspection) -> None:
    graph, right = computed.graph, computed.sites[0].site
    assert graph is not None
    wrong = dataclasses.replace(right, pattern_json=to_json(Chunked(BLOCK)))
    (note,) = wrong.kind.work(wrong, graph, 40, 0).notes
    assert "not the pattern that is recorded (chunks of 8)" in note
    assert "query 8, key 0: counted 1 times by the lists, 0 by the pattern" in note
    # What the node forbids by itself is not held against the record.
    bidirectional = dataclasses.replace(right, pattern_json=to_json(PATTERN.parts[0]))
    assert bidirectional.kind.work(bidirectional, graph, 40, 0).notes == ()
    of_another_length = dataclasses.replace(right, pattern_json=to_json(Explicit.of(np.ones((9, 9), bool))))
    (note,) = of_another_length.kind.work(of_another_length, graph, 40, 0).notes
    assert "the pattern cannot be asked" in note
    with pytest.raises(Unknown, match="cannot be drawn"):
        of_another_length.kind.picture(of_another_length, None, Scale(16, 8), 0)


def test_lists_that_cannot_be_computed_are_unknown_and_the_rest_is_told(
    factory: Path, bundle: Path, copied: Callable[[Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx
    from longspan.exporter.manifest import sha256_of
    from longspan.exporter.whole_folders import MANIFEST_FILE

    broken = copied(bundle)
    model = onnx.load(broken / MODEL_FILE)
    for node in model.graph.node:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            array = onnx.numpy_helper.to_array(attribute.t)
            if array.dtype == np.int32 and (array == 3).any():
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(np.where(array == 3, 9, array).astype(np.int32)))
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        if array.dtype == np.int32 and (array == 3).any():
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.where(array == 3, 9, array).astype(np.int32), tensor.name))
    onnx.save(model, broken / MODEL_FILE)
    data = json.loads((broken / MANIFEST_FILE).read_text())
    data["files"][MODEL_FILE] = sha256_of(broken / MODEL_FILE)
    (broken / MANIFEST_FILE).write_text(json.dumps(data))
    found = inspect(broken, length=40)
    assert found.sites[0].density is None and found.sites[0].flops is None
    assert "its lists for 40 tokens are wrong: full_kv_num_blocks[batch 0, head 0, row 3]" in found.sites[0].notes[0]
    assert run(["inspect", str(broken), "--length", "40"]) == 0
    out = capsys.readouterr().out
    assert " ? " in out and "note: first, second: its lists for 40 tokens are wrong" in out
    with pytest.raises(InvalidRequest, match="nothing can be drawn"):
        panels(found, 16)


def test_the_check_sweeps_around_blocks_and_sees_the_kernel_at_each_site(report: CheckReport) -> None:
    assert report.passed, report.failures
    lengths = {case.case.length for case in report.cases}
    assert {1, 7, 8, 9, 16, 25} <= lengths and any(length % BLOCK for length in lengths if length > 40)
    kernel, body = report.paths
    assert set(kernel.sites.values()) == {"kernel"} and set(body.sites.values()) == {"function body"}
    assert len(kernel.sites) == len(body.sites) == 2
    assert report.site_comparison is not None and len(report.site_comparison.outputs) == 2


def test_a_model_of_one_length_is_inspected_at_that() -> None:
    assert [_checked(length, 2048, 192) for length in (None, 192)] == [192, 192]
    with pytest.raises(InvalidRequest, match="--length 100: the model is made for 192 tokens only"):
        _checked(100, 2048, 192)


def test_junit_names_the_operator_and_its_pattern(report: CheckReport) -> None:
    text = to_junit(report)
    assert 'name="attention" value="2 x BlockSparseAttention (' in text and 'failures="0"' in text
    for path in ("kernel", "function body"):
        assert f'classname="{path}" name="ran at every site"' in text


def test_the_page_draws_what_was_recorded(report: CheckReport) -> None:
    page = check_page(report)
    assert page.count('class="mask"') == 1 and "</span>seen" in page and "in blocks of 8 x 8" in page
    blind = dataclasses.replace(
        report, sites=tuple(dataclasses.replace(each, pattern_json="") for each in report.sites)
    )
    page = check_page(blind)
    assert 'class="mask"' not in page and "No picture: lists computed in the model" in page


def test_a_list_that_is_off_by_one_block_fails(bundle: Path, copied: Callable[[Path], Path], tmp_path: Path) -> None:
    """The model is another one than the bundle was made from: its first rows list a block less."""
    source = Bundle.open(bundle).manifest.source
    file = Path(source.location.rpartition(":")[0])
    changed = copied(bundle)
    text = file.read_text()
    try:
        file.write_text(text.replace("row + 1, max=3", "row + 1, max=2"))
        other = export(SourceRequest(source.location), tmp_path / "other").path
    finally:
        file.write_text(text)
    (changed / MODEL_FILE).write_bytes((other / MODEL_FILE).read_bytes())
    from .test_parity import fix_hash

    failing = check(fix_hash(changed), max_length=40)
    wrong = {case.case.length for case in failing.cases if case.failures()}
    # Two rows of blocks list what they should; the third is the first to miss its own block.
    assert wrong == {case.case.length for case in failing.cases if case.case.length > 2 * BLOCK}


def test_bench_counts_the_blocks_at_each_length(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    work = AttentionWork(opened)
    assert work.flops(1, 32) == 2 * (1 + 2 + 3 + 3) * 64 * 2 * 2 * 32
    assert work.flops(3, 64) == 3 * 2 * (1 + 2 + 6 * 3) * 64 * 2 * 2 * 32
    assert in_words(opened.manifest.sites).startswith("2 x BlockSparseAttention (")


class Chunks(SiteGraph):
    """A graph whose site sees chunks of the text as rows of a larger batch, as Llama 4's does, or the text itself."""

    def __init__(self, rows: int | None) -> None:
        self._rows = rows

    def sizes(self, site: AttentionSite) -> Sizes:
        return Sizes(4, 2, 8, 8)

    def rows(self, site: AttentionSite, length: int) -> int | None:
        return self._rows


def test_windows_in_chunks_are_counted_and_drawn_by_what_was_recorded() -> None:
    pattern = Chunked(8) & Causal()
    attributes = {"left_window_size": 7, "right_window_size": 0, "is_causal": 1}
    chunks = AttentionSite(
        "node", "layer.0", "SlidingWindowAttention", ("Q", "K", "V"), attributes, "family x", (), to_json(pattern)
    )
    counts = pattern.dense(Lengths.of(100))[0]
    work = chunks.kind.work(chunks, Chunks(None), 100, 0)
    assert (work.terms, work.computed, work.notes) == (4 * counts.sum(), 4 * counts.sum(), ())
    (picture,) = chunks.kind.picture(chunks, Chunks(None), Scale(24, 1), 0)
    np.testing.assert_array_equal(picture == SEEN, pattern.dense(Lengths.of(24))[0] > 0)
    # On the text itself the band is what is computed, and the record is wrong.
    work = chunks.kind.work(chunks, Chunks(100), 100, 0)
    band = 100 * 8 - 7 * 8 // 2
    assert work.terms == 4 * band
    assert work.notes == (f"its band counts {4 * band:,} pairs, the pattern recorded {4 * counts.sum():,}",)
    right = dataclasses.replace(chunks, pattern_json=to_json(Window(7, 0)))
    assert right.kind.work(right, Chunks(100), 100, 0).notes == ()
