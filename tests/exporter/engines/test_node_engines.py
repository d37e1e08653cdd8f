"""What `tests/trt` hands to TensorRT on a machine that has it is made and built here as far as that goes without."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from longspan.plugins.gpu.pack_build import Target

from ...trt.node_engines import build, case_model
from ...trt.test_operators import RUNS
from .plugin_contract import without_kernels


def test_every_case_becomes_a_plugin() -> None:
    assert len(RUNS) > 90
    for run in RUNS:
        model, feed = case_model(run)
        graph = without_kernels(model, (Target(90),))
        assert [site.lowering for site in graph.sites] == ["plugin"], run.name
        assert {value.name for value in graph.model.graph.inputs} == feed.keys()


@pytest.mark.parametrize(
    "name",
    [
        "SlidingWindowAttention / global, padded",
        "BlockSparseAttention / everything",
        "BlockSparseAttention / block masks",
    ],
)
def test_function_bodies_of_cases_build(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    run = next(run for run in RUNS if run.name.startswith(name))
    engine, library, _ = build(run, "none", "tensorrt-rtx", "sm89", tmp_path)
    assert engine.stat().st_size > 0 and library is None
