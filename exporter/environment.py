"""What this machine has for Longspan, what it lacks, and what that costs."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .probe import MARK

_TIMEOUT_SECONDS = 120
_QUICK_SECONDS = 15

# The folder that a program is started in may hold a torch.py or the like; the command line does not look there either.
_PROBE = (
    "import sys; sys.path[:] = [folder for folder in sys.path if folder]; "
    "from longspan.exporter.probe import main; main(sys.argv[1:])"
)


@dataclass(frozen=True)
class Finding:
    """One thing that Longspan uses.

    Attributes:
        group: Heading that it stands under.
        name: What it is.
        found: Version, place or description; empty when it is missing.
        problem: Why what was found does not work; empty when it does.
        cost: What does not work, or works slower, without it.
        remedy: The command, or the step, that brings it.
        needed: Whether export or check on a CPU do not run without it.
    """

    group: str
    name: str
    found: str
    problem: str = ""
    cost: str = ""
    remedy: str = ""
    needed: bool = False

    @property
    def present(self) -> bool:
        """Whether it is there and works."""
        return bool(self.found) and not self.problem

    @property
    def status(self) -> str:
        """``"present"``, ``"broken"`` or ``"missing"``."""
        return "present" if self.present else "broken" if self.found else "missing"


@dataclass(frozen=True)
class _Package:
    """A Python package to look for: import name, names of its distributions, and what `Finding` says of it."""

    group: str
    module: str
    distributions: tuple[str, ...]
    cost: str
    remedy: str
    needed: bool = False


_REINSTALL = "pip install --force-reinstall longspan"
_PACKAGES = (
    _Package("Python packages", "torch", ("torch",), "export and check do not run", "pip install torch", True),
    _Package("Python packages", "onnx", ("onnx",), "export does not run", _REINSTALL, True),
    _Package("Python packages", "onnx_ir", ("onnx-ir",), "export does not run", _REINSTALL, True),
    _Package("Python packages", "onnxscript", ("onnxscript",), "export does not run", _REINSTALL, True),
    _Package("Python packages", "safetensors", ("safetensors",), "export does not run", _REINSTALL, True),
    _Package(
        "Python packages",
        "transformers",
        ("transformers",),
        "Hugging Face models cannot be loaded; file.py:factory and .pt2 can",
        "pip install 'longspan[hf]'",
    ),
    _Package(
        "Python packages",
        "matplotlib",
        ("matplotlib",),
        "bench draws no plot, inspect no picture",
        "pip install 'longspan[report]'",
    ),
    _Package(
        "Python packages",
        "tritonclient.grpc",
        ("tritonclient",),
        "package does not run",
        "pip install 'longspan[serving]'",
    ),
    _Package(
        "ONNX Runtime",
        "onnxruntime",
        ("onnxruntime", "onnxruntime-gpu"),
        "check and bench do not run",
        "pip install 'longspan[cpu]'",
        True,
    ),
    _Package("GPU", "triton", ("triton",), "no Triton kernels", "pip install 'longspan[gpu]'"),
    _Package(
        "TensorRT",
        "tensorrt",
        ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
        "no TensorRT engines; ONNX Runtime does not need it",
        "pip install 'longspan[tensorrt]' (its wheels come from the vendor's own index)",
    ),
    _Package(
        "TensorRT",
        "tensorrt_rtx",
        ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings"),
        "no TensorRT-RTX engines; ONNX Runtime does not need it",
        "pip install 'longspan[rtx]'",
    ),
)


def examine() -> tuple[Finding, ...]:
    """Look at the machine, packages, runtime, kernels, GPU and build tools; never raises.

    Packages are imported, and a node of each operator is run, in processes of their own: a package that ends its
    process is a finding. Nothing is downloaded, and CUDA is not initialised.
    """
    packages = _packages()
    runtime = next(finding for finding in packages if finding.name == "onnxruntime")
    return (
        Finding("Machine", "system", f"{platform.system()} {platform.release()} ({platform.machine()})"),
        Finding("Machine", "processor", _processor()),
        Finding("Machine", "Python", platform.python_version()),
        *(finding for finding in packages if finding.group in ("Python packages", "ONNX Runtime")),
        *_runtime(runtime),
        _gpu(),
        *(finding for finding in packages if finding.group in ("GPU", "TensorRT")),
        *_plugin_libraries(),
        _tool("C++ compiler", ("c++", "g++", "clang++"), "apt-get install g++"),
        _tool("CMake", ("cmake",), "pip install cmake"),
        _tool("Ninja", ("ninja",), "pip install ninja"),
        _headers(),
    )


def _packages() -> list[Finding]:
    versions = {package.module: _version(package.distributions) for package in _PACKAGES}
    problems = _import_problems([module for module, version in versions.items() if version])
    return [
        Finding(
            group=package.group,
            name=package.distributions[0],
            found=versions[package.module],
            problem=problems.get(package.module, ""),
            cost=package.cost,
            remedy=package.remedy,
            needed=package.needed,
        )
        for package in _PACKAGES
    ]


def _version(distributions: Sequence[str]) -> str:
    for distribution in distributions:
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        except Exception as error:  # metadata that a broken installation left behind
            return f"unknown version ({error})"
        other = "" if distribution == distributions[0] else f" ({distribution})"
        return f"{version or 'unknown version'}{other}"
    return ""


def _import_problems(modules: Sequence[str]) -> dict[str, str]:
    """Why modules do not import, by name. One that ends its process costs a new process for those behind it."""
    problems: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        answers, ended = _ask("imports", *waiting)
        problems |= {answer["name"]: f"does not import: {answer['error']}" for answer in answers if answer["error"]}
        answered = {answer["name"] for answer in answers}
        waiting = [module for module in waiting if module not in answered]
        if waiting:
            problems[waiting.pop(0)] = f"does not import: {ended}"
    return problems


def _ask(*arguments: str) -> tuple[list[dict[str, Any]], str]:
    """The answers of a probe in a process of its own, and how that process ended."""
    try:
        finished = subprocess.run(
            [sys.executable, "-c", _PROBE, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        output, code = finished.stdout, finished.returncode
        ended = f"the process ended by signal {-code}" if code < 0 else f"the process ended with code {code}"
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", f"no end after {_TIMEOUT_SECONDS} s"
    except OSError as error:
        return [], str(error)
    lines = output.decode(errors="replace").splitlines()
    return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)], ended


def _runtime(runtime: Finding) -> list[Finding]:
    """Execution providers and kernels, both asked of ONNX Runtime."""
    answers, ended = _ask("kernel") if runtime.present else ([], "")
    answer = answers[0] if answers else {"library": "", "isa": "", "error": ended, "providers": ""}
    providers = answer["providers"]
    wanted = os.environ.get("LONGSPAN_CPU_ISA", "")
    isa = f"{answer['isa']}, as LONGSPAN_CPU_ISA says" if wanted else answer["isa"]
    unset = "; or unset LONGSPAN_CPU_ISA" if wanted else ""
    return [
        Finding(
            "ONNX Runtime",
            "execution providers",
            providers,
            "" if not providers or "CPUExecutionProvider" in providers else "CPUExecutionProvider is not among them",
            "check and bench do not run",
            "pip install 'longspan[cpu]'",
            needed=True,
        ),
        Finding(
            "Longspan kernels",
            "kernel library",
            f"runs with {isa}: {answer['library']}" if answer["library"] else "",
            answer["error"] if answer["library"] else "",
            "models run on their function bodies, which are several times slower than the kernels",
            f"apt-get install g++, then {_REINSTALL}{unset}",
        ),
    ]


def _gpu() -> Finding:
    """The driver's own tool, and no library that would initialise CUDA."""
    cost = "bundles run on the CPU only"
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("GPU", "NVIDIA GPU", "", cost=cost, remedy="a machine with one, and its driver (nvidia-smi)")
    query = [tool, "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader"]
    output, problem = _output_of(query)
    return Finding("GPU", "NVIDIA GPU", output or tool, problem, cost, "install the driver of this GPU")


