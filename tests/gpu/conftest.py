"""Everything here needs a CUDA device; without one it is skipped, and the report says why.

With ``--require-gpu`` a missing device is an error instead: for machines that are known to have one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where this folder is named on the command line, as ``make gpu`` does."""
    parser.addoption("--require-gpu", action="store_true", help="fail, do not skip, where there is no CUDA device")


def missing() -> str:
    """What the tests of this folder lack, or ""."""
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set: kernels would be interpreted on the CPU"
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", which is built without CUDA"
        return f"no CUDA device (torch {torch.__version__}{built})"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0, which the kernels need"
    return ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is in this folder, and skip it where the device is missing."""
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    for item in ours:
        item.add_marker(pytest.mark.gpu)
    reason = missing() if ours else ""
    if not reason:
        return
    if config.getoption("--require-gpu", default=False):
        raise pytest.UsageError(f"--require-gpu: {reason}")
    for item in ours:
        item.add_marker(pytest.mark.skip(reason=f"GPU tests: {reason}"))
