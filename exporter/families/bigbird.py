"""BigBird (Zaheer et al. 2020) and the encoder of BigBird-Pegasus: blocks, as ``transformers`` computes them.

The first and the last block see all and are seen by all; the others see themselves and their neighbours, and besides
``num_random_blocks`` blocks that are drawn in training only: in evaluation every one of them is block 0, which is
therefore counted 1 + num_random_blocks times. Texts of at most ``5 + 2 · num_random_blocks`` blocks get full attention.

The eager code changes its modules for good when it meets such a text; it pads the text to a multiple of the block; it
hides keys by adding -10000, and sets the rows of padding to zero. Here the lists of blocks are computed from the
length, once for all layers, and name everything for a short text. The operator takes any length: of the eager code's
padded tail no key is seen and no row is kept, so that the last block is what is left of it.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import Family, modules_of_class, replaced

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..conversion import Conversion

_MODELS = {
    "BigBirdBlockSparseAttention": "transformers.models.big_bird.modeling_big_bird",
    "BigBirdPegasusBlockSparseAttention": "transformers.models.bigbird_pegasus.modeling_bigbird_pegasus",
}
_SPARSE, _FULL = "block_sparse", "original_full"


@dataclass(frozen=True)
class _Mask:
    """What the model hands to its layers as a mask.

    Attributes:
        padding: bool (B, S), True = attend.
        blanked: bool (B, S), rows whose attention is zero: those of padding in a text that is not short.
        lists: The operator's list inputs in order, the same for all rows of the batch and all heads.
    """

    padding: torch.Tensor
    blanked: torch.Tensor
    lists: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _sites(model: nn.Module, conversion: Conversion) -> list[str]:
    names = [name for kind in _MODELS for name in modules_of_class(model, kind)]
    # As a decoder the eager code is causal for short texts only; nobody can mean that.
    return [] if getattr(getattr(model, "config", None), "is_decoder", False) else names


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo, afterwards, the change to full attention that a short text makes in a model, and keep its warning quiet."""
    loggers = [logging.getLogger(modeling) for modeling in _MODELS.values()]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    parts = [module for module in model.modules() if hasattr(module, "attention_type")]
    before = [(module, module.attention_type, module._modules.get("self")) for module in parts]
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module, kind, attention in before:
            module.attention_type = kind
            if attention is not None:
                module.self = attention


@contextlib.contextmanager
def _intercept(model: Any, conversion: Conversion) -> Iterator[None]:
    sizes = {
        (module.block_size, module.num_random_blocks) for module in map(model.get_submodule, _sites(model, conversion))
    }
    ((block, drawn),) = sizes

    def patches(kind: str, modeling: str) -> Iterator[tuple[str, Any]]:
        stock = importlib.import_module(modeling).create_bidirectional_mask

        def make_mask(*, attention_mask: torch.Tensor, encoder_hidden_states: Any = None, **keywords: Any) -> Any:
            if encoder_hidden_states is not None:
                return stock(attention_mask=attention_mask, encoder_hidden_states=encoder_hidden_states, **keywords)
            return _mask(attention_mask != 0, block, drawn)

        yield f"{modeling}:{kind}.forward", _attention
        yield f"{modeling}:create_bidirectional_mask", make_mask

    with _as_it_was(model), contextlib.ExitStack() as stack:
        for kind, modeling in _MODELS.items():
            stack.enter_context(replaced(*patches(kind, modeling)))
        # Modules that believe in full attention neither pad nor compare the length, and hand on one mask.
        for module in model.modules():
            if getattr(module, "attention_type", None) == _SPARSE:
                module.attention_type = _FULL
        yield


def _attention(self: Any, hidden_states: torch.Tensor, attention_mask: _Mask, **_: Any) -> tuple[torch.Tensor, None]:
    """BigBirdBlockSparseAttention.forward as one operator; hidden_states is (B, S, hidden)."""
    from ...plugins.block_sparse_attention.torch_op import block_sparse_attention
    from ..patterns import to_json
    from ..patterns.systems import big_bird_of_any_length

    output = block_sparse_attention(
        self.query(hidden_states),
        self.key(hidden_states),
        self.value(hidden_states),
        *attention_mask.lists,
        attn_mask=attention_mask.padding,
        q_block_size=self.block_size,
        kv_block_size=self.block_size,
        scale=self.attention_head_size**-0.5,
        q_num_heads=self.num_attention_heads,
        kv_num_heads=self.num_attention_heads,
        pattern=to_json(big_bird_of_any_length(self.block_size, self.num_random_blocks)),
    )
    return output.masked_fill(attention_mask.blanked[:, :, None], 0), None


def _mask(padding: torch.Tensor, block: int, drawn: int) -> _Mask:
    """The mask of a batch with this (B, S) padding, and the lists of its length."""
    import torch

    length = padding.shape[1]
    short = torch.full((1, 1), length, device=padding.device) <= (5 + 2 * drawn) * block
    return _Mask(padding, ~padding & ~short, block_lists(length, block, drawn, padding.device))


def block_lists(
    length: int, block: int, drawn: int, device: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks that each row of blocks lists, in ascending order, in torch operations that no length is fixed by.

    Args:
        length: Tokens of the text; may be symbolic.
        block: Tokens of a block.
        drawn: num_random_blocks.
        device: Where the lists are wanted.

    Returns:
        kv_num_blocks, kv_indices, full_kv_num_blocks and full_kv_indices, int32. All blocks are full ones; their list
        is as wide as there are blocks, which the first and the last row see.
    """
    import torch

    # As a value of the graph: torch.export would tell the one block of a short text from several.
    count = torch.scalar_tensor((length + block - 1) // block, dtype=torch.int64).item()
    torch._check(count >= 1)
    last = count - 1
    index = torch.arange(count, device=device)
    row, slot = index[:, None], index[None, :]
    whole = (row == 0) | (row == last) | (torch.full_like(row, count) <= 5 + 2 * drawn)
    # Block 0 as often as it counts, then the neighbours that are not block 0, then the last block, unless it is one.
    neighbour = (row - 1).clamp(min=1) + slot - (1 + drawn)
    listed = torch.where(slot <= drawn, 0, torch.where(neighbour <= row + 1, neighbour, last)).clamp(max=last)
    few = 5 + drawn - (row == 1).to(torch.int64) - (row == last - 1).to(torch.int64)
    counts = torch.where(whole, count, few)[None, None, :, 0].to(torch.int32)
    indices = torch.where(whole, slot, listed)[None, None].to(torch.int32)
    return torch.zeros_like(counts), indices[..., :0], counts, indices


BIGBIRD = Family(
    name="bigbird",
    sites=_sites,
    intercept=_intercept,
    faithful=lambda model, conversion: True,
    reason="",
    original=_as_it_was,
)
