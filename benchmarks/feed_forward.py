"""Feed-forward, two products with bias and exact GELU between them, beside plain torch and torch.compile.

    python benchmarks/feed_forward.py [--device cpu|cuda] [--dtype float32] [--seqlen 4096] [--dim 512]
                                      [--pass forward training] [--short] [--quick] [--json F]

`forward` is without gradients, `training` is the forward pass with the gradients of the input, the weights and the
biases. The hidden width is four times the width, as in the model. `tflops` counts the products without recomputation:
two forward, six with gradients. `workspace_mb` is what a call holds beyond its results: for `training` without the
gradients, the hidden tensors. On a GPU the kernels between the products have rows of their own, op `gelu`, beside a
copy that moves as many bytes.
"""

from __future__ import annotations

import argparse
import functools

import checks
import operations
import torch
from torch.nn import functional

from andromeda.ops.feed_forward import feed_forward

WIDTHS = {"cpu": 512, "cuda": 2560}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = operations.parser(__doc__.split("\n")[0], dtype=None)
    parser.add_argument("--dim", type=int)
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.dim = args.dim or (64 if args.quick else WIDTHS[args.device])
    return operations.complete(args, {"cpu": 4096, "cuda": 8192}, steps=("forward", "training"))


class Inputs:
    def __init__(self, args: argparse.Namespace, *, gradients: bool) -> None:
        dtype, dim, hidden = checks.DTYPES[args.dtype], args.dim, 4 * args.dim

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(shape, device=args.device)).to(dtype)

        self.x = draw(1, args.seqlen, dim)
        self.weight_in, self.bias_in = draw(hidden, dim, scale=dim**-0.5), draw(hidden)
        self.weight_out, self.bias_out = draw(dim, hidden, scale=hidden**-0.5), draw(dim)
        self.leaves = (self.x, self.weight_in, self.bias_in, self.weight_out, self.bias_out)
        for leaf in self.leaves:
            leaf.requires_grad_(gradients)
        self.douts = [draw(1, args.seqlen, dim)]
        self.device = args.device
        self.shape = f"b1 n{args.seqlen} dim{dim}"
        products = 2 * 2.0 * args.seqlen * dim * hidden
        self.bytes: dict[str, int] = {}
        self.flops = {"forward": products, "training": 3 * products}

    def contenders(self) -> dict[str, operations.Forward]:
        def andromeda(backend: str) -> tuple[torch.Tensor, ...]:
            return (feed_forward(*self.leaves, backend=backend),)

        def plain() -> tuple[torch.Tensor, ...]:
            hidden = functional.gelu(functional.linear(self.x, self.weight_in, self.bias_in))
            return (functional.linear(hidden, self.weight_out, self.bias_out),)

        backends = operations.backends(self.device, cuda=False)
        ours = {name: functools.partial(andromeda, of) for name, of in backends.items()}
        return {**ours, operations.BASELINE: plain}


def kernel_rows(args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """The Triton kernels alone: bias and GELU, and their gradient."""
    from andromeda.triton_kernels import feed_forward as kernels

    dtype, hidden = checks.DTYPES[args.dtype], 4 * args.dim
    product, dactivation, activation, dproduct = torch.randn(4, args.seqlen, hidden, device=args.device).to(dtype)
    bias = torch.randn(hidden, device=args.device).to(dtype)
    dbias = torch.empty_like(bias)

    def forward() -> None:
        kernels.forward(product=product, bias=bias, activation=activation)

    def backward() -> None:
        kernels.backward(
            product=product, bias=bias, dactivation=dactivation, activation=activation, dproduct=dproduct, dbias=dbias
        )

    forward()
    expected = functional.gelu(product.float() + bias.float())
    if objection := operations.disagreement([activation.float()], [expected], operations.AGREEMENT[dtype]):
        return [], [f"{checks.TRITON}, kernel of gelu, {objection}: not timed"]
    rows, shape = [], f"n{args.seqlen} hidden{hidden}"
    for step, kernel, matrices in (("forward", forward, 2), ("backward", backward, 4)):
        rows += operations.beside_copy("gelu", step, shape, kernel, matrices * product.nbytes, args)
    return rows, []


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    operations.main(
        "feed_forward",
        f"Feed-forward, {args.dim} channels",
        "one operation after the other",
        Inputs,
        args,
        more=kernel_rows if args.device == "cuda" else None,
    )


if __name__ == "__main__":
    main()
