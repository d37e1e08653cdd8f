"""GPT-Neo: every other layer sees the last ``window_size`` tokens, its own included, and scores are not scaled.

Its attention does not come from ``transformers``' attention interface. A local layer cuts its window out of a buffer of
max_position_embeddings x max_position_embeddings and adds the causal mask of the whole model; neither is needed here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..sites.record import StandardSite
from .attention_interface import banded_attention
from .base import Family, modules_of_class, replaced
from .exportable import exportable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..conversion import Conversion

_MODELING = "transformers.models.gpt_neo.modeling_gpt_neo"


@dataclass(frozen=True)
class _Masks:
    """What the model hands to its layers as a mask.

    Attributes:
        padding: bool (B, S), True = attend; None without padding.
        causal: Makes the (B, 1, S, S) mask that global layers add.
    """

    padding: torch.Tensor | None
    causal: Callable[[], Any]


def _layers(model: nn.Module, kind: str) -> list[str]:
    names = modules_of_class(model, "GPTNeoSelfAttention")
    return [name for name in names if model.get_submodule(name).attention_type == kind]


def _sites(model: nn.Module, conversion: Conversion) -> list[str]:
    return _layers(model, "local")


def _standard(model: nn.Module, conversion: Conversion) -> tuple[StandardSite, ...]:
    reason = "full attention: every query sees all keys up to its own"
    return tuple(StandardSite(name, reason) for name in _layers(model, "global"))


@contextlib.contextmanager
def _intercept(model: nn.Module, conversion: Conversion) -> Iterator[None]:
    from transformers.masking_utils import create_causal_mask

    def attend(
        self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: _Masks
    ) -> tuple[torch.Tensor, Any]:
        if self.attention_type == "global":
            # The model's own code takes causality from its buffer as well, whose slice fixes the length when traced.
            scores = query.float() @ key.float().transpose(-1, -2) + attention_mask.causal()
            return scores.softmax(dim=-1).to(value.dtype) @ value, None
        left = self.config.window_size - 1
        output = banded_attention(query, key, value, padding=attention_mask.padding, left=left, right=0, scaling=1.0)
        return output.transpose(1, 2), None

    def make_mask(*, attention_mask: torch.Tensor | None, **keywords: Any) -> _Masks:
        padding = None if attention_mask is None else attention_mask.bool()
        return _Masks(padding, lambda: create_causal_mask(attention_mask=attention_mask, **keywords))

    with (
        exportable(model),
        replaced((f"{_MODELING}:GPTNeoSelfAttention._attn", attend), (f"{_MODELING}:create_causal_mask", make_mask)),
    ):
        yield


GPT_NEO = Family(
    name="gpt-neo",
    sites=_sites,
    intercept=_intercept,
    faithful=lambda model, conversion: True,
    reason="",
    standard=_standard,
)
