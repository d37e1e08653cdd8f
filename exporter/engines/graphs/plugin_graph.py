"""The graph for TensorRT with the plugin: each attention site is one node that says everything about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ....plugins.definition import DOMAIN, PACK_ATTRIBUTE, PACK_ID_ATTRIBUTE, Operator, Tensor
from ....plugins.errors import InvalidOperands
from ....plugins.functions import signature_of, write_out
from ....plugins.gpu.pack import InvalidPack, Pack
from ....plugins.registry import operator
from ...errors import BundleCorrupted, ExportFailed
from ...kernel_sites import graph_sites
from ...sites.record import Rung, longspan_nodes
from ..manifest import BuiltSite
from .aot_nodes import aot_refusals, compile_aot, write_aot_nodes
from .body_graph import finish, name_nodes
from .inlining import inline_other_functions, inline_sites
from .node_packs import node_packs, refusals
from .refusals import STANDARD
from .typed import Progress, dtype_of, in_type

if TYPE_CHECKING:
    import onnx_ir as ir

    from ....plugins.gpu.pack_build import Target
    from ....plugins.gpu.variants import KernelSite

PLUGIN_NAMESPACE = DOMAIN
PLUGIN_VERSION = "1"
OPERANDS, RESULTS = "operands", "results"
"""Attributes that name a node's inputs and outputs: a plugin cannot leave one out, so that only those present are
written, one after the other."""

_INT32 = range(-(2**31), 2**31)


@dataclass(frozen=True)
class PluginGraph:
    """A graph for TensorRT with the plugin.

    Attributes:
        model: The graph; its ``longspan`` nodes are plugins, all others standard.
        sites: How each site is lowered.
        dtype: What matrix products and attention compute in.
        kept_in_fp32: How many nodes stay in fp32, by the reason.
    """

    model: ir.Model
    sites: tuple[BuiltSite, ...]
    dtype: str
    kept_in_fp32: dict[str, int]


def plugin_graph(
    model: ir.Model,
    targets: Sequence[Target],
    *,
    dtype: str | None = None,
    packs: Sequence[Pack] = (),
    bodies: bool = False,
    aot: bool = False,
    progress: Progress = lambda stage: None,
    warn: Progress = lambda text: None,
) -> PluginGraph:
    """Turn every site into a node that TensorRT's parser makes a plugin of.

    The node keeps its name and its results. Its inputs are those that are present, named by the attribute `operands`;
    `results` names its outputs. The definition's attributes are written out, and ``kernel_pack`` holds the kernels for
    this node and the targets, as int8: nothing beside the plugin library is needed. ``block_masks`` becomes int32 words
    of the same bytes, since a network has no uint8.

    Args:
        model: A bundle's graph; it is not changed, and shares with the result the weights that keep their type.
        targets: What the kernels are for.
        dtype: Type to build in, one of `request.DTYPES`; None for what the model computes in.
        packs: Where to look for kernels, before and beyond the pack in the model; what they lack is compiled.
        bodies: Build the function body of a site that no kernel serves, instead of refusing the graph.
        aot: Write ahead-of-time plugins, each with a name and one kernel of its own; sites that need more are refused.
        progress: Told how many kernels are compiled, and when there is something to convert.
        warn: Told which numbers the type could not hold.

    Raises:
        ExportFailed: no kernel serves a site, a site contradicts its definition, the graph cannot be converted, or
            there is a node that TensorRT must not see; the text names it.
        EnvironmentLacks: kernels must be compiled, and Triton is not installed.
        BundleCorrupted: the pack in the model is damaged.
    """
    prepared = model.clone()
    known = [*packs, *_packs_in(prepared)]
    inline_other_functions(prepared)
    name_nodes(prepared)
    dtype = dtype or dtype_of(prepared)
    notes: list[str] = []
    typed = in_type(prepared, dtype, progress, notes.append, bodies=False)
    served, refused = _served(typed.model, targets, aot)
    if refused and not bodies:
        raise ExportFailed(_refusal(refused))
    names = [node.name or "" for node in _sites(prepared)]
    if refused:
        # Bodies are converted with everything around them: converted before, they would compute in float32 inside.
        inline_sites(prepared, [node for node in _sites(prepared) if node.name in refused])
        notes.clear()
        typed = in_type(prepared, dtype, progress, notes.append, bodies=True)
    for note in notes:
        warn(note)
    prepared = typed.model
    kernels, compiled = ({}, frozenset()) if aot else node_packs(served, targets, known, progress)
    plugins = compile_aot(prepared, served, targets, progress) if aot and served else {}
    words: dict[ir.Value, ir.Value] = {}
    for node in _sites(prepared):
        _write_plugin(prepared, node, kernels.get(node.name or ""), words)
    for identifier in [identifier for identifier in prepared.functions if identifier[0] == DOMAIN]:
        del prepared.functions[identifier]
    finish(prepared, (*STANDARD, DOMAIN))
    if aot:
        write_aot_nodes(prepared, plugins)
    sites = tuple(_lowered(name, refused.get(name), name in compiled or aot) for name in names)
    return PluginGraph(prepared, sites, typed.dtype, typed.kept_in_fp32)


def _sites(model: ir.Model) -> list[ir.Node]:
    """The ``longspan`` nodes of the graph, nested graphs included."""
    return [node for node in model.graph.all_nodes() if node.domain == DOMAIN]


def _packs_in(model: ir.Model) -> list[Pack]:
    """The packs that nodes carry; the attributes are removed."""
    packs = []
    for node in _sites(model):
        node.attributes.pop(PACK_ID_ATTRIBUTE, None)
        attribute = node.attributes.pop(PACK_ATTRIBUTE, None)
        if attribute is not None:
            try:
                packs.append(Pack.from_bytes(attribute.as_tensor().tobytes()))
            except InvalidPack as error:
                raise BundleCorrupted(f"the kernel pack of node {node.name!r} {error}") from error
    return packs


def _served(model: ir.Model, targets: Sequence[Target], aot: bool) -> tuple[dict[str, KernelSite], dict[str, str]]:
    """Sites of a graph in its final type that become plugins, and why the others do not."""
    for node in longspan_nodes(model):
        try:
            signature_of(node)
        except InvalidOperands as error:
            raise ExportFailed(f"{node.op_type} {node.name!r} contradicts its definition: {error}") from error
    found = graph_sites(model)
    refused = {**found.refused, **refusals(found.sites, targets)}
    for node in longspan_nodes(model):
        reason = refused.get(node.name or "") or _unfit(node)
        if reason is not None:
            refused[node.name or ""] = reason
    for node in _sites(model):
        if node.graph is not model.graph:
            refused[node.name or ""] = "it is inside a Loop, Scan or If; plugins are nodes of the main graph"
    served = {node: site for node, site in found.sites.items() if node not in refused}
    if aot:
        refused |= aot_refusals(model, served, targets)
    return {node: site for node, site in served.items() if node not in refused}, refused


def _unfit(node: ir.Node) -> str | None:
    """Why a node cannot be written as a plugin, whatever kernels there are."""
    definition = operator(node.op_type)
    for attribute in definition.attributes:
        given = node.attributes.get(attribute.name)
        numbers: Any = () if given is None or attribute.kind == "float" else given.value
        for number in (numbers,) if isinstance(numbers, int) else numbers:
            if number not in _INT32:
                return f"its {attribute.name} is {number}: a plugin's numbers have 32 bits"
    for formal, value in _present(definition, node):
        wanted = _element(formal, node)
        if value.dtype != wanted:
            got = "an unknown type" if value.dtype is None else f"type {value.dtype.name.lower()}"
            return f"its {formal.name} has {got}; allowed: {wanted.name.lower()}"
        if formal.name == "block_masks":
            return _unfit_masks(value)
    return None


def _element(formal: Tensor, node: ir.Node) -> ir.DataType:
    import onnx_ir as ir

    q = node.inputs[0]
    if formal.dtype == "T" and q is not None and q.dtype is not None:
        return q.dtype
    return {"float32": ir.DataType.FLOAT}.get(formal.dtype) or ir.DataType[formal.dtype.upper()]


def _unfit_masks(value: ir.Value) -> str | None:
    import onnx_ir as ir

    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return (
            "its block_masks are computed in the graph, and a TensorRT network has no uint8; allowed: masks that are "
            "constants"
        )
    _, rows, row_bytes = tensor.numpy().shape
    if rows * row_bytes % 4:
        return f"its block_masks have {rows} rows of {row_bytes} bytes, which are no whole words of 4 bytes"
    return None


def _present(definition: Operator, node: ir.Node) -> list[tuple[Tensor, ir.Value]]:
    pairs = zip(definition.inputs, node.inputs, strict=False)
    return [(formal, value) for formal, value in pairs if value is not None]


def _refusal(refused: dict[str, str]) -> str:
    lines = "; ".join(f"node {node!r}: {reason}" for node, reason in refused.items())
    return (
        f"no kernel of the plugin serves {len(refused)} of the attention sites: {lines}; next step: build without the "
        "plugin (--plugin-api none), whose function bodies take any site"
    )


def _lowered(node: str, refused: str | None, compiled: bool) -> BuiltSite:
    if refused is not None:
        rungs = (
            Rung("plugin", False, refused),
            Rung("function body", True, "standard ONNX, which TensorRT compiles as any other part of the network"),
        )
        return BuiltSite(node, "function body", rungs)
    kernels = "compiled for this engine" if compiled else "from the bundle's kernel pack"
    return BuiltSite(node, "plugin", (Rung("plugin", True, f"a GPU kernel serves the site: {kernels}"),))


def _write_plugin(model: ir.Model, node: ir.Node, pack: Pack | None, words: dict[ir.Value, ir.Value]) -> None:
    """Write a node, in place, as the plugin reads it; its attributes are written out."""
    import numpy as np
    import onnx_ir as ir

    write_out(node)
    present = _present(operator(node.op_type), node)
    values = [_as_words(model, value, words) if f.name == "block_masks" else value for f, value in present]
    node.resize_inputs(len(values))
    for index, value in enumerate(values):
        node.replace_input_with(index, value)
    results = ["Y", "lse"][: 1 + (len(node.outputs) > 1 and bool(node.outputs[1].name))]
    node.resize_outputs(len(results))
    node.overload = ""
    named: dict[str, Any] = {
        "plugin_namespace": PLUGIN_NAMESPACE,
        "plugin_version": PLUGIN_VERSION,
        OPERANDS: [formal.name for formal, _ in present],
        RESULTS: results,
    }
    for attribute in ir.convenience.convert_attributes(named):
        node.attributes.add(attribute)
    if pack is not None:
        # TensorRT's parser refuses uint8 here.
        content = ir.tensor(np.frombuffer(pack.to_bytes(), np.int8), name=PACK_ATTRIBUTE)
        node.attributes.add(ir.AttrTensor(PACK_ATTRIBUTE, content))


def _as_words(model: ir.Model, value: ir.Value, words: dict[ir.Value, ir.Value]) -> ir.Value:
    """The int32 initializer (M, words of a mask) with the bytes of `value`, which is constant; made once for each."""
    import numpy as np
    import onnx_ir as ir

    if value not in words:
        tensor = ir.convenience.get_const_tensor(value)
        assert tensor is not None, "_unfit_masks looked before"
        masks = np.ascontiguousarray(tensor.numpy())
        count, rows, row_bytes = masks.shape
        data = masks.reshape(-1).view("<i4").reshape(count, rows * row_bytes // 4)
        name = f"{value.name}_words"
        while name in model.graph.initializers:
            name += "_"
        words[value] = ir.Value(
            name=name,
            const_value=ir.tensor(data, name=name),
            type=ir.TensorType(ir.DataType.INT32),
            shape=ir.Shape(data.shape),
        )
        model.graph.register_initializer(words[value])
    return words[value]
