"""Sites as ahead-of-time plugins of TensorRT: which of them qualify, their kernels, and their nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ....plugins.errors import PluginError
from ....plugins.gpu.variants import KernelSite, NoKernel
from ....plugins.tensorrt.aot import RECORD_ATTRIBUTE, compile_plugin, node_attributes, plugin_name
from ....plugins.tensorrt.aot_record import AotPlugin
from ....plugins.tensorrt.aot_variants import aot_recipes, architecture_for
from ...errors import ExportFailed
from ...kernel_packs import require_triton
from ...sites.record import longspan_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

    from ....plugins.gpu.pack_build import Target


def aot_refusals(model: ir.Model, sites: Mapping[str, KernelSite], targets: Sequence[Target]) -> dict[str, str]:
    """Why a site cannot be an ahead-of-time plugin, by node; sites that can are not named. Compiles nothing.

    Args:
        model: The graph that the sites are in.
        sites: What to execute, by node.
        targets: What devices the engine is for.
    """
    refused = {}
    for node, layout in _layouts(model, sites).items():
        try:
            aot_recipes(sites[node], layout, architecture_for(targets))
        except NoKernel as error:
            refused[node] = str(error)
    return refused


def compile_aot(
    model: ir.Model,
    sites: Mapping[str, KernelSite],
    targets: Sequence[Target],
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, AotPlugin]:
    """The plugin of each site; sites that agree in everything share one.

    Args:
        model: The graph that the sites are in.
        sites: What to execute, by node; `aot_refusals` names none of them.
        targets: What devices the engine is for.
        progress: Told how many plugins are compiled.

    Raises:
        EnvironmentLacks: Triton is not installed.
        ExportFailed: a kernel does not compile.
    """
    require_triton()
    architecture = architecture_for(targets)
    layouts = _layouts(model, sites)
    names = {node: plugin_name(sites[node], layout, architecture) for node, layout in layouts.items()}
    different = {name: node for node, name in names.items()}
    compiled: dict[str, AotPlugin] = {}
    for name, node in different.items():
        progress(f"plugin {len(compiled)} of {len(different)}")
        try:
            compiled[name] = compile_plugin(sites[node], layouts[node], architecture)
        except PluginError as error:
            raise ExportFailed(f"node {node!r}: {error}") from error
    return {node: compiled[name] for node, name in names.items()}


def write_aot_nodes(model: ir.Model, plugins: Mapping[str, AotPlugin]) -> None:
    """Make the nodes of a graph those of their plugins, in place.

    Args:
        model: A graph whose ``longspan`` nodes have their inputs densely, in the definition's order.
        plugins: By node.
    """
    import onnx_ir as ir

    written: set[str] = set()
    for node in longspan_nodes(model):
        plugin = plugins[node.name or ""]
        node.op_type = plugin.name
        node.attributes.clear()
        attributes = node_attributes(plugin)
        if plugin.name in written:  # one record will do
            del attributes[RECORD_ATTRIBUTE]
        written.add(plugin.name)
        for attribute in ir.convenience.convert_attributes(attributes):
            node.attributes.add(attribute)


def _layouts(model: ir.Model, sites: Mapping[str, KernelSite]) -> dict[str, str]:
    """Layout of each site's operands, by the axes of its Q."""
    layouts = {}
    for node in longspan_nodes(model):
        name, q = node.name or "", node.inputs[0]
        if name in sites and q is not None and q.shape is not None:
            layouts[name] = "bhsd" if len(q.shape) == 4 else "bsd"
    return layouts
