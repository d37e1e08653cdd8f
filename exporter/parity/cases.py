"""Which lengths, batches and masks are checked: few cases, chosen so that a pattern has nowhere to hide.

A window that holds the whole text computes what dense attention does, so a short input proves nothing about a window.
For every pattern of the model the lengths stand around the places where its behaviour changes: for a window, where the
text outgrows one side of the band (the first pair is cut off) and where it outgrows the whole band (the first row is
full); for block lists, multiples of the block and the thresholds of the pattern that they came from.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InvalidRequest
from ..manifest import Manifest
from ..sites.record import AttentionSite
from .inputs import GLOBALS, PADDINGS

LONGEST = 8192
"""Longest input checked unless asked for more; float64 on a CPU takes minutes beyond."""

WITHOUT_LIMIT = 4096
"""Longest input for a model that accepts any length, unless its windows need more."""

BATCHES = (3, 1)
"""Rows that a sweep is made with."""


@dataclass(frozen=True)
class Case:
    """One input to check.

    Attributes:
        batch: Rows.
        length: Tokens per row.
        padding: Kind of padding, see `inputs.PADDINGS`; ``"file"`` for inputs that were loaded.
        global_tokens: Kind of global tokens, see `inputs.GLOBALS`; ``"file"`` for inputs that were loaded.
    """

    batch: int
    length: int
    padding: str
    global_tokens: str

    def __str__(self) -> str:
        return f"{self.batch} x {self.length}, padding {self.padding}, global tokens {self.global_tokens}"


def sweep_lengths(
    sites: Sequence[AttentionSite], accepted: int | None, cap: int | None = None, always_global: int = 0
) -> tuple[int, ...]:
    """Lengths to check, ascending: 1, those around which a site's behaviour changes, and the longest.

    What the lengths of a site are, its operator says: `sites.window`, `sites.block_sparse`.

    Args:
        sites: The attention sites.
        accepted: Longest input that the model accepts; None when unlimited.
        cap: Longest input to check; None for `LONGEST`.
        always_global: First tokens that the conversion made global.

    Raises:
        InvalidRequest: `cap` is below 1.
    """
    if cap is not None and cap < 1:
        raise InvalidRequest(f"--max-length {cap}: must be 1 or more")
    lengths = {1}
    for site in sites:
        lengths |= site.sweep(always_global).lengths
    if accepted is None:
        accepted = max(WITHOUT_LIMIT, *lengths)
    limit = min(accepted, LONGEST if cap is None else cap)
    return tuple(sorted({length for length in lengths if 1 <= length <= limit} | {limit}))


def sweep(manifest: Manifest, lengths: Sequence[int], batches: Sequence[int] = BATCHES) -> tuple[Case, ...]:
    """Combine lengths with batches and masks: every length, and every pair of batch, padding and global tokens.

    Every length is met with a row that has no padding. Where a text outgrows one side of a window, a single pair of
    tokens, the first and the last, tells the right pattern from the next; there global tokens would hide it too, so
    those lengths are met without. The longest is met once, with the fewest rows, because it takes the most time.

    Args:
        manifest: The bundle's manifest; decides which masks there are.
        lengths: Lengths to check, ascending.
        batches: Rows to check them with.

    Raises:
        InvalidRequest: a length is below 1 or above what the model accepts.
    """
    for length in lengths:
        if manifest.fixed_length not in (None, length):
            raise InvalidRequest(f"--lengths {length}: the model was exported for {manifest.fixed_length} tokens only")
        if length < 1 or (manifest.max_length is not None and length > manifest.max_length):
            raise InvalidRequest(f"--lengths {length}: the model accepts 1 to {manifest.max_length or 'any number of'}")
    paddings, global_kinds = mask_kinds(manifest)
    kinds = [_Kind(*values) for values in itertools.product(batches, paddings, reversed(global_kinds))]
    missing = set().union(*(kind.pairs for kind in kinds))
    uses: collections.Counter[_Kind] = collections.Counter()
    cases = []

    def meet(length: int, allowed: Sequence[_Kind]) -> None:
        kind = max(allowed, key=lambda kind: (len(kind.pairs & missing), -uses[kind]))
        missing.difference_update(kind.pairs)
        uses[kind] += 1
        cases.append(Case(kind.batch, length, kind.padding, kind.global_tokens))

    *shorter, longest = lengths
    fewest = min(batches)
    meet(longest, [kind for kind in kinds if kind.batch == fewest and kind.whole_row])
    edges = set().union(*(site.sweep(manifest.conversion.global_tokens).edges for site in manifest.sites))
    for length in reversed(shorter):
        bare = length in edges
        meet(length, [kind for kind in kinds if kind.whole_row and not (bare and kind.global_tokens != "none")])
    # The rest at lengths beyond the windows, but the longest only where there is no other.
    beyond = shorter[(len(shorter) + 1) // 2 :] or [longest]
    turns = itertools.cycle(beyond)
    while missing:
        meet(next(turns), kinds)
    return tuple(sorted(cases, key=lambda case: (case.length, case.batch)))


@dataclass(frozen=True)
class _Kind:
    """A case without its length."""

    batch: int
    padding: str
    global_tokens: str

    @property
    def pairs(self) -> frozenset[tuple[str, int | str, str]]:
        """What a sweep must have met in some case each."""
        return frozenset(
            {
                ("batch, padding", self.batch, self.padding),
                ("batch, global tokens", self.batch, self.global_tokens),
                ("padding, global tokens", self.padding, self.global_tokens),
            }
        )

    @property
    def whole_row(self) -> bool:
        """Whether a row has no padding at all."""
        return self.padding == "none" or (self.batch > 1 and self.padding in ("right", "left"))


def mask_kinds(manifest: Manifest) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Kinds of padding and of global tokens that the model's inputs can express."""
    roles = {record.role for record in manifest.inputs}
    return (
        PADDINGS if "padding_mask" in roles else PADDINGS[:1],
        GLOBALS if "global_mask" in roles else GLOBALS[:1],
    )


def single_shape(manifest: Manifest, batch: int, length: int) -> tuple[Case, ...]:
    """The masks worth checking at one given shape: each kind once."""
    paddings, global_kinds = mask_kinds(manifest)
    count = max(len(paddings), len(global_kinds))
    return tuple(
        Case(batch, length, paddings[index % len(paddings)], global_kinds[index % len(global_kinds)])
        for index in range(count)
    )
