"""Which nodes of a graph become narrow, which stay float32, and what becomes of constants, names and types."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from longspan.exporter.engines.precision import rules
from longspan.exporter.engines.precision.conversion import Precision, convert_precision
from longspan.exporter.errors import ExportFailed, InvalidRequest
from longspan.plugins.functions import attach_function_bodies

from .rounding import FLOAT, rounded_everywhere, run, run_rounded

FLOAT16, BFLOAT16 = ir.DataType.FLOAT16, ir.DataType.BFLOAT16
TYPES = {"fp16": FLOAT16, "bf16": BFLOAT16}
EPS = {"fp16": 2.0**-10, "bf16": 2.0**-7}  # from 1 to the next number

Initializers = dict[str, Any]


def graph(text: str, opset: int = 20, functions: str = "", **initializers: Any) -> ir.Model:
    """A model of ONNX's textual syntax; arrays given by name are its initializers."""
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}, "longspan" : 1, "custom" : 1]> agraph {text} {functions}'
    )
    for name, array in initializers.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return ir.from_proto(model)


def converted(model: ir.Model, dtype: str, **options: Any) -> Precision:
    """A conversion that is checked for what every one must be: valid, repeatable, without a cast twice."""
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    result = convert_precision(model, dtype, **options)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    proto = ir.to_proto(result.model)
    onnx.checker.check_model(proto, full_check=True)
    assert all(value.type is not None for node in result.model.graph.all_nodes() for value in node.outputs)
    again = convert_precision(result.model, dtype, **options)
    assert ir.to_proto(again.model).SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)
    casts = collections.Counter((cast.inputs[0], cast.outputs[0].dtype) for cast in float_casts(result.model))
    assert all(count == 1 for count in casts.values())
    assert all(cast.inputs[0].dtype != cast.outputs[0].dtype for cast in float_casts(result.model))  # type: ignore[union-attr]
    assert result.casts == len(list(float_casts(result.model)))
    return result


def float_casts(model: ir.Model) -> Iterator[ir.Node]:
    floats = (FLOAT, FLOAT16, BFLOAT16)
    for node in model.graph.all_nodes():
        if node.op_type == "Cast" and node.inputs[0].dtype in floats and node.outputs[0].dtype in floats:  # type: ignore[union-attr]
            yield node


def computed_in(model: ir.Model) -> dict[str, ir.DataType | None]:
    """The type in which the node that makes each value computes: that of its first float operand."""
    found = {}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            floats = [v.dtype for v in node.inputs if v is not None and v.dtype in (FLOAT, FLOAT16, BFLOAT16)]
            found[value.name or ""] = floats[0] if floats else value.dtype
    return found


def reasons(result: Precision) -> dict[str, str]:
    return {kept.node: kept.reason for kept in result.kept}


