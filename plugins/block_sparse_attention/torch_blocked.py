"""BlockSparseAttention in plain torch: the execution that the torch op runs where no kernel is registered.

Each row of blocks gathers the keys of its listed blocks, a key once per listing, and attends to them; heads that share
their lists go together. No S_q x S_k tensor exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
from .definition import BLOCK_SPARSE_ATTENTION, Attributes, ListBounds, check_lists, infer_shapes

_LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "block_mask_ids")
_TYPES = dict.fromkeys((*_LISTS, "q_positions", "k_positions"), torch.int32) | {"block_masks": torch.uint8}


@dataclass(frozen=True)
class Operands:
    """The tensor inputs, in the order of the definition; absent optional inputs are None."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kv_num_blocks: torch.Tensor
    kv_indices: torch.Tensor
    full_kv_num_blocks: torch.Tensor
    full_kv_indices: torch.Tensor
    block_mask_ids: torch.Tensor | None = None
    block_masks: torch.Tensor | None = None
    attn_mask: torch.Tensor | None = None
    nonpad_kv_seqlen: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    q_positions: torch.Tensor | None = None
    k_positions: torch.Tensor | None = None
    distance_bias: torch.Tensor | None = None

    def present(self) -> dict[str, torch.Tensor]:
        """The inputs that are present, by formal name."""
        return present_inputs(BLOCK_SPARSE_ATTENTION, self)


