"""Benchmarks: structure, limits, and failures as rows. Nothing here judges a time."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from longspan.exporter import EnvironmentLacks, FallbackRan, InvalidRequest, bench
from longspan.exporter.bundle import Bundle
from longspan.exporter.sources.reload import Consent
from longspan.exporter.throughput import BenchSettings, benchmark, runner
from longspan.exporter.throughput.benchmark import bench_inputs
from longspan.exporter.throughput.report import describe_crossover
from longspan.exporter.throughput.saved import load, to_json
from longspan.exporter.throughput.settings import resolve_lengths
from longspan.exporter.throughput.statistics import Crossover
from longspan.exporter.throughput.variants import Variant, body_variant, kernel_variant, stock_variant
from onnx import TensorProto, helper

QUICK = BenchSettings(warm_up_ms=0, iterations=2, duration_s=0, lengths=(48,), against=(), time_limit_s=60)
"""As little as a trial can do."""


@pytest.fixture
def bundle(bert_bundle: Path, tmp_path: Path) -> Bundle:
    """A copy of the small bundle, to write reports into."""
    return Bundle.open(shutil.copytree(bert_bundle, tmp_path / "bundle"))


@pytest.fixture
def inputs(bundle: Bundle, tmp_path: Path) -> Path:
    """Inputs of 48 tokens in a file."""
    path = tmp_path / "inputs.npz"
    np.savez(path, **bench_inputs(bundle.manifest, 48, QUICK))
    return path


def test_bench_measures_every_variant_and_writes_the_report(bundle: Bundle) -> None:
    settings = dataclasses.replace(QUICK, against=("body", "dense", "stock"), rounds=2, batch=2)
    stages: list[str] = []
    report = bench(bundle, settings, progress=stages.append, command="longspan bench")
    assert [row.variant for row in report.rows] == ["kernel", "body", "dense", "stock"]
    for row in report.rows:
        assert row.status == "ok", row
        assert row.latency is not None and row.tokens_per_s is not None and row.ratio is not None
        # Two rounds of two iterations, pooled.
        assert row.latency.runs == 4
        assert len(row.round_medians_ms) == 2
        assert row.tokens_per_s == pytest.approx(2 * row.length / row.latency.median * 1e3)
        assert row.ratio == row.latency.median / report.at("kernel", row.length).latency.median  # type: ignore[union-attr]
        assert 0 < row.import_rss_bytes <= row.session_rss_bytes <= row.peak_rss_bytes  # type: ignore[operator]
        assert row.kernel_nodes == (len(bundle.manifest.sites) if row.variant == "kernel" else 0)
    assert {found.baseline for found in report.crossovers} == {"body", "dense", "stock"}
    assert any("stock export, 48 tokens" in stage for stage in stages)
    written = json.loads((bundle.reports_path / "bench.json").read_text())
    assert written == json.loads(to_json(report))
    assert load(bundle.reports_path / "bench.json", "--compare") == report
    assert written["schema_version"] == 3
    assert written["settings"]["lengths"] == [48]
    assert written["machine"]["versions"]["onnxruntime"]
    assert (bundle.reports_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert Bundle.open(bundle.path).manifest == bundle.manifest


def test_memory_is_the_trials_and_not_its_parents(bundle: Bundle, inputs: Path) -> None:
    """getrusage would hand the parent's peak down to the child."""
    ballast = np.ones(64 << 20, np.float64)
    outcome = runner.run_trial(body_variant(bundle), inputs, QUICK)
    assert outcome["memory_bytes"]["peak"] < ballast.nbytes


def test_a_session_that_runs_another_path_is_no_measurement(bundle: Bundle, inputs: Path) -> None:
    without_library = dataclasses.replace(kernel_variant(bundle), library=None)
    outcome = runner.run_trial(without_library, inputs, QUICK)
    assert outcome["status"] == "wrong path"
    assert "ran 0 longspan kernels, expected 2" in outcome["reason"]