RNG = np.random.default_rng(7)
WEIGHT = RNG.standard_normal((8, 8)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_products_and_what_stands_between_are_narrow_softmax_and_norms_are_not(dtype: str) -> None:
    model = graph(
        """(float[N,8] x) => (float[N,8] y) {
            a = MatMul(x, w)
            b = Add(a, bias)
            c = Gelu(b)
            d = LayerNormalization(c, scale, bias)
            e = MatMul(d, w)
            f = Softmax <axis = -1> (e)
            g = MatMul(f, w)
            y = Add(g, b)
        }""",
        w=WEIGHT,
        bias=WEIGHT[0],
        scale=WEIGHT[1],
    )
    result = converted(model, dtype)
    types, narrow = computed_in(result.model), TYPES[dtype]
    assert {name: types[name] for name in "abcefg"} == {**dict.fromkeys("abceg", narrow), "f": FLOAT}
    assert types["d"] == FLOAT
    assert result.narrow == {"MatMul": 3, "Add": 2, "Gelu": 1}
    assert result.kept_in_fp32 == {rules.NORM: 1, rules.SOFTMAX: 1}
    # x, then around the norm and the softmax, and y.
    assert result.casts == 6
    stored = {value.name: value.dtype for value in result.model.graph.initializers.values()}
    assert stored == {"w": narrow, "bias_" + narrow.name.lower(): narrow, "bias": FLOAT, "scale": FLOAT}


def test_what_comes_in_and_goes_out_keeps_its_type_unless_it_is_asked_for() -> None:
    model = graph("(float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }", w=WEIGHT)
    kept, changed = converted(model, "fp16"), converted(model, "fp16", convert_io=True)
    assert [(v.name, v.dtype) for v in (*kept.model.graph.inputs, *kept.model.graph.outputs)] == [
        ("x", FLOAT),
        ("y", FLOAT),
    ]
    assert [(v.name, v.dtype) for v in (*changed.model.graph.inputs, *changed.model.graph.outputs)] == [
        ("x", FLOAT16),
        ("y", FLOAT16),
    ]
    assert (kept.casts, changed.casts) == (2, 0)


def test_a_result_that_a_float32_node_reads_too_is_cast_once() -> None:
    text = "(float[N,8] x) => (float[N,8] y, float[N,8] z) { y = MatMul(x, w) z = Softmax <axis = -1> (y) }"
    result = converted(graph(text, w=WEIGHT), "fp16")
    assert result.casts == 2 and [value.name for value in result.model.graph.outputs] == ["y", "z"]


ROTARY = """(int64 n, float[N,4] x) => (float[N,4] y) {
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    index = Range(zero, n, one)
    row = Unsqueeze(index, axis)
    position = Cast <to = 1> (row)
    angle = Mul(position, frequency)
    both = Concat <axis = -1> (angle, angle)
    cosine = Cos(both)
    sine = Sin(both)
    product = MatMul(x, w)
    first, second = Split <axis = -1, num_outputs = 2> (product)
    negative = Neg(second)
    turned = Concat <axis = -1> (negative, first)
    a = Mul(product, cosine)
    b = Mul(turned, sine)
    y = Add(a, b)
}"""


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_rotary_angles_are_float32_beyond_the_integers_that_a_narrow_type_holds(dtype: str) -> None:
    model = graph(
        ROTARY, axis=np.array([1]), frequency=np.array([1.0, 0.01], np.float32), w=np.eye(4, dtype=np.float32)
    )
    result = converted(model, dtype)
    types = computed_in(result.model)
    assert {types[name] for name in ("position", "angle", "both", "cosine", "sine")} == {FLOAT}
    assert {types[name] for name in ("product", "negative", "turned", "a", "b", "y_" + TYPES[dtype].name.lower())} == {
        TYPES[dtype]
    }
    length = 5000
    feed = {"n": np.array(length), "x": np.ones((length, 4), np.float32)}
    right = run(model, feed)["y"]
    # Five values of 1 or less are rounded on the way to a sum of 2 or less.
    assert np.abs(run_rounded(result.model, feed)["y"] - right).max() <= 5 * EPS[dtype]
    wrong = np.abs(run(rounded_everywhere(infer(model), TYPES[dtype]), feed)["y"] - right)
    first = np.flatnonzero(wrong.max(-1) > 0.5)[0]
    assert first > {"fp16": 2048, "bf16": 256}[dtype] and wrong.max() > 1


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_norm_of_activations_of_three_hundred(dtype: str) -> None:
    """Squares of 300 are 90000: more than float16 holds."""
    model = graph(
        """(float[N,8] x) => (float[N,8] y) {
            hidden = MatMul(x, w)
            two = Constant <value = float {2.0}> ()
            square = Pow(hidden, two)
            mean = ReduceMean(square, axis)
            epsilon = Constant <value = float {1e-6}> ()
            shifted = Add(mean, epsilon)
            root = Sqrt(shifted)
            inverse = Reciprocal(root)
            normal = Mul(hidden, inverse)
            scaled = Mul(scale, normal)
            y = MatMul(scaled, w)
        }""",
        w=np.eye(8, dtype=np.float32),
        axis=np.array([-1]),
        scale=np.ones(8, np.float32),
    )
    result = converted(model, dtype)
    types = computed_in(result.model)
    assert {types[name] for name in ("square", "mean", "shifted", "root", "inverse", "normal")} == {FLOAT}
    assert types["scaled"] == types["y_" + TYPES[dtype].name.lower()] == TYPES[dtype]
    feed = {"x": np.float32(300) * RNG.choice([-1.0, 1.0], (4, 8)).astype(np.float32)}
    right = run(model, feed)["y"]
    # Values of 1: x, hidden, normal, scaled and y are rounded.
    assert np.abs(run_rounded(result.model, feed)["y"] - right).max() <= 5 * EPS[dtype]
    if dtype == "fp16":
        assert not np.abs(run(rounded_everywhere(infer(model), FLOAT16), feed)["y"]).any()  # 1 / infinity


def infer(model: ir.Model) -> ir.Model:
    """The graph with the types of all values."""
    return convert_precision(model, "fp32").model


def test_a_squared_deviation_is_float32_and_the_sum_before_it_is_not() -> None:
    model = graph(
        """(float[N,8] x) => (float[N,8] y) {
            a = MatMul(x, w)
            b = MatMul(a, w)
            residual = Add(a, b)
            mean = ReduceMean(residual, axis)
            deviation = Sub(residual, mean)
            square = Mul(deviation, deviation)
            variance = ReduceMean(square, axis)
            root = Sqrt(variance)
            y = Div(deviation, root)
        }""",
        w=WEIGHT,
        axis=np.array([-1]),
    )
    result = converted(model, "fp16")
    types = computed_in(result.model)
    assert {types[name] for name in ("mean", "deviation", "square", "variance", "root", "y")} == {FLOAT}
    assert {types[name] for name in ("a", "b", "residual")} == {FLOAT16}
    # x, and the sum of the residual stream; the result leaves as it is computed.
    assert result.casts == 2


def test_a_softmax_in_parts_over_more_keys_than_float16_can_count() -> None:
    keys = 70_000
    model = graph(
        """(float[N,8] x) => (float[N,8] y) {
            scores = MatMul(x, k)
            top = ReduceMax(scores, axis)
            shifted = Sub(scores, top)
            terms = Exp(shifted)
            total = ReduceSum(terms, axis)
            weights = Div(terms, total)
            y = MatMul(weights, v)
        }""",
        k=np.zeros((8, keys), np.float32),
        v=np.ones((keys, 8), np.float32),
        axis=np.array([-1]),
    )
    result = converted(model, "fp16")
    types = computed_in(result.model)
    assert {types[name] for name in ("top", "shifted", "terms", "total", "weights")} == {FLOAT}
    assert types["scores"] == types["y_float16"] == FLOAT16
    feed = {"x": np.ones((1, 8), np.float32)}
    # A weight of 1/70000 is below float16's normal numbers, which stand 2^-24 apart there; each is off by half of that.
    assert np.abs(run_rounded(result.model, feed)["y"] - 1).max() <= keys * 2.0**-25 + 2.0**-11
    assert not np.abs(run(rounded_everywhere(infer(model), FLOAT16), feed)["y"] - 1).max() < 0.9  # 1 / infinity


def test_sums_that_nothing_normalised_are_contracted_in_float32() -> None:
    """As a softmax that divides behind the second product does: 4096 keys of value 100 would be 409600."""
    model = graph(
        """(float[N,8] x) => (float[N,8] y) {
            scores = MatMul(x, k)
            terms = Exp(scores)
            sums = MatMul(terms, v)
            total = ReduceSum(terms, axis)
            y = Div(sums, total)
        }""",
        k=np.zeros((8, 4096), np.float32),
        v=np.full((4096, 8), 100, np.float32),
        axis=np.array([-1]),
    )
    result = converted(model, "fp16")
    assert computed_in(result.model)["sums"] == FLOAT
    assert rules.UNNORMALISED in result.kept_in_fp32
    assert np.allclose(run_rounded(result.model, {"x": np.zeros((2, 8), np.float32)})["y"], 100, rtol=2.0**-11)


def test_a_quotient_is_data_again_only_where_it_is_divided_by_its_own_sum() -> None:
    """A sum of squares over a count is a variance: 90000 where activations are 300."""
    model = graph(
        """(float[N,8] x, float[N,1] count) => (float[N,8] y) {
            hidden = MatMul(x, w)
            squares = ReduceSumSquare(hidden, axis)
            ones = Exp(count)
            number = ReduceSum(ones, axis)
            variance = Div(squares, number)
            epsilon = Constant <value = float {0.001}> ()
            shifted = Add(variance, epsilon)
            root = Sqrt(shifted)
            y = Div(hidden, root)
        }""",
        w=np.eye(8, dtype=np.float32),
        axis=np.array([-1]),
    )
    result = converted(model, "fp16")
    types = computed_in(result.model)
    assert {types[name] for name in ("variance", "shifted", "root")} == {FLOAT}
    feed = {"x": np.full((1, 8), 300, np.float32), "count": np.log(np.full((1, 1), 8, np.float32))}
    # Values of 1: x and hidden are rounded.
    assert np.abs(run_rounded(result.model, feed)["y"] - 1).max() <= 2 * EPS["fp16"]
    inverse = """(float[N,8] x) => (float[N,8] y) {
        terms = Exp(x)
        total = ReduceSum(terms, axis)
        inverse = Reciprocal(total)
        weights = Mul(inverse, terms)
        y = MatMul(weights, w)
    }"""
    assert converted(graph(inverse, w=WEIGHT, axis=np.array([-1])), "fp16").narrow == {"MatMul": 1}


MASKED = """(float[N,8] x, int64[N] mask) => (float[N,8] y) {
    scores = MatMul(x, k)
    kept = Cast <to = 1> (mask)
    one = Constant <value = float {1.0}> ()
    dropped = Sub(one, kept)
    lowest = Constant <value = float {-3.4028234663852886e38}> ()
    penalty = Mul(dropped, lowest)
    masked = Add(scores, penalty)
    weights = Softmax <axis = -1> (masked)
    y = MatMul(weights, k)
}"""


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_mask_beyond_the_range_makes_no_nan_where_a_row_sees_nothing(dtype: str) -> None:
    """Both narrow types round float32's lowest number to minus infinity, and a softmax over nothing else is 0 / 0."""
    model = graph(MASKED, k=WEIGHT)
    result = converted(model, dtype)
    types = computed_in(result.model)
    assert {types[name] for name in ("dropped", "penalty", "masked", "weights")} == {FLOAT}
    assert not result.clamped
    for mask in (np.zeros(8, np.int64), np.arange(8) % 2):
        feed = {"x": RNG.standard_normal((8, 8)).astype(np.float32), "mask": mask}
        right, got = run(model, feed)["y"], run_rounded(result.model, feed)["y"]
        # Scores of magnitude m are off by about 2 m eps (operands, sum), which the softmax passes on; then a product.
        scores = np.abs(feed["x"] @ WEIGHT).max()
        assert np.abs(got - right).max() <= (2 * scores + 2) * EPS[dtype] * np.abs(WEIGHT).max()
    assert np.isnan(
        run(rounded_everywhere(infer(model), TYPES[dtype]), {**feed, "mask": np.zeros(8, np.int64)})["y"]
    ).any()


CLAMPED = """(float[N,8] x, bool[N,8] low, bool[N,8] infinite) => (float[N,8] y) {
    a = MatMul(x, w)
    lowest = Constant <value = float {-1e9}> ()
    some = Where(low, lowest, a)
    never = Constant <value = float {-inf}> ()
    y = Where(infinite, never, some)
}"""


def test_a_masked_value_that_must_be_narrow_is_clamped_and_infinity_stays_infinity() -> None:
    model = graph(CLAMPED.replace("-inf", "-1.0"), w=np.eye(8, dtype=np.float32))
    for node in model.graph:
        if node.outputs[0].name == "never":
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.float32(-np.inf)))
    result = converted(model, "fp16", convert_io=True)
    [clamped] = result.clamped
    assert (clamped.value, clamped.lowest, clamped.bound) == ("y_float", None, 65504.0)
    assert result.notes == ("'y_float' is clamped to ±65504: a mask beyond that went into it",)
    row = np.arange(8) % 4
    feed = {"x": np.ones((1, 8), np.float16), "low": (row == 1)[None], "infinite": (row == 2)[None]}
    got = run_rounded(result.model, feed)["y"][0]
    assert got.tolist() == [1, -65504, -np.inf, 1, 1, -65504, -np.inf, 1]
    # bfloat16 holds 1e9, rounded.
    assert not converted(model, "bf16", convert_io=True).clamped


