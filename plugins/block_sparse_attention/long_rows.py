"""Rows of blocks at the ends of a text that list more blocks than all between, as global tokens make them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LongRows:
    """What is known of the lists of a site at every length: all rows but some at the ends are short.

    A function body cannot check it: it reads no more than `width` slots of a short row.

    Attributes:
        first: Rows of blocks at the start that may list any number of blocks.
        last: The same at the end.
        width: Most blocks that the two lists of any other row name together.
        up_to: Texts of this many rows of blocks or fewer may break that rule.
        known_to: Texts of more rows of blocks may break it as well; 0 for none.
    """

    first: int
    last: int
    width: int
    up_to: int = 0
    known_to: int = 0

    @property
    def name(self) -> str:
        """As part of an overload."""
        return f"long_rows_{self.first}_{self.last}_{self.width}_{self.up_to}_{self.known_to}"

    @property
    def words(self) -> str:
        """E.g. ``"at most 8 blocks in a row, the first 1 and the last 1 rows of blocks apart"``."""
        ends = [f"the {side} {count}" for side, count in (("first", self.first), ("last", self.last)) if count]
        apart = f", {' and '.join(ends)} rows of blocks apart" if ends else ""
        short = f", texts of {self.up_to} rows or fewer as wide as their lists" if self.up_to else ""
        return f"at most {self.width} blocks in a row{apart}{short}"

    def slots(self, rows: int, width: int) -> int:
        """Slots that are computed of one list head.

        Args:
            rows: Rows of blocks of the text.
            width: Slots of the lists, both kinds.
        """
        apart = min(self.first + self.last, rows)
        holds = self.up_to < rows and (not self.known_to or rows <= self.known_to)
        short = min(width, self.width) if holds else width
        return apart * width + max(rows - apart, 1) * short
