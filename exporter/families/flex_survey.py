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
from torch.nn.attention import flex_attention as flex
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ExportFailed
from .examples import Examples, examples_of
from .exportable import exportable
from .flex_interception import DeclaredMask, FlexArguments, intercepted, with_listed
from .flex_meaning import Call, Meaning, read_meaning
from .score_mods import Sizes

_KEPT = "_longspan_flex_survey"
_LONGER = (37, -61, 811)
"""Tokens by which the other runs differ from the example."""

_DRAWS = 3

_SHAPE_ONLY = ("_like", "new_zeros", "new_ones", "new_full", "new_empty", "empty_strided")
"""Operators that take the shape of a tensor and not its values."""


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
    first = _Recorder(model)
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
    for call in first.calls:
        call.ask_at_its_ends()
    runs, open_length = [first.calls], False
    for longer in _LONGER:
        inputs = examples.resized(1, longer)
        if inputs is None:
            continue
        open_length = True
        again = _Recorder(model)
        try:
            again.run(inputs)
            for call in again.calls:
                call.ask_at_its_ends()
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
    if any(call.mask_reads_inputs or call.score_reads_inputs for call in first.calls):
        for seed in range(_DRAWS):
            drawn = _Recorder(model)
            drawn.run(examples.redrawn(seed))
            redrawn.append(drawn.calls)
    calls = tuple(
        read_meaning([run[index] for run in runs], [run[index] for run in redrawn], open_length)
        for index in range(len(first.calls))
    )
    return FlexSurvey(calls, tuple(first.others))


@dataclass
class _Recorder:
    """Runs a model and collects its calls."""

    model: Any
    calls: list[Call] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    _inside: list[str] = field(default_factory=list)

    def run(self, inputs: dict[str, torch.Tensor]) -> None:
        with (
            torch.no_grad(),
            exportable(self.model),
            self._layers(),
            intercepted(self._called),
            _Descent(inputs.values(), self._operator_called) as self._descent,
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
        _refuse_arguments(call, self._layer)
        query, key, value = call.query, call.key, call.value
        sizes = Sizes(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        mask = call.block_mask
        _refuse_mask(mask, sizes, self._layer)
        listed = None if mask is None or isinstance(mask, DeclaredMask) else mask
        mask_mod = flex.noop_mask if mask is None else mask.mask_mod
        size = (flex._DEFAULT_SPARSE_BLOCK_SIZE,) * 2 if mask is None else tuple(mask.BLOCK_SIZE)
        self.calls.append(
            Call(
                layer=self._layer,
                sizes=sizes,
                mask_mod=mask_mod,
                score_mod=call.score_mod,
                block_size=size,
                asked=(1, 1) if mask is None else tuple(mask.shape[:2]),
                listed=None if listed is None else with_listed(listed.as_tuple())[-1],
                lists=listed,
                mask_reads_inputs=self._descent.descends(lambda b, h, q, k: mask_mod(b, h, q, k), scores=False),
                score_reads_inputs=call.score_mod is not None and self._descent.descends(call.score_mod, scores=True),
            )
        )
        output = query.new_zeros((*query.shape[:3], value.shape[3]))
        lse = query.new_zeros(query.shape[:3])
        # What follows descends from the inputs, whatever this stand-in was made of.
        self._descent.mark(output, lse)
        return call.result(output, lse)


class _Descent(TorchDispatchMode):
    """Knows which tensors are computed from the values of a model's inputs, by the storage that they live in."""

    def __init__(self, inputs: Any, on_operator: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages: dict[int, Any] = {}
        self._on_operator = on_operator
        self.mark(*inputs)

    def mark(self, *tensors: torch.Tensor) -> None:
        """Count tensors as computed from the inputs."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            # Kept alive, so that no other storage takes its place.
            self._storages[storage._cdata] = storage

    def descends(self, function: Callable[..., Any], scores: bool) -> bool:
        """Whether a mask_mod, or a score_mod, reads a tensor that is computed from the inputs."""
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

        index = [torch.zeros(1, dtype=torch.int64) for _ in range(4)]
        if scores:
            index.insert(0, torch.zeros(1, dtype=torch.float64))
        with TransformGetItemToIndex():
            result = torch.vmap(function)(*index)
        return self._has(result)

    def _has(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self._storages

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "longspan":
            self._on_operator()
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if any(part in name for part in _SHAPE_ONLY):
            return result
        leaves = torch.utils._pytree.tree_leaves
        if any(self._has(value) for value in leaves((args, kwargs))):
            self.mark(*(value for value in leaves(result) if isinstance(value, torch.Tensor)))
        return result


def _refuse_arguments(call: FlexArguments, layer: str) -> None:
    """Refuse what no operator has, and what flex_attention itself refuses.

    Raises:
        ExportFailed: the call asks for one of these.
    """
    if call.return_aux is not None and call.return_aux.max_scores:
        raise ExportFailed(
            f"{layer}: flex_attention is asked for its largest scores (AuxRequest(max_scores=True)), which the "
            "operators do not have; allowed: lse=True; next step: leave them out"
        )
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    if heads != kv_heads and not (call.enable_gqa and heads % kv_heads == 0):
        raise ExportFailed(
            f"{layer}: flex_attention gets {heads} query heads and {kv_heads} key heads; allowed: as many, or with "
            "enable_gqa=True a divisor of them"
        )


def _refuse_mask(mask: Any, sizes: Sizes, layer: str) -> None:
    """Refuse a BlockMask that is for other lengths, or has lost its meaning.

    Raises:
        ExportFailed: it is one of these.
    """
    if mask is None:
        return
    if mask.mask_mod is flex._sliced_mask_mod_error:
        raise ExportFailed(
            f"{layer}: its BlockMask is a slice of another, which has no mask_mod; next step: set mask_mod on it, or "
            "make it with create_block_mask"
        )
    if tuple(mask.BLOCK_SIZE) == (flex._LARGE_SPARSE_BLOCK_SIZE,) * 2:
        return
    wanted, got = (sizes.queries, sizes.keys), tuple(mask.seq_lengths)
    if wanted != got:
        raise ExportFailed(
            f"{layer}: its BlockMask is for {got[0]} queries and {got[1]} keys, and there are {wanted[0]} and "
            f"{wanted[1]}; next step: make it in forward, of the length of the input "
            "(create_block_mask(mask_mod, None, None, S, S)), or fix the length (dynamic_shapes without a Dim for it)"
        )


def _void(_: object) -> None:
    """Nothing: a hook that returns something would change the module's output."""


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
