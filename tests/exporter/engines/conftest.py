"""Bundles with engines; built once, never written to (copy them to change them)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from ...shared import made_once
from . import prepared_graphs


@pytest.fixture(scope="session")
def rtx_bundle(longformer_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of a small Longformer with an engine ``x`` of TensorRT-RTX for sm89, up to 2 x 64 tokens."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    from longspan.exporter.engines import BuildRequest, build

    request = BuildRequest("tensorrt-rtx", max_shapes=("input_ids:[2,64]",), name="x", compute_capabilities=("sm89",))
    return (
        made_once(
            tmp_path_factory,
            "rtx",
            lambda folder: build(shutil.copytree(longformer_bundle, folder / "bundle"), request),
        )
        / "bundle"
    )


@pytest.fixture(scope="session", autouse=True)
def shared_graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`graph_of` traces each model once, in one of the workers."""
    prepared_graphs.factory = tmp_path_factory
    yield
    prepared_graphs.factory = None
