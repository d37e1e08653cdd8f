"""TensorRT-RTX's plugin registry in a process of its own, asked what it makes of nodes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from .cuda_programs import build

# Loads the library (argument 1) as a program would, and answers requests from its standard input with one JSON line. A
# probe (argument 2) is asked what the bindings do not tell of a C++ plugin.
CHILD = """
import ctypes, json, sys
import numpy
import tensorrt_rtx as trt

library, requests, probe = sys.argv[1], json.load(sys.stdin), ctypes.CDLL(sys.argv[2])
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


def ask(major: int, *requests: tuple[str, str, dict[str, Any]]) -> Any:
    """What the registry makes of requests: (operator, phase, fields)."""
    folder = build(f"longspan_trt{major}")
    probe = build(f"trt{major}_registry_probe") / f"libtrt{major}_registry_probe.so"
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder / f"liblongspan_trt{major}.so"), str(probe)],
        input=json.dumps(requests), capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"the process ended with {done.returncode}: {done.stdout}{done.stderr}"
    answer = json.loads(done.stdout.splitlines()[-1])
    answer["stderr"] = done.stderr
    return answer
