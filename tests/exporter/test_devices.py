"""Where bundles compute: what is missing is said before anything long begins, and with the way to get it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from longspan.exporter import Bundle, EnvironmentLacks, FallbackRan, InvalidRequest, check, devices
from longspan.exporter.devices import exact_providers, kernels_missing, require_device, verify_session
from longspan.exporter.manifest import KernelsRecord
from longspan.exporter.parity import runners
from longspan.exporter.throughput import BenchSettings
from longspan.exporter.throughput.trial import bound
from longspan.exporter.throughput.variants import kernel_variant
from onnx import TensorProto, helper

GPU_PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_devices_have_providers() -> None:
    assert BenchSettings().device == "cpu" and BenchSettings().providers == ("CPUExecutionProvider",)
    assert BenchSettings(providers=devices.PROVIDERS["cuda"]).device == "cuda"
    assert exact_providers("cpu") == ["CPUExecutionProvider"]
    assert exact_providers("cuda") == [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"]
    require_device("cpu")
    with pytest.raises(InvalidRequest, match="allowed: cpu, cuda"):
        require_device("tpu")


def test_a_runtime_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EnvironmentLacks, match=r"CUDAExecutionProvider: .*pip install onnxruntime-gpu"):
        require_device("cuda")


def test_a_machine_without_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: GPU_PROVIDERS)
    monkeypatch.setattr(devices, "_DRIVER", "libcuda-that-is-not-there.so.1")
    assert devices.cuda_devices() == 0
    with pytest.raises(EnvironmentLacks, match="there is no NVIDIA GPU"):
        require_device("cuda")
    monkeypatch.setattr(devices, "cuda_devices", lambda: 1)
    require_device("cuda")


def test_without_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EnvironmentLacks, match="not installed; next step"):
        require_device("cuda")


def test_a_session_on_another_provider_is_refused() -> None:
    class Session:
        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    verify_session(Session(), devices.PROVIDERS["cpu"])
    with pytest.raises(EnvironmentLacks, match="could not start CUDAExecutionProvider and took CPUExecutionProvider"):
        verify_session(Session(), devices.PROVIDERS["cuda"])


def test_a_bundle_without_gpu_kernels_says_how_to_get_them(bert_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(bert_bundle)
    monkeypatch.delenv("LONGSPAN_KERNEL_PATH", raising=False)
    assert kernels_missing("cpu", bundle.manifest) == ""
    assert "next step: export with --gpu-arch" in kernels_missing("cuda", bundle.manifest)
    variant = kernel_variant(bundle, "cuda")
    assert variant.model is None and "--gpu-arch" in variant.unavailable
    record = KernelsRecord(("sm_90",), "0" * 64, 1, 1, "compiler", {})
    assert kernels_missing("cuda", dataclasses.replace(bundle.manifest, gpu=record)) == ""
    partial = dataclasses.replace(record, refused={"node_3": "a head size of 512"})
    missing = kernels_missing("cuda", dataclasses.replace(bundle.manifest, gpu=partial))
    assert missing.endswith("for every site (node_3: a head size of 512)")
    monkeypatch.setenv("LONGSPAN_KERNEL_PATH", "packs")
    assert kernels_missing("cuda", bundle.manifest) == ""


def test_check_refuses_before_it_opens_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EnvironmentLacks, match="CUDAExecutionProvider"):
        check(tmp_path / "none", device="cuda")


def test_trials_bind_inputs_and_outputs() -> None:
    """The way a trial on a GPU is fed, on the CPU."""
    value: Any = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["c"])],
        "sum",
        [value("a", TensorProto.FLOAT, ["n"]), value("b", TensorProto.FLOAT, ["n"])],
        [value("c", TensorProto.FLOAT, ["n"])],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"a": np.arange(3, dtype=np.float32), "b": np.ones(3, np.float32)}
    binding = bound(onnxruntime, session, feeds, "cpu")
    session.run_with_iobinding(binding)
    assert binding.copy_outputs_to_cpu()[0].tolist() == [1, 2, 3]


def test_check_on_a_gpu_runs_the_body_of_a_bundle_without_kernels(
    bert_bundle: Path, copied: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU's provider stands in for CUDA's."""
    monkeypatch.delenv("LONGSPAN_KERNEL_PATH", raising=False)
    monkeypatch.setitem(devices.PROVIDERS, "cuda", ("CPUExecutionProvider",))
    monkeypatch.setattr(devices, "exact_providers", lambda device: list(devices.PROVIDERS[device]))
    monkeypatch.setattr(runners, "exact_providers", devices.exact_providers)
    monkeypatch.setattr(devices, "cuda_devices", lambda: 1)
    bundle = copied(bert_bundle)
    report = check(bundle, device="cuda", lengths=[40])
    kernel, body = report.paths
    assert not kernel.ran and "next step: export with --gpu-arch" in kernel.reason
    assert body.ran and report.passed
    with pytest.raises(FallbackRan, match="--gpu-arch"):
        check(bundle, device="cuda", lengths=[40], require_kernel=True)
