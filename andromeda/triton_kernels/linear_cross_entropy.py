"""The loss of rows of logits and, in their place, its gradient (docs/model.md#9).

    loss = lse - logits[target] + z_loss * lse^2,   lse = logsumexp(logits)
    dlogits = exp(logits - lse) * (1 + 2 * z_loss * lse),   less 1 at the target

A program owns a row and goes over it twice, tile by tile: first for the running maximum and the sum of the
exponentials, then for the gradient. The second time the row comes from the second-level cache, so memory is read once
and written once: without a gradient, only read. A row whose target is ignored is not read at all.

Exponentials are base 2: exp(x) = exp2(x * log2(e)), one multiplication and addition and one instruction.
"""

import torch
import triton
import triton.language as tl

from andromeda.triton_kernels import launch

# 1024 threads with 8 logits each. Two such programs fill a multiprocessor, so that the rows in work are few enough to
# stay in the second-level cache: of 50304 bfloat16 logits, 26 MB on an H200. A small vocabulary takes a small tile.
_LARGE_TILE, _SMALL_TILE = 8192, 1024
_ELEMENTS_PER_THREAD = 8
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.0e38)  # finite: the difference of two infinities would be NaN


@triton.jit
def tile_of(
    logits: tl.tensor, start: tl.tensor, num_tokens: tl.tensor, kTile: tl.constexpr, kMasked: tl.constexpr
) -> tl.tensor:
    """A tile of a row in float32, -inf outside the vocabulary."""
    column = start + tl.arange(0, kTile)
    if kMasked:
        return tl.load(logits + column, mask=column < num_tokens, other=-float("inf")).to(tl.float32)
    return tl.load(logits + column).to(tl.float32)


@triton.jit
def add_tile(
    largest: tl.tensor,
    sums: tl.tensor,
    at_target: tl.tensor,
    x: tl.tensor,
    start: tl.tensor,
    target: tl.tensor,
    kTile: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The running maximum, the sums of exponentials relative to it, and the logit of the target, after a tile more."""
    new_largest = tl.maximum(largest, tl.max(x, 0))
    offset = new_largest * _LOG2_E
    sums = sums * tl.exp2(largest * _LOG2_E - offset) + tl.exp2(x * _LOG2_E - offset)
    return new_largest, sums, tl.where(start + tl.arange(0, kTile) == target, x, at_target)


@triton.jit
def store_gradient(
    logits: tl.tensor,
    x: tl.tensor,
    start: tl.tensor,
    num_tokens: tl.tensor,
    target: tl.tensor,
    offset: tl.tensor,
    factor: tl.tensor,
    kTile: tl.constexpr,
    kMasked: tl.constexpr,
) -> None:
    """Replace a tile of logits by its gradient."""
    column = start + tl.arange(0, kTile)
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
    kTile: tl.constexpr,
    kGradient: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    logits += row.to(tl.int64) * row_stride
    target = tl.load(targets + row)
    whole = num_tokens // kTile * kTile  # the columns in tiles that need no mask
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if kGradient:
            for start in range(0, num_tokens, kTile):
                column = start + tl.arange(0, kTile)
                zeros = tl.zeros((kTile,), logits.dtype.element_ty)
                tl.store(logits + column, zeros, mask=column < num_tokens)
    else:
        largest = tl.full((), _LOWEST, tl.float32)
        sums = tl.zeros((kTile,), tl.float32)
        at_target = tl.zeros((kTile,), tl.float32)
        for start in range(0, whole, kTile):
            x = tile_of(logits, start, num_tokens, kTile, False)
            largest, sums, at_target = add_tile(largest, sums, at_target, x, start, target, kTile)
        if whole < num_tokens:
            x = tile_of(logits, whole, num_tokens, kTile, True)
            largest, sums, at_target = add_tile(largest, sums, at_target, x, whole, target, kTile)
        # The same offset again, not the log-sum-exp: its rounding error, which grows with the logits, then cancels.
        offset, total = largest * _LOG2_E, tl.sum(sums, 0)
        lse = (offset + tl.log2(total)) * _LN_2
        # A target outside the vocabulary is no error here, since reading it back would stall the GPU.
        known = (target >= 0) & (target < num_tokens)
        loss = tl.where(known, lse - tl.sum(at_target, 0) + z_loss * lse * lse, float("nan"))
        tl.store(losses + row, loss)
        if kGradient:
            factor = tl.where(known, (1.0 + 2.0 * z_loss * lse) / total, float("nan"))
            for start in range(0, whole, kTile):
                x = tile_of(logits, start, num_tokens, kTile, False)
                store_gradient(logits, x, start, num_tokens, target, offset, factor, kTile, False)
            if whole < num_tokens:
                x = tile_of(logits, whole, num_tokens, kTile, True)
                store_gradient(logits, x, whole, num_tokens, target, offset, factor, kTile, True)


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
    lanes = launch.warp_size(logits.device)
    loss_kernel[(rows,)](
        logits,
        targets,
        losses,
        logits.stride(0),
        num_tokens,
        ignore_index,
        z_loss,
        kTile=tile,
        kGradient=with_gradient,
        num_warps=tile // (_ELEMENTS_PER_THREAD * lanes),
        **launch.OPTIONS,
    )
