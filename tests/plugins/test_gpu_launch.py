"""Plans of GPU launches: made from shapes alone, on any machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from longspan.plugins.errors import InvalidOperands
from longspan.plugins.gpu.expressions import InvalidExpression, evaluate, names
from longspan.plugins.gpu.launch import LaunchPlan, check_status
from longspan.plugins.gpu.variants import NoKernel
from longspan.plugins.sliding_window_attention.definition import Attributes
from longspan.plugins.sliding_window_attention.triton_run import plan


def planned(seq_q: int, seq_k: int, heads: int = 32, kv_heads: int = 8, more: dict[str, Any] | None = None,
            **attributes: Any) -> LaunchPlan:  # fmt: skip
    """The plan of a call on tensors without memory."""
    operands = {
        name: torch.empty(1, count, length, 128, dtype=torch.float16, device="meta")
        for name, count, length in (("Q", heads, seq_q), ("K", kv_heads, seq_k), ("V", kv_heads, seq_k))
    }
    return plan(operands | (more or {}), Attributes(**attributes))


def test_a_decode_step_splits_the_window_and_not_the_cache() -> None:
    short, long = (
        planned(1, keys, left_window_size=4095, right_window_size=0, is_causal=True) for keys in (4096, 2**20)
    )
    assert short.path.name == long.path.name == "split"
    assert short.sizes["splits"] == long.sizes["splits"] > 1
    assert short.workspace_bytes == long.workspace_bytes == 4 * short.sizes["splits"] * 32 * (128 + 1)
    assert short.grid(short.path.kernels[0]) == (8, short.sizes["splits"], 1)


def test_many_rows_need_no_buffers() -> None:
    made = planned(8192, 8192, left_window_size=256, right_window_size=256)
    assert made.path.name == "whole"
    assert made.workspace_bytes == 0
    (kernel,) = made.path.kernels
    rows = kernel.constexprs["BLOCK_M"] // 4  # four query heads share a tile
    assert made.grid(kernel) == (8192 // rows * 8, 1, 1)


def test_tiles_of_a_dilation_begin_in_every_residue() -> None:
    made = planned(1000, 1000, heads=2, kv_heads=2, left_window_size=8, right_window_size=8, dilation=(1, 300))
    assert made.sizes["tiles"] == 300  # of four rows each
    assert made.path.kernels[0].constexprs["DILATIONS"] == (1, 300)


def test_sizes_beyond_int32_are_refused() -> None:
    with pytest.raises(NoKernel, match="1073741823"):
        planned(1, 2**30)


def test_global_tokens_take_kernels_of_their_own() -> None:
    mask = torch.empty(1, 8192, dtype=torch.bool, device="meta")
    made = planned(8192, 8192, more={"global_mask": mask}, left_window_size=256, right_window_size=256)
    functions = [kernel.function.partition(":")[2] for kernel in made.path.kernels]
    assert functions == ["collect_global", "window_forward", "global_rows_forward", "merge_parts"]


def test_status_names_the_place() -> None:
    status = torch.zeros(8, dtype=torch.int32)
    inputs = {"nonpad_kv_seqlen": (4,), "kv_indices": (2, 3, 5, 7)}
    check_status(status, inputs)
    check_status(None, inputs)
    status[2] = 1 + ((1 * 3 + 2) * 5 + 4) * 7 + 6
    with pytest.raises(InvalidOperands, match=r"kv_indices\[batch 1, head 2, row 4, slot 6\]"):
        check_status(status, inputs)


def test_expressions() -> None:
    sizes = {"S_q": 1000, "B": 3}
    assert evaluate("cdiv(S_q, 128) * B + max(1, B - 2, 0) // 1 % 7", sizes) == 25
    assert evaluate("le(B, 3) + le(S_q, 999) + both(B, S_q) + both(B, 0)", sizes) == 2
    assert names("cdiv(S_q, 128) * B") == {"S_q", "B"}


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("S_q +", "not a size expression"),
        ("S_q / 2", "holds a BinOp"),
        ("S_q ** 2", "holds a BinOp"),
        ("1.5", "holds a Constant"),
        ("True", "holds a Constant"),
        ("open(S_q)", "holds a Call"),
        ("min(S_q)", "holds a Call"),
        ("S_q.real", "holds a Attribute"),
        ("H * 2", "needs H"),
        ("S_q // (B - 3)", "divides by zero"),
    ],
)
def test_what_is_no_expression_is_refused(expression: str, reason: str) -> None:
    with pytest.raises(InvalidExpression, match=reason):
        evaluate(expression, {"S_q": 1000, "B": 3})