def test_a_trained_tensor_beyond_float16_is_refused_by_name() -> None:
    weight = WEIGHT.copy()
    weight[2, 3], weight[5, 5] = 7e4, -8e4
    model = graph("(float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }", w=weight)
    with pytest.raises(ExportFailed, match=r"'w'.*MatMul.*float16 does not: 2 of 64 numbers, up to 8e\+04.*bf16"):
        convert_precision(model, "fp16")
    assert converted(model, "bf16").narrow == {"MatMul": 1}
    table = graph("(int64[N] i) => (float[N,8] y) { y = Gather(w, i) }", w=weight)
    with pytest.raises(ExportFailed, match="'w'"):
        convert_precision(table, "fp16")


def test_the_scale_of_a_norm_may_be_beyond_float16_because_the_norm_is_float32() -> None:
    model = graph(
        "(float[N,8] x) => (float[N,8] y) { y = LayerNormalization(x, w, b) }",
        w=np.full(8, 7e4, np.float32),
        b=WEIGHT[0],
    )
    result = converted(model, "fp16")
    assert not result.narrow and result.casts == 0


def test_a_tensor_too_small_for_float16_is_named_and_an_epsilon_stays_one() -> None:
    weight = WEIGHT * np.float32(1e-8)
    model = graph(
        """(float[N,8] x) => (float[N,8] y) {
            a = MatMul(x, w)
            e = Constant <value = float {1e-9}> ()
            b = Add(a, e)
            y = Div(a, b)
        }""",
        w=weight,
    )
    result = converted(model, "fp16")
    lost = np.abs(weight - weight.astype(np.float16)).max() / np.abs(weight).max()
    assert dict(result.coarse) == {"w": pytest.approx(lost)} and lost > 0.5
    assert result.notes == (
        f"fp16: the numbers in 'w' are so small that rounding takes up to {lost:.1%} of the largest",
    )
    assert reasons(result) == {"": rules.CONSTANT}
    assert not converted(model, "bf16").notes
    # A few small numbers beside others are rounded as any product of them is.
    weight = WEIGHT.copy()
    weight[0, :3] = 1e-9
    assert not converted(graph("(float[N,8] x) => (float[N,8] y) { y = MatMul(x, w) }", w=weight), "fp16").notes


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
