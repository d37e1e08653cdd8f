"""The ONNX Runtime CPU kernel of SlidingWindowAttention against the reference, on every instruction set there is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from longspan.plugins import ort_library_path
from longspan.plugins.errors import InvalidOperands, LibraryMissing
from longspan.plugins.sliding_window_attention.definition import Attributes, infer_shapes
from longspan.plugins.sliding_window_attention.reference import sliding_window_attention

from .ort_kernel_node import DTYPES, Array, assert_close, isas, node_model, rounded, run_node, session
from .sliding_window_cases import CASES, Case

try:
    ort_library_path()
except LibraryMissing as error:
    pytest.skip(str(error), allow_module_level=True)

ISAS = isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sessions made in the test use this instruction set."""
    monkeypatch.setenv("LONGSPAN_CPU_ISA", request.param)
    return str(request.param)


def check(operands: Mapping[str, Array], attributes: Mapping[str, Any], dtype: str) -> None:
    """Compare one node with the reference in float64, within what float32 arithmetic and rounding to `dtype` allow."""
    values = rounded(operands, dtype)
    given = {name.lower(): array for name, array in values.items()}
    want = sliding_window_attention(**given, attributes=Attributes.from_mapping(attributes))
    assert_close(run_node(operands, attributes, dtype), want, values, attributes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: Case, dtype: str, isa: str) -> None:
    for layout in ("bhsd", "bsd"):
        check(case.operands(layout), case.node_attributes(layout), dtype)


