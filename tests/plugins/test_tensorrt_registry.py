"""The plugin library in the real plugin registry of TensorRT-RTX, in a process of its own: it takes no GPU to ask."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from longspan.plugins import operators, plugin_library_major
from longspan.plugins.tensorrt.headers import find_headers

from .cuda_programs import build
from .packs import pack

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
MAJORS = sorted(find_headers())
if not MAJORS:
    pytest.skip("no headers of TensorRT: install kernel-lens", allow_module_level=True)

# Loads the library (argument 1) as a program would, and answers requests (argument 2) with one JSON line. With a
# probe (argument 3) it also asks what the bindings do not tell of a C++ plugin.
CHILD = """
import ctypes, json, sys
import numpy
import tensorrt_rtx as trt

library, requests, probe = sys.argv[1], json.loads(sys.argv[2]), ctypes.CDLL(sys.argv[3])
said = []

class Logger(trt.ILogger):
    def __init__(self):
        super().__init__()
    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR:
            said.append(message)

logger = Logger()
builder = trt.Builder(logger)
registry = trt.get_plugin_registry()
before = {creator.name for creator in registry.all_creators}
registry.load_library(library)
answer = {"creators": {}, "plugins": [], "before": sorted(before)}
for creator in registry.all_creators:
    if creator.plugin_namespace == "longspan":
        answer["creators"][creator.name] = [creator.plugin_version, {f.name: f.type.name for f in creator.field_names}]

TYPES = {"INT32": numpy.int32, "FLOAT32": numpy.float32, "INT8": numpy.int8, "CHAR": numpy.int8, "INT64": numpy.int64}

class Field(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("type", ctypes.c_int32),
                ("length", ctypes.c_int32)]

probe.RoundTrip.restype = ctypes.c_char_p
for name, phase, values in requests:
    arrays = {key: (kind, numpy.array(list(bytes.fromhex(value)) if kind in ("CHAR", "INT8") else value,
                                      numpy.uint8 if kind in ("CHAR", "INT8") else TYPES[kind]).view(TYPES[kind]))
              for key, (kind, value) in values.items()}
    fields = [trt.PluginField(key, array, getattr(trt.PluginFieldType, kind)) for key, (kind, array) in arrays.items()]
    creator = registry.get_creator(name, "1", "longspan")
    plugin = creator.create_plugin("node", trt.PluginFieldCollection(fields), getattr(trt.TensorRTPhase, phase))
    made = None
    if plugin is not None:
        core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
        runtime = plugin.get_capability_interface(trt.PluginCapabilityType.RUNTIME)
        made = {"name": core.plugin_name, "version": core.plugin_version, "namespace": core.plugin_namespace,
                "interfaces": [core.interface_info.kind, build.interface_info.kind, runtime.interface_info.kind],
                "outputs": build.num_outputs, "id": build.timing_cache_id, "metadata": build.metadata_string}
    raw = (Field * len(arrays))(*[Field(key.encode(), array.ctypes.data, int(getattr(trt.PluginFieldType, kind)),
                                        array.size) for key, (kind, array) in arrays.items()])
    trip = probe.RoundTrip(library.encode(), name.encode(), raw, len(arrays)).decode() if phase == "BUILD" else ""
    answer["plugins"].append({"made": made, "trip": trip, "said": list(said)})
    said.clear()
print(json.dumps(answer))
"""


def chars(*values: str) -> tuple[str, str]:
    """STRINGS of an ONNX node, as TensorRT's parser hands them on."""
    return "CHAR", "".join(value + "\0" for value in values).encode().hex()


WINDOW: dict[str, Any] = {
    "left_window_size": ("INT32", [31]), "is_causal": ("INT32", [1]), "dilation": ("INT32", [1, 2]),
    "q_num_heads": ("INT32", [2]), "kv_num_heads": ("INT32", [1]), "scale": ("FLOAT32", [0.25]),
    "operands": chars("Q", "K", "V", "attn_mask"), "results": chars("Y"),
    "kernel_pack": ("INT8", pack().to_bytes().hex()),
}  # fmt: skip
BLOCKS: dict[str, Any] = {
    "q_block_size": ("INT32", [16]), "kv_block_size": ("INT32", [32]), "softcap": ("FLOAT32", [30.0]),
    "operands": chars("Q", "K", "V", "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    "results": chars("Y", "lse"),
}  # fmt: skip


def ask(major: int, *requests: tuple[str, str, dict[str, Any]]) -> Any:
    """What the registry makes of requests: (operator, phase, fields)."""
    folder = build(f"longspan_trt{major}")
    probe = build(f"trt{major}_registry_probe") / f"libtrt{major}_registry_probe.so"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder / f"liblongspan_trt{major}.so"), json.dumps(requests), str(probe)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"the process ended with {done.returncode}: {done.stdout}{done.stderr}"
    answer = json.loads(done.stdout.splitlines()[-1])
    answer["stderr"] = done.stderr
    return answer


