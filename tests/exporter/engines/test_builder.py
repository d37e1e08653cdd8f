"""``build``: engines of TensorRT-RTX without a GPU, the path to TensorRT on a stand-in, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from longspan.exporter import BundleCorrupted, EnvironmentLacks, ExportFailed, FallbackRan, InvalidRequest, check
from longspan.exporter.bundle import Bundle
from longspan.exporter.engines import BuildRequest, Engine, build
from longspan.exporter.engines.manifest import ENGINE_FILE, NOT_BUILT, NOT_RUN, EngineManifest, engine_names
from longspan.exporter.whole_folders import MANIFEST_FILE

from . import stand_in

Copy = Callable[[Path], Path]

SMALL = ("input_ids:[2,64]",)


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")


@pytest.fixture
def bundle(longformer_bundle: Path, copied: Copy) -> Path:
    return copied(longformer_bundle)


def request(target: str = "tensorrt-rtx", **options: Any) -> BuildRequest:
    if target == "tensorrt-rtx":
        options.setdefault("compute_capabilities", ("sm89",))
    return BuildRequest(target, max_shapes=SMALL, **options)


@pytest.mark.usefixtures("rtx")
def test_an_engine_stands_beside_its_model_with_a_manifest(bundle: Path) -> None:
    stages: list[str] = []
    engine = build(bundle, request(), progress=stages.append)
    assert engine.path == bundle / "engines" / "tensorrt-rtx-sm89-fp32"
    again = Engine.open(Bundle.open(bundle), engine.name)
    assert again.manifest == engine.manifest
    manifest = again.manifest
    assert manifest.status == NOT_RUN
    assert manifest.compute_capabilities == ("sm89",)
    assert manifest.profiles[0].inputs["input_ids"].max == (2, 64)
    assert [site.lowering for site in manifest.sites] == ["function body"] * 2
    assert manifest.plugin is None
    assert manifest.versions["tensorrt_rtx"]
    assert manifest.options == {"max_shapes": list(SMALL), "compute_capabilities": ["sm89"]}
    assert sorted(file.name for file in engine.path.iterdir()) == [MANIFEST_FILE, ENGINE_FILE]
    assert any("Building engine" in stage for stage in stages), "the builder's progress is shown"
    assert engine_names(Bundle.open(bundle)) == [engine.name]
    assert not [entry for entry in (bundle / "engines").iterdir() if entry.name.startswith(".")]


@pytest.mark.usefixtures("rtx")
def test_options_reach_the_builder(bundle: Path) -> None:
    options: dict[str, Any] = {"weight_streaming": True, "optimization_level": 1, "pool_limits": {"workspace": 1 << 30}}
    engine = build(bundle, request(name="x", compute_capabilities=("sm89", "sm120"), **options))
    assert engine.manifest.options.items() >= options.items()
    assert engine.manifest.compute_capabilities == ("sm89", "sm120")


@pytest.mark.usefixtures("rtx")
def test_what_only_a_gpu_can_compile(bundle: Path) -> None:
    with pytest.raises(EnvironmentLacks, match="weights can be replaced on a GPU only"):
        build(bundle, request(strip=True))


@pytest.mark.usefixtures("rtx")
def test_an_operation_that_a_device_lacks_is_named(bundle: Path) -> None:
    with pytest.raises(ExportFailed, match=r"node_.*for Turing .*FP32 GEMM .*next step: --dtype fp16"):
        build(bundle, request(compute_capabilities=("sm75",)))


@pytest.mark.usefixtures("rtx")
def test_two_profiles(bundle: Path) -> None:
    shapes = ("input_ids:[1,16]", "input_ids:[2,64]")
    engine = build(bundle, BuildRequest("tensorrt-rtx", max_shapes=shapes, compute_capabilities=("sm89",)))
    assert [profile.inputs["input_ids"].max for profile in engine.manifest.profiles] == [(1, 16), (2, 64)]


def test_an_old_engine_is_kept_until_force_replaces_it(rtx_bundle: Path, copied: Copy) -> None:
    bundle = copied(rtx_bundle)
    first = Engine.open(Bundle.open(bundle), "x").manifest
    with pytest.raises(InvalidRequest, match="holds an engine already"):
        build(bundle, request(name="x"))
    with pytest.raises(ExportFailed, match=r"no tactics .* workspace"):
        build(bundle, request(name="x", pool_limits={"workspace": 1024}), force=True)
    assert Engine.open(Bundle.open(bundle), "x").manifest == first
    second = build(bundle, request(name="x", compute_capabilities=("sm80",)), force=True)
    assert Engine.open(Bundle.open(bundle), "x").manifest == second.manifest


def test_damage_is_found(bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    folder = bundle / "engines" / "x"
    folder.mkdir(parents=True)
    for manifest, message in (
        ("", "is not the manifest of an engine"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1}', "KeyError"),
    ):
        (folder / MANIFEST_FILE).write_text(manifest)
        with pytest.raises(BundleCorrupted, match=message):
            Engine.open(opened, "x")
    with pytest.raises(InvalidRequest, match="has no such engine; it has: x; next step: longspan build"):
        Engine.open(opened, "y")


def test_a_changed_engine_is_refused(rtx_bundle: Path, copied: Copy) -> None:
    bundle = copied(rtx_bundle)
    engine = Engine.open(Bundle.open(bundle), "x")
    original = engine.file.read_bytes()
    changed = bytearray(original)
    changed[len(changed) // 2] ^= 1
    engine.file.write_bytes(changed)
    with pytest.raises(BundleCorrupted, match=r"model\.engine: differs from what was written .* build again"):
        Engine.open(Bundle.open(bundle), "x")
    engine.file.write_bytes(original)
    manifest = json.loads((engine.path / MANIFEST_FILE).read_text())
    (engine.path / MANIFEST_FILE).write_text(json.dumps(manifest | {"model_sha256": "0" * 64}))
    with pytest.raises(BundleCorrupted, match=r"was built from another model\.onnx"):
        Engine.open(Bundle.open(bundle), "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target", "vulkan"),
        ("dtype", "fp64"),
        ("status", 5),
        ("versions", None),
        ("versions", {"tensorrt_rtx": 1.7}),
        ("compute_capabilities", [89]),
        ("build_s", "long"),
        ("options", []),
        ("profiles", [{"inputs": {}}]),
        ("profiles", [{"inputs": {"input_ids": {"min": ["a"], "opt": [1, 2], "max": [1, 2]}}}]),
        ("profiles", [{"inputs": {"input_ids": {"min": [9, 9], "opt": [1, 2], "max": [1, 2]}}}]),
    ],
)
def test_a_value_that_no_build_writes_is_found(rtx_bundle: Path, copied: Copy, key: str, value: Any) -> None:
    bundle = copied(rtx_bundle)
    file = bundle / "engines" / "x" / MANIFEST_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    found = {"status": "a text", "profiles": "a profile"}.get(key, key)
    with pytest.raises(BundleCorrupted, match=f"{found}.* next step: build again"):
        Engine.open(Bundle.open(bundle), "x")


def test_a_manifest_names_no_file_outside_its_folder() -> None:
    with pytest.raises(BundleCorrupted, match="no plain name"):
        EngineManifest.from_json(
            json.dumps(
                {"schema_version": 1, "profiles": [], "compute_capabilities": [], "plugin": None, "sites": []}
                | {"file": "../../x", "files": {}}
            )
        )


@pytest.mark.usefixtures("rtx")
def test_a_capability_that_the_target_does_not_have(bundle: Path) -> None:
    with pytest.raises(InvalidRequest, match="sm90: TensorRT-RTX does not build for it; allowed: sm75, "):
        build(bundle, request(compute_capabilities=("sm90",)))
    with pytest.raises(InvalidRequest, match="--compute-capability is needed where there is no GPU"):
        build(bundle, request(compute_capabilities=()))


def test_without_the_package(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.exporter.engines.runtimes.importlib.util.find_spec", lambda name: None)
    for target, remedy in (("tensorrt", r"'longspan\[tensorrt\]'"), ("tensorrt-rtx", r"'longspan\[rtx\]'")):
        with pytest.raises(EnvironmentLacks, match=f"is not installed; next step: pip install {remedy}"):
            build(bundle, request(target))


def test_tensorrt_wants_a_gpu(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(tmp_path / "packages", monkeypatch)
    monkeypatch.setattr("longspan.exporter.engines.builder.cuda_gpu", lambda: None)
    with pytest.raises(EnvironmentLacks, match="TensorRT times kernels on the GPU"):
        build(bundle, request("tensorrt"))


def test_tensorrt_without_the_plugin(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(tmp_path / "packages", monkeypatch)
    cache = tmp_path / "timing.cache"
    engine = build(bundle, request("tensorrt", plugin_api="none", timing_cache=cache))
    manifest = engine.manifest
    assert engine.name == "tensorrt-sm89-fp32"
    assert (manifest.device, manifest.compute_capabilities) == ("Stand-in GPU", ("sm89",))
    assert manifest.versions["tensorrt"] == "10.14.1.48"
    assert {site.ladder[0].reason for site in manifest.sites} == {"--plugin-api none"}
    assert cache.stat().st_size
    build(bundle, request("tensorrt", plugin_api="none", timing_cache=cache), force=True)
    with pytest.raises(InvalidRequest, match="its folder does not exist"):
        build(bundle, request("tensorrt", plugin_api="none", timing_cache=tmp_path / "no" / "cache"), force=True)


def test_a_graph_is_checked_where_no_engine_can_be(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.exporter.engines.runtimes.importlib.util.find_spec", lambda name: None)
    engine = build(bundle, BuildRequest("tensorrt-rtx", "fp16", graph_only=True))
    assert (engine.name, engine.file.name) == ("tensorrt-rtx-fp16-graph", "model.onnx")
    assert engine.manifest.status == NOT_BUILT
    report = check(bundle, engine=engine.name, lengths=[17])
    assert report.passed
    assert "no engine was built" in " ".join(report.paths[0].notes)
    assert Engine.open(Bundle.open(bundle), engine.name).manifest.status == NOT_BUILT


def test_a_graph_with_plugins_has_kernels_for_what_was_named(bundle: Path) -> None:
    pytest.importorskip("triton")
    with pytest.raises(InvalidRequest, match="it says which kernels go into the graph"):
        build(bundle, BuildRequest("tensorrt", graph_only=True))
    engine = build(bundle, BuildRequest("tensorrt", graph_only=True, compute_capabilities=("sm80",)))
    assert engine.manifest.plugin is not None and engine.manifest.plugin.kernels == ("sm_80",)
    assert {site.lowering for site in engine.manifest.sites} == {"plugin"}
    with pytest.raises(InvalidRequest, match="is a graph of TensorRT plugins, which ONNX Runtime does not have"):
        check(bundle, engine=engine.name, lengths=[17])


def test_no_kernel_is_promised_for_a_device_before_ampere(bundle: Path) -> None:
    wanted = BuildRequest("tensorrt", graph_only=True, compute_capabilities=("sm75", "sm80"))
    with pytest.raises(InvalidRequest, match=r"sm75: longspan's GPU kernels are for sm80 and later; .* none"):
        build(bundle, wanted)
    assert not (bundle / "engines").exists()


def test_kernels_are_for_the_gpu_that_is_there_besides_those_that_were_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.install(tmp_path / "packages", monkeypatch)
    seen: list[Any] = []

    def served(model: Any, targets: Any, *more: Any) -> tuple[dict[str, Any], dict[str, str]]:
        seen.extend(map(str, targets))
        return _none_served(model, targets, *more)

    monkeypatch.setattr("longspan.exporter.engines.graphs.plugin_graph._served", served)
    with pytest.raises(ExportFailed):
        build(bundle, request("tensorrt", compute_capabilities=("sm90", "sm89")))
    assert seen == ["sm_89", "sm_90"]


@pytest.mark.parametrize("content", [b"text", b"\x7fELF" + b"\0" * 60, None])
def test_a_file_that_is_no_plugin_library(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    stand_in.install(tmp_path / "packages", monkeypatch)
    library = tmp_path / "other.so"
    if content is not None:
        library.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"--plugin-library.*other\.so"):
        build(bundle, request("tensorrt", plugin_library=library))


def test_a_file_that_is_no_timing_cache_is_kept(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(tmp_path / "packages", monkeypatch)
    cache = tmp_path / "letter.txt"
    cache.write_bytes(b"Dear reader")
    with pytest.raises(InvalidRequest, match=r"letter\.txt: is not a timing cache of this version"):
        build(bundle, request("tensorrt", plugin_api="none", timing_cache=cache))
    assert cache.read_bytes() == b"Dear reader"
    with pytest.raises(InvalidRequest, match="is not a file"):
        build(bundle, request("tensorrt", plugin_api="none", timing_cache=tmp_path))
    monkeypatch.chdir(tmp_path)
    for attempt in range(2):
        engine = build(
            bundle, request("tensorrt", plugin_api="none", timing_cache=Path("new.cache")), force=attempt > 0
        )
    assert Path("new.cache").stat().st_size
    assert engine.manifest.options["timing_cache"] == str(tmp_path / "new.cache")


def test_a_plugin_library_of_another_major_version_is_refused_before_it_is_loaded(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longspan.plugins import LibraryMissing
    from longspan.plugins.library import tensorrt_library_path

    try:
        library = tensorrt_library_path(10)
    except LibraryMissing as error:
        pytest.skip(str(error))
    stand_in.install(tmp_path / "packages", monkeypatch, "11.4.0.106")
    with pytest.raises(EnvironmentLacks, match=r"was built for TensorRT 10, here is 11\.4\.0\.106"):
        build(bundle, request("tensorrt", plugin_library=Path(library)))
    with pytest.raises(EnvironmentLacks, match="liblongspan_trt11"):
        build(bundle, request("tensorrt"))


def test_a_build_that_is_killed_takes_its_process_with_it() -> None:
    parent = """