def random_site(seed: int) -> tuple[dict[str, Array], dict[str, Any]]:
    """A site of any combination of features, longer than a tile of rows and one of keys."""
    rng = np.random.default_rng(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    def chance() -> bool:
        return bool(rng.random() < 0.4)

    batch, kv_heads, group = pick(1, 2), pick(1, 2), pick(1, 1, 2, 3)
    heads, size, v_size = kv_heads * group, pick(1, 8, 17, 64), pick(3, 16, 40, 64)
    seq_k = int(rng.integers(200, 600))
    seq_q = pick(seq_k, seq_k, 1, int(rng.integers(1, 300)))
    attributes: dict[str, Any] = {"is_causal": int(chance())}
    bounded = rng.random() < 0.8
    attributes["left_window_size"] = int(rng.integers(0, 400)) if bounded else -1
    attributes["right_window_size"] = int(rng.integers(0, 200)) if bounded or chance() else -1
    if chance():
        attributes["dilation"] = [int(d) for d in rng.integers(1, 6, size=pick(1, heads))]
    if chance():
        attributes["softcap"] = pick(0.5, 5.0, 50.0)
    if chance():
        attributes["scale"] = pick(-0.3, 0.05, 1.0)

    def rows(count: int, length: int, width: int) -> Array:
        return rng.standard_normal((batch, count, length, width)).astype(np.float32)

    def projections() -> tuple[Array, Array, Array]:
        return rows(heads, seq_q, size), rows(kv_heads, seq_k, size), rows(kv_heads, seq_k, v_size)

    operands: dict[str, Array] = dict(zip(("Q", "K", "V"), projections(), strict=True))
    if chance():
        operands["attn_mask"] = rng.random((batch, seq_k)) < pick(0.0, 0.5, 0.99)
    if chance() or seq_q == 1:
        operands["nonpad_kv_seqlen"] = rng.integers(0, seq_k + 1, batch)
    if chance():
        operands["global_mask"] = rng.random((batch, seq_k)) < pick(0.0, 0.02, 0.7)
        if chance():
            names = ("global_Q", "global_K", "global_V")
            operands |= dict(zip(names, projections(), strict=True))
    if bounded and chance():
        width = attributes["left_window_size"] + attributes["right_window_size"] + 1
        operands["band_bias"] = rng.standard_normal((pick(1, batch), pick(1, heads), pick(1, seq_q), width))
    if chance():
        operands["sinks"] = rng.standard_normal(heads) * 3
    if chance():
        operands["spans"] = rng.uniform(-40, 300, heads)
        attributes["span_ramp"] = pick(1.0, 32.0)
    if chance():  # 3-D
        for name in ("Q", "K", "V", "global_Q", "global_K", "global_V"):
            if name in operands:
                merged = operands[name].transpose(0, 2, 1, 3)
                operands[name] = merged.reshape(*merged.shape[:2], -1)
        attributes |= {"q_num_heads": heads, "kv_num_heads": kv_heads}
    return operands, attributes


@pytest.mark.parametrize("seed", range(12))
def test_random_sites_longer_than_a_tile(seed: int, isa: str) -> None:
    for index, dtype in enumerate(DTYPES):
        check(*random_site(100 * seed + 10 * ISAS.index(isa) + index), dtype)


def test_large_finite_inputs_and_masked_rows_give_no_nan(isa: str) -> None:
    rng = np.random.default_rng(0)
    shape = (1, 2, 40, 16)
    for dtype, largest in (("float16", 6e4), ("bfloat16", 1e18), ("float32", 1e18)):
        operands: dict[str, Array] = {name: rng.choice([-largest, largest], shape) for name in ("Q", "K")}
        operands["V"] = rng.choice([-1.0, 1.0], shape)
        operands["attn_mask"] = np.arange(40)[None] < 20
        y, lse = run_node(operands, {"left_window_size": 3, "right_window_size": 3}, dtype)
        assert np.isfinite(y).all() and not np.isnan(lse).any()
        assert (y[:, :, 23:] == 0).all() and (lse[:, :, 23:] == -np.inf).all()
        assert (np.abs(y[:, :, :23]).max(-1) > 0.1).all()


def test_garbage_behind_the_valid_keys_is_not_read(isa: str) -> None:
    rng = np.random.default_rng(1)
    operands: dict[str, Array] = {name: rng.standard_normal((1, 1, 30, 8)) for name in ("K", "V")}
    operands["Q"] = rng.standard_normal((1, 1, 4, 8))
    operands["nonpad_kv_seqlen"] = np.array([20])
    attributes = {"left_window_size": 7, "right_window_size": 2}
    clean = run_node(operands, attributes)
    for name in ("K", "V"):
        operands[name][:, :, 20:] = np.nan
    for before, after in zip(clean, run_node(operands, attributes), strict=True):
        np.testing.assert_array_equal(before, after)


def test_one_visible_key_is_copied_exactly(isa: str) -> None:
    rng = np.random.default_rng(2)
    operands = {name: rng.standard_normal((1, 2, 33, 20)) for name in ("Q", "K", "V")}
    (y,) = run_node(operands, {"left_window_size": 0, "right_window_size": 0}, lse=False)
    np.testing.assert_array_equal(y, operands["V"].astype(np.float32))


@pytest.mark.parametrize("features", [(), ("attn_mask", "sinks"), ("nonpad_kv_seqlen", "global_mask")], ids=str)
@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)], ids=str)
def test_empty_dimensions(sizes: tuple[int, int, int], features: tuple[str, ...]) -> None:
    batch, seq_q, seq_k = sizes
    lengths, none = (seq_k,) * batch if "nonpad_kv_seqlen" in features else (), ((),) * batch
    window = {"left_window_size": 1, "right_window_size": 1}
    case = Case("empty", window, features, batch=batch, seq_q=seq_q, seq_k=seq_k, lengths=lengths, global_tokens=none)
    for layout in ("bhsd", "bsd"):
        check(case.operands(layout), case.node_attributes(layout), "float32")


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    operands, attributes = random_site(7)
    model = node_model(operands, attributes)
    one, two = (session(model, threads).run(None, rounded(operands, "float32")) for threads in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def _operands(**shapes: tuple[int, ...]) -> dict[str, Array]:
    kinds = {"attn_mask": bool, "global_mask": bool, "nonpad_kv_seqlen": np.int64}
    full = {"Q": (2, 4, 6, 8), "K": (2, 2, 6, 8), "V": (2, 2, 6, 8)} | shapes
    return {name: np.ones(shape, kinds.get(name, np.float32)) for name, shape in full.items()}


_BANDED = {"left_window_size": 2, "right_window_size": 1}

BAD_SHAPES: list[tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = [
    ({"K": (2, 2, 5, 8)}, {}),
    ({"V": (2, 1, 6, 8)}, {}),
    ({"K": (2, 2, 6, 7)}, {}),
    ({"K": (2, 3, 6, 8), "V": (2, 3, 6, 8)}, {}),
    ({"K": (2, 6, 16)}, {}),
    ({"Q": (2, 6), "K": (2, 6), "V": (2, 6)}, {}),
    ({"Q": (2, 6, 32), "K": (2, 6, 16), "V": (2, 6, 16)}, {}),
    ({"Q": (2, 6, 30), "K": (2, 6, 16), "V": (2, 6, 16)}, {"q_num_heads": 4, "kv_num_heads": 2}),
    ({}, {"q_num_heads": 8}),
    ({}, {"dilation": [1, 2]}),
    ({"attn_mask": (2, 5)}, {}),
    ({"nonpad_kv_seqlen": (3,)}, {}),
    ({"global_mask": (1, 6)}, {}),
    ({"global_Q": (2, 4, 6, 8), "global_mask": (2, 6)}, {}),
    ({"global_Q": (2, 4, 6, 8), "global_K": (2, 2, 6, 8), "global_V": (2, 2, 6, 8)}, {}),
    ({"sinks": (2,)}, {}),
    ({"spans": (4, 1)}, {}),
    ({"band_bias": (1, 1, 1, 4)}, {}),
    ({"band_bias": (1, 1, 1, 5)}, _BANDED),
    ({"band_bias": (2, 3, 1, 4)}, _BANDED),
]


@pytest.mark.parametrize(("shapes", "attributes"), BAD_SHAPES, ids=str)
def test_bad_shapes_fail_with_the_message_of_the_definition(
    shapes: dict[str, tuple[int, ...]], attributes: dict[str, Any]
) -> None:
    operands = _operands(**shapes)
    with pytest.raises(InvalidOperands) as caught:
        infer_shapes({name: array.shape for name, array in operands.items()}, Attributes.from_mapping(attributes))
    with pytest.raises(Exception) as failed:
        run_node(operands, attributes)
    assert f"SlidingWindowAttention: {caught.value}" in str(failed.value)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"left_window_size": -2}, "left_window_size = -2: must be -1 (unbounded), 0 or positive"),
        ({"dilation": [1, 0, 1, 1]}, "dilation = [1, 0, 1, 1]: every value must be 1 or more"),
        ({"left_window_size": 2**31}, "left_window_size = 2147483648: must be at most 2147483647; -1 means unbounded"),
        ({"right_window_size": 2**62}, f"right_window_size = {2**62}: must be at most 2147483647; -1 means unbounded"),
        ({"dilation": [2**63 - 2]}, f"dilation = [{2**63 - 2}]: every value must be at most 2147483647"),
        ({"dilation": [1, 2**31]}, "dilation = [1, 2147483648]: every value must be at most 2147483647"),
        ({"q_num_heads": 2**62}, f"q_num_heads = {2**62}, kv_num_heads = 0: must be at most 2147483647"),
        ({"softcap": -1.0}, "softcap = -1: must be 0 (off) or positive and finite"),
        ({"scale": float("inf")}, "scale = inf: must be finite"),
        ({"span_ramp": 0.0}, "span_ramp = 0: must be positive and finite"),
        ({"q_num_heads": 4, "kv_num_heads": 3}, "q_num_heads = 4 is not a multiple of kv_num_heads = 3"),
        ({"softcap": 50}, "attribute softcap is of another type: must be FLOAT"),
        ({"left_window_size": 4.0}, "attribute left_window_size is of another type: must be INT"),
        ({"dilation": [1.0]}, "attribute dilation is of another type: must be INTS or INT, and not empty"),
    ],
)
def test_bad_attributes_fail_when_the_session_is_made(attributes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception) as failed:
        session(node_model(_operands(), attributes))
    assert message in str(failed.value)