@pytest.mark.parametrize("major", MAJORS)
def test_creators_and_plugins(major: int) -> None:
    answer = ask(major, ("SlidingWindowAttention", "BUILD", WINDOW), ("BlockSparseAttention", "BUILD", BLOCKS))
    assert sorted(answer["creators"]) == sorted(definition.name for definition in operators())
    for definition in operators():
        version, fields = answer["creators"][definition.name]
        assert version == "1"
        kinds = {"int": "INT32", "ints": "INT32", "float": "FLOAT32"}
        expected = {attribute.name: kinds[attribute.kind] for attribute in definition.attributes}
        assert fields == expected | {"operands": "CHAR", "results": "CHAR", "kernel_pack": "INT8"}
    window, blocks = answer["plugins"]
    for name, outputs, given in (("SlidingWindowAttention", 1, window), ("BlockSparseAttention", 2, blocks)):
        made = given["made"]
        assert (made["name"], made["version"], made["namespace"]) == (name, "1", "longspan")
        assert made["interfaces"] == ["PLUGIN_V3ONE_CORE", "PLUGIN_V3ONE_BUILD", "PLUGIN_V3ONE_RUNTIME"]
        assert made["outputs"] == outputs
        assert made["metadata"].startswith(f"{name}(Q,K,V,")
        assert not given["said"]
    assert "left_window_size=31" in window["made"]["metadata"] and "dilation=(1, 2)" in window["made"]["metadata"]


@pytest.mark.parametrize("major", MAJORS)
def test_clones_and_what_an_engine_keeps(major: int) -> None:
    answer = ask(major, ("SlidingWindowAttention", "BUILD", WINDOW), ("BlockSparseAttention", "BUILD", BLOCKS))
    for definition, given, fields in zip(operators(), answer["plugins"], (WINDOW, BLOCKS), strict=True):
        lines = given["trip"].splitlines()
        same = f" longspan::{definition.name} 1 {given['made']['id']}"
        assert lines[0] == "made" + same and lines[1] == "clone" + same and lines[-1] == "recreated" + same
        saved = {line.split()[1]: int(line.split()[3]) for line in lines[2:-1]}
        always = {attribute.name for attribute in definition.attributes if attribute.default is not None}
        assert saved.keys() == always | fields.keys() | {"operands", "results"}
        for key, (kind, value) in fields.items():
            assert saved[key] == (len(value) // 2 if kind in ("CHAR", "INT8") else len(value))


@pytest.mark.parametrize("major", MAJORS)
def test_an_engine_is_read_by_the_registry(major: int) -> None:
    saved = WINDOW | {"type": chars("float16")}
    read, built, refused = ask(major, ("SlidingWindowAttention", "RUNTIME", saved),
                               ("SlidingWindowAttention", "BUILD", WINDOW),
                               ("SlidingWindowAttention", "BUILD", saved))["plugins"]  # fmt: skip
    assert read["made"] == built["made"]
    assert refused["made"] is None


REFUSALS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"operands": chars("Q", "K")}, "field operands lacks V, which is required"),
    ({"operands": chars("Q", "K", "V", "mask")}, "field operands names 'mask'; allowed: Q, K, V, attn_mask"),
    ({"left_window_size": ("FLOAT32", [31.0])}, "field left_window_size is 1 of FLOAT32: must be 1 of INT32"),
    ({"left_window_size": ("INT32", [-2])}, "left_window_size = -2: must be -1 (unbounded), 0 or positive"),
    ({"windows": ("INT32", [1])}, "unknown field 'windows'; allowed: left_window_size, right_window_size"),
    ({"kernel_pack": ("INT8", "0102")}, "field kernel_pack is 2 bytes long, less than the header"),
)


@pytest.mark.parametrize("major", MAJORS)
def test_wrong_fields_are_refused_with_a_message(major: int) -> None:
    answer = ask(major, *(("SlidingWindowAttention", "BUILD", WINDOW | change) for change, _ in REFUSALS))
    for given, (_, message) in zip(answer["plugins"], REFUSALS, strict=True):
        assert given["made"] is None
        # TensorRT-RTX 1.7 has the interfaces of TensorRT 11: a library for 10 finds no logger there, and uses stderr.
        said = "".join(given["said"]) if major >= 11 else answer["stderr"]
        assert f"longspan SlidingWindowAttention 'node': {message}" in said


@pytest.mark.parametrize("major", MAJORS)
def test_the_file_tells_its_version(major: int) -> None:
    assert plugin_library_major(build(f"longspan_trt{major}") / f"liblongspan_trt{major}.so") == major


@pytest.mark.parametrize("major", MAJORS)
def test_nothing_is_linked_and_nothing_else_visible(major: int) -> None:
    library = Path(build(f"longspan_trt{major}") / f"liblongspan_trt{major}.so").read_bytes()
    for foreign in (b"libnvinfer", b"libcudart", b"libstdc++.so"):
        assert foreign not in library
