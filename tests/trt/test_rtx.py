"""Engines of TensorRT-RTX on a GPU that it builds for: checked like their bundles, and timed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from longspan.cli.main import run
from longspan.exporter import check
from longspan.exporter.engines import BuildRequest, build

from .engines_of_models import MODELS, exported, largest


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_engine_computes_what_its_model_does(name: str, dtype: str, tmp_path: Path) -> None:
    bundle = exported(name, tmp_path)
    build(bundle, BuildRequest("tensorrt-rtx", name="rtx", dtype=dtype, max_shapes=(largest(bundle, 3, 128),)))
    report = check(bundle, engine="rtx")
    assert report.passed, report.failures
    options = ["--lengths", "64", "--against", "none", "--iterations", "5", "--duration", "0.01", "--warm-up", "1"]
    assert run(["bench", str(bundle), "--engine", "rtx", *options]) == 0
