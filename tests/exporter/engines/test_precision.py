"""Which nodes of a graph become narrow, which stay float32, and what becomes of numbers beyond the type's range."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from longspan.exporter.engines.precision import rules
from longspan.exporter.engines.precision.conversion import convert_precision
from longspan.exporter.errors import ExportFailed

from .precision_graphs import (
    EPS,
    FLOAT16,
    RNG,
    TYPES,
    WEIGHT,
    computed_in,
    converted,
    graph,
    infer,
    reasons,
)
from .rounding import FLOAT, rounded_everywhere, run, run_rounded


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
