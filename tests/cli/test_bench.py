"""``longspan bench``: exit codes, and what is printed where."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
from longspan.cli.bench import verdict
from longspan.cli.main import run
from longspan.exporter import throughput
from longspan.exporter.throughput.benchmark import bench
from longspan.exporter.throughput.report import BenchReport, Row
from longspan.exporter.throughput.saved import to_json
from longspan.exporter.throughput.settings import BenchSettings
from longspan.exporter.throughput.statistics import Crossover, Latency
from longspan.exporter.throughput.variants import Variant

QUICK = ["--lengths", "48", "--iterations", "1", "--duration", "0", "--warm-up", "0"]


@pytest.fixture
def bundle(bert_bundle: Path, tmp_path: Path) -> str:
    """Folder of a copy of the small bundle."""
    return str(shutil.copytree(bert_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def report(bert_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchReport:
    """A report of the kernel alone."""
    folder = shutil.copytree(bert_bundle, tmp_path_factory.mktemp("bench") / "bundle")
    settings = BenchSettings(lengths=(48,), iterations=1, duration_s=0, warm_up_ms=0, against=())
    return bench(folder, settings, plot=False)


def test_prints_a_table_the_crossovers_and_where_the_report_is(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", bundle, "--against", "body,dense", "--no-plot", *QUICK]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "BertModel: 2 x SlidingWindowAttention (8 left, 8 right)"
    header = next(line for line in lines if line.startswith("tokens"))
    assert header.split() == [
        "tokens",
        "variant",
        "p50",
        "ms",
        "p90",
        "p99",
        "spread",
        "runs",
        "tokens/s",
        "MiB",
        "ratio",
    ]
    kernel, body, dense = (
        next(line for line in lines if name in line) for name in ("48 longspan", "function", "dense")
    )
    # The ratio is the last column, so nothing was cut off at the 80 columns of a pipe.
    assert kernel.split()[-1] == "1.00"
    assert float(body.split()[-1]) > 0 and float(dense.split()[-1]) > 0
    assert any("longspan kernel is" in line and "dense SDPA" in line for line in lines)
    assert lines[-1].startswith("report: ")
    assert json.loads(Path(bundle, "reports", "bench.json").read_text())["settings"]["against"] == ["body", "dense"]
    # Silent where stderr is no terminal.
    assert captured.err == ""


def test_json_on_stdout_is_json_alone(
    bundle: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["bench", bundle, "--against", "none", "--no-plot", "--json", "-", *QUICK]
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/longspan", *arguments])
    assert run(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in printed["rows"]] == ["kernel"]
    assert printed["command"].startswith(f"longspan bench {bundle} ")


def test_json_to_a_file(bundle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "bench.json"
    assert run(["bench", bundle, "--against", "none", "--no-plot", "--json", str(file), *QUICK]) == 0
    assert file.read_bytes() == Path(bundle, "reports", "bench.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--lengths", "300"], 2, "the model accepts 256 tokens at most"),
        (["--lengths", "0"], 2, "must be 1 or more"),
        (["--lengths", "many"], 2, "not a list of whole numbers"),
        (["--against", "fastest"], 2, "allowed: body, dense, stock, none"),
        (["--iterations", "0"], 2, "--iterations: must be 1 or more"),
        (["--global-tokens", "1"], 2, "no input for global tokens"),
        (["--json", "no/such/folder/bench.json"], 2, "its folder does not exist"),
        (["--device", "cuda"], 4, "pip install onnxruntime-gpu"),
    ],
)
def test_bad_arguments(
    arguments: list[str], code: int, text: str, bert_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", str(bert_bundle), *arguments]) == code
    assert text in capsys.readouterr().err


def test_no_bundle_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_without_onnxruntime(
    bert_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert run(["bench", str(bert_bundle)]) == 4
    assert "pip install 'longspan[cpu]'" in capsys.readouterr().err


def test_require_kernel_without_the_library(
    bert_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = Variant("kernel", None, unavailable="liblongspan_ort.so is not installed")
    monkeypatch.setattr(throughput.benchmark, "kernel_variant", lambda *_: missing)
    assert run(["bench", str(bert_bundle), "--require-kernel", *QUICK]) == 5
    assert "liblongspan_ort.so is not installed" in capsys.readouterr().err


def test_a_broken_bundle_is_a_failure_and_a_broken_baseline_is_not(
    report: BenchReport, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = dataclasses.replace(report, rows=(*report.rows, Row("stock", 48, "crashed", "SIGSEGV")))
    assert verdict(baseline, None) == 0
    broken = dataclasses.replace(report, rows=(*report.rows, Row("body", 48, "crashed", "SIGSEGV")))
    assert verdict(broken, None) == 1
    assert "function body crashed at 48 tokens: SIGSEGV" in capsys.readouterr().err


def test_min_speedup(report: BenchReport, capsys: pytest.CaptureFixture[str]) -> None:
    # Faster than body by less than asked does not count: it is the same bundle.
    body, dense = (Crossover(name, "always", None, 48, 48, ratio) for name, ratio in (("body", 1.1), ("dense", 3.0)))
    fast = dataclasses.replace(report, crossovers=(body, dense))
    assert verdict(fast, 3.0) == 0
    assert verdict(fast, 3.1) == 1
    assert "3x against dense at 48 tokens, below 3.1x" in capsys.readouterr().err
    # A promise that was not measured is not kept.
    assert verdict(report, 1.0) == 1
    assert "neither dense SDPA nor the stock export was measured" in capsys.readouterr().err


@pytest.fixture(scope="module")
def saved(report: BenchReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved report of 60 samples, and beside it one that was twice as fast."""
    folder = tmp_path_factory.mktemp("saved")
    (row,) = report.rows
    for name, factor in (("now.json", 2), ("before.json", 1)):
        samples = tuple(factor * (1_000_000 + 1000 * index) for index in range(60))
        latency = Latency.of([sample / 1e6 for sample in samples])
        one = dataclasses.replace(report, rows=(dataclasses.replace(row, samples_ns=(samples,), latency=latency),))
        (folder / name).write_text(to_json(one))
    return folder


