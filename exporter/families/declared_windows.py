"""Every model on ``transformers``' attention interface that declares windows or chunks for some of its layers.

Mistral, Gemma, GPT-OSS, ModernBERT, Llama 4 and the others differ in what they call their windows, in whether a bound
is inclusive, and in what else their attention does; no name of a family appears here. The model is run once on a few
tokens: each mask that it asks for is identified by `mask_meaning`, and each attention that receives such a mask is a
site. Attention under any other mask, and attention with an argument that the operator does not know, stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ExportFailed
from ..patterns import Pattern, Window
from ..sites.record import StandardSite
from .attention_interface import banded_attention, interface, on_the_interface
from .base import Family, replaced
from .exportable import exportable
from .mask_meaning import chunk_size, fingerprint, is_local, meaning, read_pattern

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..conversion import Conversion
    from .chunked_attention import ChunkLayout

# What a model may hand to its attention without changing what is computed beyond what the operator knows.
_HARMLESS = frozenset(
    (
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "scaling",
        "sliding_window",
        "token_type_ids",
        "use_cache",
    )
)
_KNOWN = _HARMLESS | {"softcap", "s_aux"}

# Rows of the survey's input: no padding, and left padding that moves the boundaries of chunks.
_LEFT_PADDING = (0, 1, 3)
_SURVEY_LENGTH = 5

_POSITION_IDS = 2
"""Index of ``position_ids`` among the positional arguments of a model."""


@dataclass(frozen=True)
class _PatternMask:
    """Takes the place of a mask while a model hands it from layer to layer.

    A model that computes with its mask fails on it, which is better than computing with half of a mask.

    Attributes:
        pattern: What the mask would say.
        padding: bool (B, S), True = attend; None without padding.
        chunks: Where the pattern is chunks, how the batch is cut.
        stock: Makes the mask itself, for attention that must stay as it is.
    """

    pattern: Pattern
    padding: torch.Tensor | None
    chunks: ChunkLayout | None
    stock: Callable[[], Any]


@dataclass(frozen=True)
class _Survey:
    """What a model's attention does.

    Attributes:
        meanings: Pattern of each mask function by its fingerprint; None for those that are none of ours.
        sites: Names of the modules whose attention is replaced, in the order they are called.
        standard: Attention that is not.
    """

    meanings: dict[Hashable, Pattern | None]
    sites: tuple[str, ...]
    standard: tuple[StandardSite, ...]


@dataclass
class _Recorder:
    """Collects a survey while the model runs."""

    names: dict[int, str]
    meanings: dict[Hashable, Pattern | None] = field(default_factory=dict)
    sites: list[str] = field(default_factory=list)
    standard: list[StandardSite] = field(default_factory=list)
    masks: list[tuple[Any, Pattern | None]] = field(default_factory=list)

    def mask_made(self, mask: Any, pattern: Pattern | None) -> None:
        self.masks.append((mask, pattern))

    def called(self, module: Any, mask: Any, refusal: str) -> None:
        name = self.names.get(id(module), type(module).__name__)
        if isinstance(mask, _PatternMask) and not refusal:
            self.sites.append(name)
            return
        known = [pattern for made, pattern in self.masks if made is mask]
        if isinstance(mask, _PatternMask):
            reason = f"{meaning(mask.pattern)}, but {refusal}"
        elif known and known[0] is not None:
            reason = f"full attention: {meaning(known[0])}"
        elif known:
            reason = "its mask is neither a window nor chunks at a fixed distance from the query"
        else:
            reason = "it has no mask that the attention interface made"
        self.standard.append(StandardSite(name, reason))


def _attend(
    stock: Callable[..., Any],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    recorder: _Recorder | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, Any]:
    refusal = _refusal(keywords)
    if recorder is not None:
        recorder.called(module, attention_mask, refusal)
    if not isinstance(attention_mask, _PatternMask):
        return stock(module, query, key, value, attention_mask, **keywords)  # type: ignore[no-any-return]
    if refusal:
        return stock(module, query, key, value, attention_mask.stock(), **keywords)  # type: ignore[no-any-return]
    common: dict[str, Any] = {
        "scaling": keywords.get("scaling"),
        "softcap": keywords.get("softcap") or 0.0,
        "sinks": keywords.get("s_aux"),
    }
    pattern = attention_mask.pattern
    if isinstance(pattern, Window):
        padding = attention_mask.padding
        return banded_attention(
            query, key, value, padding=padding, left=pattern.left, right=pattern.right, **common
        ), None
    from .chunked_attention import chunked_attention

    assert attention_mask.chunks is not None
    return chunked_attention(query, key, value, layout=attention_mask.chunks, **common), None


def _refusal(keywords: dict[str, Any]) -> str:
    """Why attention with these arguments is not the operator's; empty where it is."""
    unknown = [
        name for name, value in keywords.items() if name not in _KNOWN and value is not None and value is not False
    ]
    return f"the model passes {', '.join(unknown)} to it, which the operator does not have" if unknown else ""


