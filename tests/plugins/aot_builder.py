"""TensorRT's Python bindings on a stand-in for its libraries, in a process of their own: ``python -m
tests.plugins.aot_builder < REQUESTS > RESULTS``.

The bindings are NVIDIA's, compiled and in Python, from the package ``tensorrt-cu13-bindings``: ``tensorrt.plugin``
validates and serves a plugin as it would for an engine. What calls it is ``tensorrt/quick_builder.cc``.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from longspan.plugins.tensorrt.aot_record import AotPlugin

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).parent / "tensorrt" / "quick_builder.cc"
BINDINGS = "tensorrt_bindings"
MAJOR = 11
"""The release whose interfaces the stand-in speaks."""

Shape = tuple[int, ...]
Bounds = tuple[Shape, Shape]


@dataclass(frozen=True)
class Answer:
    """What an engine would hold of a plugin.

    Attributes:
        failed: The call that failed; empty where none did.
        outputs: (data type, expressions of the dimensions) of each output.
        supported: (data type, format) of each input and output, one combination after another.
        tactics: By number: (entry, seven launch parameters, numbers for the kernel, code).
        fields: How many attributes the plugin declares.
        interface: What kind of plugin it is.
        said: What went to stderr.
    """

    failed: str = ""
    outputs: tuple[tuple[int, tuple[str, ...]], ...] = ()
    supported: tuple[tuple[int, int], ...] = ()
    tactics: dict[int, tuple[str, tuple[str, ...], tuple[str, ...], str]] = field(default_factory=dict)
    fields: int = -1
    interface: str = ""
    said: str = ""


def bindings_folder() -> Path:
    """Where the bindings are; skips the test where they are missing, or another release's."""
    spec = importlib.util.find_spec(BINDINGS)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("TensorRT's Python bindings are not installed; next step: pip install tensorrt-cu13-bindings")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "plugin").is_dir() or f"libnvinfer.so.{MAJOR}".encode() not in _library(folder).read_bytes():
        pytest.skip(f"{BINDINGS} is not the bindings of TensorRT {MAJOR}")
    return folder


def _library(folder: Path) -> Path:
    return folder / "tensorrt.so"


def build_stand_in(folder: Path) -> None:
    """Compile the stand-in for TensorRT's libraries into `folder`, under all their names."""
    from longspan.plugins.tensorrt.headers import find_headers

    headers = find_headers()
    if not headers:
        pytest.skip("TensorRT's headers are not installed; next step: pip install kernel-lens")
    library = folder / f"libnvinfer.so.{MAJOR}"
    include = [f"-isystem{next(iter(headers.values()))}", f"-I{ROOT / 'plugins' / 'tensorrt' / 'cuda_types'}"]
    command = ["c++", "-std=c++17", "-O0", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-unused-parameter", *include]
    done = subprocess.run([*command, "-o", library, SOURCE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for other in ("nvinfer_plugin", "nvonnxparser"):
        (folder / f"lib{other}.so.{MAJOR}").symlink_to(library.name)


def played(folder: Path, requests: Sequence[tuple[AotPlugin, Sequence[Bounds]]]) -> list[Answer]:
    """Have `build_stand_in`'s builder ask for plugins, each with the smallest and largest shape of its inputs."""
    text = json.dumps([(plugin.to_json(), bounds) for plugin, bounds in requests])
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-m", "tests.plugins.aot_builder", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, input=text, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [_answer(lines, codes, done.stderr) for lines, codes in json.loads(done.stdout.splitlines()[-1])]


def _answer(text: str, codes: Sequence[str], said: str) -> Answer:
    values: dict[str, Any] = {"outputs": [], "supported": [], "tactics": {}, "said": said}
    for line in text.splitlines():
        kind, *words = line.split("\t")
        if kind == "output":
            values["outputs"].append((int(words[0]), tuple(words[1].split("|"))))
        elif kind == "supported":
            values["supported"].append((int(words[0]), int(words[1])))
        elif kind == "tactic":
            number, entry, launch, numbers = words
            code = codes[len(values["tactics"])]
            values["tactics"][int(number)] = (entry, tuple(launch.split("|")), tuple(numbers.split("|")), code)
        else:
            values[kind] = int(words[0]) if kind == "fields" else words[0]
    return Answer(**{**values, "outputs": tuple(values["outputs"]), "supported": tuple(values["supported"])})


def value_of(expression: str, shapes: Sequence[Shape]) -> int:
    """An expression of the stand-in for given shapes of the inputs, in Python's own arithmetic."""
    names = {f"d{i}_{axis}": size for i, shape in enumerate(shapes) for axis, size in enumerate(shape)}
    functions = {
        "cdiv": lambda a, b: -(-a // b), "min": min, "max": max, "less": lambda a, b: int(a < b),
        "equal": lambda a, b: int(a == b),
    }  # fmt: skip
    assert re.fullmatch(r"[\w\s()+*/,-]+", expression), expression
    return int(eval(expression, {"__builtins__": {}}, {**names, **functions}))


def load_bindings() -> Any:
    """The module ``tensorrt``, which is what the bindings are called in an installation with the libraries."""
    sys.modules["tensorrt_libs"] = None  # type: ignore[assignment]  # not the real libraries, should they be there
    bindings = importlib.import_module(BINDINGS)
    sys.modules["tensorrt"] = bindings
    bindings.__name__ = "tensorrt"
    return bindings


def main(folder: Path) -> None:
    """Answer the requests on stdin."""
    from longspan.plugins.tensorrt.aot import register

    tensorrt = load_bindings()
    library = ctypes.CDLL(str(folder / f"libnvinfer.so.{MAJOR}"))
    library.quick_build.restype = library.quick_code.restype = ctypes.c_char_p
    kinds = {"FP32": "FLOAT", "FP16": "HALF"}
    answers = []
    for text, bounds in json.loads(sys.stdin.read()):
        plugin = AotPlugin.from_json(text)
        register(tensorrt, [plugin, plugin])
        types = [int(getattr(tensorrt.DataType, kinds.get(kind, kind))) for kind in plugin.types[: len(bounds)]]
        low, high = ([size for pair in bounds for size in pair[end]] for end in (0, 1))
        said = library.quick_build(
            plugin.name.encode(), b"longspan", len(bounds), (ctypes.c_int32 * len(types))(*types),
            (ctypes.c_int32 * len(types))(*(len(pair[0]) for pair in bounds)), (ctypes.c_int64 * len(low))(*low),
            (ctypes.c_int64 * len(high))(*high),
        )  # fmt: skip
        lines = said.decode()
        answers.append((lines, [library.quick_code(i).decode() for i in range(lines.count("\ntactic"))]))
    print(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
