"""The sample runs, and prints what its expected output says where that does not depend on the machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SAMPLE = Path(__file__).parents[2] / "samples" / "bigbird"


def test_it_prints_what_is_expected(tmp_path: Path, kernel_library: str) -> None:
    command = [sys.executable, SAMPLE / "run.py", "--out", tmp_path / "out", "--quick"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    expected = (SAMPLE / "expected_output.txt").read_text(encoding="utf-8")
    for text in (expected, finished.stdout):
        assert re.search(r"encoder\.layer\.0–1\.attention\.self ×2 +BlockSparseAttention +block sparse +16x16 +4", text)
        assert "2 sites replaced, up to 4,096 tokens" in text
        assert re.search(r"^pass: \d+ cases", text, re.MULTILINE)
        assert text.count("ran at 2 of 2 sites") == 2
        rows = re.findall(r"^ *([\d,]+) +(\S+e[+-]\d+) +(\S+e[+-]\d+)$", text, re.MULTILINE)
        assert len(rows) >= 3
        for tokens, exported, after in rows:
            assert float(exported) < 1e-5
            # Up to 176 tokens full attention is what the model has.
            assert (float(after) > 1e-3) == (int(tokens.replace(",", "")) > 176)
