"""SlidingWindowAttention as a model-local ONNX function of standard operators, in blocks: no S_q x S_k value exists.

With dilation δ the queries fall into δ residue classes; a *block* is `rows` consecutive members of one class. Its
band keys are equally spaced by δ too, so a block is a small dense problem of `rows` queries and
``rows + left + right`` keys, whose band is the same diagonal stripe in every block::

            columns (keys, step δ)
    row 0   # # # # . . .          left + right + 1 keys for each row
    row 1   . # # # # . .
    row 2   . . # # # # .

One Gather with computed row numbers fetches the keys of all blocks from K seen as a table of rows of D. It serves both
layouts, dilation per head and positions per batch entry, and grouped heads share what it fetched. Global keys are
further columns of each block. One Gather at the end puts rows back in order and takes those of global tokens from their
own full attention. Axes of block tensors: batch, key head, query head of the group, block, row, column.

Bounded small windows compute all blocks at once. Wide or unbounded ones (`Signature.loop`) run the same nodes in a Loop
of one block at a time, so that memory stays O(rows · S).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from ..attention.function_body import (
    LOWEST,
    AttentionBody,
    AttentionSignature,
    base_signature,
    node_attributes,
    node_inputs,
)
from ..attention.operands import SIZE_LIMIT
from ..onnx_builder import Expr
from .definition import SLIDING_WINDOW_ATTENTION, Attributes

LOOP_ABOVE = 1024
"""Widest band, in keys, whose blocks are all computed at once."""

_MIN_ROWS, _MAX_ROWS = 16, 128
_FAR = SIZE_LIMIT  # stands for an unbounded side


@dataclass(frozen=True)
class Signature(AttentionSignature):
    """What a body is specialised for.

    Attributes:
        loop: Whether blocks run one at a time.
        bias_rows: Whether `band_bias` differs between query rows.
    """

    loop: bool = False
    bias_rows: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """What the overload names after the optional inputs."""
        return (*super().flags, *(name for name in ("loop", "bias_rows") if getattr(self, name)))

    @classmethod
    def of(cls, node: ir.Node) -> Signature:
        """The signature of one node.

        Raises:
            InvalidOperands: an attribute is invalid, or the layout is neither in a shape nor implied by `q_num_heads`.
        """
        attributes = Attributes.from_mapping(node_attributes(node))
        left, right = attributes.band(_FAR)
        bias = node_inputs(node, SLIDING_WINDOW_ATTENTION).get("band_bias")
        return cls(
            **vars(base_signature(node, SLIDING_WINDOW_ATTENTION, attributes)),
            loop=left + right + 1 > LOOP_ABOVE,
            bias_rows=bias is not None and (bias.shape is None or len(bias.shape) != 4 or bias.shape[2] != 1),
        )


def function_body(signature: Signature, opset: int = 18) -> ir.Function:
    """Build the function for all sites of one signature.

    Args:
        signature: What to specialise for.
        opset: Version of the standard domain, 18 or later; the operators used mean the same in all.
    """
    return _Body(signature, opset).build()


class _Body(AttentionBody):
    """The graph under construction; attributes hold values that several parts use."""

    def __init__(self, signature: Signature, opset: int) -> None:
        super().__init__(SLIDING_WINDOW_ATTENTION, signature, opset)
        self.signature = signature
        b = self.b
        self.batch_axis = b.reshape(b.arange(self.batch), [-1, 1, 1, 1, 1])
        self.kv_axis = b.reshape(b.arange(self.kv_heads), [1, -1, 1, 1, 1])
        self.head_axis = self.kv_axis * self.group + b.reshape(b.arange(self.group), [1, 1, -1, 1, 1])
        self._positions()
        self._window()

    def _positions(self) -> None:
        """Position of query 0 (offset) and number of valid keys, with axes (batch|1, 1, 1, 1, 1)."""
        b = self.b
        if self.has("nonpad_kv_seqlen"):
            length = b.reshape(b.input("nonpad_kv_seqlen"), [-1, 1, 1, 1, 1])
            self.offset, self.limit = length - self.seq_q, b.minimum(length, self.seq_k)
        else:
            # Global tokens differ between batch entries, and Concat does not broadcast.
            self.offset = b.expand(0, [self.batch if self.has("global_mask") else 1, 1, 1, 1, 1])
            self.limit = self.seq_k

    def _window(self) -> None:
        """Window, dilation and the arrangement of queries in blocks."""
        b = self.b
        left, right = b.attribute("left_window_size"), b.attribute("right_window_size")
        causal = b.equal(b.attribute("is_causal"), 1)
        self.left = b.where(left < 0, _FAR, left)
        self.right = b.where(causal, 0, b.where(right < 0, _FAR, right))
        self.ahead = b.where(causal, 0, _FAR)  # how far after itself a query may see at all
        dilation = b.attribute("dilation")
        self.dilation = b.reshape(dilation, [1, *self._head_sizes(b.dim(dilation, 0)), 1, 1])
        # A step beyond every distance reaches the same keys, none but the query's own. Cut, since ONNX Runtime 1.31
        # takes the wrong Min and Max of int64 tensors where bit 31 of a value is set.
        self.step = b.minimum(self.dilation, self.seq_q + self.seq_k)
        self.least_dilation = b.reduce_all("Min", dilation)
        members = (self.seq_q + self.dilation - 1) // self.dilation
        width = self.left + self.right + 1
        self.rows = b.maximum(b.minimum(b.maximum(width, _MIN_ROWS), _MAX_ROWS, b.reduce_all("Max", members)), 1)
        self.per_class = (members + (self.rows - 1)) // self.rows
        self.blocks = b.reduce_all("Max", b.minimum(self.dilation, self.seq_q) * self.per_class)
        self.row = b.arange(self.rows)

    def _head_sizes(self, count: Expr) -> tuple[Expr, Expr]:
        """Sizes of the two head axes for something given once, or once per query head."""
        b = self.b
        once = b.equal(count, 1)
        return b.where(once, 1, self.kv_heads), b.where(once, 1, self.group)

    def build(self) -> ir.Function:
        """Compute all blocks, and put the rows in order."""
        b = self.b
        self.global_positions: Expr | None = None
        if self.has("global_mask"):
            self._compact_globals()
        if self.signature.loop:
            results = b.loop(self.blocks, lambda trip: self._blocks(b.reshape(trip, [1, 1, 1, 1, 1])))
        else:
            results = self._blocks(b.reshape(b.arange(self.blocks), [1, 1, 1, -1, 1]))
        tables = [[result] for result in results]
        number = self._place()
        if self.has("global_mask"):
            number = self._place_globals(number, b.op("Size", results[0]) // self.v_size)
            for table, result in zip(tables, self._global_rows(), strict=True):
                table.append(result)
        number = b.reshape(number, [self.batch, self.heads, self.seq_q])
        flat = [[b.reshape(part, [-1, self.v_size]) for part in tables[0]]]
        flat += [[b.reshape(part, [-1]) for part in table] for table in tables[1:]]
        y, *lse = (b.concat(parts, 0) for parts in flat)
        return self.ordered(y, lse, number)

    def _place(self) -> Expr:
        """Row of each query in the results of the blocks: (batch, key head, group, 1, S_q)."""
        query = self.b.arange(self.seq_q)
        member = query // self.dilation
        block = (query % self.dilation) * self.per_class + member // self.rows
        batch_head = self.batch_axis * self.heads + self.head_axis
        if self.signature.loop:  # the Loop stacks its results along a new first axis
            return (block * (self.batch * self.heads) + batch_head) * self.rows + member % self.rows
        return (batch_head * self.blocks + block) * self.rows + member % self.rows

    def _blocks(self, block: Expr) -> list[Expr]:
        """Output and lse of the blocks numbered `block` (1, 1, 1, blocks, 1)."""
        b = self.b
        first = block // self.per_class + (block % self.per_class) * self.rows * self.step
        # Rows past the end of a class repeat the last query; nothing reads their results.
        query = b.minimum(first + self.row * self.step, self.seq_q - 1)
        position = self.offset + query
        # A window may be much larger than the sequence: no query has keys further away than this. The bounds follow
        # from shapes and do not vary between blocks, since TensorRT plans for no other sizes.
        if self.has("nonpad_kv_seqlen"):
            highest, lowest = self.seq_k - 1, -self.seq_q
        else:
            highest, lowest = self.seq_q - 1, b.constant(0)
        before = b.maximum(highest, 0) // self.least_dilation
        after = b.maximum(self.seq_k - 1 - lowest, 0) // self.least_dilation
        left, right = b.minimum(self.left, before), b.minimum(self.right, after)
        column = b.arange(self.rows + left + right) - left
        steps = column - b.reshape(self.row, [-1, 1])
        key = self.offset + first + column * self.step
        penalty, key = self._band_penalty(key, (steps >= -left) & (steps <= right))
        if self.has("band_bias"):
            penalty = penalty + self._bias(query, left, right)
        if self.has("spans"):
            penalty = penalty + self._span_penalty(steps, key)
        if self.has("global_mask"):
            assert self.global_positions is not None
            count = b.dim(self.global_positions, 4)
            shape = b.concat([b.op("Shape", key, end=4), b.vector([count])], 0)
            key = b.concat([key, b.op("Expand", self.global_positions, shape)], 4)
            columns = self._global_penalty(position)
            if self.has("band_bias") or self.has("spans"):
                shape = b.concat([b.op("Shape", penalty, end=5), b.vector([count])], 0)
                columns = b.op("Expand", columns, shape)
            penalty = b.concat([penalty, columns], 5)
        queries = b.op("Gather", self.q_rows, self._row_number(self.head_axis, query, self.heads, self.seq_q))
        number = self._row_number(self.kv_axis, key, self.kv_heads, self.seq_k)
        keys, values = b.op("Gather", self.k_rows, number), b.op("Gather", self.v_rows, number)
        scores = self.cap(b.op("MatMul", queries, b.op("Transpose", keys, perm=[0, 1, 2, 3, 5, 4])))
        sinks = self._per_head("sinks", 6) if self.has("sinks") else None
        return self._attend(scores, penalty, values, sinks)

    def _band_penalty(self, key: Expr, in_band: Expr) -> tuple[Expr, Expr]:
        """0 where a band key may be seen, else lowest: (…, block, row, column); and the key clamped to what exists."""
        b = self.b
        valid = (key >= 0) & (key < self.limit)
        key = b.maximum(b.minimum(key, self.seq_k - 1), 0)
        if self.has("attn_mask"):
            valid = valid & self._flag("attn_mask", key)
        return b.where(b.op("Unsqueeze", valid, [4]) & in_band, 0.0, LOWEST), key

    def _row_number(self, head: Expr, position: Expr, heads: Expr, length: Expr) -> Expr:
        return self.row_number(self.batch_axis, head, position, heads, length)

    def _flag(self, name: str, position: Expr) -> Expr:
        """The (B, S_k) input `name` at positions with axes (batch, …, n)."""
        flat = self.b.reshape(self.b.input(name), [-1])
        return self.b.op("Gather", flat, self.batch_axis * self.seq_k + position)

    def _per_head(self, name: str, rank: int) -> Expr:
        """An (H_q,) input as float32, -inf cut to lowest, with axes (1, key head, group, 1, …)."""
        return self.b.reshape(self.floats(name), [1, self.kv_heads, self.group, *[1] * (rank - 3)])

    def _bias(self, query: Expr, left: Expr, right: Expr) -> Expr:
        """`band_bias` moved from the key's index in each row's band to the block's columns."""
        b = self.b
        bias = self.floats("band_bias")
        batches, heads, rows = (b.dim(bias, axis) for axis in range(3))
        own_left = b.attribute("left_window_size")
        bias = b.slice(bias, own_left - left, own_left + right + 1, 3)
        width = left + right + 1
        if self.signature.bias_rows:
            line = b.minimum(self.batch_axis, batches - 1) * heads + b.minimum(self.head_axis, heads - 1)
            line = line * rows + b.minimum(query, rows - 1)
            bias = b.op("Gather", b.reshape(bias, [-1, width]), line)
        else:
            bias = b.reshape(bias, [batches, *self._head_sizes(heads), 1, 1, width])
            bias = b.expand(bias, [1, 1, 1, 1, self.rows, 1])
        # Each row of the flattened matrix is one longer than a row of the result, which shifts row r by r columns.
        columns = self.rows + left + right
        bias = b.op("Pad", bias, b.vector([*[0] * 11, self.rows]))
        bias = b.slice(b.reshape(bias, [0, 0, 0, 0, -1]), 0, self.rows * columns, 4)
        return b.reshape(bias, [0, 0, 0, 0, self.rows, columns])

    def _span_penalty(self, steps: Expr, key: Expr) -> Expr:
        """Logarithm of the span's weight; adding it to the score multiplies the weight in the softmax."""
        b = self.b
        ramp = b.attribute("span_ramp")
        distance = b.cast(b.op("Abs", steps) * b.op("Unsqueeze", self.dilation, [5]), ir.DataType.FLOAT)
        weight = b.op("Clip", (self._per_head("spans", 6) + ramp - distance) / ramp, 0.0, 1.0)
        penalty = b.maximum(b.op("Log", weight), LOWEST)
        if self.has("global_mask"):
            penalty = b.where(b.op("Unsqueeze", self._flag("global_mask", key), [4]), 0.0, penalty)
        return penalty

    def _compact_globals(self) -> None:
        """Positions of the global tokens, padded to the largest number in any batch entry (at least 1)."""
        b = self.b
        flags = b.cast(b.input("global_mask"), ir.DataType.INT64)
        self.global_count = b.maximum(b.reduce_all("Max", b.reduce("Sum", flags, 1)), 1)
        self.global_rank = b.op("CumSum", flags, 1) - 1
        countdown = self.seq_k - b.arange(self.seq_k)
        rest = b.multi_op("TopK", 2, flags * countdown, b.vector([self.global_count]))[0]
        position = b.reshape(b.minimum(self.seq_k - rest, self.seq_k - 1), [self.batch, 1, 1, 1, -1])
        seen = b.reshape(rest > 0, [self.batch, 1, 1, 1, -1]) & (position < self.limit)
        self.global_positions = position
        self.global_seen = seen & self._flag("attn_mask", position) if self.has("attn_mask") else seen

    def _global_penalty(self, position: Expr) -> Expr:
        """0 where a row sees a global key outside its band, else lowest: (…, block, row, global key)."""
        b = self.b
        assert self.global_positions is not None
        distance = b.op("Unsqueeze", self.global_positions, [4]) - b.op("Unsqueeze", position, [5])
        step = b.op("Unsqueeze", self.step, [5])
        in_band = (distance >= -(self.left * step)) & (distance <= self.right * step)
        in_band = in_band & b.equal(distance % step, 0)
        seen = b.op("Unsqueeze", self.global_seen, [4]) & ~in_band & (distance <= self.ahead)
        return b.where(seen, 0.0, LOWEST)

    def _global_rows(self) -> list[Expr]:
        """Full attention of the global tokens' rows: (batch, key head, group, token, D_v), and lse where needed."""
        b = self.b
        assert self.global_positions is not None
        query = b.maximum(b.minimum(self.global_positions - self.offset, self.seq_q - 1), 0)
        number = self._row_number(self.head_axis, query, self.heads, self.seq_q)
        separate = self.has("global_Q")
        queries = b.op("Gather", self.query_rows("global_Q") if separate else self.q_rows, number)
        keys = self.key_rows("global_K", self.size) if separate else self.k_rows
        values = self.key_rows("global_V", self.v_size) if separate else self.v_rows
        if self.signature.layout == "bhsd":
            keys = b.op("Transpose", b.reshape(keys, [self.batch, self.kv_heads, self.seq_k, -1]), perm=[0, 1, 3, 2])
            values = b.reshape(values, [self.batch, self.kv_heads, self.seq_k, -1])
        else:
            keys = b.op("Transpose", b.reshape(keys, [self.batch, self.seq_k, self.kv_heads, -1]), perm=[0, 2, 3, 1])
            values = b.reshape(values, [self.batch, self.seq_k, self.kv_heads, -1])
            values = b.op("Transpose", values, perm=[0, 2, 1, 3])
        # Fold the group into the rows: (batch, key head, group · token, D).
        queries = b.reshape(queries, [self.batch, self.kv_heads, -1, self.size])
        key = b.arange(self.seq_k)
        seen = (key < self.limit) & (key <= b.reshape(self.global_positions, [self.batch, 1, 1, -1, 1]) + self.ahead)
        if self.has("attn_mask"):
            seen = seen & b.reshape(b.input("attn_mask"), [self.batch, 1, 1, 1, self.seq_k])
        scores = self.cap(b.op("MatMul", queries, keys))
        scores = b.reshape(scores, [self.batch, self.kv_heads, self.group, -1, self.seq_k])
        sinks = self._per_head("sinks", 5) if self.has("sinks") else None
        return self._attend(scores, b.where(seen, 0.0, LOWEST), b.op("Unsqueeze", values, [2]), sinks)

    def _place_globals(self, number: Expr, before: Expr) -> Expr:
        """Replace the row numbers of global tokens by those of their own results, which follow `before` others."""
        b = self.b
        position = self.offset + b.arange(self.seq_q)
        inside = (position >= 0) & (position < self.seq_k)
        position = b.maximum(b.minimum(position, self.seq_k - 1), 0)
        flag = inside & self._flag("global_mask", position)
        rank = b.op("Gather", b.reshape(self.global_rank, [-1]), self.batch_axis * self.seq_k + position)
        own = (self.batch_axis * self.heads + self.head_axis) * self.global_count + rank + before
        return b.where(flag, own, number)

    def _attend(self, scores: Expr, penalty: Expr, values: Expr, sinks: Expr | None) -> list[Expr]:
        """Output of every row, and its lse where needed."""
        weights, factor, lse = self.softmax(scores, penalty, sinks)
        return [self.b.op("MatMul", weights, values) * factor, *(self.b.op("Squeeze", x, [-1]) for x in lse)]
