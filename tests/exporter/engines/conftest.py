"""Bundles with engines; built once, never written to (copy them to change them)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def rtx_bundle(longformer_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a small Longformer with an engine ``x`` of TensorRT-RTX for sm89, up to 2 x 64 tokens."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from longspan.exporter.engines import BuildRequest, build

    bundle = Path(shutil.copytree(longformer_bundle, tmp_path_factory.mktemp("rtx") / "bundle"))
    shapes = ("input_ids:[2,64]",)
    build(bundle, BuildRequest("tensorrt-rtx", max_shapes=shapes, name="x", compute_capabilities=("sm89",)))
    return bundle
