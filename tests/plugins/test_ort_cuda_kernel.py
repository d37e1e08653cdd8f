"""The CUDA kernels in ONNX Runtime, on a stub of the driver: a CPU session runs them where it would run its own."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from longspan.exporter import Bundle
from longspan.exporter.parity.inputs import draw_inputs
from longspan.plugins import operator
from longspan.plugins.definition import DOMAIN, PACK_ATTRIBUTE, PACK_ID_ATTRIBUTE
from longspan.plugins.gpu.pack import pack_id
from longspan.plugins.gpu.pack_build import Target
from longspan.plugins.gpu.variants import KernelSite, variants_for
from onnx import TensorProto, helper, numpy_helper

from .cuda_programs import build, entry_of, stub_pack

TARGET = Target(90)


@pytest.fixture(scope="module")
def library() -> str:
    return str(build("longspan_ort_stub") / "liblongspan_ort_stub.so")


def calls(library: str) -> list[str]:
    """What the driver was asked since the last time."""
    stub = ctypes.CDLL(str(Path(library).with_name("libstub_driver.so")))
    stub.TakeCalls.restype = ctypes.c_char_p
    text: bytes = stub.TakeCalls()
    return text.decode().splitlines()


def site(inputs: tuple[str, ...] = (), dtype: str = "float16", lse: bool = False, **attributes: Any) -> KernelSite:
    window = {"left_window_size": 4, "right_window_size": 4, **attributes}
    return KernelSite("SlidingWindowAttention", dtype, 16, 16, 2, 1, ("Q", "K", "V", *inputs), window, lse)


def bytes_of(*sites: KernelSite) -> bytes:
    return stub_pack([(variants_for(one, TARGET.architecture), TARGET) for one in sites]).to_bytes()


def node(one: KernelSite, name: str, attributes: Mapping[str, Any]) -> onnx.NodeProto:
    """A node of the site, whose inputs are those of the graph."""
    definition = operator(one.operator)
    names = [tensor.name if one.has(tensor.name) else "" for tensor in definition.inputs]
    while not names[-1]:
        names.pop()
    outputs = [f"{name}_Y", *([f"{name}_lse"] if one.lse else [])]
    return helper.make_node(definition.name, names, outputs, name, domain=DOMAIN, **one.attributes, **attributes)


def session(library: str, nodes: list[onnx.NodeProto], *, width: int | None = 16) -> ort.InferenceSession:
    """A session of the nodes; a width of None is one that the model does not say."""
    last = width if width is not None else "width"
    shapes = {"Q": ["B", 2, "S", last], "K": ["B", 1, "S", last], "V": ["B", 1, "S", last], "attn_mask": ["B", "S"]}
    used = {name for one in nodes for name in one.input}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.BOOL if name == "attn_mask" else TensorProto.FLOAT16, shape)
        for name, shape in shapes.items()
        if name in used
    ]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT if "lse" in name else TensorProto.FLOAT16, None)
        for one in nodes
        for name in one.output
    ]
    graph = helper.make_graph(nodes, "nodes", inputs, outputs)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 4  # nodes that fail are part of the tests
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # equal nodes stay two
    options.register_custom_ops_library(library)
    content = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def feeds(opened: ort.InferenceSession, width: int = 16, length: int = 40) -> dict[str, Any]:
    shapes = {"Q": (1, 2, length, width), "K": (1, 1, length, width), "V": (1, 1, length, width)}
    given: dict[str, Any] = {name: np.zeros(shape, np.float16) for name, shape in shapes.items()}
    given["attn_mask"] = np.ones((1, length), bool)
    return {value.name: given[value.name] for value in opened.get_inputs()}


def carrier(data: bytes) -> dict[str, Any]:
    content = numpy_helper.from_array(np.frombuffer(data, np.uint8), PACK_ATTRIBUTE)
    return {PACK_ATTRIBUTE: content, PACK_ID_ATTRIBUTE: pack_id(data)}


def test_a_model_brings_its_kernels(library: str) -> None:
    one, two = site(), site(("attn_mask",), lse=True)
    data = bytes_of(one, two)
    calls(library)
    # The node that carries the pack comes last: the other finds it when it first runs.
    opened = session(library, [node(two, "two", {PACK_ID_ATTRIBUTE: pack_id(data)}), node(one, "one", carrier(data))])
    loaded = calls(library)
    assert loaded and all(line.startswith(("load cubin ", "prepare ", "shared ")) for line in loaded)
    y, lse, other = opened.run(None, feeds(opened))
    assert y.shape == other.shape == (1, 2, 40, 16) and lse.shape == (1, 2, 40)
    whole = [variants_for(each, TARGET.architecture).paths[-1].kernels[0] for each in (two, one)]
    launches = [line.split() for line in calls(library) if line.startswith("launch ")]
    assert {words[1] for words in launches} == {entry_of(kernel) for kernel in whole}
    assert {words[9] for words in launches} == {"0"}  # the CPU has no stream
    opened.run(None, feeds(opened))
    assert not [line for line in calls(library) if not line.startswith(("launch ", "memset "))]


def test_few_rows_take_scratch_memory_and_a_merge(library: str) -> None:
    data = bytes_of(site())
    opened = session(library, [node(site(), "one", carrier(data))])
    calls(library)
    opened.run(None, feeds(opened, length=1))
    split = variants_for(site(), TARGET.architecture).paths[0]
    launches = [line.split() for line in calls(library) if line.startswith("launch ")]
    assert [words[1] for words in launches] == [entry_of(kernel) for kernel in split.kernels]
    partial = [parameter.meaning for parameter in split.kernels[0].parameters].index("buffer:partial_out")
    assert int(launches[0][11 + partial], 16) % 256 == 0 != int(launches[0][11 + partial], 16)


def test_packs_are_found_by_the_environment(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, one in (("b", site()), ("a", site(is_causal=1))):
        (tmp_path / f"{name}.pack").write_bytes(bytes_of(one))
    monkeypatch.setenv("LONGSPAN_KERNEL_PATH", str(tmp_path))
    opened = session(library, [node(site(), "one", {}), node(site(is_causal=1), "two", {})])
    calls(library)
    opened.run(None, feeds(opened))
    assert len([line for line in calls(library) if line.startswith("launch ")]) == 2


def test_a_session_without_kernels_for_a_node_is_refused(library: str) -> None:
    data = bytes_of(site())
    for asked, attributes, reason in (
        (site(), {}, "no kernel pack is loaded"),
        (site(is_causal=1), carrier(data), "is_causal is 1, not 0"),
        (site(lse=True), carrier(data), "outputs are Y,lse, not Y"),
    ):
        with pytest.raises(Exception, match=reason) as refusal:
            session(library, [node(asked, "one", attributes)])
        assert "SlidingWindowAttention: no GPU kernel for SlidingWindowAttention of float16" in str(refusal.value)
        assert "device 0 (Stub, compute capability 9.0)" in str(refusal.value)
        assert "next step: compile kernels for this device" in str(refusal.value)
    with pytest.raises(Exception, match="D is 32, not 16"):
        session(library, [node(site(), "one", carrier(data))], width=32)


def test_what_a_model_does_not_say_is_refused_when_it_runs(library: str) -> None:
    data = bytes_of(site())
    opened = session(library, [node(site(), "one", carrier(data))], width=None)
    opened.run(None, feeds(opened))
    with pytest.raises(Exception, match="D is 32, not 16"):
        opened.run(None, feeds(opened, width=32))
    lost = session(library, [node(site(), "one", {PACK_ID_ATTRIBUTE: "0" * 64})])
    with pytest.raises(Exception, match=f"no node of the session carries the kernel pack {'0' * 64}"):
        lost.run(None, feeds(lost))


def test_a_damaged_pack_is_refused(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes_of(site())
    damaged = data[:-1] + bytes([data[-1] ^ 1])
    with pytest.raises(Exception, match=r"attribute kernel_pack differs from what was written \(SHA-256\)"):
        session(library, [node(site(), "one", carrier(damaged))])
    (tmp_path / "damaged.pack").write_bytes(damaged)
    monkeypatch.setenv("LONGSPAN_KERNEL_PATH", str(tmp_path))
    with pytest.raises(Exception, match=r"LONGSPAN_KERNEL_PATH: .*damaged.pack: differs from what was written"):
        session(library, [node(site(), "one", {})])


def test_an_exported_bundle_runs_by_the_kernels_inside(library: str, gpu_bundle: Path) -> None:
    opened = Bundle.open(gpu_bundle)
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    calls(library)
    running = ort.InferenceSession(opened.model_path, options, providers=["CPUExecutionProvider"])
    assert set(calls(library)) >= {"load ptx"}  # the stub is an sm_90, the bundle has machine code for sm_80
    running.run(None, draw_inputs(opened.manifest.inputs, 2, 40, seed=0))
    lines = calls(library)
    assert not [line for line in lines if line.startswith("load")]
    assert len([line for line in lines if line.startswith("launch window_forward ")]) == len(opened.manifest.sites)
