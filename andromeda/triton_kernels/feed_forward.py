"""Bias and exact GELU between the two products of feed-forward, and their gradient: one pass over memory each.

    forward     u = product + bias,   activation = u * Phi(u)
    backward    dproduct = dactivation * (Phi(u) + u * phi(u)),   the activation again,   dbias = sum of dproduct

Phi(u) = (1 + erf(u / sqrt(2))) / 2 is the normal distribution and phi its density (docs/model.md#6). Everything between
a load and a store is float32; a result is rounded once.

A program owns a tile of kRows x kColumns of the (rows, hidden) matrix; in backward it walks down kSteps such tiles and
sums dproduct over all of their rows, one partial sum for each column. torch adds these up. How many rows a partial sum
covers depends on nothing, so the result has the same bits on every run.

Memory: forward reads 1 matrix and writes 1, backward reads 2 and writes 2. The time should be that of a copy of as many
bytes: while an H200 copies a number of 2 bytes, it has time for about 30 operations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from andromeda.triton_kernels import launch

# A row of a tile is 32 lanes with 16 bytes of half precision each. On an H200, (8192, 10240) in bfloat16 takes 1.02
# times as long as a copy of as many bytes forward and 1.12 backward; with 16 rows, 8 steps and 4 warps 1.37 backward.
_ROWS, _COLUMNS, _STEPS, _WARPS = 4, 256, 16, 2


@triton.jit
def _normal_distribution(u: tl.tensor) -> tl.tensor:
    """Phi(u) for float32, with an error below 2**-24 before rounding.

    erf of the GPUs' libraries has branches, which become 20 operations more: as many as the time of the copy has room
    for. Here the tail Phi(-a) is 2**p(a), for all a >= 0. The polynomial p of degree 10 has the smallest weighted error
    on 0 ... 7, relative to 1 near 0 and to the tail further out (8e-5 at a = 5); p(0) is -1 exactly. Its leading
    coefficient is negative: beyond 7 it falls to minus infinity.
    """
    a = tl.abs(u)
    p = -3.640442258756593e-08 * a + 1.035009631777939e-06
    p = p * a - 1.2591201993927825e-05
    p = p * a + 8.411808812525123e-05
    p = p * a - 0.00029957195511087775
    p = p * a + 2.8397766072885133e-05
    p = p * a + 0.006926332134753466
    p = p * a - 0.05243551358580589
    p = p * a - 0.4592205286026001
    p = p * a - 1.15110445022583
    tail = tl.exp2(p * a - 1.0)
    return tl.where(u < 0.0, tail, 1.0 - tail)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    product: tl.tensor,
    bias: tl.tensor,
    activation: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    kRows: tl.constexpr,
    kColumns: tl.constexpr,
) -> None:
    # Neighbours in the grid are neighbours in a row.
    across = tl.cdiv(hidden, kColumns)
    row = (tl.program_id(0) // across).to(tl.int64) * kRows + tl.arange(0, kRows)[:, None]
    column = tl.program_id(0) % across * kColumns + tl.arange(0, kColumns)[None, :]
    inside = (row < rows) & (column < hidden)
    place = row * hidden + column
    u = tl.load(product + place, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        u += tl.load(bias + column, mask=column < hidden, other=0.0).to(tl.float32)
    tl.store(activation + place, (u * _normal_distribution(u)).to(activation.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    product: tl.tensor,
    bias: tl.tensor,
    dactivation: tl.tensor,
    activation: tl.tensor,
    dproduct: tl.tensor,
    partial: tl.tensor,
    rows: tl.tensor,
    hidden: tl.tensor,
    kRows: tl.constexpr,
    kColumns: tl.constexpr,
    kSteps: tl.constexpr,
) -> None:
    across = tl.cdiv(hidden, kColumns)
    run = (tl.program_id(0) // across).to(tl.int64)
    row = run * (kRows * kSteps) + tl.arange(0, kRows)[:, None]
    column = tl.program_id(0) % across * kColumns + tl.arange(0, kColumns)[None, :]
    shift = tl.zeros((1, kColumns), tl.float32)
    if bias is not None:
        shift = tl.load(bias + column, mask=column < hidden, other=0.0).to(tl.float32)
    total = tl.zeros((kRows, kColumns), tl.float32)
    for _ in range(kSteps):
        inside = (row < rows) & (column < hidden)
        place = row * hidden + column
        u = tl.load(product + place, mask=inside, other=0.0).to(tl.float32) + shift
        gradient = tl.load(dactivation + place, mask=inside, other=0.0).to(tl.float32)
        distribution = _normal_distribution(u)
        density = 0.3989422804014327 * tl.exp2(u * u * -0.7213475204444817)  # log2(e) / 2
        gradient *= distribution + u * density
        tl.store(activation + place, (u * distribution).to(activation.dtype.element_ty), mask=inside)
        tl.store(dproduct + place, gradient.to(dproduct.dtype.element_ty), mask=inside)
        total += gradient  # 0 outside, by its loaded factor
        row += kRows
    if partial is not None:
        tl.store(partial + run * hidden + column, tl.sum(total, 0)[None, :], mask=column < hidden)


def forward(*, product: Tensor, bias: Tensor | None, activation: Tensor) -> None:
    """Write the activation. All matrices are (rows, hidden) without gaps; the bias is (hidden,)."""
    rows, hidden = product.shape
    if 0 not in product.shape:
        forward_kernel[(_num_tiles(rows, _ROWS, hidden),)](
            product, bias, activation, rows, hidden, _ROWS, _COLUMNS, num_warps=_WARPS, **launch.OPTIONS
        )


def backward(
    *,
    product: Tensor,
    bias: Tensor | None,
    dactivation: Tensor,
    activation: Tensor,
    dproduct: Tensor,
    dbias: Tensor | None,
) -> None:
    """Write the activation, the gradient of the product and, if given, that of the bias.

    dproduct: may be `dactivation` itself.
    """
    rows, hidden = product.shape
    runs = triton.cdiv(rows, _ROWS * _STEPS)
    partial = None if dbias is None else torch.empty(runs, hidden, dtype=torch.float32, device=product.device)
    if 0 not in product.shape:
        backward_kernel[(_num_tiles(rows, _ROWS * _STEPS, hidden),)](
            product,
            bias,
            dactivation,
            activation,
            dproduct,
            partial,
            rows,
            hidden,
            _ROWS,
            _COLUMNS,
            _STEPS,
            num_warps=_WARPS,
            **launch.OPTIONS,
        )
    if dbias is not None and partial is not None:
        dbias.copy_(partial.sum(0))


def _num_tiles(rows: int, height: int, hidden: int) -> int:
    return triton.cdiv(rows, height) * triton.cdiv(hidden, _COLUMNS)
