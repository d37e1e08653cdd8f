"""The graph for TensorRT's plugin: nodes that say everything about themselves, and the same results."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from longspan.exporter import EnvironmentLacks, ExportFailed
from longspan.exporter.engines.graphs import node_packs
from longspan.exporter.engines.graphs.plugin_graph import PluginGraph, plugin_graph
from longspan.exporter.errors import BundleCorrupted
from longspan.plugins.gpu.pack import Pack
from longspan.plugins.gpu.pack_build import PTX, Target
from longspan.plugins.registry import operator

from .plugin_contract import undone, without_kernels
from .prepared_graphs import assert_same, graph_of

pytestmark = pytest.mark.usefixtures("one_thread")

SM89 = (Target(89),)
MODELS = ("longformer", "bigbird", "longt5-local", "decoder", "phi3-small")
FIELDS = {"plugin_namespace", "plugin_version", "operands", "results"}


def model_of(text: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def plugins(graph: PluginGraph) -> list[ir.Node]:
    return [node for node in graph.model.graph if node.domain == "longspan"]


@pytest.mark.parametrize("name", MODELS)
def test_each_site_is_one_node_that_says_everything(name: str) -> None:
    original = graph_of(name)
    before = ir.to_proto(original).SerializeToString()
    graph = without_kernels(original)
    assert ir.to_proto(original).SerializeToString() == before
    assert not graph.model.functions
    sites = [node for node in original.graph if node.domain == "longspan"]
    assert [node.name for node in plugins(graph)] == [node.name for node in sites]
    for node, site in zip(plugins(graph), sites, strict=True):
        definition = operator(node.op_type)
        assert node.op_type == site.op_type and not node.overload
        present = [tensor.name for tensor, x in zip(definition.inputs, site.inputs, strict=False) if x is not None]
        assert list(node.attributes["operands"].as_strings()) == present
        assert list(node.attributes["results"].as_strings()) == ["Y"] and len(node.outputs) == 1
        assert node.attributes["plugin_namespace"].as_string() == "longspan"
        assert node.attributes["plugin_version"].as_string() == "1"
        own = {a.name for a in definition.attributes if a.default is not None or a.name in site.attributes}
        assert set(node.attributes) == FIELDS | own
        assert all(value is not None and value.dtype != ir.DataType.UINT8 for value in node.inputs)
    assert not any(v.dtype == ir.DataType.UINT8 for v in graph.model.graph.initializers.values())
    assert_same(undone(graph.model), original, 0.0)


def test_ladders_say_how_each_site_is_lowered() -> None:
    graph = without_kernels(graph_of("longformer"))
    assert [site.lowering for site in graph.sites] == ["plugin", "plugin"]
    assert all(
        site.ladder[0].chosen and "a GPU kernel serves the site" in site.ladder[0].reason for site in graph.sites
    )


def test_kernels_come_from_the_bundle(gpu_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise AssertionError("there is nothing to compile")

    monkeypatch.setattr(node_packs, "compile_pack", refuse)
    model = ir.load(gpu_bundle / "model.onnx")
    graph = plugin_graph(model, (Target(80),))
    for node, site in zip(plugins(graph), graph.sites, strict=True):
        assert set(node.attributes) >= {"kernel_pack"} and "kernel_pack_id" not in node.attributes
        tensor = node.attributes["kernel_pack"].as_tensor()
        assert tensor.dtype == ir.DataType.INT8 and len(tensor.shape) == 1
        pack = Pack.from_bytes(tensor.tobytes())
        assert pack.architectures == ((80, "cubin"),) and len(pack.recipes) == 1
        assert "from the bundle's kernel pack" in site.ladder[0].reason
    # What is written can be read back, and the bundle's own model still has its pack.
    onnx.checker.check_model(ir.to_proto(graph.model))
    assert sum("kernel_pack" in node.attributes for node in model.graph) == 1


def test_a_pack_that_is_given_counts_before_the_models(gpu_bundle: Path) -> None:
    model = ir.load(gpu_bundle / "model.onnx")
    (carrier,) = (node for node in model.graph if "kernel_pack" in node.attributes)
    own = Pack.from_bytes(carrier.attributes["kernel_pack"].as_tensor().tobytes())
    given = Pack("another compiler 1", own.kernels, own.recipes)
    for node in plugins(plugin_graph(model, (Target(80), PTX), packs=[given])):
        pack = Pack.from_bytes(node.attributes["kernel_pack"].as_tensor().tobytes())
        assert pack == given


def test_what_the_bundle_lacks_is_compiled_once_for_all_sites(gpu_bundle: Path) -> None:
    said: list[str] = []
    graph = plugin_graph(ir.load(gpu_bundle / "model.onnx"), (Target(80), Target(89)), progress=said.append)
    packs = [Pack.from_bytes(node.attributes["kernel_pack"].as_tensor().tobytes()) for node in plugins(graph)]
    assert packs[0] == packs[1] and packs[0].architectures == ((80, "cubin"), (89, "cubin"))
    total = said[0].split()[-1]
    assert said == [f"kernel {done} of {total}" for done in range(int(total) + 1)]
    assert all("compiled for this engine" in site.ladder[0].reason for site in graph.sites)


def test_without_triton_the_error_says_what_to_install(gpu_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    with pytest.raises(EnvironmentLacks, match=r"pip install 'longspan\[gpu\]'"):
        plugin_graph(ir.load(gpu_bundle / "model.onnx"), SM89)


def test_a_damaged_pack_is_found(gpu_bundle: Path) -> None:
    model = ir.load(gpu_bundle / "model.onnx")
    (carrier,) = (node for node in model.graph if "kernel_pack" in node.attributes)
    data = np.array(carrier.attributes["kernel_pack"].as_tensor().numpy())
    data[-1] ^= 1
    carrier.attributes["kernel_pack"] = ir.AttrTensor("kernel_pack", ir.tensor(data))
    with pytest.raises(BundleCorrupted, match=f"kernel pack of node '{carrier.name}' differs from what was written"):
        plugin_graph(model, SM89)


WINDOW = """<ir_version: 10, opset_import: ["" : 20, "longspan" : 1]>
    graph ({types}) => (float Y) {{
        h = Identity(q)
        [site] Y {more} = longspan.SlidingWindowAttention <{attributes}> ({inputs})
    }}"""
QKV = "float[B,2,S,{0}] q, float[B,2,S,{0}] k, float[B,2,S,{0}] v"


def window(size: int = 16, types: str = "", attributes: str = "dilation = 1", inputs: str = "q, k, v") -> ir.Model:
    text = WINDOW.format(types=QKV.format(size) + types, attributes=attributes, inputs=inputs, more="")
    return model_of(text)


REFUSED = {
    "GPU kernels go up to 256": window(512),
    "its attn_mask has type int64; allowed: bool": window(types=", int64[B,S] m", inputs="q, k, v, m"),
    "its attn_mask has type float": window(types=", float[B,S] m", inputs="q, k, v, m"),
    "its H_q is unknown": model_of(
        WINDOW.format(
            types="float[B,h,S,16] q, float[B,2,S,16] k, float[B,2,S,16] v", attributes="dilation = 1", more="",
            inputs="q, k, v",
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_a_site_that_no_kernel_serves_is_named(reason: str) -> None:
    with pytest.raises(ExportFailed, match=rf"1 of the attention sites: node 'site': .*{reason}.*--plugin-api none"):
        without_kernels(REFUSED[reason])


def test_such_a_site_gets_its_function_body_where_that_is_wanted() -> None:
    graph = without_kernels(window(512), bodies=True)
    assert not plugins(graph) and not graph.model.functions and set(graph.model.opset_imports) == {""}
    (site,) = graph.sites
    assert site.lowering == "function body"
    assert [(rung.lowering, rung.chosen) for rung in site.ladder] == [("plugin", False), ("function body", True)]
    assert "GPU kernels go up to 256" in site.ladder[0].reason


def test_such_a_body_is_converted_with_the_graph_around_it() -> None:
    model = model_of(f"""<ir_version: 10, opset_import: ["" : 20, "longspan" : 1]>
        graph ({QKV.format(512)}, float[B,2,S,16] u) => (float Y, float Z) {{
            [large] Y = longspan.SlidingWindowAttention <left_window_size = 3, right_window_size = 3> (q, k, v)
            [small] Z = longspan.SlidingWindowAttention <left_window_size = 3, right_window_size = 3> (u, u, u)
        }}""")
    graph = without_kernels(model, bodies=True, dtype="fp16")
    assert {site.node: site.lowering for site in graph.sites} == {"large": "function body", "small": "plugin"}
    (plugin,) = plugins(graph)
    nodes = {kind: [n for n in graph.model.graph.all_nodes() if n.op_type == kind] for kind in ("MatMul", "Softmax")}
    assert all(nodes.values())
    types = {kind: {value.dtype for node in found for value in node.inputs} for kind, found in nodes.items()}  # type: ignore[union-attr]
    assert types == {"MatMul": {ir.DataType.FLOAT16}, "Softmax": {ir.DataType.FLOAT}}
    assert graph.dtype == "fp16" and sum(graph.kept_in_fp32.values()) > 0
    assert {value.dtype for value in plugin.inputs} == {ir.DataType.FLOAT16}  # type: ignore[union-attr]


@pytest.mark.parametrize("bodies", [False, True])
def test_a_site_that_contradicts_its_definition_is_refused(bodies: bool) -> None:
    with pytest.raises(ExportFailed, match=r"SlidingWindowAttention 'site' contradicts .*left_window_size = -2"):
        without_kernels(window(attributes="left_window_size = -2"), bodies=bodies)


def test_an_unknown_architecture_is_a_reason_too() -> None:
    with pytest.raises(ExportFailed, match="sm_75 is not among the architectures"):
        plugin_graph(window(), (Target(75),))


def test_the_second_output_is_named_where_it_is_used() -> None:
    text = WINDOW.format(types=QKV.format(16), attributes="dilation = 1", inputs="q, k, v", more=", l")
    model = model_of(text.replace("=> (float Y)", "=> (float Y, float l)"))
    (node,) = plugins(without_kernels(model))
    assert list(node.attributes["results"].as_strings()) == ["Y", "lse"]
    assert list(node.attributes["dilation"].as_ints()) == [1]


def test_a_site_in_a_nested_graph_is_none_of_the_plugins() -> None:
    model = model_of("""<ir_version: 10, opset_import: ["" : 20, "longspan" : 1]>
        graph (bool c, float[B,2,S,16] q) => (float y) {
            y = If (c) <then_branch = a () => (float u) { [inner] u = longspan.SlidingWindowAttention (q, q, q) },
                        else_branch = b () => (float w) { w = Identity(q) }>
        }""")
    with pytest.raises(ExportFailed, match="node 'inner': it is inside a Loop, Scan or If"):
        without_kernels(model)
    graph = without_kernels(model, bodies=True)
    assert [site.lowering for site in graph.sites] == ["function body"]
    assert not any(node.domain for node in graph.model.graph.all_nodes())


LISTS = """<ir_version: 10, opset_import: ["" : 20, "longspan" : 1]>
    graph (float[B,2,S,16] q, int32[1,1,n] c, int32[1,1,n,w] i, uint8[M,{rows},{row_bytes}] given) => (float Y)
    <uint8[2,{rows},{row_bytes}] masks = {{ {numbers} }}> {{
        [site] Y = longspan.BlockSparseAttention <q_block_size: int = {rows}, kv_block_size: int = {keys}>
            (q, q, q, c, i, c, i, i, {masks})
    }}"""


def lists(rows: int, keys: int, masks: str = "masks") -> ir.Model:
    row_bytes = -(-keys // 8)
    numbers = ", ".join(str(k % 251) for k in range(2 * rows * row_bytes))
    return model_of(LISTS.format(rows=rows, keys=keys, row_bytes=row_bytes, numbers=numbers, masks=masks))


def test_block_masks_become_words_of_the_same_bytes() -> None:
    (node,) = plugins(without_kernels(lists(16, 24)))
    words = node.inputs[8]
    assert words is not None and words.const_value is not None and words.dtype == ir.DataType.INT32
    assert list(words.const_value.shape) == [2, 16 * 3 // 4]
    assert list(words.const_value.numpy().astype("<i4").tobytes()) == [k % 251 for k in range(2 * 16 * 3)]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lists(6, 8), "its block_masks have 6 rows of 1 bytes, which are no whole words"),
        (lists(16, 16, "given"), "its block_masks are computed in the graph"),
    ],
    ids=["no words", "computed"],
)
def test_masks_that_a_network_cannot_hold_are_refused(model: ir.Model, reason: str) -> None:
    with pytest.raises(ExportFailed, match=reason):
        without_kernels(model)
