"""Attention masks as SVG: one path per kind of pair, so that a picture is a few kilobytes and prints sharply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..masks import Mask, Scale, sketch

BAND_COLOR = "#0072b2"
GLOBAL_COLOR = "#e69f00"

_CELL = 4


def mask_svgs(attributes: Mapping[str, Any], scale: Scale, global_tokens: int, most: int = 4) -> list[str]:
    """One picture per head whose mask differs from the others', at most `most` of them.

    Rows are queries, from the top; columns are keys, from the left.

    Args:
        attributes: The node's attributes.
        scale: Cells of the picture and tokens behind each.
        global_tokens: Global tokens at the start of the text, drawn in a colour of their own.
        most: Pictures to draw.
    """
    band = sketch(attributes, scale)
    seen = sketch(attributes, scale, global_tokens)
    different = {heads.tobytes(): index for index, heads in reversed(list(enumerate(band)))}
    return [_svg(band[index], seen[index] & ~band[index]) for index in sorted(different.values())[:most]]


def _svg(band: Mask, outside: Mask) -> str:
    side = _CELL * len(band)
    paths = "".join(
        f'<path d="{_path(mask)}" fill="{color}"/>'
        for mask, color in ((band, BAND_COLOR), (outside, GLOBAL_COLOR))
        if mask.any()
    )
    share = (band | outside).mean()
    return (
        f'<svg class="mask" viewBox="0 0 {side} {side}" role="img" shape-rendering="crispEdges" '
        f'aria-label="attention mask: rows are queries, columns keys; {share:.0%} of all pairs">'
        f'<rect width="{side}" height="{side}" fill="#f1f3f5"/>{paths}</svg>'
    )


def _path(mask: Mask) -> str:
    """Rectangles of one row's runs each."""
    parts = []
    for row, cells in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], cells.astype(np.int8), [0]))))
        parts += [
            f"M{_CELL * begin} {_CELL * row}h{_CELL * (end - begin)}v{_CELL}h-{_CELL * (end - begin)}z"
            for begin, end in edges.reshape(-1, 2).tolist()
        ]
    return "".join(parts)
