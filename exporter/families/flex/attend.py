"""One call of flex_attention as one operator of Longspan, in eager mode and while tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex

from ....plugins.block_sparse_attention.torch_op import block_sparse_attention, block_sparse_attention_lse
from ....plugins.sliding_window_attention.torch_op import sliding_window_attention, sliding_window_attention_lse
from ...errors import ExportFailed, InvalidRequest
from ...pattern_attention import choose_block_size
from ...patterns import BlockLists, Lengths, Pattern, Tokens, block_table, lower_pattern, to_json
from ...patterns.block_table import block_kinds
from ...patterns.block_table_torch import constant_lists, traced_lists
from .documents import document_lists, tensors_of
from .interception import FlexArguments
from .lists import FrozenLists
from .mask_mods import MaskMod
from .meaning import Meaning, combined
from .score_mods import bias_at

_FARTHEST_BIAS = 1 << 14
"""Widest band whose bias is an input of its own; beyond, block lists take it by distance."""


def attend(meaning: Meaning, call: FlexArguments) -> Any:
    """Compute what flex_attention does with these arguments.

    Args:
        meaning: What the call was found to compute.
        call: Its arguments; query is (B, H_q, S_q, D).

    Returns:
        What flex_attention returns: (B, H_q, S_q, D_v), and (B, H_q, S_q) where it is asked for the log-sum-exp.

    Raises:
        ExportFailed: frozen lists are for other lengths.
    """
    query, key, value = call.query, call.key, call.value
    heads, size = query.shape[1], query.shape[3]
    if key.shape[0] != query.shape[0]:
        key, value = (tensor.expand(query.shape[0], -1, -1, -1) for tensor in (key, value))
    common: dict[str, Any] = {
        "scale": (size**-0.5 if call.scale is None else float(call.scale)) * meaning.score.factor,
        "softcap": meaning.score.softcap,
        "q_num_heads": heads,
        "kv_num_heads": key.shape[1],
    }
    if meaning.padding:
        common["attn_mask"] = _padding(meaning, call)
    # The 3-D layout cancels the transposes that the model made around its attention.
    flat = tuple(tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value))
    operands: tuple[torch.Tensor, ...] = flat
    operators: tuple[Callable[..., Any], Callable[..., Any]] = sliding_window_attention, sliding_window_attention_lse
    if meaning.pattern is not None and _is_band(meaning.pattern, meaning):
        common |= _band(meaning.pattern, meaning, call)
    else:
        lists = _lists(meaning, call)
        operands = (*flat, *(lists.pop(name) for name in BlockLists.ARRAYS[:4]))
        operators = block_sparse_attention, block_sparse_attention_lse
        common |= lists
        if meaning.score.bias:
            common["distance_bias"] = _distance_bias(meaning, call)
    output, lse = operators[1](*operands, **common) if call.wants_lse else (operators[0](*operands, **common), None)
    return call.result(output.unflatten(2, (heads, value.shape[3])).transpose(1, 2), lse)


def _is_band(pattern: Pattern, meaning: Meaning) -> bool:
    """Whether SlidingWindowAttention computes it: a bias belongs to a band with two ends and no global tokens."""
    lowering = lower_pattern(pattern)
    if lowering.operator != "SlidingWindowAttention":
        return False
    sides = [lowering.attributes[f"{side}_window_size"] for side in ("left", "right")]
    bounded = min(sides) >= 0 and sum(sides) < _FARTHEST_BIAS and lowering.global_tokens is None
    return not meaning.score.bias or (bounded and len(set(lowering.attributes["dilation"])) == 1)


def _band(pattern: Pattern, meaning: Meaning, call: FlexArguments) -> dict[str, Any]:
    """Arguments of SlidingWindowAttention."""
    query, key = call.query, call.key
    lowering = lower_pattern(pattern, heads=query.shape[1])
    arguments = {**lowering.attributes, "is_causal": bool(lowering.attributes["is_causal"])}
    arguments["pattern"] = to_json(pattern)
    if meaning.score.bias:
        left, right = arguments["left_window_size"], arguments["right_window_size"]
        step = arguments["dilation"][0]
        offset = torch.arange(-left, right + 1, device=query.device) * step
        bias = bias_at(
            call.score_mod,
            query.shape[1] if meaning.score.by_head else 1,
            (-offset).clamp(min=0),
            offset.clamp(min=0),
            query.dtype,
        )
        arguments["band_bias"] = bias[None, :, None, :]
    if lowering.global_tokens is not None:
        mask = _contains(lowering.global_tokens, key.shape[2], query.device)
        arguments["global_mask"] = mask[None].expand(query.shape[0], -1)
    return arguments


def _contains(tokens: Tokens, length: Any, device: Any) -> torch.Tensor:
    """Bool (length,), which positions are among some tokens."""
    position = torch.arange(length, device=device)
    found = position < tokens.first
    for at in tokens.at:
        found = found | (position == at)
    for residue in tokens.residues:
        found = found | (position % tokens.period == residue)
    if tokens.last:
        found = found | (position >= length - tokens.last)
    return found


def _distance_bias(meaning: Meaning, call: FlexArguments) -> torch.Tensor:
    """(1|H_q, S_q + S_k - 1)."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    offset = torch.arange(queries + keys - 1, device=call.query.device) - (queries - 1)
    heads = call.query.shape[1] if meaning.score.by_head else 1
    return bias_at(call.score_mod, heads, (-offset).clamp(min=0), offset.clamp(min=0), call.query.dtype)


