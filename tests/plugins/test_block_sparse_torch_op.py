"""The torch op of BlockSparseAttention against the reference, and its translation to one ONNX node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from longspan.plugins.block_sparse_attention.torch_op import block_sparse_attention, block_sparse_attention_lse
from longspan.plugins.errors import InvalidOperands
from longspan.plugins.torch_ops import onnx_translation_table
from longspan.plugins.torch_support import PATTERN

from .block_sparse_cases import CASES, Case, expected

EVERYTHING = next(case for case in CASES if case.name == "everything")


def tensors(case: Case, layout: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The operands of a case by argument name; floating-point ones in `dtype`."""
    given = {name.lower(): torch.from_numpy(np.ascontiguousarray(a)) for name, a in case.operands(layout).items()}
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}


@pytest.mark.parametrize("layout", ["bhsd", "bsd"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64_agrees_with_the_reference(case: Case, layout: str) -> None:
    given, attributes = tensors(case, layout, torch.float64), case.node_attributes(layout)
    y, lse = block_sparse_attention_lse(**given, **attributes)
    want_y, want_lse = expected(case, layout)
    np.testing.assert_allclose(y.numpy(), want_y, rtol=0, atol=1e-13)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=0, atol=1e-13)
    assert torch.equal(block_sparse_attention(**given, **attributes), y)


@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, 0), (2, 0, 0)], ids=str)
def test_empty_dimensions(sizes: tuple[int, int, int]) -> None:
    batch, seq_q, seq_k = sizes
    case = Case("empty", features=("sinks", "distance_bias"), batch=batch, seq_q=seq_q, seq_k=seq_k)
    got = block_sparse_attention_lse(**tensors(case, "bhsd", torch.float64), **case.node_attributes("bhsd"))
    for mine, want in zip(got, expected(case, "bhsd"), strict=True):
        np.testing.assert_allclose(mine.numpy(), want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["everything", "padding", "listed several times", "grouped heads"])
def test_lower_precision_accumulates_in_float32(name: str, dtype: torch.dtype) -> None:
    case = next(case for case in CASES if case.name == name)
    given = tensors(case, "bhsd", dtype)
    formal = {"q": "Q", "k": "K", "v": "V"}
    exact = {
        formal.get(name, name): tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
        for name, tensor in given.items()
    }
    want_y, want_lse = expected(case, "bhsd", exact)
    y, lse = block_sparse_attention_lse(**given, **case.node_attributes("bhsd"))
    assert (y.dtype, lse.dtype) == (dtype, torch.float32)
    half_ulp = 0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    float32 = 4 * 16 * torch.finfo(torch.float32).eps  # |V| < 4; a score below 16 is off by 16 eps
    np.testing.assert_allclose(y.double().numpy(), want_y, rtol=half_ulp, atol=float32)
    np.testing.assert_allclose(lse.double().numpy(), want_lse, rtol=0, atol=float32)


@pytest.mark.parametrize("name", ["plain", "everything", "decode"])
def test_opcheck(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    for layout in ("bhsd", "bsd"):
        given, attributes = tensors(case, layout, torch.float32), case.node_attributes(layout)
        for op in (torch.ops.longspan.block_sparse_attention, torch.ops.longspan.block_sparse_attention_lse):
            torch.library.opcheck(
                op.default, (), {**given, **attributes}, test_utils=("test_schema", "test_faketensor")
            )


BAD = [
    ({"kv_num_blocks": -1}, "kv_num_blocks[batch 0, head 0, row 2] = -1: must be between 0 and 6"),
    ({"kv_num_blocks": 7}, "kv_num_blocks[batch 0, head 0, row 2] = 7: must be between 0 and 6"),
    ({"full_kv_num_blocks": 99}, "full_kv_num_blocks[batch 0, head 0, row 2] = 99: must be between 0 and"),
    ({"kv_indices": -1}, "kv_indices[batch 0, head 0, row 2, slot 0] = -1: must be between 0 and 4"),
    ({"kv_indices": 5}, "kv_indices[batch 0, head 0, row 2, slot 0] = 5: must be between 0 and 4"),
    ({"full_kv_indices": 2**31 - 1}, "full_kv_indices[batch 0, head 0, row 2, slot 0] = 2147483647: must be"),
    ({"block_mask_ids": 3}, "block_mask_ids[batch 0, head 0, row 2, slot 0] = 3: must be between -1 and 2"),
    ({"block_mask_ids": -2}, "block_mask_ids[batch 0, head 0, row 2, slot 0] = -2: must be between -1 and 2"),
]
"""A value to write at row 2 of a list of the case `BAD_CASE`, and the beginning of what every execution says to it."""

BAD_CASE = Case("bad lists", features=("block_masks",), density=0.6, batch=1)


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda value: str(value))
def test_bad_lists_name_their_row(change: dict[str, int], message: str) -> None:
    given = tensors(BAD_CASE, "bhsd", torch.float32)
    for name, value in change.items():
        given[name].reshape(-1, *given[name].shape[2:])[0, 2, ...].view(-1)[0] = value
    with pytest.raises(InvalidOperands) as caught:
        block_sparse_attention(**given, **BAD_CASE.node_attributes("bhsd"))
    assert str(caught.value).startswith(message)


SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"kv_num_blocks": (1, 1, 4)}, "kv_num_blocks has shape (1, 1, 4): must be (1|1, 1|2, 5)"),
    ({"kv_indices": (1, 1, 4, 3)}, "kv_indices has shape (1, 1, 4, 3): must be (1|1, 1|2, 5, 3)"),
    (
        {"kv_indices": (1, 2, 5, 3)},
        "kv_indices has shape (1, 2, 5, 3) beside kv_num_blocks (1, 1, 5): must begin",
    ),
    ({"block_mask_ids": (1, 1, 5, 9)}, "block_mask_ids has shape (1, 1, 5, 9): must be (1, 1, 5, 6)"),
    ({"block_masks": (3, 4, 2)}, "block_masks has shape (3, 4, 2): must be (M, 4, 1)"),
    ({"attn_mask": (1, 7)}, "attn_mask has shape (1, 7): must be (1, 19)"),
    ({"q_positions": (1, 1, 19)}, "q_positions present: q_positions and k_positions come together or not at all"),
    ({"distance_bias": (1, 19)}, "distance_bias has shape (1, 19): must be (1|2, 37)"),
    ({"q_block_size": 0}, "q_block_size = 0: must be between 1 and 2147483647"),
    ({"scale": float("inf")}, "scale = inf: must be finite"),
]


@pytest.mark.parametrize(("change", "message"), SHAPES, ids=lambda value: str(value)[:40])
def test_bad_shapes_and_attributes(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {**tensors(BAD_CASE, "bhsd", torch.float32), **BAD_CASE.node_attributes("bhsd")}
    types = {"attn_mask": torch.bool, "distance_bias": torch.float32, "block_masks": torch.uint8}
    for name, value in change.items():
        given[name] = torch.zeros(value, dtype=types.get(name, torch.int32)) if isinstance(value, tuple) else value
    with pytest.raises(InvalidOperands) as caught:
        block_sparse_attention(**given)
    assert str(caught.value).startswith(message)


def test_types_are_checked() -> None:
    given = tensors(BAD_CASE, "bhsd", torch.float32)
    given["kv_indices"] = given["kv_indices"].long()
    with pytest.raises(InvalidOperands, match=r"kv_indices is torch.int64: must be torch.int32"):
        block_sparse_attention(**given, **BAD_CASE.node_attributes("bhsd"))


def test_becomes_one_node_that_carries_its_pattern() -> None:
    """Lists that are computed from a dynamic length inside the model."""

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = (x.shape[1] + 7) // 8
            block = torch.arange(rows, dtype=torch.int32)
            own = torch.ones((1, 1, rows), dtype=torch.int32)
            return block_sparse_attention(
                x, x, x, 0 * own, own[..., :0, None], own, block[None, None, :, None], q_num_heads=2, kv_num_heads=2,
                q_block_size=8, kv_block_size=8, is_causal=True, pattern='{"kind": "own block"}',
            )  # fmt: skip

    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    program = torch.onnx.export(
        Model(), (torch.randn(2, 24, 16),), dynamic_shapes=(dims,), dynamo=True, opset_version=20,
        custom_translation_table=onnx_translation_table(), verbose=False,
    )  # fmt: skip
    assert program is not None
    [node] = [node for node in program.model.graph if node.domain == "longspan"]
    assert node.metadata_props[PATTERN] == '{"kind": "own block"}'
    assert len(node.inputs) == 7
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    wanted = {"q_block_size": 8, "kv_block_size": 8, "is_causal": 1, "q_num_heads": 2, "kv_num_heads": 2}
    assert attributes == {**wanted, "scale": pytest.approx(8**-0.5)}
    saved = ir.serde.deserialize_model(ir.serde.serialize_model(program.model))
    assert [node.metadata_props.get(PATTERN) for node in saved.graph if node.domain == "longspan"] == [
        '{"kind": "own block"}'
    ]
