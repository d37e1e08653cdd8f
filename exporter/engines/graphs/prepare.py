"""From a bundle's graph to the graph that TensorRT gets: precision first, then the sites."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import ExportFailed, FallbackRan
from ...sites.record import Rung, longspan_nodes
from ..manifest import BuiltSite
from ..request import PLUGIN_AOT, TENSORRT_RTX, BuildRequest
from .body_graph import body_graph

if TYPE_CHECKING:
    import onnx_ir as ir

    from ....plugins.gpu.pack_build import Target

Progress = Callable[[str], None]

_NAMES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


@dataclass(frozen=True)
class PreparedGraph:
    """A graph for TensorRT's parser.

    Attributes:
        model: The graph.
        dtype: What matrix products and attention compute in.
        kept_in_fp32: How many nodes stay in fp32, by the reason.
        sites: How each attention site is built.
    """

    model: ir.Model
    dtype: str
    kept_in_fp32: dict[str, int]
    sites: tuple[BuiltSite, ...]


def dtype_of(model: ir.Model) -> str:
    """What a model computes in: the floating type of most of its weights, ``"fp32"`` where it has none."""
    sizes: collections.Counter[str] = collections.Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype.name in _NAMES:
            sizes[_NAMES[value.const_value.dtype.name]] += value.const_value.nbytes
    return sizes.most_common(1)[0][0] if sizes else "fp32"


@dataclass(frozen=True)
class TypedGraph:
    """A graph, what its matrix products and attention compute in, and how many nodes stay in fp32, by the reason."""

    model: ir.Model
    dtype: str
    kept_in_fp32: dict[str, int]


def in_type(
    model: ir.Model,
    dtype: str | None,
    progress: Progress = lambda stage: None,
    warn: Progress = lambda text: None,
) -> TypedGraph:
    """Convert a graph where it computes in another type than is asked for.

    Args:
        model: A bundle's graph; it is not changed.
        dtype: One of `request.DTYPES`; None for what the model computes in.
        progress: Told when there is something to convert.
        warn: Told which numbers the type could not hold.

    Raises:
        ExportFailed: the graph cannot be converted.
    """
    present = dtype_of(model)
    bodies_inlined = next(longspan_nodes(model), None) is None
    if dtype is None or (dtype == present and (dtype == "fp32" or not bodies_inlined)):
        return TypedGraph(model, present, {})
    from .precision import convert_precision

    progress(f"convert to {dtype}")
    converted = convert_precision(model, dtype)
    for note in converted.notes:
        warn(note)
    return TypedGraph(converted.model, dtype, converted.kept_in_fp32)


def prepare(
    model: ir.Model,
    request: BuildRequest,
    kernels: Sequence[Target],
    progress: Progress = lambda stage: None,
    warn: Progress = lambda text: None,
) -> PreparedGraph:
    """Rewrite a bundle's graph for TensorRT or TensorRT-RTX.

    Args:
        model: The bundle's graph.
        request: What is built.
        kernels: Architectures that the plugin's kernels are for; empty for no plugin.
        progress: Told each stage.
        warn: Told which numbers the type that was asked for could not hold.

    Raises:
        ExportFailed: a node cannot be built, or no kernel serves any site; the text names it.
        FallbackRan: no kernel serves a site, and the request wants a kernel at each.
        EnvironmentLacks: kernels must be compiled and the compiler is missing.
    """
    if not kernels:
        progress("inline the function bodies")
        sites = tuple(_body_site(node.name or "", request) for node in longspan_nodes(model))
        # First, so that the products inside the bodies are computed in that type as well.
        typed = in_type(body_graph(model), request.dtype or dtype_of(model), progress, warn)
        return PreparedGraph(typed.model, typed.dtype, typed.kept_in_fp32, sites)
    typed = in_type(model, request.dtype, progress, warn)
    from .plugin_graph import plugin_graph

    progress("write the plugins")
    plugins = plugin_graph(typed.model, kernels, bodies=True, aot=request.plugin_api == PLUGIN_AOT, progress=progress)
    _refuse_bodies(plugins.sites, request.require_kernel)
    return PreparedGraph(plugins.model, typed.dtype, typed.kept_in_fp32, plugins.sites)


def _refuse_bodies(sites: Sequence[BuiltSite], require_kernel: bool) -> None:
    """Refuse a build that would have the plugin nowhere, or not everywhere where that was asked for."""
    bodies = {site.node: site.ladder[0].reason for site in sites if site.lowering == "function body"}
    if not bodies or (len(bodies) < len(sites) and not require_kernel):
        return
    reasons = "; ".join(f"node {node!r}: {reason}" for node, reason in bodies.items())
    text = f"no kernel of the plugin serves {len(bodies)} of {len(sites)} attention sites: {reasons}"
    if require_kernel:
        raise FallbackRan(f"--require-kernel: {text}")
    raise ExportFailed(f"{text}; next step: --plugin-api none, which builds the function bodies")


def _body_site(node: str, request: BuildRequest) -> BuiltSite:
    refused = "TensorRT-RTX has no plugins" if request.target == TENSORRT_RTX else "--plugin-api none"
    return BuiltSite(
        node,
        "function body",
        (
            Rung("plugin", False, refused),
            Rung("function body", True, "standard ONNX, which the runtime compiles as any other part of the network"),
        ),
    )
