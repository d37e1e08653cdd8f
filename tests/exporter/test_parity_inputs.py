"""Cases and inputs of the checker."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from longspan.exporter.bundle import Bundle
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.manifest import InputRecord, Manifest
from longspan.exporter.parity.cases import LONGEST, mask_kinds, single_shape, sweep, sweep_lengths
from longspan.exporter.parity.inputs import (
    GLOBALS,
    PADDINGS,
    draw_inputs,
    load_feeds,
    save_feeds,
)
from longspan.exporter.shapes import parse_shapes, sizes_of
from longspan.exporter.sites.record import AttentionSite

INPUTS = (
    InputRecord("input_ids", "int64", ("batch", "sequence"), "tokens", 3, 99),
    InputRecord("attention_mask", "int64", ("batch", "sequence"), "padding_mask"),
    InputRecord("global_attention_mask", "int64", ("batch", "sequence"), "global_mask"),
    InputRecord("scores", "float32", ("batch", "sequence", 4), "data"),
)


def site(left: int, right: int, dilation: int = 1, causal: int = 0) -> AttentionSite:
    attributes = {
        "left_window_size": left,
        "right_window_size": right,
        "dilation": [dilation],
        "is_causal": causal,
    }
    return AttentionSite("node", "layer", "SlidingWindowAttention", ("Q", "K", "V"), attributes, "test")


@pytest.mark.parametrize(
    ("given", "edge", "band"),
    [
        (site(8, 8), 9, 17),
        (site(15, 0), 16, 16),
        (site(15, -1, causal=1), 16, 16),  # nothing lies to the right of a causal query
        (site(4, 4, dilation=3), 13, 25),
    ],
)
def test_lengths_stand_around_every_place_where_a_window_changes_its_behaviour(
    given: AttentionSite, edge: int, band: int
) -> None:
    lengths = sweep_lengths([given], accepted=500)
    assert {1, edge, edge + 1, band - 1, band, band + 1, 2 * band + 1, 500} <= set(lengths)
    # Beyond the window, and a multiple of no block.
    assert any(n >= 3 * band and all(n % d for d in range(2, n)) for n in lengths)


def test_every_window_of_a_model_counts() -> None:
    assert {5, 6, 33, 34} <= set(sweep_lengths([site(4, 4), site(32, 32)], accepted=256))


def test_lengths_stop_where_the_model_or_the_user_does() -> None:
    assert max(sweep_lengths([site(8, 8)], accepted=20)) == 20
    assert max(sweep_lengths([site(8, 8)], accepted=100_000)) == LONGEST
    assert max(sweep_lengths([site(8, 8)], accepted=100_000, cap=50_000)) == 50_000
    # A model without limit is checked at a length that its widest window does not hold.
    assert max(sweep_lengths([site(5000, 5000)], accepted=None, cap=10**6)) > 2 * 10_001
    with pytest.raises(InvalidRequest, match="--max-length 0"):
        sweep_lengths([site(8, 8)], accepted=20, cap=0)


def test_first_tokens_that_are_always_global_move_the_edge() -> None:
    assert {11, 12} <= set(sweep_lengths([site(8, 8)], accepted=500, always_global=2))


def test_unbounded_windows_add_no_length() -> None:
    assert sweep_lengths([site(-1, -1)], accepted=64) == (1, 64)


@pytest.fixture(scope="module")
def manifest(longformer_bundle: Path) -> Manifest:
    return Bundle.open(longformer_bundle).manifest


def test_the_sweep_is_small_and_meets_every_length_and_every_pair(manifest: Manifest) -> None:
    lengths = sweep_lengths(manifest.sites, manifest.max_length)
    cases = sweep(manifest, lengths)
    assert len(cases) <= len(lengths) + 7
    # A row without padding at every length: padding would hide the one pair that tells a window from its neighbours.
    whole = [case for case in cases if case.padding == "none" or (case.padding != "mixed" and case.batch > 1)]
    assert {case.length for case in whole} == {case.length for case in cases} == set(lengths)
    # A global token would hide it, too.
    assert {5, 6, 9, 10} <= {case.length for case in whole if case.global_tokens == "none"}
    for first, second in itertools.combinations(("batch", "padding", "global_tokens"), 2):
        values = {"batch": (1, 3), "padding": PADDINGS, "global_tokens": GLOBALS}
        seen = {(getattr(case, first), getattr(case, second)) for case in cases}
        assert seen == set(itertools.product(values[first], values[second]))
    longest = [case for case in cases if case.length == lengths[-1]]
    assert [case.batch for case in longest] == [1]


def test_two_lengths_are_enough_for_every_pair(manifest: Manifest) -> None:
    cases = sweep(manifest, (20, 40))
    assert {(case.padding, case.global_tokens) for case in cases} == set(itertools.product(PADDINGS, GLOBALS))


def test_one_length_is_checked_with_every_kind_of_mask(manifest: Manifest) -> None:
    cases = sweep(manifest, (40,))
    assert {case.padding for case in cases} == set(PADDINGS)
    assert {case.length for case in cases} == {40}
    assert {case.padding for case in single_shape(manifest, 1, 16)} == set(PADDINGS)


def test_a_model_without_masks_is_checked_without(manifest: Manifest) -> None:
    import dataclasses

    bare = dataclasses.replace(manifest, inputs=INPUTS[:1])
    assert mask_kinds(bare) == (("none",), ("none",))
    assert {case.batch for case in sweep(bare, (1, 5, 9))} == {1, 3}


@pytest.mark.parametrize("length", [0, 257])
def test_lengths_that_the_model_does_not_accept(manifest: Manifest, length: int) -> None:
    with pytest.raises(InvalidRequest, match=f"--lengths {length}"):
        sweep(manifest, (length,))


def test_drawing_is_deterministic_and_in_range() -> None:
    feed = draw_inputs(INPUTS, 3, 50, padding="right", global_tokens="several", seed=5)
    again = draw_inputs(INPUTS, 3, 50, padding="right", global_tokens="several", seed=5)
    other = draw_inputs(INPUTS, 3, 50, padding="right", global_tokens="several", seed=6)
    assert list(feed) == [record.name for record in INPUTS]
    assert all(np.array_equal(feed[name], again[name]) for name in feed)
    assert not np.array_equal(feed["input_ids"], other["input_ids"])
    assert feed["input_ids"].min() >= 3 and feed["input_ids"].max() <= 99
    assert feed["scores"].shape == (3, 50, 4) and feed["scores"].dtype == np.float32


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 7, 64])
@pytest.mark.parametrize("padding", PADDINGS)
def test_padding(padding: str, length: int, batch: int) -> None:
    mask = draw_inputs(INPUTS, batch, length, padding=padding)["attention_mask"]
    counts = mask.sum(axis=1)
    if padding == "none":
        assert counts.min() == length
        return
    empty_last = padding == "mixed" and batch > 1
    assert (counts[:-1] if empty_last else counts).min(initial=length) >= 1
    assert counts[-1] == 0 or not empty_last
    if length < 7:
        return
    steps = np.diff(mask, axis=1)
    if padding == "right":
        assert (steps <= 0).all() and counts[-1] < length
    elif padding == "left":
        assert (steps >= 0).all() and counts[-1] < length
    else:
        assert (steps[0] > 0).any() and (steps[0] < 0).any()
    if batch == 3 and length == 64 and padding != "mixed":
        assert len(set(counts)) == 3


def test_global_tokens_differ_per_row() -> None:
    none, first, several = (draw_inputs(INPUTS, 3, 64, global_tokens=kind)["global_attention_mask"] for kind in GLOBALS)
    assert not none.any()
    assert first[:, 0].all() and first.sum() == 3
    assert list(several.sum(axis=1)) == [2, 3, 4]
    assert draw_inputs(INPUTS, 3, 1, global_tokens="several")["global_attention_mask"].sum() == 3


def test_a_dimension_without_a_size_is_an_error() -> None:
    inputs = (InputRecord("memory", "float32", ("batch", "frames"), "data"),)
    with pytest.raises(InvalidRequest, match="frames"):
        draw_inputs(inputs, 1, 4)
    assert draw_inputs(inputs, 1, 4, sizes={"frames": 9})["memory"].shape == (1, 9)


def test_shapes_in_polygraphys_syntax() -> None:
    shapes = parse_shapes(["input_ids:[2,128]", "scores:[2, 128, 4]"], INPUTS)
    assert shapes == {"input_ids": (2, 128), "scores": (2, 128, 4)}
    assert sizes_of(shapes, INPUTS) == {"batch": 2, "sequence": 128}


@pytest.mark.parametrize("text", ["input_ids", "input_ids:[]", "input_ids:[2,x]", "input_ids:[2]", "other:[1,2]",
                                  "input_ids:[0,4]", "scores:[1,2,5]"])  # fmt: skip
def test_shapes_that_do_not_fit(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--input-shapes"):
        parse_shapes([text], INPUTS)


def test_shapes_that_contradict_each_other() -> None:
    with pytest.raises(InvalidRequest, match="sequence"):
        sizes_of({"input_ids": (1, 8), "attention_mask": (1, 9)}, INPUTS)


def test_inputs_travel_through_polygraphys_format(tmp_path: Path) -> None:
    from polygraphy.json import load_json

    feeds = [draw_inputs(INPUTS, 2, length, padding="left") for length in (3, 8)]
    save_feeds(feeds, tmp_path / "inputs.json")
    # What `polygraphy run --load-inputs` reads: a list of dictionaries of arrays.
    as_polygraphy = load_json(str(tmp_path / "inputs.json"))
    ours = load_feeds(tmp_path / "inputs.json", INPUTS)
    for feed, theirs, back in zip(feeds, as_polygraphy, ours, strict=True):
        for name, value in feed.items():
            np.testing.assert_array_equal(theirs[name], value)
            np.testing.assert_array_equal(back[name], value)
            assert back[name].dtype == value.dtype


def test_loaded_inputs_that_do_not_fit(tmp_path: Path) -> None:
    feed = draw_inputs(INPUTS, 2, 8)
    file = tmp_path / "inputs.json"
    with pytest.raises(InvalidRequest, match="no such file"):
        load_feeds(file, INPUTS)
    for broken, message in (
        ([], "empty"),
        ([{"input_ids": feed["input_ids"]}], "lacks attention_mask"),
        ([feed | {"input_ids": feed["input_ids"].astype(np.int32)}], "int32"),
        ([feed | {"input_ids": feed["input_ids"][:, :5]}], "sequence"),
    ):
        save_feeds(broken, file)
        with pytest.raises(InvalidRequest, match=message):
            load_feeds(file, INPUTS)
    file.write_text("not JSON")
    with pytest.raises(InvalidRequest, match="Polygraphy"):
        load_feeds(file, INPUTS)


def test_drawing_needs_no_torch() -> None:
    code = "import sys; import longspan.exporter.parity.inputs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
