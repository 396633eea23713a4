"""attention, backward (docs/model.md#16.3), in two passes without atomics: every sum has one owner and a fixed order.

    P  = 2^(softmax_scale_log2 * q k^T + bias - lse)      recomputed; log-sum-exps and biases in base 2
    dP = dout v^T,   delta = <dout, out>,   dS = P * (dP - delta)
    dq = softmax_scale * dS k,   dk = softmax_scale * dS^T q,   dv = P^T dout

    pass 1: a program owns a tile of queries of one head      pass 2: a program owns a tile of keys, and of the query
            and walks over the tiles of keys that they see            heads of its key head a share; it walks head by
                                                                      head over the tiles of queries that see the keys
                 keys                                                  queries of head 0, of head 1 ...
               +----+----+----+                                        +----+----+----+----+----+
       queries |    |    |    | -> dq, delta                      keys |    |    |    |    |    | -> dk, dv
               +----+----+----+                                        +----+----+----+----+----+

Keys are the rows of pass 2, S^T = k q^T and dP^T = v dout^T: P^T and dS^T are then left operands of the next products
as they are. (The transpose of a result as an operand costs ten times the stack memory, and some Triton compilers get
it wrong.) Where several shares have the same keys, their dk and dv are float32, and a third kernel adds them.

Seven products of a tile instead of the five of a single pass, which would need atomic additions to dq or an order of
them. Tiles of which a row does not see all keys are masked, in a loop of their own. There, operands that are not finite
are replaced, because the zeros of masked weights would make NaN of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.triton_kernels import launch, tiles
from andromeda.triton_kernels.attention_tile import (
    describe_head,
    describe_rows,
    is_finite,
    kUnlimited,
    load_rows,
    masked_tile,
    range_of_keys,
)

_kLog2E = tl.constexpr(1.44269504088896340736)
_kInfinity = tl.constexpr(float("inf"))

# The smallest float16 is 2^-24, but a key may have nothing but small weights and small gradients. So both are
# multiplied by powers of two before they are rounded, and their sums are divided by them. A weight is at most 1.
_kWeightExponent = tl.constexpr(15)
# A row's gradients are multiplied by the power that brings the largest so far to 2^14 ... 2^15, at most by 2^24. The
# state of a row is the exponent of this largest one, with the bias of float32.
_kFirstExponent = tl.constexpr(127 + 14 - 24)

# kSplit, below: the bias of a tile is the sum of a row's part and a column's part, which costs one operation per score
# less than their distance. Not without a causal mask, where the bias falls on both sides of the diagonal, and not in
# float32, where the rounding of the parts would show.


@triton.jit
def _power_of_two(exponent: tl.tensor) -> tl.tensor:
    """2^exponent, exactly; below the smallest normal number 0."""
    return (tl.maximum(exponent + 127, 0) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scale_gradients(
    ds: tl.tensor, sums: tl.tensor, exponent: tl.tensor, kIsFloat16: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Scale a tile of dS for the rounding to float16, and the sums of earlier tiles where the scale of a row falls.

    An infinity ruins only its own row.
    """
    if kIsFloat16:
        largest = tl.max(tl.abs(ds), 1).to(tl.int32, bitcast=True) >> 23
        largest = tl.maximum(exponent, largest)
        sums = sums * _power_of_two(exponent - largest)[:, None]
        ds = ds * _power_of_two(127 + 14 - largest)[:, None]
        exponent = largest
    return ds, sums, exponent


@triton.jit
def _unscaled(sums: tl.tensor, exponent: tl.tensor, kIsFloat16: tl.constexpr) -> tl.tensor:
    if kIsFloat16:
        sums = sums * _power_of_two(exponent - (127 + 14))[:, None]
    return sums


