from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
from longspan.plugins.errors import InvalidOperands
from longspan.plugins.functions import attach_function_bodies
from longspan.plugins.sliding_window_attention.function import LOOP_ABOVE, Signature, function_body

from .function_sites import (
    feeds,
    graph,
    node,
    session,
    site,
    types,
    value,
    value_sizes,
    with_float_interface,
)
from .sliding_window_cases import CASES, Case, expected

# |V| stays below 4 and scores below 16, whose rounding errors of 2^-24 relative each move a weight.
TOLERANCE = 4 * 16 * 2.0**-24 * 2


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: Case, layout: str) -> None:
    operands = case.operands(layout)
    # A site without lse takes another softmax. Both meet both layouts in other tests.
    with_lse = layout == "bhsd"
    model = site(operands, case.node_attributes(layout), lse=with_lse)
    attach_function_bodies(model)
    got = session(model).run(None, feeds(operands))
    for mine, want in zip(got, expected(case, layout), strict=False):
        np.testing.assert_allclose(mine, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["many blocks", "dilation per head", "everything", "global with offsets"])
def test_wide_windows_agree_block_by_block(name: str) -> None:
    """The same sites with windows that only a Loop may compute, cut off by the reference at the ends."""
    case = named(name)
    wide = {"left_window_size": LOOP_ABOVE, "right_window_size": 7}
    features = tuple(feature for feature in case.features if feature != "band_bias")
    case = Case(**{**vars(case), "attributes": case.attributes | wide, "features": features})
    operands = case.operands("bsd")
    model = site(operands, case.node_attributes("bsd"))
    attach_function_bodies(model)
    assert [identifier[2].split("__")[-1] for identifier in model.functions] == ["loop"]
    y, lse = session(model).run(None, feeds(operands))
    want_y, want_lse = expected(case, "bsd")
    np.testing.assert_allclose(y, want_y, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=TOLERANCE)


def test_bias_in_a_wide_window() -> None:
    attributes = {"left_window_size": LOOP_ABOVE, "right_window_size": 2}
    case = Case("wide bias", attributes, ("band_bias",), seq_q=40, bias_shape=(1, 2, 40))
    operands = case.operands("bhsd")
    model = site(operands, case.node_attributes("bhsd"), lse=False)
    attach_function_bodies(model)
    np.testing.assert_allclose(
        session(model).run(None, feeds(operands))[0], expected(case, "bhsd")[0], rtol=0, atol=TOLERANCE
    )


def test_bias_shared_by_rows_has_its_own_body() -> None:
    case = named("bias")
    operands = case.operands("bhsd")
    model = site(operands, case.node_attributes("bhsd"))
    model.graph.inputs[3].shape = ir.Shape([1, "heads", 1, "width"])
    attach_function_bodies(model)
    assert [identifier[2] for identifier in model.functions] == ["bhsd__band_bias__lse"]
    y = session(model).run(["Y"], feeds(operands))[0]
    np.testing.assert_allclose(y, expected(case, "bhsd")[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["everything", "padding", "grouped heads"])
@pytest.mark.parametrize(
    ("dtype", "array_type"), [(ir.DataType.FLOAT16, np.float16), (ir.DataType.BFLOAT16, ml_dtypes.bfloat16)]
)
def test_half_precision_only_rounds_inputs_and_output(name: str, dtype: ir.DataType, array_type: Any) -> None:
    case = named(name)
    operands = feeds(case.operands("bsd"), array_type)
    exact = {name: array.astype(np.float64) if array.dtype.kind in "fV" else array for name, array in operands.items()}
    model = site(operands, case.node_attributes("bsd"), dtype)
    with_float_interface(model, dtype)
    attach_function_bodies(model)
    got, lse = session(model).run(
        None,
        {name: array.astype(np.float32) if array.dtype == array_type else array for name, array in operands.items()},
    )
    want_y, want_lse = expected(case, "bsd", exact)
    half_ulp = float(ml_dtypes.finfo(array_type).eps) / 2
    np.testing.assert_allclose(got, want_y, rtol=half_ulp, atol=TOLERANCE)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("attributes", "features"),
    [
        ({"left_window_size": 20, "right_window_size": 11}, ()),
        ({"left_window_size": 20, "right_window_size": 0, "dilation": [1, 5]}, ("attn_mask", "sinks")),
        ({"left_window_size": 20, "right_window_size": 11}, ("global_mask", "global_Q", "band_bias", "spans")),
        ({"left_window_size": -1, "right_window_size": 0}, ()),
        ({}, ("global_mask", "spans")),
    ],
)
def test_no_value_is_quadratic(attributes: dict[str, Any], features: tuple[str, ...], tmp_path: Path) -> None:
    sizes = []
    for length in (384, 4 * 384):
        case = Case("memory", attributes, features, seq_q=length, batch=1, global_tokens=((0, 5, length - 1),))
        operands = case.operands("bhsd")
        model = site(operands, attributes)
        attach_function_bodies(model)
        sizes.append(max(value_sizes(model, feeds(operands), tmp_path)))
    assert sizes[1] <= 4.2 * sizes[0]


