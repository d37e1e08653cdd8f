"""LongT5 (Guo et al. 2022): T5's encoder with local attention, alone or beside summaries of the text's blocks.

*Local*: a query sees keys at a distance of at most ``local_radius``. Scores are not scaled; a bias by distance, learned
in buckets, is added to them. The first layer owns it and the others share it.

*Transient-global*: besides, every query sees one side key for each full block of ``global_block_size`` tokens: the sum
of the block's hidden states, normalised, through the same projections, with a bias by distance in blocks. Local and
side keys share one softmax. Side keys are few but not bounded, so that their part is standard operators, quadratic in
the length over ``global_block_size`` as in the model itself; the log-sum-exp of the local part merges the two.

The eager code cuts the text into blocks of ``local_radius + 1``, padded at the end; what it computes for tokens that
are not padding does not depend on that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..sites.record import StandardSite
from .base import Family, modules_of_class, replaced

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..conversion import Conversion

_MODELING = "transformers.models.longt5.modeling_longt5"
_LOCAL = "LongT5LocalAttention"
_TRANSIENT_GLOBAL = "LongT5TransientGlobalAttention"


@dataclass(frozen=True)
class _Bias:
    """What the first layer hands to the others as their position bias.

    Attributes:
        band: (1, H, 1, 2·radius + 1), for keys from the farthest before a query to the farthest after it.
        blocks: What transient-global attention needs beside it; None where attention is local.
    """

    band: torch.Tensor
    blocks: _Blocks | None = None


@dataclass(frozen=True)
class _Blocks:
    """How a text is cut into global blocks; made once and used by every layer.

    There are two slots more than the text's length has blocks, so that no axis is empty or, to torch.export, maybe one.

    Attributes:
        padding: bool (B, S), True = attend.
        token: int64 (B, slots, size), the token at each place of the blocks, in rows of S + 1 whose last one is zero.
        joins: (B, slots, slots), 1 where the tokens of block m (last axis) are summed in slot g.
        bias: (H, B, S, slots), added to the scores of side keys; -inf for slots without a block.
    """

    padding: torch.Tensor
    token: torch.Tensor
    joins: torch.Tensor
    bias: torch.Tensor


def _sites(model: nn.Module, conversion: Conversion) -> list[str]:
    return modules_of_class(model, _LOCAL) + modules_of_class(model, _TRANSIENT_GLOBAL)


def _standard(model: nn.Module, conversion: Conversion) -> tuple[StandardSite, ...]:
    modules: list[tuple[str, Any]] = [
        (name, model.get_submodule(name)) for name in modules_of_class(model, _TRANSIENT_GLOBAL)
    ]
    return tuple(
        StandardSite(
            f"{name} (side keys)", f"one per block of {module.global_block_size} tokens, which every query sees"
        )
        for name, module in modules
    )


def _faithful(model: nn.Module, conversion: Conversion) -> bool:
    modules: list[Any] = [model.get_submodule(name) for name in modules_of_class(model, _TRANSIENT_GLOBAL)]
    sizes = {module.global_block_size for module in modules}
    return all(size & (size - 1) == 0 for size in sizes)


def _intercept(model: nn.Module, conversion: Conversion) -> AbstractContextManager[None]:
    modules: list[Any] = [model.get_submodule(name) for name in _sites(model, conversion)]
    tables = {id(module): _Tables.of(module) for module in modules if module.has_relative_attention_bias}

    def local(
        self: Any,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        position_bias: _Bias | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, _Bias]:
        from ...plugins.sliding_window_attention.torch_op import sliding_window_attention

        bias = position_bias or _Bias(tables[id(self)].band_bias(self))
        near = _band(sliding_window_attention, self, self.q(hidden_states), hidden_states, mask, bias)
        return self.o(near), bias

    def transient_global(
        self: Any,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        position_bias: _Bias | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, _Bias]:
        import torch

        from ...plugins.sliding_window_attention.torch_op import sliding_window_attention_lse

        if mask is None:
            mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        bias = position_bias or tables[id(self)].transient_global(self, mask != 0, hidden_states.dtype)
        assert bias.blocks is not None
        query = self.q(hidden_states)
        near, lse = _band(sliding_window_attention_lse, self, query, hidden_states, bias.blocks.padding, bias)
        return self.o(_with_side_keys(self, query, hidden_states, near, lse, bias.blocks)), bias

    return replaced(
        (f"{_MODELING}:{_LOCAL}.forward", local),
        (f"{_MODELING}:{_TRANSIENT_GLOBAL}.forward", transient_global),
        (f"{_MODELING}:_get_local_attention_mask", _padding),
    )


def _padding(attention_mask: torch.Tensor | None, block_len: int, device: Any) -> torch.Tensor | None:
    """The (B, S) padding mask, in place of a mask of all pairs of neighbouring blocks."""
    return None if attention_mask is None else attention_mask != 0


def _band(
    operator: Callable[..., Any],
    attention: Any,
    query: torch.Tensor,
    hidden: torch.Tensor,
    padding: torch.Tensor | None,
    bias: _Bias,
) -> Any:
    """What `operator` returns for the local attention of (B, S, H·D) queries to the keys of `hidden`."""
    return operator(
        query,
        attention.k(hidden),
        attention.v(hidden),
        attn_mask=padding,
        band_bias=bias.band.to(hidden.dtype),
        left_window_size=attention.local_radius,
        right_window_size=attention.local_radius,
        scale=1.0,
        q_num_heads=attention.n_heads,
        kv_num_heads=attention.n_heads,
    )


def _with_side_keys(
    attention: Any,
    query: torch.Tensor,
    hidden: torch.Tensor,
    near: torch.Tensor,
    lse: torch.Tensor,
    blocks: _Blocks,
) -> torch.Tensor:
    """Merge local attention with attention to the side keys.

    Args:
        attention: The module, whose projections both parts share.
        query: (B, S, H·D), the queries of both parts.
        hidden: (B, S, channels), the module's input.
        near: (B, S, H·D), the local part.
        lse: (B, H, S), its log-sum-exp, -inf for rows without a key; the type of the softmax.
        blocks: Which tokens a side key sums, and its bias.

    Returns:
        (B, S, H·D): the softmax over the keys of both parts, with one exponential for each.
    """
    import torch

    heads, size = attention.n_heads, attention.key_value_proj_dim
    tokens = hidden.masked_fill(~blocks.padding[:, :, None], 0)
    tokens = torch.cat((tokens, tokens.new_zeros((tokens.shape[0], 1, tokens.shape[2]))), 1)
    sums = torch.nn.functional.embedding(blocks.token, tokens.flatten(0, 1)).sum(2)
    side = attention.global_input_layer_norm(blocks.joins @ sums)
    query = query.unflatten(2, (heads, size)).permute(2, 0, 1, 3)
    key = attention.k(side).unflatten(2, (heads, size)).permute(2, 0, 3, 1)
    value = attention.v(side).unflatten(2, (heads, size)).permute(2, 0, 1, 3)
    scores = (query @ key + blocks.bias).to(lse.dtype)
    lse = lse.transpose(0, 1)[..., None]
    top = torch.maximum(lse, scores.amax(-1, keepdim=True))
    top = top.masked_fill(top == -torch.inf, 0)  # exp(-inf - 0) = 0; -inf - -inf would be NaN
    near_weight, weights = torch.exp(lse - top), torch.exp(scores - top)
    total = near_weight + weights.sum(-1, keepdim=True)
    total = total.masked_fill(total == 0, 1)
    far = (weights @ value.to(weights.dtype) / total).permute(1, 2, 0, 3)
    share = (near_weight / total).permute(1, 2, 0, 3)
    merged: torch.Tensor = (near.unflatten(2, (heads, size)) * share + far).to(near.dtype).flatten(2)
    return merged


@dataclass(frozen=True)
class _Tables:
    """Bucket of each distance, from the model's own code before it is traced.

    The code takes logarithms, whose last bit may decide a bucket: none of them is left to a runtime.

    Attributes:
        band: For distances -radius … radius, in tokens.
        side: For distances -max_distance … max_distance, in blocks; beyond, nothing changes.
    """

    band: tuple[int, ...]
    side: tuple[int, ...]

    @classmethod
    def of(cls, attention: Any) -> _Tables:
        """The tables of a layer that owns a bias."""
        radius, farthest = attention.local_radius, attention.relative_attention_max_distance
        return cls(_buckets(attention, range(-radius, radius + 1)), _buckets(attention, range(-farthest, farthest + 1)))

    def band_bias(self, attention: Any) -> torch.Tensor:
        """(1, H, 1, 2·radius + 1)."""
        import torch

        weight = attention.relative_attention_bias.weight
        bias: torch.Tensor = weight[torch.tensor(self.band, device=weight.device)].t()[None, :, None, :]
        return bias

    def transient_global(self, attention: Any, padding: torch.Tensor, dtype: torch.dtype) -> _Bias:
        """Biases and blocks of a batch with this (B, S) padding mask, True = attend.

        A block is full when its last token is no padding. Tokens after as many blocks as are full belong to the last
        of these: so do the orphans at the end of a text, and on the left, padded blocks shift the count as they do in
        the model. A row without a full block has no side key.
        """
        import torch

        size, batch, length = attention.global_block_size, *padding.shape
        slots = length // size + 2
        slot = torch.arange(slots, device=padding.device)
        place = slot[:, None] * size + torch.arange(size, device=padding.device)
        row = torch.arange(batch, device=padding.device)[:, None, None]
        token = row * (length + 1) + place.clamp(max=length)
        end = place[:, -1]
        full = padding.index_select(1, end.clamp(max=length - 1)) & (end < length)
        last = full.sum(1, dtype=torch.int64)[:, None] - 1
        joins = torch.minimum(slot, last)[:, None, :] == slot[:, None]
        own = torch.minimum(torch.arange(length, device=padding.device) // size, last).clamp(min=0)

        weight = attention.global_relative_attention_bias.weight
        farthest = attention.relative_attention_max_distance
        distance = (slot - slot[:, None]).clamp(-farthest, farthest) + farthest
        table = weight[torch.tensor(self.side, device=weight.device)]
        pairs = torch.nn.functional.embedding(distance, table).permute(2, 0, 1)
        bias = pairs.index_select(1, own.reshape(-1)).reshape(-1, batch, length, slots)
        bias = bias.masked_fill((slot > last)[None, :, None, :], -torch.inf)
        return _Bias(self.band_bias(attention), _Blocks(padding, token, joins.to(dtype), bias.to(dtype)))


def _buckets(attention: Any, distances: Iterable[int]) -> tuple[int, ...]:
    import torch

    buckets = attention._relative_position_bucket(
        torch.tensor(list(distances)),
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    return tuple(buckets.tolist())


LONGT5 = Family(
    name="longt5",
    sites=_sites,
    intercept=_intercept,
    faithful=_faithful,
    reason="a global_block_size that is no power of two: the eager code sums its inverse, and in float64 the sum puts "
    "some tokens into the block before theirs",
    standard=_standard,
)