@pytest.mark.parametrize(
    "attributes",
    [
        {"left_window_size": 2**31},
        {"right_window_size": 2**62},
        {"dilation": [2**63 - 2]},
        {"dilation": [1, 2**31]},
        {"q_num_heads": 2**62},
        {"dilation": [1, 0]},
    ],
    ids=str,
)
def test_bad_attributes_fail_with_the_message_of_the_definition(attributes: dict[str, Any]) -> None:
    with pytest.raises(InvalidOperands) as caught:
        Attributes.from_mapping(attributes)
    with pytest.raises(Exception) as failed:
        session(node_model(_operands(), attributes))
    assert str(caught.value) in str(failed.value)


@pytest.mark.parametrize("length", [-1, 7])
def test_lengths_beyond_the_keys_are_refused(length: int) -> None:
    operands = _operands() | {"nonpad_kv_seqlen": np.array([6, length])}
    message = rf"nonpad_kv_seqlen\[1\] = {length}: must be between 0 and the number of keys, 6"
    with pytest.raises(Exception, match=message):
        run_node(operands, {})
    with pytest.raises(InvalidOperands, match=message):
        sliding_window_attention(**{name.lower(): x for name, x in operands.items()}, attributes=Attributes())


def test_an_instruction_set_that_the_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LONGSPAN_CPU_ISA", "avx9000")
    with pytest.raises(Exception, match="LONGSPAN_CPU_ISA = avx9000: this machine has"):
        session(node_model(_operands(), {}))


