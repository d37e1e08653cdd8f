"""The operators that Longspan defines, by name."""

from __future__ import annotations

from .block_sparse_attention.definition import BLOCK_SPARSE_ATTENTION
from .definition import Operator
from .sliding_window_attention.definition import SLIDING_WINDOW_ATTENTION

_OPERATORS = {operator.name: operator for operator in (SLIDING_WINDOW_ATTENTION, BLOCK_SPARSE_ATTENTION)}


def operators() -> tuple[Operator, ...]:
    """Every operator of the ``longspan`` domain."""
    return tuple(_OPERATORS.values())


def operator(name: str) -> Operator:
    """The definition of the operator called `name`, e.g. ``"SlidingWindowAttention"``.

    Raises:
        KeyError: there is no such operator.
    """
    if name not in _OPERATORS:
        raise KeyError(f"no operator {name!r} in domain longspan; there are: {', '.join(_OPERATORS)}")
    return _OPERATORS[name]
