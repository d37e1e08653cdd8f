"""Attention masks as SVG: one path per kind of pair, so that a picture is a few kilobytes and prints sharply."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..sites.kind import GLOBAL, PARTLY, SEEN, UNSEEN, Cells

SEEN_COLOR = "#0072b2"
PARTLY_COLOR = "#8cbfdf"
GLOBAL_COLOR = "#e69f00"

_CELL = 4
_COLORS = {SEEN: SEEN_COLOR, PARTLY: PARTLY_COLOR, GLOBAL: GLOBAL_COLOR}


def mask_svgs(pictures: Sequence[Cells], most: int = 4) -> list[str]:
    """One picture per head whose mask differs from the others', at most `most` of them.

    Rows are queries, from the top; columns are keys, from the left.

    Args:
        pictures: What `SiteKind.picture` returned.
        most: Pictures to draw.
    """
    different = {picture.tobytes(): index for index, picture in reversed(list(enumerate(pictures)))}
    return [_svg(pictures[index]) for index in sorted(different.values())[:most]]


def _svg(cells: Cells) -> str:
    side = _CELL * len(cells)
    paths = "".join(
        f'<path d="{_path(cells == kind)}" fill="{color}"/>' for kind, color in _COLORS.items() if (cells == kind).any()
    )
    share = (cells != UNSEEN).mean()
    return (
        f'<svg class="mask" viewBox="0 0 {side} {side}" role="img" shape-rendering="crispEdges" '
        f'aria-label="attention mask: rows are queries, columns keys; {share:.0%} of all pairs">'
        f'<rect width="{side}" height="{side}" fill="#f1f3f5"/>{paths}</svg>'
    )


def _path(mask: npt.NDArray[np.bool_]) -> str:
    """Rectangles of one row's runs each."""
    parts = []
    for row, cells in enumerate(mask):
        edges = np.flatnonzero(np.diff(np.concatenate(([0], cells.astype(np.int8), [0]))))
        parts += [
            f"M{_CELL * begin} {_CELL * row}h{_CELL * (end - begin)}v{_CELL}h-{_CELL * (end - begin)}z"
            for begin, end in edges.reshape(-1, 2).tolist()
        ]
    return "".join(parts)
