"""Sites of SlidingWindowAttention: a band, described by the node's attributes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...plugins.attention.operands import Shapes
from ...plugins.sliding_window_attention.definition import Attributes, cost
from ..errors import InvalidRequest
from ..masks import Scale, sketch
from ..patterns import Lengths
from .kind import GLOBAL, SEEN, UNSEEN, Cells, SiteKind, SweepLengths, Unknown, Work, beyond, prime_from
from .recorded_pattern import picture_of

if TYPE_CHECKING:
    from .graph import SiteGraph, Sizes
    from .record import AttentionSite


class WindowSites(SiteKind):
    """What is particular to SlidingWindowAttention."""

    def words(self, site: AttentionSite) -> str:
        """The band, side by side, then dilation and causality."""
        sides = ("left_window_size", "left"), ("right_window_size", "right")
        words = [f"{size if (size := site.attributes.get(name, -1)) >= 0 else 'all'} {side}" for name, side in sides]
        if max(_dilation(site)) > 1:
            words.append(f"dilation {'/'.join(str(step) for step in _dilation(site))}")
        if site.attributes.get("is_causal", 0):
            words.append("causal")
        return ", ".join(words)

    def short(self, site: AttentionSite) -> tuple[str, str]:
        """E.g. ``("dilated window", "4095+0 ×1/2")``."""
        left, right = _sides(site)
        dilation = _dilation(site)
        words = ["causal"] if site.attributes.get("is_causal", 0) or _whole_past(site) else []
        words += ["dilated"] if max(dilation) > 1 else []
        if max(left, right) >= 0 and (max(dilation) > 1 or not _whole_past(site)):
            words.append("window")
        words = words or ["full"]
        step = f" ×{'/'.join(map(str, dilation))}" if max(dilation) > 1 else ""
        return " ".join(words), "+".join("all" if size < 0 else str(size) for size in (left, right)) + step

    @property
    def is_window(self) -> bool:
        """Its sizes are keys before and after the query."""
        return True

    def reach(self, site: AttentionSite) -> int:
        """The longer side; -1 when one is unbounded."""
        sides = _sides(site)
        return -1 if min(sides) < 0 else max(sides) * max(_dilation(site))

    def sweep(self, site: AttentionSite, always_global: int) -> SweepLengths:
        """With ``e`` keys on the longer side, the query's own included, and ``w`` in the band: around e, w, 2w, 3w."""
        left, right = _sides(site)
        right = 0 if site.attributes.get("is_causal", 0) else right
        if left < 0 or right < 0:
            return SweepLengths(frozenset(), frozenset())
        step = max(_dilation(site))
        edge, band = max(left, right) * step + 1 + always_global, (left + right) * step + 1
        lengths = {edge, edge + 1, band - 1, band, band + 1, 2 * band + 1, prime_from(3 * band)}
        return SweepLengths(frozenset(lengths), frozenset({edge, edge + 1}))

    def keys(self, site: AttentionSite, length: int) -> int:
        """Keys of the band; a global token's row sees them all."""
        left, right = _sides(site)
        if "global_mask" in site.inputs or left < 0 or right < 0:
            return length
        return int(min(length, left + right + 1))

    def standard_refusal(self, site: AttentionSite) -> str:
        """What Attention lacks."""
        more = beyond(site, ("Q", "K", "V", "attn_mask", "nonpad_kv_seqlen"))
        if more:
            return f"ONNX Attention has no {more}"
        if max(_dilation(site)) > 1:
            return "ONNX Attention has no dilation"
        if max(_sides(site)) < 0 or _whole_past(site):
            return "ONNX Runtime 1.31 stores S x S scores for Attention, whatever it masks"
        return "Attention-25's windows are rejected by ONNX Runtime 1.31; Attention-24 needs an S x S mask instead"

    def contrib_refusal(self, site: AttentionSite) -> str:
        """What GroupQueryAttention and LongformerAttention lack."""
        if not site.attributes.get("is_causal", 0) and not _whole_past(site):
            return "GroupQueryAttention is causal only; LongformerAttention runs on CUDA only, with its weights inside"
        if max(_dilation(site)) > 1:
            return "GroupQueryAttention has no dilation"
        if _whole_past(site):
            return "GroupQueryAttention takes lengths of texts instead of a mask, so padding at their end only"
        return "GroupQueryAttention's CPU kernel scores the keys left of the window as well"

    @property
    def growth(self) -> str:
        """A window costs every query the same."""
        return "linear in the length"

    def work(self, site: AttentionSite, graph: SiteGraph, length: int, global_tokens: int) -> Work:
        """The pairs of the band, and of global tokens.

        Where the site's rows are not the text's (chunks that became rows of a larger batch), the band says nothing
        about the text, and the pattern that was recorded is counted instead.
        """
        attributes = Attributes.from_mapping(site.attributes)
        sizes = graph.sizes(site)
        # Where the heads are unknown, as many as have a dilation of their own stand for all: the shares are the same.
        heads = sizes.heads or len(attributes.dilation)
        pairs = heads * length * length
        globals_here = min(global_tokens, length) if "global_mask" in site.inputs else 0
        banded = min(pairs, cost(_shapes(sizes, heads, length), attributes, global_tokens=globals_here).pairs)
        recorded = site.recorded
        if recorded is None or {"global_mask", "spans"} & set(site.inputs):
            return Work(length, banded, banded, pairs)
        try:
            counted = recorded.terms(Lengths.of(length), heads)
        except InvalidRequest as error:
            raise Unknown(f"the pattern recorded cannot be counted for {length:,} tokens: {error}") from error
        if graph.rows(site, length) != length:
            return Work(length, counted, counted, pairs)
        notes = [] if counted == banded else [f"its band counts {banded:,} pairs, the pattern recorded {counted:,}"]
        return Work(length, banded, banded, pairs, tuple(notes))

    def picture_width(self, site: AttentionSite) -> int:
        """The whole band; bounded sides only."""
        attributes = Attributes.from_mapping(site.attributes)
        left, right = attributes.band(0)
        return (left + right) * max(attributes.dilation)

    def picture(self, site: AttentionSite, graph: SiteGraph | None, scale: Scale, global_tokens: int) -> list[Cells]:
        """The band drawn small (`masks.sketch`), or the recorded pattern where the site's rows are not the text's."""
        recorded = site.recorded
        if graph is not None and recorded is not None and graph.rows(site, scale.length) != scale.length:
            return picture_of(recorded, scale)
        band = sketch(site.attributes, scale)
        seen = sketch(site.attributes, scale, global_tokens) if "global_mask" in site.inputs else band
        return [
            np.where(own, SEEN, np.where(more, GLOBAL, UNSEEN)).astype(np.uint8)
            for own, more in zip(band, seen, strict=True)
        ]


def _sides(site: AttentionSite) -> tuple[int, int]:
    return site.attributes.get("left_window_size", -1), site.attributes.get("right_window_size", -1)


def _whole_past(site: AttentionSite) -> bool:
    """Whether it is plain causal attention."""
    left, right = _sides(site)
    return left < 0 and (right == 0 or bool(site.attributes.get("is_causal", 0)))


def _dilation(site: AttentionSite) -> list[int]:
    dilation: list[int] = site.attributes.get("dilation", [1])
    return dilation


def _shapes(sizes: Sizes, heads: int, length: int) -> Shapes:
    return Shapes("bsd", 1, heads, sizes.kv_heads or heads, length, length, sizes.head_size, sizes.v_head_size)
