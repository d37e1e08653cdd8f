"""BlockSparseAttention on a GPU: Triton kernels, forward only.

A tile is `BLOCK_M` rows of one block row: consecutive queries, of `FOLD` query heads that share a key head and the
lists, interleaved ``query 0 head 0, query 0 head 1, …, query 1 head 0, …``. Its keys are those of the listed blocks,
one listing after another, taken `BLOCK_N` at a time: a part of one block where `BLOCK_N` divides the size of a block,
else gathered from as many blocks as it takes, so that small and odd blocks fill their tiles too.

Full blocks go through a loop without masks, provided that every key of every block exists and counts; partial blocks,
and full ones elsewhere, share a loop with masks. `prepare_lists` runs first: it orders the rows by their number of
blocks, so that the longest start first, and reports what is out of range. The attention kernel only clamps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..gpu.tile import (
    LN_2,
    LOG2_E,
    add_keys,
    add_products,
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
def _clamped(value, low, high):
    return tl.maximum(tl.minimum(value, high), low)


@triton.jit
def _worst(values, place, read, low, high):
    """1 + the largest place of a value that is read and outside ``low … high``; 0 where there is none."""
    wrong = read & ((values < low) | (values > high))
    return tl.max(tl.max(tl.where(wrong, place + 1, 0), 1), 0)


@triton.jit
def _check_list(
    counts, indices, ids, status, row, present, batch, head, width, blocks, masks, counts_batch, counts_head,
    indices_batch, indices_head, COUNTS: tl.constexpr, INDICES: tl.constexpr, IDS: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Report what is out of range in the rows of one list, and return their clamped counts."""
    place = batch * counts_batch + head * counts_head + row
    given = tl.load(counts + place, mask=present, other=0)
    tl.atomic_max(status + COUNTS, _worst(given[:, None], place.to(tl.int32)[:, None], present[:, None], 0, width))
    count = _clamped(given, 0, width)
    worst_index = 0
    worst_id = 0
    for start in range(0, tl.max(count, 0), BLOCK_W):
        slot = start + tl.arange(0, BLOCK_W)
        read = slot[None, :] < count[:, None]
        place2 = (batch * indices_batch + head * indices_head) + row[:, None] * width + slot[None, :]
        index = tl.load(indices + place2, mask=read, other=0)
        worst_index = tl.maximum(worst_index, _worst(index, place2.to(tl.int32), read, 0, blocks - 1))
        if ids is not None:
            mask_id = tl.load(ids + place2, mask=read, other=-1)
            worst_id = tl.maximum(worst_id, _worst(mask_id, place2.to(tl.int32), read, -1, masks - 1))
    tl.atomic_max(status + INDICES, worst_index)
    if ids is not None:
        tl.atomic_max(status + IDS, worst_id)
    return count


@triton.jit
def _count(counts, full_counts, row, present, batch, head, width, full_width, counts_batch, counts_head,
           full_counts_batch, full_counts_head):  # fmt: skip
    """Listed blocks of rows, over both lists; -1 for rows that are not there."""
    partial = tl.load(counts + batch * counts_batch + head * counts_head + row, mask=present, other=0)
    full = tl.load(full_counts + batch * full_counts_batch + head * full_counts_head + row, mask=present, other=0)
    return tl.where(present, _clamped(partial, 0, width) + _clamped(full, 0, full_width), -1)


