"""What the torch executions of the attention operators have in common, and what their fake tensors need."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..definition import Operator
from ..errors import InvalidOperands
from .operands import ScoreAttributes, Shapes


def check_types(present: Mapping[str, torch.Tensor], own: Mapping[str, torch.dtype]) -> None:
    """Check the element types of all inputs present.

    Args:
        present: The inputs, by formal name.
        own: Types that are not Q's, by formal name, besides those of attn_mask and nonpad_kv_seqlen. The float64 oracle
            takes a float32 input in either precision.

    Raises:
        InvalidOperands: a type contradicts the definition; the message names the input.
    """
    q_type = present["Q"].dtype
    expected = {"attn_mask": torch.bool, "nonpad_kv_seqlen": torch.int64, **own}
    for name, tensor in present.items():
        wanted = expected.get(name, q_type)
        if tensor.dtype == wanted or (wanted == torch.float32 and tensor.dtype == q_type == torch.float64):
            continue
        raise InvalidOperands(f"{name} is {tensor.dtype}: must be {wanted} beside a Q of {q_type}")
    if not q_type.is_floating_point:
        raise InvalidOperands(f"Q is {q_type}: must be float16, bfloat16, float32 or float64")


def present_inputs(operator: Operator, operands: object) -> dict[str, torch.Tensor]:
    """The inputs that are present, by formal name.

    Args:
        operator: The definition.
        operands: A record with a field per input, named as the input in lower case; None where it is absent.
    """
    values = ((tensor.name, getattr(operands, tensor.name.lower())) for tensor in operator.inputs)
    return {name: value for name, value in values if value is not None}


def accumulator(q: torch.Tensor) -> torch.dtype:
    """Type of all arithmetic, and of lse, beside a Q: float32, or float64 for the oracle."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def empty_outputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attributes: ScoreAttributes
) -> tuple[torch.Tensor, torch.Tensor]:
    """Y and lse without values, for fake tensors.

    Sizes that vary are only multiplied and divided, never compared, so that none is specialised.

    Raises:
        InvalidOperands: the ranks or the numbers of heads contradict the definition.
    """
    if q.dim() not in (3, 4) or not q.dim() == k.dim() == v.dim():
        raise InvalidOperands(f"Q, K, V have {q.dim()}, {k.dim()}, {v.dim()} dimensions: all must be 3-D or all 4-D")
    if q.dim() == 4:
        y = q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))
        return y, q.new_empty(q.shape[:3], dtype=accumulator(q))
    heads, kv_heads = attributes.q_num_heads, attributes.kv_num_heads
    if heads < 1 or kv_heads < 1:
        raise InvalidOperands("3-D inputs need q_num_heads and kv_num_heads of 1 or more")
    for name, tensor, count in (("Q", q, heads), ("K", k, kv_heads), ("V", v, kv_heads)):
        channels = tensor.shape[2]
        if isinstance(channels, int) and channels % count:
            raise InvalidOperands(f"{name} has {channels} channels, which {count} heads do not divide")
    y = q.new_empty((q.shape[0], q.shape[1], heads * (v.shape[2] // kv_heads)))
    return y, q.new_empty((q.shape[0], heads, q.shape[1]), dtype=accumulator(q))


def head_counts(shapes: Shapes) -> tuple[int, int, int]:
    """Heads of Q, K and V."""
    return shapes.q_num_heads, shapes.kv_num_heads, shapes.kv_num_heads


def split_heads(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """View as (B, H, S, D)."""
    return tensor if tensor.dim() == 4 else tensor.unflatten(2, (count, tensor.shape[2] // count)).transpose(1, 2)


def cleared(values: torch.Tensor, masked: torch.Tensor | None) -> torch.Tensor:
    """Values (H, S_k, D_v) with zeros where `masked` (S_k, 1): their weight 0 times NaN or infinity would be NaN."""
    return values if masked is None else values.masked_fill(masked, 0)


def scaled(q: torch.Tensor, attributes: ScoreAttributes) -> torch.Tensor:
    """Queries (h, rows, D) times the scale."""
    return q * (q.shape[-1] ** -0.5 if attributes.scale is None else attributes.scale)


def capped_scores(q: torch.Tensor, k: torch.Tensor, attributes: ScoreAttributes) -> torch.Tensor:
    """Scores (h, rows, keys) of scaled queries, capped."""
    scores = q @ k.transpose(1, 2)
    if attributes.softcap > 0:
        scores = torch.tanh(scores / attributes.softcap) * attributes.softcap
    return scores


def softmax(
    scores: torch.Tensor,
    allowed: torch.Tensor,
    weight: torch.Tensor | None,
    values: torch.Tensor,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted softmax over the last axis of (h, rows, keys), times values (h, keys, D_v); and its log denominator."""
    scores = scores.masked_fill(~allowed, -torch.inf)
    lowest = scores.new_full((*scores.shape[:2], 1), -torch.inf)
    top = scores.amax(2, keepdim=True) if scores.shape[2] else lowest
    if sinks is not None:
        top = torch.maximum(top, sinks[:, None, None])
    top = top.masked_fill(top == -torch.inf, 0)  # exp(-inf - 0) = 0; -inf - -inf would be NaN
    terms = torch.exp(scores - top)
    if weight is not None:
        terms = terms * weight
    total = terms.sum(2, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None, None] - top)
    result = (terms @ values.to(terms.dtype)) / total.masked_fill(total == 0, 1)
    return result.to(values.dtype), (top + torch.log(total))[..., 0]