def blocked_attention(operands: Operands, attributes: Attributes) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (Y, lse): Y in the type of q; lse and all arithmetic in float32, or float64 for a float64 q.

    Args:
        operands: The inputs, with the shapes of `docs/operators.md`.
        attributes: The node's attributes.

    Raises:
        InvalidOperands: a shape, a type, or a value of the lists or of nonpad_kv_seqlen contradicts the definition.
    """
    present = operands.present()
    shapes = infer_shapes({name: tuple(value.shape) for name, value in present.items()}, attributes)
    check_types(present, _TYPES)
    masks = None if operands.block_masks is None else _unpacked(operands.block_masks, attributes)
    lists = {name: present[name].cpu().numpy() for name in _LISTS if name in present}
    check_lists(lists, ListBounds(attributes.kv_blocks(shapes.seq_k), 0 if masks is None else len(masks) - 1))
    lengths = None if operands.nonpad_kv_seqlen is None else operands.nonpad_kv_seqlen.tolist()
    if lengths is not None:
        check_lengths(lengths, shapes.seq_k)
    device, dtype = operands.q.device, accumulator(operands.q)
    out = operands.q.new_zeros((shapes.batch, shapes.q_num_heads, shapes.seq_q, shapes.v_head_size))
    lse = torch.full(shapes.lse, -torch.inf, dtype=dtype, device=device)
    for b in range(shapes.batch):
        entry = {name: _entry(values, b) for name, values in lists.items()}
        problem = _Problem.of(operands, attributes, shapes, entry, masks, b, None if lengths is None else lengths[b])
        for heads in _sharing(shapes, operands.kv_num_blocks, operands.full_kv_num_blocks):
            for row in range(attributes.q_blocks(shapes.seq_q)):
                rows = slice(row * attributes.q_block_size, min((row + 1) * attributes.q_block_size, shapes.seq_q))
                out[b, heads, rows], lse[b, heads, rows] = problem.attend(heads, row, rows)
    if shapes.layout == "bsd":
        out = out.transpose(1, 2).reshape(shapes.output)
    return out, lse


def _sharing(shapes: Shapes, *counts: torch.Tensor) -> list[slice]:
    """Query heads that share their lists, as slices of them."""
    if all(count.shape[1] == 1 for count in counts):
        return [slice(0, shapes.q_num_heads)]
    return [slice(head, head + 1) for head in range(shapes.q_num_heads)]


def _unpacked(masks: torch.Tensor, attributes: Attributes) -> torch.Tensor:
    """block_masks as bool (M + 1, q_block_size, kv_block_size); the last, which id -1 finds, hides nothing."""
    bits = torch.arange(8, dtype=torch.uint8, device=masks.device)
    own = ((masks[..., None] >> bits) & 1).flatten(2)[..., : attributes.kv_block_size].bool()
    return torch.cat([own, own.new_ones((1, attributes.q_block_size, attributes.kv_block_size))])


@dataclass(frozen=True)
class _Problem:
    """One batch entry: (H_q, S, D) queries, keys and values, key flags (S_k,), and its lists with an axis of heads."""

    operands: Operands
    attributes: Attributes
    lists: dict[str, Any]
    masks: torch.Tensor | None
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    valid: torch.Tensor
    q_position: torch.Tensor
    k_position: torch.Tensor

    @classmethod
    def of(
        cls,
        operands: Operands,
        attributes: Attributes,
        shapes: Shapes,
        lists: dict[str, Any],
        masks: torch.Tensor | None,
        entry: int,
        length: int | None,
    ) -> _Problem:
        """Batch entry `entry`, with `length` valid keys where nonpad_kv_seqlen says so."""
        device, group = operands.q.device, shapes.q_num_heads // shapes.kv_num_heads
        index = torch.arange(shapes.seq_k, device=device)
        valid = index < (shapes.seq_k if length is None else length)
        if operands.attn_mask is not None:
            valid = valid & operands.attn_mask[entry]
        masked = None if length is None and operands.attn_mask is None else ~valid[:, None]
        q_position = torch.arange(shapes.seq_q, device=device)[None] + (0 if length is None else length - shapes.seq_q)
        k_position = index[None]
        if operands.q_positions is not None and operands.k_positions is not None:
            q_position = _entry(operands.q_positions, entry).long()
            k_position = _entry(operands.k_positions, entry).long()
            if k_position.shape[0] > 1:
                k_position = k_position.repeat_interleave(group, 0)
        inputs = operands.q, operands.k, operands.v
        q, k, v = (split_heads(x, count)[entry] for x, count in zip(inputs, head_counts(shapes), strict=True))
        if group > 1:
            k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        return cls(operands, attributes, lists, masks, q, k, cleared(v, masked), valid, q_position, k_position)

    def attend(self, heads: slice, row: int, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Output (h, rows, D_v) in the type of v and lse (h, rows) of heads that share the lists of this block row."""
        operands, attributes = self.operands, self.attributes
        keys, mask = self._listed(heads.start, row, rows.stop - rows.start)
        dtype = accumulator(self.q)
        q = scaled(self.q[heads, rows].to(dtype), attributes)
        scores = capped_scores(q, self.k[heads, keys].to(dtype), attributes)
        allowed = self.valid[keys] & mask
        q_position = _of(self.q_position, heads)[:, rows, None]
        k_position = _of(self.k_position, heads)[:, None, keys]
        if attributes.is_causal:
            allowed = allowed & (k_position <= q_position)
        if attributes.exclude_self:
            allowed = allowed & (k_position != q_position)
        if operands.distance_bias is not None:
            query = torch.arange(rows.start, rows.stop, device=keys.device)
            entry = keys[None, :] - query[:, None] + self.q.shape[1] - 1
            scores = scores + _of(operands.distance_bias, heads).to(dtype)[:, entry]
        sinks = None if operands.sinks is None else operands.sinks[heads].to(dtype)
        return softmax(scores, allowed.expand_as(scores), None, self.v[heads, keys], sinks)

    def _listed(self, head: int, row: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys that a row reads, once per listing, and for each whether the `count` queries may see it."""
        wide, seq_k = self.attributes.kv_block_size, self.k.shape[1]
        keys, seen = [], []
        for kind in ("kv", "full_kv"):
            number = int(_entry(self.lists[f"{kind}_num_blocks"], head)[row])
            blocks = self._slots(f"{kind}_indices", head, row, number)
            columns = blocks[:, None] * wide + torch.arange(wide, device=blocks.device)
            keys.append(columns.flatten())
            if kind == "kv" and self.masks is not None:
                ids = self._slots("block_mask_ids", head, row, number)
                seen.append(self.masks[ids, :count].transpose(0, 1).flatten(1))
            else:
                seen.append(torch.ones((count, number * wide), dtype=torch.bool, device=blocks.device))
        key, mask = torch.cat(keys), torch.cat(seen, 1)
        exists = key < seq_k
        return key[exists], mask[:, exists]

    def _slots(self, name: str, head: int, row: int, number: int) -> torch.Tensor:
        slots = _entry(self.lists[name], head)[row, :number]
        return torch.from_numpy(slots.astype("int64")).to(self.k.device)


def _entry(tensor: Any, index: int) -> Any:
    """One entry of a first axis that may be 1 and stand for all."""
    return tensor[index if tensor.shape[0] > 1 else 0]


def _of(tensor: torch.Tensor, heads: slice) -> torch.Tensor:
    """The heads of a first axis that may be 1 and stand for all."""
    return tensor if tensor.shape[0] == 1 else tensor[heads]
