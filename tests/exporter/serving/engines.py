"""Engines of TensorRT as the server gets them: files that nothing here reads, with true manifests."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from longspan.exporter import Bundle
from longspan.exporter.engines import BuildRequest, Engine, EngineManifest, build
from longspan.exporter.engines.manifest import ENGINE_FILE, ENGINES_FOLDER, NOT_RUN, PluginRecord
from longspan.exporter.engines.profiles import profiles_of
from longspan.exporter.manifest import sha256_of
from longspan.exporter.serving import triton_repository
from longspan.plugins import LibraryMissing

PLUGINS, LOADER = "liblongspan_trt10.so", "liblongspan_trt10_loader.so"


def tensorrt_engine(
    bundle: Path,
    name: str,
    gpu: str = "sm89",
    *,
    batches: Sequence[tuple[int, int, int]] = ((1, 2, 4),),
    longest: int = 64,
    plugin: Path | None = None,
    **values: Any,
) -> Engine:
    """Write an engine.

    Args:
        bundle: Whose it is.
        name: Of its folder.
        gpu: Its compute capability; empty for none.
        batches: Smallest, best and largest batch of each profile.
        longest: Tokens at most.
        plugin: Plugin library that it was built with; None for none.
        values: Other fields of the manifest.
    """
    opened = Bundle.open(bundle)
    folder = bundle / ENGINES_FOLDER / name
    folder.mkdir(parents=True)
    (folder / ENGINE_FILE).write_bytes(b"engine " + name.encode())
    first = opened.manifest.inputs[0].name
    shapes = [
        [f"{first}:[{batch[bound]},{length}]" for batch in batches]
        for bound, length in ((0, 1), (1, longest // 2), (2, longest))
    ]
    manifest = EngineManifest(
        target="tensorrt", file=ENGINE_FILE, dtype="fp16", kept_in_fp32={},
        compute_capabilities=(gpu,) if gpu else (), device="a GPU", profiles=profiles_of(opened.manifest, *shapes),
        options={}, plugin=None if plugin is None else PluginRecord("v3", plugin.name, sha256_of(plugin), ()),
        sites=(), model_sha256=opened.manifest.files["model.onnx"], versions={"tensorrt": "10.14.1.48"},
        status=NOT_RUN, build_s=1.0, created="2026-01-01T00:00:00+00:00",
        files={ENGINE_FILE: sha256_of(folder / ENGINE_FILE)},
    )  # fmt: skip
    manifest = dataclasses.replace(manifest, **values)
    (folder / "manifest.json").write_text(manifest.to_json())
    return Engine(folder, manifest)


@pytest.fixture
def served(longformer_bundle: Path, tmp_path: Path) -> Path:
    """A copy of a bundle to put engines into; its name is ``encoder``."""
    return Path(shutil.copytree(longformer_bundle, tmp_path / "encoder"))


@pytest.fixture(scope="session")
def ort_bundle(longformer_bundle: Path, kernel_library: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, ``encoder``, with builds for ONNX Runtime on the CPU: ``half`` in float16 and ``single``."""
    bundle = Path(shutil.copytree(longformer_bundle, tmp_path_factory.mktemp("served") / "encoder"))
    build(bundle, BuildRequest("ort", dtype="fp16", name="half"))
    build(bundle, BuildRequest("ort", name="single"))
    return bundle


@pytest.fixture
def plugin_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Longspan's plugin library for TensorRT 10, with its loader beside it."""
    folder = tmp_path / "installed"
    folder.mkdir()
    for name in (PLUGINS, LOADER):
        (folder / name).write_bytes(name.encode())

    def find(name: str) -> Callable[[int], str]:
        def path(major: int) -> str:
            if major != 10:
                raise LibraryMissing(f"there is no library for TensorRT {major}")
            return str(folder / name)

        return path

    monkeypatch.setattr(triton_repository, "tensorrt_library_path", find(PLUGINS))
    monkeypatch.setattr(triton_repository, "tensorrt_loader_path", find(LOADER))
    return folder / PLUGINS
