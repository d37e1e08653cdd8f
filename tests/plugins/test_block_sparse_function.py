from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
from longspan.plugins.block_sparse_attention import function
from longspan.plugins.block_sparse_attention.function import EVEN_UP_TO, Signature, function_body
from longspan.plugins.block_sparse_attention.long_rows import LongRows
from longspan.plugins.errors import InvalidOperands
from longspan.plugins.functions import attach_function_bodies, fixed_size_body

from .block_sparse_cases import CASES, LISTS, Case, expected
from .function_sites import Array, feeds, graph, node, session, site, types, value, value_sizes, with_float_interface

# |V| stays below 4 and scores below 16, whose rounding errors of 2^-24 relative each move a weight.
TOLERANCE = 4 * 16 * 2.0**-24 * 2
WIDTHS = ("kv_indices", "full_kv_indices")


def block_site(operands: dict[str, Array], attributes: dict[str, Any], even: bool = False, **options: Any) -> ir.Model:
    """Model of one node with its body; `even` asks for the form that pads every row to the width of its lists."""
    model = site(operands, attributes, op_type="BlockSparseAttention", **options)
    attach_function_bodies(model)
    if even:
        main = model.graph.node(0)
        body = function_body(replace(Signature.of(main), even=True))
        main.overload = body.overload
        model.functions.clear()
        model.functions[body.identifier()] = body
    return model


def apart_site(operands: dict[str, Array], attributes: dict[str, Any], apart: LongRows, **options: Any) -> ir.Model:
    """Model of one node whose body computes the long rows at the ends apart."""
    model = site(operands, attributes, op_type="BlockSparseAttention", **options)
    main = model.graph.node(0)
    body = fixed_size_body(main, 18, apart)
    main.overload = body.overload
    model.functions[body.identifier()] = body
    model.ir_version = 10
    return model


def long_rows(operands: dict[str, Array], first: int, last: int, up_to: int = 0) -> LongRows:
    """What the lists are known to be with these rows apart."""
    listed = operands["kv_num_blocks"] + operands["full_kv_num_blocks"]
    between = listed[..., first : max(listed.shape[-1] - last, first)]
    return LongRows(first, last, max(int(between.max(initial=0)), 1), up_to)


def named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def assert_agrees(model: ir.Model | onnx.ModelProto, operands: dict[str, Array], want: tuple[Array, Array]) -> None:
    got = session(model).run(None, feeds(operands))
    for mine, right in zip(got, want, strict=False):
        np.testing.assert_allclose(mine, right, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: Case, layout: str) -> None:
    operands = case.operands(layout)
    # A site without lse takes another softmax. Both meet both layouts in other tests.
    model = block_site(operands, case.node_attributes(layout), lse=layout == "bhsd")
    assert_agrees(model, operands, expected(case, layout))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_padded_to_the_width_of_the_lists_agree(case: Case) -> None:
    operands = case.operands("bsd")
    model = block_site(operands, case.node_attributes("bsd"), even=True, lse="sinks" not in case.features)
    assert_agrees(model, operands, expected(case, "bsd"))


ENDS = ((1, 1), (0, 2), (1, 0), (0, 0), (3, 9))
"""Rows apart at the start and at the end: of five or so, none to more than there are."""


@pytest.mark.parametrize(("number", "case"), list(enumerate(CASES)), ids=[case.name for case in CASES])
def test_long_rows_apart_agree(number: int, case: Case) -> None:
    operands = case.operands("bhsd")
    apart = long_rows(operands, *ENDS[number % len(ENDS)])
    model = apart_site(operands, case.node_attributes("bhsd"), apart, lse="sinks" in case.features or number % 2 == 0)
    assert_agrees(model, operands, expected(case, "bhsd"))


