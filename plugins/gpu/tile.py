"""Device functions that the attention kernels share: loading tiles, scores, and the running softmax.

Scores are in units of log 2 throughout (``exp2`` is one instruction), ``top`` is a row's running maximum and ``total``
its running denominator relative to it. A forbidden score is -inf; `top` never falls below the lowest finite number, so
that no difference of two maxima is NaN, and a row that saw no key keeps a total of 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def load_tile(base, offsets, present, SIZE: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Rows at ``base + offsets``, `SIZE` elements each, as a tile of power-of-two `WIDTH`; what is absent is 0."""
    column = tl.arange(0, WIDTH)
    pointers = base + offsets[:, None] + column[None, :]
    if MASKED:
        if SIZE == WIDTH:
            tile = tl.load(pointers, mask=present[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=present[:, None] & (column < SIZE)[None, :], other=0.0)
    else:
        if SIZE == WIDTH:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(column < SIZE)[None, :], other=0.0)
    return tile


@triton.jit
def score_factor(scale, softcap, SOFTCAP: tl.constexpr):
    """What q·k is multiplied by. The sign of `scale` is in the queries, so that a row's maximum commutes with it."""
    if SOFTCAP:
        factor = tl.abs(scale) / softcap
    else:
        factor = tl.abs(scale) * LOG2_E
    return factor


@triton.jit
def load_queries(base, offsets, present, scale, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of queries with the sign of `scale`, which is exact in every type."""
    queries = load_tile(base, offsets, present, SIZE, WIDTH, True)
    return tl.where(scale < 0, -queries, queries)


@triton.jit
def capped(products, factor, softcap):
    """``softcap · tanh(products · factor)`` in units of log 2, for ``factor = scale / softcap``."""
    # 1 - 2 / (exp(2x) + 1) goes to -1 and 1 without overflowing to NaN; tanh.approx would be off by 2**-11.
    growth = tl.math.exp2(products * factor * (2 * LOG2_E))
    return (softcap * LOG2_E) * (1.0 - 2.0 / (growth + 1.0))


@triton.jit
def add_keys(acc, top, total, scores, values, PRECISION: tl.constexpr):
    """Take a tile of scores and their values into the running softmax."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    terms = tl.math.exp2(scores - new_top[:, None])
    decay = tl.math.exp2(top - new_top)
    total = total * decay + tl.sum(terms, 1)
    acc = tl.dot(terms.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def add_products(acc, top, total, products, factor, values, PRECISION: tl.constexpr):
    """`add_keys` of ``products · factor``, `factor` 0 or more: one fused multiply-add a score instead of two steps."""
    new_top = tl.maximum(top, tl.max(products, 1) * factor)
    terms = tl.math.exp2(products * factor - new_top[:, None])
    decay = tl.math.exp2(top - new_top)
    total = total * decay + tl.sum(terms, 1)
    acc = tl.dot(terms.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def add_weighted_keys(acc, top, total, scores, weights, values, PRECISION: tl.constexpr):
    """`add_keys` where each term is multiplied by a weight; a weight of 0 forbids the key."""
    scores = tl.where(weights > 0, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    terms = tl.math.exp2(scores - new_top[:, None]) * weights
    decay = tl.math.exp2(top - new_top)
    total = total * decay + tl.sum(terms, 1)
    acc = tl.dot(terms.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit
def first_softmax(sinks, heads, present, counts, BLOCK_M: tl.constexpr):
    """(top, total) of rows before any key: a sink is a score without a value, where `counts` says that it counts here.

    Of the parts that a row is split into, only one may count it.
    """
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=present, other=float("-inf")).to(tl.float32) * LOG2_E
        sink = tl.where(counts, sink, float("-inf"))
        top = tl.maximum(sink, LOWEST)
        total = tl.math.exp2(sink - top)
    else:
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    return top, total


@triton.jit
def normalised(acc, top, total):
    """(output, log2 of the denominator) of finished rows; 0 and -inf for a row without keys and sink."""
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    output = tl.where(seen[:, None], acc / divisor[:, None], 0.0)
    return output, tl.where(seen, top + tl.math.log2(divisor), float("-inf"))


@triton.jit
def valid_length(nonpad_kv_seqlen, status, batch, keys):
    """Number of valid keys of a batch entry; a value out of range is clamped, and reported where `status` is given."""
    if nonpad_kv_seqlen is not None:
        given = tl.load(nonpad_kv_seqlen + batch)
        if status is not None:
            tl.atomic_max(status, batch + 1, mask=(given < 0) | (given > keys))
        length = tl.minimum(tl.maximum(given, 0), keys).to(tl.int32)
    else:
        length = keys
    return length


@triton.jit
def store_rows(base, offsets, present, output, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Write the rows of a tile that are present, in the type of `base`."""
    column = tl.arange(0, WIDTH)
    mask = present[:, None] & (column < SIZE)[None, :]
    tl.store(base + offsets[:, None] + column[None, :], output.to(base.dtype.element_ty), mask=mask)


@triton.jit
def merge_parts(
    partial_out,
    partial_lse,
    rows,
    row_counts,
    y,
    lse,
    batch_heads,
    heads,
    seq_q,
    rows_per_head,
    splits,
    y_batch,
    y_head,
    y_row,
    D_V: tl.constexpr,
    WIDTH_V: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Merge the parts of split rows by their log-sum-exp, and write Y and lse.

    The parts are (splits, B, H_q, rows_per_head, D_v) and (splits, B, H_q, rows_per_head). Row r of an entry is query
    r, or query ``rows[b, r]`` for r below ``row_counts[b]`` where a list of rows is given.
    """
    blocks = tl.cdiv(rows_per_head, BLOCK_R)
    pid = tl.program_id(0)
    unit = pid // blocks
    b = unit // heads
    h = unit % heads
    r = (pid % blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    if rows is not None:
        present = (r < rows_per_head) & (r < tl.load(row_counts + b))
        query = tl.load(rows + b.to(tl.int64) * seq_q + r, mask=present, other=0)
    else:
        present = r < rows_per_head
        query = r
    place = unit.to(tl.int64) * rows_per_head + r
    part = tl.cast(batch_heads, tl.int64) * rows_per_head
    top = tl.full([BLOCK_R], LOWEST, tl.float32)
    for split in range(0, splits):
        top = tl.maximum(top, tl.load(partial_lse + split * part + place, mask=present, other=float("-inf")))
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, WIDTH_V], tl.float32)
    for split in range(0, splits):
        weight = tl.math.exp2(tl.load(partial_lse + split * part + place, mask=present, other=float("-inf")) - top)
        output = load_tile(partial_out + split * part * D_V, place * D_V, present, D_V, WIDTH_V, True)
        acc += weight[:, None] * output
        total += weight
    output, log2_total = normalised(acc, top, total)
    store_rows(y + b.to(tl.int64) * y_batch + h.to(tl.int64) * y_head, query * y_row, present, output, D_V, WIDTH_V)
    if lse is not None:
        tl.store(lse + unit.to(tl.int64) * seq_q + query, log2_total * LN_2, mask=present)
