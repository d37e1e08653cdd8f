"""Graphs for TensorRT's plugin without kernels; and what they are written in undone, so that ONNX Runtime runs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
from longspan.exporter.engines.graphs.plugin_graph import PluginGraph, plugin_graph
from longspan.plugins.functions import attach_function_bodies
from longspan.plugins.gpu.pack_build import Target
from longspan.plugins.registry import operator

_CONTRACT = ("plugin_namespace", "plugin_version", "operands", "results", "kernel_pack")


def without_kernels(model: ir.Model, targets: Sequence[Target] = (Target(89),), **options: Any) -> PluginGraph:
    """`plugin_graph` with everything but compiled code, which takes a while."""
    with mock.patch(f"{plugin_graph.__module__}.node_packs", return_value=({}, frozenset())):
        return plugin_graph(model, targets, **options)


def undone(graph: ir.Model) -> ir.Model:
    """A copy whose ``longspan`` nodes are as in a bundle, with function bodies.

    It reads nothing but what is written on the nodes, as the plugin does.
    """
    model = graph.clone()
    for node in [node for node in model.graph if node.domain == "longspan"]:
        names = node.attributes["operands"].as_strings()
        assert len(names) == len(node.inputs) and None not in node.inputs
        given = dict(zip(names, node.inputs, strict=True))
        if "block_masks" in given:
            given["block_masks"] = _bytes(model, node, given["block_masks"])  # type: ignore[arg-type]
        formal = [tensor.name for tensor in operator(node.op_type).inputs]
        assert [name for name in formal if name in given] == list(names), "the definition's order"
        node.resize_inputs(len(formal))
        for index, name in enumerate(formal):
            node.replace_input_with(index, given.get(name))
        for name in _CONTRACT:
            node.attributes.pop(name, None)
    attach_function_bodies(model)
    return model


def _bytes(model: ir.Model, node: ir.Node, words: ir.Value) -> ir.Value:
    """The uint8 masks that int32 words hold."""
    assert words.const_value is not None and words.dtype == ir.DataType.INT32
    rows = node.attributes["q_block_size"].as_int()
    row_bytes = -(-node.attributes["kv_block_size"].as_int() // 8)
    array = words.const_value.numpy().astype("<i4").view(np.uint8)
    array = array.reshape(-1, rows, row_bytes)
    name = f"{node.name}_masks"
    value = ir.Value(
        name=name,
        const_value=ir.tensor(array, name=name),
        type=ir.TensorType(ir.DataType.UINT8),
        shape=ir.Shape(array.shape),
    )
    model.graph.register_initializer(value)
    return value
