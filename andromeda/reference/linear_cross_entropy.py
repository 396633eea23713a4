"""`linear_cross_entropy` in plain torch (docs/model.md#8, #9): logits, and their cross-entropy with the targets."""

import math

import torch
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int, z_loss: float
) -> Tensor:
    """The sum of the losses of rows (rows, dim) with targets (rows,), see `andromeda.ops.linear_cross_entropy`.

    Everything is computed in the dtype of hidden. A target outside the vocabulary makes the sum NaN.
    """
    logits, counted, outside, index = _logits(hidden, weight, targets, ignore_index)
    lse = logits.logsumexp(-1)
    losses = lse - logits.gather(1, index).squeeze(1) + z_loss * lse.square()
    return losses.masked_fill(outside, math.nan).masked_fill(~counted, 0).sum()


def linear_cross_entropy_backward(
    dtotal: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden and weight as formulas (docs/model.md#16.3): an operator must not call autograd."""
    logits, counted, outside, index = _logits(hidden, weight, targets, ignore_index)
    dlogits = logits.softmax(-1) * (1 + 2 * z_loss * logits.logsumexp(-1, keepdim=True))
    dlogits = dlogits.scatter_add(1, index, -torch.ones_like(dlogits[:, :1]))
    dlogits = dlogits.masked_fill(outside[:, None], math.nan).masked_fill(~counted[:, None], 0) * dtotal
    return dlogits @ weight, dlogits.T @ _without(hidden, counted)


def _logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits; which rows count; which targets are outside the vocabulary; the targets (rows, 1), 0 for all others."""
    counted = targets != ignore_index
    outside = counted & ((targets < 0) | (targets >= weight.shape[0]))
    index = targets.masked_fill(outside | ~counted, 0)[:, None]
    return _without(hidden, counted) @ weight.T, counted, outside, index


def _without(hidden: Tensor, counted: Tensor) -> Tensor:
    """Rows that do not count as zeros: in a sum over rows 0 * nan would be nan."""
    return hidden.masked_fill(~counted[:, None], 0)
