"""attention (docs/model.md#5) for few query rows and many keys: decoding, short continuations.

    out = softmax(softmax_scale * q k^T - alibi_slopes * |i - j|) v

All tokens and all query heads of a key head are packed into the rows of one tile (row = token * group + head), so that
a key is read once for all of them. A program owns kRows rows of one (batch entry, key head) and one of num_splits runs
of tiles of keys:

             tiles of kKeys keys, num_splits runs of them
            +----+----+----+----+----+----+----+----+--
    kRows   | split 0      | split 1      | split 2          sums, weights * values and exponent of a split
            +----+----+----+----+----+----+----+----+--

It leaves its sums, the second kernel adds those of all splits in their order: a result does not depend on timing. With
one split the first kernel writes the result itself.

Memory limits this kernel, so the softmax is always online: the largest weight of a row is then 1, and the sum of the
unrounded weights is a good enough divisor (docs/attention.md#bounded-softmax). What counts is the number of bytes in
flight: num_stages - 1 tiles of keys and values per program (docs/attention.md#decoding).
"""

import triton
import triton.language as tl

from andromeda.triton_kernels.attention_tile import (
    describe_head,
    describe_rows,
    inverse,
    load_at,
    log_sum_exp,
    range_of_keys,
    sum_tiles,
)

