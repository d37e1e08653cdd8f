"""Sessions of ``ort`` builds: what they are opened with, as a record, and how to open one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....plugins.library import ORT_LIBRARY_NAME, ort_library_path, tensorrt_loader_path
from ...devices import verify_session
from ...errors import BundleCorrupted, EnvironmentLacks, InvalidRequest
from ...whole_folders import ENGINE, MANIFEST_FILE, verify_files
from ..manifest import EngineManifest
from ..profiles import Profile, Shape
from ..request import ORT

SESSION_FILE = "session.json"
"""The session beside the model, for programs that open it without Longspan."""

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT_PROVIDER = "TensorrtExecutionProvider"

CACHE_FOLDER = "trt_cache"
"""Where ONNX Runtime's TensorRT provider keeps what it built, in the folder of the build."""

LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}
"""Names of ``onnxruntime.GraphOptimizationLevel``, by what a session's record calls them."""


@dataclass(frozen=True)
class ProviderPlan:
    """One execution provider of a session.

    Attributes:
        name: ONNX Runtime's name for it.
        options: Its options, as the texts that ONNX Runtime takes.
        paths: Those of them that are paths relative to the folder of the build.
    """

    name: str
    options: dict[str, str] = field(default_factory=dict)
    paths: tuple[str, ...] = ()

    def absolute(self, folder: Path) -> tuple[str, dict[str, str]]:
        """What ``InferenceSession`` takes, for a build in `folder`."""
        return self.name, {
            name: str((folder / value).resolve()) if name in self.paths else value
            for name, value in self.options.items()
        }


@dataclass(frozen=True)
class SessionPlan:
    """What a session is opened with. Threads are left to who opens it: only he knows what else the machine runs.

    Attributes:
        model: File of the model, in the folder of the build.
        providers: Execution providers, most wanted first.
        operator_library: Name of the library with Longspan's kernels that is registered; None for none.
        enable_mem_pattern: Whether ONNX Runtime plans memory anew for every set of input shapes, and keeps the plans.
        enable_cpu_mem_arena: Whether memory is kept between runs.
        graph_optimization_level: What is done to the graph when it is loaded: a key of `LEVELS`.
        execution_mode: ``"sequential"`` or ``"parallel"``.
        config_entries: Entries of ``SessionOptions.add_session_config_entry``.
        offline_level: What was done to the graph before it was written: a key of `LEVELS`.
        tensorrt_plugins: Whether the model has nodes of Longspan's TensorRT plugins, so that the TensorRT provider is
            given the library that registers them (`tensorrt_loader_path`) as ``trt_extra_plugin_lib_paths``.
        why: Reasons, by the name of what they are for.
    """

    model: str
    providers: tuple[ProviderPlan, ...]
    operator_library: str | None
    enable_mem_pattern: bool
    offline_level: str
    enable_cpu_mem_arena: bool = True
    graph_optimization_level: str = "all"
    execution_mode: str = "sequential"
    config_entries: dict[str, str] = field(default_factory=dict)
    tensorrt_plugins: bool = False
    why: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Values that JSON has."""
        record: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return record

    def to_json(self) -> str:
        """Content of `SESSION_FILE`."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_dict(cls, record: Mapping[str, Any] | None) -> SessionPlan:
        """Read what `to_dict` made.

        Raises:
            BundleCorrupted: it is something else.
        """
        try:
            if record is None:
                raise TypeError("there is none")
            providers = tuple(
                ProviderPlan(**{**provider, "paths": tuple(provider["paths"])}) for provider in record["providers"]
            )
            plan = cls(**{**record, "providers": providers})
            if plan.graph_optimization_level not in LEVELS or plan.execution_mode not in ("sequential", "parallel"):
                raise ValueError("a level or mode is unknown")
            return plan
        except (KeyError, TypeError, ValueError) as error:
            raise BundleCorrupted(
                f"the session's record is damaged ({type(error).__name__}: {error}); next step: build again"
            ) from error


