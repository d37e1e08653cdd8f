"""Longformer (Beltagy et al. 2020): a window per layer, dilation, and global tokens with projections of their own.

The semantics are those of ``transformers``' eager code: ``|distance| <= attention_window / 2``; rows of global tokens
use the ``*_global`` projections and see every key; padded rows are zero. The eager code pads to a multiple of the
window, asks the data whether any token is global, and expands the padding mask to length x length; none of that is
needed here, so those steps are intercepted as well.

``config.attention_dilation`` (one step per layer, or a list of steps per head) is the original implementation's
setting; ``transformers`` has no dilated kernel and ignores it, so a model that sets it differs from its eager code.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .base import Family, modules_of_class, replaced

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..conversion import Conversion

_MODELING = "transformers.models.longformer.modeling_longformer"


def _sites(model: nn.Module, conversion: Conversion) -> list[str]:
    return modules_of_class(model, "LongformerSelfAttention")


def _intercept(model: nn.Module, conversion: Conversion) -> AbstractContextManager[None]:
    return replaced(
        (f"{_MODELING}:LongformerSelfAttention.forward", longformer_attention),
        (f"{_MODELING}:LongformerEncoder.forward", _encoder),
        (f"{_MODELING}:LongformerModel._pad_to_window_size", _no_padding),
        (f"{_MODELING}:create_bidirectional_mask", _padding_mask),
    )


def not_dilated(model: nn.Module, conversion: Conversion) -> bool:
    """Whether the eager code, which ignores ``attention_dilation``, computes what the configuration says."""
    dilation = getattr(getattr(model, "config", None), "attention_dilation", None)
    return not dilation or all(steps in (1, [1]) for steps in dilation)


def longformer_attention(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    is_index_masked: torch.Tensor | None = None,
    is_index_global_attn: torch.Tensor | None = None,
    is_global_attn: bool | None = None,
    output_attentions: bool = False,
) -> tuple[torch.Tensor]:
    """LongformerSelfAttention.forward, and LEDEncoderSelfAttention.forward, as one operator.

    Args:
        self: The module.
        hidden_states: (B, S, hidden).
        attention_mask: Not read; the two masks below say it.
        is_index_masked: bool (B, S), True = padding.
        is_index_global_attn: bool (B, S), True = global; None without global tokens.
        is_global_attn: Not read.
        output_attentions: Not read; there are no weights to return.

    Returns:
        (B, S, hidden), zero at padding.
    """
    from ...plugins.sliding_window_attention.torch_op import sliding_window_attention

    assert is_index_masked is not None
    global_inputs = {}
    if is_index_global_attn is not None:
        global_inputs = {
            "global_mask": is_index_global_attn,
            "global_q": self.query_global(hidden_states),
            "global_k": self.key_global(hidden_states),
            "global_v": self.value_global(hidden_states),
        }
    output = sliding_window_attention(
        self.query(hidden_states),
        self.key(hidden_states),
        self.value(hidden_states),
        attn_mask=~is_index_masked,
        **global_inputs,
        left_window_size=self.one_sided_attn_window_size,
        right_window_size=self.one_sided_attn_window_size,
        dilation=_dilation(self),
        scale=self.head_dim**-0.5,
        q_num_heads=self.num_heads,
        kv_num_heads=self.num_heads,
    )
    return (output.masked_fill(is_index_masked[:, :, None], 0.0),)


def _dilation(attention: Any) -> list[int]:
    per_layer = getattr(attention.config, "attention_dilation", None)
    if not per_layer:
        return [1]
    steps = per_layer[attention.layer_id]
    return [steps] if isinstance(steps, int) else list(steps)


def _encoder(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    padding_len: int = 0,
    output_attentions: bool = False,
    output_hidden_states: bool = False,
    return_dict: bool = True,
) -> Any:
    """LongformerEncoder.forward without the question to the data whether a global token exists."""
    from transformers.models.longformer.modeling_longformer import LongformerBaseModelOutput

    assert attention_mask is not None
    states = [hidden_states]
    for layer in self.layer:
        (hidden_states,) = layer(
            hidden_states,
            attention_mask=attention_mask,
            is_index_masked=attention_mask < 0,
            is_index_global_attn=attention_mask > 0,
        )
        states.append(hidden_states)
    all_states = tuple(states) if output_hidden_states else None
    if not return_dict:
        return tuple(value for value in (hidden_states, all_states) if value is not None)
    return LongformerBaseModelOutput(last_hidden_state=hidden_states, hidden_states=all_states)


def _no_padding(
    self: Any,
    input_ids: Any,
    attention_mask: Any,
    token_type_ids: Any,
    position_ids: Any,
    inputs_embeds: Any,
    pad_token_id: int,
) -> tuple[Any, ...]:
    """LongformerModel._pad_to_window_size for an operator that takes any length."""
    return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds


def _padding_mask(*, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> torch.Tensor:
    """The (B, 1, 1, S) additive mask; the caller reads one row of the S x S mask that it stands for."""
    import torch

    masked = attention_mask[:, None, None, :] == 0
    zero = torch.zeros_like(masked, dtype=inputs_embeds.dtype)
    return zero.masked_fill(masked, torch.finfo(inputs_embeds.dtype).min)


DILATION_REASON = "attention_dilation, which the eager code ignores"

LONGFORMER = Family(
    name="longformer",
    sites=_sites,
    intercept=_intercept,
    faithful=not_dilated,
    reason=DILATION_REASON,
)
