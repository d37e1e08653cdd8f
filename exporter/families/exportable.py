"""What keeps ``torch.export`` from tracing a model for reasons outside its attention, patched while a context lasts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .base import modules_of_class, replaced

if TYPE_CHECKING:
    import torch

_LLAMA4 = "transformers.models.llama4.modeling_llama4"


@contextlib.contextmanager
def exportable(model: Any) -> Iterator[None]:
    """Make a ``transformers`` model traceable without changing what it computes.

    No cache is built: it would be an output, and one of a length that differs between kinds of layer. Experts run as
    grouped products, because the eager loop asks the data which experts it needs; in float64, which grouped products do
    not take, they run as that loop. Llama 4 turns its queries by complex numbers, which ONNX does not have.
    """
    import torch

    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values()
    caches = [config for config in configs if getattr(config, "use_cache", None)]
    experts = getattr(model, "_can_set_experts_implementation", lambda: False)()
    before = model.get_experts_implementation() if experts else None
    with contextlib.ExitStack() as stack:
        for config in caches:
            stack.callback(setattr, config, "use_cache", True)
            config.use_cache = False
        if experts:
            stack.callback(model.set_experts_implementation, before)
            double = next(model.parameters()).dtype == torch.float64
            model.set_experts_implementation("eager" if double else "grouped_mm")
        if modules_of_class(model, "Llama4TextRotaryEmbedding"):
            stack.enter_context(_real_rotation())
        yield


def _real_rotation() -> contextlib.AbstractContextManager[None]:
    """Llama 4's rotary embedding with a pair of real numbers for each complex one."""
    from transformers.modeling_rope_utils import dynamic_rope_update

    return replaced(
        (f"{_LLAMA4}:Llama4TextRotaryEmbedding.forward", dynamic_rope_update(_angles)),
        (f"{_LLAMA4}:apply_rotary_emb", _rotate),
    )


def _angles(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Cosine and sine of each position and frequency: (B, S, D / 2, 2)."""
    import torch

    angles = position_ids[..., None].float() * self.inv_freq.float()
    turns: torch.Tensor = torch.stack((angles.cos(), angles.sin()), dim=-1) * self.attention_scaling
    return turns


def _rotate(query: torch.Tensor, key: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn neighbouring channels of (B, S, H, D) tensors by the angles of `_angles`."""
    import torch

    cos, sin = turns[:, :, None].unbind(-1)

    def turned(tensor: torch.Tensor) -> torch.Tensor:
        even, odd = tensor.float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
        return pairs.flatten(-2).type_as(tensor)

    return turned(query), turned(key)