def _plugin_libraries() -> list[Finding]:
    """The operators as TensorRT plugins, a library for each major version; read, not loaded."""
    from ..plugins.errors import PluginError
    from ..plugins.library import (
        TENSORRT_MAJOR_VERSIONS,
        plugin_library_major,
        tensorrt_library_path,
        tensorrt_library_remedy,
    )

    findings = []
    for major in TENSORRT_MAJOR_VERSIONS:
        path = problem = ""
        try:
            path = tensorrt_library_path(major)
            built_for = plugin_library_major(path)
            problem = "" if built_for == major else f"it is for TensorRT {built_for}"
        except PluginError as error:
            problem = str(error) if path else ""
        cost = f"no engines with Longspan's kernels for TensorRT {major}; --plugin-api none needs no plugin"
        findings.append(Finding("TensorRT", f"plugin for {major}", path, problem, cost, tensorrt_library_remedy()))
    return findings


def _tool(name: str, programs: Sequence[str], remedy: str) -> Finding:
    """The first program that is there: on the path, or beside this Python, where pip puts it."""
    beside = str(Path(sys.executable).parent)
    place = next((found for p in programs if (found := shutil.which(p) or shutil.which(p, path=beside))), None)
    cost = "the kernels cannot be built from source"
    if place is None:
        return Finding("Building from source", name, "", "", cost, remedy)
    output, problem = _output_of([place, "--version"])
    version = output.splitlines()[0] if output else ""
    return Finding("Building from source", name, f"{place}: {version}" if version else place, problem, cost, remedy)


def _headers() -> Finding:
    """Where ONNX Runtime's C headers are, or where a build would take them from."""
    from ..plugins.ort.headers import locate_headers

    folder, origin = locate_headers()
    return Finding(
        "Building from source",
        "ONNX Runtime headers",
        str(folder) if folder is not None else "",
        "",
        f"a build downloads them first, from {origin}" if origin else "the kernels cannot be built from source",
        "apt-get install libonnxruntime-dev, or set ONNXRUNTIME_INCLUDE_DIR",
    )


def _output_of(command: Sequence[str]) -> tuple[str, str]:
    """What a command prints, and why it failed; one of the two is empty."""
    try:
        finished = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_QUICK_SECONDS
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer after {_QUICK_SECONDS} s"
    except OSError as error:
        return "", str(error)
    if finished.returncode:
        said = (finished.stderr.strip() or finished.stdout.strip() or "no message").splitlines()[0]
        return "", f"fails with code {finished.returncode}: {said}"
    return finished.stdout.strip(), ""


def _processor() -> str:
    """Model name and number of logical cores."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} logical cores"
