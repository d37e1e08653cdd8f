"""What one call of flex_attention computes, told from the functions that it was given in several runs of the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.nn.attention import flex_attention as flex

from ...errors import ExportFailed
from ...patterns import Lengths, Pattern
from .lists import FrozenLists
from .mask_mods import Grids, MaskMod, Reach, read_pattern
from .score_mods import ScoreMod, ScoreParts, Sizes, hides

_SHORTEST = 32
"""Half of the length of a text from which a pattern may be read."""

_FIX = "fix the sequence length (dynamic_shapes without a Dim for it)"


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of flex_attention did in one run; its functions may be others in the next.

    Attributes:
        layer: The module that calls.
        sizes: Sizes of the call.
        score: What is done to the scores.
        seen: The pairs that mask_mod and score_mod leave.
        reads_inputs: Whether which they are depends on what is computed from the inputs.
        bias_reads_inputs: Whether score_mod reads such tensors.
        block_size: Queries and keys in a block of the BlockMask.
        pattern: The pattern of `seen`, read where positions have no end; None where there is none.
        frozen: Lists that hold up to some length, where there is no pattern, or that are the model's own.
        own_lists: Whether they are the model's own, and no other lists will do.
        longest: Tokens that a tensor has which the functions read; None without such an end.
        documents: Tensors of the mask that number the tokens so that no pair of two numbers is seen (`tensors_of`).
    """

    layer: str
    sizes: Sizes
    score: ScoreParts
    seen: Grids
    reads_inputs: bool
    bias_reads_inputs: bool
    block_size: tuple[int, int]
    pattern: Pattern | None = None
    frozen: FrozenLists | None = None
    own_lists: bool = False
    longest: int | None = None
    documents: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Meaning:
    """What one call computes.

    Attributes:
        layer: The module that calls.
        score: What is done to the scores.
        pattern: Which keys a query sees, where that is a pattern.
        frozen: Its block lists, where it is not.
        block_size: Block size that the model chose; None where queries and keys have different ones.
        documents: Tensor of the mask that keeps documents apart, where they are computed from the inputs.
        causal: Whether a mask of documents hides every key after the query.
        longest: Longest text that its functions can be asked about; None without an end.
        padding: Whether keys are hidden besides, by a mask that is computed from the inputs: the diagonal of mask_mod.
    """

    layer: str
    score: ScoreParts
    pattern: Pattern | None = None
    frozen: FrozenLists | None = None
    block_size: int | None = None
    padding: bool = False
    documents: str = ""
    causal: bool = False
    longest: int | None = None


def read_meaning(calls: Sequence[Call], redrawn: Sequence[Call], open_length: bool) -> Meaning:
    """What a call computes.

    Args:
        calls: The same call in several runs, of different lengths and batch sizes; the first knows patterns and lists.
        redrawn: The same call in runs on inputs that were drawn at random.
        open_length: Whether the exported model is to accept any length.

    Raises:
        ExportFailed: it is nothing that the operators compute; the message says what was seen.
    """
    first = calls[0]
    tall, wide = first.block_size
    size = tall if tall == wide and tall < flex._LARGE_SPARSE_BLOCK_SIZE else None
    common: dict[str, Any] = {
        "layer": first.layer,
        "score": _score((*calls, *redrawn)),
        "block_size": size,
        "longest": first.longest,
    }
    if first.own_lists:
        if open_length:
            raise ExportFailed(
                f"{first.layer}: its BlockMask has block lists of its own, for {first.sizes.queries} queries and "
                f"{first.sizes.keys} keys; allowed: that length; next step: {_FIX}"
            )
        return Meaning(**common, frozen=first.frozen)
    if any(call.reads_inputs for call in calls):
        pattern = _under_padding(calls, redrawn)
        if pattern is not None:
            return Meaning(**common, pattern=pattern, padding=True)
        return Meaning(**common, documents=_documents((*calls, *redrawn)), causal=_causal((*calls, *redrawn)))
    pattern = _pattern(calls)
    if pattern is not None:
        return Meaning(**common, pattern=pattern)
    if first.frozen is None or not all(_same_where_both(first, call) for call in calls):
        differs = first.frozen is not None or len({_beginning(call, calls) for call in calls}) > 1
        raise ExportFailed(
            f"{first.layer}: the mask_mod follows no rule that holds at every length"
            + (": a pair of tokens is seen in a text of one length and hidden in another" if differs else "")
            + "; allowed: what depends on distances, on a period, and on the first tokens; or what is read from a "
            f"tensor of the model; next step: {_FIX}"
        )
    return Meaning(**common, frozen=first.frozen)


def combined(mask_mod: MaskMod, score_mod: ScoreMod | None, score: ScoreParts) -> MaskMod:
    """The mask of a call: its mask_mod, and the pairs that its score_mod does not hide."""
    if score_mod is None or not score.hides:
        return mask_mod
    left = hides(score_mod)
    return lambda b, h, q, k: mask_mod(b, h, q, k) & left(b, h, q, k)


