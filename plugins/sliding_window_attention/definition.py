"""What SlidingWindowAttention is: inputs, attributes, shapes, cost.

For query row ``i`` at absolute position ``p = offset + i`` the *band* of a head with dilation ``δ`` holds the
keys ``p - left·δ, …, p - δ, p, p + δ, …, p + right·δ``; drawn for ``left = 2``, ``right = 1``, ``δ = 1`` and a
global token 0 (``#`` band, ``g`` global)::

            keys 0 1 2 3 4 5
    query 0      g g g g g g      a global row sees every key
    query 1      g # # . . .
    query 2      g # # # . .
    query 3      g # # # # .
    query 4      g . # # # #
    query 5      g . . # # #

`offset` is ``nonpad_kv_seqlen - S_q`` where that input is present, else 0; its values are 0 to S_k, and `check_lengths`
refuses others in every execution that can raise (a function body of standard operators cannot). The score of an
allowed key is ``softcap(scale · q·k) + band_bias``; keys beyond the causal frontier (``is_causal``), padded keys
(``attn_mask``, ``nonpad_kv_seqlen``) are never allowed, for global rows either. With ``spans`` the weight of a band key
at distance ``x = |p - k|`` is multiplied by ``clamp((span_ramp + span - x) / span_ramp, 0, 1)`` (Sukhbaatar et al.
2019, section 2.2). Global keys outside the band have neither bias nor span; a key both global and in the band counts
once, with the bias, without the span. Rows of global tokens have neither bias nor span, and take ``global_Q``,
``global_K``, ``global_V`` where given (Beltagy et al. 2020, section 3.1). ``sinks`` adds one logit per head to every
denominator.

Padded keys and their values are never part of a result, whatever they hold. A ``band_bias`` of -inf forbids its key to
its row, and a sink of -inf is as good as none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..definition import Attribute, Cost, Operator, Tensor
from ..errors import InvalidOperands

SIZE_LIMIT = 2**31 - 1
"""Largest window size, dilation and number of heads: products of two stay inside int64 in every execution."""

_Q_SHAPE = "(B, H_q, S_q, D) or (B, S_q, H_q·D)"
_K_SHAPE = "(B, H_kv, S_k, D) or (B, S_k, H_kv·D)"
_V_SHAPE = "(B, H_kv, S_k, D_v) or (B, S_k, H_kv·D_v)"

SLIDING_WINDOW_ATTENTION = Operator(
    name="SlidingWindowAttention",
    doc="Attention of each query to a band of keys around it, and to and from global tokens.",
    inputs=(
        Tensor("Q", "T", _Q_SHAPE, "Queries."),
        Tensor("K", "T", _K_SHAPE, "Keys."),
        Tensor("V", "T", _V_SHAPE, "Values."),
        Tensor("attn_mask", "bool", "(B, S_k)", "Key padding: True = attend.", optional=True),
        Tensor("nonpad_kv_seqlen", "int64", "(B,)", "Number of valid keys, as in ONNX Attention-25.", optional=True),
        Tensor("global_mask", "bool", "(B, S_k)", "Tokens that see all keys and that all queries see.", optional=True),
        Tensor("global_Q", "T", _Q_SHAPE, "Queries of the rows of global tokens.", optional=True),
        Tensor("global_K", "T", _K_SHAPE, "Keys for the rows of global tokens.", optional=True),
        Tensor("global_V", "T", _V_SHAPE, "Values for the rows of global tokens.", optional=True),
        Tensor(
            "band_bias",
            "T",
            "(1|B, 1|H_q, 1|S_q, left + right + 1)",
            "Added to the score of the k-th key of the band, i.e. key p + (k - left)·δ.",
            optional=True,
        ),
        Tensor("sinks", "T", "(H_q,)", "Extra logit in the denominator.", optional=True),
        Tensor("spans", "float32", "(H_q,)", "Learned span per head, in keys.", optional=True),
    ),
    attributes=(
        Attribute("left_window_size", "int", -1, "Band keys before the query's own, inclusive; -1 unbounded."),
        Attribute("right_window_size", "int", -1, "Band keys after the query's own, inclusive; -1 unbounded."),
        Attribute("dilation", "ints", (1,), "Step between band keys: one value, or one per query head."),
        Attribute("is_causal", "int", 0, "1: a query never sees keys after its own position."),
        Attribute("scale", "float", None, "Factor of q·k; 1/sqrt(D) when absent."),
        Attribute("softcap", "float", 0.0, "Scores become softcap·tanh(score/softcap) when positive."),
        Attribute("q_num_heads", "int", 0, "Query heads; needed for 3-D inputs."),
        Attribute("kv_num_heads", "int", 0, "Key and value heads; needed for 3-D inputs."),
        Attribute("span_ramp", "float", 32.0, "Length of the soft ramp after each span, in keys."),
    ),
    outputs=(
        Tensor("Y", "T", "like Q with D_v", "Attention output; rows without any allowed key are zero."),
        Tensor(
            "lse",
            "float32",
            "(B, H_q, S_q)",
            "Log of the softmax denominator, sinks included; -inf for rows without any allowed key or sink.",
            optional=True,
        ),
    ),
)


@dataclass(frozen=True)
class Attributes:
    """The attributes of one SlidingWindowAttention, checked on construction.

    Raises:
        InvalidOperands: a value is outside what the definition allows.
    """

    left_window_size: int = -1
    right_window_size: int = -1
    dilation: tuple[int, ...] = (1,)
    is_causal: bool = False
    scale: float | None = None
    softcap: float = 0.0
    q_num_heads: int = 0
    kv_num_heads: int = 0
    span_ramp: float = 32.0

    def __post_init__(self) -> None:
        for name in ("left_window_size", "right_window_size"):
            if getattr(self, name) < -1:
                raise InvalidOperands(f"{name} = {getattr(self, name)}: must be -1 (unbounded), 0 or positive")
            if getattr(self, name) > SIZE_LIMIT:
                raise InvalidOperands(
                    f"{name} = {getattr(self, name)}: must be at most {SIZE_LIMIT}; -1 means unbounded"
                )
        if not self.dilation or min(self.dilation) < 1:
            raise InvalidOperands(f"dilation = {list(self.dilation)}: every value must be 1 or more")
        if max(self.dilation) > SIZE_LIMIT:
            raise InvalidOperands(f"dilation = {list(self.dilation)}: every value must be at most {SIZE_LIMIT}")
        if self.scale is not None and not math.isfinite(self.scale):
            raise InvalidOperands(f"scale = {self.scale}: must be finite")
        if not (math.isfinite(self.softcap) and self.softcap >= 0):
            raise InvalidOperands(f"softcap = {self.softcap}: must be 0 (off) or positive and finite")
        if not (math.isfinite(self.span_ramp) and self.span_ramp > 0):
            raise InvalidOperands(f"span_ramp = {self.span_ramp}: must be positive and finite")
        if self.q_num_heads < 0 or self.kv_num_heads < 0:
            raise InvalidOperands(f"q_num_heads = {self.q_num_heads}, kv_num_heads = {self.kv_num_heads}: negative")
        if max(self.q_num_heads, self.kv_num_heads) > SIZE_LIMIT:
            raise InvalidOperands(
                f"q_num_heads = {self.q_num_heads}, kv_num_heads = {self.kv_num_heads}: must be at most {SIZE_LIMIT}"
            )
        if self.kv_num_heads and self.q_num_heads % self.kv_num_heads:
            raise InvalidOperands(
                f"q_num_heads = {self.q_num_heads} is not a multiple of kv_num_heads = {self.kv_num_heads}"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Attributes:
        """Build from a node's attributes; a scalar `dilation` stands for one value.

        Raises:
            InvalidOperands: an attribute is unknown or out of range.
        """
        known = {attribute.name for attribute in SLIDING_WINDOW_ATTENTION.attributes}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InvalidOperands(
                f"SlidingWindowAttention has no attribute {', '.join(unknown)}; there are: {', '.join(sorted(known))}"
            )
        values = dict(values)
        if "dilation" in values:
            dilation = values["dilation"]
            values["dilation"] = (dilation,) if isinstance(dilation, int) else tuple(int(d) for d in dilation)
        if "is_causal" in values:
            values["is_causal"] = bool(values["is_causal"])
        return cls(**values)

    def band(self, reach: int) -> tuple[int, int]:
        """Band sizes (left, right) in steps of the dilation that can hold an allowed key.

        Args:
            reach: What an unbounded side becomes: the largest distance between a query and a key, or more.
        """
        left = reach if self.left_window_size < 0 else self.left_window_size
        right = reach if self.right_window_size < 0 else self.right_window_size
        return left, (0 if self.is_causal else right)


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


def infer_shapes(inputs: Mapping[str, tuple[int, ...]], attributes: Attributes) -> Shapes:
    """Check the shapes of all inputs present against the definition and return the sizes.

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
        _expect(inputs, "K", (batch, heads_kv, seq_k, size))
        _expect(inputs, "V", (batch, heads_kv, seq_k, v_size))
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
        _expect(inputs, "K", (batch, seq_k, heads_kv * size))
        _expect(inputs, "V", (batch, seq_k, heads_kv * v_size))
    if heads_kv < 1 or heads_q % heads_kv:
        raise InvalidOperands(f"{heads_q} query heads are not a multiple of {heads_kv} key heads")
    if len(attributes.dilation) not in (1, heads_q):
        raise InvalidOperands(f"dilation has {len(attributes.dilation)} values: must be 1 or {heads_q} (query heads)")
    shapes = Shapes(layout, batch, heads_q, heads_kv, seq_q, seq_k, size, v_size)
    _check_optional(inputs, attributes, shapes)
    return shapes


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