def _padding(meaning: Meaning, call: FlexArguments) -> torch.Tensor:
    """Bool (B, S_k), the keys that see themselves."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    mask = _mask(meaning, call)
    batch, length, device = call.query.shape[0], call.key.shape[2], call.query.device
    over_tokens = torch.vmap(mask, in_dims=(None, None, 0, 0))
    over_batch = torch.vmap(over_tokens, in_dims=(0, None, None, None))
    token = torch.arange(length, device=device)
    head = torch.zeros((), dtype=torch.int64, device=device)
    with TransformGetItemToIndex():
        seen: torch.Tensor = over_batch(torch.arange(batch, device=device), head, token, token)
    return seen


def _mask(meaning: Meaning, call: FlexArguments) -> MaskMod:
    mask_mod = flex.noop_mask if call.block_mask is None else call.block_mask.mask_mod
    return combined(mask_mod, call.score_mod, meaning.score)


def _lists(meaning: Meaning, call: FlexArguments) -> dict[str, Any]:
    """Block lists and block sizes of BlockSparseAttention."""
    device, heads = call.query.device, call.query.shape[1]
    queries, keys = call.query.shape[2], call.key.shape[2]
    if meaning.pattern is not None:
        size = _block_size(meaning.pattern, meaning.block_size)
        sizes = {"q_block_size": size, "kv_block_size": size, "pattern": to_json(meaning.pattern)}
        if isinstance(queries, int) and isinstance(keys, int):
            return {**constant_lists(meaning.pattern, Lengths(queries, keys), size, heads, device), **sizes}
        return {**traced_lists(block_table(meaning.pattern, size), queries, keys, heads, device), **sizes}
    if meaning.documents:
        mask = _mask(meaning, call)
        numbers = tensors_of(mask)[meaning.documents]
        return document_lists(mask, numbers, call.query.shape[0], meaning.causal, meaning.block_size)
    frozen = meaning.frozen
    assert frozen is not None
    tall, wide = frozen.block_size
    arrays = {name: torch.from_numpy(array.copy()).to(device) for name, array in frozen.arrays.items()}
    _refuse_other_sizes(meaning.layer, frozen, call)
    if frozen.cut:
        arrays = _cut(arrays, (queries + tall - 1) // tall, (keys + wide - 1) // wide)
    return {**arrays, "q_block_size": tall, "kv_block_size": wide, "pattern": frozen.pattern}


def _block_size(pattern: Pattern, wanted: int | None) -> int:
    """The size that the model's mask has; another where blocks of that size would be of too many kinds."""
    try:
        if wanted is not None:
            block_kinds(pattern, wanted)
            return wanted
    except InvalidRequest:
        pass
    return choose_block_size(pattern)


def _cut(arrays: dict[str, torch.Tensor], rows: Any, columns: Any) -> dict[str, torch.Tensor]:
    """The lists of a shorter text; blocks ascend within a list, so that those beyond its end are the last."""
    device = arrays["kv_indices"].device
    row = torch.arange(rows, device=device)
    kept = {name: array if name == "block_masks" else array.index_select(2, row) for name, array in arrays.items()}
    for counts, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        if not kept[indices].shape[-1]:
            continue
        slot = torch.arange(kept[indices].shape[-1], device=device)
        inside = (kept[indices] < columns) & (slot < kept[counts][..., None])
        kept[counts] = inside.sum(-1, dtype=torch.int32)
        # Slots that are not read may hold anything, and a function body reads them all.
        kept[indices] = torch.where(inside, kept[indices], 0)
    return kept


def _refuse_other_sizes(layer: str, frozen: FrozenLists, call: FlexArguments) -> None:
    wanted = {} if frozen.cut else {"queries": frozen.seq_q, "keys": frozen.seq_k}
    got = {"queries": call.query.shape[2], "keys": call.key.shape[2]}
    batch = frozen.arrays["kv_num_blocks"].shape[0]
    if batch > 1:
        wanted["batch entries"], got["batch entries"] = batch, call.query.shape[0]
    for name, size in wanted.items():
        if not isinstance(got[name], int) or got[name] != size:
            raise ExportFailed(
                f"{layer}: its block lists are for {size} {name}, and the model is to take "
                f"{got[name] if isinstance(got[name], int) else 'any number'}; next step: fix that dimension "
                "(dynamic_shapes without a Dim for it)"
            )
