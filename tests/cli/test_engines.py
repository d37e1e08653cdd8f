"""``longspan check`` and ``longspan bench`` on an engine: what is printed, and which exit code each refusal has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from longspan.cli.main import run
from longspan.exporter.devices import Gpu
from longspan.exporter.manifest import sha256_of
from longspan.exporter.whole_folders import MANIFEST_FILE

from ..exporter.engines.hand_made import make_ort_engine, make_tensorrt_engine, plugin_layers, profile, stand_in

Copy = Callable[[Path], Path]

QUICK = ["--against", "none", "--iterations", "3", "--duration", "0.01", "--warm-up", "1", "--no-plot"]


@pytest.fixture
def bundle(longformer_bundle: Path, copied: Copy) -> Path:
    return copied(longformer_bundle)


def refused(arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refusal prints."""
    assert run(arguments) == code
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    return error


def test_check(bundle: Path, kernel_library: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_ort_engine(bundle, profiles=(profile(bundle, (1, 9), (2, 60)),))
    assert run(["check", str(bundle), "--engine", "ort", "--require-kernel", "--max-length", "20"]) == 0
    out = capsys.readouterr().out
    assert "engine ort: kernel at 2 of 2 sites (onnxruntime" in out and "float32)" in out
    assert "outside its optimization profiles: lengths 1, 5, 6, 8: the engine takes 9 to 60 tokens" in out
    assert "checked instead: 2, 1" in out and "by engine ort" in out
    assert "reports/engines/ort/check.html" in out and "--max-length 256 checks them all" not in out


def test_judged_again(bundle: Path, kernel_library: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_ort_engine(bundle)
    assert run(["check", str(bundle), "--engine", "ort", "--lengths", "20", "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["engine"]["name"] == "ort" and [path["name"] for path in printed["paths"]] == ["engine ort"]
    page = (bundle / "reports" / "engines" / "ort" / "check.html").read_text()
    assert f"longspan check {bundle} --engine ort --judge --rtol" in " ".join(page.split())
    assert run(["check", str(bundle), "--engine", "ort", "--judge", "--require-kernel"]) == 0
    assert run(["check", str(bundle), "--engine", "ort", "--judge", "--atol", "0"]) == 1
    assert "by engine ort" in capsys.readouterr().out
    assert run(["check", str(bundle), "--judge"]) == 2


def test_a_kernel_that_is_required_and_not_there(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_ort_engine(bundle, kernel=False)
    line = refused(["check", str(bundle), "--engine", "ort", "--require-kernel"], 5, capsys)
    assert "function body at 2 of 2 sites" in line
    assert run(["check", str(bundle), "--engine", "ort", "--lengths", "9"]) == 0
    capsys.readouterr()
    refused(["check", str(bundle), "--engine", "ort", "--judge", "--require-kernel"], 5, capsys)
    refused(["bench", str(bundle), "--engine", "ort", "--require-kernel", *QUICK], 5, capsys)


def test_bench(bundle: Path, kernel_library: str, capsys: pytest.CaptureFixture[str]) -> None:
    make_ort_engine(bundle)
    assert run(["bench", str(bundle), "--engine", "ort", "--lengths", "24", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "note: engine ort: CPUExecutionProvider, fp32, kernel at 2 sites" in out and "ratio: to engine" in out
    page = (bundle / "reports" / "bench.html").read_text()
    assert "engine ort" in page


@pytest.mark.parametrize("command", ["check", "bench"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "none"], "the bundle has no such engine; it has: ort"),
        (["--engine", "ort", "--device", "cpu"], "leave out --device"),
        (["--engine", "ort", "--lengths", "9,61"], "--lengths 61: the engine takes 9 to 60 tokens"),
    ],
)
def test_usage(
    bundle: Path, command: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_ort_engine(bundle, profiles=(profile(bundle, (1, 9), (2, 60)),))
    assert message in refused([command, str(bundle), *arguments], 2, capsys)


@pytest.mark.parametrize("command", ["check", "bench"])
def test_a_corrupted_engine(bundle: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    engine = make_ort_engine(bundle)
    content = engine.file.read_bytes()
    engine.file.write_bytes(content[: len(content) // 2])
    assert "differs from what was written (SHA-256)" in refused([command, str(bundle), "--engine", "ort"], 3, capsys)
    manifest = json.loads((engine.path / MANIFEST_FILE).read_text())
    manifest["files"][engine.file.name] = sha256_of(engine.file)
    (engine.path / MANIFEST_FILE).write_text(json.dumps(manifest))
    if command == "check":
        assert "ONNX Runtime cannot run it" in refused([command, str(bundle), "--engine", "ort"], 3, capsys)


@pytest.mark.parametrize("command", ["check", "bench"])
def test_tensorrt_that_is_not_here(
    bundle: Path, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch)
    monkeypatch.setattr("longspan.exporter.engines.runtimes.importlib.util.find_spec", lambda name: None)
    make_tensorrt_engine(bundle)
    assert "needs TensorRT 10.14.1.48, which is not installed" in refused(
        [command, str(bundle), "--engine", "trt"], 4, capsys
    )
    assert not (bundle / "reports").exists()


@pytest.mark.parametrize("command", ["check", "bench"])
@pytest.mark.parametrize(
    ("facts", "options", "code", "message"),
    [
        ({"gpu": None}, {}, 4, "was built for sm89 and needs such a GPU"),
        ({"gpu": Gpu("Older GPU", "sm80")}, {}, 4, "was built for sm89; the GPU here, Older GPU, is sm80"),
        ({"version": "11.1.0"}, {}, 4, "was built with TensorRT 10.14.1.48, here is 11.1.0"),
        ({"major": 11}, {}, 4, "is a plugin library for TensorRT 11"),
        ({}, {"strip": True}, 2, "without its weights"),
        ({"fault": "corrupted"}, {}, 3, "is not a whole engine"),
        ({"fault": "crash at open"}, {}, 3, "ended by SIGABRT"),
    ],
)
def test_engines_that_do_not_fit(
    bundle: Path,
    command: str,
    facts: dict[str, object],
    options: dict[str, object],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stand_in(monkeypatch, layers=plugin_layers(bundle), **facts)
    make_tensorrt_engine(bundle, options=options)
    assert message in refused([command, str(bundle), "--engine", "trt"], code, capsys)


def test_another_build_of_the_plugin_library_is_noted_in_every_report(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, layers=plugin_layers(bundle))
    (tmp_path / "own.so").write_bytes(b"another build")
    make_tensorrt_engine(bundle, options={"plugin_library": str(tmp_path / "own.so")})
    note = "the plugin library own.so is not the one that the engine was built with (SHA-256)"
    assert run(["check", str(bundle), "--engine", "trt", "--lengths", "9"]) == 0
    assert f"engine trt: {note}" in capsys.readouterr().out
    folder = bundle / "reports" / "engines" / "trt"
    assert all(note in (folder / f"check.{kind}").read_text() for kind in ("json", "junit.xml", "html"))


def test_a_crash_at_one_length_fails_the_check(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, layers=plugin_layers(bundle), fault="crash at 20")
    make_tensorrt_engine(bundle)
    assert run(["check", str(bundle), "--engine", "trt", "--lengths", "9,20"]) == 1
    assert "ended by SIGABRT: cudaErrorIllegalAddress" in capsys.readouterr().out
