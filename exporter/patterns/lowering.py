"""Which operator computes a pattern: SlidingWindowAttention where it is one band, else BlockSparseAttention.

A band needs no lists, so that its cost does not depend on blocks and its length may be open. A pattern is read as
``(band ∪ rows of tokens ∪ columns of tokens) ∩ causal``: each part of it is brought to that form, and operators combine
forms, or say why they cannot.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .base import Pattern
from .cost import block_of
from .members import Causal, Columns, Empty, Global, Rows, Window
from .operators import Blocked, Derived, Intersection, PerHead, Repeated, Shifted, Sum, Union
from .tokens import Tokens

SLIDING_WINDOW = "SlidingWindowAttention"
BLOCK_SPARSE = "BlockSparseAttention"

_NO_TOKENS = Tokens()
_EVERY_KEY = Window(-1, -1)
_CAUSAL = Window(-1, 0)


@dataclass(frozen=True)
class PatternLowering:
    """How a pattern is computed.

    Attributes:
        operator: Name of the operator.
        reason: Why this one, in words.
        attributes: The operator's attributes that follow from the pattern: windows, dilation and causality, or block
            sizes.
        global_tokens: Tokens for ``global_mask``; None without.
    """

    operator: str
    reason: str
    attributes: dict[str, Any]
    global_tokens: Tokens | None = None


def lower_pattern(pattern: Pattern, *, heads: int | None = None, block_size: int | None = None) -> PatternLowering:
    """Choose the operator of a pattern.

    Args:
        pattern: The pattern.
        heads: Query heads; None is those after which the pattern repeats. Only the number of dilations depends on it.
        block_size: Block size of lists, where lists are needed; None lets the pattern choose.
    """
    try:
        return _as_band(pattern, heads)
    except _NotABand as refusal:
        size = block_of(pattern) if block_size is None else block_size
        return PatternLowering(
            BLOCK_SPARSE,
            f"not one band: {refusal}; lists of blocks of {size}",
            {"q_block_size": size, "kv_block_size": size},
        )


def window_pattern(attributes: Mapping[str, Any], global_tokens: Tokens = _NO_TOKENS) -> Pattern:
    """The pattern of a SlidingWindowAttention without padding.

    Args:
        attributes: The node's attributes, checked already.
        global_tokens: Tokens that its ``global_mask`` holds.
    """
    dilation = attributes.get("dilation", (1,))
    steps = (dilation,) if isinstance(dilation, int) else tuple(dilation)
    sides = attributes.get("left_window_size", -1), attributes.get("right_window_size", -1)
    pattern: Pattern = (
        PerHead(tuple(Window(*sides, step) for step in steps)) if len(set(steps)) > 1 else Window(*sides, steps[0])
    )
    if global_tokens != _NO_TOKENS:
        pattern |= Global(global_tokens)
    return pattern & Causal() if attributes.get("is_causal", 0) else pattern


class _NotABand(Exception):
    """A pattern is none that SlidingWindowAttention computes; the text says why."""


@dataclass(frozen=True)
class _Form:
    """``(band ∪ rows ∪ columns) ∩ causal``, the last where `causal` is set, which it is never without tokens.

    Attributes:
        band: The band; None where it is empty.
        rows: Tokens that see all.
        columns: Tokens that all see.
        causal: Whether keys after the query are hidden.
    """

    band: Window | None
    rows: Tokens = _NO_TOKENS
    columns: Tokens = _NO_TOKENS
    causal: bool = False

    @property
    def pure(self) -> bool:
        """Whether there is nothing but the band."""
        return self.rows == self.columns == _NO_TOKENS


def _as_band(pattern: Pattern, heads: int | None) -> PatternLowering:
    forms = [_form(own) for own in pattern.by_head()]
    first = forms[0]
    if first.band is None:
        raise _NotABand("it has no band at all" if not first.pure else "it is empty")
    for head, form in enumerate(forms):
        if form.rows != form.columns:
            raise _NotABand("tokens that see every key are not those that every query sees")
        sides = None if form.band is None else (form.band.left, form.band.right)
        if sides != (first.band.left, first.band.right) or (form.rows, form.causal) != (first.rows, first.causal):
            raise _NotABand(f"heads 0 and {head} differ in more than their dilation")
    steps = [form.band.dilation for form in forms if form.band is not None]
    if heads is not None and len(steps) > 1:
        steps = [steps[head % len(steps)] for head in range(heads)]
    tokens = None if first.pure else first.rows
    causal = first.causal or (first.pure and first.band.right == 0)
    attributes = {
        "left_window_size": first.band.left,
        "right_window_size": first.band.right,
        "dilation": steps,
        "is_causal": int(causal),
    }
    words = "one band" if len(steps) == 1 else "one band whose dilation differs between heads"
    if tokens is not None:
        words += f", and global tokens ({tokens.describe()})"
    return PatternLowering(SLIDING_WINDOW, words, attributes, tokens)


def _form(pattern: Pattern) -> _Form:
    """Bring a pattern whose heads are alike to the form.

    Raises:
        _NotABand: it has none.
    """
    if isinstance(pattern, Window):
        return _Form(_canonical(pattern))
    if isinstance(pattern, Empty):
        return _Form(None)
    if isinstance(pattern, Rows):
        return _Form(None, rows=pattern.tokens)
    if isinstance(pattern, Columns):
        return _Form(None, columns=pattern.tokens)
    if isinstance(pattern, PerHead):
        return _form(pattern.head(0))
    if isinstance(pattern, (Union, Intersection)):
        combine = _union if isinstance(pattern, Union) else _intersection
        form = _form(pattern.of[0])
        for part in pattern.of[1:]:
            form = combine(form, _form(part), pattern)
        return form
    if isinstance(pattern, Blocked):
        return _blocked(pattern)
    if isinstance(pattern, Shifted) and not pattern.by:
        return _form(pattern.of)
    if isinstance(pattern, Sum) or (isinstance(pattern, Repeated) and pattern.times != 1):
        raise _NotABand(f"{pattern.describe()} counts keys more than once")
    if isinstance(pattern, Repeated):
        return _form(pattern.of)
    if isinstance(pattern, Derived):
        return _form(pattern.expanded)
    raise _NotABand(f"{pattern.describe()} is none")


def _union(one: _Form, other: _Form, pattern: Pattern) -> _Form:
    if one.causal != other.causal:
        # A band that is causal by itself may be drawn under the frontier of the other.
        bare = other if one.causal else one
        if not bare.pure or (bare.band is not None and bare.band.right != 0):
            raise _NotABand(f"only a part of {pattern.describe()} is causal")
    band = one.band or other.band
    if one.band is not None and other.band is not None:
        band = _joined(one.band, other.band)
        if band is None:
            raise _NotABand(f"{pattern.describe()} is none")
    if band == _EVERY_KEY:
        return _Form(band)
    rows, columns = one.rows.joined(other.rows), one.columns.joined(other.columns)
    return _Form(band, rows, columns, one.causal or other.causal)


def _joined(one: Window, other: Window) -> Window | None:
    """The band of two bands together; None where there is none."""
    for small, large in ((one, other), (other, one)):
        within = (large.left < 0 or 0 <= small.left * small.dilation <= large.left * large.dilation) and (
            large.right < 0 or 0 <= small.right * small.dilation <= large.right * large.dilation
        )
        if within and small.dilation % large.dilation == 0:
            return large
        if within and (small.left, small.right) == (0, 0):
            return large
    if one.dilation != other.dilation:
        return None
    sides = [-1 if min(pair) < 0 else max(pair) for pair in ((one.left, other.left), (one.right, other.right))]
    return Window(sides[0], sides[1], one.dilation)


def _intersection(one: _Form, other: _Form, pattern: Pattern) -> _Form:
    if not one.pure and other.pure:
        one, other = other, one
    if not one.pure:
        if one == other:
            return one
        raise _NotABand(f"{pattern.describe()} cuts global tokens")
    if one.band is None:
        return _Form(None)
    if other.pure:
        return _Form(None if other.band is None else _common(one.band, other.band))
    if one.band == _EVERY_KEY:
        return other
    if one.band == _CAUSAL:
        band = None if other.band is None else _common(other.band, one.band)
        return dataclasses.replace(other, band=band, causal=True)
    raise _NotABand(f"{pattern.describe()} cuts global tokens")


def _common(one: Window, other: Window) -> Window:
    step = math.lcm(one.dilation, other.dilation)
    sides = []
    for mine, its in ((one.left, other.left), (one.right, other.right)):
        bounds = [side * window.dilation for side, window in ((mine, one), (its, other)) if side >= 0]
        sides.append(min(bounds) // step if bounds else -1)
    return _canonical(Window(sides[0], sides[1], step))


def _canonical(window: Window) -> Window:
    """A band of nothing but the query's own key has no dilation."""
    return Window(0, 0) if (window.left, window.right) == (0, 0) else window


def _blocked(pattern: Blocked) -> _Form:
    """Whole blocks are a band only where that is all keys, or none; rows and columns of blocks are those of tokens."""
    if pattern.size == 1:
        return _form(pattern.of)
    inner = _form(pattern.of)
    if inner.band not in (None, _EVERY_KEY) or inner.causal:
        raise _NotABand(f"{pattern.describe()} ends at blocks, not at a distance")
    rows, columns = inner.rows.widened(pattern.size), inner.columns.widened(pattern.size)
    if rows is None or columns is None:
        raise _NotABand(f"{pattern.describe()} counts blocks from the end of the text")
    return _Form(inner.band, rows, columns)
