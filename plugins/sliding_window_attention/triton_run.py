"""SlidingWindowAttention of torch tensors by the Triton kernels: `plan` once per shape, `run` as often as needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

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

    inputs = {name: tuple(tensor.shape) for name, tensor in operands.items()}
    shapes = infer_shapes(inputs, attributes)
    given: dict[str, Any] = {name: value for name, value in asdict(attributes).items() if value is not None}
    dtype = str(operands["Q"].dtype).removeprefix("torch.")
    site = launch.site_of("SlidingWindowAttention", shapes, dtype, inputs, given, lse)
    architecture, multiprocessors = launch.device_facts(operands["Q"])
    return launch.plan(recipe(site, architecture, tiles, few_rows), shapes, inputs, multiprocessors, attributes.scale)


def sliding_window_attention(
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
        InvalidOperands: a shape contradicts the definition, or with `check` a value of nonpad_kv_seqlen.
        NoKernel: no kernel covers the call.
    """
    planned = plan(operands, attributes, lse=lse)
    buffers = launch.allocate(planned, operands["Q"].device)
    results = launch.run(planned, operands, buffers)
    if check:
        launch.check_status(buffers.get("status"), planned.inputs)
    return results
