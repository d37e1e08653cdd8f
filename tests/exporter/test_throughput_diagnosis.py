"""What a benchmark says about itself, from numbers with known answers; and its page."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from longspan.exporter.bundle import Bundle
from longspan.exporter.reports.bench_page import bench_page
from longspan.exporter.throughput import trial
from longspan.exporter.throughput.comparison import compare
from longspan.exporter.throughput.diagnosis import attention_gflops, diagnose, shares, weaknesses
from longspan.exporter.throughput.report import Row
from longspan.exporter.throughput.roofline import AttentionWork
from longspan.exporter.throughput.statistics import drift

from .test_throughput_comparison import report, row, samples

MS = 1_000_000
"""Nanoseconds."""


def measured(variant: str, length: int, ms: int, **changes: object) -> Row:
    return dataclasses.replace(row(variant, length, [[ms * MS] * 200]), **changes)  # type: ignore[arg-type]


def test_parts_of_a_run_add_up() -> None:
    parts = shares(measured("kernel", 512, 10))
    assert parts == pytest.approx(
        {"attention": 0.6, "matrix products": 0.3, "other operators": 0.06, "the runtime between them": 0.04}
    )
    assert shares(Row("kernel", 512, "crashed")) == {}


def test_what_bounds_it_how_fast_attention_is_and_how_it_grows() -> None:
    short = measured("kernel", 512, 10, session_rss_bytes=100 << 20, peak_rss_bytes=110 << 20)
    # Eight times as long for eight times the tokens; 6 GFLOP in 60 % of 80 ms are 125 GFLOP/s.
    long = measured(
        "kernel", 4096, 80, session_rss_bytes=100 << 20, peak_rss_bytes=180 << 20,
        attention_flops=6_000_000_000, sgemm_gflops=250.0, cores_used=1.9,
    )  # fmt: skip
    assert attention_gflops(long) == pytest.approx(125.0)
    bound, speed, growth = diagnose(report(short, long))
    assert "longspan kernel at 4,096 tokens is bound by attention: attention 60%" in bound
    assert "with attention for free it would be 2.5x as fast" in bound
    assert "reaches 125 GFLOP/s at 4,096 tokens, 50% of the 250" in speed
    assert "to the power 1.00, memory beyond the loaded model to the power 1.00 (10 to 80 MiB)" in growth


def test_idle_cores_are_named() -> None:
    (line,) = [line for line in diagnose(report(measured("kernel", 512, 10, cores_used=1.0))) if "threads" in line]
    assert "kept 1 of 2 threads busy" in line


def test_nothing_measured_nothing_said() -> None:
    assert diagnose(report(Row("kernel", 512, "crashed"))) == weaknesses(report()) == ()


def test_steady_numbers_have_no_weakness() -> None:
    assert weaknesses(report(measured("kernel", 512, 10, others_cores=0.1, drift=0.01))) == ()


def test_weak_numbers_are_named_with_their_numbers() -> None:
    wide = row("body", 1024, [samples(1, spread=0.5)])
    steady = measured("kernel", 512, 10)
    late = dataclasses.replace(steady, others_cores=1.5, round_medians_ms=(10.0, 12.0), drift=0.2)
    heated = dataclasses.replace(steady, variant="dense", drift=-0.08)
    notes = "\n".join(weaknesses(report(wide, late, heated)))
    assert "during 1 of 3 measurements other processes took up to 1.5 of 2 cores" in notes
    assert re.search(r"1 of 3 measurements spread by more than 10%.*function body at 1,024 \(\d+%\)", notes)
    assert "medians differ between rounds by more than 10% in 1 measurements" in notes
    assert (
        "1 of 3 measurements began slower than they ended, so the warm-up was too short" in notes and "by 20%" in notes
    )
    assert "1 of 3 measurements ended slower than they began" in notes and "by 8%" in notes


def test_drift_of_known_series() -> None:
    assert drift([2.0] * 25 + [1.0] * 75) == 1.0
    assert drift([1.0] * 75 + [2.0] * 25) == -0.5
    assert drift([1.0] * 11) is None
    # One slow first run is no drift: medians are compared.
    assert drift([9.0] + [1.0] * 19) == 0.0


def test_what_runs_inside_a_loop_is_counted_once(tmp_path: Path) -> None:
    def event(name: str, operator: str, begin: int, duration: int) -> dict[str, object]:
        args = {"op_name": operator, "provider": "CPU"}
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": begin, "dur": duration, "args": args}

    events = [
        {"cat": "Session", "name": "model_run", "ts": 100, "dur": 900},
        event("before", "MatMul", 110, 90),
        # Nodes of the body's loop have no prefix, and a second loop runs inside the first.
        event("_inlfunc_BlockSparseAttention_loop", "Loop", 200, 300),
        event("inner", "MatMul", 210, 100),
        event("inner_loop", "Loop", 320, 100),
        event("innermost", "Softmax", 330, 50),
        event("_inlfunc_BlockSparseAttention_token_0_node_Add", "Add", 510, 10),
        # A branch of the model's own, with a kernel inside.
        event("branch", "If", 600, 200),
        event("site", "BlockSparseAttention", 610, 150),
        event("after", "Add", 900, 20),
    ]
    (tmp_path / "profile.json").write_text(json.dumps(events))
    found = trial._executed(tmp_path / "profile.json", ["SlidingWindowAttention", "BlockSparseAttention"])
    assert found["time_us"] == {"run": 900, "attention": 300 + 10 + 150, "matmul": 90, "other": 20}
    assert found["kernel_nodes"] == 1 and found["nodes"]["CPU"]["MatMul"] == 2


def test_operations_of_a_real_bundle(longformer_bundle: Path) -> None:
    work = AttentionWork(Bundle.open(longformer_bundle))
    # Windows of ±4 and ±8 over 100 tokens, 4 heads of 16: pairs · 2 products · 2 operations · 16.
    pairs = sum(100 * (2 * side + 1) - side * (side + 1) for side in (4, 8))
    assert work.flops(1, 100) == 4 * pairs * 2 * 2 * 16
    assert work.flops(3, 100) == 3 * 4 * pairs * 2 * 2 * 16
    # A global token adds at most a row and a column to each.
    assert work.flops(1, 100, global_tokens=1) == 4 * (pairs + 2 * 200) * 2 * 2 * 16


def test_the_page_stands_alone_and_says_what_the_report_does() -> None:
    now = report(
        row("kernel", 512, [samples(1, 1.3)]),
        row("kernel", 1024, [samples(3, 2)]),
        Row("stock", 512, "crashed", "<SIGSEGV>"),
    )
    before = report(row("kernel", 512, [samples(2)]))
    page = bench_page(dataclasses.replace(now, comparison=compare(now, before, "before.json")))
    assert "Slower than before" in page and "regressed" in page and "crashed: &lt;SIGSEGV&gt;" in page
    assert page.count("<svg") >= 3
    # Names of the SVG and RDF vocabularies are no addresses to fetch from.
    assert not re.search(r"<script|<link|<img|@import|url\(http|(src|href)=\"http", page)
    assert bench_page(now) == bench_page(now)
    assert "No regression" not in bench_page(now, plot=False)
