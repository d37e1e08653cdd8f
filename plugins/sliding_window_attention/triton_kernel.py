"""SlidingWindowAttention on a GPU: Triton kernels, forward only.

A tile is `BLOCK_M` rows: consecutive queries of `FOLD` query heads that share a key head, interleaved
``query 0 head 0, query 0 head 1, …, query 1 head 0, …``, so that each key tile is loaded once for all of them.

With dilation δ the queries and keys of one residue modulo δ form a dense window of their own. A tile belongs to one
residue, and inside it everything is in *class coordinates*: query ``residue + δ·t`` stands at coordinate ``base + t``,
key ``first_key + δ·c`` at coordinate c, and the window is ``base + t - left … base + t + right``. Only the strides know
δ.

The key coordinates that some row of the tile sees are cut into tiles of `BLOCK_N`: those at both ends, which some rows
do not see, are masked; those between need no masks. Both kinds have a loop of their own.

Global tokens take two more kernels: `collect_global` lists them, and `global_rows_forward` computes their rows, which
the window kernel has written before like any others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gpu.tile import (
    LN_2,
    LOG2_E,
    add_keys,
    add_products,
    add_weighted_keys,
    capped,
    first_softmax,
    load_queries,
    load_tile,
    normalised,
    score_factor,
    store_rows,
    valid_length,
)


@triton.jit
def _tile_of(pid, tiles, units, backwards):
    """(tile, unit) of a program; with `backwards` the last tiles of all units, the heaviest, come first."""
    tile = tl.where(backwards, tiles - 1 - pid // units, pid % tiles)
    unit = tl.where(backwards, pid % units, pid // tiles)
    return tile, unit


@triton.jit
def _dilation_of(unit, DILATIONS: tl.constexpr):
    """The dilation of a unit: the only one, or its own."""
    dilation = tl.full([], DILATIONS[0], tl.int32)
    for other in tl.static_range(1, len(DILATIONS)):
        dilation = tl.where(unit == other, DILATIONS[other], dilation)
    return dilation


@triton.jit
def _split_blocks(first, end, full_first, full_end, part, parts, BLOCK_N: tl.constexpr):
    """Cut keys ``first … end`` into blocks from `first` on, and take one of `parts` equal shares of them.

    Returns:
        (begin, full_begin, full_stop, stop): blocks ``begin … full_begin`` and ``full_stop … stop`` need masks, those
        between hold keys of ``full_first … full_end`` alone.
    """
    blocks = tl.cdiv(end - first, BLOCK_N)
    share = tl.cdiv(blocks, parts)
    begin = tl.minimum(part * share, blocks)
    stop = tl.minimum(begin + share, blocks)
    full_begin = tl.cdiv(tl.maximum(full_first - first, 0), BLOCK_N)
    full_stop = tl.maximum(full_end - first, 0) // BLOCK_N
    full_begin = tl.minimum(tl.maximum(full_begin, begin), stop)
    full_stop = tl.minimum(tl.maximum(full_stop, full_begin), stop)
    return begin, full_begin, full_stop, stop


@triton.jit
def _band_block(
    acc, top, total, queries, k, v, attn_mask, is_global, bias_rows, spans, first, end, row_first, row_last, center,
    bias_left, key_step, k_row, v_row, factor, softcap, span_ramp,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the keys ``first … first + BLOCK_N`` of the band, in class coordinates, into the running softmax.

    Without `MASKED` every row sees all of them, and none is at or beyond `end`.
    """
    column = tl.arange(0, BLOCK_N)
    key = first + column
    present = key < end
    keys = load_tile(k + first.to(tl.int64) * k_row, column * k_row, present, D, WIDTH, MASKED)
    if attn_mask is not None:
        unpadded = tl.load(attn_mask + key * key_step, mask=present, other=0) != 0
        present = present & unpadded
    values = load_tile(
        v + first.to(tl.int64) * v_row, column * v_row, present, D_V, WIDTH_V, MASKED or attn_mask is not None
    )
    products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if not MASKED and not SOFTCAP and attn_mask is None and bias_rows is None and spans is None:
        acc, top, total = add_products(acc, top, total, products, factor, values, PRECISION)
    else:
        if SOFTCAP:
            scores = capped(products, factor, softcap)
        else:
            scores = products * factor
        if MASKED:
            allowed = (key[None, :] >= row_first[:, None]) & (key[None, :] <= row_last[:, None]) & present[None, :]
        else:
            allowed = present[None, :]
        if bias_rows is not None:
            # Every key of the band has an entry, so the mask of the band keeps the index inside.
            entry = key[None, :] - center[:, None] + bias_left
            bias = tl.load(bias_rows[:, None] + entry, mask=allowed, other=0.0)
            scores += bias.to(tl.float32) * LOG2_E
        if MASKED or attn_mask is not None:
            scores = tl.where(allowed, scores, float("-inf"))
        if spans is not None:
            distance = tl.abs(key[None, :] - center[:, None]) * key_step
            weights = (span_ramp + spans[:, None] - distance.to(tl.float32)) / span_ramp
            weights = tl.minimum(tl.maximum(weights, 0.0), 1.0)
            if is_global is not None:
                exempt = tl.load(is_global + key * key_step, mask=key < end, other=0) != 0
                weights = tl.where(exempt[None, :], 1.0, weights)
            acc, top, total = add_weighted_keys(acc, top, total, scores, weights, values, PRECISION)
        else:
            acc, top, total = add_keys(acc, top, total, scores, values, PRECISION)
    return acc, top, total


