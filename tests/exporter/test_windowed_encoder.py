"""Dense encoders turned into windowed ones, against a dense mask that says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from longspan.exporter.conversion import UNCHANGED, Conversion
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.families import family_by_name, find_family
from longspan.exporter.sources import SourceRequest, load_source

from .models import BERT, write_config

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    config = write_config(tmp_path_factory.mktemp("bert"), BERT)
    return load_source(SourceRequest(str(config), random_weights=True)).model.double()


def run(model: torch.nn.Module, feed: dict[str, torch.Tensor], conversion: Conversion) -> torch.Tensor:
    with torch.no_grad(), family_by_name("windowed-encoder").intercept(model, conversion):
        return model(**feed).last_hidden_state


def dense_with_mask(model: torch.nn.Module, feed: dict[str, torch.Tensor], conversion: Conversion) -> torch.Tensor:
    """The same pattern as an explicit (B, 1, S, S) mask for transformers' own dense attention."""
    length = feed["input_ids"].shape[1]
    assert conversion.window is not None
    position = torch.arange(length)
    window = (position[:, None] - position[None, :]).abs() <= conversion.window // 2
    global_ = position < conversion.global_tokens
    allowed = window | global_[:, None] | global_[None, :]
    mask = allowed[None, None] & feed["attention_mask"].bool()[:, None, None, :]
    with torch.no_grad():
        return model(input_ids=feed["input_ids"], attention_mask=mask).last_hidden_state


@pytest.mark.parametrize("length", [1, 8, 9, 33, 64])
@pytest.mark.parametrize("global_tokens", [0, 1, 3])
def test_matches_dense_attention_under_the_same_mask(model: torch.nn.Module, length: int, global_tokens: int) -> None:
    generator = torch.Generator().manual_seed(length)
    feed = {
        "input_ids": torch.randint(1, 500, (3, length), generator=generator),
        "attention_mask": torch.ones(3, length, dtype=torch.int64),
    }
    feed["attention_mask"][1, length * 2 // 3 + 1 :] = 0
    conversion = Conversion(window=16, global_tokens=global_tokens)
    torch.testing.assert_close(
        run(model, feed, conversion), dense_with_mask(model, feed, conversion), rtol=0, atol=TOLERANCE
    )


def test_a_window_that_holds_the_text_changes_nothing(model: torch.nn.Module) -> None:
    ids = torch.randint(1, 500, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        original = model(ids).last_hidden_state
    same = run(model, {"input_ids": ids}, Conversion(window=58))
    torch.testing.assert_close(same, original, rtol=0, atol=TOLERANCE)
    assert float((run(model, {"input_ids": ids}, Conversion(window=16)) - original).abs().max()) > 1e-3


def test_the_encoder_of_an_encoder_decoder_gets_a_window_too(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], "vocab_size": 100}
    source = load_source(SourceRequest(str(write_config(tmp_path, {**config, **sizes, **heads})), random_weights=True))
    encoder, conversion = source.model.double(), Conversion(window=16, global_tokens=1)
    family = find_family(encoder, conversion)
    assert source.record.encoder_of == "BartForConditionalGeneration" and family is not None
    assert family.sites(encoder, conversion) == ["layers.0.self_attn", "layers.1.self_attn"]
    feed = {"input_ids": torch.arange(3, 93).reshape(2, 45), "attention_mask": torch.ones(2, 45, dtype=torch.int64)}
    feed["attention_mask"][1, 31:] = 0
    torch.testing.assert_close(
        run(encoder, feed, conversion), dense_with_mask(encoder, feed, conversion), rtol=0, atol=TOLERANCE
    )


def test_an_encoder_with_relative_bias_is_left_alone(tmp_path: Path) -> None:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 100}
    config = write_config(tmp_path, {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], **sizes})
    model: torch.nn.Module = load_source(SourceRequest(str(config), random_weights=True)).model
    assert find_family(model, Conversion(window=16)) is None


def test_the_attention_implementation_is_restored(model: torch.nn.Module) -> None:
    before = model.config._attn_implementation
    run(model, {"input_ids": torch.ones(1, 4, dtype=torch.int64)}, Conversion(window=16))
    assert model.config._attn_implementation == before


def test_without_a_window_nothing_is_touched(model: torch.nn.Module) -> None:
    assert find_family(model, UNCHANGED) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["GPT2Model"], "model_type": "gpt2"},
        {"is_decoder": True, "architectures": ["BertLMHeadModel"]},
        {"architectures": ["T5EncoderModel"], "model_type": "t5"},
    ],
    ids=["causal", "decoder", "no attention interface"],
)
def test_near_misses_have_no_site(tmp_path: Path, changes: dict[str, object]) -> None:
    near_miss = load_source(SourceRequest(str(write_config(tmp_path, BERT, **changes)), random_weights=True)).model
    assert find_family(near_miss, Conversion(window=16)) is None


@pytest.mark.parametrize(
    "values",
    [{"window": 0}, {"window": 7}, {"window": -2}, {"global_tokens": 1}, {"alpha": 0.5}, {"alpha": 1.0},
     {"max_positions": 0}, {"window": 4, "global_tokens": -1}],
)  # fmt: skip
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match="--"):
        Conversion(**values)  # type: ignore[arg-type]
