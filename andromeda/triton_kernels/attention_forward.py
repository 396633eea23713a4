"""attention (docs/model.md#5) for many query rows.

    out = softmax(softmax_scale * q k^T - alibi_slopes * |i - j|) v

A program owns kQueries rows of one head. It skips the tiles of kKeys keys that none of its rows sees, or that the bias
makes negligible (`range_of_keys`), and adds the others (attention_tile.py):

    scores = q k^T + bias   kQueries x kKeys, float32      weights = 2^scores
    out    += weights v     kQueries x head_dim, float32

Softmax: bounded where the head has a small bound, else online; the branch is the same for the whole program. The query
tile is the slow index, the last one first: under a causal mask it sees most keys, and the programs at the end of the
launch are short. All heads, which share keys, run side by side, the last ones first: in this model family heads
without a bias are last and have most to do.

Cost: 4 * head_dim flops per visible pair. Q and out move once; K and V move once per query tile, from L2 where the
heads that share them run together.
"""

import triton
import triton.language as tl

from andromeda.triton_kernels.attention_tile import (
    describe_head,
    describe_rows,
    inverse,
    load_rows,
    log_sum_exp,
    range_of_keys,
    sees_itself,
    sum_tiles,
)


@triton.jit(do_not_specialize=["batch", "seqlen_q", "seqlen_k", "num_heads", "query_tiles"])
def attention_forward_kernel(
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
    out: tl.tensor,  # (batch, seqlen_q, num_heads, head_dim), dense
    softmax_lse: tl.tensor,  # (batch, num_heads, seqlen_q)
    batch: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    num_heads: tl.tensor,
    group: tl.tensor,  # num_heads / num_kv_heads
    query_tiles: tl.tensor,
    softmax_scale: tl.tensor,
    kMaxBound: tl.constexpr,  # bounded softmax up to here
    kCausal: tl.constexpr,
    kQueries: tl.constexpr,
    kKeys: tl.constexpr,
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,  # head_dim, padded
) -> None:
    kBiased: tl.constexpr = alibi_slopes is not None
    if num_keys is not None:
        seqlen_k = tl.minimum(tl.maximum(tl.load(num_keys), 0), seqlen_k)
    index = tl.program_id(0)
    head = num_heads - 1 - index % num_heads
    index //= num_heads
    entry = (index % batch).to(tl.int64)
    query = (query_tiles - 1 - index // batch) * kQueries + tl.arange(0, kQueries)
    exists = query < seqlen_q
    if key_start is not None:
        key_start += entry * seqlen_q
    q += entry * q_batch + head.to(tl.int64) * q_head
    k += entry * k_batch + (head // group).to(tl.int64) * k_head
    v += entry * v_batch + (head // group).to(tl.int64) * v_head

    slope, bound, window = describe_head(alibi_slopes, logit_bound, head)
    position, first, end = describe_rows(key_start, query, seqlen_q, seqlen_k, kCausal)
    begin, stop, unmasked_begin, unmasked_end = range_of_keys(position, first, end, exists, window)
    raw_slope = tl.full((kQueries,), slope / softmax_scale, tl.float32)
    q_tile = load_rows(q, q_seq, query, seqlen_q, kHeadDim, kChannels, False)

    # A biased row that does not see its own key may have only tiny weights.
    fit = sees_itself(position, first, end) | (first >= end) | (slope == 0.0)
    if logit_bound is not None and (bound <= kMaxBound) & (tl.min(fit.to(tl.int32), 0) != 0):
        sums, sum, divisor, exponent = sum_tiles(
            q_tile,
            k,
            k_seq,
            v,
            v_seq,
            begin // kKeys,
            tl.cdiv(stop, kKeys),
            unmasked_begin,
            unmasked_end,
            seqlen_k,
            position,
            first,
            end,
            raw_slope,
            softmax_scale,
            kQueries,
            kKeys,
            kHeadDim,
            kChannels,
            kCausal,
            kBiased,
            True,
        )
    else:
        sums, sum, divisor, exponent = sum_tiles(
            q_tile,
            k,
            k_seq,
            v,
            v_seq,
            begin // kKeys,
            tl.cdiv(stop, kKeys),
            unmasked_begin,
            unmasked_end,
            seqlen_k,
            position,
            first,
            end,
            raw_slope,
            softmax_scale,
            kQueries,
            kKeys,
            kHeadDim,
            kChannels,
            kCausal,
            kBiased,
            False,
        )

    row = entry * num_heads + head
    tl.store(softmax_lse + row * seqlen_q + query, log_sum_exp(sum, exponent), mask=exists)
    channel = tl.arange(0, kChannels)
    address = out + ((entry * seqlen_q + query)[:, None] * num_heads + head) * kHeadDim + channel[None, :]
    tl.store(
        address,
        (sums * inverse(divisor)[:, None]).to(q_tile.dtype),
        mask=exists[:, None] & (channel < kHeadDim)[None, :],
    )
