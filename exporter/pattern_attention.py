"""`attention`: the one line by which a model of your own declares its pattern.

The module is not named after its function: importing it would put the module in the function's place.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .errors import InvalidRequest
from .patterns import (
    Lengths,
    Pattern,
    PatternLowering,
    PerHead,
    Tokens,
    block_of,
    block_table,
    build_lists,
    lower_pattern,
    to_json,
)
from .patterns.block_table import block_kinds
from .patterns.lowering import SLIDING_WINDOW

if TYPE_CHECKING:
    import torch

_BLOCKS = (128, 64, 32, 16)
_REFERENCE_LENGTH = 4096
_OVERHEAD = 8


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern,
    *,
    padding: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    distance_bias: torch.Tensor | None = None,
    block_size: int | None = None,
) -> torch.Tensor:
    """Attend as a pattern says: ``softmax(scale · q·kᵀ)·v`` over the keys that each query counts, as often as it does.

    Where the pattern is one band with global tokens, this is SlidingWindowAttention, else BlockSparseAttention; heads
    whose patterns are bands of different windows become one node for each run of equal heads. While a model is traced
    with an open length, lists of blocks are computed inside the graph, once for all layers. A pattern without a
    rule for every length (`Random`, `Explicit`) is traced for one fixed length, and its lists are constants.

    Where a gradient is needed, the same is computed densely with torch's own operations, in memory of queries times
    keys: for training, and for models of a length at which that is affordable. Under ``torch.no_grad()``, and while
    tracing, it is not.

    Args:
        q: (B, H, S_q, D); float16, bfloat16, float32, or float64 (computed in float64). Query i stands at position i.
        k: (B, H_kv, S_k, D), with H a multiple of H_kv: query heads in order share key heads.
        v: (B, H_kv, S_k, D_v).
        pattern: Which keys each query counts; H must be a multiple of the heads after which it repeats.
        padding: bool (B, S_k), True = attend; a key that is not attended is counted by no query.
        scale: Factor of q·k; 1/sqrt(D) when None.
        softcap: Scores become softcap·tanh(score/softcap) when positive.
        sinks: (H,), an extra logit in the denominator of each head.
        distance_bias: (1|H, S_q + S_k - 1), added to scores: entry k - i + S_q - 1 to that of query i and key k.
        block_size: Tokens in a block of the lists, where lists are needed; None takes `choose_block_size`.

    Returns:
        (B, H, S_q, D_v) in the type of q. Queries that count no key are zero.

    Raises:
        InvalidRequest: an argument does not fit the others, or the pattern not the length.
        InvalidOperands: a tensor contradicts the operator's definition.
    """
    _check(q, k, v, pattern, padding, block_size)
    call = _Call(q, k, v, padding, scale, softcap, sinks, distance_bias)
    call.check_shapes()
    if call.needs_gradient:
        return call.dense(pattern)
    heads = q.shape[1]
    outputs = [
        part.run(call.of_heads(part.first, part.last) if part.last - part.first < heads else call, block_size)
        for part in _parts(pattern, heads, heads // k.shape[1], distance_bias is not None)
    ]
    if len(outputs) == 1:
        return outputs[0]
    import torch

    return torch.cat(outputs, dim=1)


@functools.lru_cache(maxsize=256)
def choose_block_size(pattern: Pattern, lengths: Lengths | None = None) -> int:
    """The block size at which BlockSparseAttention computes a pattern fastest, by an estimate.

    Of 128, 64, 32, 16 and the size of the pattern's own blocks, it is the one with the fewest pairs in listed blocks,
    where a pair in blocks of B counts ``1 + 8 / B``: small blocks waste less and cost more each. The larger one wins a
    tie.

    Args:
        pattern: The pattern.
        lengths: None compares at 4,096 tokens, and is for patterns that have a `block_table`.

    Raises:
        InvalidRequest: the pattern has no table and `lengths` is None, or it is for other lengths.
    """
    estimates: dict[int, float] = {}
    sizes = sorted({*_BLOCKS, block_of(pattern)}, reverse=True)
    for size in sizes:
        if lengths is None:
            try:
                block_kinds(pattern, size)
            except InvalidRequest:
                # Blocks that share no divisor with the period may be of too many kinds; another size may do.
                if size == sizes[-1] and not estimates:
                    raise
                continue
        pairs = build_lists(pattern, lengths or Lengths.of(_REFERENCE_LENGTH), size, size).listed_pairs
        estimates[size] = pairs * (1 + _OVERHEAD / size)
    return min(estimates, key=lambda size: estimates[size])


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: object,
    padding: torch.Tensor | None,
    block_size: int | None,
) -> None:
    """Check what the operators cannot know of.

    Raises:
        InvalidRequest: an argument does not fit.
    """
    if not isinstance(pattern, Pattern):
        raise InvalidRequest(
            f"attention: pattern is a {type(pattern).__name__}; allowed: a pattern of longspan.exporter.patterns, e.g. "
            "Window(127, 0) | Strided(128)"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise InvalidRequest(
                f"attention: {name} has shape {tuple(tensor.shape)}; allowed: (batch, heads, sequence, head size); "
                "next step: x.view(batch, sequence, heads, -1).transpose(1, 2)"
            )
    heads, key_heads = q.shape[1], k.shape[1]
    if not key_heads or heads % key_heads:
        raise InvalidRequest(f"attention: q has {heads} heads and k {key_heads}; allowed: a multiple of those of k")
    if heads % pattern.heads:
        raise InvalidRequest(
            f"attention: q has {heads} heads, and the pattern repeats after {pattern.heads}; allowed: a multiple"
        )
    if padding is not None and str(padding.dtype) != "torch.bool":
        raise InvalidRequest(
            f"attention: padding is {padding.dtype}; allowed: bool (batch, keys), True = attend; next step: mask != 0"
        )
    if block_size is not None and (not isinstance(block_size, int) or block_size < 1):
        raise InvalidRequest(f"attention: block_size = {block_size}; allowed: a whole number of 1 or more")


@dataclass(frozen=True)
class _Call:
    """The tensors of one call of `attention`."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    padding: torch.Tensor | None
    scale: float | None
    softcap: float
    sinks: torch.Tensor | None
    distance_bias: torch.Tensor | None

    @property
    def lengths(self) -> tuple[int, int]:
        """Queries and keys; may be symbolic."""
        return self.q.shape[2], self.k.shape[2]

    def check_shapes(self) -> None:
        """Check what torch would broadcast or index elsewhere: the dense path and bands do not ask an operator.

        Lengths that a trace leaves open are not compared, since that would fix them.

        Raises:
            InvalidRequest: a tensor does not fit q.
        """
        (batch, heads, queries, size), keys = self.q.shape, self.k.shape[2]
        expected: list[tuple[str, torch.Tensor | None, tuple[Any, ...]]] = [
            ("k", self.k, (batch, self.k.shape[1], keys, size)),
            ("v", self.v, (batch, self.k.shape[1], keys, self.v.shape[3])),
            ("padding", self.padding, (batch, keys)),
            ("sinks", self.sinks, (heads,)),
        ]
        if self.distance_bias is not None:
            rows = 1 if self.distance_bias.shape[0] == 1 else heads
            expected.append(("distance_bias", self.distance_bias, (rows, queries + keys - 1)))
        for name, tensor, allowed in expected:
            if tensor is None:
                continue
            pairs = zip(tensor.shape, allowed, strict=False)
            unlike = (got != want for got, want in pairs if isinstance(got, int) and isinstance(want, int))
            if tensor.dim() != len(allowed) or any(unlike):
                raise InvalidRequest(
                    f"attention: {name} has shape {tuple(tensor.shape)}; allowed: {tuple(allowed)} beside q of "
                    f"{tuple(self.q.shape)}"
                )

    @property
    def needs_gradient(self) -> bool:
        """Whether somebody may ask for a derivative, which the operators do not have."""
        import torch

        tensors = (self.q, self.k, self.v, self.sinks, self.distance_bias)
        return (
            torch.is_grad_enabled()
            and not torch.compiler.is_exporting()
            and any(tensor is not None and tensor.requires_grad for tensor in tensors)
        )

    def of_heads(self, first: int, last: int) -> _Call:
        """The query heads from `first` on, `last` excluded, and the key heads that they share."""
        group = self.q.shape[1] // self.k.shape[1]
        heads, shared = slice(first, last), slice(first // group, last // group)
        bias = self.distance_bias
        return replace(
            self,
            q=self.q[:, heads],
            k=self.k[:, shared],
            v=self.v[:, shared],
            sinks=None if self.sinks is None else self.sinks[heads],
            distance_bias=bias if bias is None or bias.shape[0] == 1 else bias[heads],
        )

    def banded(self, pattern: Pattern, lowering: PatternLowering) -> torch.Tensor:
        """By SlidingWindowAttention."""
        from ..plugins.sliding_window_attention.torch_op import sliding_window_attention

        tokens = lowering.global_tokens
        return sliding_window_attention(
            self.q,
            self.k,
            self.v,
            attn_mask=self.padding,
            global_mask=None if tokens is None else self._mask_of(tokens),
            band_bias=None if self.distance_bias is None else self._band_bias(self.distance_bias, lowering.attributes),
            sinks=self.sinks,
            scale=self.scale,
            softcap=self.softcap,
            pattern=to_json(pattern),
            **lowering.attributes,
        )

    def _mask_of(self, tokens: Tokens) -> torch.Tensor:
        """`Tokens.contain` of all keys: bool (B, S_k)."""
        import torch

        position = torch.arange(self.lengths[1], device=self.q.device)
        found = position < tokens.first
        if tokens.last:
            found = found | (position >= torch.sym_max(*self.lengths) - tokens.last)
        for at in tokens.at:
            found = found | (position == at)
        for residue in tokens.residues:
            found = found | (position % tokens.period == residue)
        return found[None].expand(self.q.shape[0], -1)

    def _band_bias(self, bias: torch.Tensor, attributes: dict[str, Any]) -> torch.Tensor:
        """(1, 1|H, 1, left + right + 1), the bias of the distances in a band."""
        import torch

        queries, keys = self.lengths
        left, right, (step,) = (attributes[name] for name in ("left_window_size", "right_window_size", "dilation"))
        distance = torch.arange(-left, right + 1, device=bias.device) * step
        # Distances that the text does not hold have keys that do not exist.
        entry = (distance + (queries - 1)).clamp(min=0).clamp(max=queries + keys - 2)
        return bias.index_select(-1, entry)[None, :, None]

    def listed(self, pattern: Pattern, block_size: int | None) -> torch.Tensor:
        """By BlockSparseAttention."""
        from ..plugins.block_sparse_attention.torch_op import block_sparse_attention
        from .patterns.block_table_torch import constant_lists, traced_lists

        queries, keys = self.lengths
        heads, device = self.q.shape[1], self.q.device
        lists: Any
        if isinstance(queries, int) and isinstance(keys, int):
            lengths = Lengths(queries, keys)
            size = block_size or _block_size(pattern, lengths)
            lists = constant_lists(pattern, lengths, size, heads, device)
        else:
            size = block_size or choose_block_size(pattern)
            lists = traced_lists(block_table(pattern, size), queries, keys, heads, device)
        return block_sparse_attention(
            self.q,
            self.k,
            self.v,
            **lists,
            attn_mask=self.padding,
            sinks=self.sinks,
            distance_bias=self.distance_bias,
            q_block_size=size,
            kv_block_size=size,
            scale=self.scale,
            softcap=self.softcap,
            pattern=to_json(pattern),
        )

    def dense(self, pattern: Pattern) -> torch.Tensor:
        """By torch's own operations, each of which has a derivative."""
        import torch

        dtype = torch.float32 if self.q.dtype in (torch.float16, torch.bfloat16) else self.q.dtype
        (queries, keys), heads = self.lengths, self.q.shape[1]
        counts = torch.from_numpy(_dense_counts(pattern, Lengths(queries, keys))).to(self.q.device)
        counts = counts.repeat(heads // counts.shape[0], 1, 1) if counts.shape[0] > 1 else counts
        group = heads // self.k.shape[1]
        k, v = (each.to(dtype).repeat_interleave(group, 1) for each in (self.k, self.v))
        counted = (counts > 0)[None]
        if self.padding is not None:
            counted = counted & self.padding[:, None, None]
            # Whatever padding holds, its derivative is zero.
            k, v = (each.masked_fill(~self.padding[:, None, :, None], 0) for each in (k, v))
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (self.q.to(dtype) * scale) @ k.transpose(-1, -2)
        if self.softcap > 0:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.distance_bias is not None:
            index = torch.arange(keys, device=k.device) - torch.arange(queries, device=k.device)[:, None] + queries - 1
            scores = scores + self.distance_bias[:, index].to(dtype)
        scores = (scores + counts.clamp(min=1).log().to(dtype)).masked_fill(~counted, -torch.inf)
        top = scores.detach().amax(-1, keepdim=True) if keys else scores.new_zeros((*scores.shape[:3], 1))
        sinks = None if self.sinks is None else self.sinks.to(dtype)[:, None, None]
        top = top if sinks is None else torch.maximum(top, sinks.detach())
        top = top.masked_fill(top == -torch.inf, 0)
        weights = torch.exp(scores - top)
        total = weights.sum(-1, keepdim=True)
        total = total if sinks is None else total + torch.exp(sinks - top)
        return ((weights @ v) / total.masked_fill(total == 0, 1)).to(self.q.dtype)


@functools.lru_cache(maxsize=4)
def _dense_counts(pattern: Pattern, lengths: Lengths) -> Any:
    return pattern.dense(lengths)


def _block_size(pattern: Pattern, lengths: Lengths) -> int:
    """The size that a trace of any length would choose, so that both compute alike; else that for these lengths."""
    try:
        return choose_block_size(pattern)
    except InvalidRequest:
        return choose_block_size(pattern, lengths)


@dataclass(frozen=True)
class _Part:
    """Consecutive query heads that one node computes.

    Attributes:
        first: The first head.
        last: The head after the last.
        pattern: Their pattern.
        lowering: How SlidingWindowAttention computes it; None where it does not.
    """

    first: int
    last: int
    pattern: Pattern
    lowering: PatternLowering | None

    def run(self, call: _Call, block_size: int | None) -> torch.Tensor:
        """The output of these heads."""
        if self.lowering is not None:
            return call.banded(self.pattern, self.lowering)
        return call.listed(self.pattern, block_size)


@functools.lru_cache(maxsize=256)
def _parts(pattern: Pattern, heads: int, group: int, biased: bool) -> tuple[_Part, ...]:
    """Cut heads into parts: bands where heads in a row are one, and lists for the rest.

    Args:
        pattern: The pattern.
        heads: Query heads.
        group: Query heads that share a key head, which no part may divide.
        biased: Whether there is a bias by distance.
    """
    whole = _Part(0, heads, pattern, _band(pattern, heads, biased))
    by_head = [pattern.head(head) for head in range(heads)]
    starts = [0, *(head for head in range(1, heads) if by_head[head] != by_head[head - 1])]
    if whole.lowering is not None or len(starts) == 1 or any(start % group for start in starts):
        return (whole,)
    parts: list[_Part] = []
    for first, last in zip(starts, [*starts[1:], heads], strict=True):
        part = _Part(first, last, by_head[first], _band(by_head[first], last - first, biased))
        if part.lowering is None and parts and parts[-1].lowering is None:
            # Lists of many heads are one node.
            first = parts.pop().first
            part = _Part(first, last, PerHead(tuple(by_head[first:last])), None)
        parts.append(part)
    return tuple(parts) if len(parts) > 1 else (whole,)


def _band(pattern: Pattern, heads: int, biased: bool) -> PatternLowering | None:
    """How SlidingWindowAttention computes a pattern; None where it does not."""
    # A block size keeps lower_pattern from looking for one.
    lowering = lower_pattern(pattern, heads=heads, block_size=1)
    if lowering.operator != SLIDING_WINDOW:
        return None
    attributes = lowering.attributes
    sides = attributes["left_window_size"], attributes["right_window_size"]
    # Its bias is of a band with an end, the same distances for all heads, and has no part in global tokens.
    takes_bias = min(sides) >= 0 and len(attributes["dilation"]) == 1 and lowering.global_tokens is None
    return lowering if takes_bias or not biased else None
