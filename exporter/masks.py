"""Which key each query sees, as arrays of true and false; for pictures and reports, never for computing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..plugins.sliding_window_attention.definition import Attributes
from .errors import InvalidRequest
from .patterns import Lengths, Tokens, window_pattern

Mask = npt.NDArray[np.bool_]

# A band that takes a quarter of the picture's width shows its own width and the space that it leaves out.
_SPANS_PER_PICTURE = 4


def mask_of(attributes: Mapping[str, Any], length: int, global_tokens: int | Sequence[int] = 0) -> Mask:
    """The pairs that a SlidingWindowAttention scores on one text without padding.

    Padding, spans and lengths are inputs of the node and not part of it, so they do not appear here.

    Args:
        attributes: The node's attributes, as in ``AttentionSite.attributes``.
        length: Queries and keys, 0 or more.
        global_tokens: Global tokens: how many at the start of the text, or their positions.

    Returns:
        (H, length, length), True where query (row) sees key (column); H is the number of query heads where their
        dilations differ, else 1, because all heads then share one mask.

    Raises:
        InvalidOperands: the attributes contradict the definition.
        InvalidRequest: `length` or a position is out of range.
    """
    if length < 0:
        raise InvalidRequest(f"length {length}: must be 0 or more")
    Attributes.from_mapping(attributes)
    if isinstance(global_tokens, int):
        tokens = Tokens(first=global_tokens)
    else:
        outside = [position for position in global_tokens if not 0 <= position < length]
        if outside:
            raise InvalidRequest(f"global tokens {outside}: must lie in 0 … {length - 1}")
        tokens = Tokens(at=tuple(global_tokens))
    return window_pattern(attributes, tokens).dense(Lengths.of(length)) > 0


@dataclass(frozen=True)
class Scale:
    """How many tokens a picture shows, and how many stand behind each of its cells.

    Attributes:
        cells: Rows and columns of the picture.
        unit: Tokens per row and column, a power of two.
    """

    cells: int
    unit: int

    @property
    def length(self) -> int:
        """Tokens that the picture shows."""
        return self.cells * self.unit


def scale_for(widest: int, cells: int, limit: int | None = None) -> Scale:
    """One scale for several patterns, so that their pictures can be compared.

    Args:
        widest: Tokens that should take about a quarter of the picture's width, as far as a power of two allows: the
            widest bounded band; 0 where there is none, which gives a cell per token.
        cells: Rows and columns of each picture.
        limit: Tokens that the model accepts; the picture shows no more, unless a cell per token does.
    """
    wanted = _SPANS_PER_PICTURE * widest if limit is None else min(_SPANS_PER_PICTURE * widest, limit)
    unit = 1
    while 2 * unit * cells <= wanted:
        unit *= 2
    return Scale(cells, unit)


def sketch(attributes: Mapping[str, Any], scale: Scale, global_tokens: int = 0) -> Mask:
    """The mask of a node drawn small: window sizes are divided by the unit and rounded, dilations stay.

    Stripes of a dilated band thus stand as far apart, in cells, as its keys do in tokens. Any global token takes at
    least one cell.

    Returns:
        (H, cells, cells), as `mask_of`.
    """
    smaller = dict(attributes)
    for name in ("left_window_size", "right_window_size"):
        size = smaller.get(name, -1)
        smaller[name] = size if size < 0 else round(size / scale.unit)
    return mask_of(smaller, scale.cells, -(-global_tokens // scale.unit))
