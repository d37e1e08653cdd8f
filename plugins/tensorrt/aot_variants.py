"""Which kernel a node takes as an ahead-of-time plugin of TensorRT: one launch, no scratch memory, int32 numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..gpu.build import tile_kind, widest
from ..gpu.pack_build import PTX, PTX_ARCHITECTURE, Target
from ..gpu.tiles import Tile
from ..gpu.tuning import choose
from ..gpu.variants import (
    ARCHITECTURES,
    ELEMENT_SIZES,
    Constant,
    KernelSite,
    KernelVariant,
    NoKernel,
    Parameter,
    Path,
    Recipe,
)
from ..registry import operator as definition_of

SHARED_LIMIT = 48 * 1024
"""Bytes of shared memory that a kernel has without its launcher asking for more; nothing tells TensorRT to ask."""

LAYOUTS = ("bhsd", "bsd")
"""Q, K, V and Y with 4 axes, and with 3."""

_ENTRIES = {"SlidingWindowAttention": "window_entry", "BlockSparseAttention": "block_sparse_entry"}
_TILES = {"Q", "K", "V", "Y"}
_NEEDLESS = {"row_order", "status"}
"""Buffers whose kernel does without: the order of rows is speed, the status is what no launcher here would read."""


_BUDGETS = (SHARED_LIMIT, SHARED_LIMIT * 3 // 4, SHARED_LIMIT // 2)
"""What tiles are cut for, one after the other: how much a kernel takes in the end, only its compilation tells."""


def aot_recipes(site: KernelSite, layout: str, architecture: int) -> tuple[tuple[Recipe, ...], ...]:
    """The ways to execute a site with one kernel that TensorRT can launch, for it to time: by tall tiles and flat ones.

    Args:
        site: The node.
        layout: ``"bhsd"`` or ``"bsd"``; TensorRT passes no strides.
        architecture: Compute capability.

    Returns:
        For each way recipes with smaller and smaller tiles, of which the first is taken that fits `SHARED_LIMIT`. Each
        has one path with one kernel, whose parameters are inputs, int32 and outputs, in this order.

    Raises:
        NoKernel: the site needs several launches or scratch memory, or no tile fits `SHARED_LIMIT`.
        ValueError: there is no such layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: must be one of {', '.join(LAYOUTS)}")
    if architecture not in ARCHITECTURES:
        known = ", ".join(f"sm_{known}" for known in ARCHITECTURES)
        raise NoKernel(f"sm_{architecture} is not among the architectures that kernels are tuned for: {known}")
    if site.has("global_mask"):
        raise NoKernel(
            "its rows of global tokens take kernels of their own and scratch memory between them, and TensorRT "
            "launches one kernel of an ahead-of-time plugin; next step: leave --plugin-api aot out"
        )
    if site.has("block_masks"):
        _check_words(site)
    return tuple(_ways(site, layout, architecture, kind) for kind in ("whole", "split"))


def _ways(site: KernelSite, layout: str, architecture: int, kind: str) -> tuple[Recipe, ...]:
    recipes: dict[str, Recipe] = {}
    for budget in _BUDGETS:
        try:
            tile = choose(architecture, tile_kind(site, kind), ELEMENT_SIZES[site.dtype], widest(site), budget)
        except ValueError:
            break
        recipe = _recipe(site, layout, architecture, tile)
        recipes.setdefault(recipe.variants[0].name, recipe)
    if not recipes:
        raise NoKernel(
            f"head size {max(site.head_size, site.v_head_size)} in {site.dtype}: no tile fits the "
            f"{SHARED_LIMIT // 1024} KiB of shared memory that an ahead-of-time plugin has; next step: leave "
            "--plugin-api aot out"
        )
    return tuple(recipes.values())


def operands_of(site: KernelSite) -> tuple[str, ...]:
    """Formal names of the inputs that are present, in the order of the node and of the kernel's parameters."""
    return tuple(tensor.name for tensor in definition_of(site.operator).inputs if site.has(tensor.name))


def results_of(site: KernelSite) -> tuple[str, ...]:
    """Formal names of the outputs."""
    return ("Y", "lse") if site.lse else ("Y",)


def architecture_for(targets: Sequence[Target]) -> int:
    """The architecture to compile a plugin for, which has one PTX.

    Args:
        targets: What the engine shall run on.

    Returns:
        The only architecture, or the oldest one, whose PTX the driver translates for every newer one.
    """
    only = targets[0] if len(targets) == 1 else PTX
    return PTX_ARCHITECTURE if only.form == PTX.form else only.architecture


