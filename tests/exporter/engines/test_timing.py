"""Engines in a benchmark: beside which others they are timed, at which lengths, and what must be seen to run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from longspan.exporter import bench
from longspan.exporter.bundle import Bundle
from longspan.exporter.engines.manifest import BuiltSite
from longspan.exporter.errors import EnvironmentLacks, FallbackRan, InvalidRequest
from longspan.exporter.throughput import BenchSettings, engine_trial, runner
from longspan.exporter.throughput.comparison import differences
from longspan.exporter.throughput.engines import settings_for, timed_engine
from longspan.exporter.throughput.report import CRASHED, OK, UNAVAILABLE, WRONG_PATH

from .hand_made import GPU, make_ort_engine, make_tensorrt_engine, plugin_layers, profile, stand_in

Copy = Callable[[Path], Path]

QUICK = BenchSettings(
    lengths=(24,), against=(), warm_up_ms=1, iterations=3, duration_s=0.01, threads=1, time_limit_s=60.0
)


@pytest.fixture
def bundle(longformer_bundle: Path, copied: Copy) -> Path:
    return copied(longformer_bundle)


@pytest.fixture
def trial(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Trials of TensorRT engines run in `trial_stand_in`."""

    def use(**facts: Any) -> None:
        stand_in(monkeypatch, **facts)
        here = str(Path(__file__).parent)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))
        monkeypatch.setattr(runner, "_ENGINE_MODULE", "trial_stand_in")

    return use


def test_an_ort_engine_beside_the_bundle(bundle: Path, kernel_library: str) -> None:
    make_ort_engine(bundle)
    report = bench(bundle, dataclasses.replace(QUICK, engine="ort", against=("body",)), plot=False)
    assert {row.variant: row.status for row in report.rows} == {"engine": OK, "kernel": OK, "body": OK}
    engine = report.at("engine", 24)
    assert engine.kernel_nodes == 2 and engine.ratio == 1 and report.reference == "engine"
    assert {found.baseline for found in report.crossovers} == {"kernel", "body"}
    assert report.notes[0] == "engine ort: CPUExecutionProvider, fp32, kernel at 2 sites"
    assert report.settings.engine == "ort"


def test_an_engine_of_tensorrt_beside_what_cannot_run_there(bundle: Path, trial: Callable[..., None]) -> None:
    trial(layers=plugin_layers(bundle))
    make_tensorrt_engine(bundle, profiles=(profile(bundle, (1, 8), (2, 60)),))
    report = bench(bundle, dataclasses.replace(QUICK, engine="trt", lengths=()), require_kernel=True, plot=False)
    rows = {(row.variant, row.length): row for row in report.rows}
    engine = rows["engine", 34]
    assert {length for _, length in rows} == {8, 34, 60}
    assert engine.status == OK and engine.kernel_nodes == 2 and engine.ratio == 1
    assert engine.executed == {"tensorrt": {"Myelin": 1, "PluginV3": 2, "Reformat": 1}}
    # This ONNX Runtime has no CUDA, so the kernel says so and is not timed on another device.
    assert rows["kernel", 34].status == UNAVAILABLE and "CUDAExecutionProvider" in rows["kernel", 34].reason
    assert f"TensorRT 10.14.1.48 on {GPU.name}, fp32, kernel at 2 sites" in report.notes[0]
    assert "the engine takes 8 to 60 tokens, so 64, 128, 256 were not measured" in report.notes[1]


def test_a_crash_is_a_row(bundle: Path, trial: Callable[..., None]) -> None:
    trial(layers=plugin_layers(bundle), fault="crash")
    make_tensorrt_engine(bundle)
    report = bench(bundle, dataclasses.replace(QUICK, engine="trt"), plot=False)
    row = report.at("engine", 24)
    assert row.status == CRASHED and "SIGABRT" in row.reason and report.broken == (row,)


def test_layers_that_go_away_between_two_openings_are_the_wrong_path(
    bundle: Path, trial: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial(layers=plugin_layers(bundle))
    make_tensorrt_engine(bundle)
    right = runner.environment_for
    monkeypatch.setattr(runner, "environment_for", lambda module: right(module) | {"STAND_IN_LAYERS": "[]"})
    report = bench(bundle, dataclasses.replace(QUICK, engine="trt"), plot=False)
    assert report.at("engine", 24).status == WRONG_PATH
    with pytest.raises(FallbackRan, match="24 tokens: the session ran 0 longspan kernels, expected 2"):
        bench(bundle, dataclasses.replace(QUICK, engine="trt"), require_kernel=True, plot=False)


def test_a_required_kernel_in_an_engine_of_function_bodies(bundle: Path, trial: Callable[..., None]) -> None:
    trial(layers=plugin_layers(bundle))
    nodes = [site.node for site in Bundle.open(bundle).manifest.sites]
    make_tensorrt_engine(bundle, plugin=None, sites=tuple(BuiltSite(node, "function body", ()) for node in nodes))
    with pytest.raises(FallbackRan, match="function body at 2 of 2 sites"):
        timed_engine(Bundle.open(bundle), "trt", require_kernel=True)
    assert timed_engine(Bundle.open(bundle), "trt").variant.kernel_nodes == 0


def test_plugin_layers_that_are_not_seen(bundle: Path, trial: Callable[..., None]) -> None:
    trial(layers=[])
    make_tensorrt_engine(bundle)
    with pytest.raises(FallbackRan, match="plugin layers are seen at 0 of 2 sites"):
        timed_engine(Bundle.open(bundle), "trt", require_kernel=True)


def test_what_an_engine_lacks_is_said_before_anything_is_measured(
    bundle: Path, trial: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial(gpu=None)
    make_tensorrt_engine(bundle)
    monkeypatch.setattr(runner, "run_trial", lambda *arguments: pytest.fail("a trial began"))
    with pytest.raises(EnvironmentLacks, match="was built for sm89 and needs such a GPU"):
        bench(bundle, dataclasses.replace(QUICK, engine="trt"), plot=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": (24, 61)}, "--lengths 61: the engine takes 8 to 60 tokens with a batch of 1"),
        ({"batch": 3}, "--batch 3: the engine takes 1 to 2 rows"),
    ],
)
def test_what_the_engine_does_not_take_is_refused(bundle: Path, change: dict[str, Any], message: str) -> None:
    make_ort_engine(bundle, profiles=(profile(bundle, (1, 8), (2, 60)),))
    opened = Bundle.open(bundle)
    with pytest.raises(InvalidRequest, match=message):
        settings_for(dataclasses.replace(QUICK, **change), opened, timed_engine(opened, "ort"))


def test_a_comparison_of_two_engines_is_refused_and_of_one_with_none_is_not(bundle: Path, kernel_library: str) -> None:
    make_ort_engine(bundle)
    report = bench(bundle, dataclasses.replace(QUICK, engine="ort"), plot=False)

    def named(name: str) -> Any:
        return dataclasses.replace(report, settings=dataclasses.replace(report.settings, engine=name))

    assert differences(report, named("")) == []
    assert differences(report, named("other")) == ["engine: ort, was other"]


def test_outputs_that_are_not_finite_are_found_in_every_type() -> None:
    import ml_dtypes
    import numpy as np

    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        assert engine_trial._finite(np, np.ones(3, dtype))
        assert not engine_trial._finite(np, np.array([1, np.nan], dtype))
    assert engine_trial._finite(np, np.array([True])) and engine_trial._finite(np, np.array([2]))
