"""What a family adapter says: which attention to intercept while tracing, and with what."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from ..conversion import Conversion
    from ..sites.record import StandardSite


@dataclass(frozen=True)
class Family:
    """One way of recognising attention in a PyTorch model.

    Attributes:
        name: What reports call it.
        sites: Names of the submodules whose attention the adapter replaces; empty when the family does not apply.
        intercept: Context manager under which these submodules call a longspan operator, in eager mode and while
            tracing alike. Patches live as long as the context.
        faithful: Whether the intercepted model computes what the original does. Where not, the difference is the
            approximation error, and `reason` says where it comes from.
        reason: Where the approximation error comes from.
        standard: Attention that the adapter saw and leaves as it is.
        original: Context manager around a call of the model without interception, for models that a call changes:
            afterwards they are as they were.
        max_length: Longest text that the sites accept, where they say so and the model does not.
    """

    name: str
    sites: Callable[[nn.Module, Conversion], list[str]]
    intercept: Callable[[nn.Module, Conversion], contextlib.AbstractContextManager[None]]
    faithful: Callable[[nn.Module, Conversion], bool]
    reason: str
    standard: Callable[[nn.Module, Conversion], tuple[StandardSite, ...]] = lambda model, conversion: ()
    original: Callable[[nn.Module], contextlib.AbstractContextManager[None]] = lambda model: contextlib.nullcontext()
    max_length: Callable[[nn.Module], int | None] = lambda model: None


@contextlib.contextmanager
def replaced(*targets: tuple[str, Any]) -> Iterator[None]:
    """Replace attributes while the context lasts.

    Args:
        targets: Pairs of a dotted path ``"package.module:Class.method"`` or ``"package.module:function"`` and the
            replacement.

    Raises:
        AttributeError: a path does not exist, which means that the library changed and the adapter must follow.
    """
    with contextlib.ExitStack() as stack:
        for path, replacement in targets:
            module, _, attribute = path.partition(":")
            *parents, name = attribute.split(".")
            owner: Any = importlib.import_module(module)
            for parent in parents:
                owner = getattr(owner, parent)
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


def modules_of_class(model: nn.Module, class_name: str) -> list[str]:
    """Names of the submodules whose class, or a base of it, is called `class_name`."""
    return [
        name
        for name, module in model.named_modules()
        if any(base.__name__ == class_name for base in type(module).__mro__)
    ]
