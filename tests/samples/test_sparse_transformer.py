"""The sample runs, and prints what its expected output says where that does not depend on the machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parents[2] / "samples" / "sparse_transformer"


@pytest.mark.slow
def test_it_prints_what_is_expected(tmp_path: Path) -> None:
    command = [sys.executable, SAMPLE / "run.py", "--quick", "--out", tmp_path / "out"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    expected = (SAMPLE / "expected_output.txt").read_text(encoding="utf-8")
    for text in (expected, finished.stdout):
        merged, halves = re.split(r"^\$ longspan export .*strided_heads.*$", text, flags=re.MULTILINE)
        assert re.search(r"blocks\.0–1\.attention ×2 +BlockSparseAttention", merged)
        assert "kernel: ran at 2 of 2 sites" in merged and "2.2 GFLOP instead of 8.59 (74.4% saved)" in merged
        assert "operator: SlidingWindowAttention" in halves
        assert "kernel: ran at 4 of 4 sites" in halves and "0.102 GFLOP instead of 8.59 (98.8% saved)" in halves
        assert len(re.findall(r"^pass: \d+ cases", text, re.MULTILINE)) == 2