def _check_optional(inputs: Mapping[str, tuple[int, ...]], attributes: Attributes, shapes: Shapes) -> None:
    batch, heads, seq_q, seq_k = shapes.batch, shapes.q_num_heads, shapes.seq_q, shapes.seq_k
    for name, expected in (
        ("attn_mask", (batch, seq_k)),
        ("nonpad_kv_seqlen", (batch,)),
        ("global_mask", (batch, seq_k)),
        ("global_Q", inputs["Q"]),
        ("global_K", inputs["K"]),
        ("global_V", inputs["V"]),
        ("sinks", (heads,)),
        ("spans", (heads,)),
    ):
        _expect(inputs, name, expected)
    separate = [name for name in ("global_Q", "global_K", "global_V") if name in inputs]
    if separate and (len(separate) < 3 or "global_mask" not in inputs):
        raise InvalidOperands(
            f"{', '.join(separate)} present: global_Q, global_K, global_V and global_mask come together or not at all"
        )
    bias = inputs.get("band_bias")
    if bias is not None:
        if attributes.left_window_size < 0 or attributes.right_window_size < 0:
            raise InvalidOperands(
                "band_bias needs bounded windows: left_window_size and right_window_size of 0 or more"
            )
        width = attributes.left_window_size + attributes.right_window_size + 1
        allowed = ((1, batch), (1, heads), (1, seq_q), (width,))
        if len(bias) != 4 or any(got not in sizes for got, sizes in zip(bias, allowed, strict=True)):
            raise InvalidOperands(f"band_bias has shape {bias}: must be (1|{batch}, 1|{heads}, 1|{seq_q}, {width})")


