"""Why TensorRT's Attention layer never gets a window: its parser drops it, and builds the engine of dense attention.

What `refusals` says of other uses of the layer is held against the parser too.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from longspan.exporter import ExportFailed
from longspan.exporter.engines.graphs.body_graph import body_graph

from .rtx import Built, rtx

LENGTH = 64
SHAPES = dict.fromkeys(("q", "k", "v"), ((1, 4, 1, 16), (2, 4, LENGTH, 16), (2, 4, LENGTH, 16)))
ATTENTION = """<ir_version: 11, opset_import: ["" : {opset}]>
    graph (float16[B,4,S,16] q, float16[B,4,S,16] k, float16[B,4,S,16] v{types}) => (float16[B,4,S,16] y{results}) {{
        [attention] y{results_names} = Attention <{attributes}> (q, k, v{inputs})
    }}"""


def attention(
    attributes: str = "", inputs: str = "", types: str = "", opset: int = 25, results: str = "", names: str = ""
) -> ir.Model:
    text = ATTENTION.format(
        attributes=attributes, inputs=inputs, types=types, opset=opset, results=results, results_names=names
    )
    return ir.serde.deserialize_model(onnx.parser.parse_model(text.replace("<>", "")))


def built(model: ir.Model, folder: Path, name: str) -> Built:
    return rtx(model, folder, SHAPES, "SM89", name)


WINDOWS = {
    "bidirectional": "left_window_size: int = 4, right_window_size: int = 4",
    "left": "left_window_size: int = 4",
    "right": "right_window_size: int = 4",
    "causal": "is_causal: int = 1, left_window_size: int = 4",
}


def test_engines_with_and_without_a_window_are_the_same_byte_for_byte(tmp_path: Path) -> None:
    # Builds repeat, so that equal bytes say something; on a busy machine one now and then is another.
    dense, again = (built(attention(), tmp_path, "dense") for _ in range(2))
    causal = [built(attention("is_causal: int = 1"), tmp_path, "causal").sha256 for _ in range(2)]
    assert dense.bytes and not {dense.sha256, again.sha256} & {*causal}, "what the parser does read is another engine"
    for name in ("bidirectional", "causal"):
        wanted = causal if name == "causal" else [dense.sha256, again.sha256]
        for _ in range(3):
            windowed = built(attention(WINDOWS[name]), tmp_path, name)
            assert windowed.parsed and not windowed.errors and not windowed.warnings, "not a word"
            assert windowed.layers == dense.layers
            if windowed.sha256 in wanted:
                break
        else:
            pytest.fail(f"{name}: the engine is none of those without the window")


@pytest.mark.parametrize("attributes", WINDOWS.values(), ids=WINDOWS)
def test_a_window_is_never_handed_to_it(attributes: str) -> None:
    with pytest.raises(
        ExportFailed, match=r"node 'attention' is Attention with (left|right)_window_size 4: TensorRT ign"
    ):
        body_graph(attention(attributes))


def test_windows_of_ours_make_other_engines(tmp_path: Path) -> None:
    """The same window as a site: its body is built, and another window is another engine."""
    text = """<ir_version: 10, opset_import: ["" : 20, "longspan" : 1]>
        graph (float16[B,4,S,16] q, float16[B,4,S,16] k, float16[B,4,S,16] v) => (float16[B,4,S,16] y) {{
            [site] y = longspan.SlidingWindowAttention <left_window_size: int = {0}, right_window_size: int = {0}>
                (q, k, v)
        }}"""
    engines = set()
    for size in (4, 5):
        site = ir.serde.deserialize_model(onnx.parser.parse_model(text.format(size)))
        engine = built(body_graph(site), tmp_path, f"site_{size}")
        assert engine.bytes and not any(kind.startswith("ATTENTION") for kind, _, _ in engine.layers)
        engines.add(engine.sha256)
    assert len(engines) == 2


def test_lengths_are_dropped_too(tmp_path: Path) -> None:
    model = attention("", ", , , , length", ", int64[B] length")
    parsed = rtx(model, tmp_path)
    assert parsed.parsed and not parsed.errors
    used = [name for _, _, inputs in parsed.layers for name in inputs]
    assert "v" in used and "length" not in used
    with pytest.raises(ExportFailed, match="'attention' is Attention with nonpad_kv_seqlen: TensorRT ignores lengths"):
        body_graph(model)


REFUSED_BY_BOTH = {
    "softcap": attention("softcap: float = 2.0"),
    "softmax_precision": attention("softmax_precision: int = 1"),
    "is_causal and attn_mask": attention("is_causal: int = 1", ", mask", ", bool[S,S] mask"),
    "a cache or further outputs": attention(
        "", ", , pk, pv", ", float16[B,4,P,16] pk, float16[B,4,P,16] pv",
        results=", float16[B,4,T,16] rk, float16[B,4,T,16] rv", names=", rk, rv",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED_BY_BOTH)
def test_what_its_parser_refuses_is_refused_before_and_named(what: str, tmp_path: Path) -> None:
    parsed = rtx(REFUSED_BY_BOTH[what], tmp_path)
    assert not parsed.parsed and parsed.exit_code == 0
    with pytest.raises(ExportFailed, match=f"node 'attention' is Attention with {what}"):
        body_graph(REFUSED_BY_BOTH[what])


@pytest.mark.parametrize("opset", [23, 24, 25])
def test_plain_attention_is_left_alone(opset: int, tmp_path: Path) -> None:
    for model in (
        attention("is_causal: int = 1", opset=opset),
        attention("", ", mask", ", bool[B,1,1,S] mask", opset=opset),
    ):
        body = body_graph(model)
        assert [node.op_type for node in body.graph] == ["Attention"]
        parsed = rtx(body, tmp_path)
        assert parsed.parsed and "ATTENTION_INPUT" in {kind for kind, _, _ in parsed.layers}


def test_a_node_without_function_is_a_plugin_to_it_and_is_never_handed_to_it(tmp_path: Path) -> None:
    model = ir.serde.deserialize_model(
        onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
            graph (float16[B,4,S,16] q) => (float16[B,4,S,16] y) { [site] y = own.SlidingWindowAttention (q, q, q) }""")
    )
    parsed = rtx(model, tmp_path)
    assert not parsed.parsed and "Plugin not found" in parsed.errors[-1]
    with pytest.raises(ExportFailed, match=r"'site' is own::SlidingWindowAttention: .*takes the node for a plugin"):
        body_graph(model)