@triton.jit
def _store_query_rows(
    rows: tl.tensor,
    query: tl.tensor,
    seqlen_q: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
) -> None:
    """What pass 2 must know of query rows: four words of each, so that it loads those of a tile at once.

    A vector for the rows of a tile has fewer elements than the program has threads. Triton then loads each number in
    every thread that needs it: 32 of 540 instructions of the loop, instead of one.
    """
    exists = query < seqlen_q
    words = rows + 4 * query.to(tl.int64)
    tl.store(words, lse.to(tl.int32, bitcast=True), mask=exists)
    tl.store(words + 1, delta.to(tl.int32, bitcast=True), mask=exists)
    tl.store(words + 2, first, mask=exists)
    tl.store(words + 3, end, mask=exists)


@triton.jit
def _word(tile: tl.tensor, kIndex: tl.constexpr) -> tl.tensor:
    """One of the four words of each row."""
    return tl.sum(tl.where(tl.arange(0, 4)[None, :] == kIndex, tile, 0), 1)


@triton.jit
def _finite(tile: tl.tensor) -> tl.tensor:
    return tl.where(is_finite(tile), tile, tl.zeros_like(tile))


@triton.jit
def _add_to_dq(
    dq: tl.tensor,
    exponent: tl.tensor,
    q_tile: tl.tensor,
    dout_tile: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    slope: tl.tensor,  # in base 2 if kSplit
    softmax_scale_log2: tl.tensor,
    tile: tl.tensor,
    seqlen_k: tl.tensor,
    kKeys: tl.constexpr,
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,
    kBiased: tl.constexpr,
    kSplit: tl.constexpr,
    kIsMasked: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """One tile of keys: dq += dS k. Rows are queries, columns are keys."""
    kIsFloat16: tl.constexpr = k.dtype.element_ty == tl.float16
    key = tile * kKeys + tl.arange(0, kKeys)
    k_tile = load_rows(k, k_stride, key, seqlen_k, kHeadDim, kChannels, not kIsMasked)
    v_tile = load_rows(v, v_stride, key, seqlen_k, kHeadDim, kChannels, not kIsMasked)
    log2_weights = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * softmax_scale_log2
    column = tl.arange(0, kKeys).to(tl.float32)
    distance = (tile * kKeys - position).to(tl.float32)
    if kBiased and kSplit:
        log2_weights += (slope * distance - lse)[:, None] + (slope * column)[None, :]
    elif kBiased:  # here the slope and lse are natural: their difference is one rounding, and small
        log2_weights += (-slope * tl.abs(distance[:, None] + column[None, :]) - lse[:, None]) * _kLog2E
    else:
        log2_weights -= lse[:, None]
    ds = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee") - delta[:, None]
    if kIsMasked:
        visible = (first[:, None] <= key[None, :]) & (key[None, :] < end[:, None])
        log2_weights = tl.where(visible, log2_weights, -_kInfinity)
        ds = tl.where(visible, ds, 0.0)
        k_tile = _finite(k_tile)
    ds *= tl.exp2(log2_weights)
    ds, dq, exponent = _scale_gradients(ds, dq, exponent, kIsFloat16)
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee"), exponent


@triton.jit(do_not_specialize=["batch", "num_heads", "group", "seqlen_q", "seqlen_k"])
def attention_backward_dq_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    dout: tl.tensor,
    softmax_lse: tl.tensor,  # (batch, num_heads, seqlen_q)
    alibi_slopes: tl.tensor,
    logit_bound: tl.tensor,
    key_start: tl.tensor,
    dq: tl.tensor,
    rows: tl.tensor,  # (batch, num_heads, seqlen_q, 4), int32: `_store_query_rows`
    q_batch: tl.tensor,
    q_seq: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_seq: tl.tensor,
    k_head: tl.tensor,
    v_batch: tl.tensor,
    v_seq: tl.tensor,
    v_head: tl.tensor,
    out_batch: tl.tensor,
    out_seq: tl.tensor,
    out_head: tl.tensor,
    dout_batch: tl.tensor,
    dout_seq: tl.tensor,
    dout_head: tl.tensor,
    dq_batch: tl.tensor,
    dq_seq: tl.tensor,
    dq_head: tl.tensor,
    softmax_scale: tl.tensor,
    batch: tl.tensor,
    num_heads: tl.tensor,
    group: tl.tensor,  # query heads of a key head
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    kCausal: tl.constexpr,
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,
    kQueries: tl.constexpr,
    kKeys: tl.constexpr,
    kMaskedKeys: tl.constexpr,
    kColumns: tl.constexpr,  # kQueries of pass 2
) -> None:
    """Pass 1: dq of a tile of queries, and what pass 2 must know of its rows."""
    kIsFloat16: tl.constexpr = q.dtype.element_ty == tl.float16
    kBiased: tl.constexpr = alibi_slopes is not None
    kSplit: tl.constexpr = kCausal and q.dtype.element_ty != tl.float32
    # Without a split, the difference of the bias and lse is formed before the base changes: both may be large.
    kLog2OfBase: tl.constexpr = 1.0 if kBiased and not kSplit else _kLog2E
    # The longest work comes first: under a causal mask the last queries see most keys, and heads without a bias are
    # usually last.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    entry = (program % batch).to(tl.int64)
    head = program // batch % num_heads
    query = program // batch // num_heads * kQueries + tl.arange(0, kQueries)
    q += entry * q_batch + head.to(tl.int64) * q_head
    out += entry * out_batch + head.to(tl.int64) * out_head
    dout += entry * dout_batch + head.to(tl.int64) * dout_head
    dq += entry * dq_batch + head.to(tl.int64) * dq_head
    k += entry * k_batch + (head // group).to(tl.int64) * k_head
    v += entry * v_batch + (head // group).to(tl.int64) * v_head
    softmax_lse += (entry * num_heads + head) * seqlen_q
    rows += (entry * num_heads + head) * seqlen_q * 4
    if key_start is not None:
        key_start += entry * seqlen_q

    exists = query < seqlen_q
    slope, _, window = describe_head(alibi_slopes, logit_bound, head)
    slope, softmax_scale_log2 = slope * kLog2OfBase, softmax_scale * _kLog2E
    position, first, end = describe_rows(key_start, query, seqlen_q, seqlen_k, kCausal)
    key_begin, key_end, bare_begin, bare_end = range_of_keys(position, first, end, exists, window)
    begin_tile, end_tile = key_begin // kKeys, tl.cdiv(key_end, kKeys)
    bare_first = tl.minimum(tl.maximum(tl.cdiv(bare_begin, kKeys), begin_tile), end_tile)
    bare_last = tl.minimum(tl.maximum(bare_end // kKeys, bare_first), end_tile)

    dout_tile = load_rows(dout, dout_seq, query, seqlen_q, kHeadDim, kChannels, False)
    out_tile = load_rows(out, out_seq, query, seqlen_q, kHeadDim, kChannels, False)
    # Products of their own: one that is fused with the addition of another lane's sum would give each lane other bits.
    zero = tl.zeros((kQueries, kChannels), tl.float32)
    delta = tl.sum(tl.fma(dout_tile.to(tl.float32), out_tile.to(tl.float32), zero), 1)
    delta = tl.where(delta == delta, delta, float("nan"))  # one NaN of the many: lanes add in different orders
    lse = tl.load(softmax_lse + query, mask=exists, other=0.0) * kLog2OfBase
    column_lse = lse  # as pass 2 adds it to a column
    if kBiased and kSplit:
        column_lse += slope * (query % kColumns).to(tl.float32)
    if kIsFloat16:
        column_lse -= _kWeightExponent * (kLog2OfBase / _kLog2E)
    _store_query_rows(rows, query, seqlen_q, column_lse, delta, first, end)
    q_tile = load_rows(q, q_seq, query, seqlen_q, kHeadDim, kChannels, False)

    sums = tl.zeros((kQueries, kChannels), tl.float32)
    exponent = tl.full((kQueries,), _kFirstExponent, tl.int32)
    kParts: tl.constexpr = kKeys // kMaskedKeys
    for index in tl.range(0, (end_tile - begin_tile - (bare_last - bare_first)) * kParts, num_stages=1):
        tile = masked_tile(index // kParts, bare_first, bare_last, end_tile) * kParts + index % kParts
        sums, exponent = _add_to_dq(
            sums, exponent, q_tile, dout_tile, lse, delta, position, first, end, k, v, k_seq, v_seq, slope,
            softmax_scale_log2, tile, seqlen_k, kMaskedKeys, kHeadDim, kChannels, kBiased, kSplit, True,
        )  # fmt: skip
    for tile in range(bare_first, bare_last):
        sums, exponent = _add_to_dq(
            sums, exponent, q_tile, dout_tile, lse, delta, position, first, end, k, v, k_seq, v_seq, slope,
            softmax_scale_log2, tile, seqlen_k, kKeys, kHeadDim, kChannels, kBiased, kSplit, False,
        )  # fmt: skip
    sums = _unscaled(sums, exponent, kIsFloat16) * softmax_scale
    _store_rows(dq, dq_seq, query, seqlen_q, sums, kHeadDim, kChannels)


@triton.jit
def _store_rows(
    data: tl.tensor,
    stride: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    numbers: tl.tensor,
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,
) -> None:
    channel = tl.arange(0, kChannels)
    address = data + row.to(tl.int64)[:, None] * stride + channel[None, :]
    numbers = numbers.to(data.dtype.element_ty)
    if kHeadDim == kChannels:
        tl.store(address, numbers, mask=(row < count)[:, None])
    else:
        tl.store(address, numbers, mask=(row < count)[:, None] & (channel < kHeadDim)[None, :])


@triton.jit
def _rows_of_keys(
    key_start: tl.tensor,
    key: tl.tensor,
    seqlen_q: tl.tensor,
    shift: tl.tensor,
    kKeys: tl.constexpr,
    kCausal: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """What `key_start` (or None) says about the queries of the keys key ... key + kKeys - 1, for all heads:

    seen_end: the end of the queries that see one of them;
    bare_end: the end of the first queries that see all of them;
    free_begin, free_end: without a causal mask, the range of the queries that no window limits: they do not see their
        own key.
    """
    kRows: tl.constexpr = 1024
    free_begin, free_end = kUnlimited, 0
    if not kCausal:
        free_end = tl.maximum(-shift, 0)  # their positions are before the first key
        free_begin = tl.where(free_end > 0, 0, kUnlimited)
    if key_start is None:
        return seqlen_q, seqlen_q, free_begin, free_end
    else:
        seen = tl.zeros((kRows,), tl.int32)
        bare = tl.full((kRows,), kUnlimited, tl.int32)
        begin_free, end_free = bare, seen
        for start in range(0, seqlen_q, kRows):
            query = start + tl.arange(0, kRows)
            exists = query < seqlen_q
            first = tl.load(key_start + query, mask=exists, other=0)
            sees = exists & (first < key + kKeys)
            seen = tl.where(sees, query + 1, seen)
            bare = tl.minimum(bare, tl.where(exists & (first > key), query, kUnlimited))
            if not kCausal:
                is_free = sees & (first > query + shift)
                begin_free = tl.minimum(begin_free, tl.where(is_free, query, kUnlimited))
                end_free = tl.where(is_free, query + 1, end_free)
        if not kCausal:
            free_begin = tl.minimum(free_begin, tl.min(begin_free, 0))
            free_end = tl.maximum(free_end, tl.max(end_free, 0))
        return tl.max(seen, 0), tl.minimum(tl.min(bare, 0), seqlen_q), free_begin, free_end


@triton.jit
def _add_to_dk_dv(
    dk: tl.tensor,
    dv: tl.tensor,
    exponent: tl.tensor,
    k_tile: tl.tensor,
    v_tile: tl.tensor,
    key: tl.tensor,
    q: tl.tensor,
    dout: tl.tensor,
    rows: tl.tensor,
    q_stride: tl.tensor,
    dout_stride: tl.tensor,
    slope: tl.tensor,  # in base 2 if kSplit
    softmax_scale_log2: tl.tensor,
    tile: tl.tensor,
    seqlen_q: tl.tensor,
    shift: tl.tensor,
    kTile: tl.constexpr,  # queries of a tile that needs no mask
    kQueries: tl.constexpr,
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,
    kBiased: tl.constexpr,
    kSplit: tl.constexpr,
    kIsMasked: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """One tile of queries: dv += P^T dout, dk += dS^T q. Rows are keys, columns are queries."""
    kIsFloat16: tl.constexpr = q.dtype.element_ty == tl.float16
    query = tile * kQueries + tl.arange(0, kQueries)
    q_tile = load_rows(q, q_stride, query, seqlen_q, kHeadDim, kChannels, not kIsMasked)
    dout_tile = load_rows(dout, dout_stride, query, seqlen_q, kHeadDim, kChannels, not kIsMasked)
    place = rows + 4 * query.to(tl.int64)[:, None] + tl.arange(0, 4)[None, :]
    if kIsMasked:
        words = tl.load(place, mask=(query < seqlen_q)[:, None], other=0)  # a row that does not exist sees no key
    else:
        words = tl.load(place)
    lse = _word(words, 0).to(tl.float32, bitcast=True)
    delta = _word(words, 1).to(tl.float32, bitcast=True)
    weights = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * softmax_scale_log2
    if kBiased:
        # From the first position of the whole tile that this one may be a part of.
        distance = (key - (tile * kQueries // kTile * kTile + shift)).to(tl.float32)
        if kSplit:  # the part of the columns is in lse
            weights += (slope * distance)[:, None] - lse[None, :]
        else:
            column = (query % kTile).to(tl.float32)
            weights += (-slope * tl.abs(distance[:, None] - column[None, :]) - lse[None, :]) * _kLog2E
    else:
        weights -= lse[None, :]
    ds = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee") - delta[None, :]
    if kIsMasked:
        visible = (_word(words, 2)[None, :] <= key[:, None]) & (key[:, None] < _word(words, 3)[None, :])
        weights = tl.exp2(tl.where(visible, weights, -_kInfinity))
        ds = tl.where(visible, ds, 0.0)
        weights += 0.0 * ds  # puts a NaN where a gradient is not finite: the product reads a 0 instead
        q_tile, dout_tile = _finite(q_tile), _finite(dout_tile)
    else:
        weights = tl.exp2(weights)
    dv = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
    ds *= weights
    ds, dk, exponent = _scale_gradients(ds, dk, exponent, kIsFloat16)
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv, exponent


@triton.jit(do_not_specialize=["batch", "num_heads", "num_kv_heads", "num_shares", "seqlen_q", "seqlen_k"])
def attention_backward_dk_dv_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    dout: tl.tensor,
    rows: tl.tensor,  # of pass 1
    alibi_slopes: tl.tensor,
    logit_bound: tl.tensor,
    key_start: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    q_batch: tl.tensor,
    q_seq: tl.tensor,
    q_head: tl.tensor,
    k_batch: tl.tensor,
    k_seq: tl.tensor,
    k_head: tl.tensor,
    v_batch: tl.tensor,
    v_seq: tl.tensor,
    v_head: tl.tensor,
    dout_batch: tl.tensor,
    dout_seq: tl.tensor,
    dout_head: tl.tensor,
    dk_share: tl.tensor,  # from one share to the next
    dk_batch: tl.tensor,
    dk_seq: tl.tensor,
    dk_head: tl.tensor,
    dv_share: tl.tensor,
    dv_batch: tl.tensor,
    dv_seq: tl.tensor,
    dv_head: tl.tensor,
    softmax_scale: tl.tensor,
    batch: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    num_shares: tl.tensor,
    seqlen_q: tl.tensor,
    seqlen_k: tl.tensor,
    kCausal: tl.constexpr,
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,
    kKeys: tl.constexpr,
    kQueries: tl.constexpr,
    kMaskedQueries: tl.constexpr,
) -> None:
    """Pass 2: dk and dv of a tile of keys, summed over a share of the query heads of a key head."""
    kIsFloat16: tl.constexpr = q.dtype.element_ty == tl.float16
    kBiased: tl.constexpr = alibi_slopes is not None
    kSplit: tl.constexpr = kCausal and q.dtype.element_ty != tl.float32
    # Without a split, the difference of the bias and lse is formed before the base changes: both may be large.
    kLog2OfBase: tl.constexpr = 1.0 if kBiased and not kSplit else _kLog2E
    # The longest work comes first: under a causal mask most queries see the first keys.
    program = tl.program_id(0)
    entry = (program % batch).to(tl.int64)
    kv_head = program // batch % num_kv_heads
    share = program // batch // num_kv_heads % num_shares
    first_key = program // batch // num_kv_heads // num_shares * kKeys
    key = first_key + tl.arange(0, kKeys)
    group = num_heads // num_kv_heads
    k += entry * k_batch + kv_head.to(tl.int64) * k_head
    v += entry * v_batch + kv_head.to(tl.int64) * v_head
    dk += share.to(tl.int64) * dk_share + entry * dk_batch + kv_head.to(tl.int64) * dk_head
    dv += share.to(tl.int64) * dv_share + entry * dv_batch + kv_head.to(tl.int64) * dv_head
    if key_start is not None:
        key_start += entry * seqlen_q

    shift = seqlen_k - seqlen_q  # position of query 0
    seen_end, bare_end, free_begin, free_end = _rows_of_keys(key_start, first_key, seqlen_q, shift, kKeys, kCausal)
    k_tile = load_rows(k, k_seq, key, seqlen_k, kHeadDim, kChannels, False)
    v_tile = load_rows(v, v_seq, key, seqlen_k, kHeadDim, kChannels, False)
    dk_sums = tl.zeros((kKeys, kChannels), tl.float32)
    dv_sums = tl.zeros((kKeys, kChannels), tl.float32)
    exponent = tl.full((kKeys,), _kFirstExponent, tl.int32)
    kParts: tl.constexpr = kQueries // kMaskedQueries
    for head in tl.range(kv_head * group + share, kv_head * group + group, num_shares):
        head_q = q + entry * q_batch + head.to(tl.int64) * q_head
        head_dout = dout + entry * dout_batch + head.to(tl.int64) * dout_head
        head_rows = rows + (entry * num_heads + head) * seqlen_q * 4
        slope, _, window = describe_head(alibi_slopes, logit_bound, head)
        slope, softmax_scale_log2 = slope * kLog2OfBase, softmax_scale * _kLog2E

        # The queries that see a key, and those that see all keys.
        last_key = tl.minimum(first_key + kKeys, seqlen_k) - 1
        if kCausal:
            begin = first_key - shift
            bare_begin = last_key - shift
        else:
            begin = tl.minimum(first_key - window + 1 - shift, free_begin)
            bare_begin = 0
        query_end = tl.maximum(last_key - shift + window, free_end)
        query_end = tl.minimum(query_end, seen_end)
        begin_tile, end_tile = tl.maximum(begin, 0) // kQueries, tl.cdiv(query_end, kQueries)
        end_tile = tl.maximum(end_tile, begin_tile)
        bare_first = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(bare_begin, 0), kQueries), begin_tile), end_tile)
        bare_last = tl.minimum(tl.maximum(bare_end // kQueries, bare_first), end_tile)
        for index in tl.range(0, (end_tile - begin_tile - (bare_last - bare_first)) * kParts, num_stages=1):
            tile = masked_tile(index // kParts, bare_first, bare_last, end_tile) * kParts + index % kParts
            dk_sums, dv_sums, exponent = _add_to_dk_dv(
                dk_sums, dv_sums, exponent, k_tile, v_tile, key, head_q, head_dout, head_rows, q_seq, dout_seq,
                slope, softmax_scale_log2, tile, seqlen_q, shift, kQueries, kMaskedQueries,
                kHeadDim, kChannels, kBiased, kSplit, True,
            )  # fmt: skip
        for tile in range(bare_first, bare_last):
            dk_sums, dv_sums, exponent = _add_to_dk_dv(
                dk_sums, dv_sums, exponent, k_tile, v_tile, key, head_q, head_dout, head_rows, q_seq, dout_seq,
                slope, softmax_scale_log2, tile, seqlen_q, shift, kQueries, kQueries,
                kHeadDim, kChannels, kBiased, kSplit, False,
            )  # fmt: skip
    dk_sums = _unscaled(dk_sums, exponent, kIsFloat16) * softmax_scale
    if kIsFloat16:
        dk_sums *= 1.0 / (1 << _kWeightExponent)
        dv_sums *= 1.0 / (1 << _kWeightExponent)
    _store_rows(dk, dk_seq, key, seqlen_k, dk_sums, kHeadDim, kChannels)
    _store_rows(dv, dv_seq, key, seqlen_k, dv_sums, kHeadDim, kChannels)


@triton.jit(do_not_specialize=["num_rows", "num_kv_heads", "num_shares", "seqlen_k"])
def attention_backward_sum_kernel(
    dk_shares: tl.tensor,  # (num_shares, batch, seqlen_k, num_kv_heads, kHeadDim), float32, dense
    dv_shares: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    dk_batch: tl.tensor,
    dk_seq: tl.tensor,
    dk_head: tl.tensor,
    dv_batch: tl.tensor,
    dv_seq: tl.tensor,
    dv_head: tl.tensor,
    num_rows: tl.tensor,  # batch * seqlen_k * num_kv_heads
    num_kv_heads: tl.tensor,
    num_shares: tl.tensor,
    seqlen_k: tl.tensor,
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,
    kRows: tl.constexpr,
) -> None:
    """Add the results of all shares, in ascending order, and round once."""
    row = tl.program_id(0).to(tl.int64) * kRows + tl.arange(0, kRows)
    channel = tl.arange(0, kChannels)
    inside = (row < num_rows)[:, None] & (channel < kHeadDim)[None, :]
    place = row[:, None] * kHeadDim + channel[None, :]
    dk_sums = tl.zeros((kRows, kChannels), tl.float32)
    dv_sums = tl.zeros((kRows, kChannels), tl.float32)
    for _ in range(num_shares):
        dk_sums += tl.load(dk_shares + place, mask=inside, other=0.0)
        dv_sums += tl.load(dv_shares + place, mask=inside, other=0.0)
        place += num_rows.to(tl.int64) * kHeadDim
    kv_head = row % num_kv_heads
    key = row // num_kv_heads % seqlen_k
    entry = row // num_kv_heads // seqlen_k
    dk += (entry * dk_batch + key * dk_seq + kv_head * dk_head)[:, None] + channel[None, :]
    dv += (entry * dv_batch + key * dv_seq + kv_head * dv_head)[:, None] + channel[None, :]
    tl.store(dk, dk_sums.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv, dv_sums.to(dv.dtype.element_ty), mask=inside)


# Programs of pass 2 per multiprocessor: two are resident at a time, and two rounds balance their work, which differs
# with masks and windows.
_PROGRAMS_PER_MULTIPROCESSOR = 4
_SUM_ROWS = 16


def num_shares_of(num_programs: int, group: int, num_multiprocessors: int) -> int:
    """The number of equal shares of the query heads of a key head: the smallest divisor that fills the device.

    num_programs: those of pass 2 with one share.
    """
    wanted = num_multiprocessors * _PROGRAMS_PER_MULTIPROCESSOR
    return next((n for n in range(1, group) if group % n == 0 and n * num_programs >= wanted), group)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    logit_bound: Tensor | None,
    key_start: Tensor | None,
    out: Tensor,
    softmax_lse: Tensor,
    causal: bool,
    softmax_scale: float,
    *,
    dout: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """Write dq, dk and dv. No tensor is empty; the last dimensions are dense."""
    batch, seqlen_q, num_heads, head_dim = q.shape
    _, seqlen_k, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    channels = tiles.padded_channels(head_dim)
    architecture = launch.architecture(q.device)
    assert architecture is not None  # the caller has asked
    of_queries = tiles.choose(tiles.ATTENTION_BACKWARD_DQ, architecture, q.itemsize, channels)
    of_keys = tiles.choose(tiles.ATTENTION_BACKWARD_DK_DV, architecture, q.itemsize, channels)
    rows = q.new_empty((batch, num_heads, seqlen_q, 4), dtype=torch.int32)
    attention_backward_dq_kernel[(triton.cdiv(seqlen_q, of_queries.rows) * num_heads * batch,)](
        q,
        k,
        v,
        out,
        dout,
        softmax_lse,
        alibi_slopes,
        logit_bound,
        key_start,
        dq,
        rows,
        *_strides(q, k, v, out, dout, dq),
        softmax_scale,
        batch,
        num_heads,
        group,
        seqlen_q,
        seqlen_k,
        kCausal=causal,
        kHeadDim=head_dim,
        kChannels=channels,
        kQueries=of_queries.rows,
        kKeys=of_queries.keys,
        kMaskedKeys=min(of_queries.keys, tiles.ATTENTION_BACKWARD_MASKED),
        kColumns=of_keys.rows,
        num_warps=of_queries.num_warps,
        num_stages=of_queries.num_stages,
        **launch.OPTIONS,
    )

    num_programs = triton.cdiv(seqlen_k, of_keys.keys) * num_kv_heads * batch
    num_shares = num_shares_of(num_programs, group, launch.multiprocessors())
    dk_shares, dv_shares = dk[None], dv[None]
    if num_shares > 1:
        dk_shares, dv_shares = (k.new_empty((num_shares, *k.shape), dtype=torch.float32) for _ in range(2))
    attention_backward_dk_dv_kernel[(num_programs * num_shares,)](
        q,
        k,
        v,
        dout,
        rows,
        alibi_slopes,
        logit_bound,
        key_start,
        dk_shares,
        dv_shares,
        *_strides(q, k, v, dout),
        *dk_shares.stride()[:4],
        *dv_shares.stride()[:4],
        softmax_scale,
        batch,
        num_heads,
        num_kv_heads,
        num_shares,
        seqlen_q,
        seqlen_k,
        kCausal=causal,
        kHeadDim=head_dim,
        kChannels=channels,
        kKeys=of_keys.keys,
        kQueries=of_keys.rows,
        kMaskedQueries=min(of_keys.rows, tiles.ATTENTION_BACKWARD_MASKED),
        num_warps=of_keys.num_warps,
        num_stages=of_keys.num_stages,
        **launch.OPTIONS,
    )
    if num_shares > 1:
        num_key_rows = batch * seqlen_k * num_kv_heads
        attention_backward_sum_kernel[(triton.cdiv(num_key_rows, _SUM_ROWS),)](
            dk_shares,
            dv_shares,
            dk,
            dv,
            *_strides(dk, dv),
            num_key_rows,
            num_kv_heads,
            num_shares,
            seqlen_k,
            kHeadDim=head_dim,
            kChannels=channels,
            kRows=_SUM_ROWS,
            **launch.OPTIONS,
        )


def _strides(*tensors: Tensor) -> list[int]:
    """(batch, seq, head) of each."""
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]