def _expect(inputs: Mapping[str, tuple[int, ...]], name: str, expected: tuple[int, ...]) -> None:
    got = inputs.get(name)
    if got is not None and tuple(got) != expected:
        raise InvalidOperands(f"{name} has shape {tuple(got)}: must be {expected}")


def band_pairs(seq_q: int, seq_k: int, left: int, right: int, dilation: int = 1, offset: int = 0) -> int:
    """Number of query-key pairs of one head's band, edges cut off.

    Args:
        seq_q: Query rows.
        seq_k: Keys.
        left: Band keys before the query's own (0 or more).
        right: Band keys after the query's own (0 or more).
        dilation: Step between band keys.
        offset: Absolute position of query row 0.
    """
    pairs = 0
    for step in range(-min(left, (seq_q + offset) // dilation), min(right, seq_k // dilation + 1) + 1):
        first = max(offset, -step * dilation)
        last = min(offset + seq_q, seq_k - step * dilation)
        pairs += max(0, last - first)
    return pairs


def cost(shapes: Shapes, attributes: Attributes, element_size: int = 4, global_tokens: int = 0) -> Cost:
    """Work of one execution without padding.

    Args:
        shapes: Sizes of the execution.
        attributes: The node's attributes.
        element_size: Bytes per element of T.
        global_tokens: Global tokens per sequence: each adds a full row and a full column (what the band already
            holds of them is counted again, so this is an upper bound).
    """
    left, right = attributes.band(shapes.seq_q + shapes.seq_k)
    dilation = attributes.dilation if len(attributes.dilation) > 1 else attributes.dilation * shapes.q_num_heads
    per_batch = sum(band_pairs(shapes.seq_q, shapes.seq_k, left, right, step) for step in dilation)
    per_batch += shapes.q_num_heads * global_tokens * (shapes.seq_k + shapes.seq_q)
    pairs = shapes.batch * per_batch
    moved = shapes.seq_q * shapes.q_num_heads * (shapes.head_size + shapes.v_head_size)
    moved += shapes.seq_k * shapes.kv_num_heads * (shapes.head_size + shapes.v_head_size)
    return Cost(
        pairs=pairs,
        flops=2 * pairs * (shapes.head_size + shapes.v_head_size),
        bytes=shapes.batch * moved * element_size,
    )
