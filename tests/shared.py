"""What several worker processes of one run of the tests need, made by the first of them that asks."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that one process of this run fills, and a copy of it for each that asks.

    Exporting and tracing models takes seconds each; a fixture of scope session is made again by every worker of
    pytest-xdist.

    Args:
        factory: Of the worker.
        name: Of the folder.
        make: Fills it; run once, while the others wait.

    Returns:
        A copy of the worker's own.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    made, done = root / f"made-{name}", root / f"made-{name}.done"
    with (root / f"{made.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            make(made)
            done.touch()
    return Path(shutil.copytree(made, factory.mktemp(name) / name))
