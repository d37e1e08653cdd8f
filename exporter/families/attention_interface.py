"""The mechanics of intercepting ``transformers``' attention interface, shared by the adapters that use it.

A model on the interface asks it for two functions: one that turns a 2-D padding mask and a mask function into the mask
of a kind of layer, and one that computes attention under such a mask. Both are replaced together: with the attention
function alone the mask arrives as None and padding is lost without a word.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ExportFailed
from .base import replaced

if TYPE_CHECKING:
    import torch
    from torch import nn

_NAME = "longspan"

Attend = Callable[..., "tuple[torch.Tensor, Any]"]
"""``attend(stock, module, query, key, value, mask, **keywords)``: (B, H, S, D) in, ((B, S, H, D_v), None) out."""

MakeMask = Callable[..., Any]
"""``make_mask(stock, **keywords)``; `stock` and the keywords are those of ``transformers``' mask functions."""


def on_the_interface(model: nn.Module) -> bool:
    """Whether `model` takes its attention from the interface, rather than ignoring what it is told to use."""
    return bool(getattr(model, "_can_set_attn_implementation", lambda: False)())


@contextlib.contextmanager
def interface(model: Any, attend: Attend, make_mask: MakeMask) -> Iterator[None]:
    """Route a model's attention and masks through two functions while the context lasts.

    Each gets what it stands in for as its first argument, bound to the implementation that the model used before, so
    that what it does not replace stays as it was.

    Args:
        model: A ``PreTrainedModel``.
        attend: Called for every attention.
        make_mask: Called for every mask.

    Raises:
        ExportFailed: the model does not use the interface.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    configs = _configs(model)
    before = [config._attn_implementation_internal for config in configs]
    stock = model.config._attn_implementation
    # Flash and flex attention run on other devices and return other kinds of mask.
    stock = stock if stock in ("eager", "sdpa") else "eager"
    get_interface = AttentionInterface.get_interface

    def get(self: Any, implementation: str, default: Callable[..., Any]) -> Callable[..., Any]:
        if implementation != _NAME:
            return get_interface(self, implementation, default)
        # The default is the eager code of the model's own file, which no registry knows.
        return functools.partial(attend, get_interface(self, stock, default))

    AttentionInterface.register(_NAME, attend)
    AttentionMaskInterface.register(_NAME, functools.partial(make_mask, AttentionMaskInterface._global_mapping[stock]))
    try:
        model.set_attn_implementation(_NAME)
        if model.config._attn_implementation != _NAME:
            raise ExportFailed(
                f"{type(model).__name__} does not take its attention from the transformers attention interface; "
                "allowed: models that do (BERT, RoBERTa, Mistral, Gemma, …)"
            )
        with replaced(("transformers:AttentionInterface.get_interface", get)):
            yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
        AttentionInterface._global_mapping.pop(_NAME, None)
        AttentionMaskInterface._global_mapping.pop(_NAME, None)


def _configs(model: Any) -> list[Any]:
    """The configurations of a model and of the models inside it, each once."""
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    return [config for config in configs.values() if hasattr(config, "_attn_implementation_internal")]


def banded_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    padding: torch.Tensor | None,
    left: int,
    right: int,
    scaling: float | None = None,
    **keywords: Any,
) -> torch.Tensor:
    """Call the operator in the interface's layout.

    Args:
        query: (B, H_q, S, D).
        key: (B, H_kv, S, D).
        value: (B, H_kv, S, D_v).
        padding: bool (B, S), True = attend; None without padding.
        left: Keys before a query's own that it sees.
        right: Keys after a query's own that it sees; 0 makes the node causal.
        scaling: Factor of q·k; 1/sqrt(D) when None.
        keywords: Further keyword arguments of the operator.

    Returns:
        (B, S, H_q, D_v).
    """
    from ...plugins.sliding_window_attention.torch_op import sliding_window_attention

    batch, heads, length, size = query.shape
    # The 3-D layout cancels the transposes that the model made around its attention.
    flat = (tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value))
    output = sliding_window_attention(
        *flat,
        attn_mask=padding,
        left_window_size=left,
        right_window_size=right,
        is_causal=right == 0,
        scale=size**-0.5 if scaling is None else scaling,
        q_num_heads=heads,
        kv_num_heads=key.shape[1],
        **keywords,
    )
    return output.reshape(batch, length, heads, value.shape[3])
