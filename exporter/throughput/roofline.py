"""What attention could reach: its operations, and a matrix product to hold its speed against."""

from __future__ import annotations

from pathlib import Path

from ...plugins.attention.operands import Shapes
from ...plugins.sliding_window_attention.definition import Attributes, cost
from ..bundle import Bundle

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
        import onnx

        graph = onnx.load(bundle.model_path, load_external_data=False).graph
        self._sites = bundle.manifest.sites
        self._always_global = bundle.manifest.conversion.global_tokens
        self._nodes = {node.name: node for node in graph.node}
        values = (*graph.value_info, *graph.input)
        self._last = {
            value.name: (len(dims), dims[-1].dim_value)
            for value in values
            if (dims := value.type.tensor_type.shape.dim)
        }
        self._heads = {
            value.name: value.type.tensor_type.shape.dim[1].dim_value
            for value in values
            if len(value.type.tensor_type.shape.dim) == 4
        }

    def flops(self, batch: int, length: int, global_tokens: int = 0) -> int | None:
        """Floating-point operations of one run without padding; None where the graph does not record the sizes.

        Args:
            batch: Sequences.
            length: Tokens per sequence.
            global_tokens: Global tokens of each sequence, besides those of a conversion.
        """
        total = 0
        for site in self._sites:
            attributes = Attributes.from_mapping(site.attributes)
            shapes = self._shapes(site.node, attributes, batch, length)
            if shapes is None:
                return None
            seen = global_tokens + self._always_global if "global_mask" in site.inputs else 0
            total += cost(shapes, attributes, global_tokens=seen).flops
        return total

    def _shapes(self, node: str, attributes: Attributes, batch: int, length: int) -> Shapes | None:
        query, key, value = self._nodes[node].input[:3]
        (rank, width), (_, v_width) = self._last.get(query, (0, 0)), self._last.get(value, (0, 0))
        heads = attributes.q_num_heads or self._heads.get(query, 0)
        kv_heads = attributes.kv_num_heads or self._heads.get(key, 0)
        if not (width and v_width and heads and kv_heads):
            return None
        if rank == 3:
            width, v_width = width // heads, v_width // kv_heads
        return Shapes("bhsd", batch, heads, kv_heads, length, length, width, v_width)
