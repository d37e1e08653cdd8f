"""What a FlexAttention ``score_mod`` does to a score: the parts that an operator has, read from values and proved.

A score_mod maps a score and the indices of its batch entry, head, query and key to another score. The operators compute
``softcap(scale · score) + bias(head, k - q)``, and hide pairs. A score_mod is accepted if it is that: at every pair of
a grid and for scores of every size, -∞ is returned for a pair whatever its score, or the part that depends on the score
is the same for all pairs and a multiple or ``c · tanh(s · a / c)`` of it, and the rest is the same for all pairs of one
head and one distance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...errors import ExportFailed
from .mask_mods import Integers, MaskMod, MaskValues, Seen

ScoreMod = Callable[..., Any]
Numbers = npt.NDArray[np.float64]

_SCORES = np.array([-1e3, -60.0, -7.5, -1.0, -1e-2, 0.0, 1e-3, 0.5, 2.0, 31.0, 250.0])
"""Scores that are tried; 0 among them."""

_ZERO = list(_SCORES).index(0.0)
_LARGE = 2.0**100
_BATCH = 3
_POSITIONS = 96
_ROUNDING = 1e-5
"""Largest relative difference that counts as rounding: a bias may be computed in float32."""

_FLOAT32 = 5e-7
"""What a few roundings to float32 make of a score with its bias, relative to both."""

_LARGEST_BIAS = 1e4
"""What counts as a bias; -1e9 is meant to hide, and must not pass for the rounding of anything."""

_ALLOWED = (
    "allowed: factors of the score, c·tanh(score / c), then a bias by head and by the distance k - q (ALiBi, tables of "
    "relative positions), in this order, and -inf for pairs that are hidden"
)


@dataclass(frozen=True)
class ScoreParts:
    """A score_mod in the operator's terms.

    Attributes:
        factor: What scores are multiplied by.
        softcap: Then bounded by; 0 for not at all.
        bias: Whether a bias by distance is added.
        by_head: Whether the bias differs between heads.
        hides: Whether -inf is returned for some pairs.
    """

    factor: float = 1.0
    softcap: float = 0.0
    bias: bool = False
    by_head: bool = False
    hides: bool = False


@dataclass(frozen=True)
class Sizes:
    """Of one call of flex_attention.

    Attributes:
        batch: Batch entries.
        heads: Query heads.
        queries: Query rows.
        keys: Keys.
    """

    batch: int
    heads: int
    queries: int
    keys: int


@dataclass(frozen=True)
class _Asked:
    """A score_mod's values at some pairs of a call.

    Attributes:
        query: int64 (queries,), which.
        key: int64 (keys,), which.
        values: (scores, batch, heads, queries, keys).
        left: bool (batch, heads, queries, keys), pairs that are not hidden, by the mask or by the score_mod.
    """

    query: Integers
    key: Integers
    values: Numbers
    left: Seen

    @property
    def bias(self) -> Numbers:
        """(batch, heads, queries, keys), the values at a score of 0 of pairs that are left, else 0."""
        return np.where(self.left, self.values[_ZERO], 0.0)


def read_score_mod(score_mod: ScoreMod, mask_mod: MaskMod, sizes: Sizes, layer: str) -> ScoreParts:
    """Find the parts of a score_mod and prove them on the pairs of one call.

    Args:
        score_mod: The function.
        mask_mod: The mask that goes with it; what it hides does not matter.
        sizes: Sizes of the call.
        layer: The module that calls, for messages.

    Raises:
        ExportFailed: the score_mod is something else; the message says what was seen.
    """
    query, key = _spread_out(sizes.queries), _spread_out(sizes.keys)
    entries = range(min(sizes.batch, _BATCH))
    values = np.stack([_values(score_mod, score, len(entries), sizes.heads, query, key) for score in _SCORES])
    hidden = np.isneginf(values)
    if not (np.isfinite(values) | hidden).all():
        raise _refused(layer, "gives NaN or +inf for some scores")
    if (hidden != hidden[:1]).any():
        raise _refused(layer, "hides pairs by their score")
    allowed = np.stack([[MaskValues(mask_mod, b).grid(h, query, key) for h in range(sizes.heads)] for b in entries])
    asked = _Asked(query, key, np.where(hidden, 0.0, values), allowed & ~hidden[0])
    hiding = bool(hidden.any())
    if not asked.left.any():
        return ScoreParts(hides=hiding)
    factor, softcap = _of_score(score_mod, asked, layer)
    bias = asked.bias
    size = float(np.abs(bias).max())
    if not size:
        return ScoreParts(factor, softcap, hides=hiding)
    if _spread(bias, asked.left, (0,)) > _ROUNDING * size:
        raise _refused(layer, "depends on the batch index beyond the score")
    _refuse_beyond_distance(score_mod, asked, sizes, layer)
    return ScoreParts(factor, softcap, True, _spread(bias, asked.left, (0, 1)) > _ROUNDING * size, hiding)


def hides(score_mod: ScoreMod) -> Callable[..., Any]:
    """The mask_mod of the pairs that a score_mod does not give -inf."""

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        # At a score of 0 no multiple of it is NaN.
        return ~torch.isneginf(score_mod(torch.zeros((), dtype=torch.float64), b, h, q, k))

    return seen


def bias_at(
    score_mod: ScoreMod, heads: int, query: torch.Tensor, key: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The bias of a score_mod at some pairs, as part of a model's computation.

    Args:
        score_mod: One that has a bias by distance.
        heads: How many heads, from 0 on, are asked about.
        query: int64 (n,), indices of queries.
        key: int64 (n,), of keys.
        dtype: Type that is wanted.

    Returns:
        (heads, n); 0 where the pair is hidden.
    """
    bias: torch.Tensor = _over_heads(score_mod, heads, query, key, dtype)
    return bias.masked_fill(bias == -torch.inf, 0).to(dtype)


