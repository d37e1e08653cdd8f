"""What a pattern costs, and how it looks from afar; exact numbers at any length, from its block lists."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import InvalidRequest
from .base import Pattern
from .fast_lists import build_lists
from .lengths import Lengths
from .members import All
from .operators import Blocked, Derived

if TYPE_CHECKING:
    from ...plugins.attention.operands import Shapes
    from ...plugins.definition import Cost

_SMALLEST_BLOCK, _USUAL_BLOCK, _LARGEST_BLOCK = 16, 64, 128


def terms(pattern: Pattern, lengths: Lengths, heads: int | None = None) -> int:
    """Query-key pairs that the softmaxes of all heads count; a key that is counted twice is two.

    Args:
        pattern: The pattern.
        lengths: For which lengths.
        heads: Query heads; None is those after which the pattern repeats.
    """
    lists = build_lists(pattern, lengths, *[block_of(pattern)] * 2, heads=heads)
    return int(lists.terms().sum()) * ((heads or 1) if lists.heads == 1 else 1)


def density(pattern: Pattern, lengths: Lengths) -> float:
    """The share of all query-key pairs that are counted, each once however often; 0 where there are no pairs.

    Args:
        pattern: The pattern.
        lengths: For which lengths.
    """
    pairs = pattern.heads * lengths.seq_q * lengths.seq_k
    return terms(pattern & All(), lengths) / pairs if pairs else 0.0


def cost(pattern: Pattern, shapes: Shapes, *, offset: int = 0, element_size: int = 4) -> Cost:
    """Work of one execution that computes nothing but what the pattern counts: a floor for every kernel.

    FLOPs are ``2 · terms · (D + D_v)``, which is ``4 · D · terms`` where both sizes are equal.

    Args:
        pattern: The pattern.
        shapes: Sizes of the execution.
        offset: Keys that earlier calls left in a cache.
        element_size: Bytes per element.
    """
    from ...plugins.attention.operands import cost_of

    lengths = Lengths(shapes.seq_q, shapes.seq_k, offset)
    return cost_of(shapes, shapes.batch * terms(pattern, lengths, shapes.q_num_heads), element_size)


def shares(pattern: Pattern, length: int, unit: int) -> npt.NDArray[np.float64]:
    """The pattern from afar: which share of the pairs of each square of tokens is counted at all.

    Args:
        pattern: The pattern.
        length: Tokens of the text.
        unit: Tokens on a side of a square.

    Returns:
        float64 (heads, squares, squares) of 0 … 1; row = queries, column = keys. `heads` is 1 where all are alike.

    Raises:
        InvalidRequest: `unit` is below 1, or the pattern is for another length.
    """
    if unit < 1:
        raise InvalidRequest(f"unit = {unit}: must be 1 or more")
    sides = np.minimum(unit, length - np.arange(0, length, unit))
    counted = build_lists(pattern & All(), Lengths.of(length), unit, unit).terms()
    shared: npt.NDArray[np.float64] = counted / (sides[:, None] * sides[None, :])
    return shared


def block_of(pattern: Pattern) -> int:
    """A block size that suits a pattern: one whose lists have few partial blocks, and few kinds of blocks.

    A size that divides the pattern's own blocks, so that no block of a list straddles them; without such blocks, or
    where they are small, a whole number of the pattern's periods, in whole bytes of a mask where possible; else 64.
    """
    own = math.gcd(*_block_sizes(pattern))
    if own >= _SMALLEST_BLOCK:
        return _divisor(own)
    structure = pattern.structure
    period = 1 if structure is None else structure.period
    for unit in (math.lcm(period, 8), period):
        if unit <= _LARGEST_BLOCK:
            return unit * max(1, _USUAL_BLOCK // unit)
    return _divisor(period)


def _block_sizes(pattern: Pattern) -> list[int]:
    """Tokens in the blocks that a pattern is made of; those inside of blocks are multiples."""
    if isinstance(pattern, Blocked):
        return [pattern.size]
    parts = (pattern.expanded,) if isinstance(pattern, Derived) else pattern.parts
    return [size for part in parts for size in _block_sizes(part)]


def _divisor(number: int) -> int:
    """The largest divisor that is a usual block size; 64 where there is none."""
    divisors = [size for size in range(_LARGEST_BLOCK, _SMALLEST_BLOCK - 1, -1) if number % size == 0]
    return divisors[0] if divisors else _USUAL_BLOCK
