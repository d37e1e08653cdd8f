"""Tests that need a GPU are reported as skipped, with the reason, where there is none; they never pass silently."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .gpu.conftest import missing

pytest.importorskip("torch")
pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]


def run_gpu_tests(*options: str) -> subprocess.CompletedProcess[str]:
    """A few of the GPU tests in a process that sees no device."""
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_kernels.py", "-q", "-p", "no:cacheprovider", *options]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_without_a_device_every_test_is_skipped_for_a_reason() -> None:
    done = run_gpu_tests("-m", "gpu")  # the marker is on all of them
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"\d+ skipped in .*", last), last
    counts = re.findall(r"^SKIPPED \[(\d+)\] tests/gpu/.*: GPU tests: no CUDA device \(torch .*\)$", done.stdout, re.M)
    assert sum(map(int, counts)) == int(last.split()[0]) > 300


def test_where_a_device_is_required_its_absence_is_an_error() -> None:
    done = run_gpu_tests("--require-gpu")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--require-gpu: no CUDA device" in done.stderr


def test_an_interpreted_run_is_no_gpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET=1 is set" in missing()