WHY = {
    "graph_optimization_level": "what is left to do when the model is loaded depends on the machine: the layout of "
    "tensors, and every function body where the library is not registered",
    "threads": "not set: only who opens the session knows what else the machine runs",
    "enable_mem_pattern": "off where lengths vary: a plan would be made and kept for every shape that is ever seen",
    "session.use_device_allocator_for_initializers": "weights stay out of the arena, which would round them up and "
    "hold them beside what runs need",
    "use_tf32": "off: products of float32 keep their 24 bits, as in longspan check",
    "arena_extend_strategy": "memory grows by what a run needs; the default doubles it at each longer text",
    "cudnn_conv_algo_search": "by heuristics: the default times all algorithms again for every new shape",
    "enable_skip_layer_norm_strict_mode": "norms are computed in float32 in a float16 graph as well",
    "enable_cuda_graph": "off: a graph is captured for one shape with inputs at fixed addresses; lengths vary. A "
    "program that serves one shape through an IoBinding may turn it on",
    "trt_fp16_enable": "not set, nor trt_bf16_enable: with either, TensorRT may compute any layer in that type. "
    "Without, the network is strongly typed and types are those of the graph, where softmax and norms stay float32",
    "trt_engine_cache_enable": "an engine is built when the session first meets a model and a GPU, which takes "
    "minutes; the cache is valid for one model, TensorRT and GPU",
    "trt_extra_plugin_lib_paths": "set when the session is opened, to liblongspan_trt*_loader.so of this machine: the "
    "provider opens a library and asks TensorRT's registry, so the library must register the plugins itself",
    "trt_timing_cache_enable": "a build that is repeated after a change reuses what was timed",
    "trt_profile_min_shapes": "one engine for all shapes of the profile; without, one is built at each new longest",
    "trt_cuda_graph_enable": "off, for the same reason as enable_cuda_graph",
}
"""Why options have their values, by option."""


def cuda_options() -> dict[str, str]:
    """Options of the CUDA provider; `WHY` has the reasons."""
    return {
        "device_id": "0",
        "use_tf32": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "enable_skip_layer_norm_strict_mode": "1",
        "enable_cuda_graph": "0",
    }


def tensorrt_options(profiles: Sequence[Profile]) -> dict[str, str]:
    """Options of the TensorRT provider; `WHY` has the reasons.

    Args:
        profiles: The shapes that it is to build for.
    """
    return {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": CACHE_FOLDER,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": CACHE_FOLDER,
        "trt_cuda_graph_enable": "0",
        **{f"trt_profile_{bound}_shapes": _shapes(profiles, bound) for bound in ("min", "opt", "max")},
    }


TENSORRT_PATHS = ("trt_engine_cache_path", "trt_timing_cache_path")


def _shapes(profiles: Sequence[Profile], bound: str) -> str:
    """``name:1x128,other:1x128``; a name that comes again belongs to the next profile."""
    shapes: list[tuple[str, Shape]] = [
        (name, getattr(shapes, bound)) for profile in profiles for name, shapes in profile.inputs.items()
    ]
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes)