def test_quadratic_values_would_be_noticed(tmp_path: Path) -> None:
    """The control of `test_no_value_is_quadratic`."""
    text = (
        '<ir_version: 9, opset_import: ["" : 18]> control (float[S, D] Q) => (float[S, D] Y) '
        "{ T = Transpose(Q)  P = MatMul(Q, T)  W = Softmax(P)  Y = MatMul(W, Q) }"
    )
    model = onnx.parser.parse_model(text)
    inputs = [{"Q": np.zeros((length, 8), np.float32)} for length in (384, 4 * 384)]
    small, large = (max(value_sizes(model, given, tmp_path)) for given in inputs)
    assert large == 16 * small


def test_sites_share_a_body_and_overloads_keep_apart() -> None:
    """Three sites in a row: two signatures, and attributes that differ at every site."""
    case = named("padding")
    operands = case.operands("bhsd")
    elements = types("SlidingWindowAttention")
    inputs = {name: value(name, elements[name], array.ndim) for name, array in operands.items()}
    steps = [
        {"left_window_size": 3, "right_window_size": 2, "scale": 0.5},
        {"left_window_size": 1, "right_window_size": 0, "scale": 0.25, "dilation": [2, 1]},
        {"left_window_size": 2, "right_window_size": 1},
    ]
    nodes, current = [], inputs["Q"]
    for index, attributes in enumerate(steps):
        result = value(f"Y{index}", ir.DataType.FLOAT, 4)
        nodes.append(node(inputs | {"Q": current}, attributes, [result]))
        current = result
    model = ir.Model(graph(list(inputs.values()), nodes, [current]), ir_version=10)
    attach_function_bodies(model)
    assert [step.overload for step in nodes] == [
        "bhsd__attn_mask__scale",
        "bhsd__attn_mask__scale",
        "bhsd__attn_mask",
    ]
    assert set(model.functions) == {step.op_identifier() for step in nodes}

    want = operands["Q"]
    for attributes in steps:
        step = Case(**{**vars(case), "attributes": attributes | {"dilation": tuple(attributes.get("dilation", [1]))}})
        want = expected(step, "bhsd", operands | {"Q": want})[0]
    got = session(model).run(None, feeds(operands))[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=3 * TOLERANCE)


