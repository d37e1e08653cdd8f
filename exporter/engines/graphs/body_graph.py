"""The graph for runtimes that have no kernel of ours: TensorRT-RTX, and TensorRT without the plugin."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from ....plugins.definition import DOMAIN
from .inlining import NOTHING_KNOWN, inline_other_functions, inline_sites
from .refusals import STANDARD, refuse_misread_nodes, refuse_unknown_operators
from .rewrites import counted_by_comparison, without_loop_conditions

if TYPE_CHECKING:
    import onnx_ir as ir

    from ....plugins.block_sparse_attention.long_rows import LongRows


def body_graph(
    model: ir.Model, keep: Collection[str] = (), long_rows: Mapping[str, LongRows] = NOTHING_KNOWN
) -> ir.Model:
    """Inline every function, those of attention sites in the form that TensorRT builds.

    Args:
        model: A bundle's graph; it is not changed, and shares its weights with the result.
        keep: Sites that are left as they are, with their functions, for `native.write_native`.
        long_rows: Rows of blocks that are computed apart, by site: `long_rows.find_long_rows`.

    Returns:
        A graph of standard operators without functions, whose nodes and values all have names of their own.

    Raises:
        ExportFailed: a site contradicts its operator's definition, or there is a node that TensorRT must not see: of an
            operator that is neither standard ONNX nor has a function, which it takes for a plugin, and TensorRT-RTX
            then ends the process; or one that it reads as something else, such as Attention with a window.
    """
    prepared = model.clone()
    inline_other_functions(prepared)
    name_nodes(prepared)
    sites = [node for node in prepared.graph.all_nodes() if node.domain == DOMAIN and node.name not in keep]
    inline_sites(prepared, sites, long_rows)
    finish(prepared, (*STANDARD, DOMAIN) if keep else STANDARD)
    return prepared


def finish(model: ir.Model, domains: Sequence[str] = STANDARD) -> None:
    """What both paths need when sites are done, in place: rewrites, unique names, and refusal of what is left.

    Args:
        model: Its sites are inlined or plugins.
        domains: Those of the operators that TensorRT knows.

    Raises:
        ExportFailed: a node is left that TensorRT must not see.
    """
    from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

    RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    counted_by_comparison(model)
    RemoveUnusedNodesPass()(model)
    without_loop_conditions(model)  # behind the pass, which takes an absent condition for no input at all
    name_nodes(model)
    RemoveUnusedOpsetsPass()(model)
    refuse_unknown_operators(model, domains)
    refuse_misread_nodes(model)


def name_nodes(model: ir.Model) -> None:
    """Give each node, in place, a name that no other has: TensorRT's inspector finds layers by them."""
    used: set[str] = set()
    for number, node in enumerate(model.graph.all_nodes()):
        name = node.name or f"{node.op_type}_{number}"
        if name in used:
            name = next(wanted for k in range(1, len(used) + 2) if (wanted := f"{name}~{k}") not in used)
        used.add(name)
        node.name = name
