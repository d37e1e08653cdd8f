"""A stand-in for TensorRT: TensorRT-RTX under its name, where only the latter can be installed.

The two share their API but for a few members; what differs (plugins in networks, timing on a GPU) is for `tests/trt`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ARCHITECTURE = "sm89"


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = "10.14.1.48") -> None:
    """Make ``import tensorrt`` work, here and in child processes, and pretend that there is a GPU."""
    from longspan.exporter.devices import Gpu

    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    (folder / "tensorrt").mkdir(parents=True)
    (folder / "tensorrt" / "__init__.py").write_text(
        f"from tensorrt_rtx import *\nfrom tensorrt_rtx import __version__\n__version__ = {version!r}\n"
    )
    monkeypatch.syspath_prepend(folder)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr("longspan.exporter.engines.builder.cuda_gpu", lambda: Gpu("Stand-in GPU", ARCHITECTURE))
