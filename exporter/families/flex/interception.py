"""PyTorch's ``flex_attention`` and ``create_block_mask``, sent elsewhere wherever a model got hold of them.

A model's file usually holds them under names of its own: imported by name, wrapped in ``functools.partial`` or
``torch.compile``, kept in a default argument. All of these lead to the same two function objects, so it is their code
that is exchanged while the context lasts. Not reached are calls that go round both: of the higher-order operator
``torch.ops.higher_order.flex_attention``, and of ``create_mask``, which makes a dense mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex

from ...errors import ExportFailed
from ..base import replaced

_FLEX = "torch.nn.attention.flex_attention"

Attend = Callable[..., Any]
"""Takes the place of ``flex_attention``, with its arguments."""


@dataclass(frozen=True)
class FlexArguments:
    """The arguments of one call of flex_attention."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    score_mod: Any = None
    block_mask: Any = None
    scale: float | None = None
    enable_gqa: bool = False
    return_lse: bool = False
    kernel_options: Any = None
    return_aux: Any = None

    @property
    def wants_lse(self) -> bool:
        """Whether the caller reads the log-sum-exp."""
        return self.return_lse or (self.return_aux is not None and self.return_aux.lse)

    def result(self, output: torch.Tensor, lse: torch.Tensor | None) -> Any:
        """What flex_attention returns."""
        if self.return_aux is not None:
            return output, flex.AuxOutput(lse=lse if self.return_aux.lse else None)
        return (output, lse) if self.return_lse else output


class DeclaredMask(flex.BlockMask):
    """What ``create_block_mask`` returns while it is intercepted: what was asked for, no lists.

    Models keep masks, in caches for example, so it may outlive the interception: asked for its lists outside of it, it
    has them made by PyTorch.

    Attributes:
        mask_mod: The mask function.
        seq_lengths: Queries and keys; symbolic while tracing.
        BLOCK_SIZE: Queries and keys in a block.
    """

    def __init__(self, mask_mod: Any, batch: Any, heads: Any, lengths: tuple[Any, Any], device: Any, size: Any) -> None:
        """Remember the arguments of ``create_block_mask``."""
        self.mask_mod, self.seq_lengths = mask_mod, lengths
        self.BLOCK_SIZE = (size, size) if isinstance(size, int) else tuple(size)
        self._asked = (mask_mod, batch, heads, *lengths, device, size)
        self._made: flex.BlockMask | None = None

    def to(self, device: Any) -> DeclaredMask:
        """Itself: it has no tensors."""
        return self

    @property
    def shape(self) -> tuple[Any, ...]:
        """Batch, heads, queries and keys."""
        return (self._asked[1] or 1, self._asked[2] or 1, *self.seq_lengths)

    def _adjust(self, new_q_len: Any, new_kv_len: Any) -> DeclaredMask:
        mask_mod, batch, heads, _, _, device, size = self._asked
        return DeclaredMask(mask_mod, batch, heads, (new_q_len, new_kv_len), device, size)

    def _real(self) -> flex.BlockMask:
        if _intercepted():
            raise ExportFailed(
                "the model computes with the lists of a BlockMask that it made, which an export cannot follow; "
                "allowed: to hand the mask to flex_attention; next step: BlockMask.from_kv_blocks, with own lists"
            )
        if self._made is None:
            self._made = flex.create_block_mask(*self._asked)
        return self._made

    def __getitem__(self, index: Any) -> Any:
        return self._real()[index]


def _from_real(name: str) -> property:
    return property(lambda self: getattr(self._real(), name))


for _name in flex.BlockMask._TENSOR_ATTRS:
    setattr(DeclaredMask, _name, _from_real(_name))
for _name in ("dq_kv_order_spt",):
    setattr(DeclaredMask, _name, None)


def _declare(
    mask_mod: Any,
    B: Any,  # noqa: N803 - the names of PyTorch, by which models pass them
    H: Any,  # noqa: N803
    Q_LEN: Any,  # noqa: N803
    KV_LEN: Any,  # noqa: N803
    device: Any = None,
    BLOCK_SIZE: Any = flex._DEFAULT_SPARSE_BLOCK_SIZE,  # noqa: N803
    *_: Any,
    **__: Any,
) -> DeclaredMask:
    return DeclaredMask(mask_mod, B, H, (Q_LEN, KV_LEN), device, BLOCK_SIZE)


@contextlib.contextmanager
def intercepted(attend: Attend) -> Iterator[None]:
    """Send every call of ``flex_attention`` to `attend`, and make no block lists, while the context lasts.

    What was compiled with ``torch.compile`` runs as it was written meanwhile: neither compiled nor traced by dynamo.
    """
    with (
        _exchanged(flex.flex_attention, attend),
        _exchanged(flex.create_block_mask, _declare),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run ``flex_attention`` as PyTorch's own dense computation, operator by operator, while the context lasts.

    PyTorch does the same without a compiler, but through an operator that takes no dispatch modes, such as those that
    raise a computation to float64.

    A BlockMask with lists of its own hides the blocks that it does not list from a compiled kernel, but not from that
    computation; here they are hidden.
    """
    from torch._higher_order_ops.flex_attention import math_attention

    def attend(query: Any, key: Any, value: Any, score_mod: Any, block_mask: Any, *rest: Any, **keywords: Any) -> Any:
        return math_attention(query, key, value, score_mod, with_listed(block_mask), *rest, **keywords)

    with (
        replaced((f"{_FLEX}:flex_attention_hop", attend), (f"{_FLEX}:_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)),
        torch.compiler.set_stance("force_eager"),
    ):
        yield


def with_listed(block_mask: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tuple of a BlockMask, its mask function restricted to listed blocks, and lifted on full ones."""
    _, keys, counts, indices, full_counts, full_indices, *_, tall, wide, mask_mod = block_mask
    if tall >= flex._LARGE_SPARSE_BLOCK_SIZE:
        return block_mask
    columns = -(-keys // wide)
    partial = flex._ordered_to_dense(counts, indices, columns).bool()
    full = None if full_counts is None else flex._ordered_to_dense(full_counts, full_indices, columns).bool()

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        def at(dense: Any) -> Any:
            row = b if dense.shape[0] > 1 else torch.zeros_like(b)
            head = h if dense.shape[1] > 1 else torch.zeros_like(h)
            return dense[row, head, q // tall, k // wide]

        allowed = mask_mod(b, h, q, k) & at(partial)
        return allowed if full is None else allowed | at(full)

    return (*block_mask[:-1], seen)


@contextlib.contextmanager
def _exchanged(function: Any, replacement: Callable[..., Any]) -> Iterator[None]:
    """Let calls of a Python function, however it is referred to, run another."""
    name = f"_longspan_{function.__name__}"
    if name in function.__globals__:
        raise ExportFailed(f"{function.__name__} is intercepted already")
    forward: dict[str, Any] = {}
    exec(f"def forward(*args, **keywords):\n    return {name}(*args, **keywords)", forward)
    before = function.__code__, function.__defaults__, function.__kwdefaults__
    function.__globals__[name] = replacement
    function.__code__, function.__defaults__, function.__kwdefaults__ = forward["forward"].__code__, None, None
    try:
        yield
    finally:
        function.__code__, function.__defaults__, function.__kwdefaults__ = before
        del function.__globals__[name]


def _intercepted() -> bool:
    return "_longspan_create_block_mask" in vars(flex)
