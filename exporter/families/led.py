"""LED (Beltagy et al. 2020, section 6): the encoder is Longformer's, with another encoder around it.

Its attention is the same code under another name, and so is its replacement. The eager encoder pads the text to a
multiple of the widest window and asks the data whether a token is global; neither is needed here, so its forward is
replaced as well. The decoder attends in full and is not exported.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .base import Family, modules_of_class, replaced
from .longformer import DILATION_REASON, longformer_attention, not_dilated

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..conversion import Conversion

_MODELING = "transformers.models.led.modeling_led"


def _sites(model: nn.Module, conversion: Conversion) -> list[str]:
    return modules_of_class(model, "LEDEncoderSelfAttention")


def _intercept(model: nn.Module, conversion: Conversion) -> AbstractContextManager[None]:
    return replaced(
        (f"{_MODELING}:LEDEncoderSelfAttention.forward", longformer_attention),
        (f"{_MODELING}:LEDEncoder.forward", _encoder),
    )


def _encoder(
    self: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    global_attention_mask: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    output_attentions: bool | None = None,
    output_hidden_states: bool | None = None,
    return_dict: bool | None = None,
    **_: Any,
) -> Any:
    """LEDEncoder.forward without padding and without the question whether a global token exists."""
    import torch
    from transformers.models.led.modeling_led import LEDEncoderBaseModelOutput

    if inputs_embeds is None:
        inputs_embeds = self.embed_tokens(input_ids)
    if attention_mask is None:
        attention_mask = torch.ones(inputs_embeds.shape[:-1], dtype=torch.int64, device=inputs_embeds.device)
    # A padded token is never global: the eager code multiplies the two masks.
    masked = attention_mask == 0
    is_global = None if global_attention_mask is None else (global_attention_mask != 0) & ~masked
    positions = self.embed_positions(inputs_embeds.shape[:-1])
    states = [self.layernorm_embedding(inputs_embeds + positions)]
    for layer in self.layers:
        states.append(layer(states[-1], attention_mask, is_index_masked=masked, is_index_global_attn=is_global)[0])
    wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
    output = LEDEncoderBaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states) if wanted else None)
    return_dict = self.config.return_dict if return_dict is None else return_dict
    return output if return_dict else output.to_tuple()


LED = Family(name="led", sites=_sites, intercept=_intercept, faithful=not_dilated, reason=DILATION_REASON)
