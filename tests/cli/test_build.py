"""``longspan build``: what it prints and how it exits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from longspan.cli.main import run

Copy = Callable[[Path], Path]


@pytest.fixture
def bundle(longformer_bundle: Path, copied: Copy) -> str:
    return str(copied(longformer_bundle))


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (text,) = captured.err.splitlines()
    return text


def test_an_engine_without_a_gpu(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    options = ["--compute-capability", "8.9", "--dtype", "fp16", "--max-shapes", "input_ids:[2,64]"]
    assert run(["build", bundle, "--target", "tensorrt-rtx", *options]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    out = captured.out
    assert out.startswith("tensorrt-rtx-sm89-fp16: TensorRT-RTX for sm89, fp16, ")
    assert re.search(r"^attention_mask +1×1 +1×64 +2×64 *$", out, re.MULTILINE)
    assert "✗ plugin: TensorRT-RTX has no plugins" in out and "✓ function body" in out
    assert re.search(r"^\d+ nodes stay in fp32:$", out, re.MULTILINE)
    assert "softmax: a sum of exponentials over many keys" in out
    assert "tensorrt-rtx-sm89-fp16/model.engine: built, not run" in out
    assert out.endswith(f"next: longspan check {bundle} --engine tensorrt-rtx-sm89-fp16\n")


def test_an_optimised_model(bundle: str, kernel_library: str, capsys: pytest.CaptureFixture[str]) -> None:
    # What stands in brackets is no markup.
    bundle = str(Path(bundle).rename(Path(bundle).with_name("model [bold]")))
    assert run(["build", bundle, "--target", "ort", "--name", "mine"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mine: ONNX Runtime, fp32, ") and f"\n{bundle}/engines/mine/model.onnx: run by" in out
    assert "✓ kernel: of liblongspan_ort.so" in out
    assert "run by CPUExecutionProvider" in out
    assert run(["build", bundle, "--target", "ort", "--name", "mine"]) == 2
    assert "holds an engine already" in line(capsys)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--target", "coreml"], 2, "'coreml' is not one of"),
        (["--target", "ort", "--strip"], 2, "--strip has no meaning for --target ort; it is for tensorrt"),
        (["--target", "ort", "--pool-limit", "workspace"], 2, "must be POOL:SIZE, e.g. workspace:1G"),
        (["--target", "tensorrt-rtx"], 2, "--compute-capability is needed where there is no GPU to build for"),
        (["--target", "tensorrt-rtx", "--compute-capability", "sm90"], 2, "sm90: TensorRT-RTX does not build for it"),
        (["--target", "tensorrt-rtx", "--compute-capability", "hopper"], 2, "hopper: must be like sm89"),
        (["--target", "tensorrt-rtx", "--compute-capability", "sm89", "--strip"], 4, "on a GPU only"),
        (
            ["--target", "tensorrt-rtx", "--min-shapes", "input_ids:[1,64]", "--opt-shapes", "input_ids:[1,32]"],
            2,
            "--min-shapes and --opt-shapes: the sequence would go from 64 to 32; allowed: min ≤ opt ≤ max",
        ),
        (
            ["--target", "tensorrt-rtx", "--max-shapes", "input_ids:[1,257]"],
            2,
            "the sequence is 257, the model has positions for 256 tokens",
        ),
        (["--target", "tensorrt-rtx", "--max-shapes", "ids:[1,8]"], 2, "no input 'ids'; allowed: input_ids"),
    ],
)
def test_bad_input_is_one_line(
    bundle: str,
    options: list[str],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("longspan.exporter.engines.builder.cuda_gpu", lambda: None)
    monkeypatch.setattr("longspan.exporter.engines.runtimes.importlib.util.find_spec", lambda name: object())
    assert run(["build", bundle, *options]) == code
    assert message in line(capsys)
    assert not (Path(bundle) / "engines").exists()


@pytest.mark.parametrize(("target", "package"), [("tensorrt", "TensorRT"), ("tensorrt-rtx", "TensorRT-RTX")])
def test_a_target_whose_package_is_missing(
    bundle: str, target: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("longspan.exporter.engines.runtimes.importlib.util.find_spec", lambda name: None)
    assert run(["build", bundle, "--target", target]) == 4
    assert f"{package} is not installed; next step: pip install" in line(capsys)


def test_what_the_builder_refuses(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    options = ["--compute-capability", "sm89", "--pool-limit", "workspace:1K"]
    assert run(["build", bundle, "--target", "tensorrt-rtx", *options]) == 3
    assert "next step: a larger --pool-limit workspace" in line(capsys)
    assert not (Path(bundle) / "engines").exists()


def test_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(tmp_path / "none"), "--target", "ort"]) == 2
    assert "no such folder" in line(capsys)
