"""What one call of flex_attention does, seen while the model runs: its functions may read what only this run has."""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import ExportFailed
from .documents import keeps_documents_apart, tensors_of
from .interception import DeclaredMask, FlexArguments, with_listed
from .lists import FrozenLists, frozen_lists, own_lists
from .mask_mods import Grids, MaskMod, MaskValues, read_pattern
from .meaning import Call, combined
from .score_mods import ScoreMod, ScoreParts, Sizes, read_score_mod

_SHAPE_ONLY = ("_like", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided")
"""Operators that take the shape of a tensor and not its values."""


_LONGEST_TEXT = 1 << 17
_LONGEST_FROZEN = 1 << 13
"""Tokens up to which a mask without a rule is written down."""


class Reading(enum.Enum):
    """What is read from a call's mask besides the pairs that it leaves."""

    NOTHING = enum.auto()
    ONE_LENGTH = enum.auto()
    ANY_LENGTH = enum.auto()


def observe(layer: str, call: FlexArguments, descent: Descent, reading: Reading) -> Call:
    """Ask a call's functions for all that `meaning` compares between runs.

    Args:
        layer: The module that calls.
        call: The arguments.
        descent: Knows what is computed from the model's inputs.
        reading: What more to read from the mask.

    Raises:
        ExportFailed: the call is one that no operator computes.
        Exception: whatever its functions raise at the ends of the text, as they would have within the attention.
    """
    query, key, mask, score_mod = call.query, call.key, call.block_mask, call.score_mod
    sizes = Sizes(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    _refuse_arguments(call, layer)
    _refuse_mask(mask, sizes, layer)
    mask_mod = flex.noop_mask if mask is None else mask.mask_mod
    size = (flex._DEFAULT_SPARSE_BLOCK_SIZE,) * 2 if mask is None else tuple(mask.BLOCK_SIZE)
    _ask_at_the_ends(mask_mod, score_mod, sizes)
    score = ScoreParts() if score_mod is None else read_score_mod(score_mod, mask_mod, sizes, layer)
    whole = combined(mask_mod, score_mod, score)
    reads_scores = score_mod is not None and descent.descends(_without_score(score_mod))
    reads_inputs = descent.descends(mask_mod) or (score.hides and reads_scores)
    batch, heads = (size if _reads(whole, axis) else 1 for axis, size in ((0, sizes.batch), (1, sizes.heads)))
    seen = Grids.of(whole, batch, heads, (sizes.queries, sizes.keys))
    found: dict[str, Any] = {}
    if mask is not None and not isinstance(mask, DeclaredMask):
        if not _listed_as_meant(mask, sizes):
            if reads_inputs or reads_scores or score.hides:
                raise ExportFailed(
                    f"{layer}: its BlockMask has block lists of its own, and pairs are hidden besides by the inputs or "
                    "by the score_mod; allowed: lists with a mask_mod of constants; next step: create_block_mask"
                )
            found = {"frozen": own_lists(mask, sizes), "own_lists": True}
    elif mask is not None:
        _refuse_narrow_mask(mask, mask_mod, sizes, layer)
    if not found and not reads_inputs and reading is not Reading.NOTHING:
        if reading is Reading.ANY_LENGTH:
            found["longest"] = _longest(mask_mod, score_mod, sizes)
        found["pattern"] = _pattern(whole, heads) if batch == 1 else None
        if found["pattern"] is None:
            found["frozen"] = _frozen(whole, seen, size, reading)
    if reads_inputs and sizes.queries == sizes.keys:
        found["documents"] = _documents(whole, seen, sizes, descent)
    return Call(layer, sizes, score, seen, reads_inputs, reads_scores, size, **found)


def _documents(mask_mod: MaskMod, seen: Grids, sizes: Sizes, descent: Descent) -> frozenset[str]:
    """Tensors of a mask, computed from the inputs, that number the tokens so that no pair of two numbers is seen."""
    shapes = ((sizes.keys,), (1, sizes.keys), (sizes.batch, sizes.keys))
    return frozenset(
        place
        for place, tensor in tensors_of(mask_mod).items()
        if descent.has(tensor)
        and tuple(tensor.shape) in shapes
        and tensor.dtype in (torch.int32, torch.int64)
        and keeps_documents_apart(seen, tensor)
    )


def _pattern(mask_mod: MaskMod, heads: int) -> Any:
    try:
        return read_pattern(MaskValues(mask_mod), heads)
    except (IndexError, RuntimeError):
        return None  # It reads a tensor that ends.


def _frozen(mask_mod: MaskMod, seen: Grids, size: tuple[int, int], reading: Reading) -> FrozenLists | None:
    """Lists for the length of the text, or cut from the longest that the mask's tensors allow."""
    if reading is Reading.ONE_LENGTH:
        return frozen_lists(seen, size, cut=False)
    batch, heads = seen.seen.shape[:2]
    longest = _longest(mask_mod, None, Sizes(batch, heads, 0, 0))
    if longest is None or longest > _LONGEST_FROZEN:
        return None
    return frozen_lists(Grids.of(mask_mod, batch, heads, (longest, longest)), size, cut=True)


def _longest(mask_mod: MaskMod, score_mod: ScoreMod | None, sizes: Sizes) -> int | None:
    """Tokens of the longest text that two functions can be asked about, where tensors that they read end; else None."""

    def reads(length: int) -> bool:
        try:
            _ask_at_the_ends(mask_mod, score_mod, dataclasses.replace(sizes, queries=length, keys=length))
        except (IndexError, RuntimeError):
            return False
        return True

    low, high = 1, _LONGEST_TEXT
    if reads(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reads(middle) else (low, middle)
    return low


def _ask_at_the_ends(mask_mod: MaskMod, score_mod: ScoreMod | None, sizes: Sizes) -> None:
    """Ask for the corners of the text; raises what the attention itself would have raised."""
    query, key = ((sizes.queries - 1) * np.array([0, 0, 1, 1]), (sizes.keys - 1) * np.array([0, 1, 0, 1]))
    for entry, head in itertools.product({0, sizes.batch - 1}, {0, sizes.heads - 1}):
        MaskValues(mask_mod, entry).pairs(head, query, key)
        if score_mod is not None:
            MaskValues(_without_score(score_mod), entry).pairs(head, query, key)


def _without_score(score_mod: ScoreMod) -> MaskMod:
    return lambda b, h, q, k: score_mod(torch.zeros((), dtype=torch.float64), b, h, q, k)


def _reads(mask_mod: MaskMod, axis: int) -> bool:
    """Whether a mask_mod reads the index of the batch (0) or the head (1)."""
    index = [torch.zeros(1, dtype=torch.int64) for _ in range(4)]
    descent = Descent([index[axis]])
    with descent:
        return descent.has(_called_once(mask_mod, index))


def _called_once(function: Callable[..., Any], index: list[torch.Tensor]) -> Any:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    with TransformGetItemToIndex():
        return torch.vmap(function)(*index)


def _listed_as_meant(mask: flex.BlockMask, sizes: Sizes) -> bool:
    """Whether the lists of a BlockMask leave what its mask_mod allows, and no more."""
    lengths = sizes.queries, sizes.keys
    listed = with_listed(mask.as_tuple())[-1]
    own, meant = (Grids.of(each, sizes.batch, sizes.heads, lengths) for each in (listed, mask.mask_mod))
    return np.array_equal(own.seen, meant.seen)


def _refuse_narrow_mask(mask: DeclaredMask, mask_mod: MaskMod, sizes: Sizes, layer: str) -> None:
    """Refuse a mask_mod that differs where its BlockMask was told that all are alike.

    Raises:
        ExportFailed: the blocks of the first batch entry or head would be those of all.
    """
    asked = zip(mask.shape[:2], (sizes.batch, sizes.heads), strict=True)
    for axis, (made, size) in enumerate(asked):
        if made != 1 or size == 1 or not _reads(mask_mod, axis):
            continue
        name, argument = (("batch entries", "B"), ("heads", "H"))[axis]
        raise ExportFailed(
            f"{layer}: the mask_mod differs between {name}, and its BlockMask was made with {argument}=None: "
            "compiled, flex_attention takes the blocks of the first for all; next step: create_block_mask with "
            f"{argument}={size}"
        )


class Descent(TorchDispatchMode):
    """Knows which tensors are computed from the values of a model's inputs, by the storage that they live in."""

    def __init__(self, inputs: Any, on_operator: Callable[[], None] = lambda: None) -> None:
        """Mark `inputs`, and tell `on_operator` of every longspan operator that runs."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, Any] = {}
        self._on_operator = on_operator
        self.mark(*inputs)

    def mark(self, *tensors: torch.Tensor) -> None:
        """Count tensors as computed from the inputs."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # Kept alive, so that no other storage takes its place.
            self._storages[storage._cdata] = storage

    def descends(self, mask_mod: MaskMod) -> bool:
        """Whether what a mask_mod says descends from a tensor that is marked."""
        return self.has(_called_once(mask_mod, [torch.zeros(1, dtype=torch.int64) for _ in range(4)]))

    def has(self, value: Any) -> bool:
        """Whether a value is a tensor that is marked."""
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self._storages

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "longspan":
            self._on_operator()
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if any(part in name for part in _SHAPE_ONLY):
            return result
        leaves = torch.utils._pytree.tree_leaves
        if any(self.has(value) for value in leaves((args, kwargs))):
            self.mark(*(value for value in leaves(result) if isinstance(value, torch.Tensor)))
        return result


def _refuse_arguments(call: FlexArguments, layer: str) -> None:
    """Refuse what no operator has, and what flex_attention itself refuses.

    Raises:
        ExportFailed: the call asks for one of these.
    """
    if call.return_aux is not None and call.return_aux.max_scores:
        raise ExportFailed(
            f"{layer}: flex_attention is asked for its largest scores (AuxRequest(max_scores=True)), which the "
            "operators do not have; allowed: lse=True; next step: leave them out"
        )
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    if heads != kv_heads and not (call.enable_gqa and heads % kv_heads == 0):
        raise ExportFailed(
            f"{layer}: flex_attention gets {heads} query heads and {kv_heads} key heads; allowed: as many, or with "
            "enable_gqa=True a divisor of them"
        )


def _refuse_mask(mask: Any, sizes: Sizes, layer: str) -> None:
    """Refuse a BlockMask that is for other lengths, or has lost its meaning.

    Raises:
        ExportFailed: it is one of these.
    """
    if mask is None:
        return
    if mask.mask_mod is flex._sliced_mask_mod_error:
        raise ExportFailed(
            f"{layer}: its BlockMask is a slice of another, which has no mask_mod; next step: set mask_mod on it, or "
            "make it with create_block_mask"
        )
    if tuple(mask.BLOCK_SIZE) == (flex._LARGE_SPARSE_BLOCK_SIZE,) * 2:
        return
    wanted, got = (sizes.queries, sizes.keys), tuple(mask.seq_lengths)
    if wanted != got:
        raise ExportFailed(
            f"{layer}: its BlockMask is for {got[0]} queries and {got[1]} keys, and there are {wanted[0]} and "
            f"{wanted[1]}; next step: make it in forward, of the length of the input "
            "(create_block_mask(mask_mod, None, None, S, S)), or fix the length (dynamic_shapes without a Dim for it)"
        )