def test_require_kernel(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernel_variant(bundle)
    monkeypatch.setattr(benchmark, "kernel_variant", lambda *_: dataclasses.replace(kernel, library=None))
    with pytest.raises(FallbackRan, match="48 tokens: the session ran 0 longspan kernels"):
        bench(bundle, QUICK, require_kernel=True, plot=False)
    monkeypatch.setattr(benchmark, "kernel_variant", lambda *_: Variant("kernel", None, unavailable="not built"))
    with pytest.raises(FallbackRan, match="not built"):
        bench(bundle, QUICK, require_kernel=True, plot=False)


def test_without_the_library_the_function_body_is_the_reference(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "kernel_variant", lambda *_: Variant("kernel", None, unavailable="not built"))
    report = bench(bundle, dataclasses.replace(QUICK, against=("body",)), plot=False)
    assert report.reference == "body"
    assert report.at("kernel", 48).status == "unavailable"
    assert report.at("kernel", 48).reason == "not built"
    assert report.at("body", 48).ratio == 1.0
    assert not report.broken
    assert not report.crossovers


@pytest.mark.parametrize(
    ("source", "status", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed", "ended by SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "out of memory", "SIGKILL"),
        ("import sys; sys.exit('no luck')", "crashed", "exit code 1: no luck"),
        ("print('hello')", "failed", "printed no result"),
        ("import time; time.sleep(60)", "over limit", "did not end within 0.2 s"),
    ],
)
def test_trials_that_end_otherwise_are_outcomes(
    source: str, status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_trial.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "_MODULE", "bad_trial")
    limit = 0.2 if status == "over limit" else 60.0
    monkeypatch.setattr(runner, "_GRACE_S", 0.0)
    settings = dataclasses.replace(QUICK, time_limit_s=limit)
    outcome = runner.run_trial(Variant("stock", tmp_path / "none.onnx"), tmp_path / "inputs.npz", settings)
    assert outcome["status"] == status
    assert reason in outcome["reason"]


def test_one_crash_does_not_end_the_bench(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    monkeypatch.setattr(benchmark, "body_variant", lambda _: Variant("body", broken))
    report = bench(bundle, dataclasses.replace(QUICK, against=("body",)), plot=False)
    assert report.at("kernel", 48).status == "ok"
    assert report.at("body", 48).status == "failed"
    assert report.broken == (report.at("body", 48),)
    assert report.crossovers[0].kind == "unknown"


def test_outputs_that_are_not_finite_are_no_measurement(tmp_path: Path) -> None:
    outcome = _run_model(tmp_path, "Log", np.array([-1.0], np.float32))
    assert outcome["status"] == "failed"
    assert outcome["reason"] == "output y holds values that are not finite"


def test_memory_limit_makes_a_row_instead_of_a_killed_machine(tmp_path: Path) -> None:
    outcome = _run_model(tmp_path, "ConstantOfShape", np.array([1 << 31], np.int64), memory_limit_bytes=1 << 30)
    assert outcome["status"] == "out of memory"


def _run_model(folder: Path, operator: str, value: np.ndarray[Any, Any], **settings: Any) -> dict[str, Any]:
    """Run a model of one operator in a trial."""
    element = helper.np_dtype_to_tensor_dtype(value.dtype)
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"])],
        operator,
        [helper.make_tensor_value_info("x", element, value.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    np.savez(folder / "inputs.npz", x=value)
    settings = dataclasses.replace(QUICK, **settings)  # type: ignore[assignment]
    return runner.run_trial(Variant("stock", folder / "model.onnx"), folder / "inputs.npz", settings)  # type: ignore[arg-type]


def test_a_stock_export_that_fails_is_a_row(bundle: Bundle, tmp_path: Path) -> None:
    variant = stock_variant(bundle, tmp_path, Consent(str(tmp_path / "gone" / "config.json")))
    assert variant.model is None
    assert "is not there" in variant.unavailable
    changed = tmp_path / "config.json"
    changed.write_text(Path(bundle.manifest.source.location).read_text() + "\n")
    unavailable = stock_variant(bundle, tmp_path, Consent(str(changed))).unavailable
    assert "config.json differ from what was exported" in unavailable


def test_a_model_that_the_stock_exporter_cannot_trace_is_a_row(
    longformer_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    variant = stock_variant(Bundle.open(longformer_bundle), tmp_path, Consent())
    assert variant.model is None
    assert "tracing failed: GuardOnDataDependentSymNode" in variant.unavailable
    # One line, and none of the thousands that torch.export prints on the way.
    assert "\n" not in variant.unavailable
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_dense_attention_must_have_run(bundle: Bundle, inputs: Path) -> None:
    outcome = runner.run_trial(
        dataclasses.replace(body_variant(bundle), operators={"MultiHeadAttention": 2}), inputs, QUICK
    )
    assert outcome["status"] == "wrong path"
    assert outcome["reason"] == "the session ran MultiHeadAttention 0 times, expected 2"


def test_hopeless_trials_are_not_started() -> None:
    dense, linear = Variant("dense", None, exponent=2), Variant("kernel", None, exponent=1)
    settings = dataclasses.replace(QUICK, time_limit_s=10, memory_limit_bytes=1 << 30)
    # A run of 0.5 s at 1024 tokens becomes 32 s at 8192 if quadratic, 4 s if linear.
    skipped = runner.foresee(dense, 8192, {512: 0.1, 1024: 0.5}, {}, settings)
    assert skipped is not None and skipped["status"] == "over limit"
    assert "up to 32 s (from 0.5 s at 1024 tokens)" in skipped["reason"]
    assert runner.foresee(linear, 8192, {512: 0.1, 1024: 0.5}, {}, settings) is None
    # 100 MiB become 6400 MiB, or 800.
    skipped = runner.foresee(dense, 8192, {1024: 0.001}, {1024: 100 << 20}, settings)
    assert skipped is not None and skipped["status"] == "out of memory"
    assert runner.foresee(linear, 8192, {1024: 0.001}, {1024: 100 << 20}, settings) is None
    assert runner.foresee(dense, 8192, {}, {}, settings) is None


def test_a_limit_once_exceeded_skips_the_longer_lengths(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def run_trial(variant: Variant, inputs: Path, settings: BenchSettings, sgemm: Path | None = None) -> dict[str, Any]:
        started.append(variant.name)
        return {"status": "over limit", "reason": "too slow"}

    monkeypatch.setattr(benchmark, "run_trial", run_trial)
    report = bench(bundle, dataclasses.replace(QUICK, lengths=(48, 96)), plot=False)
    assert started == ["kernel"]
    assert [row.status for row in report.rows] == ["over limit", "over limit"]
    assert report.rows[1].reason == "not started: over limit at 48 tokens already"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, (512, 1024, 2048, 4096)),
        (4098, (512, 1024, 2048, 4096)),
        (4096, (512, 1024, 2048, 4096)),
        (512, (128, 256, 512)),
        (3000, (512, 1024, 2048, 3000)),
        (1, (1,)),
    ],
)
def test_default_lengths(bundle: Bundle, limit: int | None, expected: tuple[int, ...]) -> None:
    manifest = dataclasses.replace(bundle.manifest, max_length=limit)
    assert resolve_lengths(BenchSettings(), manifest) == expected


def test_lengths_beyond_the_model_are_refused(bundle: Bundle) -> None:
    with pytest.raises(InvalidRequest, match="--lengths 512: the model accepts 256 tokens at most"):
        bench(bundle, dataclasses.replace(QUICK, lengths=(64, 512)))


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 0},
        {"iterations": 0},
        {"rounds": 0},
        {"threads": -1},
        {"warm_up_ms": -1},
        {"duration_s": -1},
        {"time_limit_s": 0},
        {"memory_limit_bytes": 0},
        {"global_tokens": -1},
        {"against": ("fastest",)},
        {"providers": ()},
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="--"):
        BenchSettings(**change)


