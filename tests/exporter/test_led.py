"""The LED adapter against transformers' eager encoder, which shares nothing with it but the projections."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from longspan.exporter.conversion import UNCHANGED
from longspan.exporter.families import family_by_name, find_family
from longspan.exporter.families import led as adapter
from longspan.exporter.sites.record import longspan_nodes
from longspan.exporter.sources import Source

from .family_checks import (
    TOLERANCE,
    double_of,
    error,
    export_graph,
    load_steep,
    original,
    padded_feed,
    run_session,
    session_of,
    worst,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG: dict[str, Any] = {
    "architectures": ["LEDForConditionalGeneration"],
    "model_type": "led",
    "attention_window": [8, 16],
    "encoder_layers": 2,
    "decoder_layers": 1,
    "d_model": 32,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 100,
    "max_encoder_position_embeddings": 160,
    "max_decoder_position_embeddings": 32,
}
WIDEST = 16
LENGTHS = (1, 7, 8, 9, 15, 16, 17, 33, 101, 160)
BY = family_by_name("led")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return load_steep(tmp_path_factory.mktemp("led"), CONFIG, "query", "query_global")


@pytest.fixture(scope="module")
def double(source: Source) -> Any:
    return double_of(source)


def feed_of(batch: int, length: int, padding: str = "none", tokens: str = "none") -> dict[str, torch.Tensor]:
    """Inputs with global tokens: ``none``, ``first``, or ``several``, another number in each row, padded ones too."""
    feed = padded_feed(batch, length, padding)
    marks = feed["global_attention_mask"] = torch.zeros_like(feed["input_ids"])
    if tokens == "first":
        marks[:, 0] = 1
    elif tokens == "several":
        for row in range(batch):
            marks[row, row :: max(length // (row + 2), 1)] = 1
    return feed


def test_of_the_model_the_encoder_is_loaded_and_every_layer_is_a_site(source: Source) -> None:
    assert type(source.model).__name__ == "LEDEncoder" and source.record.encoder_of == "LEDForConditionalGeneration"
    assert source.max_length == 160
    assert list(source.example_inputs) == ["input_ids", "attention_mask", "global_attention_mask"]
    assert find_family(source.model, UNCHANGED) is BY  # type: ignore[arg-type]
    sites = BY.sites(source.model, UNCHANGED)  # type: ignore[arg-type]
    assert sites == [f"layers.{layer}.self_attn.longformer_self_attn" for layer in range(2)]


@pytest.mark.parametrize("tokens", ["none", "first", "several"])
@pytest.mark.parametrize("length", LENGTHS)
def test_matches_eager_at_every_length(double: Any, length: int, tokens: str) -> None:
    assert error(double, BY, feed_of(1, length, tokens=tokens)) < TOLERANCE


@pytest.mark.parametrize("tokens", ["none", "several"])
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
@pytest.mark.parametrize("length", [16, 47, 96])
def test_matches_eager_with_padding(double: Any, length: int, padding: str, tokens: str) -> None:
    assert error(double, BY, feed_of(3, length, padding, tokens)) < TOLERANCE


def test_a_window_or_a_global_token_less_would_be_seen(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = feed_of(1, 101, tokens="several")
    attention = adapter.longformer_attention

    def narrower(self: Any, *args: Any, **keywords: Any) -> Any:
        self.one_sided_attn_window_size -= 1
        try:
            return attention(self, *args, **keywords)
        finally:
            self.one_sided_attn_window_size += 1

    def local(self: Any, *args: Any, is_index_global_attn: torch.Tensor, **keywords: Any) -> Any:
        return attention(self, *args, is_index_global_attn=None, **keywords)

    for mutant in (narrower, local):
        monkeypatch.setattr(adapter, "longformer_attention", mutant)
        assert error(double, BY, feed) > 1e-3, mutant


def test_hidden_states_and_tuples_are_those_of_the_eager_encoder(double: Any) -> None:
    feed = feed_of(2, 41, "right", "first")
    mask = feed["attention_mask"][:, :, None]
    with torch.no_grad():
        theirs = double(**feed, output_hidden_states=True)
        with BY.intercept(double, UNCHANGED):
            ours = double(**feed, output_hidden_states=True)
            (alone,) = double(**feed, return_dict=False)
            embedded = double(inputs_embeds=double.embed_tokens(feed["input_ids"]), attention_mask=mask[..., 0])
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for mine, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        # The eager encoder takes its softmax in float32 outside of the oracle's arithmetic.
        assert float(((mine - other) * mask).abs().max()) < 1e-5
    assert torch.equal(alone, ours.last_hidden_state) and embedded.last_hidden_state.shape == alone.shape


def test_without_masks_nothing_is_padded_and_nothing_global(double: Any) -> None:
    feed = feed_of(2, 50)
    ids = {"input_ids": feed["input_ids"]}
    with torch.no_grad(), BY.intercept(double, UNCHANGED):
        assert torch.equal(double(**ids)[0], double(**feed)[0])


def test_the_exported_encoder_matches_at_lengths_that_were_not_traced(
    source: Source, double: Any, tmp_path: Path
) -> None:
    graph = export_graph(source, BY)
    windows = [node.attributes["left_window_size"].as_int() for node in longspan_nodes(graph)]
    assert windows == [4, 8] and not any(node.op_type in ("Pad", "Transpose") for node in graph.graph)
    # The model is its own again: transformers' exporter leaves in it what it found, and found an intercepted encoder.
    assert "forward" not in vars(source.model) and error(double_of(source), BY, feed_of(1, 9)) < TOLERANCE
    run = functools.partial(run_session, session_of(graph, tmp_path / "led.onnx"))
    for batch, length, padding, tokens in (
        (1, 9, "none", "none"),
        (3, 64, "left", "several"),
        (2, 101, "right", "first"),
    ):
        feed = feed_of(batch, length, padding, tokens)
        assert worst(run(feed), original(double, feed, BY), feed["attention_mask"]) < 2e-5
