"""BlockSparseAttention of torch tensors by the Triton kernels: `plan` once per shape, `run` as often as needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..gpu import launch
from ..gpu.launch import LaunchPlan
from ..gpu.tiles import Tile
from .definition import Attributes, infer_shapes

if TYPE_CHECKING:
    import torch


def plan(
    operands: Mapping[str, torch.Tensor],
    attributes: Attributes,
    *,
    lse: bool = False,
    tiles: tuple[Tile, Tile] | None = None,
    few_rows: int | None = None,
) -> LaunchPlan:
    """Check the shapes and lay out the launches. Reads no tensor.

    Args:
        operands: Inputs by formal name.
        attributes: The node's attributes.
        lse: Whether the log-sum-exp is wanted.
        tiles: Tiles for many and for few rows, instead of the tuned ones.
        few_rows: Largest S_q for which keys are split, instead of the recipe's own.

    Raises:
        InvalidOperands: a shape contradicts the definition.
        NoKernel: no kernel covers the call.
    """
    from .triton_variants import recipe

    return launch.plan_node("BlockSparseAttention", (infer_shapes, recipe), operands, attributes, lse, tiles, few_rows)


def block_sparse_attention(
    operands: Mapping[str, torch.Tensor], attributes: Attributes, *, lse: bool = False, check: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Plan and run.

    Args:
        operands: Inputs by formal name, on one device.
        attributes: The node's attributes.
        lse: Whether the log-sum-exp is wanted.
        check: Whether to wait for the device and raise what it found out of range.

    Returns:
        (Y, lse or None).

    Raises:
        InvalidOperands: a shape contradicts the definition, or with `check` a value of the lists or lengths.
        NoKernel: no kernel covers the call.
    """
    return launch.execute(plan(operands, attributes, lse=lse), operands, check)
