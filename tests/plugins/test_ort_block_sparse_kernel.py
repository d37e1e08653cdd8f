"""The ONNX Runtime CPU kernel of BlockSparseAttention against the reference, on every instruction set there is."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from longspan.plugins import ort_library_path
from longspan.plugins.block_sparse_attention.definition import Attributes, ListBounds, check_lists, infer_shapes
from longspan.plugins.block_sparse_attention.reference import block_sparse_attention
from longspan.plugins.errors import InvalidOperands, LibraryMissing

from . import ort_kernel_node
from .block_sparse_cases import CASES, LISTS, Case
from .ort_kernel_node import DTYPES, EPS32, Array, assert_close, isas, rounded, session

try:
    ort_library_path()
except LibraryMissing as error:
    pytest.skip(str(error), allow_module_level=True)

NAME = "BlockSparseAttention"
ISAS = isas()
node_model = partial(ort_kernel_node.node_model, name=NAME)
run_node = partial(ort_kernel_node.run_node, name=NAME)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sessions made in the test use this instruction set."""
    monkeypatch.setenv("LONGSPAN_CPU_ISA", request.param)
    return str(request.param)


def check(operands: Mapping[str, Array], attributes: Mapping[str, Any], dtype: str) -> None:
    """Compare one node with the reference in float64, within what float32 arithmetic and rounding to `dtype` allow."""
    values = rounded(operands, dtype)
    given = {name.lower(): array for name, array in values.items()}
    want = block_sparse_attention(**given, attributes=Attributes.from_mapping(attributes))
    assert_close(run_node(operands, attributes, dtype), want, values, attributes, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_reference(case: Case, dtype: str, isa: str) -> None:
    for layout in ("bhsd", "bsd"):
        check(case.operands(layout), case.node_attributes(layout), dtype)


def random_case(seed: int) -> tuple[Case, str]:
    """A site of any combination of features, longer than a tile of rows and one of keys, and its layout."""
    rng = np.random.default_rng(seed)

    def pick(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    def chance() -> bool:
        return bool(rng.random() < 0.4)

    batch, kv_heads = pick(1, 2), pick(1, 2)
    heads = kv_heads * pick(1, 1, 2, 3)
    seq_k = int(rng.integers(200, 600))
    features = [
        name
        for name in ("block_masks", "attn_mask", "nonpad_kv_seqlen", "sinks", "q_positions", "distance_bias")
        if chance()
    ]
    attributes: dict[str, Any] = {"is_causal": int(chance()), "exclude_self": int(chance())}
    if chance():
        attributes["softcap"] = pick(0.5, 5.0, 50.0)
    if chance():
        attributes["scale"] = pick(-0.3, 0.05, 1.0)
    case = Case(
        f"random {seed}",
        tall=pick(1, 16, 40, 64, 128),
        wide=pick(8, 33, 64, 128, 300),
        attributes=attributes,
        features=tuple(features),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        seq_q=pick(seq_k, seq_k, 1, int(rng.integers(1, 300))),
        seq_k=seq_k,
        size=pick(1, 8, 17, 64),
        v_size=pick(3, 16, 40, 64),
        shared=(pick(1, batch), pick(1, heads)),
        density=pick(0.1, 0.5, 1.0, None) if "block_masks" not in features else pick(0.1, 0.5, 1.0),
        repeats=pick(1, 1, 5),
        lengths=tuple(int(length) for length in rng.integers(0, seq_k + 1, batch)),
        padded=tuple(sorted(int(edge) for edge in rng.integers(0, seq_k, 2)) for _ in range(batch)),  # type: ignore[misc]
        bias_heads=pick(1, heads),
        own_positions=chance(),
    )
    return case, pick("bhsd", "bsd")


@pytest.mark.parametrize("seed", range(12))
def test_random_sites_longer_than_a_tile(seed: int, isa: str) -> None:
    for index, dtype in enumerate(DTYPES):
        case, layout = random_case(100 * seed + 10 * ISAS.index(isa) + index)
        check(case.operands(layout), case.node_attributes(layout), dtype)


def test_a_block_listed_m_times_weighs_m_fold(isa: str) -> None:
    """Every block m times: the same Y, and log(m) more in the lse; more than the lists could hold distinct blocks."""
    case = Case("many times", tall=16, wide=16, seq_q=100, density=None)
    operands = case.operands("bhsd")
    y, lse = run_node(operands, case.node_attributes("bhsd"))
    operands["full_kv_num_blocks"] = operands["full_kv_num_blocks"] * 1000
    operands["full_kv_indices"] = np.tile(operands["full_kv_indices"], 1000)
    many_y, many_lse = run_node(operands, case.node_attributes("bhsd"))
    np.testing.assert_allclose(many_y, y, rtol=8 * EPS32, atol=8 * EPS32)
    np.testing.assert_allclose(many_lse, lse + np.log(1000), rtol=4 * EPS32)


def test_partial_without_masks_and_full_lists_mean_the_same(isa: str) -> None:
    case = Case("either list", tall=16, wide=16, seq_q=100, density=0.5)
    operands = case.operands("bhsd")
    operands["kv_num_blocks"] = np.zeros_like(operands["kv_num_blocks"])
    swapped = dict(operands)
    for own, other in zip(LISTS, (*LISTS[2:], *LISTS[:2]), strict=True):
        swapped[own] = operands[other]
    for a, b in zip(
        run_node(operands, case.node_attributes("bhsd")),
        run_node(swapped, case.node_attributes("bhsd")),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_the_order_of_a_list_does_not_matter(isa: str) -> None:
    case = Case("any order", tall=32, wide=16, seq_q=300, density=0.6, features=("block_masks",), repeats=3)
    operands = case.operands("bhsd")
    backwards = dict(operands)
    for counts, lists in (("kv_num_blocks", ("kv_indices", "block_mask_ids")),
                          ("full_kv_num_blocks", ("full_kv_indices",))):  # fmt: skip
        for name in lists:
            backwards[name] = operands[name].copy()
            for row in np.ndindex(operands[counts].shape):
                count = int(operands[counts][row])
                backwards[name][row][:count] = operands[name][row][:count][::-1]
    assert (operands["kv_num_blocks"] > 1).any() and (operands["full_kv_num_blocks"] > 1).any()
    for a, b in zip(
        run_node(operands, case.node_attributes("bhsd")),
        run_node(backwards, case.node_attributes("bhsd")),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("length", [64, 257, 600])
def test_a_window_as_blocks_agrees_with_the_windowed_operator(length: int, isa: str) -> None:
    rng = np.random.default_rng(length)
    operands = {name: rng.standard_normal((1, 4, length, 32)) for name in ("Q", "K", "V")}
    left, right, tall, wide = 70, 33, 32, 64
    want = ort_kernel_node.run_node(operands, {"left_window_size": left, "right_window_size": right})
    rows, columns = -(-length // tall), -(-length // wide)
    q, k = np.arange(rows * tall)[:, None], np.arange(columns * wide)
    tiles = ((k >= q - left) & (k <= q + right)).reshape(rows, tall, columns, wide).swapaxes(1, 2)
    hit, whole = tiles.any((2, 3)), tiles.all((2, 3))
    counts = [(hit & ~whole).sum(1), whole.sum(1)]
    width = int(max(counts[0].max(), counts[1].max()))
    lists = [np.zeros((rows, width), np.int32) for _ in counts]
    ids = np.full((rows, width), -1, np.int32)
    for row in range(rows):
        for listed, blocks in zip(lists, ((hit & ~whole)[row], whole[row]), strict=True):
            (chosen,) = blocks.nonzero()
            listed[row, : len(chosen)] = chosen
        ids[row, : counts[0][row]] = counts[0][:row].sum() + np.arange(counts[0][row])
    given = operands | {
        "kv_num_blocks": counts[0].astype(np.int32)[None, None],
        "kv_indices": lists[0][None, None],
        "full_kv_num_blocks": counts[1].astype(np.int32)[None, None],
        "full_kv_indices": lists[1][None, None],
        "block_mask_ids": ids[None, None],
        "block_masks": np.packbits(tiles[hit & ~whole], axis=-1, bitorder="little"),
    }
    got = run_node(given, {"q_block_size": tall, "kv_block_size": wide})
    np.testing.assert_allclose(got[0], want[0], atol=32 * EPS32)
    np.testing.assert_allclose(got[1], want[1], atol=32 * EPS32)


def test_large_finite_inputs_and_empty_rows_give_no_nan(isa: str) -> None:
    rng = np.random.default_rng(0)
    case = Case("large", tall=10, wide=8, seq_q=40, density=0.5, batch=1)
    for dtype, largest in (("float16", 6e4), ("bfloat16", 1e18), ("float32", 1e18)):
        operands = case.operands("bhsd")
        for name in ("Q", "K"):
            operands[name] = rng.choice([-largest, largest], operands[name].shape)
        operands["V"] = rng.choice([-1.0, 1.0], operands["V"].shape)
        operands["kv_num_blocks"][..., 1] = operands["full_kv_num_blocks"][..., 1] = 0
        y, lse = run_node(operands, case.node_attributes("bhsd"), dtype)
        assert np.isfinite(y).all() and not np.isnan(lse).any()
        assert (y[:, :, 10:20] == 0).all() and (lse[:, :, 10:20] == -np.inf).all()


@pytest.mark.parametrize("features", [(), ("attn_mask", "sinks"), ("nonpad_kv_seqlen", "distance_bias")], ids=str)
@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0), (2, 1, 0)], ids=str)
def test_empty_dimensions(sizes: tuple[int, int, int], features: tuple[str, ...]) -> None:
    batch, seq_q, seq_k = sizes
    lengths = (seq_k,) * batch if "nonpad_kv_seqlen" in features else ()
    case = Case("empty", features=features, batch=batch, seq_q=seq_q, seq_k=seq_k, lengths=lengths, tall=3, wide=3)
    for layout in ("bhsd", "bsd"):
        check(case.operands(layout), case.node_attributes(layout), "float32")


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    case, layout = random_case(7)
    operands = case.operands(layout)
    model = node_model(operands, case.node_attributes(layout))
    one, two = (session(model, threads).run(None, rounded(operands, "float32")) for threads in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


# Two batch entries, four heads on two, 10 queries and 7 keys: 3 rows of 2 blocks.
_SITE = Case("site", heads=4, seq_q=10, seq_k=7, shared=(2, 4), density=1.0, features=("block_masks",))


def _operands(**shapes: tuple[int, ...]) -> dict[str, Array]:
    operands = _SITE.operands("bhsd")
    kinds: dict[str, Any] = {"attn_mask": bool, "nonpad_kv_seqlen": np.int64, "block_masks": np.uint8}
    integers = {*LISTS, "block_mask_ids", "q_positions", "k_positions"}
    for name, shape in shapes.items():
        operands[name] = np.zeros(shape, kinds.get(name, np.int32 if name in integers else np.float32))
    return operands


BAD_SHAPES: list[tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = [
    ({"K": (2, 2, 5, 8)}, {}),
    ({"V": (2, 1, 7, 8)}, {}),
    ({"Q": (2, 6), "K": (2, 6), "V": (2, 6)}, {}),
    ({}, {"q_num_heads": 8}),
    ({}, {"q_block_size": 5}),
    ({}, {"kv_block_size": 32}),
    ({"kv_num_blocks": (2, 4, 4)}, {}),
    ({"kv_num_blocks": (2, 3)}, {}),
    ({"kv_num_blocks": (3, 4, 3)}, {}),
    ({"kv_indices": (2, 4, 3)}, {}),
    ({"kv_indices": (2, 1, 3, 3)}, {}),
    ({"full_kv_num_blocks": (1, 2, 3)}, {}),
    ({"full_kv_indices": (1, 4, 3, 3)}, {}),
    ({"block_mask_ids": (2, 4, 3, 1)}, {}),
    ({"block_masks": (2, 4, 2)}, {}),
    ({"block_masks": (4, 1)}, {}),
    ({"attn_mask": (2, 10)}, {}),
    ({"nonpad_kv_seqlen": (1,)}, {}),
    ({"sinks": (2,)}, {}),
    ({"q_positions": (1, 1, 10)}, {}),
    ({"k_positions": (1, 1, 7)}, {}),
    ({"q_positions": (1, 1, 9), "k_positions": (1, 1, 7)}, {}),
    ({"q_positions": (1, 1, 10), "k_positions": (1, 4, 7)}, {}),
    ({"distance_bias": (1, 17)}, {}),
    ({"distance_bias": (2, 16)}, {}),
]


@pytest.mark.parametrize(("shapes", "attributes"), BAD_SHAPES, ids=str)
def test_bad_shapes_fail_with_the_message_of_the_definition(
    shapes: dict[str, tuple[int, ...]], attributes: dict[str, Any]
) -> None:
    operands, attributes = _operands(**shapes), _SITE.node_attributes("bhsd") | attributes
    with pytest.raises(InvalidOperands) as caught:
        infer_shapes({name: array.shape for name, array in operands.items()}, Attributes.from_mapping(attributes))
    with pytest.raises(Exception) as failed:
        run_node(operands, attributes)
    assert f"{NAME}: {caught.value}" in str(failed.value)


def test_masks_and_ids_come_together() -> None:
    for name in ("block_masks", "block_mask_ids"):
        operands = _operands()
        del operands[name]
        with pytest.raises(InvalidOperands) as caught:
            infer_shapes({name: array.shape for name, array in operands.items()}, Attributes(4, 4))
        with pytest.raises(Exception) as failed:
            run_node(operands, _SITE.node_attributes("bhsd"))
        assert f"{NAME}: {caught.value}" in str(failed.value)


@pytest.mark.parametrize(
    "attributes",
    [
        {"q_block_size": 0},
        {"q_block_size": 2**31},
        {"kv_block_size": -3},
        {"kv_block_size": 2**62},
        {"softcap": -1.0},
        {"q_num_heads": 4, "kv_num_heads": 3},
        {"q_num_heads": 2**62},
    ],
    ids=str,
)
def test_bad_attributes_fail_when_the_session_is_made(attributes: dict[str, Any]) -> None:
    with pytest.raises(InvalidOperands) as caught:
        Attributes.from_mapping(attributes)
    with pytest.raises(Exception) as failed:
        session(node_model(_operands(), attributes))
    assert str(caught.value).replace("-1.0", "-1") in str(failed.value)


_LAST = None  # the last entry of a list that is read

SPOILED: dict[str, list[tuple[str, tuple[int, ...] | None, int]]] = {
    "count below 0": [("kv_num_blocks", (1, 2, 0), -1)],
    "count above the width": [("kv_num_blocks", (0, 3, 2), 4)],
    "count of full blocks": [("full_kv_num_blocks", (1, 3, 2), 2**31 - 1)],
    "index below 0": [("kv_indices", (0, 1, 2, 0), -1)],
    "index above the blocks": [("kv_indices", _LAST, 2)],
    "index of a full block": [("full_kv_indices", _LAST, -(2**31))],
    "mask id below -1": [("block_mask_ids", (1, 0, 1, 1), -2)],
    "mask id above the masks": [("block_mask_ids", _LAST, 3)],
    "the first of two": [("kv_indices", (1, 0, 0, 0), 9), ("kv_indices", (0, 3, 0, 1), 8)],
    "counts before indices": [("kv_indices", (0, 0, 0, 0), 9), ("kv_num_blocks", (1, 3, 2), -7)],
}


@pytest.mark.parametrize("changes", SPOILED.values(), ids=SPOILED.keys())
def test_bad_lists_fail_with_the_message_of_the_definition(
    changes: list[tuple[str, tuple[int, ...] | None, int]], isa: str
) -> None:
    operands = _operands()
    check(operands, _SITE.node_attributes("bhsd"), "float32")
    for name, place, value in changes:
        counts = operands["full_kv_num_blocks" if name.startswith("full") else "kv_num_blocks"]
        operands[name][place or (1, 3, 2, counts[1, 3, 2] - 1)] = value
    with pytest.raises(InvalidOperands) as caught:
        lists = {name: operands[name] for name in (*LISTS, "block_mask_ids")}
        check_lists(lists, ListBounds(kv_blocks=2, masks=len(operands["block_masks"])))
    with pytest.raises(Exception) as failed:
        run_node(operands, _SITE.node_attributes("bhsd"))
    assert f"{NAME}: {caught.value}" in str(failed.value)


def test_entries_that_no_count_reaches_are_not_looked_at() -> None:
    operands = _operands()
    clean = run_node(operands, _SITE.node_attributes("bhsd"))
    for counts, lists in (("kv_num_blocks", ("kv_indices", "block_mask_ids")),
                          ("full_kv_num_blocks", ("full_kv_indices",))):  # fmt: skip
        for name in lists:
            unread = np.arange(operands[name].shape[-1]) >= operands[counts][..., None]
            assert unread.any()
            operands[name][unread] = np.resize(np.array([-(2**31), 2**31 - 1], np.int32), int(unread.sum()))
    for before, after in zip(clean, run_node(operands, _SITE.node_attributes("bhsd")), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("length", [-1, 8])
def test_lengths_beyond_the_keys_are_refused(length: int) -> None:
    operands = _operands() | {"nonpad_kv_seqlen": np.array([6, length])}
    message = rf"nonpad_kv_seqlen\[1\] = {length}: must be between 0 and the number of keys, 7"
    with pytest.raises(Exception, match=message):
        run_node(operands, _SITE.node_attributes("bhsd"))


def test_the_shape_of_y_is_known_when_the_model_is_loaded() -> None:
    import onnxruntime

    if int(onnxruntime.__version__.split(".")[1]) < 24:
        pytest.skip("ONNX Runtime below 1.24 crashes on shape inference of ops with optional inputs")
    for dtype in DTYPES:
        made = session(node_model(_operands(), _SITE.node_attributes("bhsd"), dtype))
        assert made.get_outputs()[0].shape == ["Q_0", "Q_1", "Q_2", "V_3"]
