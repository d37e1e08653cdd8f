"""The nodes of graphs for TensorRT's plugin, given to the compiled plugin as TensorRT's parser would give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from longspan.exporter.engines.graphs.plugin_graph import plugin_graph
from longspan.plugins.gpu.pack import Pack, pack_id
from longspan.plugins.gpu.pack_build import Target
from longspan.plugins.tensorrt.headers import find_headers

from ...plugins.registry_process import ask, chars
from .plugin_contract import without_kernels
from .prepared_graphs import graph_of

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
MAJORS = sorted(find_headers())
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not MAJORS, reason="no headers of TensorRT: install kernel-lens"),
]


def fields_of(node: onnx.NodeProto) -> dict[str, Any]:
    """What TensorRT's parser makes of a node's attributes."""
    fields: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name in ("plugin_namespace", "plugin_version"):
            continue
        if attribute.type == onnx.AttributeProto.TENSOR:
            assert value.data_type == onnx.TensorProto.INT8
            fields[attribute.name] = ("INT8", onnx.numpy_helper.to_array(value).tobytes().hex())
        elif attribute.type == onnx.AttributeProto.STRINGS:
            fields[attribute.name] = chars(*(text.decode() for text in value))
        elif attribute.type == onnx.AttributeProto.FLOAT:
            fields[attribute.name] = ("FLOAT32", [value])
        else:
            fields[attribute.name] = ("INT32", [value] if isinstance(value, int) else list(value))
    return fields


def assert_plugins(graph: ir.Model) -> list[Any]:
    """Every node of the graph becomes a plugin that says the same of itself."""
    nodes = [node for node in ir.to_proto(graph).graph.node if node.domain == "longspan"]
    assert nodes
    answer = ask(MAJORS[-1], *((node.op_type, "BUILD", fields_of(node)) for node in nodes))
    for node, given in zip(nodes, answer["plugins"], strict=True):
        assert given["made"] is not None, (given["said"], answer["stderr"])
        fields = fields_of(node)
        operands = bytes.fromhex(fields["operands"][1]).decode().rstrip("\0").split("\0")
        assert len(operands) == len(node.input)
        metadata = given["made"]["metadata"]
        assert metadata.startswith(f"{node.op_type}({','.join(operands)})")
        for name, (kind, value) in fields.items():
            if kind == "INT32" and name != "dilation":
                assert f" {name}={value[0]} " in metadata
        assert given["made"]["outputs"] == len(node.output)
        assert given["trip"].splitlines()[-1] == f"recreated longspan::{node.op_type} 1 {given['made']['id']}"
    return list(answer["plugins"])


@pytest.mark.parametrize("name", ["longformer", "bigbird", "decoder"])
def test_every_node_becomes_a_plugin(name: str) -> None:
    assert_plugins(without_kernels(graph_of(name)).model)


def test_kernels_reach_the_plugin(gpu_bundle: Path) -> None:
    graph = plugin_graph(ir.load(gpu_bundle / "model.onnx"), (Target(80),)).model
    node = next(node for node in ir.to_proto(graph).graph.node if node.domain == "longspan")
    data = bytes.fromhex(fields_of(node)["kernel_pack"][1])
    assert {recipe.architecture for recipe in Pack.from_bytes(data).recipes} == {80}
    (plugin, *_) = assert_plugins(graph)
    assert f"kernel_pack={pack_id(data)}" in plugin["made"]["metadata"]
