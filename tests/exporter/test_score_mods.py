"""What is read from score_mods."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from longspan.exporter.errors import ExportFailed
from longspan.exporter.families.flex.score_mods import ScoreParts, Sizes, bias_at, read_score_mod

HEADS, LENGTH = 4, 150
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
TABLE = torch.randn(HEADS, 2 * LENGTH - 1, generator=torch.Generator().manual_seed(0))
SIZES = Sizes(2, HEADS, LENGTH, LENGTH)


def everything(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q == q


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


READINGS: dict[str, tuple[Any, ScoreParts]] = {
    "nothing": (lambda s, b, h, q, k: s, ScoreParts()),
    "factor": (lambda s, b, h, q, k: s * 0.3, ScoreParts(factor=0.3)),
    "negative": (lambda s, b, h, q, k: -s, ScoreParts(factor=-1.0)),
    "cap": (lambda s, b, h, q, k: 20 * torch.tanh(s / 20), ScoreParts(softcap=20.0)),
    "factor, cap": (lambda s, b, h, q, k: 30 * torch.tanh(s * 1.7 / 30), ScoreParts(factor=1.7, softcap=30.0)),
    "steep cap": (lambda s, b, h, q, k: 2 * torch.tanh(s * 1e4), ScoreParts(factor=2e4, softcap=2.0)),
    "alibi": (lambda s, b, h, q, k: s + SLOPES[h] * (k - q), ScoreParts(bias=True, by_head=True)),
    "same for all heads": (lambda s, b, h, q, k: s - 0.1 * (k - q).abs(), ScoreParts(bias=True)),
    "constant": (lambda s, b, h, q, k: s + 3.0, ScoreParts(bias=True)),
    "table": (lambda s, b, h, q, k: s + TABLE[h, k - q + LENGTH - 1], ScoreParts(bias=True, by_head=True)),
    "all three": (
        lambda s, b, h, q, k: 5 * torch.tanh(s * 0.5 / 5) - SLOPES[h] * (q - k).abs(),
        ScoreParts(0.5, 5.0, bias=True, by_head=True),
    ),
    "hidden": (lambda s, b, h, q, k: torch.where(q >= k, s, -math.inf), ScoreParts(hides=True)),
    "alibi, hidden": (
        lambda s, b, h, q, k: torch.where(q >= k, s + SLOPES[h] * (k - q), -math.inf),
        ScoreParts(bias=True, by_head=True, hides=True),
    ),
    "all hidden": (lambda s, b, h, q, k: s - math.inf, ScoreParts(hides=True)),
    "computed in float32": (
        lambda s, b, h, q, k: s.float() + SLOPES[h] * k - SLOPES[h] * q,
        ScoreParts(bias=True, by_head=True),
    ),
}


@pytest.mark.parametrize("name", READINGS)
def test_what_the_operators_have(name: str) -> None:
    score_mod, parts = READINGS[name]
    found = read_score_mod(score_mod, everything, SIZES, "layer")
    assert (found.bias, found.by_head, found.hides) == (parts.bias, parts.by_head, parts.hides)
    assert (found.factor, found.softcap) == pytest.approx((parts.factor, parts.softcap), rel=1e-6)
    if "float32" not in name:
        assert (found.factor, found.softcap) == pytest.approx((parts.factor, parts.softcap), rel=1e-13)


def test_what_the_mask_hides_does_not_matter() -> None:
    def score_mod(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return torch.where(q >= k, 2 * s, -1e9 * q)

    assert read_score_mod(score_mod, causal, SIZES, "layer") == ScoreParts(factor=2.0)
    with pytest.raises(ExportFailed):
        read_score_mod(score_mod, everything, SIZES, "layer")


REFUSED: dict[str, tuple[Any, str]] = {
    "position": (lambda s, b, h, q, k: s + 0.1 * q, "depends on q_idx beyond the distance"),
    "late position": (lambda s, b, h, q, k: s + 0.1 * (q >= LENGTH - 1), "depends on q_idx beyond the distance"),
    "by head": (lambda s, b, h, q, k: s * SLOPES[h], "depends on the head;"),
    "decay": (lambda s, b, h, q, k: s * torch.exp(-0.01 * (q - k).abs()), "depends on q_idx and kv_idx"),
    "cap after bias": (lambda s, b, h, q, k: 20 * torch.tanh((s + SLOPES[h] * (k - q)) / 20), "depends on"),
    "batch": (lambda s, b, h, q, k: s + b, "depends on the batch index"),
    "relu": (lambda s, b, h, q, k: torch.relu(s), "neither a multiple of the score nor"),
    "another bend": (lambda s, b, h, q, k: s / (1 + s.abs()), "neither a multiple of the score nor"),
    "square": (lambda s, b, h, q, k: s * s, "neither a multiple of the score nor"),
    "hidden by score": (lambda s, b, h, q, k: torch.where(s > 1, s, -math.inf), "hides pairs by their score"),
    "nan": (lambda s, b, h, q, k: s / (q - q), "NaN or"),
    "large and negative": (lambda s, b, h, q, k: torch.where(q >= k, s, -1e9), "depends on q_idx and kv_idx"),
    "bias that is hidden at the start": (
        lambda s, b, h, q, k: torch.where((q > 3) & (k > 3), s + 0.1 * (k - q), -math.inf),
        "depends on q_idx beyond the distance",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_they_do_not(name: str) -> None:
    score_mod, words = REFUSED[name]
    with pytest.raises(ExportFailed, match=words) as failure:
        read_score_mod(score_mod, everything, SIZES, "layer.3")
    assert str(failure.value).startswith("layer.3: the score_mod ")
    assert "allowed: " in str(failure.value)
    assert "next step: " in str(failure.value)


def test_the_bias_of_a_distance() -> None:
    score_mod, _ = READINGS["alibi, hidden"]
    offset = torch.arange(-3, 2)
    bias = bias_at(score_mod, HEADS, (-offset).clamp(min=0), offset.clamp(min=0), torch.float64)
    assert torch.equal(bias[:, :4], SLOPES.double()[:, None] * offset[:4])
    assert torch.equal(bias[:, 4], torch.zeros(HEADS, dtype=torch.float64))
