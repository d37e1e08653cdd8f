"""The ONNX Runtime library on CUDA: a bundle with its kernels inside, checked, traced and timed on the device."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

import onnxruntime as ort
from longspan.cli.main import run
from longspan.exporter import Conversion, SourceRequest, export
from longspan.exporter.kernel_packs import targets_of

from ..exporter.models import BERT, LONGFORMER, write_config

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="this ONNX Runtime has no CUDAExecutionProvider; next step: pip install 'longspan[gpu]'",
)


def _bundle(folder: Path, model: str, ptx_only: bool) -> Path:
    """A bundle for the device here, or with an architecture that cannot run here and PTX."""
    import torch
    from longspan.plugins.gpu.variants import ARCHITECTURES

    major, minor = torch.cuda.get_device_capability()
    own = max(known for known in ARCHITECTURES if known <= 10 * major + minor)
    # PTX is for sm_80 and later; machine code of another major version is not loaded.
    chosen = next(known for known in ARCHITECTURES if known // 10 != major) if ptx_only else own
    config = write_config(folder / "source", {"longformer": LONGFORMER, "bert": BERT}[model])
    conversion = Conversion(window=16) if model == "bert" else Conversion()
    request = SourceRequest(str(config), random_weights=True)
    return export(request, folder / "bundle", conversion=conversion, gpu=targets_of(f"sm_{chosen}")).path


@pytest.fixture(scope="module", params=["longformer", "bert"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _bundle(tmp_path_factory.mktemp(request.param), request.param, ptx_only=False)


def test_check_passes_on_the_device_by_the_kernels(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    assert run(["check", str(bundle), "--device", "cuda", "--require-kernel", "--json", str(out)]) == 0
    assert "CUDAExecutionProvider" in out.read_text()


def test_bench_times_the_kernels_on_the_device(bundle: Path) -> None:
    options = ["--lengths", "64", "--against", "none", "--iterations", "5", "--duration", "0.01", "--warm-up", "1"]
    assert run(["bench", str(bundle), "--device", "cuda", "--require-kernel", *options]) == 0


def test_kernels_of_another_architecture_are_translated_from_ptx(tmp_path: Path) -> None:
    made = _bundle(tmp_path, "bert", ptx_only=True)
    assert run(["check", str(made), "--device", "cuda", "--require-kernel"]) == 0
