"""The float64 oracle: the same model with every floating-point step in float64.

``model.double()`` is not enough. Models cast on purpose (``softmax(…, dtype=torch.float32)``, ``x.float()``, masks made
in a given type), and each such step brings a float64 run back to the errors of float32, where it can no longer judge a
float32 runtime. So those casts are raised to float64 as well, at the dispatcher, where nothing passes by.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_LOW = frozenset((torch.float16, torch.bfloat16, torch.float32))


class _Promote(TorchDispatchMode):
    """Reads every lower floating-point type among an operator's arguments as float64."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        promoted = {name: _promoted(value) for name, value in (kwargs or {}).items()}
        return func(*map(_promoted, args), **promoted)


def _promoted(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOW else value


def float64_copy(model: torch.nn.Module) -> Any:
    """A copy of a model in float64; its experts, where it has some, run as a loop, which takes every type."""
    double = copy.deepcopy(model).double()
    if getattr(double, "_can_set_experts_implementation", lambda: False)():
        double.set_experts_implementation("eager")  # type: ignore[operator]
    return double


def typed_copy(model: torch.nn.Module, dtype: torch.dtype) -> Any:
    """A copy of a model with its parameters, and the buffers that are saved with them, rounded to a type.

    Buffers that are computed and not saved, such as the frequencies of rotary positions, keep theirs: that is what
    loading a model in a type does, and rounding them would be an error that no runtime makes.
    """
    typed = copy.deepcopy(model)
    saved = typed.state_dict(keep_vars=True).values()
    for value in saved:
        if value.is_floating_point():
            value.data = value.data.to(dtype)
    return typed


@contextlib.contextmanager
def float64_arithmetic() -> Iterator[None]:
    """Run eager torch code in float64, whatever floating-point types it asks for.

    Parameters and inputs must be float64 already.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Promote():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)
