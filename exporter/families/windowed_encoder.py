"""Dense bidirectional encoders turned into windowed ones: the Longformer conversion (Beltagy et al. 2020, section 5).

Applies to models that take their attention from ``transformers``' attention interface (BERT, RoBERTa, ELECTRA, …) when
the user asks for a window. Unlike the paper's conversion nothing is trained afterwards, so the result approximates the
original: exactly where the window holds the whole text, less well beyond.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ExportFailed
from .base import Family

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..conversion import Conversion

_INTERFACE = "longspan_window"


def _sites(model: nn.Module, conversion: Conversion) -> list[str]:
    if conversion.window is None or not hasattr(model, "set_attn_implementation"):
        return []
    # What the attention interface hands to an implementation: a module with a scaling that is not causal.
    return [
        name
        for name, module in model.named_modules()
        if name.endswith((".self", ".attention", ".self_attn"))
        and hasattr(module, "scaling")
        and not getattr(module, "is_causal", False)
        and not getattr(module, "is_decoder", False)
    ]


@contextlib.contextmanager
def _intercept(model: Any, conversion: Conversion) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        return _windowed_attention(query, key, value, attention_mask, scaling, conversion), None

    AttentionInterface.register(_INTERFACE, attention)
    # Both interfaces: with the attention alone the mask would arrive as None and padding would be lost silently.
    AttentionMaskInterface.register(_INTERFACE, lambda *_, attention_mask=None, **__: attention_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(_INTERFACE)
    try:
        if model.config._attn_implementation != _INTERFACE:
            raise ExportFailed(
                f"{type(model).__name__} does not take its attention from the transformers attention interface, so "
                "--window cannot be applied; allowed: encoders that do (BERT, RoBERTa, ELECTRA, …)"
            )
        yield
    finally:
        model.set_attn_implementation(before)


def _windowed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    conversion: Conversion,
) -> torch.Tensor:
    """(B, H, S, D) in, (B, S, H, D) out, as the interface wants; attention_mask is (B, S), True = attend."""
    import torch

    from ...plugins.sliding_window_attention.torch_op import sliding_window_attention

    assert conversion.window is not None
    heads, size = query.shape[1], query.shape[3]
    batch, length = query.shape[0], query.shape[2]
    global_mask = None
    if conversion.global_tokens:
        first = torch.arange(length, device=query.device) < conversion.global_tokens
        global_mask = first[None, :].expand(batch, length)
    # The 3-D layout cancels the transposes that the model made around its attention.
    query, key, value = (tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value))
    output = sliding_window_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        global_mask=global_mask,
        left_window_size=conversion.window // 2,
        right_window_size=conversion.window // 2,
        scale=size**-0.5 if scaling is None else scaling,
        q_num_heads=heads,
        kv_num_heads=heads,
    )
    return output.reshape(batch, length, heads, size)


WINDOWED_ENCODER = Family(
    name="windowed-encoder",
    sites=_sites,
    intercept=_intercept,
    faithful=lambda model, conversion: False,
    reason="dense attention cut to a window",
)
