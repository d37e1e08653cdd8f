"""Which lengths, batches and masks are checked: few cases, chosen so that a pattern has nowhere to hide.

A window that holds the whole text computes what dense attention does, so a short input proves nothing about a window.
For every window of the model the lengths stand around the two places where its behaviour changes: where the text
outgrows one side of the band (the first pair is cut off) and where it outgrows the whole band (the first row is full).
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InvalidRequest
from ..manifest import Manifest
from ..sites import AttentionSite
from .inputs import GLOBALS, PADDINGS

LONGEST = 8192
"""Longest input checked unless asked for more; float64 on a CPU takes minutes beyond."""

WITHOUT_LIMIT = 4096
"""Longest input for a model that accepts any length, unless its windows need more."""

_BATCHES = (3, 1)


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
    """Lengths to check, ascending.

    With ``e`` keys on the longer side of a band, the query's own included, and ``w`` keys in the whole band, in tokens:
    1, e, e+1, w-1, w, w+1, 2w+1 for each window; the first prime from 3w on, which no block size divides; the longest.
    First tokens that are always global make a text outgrow its window as many tokens later.

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
    for edge, band in {_extent(site) for site in sites} - {None}:  # type: ignore[misc]
        edge += always_global
        lengths |= {edge, edge + 1, band - 1, band, band + 1, 2 * band + 1, _prime_from(3 * band)}
    if accepted is None:
        accepted = max(WITHOUT_LIMIT, *lengths)
    limit = min(accepted, LONGEST if cap is None else cap)
    return tuple(sorted({length for length in lengths if 1 <= length <= limit} | {limit}))


def _extent(site: AttentionSite) -> tuple[int, int] | None:
    """Keys on the longer side of a band and in all of it, in tokens; None where a side has no bound."""
    left = site.attributes.get("left_window_size", -1)
    right = 0 if site.attributes.get("is_causal", 0) else site.attributes.get("right_window_size", -1)
    if left < 0 or right < 0:
        return None
    step = max(site.attributes.get("dilation", [1]))
    return max(left, right) * step + 1, (left + right) * step + 1


def _prime_from(number: int) -> int:
    while number < 2 or any(number % divisor == 0 for divisor in range(2, int(number**0.5) + 1)):
        number += 1
    return number


def sweep(manifest: Manifest, lengths: Sequence[int]) -> tuple[Case, ...]:
    """Combine lengths with batches and masks: every length, and every pair of batch, padding and global tokens.

    Every length is met with a row that has no padding. Where a text outgrows one side of a window, a single pair of
    tokens, the first and the last, tells the right window from the next; there global tokens would hide it too, so
    those lengths are met without. The longest is met once, as one row, because it takes the most time.

    Args:
        manifest: The bundle's manifest; decides which masks there are.
        lengths: Lengths to check, ascending.

    Raises:
        InvalidRequest: a length is below 1 or above what the model accepts.
    """
    for length in lengths:
        if length < 1 or (manifest.max_length is not None and length > manifest.max_length):
            raise InvalidRequest(f"--lengths {length}: the model accepts 1 to {manifest.max_length or 'any number of'}")
    paddings, global_kinds = mask_kinds(manifest)
    kinds = [_Kind(*values) for values in itertools.product(_BATCHES, paddings, reversed(global_kinds))]
    missing = set().union(*(kind.pairs for kind in kinds))
    uses: collections.Counter[_Kind] = collections.Counter()
    cases = []

    def meet(length: int, allowed: Sequence[_Kind]) -> None:
        kind = max(allowed, key=lambda kind: (len(kind.pairs & missing), -uses[kind]))
        missing.difference_update(kind.pairs)
        uses[kind] += 1
        cases.append(Case(kind.batch, length, kind.padding, kind.global_tokens))

    *shorter, longest = lengths
    meet(longest, [kind for kind in kinds if kind.batch == 1 and kind.whole_row])
    always = manifest.conversion.global_tokens
    edges = {extent[0] + always + more for site in manifest.sites if (extent := _extent(site)) for more in (0, 1)}
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
