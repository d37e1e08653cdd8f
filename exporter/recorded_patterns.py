"""Patterns that the sites of a model carry as a record: what they count, and how they look."""

from __future__ import annotations

import functools

import numpy as np

from .errors import InvalidRequest
from .listed_blocks import ListedBlocks
from .masks import Scale
from .patterns import Lengths, Pattern, build_lists, from_json
from .site_kind import PARTLY, SEEN, UNSEEN, Cells

_BLOCK = 128
"""Blocks in which pairs are counted; any size gives the same sum."""


@functools.lru_cache(maxsize=64)
def read(record: str) -> Pattern | None:
    """The pattern of a record; None where there is none, or one that this version cannot read."""
    if not record:
        return None
    try:
        return from_json(record)
    except InvalidRequest:
        return None


def terms_of(pattern: Pattern, length: int, heads: int) -> int:
    """Pairs that a pattern counts in a text, over `heads` query heads; a key that is counted twice is two."""
    listed = ListedBlocks.of_pattern(build_lists(pattern, Lengths.of(length), _BLOCK, _BLOCK))
    of_head = [listed.terms(head) for head in range(listed.heads)]
    return sum(of_head[head % len(of_head)] for head in range(heads))


def picture_of(pattern: Pattern, scale: Scale) -> list[Cells]:
    """A pattern drawn small, one picture per head that differs: a cell is seen whole, partly or not at all.

    Raises:
        InvalidRequest: the pattern is for other lengths.
    """
    lists = build_lists(pattern, Lengths.of(scale.length), scale.unit, scale.unit)
    pictures = []
    for head in range(lists.heads):
        cells = np.full((scale.cells, scale.cells), UNSEEN, np.uint8)
        # Partial blocks first: a block may be listed again, and then is seen whole.
        for counts, indices, value in (
            (lists.kv_num_blocks, lists.kv_indices, PARTLY),
            (lists.full_kv_num_blocks, lists.full_kv_indices, SEEN),
        ):
            row, slot = np.nonzero(np.arange(indices.shape[-1]) < counts[0, head][:, None])
            cells[row, indices[0, head, row, slot]] = value
        pictures.append(cells)
    return pictures
