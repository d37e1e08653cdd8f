"""Runs in the place of the worker of `exporter.engines.running`: its protocol, with ONNX Runtime instead of TensorRT.

The engine is an ONNX file. What else is wanted stands in environment variables: ``STAND_IN_VERSION``,
``STAND_IN_LAYERS`` (JSON) and ``STAND_IN_FAULT``, one of those in `Session.infer` or `Session.open`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longspan.exporter.engines.running.exchange import Array
from longspan.exporter.engines.running.inference_worker import CORRUPTED, FAILED, Refused, serve

FAULT = os.environ.get("STAND_IN_FAULT", "")


class Session:
    """Answers requests with ONNX Runtime."""

    def hello(self, module: str) -> dict[str, Any]:
        print("what libraries print does not disturb the answers")
        if FAULT == "no module":
            raise ImportError(f"No module named {module!r}")
        self.rtx = os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX", "")
        return {"version": os.environ.get("STAND_IN_VERSION", "10.14.1.48")}

    def open(self, engine: str, library: str | None) -> dict[str, Any]:
        if FAULT == "corrupted":
            raise Refused(CORRUPTED, "header.magicTag == kEXPECTED_MAGIC_TAG failed")
        if FAULT == "crash at open":
            print("Assertion `engine` failed.", file=sys.stderr, flush=True)
            os.abort()
        if Path(engine).suffix == ".onnx":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            self.session = onnxruntime.InferenceSession(engine, options, providers=["CPUExecutionProvider"])
        layers = json.loads(os.environ.get("STAND_IN_LAYERS", "[]"))
        return {"layers": layers, "provider": f"stand-in {self.rtx}".strip(), "library": library}

    def infer(self, feed: Mapping[str, Array], profile: int) -> tuple[dict[str, Array], float]:
        if FAULT == "refuse":
            raise Refused(FAILED, "no kernel image is available")
        if FAULT == "crash" or (FAULT.startswith("crash at ") and FAULT.endswith(f" {_length(feed)}")):
            print("cudaErrorIllegalAddress\n", file=sys.stderr, flush=True)
            os.abort()
        if FAULT == "leave":
            sys.exit(7)
        if FAULT == "slow":
            time.sleep(0.3)
        if FAULT == "hang":
            time.sleep(600)
        if FAULT == "nonsense":
            raise ValueError("first line\nsecond line")
        if hasattr(self, "session"):
            names = [value.name for value in self.session.get_outputs()]
            return dict(zip(names, self.session.run(None, dict(feed)), strict=True)), 0.25
        return {f"{name} {profile}": value for name, value in feed.items()}, 0.5


def _length(feed: Mapping[str, Array]) -> int:
    return next(iter(feed.values())).shape[-1]


if __name__ == "__main__":
    serve(Session)
