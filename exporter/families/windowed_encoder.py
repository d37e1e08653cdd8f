"""Dense bidirectional encoders turned into windowed ones: the Longformer conversion (Beltagy et al. 2020, section 5).

Applies to models that take their attention from ``transformers``' attention interface (BERT, RoBERTa, ELECTRA, …) when
the user asks for a window. Unlike the paper's conversion nothing is trained afterwards, so the result approximates the
original: exactly where the window holds the whole text, less well beyond.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .attention_interface import banded_attention, interface
from .base import Family

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..conversion import Conversion


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


def _intercept(model: nn.Module, conversion: Conversion) -> contextlib.AbstractContextManager[None]:
    assert conversion.window is not None
    half, global_tokens = conversion.window // 2, conversion.global_tokens

    def attend(
        stock: Callable[..., Any],
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        output = banded_attention(
            query,
            key,
            value,
            padding=attention_mask,
            left=half,
            right=half,
            scaling=scaling,
            global_mask=_first_tokens(query, global_tokens) if global_tokens else None,
        )
        return output, None

    # The mask stays what it came as: (B, S), True = attend.
    return interface(model, attend, lambda stock, *, attention_mask, **_: attention_mask)


def _first_tokens(query: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the first `count` tokens of each row: bool (B, S)."""
    import torch

    batch, length = query.shape[0], query.shape[2]
    return (torch.arange(length, device=query.device) < count)[None, :].expand(batch, length)


WINDOWED_ENCODER = Family(
    name="windowed-encoder",
    sites=_sites,
    intercept=_intercept,
    faithful=lambda model, conversion: False,
    reason="dense attention cut to a window",
)
