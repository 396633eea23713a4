"""`feed_forward` in plain torch (docs/model.md#6): two linear maps with the exact GELU between them."""

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear


def feed_forward(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None
) -> Tensor:
    """See `andromeda.ops.feed_forward`. Everything is computed in the dtype of x."""
    return linear(gelu(linear(x, weight_in, bias_in)), weight_out, bias_out)


def feed_forward_backward(
    dout: Tensor, x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight_in, bias_in, weight_out and bias_out as formulas: an operator must not call autograd."""
    hidden = linear(x, weight_in, bias_in)
    dhidden = torch.ops.aten.gelu_backward(dout @ weight_out, hidden)
    dweight_in, dweight_out = _of_weight(dhidden, x), _of_weight(dout, gelu(hidden))
    return dhidden @ weight_in, dweight_in, _of_bias(dhidden), dweight_out, _of_bias(dout)


def _of_weight(dout: Tensor, x: Tensor) -> Tensor:
    """The gradient of a weight: the sum over rows of the products of dout and x."""
    return dout.flatten(0, -2).T @ x.flatten(0, -2)


def _of_bias(dout: Tensor) -> Tensor:
    return dout.flatten(0, -2).sum(0)
