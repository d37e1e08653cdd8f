"""What the function bodies of attention operators share: signatures, tables of rows, softmax over penalised scores."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ..definition import PACK_ATTRIBUTE, PACK_ID_ATTRIBUTE, Operator
from ..errors import InvalidOperands
from ..onnx_builder import Expr, FunctionBuilder
from .operands import ScoreAttributes

LOWEST = -1e38
"""Score of a masked pair, and what -inf is cut to: sums of three stay finite in float32."""

HIDDEN = -1e37
"""A row whose largest score is below saw no key."""


@dataclass(frozen=True)
class AttentionSignature:
    """What a body is specialised for; sites of equal signature share one function.

    Attributes:
        optional_inputs: Formal names of the optional inputs present, in order.
        layout: ``"bhsd"`` (4-D) or ``"bsd"`` (3-D).
        lse: Whether the second output is produced.
        scale: Whether the node carries `scale`.
        softcap: Whether scores are capped.
    """

    optional_inputs: tuple[str, ...] = ()
    layout: str = "bhsd"
    lse: bool = False
    scale: bool = False
    softcap: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """What the overload names after the optional inputs; an operator's signature appends its own."""
        return tuple(name for name in ("lse", "scale", "softcap") if getattr(self, name))

    @property
    def overload(self) -> str:
        """Overload of the function, e.g. ``"bsd__attn_mask__lse"``."""
        return "__".join([self.layout, *self.optional_inputs, *self.flags])


def node_inputs(node: ir.Node, operator: Operator) -> dict[str, ir.Value]:
    """The inputs that a node has, by formal name."""
    named = zip((tensor.name for tensor in operator.inputs), node.inputs, strict=False)
    return {name: value for name, value in named if value is not None}


def node_attributes(node: ir.Node) -> dict[str, object]:
    """The attributes of its definition that a node carries, by name: its kernels say nothing about the result."""
    deployment = (PACK_ATTRIBUTE, PACK_ID_ATTRIBUTE)
    return {name: attribute.value for name, attribute in node.attributes.items() if name not in deployment}


def base_signature(node: ir.Node, operator: Operator, attributes: ScoreAttributes) -> AttentionSignature:
    """The part of a node's signature that every attention operator has.

    Args:
        node: A node of `operator`.
        operator: Its definition.
        attributes: Its checked attributes.

    Raises:
        InvalidOperands: the layout is neither in a shape nor implied by `q_num_heads`.
    """
    inputs = node_inputs(node, operator)
    return AttentionSignature(
        optional_inputs=tuple(tensor.name for tensor in operator.inputs if tensor.optional and tensor.name in inputs),
        layout=_layout(node, attributes),
        lse=len(node.outputs) > 1 and bool(node.outputs[1].name),
        scale="scale" in node.attributes,
        softcap=attributes.softcap > 0,
    )


def _layout(node: ir.Node, attributes: ScoreAttributes) -> str:
    for value in node.inputs[:3]:
        if value is not None and value.shape is not None:
            if len(value.shape) not in (3, 4):
                raise InvalidOperands(f"{value.name} of {node.name!r} has shape {value.shape}: must be 3-D or 4-D")
            return "bhsd" if len(value.shape) == 4 else "bsd"
    if attributes.q_num_heads:
        return "bsd"
    raise InvalidOperands(
        f"layout of {node.op_type} {node.name!r} is unknown: Q, K, V have no shapes and q_num_heads is absent; "
        "allowed: 3-D or 4-D; next step: run shape inference, or set the shape of Q"
    )


def function_builder(operator: Operator, signature: AttentionSignature, opset: int) -> FunctionBuilder:
    """A builder with the inputs, as far as the last one present, and the attributes of a site's function."""
    names = [tensor.name for tensor in operator.inputs]
    required = sum(not tensor.optional for tensor in operator.inputs)
    last = max((names.index(name) for name in signature.optional_inputs), default=required - 1)
    builder = FunctionBuilder(names[: last + 1], opset)
    for attribute in operator.attributes:
        if attribute.name != "scale" or signature.scale:
            builder.declare(attribute.name, attribute.kind, attribute.default)
    return builder


