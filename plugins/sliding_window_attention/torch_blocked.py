"""SlidingWindowAttention in plain torch: the execution that the torch op runs where no kernel is registered.

A head with dilation δ is δ independent windows without dilation, one for each residue class of positions, over strided
views; each runs in blocks of query rows against the slice of keys that the block can see. No S_q x S_k tensor exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..attention.operands import Shapes, check_lengths
from ..attention.torch_execution import (
    accumulator,
    capped_scores,
    check_types,
    cleared,
    head_counts,
    present_inputs,
    scaled,
    softmax,
    split_heads,
)
from .definition import SLIDING_WINDOW_ATTENTION, Attributes, infer_shapes

_BLOCK = 128


@dataclass(frozen=True)
class Operands:
    """The tensor inputs, in the order of the definition; absent optional inputs are None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    attn_mask: torch.Tensor | None = None
    nonpad_kv_seqlen: torch.Tensor | None = None
    global_mask: torch.Tensor | None = None
    global_q: torch.Tensor | None = None
    global_k: torch.Tensor | None = None
    global_v: torch.Tensor | None = None
    band_bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    spans: torch.Tensor | None = None

    def present(self) -> dict[str, torch.Tensor]:
        """The inputs that are present, by formal name."""
        return present_inputs(SLIDING_WINDOW_ATTENTION, self)


