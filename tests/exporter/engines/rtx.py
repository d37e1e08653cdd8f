"""Parse and build with TensorRT-RTX in a process of its own, since it may end the process; no GPU is needed.

As a program: ``python rtx.py MODEL < request.json`` prints what `Built` holds as JSON.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Built:
    """What TensorRT-RTX made of a model.

    Attributes:
        parsed: Whether the parser took it.
        errors: What the parser or the builder said where it failed.
        warnings: Of both.
        layers: (type, name, names of its inputs) of each layer of the network.
        bytes: Size of the engine; 0 where none was asked for, or none came.
        sha256: Of the engine. Builds of equal networks in this form are equal.
        exit_code: Of the process: negative where it was ended.
    """

    parsed: bool = False
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    layers: list[tuple[str, str, list[str]]] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""
    exit_code: int = 0


def rtx(
    model: ir.Model, folder: Path, shapes: Shapes | None = None, capability: str | None = None, name: str = "model"
) -> Built:
    """Parse a model and, where a capability is named, build it.

    Args:
        model: Has no external data.
        folder: Where to write.
        shapes: Smallest, best and largest shape of each input.
        capability: ``"SM89"``, …; None parses only.
        name: Of the file.
    """
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    file = folder / f"{name}.onnx"
    ir.save(model, file)
    request = json.dumps({"shapes": shapes or {}, "capability": capability})
    done = subprocess.run(
        [sys.executable, __file__, str(file)], input=request, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        return Built(errors=[done.stderr[-2000:]], exit_code=done.returncode)
    return Built(**json.loads(done.stdout.splitlines()[-1]))


def _build(file: str, request: dict[str, Any]) -> dict[str, Any]:
    import tensorrt_rtx as trt

    said: dict[str, list[str]] = {"errors": [], "warnings": []}

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                said["errors"].append(message)
            elif severity == trt.ILogger.WARNING:
                said["warnings"].append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network()
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(Path(file).read_bytes())
    layers = []
    for number in range(network.num_layers):
        layer = network.get_layer(number)
        inputs = [layer.get_input(k) for k in range(layer.num_inputs)]
        layers.append((layer.type.name, layer.name, [x.name for x in inputs if x is not None]))
    result = {"parsed": parsed, **said, "layers": layers}
    if not parsed or request["capability"] is None:
        return result
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, request["capability"]), 0)
    if request["shapes"]:
        profile = builder.create_optimization_profile()
        for name, ranges in request["shapes"].items():
            profile.set_shape(name, *map(tuple, ranges))
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is not None:
        result |= {"bytes": engine.nbytes, "sha256": hashlib.sha256(bytes(engine)).hexdigest()}
    return result


if __name__ == "__main__":
    print(json.dumps(_build(sys.argv[1], json.loads(sys.stdin.read()))))
