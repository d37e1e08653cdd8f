"""Patterns that the sites of a model carry as a record: what they count, and how they look."""

from __future__ import annotations

import functools

import numpy as np

from ..errors import InvalidRequest
from ..masks import Scale
from ..patterns import Pattern, from_json, shares
from .kind import PARTLY, SEEN, UNSEEN, Cells, Unknown


@functools.lru_cache(maxsize=64)
def read(record: str) -> Pattern | None:
    """The pattern of a record; None where there is none, or one that this version cannot read."""
    if not record:
        return None
    try:
        return from_json(record)
    except InvalidRequest:
        return None


def picture_of(pattern: Pattern, scale: Scale) -> list[Cells]:
    """A pattern drawn small, one picture per head that differs: a cell is seen whole, partly or not at all.

    Raises:
        Unknown: the pattern is for other lengths.
    """
    try:
        counted = shares(pattern, scale.length, scale.unit)
    except InvalidRequest as error:
        raise Unknown(f"the pattern recorded cannot be drawn for {scale.length:,} tokens: {error}") from error
    cells = np.where(counted == 1, SEEN, np.where(counted > 0, PARTLY, UNSEEN)).astype(np.uint8)
    return list(cells)
