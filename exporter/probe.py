"""What `environment` asks of a process of its own, because a broken package may end it.

Each answer is a line of JSON behind `MARK`, because packages print what they like when they are imported.
"""

from __future__ import annotations

import importlib
import json
import os
import re
from typing import Any

MARK = "longspan-probe:"


def main(arguments: list[str]) -> None:
    """Answer ``imports MODULE …`` or ``kernel`` on stdout."""
    if arguments[0] == "imports":
        for name in arguments[1:]:
            _say({"name": name, "error": _import(name)})
    else:
        _say(kernel())


def _say(answer: dict[str, Any]) -> None:
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)


def _import(name: str) -> str:
    """Why `name` does not import; empty where it does."""
    try:
        importlib.import_module(name)
    except BaseException as error:  # a package may also call sys.exit
        return _describe(error)
    return ""


def _describe(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def kernel() -> dict[str, Any]:
    """ONNX Runtime's providers, and one attention node run with the library; what failed is under ``"error"``."""
    answer: dict[str, Any] = {"providers": "", "library": "", "isa": "", "error": ""}
    try:
        import onnxruntime

        answer["providers"] = ", ".join(onnxruntime.get_available_providers())
        from ..plugins.library import ort_library_path

        answer["library"] = ort_library_path()
        wanted = os.environ.get("LONGSPAN_CPU_ISA", "")
        # Asked for an instruction set that no machine has, the library names those that this one has, best first.
        os.environ["LONGSPAN_CPU_ISA"] = "?"
        found = re.search(r"this machine has ([\w, ]+)", _run(answer["library"]))
        os.environ["LONGSPAN_CPU_ISA"] = wanted
        answer["isa"] = wanted or (found.group(1).split(", ")[0] if found else "")
        answer["error"] = _run(answer["library"])
    except Exception as error:
        answer["error"] = _describe(error)
    return answer


def _run(library: str) -> str:
    """Why a model of one node does not run; empty where it does."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    node = helper.make_node("SlidingWindowAttention", ["q", "q", "q"], ["y"], domain="longspan", left_window_size=1)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 4, 8]) for name in ("q", "y")]
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("longspan", 1)]
    model = helper.make_model(
        helper.make_graph([node], "probe", values[:1], values[1:]), ir_version=10, opset_imports=domains
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        session.run(None, {"q": np.ones((1, 1, 4, 8), np.float32)})
    except Exception as error:
        return _describe(error)
    return ""