def open_ort_session(
    engine_folder: str | os.PathLike[str],
    *,
    threads: int = 0,
    library: str | bool = True,
    profile: str | os.PathLike[str] | None = None,
) -> Any:
    """Open the session of an ``ort`` build, exactly as its manifest says.

    Args:
        engine_folder: ``BUNDLE/engines/NAME``.
        threads: Threads that a node may use; 0 for ONNX Runtime's choice.
        library: Whether the operator library is registered where the manifest says so; False runs the function bodies
            instead. A text is the file of another library to register.
        profile: Prefix of a file to profile to; None for no profile.

    Returns:
        An ``onnxruntime.InferenceSession``.

    Raises:
        InvalidRequest: the folder holds no ``ort`` build.
        BundleCorrupted: its files are damaged.
        EnvironmentLacks: ONNX Runtime is missing, or cannot start the provider.
        LibraryMissing: this installation lacks the operator library.
    """
    folder = Path(engine_folder)
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise InvalidRequest(
            f"{folder}: is no engine, it has no {MANIFEST_FILE}; next step: longspan build --target ort"
        )
    try:
        manifest = EngineManifest.from_json(file.read_text(encoding="utf-8"))
        if manifest.target != ORT:
            raise InvalidRequest(
                f"{folder}: is an engine of {manifest.target}, which ONNX Runtime does not run; allowed: those that "
                "longspan build --target ort made"
            )
        plan = SessionPlan.from_dict(manifest.session)
    except (BundleCorrupted, UnicodeDecodeError) as error:
        raise BundleCorrupted(f"{folder}: {error}") from error
    verify_files(folder, manifest.files, ENGINE)
    return open_planned(
        folder, plan, threads=threads, library=library, profile=None if profile is None else Path(profile)
    )


def open_planned(
    folder: Path,
    plan: SessionPlan,
    *,
    threads: int = 0,
    library: str | bool = True,
    profile: Path | None = None,
    providers: Sequence[ProviderPlan] | None = None,
) -> Any:
    """Open a session in a folder that has no manifest yet; arguments and errors are those of `open_ort_session`.

    Args:
        folder: Where the model is.
        plan: How to open it.
        threads: See there.
        library: See there.
        profile: See there.
        providers: Other execution providers than the plan's.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentLacks(
            "an ort build runs in ONNX Runtime, which is not installed; next step: pip install 'longspan[cpu]', or for "
            "a GPU 'longspan[gpu]'"
        ) from error
    wanted = plan.providers if providers is None else providers
    missing = [provider.name for provider in wanted if provider.name not in onnxruntime.get_available_providers()]
    if missing:
        raise EnvironmentLacks(
            f"{', '.join(missing)}: this ONNX Runtime has {', '.join(onnxruntime.get_available_providers())}; next "
            "step: pip uninstall onnxruntime, then pip install onnxruntime-gpu"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, LEVELS[plan.graph_optimization_level]
    )
    options.execution_mode = getattr(onnxruntime.ExecutionMode, f"ORT_{plan.execution_mode.upper()}")
    options.enable_mem_pattern = plan.enable_mem_pattern
    options.enable_cpu_mem_arena = plan.enable_cpu_mem_arena
    for name, value in plan.config_entries.items():
        options.add_session_config_entry(name, value)
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if isinstance(library, str):
        options.register_custom_ops_library(library)
    elif library and plan.operator_library == ORT_LIBRARY_NAME:
        options.register_custom_ops_library(ort_library_path())
    taken = [provider.absolute(folder) for provider in wanted]
    if plan.tensorrt_plugins:
        loader = tensorrt_loader_path(provider_major(Path(onnxruntime.__file__).parent))
        for name, values in taken:
            if name == TENSORRT_PROVIDER:
                values["trt_extra_plugin_lib_paths"] = loader
    session = onnxruntime.InferenceSession(str(folder / plan.model), options, providers=taken)
    verify_session(session, [provider.name for provider in wanted])
    return session


def provider_major(package: Path) -> int:
    """Major version of the TensorRT that ONNX Runtime's TensorRT provider was built for, read without loading it.

    Args:
        package: Folder of the package ``onnxruntime``.

    Raises:
        EnvironmentLacks: the provider is not here, or does not say it.
    """
    file = package / "capi" / "libonnxruntime_providers_tensorrt.so"
    found = re.search(rb"libnvinfer\.so\.(\d+)\0", file.read_bytes()) if file.is_file() else None
    if found is None:
        raise EnvironmentLacks(
            f"{file}: is missing, or does not say for which TensorRT it is, which decides the plugins; next step: pip "
            "install onnxruntime-gpu"
        )
    return int(found.group(1))
