"""`feed_forward` in plain torch (docs/model.md#6): two linear maps with the exact GELU between them."""

import torch
from torch import Tensor
from torch.nn import functional


def feed_forward(
    x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor, bias_out: Tensor | None
) -> Tensor:
    """See `andromeda.ops.feed_forward`. Everything is computed in the dtype of x."""
    return functional.linear(bias_gelu(functional.linear(x, weight_in), bias_in), weight_out, bias_out)


def bias_gelu(product: Tensor, bias: Tensor | None) -> Tensor:
    """What lies between the two products."""
    return functional.gelu(product if bias is None else product + bias)


def bias_gelu_backward(dactivation: Tensor, product: Tensor, bias: Tensor | None) -> Tensor:
    """The gradient of the product; the sum of its rows is that of the bias."""
    return torch.ops.aten.gelu_backward(dactivation, product if bias is None else product + bias)


def feed_forward_backward(
    dout: Tensor, x: Tensor, weight_in: Tensor, bias_in: Tensor | None, weight_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight_in, bias_in, weight_out and bias_out as formulas: an operator must not call autograd."""
    product = functional.linear(x, weight_in)
    dproduct = bias_gelu_backward(dout @ weight_out, product, bias_in)
    return (
        dproduct @ weight_in,
        _of_weight(dproduct, x),
        dproduct.flatten(0, -2).sum(0),
        _of_weight(dout, bias_gelu(product, bias_in)),
        dout.flatten(0, -2).sum(0),
    )


def _of_weight(dout: Tensor, x: Tensor) -> Tensor:
    """The gradient of a weight: the sum over rows of the products of dout and x."""
    return dout.flatten(0, -2).T @ x.flatten(0, -2)
