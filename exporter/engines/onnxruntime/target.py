"""Target ``ort``: an optimised model with the session that it is to be opened with.

What is written runs in every ONNX Runtime: attention sites stay ``longspan`` nodes with their function bodies, so the
kernels run where the operator library is registered and the bodies where it is not. For ONNX Runtime's TensorRT
provider the bodies are inlined instead, in the form that TensorRT builds, or the sites become plugins.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....plugins.definition import DOMAIN
from ....plugins.library import ORT_LIBRARY_NAME
from ...bundle import MODEL_FILE, Bundle
from ...devices import CUDA, cuda_devices
from ...errors import EnvironmentLacks, ExportFailed, InvalidRequest
from ...graph_io import save_model
from ...manifest import KernelsRecord
from ...sites.record import Rung, longspan_nodes
from ...versions import installed_versions
from ..graphs.body_graph import body_graph
from ..graphs.typed import TypedGraph, dtype_of, in_type
from ..manifest import NOT_RUN, BuiltSite
from ..profiles import Profile
from ..request import PLUGIN_V3, BuildRequest
from .optimization import offline_level, optimised
from .session import (
    CPU_PROVIDER,
    CUDA_PROVIDER,
    SESSION_FILE,
    TENSORRT_PATHS,
    TENSORRT_PROVIDER,
    WHY,
    ProviderPlan,
    SessionPlan,
    cuda_options,
    tensorrt_options,
)
from .verification import Agreement, verify, width_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from ..graphs.plugin_graph import PluginGraph

_NUMPY_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

_PLUGIN_DOMAIN = "trt.plugins"

_INITIALIZERS = "session.use_device_allocator_for_initializers"


@dataclass(frozen=True)
class OrtBuild:
    """What was built.

    Attributes:
        file: The model, in the folder of the build.
        session: What to open its session with: `SessionPlan.to_dict`.
        dtype: What matrix products and attention compute in: one of `request.DTYPES`.
        kept_in_fp32: How many nodes stay in fp32, by the reason.
        sites: How each attention site is executed.
        versions: Versions of the packages that took part.
        agreements: Comparisons with the bundle; all passed.
        status: `NOT_RUN`, or on what it has run.
        build_s: Seconds that the build took, comparisons included.
    """

    file: str
    session: dict[str, Any]
    dtype: str
    kept_in_fp32: dict[str, int]
    sites: tuple[BuiltSite, ...]
    versions: dict[str, str]
    agreements: tuple[Agreement, ...]
    status: str
    build_s: float


def build_ort(
    bundle: Bundle,
    request: BuildRequest,
    model: ir.Model,
    folder: Path,
    profiles: Sequence[Profile] = (),
    progress: Callable[[str], None] = lambda stage: None,
    warn: Callable[[str], None] = lambda text: None,
) -> OrtBuild:
    """Write the model of an ``ort`` build and `SESSION_FILE` into a folder, and compare it with the bundle.

    Args:
        bundle: What is built from.
        request: What is asked for.
        model: The bundle's graph; it is not changed.
        folder: An existing folder.
        profiles: The shapes that the TensorRT provider is to build for; without meaning for other providers.
        progress: Told each stage.
        warn: Told which numbers the type that was asked for could not hold.

    Raises:
        InvalidRequest: the provider has no kernels for the type.
        EnvironmentLacks: ONNX Runtime is not installed, or the compiler that GPU kernels of another type need.
        ExportFailed: the model cannot be optimised or run, or what was built differs from the bundle.
    """
    started = time.perf_counter()
    ort_version = _require_onnxruntime()
    dtype = request.dtype or dtype_of(model)
    if request.provider == "cpu" and dtype == "bf16":
        raise InvalidRequest(
            "--dtype bf16: ONNX Runtime's CPU provider has no kernels for it; allowed with --provider cpu: fp32, fp16"
        )
    converted = None if dtype == dtype_of(model) else _NUMPY_NAMES[dtype]
    gpu = bundle.manifest.gpu
    plugins = _plugins(model, request, gpu, progress, warn)
    if plugins is not None:
        typed = TypedGraph(plugins.model, plugins.dtype, plugins.kept_in_fp32)
    elif request.provider == "tensorrt":
        progress("inline the function bodies")
        # First, so that the products inside the bodies are computed in that type as well.
        typed = in_type(body_graph(model), dtype, progress, warn, bodies=True)
    else:
        typed = in_type(model, request.dtype, progress, warn)
    source = typed.model
    if request.provider == CUDA and gpu is not None and converted is not None:
        gpu = _kernels_of_type(source, gpu, progress)
    level, reason = offline_level(source, request)
    library, refused = _library(request, gpu, level, reason)
    plan = _plan(bundle, request, profiles, level, reason, library, refused, plugins is not None)
    with tempfile.TemporaryDirectory() as temporary:
        written = source if level == "disabled" else optimised(source, level, Path(temporary), progress)
        save_model(written, folder / MODEL_FILE)
    (folder / SESSION_FILE).write_text(plan.to_json(), encoding="utf-8")
    progress("compare with the bundle")
    agreements, ran, status = _compared(bundle, request, folder, plan, dtype, converted, width_of(model), ort_version)
    return OrtBuild(
        file=MODEL_FILE,
        session=plan.to_dict(),
        dtype=dtype,
        kept_in_fp32=typed.kept_in_fp32,
        sites=plugins.sites
        if plugins is not None
        else tuple(
            _site(node.name or "", request, refused, ran.get(node.name or ""), status) for node in longspan_nodes(model)
        ),
        versions={**installed_versions(("onnx", "onnx-ir")), "onnxruntime": ort_version},
        agreements=agreements,
        status=status,
        build_s=round(time.perf_counter() - started, 3),
    )


def _require_onnxruntime() -> str:
    """Version of ONNX Runtime.

    Raises:
        EnvironmentLacks: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise EnvironmentLacks(
            "--target ort: ONNX Runtime is not installed; next step: pip install 'longspan[cpu]'"
        ) from error
    return str(onnxruntime.__version__)


