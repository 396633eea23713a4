"""What the attention kernels share: the keys that a row sees, a head's bias and window, one tile of keys.

A program owns rows: queries of one head, or for few queries those of all heads that share a key head. Each row has a
position, a slope and an interval of keys, so the same code serves both. Keys come in tiles:

    first tile                                      end tile      per row
    | some rows |          all rows          | some rows |        position, slope, first and end of its keys, window
    |  masked   |  bare                      |  masked   |        output, float32; sums of its weights; their maximum

`sum_tiles` takes the masked tiles first, those at the end before those at the beginning, and then the bare ones: two
loops, of which only the second matters for speed. Scores are in units of <q, k>: the bias is divided by softmax_scale,
so that the accumulator of the product can start from it (docs/attention.md#alibi). The weight of a score is

    e^(score * softmax_scale - exponent of the row)

where the exponent is that of the row's largest score so far, or 0 with a small bound
(docs/attention.md#bounded-softmax).
"""

import triton
import triton.language as tl

kOnes = tl.constexpr(16)  # columns of ones: the fewest that a product may have
kUnlimited = tl.constexpr(2**30)  # more than any number of keys; twice that still fits in 32 bits
kLn2 = tl.constexpr(0.6931471805599453)
_kInfinity = tl.constexpr(float("inf"))
_kSkippedNats = tl.constexpr(16.635532333438686)  # 24 ln 2: keys beyond a window hold less than 2^-24 of a row


@triton.jit
def describe_head(alibi_slopes: tl.tensor, logit_bound: tl.tensor, head: tl.tensor) -> tuple[tl.tensor, ...]:
    """The slope per key, the bound of |softmax_scale <q, k>| (infinite if unknown) and the window of heads.

    Keys at the distance `window` or farther together hold less than 2^-24 of a row that sees its own key
    (docs/attention.md#windows). alibi_slopes and logit_bound may be None.
    """
    slope = tl.full((), 0.0, tl.float32)
    bound = tl.full((), _kInfinity, tl.float32)
    window = tl.full((), kUnlimited, tl.int32)
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head)
    if logit_bound is not None:
        bound = tl.load(logit_bound + head)
        bound = tl.where(bound >= 0.0, bound, _kInfinity)  # a NaN is no bound
        if alibi_slopes is not None:
            # Rounded up, plus one: float32 is not exact, and a key too many is harmless.
            distance = tl.ceil((2.0 * bound + _kSkippedNats) / slope) + 1.0
            window = tl.where((slope > 0.0) & (distance < 1e9), distance, kUnlimited).to(tl.int32)
    return slope, bound, window


