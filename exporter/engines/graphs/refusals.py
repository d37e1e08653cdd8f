"""Find what TensorRT's parser must not see, before it sees it: it may end the process, or compute something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import ExportFailed

if TYPE_CHECKING:
    import onnx_ir as ir

STANDARD = ("", "ai.onnx")


def refuse_unknown_operators(model: ir.Model, domains: Sequence[str] = STANDARD) -> None:
    """Refuse nodes of other domains than the standard one.

    Args:
        model: A graph whose functions are inlined.
        domains: Those that are allowed.

    Raises:
        ExportFailed: there are some; the message names them.
    """
    found = [node for node in model.graph.all_nodes() if node.domain not in domains]
    if found:
        raise ExportFailed(
            f"{_listed(found)}: TensorRT has no such operator, takes the node for a plugin, and may end the process; "
            "allowed: standard ONNX, and operators with a function in the model; next step: export the model without "
            "this operator, or give the graph a function for it"
        )


def _listed(nodes: list[ir.Node], most: int = 3) -> str:
    named = ", ".join(f"node {node.name!r} is {node.domain}::{node.op_type}" for node in nodes[:most])
    return named + (f" (and {len(nodes) - most} more)" if len(nodes) > most else "")
