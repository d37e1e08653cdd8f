"""What a measurement ran on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from ..versions import installed_versions

_PACKAGES = (
    "longspan",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-cu12",
    "tensorrt-rtx-cu13-bindings",
    "numpy",
    "torch",
    "transformers",
)
# The widest first; what a CPU kernel can be compiled for.
_VECTOR_FLAGS = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2", "sve", "asimd")


@dataclass(frozen=True)
class Machine:
    """The computer and its software.

    Attributes:
        cpu: Model name, with its clock or generation where the system tells.
        physical_cores: Cores; what ONNX Runtime starts one thread each for by default.
        logical_cores: Hardware threads that this process may use.
        memory_bytes: Physical memory.
        isa: Vector instruction sets that matter to attention, widest first.
        system: Operating system and version.
        python: Python version.
        versions: Versions of the packages that take part.
    """

    cpu: str
    physical_cores: int
    logical_cores: int
    memory_bytes: int
    isa: tuple[str, ...]
    system: str
    python: str
    versions: dict[str, str]

    @property
    def short(self) -> str:
        """One line for a title: CPU, cores, widest instruction set, ONNX Runtime."""
        runtime = self.versions.get("onnxruntime") or self.versions.get("onnxruntime-gpu", "")
        isa = f", {self.isa[0]}" if self.isa else ""
        return f"{self.cpu}, {self.logical_cores} logical cores{isa}, ONNX Runtime {runtime}"


def describe_machine() -> Machine:
    """Read the record from the system."""
    import psutil

    cpu, flags = _cpu()
    return Machine(
        cpu=cpu,
        physical_cores=psutil.cpu_count(logical=False) or 0,
        logical_cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        isa=tuple(flag for flag in _VECTOR_FLAGS if flag in flags),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=installed_versions(_PACKAGES),
    )


def available_memory() -> int:
    """Bytes that a new process may take: what the system has, or what the control group leaves of it."""
    import psutil

    available = int(psutil.virtual_memory().available)
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return available if limit == "max" else max(0, min(available, int(limit) - int(used)))
    except (OSError, ValueError):
        return available


def busy_seconds() -> float:
    """CPU time of everything on the machine since it started, time stolen by a hypervisor included."""
    import psutil

    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - times.guest - times.guest_nice)


def _cpu() -> tuple[str, frozenset[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = frozenset((fields.get("flags") or fields.get("Features") or "").split())
    return fields.get("model name") or platform.machine(), flags
