"""Percentiles, crossovers and predictions on samples with known answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from longspan.exporter.throughput.statistics import Crossover, Latency, crossover, next_latency, percentile


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
@pytest.mark.parametrize("percent", [0, 1, 10, 50, 90, 99, 100])
def test_percentile_is_numpys(count: int, percent: float) -> None:
    samples = np.random.default_rng(count).exponential(size=count)
    assert percentile(list(samples), percent) == pytest.approx(np.percentile(samples, percent), rel=1e-14)


def test_percentile_needs_a_sample() -> None:
    with pytest.raises(ValueError, match="no samples"):
        percentile([], 50)


def test_latency_of_known_samples() -> None:
    # 1 … 101: rank (n - 1) * q is whole, so every percentile is a sample.
    latency = Latency.of([float(value) for value in range(101, 0, -1)])
    assert latency == Latency(
        runs=101, median=51.0, minimum=1.0, maximum=101.0, p10=11.0, p90=91.0, p99=100.0, spread=80 / 51
    )


def test_latency_of_one_sample_has_no_spread() -> None:
    latency = Latency.of([3.0])
    assert (latency.median, latency.p99, latency.spread) == (3.0, 3.0, 0.0)


@pytest.mark.parametrize("exact", [700, 1000, 1500, 2000])
def test_crossover_of_power_laws_is_exact(exact: int) -> None:
    """t = n against t = n²/c cross at n = c, wherever the measured lengths lie: both are lines in log-log."""
    lengths = (512, 1024, 2048)
    ours = {length: 0.01 * length for length in lengths}
    theirs = {length: 0.01 * length**2 / exact for length in lengths}
    found = crossover("stock", ours, theirs)
    assert found.kind == "from"
    assert found.tokens == exact
    assert found.speedup_at_longest == pytest.approx(2048 / exact)


def test_crossover_rounds_up_to_a_token() -> None:
    found = crossover("stock", {256: 1.0, 1024: 1.0}, {256: 0.5, 1024: 8.0})
    # ln ratio goes from -ln 2 to 3 ln 2 over two octaves: a quarter of the way, 256 * 2^0.5 = 362.04.
    assert found.tokens == math.ceil(256 * math.sqrt(2)) == 363


def test_faster_at_every_length() -> None:
    found = crossover("dense", {512: 1.0, 1024: 2.0}, {512: 1.5, 1024: 6.0})
    assert found == Crossover("dense", "always", None, 512, 1024, 3.0)


def test_never_faster_where_the_longest_is_not() -> None:
    # Faster in between does not count: what counts is that it stays faster.
    found = crossover("dense", {512: 2.0, 1024: 2.0, 2048: 2.0}, {512: 1.0, 1024: 3.0, 2048: 2.0})
    assert (found.kind, found.tokens, found.longest) == ("never", None, 2048)


def test_only_the_last_crossing_counts() -> None:
    ours = dict.fromkeys((256, 512, 1024, 2048), 1.0)
    found = crossover("stock", ours, {256: 2.0, 512: 4.0, 1024: 0.5, 2048: 2.0})
    assert (found.kind, found.tokens) == ("from", math.ceil(1024 * math.sqrt(2)))


def test_only_common_lengths_count() -> None:
    found = crossover("stock", {512: 1.0, 1024: 1.0, 8192: 1.0}, {512: 2.0, 1024: 2.0, 4096: 9.0})
    assert (found.kind, found.shortest, found.longest) == ("always", 512, 1024)
    assert crossover("stock", {512: 1.0}, {1024: 1.0}).kind == "unknown"


def test_prediction_scales_the_longest_measured() -> None:
    assert next_latency({512: 1.0, 1024: 3.0}, 4096, 2) == 48.0
    assert next_latency({512: 1.0, 1024: 3.0}, 4096, 1) == 12.0
    assert next_latency({1024: 3.0}, 1024, 2) is None
