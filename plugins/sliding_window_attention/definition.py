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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..attention.operands import (
    ATTN_MASK,
    IS_CAUSAL,
    K_SHAPE,
    NONPAD_KV_SEQLEN,
    OUTPUTS,
    Q_SHAPE,
    QKV,
    SCORE_AND_HEADS,
    SINKS,
    SIZE_LIMIT,
    V_SHAPE,
    Shapes,
    check_known,
    check_score_attributes,
    cost_of,
    expect_shape,
    qkv_shapes,
)
from ..definition import Attribute, Cost, Operator, Tensor
from ..errors import InvalidOperands

SLIDING_WINDOW_ATTENTION = Operator(
    name="SlidingWindowAttention",
    doc="Attention of each query to a band of keys around it, and to and from global tokens.",
    inputs=(
        *QKV,
        ATTN_MASK,
        NONPAD_KV_SEQLEN,
        Tensor("global_mask", "bool", "(B, S_k)", "Tokens that see all keys and that all queries see.", optional=True),
        Tensor("global_Q", "T", Q_SHAPE, "Queries of the rows of global tokens.", optional=True),
        Tensor("global_K", "T", K_SHAPE, "Keys for the rows of global tokens.", optional=True),
        Tensor("global_V", "T", V_SHAPE, "Values for the rows of global tokens.", optional=True),
        Tensor(
            "band_bias",
            "T",
            "(1|B, 1|H_q, 1|S_q, left + right + 1)",
            "Added to the score of the k-th key of the band, i.e. key p + (k - left)·δ.",
            optional=True,
        ),
        SINKS,
        Tensor("spans", "float32", "(H_q,)", "Learned span per head, in keys.", optional=True),
    ),
    attributes=(
        Attribute("left_window_size", "int", -1, "Band keys before the query's own, inclusive; -1 unbounded."),
        Attribute("right_window_size", "int", -1, "Band keys after the query's own, inclusive; -1 unbounded."),
        Attribute("dilation", "ints", (1,), "Step between band keys: one value, or one per query head."),
        IS_CAUSAL,
        *SCORE_AND_HEADS,
        Attribute("span_ramp", "float", 32.0, "Length of the soft ramp after each span, in keys."),
    ),
    outputs=OUTPUTS,
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
        if not (math.isfinite(self.span_ramp) and self.span_ramp > 0):
            raise InvalidOperands(f"span_ramp = {self.span_ramp}: must be positive and finite")
        check_score_attributes(self)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Attributes:
        """Build from a node's attributes; a scalar `dilation` stands for one value.

        Raises:
            InvalidOperands: an attribute is unknown or out of range.
        """
        check_known(SLIDING_WINDOW_ATTENTION.name, SLIDING_WINDOW_ATTENTION.attributes, values)
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


def infer_shapes(inputs: Mapping[str, tuple[int, ...]], attributes: Attributes) -> Shapes:
    """Check the shapes of all inputs present against the definition and return the sizes.

    Args:
        inputs: Shape of each input that is present, by formal name.
        attributes: The node's attributes.

    Raises:
        InvalidOperands: a shape contradicts the definition; the message names the input.
    """
    shapes = qkv_shapes(inputs, attributes)
    heads_q = shapes.q_num_heads
    if len(attributes.dilation) not in (1, heads_q):
        raise InvalidOperands(f"dilation has {len(attributes.dilation)} values: must be 1 or {heads_q} (query heads)")
    _check_optional(inputs, attributes, shapes)
    return shapes


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
        expect_shape(inputs, name, expected)
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
    return cost_of(shapes, shapes.batch * per_batch, element_size)
