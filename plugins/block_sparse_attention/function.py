"""BlockSparseAttention as a model-local ONNX function of standard operators: no S_q x S_k value exists.

The unit of work is an *item*: one row of blocks of one batch entry, with all heads that share its lists. Together its
lists name ``width`` blocks, so it is a dense problem of ``q_block_size`` queries and ``width * kv_block_size`` keys,
which Gathers with computed row numbers fetch from Q, K and V as tables of rows. A few items at a time are computed in a
Loop, widest first; each is padded to the widest of its chunk::

    blocks  |##|
    listed  |##|                     Rows that list every block cost what they list,
            |##| |########| |####|   and add nothing to the others.
            |##| |########| |####|
             1    2          3       chunk

For that the items are sorted by width, and a chunk ends where the width has fallen by a quarter. Where the shapes of
the lists say that no item is wide (`Signature.even`), there is nothing to sort: all items have the width of the lists,
and all sizes follow from shapes, as TensorRT needs it. Rows at the ends that are known to be longer than all others
(`Signature.long_rows`) are then computed apart, at the width of the lists; the others have a width of their own.

Axes of index tensors: item, key head, query head of the group, row, column (key). Heads that have lists of their own
are part of the item, and the two axes of heads are then 1.
"""

from __future__ import annotations

from collections.abc import Callable
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
from ..onnx_builder import Expr
from .definition import BLOCK_SPARSE_ATTENTION, Attributes
from .long_rows import LongRows

EVEN_UP_TO = 1024
"""Most keys that static lists may name in a row for all rows to be computed at the width of the lists."""

CHUNK = 2**20
"""Scores that are computed at once, unless a single item has more: as many as a CPU's cache holds."""

EVEN_CHUNK = 2**22
"""The same where all items are computed at one width, as a GPU does it, to which each operator is a launch."""

_STRETCH = 16  # distances in a row of the bias table, where the block size is a multiple


@dataclass(frozen=True)
class Signature(AttentionSignature):
    """What a body is specialised for.

    Attributes:
        is_causal: Whether keys after the query are forbidden.
        exclude_self: Whether the key at the query's position is forbidden.
        full_only: Whether the partial lists are known to have no slots.
        partial_only: Whether the full lists are known to have no slots.
        even: Whether every item has the width of its lists.
        long_rows: Where `even` is meant for these rows alone; None for all. No node says it: who knows the lists does.
    """

    is_causal: bool = False
    exclude_self: bool = False
    full_only: bool = False
    partial_only: bool = False
    even: bool = False
    long_rows: LongRows | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        """What the overload names after the optional inputs."""
        own = ("is_causal", "exclude_self", "full_only", "partial_only", "even")
        apart = () if self.long_rows is None else (self.long_rows.name,)
        return (*super().flags, *(name for name in own if getattr(self, name)), *apart)

    @classmethod
    def of(cls, node: ir.Node) -> Signature:
        """The signature of one node.

        Raises:
            InvalidOperands: an attribute is invalid, or the layout is neither in a shape nor implied by `q_num_heads`.
        """
        attributes = Attributes.from_mapping(node_attributes(node))
        inputs = node_inputs(node, BLOCK_SPARSE_ATTENTION)
        partial, full = (_width(inputs.get(name)) for name in ("kv_indices", "full_kv_indices"))
        known = partial is not None and full is not None
        return cls(
            **vars(base_signature(node, BLOCK_SPARSE_ATTENTION, attributes)),
            is_causal=attributes.is_causal,
            exclude_self=attributes.exclude_self,
            full_only=partial == 0,
            partial_only=full == 0 and partial != 0,
            even=known and ((partial or 0) + (full or 0)) * attributes.kv_block_size <= EVEN_UP_TO,
        )


def _width(indices: ir.Value | None) -> int | None:
    """Slots of a list, where its shape says it."""
    if indices is None or indices.shape is None or not indices.shape.rank():
        return None
    last = indices.shape[-1]
    return last if isinstance(last, int) else None


def function_body(signature: Signature, opset: int = 18) -> ir.Function:
    """Build the function for all sites of one signature.

    Args:
        signature: What to specialise for.
        opset: Version of the standard domain, 18 or later; the operators used mean the same in all.
    """
    return _Body(signature, opset).build()


