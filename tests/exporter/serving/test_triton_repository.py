"""Model repositories: what the server's own schema reads back, what is in the files, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from longspan.exporter import Bundle
from longspan.exporter.engines.onnxruntime.session import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    TENSORRT_PATHS,
    TENSORRT_PROVIDER,
    ProviderPlan,
    SessionPlan,
    cuda_options,
    tensorrt_options,
)
from longspan.exporter.engines.profiles import profiles_of
from longspan.exporter.errors import EnvironmentLacks, ExportFailed, InvalidRequest
from longspan.exporter.manifest import InputRecord, OutputRecord, sha256_of
from longspan.exporter.parity.runners import open_session
from longspan.exporter.serving import PackageRequest, package, triton_repository
from longspan.exporter.serving.triton_config import TYPES, parse, to_text
from longspan.exporter.serving.triton_repository import Repository
from longspan.plugins import LibraryMissing, ort_library_path

from .engines import LOADER, PLUGINS, tensorrt_engine

proto = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient[grpc] is not installed")


def config_of(repository: Repository, model: str = "encoder") -> Any:
    return parse((repository.path / "models" / model / "config.pbtxt").read_text())


def files_of(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_an_ort_build_field_by_field(ort_bundle: Path, tmp_path: Path) -> None:
    repository = package(ort_bundle, tmp_path / "repo", PackageRequest(engines=("single",), queue_delay_us=250))
    config, manifest = config_of(repository), Bundle.open(ort_bundle).manifest
    assert (config.name, config.platform, config.backend) == ("encoder", "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 4
    assert [(i.name, proto.DataType.Name(i.data_type), list(i.dims)) for i in config.input] == [
        (record.name, TYPES[record.dtype], [-1]) for record in manifest.inputs
    ]
    assert [(o.name, proto.DataType.Name(o.data_type), list(o.dims)) for o in config.output] == [
        (record.name, TYPES[record.dtype], [-1, 64] if len(record.shape) == 3 else [64]) for record in manifest.outputs
    ]
    assert not any(tensor.allow_ragged_batch for tensor in config.input)
    assert config.version_policy.HasField("all")
    assert config.HasField("dynamic_batching")
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    # No batch is better than another without profiles; the server's documentation says to name none then.
    assert not config.dynamic_batching.preferred_batch_size
    (group,) = config.instance_group
    assert (group.kind, group.count) == (proto.ModelInstanceGroup.KIND_CPU, 1)
    assert {name: value.string_value for name, value in config.parameters.items()} == {
        "enable_mem_arena": "1",
        "enable_mem_pattern": "0",
        "session.use_device_allocator_for_initializers": "1",
    }
    assert not config.optimization.execution_accelerators.gpu_execution_accelerator
    assert list(config.model_operations.op_library_filename) == ["/longspan/plugins/liblongspan_ort.so"]
    (sample,) = config.model_warmup
    opt = profiles_of(manifest)[0].inputs["input_ids"].opt
    assert (sample.name, sample.batch_size, sample.count) == ("opt", opt[0], 1)
    for name, value in sample.inputs.items():
        assert list(value.dims) == [opt[1]]
        assert value.input_data_file == f"opt.{name}.bin"
    assert repository.start == ("--model-repository=/longspan/models",)


def test_the_packaged_model_runs_its_warm_up_with_the_library_that_its_configuration_names(
    ort_bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "repo"
    repository = package(ort_bundle, out, PackageRequest(engines=("single",), mount=str(out)))
    config = config_of(repository)
    options = onnxruntime.SessionOptions()
    for file in config.model_operations.op_library_filename:
        options.register_custom_ops_library(file)
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    model = out / "models" / config.name / "1" / "model.onnx"
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    records = {record.name: record for record in Bundle.open(ort_bundle).manifest.inputs}
    (sample,) = config.model_warmup
    feed = {}
    for name, value in sample.inputs.items():
        data = (model.parents[1] / "warmup" / value.input_data_file).read_bytes()
        one = np.frombuffer(data, records[name].dtype).reshape(1, *value.dims)
        assert one.min() >= records[name].low and one.max() <= records[name].high
        feed[name] = np.repeat(one, sample.batch_size, 0)
    outputs = session.run([output.name for output in config.output], feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = {event["args"]["op_name"] for event in events if event.get("cat") == "Node"}
    assert "SlidingWindowAttention" in ran
    oracle = open_session(str(ort_bundle / "model.onnx"), ort_library_path()).run(None, feed)
    for output, got, expected in zip(config.output, outputs, oracle, strict=True):
        assert list(got.shape[1:]) == [got.shape[1] if size == -1 else size for size in output.dims]
        assert np.abs(got - expected).max() <= 64 * np.finfo(np.float32).eps * np.abs(expected).max()


def test_everything_is_hashed_and_described(ort_bundle: Path, tmp_path: Path) -> None:
    repository = package(ort_bundle, tmp_path / "repo")
    written = json.loads((repository.path / "manifest.json").read_text())
    assert sorted([*written["files"], "manifest.json"]) == files_of(repository.path)
    assert all(sha256_of(repository.path / name) == sha for name, sha in written["files"].items())
    assert written["libraries"] == {"liblongspan_ort.so": sha256_of(Path(ort_library_path()))}
    (model,) = written["models"]
    assert [(row["number"], row["engines"], row["dtype"]) for row in model["versions"]] == [
        (1, ["half"], "fp16"), (2, ["single"], "fp32"),
    ]  # fmt: skip
    engines = ort_bundle / "engines"
    for number, name in ((1, "half"), (2, "single")):
        version = repository.path / "models" / "encoder" / str(number)
        assert sha256_of(version / "model.onnx") == sha256_of(engines / name / "model.onnx")
    readme = (repository.path / "README.md").read_text()
    for text in (
        "tritonserver --model-repository=/longspan/models", "| 1 | `half` | fp16 |", "| 2 | `single` | fp32 |",
        "/v2/models/encoder/infer", written["libraries"]["liblongspan_ort.so"], "CPUExecutionProvider",
    ):  # fmt: skip
        assert text in readme
    assert "--gpus" not in readme
    call = next(line for line in readme.splitlines() if line.startswith("curl -s"))
    body = json.loads(call.split("-d '")[1].removesuffix("'"))
    assert {value["name"] for value in body["inputs"]} == {
        record.name for record in Bundle.open(ort_bundle).manifest.inputs
    }
    assert all(len(value["data"]) == np.prod(value["shape"]) for value in body["inputs"])


def test_the_clients_program_in_the_readme_sends_what_the_model_takes(
    ort_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tritonclient.grpc as triton

    sent: dict[str, Any] = {}
    manifest = Bundle.open(ort_bundle).manifest

    class Client:
        def __init__(self, url: str) -> None:
            sent["url"] = url

        def infer(self, name: str, inputs: list[Any]) -> Client:
            sent.update(name=name, inputs={value.name(): (value.datatype(), value.shape()) for value in inputs})
            return self

        def as_numpy(self, name: str) -> Any:
            assert name == manifest.outputs[0].name
            return np.zeros(())

    readme = (package(ort_bundle, tmp_path / "repo").path / "README.md").read_text()
    monkeypatch.setattr(triton, "InferenceServerClient", Client)
    exec(readme.split("```python\n")[1].split("```")[0], {})
    assert (sent["name"], sent["url"]) == ("encoder", "localhost:8001")
    assert sent["inputs"] == {record.name: ("INT64", [1, 8]) for record in manifest.inputs}


def test_versions_follow_the_order_that_is_asked_for(ort_bundle: Path, tmp_path: Path) -> None:
    repository = package(ort_bundle, tmp_path / "repo", PackageRequest(engines=("single", "half"), name="other.name"))
    (model,) = repository.manifest.models
    assert [row["engines"] for row in model["versions"]] == [["single"], ["half"]]
    assert config_of(repository, "other.name").name == "other.name"


def test_a_tensorrt_engine_with_the_plugin(served: Path, plugin_library: Path, tmp_path: Path) -> None:
    engine = tensorrt_engine(served, "engine", plugin=plugin_library, longest=64)
    repository = package(served, tmp_path / "repo")
    config = config_of(repository)
    assert (config.platform, config.backend, config.max_batch_size) == ("tensorrt_plan", "tensorrt", 4)
    assert not config.cc_model_filenames and not config.HasField("model_operations")
    assert list(config.dynamic_batching.preferred_batch_size) == [2]
    (group,) = config.instance_group
    assert (group.kind, list(group.profile)) == (proto.ModelInstanceGroup.KIND_GPU, [])
    samples = [(s.name, s.batch_size, {tuple(i.dims) for i in s.inputs.values()}) for s in config.model_warmup]
    assert samples == [("opt", 2, {(32,)}), ("max", 4, {(64,)})]
    folder = repository.path / "models" / "encoder"
    assert (folder / "1" / "model.plan").read_bytes() == engine.file.read_bytes()
    for sample in config.model_warmup:
        for value in sample.inputs.values():
            # The server repeats one row as often as the batch is large.
            assert (folder / "warmup" / value.input_data_file).stat().st_size == 8 * value.dims[0]
    assert repository.start == (
        "--model-repository=/longspan/models",
        f"--backend-config=tensorrt,plugins=/longspan/plugins/{LOADER}",
    )
    assert set(repository.manifest.libraries) == {PLUGINS, LOADER}
    assert repository.manifest.libraries[PLUGINS] == sha256_of(plugin_library)
    # The server takes every folder beside models for a model.
    assert [entry.name for entry in (repository.path / "models").iterdir()] == ["encoder"]
    readme = (repository.path / "README.md").read_text()
    for text in ("--gpus all", "compute capability 8.9", "TensorRT 10.14.1.48", "built, not run", LOADER):
        assert text in readme


def test_engines_of_several_gpus_are_one_version(served: Path, tmp_path: Path) -> None:
    for name, gpu in (("a", "sm80"), ("b", "sm120")):
        tensorrt_engine(served, name, gpu)
        tensorrt_engine(served, f"{name}-fp32", gpu, dtype="fp32")
    repository = package(served, tmp_path / "repo")
    config = config_of(repository)
    assert dict(config.cc_model_filenames) == {"8.0": "sm80.plan", "12.0": "sm120.plan"}
    folder = repository.path / "models" / "encoder"
    assert files_of(folder / "1") == files_of(folder / "2") == ["sm120.plan", "sm80.plan"]
    assert (folder / "1" / "sm120.plan").read_bytes() == b"engine b"
    assert (folder / "2" / "sm80.plan").read_bytes() == b"engine a-fp32"
    assert repository.start == ("--model-repository=/longspan/models",)


def test_several_profiles_are_all_used(served: Path, tmp_path: Path) -> None:
    tensorrt_engine(served, "engine", batches=((1, 1, 2), (1, 4, 8)))
    config = config_of(package(served, tmp_path / "repo"))
    assert list(config.instance_group[0].profile) == ["0", "1"]
    assert config.max_batch_size == 8
    assert list(config.dynamic_batching.preferred_batch_size) == [4]
    assert [(s.name, s.batch_size) for s in config.model_warmup] == [
        ("opt_0", 1), ("max_0", 2), ("opt_1", 4), ("max_1", 8),
    ]  # fmt: skip


def test_no_version_is_warmed_up_with_what_it_does_not_take(served: Path, tmp_path: Path) -> None:
    tensorrt_engine(served, "long", longest=128)
    tensorrt_engine(served, "short", longest=64, batches=((1, 2, 3),))
    config = config_of(package(served, tmp_path / "repo"))
    assert config.max_batch_size == 3
    # 64 tokens are the best of the one and the most of the other; 128 only one takes.
    assert [(s.batch_size, next(iter(s.inputs.values())).dims[0]) for s in config.model_warmup] == [(2, 64)]


def test_platforms_become_models_of_their_own(served: Path, ort_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(ort_bundle / "engines", served / "engines")
    tensorrt_engine(served, "engine")
    repository = package(served, tmp_path / "repo")
    assert [model["name"] for model in repository.manifest.models] == ["encoder-tensorrt", "encoder-cpu"]
    assert config_of(repository, "encoder-cpu").platform == "onnxruntime_onnx"
    assert config_of(repository, "encoder-tensorrt").platform == "tensorrt_plan"


def test_gpu_providers_of_onnx_runtime(longformer_bundle: Path, tmp_path: Path, kernel_library: str) -> None:
    from longspan.exporter.engines import BuildRequest, build

    bundle = Path(shutil.copytree(longformer_bundle, tmp_path / "encoder"))
    build(bundle, BuildRequest("ort", provider="cuda"))
    shapes = {f"{bound}_shapes": (f"input_ids:[{rows},64]",) for bound, rows in (("min", 1), ("opt", 2), ("max", 4))}
    build(bundle, BuildRequest("ort", provider="tensorrt", **shapes))  # type: ignore[arg-type]
    repository = package(bundle, tmp_path / "repo")
    config = config_of(repository, "encoder-cuda-bodies")
    (cuda,) = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert cuda.name == "cuda"
    # The server gives instances their device, and reads two options from the parameters, as numbers.
    assert dict(cuda.parameters) == {
        "use_tf32": "0",
        "enable_skip_layer_norm_strict_mode": "1",
        "enable_cuda_graph": "0",
    }
    assert config.parameters["arena_extend_strategy"].string_value == "1"
    assert config.parameters["cudnn_conv_algo_search"].string_value == "1"
    assert config.instance_group[0].kind == proto.ModelInstanceGroup.KIND_GPU
    assert not config.model_operations.op_library_filename
    config = config_of(repository, "encoder-ort-tensorrt")
    tensorrt, cuda = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert (tensorrt.name, cuda.name) == ("tensorrt", "cuda")
    assert tensorrt.parameters["trt_engine_cache_path"] == "/longspan/trt_cache"
    assert tensorrt.parameters["trt_profile_max_shapes"].startswith("input_ids:4x64,")
    assert "device_id" not in tensorrt.parameters
    assert (repository.path / "trt_cache").is_dir()
    readme = (repository.path / "README.md").read_text()
    assert "/longspan:ro" not in readme and "servers from 24.07 on" in readme


def test_plugins_in_onnx_runtime(served: Path, plugin_library: Path, tmp_path: Path) -> None:
    profiles = profiles_of(Bundle.open(served).manifest, max_shapes=["input_ids:[4,64]"])
    for name, plugins in (("bodies", False), ("plugins", True)):
        plan = SessionPlan(
            model="model.engine", operator_library=None, enable_mem_pattern=False, offline_level="disabled",
            tensorrt_plugins=plugins,
            providers=(ProviderPlan(TENSORRT_PROVIDER, tensorrt_options(profiles), TENSORRT_PATHS),
                       ProviderPlan(CUDA_PROVIDER, cuda_options()), ProviderPlan(CPU_PROVIDER)),
        )  # fmt: skip
        values = {"target": "ort", "session": plan.to_dict(), "options": {"provider": "tensorrt"}}
        tensorrt_engine(served, name, profiles=profiles, **values)
    # One version that needs them is enough.
    for engines in (("plugins",), ("bodies", "plugins")):
        repository = package(served, tmp_path / "repo", PackageRequest(engines=engines), force=True)
        accelerator = config_of(repository).optimization.execution_accelerators.gpu_execution_accelerator[0]
        # The fixture's installation has the libraries of TensorRT 10 only.
        assert accelerator.parameters["trt_extra_plugin_lib_paths"] == f"/longspan/plugins/{LOADER}"
        assert set(repository.manifest.libraries) == {PLUGINS, LOADER}
        # It is the provider that loads them, not the server's TensorRT backend.
        assert repository.start == ("--model-repository=/longspan/models",)
    with pytest.raises(InvalidRequest, match=r"--plugin-library .*: no served engine of TensorRT needs a plugin"):
        package(served, tmp_path / "other", PackageRequest(engines=("bodies",), plugin_library=plugin_library))
    repository = package(served, tmp_path / "repo", PackageRequest(engines=("bodies",)), force=True)
    accelerator = config_of(repository).optimization.execution_accelerators.gpu_execution_accelerator[0]
    assert "trt_extra_plugin_lib_paths" not in accelerator.parameters
    assert not repository.manifest.libraries


def test_batches_that_the_server_cannot_make(served: Path, tmp_path: Path) -> None:
    tensorrt_engine(served, "engine", batches=((2, 2, 4),))
    config = config_of(package(served, tmp_path / "repo"))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert [list(tensor.dims) for tensor in config.input] == [[-1, -1]] * len(config.input)
    assert [(s.batch_size, list(next(iter(s.inputs.values())).dims)) for s in config.model_warmup] == [
        (1, [2, 32]), (1, [4, 64]),
    ]  # fmt: skip
    with pytest.raises(InvalidRequest, match=r"takes no single row"):
        package(served, tmp_path / "other", PackageRequest(max_batch=2))


def test_scalars_are_one_number_a_row(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longspan.exporter.serving import triton_config

    tensor = proto.ModelOutput()
    triton_config._tensor(proto, tensor, OutputRecord("score", "float32", ("batch",)), True)
    assert list(tensor.dims) == [1] and tensor.HasField("reshape") and not tensor.reshape.shape
    with pytest.raises(InvalidRequest, match="is a scalar"):
        triton_config._tensor(proto, proto.ModelInput(), InputRecord("x", "float32", (), "data"), False)
    with pytest.raises(InvalidRequest, match="of type complex64"):
        triton_config._tensor(proto, proto.ModelInput(), InputRecord("x", "complex64", ("batch",), "data"), True)


@pytest.mark.parametrize("name", ["", " ", "..", ".hidden", "a/b", "-x", "a b", "ä", "x" * 129])
def test_names_that_the_server_refuses(ort_bundle: Path, tmp_path: Path, name: str) -> None:
    if not name:
        bundle = tmp_path / "not a name"
        shutil.copytree(ort_bundle, bundle)
    else:
        bundle = ort_bundle
    with pytest.raises(InvalidRequest, match="--name"):
        package(bundle, tmp_path / "repo", PackageRequest(name=name))
    assert not (tmp_path / "repo").exists()


def test_what_cannot_be_served(served: Path, plugin_library: Path, tmp_path: Path) -> None:
    def refused(match: str, **request: Any) -> None:
        with pytest.raises(InvalidRequest, match=match):
            package(served, tmp_path / "repo", PackageRequest(**request))
        assert not (tmp_path / "repo").exists()

    refused("has no engines to serve; next step: longspan build")
    rtx = tensorrt_engine(served, "rtx", target="tensorrt-rtx")
    refused("no engine can be served: rtx: the server has no backend for TensorRT-RTX")
    refused("--engine rtx: the server has no backend", engines=("rtx",))
    tensorrt_engine(served, "stripped", options={"strip": True})
    refused("--engine stripped: its weights were left out", engines=("stripped",))
    tensorrt_engine(served, "graph", options={"graph_only": True})
    refused("--engine graph: is a graph", engines=("graph",))
    tensorrt_engine(served, "a", "sm80", plugin=plugin_library)
    tensorrt_engine(served, "b", "sm89", dtype="fp32", plugin=plugin_library)
    refused("cannot be versions of one model", engines=("a", "b"))
    refused("named twice", engines=("a", "a"))
    refused("the engines take 4 rows at most", engines=("a",), max_batch=5)
    refused("must be 0", engines=("a",), max_batch=-1)
    refused("no such engine", engines=("c",))
    tensorrt_engine(served, "eleven", plugin=plugin_library, versions={"tensorrt": "11.1.0"})
    refused("a server has one TensorRT", engines=("b", "eleven"))
    tensorrt_engine(served, "unknown", plugin=plugin_library, versions={})
    refused("does not say which TensorRT", engines=("unknown",))
    plugin_library.write_bytes(b"built again")
    refused("was built with another liblongspan_trt10", engines=("a",))
    assert rtx.path.is_dir()
    with pytest.raises(LibraryMissing, match="no such file"):
        package(served, tmp_path / "repo", PackageRequest(engines=("a",), plugin_library=tmp_path / "none.so"))


def test_others_are_left_out_and_named(served: Path, tmp_path: Path) -> None:
    tensorrt_engine(served, "engine")
    tensorrt_engine(served, "rtx", target="tensorrt-rtx")
    repository = package(served, tmp_path / "repo")
    (reason,) = repository.manifest.left_out
    assert reason.startswith("rtx: the server has no backend for TensorRT-RTX")
    assert [row["engines"] for row in repository.manifest.models[0]["versions"]] == [["engine"]]


@pytest.mark.parametrize("mount", ["longspan", "/", "/a/../b", "/a b", "/a;b", ""])
def test_mounts_that_a_configuration_cannot_name(mount: str) -> None:
    with pytest.raises(InvalidRequest, match="--mount"):
        PackageRequest(mount=mount)


def test_a_version_compatible_engine_says_so(served: Path, tmp_path: Path) -> None:
    tensorrt_engine(served, "engine", options={"version_compatible": True})
    repository = package(served, tmp_path / "repo")
    assert "--backend-config=tensorrt,version-compatible=true" in repository.start


def test_written_whole_or_not_at_all(ort_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "repo"

    def failing(*arguments: Any, **options: Any) -> str:
        raise ExportFailed("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(triton_repository, "to_text", failing)
        with pytest.raises(ExportFailed, match="disk"):
            package(ort_bundle, out)
    assert [entry.name for entry in tmp_path.iterdir()] == []
    package(ort_bundle, out, PackageRequest(name="first"))
    before = files_of(out)
    with pytest.raises(InvalidRequest, match="--force"):
        package(ort_bundle, out, PackageRequest(name="second"))
    with monkeypatch.context() as patch:
        patch.setattr(triton_repository, "readme", failing)
        with pytest.raises(ExportFailed, match="disk"):
            package(ort_bundle, out, PackageRequest(name="second"), force=True)
    assert files_of(out) == before
    package(ort_bundle, out, PackageRequest(name="second"), force=True)
    assert [entry.name for entry in (out / "models").iterdir()] == ["second"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["repo"]


def test_nothing_else_is_replaced(ort_bundle: Path, served: Path, tmp_path: Path) -> None:
    for folder in (served, Path(shutil.copytree(ort_bundle / "engines" / "single", tmp_path / "engine"))):
        before = files_of(folder)
        with pytest.raises(InvalidRequest, match="a bundle or an engine, which would be lost"):
            package(ort_bundle, folder, force=True)
        assert files_of(folder) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").write_text("mine")
    with pytest.raises(InvalidRequest, match="would be lost"):
        package(ort_bundle, tmp_path / "notes", force=True)


def test_the_schema_is_asked_for_before_anything_is_written(
    ort_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    with pytest.raises(EnvironmentLacks, match=r"pip install 'longspan\[serving\]'"):
        package(ort_bundle, tmp_path / "repo")
    assert not (tmp_path / "repo").exists()


def test_text_that_the_schema_does_not_read_is_refused() -> None:
    config = proto.ModelConfig(name="x", max_batch_size=2)
    assert parse(to_text(config)) == config
    with pytest.raises(ExportFailed, match="server's schema"):
        parse("max_batch: 3")
