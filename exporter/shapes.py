"""Shapes of a model's inputs, as Polygraphy writes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .errors import InvalidRequest
from .manifest import InputRecord


def parse_shapes(
    texts: Iterable[str], inputs: Sequence[InputRecord], option: str = "--input-shapes"
) -> dict[str, tuple[int, ...]]:
    """Parse ``name:[size,size]``, the syntax of Polygraphy's ``--input-shapes``.

    Args:
        texts: One text per input.
        inputs: The manifest's inputs.
        option: The option that the texts come from, for errors.

    Raises:
        InvalidRequest: a text is malformed, or a shape does not fit its input.
    """
    records = {record.name: record for record in inputs}
    shapes = {}
    for text in texts:
        name, separator, sizes = text.rpartition(":")
        try:
            shape = tuple(int(size) for size in sizes.strip().removeprefix("[").removesuffix("]").split(","))
        except ValueError:
            shape = ()
        if not separator or not shape or min(shape) < 1:
            raise InvalidRequest(f"{option} {text}: must be input:[size,size,…], e.g. input_ids:[1,128]")
        if name not in records:
            raise InvalidRequest(f"{option} {text}: no input {name!r}; allowed: {', '.join(records)}")
        record = records[name]
        fits = len(shape) == len(record.shape) and all(
            isinstance(wanted, str) or wanted == got for wanted, got in zip(record.shape, shape, strict=True)
        )
        if not fits:
            raise InvalidRequest(f"{option} {text}: input {name} has shape {list(record.shape)}")
        shapes[name] = shape
    return shapes


def sizes_of(shapes: Mapping[str, tuple[int, ...]], inputs: Sequence[InputRecord]) -> dict[str, int]:
    """Size of each symbolic dimension, from the shapes of some inputs.

    Raises:
        InvalidRequest: two inputs give one dimension different sizes.
    """
    sizes: dict[str, int] = {}
    for record in inputs:
        for dimension, size in zip(record.shape, shapes.get(record.name, ()), strict=False):
            if isinstance(dimension, str) and sizes.setdefault(dimension, size) != size:
                raise InvalidRequest(
                    f"input {record.name}: {dimension} is {size}, but another input makes it {sizes[dimension]}"
                )
    return sizes