_kInfinity = tl.constexpr(float("inf"))


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_k", "num_kv_heads", "group", "num_row_blocks", "num_splits"])
def attention_decode_kernel(
    q: tl.tensor,  # (batch, seqlen_q, num_heads, head_dim)
    q_batch: tl.tensor,  # strides
    q_seq: tl.tensor,
    q_head: tl.tensor,
    k: tl.tensor,  # (batch, seqlen_k, num_kv_heads, head_dim)
    k_batch: tl.tensor,
    k_seq: tl.tensor,
    k_head: tl.tensor,
    v: tl.tensor,
    v_batch: tl.tensor,
    v_seq: tl.tensor,
    v_head: tl.tensor,
    alibi_slopes: tl.tensor,  # (num_heads,), or None
    logit_bound: tl.tensor,  # (num_heads,), or None
    key_start: tl.tensor,  # (batch, seqlen_q), or None
    num_keys: tl.tensor,  # (1,), the number of keys in the place of seqlen_k, or None
    out: tl.tensor,  # (batch, seqlen_q, num_heads, head_dim), dense; with several splits not used
    softmax_lse: tl.tensor,  # (batch, num_heads, seqlen_q); with several splits not used
    partial_out: tl.tensor,  # (batch * num_kv_heads * num_row_blocks * num_splits, kRows, head_dim); None with one
    partial_sum: tl.tensor,  # (..., kRows), and so on
    partial_exponent: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    num_kv_heads: tl.tensor,
    group: tl.tensor,  # num_heads / num_kv_heads
    num_row_blocks: tl.tensor,
    num_splits: tl.tensor,
    softmax_scale: tl.tensor,
    kCausal: tl.constexpr,
    kRows: tl.constexpr,
    kKeys: tl.constexpr,
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,  # head_dim, padded
) -> None:
    if num_keys is not None:
        seqlen_k = tl.minimum(tl.maximum(tl.load(num_keys), 0), seqlen_k)
    # Row blocks that read the same keys are neighbours in the grid: the second one finds them in L2.
    index = tl.program_id(0)
    row = index % num_row_blocks * kRows + tl.arange(0, kRows)
    split = index // num_row_blocks % num_splits
    head_of_batch = index // num_row_blocks // num_splits
    kv_head = head_of_batch % num_kv_heads
    entry = (head_of_batch // num_kv_heads).to(tl.int64)
    query = row // group
    head = kv_head * group + row % group
    exists = query < seqlen_q
    if key_start is not None:
        key_start += entry * seqlen_q
    q += entry * q_batch
    k += entry * k_batch + kv_head.to(tl.int64) * k_head
    v += entry * v_batch + kv_head.to(tl.int64) * v_head

    slope, _, window = describe_head(alibi_slopes, logit_bound, head)
    position, first, end = describe_rows(key_start, query, seqlen_q, seqlen_k, kCausal)
    begin, stop, unmasked_begin, unmasked_end = range_of_keys(position, first, end, exists, window)
    first_tile = begin // kKeys
    num_tiles = tl.maximum(tl.cdiv(stop, kKeys) - first_tile, 0).to(tl.int64)
    raw_slope = tl.zeros((kRows,), tl.float32) + slope / softmax_scale
    q_address = q + query.to(tl.int64) * q_seq + head.to(tl.int64) * q_head
    sums, sum, _, exponent = sum_tiles(
        load_at(q_address, exists, kHeadDim, kChannels, False),
        k,
        k_seq,
        v,
        v_seq,
        first_tile + (num_tiles * split // num_splits).to(tl.int32),
        first_tile + (num_tiles * (split + 1) // num_splits).to(tl.int32),
        unmasked_begin,
        unmasked_end,
        seqlen_k,
        position,
        first,
        end,
        raw_slope,
        softmax_scale,
        kRows,
        kKeys,
        kHeadDim,
        kChannels,
        kCausal,
        alibi_slopes is not None,
        False,
    )

    channel = tl.arange(0, kChannels)
    stored = exists[:, None] & (channel < kHeadDim)[None, :]
    if partial_out is None:
        num_heads = num_kv_heads * group
        tl.store(softmax_lse + (entry * num_heads + head) * seqlen_q + query, log_sum_exp(sum, exponent), mask=exists)
        address = out + ((entry * seqlen_q + query) * num_heads + head)[:, None] * kHeadDim + channel[None, :]
        tl.store(address, (sums * inverse(sum)[:, None]).to(out.dtype.element_ty), mask=stored)
    else:
        partial = ((head_of_batch * num_row_blocks + index % num_row_blocks).to(tl.int64) * num_splits + split) * kRows
        partial += tl.arange(0, kRows)
        tl.store(partial_sum + partial, sum, mask=exists)
        tl.store(partial_exponent + partial, exponent, mask=exists)
        tl.store(partial_out + partial[:, None] * kHeadDim + channel[None, :], sums, mask=stored)


@triton.jit(do_not_specialize=["seqlen_q", "num_kv_heads", "group", "num_row_blocks", "num_splits"])
def add_splits_kernel(
    out: tl.tensor,  # as above
    softmax_lse: tl.tensor,
    partial_out: tl.tensor,
    partial_sum: tl.tensor,
    partial_exponent: tl.tensor,
    seqlen_q: tl.tensor,
    num_kv_heads: tl.tensor,
    group: tl.tensor,
    num_row_blocks: tl.tensor,
    num_splits: tl.tensor,
    kRows: tl.constexpr,
    kSplits: tl.constexpr,  # at least num_splits
    kStep: tl.constexpr,  # splits at a time
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,
) -> None:
    """Adds the partial results of one row: a program per (batch entry, key head, packed row)."""
    num_rows = seqlen_q * group
    head_of_batch = tl.program_id(0) // num_rows
    row = tl.program_id(0) % num_rows
    entry = (head_of_batch // num_kv_heads).to(tl.int64)
    head = head_of_batch % num_kv_heads * group + row % group
    first = (head_of_batch * num_row_blocks + row // kRows).to(tl.int64) * num_splits * kRows + row % kRows

    split = tl.arange(0, kSplits)
    sum = tl.load(partial_sum + first + split * kRows, mask=split < num_splits, other=0.0)
    exponent = tl.load(partial_exponent + first + split * kRows, mask=split < num_splits, other=0.0)
    exponent = tl.where(sum == 0.0, -_kInfinity, exponent)  # a split without a key of this row
    largest = tl.max(exponent, 0)
    largest = tl.where(largest == -_kInfinity, 0.0, largest)
    sum = tl.sum(sum * tl.exp(exponent - largest), 0)

    channel = tl.arange(0, kChannels)
    total = tl.zeros((kChannels,), tl.float32)
    for start in range(0, num_splits, kStep):
        step = start + tl.arange(0, kStep)
        part = first + step * kRows
        weight = tl.load(partial_sum + part, mask=step < num_splits, other=0.0)
        relative = tl.load(partial_exponent + part, mask=step < num_splits, other=0.0) - largest
        address = partial_out + part[:, None] * kHeadDim + channel[None, :]
        sums = tl.load(address, mask=(step < num_splits)[:, None] & (channel < kHeadDim)[None, :], other=0.0)
        total += tl.sum(sums * tl.where(weight == 0.0, 0.0, tl.exp(relative))[:, None], 0)

    query = row // group
    num_heads = num_kv_heads * group
    tl.store(softmax_lse + (entry * num_heads + head) * seqlen_q + query, log_sum_exp(sum, largest))
    address = out + ((entry * seqlen_q + query) * num_heads + head) * kHeadDim + channel
    tl.store(address, (total * inverse(sum)).to(out.dtype.element_ty), mask=channel < kHeadDim)