def _make_mask(
    stock: Callable[..., Any],
    meanings: dict[Hashable, Pattern | None],
    recorder: _Recorder | None = None,
    **keywords: Any,
) -> Any:
    function, padding = keywords["mask_function"], keywords["attention_mask"]
    print_ = fingerprint(function)
    if recorder is not None and print_ not in meanings:
        meanings[print_] = read_pattern(function, _left_padding(keywords), keywords.get("use_vmap", False))
    pattern = meanings.get(print_)
    if pattern is not None and is_local(pattern) and keywords["q_length"] == keywords["kv_length"]:
        size = chunk_size(pattern)
        chunks = _chunks(size, **keywords) if size else None
        return _PatternMask(pattern, padding, chunks, lambda: stock(**keywords))
    mask = stock(**keywords)
    if recorder is not None:
        recorder.mask_made(mask, pattern)
    return mask


def _chunks(
    size: int, *, attention_mask: torch.Tensor | None, batch_size: int, q_length: int, device: Any, **_: Any
) -> ChunkLayout:
    import torch

    from .chunked_attention import ChunkLayout

    if attention_mask is None:
        attention_mask = torch.ones((batch_size, q_length), dtype=torch.bool, device=device)
    return ChunkLayout.of(attention_mask, size)


def _left_padding(keywords: dict[str, Any]) -> torch.Tensor:
    import torch

    padding = keywords["attention_mask"]
    if padding is None:
        return torch.zeros(keywords["batch_size"], dtype=torch.int64)
    left: torch.Tensor = (padding.to(torch.int64).cumsum(-1) == 0).sum(-1)
    return left


def _survey(model: Any) -> _Survey:
    """The survey of a model, made once; copies of the model carry it along."""
    found: _Survey | None = model.__dict__.get("_longspan_survey")
    if found is None:
        found = model.__dict__["_longspan_survey"] = _run_survey(model)
    return found


def _run_survey(model: Any) -> _Survey:
    import torch

    from ..parity.oracle import float64_arithmetic

    recorder = _Recorder({id(module): name for name, module in model.named_modules()})
    mask = torch.ones(len(_LEFT_PADDING), _SURVEY_LENGTH, dtype=torch.int64)
    for row, count in enumerate(_LEFT_PADDING):
        mask[row, :count] = 0
    device = next(model.parameters()).device
    mask = mask.to(device)
    double = next(model.parameters()).dtype == torch.float64

    def make_mask(stock: Callable[..., Any], **keywords: Any) -> Any:
        return _make_mask(stock, recorder.meanings, recorder, **keywords)

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(exportable(model))
        stack.enter_context(interface(model, functools.partial(_attend, recorder=recorder), make_mask))
        if double:
            stack.enter_context(float64_arithmetic())
        model(input_ids=torch.ones_like(mask), attention_mask=mask)
    return _Survey(recorder.meanings, tuple(recorder.sites), tuple(recorder.standard))


def _sites(model: nn.Module, conversion: Conversion) -> list[str]:
    if not on_the_interface(model):
        return []
    try:
        return list(_survey(model).sites)
    except ExportFailed:
        raise
    except Exception as error:
        if _declares_windows(model):
            raise ExportFailed(
                f"{type(model).__name__} declares windows but does not run on input_ids and attention_mask alone: "
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}; next step: export the "
                "part of it that does, with file.py:factory"
            ) from error
        return []


def _declares_windows(model: Any) -> bool:
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))


@contextlib.contextmanager
def _intercept(model: Any, conversion: Conversion) -> Iterator[None]:
    survey = _survey(model)

    def make_mask(stock: Callable[..., Any], **keywords: Any) -> Any:
        return _make_mask(stock, survey.meanings, **keywords)

    with exportable(model), _no_packed_sequences(model), interface(model, _attend, make_mask):
        yield


@contextlib.contextmanager
def _no_packed_sequences(model: Any) -> Iterator[None]:
    """Spare a model without padding mask the search for several texts in one row, unless its caller gives positions.

    Positions that the model counts itself are consecutive, but while tracing ``transformers`` cannot know that.
    """
    from transformers import masking_utils

    given = False

    def note(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal given
        given = keywords.get("position_ids") is not None or len(args) > _POSITION_IDS

    def find(position_ids: torch.Tensor) -> Any:
        return find_packed(position_ids) if given else None

    find_packed = masking_utils.find_packed_sequence_indices
    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with replaced(("transformers.masking_utils:find_packed_sequence_indices", find)):
            yield
    finally:
        hook.remove()


def _standard(model: nn.Module, conversion: Conversion) -> tuple[StandardSite, ...]:
    return _survey(model).standard


DECLARED_WINDOWS = Family(
    name="declared-windows",
    sites=_sites,
    intercept=_intercept,
    faithful=lambda model, conversion: True,
    reason="",
    standard=_standard,
)