@triton.jit
def describe_rows(
    key_start: tl.tensor, query: tl.tensor, seqlen_q: tl.tensor, seqlen_k: tl.tensor, kCausal: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """The position of query rows among the keys, and the first and the end of the keys that each sees.

    key_start: that of the batch entry's first query, or None. A row without a key gets kUnlimited and 0: it is masked
    in every tile. A row that does not exist sees every key: its result is dropped, and it must not force a mask on the
    other rows.
    """
    exists = query < seqlen_q
    position = query + (seqlen_k - seqlen_q)
    first = tl.zeros_like(query)
    end = first + seqlen_k
    if key_start is not None:
        first = tl.maximum(tl.load(key_start + query, mask=exists, other=0), 0)
    if kCausal:
        end = tl.where(exists, tl.minimum(end, position + 1), end)
    empty = first >= end
    return position, tl.where(empty, kUnlimited, first), tl.where(empty, 0, end)


@triton.jit
def sees_itself(position: tl.tensor, first: tl.tensor, end: tl.tensor) -> tl.tensor:
    return (first <= position) & (position < end)


@triton.jit
def range_of_keys(
    position: tl.tensor, first: tl.tensor, end: tl.tensor, exists: tl.tensor, window: tl.tensor
) -> tuple[tl.tensor, ...]:
    """The keys of rows together: (begin, end, unmasked_begin, unmasked_end).

    Some row sees the keys from `begin` to `end`, less those beyond its window: tiles outside are skipped. All rows see
    the keys from `unmasked_begin` to `unmasked_end`: tiles inside need no mask. The window only skips whole tiles: a
    row may see more keys than its window has. A row that does not see its own key has none.
    """
    limited = sees_itself(position, first, end) & (window < kUnlimited)
    begin = tl.where(limited, tl.maximum(first, position - window + 1), first)
    stop = tl.where(limited, tl.minimum(end, position + window), end)
    return (
        tl.min(tl.where(exists, begin, kUnlimited), 0),
        tl.max(tl.where(exists, stop, 0), 0),
        tl.max(tl.where(exists, first, 0), 0),
        tl.min(tl.where(exists, end, kUnlimited), 0),
    )


@triton.jit
def bias_of(
    raw_slope: tl.tensor, position: tl.tensor, key: tl.tensor, kKeys: tl.constexpr, kCausal: tl.constexpr
) -> tl.tensor:
    """-raw_slope * |position - j| for the keys j = key ... key + kKeys - 1, in tiles of rows by keys.

    Distances are exact: the row's part is computed in integers. (Without it, the absolute position would remain in the
    score, and its rounding in the weights.) Under a causal mask all visible keys are at or left of the diagonal, and
    the bias is linear: one multiply-add for each score.
    """
    column = tl.arange(0, kKeys).to(tl.float32)[None, :]
    distance = (key - position).to(tl.float32)
    if kCausal:
        return raw_slope[:, None] * column + (raw_slope * distance)[:, None]
    else:
        return -raw_slope[:, None] * tl.abs(column + distance[:, None])


@triton.jit
def load_rows(
    data: tl.tensor,
    stride: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,
    kAllExist: tl.constexpr,
) -> tl.tensor:
    """Rows `row` of a (count, kHeadDim) matrix in kChannels columns; what does not exist is 0.

    kAllExist: every row exists.
    """
    return load_at(data + row.to(tl.int64) * stride, row < count, kHeadDim, kChannels, kAllExist)


@triton.jit
def load_at(
    address: tl.tensor, exists: tl.tensor, kHeadDim: tl.constexpr, kChannels: tl.constexpr, kAllExist: tl.constexpr
) -> tl.tensor:
    """The same for rows that begin at an `address` each."""
    channel = tl.arange(0, kChannels)[None, :]
    address = address[:, None] + channel
    if kAllExist and kHeadDim == kChannels:
        return tl.load(address)
    elif kAllExist:
        return tl.load(address, mask=channel < kHeadDim, other=0.0)
    elif kHeadDim == kChannels:
        return tl.load(address, mask=exists[:, None], other=0.0)
    else:
        return tl.load(address, mask=exists[:, None] & (channel < kHeadDim), other=0.0)


@triton.jit
def is_finite(numbers: tl.tensor) -> tl.tensor:
    """Where numbers are neither infinite nor NaN."""
    return tl.abs(numbers.to(tl.float32)) < _kInfinity


@triton.jit
def add_not_finite(
    result: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    data: tl.tensor,
    stride: tl.tensor,
    key: tl.tensor,
    count: tl.tensor,
    kKeys: tl.constexpr,
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,
) -> tl.tensor:
    """result += the numbers of rows key ... key + kKeys - 1 of `data` that are not finite, in the rows that see them.

    A product with a hidden NaN or infinity would be NaN although its weight is 0. Tiles that a row must not see take
    this slow path if they are not finite: the product leaves these numbers out.
    """
    channel = tl.arange(0, kChannels)
    address = data + key.to(tl.int64) * stride + channel
    for row in range(key, tl.minimum(key + kKeys, count)):
        numbers = tl.load(address, mask=channel < kHeadDim, other=0.0)
        address += stride
        numbers = tl.where(is_finite(numbers), 0.0, numbers.to(tl.float32))
        result += tl.where(((first <= row) & (row < end))[:, None], numbers[None, :], 0.0)
    return result


@triton.jit
def masked_tile(index: tl.tensor, bare_first: tl.tensor, bare_end: tl.tensor, end_tile: tl.tensor) -> tl.tensor:
    """The masked tile of a number: those after the bare tiles, from the last on, then those before, likewise."""
    return tl.where(index < end_tile - bare_end, end_tile - 1 - index, bare_first - 1 - (index - (end_tile - bare_end)))


@triton.jit
def add_tile(
    out: tl.tensor,
    sum: tl.tensor,
    rounded_sum: tl.tensor,
    maximum: tl.tensor,
    q_tile: tl.tensor,
    k: tl.tensor,
    k_stride: tl.tensor,
    v: tl.tensor,
    v_stride: tl.tensor,
    tile: tl.tensor,
    seqlen_k: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    raw_slope: tl.tensor,
    softmax_scale_log2: tl.tensor,
    kKeys: tl.constexpr,
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,
    kCausal: tl.constexpr,
    kBiased: tl.constexpr,
    kBounded: tl.constexpr,
    kMasked: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """Adds the weights of one tile of keys, and their products with its values, to the sums of the rows."""
    key = tile * kKeys
    column = key + tl.arange(0, kKeys)
    k_tile = load_rows(k, k_stride, column, seqlen_k, kHeadDim, kChannels, not kMasked)

    if not kBiased:
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    elif q_tile.dtype == tl.float32:  # an accumulator that starts from a large bias would lose bits of the product
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        scores += bias_of(raw_slope, position, key, kKeys, kCausal)
    else:
        scores = tl.dot(q_tile, tl.trans(k_tile), bias_of(raw_slope, position, key, kKeys, kCausal))
    if kMasked:  # after the product: a NaN in a hidden key does not survive
        seen = (first[:, None] <= column[None, :]) & (column[None, :] < end[:, None])
        scores = tl.where(seen, scores, -_kInfinity)

    if kBounded:
        weights = tl.exp2(scores * softmax_scale_log2)
    else:
        before = maximum
        maximum = tl.maximum(maximum, tl.max(scores, 1))
        reference = tl.where(maximum == -_kInfinity, 0.0, maximum)  # before the first visible key, weights are 0
        rescale = tl.exp2((before - reference) * softmax_scale_log2)
        if q_tile.dtype == tl.float32:  # the difference is exact, a product of either would not be
            weights = tl.exp2((scores - reference[:, None]) * softmax_scale_log2)
        else:
            weights = tl.exp2(scores * softmax_scale_log2 - (reference * softmax_scale_log2)[:, None])
        out *= rescale[:, None]
        sum *= rescale
    sum += tl.sum(weights, 1)
    rounded = weights.to(q_tile.dtype)
    if kBounded and q_tile.dtype != tl.float32:  # as a product, which costs less than to convert them back
        rounded_sum = tl.dot(rounded, tl.full((kKeys, kOnes), 1.0, rounded.dtype), rounded_sum)

    v_tile = load_rows(v, v_stride, column, seqlen_k, kHeadDim, kChannels, not kMasked)
    if kMasked:
        finite = is_finite(v_tile)
        if tl.max(tl.max(tl.where(finite, 0, 1), 1), 0) != 0:
            out = add_not_finite(out, first, end, v, v_stride, key, seqlen_k, kKeys, kHeadDim, kChannels)
        v_tile = tl.where(finite, v_tile, tl.zeros_like(v_tile))
    out = tl.dot(rounded, v_tile, out, input_precision="ieee")
    return out, sum, rounded_sum, maximum


@triton.jit
def sum_tiles(
    q_tile: tl.tensor,
    k: tl.tensor,
    k_stride: tl.tensor,
    v: tl.tensor,
    v_stride: tl.tensor,
    first_tile: tl.tensor,
    end_tile: tl.tensor,
    unmasked_begin: tl.tensor,
    unmasked_end: tl.tensor,
    seqlen_k: tl.tensor,
    position: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    raw_slope: tl.tensor,
    softmax_scale: tl.tensor,
    kRows: tl.constexpr,
    kKeys: tl.constexpr,
    kHeadDim: tl.constexpr,
    kChannels: tl.constexpr,
    kCausal: tl.constexpr,
    kBiased: tl.constexpr,
    kBounded: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """The sums of rows over the tiles first_tile ... end_tile - 1: (out, sum, divisor, exponent).

    Weights are relative to e^exponent. out: weights * values. sum: of the weights. divisor: of the weights as they were
    rounded for the product with the values. With a running maximum the largest weight is 1, which rounding keeps, and
    the divisor is the sum; with a constant reference its rounding must cancel in the quotient.
    """
    softmax_scale_log2 = softmax_scale * 1.4426950408889634
    out = tl.zeros((kRows, kChannels), tl.float32)
    sum = tl.zeros((kRows,), tl.float32)
    rounded_sum = tl.zeros((kRows, kOnes), tl.float32)  # all columns are equal
    maximum = tl.full((kRows,), -_kInfinity, tl.float32)
    end_tile = tl.maximum(first_tile, end_tile)
    bare_first = tl.minimum(tl.maximum((unmasked_begin + (kKeys - 1)) // kKeys, first_tile), end_tile)
    bare_end = tl.maximum(tl.minimum(unmasked_end // kKeys, end_tile), bare_first)
    num_bare = bare_end - bare_first
    for index in tl.range(0, end_tile - first_tile - num_bare):
        tile = masked_tile(index, bare_first, bare_end, end_tile)
        out, sum, rounded_sum, maximum = add_tile(
            out,
            sum,
            rounded_sum,
            maximum,
            q_tile,
            k,
            k_stride,
            v,
            v_stride,
            tile,
            seqlen_k,
            position,
            first,
            end,
            raw_slope,
            softmax_scale_log2,
            kKeys,
            kHeadDim,
            kChannels,
            kCausal,
            kBiased,
            kBounded,
            True,
        )
    for index in tl.range(0, num_bare):
        out, sum, rounded_sum, maximum = add_tile(
            out,
            sum,
            rounded_sum,
            maximum,
            q_tile,
            k,
            k_stride,
            v,
            v_stride,
            bare_end - 1 - index,
            seqlen_k,
            position,
            first,
            end,
            raw_slope,
            softmax_scale_log2,
            kKeys,
            kHeadDim,
            kChannels,
            kCausal,
            kBiased,
            kBounded,
            False,
        )
    if kBounded:
        exponent = tl.zeros((kRows,), tl.float32)
        divisor = sum if q_tile.dtype == tl.float32 else tl.max(rounded_sum, 1)
    else:
        exponent = tl.where(maximum == -_kInfinity, 0.0, maximum) * softmax_scale
        divisor = sum
    return out, sum, divisor, exponent


@triton.jit
def inverse(divisor: tl.tensor) -> tl.tensor:
    """1 / divisor; 0 for a row that sees no key."""
    return tl.where(divisor == 0.0, 0.0, 1.0 / divisor)


@triton.jit
def log_sum_exp(sum: tl.tensor, exponent: tl.tensor) -> tl.tensor:
    """The logarithm of a sum of weights relative to e^exponent; -inf for a row that sees no key."""
    return exponent + kLn2 * tl.log2(sum)
