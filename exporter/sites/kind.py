"""What commands ask about a site and each operator answers in its own way."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from ..masks import Scale
    from .graph import SiteGraph
    from .record import AttentionSite

UNSEEN, SEEN, GLOBAL, PARTLY = 0, 1, 2, 3
"""Values of a picture's cells: none of its pairs is counted; all are; for a global token; some are."""

Cells = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class SweepLengths:
    """Lengths in tokens around which the behaviour of a site changes.

    Attributes:
        lengths: Lengths worth checking: below, at and above each change, off and on the blocks.
        edges: Those of them at which a single pair of tokens tells a right pattern from the next, so that neither
            padding nor a global token may hide it.
    """

    lengths: frozenset[int]
    edges: frozenset[int]


@dataclass(frozen=True)
class Work:
    """What a site does for one text without padding.

    Attributes:
        length: Tokens that the numbers are for; another one than asked for where the site's lists are fixed.
        terms: Query-key pairs that its softmaxes count, over all heads; a key that is counted twice is two.
        computed: Pairs that its matrix products are computed for, over all heads: whole blocks, masked or not.
        pairs: Pairs that dense attention of the same heads scores.
        notes: What a reader of the numbers must know, in sentences without a full stop.
    """

    length: int
    terms: int
    computed: int
    pairs: int
    notes: tuple[str, ...] = ()


class Unknown(Exception):
    """A question about a site that its graph does not answer; the text says why."""


class SiteKind(abc.ABC):
    """What is particular to the sites of one operator.

    Every method takes the site first, so that one object serves all sites of its operator.
    """

    @abc.abstractmethod
    def words(self, site: AttentionSite) -> str:
        """The pattern in words, e.g. ``"256 left, 256 right, dilation 2, causal"``."""

    @abc.abstractmethod
    def short(self, site: AttentionSite) -> tuple[str, str]:
        """The pattern in one or two words, and its sizes, for the columns of a table."""

    @property
    @abc.abstractmethod
    def is_window(self) -> bool:
        """Whether the sizes of `short` are those of a window; else they are those of a block."""

    @abc.abstractmethod
    def reach(self, site: AttentionSite) -> int:
        """Largest distance in tokens between a query and a key that it sees, global tokens apart; -1 for no bound."""

    @abc.abstractmethod
    def sweep(self, site: AttentionSite, always_global: int) -> SweepLengths:
        """Lengths to check.

        Args:
            site: The site.
            always_global: First tokens that a conversion made global.
        """

    @abc.abstractmethod
    def keys(self, site: AttentionSite, length: int) -> int:
        """Most keys that a query sees in a text of `length` tokens, or a bound of it."""

    @abc.abstractmethod
    def standard_refusal(self, site: AttentionSite) -> str:
        """Why ONNX Attention does not compute it."""

    @abc.abstractmethod
    def contrib_refusal(self, site: AttentionSite) -> str:
        """Why no operator that ONNX Runtime contributes computes it."""

    @property
    @abc.abstractmethod
    def growth(self) -> str:
        """What the time and memory of a function body grow with."""

    @abc.abstractmethod
    def work(self, site: AttentionSite, graph: SiteGraph, length: int, global_tokens: int) -> Work:
        """What the site does for one text.

        Args:
            site: The site.
            graph: The graph that it is in.
            length: Tokens.
            global_tokens: Global tokens of the text, where the site takes some.

        Raises:
            Unknown: the graph does not say.
        """

    @abc.abstractmethod
    def picture_width(self, site: AttentionSite) -> int:
        """Tokens that should take a quarter of a picture's width; 0 where any number does."""

    @abc.abstractmethod
    def picture(self, site: AttentionSite, graph: SiteGraph | None, scale: Scale, global_tokens: int) -> list[Cells]:
        """Small masks, one per head, or one for all heads where they are alike.

        Args:
            site: The site.
            graph: The graph that it is in; None where only its record is left.
            scale: Cells of the picture, and tokens behind each.
            global_tokens: Global tokens at the start of the text, where the site takes some.

        Returns:
            uint8 (cells, cells) arrays of `UNSEEN`, `SEEN`, `GLOBAL` and `PARTLY`; row = query, column = key.

        Raises:
            Unknown: neither graph nor record say what there is to draw.
        """


def beyond(site: AttentionSite, known: Sequence[str]) -> str:
    """Inputs of the site besides those in `known`, listed; empty where there are none."""
    return ", ".join(name for name in site.inputs if name not in known)


def prime_from(number: int) -> int:
    """The first prime that is `number` or more: a length that no block size divides."""
    while number < 2 or any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number