def test_global_tokens_need_an_input_for_them(bundle: Bundle) -> None:
    with pytest.raises(InvalidRequest, match="no input for global tokens"):
        bench(bundle, dataclasses.replace(QUICK, global_tokens=2))


def test_inputs_have_no_padding_and_the_wanted_global_tokens(bundle: Bundle) -> None:
    from longspan.exporter.manifest import InputRecord

    mask = InputRecord("global_attention_mask", "int64", ("batch", "sequence"), "global_mask")
    manifest = dataclasses.replace(bundle.manifest, inputs=(*bundle.manifest.inputs, mask))
    feed = bench_inputs(manifest, 10, dataclasses.replace(QUICK, batch=2, global_tokens=3))
    assert feed["attention_mask"].all()
    assert feed["global_attention_mask"].tolist() == [[1, 1, 1] + [0] * 7] * 2


def test_a_missing_provider_is_named(bundle: Bundle) -> None:
    with pytest.raises(EnvironmentLacks, match=r"NoSuchProvider: this ONNX Runtime has .*CPUExecutionProvider"):
        bench(bundle, dataclasses.replace(QUICK, providers=("NoSuchProvider",)))


def test_without_matplotlib_the_report_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    report = bench(bundle, QUICK)
    assert any("pip install 'longspan[report]'" in note for note in report.notes)
    assert (bundle.reports_path / "bench.json").is_file()
    assert not (bundle.reports_path / "bench.png").exists()


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (
            Crossover("stock", "from", 811, 512, 4096, 12.34),
            "longspan kernel is faster than stock export from about 811 tokens (12.3x at 4096 tokens)",
        ),
        (
            Crossover("dense", "always", None, 512, 4096, 2.0),
            "longspan kernel is faster than dense SDPA at every measured length (2x at 4096 tokens)",
        ),
        (
            Crossover("dense", "never", None, 512, 4096, 0.5),
            "longspan kernel is not faster than dense SDPA up to 4096 tokens (0.5x at 4096 tokens)",
        ),
        (
            Crossover("stock", "unknown", None, None, None, None),
            "longspan kernel and stock export were not measured at the same length",
        ),
    ],
)
def test_crossovers_in_words(found: Crossover, text: str) -> None:
    assert describe_crossover(found, "kernel") == text