import subprocess, sys, time
module = "longspan.exporter.engines.tensorrt.build_worker"
worker = f"import {module} as w; w._end_with_parent(); print('up', flush=True)"
child = subprocess.Popen([sys.executable, "-c", worker + "; w.time.sleep(600)"], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        worker = int(killed.stdout.readline())
        os.kill(worker, 0)
        killed.kill()
    deadline = time.monotonic() + 30
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(worker)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_process_that_ends_is_one_line_that_names_the_node(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT-RTX, which stands in here, ends the process where it meets a plugin."""
    from longspan.plugins import LibraryMissing
    from longspan.plugins.library import tensorrt_library_path

    try:
        tensorrt_library_path(10)
    except LibraryMissing as error:
        pytest.skip(str(error))
    pytest.importorskip("triton")
    stand_in.install(tmp_path / "packages", monkeypatch)
    with pytest.raises(ExportFailed, match=r"TensorRT 10\.14\.1\.48 .*sliding_window_attention"):
        build(bundle, request("tensorrt"))
    assert not (bundle / "engines").exists()


def test_require_kernel(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in.install(tmp_path / "packages", monkeypatch)
    monkeypatch.setattr("longspan.exporter.engines.graphs.plugin_graph._served", _none_served)
    with pytest.raises(FallbackRan, match="--require-kernel: no kernel of the plugin serves 2 of 2"):
        build(bundle, request("tensorrt", require_kernel=True))
    with pytest.raises(ExportFailed, match="--plugin-api none, which builds the function bodies"):
        build(bundle, request("tensorrt"))


def _none_served(model: Any, targets: Any, *_: Any) -> tuple[dict[str, Any], dict[str, str]]:
    from longspan.exporter.sites.record import longspan_nodes

    return {}, {node.name or "": "it is too wide" for node in longspan_nodes(model)}
