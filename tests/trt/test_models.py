"""Engines of whole models: built, checked like their bundles, timed, and refused where they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from longspan.cli.main import run
from longspan.exporter import check
from longspan.exporter.bundle import Bundle
from longspan.exporter.engines import BuildRequest, build
from longspan.exporter.engines.manifest import Engine
from longspan.exporter.manifest import sha256_of
from longspan.exporter.whole_folders import MANIFEST_FILE
from longspan.plugins.tensorrt.aot import unsupported

from .conftest import version_of
from .engines_of_models import MODELS, exported, largest


@pytest.fixture(scope="module", params=list(MODELS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(request.param, tmp_path_factory.mktemp(request.param))


def built(bundle: Path, name: str, **options: object) -> Engine:
    """An engine for up to 3 rows and 128 tokens."""
    request = BuildRequest("tensorrt", name=name, max_shapes=(largest(bundle, 3, 128),), **options)  # type: ignore[arg-type]
    return build(bundle, request)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_an_engine_with_the_plugin_computes_what_its_model_does(bundle: Path, dtype: str) -> None:
    engine = built(bundle, f"plugin-{dtype}", dtype=dtype)
    report = check(bundle, engine=engine.name, require_kernel=True)
    assert report.passed, report.failures
    assert Engine.open(Bundle.open(bundle), engine.name).manifest.status.startswith("ran on ")


def test_an_engine_of_function_bodies_computes_what_its_model_does(bundle: Path) -> None:
    engine = built(bundle, "bodies", plugin_api="none")
    assert check(bundle, engine=engine.name).passed
    assert run(["check", str(bundle), "--engine", engine.name, "--require-kernel"]) == 5


def test_an_engine_with_an_ahead_of_time_plugin_computes_what_its_model_does(bundle: Path) -> None:
    reason = unsupported(version_of("tensorrt"))
    if reason:
        pytest.skip(reason)
    if any("global_mask" in site.inputs for site in Bundle.open(bundle).manifest.sites):
        pytest.skip("one kernel does not execute sites with global tokens")
    engine = built(bundle, "aot", plugin_api="aot")
    assert check(bundle, engine=engine.name, require_kernel=True).passed


def test_several_profiles(bundle: Path) -> None:
    request = BuildRequest(
        "tensorrt",
        name="profiles",
        min_shapes=(largest(bundle, 1, 1), largest(bundle, 1, 33)),
        opt_shapes=(largest(bundle, 1, 32), largest(bundle, 1, 96)),
        max_shapes=(largest(bundle, 4, 32), largest(bundle, 1, 128)),
    )
    build(bundle, request)
    assert check(bundle, engine="profiles", require_kernel=True).passed


def test_an_engine_is_timed(bundle: Path) -> None:
    engine = built(bundle, "timed")
    options = ["--lengths", "64", "--against", "none", "--iterations", "5", "--duration", "0.01", "--warm-up", "1"]
    assert run(["bench", str(bundle), "--engine", engine.name, "--require-kernel", *options]) == 0


def test_what_does_not_fit_is_refused(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = built(bundle, "misfit")
    file = engine.path / MANIFEST_FILE
    right = file.read_text()

    def refused(code: int, words: str, **changes: object) -> None:
        file.write_text(json.dumps(json.loads(right) | changes))
        assert run(["check", str(bundle), "--engine", "misfit", "--lengths", "16"]) == code
        error = capsys.readouterr().err.strip()
        assert words in error and len(error.splitlines()) == 1

    refused(4, "was built for sm50", compute_capabilities=["sm50"])
    refused(4, "was built with TensorRT 9.3.0", versions={"tensorrt": "9.3.0"}, plugin=None)
    refused(2, "without its weights", options={"strip": True})
    engine.file.write_bytes(engine.file.read_bytes()[: engine.file.stat().st_size // 2])
    refused(3, "differs from what was written")
    refused(3, "is not a whole engine", files={engine.file.name: sha256_of(engine.file)})
