"""The sample runs, and prints what its expected output says where that does not depend on the machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SAMPLE = Path(__file__).parents[2] / "samples" / "windowed_decoder"


def test_it_prints_what_is_expected(tmp_path: Path) -> None:
    command = [sys.executable, SAMPLE / "run.py", "--out", tmp_path / "out"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    expected = (SAMPLE / "expected_output.txt").read_text(encoding="utf-8")
    for text in (expected, finished.stdout):
        assert re.search(r"model\.layers\.0–1\.self_attn ×2 +SlidingWindowAttention +causal window +31\+0 +4/2", text)
        assert "2 sites replaced, up to 2,048 tokens" in text
        assert re.search(r"^pass: \d+ cases", text, re.MULTILINE)
        assert "ran at 2 of 2 sites" in text
