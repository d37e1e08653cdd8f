"""Masks that see no further than the query's own document, where the documents are computed from the model's inputs.

Which blocks of keys a query needs is not known before the model runs. But no pair of two documents is ever seen, so
that a block of queries needs a block of keys only where the ranges of their document numbers overlap. The graph lists
those blocks and asks mask_mod about each pair in them, and about no other: what it takes grows with the listed blocks,
which for short documents, one after the other, grow like the length.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import numpy as np
import torch
from torch import nn

from .mask_mods import Grids, MaskMod

_BLOCK = 64


def tensors_of(function: Any) -> dict[str, torch.Tensor]:
    """Tensors that a function holds, by where: in its closure, in those of functions that it calls, or one step off."""
    found: dict[str, torch.Tensor] = {}

    def visit(value: Any, place: str, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            found[place] = value
        elif depth > 8:
            return
        elif isinstance(value, types.FunctionType):
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                visit(cell.cell_contents, f"{place}.{name}", depth + 1)
            visit(value.__defaults__ or (), f"{place}.defaults", depth + 1)
        elif isinstance(value, types.MethodType):
            visit(value.__func__, place, depth + 1)
            visit(value.__self__, f"{place}.self", depth + 1)
        elif isinstance(value, functools.partial):
            visit((value.func, *value.args, *value.keywords.values()), f"{place}.partial", depth + 1)
        elif isinstance(value, (tuple, list)):
            for index, each in enumerate(value):
                visit(each, f"{place}[{index}]", depth + 1)
        elif isinstance(value, nn.Module):
            for name, each in vars(value).items():
                if isinstance(each, torch.Tensor):
                    found[f"{place}.{name}"] = each

    visit(function, "", 0)
    return found


def keeps_documents_apart(seen: Grids, numbers: torch.Tensor) -> bool:
    """Whether no pair is seen whose tokens have different numbers.

    Args:
        seen: The pairs that a mask leaves.
        numbers: (S,) or (1|B, S), a number for each token.
    """
    rows = np.atleast_2d(numbers.detach().numpy())
    for entry in range(max(len(rows), seen.seen.shape[0])):
        own = rows[entry % len(rows)]
        apart = own[:, None] != own[None, :]
        if any((seen.at(entry, head) & apart).any() for head in range(seen.seen.shape[1])):
            return False
    return True


def document_lists(
    mask_mod: MaskMod, numbers: torch.Tensor, batch: Any, causal: bool, size: int | None
) -> dict[str, Any]:
    """Block lists of a mask that keeps documents apart, as operations on the numbers of the tokens.

    Args:
        mask_mod: The mask; heads are alike.
        numbers: (S,) or (1|B, S), the document of each token.
        batch: Batch entries.
        causal: Whether no key after the query is seen.
        size: Tokens in a block; None for the default.

    Returns:
        Inputs and block sizes of BlockSparseAttention by name: all listed blocks are partial, each with its own mask.
    """
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    size = size if size and size % 8 == 0 else _BLOCK
    numbers = (numbers[None] if numbers.dim() == 1 else numbers).expand(batch, -1)
    length, device = numbers.shape[1], numbers.device
    blocks = (length + size - 1) // size
    inside, block = torch.arange(size, device=device), torch.arange(blocks, device=device)
    # Tokens beyond the end stand for the last one: they are in its document, and do not exist.
    token = (block[:, None] * size + inside).clamp(max=length - 1)
    tiles = numbers.index_select(1, token.flatten()).unflatten(1, (blocks, size))
    low, high = tiles.amin(-1), tiles.amax(-1)
    listed = (low[:, :, None] <= high[:, None, :]) & (low[:, None, :] <= high[:, :, None])
    if causal:
        listed = listed & (block <= block[:, None])
    counts = listed.sum(-1, dtype=torch.int32)
    # Keys are unique, so that what is listed comes first and ascends, whoever sorts.
    order = torch.where(listed, block, block + blocks).sort(-1).values
    order = torch.where(order >= blocks, order - blocks, order)
    # Mask 0 is nobody's: with it and the blocks of the diagonal there are always two, which torch.export wants to know.
    place = torch.cat([torch.zeros((1, 3), dtype=torch.int64, device=device), listed.nonzero()])
    torch._check(place.shape[0] > 1)
    entry, row, column = place.unbind(-1)
    over_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    over_tiles = torch.vmap(torch.vmap(over_keys, in_dims=(None, None, 0, None)), in_dims=(0, None, 0, 0))
    head = torch.zeros((), dtype=torch.int64, device=device)
    with TransformGetItemToIndex():
        seen = over_tiles(entry, head, token.index_select(0, row), token.index_select(0, column))
    bits = torch.tensor([1 << bit for bit in range(8)], device=device)
    masks = (seen.unflatten(2, (size // 8, 8)).to(torch.int64) * bits).sum(-1).to(torch.uint8)
    number = listed.flatten().to(torch.int64).cumsum(0).view_as(listed).gather(-1, order)
    read = block < counts[..., None]
    return {
        "kv_num_blocks": counts[:, None],
        "kv_indices": order[:, None].to(torch.int32),
        "full_kv_num_blocks": torch.zeros_like(counts)[:, None],
        "full_kv_indices": order[:, None, :, :0].to(torch.int32),
        "block_mask_ids": torch.where(read, number, -1)[:, None].to(torch.int32),
        "block_masks": masks,
        "q_block_size": size,
        "kv_block_size": size,
    }
