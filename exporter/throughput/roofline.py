"""What attention could reach: its operations, and a matrix product to hold its speed against."""

from __future__ import annotations

from pathlib import Path

from ..bundle import Bundle
from ..sites.graph import SiteGraph
from ..sites.kind import Unknown

SGEMM_SIZE = 1024
"""Rows, columns and terms: large enough that a CPU reaches its peak, small enough for milliseconds."""


def write_sgemm(folder: Path) -> Path:
    """Write a model of one float32 matrix product and return its file."""
    import onnx
    from onnx import TensorProto, helper

    shape = [SGEMM_SIZE, SGEMM_SIZE]
    a, b, c = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "abc")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "sgemm", [a, b], [c])
    path = folder / "sgemm.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


class AttentionWork:
    """Operations of all attention sites of a bundle, by length."""

    def __init__(self, bundle: Bundle) -> None:
        import onnx_ir as ir

        manifest = bundle.manifest
        self._sites = manifest.sites
        self._always_global = manifest.conversion.global_tokens
        self._graph = SiteGraph(ir.load(bundle.model_path), manifest.inputs)

    def flops(self, batch: int, length: int, global_tokens: int = 0) -> int | None:
        """Floating-point operations of one run without padding; None where the graph does not say.

        Those of block lists are those of the blocks that the graph lists for one drawn text.

        Args:
            batch: Sequences.
            length: Tokens per sequence.
            global_tokens: Global tokens of each sequence, besides those of a conversion.
        """
        total = 0
        for site in self._sites:
            channels = self._graph.sizes(site).channels
            if not channels:
                return None
            try:
                work = site.kind.work(site, self._graph, length, global_tokens + self._always_global)
            except Unknown:
                return None
            if work.length != length:
                return None
            total += 2 * channels * work.computed
        return batch * total
