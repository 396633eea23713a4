"""qk_norm_rotary in Triton (docs/model.md#5.2, #5.3, #16.3).

    forward    x_hat = x / max(||x||, 1e-12)      out = m R (scale * x_hat)     R: rotation of pairs, times z
    backward   g = R^T dout                       dscale = m * sum of g * x_hat over tokens
               e = scale * g                      dx = m (e - x_hat <x_hat, e>) / ||x||, or m e / 1e-12 if ||x|| < 1e-12

m is q_multiplier for q and 1 for k. With a norm it is a factor of the inverse norm: one product per row.

A row is one head of one token. A program owns a tile of rows: a power of two of heads that lie side by side in memory,
and as many tokens as make it `_TILE_ELEMENTS` large. Backward it walks over a run of tokens, keeps the scale
and its sum for dscale in registers, and writes the sum at the end: no two programs write to one place. The first
programs of a launch work on q and the others on k, so that a small operand does not cost a launch.

A tile is split into the even and the odd channels, (rows, pairs) each: a lane holds both channels of a pair, so neither
the split nor the rotation moves data between lanes.

Bytes per call: forward x and out once; backward x, dout and dx once, and dscale_partial; the tables from the caches.

Not supported: head_dim above 1024, float64.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from andromeda.triton_kernels import launch

_TILE_ELEMENTS = {"forward": 1024, "backward": 4096}  # 32 per lane
_NUM_WARPS = {"forward": 1, "backward": 4}
_MOST_ROWS = 64
_MOST_HEADS = 8  # of a tile: 2 KiB of adjacent memory at head_dim 128 in half precision
_kMaxStep = tl.constexpr(8191)  # the tables have rows for every step up to it
_PROGRAMS_PER_MULTIPROCESSOR = 3  # of the backward pass that are resident at a time


@triton.jit
def _tokens_of(first: tl.tensor, row: tl.tensor, end: tl.tensor, seqlen: tl.tensor, kHeads: tl.constexpr) -> Any:
    """Of each row of a tile: whether its token exists, the token's number in the batch, its sequence, its place in it.

    first: the number of the tile's first token.
    end: the number of the first token that does not exist.
    """
    in_tile = row // kHeads
    batch = first // seqlen
    seq = (first - batch * seqlen).to(tl.uint32) + in_tile.to(tl.uint32)
    sequences = seq // seqlen.to(tl.uint32)  # that end before the row
    seq -= sequences * seqlen.to(tl.uint32)
    token = first + in_tile
    return token < end, token, batch + sequences.to(tl.int64), seq.to(tl.int64)


@triton.jit
def _load_pairs(pointers: tl.tensor, inside: tl.tensor, kRows: tl.constexpr, kBlockDim: tl.constexpr) -> Any:
    """The even and the odd channels of rows; zeros outside."""
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(x, (kRows, kBlockDim // 2, 2)))


@triton.jit
def _load_scale(
    scale: tl.tensor, head: tl.tensor, kHeadDim: tl.constexpr, kRows: tl.constexpr, kBlockDim: tl.constexpr
) -> Any:
    """The even and the odd channels of the scale, a row for each row of the tile."""
    channel = tl.arange(0, kBlockDim)[None, :]
    pointers = scale + head[:, None] * kHeadDim + channel
    rows = tl.load(pointers, mask=channel < kHeadDim, other=0.0)
    return tl.split(tl.reshape(rows, (kRows, kBlockDim // 2, 2)))


@triton.jit
def _load_rotation(
    table: tl.tensor,
    row: tl.tensor,
    factors: tl.tensor,
    factor_row: tl.tensor,
    seq: tl.tensor,
    inside: tl.tensor,
    kFactorStep: tl.constexpr,
    kRotaryDim: tl.constexpr,
    kRows: tl.constexpr,
    kBlockDim: tl.constexpr,
) -> Any:
    """z * cos and z * sin of the rows' pairs. Past kRotaryDim they are undefined."""
    channel = tl.arange(0, kBlockDim)[None, :]
    pointers = table + (row + seq)[:, None] * kRotaryDim + channel
    rows = tl.load(pointers, mask=inside[:, None] & (channel < kRotaryDim), other=0.0)
    cos, sin = tl.split(tl.reshape(rows, (kRows, kBlockDim // 2, 2)))
    if factors is not None:
        pair = tl.arange(0, kBlockDim // 2)[None, :]
        pointers = factors + (factor_row + kFactorStep * seq)[:, None] * (kRotaryDim // 2) + pair
        z = tl.load(pointers, mask=inside[:, None] & (pair < kRotaryDim // 2), other=0.0)
        cos *= z
        sin *= z
    return cos, sin


@triton.jit
def _inverse_norm(sum_of_squares: tl.tensor, kPrecise: tl.constexpr) -> Any:
    """1 / max(norm, 1e-12). A NaN stays one."""
    inverse = tl.div_rn(1.0, tl.sqrt_rn(sum_of_squares)) if kPrecise else tl.rsqrt(sum_of_squares)
    return tl.where(sum_of_squares < 1e-24, 1e12, inverse)


@triton.jit
def _store_pairs(pointers: tl.tensor, even: tl.tensor, odd: tl.tensor, inside: tl.tensor) -> None:
    kRows: tl.constexpr = even.shape[0]
    kBlockDim: tl.constexpr = 2 * even.shape[1]
    row = tl.reshape(tl.join(even, odd), (kRows, kBlockDim))
    tl.store(pointers, row.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def _transform_tile(
    program: tl.tensor,
    x: tl.tensor,
    scale: tl.tensor,
    table: tl.tensor,
    factors: tl.tensor,
    out: tl.tensor,
    x_batch: tl.tensor,
    x_seq: tl.tensor,
    x_head: tl.tensor,
    num_batches: tl.tensor,
    seqlen: tl.tensor,
    head_tiles: tl.tensor,
    table_row: tl.tensor,
    factor_row: tl.tensor,
    multiplier: tl.tensor,
    kFactorStep: tl.constexpr,
    kHeadDim: tl.constexpr,
    kRotaryDim: tl.constexpr,
    kNormalize: tl.constexpr,
    kRows: tl.constexpr,
    kHeads: tl.constexpr,
    kBlockDim: tl.constexpr,
) -> None:
    row = tl.arange(0, kRows)
    channel = tl.arange(0, kBlockDim)[None, :]
    head = (program % head_tiles) * kHeads + row % kHeads
    first = (program // head_tiles).to(tl.int64) * (kRows // kHeads)
    exists, token, batch, seq = _tokens_of(first, row, num_batches.to(tl.int64) * seqlen, seqlen, kHeads)
    inside = exists[:, None] & (channel < kHeadDim)
    offset = batch * x_batch + seq * x_seq + head.to(tl.int64) * x_head
    even, odd = _load_pairs(x + offset[:, None] + channel, inside, kRows, kBlockDim)

    if kNormalize:
        kPrecise: tl.constexpr = x.dtype.element_ty == tl.float32
        factor = _inverse_norm(tl.sum(even * even + odd * odd, 1), kPrecise)[:, None] * multiplier
    else:
        factor = multiplier
    even *= factor
    odd *= factor
    if scale is not None:
        even_scale, odd_scale = _load_scale(scale, head, kHeadDim, kRows, kBlockDim)
        even *= even_scale
        odd *= odd_scale
    if kRotaryDim > 0:
        cos, sin = _load_rotation(
            table, table_row, factors, factor_row, seq, exists, kFactorStep, kRotaryDim, kRows, kBlockDim
        )
        # Other channels pass through: times 1 plus 0 times their neighbour would spread an infinity.
        is_rotated = tl.arange(0, kBlockDim // 2)[None, :] < kRotaryDim // 2
        rotated_even = even * cos - odd * sin
        rotated_odd = odd * cos + even * sin
        even = tl.where(is_rotated, rotated_even, even)
        odd = tl.where(is_rotated, rotated_odd, odd)

    out_row = token * (head_tiles * kHeads) + head
    _store_pairs(out + out_row[:, None] * kHeadDim + channel, even, odd, inside)


# Arguments that vary from call to call. Specialised, the number 1 and multiples of 16 would each compile a kernel.
_VARYING = [
    *(f"{operand}_{name}" for operand in "qk" for name in ("seqlen", "head_tiles", "row", "factor_row")),
    *("batch", "q_programs"),
]


@triton.jit(do_not_specialize=_VARYING)
def forward_kernel(
    q: tl.tensor,
    q_scale: tl.tensor,
    q_table: tl.tensor,
    q_out: tl.tensor,
    q_batch: tl.tensor,
    q_seq: tl.tensor,
    q_head: tl.tensor,
    q_seqlen: tl.tensor,
    q_head_tiles: tl.tensor,
    q_row: tl.tensor,
    q_factor_row: tl.tensor,
    k: tl.tensor,
    k_scale: tl.tensor,
    k_table: tl.tensor,
    k_out: tl.tensor,
    k_batch: tl.tensor,
    k_seq: tl.tensor,
    k_head: tl.tensor,
    k_seqlen: tl.tensor,
    k_head_tiles: tl.tensor,
    k_row: tl.tensor,
    k_factor_row: tl.tensor,
    factors: tl.tensor,
    step: tl.tensor,  # (1,), how many positions further on every token lies than its rows say, or None
    batch: tl.tensor,
    q_programs: tl.tensor,
    q_multiplier: tl.tensor,
    kHeadDim: tl.constexpr,
    kRotaryDim: tl.constexpr,
    kNormalize: tl.constexpr,
    kRows: tl.constexpr,
    kQHeads: tl.constexpr,
    kKHeads: tl.constexpr,
    kBlockDim: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    if step is not None:
        further = tl.minimum(tl.maximum(tl.load(step), 0), _kMaxStep)
        q_row += further
        k_row += further
        q_factor_row += further
        k_factor_row -= further
    if program < q_programs:
        _transform_tile(
            program, q, q_scale, q_table, factors, q_out, q_batch, q_seq, q_head, batch, q_seqlen, q_head_tiles,
            q_row, q_factor_row, q_multiplier, 1, kHeadDim, kRotaryDim, kNormalize, kRows, kQHeads, kBlockDim,
        )  # fmt: skip
    else:
        _transform_tile(
            program - q_programs, k, k_scale, k_table, factors, k_out, k_batch, k_seq, k_head, batch, k_seqlen,
            k_head_tiles, k_row, k_factor_row, 1.0, -1, kHeadDim, kRotaryDim, kNormalize, kRows, kKHeads, kBlockDim,
        )  # fmt: skip


@triton.jit
def _walk_run(
    program: tl.tensor,
    x: tl.tensor,
    scale: tl.tensor,
    table: tl.tensor,
    factors: tl.tensor,
    dout: tl.tensor,
    dx: tl.tensor,
    dscale_partial: tl.tensor,
    x_batch: tl.tensor,
    x_seq: tl.tensor,
    x_head: tl.tensor,
    dout_batch: tl.tensor,
    dout_seq: tl.tensor,
    dout_head: tl.tensor,
    num_batches: tl.tensor,
    seqlen: tl.tensor,
    head_tiles: tl.tensor,
    run_length: tl.tensor,
    table_row: tl.tensor,
    factor_row: tl.tensor,
    multiplier: tl.tensor,
    kFactorStep: tl.constexpr,
    kHeadDim: tl.constexpr,
    kRotaryDim: tl.constexpr,
    kNormalize: tl.constexpr,
    kRows: tl.constexpr,
    kHeads: tl.constexpr,
    kBlockDim: tl.constexpr,
) -> None:
    kTokens: tl.constexpr = kRows // kHeads
    kPairs: tl.constexpr = kBlockDim // 2
    row = tl.arange(0, kRows)
    channel = tl.arange(0, kBlockDim)[None, :]
    first_head = (program % head_tiles) * kHeads
    head = first_head + row % kHeads
    run = program // head_tiles
    if scale is not None:
        even_scale, odd_scale = _load_scale(scale, head, kHeadDim, kRows, kBlockDim)
        even_dscale = tl.zeros((kRows, kPairs), tl.float32)
        odd_dscale = tl.zeros((kRows, kPairs), tl.float32)

    start = run.to(tl.int64) * run_length
    end = tl.minimum(start + run_length, num_batches.to(tl.int64) * seqlen)
    for first in range(start, end, kTokens):
        # Step 1: loads. A row past the end is zeros: it adds nothing to dscale.
        exists, token, batch, seq = _tokens_of(first, row, end, seqlen, kHeads)
        inside = exists[:, None] & (channel < kHeadDim)
        offset = batch * dout_batch + seq * dout_seq + head.to(tl.int64) * dout_head
        even, odd = _load_pairs(dout + offset[:, None] + channel, inside, kRows, kBlockDim)
        if kNormalize or scale is not None:
            offset = batch * x_batch + seq * x_seq + head.to(tl.int64) * x_head
            even_x, odd_x = _load_pairs(x + offset[:, None] + channel, inside, kRows, kBlockDim)

        # Step 2: g, the norm of x and its product with e.
        if kRotaryDim > 0:
            cos, sin = _load_rotation(
                table, table_row, factors, factor_row, seq, exists, kFactorStep, kRotaryDim, kRows, kBlockDim
            )
            is_rotated = tl.arange(0, kPairs)[None, :] < kRotaryDim // 2
            rotated_even = even * cos + odd * sin
            rotated_odd = odd * cos - even * sin
            even = tl.where(is_rotated, rotated_even, even)
            odd = tl.where(is_rotated, rotated_odd, odd)
        if kNormalize or scale is not None:
            # A row whose g is 0, a hidden key for instance, adds nothing, even where it holds a NaN (0 * NaN).
            is_used = (tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1) != 0.0)[:, None]
            even_x = tl.where(is_used, even_x, 0.0)
            odd_x = tl.where(is_used, odd_x, 0.0)
        if kNormalize:
            kPrecise: tl.constexpr = x.dtype.element_ty == tl.float32
            squares = tl.sum(even_x * even_x + odd_x * odd_x, 1)
            inverse = _inverse_norm(squares, kPrecise)[:, None]
            even_x *= inverse
            odd_x *= inverse

        # Step 3: both gradients.
        if scale is not None:
            even_dscale += even * even_x
            odd_dscale += odd * odd_x
            even *= even_scale
            odd *= odd_scale
        if kNormalize:
            along = tl.sum(even_x * even + odd_x * odd, 1)
            along = tl.where(squares < 1e-24, 0.0, along)[:, None]  # below the floor the divisor is a constant
            even -= even_x * along
            odd -= odd_x * along
            factor = inverse * multiplier
        else:
            factor = multiplier
        even *= factor
        odd *= factor
        out_row = token * (head_tiles * kHeads) + head
        _store_pairs(dx + out_row[:, None] * kHeadDim + channel, even, odd, inside)

    if scale is not None:
        even_sum = tl.sum(tl.reshape(even_dscale, (kTokens, kHeads, kPairs)), 0) * multiplier
        odd_sum = tl.sum(tl.reshape(odd_dscale, (kTokens, kHeads, kPairs)), 0) * multiplier
        out_head = run.to(tl.int64) * (head_tiles * kHeads) + first_head + tl.arange(0, kHeads)
        pointers = dscale_partial + out_head[:, None] * kHeadDim + channel
        _store_pairs(pointers, even_sum, odd_sum, channel < kHeadDim)


@triton.jit(do_not_specialize=[*_VARYING, "q_run_length", "k_run_length"])
def backward_kernel(
    q: tl.tensor,
    q_scale: tl.tensor,
    q_table: tl.tensor,
    dq_out: tl.tensor,
    dq: tl.tensor,
    dq_scale_partial: tl.tensor,
    q_batch: tl.tensor,
    q_seq: tl.tensor,
    q_head: tl.tensor,
    dq_out_batch: tl.tensor,
    dq_out_seq: tl.tensor,
    dq_out_head: tl.tensor,
    q_seqlen: tl.tensor,
    q_head_tiles: tl.tensor,
    q_run_length: tl.tensor,
    q_row: tl.tensor,
    q_factor_row: tl.tensor,
    k: tl.tensor,
    k_scale: tl.tensor,
    k_table: tl.tensor,
    dk_out: tl.tensor,
    dk: tl.tensor,
    dk_scale_partial: tl.tensor,
    k_batch: tl.tensor,
    k_seq: tl.tensor,
    k_head: tl.tensor,
    dk_out_batch: tl.tensor,
    dk_out_seq: tl.tensor,
    dk_out_head: tl.tensor,
    k_seqlen: tl.tensor,
    k_head_tiles: tl.tensor,
    k_run_length: tl.tensor,
    k_row: tl.tensor,
    k_factor_row: tl.tensor,
    factors: tl.tensor,
    batch: tl.tensor,
    q_programs: tl.tensor,
    q_multiplier: tl.tensor,
    kHeadDim: tl.constexpr,
    kRotaryDim: tl.constexpr,
    kNormalize: tl.constexpr,
    kRows: tl.constexpr,
    kQHeads: tl.constexpr,
    kKHeads: tl.constexpr,
    kBlockDim: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    if program < q_programs:
        _walk_run(
            program, q, q_scale, q_table, factors, dq_out, dq, dq_scale_partial, q_batch, q_seq, q_head, dq_out_batch,
            dq_out_seq, dq_out_head, batch, q_seqlen, q_head_tiles, q_run_length, q_row, q_factor_row, q_multiplier, 1,
            kHeadDim, kRotaryDim, kNormalize, kRows, kQHeads, kBlockDim,
        )  # fmt: skip
    else:
        _walk_run(
            program - q_programs, k, k_scale, k_table, factors, dk_out, dk, dk_scale_partial, k_batch, k_seq, k_head,
            dk_out_batch, dk_out_seq, dk_out_head, batch, k_seqlen, k_head_tiles, k_run_length, k_row, k_factor_row,
            1.0, -1, kHeadDim, kRotaryDim, kNormalize, kRows, kKHeads, kBlockDim,
        )  # fmt: skip


def forward(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    q_table: torch.Tensor | None,
    k_table: torch.Tensor | None,
    q_row: int = 0,
    k_row: int = 0,
    factors: torch.Tensor | None = None,
    q_factor_row: int = 0,
    k_factor_row: int = 0,
    step: torch.Tensor | None = None,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    normalize: bool,
    q_multiplier: float = 1.0,
) -> None:
    """The arguments of `qk_norm_rotary_forward` in andromeda/_C.pyi. q_out and k_out are contiguous."""
    constants = _constants(q, k, q_table, normalize, "forward")
    programs = [
        (x.shape[2] // heads) * _ceil_div(x.shape[0] * x.shape[1], constants["kRows"] // heads)
        for x, heads in ((q, constants["kQHeads"]), (k, constants["kKHeads"]))
    ]
    if sum(programs) == 0:
        return
    forward_kernel[(sum(programs),)](
        *(q, q_scale, q_table, q_out, *q.stride()[:3]),
        *(q.shape[1], q.shape[2] // constants["kQHeads"], q_row, q_factor_row),
        *(k, k_scale, k_table, k_out, *k.stride()[:3]),
        *(k.shape[1], k.shape[2] // constants["kKHeads"], k_row, k_factor_row),
        *(factors, step, q.shape[0], programs[0], q_multiplier),
        **constants,
        num_warps=_NUM_WARPS["forward"],
        **launch.OPTIONS,
    )


def backward(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    q_scale: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    q_table: torch.Tensor | None,
    k_table: torch.Tensor | None,
    q_row: int = 0,
    k_row: int = 0,
    factors: torch.Tensor | None = None,
    q_factor_row: int = 0,
    k_factor_row: int = 0,
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dq_scale_partial: torch.Tensor | None,
    dk_scale_partial: torch.Tensor | None,
    normalize: bool,
    q_multiplier: float = 1.0,
) -> None:
    """The arguments of `qk_norm_rotary_backward` in andromeda/_C.pyi. dq and dk are contiguous."""
    constants = _constants(q, k, q_table, normalize, "backward")
    q_head_tiles, k_head_tiles = q.shape[2] // constants["kQHeads"], k.shape[2] // constants["kKHeads"]
    q_runs = _num_runs(q, dq_scale_partial, constants["kRows"] // constants["kQHeads"])
    k_runs = _num_runs(k, dk_scale_partial, constants["kRows"] // constants["kKHeads"])
    programs = q_head_tiles * q_runs + k_head_tiles * k_runs
    if programs == 0:
        return
    backward_kernel[(programs,)](
        *(q, q_scale, q_table, dq_out, dq, dq_scale_partial, *q.stride()[:3], *dq_out.stride()[:3]),
        *(q.shape[1], q_head_tiles, _ceil_div(q.shape[0] * q.shape[1], max(q_runs, 1)), q_row, q_factor_row),
        *(k, k_scale, k_table, dk_out, dk, dk_scale_partial, *k.stride()[:3], *dk_out.stride()[:3]),
        *(k.shape[1], k_head_tiles, _ceil_div(k.shape[0] * k.shape[1], max(k_runs, 1)), k_row, k_factor_row),
        *(factors, q.shape[0], q_head_tiles * q_runs, q_multiplier),
        **constants,
        num_warps=_NUM_WARPS["backward"],
        **launch.OPTIONS,
    )


def backward_runs(*, q: torch.Tensor, k: torch.Tensor) -> int:
    """The best number of partial sums for many tokens like those of q and k, on their device."""
    constants = _constants(q, k, None, True, "backward")
    head_tiles = max(q.shape[2] // constants["kQHeads"], k.shape[2] // constants["kKHeads"], 1)
    return max(_PROGRAMS_PER_MULTIPROCESSOR * launch.multiprocessors(q.device) // head_tiles, 1)


def _num_runs(x: torch.Tensor, dscale_partial: torch.Tensor | None, tokens_of_tile: int) -> int:
    """Runs of tokens: the partial sums, or without these one tile each."""
    if dscale_partial is not None:
        return dscale_partial.shape[0]
    return _ceil_div(x.shape[0] * x.shape[1], tokens_of_tile)


def _constants(
    q: torch.Tensor, k: torch.Tensor, table: torch.Tensor | None, normalize: bool, direction: str
) -> dict[str, int]:
    head_dim = q.shape[3]
    block_dim = max(2, triton.next_power_of_2(head_dim))
    rows = min(_TILE_ELEMENTS[direction] // block_dim, _MOST_ROWS)
    return {
        "kHeadDim": head_dim,
        "kRotaryDim": 0 if table is None else table.shape[1],
        "kNormalize": normalize,
        "kRows": rows,
        "kQHeads": _heads_of_tile(q.shape[2], rows),
        "kKHeads": _heads_of_tile(k.shape[2], rows),
        "kBlockDim": block_dim,
    }


def _heads_of_tile(num_heads: int, rows: int) -> int:
    """The largest power of two that divides num_heads, at most _MOST_HEADS and the rows of a tile."""
    return min(num_heads & -num_heads, _MOST_HEADS, rows) if num_heads > 0 else 1


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
