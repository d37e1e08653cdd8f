"""The oracle, the measured errors and the derived tolerances."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.manifest import InputRecord, OutputRecord
from longspan.exporter.parity.errors_between import meaningful, measure, token_mask
from longspan.exporter.parity.oracle import float64_arithmetic
from longspan.exporter.parity.tolerances import (
    FACTOR,
    Overrides,
    Scale,
    identity_tolerance,
    lowering_tolerance,
    unit_roundoff,
)
from longspan.exporter.sites.record import AttentionSite


def cast_on_purpose(x: torch.Tensor) -> torch.Tensor:
    """The casts that transformers' models are full of."""
    mask = torch.zeros(x.shape, dtype=torch.float32)
    weights = torch.nn.functional.softmax(x + mask, dim=-1, dtype=torch.float32).to(x.dtype)
    return (weights.float() + torch.ones(x.shape[-1]) / 3).type_as(x)


def test_the_oracle_keeps_float64_where_the_model_casts() -> None:
    x = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    terms = np.exp(x.numpy())
    expected = terms / terms.sum(axis=-1, keepdims=True) + 1 / 3
    with float64_arithmetic():
        np.testing.assert_allclose(cast_on_purpose(x).numpy(), expected, rtol=1e-14)
    assert np.abs(cast_on_purpose(x).numpy() - expected).max() > 1e-9


def test_the_default_type_is_back_after_an_error() -> None:
    before = torch.get_default_dtype()
    with pytest.raises(ZeroDivisionError), float64_arithmetic():
        assert torch.zeros(1).dtype == torch.float64
        raise ZeroDivisionError
    assert torch.get_default_dtype() == before


def test_measure() -> None:
    oracle = np.array([[3.0, 4.0], [0.0, 1.0]])
    error = measure(oracle + np.array([[0.0, 0.5], [0.0, -0.25]]), oracle)
    assert error.max_abs == 0.5 and error.rms == pytest.approx(np.sqrt((0.25 + 0.0625) / 4))
    # Numpy's and Polygraphy's rule: 0.5 against 0.1 · 4, 0.25 against 0.1 · 1.
    assert error.excess(0.1) == pytest.approx(0.15) and error.excess() == 0.5
    assert measure(oracle, oracle).cosine == pytest.approx(1) and measure(-oracle, oracle).cosine == pytest.approx(-1)


def test_what_is_not_compared_may_be_anything() -> None:
    oracle, got = np.zeros((2, 3)), np.zeros((2, 3))
    got[1, 2] = np.nan
    assert measure(got, oracle, np.array([[True], [False]])).max_abs == 0
    assert measure(got, oracle).max_abs == np.inf and "not finite" in measure(got, oracle).note
    assert "oracle" in measure(oracle, got).note


def test_another_shape_is_an_error_and_never_broadcast() -> None:
    assert "shape" in measure(np.zeros((1, 3)), np.zeros((2, 3))).note


def test_meaningful_elements() -> None:
    inputs = (InputRecord("attention_mask", "int64", ("batch", "sequence"), "padding_mask"),)
    mask = np.array([[1, 1, 0], [0, 1, 1]])
    tokens = token_mask({"attention_mask": mask}, inputs)
    assert tokens is not None and token_mask({}, ()) is None

    def chosen(*shape: int | str) -> object:
        return meaningful(OutputRecord("y", "float32", shape), tokens)

    np.testing.assert_array_equal(chosen("batch", "sequence", 8), mask[:, :, None] == 1)
    np.testing.assert_array_equal(chosen("sequence", "batch"), mask.T == 1)
    # Pooled from the first token, which is padding in row 1.
    np.testing.assert_array_equal(chosen("batch", 8), [[True], [False]])
    assert chosen(8) is None


def site(left: int, right: int, *inputs: str) -> AttentionSite:
    attributes = {"left_window_size": left, "right_window_size": right}
    return AttentionSite("node", "", "SlidingWindowAttention", ("Q", "K", "V", *inputs), attributes, "test")


def test_the_longest_sum_grows_with_the_length_up_to_the_window() -> None:
    sites = [site(100, 100)] * 4
    assert Scale.of(sites, width=64, length=50) == Scale(64, 4)
    assert Scale.of(sites, width=64, length=150) == Scale(150, 4)
    assert Scale.of(sites, width=64, length=5000) == Scale(201, 4)
    assert Scale.of([site(100, 100, "global_mask")], width=64, length=5000).terms == 5000
    assert Scale.of([site(-1, 0)], width=64, length=5000).terms == 5000


def test_unit_roundoff() -> None:
    assert unit_roundoff(np.dtype(np.float32)) == 2.0**-24
    assert unit_roundoff(np.dtype(ml_dtypes.bfloat16)) == 2.0**-8
    assert unit_roundoff(np.dtype(np.int64)) == unit_roundoff(np.dtype(np.bool_)) == 0


def test_the_tolerance_admits_another_order_of_summation_and_no_wrong_term() -> None:
    """A float32 dot product of 4096 terms: torch's order, numpy's order, and one term missing."""
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 64, 4096)).astype(np.float32)
    oracle = np.einsum("ik,ik->i", a.astype(np.float64), b.astype(np.float64))
    torch_error = float(np.abs((torch.from_numpy(a) * torch.from_numpy(b)).sum(-1).numpy() - oracle).max())
    backwards = np.cumsum(a[:, ::-1] * b[:, ::-1], axis=1, dtype=np.float32)[:, -1]
    tolerance = lowering_tolerance(torch_error, float(np.abs(oracle).max()), np.dtype(np.float32), Scale(4096, 1))
    assert 0 < np.abs(backwards - oracle).max() <= tolerance
    assert np.abs(oracle - a[:, 0].astype(np.float64) * b[:, 0] - oracle).max() > 100 * tolerance


def test_the_tolerance_follows_the_type() -> None:
    scale = Scale(256, 4)
    single, half = (lowering_tolerance(0.0, 2.0, np.dtype(t), scale) for t in (np.float32, np.float16))
    assert single == (2.0**-24 + 16 * 2.0**-24) * 2 * 2
    # Rounded to float16 once a layer, accumulated in float32.
    assert half == (2.0**-11 + 16 * 2.0**-24) * 2 * 2
    assert lowering_tolerance(1.0, 0.0, np.dtype(np.float32), scale) == FACTOR
    # Where torch overflows it proves nothing, and must not allow everything.
    assert lowering_tolerance(np.inf, 2.0, np.dtype(np.float16), scale) == half
    # The same amplification, in float64.
    double = identity_tolerance(2.0**-24, 0.0, np.dtype(np.float32), scale)
    assert double == FACTOR * 2.0**-53


def test_overrides() -> None:
    overrides = Overrides.parse(["1e-3", "pooled:0"], ["y:2"])
    assert (
        overrides.of("y") == (1e-3, 2.0) and overrides.of("pooled") == (0.0, 0.0) and overrides.of("z") == (1e-3, 0.0)
    )
    assert Overrides().of("y") is None and Overrides.parse([], ["y:1"]).of("z") is None
    with pytest.raises(InvalidRequest, match="allowed: y, z"):
        overrides.check(["y", "z"])


@pytest.mark.parametrize("text", ["", "x", "y:x", "-1", "nan", "inf"])
def test_overrides_that_are_no_numbers(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--atol"):
        Overrides.parse([], [text])
