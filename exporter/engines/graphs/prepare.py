"""From a bundle's graph to the graph that TensorRT gets, sites and precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from ...errors import ExportFailed, FallbackRan
from ...sites.record import Rung, longspan_nodes
from ..manifest import BuiltSite
from ..request import PLUGIN_AOT, TENSORRT_RTX, BuildRequest
from .body_graph import body_graph
from .long_rows import find_long_rows
from .native import native_sites, write_native
from .typed import Progress, dtype_of, in_type

if TYPE_CHECKING:
    import onnx_ir as ir

    from ....plugins.block_sparse_attention.long_rows import LongRows
    from ....plugins.gpu.pack_build import Target


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


def prepare(
    model: ir.Model,
    request: BuildRequest,
    kernels: Sequence[Target],
    progress: Progress = lambda stage: None,
    warn: Progress = lambda text: None,
    longest: Mapping[str, int] = MappingProxyType({}),
) -> PreparedGraph:
    """Rewrite a bundle's graph for TensorRT or TensorRT-RTX.

    Args:
        model: The bundle's graph.
        request: What is built.
        kernels: Architectures that the plugin's kernels are for; empty for no plugin.
        progress: Told each stage.
        warn: Told which numbers the type that was asked for could not hold.
        longest: Largest size of each symbolic dimension over all profiles.

    Raises:
        ExportFailed: a node cannot be built, or no kernel serves any site; the text names it.
        FallbackRan: no kernel serves a site, and the request wants a kernel at each.
        EnvironmentLacks: kernels must be compiled and the compiler is missing.
    """
    if not kernels:
        progress("inline the function bodies")
        dtype = request.dtype or dtype_of(model)
        refused: dict[str, str | None] = dict.fromkeys(
            (node.name or "" for node in longspan_nodes(model)), _OTHER_LAYERS
        )
        if request.target == TENSORRT_RTX:
            refused = native_sites(model, dtype, longest)
        native = [node for node, reason in refused.items() if reason is None]
        long_rows = find_long_rows(model, longest)
        # First, so that the products inside the bodies are computed in that type as well.
        typed = in_type(body_graph(model, native, long_rows), dtype, progress, warn, bodies=True)
        write_native(typed.model, native)
        sites = tuple(_body_site(node, reason, request, long_rows.get(node)) for node, reason in refused.items())
        return PreparedGraph(typed.model, typed.dtype, typed.kept_in_fp32, sites)
    from .plugin_graph import plugin_graph

    progress("write the plugins")
    aot = request.plugin_api == PLUGIN_AOT
    plugins = plugin_graph(model, kernels, dtype=request.dtype, bodies=True, aot=aot, progress=progress, warn=warn)
    _refuse_bodies(plugins.sites, request.require_kernel)
    return PreparedGraph(plugins.model, plugins.dtype, plugins.kept_in_fp32, plugins.sites)


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


_OTHER_LAYERS = "used with TensorRT-RTX, whose Attention layer is known; that of other versions of TensorRT is not"


def _body_site(node: str, no_layer: str | None, request: BuildRequest, long_rows: LongRows | None) -> BuiltSite:
    no_plugin = "TensorRT-RTX has no plugins" if request.target == TENSORRT_RTX else "--plugin-api none"
    plugin = Rung("plugin", False, no_plugin)
    if no_layer is None:
        reason = "TensorRT's Attention: the window leaves out no key at any length of the profiles"
        return BuiltSite(node, "native layer", (plugin, Rung("native layer", True, reason)))
    body = "standard ONNX, which the runtime compiles as any other part of the network"
    if long_rows is not None:
        body += f"; {long_rows.words}"
    rungs = (plugin, Rung("native layer", False, no_layer), Rung("function body", True, body))
    return BuiltSite(node, "function body", rungs)
