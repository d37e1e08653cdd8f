"""What a conversion of precision makes of a graph as a whole: types, names, nested graphs, sites; and its table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from longspan.exporter.engines.precision import rules
from longspan.exporter.engines.precision.conversion import convert_precision
from longspan.exporter.errors import ExportFailed, InvalidRequest
from longspan.plugins.functions import attach_function_bodies

from .precision_graphs import (
    EPS,
    FLOAT16,
    RNG,
    TYPES,
    WEIGHT,
    computed_in,
    converted,
    graph,
    reasons,
)
from .rounding import FLOAT, run, run_rounded


def test_integers_and_float64_are_left_alone() -> None:
    model = graph(
        """(int64[N] i, float[N,8] x, double[N,8] d) => (int64[N] p, float[N,8] y, double[N,8] e) {
            two = Constant <value = int64 {2}> ()
            p = Pow(i, two)
            y = MatMul(x, w)
            e = Mul(d, d)
        }""",
        w=WEIGHT,
    )
    result = converted(model, "fp16")
    types = {value.name: value.dtype for node in result.model.graph for value in node.outputs}
    assert types["p"] == ir.DataType.INT64 and types["e"] == ir.DataType.DOUBLE
    assert not result.kept and result.double == ("Mul",)
    assert result.notes == ("nodes that stay in float64: 1, the first is 'Mul'",)


def test_nothing_depends_on_the_precision_that_a_graph_comes_in() -> None:
    model = graph(
        """(float[N,8] x) => (float[N,8] y) {
            a = MatMul(x, w)
            b = Softmax <axis = -1> (a)
            y = MatMul(b, w)
        }""",
        w=WEIGHT.astype(np.float16).astype(np.float32),
    )
    half = convert_precision(model, "fp16").model
    for dtype in ("fp32", "fp16", "bf16"):
        direct, by_half = converted(model, dtype), converted(half, dtype)
        assert direct.kept == by_half.kept and direct.casts == by_half.casts and direct.narrow == by_half.narrow
        first, second = (result.model.graph.initializers["w"].const_value for result in (direct, by_half))
        assert first is not None and second is not None and (first.numpy() == second.numpy()).all()
    assert converted(half, "fp32").casts == 0


def test_a_float16_graph_of_a_program_gets_its_islands_too() -> None:
    model = graph(
        """(float16[N,8] x) => (float16[N,8] y) {
            a = MatMul(x, w)
            wide = Cast <to = 1> (a)
            b = Softmax <axis = -1> (wide)
            narrow = Cast <to = 10> (b)
            c = Softmax <axis = -1> (narrow)
            y = MatMul(c, w)
        }""",
        w=WEIGHT.astype(np.float16),
    )
    result = converted(model, "fp16")
    types = computed_in(result.model)
    assert types["b"] == types["c"] == FLOAT and types["y"] == FLOAT16
    # Nothing is cast between the two; the graph's own types stay.
    assert result.casts == 2 and result.model.graph.inputs[0].dtype == FLOAT16


def test_an_operator_without_a_bfloat16_form_stays_float32_and_says_so() -> None:
    text = "(float[1,8,N] x) => (float[1,8,M] y) { y = Conv(x, w) }"
    model = graph(text, w=WEIGHT[:, :, None])
    result = converted(model, "bf16")
    assert list(reasons(result).values()) == ["opset 20 has no bfloat16 Conv"]
    assert converted(model, "fp16").narrow == {"Conv": 1}
    assert converted(
        graph("(float[1,8,N] x) => (float[1,8,M] y) { y = Conv(x, w) }", 22, w=WEIGHT[:, :, None]), "bf16"
    ).narrow


def test_an_unknown_operator_is_named_and_one_with_a_function_is_inlined() -> None:
    text = "(float[N,8] x) => (float[N,8] y) { [odd] a = custom.Twice(x) y = MatMul(a, w) }"
    function = '<domain: "custom", opset_import: ["" : 20]> Twice (v) => (r) { r = Add(v, v) }'
    model = graph(text, w=WEIGHT)
    value = next(iter(model.graph)).outputs[0]
    value.type, value.shape = ir.TensorType(FLOAT), ir.Shape(["N", 8])
    with pytest.raises(ExportFailed, match=r"node 'odd' is custom::Twice.*give the graph a function"):
        convert_precision(model, "fp16")
    result = converted(graph(text, functions=function, w=WEIGHT), "fp16")
    assert result.narrow == {"Add": 1, "MatMul": 1}
    untyped = graph(text, w=WEIGHT)
    with pytest.raises(ExportFailed, match=r"no type \(custom::Twice 'odd'"):
        convert_precision(untyped, "fp16")


def test_wrong_requests_are_refused() -> None:
    model = graph("(float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }", w=WEIGHT)
    with pytest.raises(InvalidRequest, match=r"'int8'.*fp32, fp16, bf16"):
        convert_precision(model, "int8")
    old = graph("(float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }", 18, w=WEIGHT)
    with pytest.raises(ExportFailed, match="opset 18; allowed: 20 or later"):
        convert_precision(old, "fp16")


def test_the_branches_of_an_if_are_converted_and_agree_on_a_type() -> None:
    model = graph(
        """(bool c, float[N,8] x) => (float[N,8] y) {
            h = MatMul(x, w)
            r, s = If (c) <
                then_branch = yes () => (float[N,8] a, float[N,8] d) { a = Mul(h, h) d = MatMul(h, w) },
                else_branch = no () => (float[N,8] b, float[N,8] e) { b = Softmax <axis = -1> (h) e = Neg(h) }
            >
            y = Add(r, s)
        }""",
        w=WEIGHT,
    )
    result = converted(model, "fp16")
    [branch] = [node for node in result.model.graph if node.op_type == "If"]
    # One branch of the first result is a softmax, in float32; both of the second are narrow.
    assert [value.dtype for value in branch.outputs] == [FLOAT, FLOAT16]
    for choice in (True, False):
        feed = {"c": np.array(choice), "x": RNG.standard_normal((3, 8)).astype(np.float32)}
        right = run(model, feed)["y"]
        assert (
            np.abs(run_rounded(result.model, feed)["y"] - right).max()
            <= 8 * EPS["fp16"] * np.abs(right).max() + 8 * EPS["fp16"]
        )


def test_constants_of_one_name_in_two_branches_stay_two() -> None:
    model = graph(
        """(bool c, float[N,8] x) => (float[N,8] y) {
            h = MatMul(x, w)
            y = If (c) <
                then_branch = yes () => (float[N,8] a) { k = Constant <value = float[1] {2.0}> () a = Mul(h, k) },
                else_branch = no () => (float[N,8] b) { k = Constant <value = float[1] {3.0}> () b = Mul(h, k) }
            >
        }""",
        w=np.eye(8, dtype=np.float32),
    )
    result = converted(model, "fp16")
    for choice, factor in ((True, 2), (False, 3)):
        feed = {"c": np.array(choice), "x": np.ones((1, 8), np.float32)}
        assert (run_rounded(result.model, feed)["y"] == factor).all()


def test_a_loop_sums_in_float32_and_works_in_the_narrow_type() -> None:
    model = graph(
        """(int64 n, float[N,8] x) => (float[N,8] y, float[M,N,8] steps) {
            h = MatMul(x, w)
            go = Constant <value = bool {1}> ()
            zero = Constant <value = float[1,1] {0.0}> ()
            start = Expand(zero, shape)
            y, last, steps = Loop (n, go, start, h) <body = step (int64 i, bool more, float[N,8] sum, float[N,8] state)
                => (bool on, float[N,8] next, float[N,8] then, float[N,8] scan) {
                on = Identity(more)
                then = MatMul(state, w)
                next = Add(sum, then)
                scan = Tanh(then)
            }>
        }""",
        w=WEIGHT / 4,
        shape=np.array([3, 8]),
    )
    result = converted(model, "fp16")
    [loop] = [node for node in result.model.graph if node.op_type == "Loop"]
    body = loop.attributes["body"].as_graph()
    assert [value.dtype for value in body.inputs[2:]] == [FLOAT, FLOAT16]
    assert [value.dtype for value in loop.outputs] == [FLOAT, FLOAT16, FLOAT16]
    feed = {"n": np.array(3), "x": RNG.standard_normal((3, 8)).astype(np.float32)}
    right, got = run(model, feed), run_rounded(result.model, feed)
    for name in ("y", "steps"):
        # Three products in a row, each of rounded operands, of values around 1.
        assert np.abs(got[name] - right[name]).max() <= 2 * 3 * EPS["fp16"] * max(1.0, np.abs(right[name]).max())


def test_values_of_a_sequence_stay_float32() -> None:
    model = graph(
        """(float[N,8] x) => (float[M,8] y) {
            a = MatMul(x, w)
            s = SequenceConstruct(a, a)
            b = ConcatFromSequence <axis = 0> (s)
            y = MatMul(b, w)
        }""",
        w=WEIGHT,
    )
    result = converted(model, "fp16")
    assert result.kept_in_fp32 == {rules.SEQUENCE: 2} and result.narrow == {"MatMul": 2}


def attention(attributes: str = "", inputs: str = "q, k, v", outputs: str = "y, lse", **initializers: Any) -> ir.Model:
    model = graph(
        f"""(float[1,2,N,8] x) => (float[1,2,N,8] y, float[1,2,N] lse) {{
            q = MatMul(x, w)
            k = MatMul(x, w)
            v = MatMul(x, w)
            [site] {outputs} = longspan.SlidingWindowAttention
                <left_window_size = 4, right_window_size = 4{attributes}> ({inputs})
        }}""",
        w=WEIGHT,
        **initializers,
    )
    for node in model.graph:
        if node.domain == "longspan":
            for value, shape in zip(node.outputs, (["N1", 2, "N", 8], [1, 2, "N"]), strict=False):
                value.type, value.shape = ir.TensorType(FLOAT), ir.Shape(shape)
        else:
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(FLOAT), ir.Shape([1, 2, "N", 8])
    attach_function_bodies(model)
    return model


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_an_attention_site_is_narrow_and_its_lse_and_spans_are_not(dtype: str) -> None:
    inputs = "q, k, v, , , , , , , bias, , spans"
    bias = np.zeros((1, 1, 1, 9), np.float32)
    model = attention("", inputs, bias=bias, spans=np.array([3.0, 5.0], np.float32))
    result = converted(model, dtype)
    [site] = [node for node in result.model.graph if node.domain == "longspan"]
    types = {value.name: value.dtype for value in (*site.inputs, *site.outputs) if value is not None}
    narrow = TYPES[dtype]
    assert types["spans"] == types["lse"] == FLOAT
    assert all(types[name] == narrow for name in types if name not in ("spans", "lse"))
    assert site.op_identifier() in result.model.functions
    feed = {"x": RNG.standard_normal((1, 2, 30, 8)).astype(np.float32)}
    right, got = run(model, feed), run_rounded(result.model, feed)
    # Scores are products of 8 terms of rounded numbers; what rounds them is the magnitude of their operands.
    score = float((np.abs(feed["x"] @ WEIGHT) ** 2).sum(-1).max()) / np.sqrt(8)
    assert np.abs(got["lse"] - right["lse"]).max() <= 2 * score * EPS[dtype]


def test_a_forbidden_distance_of_a_site_is_clamped_and_reported() -> None:
    inputs = "q, k, v, , , , , , , bias"
    bias = np.zeros((1, 1, 1, 9), np.float32)
    bias[..., 0], bias[..., 1] = -1e38, -np.inf
    result = converted(attention("", inputs, bias=bias), "fp16")
    [clamped] = result.clamped
    assert clamped.value == "bias" and clamped.lowest == np.float32(-1e38)
    assert result.notes == ("'bias' holds -1e+38; it becomes -65504",)
    [value] = [v for v in result.model.graph.initializers.values() if v.name == "bias"]
    assert value.const_value is not None and value.const_value.numpy()[0, 0, 0, :3].tolist() == [-65504, -np.inf, 0]
    bias[..., 2] = 1e6
    with pytest.raises(ExportFailed, match=r"'bias'.*1e\+06"):
        convert_precision(attention("", inputs, bias=bias), "fp16")


def test_kernels_stay_at_a_site_that_keeps_its_type_and_at_no_other() -> None:
    def with_kernels(model: ir.Model) -> ir.Model:
        [site] = [node for node in model.graph if node.domain == "longspan"]
        site.attributes["kernel_pack"] = ir.AttrTensor("kernel_pack", ir.tensor(np.zeros(4, np.uint8)))
        return model

    models = {"fp32": attention(), "fp16": convert_precision(attention(), "fp16").model}
    for own, model in models.items():
        for dtype in ("fp32", "fp16", "bf16"):
            result = convert_precision(with_kernels(model), dtype).model
            [site] = [node for node in result.graph if node.domain == "longspan"]
            assert ("kernel_pack" in site.attributes) == (dtype == own)


def test_the_table_names_standard_operators_only_and_none_twice() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert set(rules.RULES) <= known | {"Scatter"}
    assert sum(len(names.split()) for names in rules._NAMES.values()) == len(rules.RULES)
    assert all(rule.reason for rule in rules.RULES.values() if rule.group is rules.Group.WIDE)


def test_scatter_that_adds_is_a_sum_and_one_that_replaces_is_a_copy() -> None:
    text = """(float[N,8] x, int64[N,8] i) => (float[N,8] y) {{
        a = MatMul(x, w)
        y = ScatterElements <axis = 0{}> (a, i, a)
    }}"""
    assert converted(graph(text.format(', reduction = "add"'), w=WEIGHT), "fp16").kept_in_fp32 == {rules.SUM: 1}
    assert converted(graph(text.format(""), w=WEIGHT), "fp16").narrow == {"MatMul": 1, "ScatterElements": 1}


def test_ml_dtypes_agrees_with_the_table_of_epsilons() -> None:
    assert {"fp16": float(np.finfo(np.float16).eps), "bf16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps)} == EPS


def test_the_documentation_names_every_operator_that_stays_float32_with_its_reason() -> None:
    text = (Path(__file__).parents[3] / "docs" / "precision.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))
    for name, rule in rules.RULES.items():
        if rule.group is rules.Group.WIDE:
            assert re.search(rf"\b{name}\b", rows[rule.reason]), name
    words = [getattr(rules, name) for name in dir(rules) if name.isupper() and isinstance(getattr(rules, name), str)]
    assert len(words) > 10 and set(words) <= set(rows)
