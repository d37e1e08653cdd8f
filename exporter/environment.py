"""What this machine has for Longspan, what it lacks, and what that costs."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..plugins import LibraryMissing, ort_library_path


@dataclass(frozen=True)
class Finding:
    """One thing that Longspan uses.

    Attributes:
        name: What it is.
        found: Version or place; empty when it is missing.
        cost: What does not work, or works slower, without it.
        remedy: The command that brings it.
    """

    name: str
    found: str
    cost: str
    remedy: str

    @property
    def present(self) -> bool:
        """Whether it is there."""
        return bool(self.found)


def examine() -> tuple[Finding, ...]:
    """Look at packages, compiled library, compiler and processor; of heavy packages only ONNX Runtime is imported."""
    return (
        Finding("python", platform.python_version(), "", ""),
        Finding("processor", _processor(), "", ""),
        _package("torch", "export and check do not run", "pip install torch"),
        _package("transformers", "Hugging Face models cannot be loaded", "pip install 'longspan[hf]'"),
        Finding(
            "onnxruntime",
            _version("onnxruntime", "onnxruntime-gpu"),
            "check and bench do not run",
            "pip install 'longspan[cpu]'",
        ),
        Finding(
            "execution providers", _guarded(_providers), "check and bench do not run", "pip install 'longspan[cpu]'"
        ),
        Finding(
            "longspan kernels",
            _guarded(_library),
            "models run on their function bodies, which are several times slower than the kernels",
            "apt-get install g++, then reinstall longspan",
        ),
        Finding(
            "C++ compiler",
            shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or "",
            "the kernels cannot be built when longspan is installed from source",
            "apt-get install g++",
        ),
        _package("matplotlib", "bench draws no plot", "pip install 'longspan[report]'"),
    )


def _version(*distributions: str) -> str:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _package(name: str, cost: str, remedy: str) -> Finding:
    return Finding(name, _version(name), cost, remedy)


def _guarded(look: Callable[[], str]) -> str:
    """What `look` finds; empty where a package or the library is missing."""
    try:
        return look()
    except (ImportError, LibraryMissing):
        return ""


def _providers() -> str:
    import onnxruntime

    return ", ".join(onnxruntime.get_available_providers())


def _library() -> str:
    """Path of the library, after ONNX Runtime has loaded it: a file that does not load is as good as none."""
    import onnxruntime

    path = ort_library_path()
    try:
        onnxruntime.SessionOptions().register_custom_ops_library(path)
    except Exception as error:
        raise LibraryMissing(f"{path} does not load: {error}") from error
    return path


def _processor() -> str:
    """Model name, and the widest instruction set that the kernels can use."""
    model, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n")[0].splitlines() if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        model, flags = fields.get("model name", model), fields.get("flags", "")
    names = set(flags.split())
    isa = "AVX-512" if "avx512f" in names else "AVX2" if {"avx2", "fma"} <= names else "baseline"
    return f"{model} ({isa})"
