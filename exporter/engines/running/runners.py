"""Engines as Polygraphy runners, and what is seen to run at each attention site of theirs."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from ...bundle import Bundle
from ...errors import BundleCorrupted, ExportFailed
from ...manifest import Manifest
from ...parity.inputs import Feed
from ...parity.runners import RuntimePath, input_metadata
from ...parity.tolerances import numpy_name
from ...reports.files import write_atomically
from ...whole_folders import MANIFEST_FILE
from ..manifest import NOT_BUILT, NOT_RUN, Engine, EngineManifest
from ..profiles import Profile
from ..request import ORT
from ..runtimes import RUNTIMES
from .inference_process import InferenceEnded, InferenceProcess
from .reach import profile_for
from .requirements import Fitting, require_runnable, require_version
from .seen import path_name, sites_seen


class EngineRunner(BaseRunner):  # type: ignore[misc]
    """Runs an engine in a process of its own; a process that ended is started anew for the next inputs."""

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        profiles: Sequence[Profile],
        start: Callable[[], InferenceProcess],
        process: InferenceProcess,
    ) -> None:
        """Make a runner.

        Args:
            name: What reports call it.
            manifest: The bundle's, which says what inputs and outputs there are.
            profiles: The engine's.
            start: Starts a process that has the engine open.
            process: The first of them.
        """
        super().__init__(name=name)
        self._manifest, self._profiles, self._start = manifest, profiles, start
        self._process: InferenceProcess | None = process

    def get_input_metadata_impl(self) -> TensorMetadata:
        """The bundle's inputs."""
        return input_metadata(self._manifest)

    def infer_impl(self, feed_dict: Feed) -> OrderedDict[str, Any]:
        """Outputs by name.

        Raises:
            ExportFailed: the engine failed, ended its process, or lacks an output of the bundle.
        """
        index = profile_for(self._profiles, {name: value.shape for name, value in feed_dict.items()})
        if index is None:
            raise ExportFailed("the inputs lie outside every optimization profile of the engine")
        if self._process is None:
            self._process = self._start()
        start = time.perf_counter()
        try:
            outputs, self.inference_time = self._process.infer(feed_dict, index)
        except InferenceEnded:
            self._close()
            raise
        self.inference_time = self.inference_time or time.perf_counter() - start
        missing = [record.name for record in self._manifest.outputs if record.name not in outputs]
        if missing:
            raise ExportFailed(f"the engine has no output {', '.join(missing)}; it has {', '.join(outputs)}")
        return OrderedDict((record.name, outputs[record.name]) for record in self._manifest.outputs)

    def deactivate_impl(self) -> None:
        """End the process."""
        self._close()

    def _close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._process = None


def engine_path(bundle: Bundle, engine: Engine, probe: Feed) -> RuntimePath:
    """Open an engine, and see what runs at each attention site.

    Args:
        bundle: What it was built from.
        engine: The engine.
        probe: Inputs for a run that is profiled, where the runtime tells only then what ran.

    Raises:
        InvalidRequest: the engine has no weights, or is a graph that ONNX Runtime cannot run.
        BundleCorrupted: its file is not a whole engine.
        EnvironmentLacks: its runtime, a GPU or the plugin library is missing here, or of another version.
        ExportFailed: it cannot be loaded.
    """
    if engine.manifest.target == ORT or engine.manifest.status == NOT_BUILT:
        from .onnxruntime_runners import graph_path, onnxruntime_path

        opens = graph_path if engine.manifest.status == NOT_BUILT else onnxruntime_path
        return opens(bundle, engine, probe)
    return _tensorrt_path(bundle, engine, require_runnable(engine))


def _tensorrt_path(bundle: Bundle, engine: Engine, fitting: Fitting) -> RuntimePath:
    manifest, name = engine.manifest, path_name(engine)
    process, opened = start_process(engine, fitting)
    return RuntimePath(
        name=name,
        runner=EngineRunner(
            name, bundle.manifest, manifest.profiles, lambda: start_process(engine, fitting)[0], process
        ),
        reason="",
        sites=sites_seen(manifest, opened["layers"]),
        provider=fitting.gpu.name,
        library=None if fitting.library is None else str(fitting.library),
        device=fitting.gpu.name,
        runtime=f"{RUNTIMES[manifest.target].title} {process.version}",
        dtype=numpy_name(manifest.dtype),
        notes=fitting.notes,
    )


def start_process(engine: Engine, fitting: Fitting) -> tuple[InferenceProcess, dict[str, Any]]:
    """A process that has the engine open, and what it says of it; see `InferenceProcess.open`.

    Raises:
        BundleCorrupted: the engine's file is not a whole engine.
        EnvironmentLacks: the runtime is of another version, or cannot load it.
        ExportFailed: the process ended.
    """
    title = RUNTIMES[engine.manifest.target].title
    process = InferenceProcess(fitting.module)
    try:
        require_version(engine, process.version)
        return process, process.open(engine.file, fitting.library)
    except InferenceEnded as error:
        process.close()
        raise ExportFailed(f"{engine.file}: {title} cannot load it: {error}") from error
    except BundleCorrupted as error:
        process.close()
        raise BundleCorrupted(f"{engine.file}: is not a whole engine: {error}; next step: build again") from error
    except BaseException:
        process.close()
        raise


def mark_as_run(engine: Engine, device: str) -> None:
    """Write into an engine's manifest that it ran; nothing where it says so already, or was built again meanwhile.

    Args:
        engine: The engine as it was opened.
        device: What it ran on.
    """
    file = engine.path / MANIFEST_FILE
    if engine.manifest.status != NOT_RUN:
        return
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    try:
        if EngineManifest.from_json(file.read_text(encoding="utf-8")) != engine.manifest:
            return
        write_atomically(dataclasses.replace(engine.manifest, status=f"ran on {device}, {today}").to_json(), file)
    except (OSError, BundleCorrupted):
        # The engine ran all the same; its folder may belong to somebody else.
        return
