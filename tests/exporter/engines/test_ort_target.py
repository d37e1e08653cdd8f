"""Builds for ONNX Runtime: optimised files keep their kernels and bodies, sessions are the ones written down."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from longspan.exporter import Bundle
from longspan.exporter.engines import open_ort_session
from longspan.exporter.engines.manifest import NOT_RUN, EngineManifest
from longspan.exporter.engines.onnxruntime import session as ort_session
from longspan.exporter.engines.onnxruntime import verification
from longspan.exporter.engines.onnxruntime.optimization import optimised
from longspan.exporter.engines.onnxruntime.session import (
    CACHE_FOLDER,
    SESSION_FILE,
    ProviderPlan,
    SessionPlan,
    open_planned,
)
from longspan.exporter.engines.onnxruntime.target import OrtBuild, build_ort
from longspan.exporter.engines.profiles import profiles_of
from longspan.exporter.engines.request import BuildRequest
from longspan.exporter.errors import BundleCorrupted, EnvironmentLacks, ExportFailed, InvalidRequest
from longspan.exporter.graph_io import save_model
from longspan.exporter.manifest import sha256_of
from longspan.exporter.parity.inputs import Feed, draw_inputs
from longspan.exporter.parity.runners import FUNCTION_BODY, KERNEL, open_session, what_ran
from longspan.exporter.sites.record import longspan_nodes
from longspan.plugins import LibraryMissing, ort_library_path
from longspan.plugins.gpu.pack import Pack
from longspan.plugins.gpu.pack_build import Target

pytestmark = pytest.mark.usefixtures("kernel_library")

Built = tuple[Bundle, Path, OrtBuild]


def build(bundle: Path, folder: Path, provider: str = "cpu", **options: Any) -> Built:
    opened = Bundle.open(bundle)
    folder.mkdir(parents=True, exist_ok=True)
    profiles = profiles_of(opened.manifest) if provider == "tensorrt" else ()
    request = BuildRequest("ort", provider=provider, **options)
    return opened, folder, build_ort(opened, request, ir.load(opened.model_path), folder, profiles)


def as_engine(built: Built) -> Path:
    """The build with the manifest that `longspan build` writes beside it."""
    bundle, folder, result = built
    values = {item.name: getattr(result, item.name) for item in dataclasses.fields(OrtBuild)}
    del values["agreements"]
    manifest = EngineManifest(
        target="ort", compute_capabilities=(), device="", profiles=(), options={}, plugin=None, created="2026-01-01",
        model_sha256=bundle.manifest.files["model.onnx"],
        files={file.name: sha256_of(file) for file in folder.iterdir() if file.name != "manifest.json"}, **values,
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json())
    return folder


@pytest.fixture(scope="module")
def cpu(longformer_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(longformer_bundle, tmp_path_factory.mktemp("cpu"))


def feeds(bundle: Bundle) -> list[Feed]:
    inputs = bundle.manifest.inputs
    return [
        draw_inputs(inputs, batch, length, padding=padding, global_tokens="several", seed=7)
        for batch, length, padding in ((1, 1, "none"), (3, 37, "mixed"), (2, 128, "left"), (1, 256, "none"))
    ]


def test_the_optimised_file_has_fusions_sites_and_their_functions(cpu: Built) -> None:
    bundle, folder, result = cpu
    before, after = onnx.load(bundle.model_path), onnx.load(folder / result.file)
    assert len(after.graph.node) < len(before.graph.node)
    assert "com.microsoft" in {node.domain for node in after.graph.node}
    sites = [node for node in after.graph.node if node.domain == "longspan"]
    assert [node.name for node in sites] == [site.node for site in bundle.manifest.sites]
    functions = {(function.name, function.overload) for function in after.functions}
    assert {(node.op_type, node.overload) for node in sites} == functions
    imported = {entry.domain for entry in after.opset_import}
    assert imported == {node.domain for node in after.graph.node} | {""}


def test_equal_to_the_bundle_with_and_without_the_library(cpu: Built) -> None:
    bundle, folder, _ = cpu
    engine = as_engine(cpu)
    oracle = open_session(str(bundle.model_path), ort_library_path())
    for library in (True, False):
        session = open_ort_session(engine, library=library)
        for feed in feeds(bundle):
            for expected, got in zip(oracle.run(None, feed), session.run(None, feed), strict=True):
                assert got.shape == expected.shape
                eps = np.finfo(np.float32).eps
                # Two orders of the sums of two layers, each of up to 128 terms.
                assert np.abs(got - expected).max() <= 4 * eps * np.sqrt(128) * np.abs(expected).max()
    assert folder == engine


@pytest.mark.parametrize(("library", "expected"), [(True, KERNEL), (False, FUNCTION_BODY)])
def test_the_profile_shows_what_runs(cpu: Built, tmp_path: Path, library: bool, expected: str) -> None:
    bundle, _, _ = cpu
    session = open_ort_session(as_engine(cpu), library=library, profile=tmp_path / "profile")
    session.run(None, feeds(bundle)[1])
    events = json.loads(Path(session.end_profiling()).read_text())
    ran, _ = what_ran(events, bundle.manifest.sites)
    assert ran == {site.node: expected for site in bundle.manifest.sites}


def test_what_is_recorded(cpu: Built) -> None:
    bundle, folder, result = cpu
    assert "CPUExecutionProvider" in result.status and onnxruntime.__version__ in result.status
    assert result.versions["onnxruntime"] == onnxruntime.__version__
    assert (result.dtype, result.kept_in_fp32) == ("fp32", {})
    assert [site.node for site in result.sites] == [site.node for site in bundle.manifest.sites]
    for site in result.sites:
        assert site.lowering == "kernel" and "profile" in site.ladder[0].reason
    assert json.loads((folder / SESSION_FILE).read_text()) == result.session
    assert result.session["offline_level"] == "extended"
    assert result.session["operator_library"] == "liblongspan_ort.so"
    assert result.session["enable_mem_pattern"] is False
    assert {agreement.length for agreement in result.agreements} >= {1, 256}
    assert all(0 <= agreement.difference <= agreement.tolerance < 1e-4 for agreement in result.agreements)
    # With the library and without it, at every length and output.
    assert len(result.agreements) % (2 * len(bundle.manifest.outputs)) == 0


def test_the_session_has_the_options_that_are_written(cpu: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def open_one(model: str, options: Any, providers: Any) -> Any:
        seen.update(options=options, providers=providers)
        return real(model, options, providers=providers)

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_one)
    open_ort_session(as_engine(cpu), threads=1)
    options = seen["options"]
    assert seen["providers"] == [("CPUExecutionProvider", {})]
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    assert (options.enable_mem_pattern, options.enable_cpu_mem_arena) == (False, True)
    assert options.get_session_config_entry("session.use_device_allocator_for_initializers") == "1"


def test_cuda_without_a_gpu_is_built_and_not_run(gpu_bundle: Path, tmp_path: Path) -> None:
    bundle, folder, result = build(gpu_bundle, tmp_path, "cuda")
    assert result.status == NOT_RUN
    assert result.session["offline_level"] == "basic"
    assert result.session["operator_library"] == "liblongspan_ort.so"
    cuda, cpu = result.session["providers"]
    assert (cuda["name"], cpu["name"]) == ("CUDAExecutionProvider", "CPUExecutionProvider")
    assert (cuda["options"]["use_tf32"], cuda["options"]["enable_cuda_graph"]) == ("0", "0")
    before, after = ir.load(bundle.model_path), ir.load(folder / result.file)
    # Nothing that a provider other than the GPU's was asked about, and the kernels byte for byte.
    assert {node.domain for node in after.graph.all_nodes()} == {"", "longspan"}
    packs = [
        [
            node.attributes["kernel_pack"].as_tensor().tobytes()
            for node in longspan_nodes(model)
            if "kernel_pack" in node.attributes
        ]
        for model in (before, after)
    ]
    assert packs[0] and packs[0] == packs[1]
    assert all(site.ladder[0].reason.endswith(NOT_RUN) for site in result.sites)
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(EnvironmentLacks, match="CUDAExecutionProvider"):
            open_ort_session(as_engine((bundle, folder, result)))


def test_a_converted_graph_gets_kernels_of_its_type(gpu_bundle: Path, tmp_path: Path) -> None:
    _, folder, result = build(gpu_bundle, tmp_path, "cuda", dtype="fp16")
    assert (result.dtype, result.session["operator_library"]) == ("fp16", "liblongspan_ort.so")
    # A session on the CPU would have put casts around every node.
    assert result.session["offline_level"] == "disabled"
    nodes = list(longspan_nodes(ir.load(folder / result.file)))
    (carrier,) = [node for node in nodes if "kernel_pack" in node.attributes]
    pack = Pack.from_bytes(carrier.attributes["kernel_pack"].as_tensor().tobytes())
    assert {recipe.dtype for recipe in pack.recipes} == {"float16"}
    assert {str(Target(*target)) for target in pack.architectures} == {"sm_80", "ptx"}
    assert len({node.attributes["kernel_pack_id"].as_string() for node in nodes}) == 1
    assert {site.lowering for site in result.sites} == {"kernel"}


def test_cuda_without_kernels_runs_the_bodies_and_says_why(longformer_bundle: Path, tmp_path: Path) -> None:
    _, _, result = build(longformer_bundle, tmp_path, "cuda")
    assert result.session["operator_library"] is None
    for site in result.sites:
        assert site.lowering == "function body"
        assert "--gpu-arch" in site.ladder[0].reason


def test_tensorrt_provider_gets_standard_operators_and_profiles(longformer_bundle: Path, tmp_path: Path) -> None:
    bundle, folder, result = build(
        longformer_bundle, tmp_path, "tensorrt",
        min_shapes=("input_ids:[1,8]",), opt_shapes=("input_ids:[2,64]",), max_shapes=("input_ids:[4,200]",),
    )  # fmt: skip
    model = onnx.load(folder / result.file)
    assert {node.domain for node in model.graph.node} <= {""}
    assert not model.functions
    first = result.session["providers"][0]
    assert first["name"] == "TensorrtExecutionProvider"
    assert not {"trt_fp16_enable", "trt_bf16_enable"} & set(first["options"])
    names = [record.name for record in bundle.manifest.inputs]
    profiles = profiles_of(bundle.manifest)
    assert first["options"]["trt_profile_max_shapes"] == ",".join(
        f"{name}:{'x'.join(map(str, profiles[0].inputs[name].max))}" for name in names
    )
    assert result.status == NOT_RUN
    plan = SessionPlan.from_dict(result.session)
    name, options = plan.providers[0].absolute(folder)
    assert options["trt_engine_cache_path"] == str((folder / CACHE_FOLDER).resolve())
    assert options["device_id"] == "0" and name == "TensorrtExecutionProvider"


def test_plugins_for_the_tensorrt_provider(gpu_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, folder, result = build(gpu_bundle, tmp_path / "built", "tensorrt", plugin_api="v3")
    model = ir.load(folder / result.file)
    assert model.opset_imports["trt.plugins"] == 1 and "longspan" not in model.opset_imports
    assert not model.functions
    plugins = [node for node in model.graph if node.domain == "trt.plugins"]
    assert {node.domain for node in model.graph.all_nodes()} == {"", "trt.plugins"}
    assert [(node.name, node.op_type) for node in plugins] == [
        (site.node, site.operator) for site in bundle.manifest.sites
    ]
    for node in plugins:
        assert node.attributes["plugin_namespace"].as_string() == "longspan"
        content = node.attributes["kernel_pack"].as_tensor()
        assert content.dtype == ir.DataType.INT8
        assert Pack.from_bytes(content.tobytes()).architectures
        assert all(value.dtype == ir.DataType.FLOAT and value.shape is not None for value in node.outputs)
    assert (result.session["tensorrt_plugins"], result.status, result.agreements) == (True, NOT_RUN, ())
    assert {site.lowering for site in result.sites} == {"plugin"}

    seen: dict[str, Any] = {}

    class Session:
        def __init__(self, model: str, options: Any, providers: Any) -> None:
            seen["providers"] = dict(providers)

        def get_providers(self) -> list[str]:
            return list(seen["providers"])

    package = tmp_path / "onnxruntime"
    (package / "capi").mkdir(parents=True)
    (package / "capi" / "libonnxruntime_providers_tensorrt.so").write_bytes(b"\x7fELF\0libnvinfer.so.11\0")
    monkeypatch.setattr(onnxruntime, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: PROVIDERS)
    monkeypatch.setattr(ort_session, "tensorrt_loader_path", lambda major: f"/lib/liblongspan_trt{major}_loader.so")
    open_ort_session(as_engine((bundle, folder, result)))
    tensorrt = seen["providers"]["TensorrtExecutionProvider"]
    assert tensorrt["trt_extra_plugin_lib_paths"] == "/lib/liblongspan_trt11_loader.so"
    assert "trt_extra_plugin_lib_paths" not in seen["providers"]["CUDAExecutionProvider"]
    (package / "capi" / "libonnxruntime_providers_tensorrt.so").unlink()
    with pytest.raises(EnvironmentLacks, match="which TensorRT"):
        open_ort_session(folder)


PROVIDERS = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def test_plugins_that_cannot_be(longformer_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"has no GPU kernels.*--gpu-arch"):
        build(longformer_bundle, tmp_path, "tensorrt", plugin_api="v3")
    with pytest.raises(InvalidRequest, match="no meaning for --provider cuda"):
        BuildRequest("ort", provider="cuda", plugin_api="v3")
    with pytest.raises(InvalidRequest, match="in libraries only"):
        BuildRequest("ort", provider="tensorrt", plugin_api="aot")


def test_without_the_library_nothing_is_expanded_for_good(
    longformer_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> str:
        raise LibraryMissing("liblongspan_ort.so is not installed")

    for module in ("optimization", "verification", "session"):
        monkeypatch.setattr(f"longspan.exporter.engines.onnxruntime.{module}.ort_library_path", missing)
    bundle, folder, result = build(longformer_bundle, tmp_path)
    assert result.session["offline_level"] == "disabled"
    assert result.session["operator_library"] is None
    assert "not installed" in result.session["why"]["operator_library"]
    nodes = [node.name for node in longspan_nodes(ir.load(folder / result.file))]
    assert nodes == [site.node for site in bundle.manifest.sites]


def test_weights_that_lie_beside_the_model(
    longformer_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.exporter.engines.onnxruntime.optimization.EXTERNAL_DATA_BYTES", 1000)
    monkeypatch.setattr(
        "longspan.exporter.engines.onnxruntime.target.save_model",
        lambda model, path: save_model(model, path, external_data_bytes=1000),
    )
    built = build(longformer_bundle, tmp_path / "built")
    assert sorted(file.name for file in built[1].iterdir()) == ["model.onnx", "model.onnx.data", SESSION_FILE]
    moved = Path(shutil.move(as_engine(built), tmp_path / "moved"))
    assert open_ort_session(moved).run(None, feeds(built[0])[0])
    (moved / "model.onnx.data").open("ab").write(b"\0")
    with pytest.raises(BundleCorrupted, match=r"model\.onnx\.data: differs"):
        open_ort_session(moved)


def test_a_changed_site_is_refused(longformer_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load: Callable[[Any], ir.Model] = ir.load

    def narrowed(path: Any) -> ir.Model:
        model = load(path)
        node = next(longspan_nodes(model))
        node.attributes["left_window_size"] = ir.AttrInt64("left_window_size", 1)
        return model

    model = ir.load(Bundle.open(longformer_bundle).model_path)
    name = next(longspan_nodes(model)).name
    monkeypatch.setattr("onnx_ir.load", narrowed)
    with pytest.raises(ExportFailed, match=f"changed attention sites: {name}"):
        optimised(model, "basic", tmp_path, lambda stage: None)


def test_a_wrong_model_is_refused(cpu: Built, tmp_path: Path) -> None:
    bundle, folder, result = cpu
    model = onnx.load(folder / result.file)
    weight = max(model.graph.initializer, key=lambda value: len(value.raw_data))
    values = onnx.numpy_helper.to_array(weight) * np.float32(1.001)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / result.file)
    plan = SessionPlan.from_dict(result.session)
    with pytest.raises(ExportFailed, match="differs from the bundle's by"):
        verification.verify(bundle, tmp_path, plan, None, 128, on_plan=True)


def test_a_half_precision_build_is_compared_in_its_own_precision(longformer_bundle: Path, tmp_path: Path) -> None:
    _, _, result = build(longformer_bundle, tmp_path, dtype="fp16")
    assert result.dtype == "fp16"
    largest = max(agreement.difference for agreement in result.agreements)
    assert 1e-5 < largest < 0.1
    assert all(agreement.difference <= agreement.tolerance for agreement in result.agreements)


def test_bfloat16_is_refused_where_nothing_computes_in_it(longformer_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"--dtype bf16.*fp32, fp16"):
        build(longformer_bundle, tmp_path, dtype="bf16")
    assert not any(tmp_path.iterdir())


def test_open_refuses_what_is_no_ort_build(cpu: Built, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"manifest\.json"):
        open_ort_session(tmp_path)
    engine = as_engine(cpu)
    manifest = json.loads((engine / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"target": "tensorrt"}))
    with pytest.raises(InvalidRequest, match="an engine of tensorrt"):
        open_ort_session(tmp_path)
    for damaged in (None, {"model": 1}, manifest["session"] | {"graph_optimization_level": "most"}):
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"session": damaged}))
        with pytest.raises(BundleCorrupted, match="session"):
            open_ort_session(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    for name in ("model.onnx", SESSION_FILE):
        (tmp_path / name).write_bytes((engine / name).read_bytes())
    (tmp_path / "model.onnx").open("ab").write(b"\0")
    with pytest.raises(BundleCorrupted, match=r"model\.onnx: differs"):
        open_ort_session(tmp_path)


def test_a_provider_that_is_not_here_is_named(cpu: Built) -> None:
    _, folder, result = cpu
    plan = dataclasses.replace(SessionPlan.from_dict(result.session), providers=(ProviderPlan("NoSuchProvider"),))
    with pytest.raises(EnvironmentLacks, match="NoSuchProvider"):
        open_planned(folder, plan)
