"""The BigBird adapter against transformers' eager code, which gathers blocks of keys, pads, and adds -10000."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from longspan.exporter.conversion import UNCHANGED
from longspan.exporter.families import bigbird as adapter
from longspan.exporter.families import family_by_name, find_family
from longspan.exporter.patterns import Lengths, build_lists, from_json, systems
from longspan.exporter.sites.record import longspan_nodes
from longspan.exporter.sources import Source

from .family_checks import (
    TOLERANCE,
    double_of,
    error,
    export_graph,
    intercepted,
    load_steep,
    original,
    padded_feed,
    run_session,
    session_of,
    worst,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK, DRAWN = 8, 2
SHORT = (5 + 2 * DRAWN) * BLOCK
"""Longest text that gets full attention."""

_SHARED: dict[str, Any] = {
    "vocab_size": 100,
    "max_position_embeddings": 1024,
    "block_size": BLOCK,
    "num_random_blocks": DRAWN,
    "sep_token_id": 66,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bigbird": {
        **_SHARED,
        "architectures": ["BigBirdModel"],
        "model_type": "big_bird",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "bigbird-pegasus": {
        **_SHARED,
        "architectures": ["BigBirdPegasusForConditionalGeneration"],
        "model_type": "bigbird_pegasus",
        "d_model": 32,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    },
}
BY = family_by_name("bigbird")
# One block, and below, at and above the length where attention becomes sparse, on the block and off it.
LENGTHS = (1, 7, 8, 9, SHORT - 1, SHORT, SHORT + 1, SHORT + 7, SHORT + 8, SHORT + 9, 101, 128)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("bigbird")
    return {kind: load_steep(folder / kind, config, "query") for kind, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def doubles(sources: dict[str, Source]) -> dict[str, Any]:
    return {kind: double_of(source) for kind, source in sources.items()}


def test_every_layer_is_a_site_and_of_pegasus_the_encoder_is_loaded(sources: dict[str, Source]) -> None:
    for kind, source in sources.items():
        assert find_family(source.model, UNCHANGED) is BY and source.max_length == 1024, kind  # type: ignore[arg-type]
        assert len(BY.sites(source.model, UNCHANGED)) == 2  # type: ignore[arg-type]
    pegasus = sources["bigbird-pegasus"]
    assert pegasus.record.encoder_of == "BigBirdPegasusForConditionalGeneration"
    assert type(pegasus.model).__name__ == "BigBirdPegasusEncoder"


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_matches_eager_at_every_length(doubles: dict[str, Any], kind: str, padding: str) -> None:
    for length in LENGTHS:
        for batch in (1, 3):
            assert error(doubles[kind], BY, padded_feed(batch, length, padding)) < TOLERANCE, (length, batch)


def test_matches_eager_where_it_plans_its_blocks_differently(doubles: dict[str, Any]) -> None:
    # At 1024, 3072 and 4096 tokens the eager code takes another way to the same zeros.
    assert error(doubles["bigbird"], BY, padded_feed(1, 1024, "right")) < TOLERANCE


@pytest.mark.parametrize("drawn", [1, 3])  # with 0 the eager code fails on an empty view
def test_matches_eager_with_other_numbers_of_random_blocks(drawn: int, tmp_path: Path) -> None:
    model = double_of(load_steep(tmp_path, CONFIGS["bigbird"], "query", num_random_blocks=drawn))
    short = (5 + 2 * drawn) * BLOCK
    for length in (short, short + 1, short + BLOCK, short + 3 * BLOCK + 5):
        assert error(model, BY, padded_feed(2, length, "right")) < TOLERANCE, length


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_rows_of_padding_are_those_of_the_eager_code(doubles: dict[str, Any], kind: str, padding: str) -> None:
    for length in (SHORT - 3, SHORT + 1, 101):
        feed = padded_feed(3, length, padding)
        ours, theirs = intercepted(doubles[kind], feed, BY), original(doubles[kind], feed, BY)
        assert worst(ours, theirs, torch.ones_like(feed["attention_mask"])) < TOLERANCE, length


def test_the_pooled_output_is_that_of_a_padded_first_token_too(doubles: dict[str, Any]) -> None:
    model, feed = doubles["bigbird"], padded_feed(2, 101, "left")
    with torch.no_grad():
        with BY.original(model):
            theirs = model(**feed).pooler_output
        with BY.intercept(model, UNCHANGED):
            ours = model(**feed).pooler_output
    assert float((ours - theirs).abs().max()) < TOLERANCE


def changed(change: Callable[..., None]) -> Callable[..., Any]:
    """`block_lists` with `change` made to its counts (rows,) and blocks (rows, slots) in place."""
    lists = adapter.block_lists

    def mutant(length: int, block: int, drawn: int, device: Any = None) -> Any:
        none, nothing, counts, indices = (tensor.clone() for tensor in lists(length, block, drawn, device))
        change(counts[0, 0], indices[0, 0])
        return none, nothing, counts, indices

    return mutant


def without(slot: int) -> Callable[..., Any]:
    """Rows between the first and the last lack what they list in this slot."""

    def change(counts: torch.Tensor, indices: torch.Tensor) -> None:
        for row in range(1, len(counts) - 1):
            kept = indices[row, : counts[row]].tolist()
            del kept[slot]
            counts[row] -= 1
            indices[row, : len(kept)] = torch.tensor(kept, dtype=torch.int32)

    return changed(change)


def once_more(counts: torch.Tensor, indices: torch.Tensor) -> None:
    """Rows between the first and the last count block 0 once more."""
    for row in range(1, len(counts) - 1):
        indices[row, counts[row]] = 0
        counts[row] += 1


def test_what_is_easily_got_wrong_would_be_seen(doubles: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lists, mask = adapter.block_lists, adapter._mask

    def as_if(drawn: int) -> Callable[..., Any]:
        return lambda length, block, _, device=None: lists(length, block, drawn, device)

    def unblanked(*arguments: Any) -> Any:
        made = mask(*arguments)
        return adapter._Mask(made.padding, torch.zeros_like(made.padding), made.lists)

    mutants = {
        "block 0 once": ("block_lists", as_if(0), 101),
        "full attention for longer": ("block_lists", as_if(DRAWN + 1), SHORT + 1),
        "full attention for less long": ("block_lists", as_if(DRAWN - 1), SHORT),
        "block 0 as often as blocks are drawn": ("block_lists", without(0), 101),
        "block 0 once more": ("block_lists", changed(once_more), 101),
        "without the block before": ("block_lists", without(DRAWN + 1), 101),
        "without the last block or the one after": ("block_lists", without(-1), 101),
        "rows of padding kept": ("_mask", unblanked, 101),
    }
    for name, (attribute, mutant, length) in mutants.items():
        feed = padded_feed(2, length, "holes")
        with monkeypatch.context() as patch:
            patch.setattr(adapter, attribute, mutant)
            ours = intercepted(doubles["bigbird"], feed, BY)
        everything = torch.ones_like(feed["attention_mask"])
        assert worst(ours, original(doubles["bigbird"], feed, BY), everything) > 1e-4, name


def test_a_short_text_changes_a_model_for_good_but_not_here(doubles: dict[str, Any]) -> None:
    model, short, long = copy.deepcopy(doubles["bigbird"]), padded_feed(1, 20, "none"), padded_feed(1, 101, "none")
    attention = model.encoder.layer[0].attention.self
    before = original(model, long, BY)
    intercepted(model, short, BY)
    original(model, short, BY)
    assert torch.equal(original(model, long, BY), before)
    assert model.attention_type == "block_sparse" and model.encoder.layer[0].attention.self is attention
    # What is guarded against does happen.
    with torch.no_grad():
        model(**short)
        assert float((model(**long)[0] - before).abs().max()) > 1e-3
    assert BY.sites(model, UNCHANGED) == []


@pytest.mark.parametrize("drawn", [0, 1, 3])
@pytest.mark.parametrize("block", [1, 4])
def test_lists_are_those_of_the_pattern(block: int, drawn: int) -> None:
    pattern = systems.big_bird_of_any_length(block, drawn)
    for length in (*range(1, 14 * block), 30 * block + 1):
        wanted = build_lists(pattern, Lengths.of(length), block, block)
        none, nothing, counts, indices = (tensor.numpy() for tensor in adapter.block_lists(length, block, drawn))
        np.testing.assert_array_equal(none, np.zeros_like(counts))
        assert nothing.shape == (*counts.shape, 0)
        np.testing.assert_array_equal(counts, wanted.full_kv_num_blocks)
        assert not wanted.kv_num_blocks.any()
        for row, count in enumerate(counts[0, 0]):
            np.testing.assert_array_equal(indices[0, 0, row, :count], wanted.full_kv_indices[0, 0, row, :count])
        assert indices.min() >= 0 and indices.max() < -(-length // block)


@pytest.mark.parametrize("changes", [{"attention_type": "original_full"}, {"is_decoder": True}])
def test_full_attention_and_decoders_are_left_alone(changes: dict[str, Any], tmp_path: Path) -> None:
    model: Any = load_steep(tmp_path, CONFIGS["bigbird"], "query", **changes).model
    assert BY.sites(model, UNCHANGED) == [] and find_family(model, UNCHANGED) is None


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_exported_model_matches_at_lengths_that_were_not_traced(
    sources: dict[str, Source], doubles: dict[str, Any], kind: str, kernel_library: str, tmp_path: Path
) -> None:
    graph = export_graph(sources[kind], BY)
    first, second = longspan_nodes(graph)
    # Lists are made once, and the 3-D layout leaves nothing to transpose.
    assert first.inputs[3:7] == second.inputs[3:7]
    assert not any(node.op_type in ("Transpose", "Pad") for node in graph.graph)
    assert from_json(first.metadata_props["longspan.pattern"]) == systems.big_bird_of_any_length(BLOCK, DRAWN)
    path = tmp_path / "bigbird.onnx"
    for library in ("", kernel_library):
        run = functools.partial(run_session, session_of(graph, path, library))
        for batch, length, padding in (
            (1, 1, "none"),
            (2, 2 * BLOCK, "right"),
            (1, SHORT, "none"),
            (3, SHORT + 1, "left"),
            (2, 128, "holes"),
            (1, 301, "right"),
        ):
            feed = padded_feed(batch, length, padding)
            theirs = original(doubles[kind], feed, BY)
            if kind == "bigbird":
                feed["token_type_ids"] = torch.zeros_like(feed["input_ids"])
            assert worst(run(feed), theirs, feed["attention_mask"]) < 2e-5, (length, library)