@triton.jit
def window_forward(
    q, k, v, attn_mask, nonpad_kv_seqlen, global_mask, global_keys, global_key_counts, band_bias, sinks, spans,
    y, lse, partial_out, partial_lse, status,
    batches, heads, seq_q, seq_k, tiles, splits, left, right, bias_left, scale, softcap, span_ramp,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, y_batch, y_head, y_row,
    bias_batch, bias_head, bias_row,
    GROUP: tl.constexpr, FOLD: tl.constexpr, DILATIONS: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Rows of a tile against their band and the global keys; with `SPLIT` against one share of both.

    Grid: (tiles · units · B, splits), where a unit is a key head with `FOLD` of its query heads.
    """
    folds: tl.constexpr = (GROUP + FOLD - 1) // FOLD
    rows_per_tile: tl.constexpr = BLOCK_M // FOLD
    dilated: tl.constexpr = DILATIONS != (1,)
    units = (heads // GROUP) * folds
    reach = seq_q + seq_k
    tile, unit = _tile_of(tl.program_id(0), tiles, units * batches, left < 0)
    b = unit // units
    unit = unit % units
    kv_head = unit // folds

    # The tile's residue, and its rows in class coordinates.
    length = valid_length(nonpad_kv_seqlen, status, b, seq_k)
    offset = 0
    if nonpad_kv_seqlen is not None:
        offset = length - seq_q
    if dilated:
        step = tl.minimum(_dilation_of(unit, DILATIONS), reach)
        classes = tl.minimum(step, seq_q)
        residue = tile % classes
        first_row = (tile // classes) * rows_per_tile
        shift = tl.cdiv(seq_q, step)  # keeps the dividend positive: position may be -seq_q
        base = (offset + residue + shift * step) // step - shift
        first_key = offset + residue - base * step
        class_rows = tl.cdiv(seq_q - residue, step)
        class_keys = tl.cdiv(tl.maximum(length - first_key, 0), step)
    else:
        step = 1
        residue = 0
        first_row = tile * rows_per_tile
        base = offset
        first_key = 0
        class_rows = seq_q
        class_keys = length
    if first_row >= class_rows:
        return  # heads of smaller dilation have fewer tiles
    m = tl.arange(0, BLOCK_M)
    row = first_row + m // FOLD
    member = (unit % folds) * FOLD + m % FOLD
    present = (m // FOLD < rows_per_tile) & (row < class_rows) & (member < GROUP)
    head = kv_head * GROUP + member
    query = residue + step * row
    center = base + row

    b64 = b.to(tl.int64)
    q_place = b64 * q_batch + head.to(tl.int64) * q_head + query.to(tl.int64) * q_row
    queries = load_queries(q, q_place, present, scale, D, WIDTH)
    factor = score_factor(scale, softcap, SOFTCAP)
    # Triton's own launcher makes int32, or a constant, of a small stride.
    k_row = tl.cast(k_row, tl.int64)
    v_row = tl.cast(v_row, tl.int64)
    k += b64 * k_batch + kv_head.to(tl.int64) * k_head
    v += b64 * v_batch + kv_head.to(tl.int64) * v_head
    if attn_mask is not None:
        attn_mask += b64 * seq_k + first_key
    band_global = None
    if global_mask is not None:
        band_global = global_mask + b64 * seq_k + first_key
    bias_rows = None
    if band_bias is not None:
        bias_rows = band_bias + b64 * bias_batch + head.to(tl.int64) * bias_head + query.to(tl.int64) * bias_row
        bias_rows = tl.where(present, bias_rows, band_bias)
    span = None
    left = tl.where(left < 0, reach, tl.minimum(left, reach))
    right = tl.where(right < 0, reach, tl.minimum(right, reach))
    if CAUSAL:
        right = right * 0
    if spans is not None:
        span = tl.load(spans + head, mask=present, other=float("-inf"))
        if band_bias is None:
            # Keys beyond the longest span have no weight. With a bias, global ones among them need it: no cut then.
            longest = tl.minimum(tl.maximum(tl.max(span, 0) + span_ramp, 0.0), 1073741824.0).to(tl.int32) // step
            left = tl.minimum(left, longest)
            right = tl.minimum(right, longest)

    part = tl.full([], 0, tl.int32)
    parts = 1
    if SPLIT:
        part = tl.program_id(1)
        parts = splits
    top, total = first_softmax(sinks, head, present, part == 0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
    last_row = tl.minimum(first_row + rows_per_tile, class_rows) - 1
    first = tl.maximum(base + first_row - left, 0)
    end = tl.maximum(tl.minimum(base + last_row + right + 1, class_keys), first)
    full_end = tl.minimum(base + first_row + right + 1, class_keys)
    begin, full_begin, full_stop, stop = _split_blocks(
        first, end, base + last_row - left, full_end, part, parts, BLOCK_N
    )
    band_k = k + first_key * k_row
    band_v = v + first_key * v_row
    for block in range(full_begin, full_stop):
        acc, top, total = _band_block(
            acc, top, total, queries, band_k, band_v, attn_mask, band_global, bias_rows, span, first + block * BLOCK_N,
            end, center - left, center + right, center, bias_left, step, step * k_row, step * v_row, factor, softcap,
            span_ramp, False, SOFTCAP, D, D_V, WIDTH, WIDTH_V, BLOCK_N, PRECISION,
        )  # fmt: skip
    # The masked blocks on both sides share a loop: half the code, and one pipeline to fill.
    for masked in range(begin, stop - (full_stop - full_begin)):
        block = masked + tl.where(masked < full_begin, 0, full_stop - full_begin)
        acc, top, total = _band_block(
            acc, top, total, queries, band_k, band_v, attn_mask, band_global, bias_rows, span, first + block * BLOCK_N,
            end, center - left, center + right, center, bias_left, step, step * k_row, step * v_row, factor, softcap,
            span_ramp, True, SOFTCAP, D, D_V, WIDTH, WIDTH_V, BLOCK_N, PRECISION,
        )  # fmt: skip

    if global_mask is not None:
        # Global keys outside the band; those inside it have been counted there.
        count = tl.load(global_key_counts + b)
        begin, _, _, stop = _split_blocks(0, count, 0, 0, part, parts, BLOCK_N)
        for block in range(begin, stop):
            slot = block * BLOCK_N + tl.arange(0, BLOCK_N)
            listed = slot < count
            key = tl.load(global_keys + b64 * seq_k + slot, mask=listed, other=0)
            keys = load_tile(k, key.to(tl.int64) * k_row, listed, D, WIDTH, True)
            values = load_tile(v, key.to(tl.int64) * v_row, listed, D_V, WIDTH_V, True)
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if SOFTCAP:
                scores = capped(products, factor, softcap)
            else:
                scores = products * factor
            coordinate = (key - first_key) // step
            in_class = (key - first_key) % step == 0
            in_band = (coordinate[None, :] >= (center - left)[:, None]) & (
                coordinate[None, :] <= (center + right)[:, None]
            )
            allowed = listed[None, :] & ~(in_band & in_class[None, :])
            if CAUSAL:
                allowed = allowed & (key[None, :] <= (query + offset)[:, None])
            scores = tl.where(allowed, scores, float("-inf"))
            acc, top, total = add_keys(acc, top, total, scores, values, PRECISION)

    output, log2_total = normalised(acc, top, total)
    if SPLIT:
        place = ((part * batches + b64) * heads + head) * seq_q + query
        store_rows(partial_out, place * D_V, present, output, D_V, WIDTH_V)
        tl.store(partial_lse + place, log2_total, mask=present)
    else:
        y_place = b64 * y_batch + head.to(tl.int64) * y_head + query.to(tl.int64) * y_row
        store_rows(y, y_place, present, output, D_V, WIDTH_V)
        if lse is not None:
            tl.store(lse + (b64 * heads + head) * seq_q + query, log2_total * LN_2, mask=present)


@triton.jit
def collect_global(
    global_mask, attn_mask, nonpad_kv_seqlen, status, global_keys, global_key_counts, global_rows, global_row_counts,
    seq_q, seq_k, BLOCK: tl.constexpr,
):  # fmt: skip
    """List, per batch entry, the valid global keys (B, S_k) and the query rows of global tokens (B, S_q), ascending.

    Grid: (B,). The lists end after their counts; what follows is not written.
    """
    b = tl.program_id(0)
    b64 = b.to(tl.int64)
    length = valid_length(nonpad_kv_seqlen, status, b, seq_k)
    offset = 0
    if nonpad_kv_seqlen is not None:
        offset = length - seq_q
    keys = tl.zeros([], tl.int32)
    rows = tl.zeros([], tl.int32)
    for start in range(0, seq_k, BLOCK):
        key = start + tl.arange(0, BLOCK)
        flag = tl.load(global_mask + b64 * seq_k + key, mask=key < seq_k, other=0) != 0
        valid = flag & (key < length)
        if attn_mask is not None:
            valid = valid & (tl.load(attn_mask + b64 * seq_k + key, mask=key < seq_k, other=0) != 0)
        row = key - offset
        is_row = flag & (row >= 0) & (row < seq_q)
        valid = valid.to(tl.int32)
        is_row = is_row.to(tl.int32)
        tl.store(global_keys + b64 * seq_k + keys + tl.cumsum(valid, 0) - valid, key, mask=valid != 0)
        tl.store(global_rows + b64 * seq_q + rows + tl.cumsum(is_row, 0) - is_row, row, mask=is_row != 0)
        keys += tl.sum(valid, 0)
        rows += tl.sum(is_row, 0)
    tl.store(global_key_counts + b, keys)
    tl.store(global_row_counts + b, rows)


@triton.jit
def global_rows_forward(
    q, k, v, attn_mask, nonpad_kv_seqlen, global_rows, global_row_counts, sinks, y, lse, partial_out, partial_lse,
    status, batches, heads, seq_q, seq_k, splits, scale, softcap,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, y_batch, y_head, y_row,
    GROUP: tl.constexpr, FOLD: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, D_V: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of global tokens against all valid keys.

    Their number is known on the device alone. The first tile of rows, mostly the only one, is shared by `splits`
    programs, each of which takes a part of the keys and leaves it in `partial_out` (splits, B, H_q, rows of a tile,
    D_v); of the further tiles each program computes every `splits`-th whole. Grid: (splits · units · B).
    """
    folds: tl.constexpr = (GROUP + FOLD - 1) // FOLD
    rows_per_tile: tl.constexpr = BLOCK_M // FOLD
    units = (heads // GROUP) * folds
    pid = tl.program_id(0)
    part = pid % splits
    b = pid // splits // units
    unit = pid // splits % units
    kv_head = unit // folds
    b64 = b.to(tl.int64)
    count = tl.load(global_row_counts + b)
    if count == 0:
        return
    length = valid_length(nonpad_kv_seqlen, status, b, seq_k)
    offset = 0
    if nonpad_kv_seqlen is not None:
        offset = length - seq_q
    m = tl.arange(0, BLOCK_M)
    member = (unit % folds) * FOLD + m % FOLD
    head = kv_head * GROUP + member
    factor = score_factor(scale, softcap, SOFTCAP)
    # Triton's own launcher makes int32, or a constant, of a small stride.
    k_row = tl.cast(k_row, tl.int64)
    v_row = tl.cast(v_row, tl.int64)
    k += b64 * k_batch + kv_head.to(tl.int64) * k_head
    v += b64 * v_batch + kv_head.to(tl.int64) * v_head
    if attn_mask is not None:
        attn_mask += b64 * seq_k
    further = tl.maximum(tl.cdiv(count, rows_per_tile) - 1 - part, 0)
    for item in range(0, 1 + tl.cdiv(further, splits)):
        shared = item == 0
        tile = tl.where(shared, 0, 1 + part + (item - 1) * splits)
        slot = tile * rows_per_tile + m // FOLD
        present = (m // FOLD < rows_per_tile) & (slot < count) & (member < GROUP)
        query = tl.load(global_rows + b64 * seq_q + slot, mask=present, other=0)
        q_place = b64 * q_batch + head.to(tl.int64) * q_head + query.to(tl.int64) * q_row
        queries = load_queries(q, q_place, present, scale, D, WIDTH)
        top, total = first_softmax(sinks, head, present, (tile > 0) | (part == 0), BLOCK_M)
        acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)
        last = tl.full([BLOCK_M], 0, tl.int32) + (length - 1)
        if CAUSAL:
            last = tl.minimum(last, query + offset)
        end = tl.maximum(tl.max(tl.where(present, last, -1), 0) + 1, 0)
        full_end = tl.minimum(tl.min(tl.where(present, last, end - 1), 0) + 1, end)
        begin, full_begin, full_stop, stop = _split_blocks(
            0, end, 0, full_end, tl.where(shared, part, 0), tl.where(shared, splits, 1), BLOCK_N
        )
        for block in range(full_begin, full_stop):
            acc, top, total = _band_block(
                acc, top, total, queries, k, v, attn_mask, None, None, None, block * BLOCK_N + begin * 0, end, last,
                last, last, 0, 1, k_row, v_row, factor, softcap, 1.0, False, SOFTCAP, D, D_V, WIDTH, WIDTH_V, BLOCK_N,
                PRECISION,
            )  # fmt: skip
        for block in range(full_stop, stop):
            acc, top, total = _band_block(
                acc, top, total, queries, k, v, attn_mask, None, None, None, block * BLOCK_N + begin * 0, end, last * 0,
                last, last, 0, 1, k_row, v_row, factor, softcap, 1.0, True, SOFTCAP, D, D_V, WIDTH, WIDTH_V, BLOCK_N,
                PRECISION,
            )  # fmt: skip
        output, log2_total = normalised(acc, top, total)
        if shared:
            place = ((part * batches + b64) * heads + head) * rows_per_tile + slot
            store_rows(partial_out, place * D_V, present, output, D_V, WIDTH_V)
            tl.store(partial_lse + place, log2_total, mask=present)
        else:
            y_place = b64 * y_batch + head.to(tl.int64) * y_head + query.to(tl.int64) * y_row
            store_rows(y, y_place, present, output, D_V, WIDTH_V)
            if lse is not None:
                tl.store(lse + (b64 * heads + head) * seq_q + query, log2_total * LN_2, mask=present)
