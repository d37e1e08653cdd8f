"""The graph for TensorRT-RTX: standard operators alone, each with a name of its own, and the same results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from longspan.exporter import ExportFailed
from longspan.exporter.engines.graphs.body_graph import body_graph, name_nodes
from longspan.exporter.engines.graphs.rewrites import counted_by_comparison, without_loop_conditions

from .prepared_graphs import NAMES, assert_same, graph_of

pytestmark = pytest.mark.usefixtures("one_thread")

# Both graphs compute in float32 with sums in another order: a few layers of some dozens of operations.
ROUNDING = 32 * float(np.finfo(np.float32).eps)


def model_of(text: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_the_bundle_does(name: str) -> None:
    graph = graph_of(name)
    before = ir.to_proto(graph).SerializeToString()
    body = body_graph(graph)
    assert ir.to_proto(graph).SerializeToString() == before
    assert_same(body, graph, ROUNDING)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_standard_operators_with_names_of_their_own(name: str) -> None:
    body = body_graph(graph_of(name))
    onnx.checker.check_model(ir.to_proto(body), full_check=True)
    assert not body.functions and set(body.opset_imports) == {""}
    nodes = list(body.graph.all_nodes())
    assert {node.domain for node in nodes} == {""}
    names = [node.name for node in nodes]
    assert len(set(names)) == len(names) and all(names)
    values = [output.name for node in nodes for output in node.outputs]
    assert len(set(values)) == len(values)
    assert not {node.op_type for node in nodes} & {"SequenceEmpty", "SequenceInsert", "ConcatFromSequence"}
    sites = {node.name for node in graph_of(name).graph if node.domain == "longspan"}
    assert sites == {node.name.split("/")[0] for node in nodes if "/Softmax_" in (node.name or "")}


def test_functions_of_other_domains_are_inlined_too() -> None:
    model = model_of("""<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
        graph (float[n] x) => (float[n] y) { y = own.twice:first (x) }
        <opset_import: ["" : 20], domain: "own", overload: "first"> twice (x) => (y) { y = Add(x, x) }
        <opset_import: ["" : 20], domain: "own", overload: "second"> twice (x) => (y) { y = Mul(x, x) }""")
    assert [node.op_type for node in body_graph(model).graph] == ["Add"]


def test_kernels_in_the_bundle_are_left_out(gpu_bundle: Path) -> None:
    body = body_graph(ir.load(gpu_bundle / "model.onnx"))
    assert not any("kernel_pack" in name for node in body.graph.all_nodes() for name in node.attributes)


def test_an_operator_that_nobody_knows_is_refused() -> None:
    model = model_of("""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        graph (float[n] x) => (float[n] y) { [first] h = com.microsoft.Gelu (x) y = com.microsoft.Gelu (h) }""")
    with pytest.raises(ExportFailed, match=r"node 'first' is com.microsoft::Gelu; .*TensorRT has no such operator"):
        body_graph(model)


def test_a_site_that_contradicts_its_definition_is_refused() -> None:
    model = model_of("""<ir_version: 10, opset_import: ["" : 20, "longspan" : 1]>
        graph (float[b, h, s, d] q) => (float[b, h, s, d] y) {
            [site] y = longspan.SlidingWindowAttention <left_window_size: int = -2> (q, q, q)
        }""")
    with pytest.raises(ExportFailed, match=r"SlidingWindowAttention 'site' has no function body: .*left_window_size"):
        body_graph(model)


def test_an_opset_without_bodies_is_refused() -> None:
    model = model_of("""<ir_version: 10, opset_import: ["" : 17, "longspan" : 1]>
        graph (float[b, h, s, d] q) => (float[b, h, s, d] y) { y = longspan.SlidingWindowAttention (q, q, q) }""")
    with pytest.raises(ExportFailed, match="opset 17"):
        body_graph(model)


def test_repeated_and_missing_names_become_unique() -> None:
    model = model_of("""<ir_version: 10, opset_import: ["" : 20]>
        graph (float[n] x) => (float[n] y) { [a] u = Neg(x) [a] v = Neg(u) [a] w = Neg(v) y = Neg(w) }""")
    name_nodes(model)
    assert [node.name for node in model.graph] == ["a", "a~1", "a~2", "Neg_3"]


LOOP = """<ir_version: 10, opset_import: ["" : 20]>
    graph (int64 n, float x) => (float y, float[k] all) {{
        always = Constant <value: tensor = bool {{1}}> ()
        y, all = Loop (n, {condition}, x) <body = inner (int64 i, bool going, float a) => (bool on, float b, float c) {{
            {on} b = Add(a, a) c = Identity(b)
        }}>
    }}"""


def test_a_loop_loses_a_condition_that_is_always_true() -> None:
    model = model_of(LOOP.format(condition="always", on="on = Identity(going)"))
    before = ir.to_proto(model)
    without_loop_conditions(model)
    (loop,) = (node for node in model.graph if node.op_type == "Loop")
    assert loop.inputs[1] is None
    for trips in (0, 3):
        feed = {"n": np.array(trips), "x": np.array(1, np.float32)}
        ours, theirs = (
            onnxruntime.InferenceSession(proto.SerializeToString()).run(None, feed)
            for proto in (ir.to_proto(model), before)
        )
        assert ours[0] == theirs[0] == 2**trips and list(ours[1]) == list(theirs[1])


@pytest.mark.parametrize("on", ["on = Not(going)", "two = Constant <value_float = 2.0> () on = Less(a, two)"])
def test_a_loop_keeps_a_condition_that_ends_it(on: str) -> None:
    model = model_of(LOOP.format(condition="always", on=on))
    without_loop_conditions(model)
    (loop,) = (node for node in model.graph if node.op_type == "Loop")
    body = loop.attributes["body"].as_graph()
    assert loop.inputs[1] is not None and body.outputs[0].producer().op_type in ("Not", "Less")  # type: ignore[union-attr]


SCATTER = """<ir_version: 10, opset_import: ["" : 20]>
    graph ({data} x, {indices}[n] i, {kind}[n] u) => ({data} y) {{
        y = ScatterElements <axis: int = 0, reduction: string = "{reduction}"> (x, i, u)
    }}"""


@pytest.mark.parametrize(("data", "dtype"), [("float[5]", np.float32), ("int64[5]", np.int64)])
@pytest.mark.parametrize("indices", [np.int64, np.int32])
def test_counting_by_comparison_adds_what_scattering_does(data: str, dtype: type, indices: type) -> None:
    kind = data.partition("[")[0]
    model = model_of(
        SCATTER.format(data=data, kind=kind, indices=np.dtype(indices).name, reduction="add")
    )  # fmt: skip
    before = ir.to_proto(model)
    counted_by_comparison(model)
    assert "ScatterElements" not in {node.op_type for node in model.graph}
    feed = {
        "x": np.arange(5).astype(dtype),
        "i": np.array([0, 4, -1, -5, 2, 2, 2], indices),
        "u": np.arange(1, 8).astype(dtype),
    }
    for count in (0, 7):
        given = {"x": feed["x"], "i": feed["i"][:count], "u": feed["u"][:count]}
        ours, theirs = (
            onnxruntime.InferenceSession(proto.SerializeToString()).run(None, given)[0]
            for proto in (ir.to_proto(model), before)
        )
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("data", "reduction"), [("float[5]", "max"), ("float[n]", "add"), ("float[4096]", "add")])
def test_other_reductions_of_a_scatter_are_refused(data: str, reduction: str) -> None:
    model = model_of(SCATTER.format(data=data, kind="float", indices="int64", reduction=reduction))
    with pytest.raises(ExportFailed, match=f"is ScatterElements with reduction '{reduction}'"):
        body_graph(model)
