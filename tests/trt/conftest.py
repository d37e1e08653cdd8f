"""Everything here needs TensorRT or TensorRT-RTX, and a GPU; without them it is skipped, and the report says why.

With ``--require-trt`` a missing TensorRT, plugin library or GPU is an error instead: for machines that are known to
have them. TensorRT-RTX, which builds for other devices than TensorRT's, may be missing all the same.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from longspan.exporter.devices import cuda_gpu
from longspan.exporter.engines.builder import RTX_CAPABILITIES
from longspan.exporter.engines.running.inference_process import InferenceProcess
from longspan.exporter.errors import ExporterError
from longspan.plugins.errors import PluginError
from longspan.plugins.library import tensorrt_library_path

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Known where this folder is named on the command line, as ``make trt`` does."""
    parser.addoption("--require-trt", action="store_true", help="fail, do not skip, where TensorRT or a GPU is missing")


def missing(module: str) -> str:
    """What an engine of a Python module would lack here, or ""."""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    gpu = cuda_gpu()
    if gpu is None:
        return "no GPU that the CUDA driver lets this process use"
    if module == "tensorrt_rtx":
        allowed = ", ".join(RTX_CAPABILITIES)
        return "" if gpu.architecture in RTX_CAPABILITIES else f"{gpu.name} is {gpu.architecture}, none of {allowed}"
    try:
        tensorrt_library_path(int(version_of(module).split(".")[0]))
    except (ExporterError, PluginError) as error:
        return str(error)
    return ""


def version_of(module: str) -> str:
    """Version of TensorRT, which is imported in a process of its own."""
    process = InferenceProcess(module)
    process.close()
    return process.version


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is in this folder, and skip it where what it needs is missing."""
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    reasons: dict[str, str] = {}
    for item in ours:
        item.add_marker(pytest.mark.trt)
        module = "tensorrt_rtx" if item.path.name == "test_rtx.py" else "tensorrt"
        if module not in reasons:
            reasons[module] = missing(module)
        if reasons[module]:
            item.add_marker(pytest.mark.skip(reason=f"TensorRT tests: {reasons[module]}"))
    if config.getoption("--require-trt", default=False) and reasons.get("tensorrt"):
        raise pytest.UsageError(f"--require-trt: {reasons['tensorrt']}")
