"""Sites whose window leaves out no key as TensorRT's Attention layer: which, that they compute the same, and build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from longspan.exporter.engines.graphs.body_graph import body_graph
from longspan.exporter.engines.graphs.native import native_sites, write_native
from longspan.exporter.engines.precision.conversion import convert_precision
from longspan.plugins.sliding_window_attention.definition import Attributes
from longspan.plugins.sliding_window_attention.reference import sliding_window_attention

from .prepared_graphs import WIDE, assert_same, graph_of
from .rtx import rtx
from .test_rtx_builds import shapes_of, unexpected

pytestmark = pytest.mark.usefixtures("one_thread")

LONGEST = {"S": 64, "T": 80}
SITE = """<ir_version: 10, opset_import: ["" : 20, "longspan" : 1]>
    graph (float{q} q, float{k} k, float{v} v{types}) => (float{q} y{results}) {{
        [site] y{results_names} = longspan.{op} <{attributes}> (q, k, v{inputs})
    }}"""
UNBOUNDED = "left_window_size = -1, right_window_size = -1"


def site(
    attributes: str = UNBOUNDED, q: str = "[B,4,S,16]", k: str = "[B,2,S,16]", v: str = "", types: str = "",
    inputs: str = "", results: str = "", names: str = "", op: str = "SlidingWindowAttention",
) -> ir.Model:  # fmt: skip
    text = SITE.format(
        q=q, k=k, v=v or k, types=types, results=results, results_names=names, op=op, attributes=attributes,
        inputs=inputs,
    )  # fmt: skip
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


PADDED: dict[str, str] = {"types": ", bool[B,S] m", "inputs": ", m"}
JOINED: dict[str, str] = {"q": "[B,S,64]", "k": "[B,S,32]"}
NATIVE = {
    "unbounded": site(),
    "as wide as the longest": site("left_window_size = 63, right_window_size = 63"),
    "causal": site("left_window_size = 63, is_causal = 1"),
    "causal, the right side means nothing": site("left_window_size = 63, right_window_size = 1, is_causal = 1"),
    "padded": site(**PADDED),
    "causal and padded": site("left_window_size = -1, is_causal = 1, scale = 0.3", **PADDED),
    "joined heads": site(UNBOUNDED + ", q_num_heads = 4, kv_num_heads = 2", **JOINED),
    "joined, causal and padded": site(
        "left_window_size = -1, is_causal = 1, q_num_heads = 4, kv_num_heads = 2", **JOINED, **PADDED
    ),
    "other lengths of keys": site(k="[B,2,T,16]"),
}


@pytest.mark.parametrize("what", NATIVE)
def test_the_layer_computes_what_the_operator_defines(what: str) -> None:
    original = NATIVE[what]
    assert native_sites(original, "fp16", LONGEST) == {"site": None}
    model = body_graph(original, keep=["site"])
    write_native(model, ["site"])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [node.op_type for node in model.graph].count("Attention") == 1 and not model.functions
    (node,) = (node for node in original.graph if node.domain == "longspan")
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    joined = "q_num_heads" in attributes
    session = onnxruntime.InferenceSession(ir.to_proto(_with_whole_masks(model)).SerializeToString())
    drawn = np.random.default_rng(0)
    for length in (1, 7, 64):
        keys = length + 3 if what == "other lengths of keys" else length
        q, k, v = (
            drawn.standard_normal((3, rows, heads * 16) if joined else (3, heads, rows, 16)).astype(np.float32)
            for rows, heads in ((length, 4), (keys, 2), (keys, 2))
        )
        feed: dict[str, Any] = {"q": q, "k": k, "v": v}
        if "padded" in what:
            feed["m"] = drawn.random((3, length)) > 0.4
            feed["m"][1, : length // 2] = False  # a causal row without keys
            feed["m"][2] = False  # a text without tokens
            hidden = ~feed["m"][:, :, None] if joined else ~feed["m"][:, None, :, None]
            feed["k"], feed["v"] = np.where(hidden, np.float32(np.nan), k), np.where(hidden, np.float32(np.inf), v)
        y = session.run(None, feed)[0]
        truth, _ = sliding_window_attention(
            q, feed["k"], feed["v"], attributes=Attributes.from_mapping(attributes), attn_mask=feed.get("m")
        )
        # A softmax of up to 67 scores and a product, in float32.
        np.testing.assert_allclose(y, truth, atol=64 * np.finfo(np.float32).eps, rtol=0)


def _with_whole_masks(model: ir.Model) -> ir.Model:
    """A copy in which masks have a row for each query: ONNX Runtime 1.31 does not broadcast that axis."""
    copy = model.clone()
    (node,) = (node for node in copy.graph if node.op_type == "Attention")
    if len(node.inputs) > 3:
        mask = node.inputs[3]
        swapped = ir.Node("", "Transpose", [mask], [ir.AttrInt64s("perm", [0, 1, 3, 2])])
        whole = ir.Node("", "Or", [mask, ir.Node("", "And", [swapped.outputs[0], mask]).outputs[0]])
        both = whole.inputs[1].producer()  # type: ignore[union-attr]
        # mask or (transposed mask and mask) is the mask, broadcast over rows.
        copy.graph.insert_before(node, [swapped, both, whole])  # type: ignore[list-item]
        node.replace_input_with(3, whole.outputs[0])
    return copy


REFUSED = {
    "its window of 62 neighbours leaves out keys: texts have up to 64": site("left_window_size = 62, is_causal = 1"),
    "its window of 9 neighbours": site("left_window_size = -1, right_window_size = 9"),
    "an unknown number of tokens": site(
        "left_window_size = 99, is_causal = 1", q="[B,4,n,16]", k="[B,2,n,16]"
    ),
    "as many queries as keys": site("left_window_size = -1, is_causal = 1", k="[B,2,T,16]"),
    "no dilation": site(UNBOUNDED + ", dilation = [2]"),
    "no softcap": site(UNBOUNDED + ", softcap = 3.0"),
    "no sinks": site(types=", float[4] s", inputs=", , , , , , , , s"),
    "no nonpad_kv_seqlen": site(types=", int64[B] n", inputs=", , n"),
    "no lse": site(results=", float l", names=", l"),
    "head sizes 8 and 8": site(q="[B,4,S,8]", k="[B,2,S,8]"),
    "head sizes 20 and 20": site(q="[B,4,S,20]", k="[B,2,S,20]"),
    "head sizes 16 and 32": site(v="[B,2,S,32]"),
    "no block lists": site(
        "dilation = 1", types=", int32[1,1,n] c, int32[1,1,n,w] i", inputs=", c, i, c, i", op="BlockSparseAttention"
    ),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_sites_that_it_cannot_compute_get_the_reason(reason: str) -> None:
    if reason == "no block lists":
        next(iter(REFUSED[reason].graph)).attributes.pop("dilation")
    found = native_sites(REFUSED[reason], "fp16", LONGEST)["site"]
    assert found is not None and reason in found


def test_it_has_no_kernel_for_fp32(tmp_path: Path) -> None:
    assert native_sites(site(), "fp32", LONGEST) == {"site": "TensorRT's Attention layer has no kernel for fp32"}
    text = """<ir_version: 11, opset_import: ["" : 23]>
        graph (float[B,4,S,16] q) => (float[B,4,S,16] y) { y = Attention (q, q, q) }"""
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    built = rtx(model, tmp_path, {"q": ((1, 4, 1, 16), (1, 4, 64, 16), (1, 4, 64, 16))}, "SM89")
    # The builder gives up, or the process ends.
    assert not built.bytes and (built.exit_code < 0 or any("is_decomposable" in text for text in built.errors))


@pytest.mark.parametrize(("dtype", "capability"), [("fp16", "SM75"), ("bf16", "SM89")])
def test_a_decoder_builds_with_the_layer_beside_a_body(dtype: str, capability: str, tmp_path: Path) -> None:
    """Texts as long as the window; only the first of two sites becomes a layer here."""
    graph = graph_of("wide-decoder")
    found = native_sites(graph, dtype, {"sequence": WIDE})
    first, second = found
    assert set(found.values()) == {None}
    assert "leaves out keys" in str(native_sites(graph, dtype, {"sequence": WIDE + 1})[second])
    typed = convert_precision(body_graph(graph, keep=[first]), dtype).model
    write_native(typed, [first])
    built = rtx(typed, tmp_path, shapes_of(typed, WIDE), capability)
    assert built.bytes and not built.errors and not unexpected(built)
    kinds = [kind for kind, _, _ in built.layers]
    assert kinds.count("ATTENTION_INPUT") == 1 and kinds.count("SOFTMAX") == 1


def test_a_model_computes_the_same_with_the_layer() -> None:
    graph = graph_of("wide-decoder")
    native = [name for name, reason in native_sites(graph, "fp16", {"sequence": WIDE}).items() if reason is None]
    model = body_graph(graph, keep=native)
    write_native(model, native)
    assert sum(node.op_type == "Attention" for node in model.graph) == 2
    # Both in float32, with sums in another order, through two layers.
    assert_same(model, graph, 64 * float(np.finfo(np.float32).eps), lengths=(1, 17, 31, WIDE))