@pytest.mark.parametrize("scores", [1, 300, 2**22])
@pytest.mark.parametrize("name", ["everything", "lists of their own for all"])
def test_any_rows_apart_agree_in_chunks_of_any_size(name: str, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(function, "EVEN_CHUNK", scores)
    case = named(name)
    operands = case.operands("bsd")
    for first, last in ENDS:
        model = apart_site(operands, case.node_attributes("bsd"), long_rows(operands, first, last))
        assert_agrees(model, operands, expected(case, "bsd"))


@pytest.mark.parametrize("batch", [1, 3])
def test_long_rows_apart_agree_at_any_length(batch: int) -> None:
    """One body for all lengths: below as many rows as are apart, and where other rows may be long as well."""
    layout: dict[str, Any] = {
        "heads": 4,
        "kv_heads": 2,
        "features": ("attn_mask", "sinks"),
        "padded": ((3, 9), (0, 40))[:batch],
    }
    apart = LongRows(2, 1, 5, up_to=4)
    running = None
    for length in (1, 3, 4, 5, 9, 13, 16, 17, 20, 21, 24, 40, 77):
        case, operands = bigbird(length, 4, **layout, batch=batch)
        if running is None:
            running = session(apart_site(operands, case.node_attributes("bhsd"), apart))
        want = expected(case, "bhsd", operands)
        for mine, right in zip(running.run(None, feeds(operands)), want, strict=True):
            np.testing.assert_allclose(mine, right, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("apart", "right"), [((1, 1, 5), True), ((0, 1, 5), False), ((1, 0, 5), False), ((1, 1, 4), False)]
)
def test_a_row_that_is_longer_than_is_known_would_be_noticed(apart: tuple[int, int, int], right: bool) -> None:
    """The control of the tests around: what a body relies on, it does not check."""
    case, operands = bigbird(64, 4)
    model = apart_site(operands, case.node_attributes("bhsd"), LongRows(*apart))
    got = session(model).run(None, feeds(operands))[0]
    assert np.allclose(got, expected(case, "bhsd", operands)[0], rtol=0, atol=TOLERANCE) == right


@pytest.mark.parametrize(("known_to", "right"), [(15, True), (16, False), (0, False)])
def test_texts_that_nothing_is_known_of_have_the_width_of_their_lists(known_to: int, right: bool) -> None:
    """Sixteen rows of blocks, all of which would be computed at too small a width."""
    case, operands = bigbird(64, 4)
    model = apart_site(operands, case.node_attributes("bhsd"), LongRows(0, 0, 4, known_to=known_to))
    got = session(model).run(None, feeds(operands))[0]
    assert np.allclose(got, expected(case, "bhsd", operands)[0], rtol=0, atol=TOLERANCE) == right


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("name", ["everything", "listed several times, masked", "lists of their own for all"])
def test_chunks_of_any_size_agree(name: str, even: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = named(name)
    operands = case.operands("bhsd")
    for scores in (1, 300):
        monkeypatch.setattr(function, "CHUNK", scores)
        monkeypatch.setattr(function, "EVEN_CHUNK", scores)
        model = block_site(operands, case.node_attributes("bhsd"), even=even)
        assert_agrees(model, operands, expected(case, "bhsd"))


@pytest.mark.parametrize("static", [(), WIDTHS])
def test_partial_and_full_lists_may_be_shared_differently(static: tuple[str, ...]) -> None:
    case = Case("mixed", shared=(2, 2), features=("block_masks",))
    operands = case.operands("bhsd")
    for name, kept in (("kv_num_blocks", np.s_[:1]), ("kv_indices", np.s_[:1]), ("block_mask_ids", np.s_[:1])):
        operands[name] = operands[name][kept]
    for name in LISTS[2:]:
        operands[name] = operands[name][:, :1]
    model = block_site(operands, case.node_attributes("bhsd"), static=static)
    assert_agrees(model, operands, expected(case, "bhsd", operands))


@pytest.mark.parametrize("even", [False, True])
def test_what_is_out_of_range_is_clamped(even: bool) -> None:
    """The result is that of the nearest lists in range; without clamping, ONNX Runtime's Gather refuses to run."""
    case = Case("clamped", seq_q=18, features=("block_masks",), density=0.9)
    operands = case.operands("bhsd")
    wrong = {name: array.copy() for name, array in operands.items()}
    columns, masks = 5, len(operands["block_masks"])
    wrong["kv_indices"][..., 0] = np.array([-1, -(2**31), columns, 2**31 - 1, 2])
    wrong["block_mask_ids"][..., 1] = np.array([-2, -(2**31), masks, 2**31 - 1, 0])
    wrong["full_kv_num_blocks"][..., :2] = np.array([-3, 2**31 - 1])
    wrong["full_kv_indices"][..., -1] = 100
    right = dict(wrong)
    right["kv_indices"] = np.clip(wrong["kv_indices"], 0, columns - 1)
    right["block_mask_ids"] = np.clip(wrong["block_mask_ids"], -1, masks - 1)
    right["full_kv_num_blocks"] = np.clip(wrong["full_kv_num_blocks"], 0, wrong["full_kv_indices"].shape[-1])
    right["full_kv_indices"] = np.clip(wrong["full_kv_indices"], 0, columns - 1)
    model = block_site(operands, case.node_attributes("bhsd"), even=even)
    assert_agrees(model, wrong, expected(case, "bhsd", right))


@pytest.mark.parametrize("name", ["everything", "padding", "grouped heads", "bias per head"])
@pytest.mark.parametrize(
    ("dtype", "array_type"), [(ir.DataType.FLOAT16, np.float16), (ir.DataType.BFLOAT16, ml_dtypes.bfloat16)]
)
def test_half_precision_only_rounds_inputs_and_output(name: str, dtype: ir.DataType, array_type: Any) -> None:
    case = named(name)
    operands = feeds(case.operands("bsd"), array_type)
    exact = {name: array.astype(np.float64) if array.dtype == array_type else array for name, array in operands.items()}
    model = site(operands, case.node_attributes("bsd"), dtype, op_type="BlockSparseAttention")
    with_float_interface(model, dtype)
    attach_function_bodies(model)
    got, lse = session(model).run(None, feeds(exact))
    want_y, want_lse = expected(case, "bsd", exact)
    half_ulp = float(ml_dtypes.finfo(array_type).eps) / 2
    np.testing.assert_allclose(got, want_y, rtol=half_ulp, atol=TOLERANCE)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=TOLERANCE)


def bigbird(length: int, block: int, **changes: Any) -> tuple[Case, dict[str, Array]]:
    """A site whose first and last rows of blocks list every block, and the others five."""
    case = Case("uneven", tall=block, wide=block, seq_q=length, density=0.0, **{"batch": 1, **changes})
    operands = case.operands("bhsd")
    blocks = -(-length // block)
    counts = np.full((1, 1, blocks), min(5, blocks), np.int32)
    counts[..., [0, -1]] = blocks
    near = np.arange(blocks)[:, None] + np.arange(-1, 2)
    indices = np.zeros((1, 1, blocks, blocks), np.int32)
    ends = np.zeros_like(near[:, :1])
    indices[..., :5] = np.concatenate([ends, near % blocks, ends + blocks - 1], 1)[:, :blocks]
    indices[..., [0, -1], :] = np.arange(blocks)
    partial = "block_masks" in case.features
    empty = {"num_blocks": np.zeros_like(counts), "indices": indices[..., :0]}
    for name, array in (("num_blocks", counts), ("indices", indices)):
        operands[f"kv_{name}"] = array if partial else empty[name]
        operands[f"full_kv_{name}"] = empty[name] if partial else array
    if partial:
        operands["block_mask_ids"] = indices % 3 - 1
    return case, operands


@pytest.mark.parametrize("features", [(), ("block_masks", "attn_mask", "sinks", "q_positions", "distance_bias")])
def test_uneven_rows_cost_what_they_list(features: tuple[str, ...], tmp_path: Path) -> None:
    """Neither memory nor work grows faster than the length; padding rows to the widest would be 4 times more."""
    largest, total = [], []
    for length in (512, 4 * 512):
        case, operands = bigbird(length, 16, features=features, attributes={"is_causal": 1})
        model = block_site(operands, case.node_attributes("bhsd"))
        sizes = value_sizes(model, feeds(operands), tmp_path)
        largest.append(max(sizes))
        total.append(sum(sizes))
    assert largest[1] <= 4.2 * largest[0]
    assert total[1] <= 4.2 * total[0]


@pytest.mark.parametrize("features", [(), ("block_masks", "attn_mask", "sinks", "q_positions", "distance_bias")])
def test_long_rows_apart_cost_what_they_list(features: tuple[str, ...], tmp_path: Path) -> None:
    """In sizes that follow from shapes alone, work grows as the length does."""
    largest, total = [], []
    for length in (512, 4 * 512):
        case, operands = bigbird(length, 16, features=features)
        model = apart_site(operands, case.node_attributes("bhsd"), LongRows(1, 1, 5))
        sizes = value_sizes(model, feeds(operands), tmp_path)
        largest.append(max(sizes))
        total.append(sum(sizes))
    assert largest[1] <= 4.2 * largest[0]
    assert total[1] <= 4.2 * total[0]


def test_work_of_padded_rows_would_be_noticed(tmp_path: Path) -> None:
    """The control of the two tests before."""
    total = []
    for length in (512, 4 * 512):
        case, operands = bigbird(length, 16)
        model = block_site(operands, case.node_attributes("bhsd"), even=True)
        total.append(sum(value_sizes(model, feeds(operands), tmp_path)))
    assert total[1] > 12 * total[0]


def test_uneven_rows_agree() -> None:
    case, operands = bigbird(333, 16, heads=4, features=("block_masks",))
    model = block_site(operands, case.node_attributes("bhsd"))
    assert_agrees(model, operands, expected(case, "bhsd", operands))


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
def test_inlined_model_is_valid_and_runs(name: str, layout: str, even: bool) -> None:
    case = named(name)
    operands = case.operands(layout)
    model = block_site(operands, case.node_attributes(layout), even=even)
    inlined = onnx.inliner.inline_local_functions(ir.to_proto(model))
    assert not inlined.functions
    assert {n.domain for n in inlined.graph.node} == {""}
    onnx.checker.check_model(inlined, full_check=True)
    assert_agrees(inlined, operands, expected(case, layout))


@pytest.mark.parametrize("opset", [20, 21, 23])
def test_body_follows_the_opset_of_the_model(opset: int) -> None:
    case = named("causal, masked")
    operands = case.operands("bhsd")
    model = block_site(operands, case.node_attributes("bhsd"), opset=opset, lse=False)
    assert {body.opset_imports[""] for body in model.functions.values()} == {opset}
    onnx.checker.check_model(ir.to_proto(model))
    assert_agrees(model, operands, expected(case, "bhsd"))


def test_sites_of_both_operators_in_one_model() -> None:
    """A window attends to what a block-sparse site computed; each has a body, and attributes differ at every site."""
    case = named("plain")
    operands = case.operands("bhsd")
    elements = types("BlockSparseAttention")
    inputs = {name: value(name, elements[name], array.ndim) for name, array in operands.items()}
    steps = [{**case.node_attributes("bhsd"), "scale": scale} for scale in (0.5, 0.25)]
    nodes, current = [], inputs["Q"]
    for index, attributes in enumerate(steps):
        result = value(f"Y{index}", ir.DataType.FLOAT, 4)
        nodes.append(node(inputs | {"Q": current}, attributes, [result], "BlockSparseAttention"))
        current = result
    last = value("Z", ir.DataType.FLOAT, 4)
    unbounded = {"left_window_size": -1, "right_window_size": -1}
    nodes.append(node({"Q": current, "K": inputs["K"], "V": inputs["V"]}, unbounded, [last]))
    model = ir.Model(graph(list(inputs.values()), nodes, [last]), ir_version=10)
    attach_function_bodies(model)
    assert [identifier[1:] for identifier in model.functions] == [
        ("BlockSparseAttention", "bhsd__scale"),
        ("SlidingWindowAttention", "bhsd__loop"),
    ]
    want = operands["Q"]
    for attributes in steps:
        step = replace(case, attributes=attributes)
        want = expected(step, "bhsd", operands | {"Q": want})[0]
    weights = np.exp(want @ operands["K"].swapaxes(-1, -2) / np.sqrt(case.size))
    want = weights / weights.sum(-1, keepdims=True) @ operands["V"]
    got = session(model).run(None, feeds(operands))[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=3 * TOLERANCE)


def signature(attributes: dict[str, Any], widths: tuple[int | str, int | str]) -> Signature:
    operands = named("plain").operands("bhsd")
    model = site(operands, attributes, op_type="BlockSparseAttention", lse=False)
    for formal in model.graph.inputs:
        if formal.name in WIDTHS:
            formal.shape = ir.Shape([*formal.shape[:3], widths[WIDTHS.index(formal.name)]])
    return Signature.of(model.graph.node(0))


def test_overload_names_what_the_body_is_specialised_for() -> None:
    made = Signature(("attn_mask", "sinks"), "bsd", lse=True, scale=True, is_causal=True, full_only=True, even=True)
    assert made.overload == "bsd__attn_mask__sinks__lse__scale__is_causal__full_only__even"
    body = function_body(made)
    assert body.identifier() == ("longspan", "BlockSparseAttention", made.overload)
    assert [formal.name for formal in body.inputs][-1] == "sinks"
    assert body.attributes["scale"].value is None


def test_signature_knows_the_widths_that_shapes_say() -> None:
    assert signature({}, ("W", "W_full")).overload == "bhsd"
    assert signature({"is_causal": 1, "exclude_self": 1}, ("W", "W_full")).overload == "bhsd__is_causal__exclude_self"
    assert signature({}, (0, "W_full")).overload == "bhsd__full_only"
    assert signature({}, ("W", 0)).overload == "bhsd__partial_only"
    # The default block holds 128 keys.
    assert signature({}, (0, EVEN_UP_TO // 128)).overload == "bhsd__full_only__even"
    assert signature({}, (1, EVEN_UP_TO // 128)).overload == "bhsd"
    assert signature({"kv_block_size": 64}, (1, EVEN_UP_TO // 128)).overload == "bhsd__even"
    assert signature({}, (0, 0)).overload == "bhsd__full_only__even"


@pytest.mark.parametrize("density", [0.0, None])
def test_lists_without_slots(density: float | None) -> None:
    """Widths of 0 that shapes know, of one kind of lists or of both."""
    case = Case("no slots", density=density, features=("block_masks",) if density == 0.0 else ())
    operands = case.operands("bhsd")
    if density == 0.0:
        for name in (*WIDTHS, "block_mask_ids"):
            operands[name] = operands[name][..., :0]
    for static in ((), WIDTHS):
        model = block_site(operands, case.node_attributes("bhsd"), static=static)
        assert_agrees(model, operands, expected(case, "bhsd", operands))


def test_what_cannot_be_attached_is_refused() -> None:
    operands = named("plain").operands("bhsd")
    with pytest.raises(InvalidOperands, match="q_block_size = 0"):
        block_site(operands, {"q_block_size": 0})
    with pytest.raises(InvalidOperands, match="no attribute left_window_size"):
        block_site(operands, {"left_window_size": 3})
    model = site(operands, {}, op_type="BlockSparseAttention")
    for formal in model.graph.inputs:
        formal.shape = None
    with pytest.raises(InvalidOperands, match=r"layout of BlockSparseAttention .* unknown.*set the shape of Q"):
        attach_function_bodies(model)
