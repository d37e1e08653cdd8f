"""Both operators as engines of one node, by each way to TensorRT, against the float64 references."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from longspan.exporter.devices import cuda_gpu
from longspan.exporter.engines.running.inference_process import InferenceEnded
from longspan.plugins.tensorrt.aot import unsupported

from ..plugins.aot_cases import eligible, has_words
from ..plugins.kernel_agreement import CASES, DTYPES, Run, compare
from . import node_engines
from .conftest import version_of


def runs() -> list[Run]:
    """Every case that a network can express; types and layouts take turns, so that each case comes once."""
    made = []
    for operator, module in CASES.items():
        for number, case in enumerate(module.CASES):
            if operator != "BlockSparseAttention" or has_words(case):
                made.append(Run(operator, case, ("bhsd", "bsd")[number % 2], DTYPES[number % len(DTYPES)]))
    return made


RUNS = runs()
EACH = pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])


def _compared(run: Run, api: str, folder: Path) -> str:
    gpu = cuda_gpu()
    assert gpu is not None
    engine, library, feed = node_engines.build(run, api, "tensorrt", gpu.architecture, folder)
    try:
        got = node_engines.execute(engine, library, feed, "tensorrt")
    except InferenceEnded:
        node_engines._process.cache_clear()
        raise
    return compare(run, run.operands("cpu"), got).message


@EACH
def test_the_plugin_agrees_with_the_reference(run: Run, tmp_path: Path) -> None:
    assert _compared(run, "v3", tmp_path) == ""


@EACH
def test_the_ahead_of_time_plugin_agrees_with_the_reference(run: Run, tmp_path: Path) -> None:
    reason = unsupported(version_of("tensorrt"))
    if reason:
        pytest.skip(reason)
    if (run.operator, run.case.name) not in {(operator, case.name) for operator, case, _ in eligible()}:
        pytest.skip("one kernel does not execute this case")
    assert _compared(run, "aot", tmp_path) == ""


@EACH
def test_the_function_body_agrees_with_the_reference(run: Run, tmp_path: Path) -> None:
    assert _compared(run, "none", tmp_path) == ""
