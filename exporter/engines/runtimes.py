"""The runtimes that engines are for, by their Python packages."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from .request import ORT, TENSORRT, TENSORRT_RTX


@dataclass(frozen=True)
class EngineRuntime:
    """One runtime.

    Attributes:
        title: What people call it.
        module: Its Python module.
        install: How it is installed.
    """

    title: str
    module: str
    install: str

    @property
    def installed(self) -> bool:
        """Whether the module is there; it is not imported, which may do harm in this process."""
        try:
            return importlib.util.find_spec(self.module) is not None
        except ValueError:  # a module that was put in sys.modules without a spec
            return False


RUNTIMES = {
    TENSORRT: EngineRuntime(
        "TensorRT",
        "tensorrt",
        "pip install 'longspan[tensorrt]' (its wheels come from the vendor's own index)",
    ),
    TENSORRT_RTX: EngineRuntime("TensorRT-RTX", "tensorrt_rtx", "pip install 'longspan[rtx]'"),
    ORT: EngineRuntime("ONNX Runtime", "onnxruntime", "pip install 'longspan[cpu]'"),
}
"""By target."""