@dataclass(frozen=True)
class _List:
    """One of the two kinds of lists.

    Attributes:
        counts: Slots read of each item, (items,), cut to what exists.
        width: Slots of each row.
        size: Slots of all rows.
        rows: Row of the input that each item has, (items,).
    """

    counts: Expr
    width: Expr
    size: Expr
    rows: Expr


@dataclass(frozen=True)
class _Place:
    """Where the pairs of a chunk are in the inputs: integers with the five axes of index tensors.

    Attributes:
        batch: (n, 1, 1, 1, 1).
        head: Query head, (n, key head, group, 1, 1).
        key_head: (n, key head, 1, 1, 1).
        query: (n, 1, 1, row, 1); the last row of blocks repeats the last query.
        key: (n, 1, 1, 1, column); cut to keys that exist.
    """

    batch: Expr
    head: Expr
    key_head: Expr
    query: Expr
    key: Expr


class _Body(AttentionBody):
    """The graph under construction; attributes hold values that several parts use."""

    def __init__(self, signature: Signature, opset: int) -> None:
        super().__init__(BLOCK_SPARSE_ATTENTION, signature, opset)
        self.signature = signature
        b = self.b
        self.tall, self.wide = b.attribute("q_block_size"), b.attribute("kv_block_size")
        self.rows = b.minimum(self.tall, self.seq_q)
        self.row_blocks = (self.seq_q + self.tall - 1) // self.tall
        self.last_block = (self.seq_k + self.wide - 1) // self.wide - 1
        self._items()
        self._lists()
        if self.has("block_masks"):
            self._masks()
        if self.has("distance_bias"):
            self._bias_rows()
        if self.has("sinks"):
            self.sinks = self.floats("sinks")

    def _items(self) -> None:
        """Number the items: (batch entry, head with lists of its own or all heads, row of blocks)."""
        b = self.b
        kinds = [kind for kind in ("kv", "full_kv") if not self._absent(kind)]
        list_heads = [b.dim(b.input(f"{kind}_num_blocks"), 1) for kind in kinds]
        self.item_heads = list_heads[0] if len(list_heads) == 1 else b.maximum(*list_heads)
        shared = b.equal(self.item_heads, 1)
        self.key_axis = b.where(shared, self.kv_heads, 1)
        self.group_axis = b.where(shared, self.group, 1)
        self.heads_of_item = self.key_axis * self.group_axis
        self.items = self.batch * self.item_heads * self.row_blocks

    def _absent(self, kind: str) -> bool:
        return self.signature.full_only if kind == "kv" else self.signature.partial_only

    def _lists(self) -> None:
        """One flat table of all slots of both kinds, and one of their mask ids, each with a last entry for no slot."""
        b = self.b
        item = b.arange(self.items)
        batch, head, row = self._place_of(item)
        self.lists: dict[str, _List] = {}
        tables = []
        for kind in ("kv", "full_kv"):
            if self._absent(kind):
                continue
            counts, indices = b.input(f"{kind}_num_blocks"), b.input(f"{kind}_indices")
            batches, heads, width = (b.dim(indices, axis) for axis in (0, 1, 3))
            own = b.minimum(batch, batches - 1) * heads + b.minimum(head, heads - 1)
            rows = own * self.row_blocks + row
            counts = b.op("Gather", b.cast(b.reshape(counts, [-1]), ir.DataType.INT64), rows)
            counts = b.maximum(b.minimum(counts, width), 0)
            self.lists[kind] = _List(counts, width, b.op("Size", indices), rows)
            tables.append(b.reshape(indices, [-1]))
        self.slots = b.concat([*tables, b.op("CastLike", b.constant([0]), tables[0])], 0)
        parts = list(self.lists.values())
        self.counts = parts[0].counts if len(parts) == 1 else parts[0].counts + parts[1].counts
        self.slot_limit = parts[0].width if len(parts) == 1 else parts[0].width + parts[1].width

    def _place_of(self, item: Expr) -> tuple[Expr, Expr, Expr]:
        """Batch entry, head and row of blocks of an item; the head is 0 for items of all heads."""
        return (
            item // (self.item_heads * self.row_blocks),
            item // self.row_blocks % self.item_heads,
            item % self.row_blocks,
        )

    def _masks(self) -> None:
        """`block_masks` as a table with a row for each row of each mask, and those of a last mask that allows all."""
        b = self.b
        masks = b.input("block_masks")
        self.mask_count = b.dim(masks, 0)
        byte = b.reshape(b.arange(256), [-1, 1])
        bits = b.cast(byte // b.constant([1, 2, 4, 8, 16, 32, 64, 128]) % 2, ir.DataType.BOOL)
        unpacked = b.op("Gather", bits, b.cast(masks, ir.DataType.INT64))
        unpacked = b.slice(b.reshape(unpacked, [-1, b.dim(masks, 2) * 8]), 0, self.wide, 1)
        allow = b.op("Expand", b.constant(True), b.vector([self.tall, self.wide]))
        self.mask_rows = b.concat([unpacked, allow], 0)
        if "kv" in self.lists:
            ids = b.reshape(b.input("block_mask_ids"), [-1])
            self.mask_ids = b.concat([ids, b.op("CastLike", b.constant([-1]), ids)], 0)

    def _bias_rows(self) -> None:
        """`distance_bias` as a table of stretches: row d of a head holds the distances d, d + 1, ... of some keys.

        Gathering stretches is twice as fast as gathering numbers. They are short, since the table has as many rows as
        there are distances; the last ones repeat the last distance, which keys behind the end read.
        """
        b = self.b
        bias = self.floats("distance_bias")
        self.bias_heads, self.distances = b.dim(bias, 0), b.dim(bias, 1)
        self.stretch = b.where(b.equal(self.wide % _STRETCH, 0), _STRETCH, self.wide)
        distance = b.reshape(b.arange(self.distances), [-1, 1]) + b.arange(self.stretch)
        bias = b.op("Gather", bias, b.minimum(distance, self.distances - 1), axis=1)
        self.bias_rows = b.reshape(bias, [-1, self.stretch])

    def build(self) -> ir.Function:
        """Compute all items, and put the rows in order.

        Each way to compute them gives the place of each item among the results, and the results as tables of rows.
        """
        b = self.b
        rank, (y, *lse) = self._at_fixed_widths() if self.signature.even else self._widest_first()
        batch = b.reshape(b.arange(self.batch), [-1, 1, 1])
        head = b.reshape(b.arange(self.heads), [-1, 1])
        query = b.arange(self.seq_q)
        item = (batch * self.item_heads + head // self.heads_of_item) * self.row_blocks + query // self.tall
        place = b.op("Gather", rank, item)
        number = (place * self.heads_of_item + head % self.heads_of_item) * self.rows + query % self.tall
        return self.ordered(y, lse, number)

    def _tables(self, results: list[Expr]) -> list[Expr]:
        """Results of some items as tables of rows, (rows, D_v) and (rows,)."""
        y, *lse = results
        return [self.b.reshape(y, [-1, self.v_size]), *(self.b.reshape(x, [-1]) for x in lse)]

    def _at_fixed_widths(self) -> tuple[Expr, list[Expr]]:
        """All items at the width of the lists, or short rows at theirs."""
        b = self.b
        width, apart = b.maximum(self.slot_limit, 1), self.signature.long_rows
        item = b.arange(self.items)
        if apart is None:
            return item, self._at_one_width(self.items, lambda number: number, width)[1]
        ends = apart.first + apart.last
        # A text of long rows alone has one short row all the same, which repeats another: a Loop needs a trip.
        short_rows = b.maximum(self.row_blocks - ends, 1)
        limit = b.minimum(width, apart.width)
        if apart.up_to:
            limit = b.where(self.row_blocks <= apart.up_to, width, limit)
        if apart.known_to:
            limit = b.where(self.row_blocks <= apart.known_to, limit, width)

        def short_item(number: Expr) -> Expr:
            row = b.minimum(number % short_rows + apart.first, self.row_blocks - 1)
            return number // short_rows * self.row_blocks + row

        lists = self.batch * self.item_heads
        computed, results = self._at_one_width(lists * short_rows, short_item, limit)
        group, row = item // self.row_blocks, item % self.row_blocks
        place = group * short_rows + row - apart.first
        if not ends:
            return place, results
        long_rows = b.minimum(self.row_blocks, ends)
        between = self.row_blocks - long_rows

        def long_item(number: Expr) -> Expr:
            row = number % long_rows
            return number // long_rows * self.row_blocks + b.where(row < apart.first, row, row + between)

        _, long_results = self._at_one_width(lists * long_rows, long_item, width)
        long_place = computed + group * long_rows + b.where(row < apart.first, row, row - between)
        is_long = (row < apart.first) | (row >= self.row_blocks - apart.last)
        tables = [b.concat(parts, 0) for parts in zip(results, long_results, strict=True)]
        return b.where(is_long, long_place, place), tables

    def _at_one_width(self, items: Expr, item_of: Callable[[Expr], Expr], width: Expr) -> tuple[Expr, list[Expr]]:
        """Compute some items, all of `width` slots.

        Args:
            items: How many.
            item_of: Which item each of their numbers stands for.
            width: Slots.

        Returns:
            How many there are results of, since the last chunk repeats the last item; and the results.
        """
        b = self.b
        count = b.minimum(b.maximum(b.constant(EVEN_CHUNK) // self._area(width), 1), items)
        number = b.arange(count)
        trips = (items + count - 1) // count
        results = b.loop(trips, lambda trip: self._chunk(item_of(b.minimum(trip * count + number, items - 1)), width))
        return trips * count, self._tables(results)

    def _widest_first(self) -> tuple[Expr, list[Expr]]:
        """As many items at a time as have about one width, widest first."""
        b = self.b
        every = b.vector([self.items])
        widths, order = b.multi_op("TopK", 2, b.maximum(self.counts, 1), every)
        rank = b.multi_op("TopK", 2, order, every, largest=0)[1]

        def step(first: Expr, *results: Expr) -> list[Expr]:
            width = b.op("Gather", widths, first)
            limit = b.minimum(first + b.maximum(b.constant(CHUNK) // self._area(width), 1), self.items)
            near = b.slice(widths, first, limit, 0) * 4 > width * 3
            end = first + b.op("ReduceSum", b.cast(near, ir.DataType.INT64), keepdims=0)
            chunk = self._chunk(b.slice(order, first, end, 0), width)
            longer = [b.append(result, part) for result, part in zip(results, chunk, strict=True)]
            return [end < self.items, end, *longer]

        states = [b.constant(0), *(b.sequence() for _ in range(1 + self.signature.lse))]
        _, *results = b.loop_while(states, step)
        return rank, self._tables([b.op("ConcatFromSequence", result, axis=0) for result in results])

    def _area(self, width: Expr) -> Expr:
        """Scores of an item."""
        return self.heads_of_item * self.rows * width * self.wide

    def _chunk(self, item: Expr, width: Expr) -> list[Expr]:
        """Output and lse of some items (n,), each of `width` slots: (n, key head, group, row, D_v or 1)."""
        b = self.b
        block, mask, listed = self._blocks(item, width)
        key = b.op("Unsqueeze", block * self.wide, [2]) + b.arange(self.wide)
        exists = b.op("Unsqueeze", listed, [2]) & (key < self.seq_k)
        key, exists = (b.reshape(x, [b.dim(item, 0), 1, 1, 1, -1]) for x in (key, exists))
        batch, own_head, row = (b.reshape(x, [-1, 1, 1, 1, 1]) for x in self._place_of(item))
        at = _Place(
            batch,
            head=own_head + b.reshape(b.arange(self.heads_of_item), [self.key_axis, self.group_axis, 1, 1]),
            key_head=own_head // self.group + b.reshape(b.arange(self.key_axis), [-1, 1, 1, 1]),
            query=b.minimum(row * self.tall + b.reshape(b.arange(self.rows), [-1, 1]), self.seq_q - 1),
            key=b.minimum(key, self.seq_k - 1),
        )
        penalty = self._penalty(exists, mask, at)
        queries = b.op("Gather", self.q_rows, self.row_number(batch, at.head, at.query, self.heads, self.seq_q))
        number = self.row_number(batch, at.key_head, at.key, self.kv_heads, self.seq_k)
        keys, values = b.op("Gather", self.k_rows, number), b.op("Gather", self.v_rows, number)
        # Grouped heads are more rows of the same products.
        queries, keys = (b.reshape(x, [0, self.key_axis, -1, self.size]) for x in (queries, keys))
        values = b.reshape(values, [0, self.key_axis, -1, self.v_size])
        scores = self.cap(b.op("MatMul", queries, b.op("Transpose", keys, perm=[0, 1, 3, 2])))
        scores = b.reshape(scores, [0, 0, self.group_axis, self.rows, -1])
        sinks = b.op("Gather", self.sinks, at.head) if self.has("sinks") else None
        weights, factor, lse = self.softmax(scores, penalty, sinks)
        y = b.op("MatMul", b.reshape(weights, [0, 0, self.group_axis * self.rows, -1]), values)
        return [b.reshape(y, [0, 0, self.group_axis, self.rows, -1]) * factor, *lse]

    def _blocks(self, item: Expr, width: Expr) -> tuple[Expr, Expr | None, Expr]:
        """Block, mask (None without masks) and whether a block is listed at all, of each slot: (n, width)."""
        b = self.b
        slot = b.arange(width)
        place: Expr = b.dim(self.slots, 0) - 1
        start, before = b.constant(0), b.constant(0)  # of the list's part of the table, and of its part of an item
        for lists in self.lists.values():
            counts, rows = (b.op("Unsqueeze", b.op("Gather", x, item), [1]) for x in (lists.counts, lists.rows))
            inside = (slot >= before) & (slot < before + counts)
            place = b.where(inside, start + rows * lists.width + slot - before, place)
            start, before = start + lists.size, before + counts
        block = b.cast(b.op("Gather", self.slots, place), ir.DataType.INT64)
        block = b.maximum(b.minimum(block, self.last_block), 0)
        if not self.has("block_masks") or "kv" not in self.lists:
            return block, None, slot < before
        # Slots of full lists lie behind those of partial lists, and with them behind the ids: they get the last, -1.
        mask = b.op("Gather", self.mask_ids, b.minimum(place, self.lists["kv"].size))
        mask = b.maximum(b.minimum(b.cast(mask, ir.DataType.INT64), self.mask_count - 1), -1)
        return block, mask % (self.mask_count + 1), slot < before

    def _penalty(self, allowed: Expr, mask: Expr | None, at: _Place) -> Expr:
        """What is added to scores: lowest for forbidden pairs, else the bias or 0; axes as small as inputs allow."""
        b = self.b
        length = b.op("Gather", b.input("nonpad_kv_seqlen"), at.batch) if self.has("nonpad_kv_seqlen") else None
        if length is not None:
            allowed = allowed & (at.key < length)
        if self.has("attn_mask"):
            flags = b.reshape(b.input("attn_mask"), [-1])
            allowed = allowed & b.op("Gather", flags, at.batch * self.seq_k + at.key)
        if mask is not None:
            number = b.op("Unsqueeze", mask * self.tall, [1]) + b.reshape(b.arange(self.rows), [-1, 1])
            rows = b.op("Gather", self.mask_rows, number)  # (n, row, slot, column)
            allowed = allowed & b.reshape(rows, [b.dim(mask, 0), 1, 1, self.rows, -1])
        if self.signature.is_causal or self.signature.exclude_self:
            q_position, k_position = at.query, at.key
            if self.has("q_positions"):
                q_position = self._positions("q_positions", at.batch, at.head, at.query)
                k_position = self._positions("k_positions", at.batch, at.key_head, at.key)
            elif length is not None:
                q_position = at.query + (length - self.seq_q)
            if self.signature.is_causal:
                allowed = allowed & (k_position <= q_position)
            if self.signature.exclude_self:
                allowed = allowed & ~b.equal(k_position, q_position)
        if not self.has("distance_bias"):
            return b.where(allowed, 0.0, LOWEST)
        keys = b.op("Gather", b.reshape(at.key, [0, 0, 0, 0, -1, self.stretch]), 0, axis=5)
        distance = keys - at.query + (self.seq_q - 1)
        bias = b.op("Gather", self.bias_rows, self._shared(at.head, self.bias_heads) * self.distances + distance)
        return b.where(allowed, b.reshape(bias, [0, 0, 0, 0, -1]), LOWEST)

    def _positions(self, name: str, batch: Expr, head: Expr, index: Expr) -> Expr:
        b = self.b
        x = b.input(name)
        batches, heads, length = (b.dim(x, axis) for axis in range(3))
        row = b.minimum(batch, batches - 1) * heads + self._shared(head, heads)
        return b.op("Gather", b.reshape(x, [-1]), row * length + index)

    def _shared(self, head: Expr, count: Expr) -> Expr:
        """Entry of each head in an input with `count` of them: axes of 1 where one stands for all."""
        b = self.b
        kept = b.where(b.equal(count, 1), 1, self.heads)
        return b.minimum(b.slice(b.slice(head, 0, kept, 1), 0, kept, 2), count - 1)
