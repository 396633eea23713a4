"""`token_shift_norm` in plain torch (docs/model.md#3, #4, #7): residual, layer norm and token shift."""

from collections.abc import Iterator

import torch
from torch import Tensor

EPSILON = 1e-5


def token_shift_norm(
    x: Tensor,
    *,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    alpha: float = 1.0,
    shift: int = 0,
    history: Tensor | None = None,
    key_start: Tensor | None = None,
    position: int = 0,
) -> tuple[Tensor, Tensor]:
    """See `andromeda.ops.token_shift_norm`. Everything is computed in the dtype of x."""
    u = norm_input(x, residual, residual_scale, alpha)
    y = u if gamma is None else torch.layer_norm(u, gamma.shape, 1 + gamma, eps=EPSILON)
    return y, token_shift(y, shift, history, key_start, position)


def norm_input(x: Tensor, residual: Tensor | None, residual_scale: Tensor | None, alpha: float) -> Tensor:
    """The input of the norm: u."""
    if residual is None:
        return x
    return x + residual * (alpha if residual_scale is None else alpha * residual_scale)


def token_shift(
    y: Tensor, shift: int, history: Tensor | None = None, key_start: Tensor | None = None, position: int = 0
) -> Tensor:
    """Delay segment k of the channels by k tokens, k = 0 ... shift (docs/model.md#4)."""
    if shift == 0:
        return y
    batch, seqlen, dim = y.shape
    segments = []
    for delay, channels in _segments(dim, shift):
        segment = y[..., channels]
        if delay > 0:
            before = y.new_zeros(batch, shift, dim) if history is None else history
            segment = torch.cat((before[:, shift - delay :, channels], segment), dim=1)[:, :seqlen]
        segments.append(segment if key_start is None else segment.masked_fill(_hidden(key_start, position, delay), 0))
    return torch.cat(segments, dim=-1)


def token_shift_transposed(dshifted: Tensor, shift: int, key_start: Tensor | None = None, position: int = 0) -> Tensor:
    """The gradient of y, from that of `token_shift(y)`: segment k moves back by k tokens."""
    seqlen, dim = dshifted.shape[1:]
    dy = torch.zeros_like(dshifted)
    for delay, channels in _segments(dim, shift):
        segment = dshifted[..., channels]
        if key_start is not None:
            segment = segment.masked_fill(_hidden(key_start, position, delay), 0)
        dy[:, : max(seqlen - delay, 0), channels] = segment[:, delay:]
    return dy


def token_shift_norm_backward(
    dy: Tensor | None,
    dshifted: Tensor | None,
    x: Tensor,
    *,
    gamma: Tensor | None,
    residual: Tensor | None,
    residual_scale: Tensor | None,
    alpha: float,
    shift: int,
    key_start: Tensor | None = None,
    position: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, residual, residual_scale and gamma as formulas (docs/model.md#16.3); None for a tensor that is
    not given.

    dy, dshifted: None for 0, but not both.
    """
    if dshifted is None:
        assert dy is not None
        du = dy
    else:
        du = token_shift_transposed(dshifted, shift, key_start, position)
        du = du if dy is None else du + dy
    dgamma = dresidual = dresidual_scale = None
    if gamma is not None:
        u = norm_input(x, residual, residual_scale, alpha)
        u = u.masked_fill((du == 0).all(-1, keepdim=True), 0)  # in a row without a gradient 0 * nan would be nan
        gain = 1 + gamma
        _, mean, inverse = torch.native_layer_norm(u, gain.shape, gain, None, EPSILON)
        du, dgamma, _ = torch.ops.aten.native_layer_norm_backward(
            du, u, gain.shape, mean, inverse, gain, None, [True, True, False]
        )
    if residual is not None:
        dresidual = du * (alpha if residual_scale is None else alpha * residual_scale)
        dresidual_scale = (
            None if residual_scale is None else alpha * (du * residual.masked_fill(du == 0, 0)).sum(dim=(0, 1))
        )
    return du, dresidual, dresidual_scale, dgamma


def _segments(dim: int, shift: int) -> Iterator[tuple[int, slice]]:
    """(delay, channels) of each segment, then of the channels that are left over."""
    width = dim // (shift + 1)
    for delay in range(shift + 1):
        yield delay, slice(delay * width, (delay + 1) * width)
    yield 0, slice((shift + 1) * width, dim)


def _hidden(key_start: Tensor, position: int, delay: int) -> Tensor:
    """(batch, seqlen, 1): whether the row `delay` tokens earlier belongs to another document or is padding."""
    token = torch.arange(position, position + key_start.shape[1], device=key_start.device)
    return (token - delay < key_start).unsqueeze(-1)