def test_the_kernel_is_preferred_to_a_function_body(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir as ir
    from longspan.plugins.functions import attach_function_bodies

    model = ir.from_proto(node_model(_operands(), _BANDED))
    attach_function_bodies(model)
    assert model.functions
    session(ir.to_proto(model))
    monkeypatch.setenv("LONGSPAN_CPU_ISA", "none")  # only the kernel reads it
    with pytest.raises(Exception, match="LONGSPAN_CPU_ISA"):
        session(ir.to_proto(model))


def test_scalar_dilation_means_the_same_as_a_list() -> None:
    rng = np.random.default_rng(3)
    operands = {name: rng.standard_normal((1, 2, 20, 8)) for name in ("Q", "K", "V")}
    for a, b in zip(
        run_node(operands, _BANDED | {"dilation": 3}), run_node(operands, _BANDED | {"dilation": [3]}), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_the_shape_of_y_is_known_when_the_model_is_loaded() -> None:
    import onnxruntime

    if int(onnxruntime.__version__.split(".")[1]) < 24:
        pytest.skip("ONNX Runtime below 1.24 crashes on shape inference of ops with optional inputs")
    for dtype in DTYPES:
        made = session(node_model(_operands(), _BANDED, dtype))
        assert made.get_outputs()[0].shape == ["Q_0", "Q_1", "Q_2", "V_3"]
    model = node_model(_operands(Q=(2, 6, 32), K=(2, 6, 16), V=(2, 6, 24)), {"q_num_heads": 4, "kv_num_heads": 2})
    assert session(model).get_outputs()[0].shape == []
    model.graph.input[2].type.tensor_type.shape.dim[2].dim_value = 24
    assert session(model).get_outputs()[0].shape == ["Q_0", "Q_1", 48]


def test_only_the_entry_point_is_exported() -> None:
    import shutil
    import subprocess

    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", ort_library_path()], capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[-1] for line in listing.splitlines()] == ["RegisterCustomOps"]
