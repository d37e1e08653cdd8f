"""What ONNX Runtime runs as a path of a check: ``ort`` builds as they were recorded, and graphs without an engine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from polygraphy.backend.onnxrt import OnnxrtRunner

from ...bundle import Bundle
from ...devices import cuda_gpu
from ...errors import EnvironmentLacks, ExporterError, ExportFailed, InvalidRequest
from ...parity.inputs import Feed
from ...parity.runners import RuntimePath, open_session, runtime_version, what_ran
from ...parity.tolerances import numpy_name
from ..manifest import Engine
from ..onnxruntime.session import CPU_PROVIDER, TENSORRT_PROVIDER, SessionPlan, open_ort_session
from .seen import built_as, path_name


def onnxruntime_path(bundle: Bundle, engine: Engine, probe: Feed) -> RuntimePath:
    """Open an ``ort`` build exactly as it was recorded, and see in a profile of one run what runs at each site.

    Nodes that ONNX Runtime hands to TensorRT have no events of their own; what their sites were built as stands for
    what ran.

    Args:
        bundle: What it was built from.
        engine: The build.
        probe: Inputs of the run.

    Raises:
        EnvironmentLacks: ONNX Runtime or the provider is missing.
        LibraryMissing: the operator library is missing.
        ExportFailed: ONNX Runtime cannot load or run the model.
    """
    plan = SessionPlan.from_dict(engine.manifest.session)
    with tempfile.TemporaryDirectory() as folder:
        try:
            session = open_ort_session(engine.path, profile=Path(folder) / "profile")
            session.run(None, probe)
        except (ExporterError, EnvironmentLacks):
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common class
            raise ExportFailed(f"{engine.file}: ONNX Runtime cannot run it: {error}") from error
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    first = plan.providers[0].name
    sites, provider = built_as(engine.manifest), ""
    if first != TENSORRT_PROVIDER:
        sites, provider = what_ran(events, bundle.manifest.sites)
    gpu = None if first == CPU_PROVIDER else cuda_gpu()
    return RuntimePath(
        name=path_name(engine),
        runner=OnnxrtRunner(session, name=path_name(engine)),
        reason="",
        sites=sites,
        provider=provider or first,
        library=plan.operator_library,
        device="CPU" if gpu is None else gpu.name,
        runtime=runtime_version(),
        dtype=numpy_name(engine.manifest.dtype),
    )


def graph_path(bundle: Bundle, engine: Engine, probe: Feed) -> RuntimePath:
    """Open the graph of an engine that was not built, in ONNX Runtime on the CPU: what TensorRT would be given.

    Args:
        bundle: What it was made from.
        engine: The graph.
        probe: Inputs of a first run.

    Raises:
        InvalidRequest: ONNX Runtime cannot run it.
        EnvironmentLacks: ONNX Runtime is missing.
        ExportFailed: ONNX Runtime cannot load or run the model.
    """
    manifest = engine.manifest
    if manifest.plugin is not None:
        raise InvalidRequest(
            f"--engine {engine.name}: is a graph of TensorRT plugins, which ONNX Runtime does not have; next step: "
            "build the engine where TensorRT is, or check a graph of --plugin-api none"
        )
    if manifest.dtype == "bf16":
        raise InvalidRequest(
            f"--engine {engine.name}: ONNX Runtime's CPU provider computes no bf16; next step: check a graph of "
            "--dtype fp16, or the engine on its device"
        )
    try:
        session = open_session(str(engine.file), None)
        session.run(None, probe)
    except EnvironmentLacks:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common class
        raise ExportFailed(f"{engine.file}: ONNX Runtime cannot run it: {error}") from error
    return RuntimePath(
        name=path_name(engine),
        runner=OnnxrtRunner(session, name=path_name(engine)),
        reason="",
        sites=built_as(manifest),
        provider=CPU_PROVIDER,
        device="CPU",
        runtime=runtime_version(),
        dtype=numpy_name(manifest.dtype),
        notes=("this is the graph that TensorRT is given, run by ONNX Runtime; no engine was built from it",),
    )
