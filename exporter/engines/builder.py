"""``longspan build``: from a bundle to an engine in a folder beside its model."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...plugins.errors import InvalidLibrary
from ...plugins.library import plugin_library_major
from ..bundle import MODEL_FILE, Bundle
from ..devices import Gpu, cuda_gpu
from ..errors import EnvironmentLacks, InvalidRequest
from ..graph_io import save_model
from ..manifest import sha256_of
from ..versions import installed_versions
from ..whole_folders import ENGINE, reserved
from .graphs.prepare import prepare
from .graphs.typed import dtype_of
from .manifest import ENGINE_FILE, ENGINES_FOLDER, NOT_BUILT, NOT_RUN, Engine, EngineManifest, PluginRecord
from .profiles import Profile, longest_sizes, profiles_of
from .request import NO_PLUGIN, ORT, PLUGIN_V3, TENSORRT, TENSORRT_RTX, BuildRequest
from .runtimes import RUNTIMES
from .tensorrt.build_process import build_in_child

if TYPE_CHECKING:
    import onnx_ir as ir

    from ...plugins.gpu.pack_build import Target

Tell = Callable[[str], None]

RTX_CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")
"""What TensorRT-RTX 1.7 builds for."""

_VERSIONED = ("longspan", "onnx", "onnx-ir", "onnxruntime", "polygraphy")


def build(
    bundle: str | os.PathLike[str],
    request: BuildRequest,
    *,
    force: bool = False,
    progress: Tell = lambda stage: None,
    warn: Tell = lambda text: None,
) -> Engine:
    """Build an engine of a bundle and write it, with its manifest, into the bundle's folder of engines.

    Args:
        bundle: Folder of the bundle.
        request: What to build.
        force: Replace an engine of the same name.
        progress: Told each stage, and how far the builder is.
        warn: Told what TensorRT warns of, once each, and which numbers a narrower type could not hold.

    Raises:
        InvalidRequest: an argument is wrong; nothing was done.
        BundleCorrupted: the bundle's files are damaged.
        EnvironmentLacks: the target's package, a GPU or the plugin library is missing.
        ExportFailed: the engine cannot be built; the text names the node where one is to blame.
    """
    began = time.perf_counter()
    progress("open")
    opened = Bundle.open(bundle)
    profiles: tuple[Profile, ...] = ()
    if request.target != ORT or request.provider == "tensorrt":
        shapes = (request.min_shapes, request.opt_shapes, request.max_shapes)
        profiles = profiles_of(opened.manifest, *shapes)
    gpu = None if request.target == ORT else _require_tensorrt(request)
    _require_files(request)

    import onnx_ir as ir

    model = ir.load(opened.model_path)
    where = (request.provider,) if request.target == ORT else _capabilities(request, gpu)
    words = (request.target, *where, request.dtype or dtype_of(model), *(["graph"] if request.graph_only else []))
    name = request.name or "-".join(words)
    with reserved(opened.path / ENGINES_FOLDER / name, force, ENGINE) as reservation:
        job = _Job(opened, model, request, profiles, gpu, progress, warn, began)
        manifest = reservation.write(job.write)
    return Engine(reservation.out, manifest)


@dataclass(frozen=True)
class _Job:
    """One build, after everything that can be refused was."""

    bundle: Bundle
    model: ir.Model
    request: BuildRequest
    profiles: tuple[Profile, ...]
    gpu: Gpu | None
    progress: Tell
    warn: Tell
    began: float

    def write(self, folder: Path) -> EngineManifest:
        """Build into a folder; `files` of the manifest is left to whoever puts the folder in place."""
        return self._onnxruntime(folder) if self.request.target == ORT else self._tensorrt(folder)

    def _onnxruntime(self, folder: Path) -> EngineManifest:
        from .onnxruntime.target import build_ort

        built = build_ort(self.bundle, self.request, self.model, folder, self.profiles, self.progress, self.warn)
        return self._manifest(
            built.versions,
            file=built.file,
            dtype=built.dtype,
            kept_in_fp32=built.kept_in_fp32,
            compute_capabilities=(),
            plugin=None,
            sites=built.sites,
            build_s=built.build_s,
            status=built.status,
            session=built.session,
        )

    def _tensorrt(self, folder: Path) -> EngineManifest:
        request = self.request
        plugin = (request.plugin_api or PLUGIN_V3) if request.target == TENSORRT else NO_PLUGIN
        kernels = self._kernels(plugin)
        longest = longest_sizes(self.profiles, self.bundle.manifest)
        prepared = prepare(self.model, request, kernels, self.progress, self.warn, longest)
        common: dict[str, Any] = {
            "dtype": prepared.dtype,
            "kept_in_fp32": prepared.kept_in_fp32,
            "compute_capabilities": _capabilities(request, self.gpu),
            "sites": prepared.sites,
        }
        named = tuple(map(str, kernels))
        if request.graph_only:
            save_model(prepared.model, folder / MODEL_FILE)
            record = None if plugin == NO_PLUGIN else PluginRecord(plugin, "", "", named)
            return self._manifest(
                {}, file=MODEL_FILE, plugin=record, build_s=time.perf_counter() - self.began, status=NOT_BUILT, **common
            )
        built = self._build(prepared.model, plugin, folder / ENGINE_FILE)
        record = None if plugin == NO_PLUGIN else _plugin_record(plugin, built["library"], named)
        versions = {RUNTIMES[request.target].module: built["version"]}
        return self._manifest(
            versions, file=ENGINE_FILE, plugin=record, build_s=built["seconds"], status=NOT_RUN, **common
        )

    def _build(self, model: ir.Model, plugin: str, engine: Path) -> dict[str, Any]:
        """Build in a process of its own; what `build_worker.build` returns."""
        request = self.request
        with tempfile.TemporaryDirectory() as temporary:
            file = Path(temporary) / MODEL_FILE
            save_model(model, file)
            return build_in_child(
                RUNTIMES[request.target].title,
                {
                    "target": request.target,
                    "model": str(file),
                    "engine": str(engine),
                    "profiles": [dataclasses.asdict(profile)["inputs"] for profile in self.profiles],
                    "capabilities": [name.removeprefix("sm") for name in _capabilities(request, self.gpu)],
                    "plugin": plugin,
                    "library": None if request.plugin_library is None else str(request.plugin_library),
                    "timing_cache": None if request.timing_cache is None else str(request.timing_cache),
                    "hardware_compatibility": request.hardware_compatibility,
                    "version_compatible": request.version_compatible,
                    "weight_streaming": request.weight_streaming,
                    "strip": request.strip,
                    "refit": request.refit,
                    "pool_limits": dict(request.pool_limits),
                    "optimization_level": request.optimization_level,
                },
                self.progress,
                self.warn,
            )

    def _kernels(self, plugin: str) -> tuple[Target, ...]:
        """What the plugin's kernels are for: the devices that the engine will run on.

        Raises:
            InvalidRequest: there are no kernels for one of them.
        """
        if plugin == NO_PLUGIN:
            return ()
        from ...plugins.gpu.pack_build import PTX, PTX_ARCHITECTURE, Target
        from ...plugins.gpu.variants import ARCHITECTURES

        if self.request.compute_capabilities:
            named = [int(name.removeprefix("sm")) for name in self.request.compute_capabilities]
        elif self.request.hardware_compatibility == "ampere-plus":
            named = list(ARCHITECTURES)
        else:
            assert self.gpu is not None, "_require_tensorrt looked before"
            named = [int(self.gpu.architecture.removeprefix("sm"))]
        if self.gpu is not None and not self.request.graph_only:
            # Whatever else was named, the engine runs where it is built.
            named = list(dict.fromkeys([int(self.gpu.architecture.removeprefix("sm")), *named]))
        older = [f"sm{number}" for number in named if number < PTX_ARCHITECTURE]
        if older:
            raise InvalidRequest(
                f"{', '.join(older)}: longspan's GPU kernels are for sm{PTX_ARCHITECTURE} and later; next step: "
                "--plugin-api none, which builds the function bodies"
            )
        tuned = tuple(Target(number) for number in named if number in ARCHITECTURES)
        everywhere = len(tuned) < len(named) or self.request.hardware_compatibility == "ampere-plus"
        return (*tuned, *((PTX,) if everywhere else ()))

    def _manifest(self, versions: dict[str, str], /, **values: Any) -> EngineManifest:
        defaults = {item.name: item.default for item in dataclasses.fields(BuildRequest)}
        given = {
            name: value
            for name, value in dataclasses.asdict(self.request).items()
            if name != "target" and value and value != defaults[name]
        }
        # As JSON reads it back.
        options = json.loads(json.dumps(given, default=os.path.abspath))
        return EngineManifest(
            target=self.request.target,
            device="" if self.gpu is None else self.gpu.name,
            profiles=self.profiles,
            options=options,
            model_sha256=self.bundle.manifest.files[MODEL_FILE],
            versions={**installed_versions(_VERSIONED), **versions},
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **values,
        )


def _require_files(request: BuildRequest) -> None:
    """Refuse files that cannot be what they are named for, before anything is done.

    Raises:
        InvalidRequest: the folder of the timing cache does not exist, or one of the files is something else.
    """
    cache, library = request.timing_cache, request.plugin_library
    if cache is not None and not cache.absolute().parent.is_dir():
        raise InvalidRequest(f"--timing-cache {cache}: its folder does not exist")
    if cache is not None and cache.exists() and not cache.is_file():
        raise InvalidRequest(f"--timing-cache {cache}: is not a file; allowed: a timing cache, or a new file")
    if library is not None:
        if not library.is_file():
            raise InvalidRequest(
                f"--plugin-library {library}: is not a file; next step: leave it out, or name a library"
            )
        try:
            plugin_library_major(library)
        except InvalidLibrary as error:
            raise InvalidRequest(f"--plugin-library: {error}") from error


def _require_tensorrt(request: BuildRequest) -> Gpu | None:
    """The GPU that is here, after making sure that the target can be built on this machine.

    Raises:
        EnvironmentLacks: its package is missing, or the GPU that it needs.
        InvalidRequest: it cannot build for a compute capability.
    """
    runtime = RUNTIMES[request.target]
    if not request.graph_only and not runtime.installed:
        raise EnvironmentLacks(
            f"--target {request.target}: {runtime.title} is not installed; next step: {runtime.install}"
        )
    gpu = cuda_gpu()
    if request.target == TENSORRT_RTX:
        unknown = [name for name in request.compute_capabilities if name not in RTX_CAPABILITIES]
        if unknown:
            raise InvalidRequest(
                f"--compute-capability {', '.join(unknown)}: TensorRT-RTX does not build for it; allowed: "
                f"{', '.join(RTX_CAPABILITIES)}"
            )
        if not request.compute_capabilities and gpu is None and not request.graph_only:
            raise InvalidRequest(
                "--compute-capability is needed where there is no GPU to build for; allowed: "
                f"{', '.join(RTX_CAPABILITIES)}, several separated by commas"
            )
        if gpu is None and (request.refit or request.strip):
            raise EnvironmentLacks(
                "--refit, --strip: TensorRT-RTX compiles engines whose weights can be replaced on a GPU only, and here "
                "is none; next step: build without them, or on a machine with a GPU"
            )
    elif gpu is None and request.graph_only:
        if not request.compute_capabilities and request.plugin_api != NO_PLUGIN:
            raise InvalidRequest(
                "--compute-capability is needed where there is no GPU: it says which kernels go into the graph, e.g. "
                "--compute-capability sm80,sm90"
            )
    elif gpu is None:
        raise EnvironmentLacks(
            "--target tensorrt: TensorRT times kernels on the GPU that it builds for, and there is none here that the "
            "driver lets this process use; next step: build on the machine that will run the engine, from here with "
            "--graph-only for trtexec there; without a GPU, --target tensorrt-rtx builds for GeForce and RTX devices"
        )
    return gpu


def _plugin_record(api: str, library: str | None, kernels: tuple[str, ...]) -> PluginRecord:
    if library is None:
        return PluginRecord(api, "", "", kernels)
    return PluginRecord(api, Path(library).name, sha256_of(Path(library)), kernels)


def _capabilities(request: BuildRequest, gpu: Gpu | None) -> tuple[str, ...]:
    """What the engine is to run on."""
    if request.compute_capabilities and (request.target == TENSORRT_RTX or request.graph_only):
        return request.compute_capabilities
    return () if gpu is None else (gpu.architecture,)
