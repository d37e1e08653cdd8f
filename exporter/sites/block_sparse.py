"""Sites of BlockSparseAttention: what they compute stands in block lists, which the graph holds or computes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...plugins.block_sparse_attention.definition import DEFAULT_BLOCK
from ..errors import InvalidRequest
from ..masks import Scale
from .kind import PARTLY, SEEN, UNSEEN, Cells, SiteKind, SweepLengths, Unknown, Work, beyond, prime_from
from .recorded_pattern import picture_of

if TYPE_CHECKING:
    from .graph import SiteGraph
    from .record import AttentionSite

FIXED, GIVEN, COMPUTED = "fixed", "given", "computed"
"""Where the lists of a site come from: the file, an input of the model, or the graph."""

_ORIGINS = {
    FIXED: "lists fixed in the model",
    GIVEN: "lists given to the model",
    COMPUTED: "lists computed in the model",
}
LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "block_mask_ids", "block_masks")
"""Inputs of the operator that say which pairs are listed."""

_MOST_THRESHOLDS = 8


class BlockSparseSites(SiteKind):
    """What is particular to BlockSparseAttention."""

    def words(self, site: AttentionSite) -> str:
        """The recorded pattern, or where the lists come from; then the blocks and what the node adds to the lists."""
        recorded = site.recorded
        tall, wide = _blocks(site)
        blocks = f"blocks of {tall} x {wide}"
        words = [recorded.describe(), f"in {blocks}"] if recorded else [blocks, _ORIGINS.get(site.lists, "lists")]
        if site.attributes.get("is_causal", 0) and "causal" not in words[0]:
            words.append("causal")
        if site.attributes.get("exclude_self", 0):
            words.append("without the query itself")
        if "q_positions" in site.inputs:
            words.append("at given positions")
        return ", ".join(words)

    def short(self, site: AttentionSite) -> tuple[str, str]:
        """E.g. ``("causal block sparse", "64x64")``."""
        words = ["causal"] if site.attributes.get("is_causal", 0) else []
        return " ".join([*words, "block sparse"]), "x".join(map(str, _blocks(site)))

    @property
    def is_window(self) -> bool:
        """Its sizes are queries and keys in a block."""
        return False

    def reach(self, site: AttentionSite) -> int:
        """No bound is known: lists may name any block."""
        return -1

    def sweep(self, site: AttentionSite, always_global: int) -> SweepLengths:
        """Lengths around multiples of the blocks, and around the thresholds of the pattern where one is recorded.

        Without a record nobody knows from which length on the lists leave something out, so lengths of many blocks are
        met, on and off the blocks.
        """
        lengths: set[int] = set()
        largest = max(_blocks(site))
        for size in set(_blocks(site)):
            lengths |= {size - 1, size, size + 1, 2 * size, 3 * size + 1}
        recorded = site.recorded
        if recorded is None:
            last = 16 * largest
            edges: set[int] = set()
            lengths |= {8 * largest - 1, 8 * largest, last, last + 1, prime_from(last + largest)}
        else:
            thresholds = _some(recorded.thresholds)
            edges = {length + more for length in thresholds for more in (0, 1)}
            # The first whole number of blocks that shows everything, and one with room to spare.
            last = (max(thresholds, default=0) // largest + 1) * largest
            lengths |= edges | {last - 1, last, last + 1, 2 * last, prime_from(2 * last + 1)}
        return SweepLengths(frozenset(lengths), frozenset(edges))

    def keys(self, site: AttentionSite, length: int) -> int:
        """All of them: a row of blocks may list every block."""
        return length

    def standard_refusal(self, site: AttentionSite) -> str:
        """What Attention lacks."""
        if "sinks" in site.inputs:
            return "ONNX Attention has no sinks"
        return "ONNX Attention takes a pattern as an S x S mask only, and computes every pair"

    def contrib_refusal(self, site: AttentionSite) -> str:
        """What SparseAttention and GroupQueryAttention lack; a cache and a causal layout are what they are made for."""
        # Masks inside blocks may be causal ones, of a pattern that is causal without the attribute.
        if not site.attributes.get("is_causal", 0) and "block_masks" not in site.inputs:
            return "SparseAttention and GroupQueryAttention are causal only"
        lacking = [
            words
            for lacks, words in (
                ("block_masks" in site.inputs, "masks inside blocks"),
                (site.attributes.get("exclude_self", 0), "way to leave out the query itself"),
                (site.attributes.get("softcap", 0.0) > 0, "softcap"),
            )
            if lacks
        ]
        extra = beyond(site, ("Q", "K", "V", *LISTS, "nonpad_kv_seqlen"))
        if extra:
            lacking.append(extra)
        if lacking:
            return f"SparseAttention has no {', '.join(lacking)}"
        return (
            "SparseAttention wants a cache of keys and values as input and output, has one layout for all rows of a "
            "batch, and counts no key twice"
        )

    @property
    def growth(self) -> str:
        """Nothing is computed of a block that is not listed."""
        return "linear in the blocks listed"

    def work(self, site: AttentionSite, graph: SiteGraph, length: int, global_tokens: int) -> Work:
        """What the lists say that the graph computes; compared with the recorded pattern where there is one."""
        if site.lists == GIVEN:
            raise Unknown("its lists are inputs of the model, so that nothing is known before it runs")
        listed = graph.listed(site, length)
        heads = graph.sizes(site).heads or listed.heads
        repeats = heads // listed.heads
        terms = repeats * sum(listed.terms(head) for head in range(listed.heads))
        computed = repeats * sum(listed.computed(head) for head in range(listed.heads))
        notes, meant = [], length
        if site.lists == FIXED and listed.attributes.q_blocks(length) != listed.attributes.q_blocks(listed.seq_q):
            meant = listed.seq_q
            notes.append(
                f"its lists are fixed for {listed.seq_q:,} tokens; what is said of it is for those, not for {length:,}"
            )
        recorded = site.recorded
        if recorded is not None:
            try:
                difference = listed.differs_from(recorded)
            except InvalidRequest as error:
                difference = f"the pattern cannot be asked: {error}"
            if difference:
                notes.append(f"its lists are not the pattern that is recorded ({recorded.describe()}): {difference}")
        return Work(meant, terms, computed, heads * listed.pairs, tuple(notes))

    def picture_width(self, site: AttentionSite) -> int:
        """As many tokens as show all that the recorded pattern does; else some blocks, more where they are whole."""
        recorded = site.recorded
        if recorded is not None and recorded.thresholds:
            return max(recorded.thresholds)
        return (2 if "block_masks" in site.inputs else 8) * max(_blocks(site))

    def picture(self, site: AttentionSite, graph: SiteGraph | None, scale: Scale, global_tokens: int) -> list[Cells]:
        """The blocks that are listed for a text of the picture's length, to scale."""
        if graph is None:
            recorded = site.recorded
            if recorded is None:
                raise Unknown(f"{_ORIGINS.get(site.lists, 'its lists')}; longspan inspect --picture draws them")
            return picture_of(recorded, scale)
        if site.lists == GIVEN:
            raise Unknown(_ORIGINS[GIVEN])
        listed = graph.listed(site, scale.length)
        pictures = []
        for head in range(listed.heads):
            share = listed.coverage(head, scale.unit, scale.cells)
            pictures.append(np.where(share == 1, SEEN, np.where(share > 0, PARTLY, UNSEEN)).astype(np.uint8))
        return pictures


def _blocks(site: AttentionSite) -> tuple[int, int]:
    tall, wide = (site.attributes.get(f"{side}_block_size", DEFAULT_BLOCK) for side in ("q", "kv"))
    return tall, wide


def _some(thresholds: tuple[int, ...]) -> tuple[int, ...]:
    """Of many thresholds the smallest, the largest, and some between."""
    if len(thresholds) <= _MOST_THRESHOLDS:
        return thresholds
    places = np.unique(np.linspace(0, len(thresholds) - 1, _MOST_THRESHOLDS).round().astype(int))
    return tuple(thresholds[place] for place in places)