class AttentionBody:
    """The graph under construction; attributes hold values that several parts use.

    Attributes:
        b: What adds nodes.
        batch, heads, kv_heads, group, seq_q, seq_k, size, v_size: Sizes, scalars; `group` is query heads per key head.
        q_rows, k_rows, v_rows: Float32 tables with a row for every position and head (see `row_number`); queries are
            scaled, and rows of keys that padding masks are zero.
    """

    def __init__(self, operator: Operator, signature: AttentionSignature, opset: int) -> None:
        self.operator = operator
        self._base = signature
        self.b = function_builder(operator, signature, opset)
        self._sizes()

    def has(self, name: str) -> bool:
        """Whether an optional input is present."""
        return name in self._base.optional_inputs

    def _sizes(self) -> None:
        b = self.b
        q, k, v = b.input("Q"), b.input("K"), b.input("V")
        self.batch = b.dim(q, 0)
        if self._base.layout == "bhsd":
            self.heads, self.kv_heads = b.dim(q, 1), b.dim(k, 1)
            self.seq_q, self.seq_k = b.dim(q, 2), b.dim(k, 2)
            self.size, self.v_size = b.dim(q, 3), b.dim(v, 3)
        else:
            self.heads, self.kv_heads = b.attribute("q_num_heads"), b.attribute("kv_num_heads")
            self.seq_q, self.seq_k = b.dim(q, 1), b.dim(k, 1)
            self.size, self.v_size = b.dim(q, 2) // self.heads, b.dim(v, 2) // self.kv_heads
        self.group = self.heads // self.kv_heads
        scale = b.attribute("scale") if self._base.scale else 1.0 / b.op("Sqrt", b.cast(self.size, ir.DataType.FLOAT))
        self.q_factor = scale / b.attribute("softcap") if self._base.softcap else scale
        self.q_rows = self.query_rows("Q")
        self.k_rows, self.v_rows = self.key_rows("K", self.size), self.key_rows("V", self.v_size)

    def query_rows(self, name: str) -> Expr:
        """An input as a float32 table of rows of `size`, scaled."""
        return self.b.reshape(self.b.cast(self.b.input(name), ir.DataType.FLOAT), [-1, self.size]) * self.q_factor

    def key_rows(self, name: str, size: Expr) -> Expr:
        """An input as a float32 table of rows of `size`; zero for masked keys, which may hold NaN."""
        b = self.b
        x = b.cast(b.input(name), ir.DataType.FLOAT)
        if self.has("attn_mask") or self.has("nonpad_kv_seqlen"):
            x = b.where(self._unmasked(), x, 0.0)
        return b.reshape(x, [-1, size])

    def _unmasked(self) -> Expr:
        """Whether each key may be seen at all: (batch, S_k, 1) or (batch, 1, S_k, 1), as K and V are laid out."""
        b = self.b
        heads = [1] if self._base.layout == "bhsd" else []
        flags = [b.reshape(b.input("attn_mask"), [self.batch, *heads, self.seq_k, 1])] if self.has("attn_mask") else []
        if self.has("nonpad_kv_seqlen"):
            length = b.reshape(b.input("nonpad_kv_seqlen"), [-1, *heads, 1, 1])
            flags.append(b.reshape(b.arange(self.seq_k), [1, *heads, -1, 1]) < length)
        return flags[0] if len(flags) == 1 else flags[0] & flags[1]

    def row_number(self, batch: Expr, head: Expr, position: Expr, heads: Expr, length: Expr) -> Expr:
        """Row in the table of an input with `heads` heads and `length` positions, in the layout of the site."""
        if self._base.layout == "bhsd":
            return (batch * heads + head) * length + position
        return (batch * length + position) * heads + head

    def floats(self, name: str) -> Expr:
        """An input that is added to scores, as float32 with -inf cut to `LOWEST`: -inf - -inf would be NaN."""
        return self.b.maximum(self.b.cast(self.b.input(name), ir.DataType.FLOAT), LOWEST)

    def cap(self, scores: Expr) -> Expr:
        """Scores of scaled queries, capped where the site caps them."""
        if not self._base.softcap:
            return scores
        return self.b.op("Tanh", scores) * self.b.attribute("softcap")  # q_factor divided by it before

    def softmax(self, scores: Expr, penalty: Expr, sinks: Expr | None) -> tuple[Expr, Expr, list[Expr]]:
        """Softmax of scores + penalty over the last axis as (weights, factor, lse): outputs are `weights @ V * factor`.

        Rows that see nothing get factor zero. `lse` is a list of the log denominators, with a last axis of 1, or empty
        where the site has no such output. The one operator Softmax is faster than its parts (on a CPU 10 against 27 ms
        for 31 million scores), but gives no denominator; ReduceLogSumExp for that alone would take 130 ms.
        """
        b = self.b
        if sinks is None and not self._base.lse:
            some = b.reduce("Max", penalty, -1) > HIDDEN
            return b.op("Softmax", scores + penalty, axis=-1), b.cast(some, ir.DataType.FLOAT), []
        scores = scores + penalty
        top = b.reduce("Max", scores, -1)
        if sinks is not None:
            top = b.maximum(top, sinks)
        terms = b.op("Exp", scores - top)
        total = b.reduce("Sum", terms, -1)
        if sinks is not None:
            total = total + b.op("Exp", sinks - top)
        some = top > HIDDEN
        lse = [b.where(some, top + b.op("Log", total), -float("inf"))] if self._base.lse else []
        return terms, b.where(some, 1.0 / total, 0.0), lse

    def ordered(self, y: Expr, lse: list[Expr], number: Expr) -> ir.Function:
        """The finished function, whose results are rows of tables.

        Args:
            y: (rows, D_v).
            lse: (rows,) where the site has that output.
            number: Row of each query: (batch, head, S_q).
        """
        b = self.b
        y = b.op("CastLike", y, b.input("Q"))
        outputs = {}
        if self._base.layout == "bhsd":
            outputs["Y"] = b.op("Gather", y, number)
        else:
            by_query = b.op("Gather", y, b.op("Transpose", number, perm=[0, 2, 1]))
            outputs["Y"] = b.reshape(by_query, [self.batch, self.seq_q, self.heads * self.v_size])
        if lse:
            outputs["lse"] = b.op("Gather", lse[0], number)
        return b.build(self.operator.domain, self.operator.name, self._base.overload, outputs)
