"""Models that call PyTorch's FlexAttention: ``torch.nn.attention.flex_attention.flex_attention``.

The model is run on its example inputs, at several lengths, to see what each call computes (`survey`): the keys
that mask_mod and score_mod leave, as a pattern, and what score_mod does to the scores. Each call then becomes one
operator: SlidingWindowAttention where the pattern is one band, else BlockSparseAttention with lists that the graph
computes from its length, or frozen lists where there is no rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...errors import ExportFailed
from ..base import Family
from ..exportable import exportable

if TYPE_CHECKING:
    from torch import nn

    from ...conversion import Conversion


def _sites(model: nn.Module, conversion: Conversion) -> list[str]:
    from ..examples import examples_of

    if examples_of(model) is None:
        return []
    from .survey import survey

    found = survey(model)
    return [*(call.layer for call in found.calls), *found.others] if found.calls else []


@contextlib.contextmanager
def _intercept(model: nn.Module, conversion: Conversion) -> Iterator[None]:
    from .attend import attend
    from .interception import FlexArguments, intercepted
    from .survey import survey

    meanings = survey(model).calls
    called = 0

    def next_call(*args: Any, **keywords: Any) -> Any:
        nonlocal called
        if called == len(meanings):
            raise ExportFailed(
                f"{type(model).__name__} calls flex_attention more often than on its example inputs ({called} times); "
                "next step: call it equally often whatever the inputs"
            )
        called += 1
        return attend(meanings[called - 1], FlexArguments(*args, **keywords))

    def start(*_: object) -> None:
        nonlocal called
        called = 0

    # Each call of the model begins with the first call of flex_attention.
    handle = model.register_forward_pre_hook(start)
    try:
        with exportable(model), intercepted(next_call):
            yield
    finally:
        handle.remove()


def _original(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    from .interception import eager

    return eager()


def _max_length(model: nn.Module) -> int | None:
    from .survey import survey

    return min((call.longest for call in survey(model).calls if call.longest is not None), default=None)


FLEX_ATTENTION = Family(
    name="flex-attention",
    sites=_sites,
    intercept=_intercept,
    faithful=lambda model, conversion: True,
    reason="",
    original=_original,
    max_length=_max_length,
)
