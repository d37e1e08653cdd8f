"""Bundles that several folders of tests read; exported once, never written to (copy them to change them)."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from longspan.exporter import Conversion, SourceRequest, export
from longspan.exporter.kernel_packs import targets_of
from longspan.plugins import LibraryMissing, ort_library_path

from .exporter.models import BERT, LONGFORMER, write_config
from .shared import made_once


def exported(factory: pytest.TempPathFactory, name: str, model: dict[str, Any], **options: Any) -> Path:
    """A bundle of a small model with random weights."""

    def make(folder: Path) -> None:
        config = write_config(folder / "source", model)
        export(SourceRequest(str(config), random_weights=True), folder / "bundle", **options)

    return made_once(factory, name, make) / "bundle"


@pytest.fixture(scope="session")
def longformer_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A faithful bundle: windows of 8 and 16, padding, global tokens, up to 256 tokens."""
    return exported(tmp_path_factory, "longformer", LONGFORMER)


@pytest.fixture(scope="session")
def bert_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An approximating bundle: dense attention cut to a window of 16, positions extended from 64 to 256."""
    return exported(tmp_path_factory, "bert", BERT, conversion=Conversion(window=16, max_positions=256))


@pytest.fixture(scope="session")
def gpu_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with GPU kernels for sm_80 and as PTX inside its model: a window of 16, two layers."""
    pytest.importorskip("triton")
    return exported(tmp_path_factory, "gpu", BERT, conversion=Conversion(window=16), gpu=targets_of("sm_80"))


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a bundle, for a test that changes it."""
    return lambda bundle: Path(shutil.copytree(bundle, tmp_path / "copied"))


@pytest.fixture(scope="session")
def kernel_library() -> str:
    """File of the compiled library; tests of the kernel are skipped in an installation without it."""
    try:
        return ort_library_path()
    except LibraryMissing as error:
        pytest.skip(str(error))


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that was built without a C++ compiler."""

    def missing() -> str:
        raise LibraryMissing("liblongspan_ort.so is not installed")

    monkeypatch.setattr("longspan.exporter.parity.runners.ort_library_path", missing)


@pytest.fixture
def small_files() -> Iterator[None]:
    """The system refuses to write any file beyond 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