def test_a_regression_fails_and_is_named(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now, before, page = str(saved / "now.json"), str(saved / "before.json"), tmp_path / "bench.html"
    assert run(["bench", now, "--compare", before, "--html", str(page), "--no-plot"]) == 1
    captured = capsys.readouterr()
    assert "longspan kernel at 1 x 48 tokens: 2.000 times as long" in captured.out
    assert "failed: --compare" in captured.err and "regressed" in captured.err
    assert "Slower than before" in page.read_text()
    # Twice as long is allowed where that is said, and the other way round it is faster.
    assert run(["bench", now, "--compare", before, "--regression", "150%"]) == 0
    assert run(["bench", before, "--compare", now]) == 0
    assert "faster" in capsys.readouterr().out


def test_another_machine_is_refused_unless_forced(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads((saved / "before.json").read_text())
    data["machine"]["cpu"] = "Another CPU"
    other = saved / "elsewhere.json"
    other.write_text(json.dumps(data))
    assert run(["bench", str(saved / "now.json"), "--compare", str(other)]) == 2
    assert "was Another CPU" in capsys.readouterr().err
    assert run(["bench", str(saved / "now.json"), "--compare", str(other), "--force-compare"]) == 1
    assert "what else differs: processor" in capsys.readouterr().out


def test_measured_and_compared_at_once(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--against", "none", "--no-plot", *QUICK]
    assert run(["bench", bundle, *quick]) == 0
    file = str(Path(bundle, "reports", "bench.json"))
    capsys.readouterr()
    # One sample each: whatever the ratio, it is below a thousandfold. The file compared with is the one replaced.
    assert run(["bench", bundle, *quick, "--compare", file, "--regression", "1000"]) == 0
    assert "longspan kernel at 1 x 48 tokens" in capsys.readouterr().out
    assert json.loads(Path(file).read_text())["comparison"]["rows"][0]["length"] == 48
    assert "Against" in Path(bundle, "reports", "bench.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--compare", "none.json"], "cannot be read"),
        (["--compare", "{saved}", "--regression", "much"], "is not a fraction"),
        (["--compare", "{saved}", "--regression", "-1%"], "must be 0 or more"),
        (["--compare", "{saved}", "--lengths", "64"], "none is measured now"),
        (["--compare", "{saved}", "--threads", "1"], "threads: 1, was 0"),
        (["--html", "no/such/folder/bench.html"], "its folder does not exist"),
    ],
)
def test_comparisons_that_cannot_be_are_refused_before_anything_is_measured(
    arguments: list[str],
    text: str,
    bert_bundle: Path,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(throughput.benchmark, "run_trial", None)
    given = [argument.format(saved=saved / "before.json") for argument in arguments]
    # The last of an option given twice counts.
    assert run(["bench", str(bert_bundle), "--against", "none", *QUICK, *given]) == 2
    assert text in capsys.readouterr().err


def test_a_saved_report_alone_is_nothing_to_measure(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", str(saved / "now.json")]) == 2
    assert "nothing can be measured" in capsys.readouterr().err
