"""What the FlexAttention calls of a model compute, found by running the model at a few lengths.

Each run records the calls in their order. What a call's mask and score_mod mean is read from the functions and must
hold for the same call of every run: a mask_mod that closes over the length is another function at another length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ...errors import ExportFailed
from ...parity.oracle import float64_arithmetic
from ..examples import Examples, examples_of
from ..exportable import exportable
from .interception import FlexArguments, intercepted
from .meaning import Call, Meaning, read_meaning
from .observation import Descent, Reading, observe

_KEPT = "_longspan_flex_survey"
_LONGER = (37, -61, 811)
"""Tokens by which the other runs differ from the example."""

_DRAWS = 8
"""Runs on other inputs, where a mask depends on them."""


@dataclass(frozen=True)
class FlexSurvey:
    """The attention of a model.

    Attributes:
        calls: What each call of flex_attention computes, in the order of the calls.
        others: Modules that call longspan operators themselves.
    """

    calls: tuple[Meaning, ...] = ()
    others: tuple[str, ...] = ()


def survey(model: Any) -> FlexSurvey:
    """The survey of a model, made once; copies of the model carry it along.

    Raises:
        ExportFailed: a call computes what the operators do not have.
    """
    found: FlexSurvey | None = model.__dict__.get(_KEPT)
    if found is None:
        examples = examples_of(model)
        with torch.no_grad():
            found = FlexSurvey() if examples is None else _survey(model, examples)
        model.__dict__[_KEPT] = found
    return found


def _survey(model: Any, examples: Examples) -> FlexSurvey:
    open_length = any(examples.resized(0, longer) for longer in _LONGER)
    first = _Recorder(model, Reading.ANY_LENGTH if open_length else Reading.ONE_LENGTH)
    try:
        first.run(dict(examples.inputs))
    except ExportFailed:
        raise
    except Exception as error:
        if first.calls:
            raise ExportFailed(
                f"{type(model).__name__} calls flex_attention and does not run on its example inputs: {_line(error)}"
            ) from error
        return FlexSurvey()
    if not first.calls:
        return FlexSurvey()
    runs = [first.calls]
    for longer in _LONGER:
        inputs = examples.resized(1, longer)
        if inputs is None:
            continue
        again = _Recorder(model)
        try:
            again.run(inputs)
        except ExportFailed:
            raise
        except Exception:
            # The model ends before, and torch.export will say so, or its positions do.
            continue
        if [call.layer for call in again.calls] != [call.layer for call in first.calls]:
            raise ExportFailed(
                f"{type(model).__name__} calls flex_attention {len(first.calls)} times on its example inputs and "
                f"{len(again.calls)} times on others ({longer:+d} tokens); next step: fix the length"
            )
        runs.append(again.calls)
    redrawn = []
    if any(call.reads_inputs or call.bias_reads_inputs for call in first.calls):
        for seed in range(_DRAWS):
            drawn = _Recorder(model)
            try:
                drawn.run(examples.redrawn(seed))
            except ExportFailed:
                raise
            except Exception:
                # Not every number need be an input of the model.
                continue
            if len(drawn.calls) == len(first.calls):
                redrawn.append(drawn.calls)
        if not redrawn:
            raise ExportFailed(
                f"{type(model).__name__}: a mask depends on the model's inputs, and the model runs on none of {_DRAWS} "
                "others; allowed: whole numbers and truth values in the range of the example's; next step: an example "
                "with a wider range"
            )
    calls = tuple(
        read_meaning([run[index] for run in runs], [run[index] for run in redrawn], open_length)
        for index in range(len(first.calls))
    )
    return FlexSurvey(calls, tuple(first.others))


@dataclass
class _Recorder:
    """Runs a model and collects its calls."""

    model: Any
    reading: Reading = Reading.NOTHING
    calls: list[Call] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    _inside: list[str] = field(default_factory=list)

    def run(self, inputs: dict[str, torch.Tensor]) -> None:
        weights = (value.dtype for value in self.model.parameters() if value.is_floating_point())
        dtype = next(weights, torch.get_default_dtype())
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            float64_arithmetic() if dtype == torch.float64 else contextlib.nullcontext(),
            exportable(self.model),
            self._layers(),
            intercepted(self._called),
            Descent(inputs.values(), self._operator_called) as self._descent,
        ):
            self.model(**inputs)

    @contextlib.contextmanager
    def _layers(self) -> Iterator[None]:
        """Know which module is running."""
        handles = []

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: self._inside.append(name)

        for name, module in self.model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(lambda *_: _void(self._inside.pop()), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def _layer(self) -> str:
        return next((name for name in reversed(self._inside) if name), type(self.model).__name__)

    def _operator_called(self) -> None:
        self.others.append(self._layer)

    def _called(self, *args: Any, **keywords: Any) -> Any:
        call = FlexArguments(*args, **keywords)
        self.calls.append(observe(self._layer, call, self._descent, self.reading))
        output = call.query.new_zeros((*call.query.shape[:3], call.value.shape[3]))
        lse = call.query.new_zeros(call.query.shape[:3])
        # What follows descends from the inputs, whatever this stand-in was made of.
        self._descent.mark(output, lse)
        return call.result(output, lse)


def _void(_: object) -> None:
    """Nothing: a hook that returns something would change the module's output."""


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
