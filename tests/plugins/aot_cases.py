"""The shared cases as sites of ahead-of-time plugins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from longspan.plugins.attention.operands import Shapes
from longspan.plugins.block_sparse_attention import definition as lists
from longspan.plugins.gpu.launch import site_of
from longspan.plugins.gpu.variants import KernelSite
from longspan.plugins.registry import operator as definition_of
from longspan.plugins.sliding_window_attention import definition as window

from . import block_sparse_cases, sliding_window_cases

Array = npt.NDArray[Any]
CASES = {"SlidingWindowAttention": sliding_window_cases, "BlockSparseAttention": block_sparse_cases}

# What these add is inside the functions that the entries share with the kernels of packs, whose tests have them all.
_SHARED = {
    "every block", "no block at all", "one block holds everything", "listed several times", "not itself", "causal",
    "padding", "holes", "sink and nothing else", "sink of -inf", "bias of -inf", "tall blocks", "wide blocks",
    "negative offsets", "self only", "window reaches past both ends", "unbounded right", "block edges",
    "largest dilation", "dilation beyond the length", "everything padded", "everything padded, dense",
    "garbage in padding, dense", "spans, unbounded", "lists per entry", "listed several times, masked",
}  # fmt: skip


def has_words(case: Any) -> bool:
    """Whether the block masks of a case fill words of four bytes."""
    return "block_masks" not in case.features or case.tall * -(-case.wide // 8) % 4 == 0


def eligible() -> Iterator[tuple[str, Any, str]]:
    """(operator, case, layout) of every case that one kernel executes, layouts by turns."""
    for operator, module in CASES.items():
        for number, case in enumerate(module.CASES):
            if "global_mask" not in case.features and (operator != "BlockSparseAttention" or has_words(case)):
                yield operator, case, ("bhsd", "bsd")[number % 2]


def interpreted() -> Iterator[tuple[str, Any, str]]:
    """Those of `eligible` that are run; the device code is tested with all of them elsewhere."""
    return (each for each in eligible() if each[1].name not in _SHARED)


def shapes_of(operator: str, shapes: dict[str, tuple[int, ...]], attributes: dict[str, Any]) -> Shapes:
    """The definition's sizes for shapes of the inputs."""
    if operator == "SlidingWindowAttention":
        return window.infer_shapes(shapes, window.Attributes.from_mapping(attributes))
    return lists.infer_shapes(shapes, lists.Attributes.from_mapping(attributes))


def site(operator: str, case: Any, layout: str, dtype: str = "float32", lse: bool = True) -> KernelSite:
    """The site of a case."""
    shapes = {name: array.shape for name, array in case.operands(layout).items()}
    attributes = case.node_attributes(layout)
    return site_of(operator, shapes_of(operator, shapes, attributes), dtype, shapes, attributes, lse)


def as_words(masks: Array) -> Array:
    """Block masks as TensorRT gets them: int32 words of the same bytes."""
    return np.ascontiguousarray(masks).reshape(len(masks), -1).view("<i4")


def network_shapes(operator: str, shapes: dict[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes of a node's tensors in the network, in order, for shapes of the definition by formal name."""
    masks = shapes.get("block_masks")
    if masks is not None:
        shapes = shapes | {"block_masks": (masks[0], masks[1] * masks[2] // 4)}
    return [shapes[tensor.name] for tensor in definition_of(operator).inputs if tensor.name in shapes]


def stretched(operator: str, case: Any, layout: str, batch: int, rows: int, keys: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs of a case with another batch and other lengths, under the node's own attributes."""
    lengths = {"lengths": (keys,) * batch} if case.lengths else {}
    padded = {"padded": ()} if case.padded else {}
    sizes = dataclasses.replace(case, batch=batch, seq_q=rows, seq_k=keys, **lengths, **padded)
    if hasattr(sizes, "bias_shape"):
        own = tuple(
            size if size == 1 else new for size, new in zip(case.bias_shape, (batch, case.heads, rows), strict=True)
        )
        sizes = dataclasses.replace(sizes, bias_shape=own)
    if hasattr(sizes, "shared"):
        sizes = dataclasses.replace(sizes, shared=(1 if case.shared[0] == 1 else batch, case.shared[1]))
    return {name: array.shape for name, array in sizes.operands(layout).items()}