@triton.jit
def prepare_lists(
    kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, block_mask_ids, nonpad_kv_seqlen, row_order, status,
    batches, seq_k, rows, width, full_width, masks, list_heads, order_batch, order_head,
    counts_batch, counts_head, indices_batch, indices_head,
    full_counts_batch, full_counts_head, full_indices_batch, full_indices_head,
    KV_BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Order the rows of each batch entry and head by their number of blocks, descending, and check the lists.

    Grid: (blocks of `BLOCK_R` rows · heads of the lists · batch entries of the lists).
    """
    groups = tl.cdiv(rows, BLOCK_R)
    pid = tl.program_id(0)
    batch = (pid // groups // list_heads).to(tl.int64)
    head = (pid // groups % list_heads).to(tl.int64)
    row = (pid % groups) * BLOCK_R + tl.arange(0, BLOCK_R)
    present = row < rows
    blocks = tl.cdiv(seq_k, KV_BLOCK)
    if nonpad_kv_seqlen is not None:
        # The lists may be one for the whole batch, so program b looks at entry b.
        for entry in range(pid, batches, tl.num_programs(0)):
            valid_length(nonpad_kv_seqlen, status, entry, seq_k)
    # The numbers of the entries of the status buffer: see STATUS in plugins/gpu/variants.py.
    partial = _check_list(
        kv_num_blocks, kv_indices, block_mask_ids, status, row, present, batch, head, width, blocks, masks,
        counts_batch, counts_head, indices_batch, indices_head, 1, 2, 5, BLOCK_W,
    )  # fmt: skip
    full = _check_list(
        full_kv_num_blocks, full_kv_indices, None, status, row, present, batch, head, full_width, blocks, masks,
        full_counts_batch, full_counts_head, full_indices_batch, full_indices_head, 3, 4, 5, BLOCK_W,
    )  # fmt: skip
    own = tl.where(present, partial + full, -1)
    rank = tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, rows, BLOCK_W):
        other_row = start + tl.arange(0, BLOCK_W)
        other = _count(
            kv_num_blocks, full_kv_num_blocks, other_row, other_row < rows, batch, head, width, full_width,
            counts_batch, counts_head, full_counts_batch, full_counts_head,
        )  # fmt: skip
        before = (other[None, :] > own[:, None]) | (
            (other[None, :] == own[:, None]) & (other_row[None, :] < row[:, None])
        )
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(row_order + batch * order_batch + head * order_head + rank, row, mask=present)


@triton.jit
def _block_at(indices, slot, listed, blocks):
    """The key block in a slot of a list, clamped to those there are."""
    return _clamped(tl.load(indices + slot, mask=listed, other=0), 0, blocks - 1)


@triton.jit
def _score(
    products, key, present, row, q_position, row_in_block, column_in_block, mask_id, block_masks, k_positions,
    distance_bias, seq_q, factor, softcap, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr, Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores of a tile in units of log 2; -inf where a pair is forbidden."""
    if SOFTCAP:
        scores = capped(products, factor, softcap)
    else:
        scores = products * factor
    if distance_bias is not None:
        entry = distance_bias[:, None] + (key[None, :] - row[:, None] + seq_q - 1)
        bias = tl.load(entry, mask=present[None, :], other=0.0) if MASKED else tl.load(entry)
        scores += bias.to(tl.float32) * LOG2_E
    if MASKED:
        allowed = present[None, :]
        if block_masks is not None:
            bytes_of_row: tl.constexpr = (KV_BLOCK + 7) // 8
            byte = row_in_block[:, None] * bytes_of_row + (column_in_block // 8)[None, :]
            mask_start = tl.maximum(mask_id, 0).to(tl.int64) * (Q_BLOCK * bytes_of_row)
            bits = tl.load(block_masks + mask_start[None, :] + byte, mask=present[None, :], other=0).to(tl.int32)
            allowed = allowed & (((bits >> (column_in_block % 8)[None, :]) & 1 != 0) | (mask_id < 0)[None, :])
        if CAUSAL or EXCLUDE_SELF:
            k_position = key
            if k_positions is not None:
                k_position = tl.load(k_positions + key, mask=present, other=0)
            if CAUSAL:
                allowed = allowed & (k_position[None, :] <= q_position[:, None])
            if EXCLUDE_SELF:
                allowed = allowed & (k_position[None, :] != q_position[:, None])
        scores = tl.where(allowed, scores, float("-inf"))
    return scores


@triton.jit
def block_sparse_forward(
    q, k, v, kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, block_mask_ids, block_masks, attn_mask,
    nonpad_kv_seqlen, sinks, q_positions, k_positions, distance_bias, row_order, y, lse, partial_out, partial_lse,
    batches, heads, seq_q, seq_k, width, full_width, masks, splits, scale, softcap, order_batch, order_head,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, y_batch, y_head, y_row,
    counts_batch, counts_head, indices_batch, indices_head,
    full_counts_batch, full_counts_head, full_indices_batch, full_indices_head,
    q_positions_batch, q_positions_head, k_positions_batch, k_positions_head, bias_head,
    Q_BLOCK: tl.constexpr, KV_BLOCK: tl.constexpr, GROUP: tl.constexpr, FOLD: tl.constexpr, CAUSAL: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Rows of a tile against their listed blocks; with `SPLIT` against one share of them.

    Grid: (tiles of a block row · block rows · units · B, splits), where a unit is a key head with `FOLD` of its query
    heads; all units of the longest row come first, or without `row_order` those of the first.
    """
    folds: tl.constexpr = (GROUP + FOLD - 1) // FOLD
    rows_per_tile: tl.constexpr = min(BLOCK_M // FOLD, Q_BLOCK)
    tiles_per_row: tl.constexpr = (Q_BLOCK + rows_per_tile - 1) // rows_per_tile
    tiled: tl.constexpr = KV_BLOCK % BLOCK_N == 0
    parts_of_block: tl.constexpr = KV_BLOCK // BLOCK_N if tiled else 1
    # Whether even a full block of existing keys needs a mask.
    always_masked: tl.constexpr = CAUSAL or EXCLUDE_SELF or attn_mask is not None or not tiled
    units = (heads // GROUP) * folds * batches
    pid = tl.program_id(0)
    b = pid % units // (units // batches)
    unit = pid % (units // batches)
    kv_head = unit // folds
    tile = pid // units % tiles_per_row
    b64 = b.to(tl.int64)
    kv_head64 = kv_head.to(tl.int64)
    # Lists of their own for each head come with FOLD = 1, so the first member's are everybody's.
    list_head = (kv_head * GROUP + (unit % folds) * FOLD).to(tl.int64)
    block_row = pid // units // tiles_per_row
    if row_order is not None:
        block_row = tl.load(row_order + b64 * order_batch + list_head * order_head + block_row)

    if block_row * Q_BLOCK + tile * rows_per_tile >= seq_q:
        return  # the last block row may be cut off
    m = tl.arange(0, BLOCK_M)
    row_in_block = tile * rows_per_tile + m // FOLD
    row = block_row * Q_BLOCK + row_in_block
    member = (unit % folds) * FOLD + m % FOLD
    present = (m // FOLD < rows_per_tile) & (row_in_block < Q_BLOCK) & (row < seq_q) & (member < GROUP)
    # Rows that are not there repeat the first one's places, so that whatever they load exists.
    row_in_block = tl.where(present, row_in_block, 0)
    row = tl.where(present, row, block_row * Q_BLOCK)
    head = kv_head * GROUP + tl.where(present, member, 0)
    head64 = head.to(tl.int64)
    length = valid_length(nonpad_kv_seqlen, None, b, seq_k)
    q_position = row
    if nonpad_kv_seqlen is not None:
        q_position = row + (length - seq_q)
    if q_positions is not None:
        q_position = tl.load(q_positions + b64 * q_positions_batch + head64 * q_positions_head + row)
        k_positions += b64 * k_positions_batch + kv_head64 * k_positions_head
    bias_rows = None
    if distance_bias is not None:
        bias_rows = distance_bias + head64 * bias_head
    if attn_mask is not None:
        attn_mask += b64 * seq_k

    queries = load_queries(q, b64 * q_batch + head64 * q_head + row.to(tl.int64) * q_row, present, scale, D, WIDTH)
    factor = score_factor(scale, softcap, SOFTCAP)
    # Triton's own launcher makes int32, or a constant, of a small stride.
    k_row = tl.cast(k_row, tl.int64)
    v_row = tl.cast(v_row, tl.int64)
    k += b64 * k_batch + kv_head64 * k_head
    v += b64 * v_batch + kv_head64 * v_head
    column = tl.arange(0, BLOCK_N)
    blocks = tl.cdiv(seq_k, KV_BLOCK)
    count = _clamped(tl.load(kv_num_blocks + b64 * counts_batch + list_head * counts_head + block_row), 0, width)
    full_count = _clamped(
        tl.load(full_kv_num_blocks + b64 * full_counts_batch + list_head * full_counts_head + block_row), 0, full_width
    )
    list_start = b64 * indices_batch + list_head * indices_head + block_row.to(tl.int64) * width
    indices = kv_indices + list_start
    full_indices = full_kv_indices + (
        b64 * full_indices_batch + list_head * full_indices_head + block_row.to(tl.int64) * full_width
    )
    if block_mask_ids is not None:
        block_mask_ids += list_start

    # Work in steps of one tile of keys, shared out to the parts of a split row.
    if tiled:
        steps = count * parts_of_block
        full_steps = full_count * parts_of_block
    else:
        steps = tl.cdiv(count * KV_BLOCK, BLOCK_N)
        full_steps = tl.cdiv(full_count * KV_BLOCK, BLOCK_N)
    part = tl.full([], 0, tl.int32)
    begin = 0
    full_begin = 0
    if SPLIT:
        part = tl.program_id(1)
        share = tl.cdiv(steps, splits)
        begin = tl.minimum(part * share, steps)
        steps = tl.minimum(begin + share, steps)
        share = tl.cdiv(full_steps, splits)
        full_begin = tl.minimum(part * share, full_steps)
        full_steps = tl.minimum(full_begin + share, full_steps)
    top, total = first_softmax(sinks, head, present, part == 0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, WIDTH_V], tl.float32)

    masked_full = full_steps - full_begin
    if not always_masked:
        whole = (length == blocks * KV_BLOCK) & (length > 0)
        masked_full = tl.where(whole, 0, masked_full)
        whole_steps = tl.where(whole, full_steps, full_begin)
        # The next block is looked up while this one is computed.
        upcoming = _block_at(full_indices, full_begin // parts_of_block, full_begin < whole_steps, blocks)
        for step in range(full_begin, whole_steps):
            first = upcoming * KV_BLOCK + (step % parts_of_block) * BLOCK_N
            upcoming = _block_at(full_indices, (step + 1) // parts_of_block, step + 1 < whole_steps, blocks)
            keys = load_tile(k + first.to(tl.int64) * k_row, column * k_row, None, D, WIDTH, False)
            values = load_tile(v + first.to(tl.int64) * v_row, column * v_row, None, D_V, WIDTH_V, False)
            products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
            if SOFTCAP or distance_bias is not None:
                scores = _score(
                    products, first + column, None, row, q_position, row_in_block, None, None, None, None, bias_rows,
                    seq_q, factor, softcap, False, SOFTCAP, CAUSAL, EXCLUDE_SELF, Q_BLOCK, KV_BLOCK,
                )  # fmt: skip
                acc, top, total = add_keys(acc, top, total, scores, values, PRECISION)
            else:
                acc, top, total = add_products(acc, top, total, products, factor, values, PRECISION)

    # Partial blocks, and after them the full blocks that need masks: without a mask id.
    partial_steps = steps - begin
    for step in range(0, partial_steps + masked_full):
        is_partial = step < partial_steps
        place = tl.where(is_partial, begin + step, full_begin + step - partial_steps)
        source = tl.where(is_partial, indices, full_indices)
        if tiled:
            slot = place // parts_of_block + column * 0
            listed = column >= 0
            column_in_block = (place % parts_of_block) * BLOCK_N + column
        else:
            nth = place * BLOCK_N + column
            slot = nth // KV_BLOCK
            listed = slot < tl.where(is_partial, count, full_count)
            column_in_block = nth % KV_BLOCK
        if tiled:
            first = _clamped(tl.load(source + place // parts_of_block), 0, blocks - 1) * KV_BLOCK
            key = first + column_in_block
        else:
            key = _block_at(source, slot, listed, blocks) * KV_BLOCK + column_in_block
        exists = listed & (key < length)
        if attn_mask is not None:
            exists = exists & (tl.load(attn_mask + key, mask=exists, other=0) != 0)
        if tiled:
            first64 = (first + (place % parts_of_block) * BLOCK_N).to(tl.int64)
            keys = load_tile(k + first64 * k_row, column * k_row, exists, D, WIDTH, True)
            values = load_tile(v + first64 * v_row, column * v_row, exists, D_V, WIDTH_V, True)
        else:
            keys = load_tile(k, key.to(tl.int64) * k_row, exists, D, WIDTH, True)
            values = load_tile(v, key.to(tl.int64) * v_row, exists, D_V, WIDTH_V, True)
        mask_id = column * 0 - 1
        if block_mask_ids is not None:
            mask_id = tl.load(block_mask_ids + slot, mask=exists & (step + column * 0 < partial_steps), other=-1)
            mask_id = _clamped(mask_id, -1, masks - 1)
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores = _score(
            products, key, exists, row, q_position, row_in_block, column_in_block, mask_id, block_masks, k_positions,
            bias_rows, seq_q, factor, softcap, True, SOFTCAP, CAUSAL, EXCLUDE_SELF, Q_BLOCK, KV_BLOCK,
        )  # fmt: skip
        acc, top, total = add_keys(acc, top, total, scores, values, PRECISION)

    output, log2_total = normalised(acc, top, total)
    if SPLIT:
        place = ((part * batches + b64) * heads + head) * seq_q + row
        store_rows(partial_out, place * D_V, present, output, D_V, WIDTH_V)
        tl.store(partial_lse + place, log2_total, mask=present)
    else:
        y_place = b64 * y_batch + head64 * y_head + row.to(tl.int64) * y_row
        store_rows(y, y_place, present, output, D_V, WIDTH_V)
        if lse is not None:
            tl.store(lse + (b64 * heads + head) * seq_q + row, log2_total * LN_2, mask=present)
