"""Comparisons of benchmarks on samples whose answer is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from longspan.exporter.errors import InvalidRequest
from longspan.exporter.throughput.comparison import (
    bootstrap_medians,
    check_comparable,
    compare,
    describe,
    differences,
    ratio_of_medians,
)
from longspan.exporter.throughput.machine import Machine
from longspan.exporter.throughput.report import BenchReport, Row
from longspan.exporter.throughput.saved import load, to_json
from longspan.exporter.throughput.settings import BenchSettings
from longspan.exporter.throughput.statistics import Crossover, Latency

MACHINE = Machine("A CPU", 2, 2, 8 << 30, ("avx2",), "Linux 6", "3.11", {"onnxruntime": "1.31.1"})


def row(variant: str, length: int, rounds: Sequence[Sequence[int]]) -> Row:
    pooled = [sample / 1e6 for samples in rounds for sample in samples]
    return Row(
        variant,
        length,
        "ok",
        latency=Latency.of(pooled),
        tokens_per_s=1.0,
        ratio=1.0,
        peak_rss_bytes=200 << 20,
        session_rss_bytes=100 << 20,
        time_us={"run": 1000, "attention": 600, "matmul": 300, "other": 60},
        samples_ns=tuple(tuple(samples) for samples in rounds),
    )


def report(*rows: Row) -> BenchReport:
    return BenchReport(
        model="Model",
        attention="2 x SlidingWindowAttention (8 left, 8 right)",
        identity="abc",
        reference="kernel",
        settings=BenchSettings(lengths=(512, 1024)),
        machine=MACHINE,
        rows=rows,
        crossovers=(Crossover("stock", "always", None, 512, 1024, 2.0),),
        diagnosis=("one",),
        notes=("two",),
        comparison=None,
        command="longspan bench",
        created="2026-01-01T00:00:00+00:00",
    )


def samples(seed: int, factor: float = 1.0, count: int = 200, spread: float = 0.03) -> list[int]:
    """Latencies around a millisecond with a tail to the right, as latencies have."""
    generator = np.random.default_rng(seed)
    return (1e6 * factor * (1 + generator.gamma(2.0, spread, count))).astype(int).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11, 101])
def test_medians_are_distributed_as_those_of_real_resamples(count: int) -> None:
    generator = np.random.default_rng(count)
    values = generator.exponential(size=count)
    drawn = bootstrap_medians([values.tolist()], 40_000, generator)
    resampled = np.median(generator.choice(values, (40_000, count)), axis=1)
    for quantile in (0.025, 0.25, 0.5, 0.75, 0.975):
        # The share of each below the other's quantile: what an interval is made of. Its standard error is 0.0035.
        threshold = np.quantile(resampled, quantile)
        assert np.mean(drawn <= threshold) == pytest.approx(np.mean(resampled <= threshold), abs=0.015)


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    """A quarter of a standard error of 400 trials is 0.3 %; the percentile interval of a median is a bit wide."""
    held = 0
    for trial in range(400):
        found = ratio_of_medians([samples(2 * trial, 1.2, 60)], [samples(2 * trial + 1, 1.0, 60)], resamples=1000)
        held += found.low <= 1.2 <= found.high
    assert 0.92 <= held / 400 <= 0.99


def test_the_interval_narrows_with_the_samples() -> None:
    few, many = (ratio_of_medians([samples(1, 1.0, n)], [samples(2, 1.0, n)]) for n in (50, 5000))
    # Ten times narrower for a hundred times the samples.
    assert 6 < (few.high - few.low) / (many.high - many.low) < 16


def test_rounds_that_differ_widen_the_interval() -> None:
    rounds = [samples(seed, factor) for seed, factor in ((1, 1.0), (2, 1.1), (3, 0.9))]
    pooled = [[sample for one in rounds for sample in one]]
    before = [samples(seed) for seed in (4, 5, 6)]
    clustered, flat = ratio_of_medians(rounds, before), ratio_of_medians(pooled, before)
    assert clustered.high - clustered.low > 3 * (flat.high - flat.low)
    assert clustered.ratio == flat.ratio


def test_equal_seeds_give_equal_intervals() -> None:
    assert ratio_of_medians([samples(1)], [samples(2)]) == ratio_of_medians([samples(1)], [samples(2)])


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, "same"), (1.03, "slower"), (1.2, "regressed"), (0.8, "faster")])
def test_verdicts(factor: float, verdict: str) -> None:
    now, before = report(row("kernel", 512, [samples(1, factor)])), report(row("kernel", 512, [samples(2)]))
    found = compare(now, before, "before.json", 0.05)
    (compared,) = found.rows
    assert compared.verdict == verdict
    assert compared.low < factor < compared.high
    assert found.regressions == ((compared,) if verdict == "regressed" else ())
    assert "longspan kernel at 1 x 512 tokens" in describe(compared) and describe(compared).endswith(verdict)
    assert found.within_process


def test_a_median_beyond_the_threshold_is_no_regression_while_its_interval_is_not() -> None:
    now, before = (report(row("kernel", 512, [samples(s, f, 8, 0.2)])) for s, f in ((1, 1.15), (2, 1.0)))
    (compared,) = compare(now, before, "before.json", 0.05).rows
    assert compared.ratio > 1.05 and compared.verdict != "regressed"


def test_only_rows_of_both_are_compared_and_lost_ones_are_named() -> None:
    before = report(
        row("kernel", 512, [samples(1)]), row("stock", 512, [samples(2)]), row("kernel", 1024, [samples(3)])
    )
    now = report(
        row("kernel", 512, [samples(4)]), Row("stock", 512, "crashed", "SIGSEGV"), row("body", 512, [samples(5)])
    )
    found = compare(now, before, "before.json")
    assert [(one.variant, one.length) for one in found.rows] == [("kernel", 512)]
    assert found.missing == ("stock export at 1 x 512 tokens: crashed: SIGSEGV",)
    with pytest.raises(InvalidRequest, match="no row of the same variant, length and batch"):
        compare(report(row("dense", 512, [samples(1)])), before, "before.json")


def test_what_is_not_the_same_thing_is_refused() -> None:
    one = report(row("kernel", 512, [samples(1)]))
    assert differences(one, one) == []
    other = dataclasses.replace(
        one,
        machine=dataclasses.replace(MACHINE, cpu="Another CPU", versions={"onnxruntime": "1.30"}),
        identity="def",
        settings=dataclasses.replace(one.settings, threads=1),
    )
    with pytest.raises(InvalidRequest) as raised:
        check_comparable(one, other, "other.json", force=False)
    text = str(raised.value)
    assert "processor: A CPU, was Another CPU" in text and "threads: 0, was 1" in text and "model: abc, was def" in text
    assert "--force-compare" in text
    # Versions may be what one compares.
    assert "onnxruntime" not in text
    check_comparable(one, other, "other.json", force=True)
    assert "onnxruntime: 1.31.1, was 1.30" in compare(one, other, "other.json").differences


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    one = report(row("kernel", 512, [samples(1), samples(2)]), Row("stock", 512, "unavailable", "no"))
    one = dataclasses.replace(one, comparison=compare(one, one, "itself"))
    file = tmp_path / "bench.json"
    file.write_text(to_json(one))
    assert load(file, "--compare") == one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "schema version None"),
        ("[]", "schema version None"),
        ("x", "is not JSON"),
        ('{"schema_version": 2}', "comparison"),
    ],
)
def test_files_that_are_no_report(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        load(file, "--compare")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load(tmp_path / "none.json", "--compare")
