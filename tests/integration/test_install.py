"""The package installs without a compiler, and says what that costs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_wheel_without_a_compiler_has_everything_but_the_library(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    environment = os.environ | {"CXX": "/no/compiler", "PIP_NO_INPUT": "1"}
    settings = ["--config-settings", f"build-dir={tmp_path / 'build'}"]
    finished = subprocess.run(
        [*command, *settings, str(PROJECT)], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith((".so", ".cc", ".h", ".cmake"))]
    for name in (
        "exporter/pipeline.py",
        "plugins/py.typed",
        "plugins/sliding_window_attention/function.py",
        "cli/main.py",
    ):
        assert f"longspan/{name}" in names