def _check_words(site: KernelSite) -> None:
    """TensorRT has no uint8 inside a network: block masks come as the same bytes in int32, so they must fill words."""
    defaults = {attribute.name: attribute.default for attribute in definition_of(site.operator).attributes}
    attributes: dict[str, Any] = {**defaults, **site.attributes}
    tall, wide = attributes["q_block_size"], attributes["kv_block_size"]
    size = tall * -(-wide // 8)
    if size % 4:
        raise NoKernel(
            f"a block mask of {tall} queries and {wide} keys has {size} bytes; TensorRT takes them as int32, so it "
            "must be a multiple of 4"
        )


def _recipe(site: KernelSite, layout: str, architecture: int, tile: Tile) -> Recipe:
    if site.operator == "SlidingWindowAttention":
        from ..sliding_window_attention import triton_variants as window

        recipe = window.recipe(site, architecture, (tile, tile))
    else:
        from ..block_sparse_attention import triton_variants as lists

        recipe = lists.recipe(site, architecture, (tile, tile))
    path = recipe.paths[-1]  # the one that takes every shape
    kernel = _entry(site, layout, path.kernels[-1])
    return Recipe(site, architecture, (Path("aot", "1", path.sizes, (), (kernel,)),))


def _entry(site: KernelSite, layout: str, kernel: KernelVariant) -> KernelVariant:
    """The entry of the operator in ``triton_kernel.py`` that calls the kernel of a path without splits."""
    fixed = {"heads", "splits", "left", "right", "bias_left", "scale", "softcap", "span_ramp"}
    inputs: list[Parameter] = []
    numbers: list[Parameter] = []
    outputs: list[Parameter] = []
    for parameter in kernel.parameters:
        kind, _, what = parameter.meaning.partition(":")
        if kind in ("input", "output"):
            # Vector loads and stores pay for tiles alone; of the others nothing is assumed.
            pointer = parameter if what in _TILES else replace(parameter, divisor=1)
            (inputs if kind == "input" else outputs).append(pointer)
        elif kind == "buffer" and what not in _NEEDLESS:
            raise NoKernel(f"it needs the buffer {what}, and ahead-of-time plugins have no scratch memory")
        elif kind == "size" and parameter.name not in (*fixed, "order_batch", "order_head"):
            numbers.append(parameter)
        elif kind == "stride" and what.partition(".")[0] not in _TILES:
            numbers.append(replace(parameter, type="i32"))
    given = {parameter.name for parameter in (*inputs, *numbers, *outputs)}
    constants = [c for c in kernel.constants if c.name != "SPLIT" and c.name not in _GONE[site.operator] | given]
    constants += [Constant(name, value) for name, value in _scalars(site, layout).items()]
    return replace(
        kernel,
        function=f"tensorrt.triton_kernel:{_ENTRIES[site.operator]}",
        parameters=(*inputs, *numbers, *outputs),
        constants=tuple(constants),
    )


_GONE = {
    "SlidingWindowAttention": {
        "global_mask", "global_keys", "global_key_counts", "status", "partial_out", "partial_lse", "splits", "softcap",
        "span_ramp", "bias_left",
    },
    "BlockSparseAttention": {"partial_out", "partial_lse", "splits", "softcap"},
}  # fmt: skip
"""Parameters of the operators' kernels that the entries do not have."""


def _scalars(site: KernelSite, layout: str) -> dict[str, Any]:
    """What the node fixes, as constants of the entry."""
    defaults = {attribute.name: attribute.default for attribute in definition_of(site.operator).attributes}
    attributes: dict[str, Any] = {**defaults, **site.attributes}
    scale = attributes["scale"]
    scalars: dict[str, Any] = {
        "HEADS": site.heads, "JOINED": layout == "bsd", "CAP": float(attributes["softcap"]),
        "SCALE": 1.0 / math.sqrt(site.head_size) if scale is None else float(scale),
    }  # fmt: skip
    if "left_window_size" in attributes:
        scalars |= {
            "LEFT": attributes["left_window_size"], "RIGHT": attributes["right_window_size"],
            "RAMP": float(attributes["span_ramp"]),
        }  # fmt: skip
    return scalars
