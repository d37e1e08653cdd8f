"""Every operator's answers to what commands ask about a site."""

from __future__ import annotations

from .block_sparse import BlockSparseSites
from .kind import SiteKind
from .window import WindowSites

_KINDS: dict[str, SiteKind] = {"SlidingWindowAttention": WindowSites(), "BlockSparseAttention": BlockSparseSites()}


def kind_of(operator: str) -> SiteKind:
    """What is particular to the sites of an operator.

    Raises:
        KeyError: there is no such operator.
    """
    return _KINDS[operator]