@dataclass(frozen=True)
class _Heads:
    """Indices of some query heads, and of the key head of each; slices where that avoids a copy."""

    query: torch.Tensor | slice
    key: torch.Tensor | slice

    @classmethod
    def all(cls, shapes: Shapes) -> _Heads:
        """Every query head."""
        group = shapes.q_num_heads // shapes.kv_num_heads
        return cls(slice(None), slice(None) if group == 1 else torch.arange(shapes.q_num_heads) // group)


@dataclass(frozen=True)
class _Sequence:
    """One batch entry: (H, S, D) views, key flags (S_k,), and the position of query row 0."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    valid: torch.Tensor
    is_global: torch.Tensor | None
    offset: int
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    spans: torch.Tensor | None


def blocked_attention(operands: Operands, attributes: Attributes) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (Y, lse): Y in the type of q; lse and all arithmetic in float32, or float64 for a float64 q.

    Args:
        operands: The inputs, with the shapes of `docs/operators.md`.
        attributes: The node's attributes.

    Raises:
        InvalidOperands: a shape, a type or a value of nonpad_kv_seqlen contradicts the definition.
    """
    shapes = infer_shapes({name: tuple(value.shape) for name, value in operands.present().items()}, attributes)
    check_types(operands.present(), {"global_mask": torch.bool, "spans": torch.float32})
    q, k, v = (
        split_heads(x, n) for x, n in zip((operands.q, operands.k, operands.v), head_counts(shapes), strict=True)
    )
    accumulate = accumulator(q)
    out = q.new_zeros((shapes.batch, shapes.q_num_heads, shapes.seq_q, shapes.v_head_size))
    lse = torch.full(shapes.lse, -torch.inf, dtype=accumulate, device=q.device)
    lengths = None if operands.nonpad_kv_seqlen is None else operands.nonpad_kv_seqlen.tolist()
    if lengths is not None:
        check_lengths(lengths, shapes.seq_k)
    for b in range(shapes.batch):
        length = shapes.seq_k if lengths is None else int(lengths[b])
        valid = torch.arange(shapes.seq_k, device=q.device) < length
        if operands.attn_mask is not None:
            valid = valid & operands.attn_mask[b]
        some_masked = lengths is not None or operands.attn_mask is not None
        masked = ~valid[:, None] if some_masked else None
        bias = operands.band_bias
        sequence = _Sequence(
            q=q[b],
            k=k[b],
            v=cleared(v[b], masked),
            valid=valid,
            is_global=None if operands.global_mask is None else operands.global_mask[b],
            offset=0 if lengths is None else length - shapes.seq_q,
            bias=None if bias is None else bias[b if bias.shape[0] > 1 else 0].to(accumulate),
            sinks=None if operands.sinks is None else operands.sinks.to(accumulate),
            spans=None if operands.spans is None else operands.spans.to(accumulate),
        )
        for heads, step in _head_groups(attributes, shapes):
            _band_rows(sequence, attributes, heads, step, out[b], lse[b])
        if operands.global_mask is not None:
            separate = [operands.global_q, operands.global_k, operands.global_v]
            views = [
                local if given is None else split_heads(given, count)[b]
                for given, local, count in zip(separate, (q[b], k[b], v[b]), head_counts(shapes), strict=True)
            ]
            views[2] = cleared(views[2], masked)
            _global_rows(sequence, attributes, _Heads.all(shapes).key, views, out[b], lse[b])
    if shapes.layout == "bsd":
        out = out.transpose(1, 2).reshape(shapes.output)
    return out, lse


def _head_groups(attributes: Attributes, shapes: Shapes) -> Iterator[tuple[_Heads, int]]:
    """Query heads that share a dilation, with it."""
    if len(set(attributes.dilation)) == 1:
        yield _Heads.all(shapes), attributes.dilation[0]
        return
    for step in sorted(set(attributes.dilation)):
        heads = torch.tensor([head for head, own in enumerate(attributes.dilation) if own == step])
        yield _Heads(heads, heads // (shapes.q_num_heads // shapes.kv_num_heads)), step


def _band_rows(
    sequence: _Sequence, attributes: Attributes, heads: _Heads, step: int, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Write the rows of `heads` as if no row were global; `step` is the dilation of these heads."""
    seq_q, seq_k = sequence.q.shape[1], sequence.k.shape[1]
    left, right = attributes.band(seq_q + seq_k + abs(sequence.offset))
    for residue in range(min(step, seq_q)):
        rows = slice(residue, seq_q, step)
        keys = slice((sequence.offset + residue) % step, seq_k, step)
        # In units of `step`, query n of this class stands at `first + n` and key m at m.
        first = (sequence.offset + residue) // step
        count, key_count = len(range(seq_q)[rows]), len(range(seq_k)[keys])
        for begin in range(0, count, _BLOCK):
            end = min(begin + _BLOCK, count)
            low = min(max(first + begin - left, 0), key_count)
            high = max(min(first + end + right, key_count), low)
            block = _Block(
                rows=slice(residue + begin * step, residue + (end - 1) * step + 1, step),
                keys=slice(keys.start + low * step, keys.start + high * step, step),
                steps=torch.arange(low, high, device=out.device)
                - torch.arange(first + begin, first + end, device=out.device)[:, None],
                left=left,
                right=right,
                step=step,
            )
            out[heads.query, block.rows], lse[heads.query, block.rows] = _band_block(
                sequence, attributes, heads, block, lse.dtype
            )


@dataclass(frozen=True)
class _Block:
    """Query rows of one residue class and the keys they can see; `steps` (rows, keys) is key minus query over step."""

    rows: slice
    keys: slice
    steps: torch.Tensor
    left: int
    right: int
    step: int


def _band_block(
    sequence: _Sequence, attributes: Attributes, heads: _Heads, block: _Block, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (h, rows, D_v) in the type of v and lse (h, rows) of one block."""
    q = scaled(sequence.q[heads.query, block.rows].to(dtype), attributes)
    scores = capped_scores(q, sequence.k[heads.key, block.keys].to(dtype), attributes)
    allowed = sequence.valid[block.keys] & (block.steps >= -block.left) & (block.steps <= block.right)
    weight = None
    if sequence.bias is not None:
        bias = sequence.bias if sequence.bias.shape[0] == 1 else sequence.bias[heads.query]
        bias = bias if bias.shape[1] == 1 else bias[:, block.rows]
        column = (block.steps + block.left).clamp(0, bias.shape[2] - 1).expand(bias.shape[0], -1, -1)
        scores = scores + bias.expand(-1, column.shape[1], -1).gather(2, column)
    if sequence.spans is not None:
        reach = attributes.span_ramp + sequence.spans[heads.query, None, None]
        weight = ((reach - block.steps.abs() * block.step) / attributes.span_ramp).clamp(0, 1)
        if sequence.is_global is not None:
            weight = weight.masked_fill(sequence.is_global[block.keys], 1)
        allowed = allowed & (weight > 0)
    values = sequence.v[heads.key, block.keys]
    if sequence.is_global is not None:
        columns = (sequence.is_global & sequence.valid).nonzero()[:, 0]
        position = sequence.offset + torch.arange(sequence.q.shape[1], device=q.device)[block.rows, None]
        distance = columns - position
        steps = distance.div(block.step, rounding_mode="floor")
        outside = (distance % block.step != 0) | (steps < -block.left) | (steps > block.right)
        if attributes.is_causal:
            outside = outside & (distance <= 0)
        more = capped_scores(q, sequence.k[heads.key][:, columns].to(dtype), attributes)
        scores = torch.cat([scores, more], 2)
        weight = None if weight is None else torch.cat([weight, torch.ones_like(more)], 2)
        allowed = torch.cat([allowed.expand(scores.shape[0], -1, -1), outside.expand_as(more)], 2)
        values = torch.cat([values, sequence.v[heads.key][:, columns]], 1)
    sinks = None if sequence.sinks is None else sequence.sinks[heads.query]
    return softmax(scores, allowed, weight, values, sinks)


def _global_rows(
    sequence: _Sequence,
    attributes: Attributes,
    key_heads: torch.Tensor | slice,
    views: list[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Overwrite the rows of global tokens: full attention with the (H, S, D) projections in `views`."""
    assert sequence.is_global is not None
    q, k, v = views
    position = sequence.offset + torch.arange(q.shape[1], device=q.device)
    inside = (position >= 0) & (position < k.shape[1])
    rows = inside.nonzero()[:, 0]
    rows = rows[sequence.is_global[position[rows]]]
    for part in rows.split(_BLOCK):
        if not len(part):
            continue
        scores = capped_scores(scaled(q[:, part].to(lse.dtype), attributes), k[key_heads].to(lse.dtype), attributes)
        allowed = sequence.valid.expand(len(part), -1)
        if attributes.is_causal:
            allowed = allowed & (torch.arange(k.shape[1], device=q.device) <= position[part, None])
        out[:, part], lse[:, part] = softmax(scores, allowed, None, v[key_heads], sequence.sinks)
