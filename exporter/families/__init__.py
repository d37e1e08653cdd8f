"""Family adapters, one small file each, and the choice between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .base import Family
from .bigbird import BIGBIRD
from .declared_windows import DECLARED_WINDOWS
from .flex.family import FLEX_ATTENTION
from .gpt_neo import GPT_NEO
from .led import LED
from .longformer import LONGFORMER
from .longt5 import LONGT5
from .windowed_encoder import WINDOWED_ENCODER

if TYPE_CHECKING:
    from torch import nn

    from ..conversion import Conversion

FAMILIES: tuple[Family, ...] = (
    LONGFORMER,
    LED,
    LONGT5,
    BIGBIRD,
    GPT_NEO,
    DECLARED_WINDOWS,
    WINDOWED_ENCODER,
    FLEX_ATTENTION,
)
"""Every adapter; the first that finds a site in a model is used."""

__all__ = ["FAMILIES", "Family", "family_by_name", "find_family"]


def find_family(model: nn.Module, conversion: Conversion) -> Family | None:
    """The first adapter with a site in `model` under `conversion`, or None."""
    return next((family for family in FAMILIES if family.sites(model, conversion)), None)


def family_by_name(name: str) -> Family:
    """The adapter called `name`.

    Raises:
        KeyError: there is no such adapter.
    """
    return {family.name: family for family in FAMILIES}[name]