def _kernels_of_type(model: ir.Model, exported: KernelsRecord, progress: Callable[[str], None]) -> KernelsRecord:
    """Put GPU kernels of a converted graph's type into it, for what the bundle has them for.

    Raises:
        EnvironmentLacks: the compiler is missing.
        InvalidRequest: no site has a kernel.
        ExportFailed: a kernel does not compile.
    """
    from ...kernel_packs import add_kernels, targets_of

    architectures = [target for target in exported.targets if target != "ptx"]
    return add_kernels(model, targets_of(",".join(architectures), "ptx" in exported.targets), progress)


def _plugins(
    model: ir.Model,
    request: BuildRequest,
    gpu: KernelsRecord | None,
    progress: Callable[[str], None],
    warn: Callable[[str], None],
) -> PluginGraph | None:
    """The graph with a plugin at each site, as ONNX Runtime's TensorRT provider takes it; None where none is wanted.

    The provider makes an operator of every plugin that TensorRT's registry has, in the domain `_PLUGIN_DOMAIN`, whose
    outputs have the types that the graph says.

    Raises:
        InvalidRequest: nothing says which GPUs the kernels are for.
        ExportFailed: no kernel serves any site.
        EnvironmentLacks: kernels must be compiled, and Triton is not installed.
    """
    if request.plugin_api != PLUGIN_V3:
        return None
    if gpu is None:
        raise InvalidRequest(
            "--plugin-api v3: the bundle has no GPU kernels, so nothing says for which GPUs; next step: export it with "
            "--gpu-arch"
        )
    from ...kernel_packs import targets_of
    from ..graphs.plugin_graph import plugin_graph

    progress("make plugins of the attention sites")
    architectures = ",".join(target for target in gpu.targets if target != "ptx")
    targets = targets_of(architectures, "ptx" in gpu.targets)
    built = plugin_graph(model, targets, dtype=request.dtype, bodies=True, progress=progress, warn=warn)
    nodes = list(longspan_nodes(built.model))
    if not nodes:
        reasons = "; ".join(f"{site.node}: {site.ladder[0].reason}" for site in built.sites)
        raise ExportFailed(f"--plugin-api v3: no kernel serves any site ({reasons}); next step: build without it")
    for node in nodes:
        untyped = [value.name for value in node.outputs if value.dtype is None or value.shape is None]
        if untyped:
            raise ExportFailed(f"{node.name}: the graph does not say of what type or shape its output {untyped[0]} is")
        node.domain = _PLUGIN_DOMAIN
    built.model.opset_imports.pop(DOMAIN, None)
    built.model.opset_imports[_PLUGIN_DOMAIN] = 1
    return built


