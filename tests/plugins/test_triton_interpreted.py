"""The Triton kernels, interpreted on the CPU, against the float64 references."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from longspan.plugins.block_sparse_attention.definition import Attributes as ListAttributes
from longspan.plugins.block_sparse_attention.reference import block_sparse_attention
from longspan.plugins.sliding_window_attention.definition import Attributes as WindowAttributes
from longspan.plugins.sliding_window_attention.reference import sliding_window_attention

from .interpreted import MANY_HEADS, MANY_HEADS_LISTS, NEGATIVE_SCALE, OPERATORS, Run, runs

pytest.importorskip("triton")
Array = npt.NDArray[Any]
ROOT = Path(__file__).parents[2]
RUNS = [(operator, run) for operator, cases in OPERATORS.items() for run in runs(cases)]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Results by operator (or "special") and run, from one process for all."""
    out = tmp_path_factory.mktemp("interpreted") / "results.npz"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.plugins.interpreted", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=900)
    results: dict[str, dict[str, dict[str, Array]]] = {}
    with np.load(out) as arrays:
        for key, array in arrays.items():
            operator, run, what = key.split("\t")
            results.setdefault(operator, {}).setdefault(run, {})[what] = array
    return results


def _reference(operator: str, operands: dict[str, Array], attributes: dict[str, Any]) -> tuple[Array, Array]:
    given = {name.lower(): array.astype(np.float64) if array.dtype.kind in "fV" else array
             for name, array in operands.items()}  # fmt: skip
    if operator == "SlidingWindowAttention":
        return sliding_window_attention(**given, attributes=WindowAttributes.from_mapping(attributes))
    return block_sparse_attention(**given, attributes=ListAttributes.from_mapping(attributes))


def _largest(array: Array) -> float:
    values = np.abs(array.astype(np.float64))
    return float(values[np.isfinite(values)].max(initial=0.0))


def assert_close(result: dict[str, Array], operator: str, operands: dict[str, Array], attributes: dict[str, Any],
                  dtype: str) -> None:  # fmt: skip
    """Hold Y and lse against the reference.

    A score is off by D roundings of products of at most |q|·|k|, and by as many of its own size (scaling, bias, cap); a
    term of the softmax by twice that relative to itself; sums by one rounding a key. In 16-bit types each term is
    rounded before the second product, and Y after it.
    """
    expected_y, expected_lse = _reference(operator, operands, attributes)
    eps = float(np.finfo(np.float32).eps)
    size, keys = operands["Q"].shape[-1], operands["K"].shape[-2 if operands["K"].ndim == 4 else 1]
    queries = max(_largest(operands["Q"]), _largest(operands.get("global_Q", operands["Q"])))
    extra = sum(_largest(operands[name]) for name in ("band_bias", "distance_bias", "sinks") if name in operands)
    score = eps * (size * queries * _largest(operands["K"]) * abs(attributes.get("scale", 1.0)) + 4 * extra + 8)
    values = max(_largest(operands["V"]), _largest(operands.get("global_V", operands["V"])))
    tolerance = values * (2 * score + eps * keys)
    if dtype != "float32":
        tolerance += 2 * values * {"float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    np.testing.assert_allclose(result["y"], expected_y, rtol=0, atol=tolerance)
    finite = np.isfinite(expected_lse)
    np.testing.assert_array_equal(np.isfinite(result["lse"]), finite)
    assert not np.isnan(result["lse"]).any()
    np.testing.assert_allclose(result["lse"][finite], expected_lse[finite], rtol=4 * eps, atol=2 * score + eps * keys)


@pytest.mark.parametrize(("operator", "run"), RUNS, ids=[f"{operator}: {run.name}" for operator, run in RUNS])
def test_kernel_agrees_with_the_reference(operator: str, run: Run, interpreted: Any) -> None:
    result = interpreted[operator][run.name]
    assert str(result["error"]) == ""
    assert_close(result, operator, run.operands(), run.case.node_attributes(run.layout), run.dtype)


@pytest.mark.parametrize("operator", OPERATORS)
def test_cases_take_both_paths(operator: str, interpreted: Any) -> None:
    assert {str(result["path"]) for result in interpreted[operator].values()} == {"whole", "split"}


def test_a_sequence_without_keys_is_zero_and_counts_its_sink(interpreted: Any) -> None:
    result = interpreted["special"]["no keys"]
    assert result["y"].shape == (2, 2, 3, 8)
    assert not result["y"].any()
    assert np.isfinite(result["lse"]).all()


@pytest.mark.parametrize(("name", "shape"), [("no queries", (2, 2, 0, 8)), ("no batch", (0, 2, 3, 8))])
def test_nothing_to_compute_is_no_launch(name: str, shape: tuple[int, ...], interpreted: Any) -> None:
    assert interpreted["special"][name]["y"].shape == shape


@pytest.mark.parametrize(
    ("name", "operator", "case"),
    [
        ("negative scale", "SlidingWindowAttention", NEGATIVE_SCALE),
        ("20 heads a key head", "SlidingWindowAttention", MANY_HEADS),
        ("20 heads a key head, lists", "BlockSparseAttention", MANY_HEADS_LISTS),
    ],
)
def test_more_of_what_is_allowed(name: str, operator: str, case: Any, interpreted: Any) -> None:
    result = interpreted["special"][name]
    assert_close(result, operator, case.operands("bhsd"), case.node_attributes("bhsd"), "float32")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("window, length too long", "nonpad_kv_seqlen[batch 1]"),
        ("window, length negative", "nonpad_kv_seqlen[batch 0]"),
        ("length too long", "nonpad_kv_seqlen[batch 1]"),
        ("kv_num_blocks = 99", "kv_num_blocks[batch 1, head 1, row 2]"),
        ("kv_num_blocks = -1", "kv_num_blocks[batch 1, head 1, row 2]"),
        ("full_kv_num_blocks = 2147483647", "full_kv_num_blocks[batch 1, head 1, row 2]"),
        ("kv_indices = 5", "kv_indices[batch 1, head 1, row 2, slot "),
        ("full_kv_indices = -3", "full_kv_indices[batch 1, head 1, row 2, slot "),
        ("block_mask_ids = 3", "block_mask_ids[batch 1, head 1, row 2, slot "),
        ("block_mask_ids = -2", "block_mask_ids[batch 1, head 1, row 2, slot "),
    ],
)
def test_a_value_out_of_range_is_clamped_and_reported(name: str, place: str, interpreted: Any) -> None:
    result = interpreted["special"][name]
    assert str(result["error"]).startswith(place)
    assert np.isfinite(result["y"]).all()


def test_lists_in_range_report_nothing(interpreted: Any) -> None:
    assert str(interpreted["special"]["all in range"]["error"]) == ""


def test_lists_of_blocks_that_do_not_exist_read_nothing(interpreted: Any) -> None:
    result = interpreted["special"]["lists without keys"]
    assert "kv_indices" in str(result["error"])
    assert not result["y"].any()
    assert np.isneginf(result["lse"]).all()


def test_rows_start_with_the_longest(interpreted: Any) -> None:
    from .block_sparse_cases import Case

    lists = Case("many rows", tall=1, wide=8, seq_q=70, batch=1, repeats=3).operands("bhsd")
    blocks = (lists["kv_num_blocks"] + lists["full_kv_num_blocks"])[0, 0]
    order = interpreted["special"]["many rows"]["buffer row_order"][:70]
    np.testing.assert_array_equal(order, np.argsort(-blocks, kind="stable"))
