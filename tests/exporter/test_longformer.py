"""The Longformer adapter against transformers' eager code, which shares nothing with it but the projections."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from longspan.exporter.conversion import UNCHANGED
from longspan.exporter.families import family_by_name, find_family
from longspan.exporter.families.base import replaced
from longspan.exporter.sources import SourceRequest, load_source
from longspan.plugins.sliding_window_attention.definition import Attributes
from longspan.plugins.sliding_window_attention.reference import sliding_window_attention
from longspan.plugins.sliding_window_attention.torch_op import sliding_window_attention as op

from .models import LONGFORMER, write_config

# Two float64 computations of O(1) activations through two layers differ by accumulated rounding only.
TOLERANCE = 1e-12


@pytest.fixture(autouse=True)
def softmax_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager code asks for a float32 softmax whatever its type; keep it in the type of its input."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None: softmax(x, dim=dim))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    config = write_config(tmp_path_factory.mktemp("longformer"), LONGFORMER)
    return load_source(SourceRequest(str(config), random_weights=True)).model.double()


def inputs(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(2, 500, (batch, length), generator=generator),
        "attention_mask": torch.ones(batch, length, dtype=torch.int64),
        "global_attention_mask": torch.zeros(batch, length, dtype=torch.int64),
    }


def compare(model: torch.nn.Module, feed: dict[str, torch.Tensor]) -> float:
    """Largest difference over the tokens that are not padding; padded ones may hold anything."""
    with torch.no_grad():
        eager = model(**feed).last_hidden_state
        with family_by_name("longformer").intercept(model, UNCHANGED):
            ours = model(**feed).last_hidden_state
    assert torch.isfinite(ours).all()
    difference = (eager - ours).abs().amax(dim=-1)
    return float((difference * feed["attention_mask"]).max())


@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 33, 101, 256])
def test_matches_eager_at_every_length(model: torch.nn.Module, length: int) -> None:
    assert compare(model, inputs(2, length)) < TOLERANCE


def test_matches_eager_with_global_tokens_that_differ_per_row(model: torch.nn.Module) -> None:
    feed = inputs(3, 75)
    feed["global_attention_mask"][0, [0, 40, 74]] = 1
    feed["global_attention_mask"][1, 5] = 1
    assert compare(model, feed) < TOLERANCE


@pytest.mark.parametrize("side", ["right", "left"])
def test_matches_eager_with_padding_and_a_padded_global_token(model: torch.nn.Module, side: str) -> None:
    feed = inputs(2, 60)
    padded = slice(45, 60) if side == "right" else slice(0, 15)
    feed["attention_mask"][1, padded] = 0
    feed["global_attention_mask"][:, [20, 50, 3]] = 1
    assert compare(model, feed) < TOLERANCE


def test_eager_code_is_back_after_the_context(model: torch.nn.Module) -> None:
    from transformers.models.longformer import modeling_longformer

    before = modeling_longformer.LongformerSelfAttention.forward
    with pytest.raises(RuntimeError), family_by_name("longformer").intercept(model, UNCHANGED):
        assert modeling_longformer.LongformerSelfAttention.forward is not before
        raise RuntimeError
    assert modeling_longformer.LongformerSelfAttention.forward is before


def test_a_path_that_no_longer_exists_is_an_error() -> None:
    with pytest.raises(AttributeError), replaced(("json:no_such_function", None)):
        pass


def test_dilation_reaches_the_operator_and_is_declared_unfaithful(tmp_path: Path) -> None:
    config = write_config(tmp_path, LONGFORMER, attention_dilation=[1, [1, 2, 3, 2]])
    model = load_source(SourceRequest(str(config), random_weights=True)).model.double()
    family = find_family(model, UNCHANGED)
    assert family is not None and not family.faithful(model, UNCHANGED)
    # The second layer alone, against the reference, on the projections that the module makes.
    attention = model.encoder.layer[1].attention.self
    hidden = torch.randn(1, 40, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    unmasked = torch.zeros(1, 40, dtype=torch.bool)
    with torch.no_grad(), family.intercept(model, UNCHANGED):
        (ours,) = attention(hidden, is_index_masked=unmasked, is_index_global_attn=unmasked)
    q, k, v = (projection(hidden).detach().numpy() for projection in (attention.query, attention.key, attention.value))
    attributes = Attributes(8, 8, (1, 2, 3, 2), q_num_heads=4, kv_num_heads=4)
    expected, _ = sliding_window_attention(q, k, v, attributes=attributes)
    np.testing.assert_allclose(ours.numpy(), expected, atol=TOLERANCE)
    undilated = op(
        *(torch.from_numpy(x) for x in (q, k, v)),
        left_window_size=8,
        right_window_size=8,
        q_num_heads=4,
        kv_num_heads=4,
    )
    assert float((ours - undilated).abs().max()) > 1e-3


def test_other_models_are_left_alone() -> None:
    assert find_family(torch.nn.Linear(4, 4), UNCHANGED) is None
