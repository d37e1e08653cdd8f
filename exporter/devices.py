"""Where ONNX Runtime computes: the CPU, or an NVIDIA GPU by its CUDA execution provider."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import EnvironmentLacks, InvalidRequest

if TYPE_CHECKING:
    from .manifest import Manifest

CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)

PROVIDERS = {CPU: ("CPUExecutionProvider",), CUDA: ("CUDAExecutionProvider", "CPUExecutionProvider")}
"""Execution providers of a device, most wanted first."""

PACK_PATH_VARIABLE = "LONGSPAN_KERNEL_PATH"
"""Environment variable with further kernel packs; see ``docs/kernel-packs.md``."""

_DRIVER = "libcuda.so.1"

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


def require_device(device: str) -> None:
    """Make sure that sessions can compute on a device, before anything long begins.

    Args:
        device: One of `DEVICES`.

    Raises:
        InvalidRequest: there is no such device.
        EnvironmentLacks: ONNX Runtime, its provider, the driver or a GPU is missing.
    """
    if device not in DEVICES:
        raise InvalidRequest(f"--device {device}: allowed: {', '.join(DEVICES)}")
    require_providers(PROVIDERS[device])


def require_providers(providers: Sequence[str]) -> None:
    """The same for execution providers by name.

    Raises:
        EnvironmentLacks: ONNX Runtime, a provider, or for CUDA's the driver or a GPU is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentLacks(
            "the bundle runs in ONNX Runtime, which is not installed; next step: pip install 'longspan[cpu]', or for "
            "--device cuda pip install onnxruntime-gpu"
        ) from error
    available = onnxruntime.get_available_providers()
    missing = [name for name in providers if name not in available]
    if missing:
        raise EnvironmentLacks(
            f"{', '.join(missing)}: this ONNX Runtime has {', '.join(available)}; for --device cuda, next step: pip "
            "uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    if providers[0] == PROVIDERS[CUDA][0] and not cuda_devices():
        raise EnvironmentLacks(
            "--device cuda: there is no NVIDIA GPU that its driver lets this process use; next step: a machine with "
            "one and its driver (nvidia-smi lists it), or --device cpu"
        )


def cuda_devices() -> int:
    """GPUs that the CUDA driver shows this process; 0 without a driver."""
    driver = _driver()
    count = ctypes.c_int(0)
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: What its maker calls it.
        architecture: Its compute capability, ``"sm90"``.
    """

    name: str
    architecture: str


def cuda_gpu() -> Gpu | None:
    """The first GPU that the CUDA driver shows this process; None without one."""
    driver = _driver()
    device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
    if driver is None or driver.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    driver.cuDeviceGetName(name, len(name), device)
    version = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        version.append(value.value)
    return Gpu(name.value.decode(errors="replace"), f"sm{version[0]}{version[1]}")


def _driver() -> ctypes.CDLL | None:
    """The CUDA driver, ready to be asked; None without one."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def kernels_missing(device: str, manifest: Manifest) -> str:
    """Why the longspan kernels cannot run a bundle on a device; empty where they may."""
    if device != CUDA or os.environ.get(PACK_PATH_VARIABLE):
        return ""
    if manifest.gpu is not None:
        refused = "; ".join(f"{node}: {reason}" for node, reason in manifest.gpu.refused.items())
        return f"the bundle has no GPU kernels for every site ({refused})" if refused else ""
    return (
        f"the bundle has no GPU kernels, and {PACK_PATH_VARIABLE} names none; next step: export with --gpu-arch, or "
        "longspan kernels compile"
    )


def exact_providers(device: str) -> list[Any]:
    """Providers of a session that is checked: products of float32 are not rounded to tf32."""
    return [(name, {"use_tf32": "0"}) if name == PROVIDERS[CUDA][0] else name for name in PROVIDERS[device]]


def verify_session(session: Any, providers: Sequence[str]) -> None:
    """Refuse a session for which ONNX Runtime silently took another provider than the most wanted one.

    Args:
        session: An `onnxruntime.InferenceSession`.
        providers: Those asked for, most wanted first.

    Raises:
        EnvironmentLacks: it did.
    """
    got = session.get_providers()
    if got[0] != providers[0]:
        raise EnvironmentLacks(
            f"ONNX Runtime could not start {providers[0]} and took {got[0]}; it needs the CUDA and cuDNN libraries "
            "that it was built for; next step: pip install 'onnxruntime-gpu[cuda,cudnn]', and see its log"
        )
