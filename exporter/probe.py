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
    """ONNX Runtime's providers, and a node of each operator run with the library; what failed is under ``"error"``."""
    answer: dict[str, Any] = {"providers": "", "library": "", "isa": "", "error": ""}
    try:
        import onnxruntime

        answer["providers"] = ", ".join(onnxruntime.get_available_providers())
        from ..plugins.library import ort_library_path

        answer["library"] = ort_library_path()
        wanted = os.environ.get("LONGSPAN_CPU_ISA", "")
        # Asked for an instruction set that no machine has, the library names those that this one has, best first.
        os.environ["LONGSPAN_CPU_ISA"] = "?"
        found = re.search(r"this machine has ([\w, ]+)", _run(answer["library"], next(iter(_PROBLEMS))))
        os.environ["LONGSPAN_CPU_ISA"] = wanted
        answer["isa"] = wanted or (found.group(1).split(", ")[0] if found else "")
        answer["error"] = _in_one({name: _run(answer["library"], name) for name in _PROBLEMS})
    except Exception as error:
        answer["error"] = _describe(error)
    return answer


def _in_one(errors: dict[str, str]) -> str:
    """Errors by operator as one text; what is wrong with all of them is said once."""
    reasons = set(errors.values())
    if len(reasons) == 1:
        return reasons.pop()
    return "; ".join(f"{name}: {error}" for name, error in errors.items() if error)


_PROBLEMS: dict[str, tuple[dict[str, Any], tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]]] = {
    "SlidingWindowAttention": ({"left_window_size": 1}, ()),
    "BlockSparseAttention": (
        {"q_block_size": 4, "kv_block_size": 4},
        (
            ("kv_num_blocks", (1, 1, 1), (0,)),
            ("kv_indices", (1, 1, 1, 0), ()),
            ("full_kv_num_blocks", (1, 1, 1), (1,)),
            ("full_kv_indices", (1, 1, 1, 1), (0,)),
        ),
    ),
}
"""A small problem of each operator: its attributes, and its inputs of integers with their shape and values."""


def _run(library: str, operator: str) -> str:
    """Why a model of one node does not run; empty where it does."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper

    attributes, integers = _PROBLEMS[operator]
    constants = [helper.make_tensor(name, TensorProto.INT32, shape, values) for name, shape, values in integers]
    names = ["q", "q", "q", *(constant.name for constant in constants)]
    node = helper.make_node(operator, names, ["y"], domain="longspan", **attributes)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 4, 8]) for name in ("q", "y")]
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("longspan", 1)]
    graph = helper.make_graph([node], "probe", values[:1], values[1:], constants)
    model = helper.make_model(graph, ir_version=10, opset_imports=domains)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        options.register_custom_ops_library(library)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"q": np.ones((1, 1, 4, 8), np.float32)})
    except Exception as error:
        return _describe(error)
    # Attention over equal values is that value, whatever the pattern.
    return "" if np.abs(y - 1).max() < 1e-5 else "wrong result: attention over ones is not one"