def _over_heads(score_mod: ScoreMod, heads: int, query: torch.Tensor, key: torch.Tensor, dtype: torch.dtype) -> Any:
    """(heads, n), the values of a score of 0 of batch entry 0 at n pairs."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    over_pairs = torch.vmap(score_mod, in_dims=(None, None, None, 0, 0))
    over_heads = torch.vmap(over_pairs, in_dims=(None, None, 0, None, None))
    device = query.device
    zero = torch.zeros((), dtype=dtype, device=device), torch.zeros((), dtype=torch.int64, device=device)
    with TransformGetItemToIndex():
        return over_heads(*zero, torch.arange(heads, device=device), query, key)


def _spread_out(length: int) -> Integers:
    """Positions of a text that are tried: all of a short one, else its start, its end, and some between."""
    if length <= _POSITIONS:
        return np.arange(length)
    between = np.linspace(_POSITIONS // 2, length - 1, _POSITIONS // 4).astype(np.int64)
    return np.unique(np.concatenate([np.arange(_POSITIONS // 2), between, np.arange(length - _POSITIONS // 4, length)]))


def _values(score_mod: ScoreMod, score: float, batch: int, heads: int, query: Integers, key: Integers) -> Numbers:
    """(batch, heads, queries, keys) of one score."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from torch.nn.attention.flex_attention import _vmap_for_bhqkv

    scores = torch.full((batch, heads, len(query), len(key)), score, dtype=torch.float64)
    indices = torch.arange(batch), torch.arange(heads), torch.from_numpy(query), torch.from_numpy(key)
    with TransformGetItemToIndex():
        found = _vmap_for_bhqkv(score_mod, prefix=(0,))(scores, *indices)
    values: Numbers = found.detach().to(torch.float64).numpy()
    return values


