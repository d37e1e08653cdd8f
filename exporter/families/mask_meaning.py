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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HORIZON = 1 << 17
"""A pattern that reaches further than this many tokens counts as unbounded."""

_SHORTEST = 64
_WHOLE_GRID = 1 << 21
"""Pairs up to which every query is enumerated; beyond, the queries around each place where a pattern changes are."""


@dataclass(frozen=True)
class Band:
    """Query i sees the keys from ``i - left`` to ``i + right``; -1 is no bound.

    Attributes:
        left: Keys before the query's own.
        right: Keys after the query's own.
    """

    left: int
    right: int

    @property
    def size(self) -> int:
        """Tokens after which the pattern shows."""
        return max(self.left, 0) + max(self.right, 0) + 1

    @property
    def bounded(self) -> bool:
        """Whether a query sees a limited number of keys."""
        return self.left >= 0 and self.right >= 0

    def allowed(self, query: torch.Tensor, key: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Whether each (query, key) is seen; shapes broadcast."""
        seen = (key == key) & (query == query) & (start == start)
        if self.left >= 0:
            seen = seen & (key >= query - self.left)
        if self.right >= 0:
            seen = seen & (key <= query + self.right)
        return seen

    def __str__(self) -> str:
        if (self.left, self.right) == (-1, 0):
            return "every query sees all keys up to its own"
        if (self.left, self.right) == (-1, -1):
            return "every query sees every key"
        return f"a query sees {self.left} keys before and {self.right} after its own"


@dataclass(frozen=True)
class Chunks:
    """Query i sees the keys up to its own within its chunk; chunks are counted from a row's first token.

    Attributes:
        size: Tokens in a chunk.
    """

    size: int

    @property
    def bounded(self) -> bool:
        """Whether a query sees a limited number of keys."""
        return True

    def allowed(self, query: torch.Tensor, key: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Whether each (query, key) is seen; `start` is the row's left padding; shapes broadcast."""
        import torch

        def chunk(position: torch.Tensor) -> torch.Tensor:
            return torch.div(position - start, self.size, rounding_mode="floor")

        return (key <= query) & (chunk(key) == chunk(query))

    def __str__(self) -> str:
        return f"a query sees the keys up to its own within chunks of {self.size}"


Pattern = Band | Chunks


def read_pattern(mask_function: Callable[..., Any], start: torch.Tensor, use_vmap: bool = False) -> Pattern | None:
    """Find the pattern of a mask function and prove it.

    Args:
        mask_function: As ``transformers`` hands it to a mask interface.
        start: int64 (B,), left padding of each row of the batch that the function was made for.
        use_vmap: Whether ``transformers`` would evaluate the function one pair at a time.

    Returns:
        The pattern, or None where the function is none of ours.
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
    yield Band(-1 if first == 0 else middle - first, -1 if last == 2 * HORIZON - 1 else last - middle)
    column = _values(function, start, use_vmap, (0, 2 * HORIZON), (first, 1))[0, :, 0]
    yield Chunks(int(column.sum()))


def _proved(function: Callable[..., Any], start: torch.Tensor, use_vmap: bool, pattern: Pattern) -> bool:
    import torch

    longest = int(start.max())
    # Two periods and a remainder beyond the longest left padding, so that every boundary is met twice.
    length = max(2 * pattern.size, _SHORTEST) + longest + 7
    if length * length <= _WHOLE_GRID:
        spans = [(0, length)]
    else:
        edges = [0, pattern.size, 2 * pattern.size]
        spans = [(max(0, edge - 8), 16 + longest) for edge in edges] + [(HORIZON, 8)]
    for first, count in spans:
        last_key = max(length, first + count + 8)
        first_key = max(0, first - 2 * pattern.size - 7) if first == HORIZON else 0
        query = torch.arange(first, first + count)[None, :, None]
        key = torch.arange(first_key, last_key)[None, None, :]
        wanted = pattern.allowed(query, key, start[:, None, None])
        got = _values(function, start, use_vmap, (first, count), (first_key, last_key - first_key))
        if not torch.equal(got, wanted):
            return False
    return True


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