def _library(request: BuildRequest, gpu: KernelsRecord | None, level: str, reason: str) -> tuple[str | None, str]:
    """Name of the operator library that the session registers, or None and why it does not.

    Args:
        request: What is asked for.
        gpu: The GPU kernels in the graph.
        level: How far the graph is optimised before it is written.
        reason: Why no farther.
    """
    if request.provider == "tensorrt":
        return None, (
            "a kernel of the CUDA provider at each site would cut the network into an engine before and one after it; "
            "--plugin-api v3 puts the kernels into the engine"
        )
    if request.provider == CUDA:
        # What LONGSPAN_KERNEL_PATH names here says nothing about the machine that opens the session.
        if gpu is None:
            return None, "the bundle has no GPU kernels; next step: export it with --gpu-arch"
        if gpu.refused:
            refused = "; ".join(f"{node}: {why}" for node, why in gpu.refused.items())
            return None, f"the bundle has no GPU kernels for every site ({refused})"
    elif level == "disabled":
        return None, reason
    return ORT_LIBRARY_NAME, ""


def _plan(
    bundle: Bundle,
    request: BuildRequest,
    profiles: Sequence[Profile],
    level: str,
    reason: str,
    library: str | None,
    refused: str,
    plugins: bool,
) -> SessionPlan:
    providers = [ProviderPlan(CPU_PROVIDER)]
    if request.provider != "cpu":
        providers.insert(0, ProviderPlan(CUDA_PROVIDER, cuda_options()))
    if request.provider == "tensorrt":
        providers.insert(0, ProviderPlan(TENSORRT_PROVIDER, tensorrt_options(profiles), TENSORRT_PATHS))
    entries = {_INITIALIZERS: "1"}
    named = {"graph_optimization_level", "enable_mem_pattern", "threads", *entries}
    named |= {option for provider in providers for option in provider.options}
    if request.provider == "tensorrt":
        named.add("trt_fp16_enable")
    if plugins:
        named.add("trt_extra_plugin_lib_paths")
    why = {option: text for option, text in WHY.items() if option in named}
    why["offline_level"] = reason
    if refused and not plugins:
        why["operator_library"] = refused
    varies = any(not isinstance(size, int) for record in bundle.manifest.inputs for size in record.shape)
    return SessionPlan(
        model=MODEL_FILE,
        providers=tuple(providers),
        operator_library=library,
        enable_mem_pattern=not varies,
        offline_level=level,
        config_entries=entries,
        tensorrt_plugins=plugins,
        why=why,
    )


def _compared(
    bundle: Bundle,
    request: BuildRequest,
    folder: Path,
    plan: SessionPlan,
    dtype: str,
    converted: str | None,
    width: int,
    version: str,
) -> tuple[tuple[Agreement, ...], dict[str, str], str]:
    """Comparisons, what ran at the sites, and the status.

    Where the provider is not here, the CPU runs the graph: that shows what it computes, not that the provider takes it.
    """
    here = request.provider == "cpu" or _can_run(plan)
    if not here and (dtype == "bf16" or plan.tensorrt_plugins):
        return (), {}, NOT_RUN  # the CPU provider has no kernels for it
    seen = verify(bundle, folder, plan, converted, width, on_plan=here)
    wrong = [node for node, how in seen.with_library.items() if how != "kernel"]
    wrong += [node for node, how in seen.without_library.items() if plan.operator_library and how == "kernel"]
    if wrong and here:
        raise ExportFailed(
            f"{', '.join(wrong)}: another path ran than the session asks for; next step: report it with the versions "
            "that longspan doctor prints"
        )
    if not here:
        return seen.agreements, {}, NOT_RUN
    return (
        seen.agreements,
        seen.with_library,
        f"run by {plan.providers[0].name} of ONNX Runtime {version} when it was built",
    )


def _can_run(plan: SessionPlan) -> bool:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return all(provider.name in available for provider in plan.providers) and cuda_devices() > 0


def _site(node: str, request: BuildRequest, refused: str, ran: str | None, status: str) -> BuiltSite:
    if refused:
        return BuiltSite(
            node,
            "function body",
            (Rung("kernel", False, refused), Rung("function body", True, "standard ONNX, which every provider runs")),
        )
    seen = f"of {ORT_LIBRARY_NAME}, " + (
        "which ran in the session's profile" if ran else f"for {request.provider}: {status}"
    )
    return BuiltSite(
        node,
        "kernel",
        (Rung("kernel", True, seen), Rung("function body", False, "in the file, for sessions without the library")),
    )
