"""What an engine lacks here is said in one line, before a runtime that could crash sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from longspan.exporter.devices import Gpu
from longspan.exporter.engines.manifest import Engine, PluginRecord
from longspan.exporter.engines.running import requirements
from longspan.exporter.engines.running.requirements import require_runnable, require_version, runs_on
from longspan.exporter.engines.runtimes import EngineRuntime
from longspan.exporter.errors import BundleCorrupted, EnvironmentLacks, InvalidRequest
from longspan.exporter.manifest import sha256_of
from longspan.plugins.errors import InvalidLibrary

from .hand_made import LIBRARY, make_tensorrt_engine, stand_in

Make = Callable[..., Engine]


@pytest.fixture
def make(longformer_bundle: Path, copied: Callable[[Path], Path]) -> Make:
    bundle = copied(longformer_bundle)
    return lambda **values: make_tensorrt_engine(bundle, **values)


def test_what_fits(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    fitting = require_runnable(make())
    assert (fitting.module, fitting.library, fitting.notes) == ("tensorrt", LIBRARY, ())


@pytest.mark.parametrize(("target", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_a_missing_package(make: Make, monkeypatch: pytest.MonkeyPatch, target: str, extra: str) -> None:
    stand_in(monkeypatch)
    monkeypatch.setattr("longspan.exporter.engines.runtimes.importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentLacks, match=rf"TensorRT.* is not installed; next step: .*longspan\[{extra}\]"):
        require_runnable(make(target=target))


def test_packages_are_looked_for_and_not_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "raises_when_imported.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert EngineRuntime("", "raises_when_imported", "").installed
    assert not EngineRuntime("", "no_such_module_anywhere", "").installed


def test_no_gpu(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, gpu=None)
    with pytest.raises(EnvironmentLacks, match="was built for sm89 and needs such a GPU; there is none here"):
        require_runnable(make())


def test_another_architecture_names_both(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, gpu=Gpu("Older GPU", "sm80"))
    with pytest.raises(
        EnvironmentLacks, match="was built for sm89; the GPU here, Older GPU, is sm80; next step: build"
    ):
        require_runnable(make())


@pytest.mark.parametrize(
    ("options", "built", "here", "runs"),
    [
        ({}, ("sm89",), "sm89", True),
        ({}, ("sm89",), "sm90", False),
        ({}, ("sm89", "sm120"), "sm120", True),
        ({}, (), "sm75", True),
        ({"hardware_compatibility": "ampere-plus"}, ("sm89",), "sm80", True),
        ({"hardware_compatibility": "ampere-plus"}, ("sm89",), "sm120", True),
        ({"hardware_compatibility": "ampere-plus"}, ("sm89",), "sm75", False),
        ({"hardware_compatibility": "same-compute-capability"}, ("sm89",), "sm90", False),
    ],
)
def test_architectures(make: Make, options: dict[str, Any], built: tuple[str, ...], here: str, runs: bool) -> None:
    assert runs_on(make(options=options, compute_capabilities=built).manifest, here) is runs


@pytest.mark.parametrize(
    ("options", "here", "allowed"),
    [
        ({}, "10.14.1.48", ""),
        ({}, "10.14.1.99", ""),
        ({}, "10.14.2", "allowed: 10.14.1.48;"),
        ({}, "11.1.0.106", "allowed: 10.14.1.48;"),
        ({"version_compatible": True}, "10.15.0", ""),
        ({"version_compatible": True}, "10.13.3", "allowed: 10.x from 10.14.1.48 on"),
        ({"version_compatible": True}, "11.0", "allowed: 10.x from 10.14.1.48 on"),
    ],
)
def test_versions(make: Make, options: dict[str, Any], here: str, allowed: str) -> None:
    engine = make(options=options)
    if not allowed:
        require_version(engine, here)
        return
    with pytest.raises(EnvironmentLacks, match=rf"built with TensorRT 10\.14\.1\.48, here is {here}; {allowed}"):
        require_version(engine, here)


def test_a_manifest_that_names_no_version(make: Make) -> None:
    with pytest.raises(BundleCorrupted, match="does not say which TensorRT built it; next step: build again"):
        require_version(make(versions={}), "10.14.1.48")


def test_an_engine_without_weights(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    with pytest.raises(InvalidRequest, match=r"built without its weights.*next step: refit"):
        require_runnable(make(options={"strip": True}))


def test_a_library_for_another_tensorrt(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, major=11)
    with pytest.raises(EnvironmentLacks, match=r"plugin library for TensorRT 11, .* built with TensorRT 10\.14"):
        require_runnable(make())


def test_a_library_that_is_none(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)

    def refuse(path: Path) -> int:
        raise InvalidLibrary(f"{path} is not a 64-bit ELF library")

    monkeypatch.setattr(requirements, "plugin_library_major", refuse)
    with pytest.raises(EnvironmentLacks, match="is not a 64-bit ELF library"):
        require_runnable(make())


def test_a_library_that_is_gone(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch)
    with pytest.raises(EnvironmentLacks, match=r"needs the plugin library .*own\.so, which is not there"):
        require_runnable(make(options={"plugin_library": str(tmp_path / "own.so")}))


def test_another_build_of_the_library_is_a_note(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch)
    own = tmp_path / "own.so"
    own.write_bytes(b"another build")
    fitting = require_runnable(make(options={"plugin_library": str(own)}))
    assert fitting.library == own
    assert fitting.notes == ("the plugin library own.so is not the one that the engine was built with (SHA-256)",)
    same = make(name="same", options={"plugin_library": str(own)}, plugin=PluginRecord("v3", "", sha256_of(own), ()))
    assert require_runnable(same).notes == ()


def test_another_gpu_of_the_same_architecture_is_a_note(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, gpu=Gpu("Sister GPU", "sm89"))
    assert require_runnable(make()).notes == (
        "the engine was built on Stand-in GPU, whose timings chose its kernels, not on Sister GPU",
    )


def test_an_ahead_of_time_plugin_needs_no_library(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, major=11)
    assert require_runnable(make(plugin=PluginRecord("aot", "", "", ("sm_89",)))).library is None
