"""What a graph computes in, and the same graph in the type that was asked for."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...sites.record import longspan_nodes

if TYPE_CHECKING:
    import onnx_ir as ir

Progress = Callable[[str], None]

_NAMES = {"FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16"}


def dtype_of(model: ir.Model) -> str:
    """What a model computes in: the floating type of most of its weights, ``"fp32"`` where it has none."""
    sizes: collections.Counter[str] = collections.Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype.name in _NAMES:
            sizes[_NAMES[value.const_value.dtype.name]] += value.const_value.nbytes
    return sizes.most_common(1)[0][0] if sizes else "fp32"


@dataclass(frozen=True)
class TypedGraph:
    """A graph, what its matrix products and attention compute in, and how many nodes stay in fp32, by the reason."""

    model: ir.Model
    dtype: str
    kept_in_fp32: dict[str, int]


def in_type(
    model: ir.Model,
    dtype: str | None,
    progress: Progress = lambda stage: None,
    warn: Progress = lambda text: None,
    bodies: bool | None = None,
) -> TypedGraph:
    """Convert a graph where it computes in another type than is asked for.

    Args:
        model: A bundle's graph; it is not changed.
        dtype: One of `request.DTYPES`; None for what the model computes in.
        progress: Told when there is something to convert.
        warn: Told which numbers the type could not hold.
        bodies: Whether function bodies were inlined, which compute in fp32 until they are converted; None where that is
            so when no site is left.

    Raises:
        ExportFailed: the graph cannot be converted.
    """
    present = dtype_of(model)
    if bodies is None:
        bodies = next(longspan_nodes(model), None) is None
    if dtype is None or (dtype == present and (dtype == "fp32" or not bodies)):
        return TypedGraph(model, present, {})
    from ..precision.conversion import convert_precision

    progress(f"convert to {dtype}")
    converted = convert_precision(model, dtype)
    for note in converted.notes:
        warn(note)
    return TypedGraph(converted.model, dtype, converted.kept_in_fp32)
