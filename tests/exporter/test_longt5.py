"""The LongT5 adapter against transformers' eager encoder, in blocks of local_radius + 1, with dense side attention."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from longspan.exporter.conversion import UNCHANGED
from longspan.exporter.families import family_by_name, find_family
from longspan.exporter.families import longt5 as adapter
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

RADIUS, BLOCK = 6, 4
CONFIG: dict[str, Any] = {
    "architectures": ["LongT5ForConditionalGeneration"],
    "model_type": "longt5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "vocab_size": 100,
    "local_radius": RADIUS,
    "global_block_size": BLOCK,
    # Fewer than the distances in a band and in blocks, so that buckets are shared and the last one is met.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
KINDS = ("local", "transient-global")
BY = family_by_name("longt5")
# Below, at and above a global block, the eager code's block of radius + 1, the band, and three such blocks.
LENGTHS = (1, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 20, 21, 22, 101)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    steep = ("q", "relative_attention_bias", "global_relative_attention_bias")
    folder = tmp_path_factory.mktemp("longt5")
    return {kind: load_steep(folder / kind, CONFIG, *steep, encoder_attention_type=kind) for kind in KINDS}


@pytest.fixture(scope="module")
def doubles(sources: dict[str, Source]) -> dict[str, Any]:
    return {kind: double_of(source) for kind, source in sources.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_of_the_model_the_encoder_is_loaded_and_every_layer_is_a_site(sources: dict[str, Source], kind: str) -> None:
    source = sources[kind]
    assert type(source.model).__name__ == "LongT5Stack" and source.max_length is None
    assert source.record.encoder_of == "LongT5ForConditionalGeneration"
    assert find_family(source.model, UNCHANGED) is BY and BY.faithful(source.model, UNCHANGED)  # type: ignore[arg-type]
    assert len(BY.sites(source.model, UNCHANGED)) == 2  # type: ignore[arg-type]


def test_a_model_that_is_an_encoder_is_loaded_whole(tmp_path: Path) -> None:
    source = load_steep(tmp_path, CONFIG, "q", architectures=["LongT5EncoderModel"])
    assert type(source.model).__name__ == "LongT5EncoderModel" and source.record.encoder_of == ""
    assert len(BY.sites(source.model, UNCHANGED)) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("kind", KINDS)
def test_matches_eager_at_every_length(doubles: dict[str, Any], kind: str, padding: str) -> None:
    for length in LENGTHS:
        for batch in (1, 3):
            feed = padded_feed(batch, length, padding)
            assert error(doubles[kind], BY, feed) < TOLERANCE, (length, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_nothing_but_padding_is_finite_and_leaves_the_others_alone(doubles: dict[str, Any], kind: str) -> None:
    feed = padded_feed(3, 40, "right")
    feed["attention_mask"][1] = 0
    assert error(doubles[kind], BY, feed) < TOLERANCE


def mutants(kind: str) -> dict[str, tuple[Any, str, Any]]:
    """Wrong computations that the comparison must notice: what is replaced in the adapter, and by what."""
    tables = adapter._Tables

    def next_bucket(attention: Any, distances: Any) -> tuple[int, ...]:
        return buckets(attention, [distance + 1 for distance in distances])

    buckets = adapter._buckets
    found: dict[str, tuple[Any, str, Any]] = {"bias of the next distance": (adapter, "_buckets", next_bucket)}
    if kind == "local":
        return found

    def changed(**changes: Any) -> Any:
        make = tables.transient_global

        def transient_global(self: Any, *arguments: Any) -> Any:
            bias = make(self, *arguments)
            values = {name: change(bias.blocks) for name, change in changes.items()}
            return dataclasses.replace(bias, blocks=dataclasses.replace(bias.blocks, **values))

        return tables, "transient_global", transient_global

    def unjoined(own: Any) -> torch.Tensor:
        return torch.eye(own.joins.shape[1], dtype=own.joins.dtype).expand_as(own.joins)

    found["orphans join no block"] = changed(joins=unjoined)
    found["no bias of side keys"] = changed(bias=lambda own: torch.where(own.bias.isinf(), own.bias, 0.0))
    found["side keys without a block count"] = changed(bias=lambda own: torch.where(own.bias.isinf(), 0.0, own.bias))
    found["padding is summed"] = changed(padding=lambda own: torch.ones_like(own.padding))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_easily_got_wrong_would_be_seen(
    doubles: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = padded_feed(2, 47, "right")
    for name, (owner, attribute, mutant) in mutants(kind).items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, mutant)
            assert error(doubles[kind], BY, feed) > 1e-4, name
    assert error(doubles[kind], BY, feed) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_radius_off_by_one_would_be_seen(doubles: dict[str, Any], kind: str, change: int) -> None:
    model, feed = doubles[kind], padded_feed(1, 47, "none")
    theirs = original(model, feed, BY)
    modules = [model.get_submodule(name) for name in BY.sites(model, UNCHANGED)]
    try:
        for module in modules:
            module.local_radius += change
        ours = intercepted(model, feed, BY)
    finally:
        for module in modules:
            module.local_radius -= change
    assert worst(ours, theirs, feed["attention_mask"]) > 1e-4


def test_a_block_size_that_binary_fractions_miss_is_declared_unfaithful(tmp_path: Path) -> None:
    kind = {"encoder_attention_type": "transient-global"}
    source = load_steep(tmp_path, CONFIG, "q", **kind, global_block_size=10)
    model: Any = source.model
    assert not BY.faithful(model, UNCHANGED)
    # What the reason says: blocks differ in float64, and not in the model's own type.
    feed = padded_feed(1, 101, "none")
    assert error(double_of(source), BY, feed) > 1e-4
    with torch.no_grad():
        theirs = model(**feed)[0]
        with BY.intercept(model, UNCHANGED):
            ours = model(**feed)[0]
    assert float((ours - theirs).abs().max()) < 1e-4


def test_a_decoder_and_dense_t5_are_left_alone(tmp_path: Path) -> None:
    from transformers import LongT5Config, LongT5ForConditionalGeneration

    model = LongT5ForConditionalGeneration(
        LongT5Config(**{name: CONFIG[name] for name in CONFIG if "arch" not in name})
    )
    assert BY.sites(model.decoder, UNCHANGED) == []
    dense = load_steep(tmp_path, CONFIG, "q", model_type="t5", architectures=["T5ForConditionalGeneration"])
    assert find_family(dense.model, UNCHANGED) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_encoder_matches_at_lengths_that_were_not_traced(
    sources: dict[str, Source], doubles: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    graph = export_graph(sources[kind], BY)
    nodes = list(longspan_nodes(graph))
    assert [node.attributes["left_window_size"].as_int() for node in nodes] == [RADIUS] * 2
    assert all(node.attributes["scale"].as_float() == 1 for node in nodes)
    assert [len(node.outputs) for node in nodes] == [2 if kind == "transient-global" else 1] * 2
    # The 3-D layout leaves nothing to transpose; the side keys' part is in standard operators.
    assert kind == "transient-global" or not any(node.op_type in ("Pad", "Transpose") for node in graph.graph)
    # Buckets are constants: no logarithm is left whose rounding could choose another.
    assert not any(node.op_type == "Log" for node in graph.graph)
    run = functools.partial(run_session, session_of(graph, tmp_path / "longt5.onnx"))
    for batch, length, padding in (
        (1, 1, "none"),
        (2, 3, "right"),
        (1, 28, "none"),
        (3, 47, "holes"),
        (3, 101, "left"),
    ):
        feed = padded_feed(batch, length, padding)
        assert worst(run(feed), original(doubles[kind], feed, BY), feed["attention_mask"]) < 2e-5
