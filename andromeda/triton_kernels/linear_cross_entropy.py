"""The loss of rows of logits and, in their place, its gradient (docs/model.md#9).

    loss = lse - logits[target] + z_loss * lse^2,   lse = logsumexp(logits)
    dlogits = exp(logits - lse) * (1 + 2 * z_loss * lse),   less 1 at the target

A program owns a row and goes over it twice, tile by tile: first for the maximum and the sum of the exponentials, which
each thread keeps for its own columns, then for the gradient. The second time the row comes from a cache, so memory is
read once and written once; without a gradient it is only read, and a row whose target is ignored is not even read.

Exponentials are base 2: exp(x - m) = exp2(x * log2(e) - offset) with offset = m * log2(e), rounded once. The sum and
the gradient use the same offset, so that its rounding error, which grows with the logits, cancels.
"""

import torch
import triton
import triton.language as tl

from andromeda.triton_kernels import launch

# 1024 threads with 8 logits each. Two such programs fill a multiprocessor, so that the rows in work are few enough to
# stay in the second-level cache: of 50304 bfloat16 logits, 26 MB on an H200. A small vocabulary takes a small tile.
_LARGE_TILE, _SMALL_TILE = 8192, 1024
_ELEMENTS_PER_THREAD = 8
_VECTOR_BYTES = 16  # of a load
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1.0e38)  # finite: the difference of two infinities would be NaN


@triton.jit
def columns(start: tl.tensor, kRuns: tl.constexpr, kVector: tl.constexpr) -> tl.tensor:
    """The columns of a tile, one run of a thread's load in each row: (kRuns, kVector)."""
    return start + tl.arange(0, kRuns)[:, None] * kVector + tl.arange(0, kVector)[None, :]


@triton.jit
def load_tile(logits: tl.tensor, column: tl.tensor, num_tokens: tl.tensor, kMasked: tl.constexpr) -> tl.tensor:
    """A tile in float32, -inf outside the vocabulary."""
    if kMasked:
        return tl.load(logits + column, mask=column < num_tokens, other=-float("inf")).to(tl.float32)
    return tl.load(logits + column).to(tl.float32)


@triton.jit
def add_tile(
    logits: tl.tensor,
    start: tl.tensor,
    num_tokens: tl.tensor,
    offset: tl.tensor,  # (kRuns,)
    total: tl.tensor,  # (kRuns,)
    kRuns: tl.constexpr,
    kVector: tl.constexpr,
    kMasked: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The largest logit times log2(e), and the sum of the exponentials relative to it, after a tile more."""
    x = load_tile(logits, columns(start, kRuns, kVector), num_tokens, kMasked)
    larger = tl.maximum(offset, tl.max(x, 1) * _LOG2_E)
    total = total * tl.exp2(offset - larger) + tl.sum(tl.exp2(x * _LOG2_E - larger[:, None]), 1)
    return larger, total


@triton.jit
def store_gradient(
    logits: tl.tensor,
    start: tl.tensor,
    num_tokens: tl.tensor,
    target: tl.tensor,
    offset: tl.tensor,
    factor: tl.tensor,
    kRuns: tl.constexpr,
    kVector: tl.constexpr,
    kMasked: tl.constexpr,
) -> None:
    """Replace a tile of logits by its gradient."""
    column = columns(start, kRuns, kVector)
    x = load_tile(logits, column, num_tokens, kMasked)
    gradient = tl.exp2(x * _LOG2_E - offset) * factor - tl.where(column == target, 1.0, 0.0)
    gradient = gradient.to(logits.dtype.element_ty)
    if kMasked:
        tl.store(logits + column, gradient, mask=column < num_tokens)
    else:
        tl.store(logits + column, gradient)


@triton.jit(do_not_specialize=["ignore_index"])
def loss_kernel(
    logits: tl.tensor,  # (rows, num_tokens), rows row_stride apart
    targets: tl.tensor,  # (rows,) int64
    losses: tl.tensor,  # (rows,) float32
    row_stride: tl.tensor,
    num_tokens: tl.tensor,
    ignore_index: tl.tensor,
    z_loss: tl.tensor,
    kRuns: tl.constexpr,
    kVector: tl.constexpr,
    kGradient: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    target = tl.load(targets + row)
    kTile: tl.constexpr = kRuns * kVector
    whole = num_tokens // kTile * kTile  # the columns in tiles that need no mask
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if kGradient:
            for start in range(0, num_tokens, kTile):
                column = columns(start, kRuns, kVector)
                zeros = tl.zeros((kRuns, kVector), logits.dtype.element_ty)
                tl.store(logits + column, zeros, mask=column < num_tokens)
    else:
        # A target outside the vocabulary is no error here, since reading it back would stall the GPU.
        known = (target >= 0) & (target < num_tokens)
        # Read before any thread replaces it: the reductions below wait for all threads.
        at_target = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
        offset = tl.full((kRuns,), _LOWEST, tl.float32)
        total = tl.zeros((kRuns,), tl.float32)
        for start in range(0, whole, kTile):
            offset, total = add_tile(logits, start, num_tokens, offset, total, kRuns, kVector, False)
        if whole < num_tokens:
            offset, total = add_tile(logits, whole, num_tokens, offset, total, kRuns, kVector, True)
        row_offset = tl.max(offset, 0)
        # A product that is fused into the first addition of the sum would have other last bits in every lane.
        row_total = tl.sum(tl.where(total == 0.0, 0.0, total * tl.exp2(offset - row_offset)), 0)
        lse = (row_offset + tl.log2(row_total)) * _LN_2
        tl.store(losses + row, lse - at_target + z_loss * lse * lse)
        if kGradient:
            factor = tl.where(known, (1.0 + 2.0 * z_loss * lse) / row_total, float("nan"))
            for start in range(0, whole, kTile):
                store_gradient(logits, start, num_tokens, target, row_offset, factor, kRuns, kVector, False)
            if whole < num_tokens:
                store_gradient(logits, whole, num_tokens, target, row_offset, factor, kRuns, kVector, True)


def forward(
    *,
    logits: torch.Tensor,
    targets: torch.Tensor,
    losses: torch.Tensor,
    ignore_index: int,
    z_loss: float,
    with_gradient: bool,
) -> None:
    """Write the losses (rows,), float32, of logits (rows, num_tokens); with_gradient: replace these by their gradient.

    The last dimension of logits is dense. Rows that start at multiples of 16 bytes are faster.
    """
    rows, num_tokens = logits.shape
    tile = _LARGE_TILE if num_tokens > _SMALL_TILE else _SMALL_TILE
    vector = _VECTOR_BYTES // logits.element_size()
    loss_kernel[(rows,)](
        logits,
        targets,
        losses,
        logits.stride(0),
        num_tokens,
        ignore_index,
        z_loss,
        kRuns=tile // vector,
        kVector=vector,
        kGradient=with_gradient,
        num_warps=tile // (_ELEMENTS_PER_THREAD * launch.warp_size(logits.device)),
        **launch.OPTIONS,
    )
