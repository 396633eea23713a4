"""token_shift_norm in Triton (docs/model.md#3, #4, #7, #16.3).

    u = alpha * residual_scale * residual + x                          u = x without a residual
    y = (u - mean(u)) / sqrt(var(u) + 1e-5) * (1 + gamma)              y = u without gamma
    shifted[t + delay(channel), channel] = y[t, channel]

    g: gradient of y from both results      e = g * (1 + gamma)      u_hat: the normalised input
    du = (e - mean(e) - u_hat * mean(e * u_hat)) * inverse           dgamma = sum of g * u_hat over tokens
    dx = du      dresidual = factor * du                             dresidual_scale = sum of alpha * residual * du

A program walks over a run of tokens and holds one row at a time in registers, from its one read to its results. A row
of y goes to one row of `shifted` per segment: forward it is scattered to them, backward their gradients are gathered.
So every row is normalised once, and no two programs write to one place.

Blocks of Triton are powers of two. A row is therefore held as two: the largest power of two of its channels, and the
others, padded. 2560 channels are 2048 and 512 without padding; one block of 4096 would spend 37 % of its lanes on
nothing.

Bytes of memory per element of x, s its size: forward 4 s (x, residual; y, shifted), backward 6 s (x, residual, dy,
dshifted; dx, dresidual). gamma, residual_scale and key_start come from the caches. Backward adds 8 bytes per channel
and run for the partial sums, which stay in registers over the run.

Not supported: dim above 8192, whose rows do not fit the registers of eight warps; float64.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from andromeda.triton_kernels import launch

# Channels of a row for which a lane has the registers, forward one each and backward five or six. Of rows above 4096
# channels it holds more. On an H200, 2560 channels took 91 us forward with 2 warps, 95 with 4 and 104 with 8.
_FORWARD_CHANNELS, _BACKWARD_CHANNELS = 40, 20
_BACKWARD_STAGES = 1  # 2: the next row is copied to shared memory during the work on one
_RESIDENT_WARPS = 12  # of the backward pass on a multiprocessor, for the number of its programs
_MOST_PROGRAMS = 2**31 - 1  # of a grid


@triton.jit
def _load_vector(vector: tl.tensor, channel: tl.tensor, kDim: tl.constexpr) -> Any:
    return tl.load(vector + channel, mask=channel < kDim, other=0.0)


@triton.jit
def _load_vector_again(vector: tl.tensor, channel: tl.tensor, kDim: tl.constexpr) -> Any:
    """The same from L1. Without the modifier the compiler would keep what the first load returned in registers."""
    return tl.load(vector + channel, mask=channel < kDim, other=0.0, cache_modifier=".ca")


@triton.jit
def _factor(residual_scale: tl.tensor, channel: tl.tensor, alpha: tl.tensor, kDim: tl.constexpr) -> Any:
    """du / dresidual."""
    if residual_scale is None:
        return alpha
    else:
        return _load_vector(residual_scale, channel, kDim) * alpha


@triton.jit
def _load_row(tensor: tl.tensor, row: tl.tensor, channel: tl.tensor, kDim: tl.constexpr) -> Any:
    """A row of a tensor, which begins at the offset `row`; zeros for channels that do not exist."""
    return tl.load(tensor + row + channel, mask=channel < kDim, other=0.0).to(tl.float32)


@triton.jit
def _load_input(
    x: tl.tensor,
    residual: tl.tensor,
    residual_scale: tl.tensor,
    x_row: tl.tensor,
    residual_row: tl.tensor,
    channel: tl.tensor,
    alpha: tl.tensor,
    kDim: tl.constexpr,
) -> Any:
    """u, and the residual (u without one)."""
    u = _load_row(x, x_row, channel, kDim)
    if residual is None:
        return u, u
    else:
        values = _load_row(residual, residual_row, channel, kDim)
        return u + values * _factor(residual_scale, channel, alpha, kDim), values


@triton.jit
def _centre(u: tl.tensor, mean: tl.tensor, channel: tl.tensor, kDim: tl.constexpr) -> Any:
    return tl.where(channel < kDim, u - mean, 0.0)


@triton.jit
def _delay(channel: tl.tensor, kDim: tl.constexpr, kShift: tl.constexpr) -> Any:
    """The tokens by which the segment of a channel is delayed."""
    segment = channel // (kDim // (kShift + 1))
    return tl.where(segment <= kShift, segment, 0)  # the channels after the last segment are not delayed


@triton.jit
def _reaches_later(
    key_start: tl.tensor,
    batch: tl.tensor,
    seq: tl.tensor,
    delay: tl.tensor,
    seqlen: tl.tensor,
    position: tl.tensor,
    exists: tl.tensor,
) -> Any:
    """Whether row `seq` is shifted to the row `delay` tokens later, which may be of another document if it exists."""
    if key_start is None:
        return exists
    else:
        start = tl.load(key_start + batch * seqlen + seq + delay, mask=exists, other=0)
        return exists & (position + seq >= start)


@triton.jit
def _store_outputs(
    values: tl.tensor,
    y: tl.tensor,
    shifted: tl.tensor,
    history: tl.tensor,
    key_start: tl.tensor,
    batch: tl.tensor,
    seq: tl.tensor,
    history_batch: tl.tensor,
    history_seq: tl.tensor,
    seqlen: tl.tensor,
    position: tl.tensor,
    channel: tl.tensor,
    kDim: tl.constexpr,
    kShift: tl.constexpr,
) -> None:
    """Some channels of y, and of `shifted`, from the same rounded values."""
    row = (batch * seqlen + seq) * kDim
    inside = channel < kDim
    if y is not None:
        values = values.to(y.dtype.element_ty)
        tl.store(y + row + channel, values, mask=inside)
    if shifted is not None:
        values = values.to(shifted.dtype.element_ty)
        delay = _delay(channel, kDim, kShift)
        exists = inside & (delay < seqlen - seq)
        seen = _reaches_later(key_start, batch, seq, delay, seqlen, position, exists)
        tl.store(shifted + row + delay * kDim + channel, tl.where(seen, values, 0.0), mask=exists)
        # Where the row of `shifted` takes its values from before this call, no other program writes them.
        if seq < kShift:
            early = inside & (seq < delay)
            if history is None:
                before = tl.zeros_like(values)
            else:
                known = early
                if key_start is not None:
                    known = early & (position + seq - delay >= tl.load(key_start + batch * seqlen + seq))
                rows = history + batch * history_batch + (kShift + seq - delay) * history_seq
                before = tl.load(rows + channel, mask=known, other=0.0)
            tl.store(shifted + row + channel, before, mask=early)


@triton.jit(do_not_specialize=["batch_size", "seqlen", "run_length", "position"])
def forward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    residual_scale: tl.tensor,
    gamma: tl.tensor,
    history: tl.tensor,
    key_start: tl.tensor,
    y: tl.tensor,
    shifted: tl.tensor,
    x_batch: tl.tensor,
    x_seq: tl.tensor,
    residual_batch: tl.tensor,
    residual_seq: tl.tensor,
    history_batch: tl.tensor,
    history_seq: tl.tensor,
    batch_size: tl.tensor,
    seqlen: tl.tensor,
    run_length: tl.tensor,
    alpha: tl.tensor,
    position: tl.tensor,
    kDim: tl.constexpr,
    kShift: tl.constexpr,
    kMain: tl.constexpr,
    kRest: tl.constexpr,
) -> None:
    main = tl.arange(0, kMain)
    if kRest > 0:
        rest = kMain + tl.arange(0, kRest)
    start = tl.program_id(0).to(tl.int64) * run_length
    end = tl.minimum(start + run_length, batch_size.to(tl.int64) * seqlen)
    for token in range(start, end):
        batch = token // seqlen
        seq = token - batch * seqlen
        x_row = batch * x_batch + seq * x_seq
        residual_row = batch * residual_batch + seq * residual_seq
        u, _ = _load_input(x, residual, residual_scale, x_row, residual_row, main, alpha, kDim)
        if kRest > 0:
            v, _ = _load_input(x, residual, residual_scale, x_row, residual_row, rest, alpha, kDim)

        if gamma is not None:
            total = tl.sum(u, 0)
            if kRest > 0:
                total += tl.sum(v, 0)
            mean = tl.div_rn(total, 1.0 * kDim)  # exact for equal channels
            u = _centre(u, mean, main, kDim)
            squares = tl.sum(u * u, 0)
            if kRest > 0:
                v = _centre(v, mean, rest, kDim)
                squares += tl.sum(v * v, 0)
            inverse = tl.div_rn(1.0, tl.sqrt_rn(squares / kDim + 1e-5))
            u *= inverse
            u += u * _load_vector(gamma, main, kDim)
            if kRest > 0:
                v *= inverse
                v += v * _load_vector(gamma, rest, kDim)

        _store_outputs(
            u, y, shifted, history, key_start, batch, seq, history_batch, history_seq, seqlen, position, main, kDim,
            kShift,
        )  # fmt: skip
        if kRest > 0:
            _store_outputs(
                v, y, shifted, history, key_start, batch, seq, history_batch, history_seq, seqlen, position, rest, kDim,
                kShift,
            )  # fmt: skip


@triton.jit
def _load_gradient(
    dy: tl.tensor,
    dshifted: tl.tensor,
    key_start: tl.tensor,
    dy_row: tl.tensor,
    dshifted_row: tl.tensor,
    dshifted_seq: tl.tensor,
    batch: tl.tensor,
    seq: tl.tensor,
    seqlen: tl.tensor,
    position: tl.tensor,
    channel: tl.tensor,
    kDim: tl.constexpr,
    kShift: tl.constexpr,
) -> Any:
    """g: of y itself, and of the rows of `shifted` that the row was scattered to."""
    g = tl.zeros(channel.shape, tl.float32) if dy is None else _load_row(dy, dy_row, channel, kDim)
    if dshifted is not None:
        delay = _delay(channel, kDim, kShift)
        exists = (channel < kDim) & (delay < seqlen - seq)
        seen = _reaches_later(key_start, batch, seq, delay, seqlen, position, exists)
        row = dshifted_row + delay.to(tl.int64) * dshifted_seq
        g += tl.load(dshifted + row + channel, mask=seen, other=0.0).to(tl.float32)
    return g


@triton.jit
def _add_sums(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor, e: tl.tensor, f: tl.tensor) -> Any:
    return a + d, b + e, c + f


@triton.jit
def _sums(u: tl.tensor, e: tl.tensor) -> Any:
    """Those of u * u, e and e * u, in one reduction: each waits for all warps a few times."""
    return tl.reduce((u * u, e, e * u), 0, _add_sums)


@triton.jit
def _store_gradients(
    du: tl.tensor,
    residual: tl.tensor,
    residual_scale: tl.tensor,
    dx: tl.tensor,
    dresidual: tl.tensor,
    row: tl.tensor,
    channel: tl.tensor,
    alpha: tl.tensor,
    kDim: tl.constexpr,
) -> Any:
    """Some channels of dx and dresidual. Returns those of residual * du."""
    inside = channel < kDim
    tl.store(dx + row + channel, du.to(dx.dtype.element_ty), mask=inside)
    if dresidual is not None:
        values = du * _factor(residual_scale, channel, alpha, kDim)
        tl.store(dresidual + row + channel, values.to(dresidual.dtype.element_ty), mask=inside)
    return tl.where(du == 0.0, 0.0, residual) * du  # without a gradient a NaN of the residual adds nothing


@triton.jit(do_not_specialize=["batch_size", "seqlen", "run_length", "position"])
def backward_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    residual_scale: tl.tensor,
    gamma: tl.tensor,
    key_start: tl.tensor,
    dy: tl.tensor,
    dshifted: tl.tensor,
    dx: tl.tensor,
    dresidual: tl.tensor,
    dresidual_scale_partial: tl.tensor,
    dgamma_partial: tl.tensor,
    x_batch: tl.tensor,
    x_seq: tl.tensor,
    residual_batch: tl.tensor,
    residual_seq: tl.tensor,
    dy_batch: tl.tensor,
    dy_seq: tl.tensor,
    dshifted_batch: tl.tensor,
    dshifted_seq: tl.tensor,
    batch_size: tl.tensor,
    seqlen: tl.tensor,
    run_length: tl.tensor,
    alpha: tl.tensor,
    position: tl.tensor,
    kDim: tl.constexpr,
    kShift: tl.constexpr,
    kMain: tl.constexpr,
    kRest: tl.constexpr,
    kStages: tl.constexpr,
) -> None:
    main = tl.arange(0, kMain)
    dgamma = tl.zeros((kMain,), tl.float32)
    dresidual_scale = tl.zeros((kMain,), tl.float32)
    if kRest > 0:
        rest = kMain + tl.arange(0, kRest)
        dgamma_rest = tl.zeros((kRest,), tl.float32)
        dresidual_scale_rest = tl.zeros((kRest,), tl.float32)
    start = tl.program_id(0).to(tl.int64) * run_length
    end = tl.minimum(start + run_length, batch_size.to(tl.int64) * seqlen)
    for token in tl.range(start, end, num_stages=kStages):
        batch = token // seqlen
        seq = token - batch * seqlen
        x_row = batch * x_batch + seq * x_seq
        residual_row = batch * residual_batch + seq * residual_seq
        dy_row = batch * dy_batch + seq * dy_seq
        dshifted_row = batch * dshifted_batch + seq * dshifted_seq

        # Step 1: loads.
        u, r = _load_input(x, residual, residual_scale, x_row, residual_row, main, alpha, kDim)
        g = _load_gradient(
            dy, dshifted, key_start, dy_row, dshifted_row, dshifted_seq, batch, seq, seqlen, position, main, kDim,
            kShift,
        )  # fmt: skip
        if kRest > 0:
            u_rest, r_rest = _load_input(x, residual, residual_scale, x_row, residual_row, rest, alpha, kDim)
            g_rest = _load_gradient(
                dy, dshifted, key_start, dy_row, dshifted_row, dshifted_seq, batch, seq, seqlen, position, rest, kDim,
                kShift,
            )  # fmt: skip

        if gamma is not None:
            # Step 2: the sums over the row.
            total = tl.sum(u, 0)
            if kRest > 0:
                total += tl.sum(u_rest, 0)
            mean = tl.div_rn(total, 1.0 * kDim)  # exact for equal channels
            u = _centre(u, mean, main, kDim)
            e = g + g * _load_vector(gamma, main, kDim)
            squares, sum_of_e, product = _sums(u, e)
            if kRest > 0:
                u_rest = _centre(u_rest, mean, rest, kDim)
                e_rest = g_rest + g_rest * _load_vector(gamma, rest, kDim)
                squares_rest, sum_of_e_rest, product_rest = _sums(u_rest, e_rest)
                squares += squares_rest
                sum_of_e += sum_of_e_rest
                product += product_rest
            inverse = tl.div_rn(1.0, tl.sqrt_rn(squares / kDim + 1e-5))

            # Step 3: a row whose g is 0, padding for instance, adds nothing to any sum, even where it holds a NaN.
            unused = False
            if (sum_of_e == 0.0) & (product != product):
                largest = tl.max(tl.abs(g), 0)
                if kRest > 0:
                    largest = tl.maximum(largest, tl.max(tl.abs(g_rest), 0))
                unused = largest == 0.0
            inverse = tl.where(unused, 0.0, inverse)
            product = tl.where(unused, 0.0, product)

            # Step 4: the gradient of u.
            mean_of_e = sum_of_e / kDim
            mean_product = product / kDim * inverse
            u = tl.where(unused, 0.0, u * inverse)
            dgamma += g * u
            e = g + g * _load_vector_again(gamma, main, kDim)
            g = (e - mean_of_e - u * mean_product) * inverse
            if kRest > 0:
                u_rest = tl.where(unused, 0.0, u_rest * inverse)
                dgamma_rest += g_rest * u_rest
                e_rest = g_rest + g_rest * _load_vector_again(gamma, rest, kDim)
                g_rest = (e_rest - mean_of_e - u_rest * mean_product) * inverse

        row = token * kDim
        dresidual_scale += _store_gradients(g, r, residual_scale, dx, dresidual, row, main, alpha, kDim)
        if kRest > 0:
            dresidual_scale_rest += _store_gradients(
                g_rest, r_rest, residual_scale, dx, dresidual, row, rest, alpha, kDim
            )

    run = tl.program_id(0).to(tl.int64) * kDim
    if dgamma_partial is not None:
        tl.store(dgamma_partial + run + main, dgamma, mask=main < kDim)
        if kRest > 0:
            tl.store(dgamma_partial + run + rest, dgamma_rest, mask=rest < kDim)
    if dresidual_scale_partial is not None:
        tl.store(dresidual_scale_partial + run + main, dresidual_scale * alpha, mask=main < kDim)
        if kRest > 0:
            tl.store(dresidual_scale_partial + run + rest, dresidual_scale_rest * alpha, mask=rest < kDim)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    residual_scale: torch.Tensor | None,
    gamma: torch.Tensor | None,
    history: torch.Tensor | None,
    key_start: torch.Tensor | None,
    y: torch.Tensor | None,
    shifted: torch.Tensor | None,
    alpha: float,
    shift: int,
    position: int,
) -> None:
    """The arguments of `token_shift_norm_forward` in andromeda/_C.pyi. y and shifted are contiguous."""
    batch, seqlen, dim = x.shape
    if 0 in x.shape:
        return
    blocks = _blocks(dim)
    run_length = _ceil_div(batch * seqlen, _MOST_PROGRAMS)  # usually 1: programs of several rows were slower
    forward_kernel[(_ceil_div(batch * seqlen, run_length),)](
        *(x, residual, residual_scale, gamma, history, key_start, y, shifted),
        *(*_row_strides(x), *_row_strides(residual), *_row_strides(history)),
        *(batch, seqlen, run_length, alpha, position),
        kShift=shift,
        **blocks,
        num_warps=_num_warps(blocks, _FORWARD_CHANNELS),
        **launch.OPTIONS,
    )


def backward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    residual_scale: torch.Tensor | None,
    gamma: torch.Tensor | None,
    key_start: torch.Tensor | None,
    dy: torch.Tensor | None,
    dshifted: torch.Tensor | None,
    dx: torch.Tensor,
    dresidual: torch.Tensor | None,
    dresidual_scale_partial: torch.Tensor | None,
    dgamma_partial: torch.Tensor | None,
    alpha: float,
    shift: int,
    position: int,
) -> None:
    """The arguments of `token_shift_norm_backward` in andromeda/_C.pyi. dx and dresidual are contiguous."""
    batch, seqlen, dim = x.shape
    # Without rows the partial sums are zero and must still be written.
    partial = dgamma_partial if dresidual_scale_partial is None else dresidual_scale_partial
    runs = min(batch * seqlen, _MOST_PROGRAMS) if partial is None else partial.shape[0]
    if runs == 0:
        return
    blocks = _blocks(dim)
    backward_kernel[(runs,)](
        *(x, residual, residual_scale, gamma, key_start, dy, dshifted, dx, dresidual),
        *(dresidual_scale_partial, dgamma_partial),
        *(*_row_strides(x), *_row_strides(residual), *_row_strides(dy), *_row_strides(dshifted)),
        *(batch, seqlen, _ceil_div(batch * seqlen, runs), alpha, position),
        kShift=shift,
        **blocks,
        kStages=_BACKWARD_STAGES,
        num_warps=_num_warps(blocks, _BACKWARD_CHANNELS),
        **launch.OPTIONS,
    )


def backward_runs(*, x: torch.Tensor) -> int:
    """The best number of partial sums for many tokens like those of x, on its device."""
    num_warps = _num_warps(_blocks(x.shape[2]), _BACKWARD_CHANNELS)
    return max(_RESIDENT_WARPS // num_warps, 1) * launch.multiprocessors(x.device)


def _row_strides(tensor: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()[:2]


def _blocks(dim: int) -> dict[str, int]:
    """The two blocks of a row; the second may be empty."""
    main = 1 << (dim.bit_length() - 1)
    return {"kDim": dim, "kMain": main, "kRest": 0 if main == dim else triton.next_power_of_2(dim - main)}


def _num_warps(blocks: dict[str, int], channels_of_lane: int) -> int:
    """Eight at most: with more, a lane has too few registers for even the channels that it holds then."""
    return min(triton.next_power_of_2(_ceil_div(blocks["kMain"] + blocks["kRest"], 32 * channels_of_lane)), 8)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
