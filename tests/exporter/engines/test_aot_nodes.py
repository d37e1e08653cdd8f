"""The graph for ahead-of-time plugins: a plugin for each kind of site, and function bodies for the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from longspan.exporter import ExportFailed
from longspan.exporter.engines.graphs import aot_nodes
from longspan.exporter.engines.graphs.plugin_graph import PluginGraph, plugin_graph
from longspan.exporter.engines.tensorrt import build_worker
from longspan.plugins.functions import attach_function_bodies
from longspan.plugins.gpu.pack_build import Target
from longspan.plugins.tensorrt import aot
from longspan.plugins.tensorrt.aot_record import AotPlugin

from ...plugins.aot_builder import bindings_folder, build_stand_in, played
from ...plugins.block_sparse_cases import LISTS

pytest.importorskip("triton")

SM89 = (Target(89),)
_ATTENTION = "longspan.SlidingWindowAttention <left_window_size = 7, right_window_size = 0, is_causal = 1"
_LISTS = "longspan.BlockSparseAttention <q_block_size = 16, kv_block_size = 64"
# Two layers of one kind, one of another, one of lists that leave an input out, one with global tokens.
TEXT = f"""<ir_version: 10, opset_import: ["": 20, "longspan": 1]>
g (float16[B, S, 256] x, float16[B, S, 64] k, float16[8] sinks, bool[B, S] mask, int32[1, 1, R] n,
   int32[1, 1, R, W] i, int32[1, 1, R] fn, int32[1, 1, R, V] fi, int32[1, 1, R, W] ids) => (float16[B, S, 256] y)
   <float16[B, S, 256] a, float16[B, S, 256] b, float16[B, S, 256] c, float16[B, S, 256] d, uint8[3, 16, 8] masks>
{{
   [first] a = {_ATTENTION}, q_num_heads = 8, kv_num_heads = 2> (x, k, k)
   [second] b = {_ATTENTION}, q_num_heads = 8, kv_num_heads = 2> (a, k, k)
   [third] c = {_ATTENTION}, q_num_heads = 8, kv_num_heads = 2> (b, k, k, mask, "", "", "", "", "", "", sinks)
   [lists] d = {_LISTS}, q_num_heads = 8, kv_num_heads = 2> (c, k, k, n, i, fn, fi, ids, masks, mask)
   [global] y = {_ATTENTION}, q_num_heads = 8, kv_num_heads = 2> (d, k, k, mask, "", mask)
}}"""
SERVED = ["first", "second", "third", "lists"]


def model() -> ir.Model:
    """The graph of `TEXT`, with function bodies."""
    made = ir.serde.deserialize_model(onnx.parser.parse_model(TEXT))
    masks = ir.tensor(np.arange(3 * 16 * 8, dtype=np.uint8).reshape(3, 16, 8), name="masks")
    value = next(each for node in made.graph for each in node.inputs if each is not None and each.name == "masks")
    value.const_value = masks
    made.graph.register_initializer(value)
    attach_function_bodies(made)
    return made


@pytest.fixture(scope="module")
def graph() -> PluginGraph:
    return plugin_graph(model(), SM89, aot=True, bodies=True)


KINDS = {"FP32": "FLOAT", "FP16": "FLOAT16", "BF16": "BFLOAT16", "INT32": "INT32", "INT64": "INT64", "BOOL": "BOOL"}


def sites(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == "longspan"]


def records(model: ir.Model) -> dict[str, AotPlugin]:
    """The plugins that the nodes carry, by name."""
    found = (node.attributes.get(aot.RECORD_ATTRIBUTE) for node in sites(model))
    plugins = [AotPlugin.from_json(attribute.as_string()) for attribute in found if attribute is not None]
    return {plugin.name: plugin for plugin in plugins}


def test_each_site_is_a_node_of_its_plugin(graph: PluginGraph, tmp_path: Path) -> None:
    nodes, plugins = sites(graph.model), records(graph.model)
    assert [node.name for node in nodes] == SERVED
    assert nodes[0].op_type == nodes[1].op_type
    assert len({node.op_type for node in nodes}) == 3 == len(plugins)
    assert [aot.RECORD_ATTRIBUTE in node.attributes for node in nodes] == [True, False, True, True]  # once is enough
    for node in nodes:
        plugin = plugins[node.op_type]
        values = {key: a.value for key, a in node.attributes.items() if key != aot.RECORD_ATTRIBUTE}
        assert values == {"plugin_namespace": "longspan", "plugin_version": "1", "aot": 1}
        assert len(node.inputs) == len(plugin.operands) and len(node.outputs) == len(plugin.results)
        types = [value.dtype for value in (*node.inputs, *node.outputs) if value is not None]
        assert [each.name for each in types if each is not None] == [KINDS[kind] for kind in plugin.types]
        assert all(".target sm_89" in kernel.ptx for kernel in plugin.kernels)
        assert (plugin.layout, plugin.heads, plugin.kv_heads, plugin.head_size) == ("bsd", 8, 2, 32)
    assert plugins[nodes[3].op_type].operands == ("Q", "K", "V", *LISTS, "block_mask_ids", "block_masks", "attn_mask")
    file = tmp_path / "model.onnx"
    ir.save(graph.model, file)
    onnx.checker.check_model(file)
    assert {plugin.name for plugin in aot._records(file)} == set(plugins)


def test_a_site_that_needs_more_is_a_function_body_and_says_why(graph: PluginGraph) -> None:
    assert {site.node: site.lowering for site in graph.sites} == {
        **dict.fromkeys(SERVED, "plugin"), "global": "function body",
    }  # fmt: skip
    assert "rows of global tokens" in graph.sites[-1].ladder[0].reason
    with pytest.raises(ExportFailed, match=r"'global'.*rows of global tokens"):
        plugin_graph(model(), SM89, aot=True)


def test_a_kernel_that_does_not_compile_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise aot.ptx.UnusablePtx("uses a parameter")

    monkeypatch.setattr(aot_nodes, "compile_plugin", fail)
    with pytest.raises(ExportFailed, match=r"'(first|second)'.*uses a parameter"):
        plugin_graph(model(), SM89, aot=True, bodies=True)


def test_the_bindings_take_what_the_graph_carries(graph: PluginGraph, tmp_path: Path) -> None:
    bindings_folder()
    build_stand_in(tmp_path)
    plugins, requests = records(graph.model), []
    for node in sites(graph.model):
        ends = [
            [
                tuple(size if isinstance(size, int) else other for size in value.shape or ())
                for value in node.inputs
                if value
            ]
            for other in (1, 1024)
        ]
        requests.append((plugins[node.op_type], list(zip(*ends, strict=True))))
    for (plugin, _), answer in zip(requests, played(tmp_path, requests), strict=True):
        assert answer.failed == "", answer.said
        assert list(answer.tactics) == [1, 2] == list(range(1, len(plugin.kernels) + 1))


@pytest.mark.parametrize(("version", "reason"), [("11.2.1.2", "issue 4849"), ("11.4.0.106", "without its module")])
def test_a_tensorrt_that_cannot_take_them_lacks_something(version: str, reason: str, tmp_path: Path) -> None:
    """Said before the parser reads the model, as what the machine lacks."""
    file = tmp_path / "model.onnx"
    ir.save(model(), file)
    tensorrt = SimpleNamespace(
        __name__="tensorrt_of_another_name", __version__=version, init_libnvinfer_plugins=lambda logger, space: True
    )
    with pytest.raises(build_worker.Refused, match=f"--plugin-api aot: .*{reason}") as refused:
        build_worker._load_plugins(tensorrt, None, {"plugin": "aot", "model": str(file)})
    assert refused.value.kind == "environment"
