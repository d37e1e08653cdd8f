"""Hierarchical decomposition of positions, against the formula written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.long_positions import extend_model, extend_positions
from longspan.exporter.sources import SourceRequest, load_source

from .models import BERT, LONGFORMER, write_config


def test_every_position_follows_the_formula() -> None:
    alpha, n = 0.4, 5
    p = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = extend_positions(p, n * n, alpha)
    u = (p - alpha * p[0]) / (1 - alpha)
    for i in range(n):
        for j in range(n):
            torch.testing.assert_close(q[i * n + j], alpha * u[i] + (1 - alpha) * u[j], rtol=0, atol=1e-14)


def test_trained_positions_stay_bit_for_bit() -> None:
    p = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(extend_positions(p, 30, 0.4)[:7], p)


def test_extended_positions_are_all_different() -> None:
    p = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    q = extend_positions(p, 64, 0.4)
    assert float(torch.pdist(q).min()) > 0


def test_more_than_the_square_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="64 at most"):
        extend_positions(torch.randn(8, 4), 65, 0.4)


def load(config: Path) -> torch.nn.Module:
    return load_source(SourceRequest(str(config), random_weights=True)).model


def test_a_longer_model_computes_the_same_on_short_texts(tmp_path: Path) -> None:
    model = load(write_config(tmp_path, BERT))
    longer, trained = extend_model(model, 200, 0.4)
    ids = torch.randint(1, 500, (2, 64), generator=torch.Generator().manual_seed(0))
    assert trained == 64
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, longer(ids).last_hidden_state)
        assert longer(torch.ones(1, 200, dtype=torch.int64)).last_hidden_state.shape == (1, 200, 64)
    assert model.config.max_position_embeddings == 64


def test_rows_before_the_first_position_are_kept(tmp_path: Path) -> None:
    config = write_config(
        tmp_path, BERT, architectures=["RobertaModel"], model_type="roberta", pad_token_id=1, max_position_embeddings=66
    )
    model = load(config)
    longer, trained = extend_model(model, 100, 0.4)
    table, extended = model.embeddings.position_embeddings.weight, longer.embeddings.position_embeddings.weight
    assert trained == 64 and extended.shape[0] == 102
    assert torch.equal(table, extended[:66])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({}, "accepts 64 tokens already"), ({"model_type": "t5", "architectures": ["T5EncoderModel"]}, "0 tables")],
)
def test_models_that_need_no_extension_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        extend_model(load(write_config(tmp_path, BERT, **changes)), 64, 0.4)


def test_longformer_positions_can_be_extended(tmp_path: Path) -> None:
    longer, trained = extend_model(load(write_config(tmp_path, LONGFORMER)), 1000, 0.4)
    assert trained == 256 and longer.config.max_position_embeddings == 1002