@pytest.mark.parametrize("name", ["plain", "everything", "unbounded left, causal"])
@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
def test_inlined_model_is_valid_and_runs(name: str, layout: str) -> None:
    case = named(name)
    operands = case.operands(layout)
    model = site(operands, case.node_attributes(layout))
    attach_function_bodies(model)
    inlined = onnx.inliner.inline_local_functions(ir.to_proto(model))
    assert not inlined.functions
    assert {n.domain for n in inlined.graph.node} == {""}
    onnx.checker.check_model(inlined, full_check=True)
    y, lse = session(inlined).run(None, feeds(operands))
    want_y, want_lse = expected(case, layout)
    np.testing.assert_allclose(y, want_y, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("opset", [18, 20, 21, 23])
def test_body_follows_the_opset_of_the_model(opset: int) -> None:
    case = named("global, padded")
    operands = case.operands("bhsd")
    model = site(operands, case.node_attributes("bhsd"), opset=opset, lse=False)
    attach_function_bodies(model)
    assert {function.opset_imports[""] for function in model.functions.values()} == {opset}
    onnx.checker.check_model(ir.to_proto(model))
    y = session(model).run(["Y"], feeds(operands))[0]
    np.testing.assert_allclose(y, expected(case, "bhsd")[0], rtol=0, atol=TOLERANCE)


def test_attaching_again_changes_nothing_and_drops_unused_bodies() -> None:
    case = named("padding")
    model = site(case.operands("bhsd"), case.node_attributes("bhsd"))
    attach_function_bodies(model)
    assert (model.ir_version, model.opset_imports["longspan"]) == (10, 1)
    once = ir.to_proto(model).SerializeToString(deterministic=True)
    attach_function_bodies(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == once
    model.graph.node(0).attributes["softcap"] = ir.AttrFloat32("softcap", 2.0)
    attach_function_bodies(model)
    assert [identifier[2] for identifier in model.functions] == ["bhsd__attn_mask__lse__softcap"]


def test_nodes_in_nested_graphs_get_bodies() -> None:
    operands = named("plain").operands("bhsd")
    q, k, v = (value(name, ir.DataType.FLOAT, 4) for name in operands)
    branches = []
    for left, name in ((1, "then_branch"), (2, "else_branch")):
        result = value(name, ir.DataType.FLOAT, 4)
        body = node({"Q": q, "K": k, "V": v}, {"left_window_size": left, "right_window_size": 0}, [result])
        branches.append(ir.AttrGraph(name, ir.Graph([], [result], nodes=[body], name=name)))
    condition = value("condition", ir.DataType.BOOL, 0)
    choice = ir.Node("", "If", [condition], branches, outputs=[value("Z", ir.DataType.FLOAT, 4)])
    model = ir.Model(graph([condition, q, k, v], [choice], list(choice.outputs)), ir_version=10)
    attach_function_bodies(model)
    running = session(model)
    for chosen, left in ((True, 1), (False, 2)):
        case = Case("plain", {"left_window_size": left, "right_window_size": 0})
        got = running.run(None, feeds(operands) | {"condition": np.array(chosen)})[0]
        np.testing.assert_allclose(got, expected(case, "bhsd", operands)[0], rtol=0, atol=TOLERANCE)


def test_layout_without_shape() -> None:
    operands = named("plain").operands("bsd")
    model = site(operands, {"q_num_heads": 2, "kv_num_heads": 2})
    for formal in model.graph.inputs:
        formal.shape = None
    assert Signature.of(model.graph.node(0)).layout == "bsd"
    del model.graph.node(0).attributes["q_num_heads"], model.graph.node(0).attributes["kv_num_heads"]
    with pytest.raises(InvalidOperands, match=r"layout .* unknown.*set the shape of Q"):
        attach_function_bodies(model)


def test_what_cannot_be_attached_is_refused() -> None:
    operands = named("plain").operands("bhsd")
    with pytest.raises(InvalidOperands, match="opset 17"):
        attach_function_bodies(site(operands, {}, opset=17))
    with pytest.raises(InvalidOperands, match="left_window_size = -2"):
        attach_function_bodies(site(operands, {"left_window_size": -2}))
    with pytest.raises(InvalidOperands, match="no attribute windw"):
        attach_function_bodies(site(operands, {"windw": 3}))
    model = site(operands, {})
    model.graph.node(0).op_type = "Convolution"
    with pytest.raises(InvalidOperands, match="longspan::Convolution"):
        attach_function_bodies(model)


def test_a_model_without_sites_stays_as_it_is() -> None:
    x = value("x", ir.DataType.FLOAT, 1)
    copy = ir.Node("", "Identity", [x], outputs=[value("y", ir.DataType.FLOAT, 1)])
    model = ir.Model(ir.Graph([x], copy.outputs, nodes=[copy], opset_imports={"": 13}, name="g"), ir_version=8)
    attach_function_bodies(model)
    assert (model.ir_version, dict(model.opset_imports), len(model.functions)) == (8, {"": 13}, 0)


def test_overload_names_what_the_body_is_specialised_for() -> None:
    signature = Signature(("attn_mask", "sinks"), "bsd", lse=True, scale=True, loop=True)
    assert signature.overload == "bsd__attn_mask__sinks__lse__scale__loop"
    function = function_body(signature)
    assert function.identifier() == ("longspan", "SlidingWindowAttention", signature.overload)
    assert [formal.name for formal in function.inputs][-1] == "sinks"
    assert function.attributes["scale"].value is None
