"""What every attention operator of the ``longspan`` domain has in common: its operands, their sizes, and their checks.

Q, K and V come split into heads, (B, H, S, D), or joined, (B, S, H·D) with the numbers of heads as attributes. The key
heads may be fewer than the query heads (grouped queries), and values may have a size of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..definition import Attribute, Cost, Tensor
from ..errors import InvalidOperands

SIZE_LIMIT = 2**31 - 1
"""Largest window, block, dilation and number of heads: products of two stay inside int64 in every execution."""

Q_SHAPE = "(B, H_q, S_q, D) or (B, S_q, H_q·D)"
K_SHAPE = "(B, H_kv, S_k, D) or (B, S_k, H_kv·D)"
V_SHAPE = "(B, H_kv, S_k, D_v) or (B, S_k, H_kv·D_v)"

QKV = (Tensor("Q", "T", Q_SHAPE, "Queries."), Tensor("K", "T", K_SHAPE, "Keys."), Tensor("V", "T", V_SHAPE, "Values."))

ATTN_MASK = Tensor("attn_mask", "bool", "(B, S_k)", "Key padding: True = attend.", optional=True)
NONPAD_KV_SEQLEN = Tensor(
    "nonpad_kv_seqlen", "int64", "(B,)", "Number of valid keys, as in ONNX Attention-25.", optional=True
)
SINKS = Tensor("sinks", "T", "(H_q,)", "Extra logit in the denominator.", optional=True)

IS_CAUSAL = Attribute("is_causal", "int", 0, "1: a query never sees keys after its own position.")
SCORE_AND_HEADS = (
    Attribute("scale", "float", None, "Factor of q·k; 1/sqrt(D) when absent."),
    Attribute("softcap", "float", 0.0, "Scores become softcap·tanh(score/softcap) when positive."),
    Attribute("q_num_heads", "int", 0, "Query heads; needed for 3-D inputs."),
    Attribute("kv_num_heads", "int", 0, "Key and value heads; needed for 3-D inputs."),
)

OUTPUTS = (
    Tensor("Y", "T", "like Q with D_v", "Attention output; rows without any allowed key are zero."),
    Tensor(
        "lse",
        "float32",
        "(B, H_q, S_q)",
        "Log of the softmax denominator, sinks included; -inf for rows without any allowed key or sink.",
        optional=True,
    ),
)


class ScoreAttributes(Protocol):
    """The attributes that every attention operator has."""

    @property
    def scale(self) -> float | None:
        """Factor of q·k."""
        ...

    @property
    def softcap(self) -> float:
        """Bound of the scores; 0 for none."""
        ...

    @property
    def q_num_heads(self) -> int:
        """Query heads; 0 where the inputs say it."""
        ...

    @property
    def kv_num_heads(self) -> int:
        """Key and value heads; 0 where the inputs say it."""
        ...


def check_score_attributes(attributes: ScoreAttributes) -> None:
    """Check scale, softcap and the numbers of heads.

    Raises:
        InvalidOperands: one is out of range.
    """
    if attributes.scale is not None and not math.isfinite(attributes.scale):
        raise InvalidOperands(f"scale = {attributes.scale}: must be finite")
    if not (math.isfinite(attributes.softcap) and attributes.softcap >= 0):
        raise InvalidOperands(f"softcap = {attributes.softcap}: must be 0 (off) or positive and finite")
    heads, kv_heads = attributes.q_num_heads, attributes.kv_num_heads
    if heads < 0 or kv_heads < 0:
        raise InvalidOperands(f"q_num_heads = {heads}, kv_num_heads = {kv_heads}: negative")
    if max(heads, kv_heads) > SIZE_LIMIT:
        raise InvalidOperands(f"q_num_heads = {heads}, kv_num_heads = {kv_heads}: must be at most {SIZE_LIMIT}")
    if kv_heads and heads % kv_heads:
        raise InvalidOperands(f"q_num_heads = {heads} is not a multiple of kv_num_heads = {kv_heads}")


def check_known(operator: str, attributes: Sequence[Attribute], given: Mapping[str, object]) -> None:
    """Check that every attribute of a node exists.

    Raises:
        InvalidOperands: one does not.
    """
    known = sorted(attribute.name for attribute in attributes)
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise InvalidOperands(f"{operator} has no attribute {', '.join(unknown)}; there are: {', '.join(known)}")


@dataclass(frozen=True)
class Shapes:
    """Sizes of one execution, the same for both layouts.

    Attributes:
        layout: ``"bhsd"`` (4-D) or ``"bsd"`` (3-D).
    """

    layout: str
    batch: int
    q_num_heads: int
    kv_num_heads: int
    seq_q: int
    seq_k: int
    head_size: int
    v_head_size: int

    @property
    def output(self) -> tuple[int, ...]:
        """Shape of Y."""
        if self.layout == "bhsd":
            return (self.batch, self.q_num_heads, self.seq_q, self.v_head_size)
        return (self.batch, self.seq_q, self.q_num_heads * self.v_head_size)

    @property
    def lse(self) -> tuple[int, ...]:
        """Shape of the second output."""
        return (self.batch, self.q_num_heads, self.seq_q)


def qkv_shapes(inputs: Mapping[str, tuple[int, ...]], attributes: ScoreAttributes) -> Shapes:
    """Check the shapes of Q, K and V against each other and the numbers of heads, and return the sizes.

    Args:
        inputs: Shape of each input that is present, by formal name.
        attributes: The node's attributes.

    Raises:
        InvalidOperands: a shape contradicts the definition; the message names the input.
    """
    q, k, v = inputs["Q"], inputs["K"], inputs["V"]
    if not len(q) == len(k) == len(v) or len(q) not in (3, 4):
        raise InvalidOperands(f"Q, K, V have shapes {q}, {k}, {v}: all must be 3-D or all 4-D")
    if len(q) == 4:
        layout, (batch, heads_q, seq_q, size) = "bhsd", q
        heads_kv, seq_k, v_size = k[1], k[2], v[3]
        expect_shape(inputs, "K", (batch, heads_kv, seq_k, size))
        expect_shape(inputs, "V", (batch, heads_kv, seq_k, v_size))
        for name, got in (("q_num_heads", heads_q), ("kv_num_heads", heads_kv)):
            if getattr(attributes, name) not in (0, got):
                raise InvalidOperands(f"{name} = {getattr(attributes, name)}, but the 4-D input has {got} heads")
    else:
        layout, heads_q, heads_kv = "bsd", attributes.q_num_heads, attributes.kv_num_heads
        if heads_q < 1 or heads_kv < 1:
            raise InvalidOperands("3-D inputs need q_num_heads and kv_num_heads of 1 or more")
        batch, seq_q, seq_k = q[0], q[1], k[1]
        for name, width, heads in (("Q", q[2], heads_q), ("K", k[2], heads_kv), ("V", v[2], heads_kv)):
            if width % heads:
                raise InvalidOperands(f"{name} has {width} channels, which {heads} heads do not divide")
        size, v_size = q[2] // heads_q, v[2] // heads_kv
        expect_shape(inputs, "K", (batch, seq_k, heads_kv * size))
        expect_shape(inputs, "V", (batch, seq_k, heads_kv * v_size))
    if heads_kv < 1 or heads_q % heads_kv:
        raise InvalidOperands(f"{heads_q} query heads are not a multiple of {heads_kv} key heads")
    return Shapes(layout, batch, heads_q, heads_kv, seq_q, seq_k, size, v_size)


def expect_shape(inputs: Mapping[str, tuple[int, ...]], name: str, expected: tuple[int, ...]) -> None:
    """Check the shape of an input, if it is present.

    Raises:
        InvalidOperands: it has another shape.
    """
    got = inputs.get(name)
    if got is not None and tuple(got) != expected:
        raise InvalidOperands(f"{name} has shape {tuple(got)}: must be {expected}")


def check_lengths(lengths: Sequence[int], seq_k: int) -> None:
    """Check the values of nonpad_kv_seqlen.

    Raises:
        InvalidOperands: a length is negative or beyond the number of keys.
    """
    for b, length in enumerate(lengths):
        if not 0 <= length <= seq_k:
            raise InvalidOperands(
                f"nonpad_kv_seqlen[{b}] = {length}: must be between 0 and the number of keys, {seq_k}"
            )


def cost_of(shapes: Shapes, pairs: int, element_size: int) -> Cost:
    """Work of one execution that scores `pairs` query-key pairs, over batch and heads."""
    moved = shapes.seq_q * shapes.q_num_heads * (shapes.head_size + shapes.v_head_size)
    moved += shapes.seq_k * shapes.kv_num_heads * (shapes.head_size + shapes.v_head_size)
    return Cost(
        pairs=pairs,
        flops=2 * pairs * (shapes.head_size + shapes.v_head_size),
        bytes=shapes.batch * moved * element_size,
    )