def _score(calls: Sequence[Call]) -> ScoreParts:
    """What all runs do to the scores."""
    layer, parts = calls[0].layer, [call.score for call in calls]
    if len({(part.factor, part.softcap) for part in parts}) > 1:
        raise ExportFailed(
            f"{layer}: the score_mod multiplies or bounds scores differently in other texts; allowed: factors "
            f"and softcaps that are constants; next step: {_FIX}"
        )
    bias = any(part.bias for part in parts)
    if bias and any(call.bias_reads_inputs for call in calls):
        raise ExportFailed(
            f"{layer}: the score_mod adds a bias and reads a tensor that is computed from the model's inputs, so "
            "that the bias may be another for other inputs; allowed: constants, parameters and buffers; next step: "
            "compute what it adds from those"
        )
    # Whether it hides a pair, or heads differ, may show at some lengths only.
    by_head, hiding = any(part.by_head for part in parts), any(part.hides for part in parts)
    return ScoreParts(parts[0].factor, parts[0].softcap, bias, by_head, hiding)


def _pattern(calls: Sequence[Call]) -> Pattern | None:
    """The pattern that all runs follow; None where there is none, or batch entries differ."""
    if not all(call.seen.alike_in_batch for call in calls):
        return None
    candidates = [calls[0].pattern]
    if len(calls) > 1:
        # A mask that knows the length may be asked about no more than that.
        longest = max(calls, key=lambda call: min(call.sizes.queries, call.sizes.keys))
        far = min(longest.sizes.queries, longest.sizes.keys) // 2
        if far >= _SHORTEST:
            heads = 1 if longest.seen.alike_in_heads else longest.sizes.heads
            candidates.append(read_pattern(longest.seen, heads, Reach(far, endless=False)))
    return next((each for each in candidates if each is not None and all(_follows(each, call) for call in calls)), None)


def _follows(pattern: Pattern, call: Call) -> bool:
    lengths = Lengths(call.sizes.queries, call.sizes.keys)
    query, key = lengths.queries()[:, None], lengths.keys()[None, :]
    heads = max(pattern.heads, call.seen.seen.shape[1])
    return all(
        np.array_equal(call.seen.at(0, head), pattern.head(head).allowed(query, key, lengths)) for head in range(heads)
    )


def _under_padding(calls: Sequence[Call], redrawn: Sequence[Call]) -> Pattern | None:
    """The pattern of a mask that hides keys besides, as the inputs say; None where it does something else."""
    # What any batch entry sees is all that is seen without padding, if every key is in some entry.
    together = [
        dataclasses.replace(call, seen=Grids(np.logical_or.reduce(call.seen.seen, 0, keepdims=True)), pattern=None)
        for call in calls
    ]
    pattern = _pattern(together)
    if pattern is None or not all(_hides_keys(pattern, call) for call in (*calls, *redrawn)):
        return None
    return pattern


def _documents(calls: Sequence[Call]) -> str:
    """The tensor that keeps documents apart in every run.

    Raises:
        ExportFailed: there is none.
    """
    common = sorted(frozenset.intersection(*(call.documents for call in calls)))
    if not common or not all(call.seen.alike_in_heads for call in calls):
        raise ExportFailed(
            f"{calls[0].layer}: the mask_mod reads a tensor that is computed from the model's inputs, and does more "
            "with it than to hide keys or to keep documents apart: which blocks of keys a query needs is then known "
            "only after all its pairs were looked at; allowed: a mask of positions & padding[b, kv_idx], and masks "
            "that hide all pairs with number[b, q_idx] != number[b, kv_idx], alike for all heads; next step: block "
            "lists as inputs of the model (longspan.plugins.block_sparse_attention.torch_op)"
        )
    return common[0]


def _causal(calls: Sequence[Call]) -> bool:
    """Whether no run sees a key after its query."""
    return not any(np.triu(call.seen.seen.any((0, 1)), 1).any() for call in calls)


def _hides_keys(pattern: Pattern, call: Call) -> bool:
    """Whether a mask is a pattern, of those keys that see themselves."""
    sizes = call.sizes
    if sizes.queries != sizes.keys:
        return False
    lengths = Lengths.of(sizes.keys)
    token = lengths.keys()
    for entry in range(sizes.batch):
        valid = call.seen.at(entry, 0).diagonal()
        for head in range(sizes.heads):
            wanted = pattern.head(head).allowed(token[:, None], token[None, :], lengths) & valid
            if not np.array_equal(call.seen.at(entry, head), wanted):
                return False
    return True


def _beginning(call: Call, calls: Sequence[Call]) -> bytes:
    """What a run shows of the pairs that all runs have."""
    queries, keys = (min(getattr(each.sizes, name) for each in calls) for name in ("queries", "keys"))
    return call.seen.seen[0, :, :queries, :keys].tobytes()


def _same_where_both(one: Call, other: Call) -> bool:
    """Whether two runs of different lengths show the same pairs where both have them."""
    queries, keys = (min(getattr(each.sizes, name) for each in (one, other)) for name in ("queries", "keys"))
    return all(
        np.array_equal(one.seen.at(entry, head)[:queries, :keys], other.seen.at(entry, head)[:queries, :keys])
        for entry in range(min(one.sizes.batch, other.sizes.batch))
        for head in range(one.sizes.heads)
    )