def _of_score(score_mod: ScoreMod, asked: _Asked, layer: str) -> tuple[float, float]:
    """Factor and softcap."""
    change = asked.values - asked.values[_ZERO]
    # Where the bias is smallest, it takes least of the score away in rounding.
    where = np.unravel_index(int(np.where(asked.left, np.abs(asked.values[_ZERO]), np.inf).argmin()), asked.left.shape)
    wanted = change[(slice(None), *where)]
    size = np.minimum(np.abs(asked.values) + np.abs(asked.bias).max(), _LARGEST_BIAS)
    allowed = _ROUNDING * (np.abs(wanted) + np.abs(wanted).max() * 1e-7)[:, None, None, None, None] + _FLOAT32 * size
    if ((np.abs(change - wanted[:, None, None, None, None]) > allowed) & asked.left).any():
        axes = ("the batch index", "the head", "q_idx", "kv_idx")
        on = [
            name
            for axis, name in enumerate(axes)
            if any(_spread(each, asked.left, (axis,)) > _ROUNDING * np.abs(each).max() for each in change[_SCORES != 0])
        ]
        raise _refused(layer, f"changes scores in a way that depends on {' and '.join(on) or 'the pair'}")
    b, h, q, k = where
    point = [torch.tensor(int(index)) for index in (b, h, asked.query[q], asked.key[k])]

    def swing(score: float) -> float:
        """Half the change from the negative of a score to the score: all but the bias, which both parts are odd in."""
        high, low = (float(score_mod(torch.tensor(each, dtype=torch.float64), *point)) for each in (score, -score))
        return (high - low) / 2

    top = swing(_LARGE)
    if abs(top) > _LARGE * 1e-12 or not top:
        factor, softcap = top / _LARGE, 0.0
        expected = factor * _SCORES
    else:
        factor, softcap = _bent(swing, top)
        expected = softcap * np.tanh(_SCORES * factor / softcap)
    if not np.isfinite(expected).all() or (np.abs(wanted - expected) > allowed[(slice(None), *where)]).any():
        raise _refused(layer, "is neither a multiple of the score nor c·tanh(score / c) of it, plus a bias")
    return factor, softcap


def _bent(swing: Callable[[float], float], top: float) -> tuple[float, float]:
    """Factor and softcap of ``c·tanh(s · a / c)``; NaN where it is none."""
    softcap, probe, factor = abs(top), abs(top), 0.0
    for _ in range(8):
        # Where the curve bends, its argument is known best.
        ratio = swing(probe) / softcap
        if 0.05 < abs(ratio) < 0.95:
            factor = softcap * math.atanh(ratio) / probe
            break
        probe *= 8.0 if abs(ratio) < 0.05 else 0.125
    rounded = float(f"{factor:.12g}")
    return (rounded if math.isclose(rounded, factor, rel_tol=1e-13) else factor) or math.nan, softcap


def _refuse_beyond_distance(score_mod: ScoreMod, asked: _Asked, sizes: Sizes, layer: str) -> None:
    """Refuse a bias that is not the same at all pairs of a distance, the first of which is where it is read."""
    size = float(np.abs(asked.bias).max())
    reach = sizes.queries - 1
    distance = np.arange(-reach, sizes.keys)
    query, key = (torch.from_numpy(np.maximum(sign * distance, 0)) for sign in (-1, 1))
    first: Numbers = _over_heads(score_mod, sizes.heads, query, key, torch.float64).detach().numpy()
    offset = asked.key[None, :] - asked.query[:, None]
    unlike = np.abs(asked.values[_ZERO] - first[:, offset + reach][None])
    wrong = asked.left & ~(unlike <= _ROUNDING * size)
    if wrong.any():
        _, _, q, k = (int(axis[0]) for axis in wrong.nonzero())
        at = f"kv_idx - q_idx = {asked.key[k] - asked.query[q]} at q_idx {asked.query[q]}"
        raise _refused(layer, f"adds something that depends on q_idx beyond the distance k - q ({at})")


def _spread(values: Numbers, left: Seen, axes: tuple[int, ...]) -> float:
    """Largest difference of values that differ in some indices only, of pairs that matter."""
    low = np.where(left, values, np.inf).min(axes)
    high = np.where(left, values, -np.inf).max(axes)
    some = left.any(axes)
    return float((high - low)[some].max(initial=0.0))


def _refused(layer: str, seen: str) -> ExportFailed:
    return ExportFailed(
        f"{layer}: the score_mod {seen}; {_ALLOWED}; next step: write it as these, or compute what it adds before or "
        "after the attention"
    )
