"""What a mask function of ``transformers`` means: the pattern is read from the function's values and then proved.

A mask function maps the indices of a batch entry, a head, a query and a key to whether the query sees the key. What
kind it is does not show from outside: names are those of a generic wrapper, and the window that a model hands to its
attention is inclusive in one family and exclusive in the next. So the function is asked: one query far from both ends
shows how far it sees, the first key that it sees shows who sees that key, and a pattern that follows from both is
accepted only if it agrees with the function at every pair that is enumerated beyond the pattern's size.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..patterns import Chunked, Lengths, Pattern, Window
from ..patterns.systems import chunked_causal

if TYPE_CHECKING:
    import torch

HORIZON = 1 << 17
"""A pattern that reaches further than this many tokens counts as unbounded."""

_SHORTEST = 64
_WHOLE_GRID = 1 << 21
"""Pairs up to which every query is enumerated; beyond, the queries around each place where a pattern changes are."""


def chunk_size(pattern: Pattern) -> int:
    """Tokens in a chunk of a pattern of chunks; 0 for any other."""
    return next((part.size for part in pattern.parts if isinstance(part, Chunked)), 0)


def is_local(pattern: Pattern) -> bool:
    """Whether a query sees a limited number of keys, however long the text."""
    return pattern.bounded if isinstance(pattern, Window) else chunk_size(pattern) > 0


def meaning(pattern: Pattern) -> str:
    """What a query sees, in words."""
    if not isinstance(pattern, Window):
        return f"a query sees the keys up to its own within chunks of {chunk_size(pattern)}"
    if (pattern.left, pattern.right) == (-1, 0):
        return "every query sees all keys up to its own"
    if (pattern.left, pattern.right) == (-1, -1):
        return "every query sees every key"
    return f"a query sees {pattern.left} keys before and {pattern.right} after its own"


def read_pattern(mask_function: Callable[..., Any], start: torch.Tensor, use_vmap: bool = False) -> Pattern | None:
    """Find the pattern of a mask function and prove it.

    Args:
        mask_function: As ``transformers`` hands it to a mask interface.
        start: int64 (B,), left padding of each row of the batch that the function was made for.
        use_vmap: Whether ``transformers`` would evaluate the function one pair at a time.

    Returns:
        A `Window`, or `chunked_causal` with chunks that are counted from a row's first token; None where the function
        is neither.
    """
    try:
        for pattern in _candidates(mask_function, start, use_vmap):
            if _proved(mask_function, start, use_vmap, pattern):
                return pattern
    except (IndexError, RuntimeError, TypeError, ValueError):
        pass  # It reads tensors of a fixed length, e.g. the ids of packed sequences.
    return None


def _candidates(function: Callable[..., Any], start: torch.Tensor, use_vmap: bool) -> Iterator[Pattern]:
    middle = HORIZON
    row = _values(function, start, use_vmap, (middle, 1), (0, 2 * HORIZON))[0, 0]
    keys = row.nonzero()[:, 0]
    if not len(keys):
        return
    first, last = int(keys[0]), int(keys[-1])
    yield Window(-1 if first == 0 else middle - first, -1 if last == 2 * HORIZON - 1 else last - middle)
    column = _values(function, start, use_vmap, (0, 2 * HORIZON), (first, 1))[0, :, 0]
    yield chunked_causal(int(column.sum()))


def _proved(function: Callable[..., Any], start: torch.Tensor, use_vmap: bool, pattern: Pattern) -> bool:
    import torch

    longest, size = int(start.max()), _size(pattern)
    # Two periods and a remainder beyond the longest left padding, so that every boundary is met twice.
    length = max(2 * size, _SHORTEST) + longest + 7
    if length * length <= _WHOLE_GRID:
        spans = [(0, length)]
    else:
        edges = [0, size, 2 * size]
        spans = [(max(0, edge - 8), 16 + longest) for edge in edges] + [(HORIZON, 8)]
    for first, count in spans:
        last_key = max(length, first + count + 8)
        first_key = max(0, first - 2 * size - 7) if first == HORIZON else 0
        # A pattern counts from a row's first token, the function from the padding before it.
        begin = start.cpu().numpy()[:, None, None]
        query = np.arange(first, first + count)[None, :, None] - begin
        key = np.arange(first_key, last_key)[None, None, :] - begin
        wanted = pattern.allowed(query, key, Lengths.of(last_key))
        got = _values(function, start, use_vmap, (first, count), (first_key, last_key - first_key))
        if not torch.equal(got.cpu(), torch.from_numpy(wanted)):
            return False
    return True


def _size(pattern: Pattern) -> int:
    """Tokens after which the pattern shows."""
    return max(pattern.left, 0) + max(pattern.right, 0) + 1 if isinstance(pattern, Window) else chunk_size(pattern)


def _values(
    function: Callable[..., Any], start: torch.Tensor, use_vmap: bool, queries: tuple[int, int], keys: tuple[int, int]
) -> torch.Tensor:
    """(B, queries, keys), evaluated the way ``transformers`` makes its masks; both ranges are (first, count)."""
    from transformers.masking_utils import sdpa_mask

    mask = sdpa_mask(
        batch_size=len(start),
        q_length=queries[1],
        kv_length=keys[1],
        q_offset=queries[0],
        kv_offset=keys[0],
        mask_function=function,
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
    )
    assert mask is not None
    return mask[:, 0]


def fingerprint(value: Any) -> Hashable:
    """Equal for two mask functions that differ at most in the tensors they close over.

    A function's meaning is enumerated once, outside of tracing; while tracing, where its values cannot be computed, it
    is known again by its code and the constants bound in it.
    """
    if isinstance(value, types.FunctionType):
        code = hashlib.sha256(value.__code__.co_code).hexdigest()
        constants = tuple(c for c in value.__code__.co_consts if isinstance(c, (int, float, str)))
        cells = tuple(fingerprint(cell.cell_contents) for cell in value.__closure__ or ())
        defaults = fingerprint(value.__defaults__ or ())
        return ("function", value.__module__, value.__qualname__, code, constants, cells, defaults)
    if isinstance(value, (tuple, list)):
        return ("sequence", *(fingerprint(item) for item in value))
    if type(value) in (int, float, bool, str, type(None)):
        return (type(value).__name__, value)
    if hasattr(value, "dim") and hasattr(value, "dtype"):
        return ("tensor", value.dim())
    return ("object", id(value))
