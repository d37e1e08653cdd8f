"""What an engine needs to run, refused in one line before a runtime that could crash sees it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ....plugins.errors import PluginError
from ....plugins.library import plugin_library_major, tensorrt_library_path
from ...devices import Gpu, cuda_gpu
from ...errors import BundleCorrupted, EnvironmentLacks, InvalidRequest
from ...manifest import sha256_of
from ..manifest import NOT_BUILT, Engine, EngineManifest
from ..request import PLUGIN_V3, TENSORRT, TENSORRT_RTX
from ..runtimes import RUNTIMES


@dataclass(frozen=True)
class Fitting:
    """What was found here for an engine.

    Attributes:
        module: Python module of its runtime.
        gpu: Where it will run.
        library: Plugin library to load; None where it needs none.
        notes: What a reader of its reports should know.
    """

    module: str
    gpu: Gpu
    library: Path | None
    notes: tuple[str, ...]


def require_runnable(engine: Engine) -> Fitting:
    """Make sure that an engine of TensorRT or TensorRT-RTX can run here.

    The runtime's version is not looked at, as importing it in this process may do harm; see `require_version`.

    Raises:
        InvalidRequest: there is only its graph, or it has no weights.
        EnvironmentLacks: the runtime's package, a GPU of the right architecture or the plugin library is missing.
        LibraryMissing: Longspan has no plugin library for the runtime's major version.
    """
    manifest, runtime = engine.manifest, RUNTIMES[engine.manifest.target]
    if manifest.status == NOT_BUILT:
        raise InvalidRequest(
            f"--engine {engine.name}: is a graph from which no engine was built; next step: longspan build without "
            "--graph-only"
        )
    if manifest.options.get("strip"):
        raise InvalidRequest(
            f"--engine {engine.name}: was built without its weights (--strip), so it cannot run; next step: refit it "
            "with model.onnx, or build it without --strip"
        )
    if not runtime.installed:
        raise EnvironmentLacks(
            f"--engine {engine.name}: needs {runtime.title} {built_with(manifest)}, which is not installed; next step: "
            f"{runtime.install}"
        )
    gpu = cuda_gpu()
    wanted = architectures(manifest)
    if gpu is None:
        raise EnvironmentLacks(
            f"--engine {engine.name}: was built for {wanted} and needs such a GPU; there is none here that the driver "
            "lets this process use; next step: a machine with one; here its graph can be checked, see --graph-only"
        )
    if not runs_on(manifest, gpu.architecture):
        raise EnvironmentLacks(
            f"--engine {engine.name}: was built for {wanted}; the GPU here, {gpu.name}, is {gpu.architecture}; next "
            f"step: {_build_again(manifest, gpu.architecture)}"
        )
    library, notes = _library(engine, runtime.title)
    if manifest.target == TENSORRT and manifest.device not in ("", gpu.name):
        notes = (
            *notes,
            f"the engine was built on {manifest.device}, whose timings chose its kernels, not on {gpu.name}",
        )
    return Fitting(runtime.module, gpu, library, notes)


def require_version(engine: Engine, version: str) -> None:
    """Make sure that a runtime of this version can load an engine.

    Engines are bound to the version that built them, unless they were built version-compatible: then to its major
    version, from the one that built them on.

    Raises:
        EnvironmentLacks: it cannot.
    """
    manifest, title = engine.manifest, RUNTIMES[engine.manifest.target].title
    built, here = (_numbers(text) for text in (built_with(manifest), version))
    if manifest.options.get("version_compatible"):
        if built[:1] == here[:1] and built <= here:
            return
        allowed = f"{built[0]}.x from {built_with(manifest)} on"
    elif built[:3] == here[:3]:
        return
    else:
        allowed = built_with(manifest)
    raise EnvironmentLacks(
        f"--engine {engine.name}: was built with {title} {built_with(manifest)}, here is {version}; allowed: "
        f"{allowed}; next step: build it again here, or with --version-compatible where TensorRT offers that"
    )


def built_with(manifest: EngineManifest) -> str:
    """Version of the runtime that built an engine.

    Raises:
        BundleCorrupted: its manifest does not say.
    """
    runtime = RUNTIMES[manifest.target]
    if runtime.module not in manifest.versions:
        raise BundleCorrupted(
            f"the engine's manifest does not say which {runtime.title} built it; next step: build again"
        )
    return manifest.versions[runtime.module]


def architectures(manifest: EngineManifest) -> str:
    """What an engine runs on, in words."""
    level = manifest.options.get("hardware_compatibility", "none")
    named = " or ".join(manifest.compute_capabilities) or "any GPU"
    return "sm80 or later" if level == "ampere-plus" else named


def runs_on(manifest: EngineManifest, architecture: str) -> bool:
    """Whether an engine was built for a compute capability, e.g. ``"sm89"``."""
    if manifest.options.get("hardware_compatibility") == "ampere-plus":
        return int(architecture.removeprefix("sm")) >= 80
    return not manifest.compute_capabilities or architecture in manifest.compute_capabilities


def _library(engine: Engine, title: str) -> tuple[Path | None, tuple[str, ...]]:
    plugin = engine.manifest.plugin
    if plugin is None or plugin.api != PLUGIN_V3:
        return None, ()
    major = _numbers(built_with(engine.manifest))[0]
    given = engine.manifest.options.get("plugin_library")
    library = Path(given or tensorrt_library_path(major))
    if not library.is_file():
        raise EnvironmentLacks(
            f"--engine {engine.name}: needs the plugin library {library}, which is not there; next step: put it back, "
            "or build the engine again with Longspan's own"
        )
    try:
        found = plugin_library_major(library)
    except PluginError as error:
        raise EnvironmentLacks(f"--engine {engine.name}: {error}") from error
    if found != major:
        raise EnvironmentLacks(
            f"--engine {engine.name}: {library} is a plugin library for {title} {found}, the engine was built with "
            f"{title} {built_with(engine.manifest)}; next step: a library built with the headers of {title} {major}"
        )
    if sha256_of(library) == plugin.sha256:
        return library, ()
    return library, (f"the plugin library {library.name} is not the one that the engine was built with (SHA-256)",)


def _build_again(manifest: EngineManifest, architecture: str) -> str:
    if manifest.target == TENSORRT_RTX:
        return f"longspan build … --target tensorrt-rtx --compute-capability {architecture}"
    return "build it on this machine"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:4])
