"""``longspan package``: what is printed, what is refused, and with which code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from longspan.cli.main import run

from ..exporter.serving.engines import LOADER, ort_bundle, plugin_library, served, tensorrt_engine

pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")

__all__ = ["ort_bundle", "plugin_library", "served"]


def test_it_prints_versions_and_how_to_start(
    served: Path, plugin_library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensorrt_engine(served, "engine", plugin=plugin_library)
    tensorrt_engine(served, "rtx", target="tensorrt-rtx")
    out = tmp_path / "repo"
    assert run(["package", str(served), "--triton-server", str(out), "--name", "model", "--mount", "/srv/x"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        "model version 1: engine, fp16, sm89, built, not run",
        "left out: rtx: the server has no backend for TensorRT-RTX, and its TensorRT backend does not read such engines"
        "; next step: longspan build --target tensorrt on the GPU that serves, or --target ort",
        "start: tritonserver --model-repository=/srv/x/models "
        f"--backend-config=tensorrt,plugins=/srv/x/plugins/{LOADER}",
        f"how to start and call it: {out / 'README.md'}",
    ]


def test_options_reach_the_configuration(ort_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "repo"
    arguments = ["package", str(ort_bundle), "--triton-server", str(out), "--engine", "single", "--engine", "half"]
    assert run([*arguments, "--max-batch-size", "16", "--queue-delay", "5"]) == 0
    text = (out / "models" / "encoder" / "config.pbtxt").read_text()
    assert "max_batch_size: 16" in text and "max_queue_delay_microseconds: 5" in text
    assert sorted(entry.name for entry in (out / "models" / "encoder").iterdir()) == [
        "1",
        "2",
        "config.pbtxt",
        "warmup",
    ]
    assert run(arguments) == 2
    assert run([*arguments, "--force"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "longspan build"),
        (("--engine", "none"), 2, "no such engine"),
        (("--queue-delay", "-1"), 2, "--queue-delay -1"),
        (("--mount", "here"), 2, "--mount here"),
    ],
)
def test_refusals_are_one_line(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, words: str
) -> None:
    assert run(["package", str(served), "--triton-server", str(tmp_path / "repo"), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert words in captured.err
    assert not (tmp_path / "repo").exists()


def test_without_the_servers_schema(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensorrt_engine(served, "engine")
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    assert run(["package", str(served), "--triton-server", str(tmp_path / "repo")]) == 4
    assert "pip install 'longspan[serving]'" in capsys.readouterr().err
