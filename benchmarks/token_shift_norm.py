"""Residual, layer norm and token shift in one pass over memory, beside plain torch and torch.compile.

    python benchmarks/token_shift_norm.py [--device cpu|cuda] [--dtype bfloat16] [--seqlen 32768] [--short] [--json F]

Memory bandwidth limits it: `of_copy` is the row's gbps divided by those of torch's `copy_` of as many bytes, in the
same rounds. Forward reads x and the residual and writes y and its token shift; backward reads x, the residual and the
gradients of both results, and writes the gradients of x and the residual. The vectors are small in comparison.
"""

from __future__ import annotations

import argparse
import functools

import checks
import operations
import torch

from andromeda.ops.token_shift_norm import token_shift_norm
from andromeda.reference import token_shift_norm as reference

ALPHA = 64**0.25  # of DeepNorm with 32 blocks


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = operations.parser(__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=2560)
    parser.add_argument("--shift", type=int, default=1)
    return operations.complete(parser.parse_args(argv), {"cpu": 4096, "cuda": 32768})


class Inputs:
    def __init__(self, args: argparse.Namespace, *, gradients: bool) -> None:
        dtype = checks.DTYPES[args.dtype]
        rows = (torch.randn(1, args.seqlen, args.dim, device=args.device).to(dtype) for _ in range(4))
        self.x, self.residual, *self.douts = rows
        self.residual_scale, self.gamma = 1 + 0.1 * torch.randn(2, args.dim, device=args.device)
        self.leaves = (self.x, self.residual, self.residual_scale, self.gamma)
        for leaf in self.leaves:
            leaf.requires_grad_(gradients)
        self.device, self.shift = args.device, args.shift
        self.shape = f"b1 n{args.seqlen} dim{args.dim} s{args.shift}"
        once = self.x.numel() * dtype.itemsize
        self.flops: dict[str, float] = {}
        self.bytes = {"forward": 4 * once, "backward": 6 * once}

    def contenders(self) -> dict[str, operations.Forward]:
        def andromeda(backend: str) -> tuple[torch.Tensor, ...]:
            return token_shift_norm(
                self.x,
                gamma=self.gamma,
                residual=self.residual,
                residual_scale=self.residual_scale,
                alpha=ALPHA,
                shift=self.shift,
                backend=backend,
            )

        def plain() -> tuple[torch.Tensor, ...]:
            u = reference.norm_input(self.x.float(), self.residual.float(), self.residual_scale, ALPHA)
            y = torch.layer_norm(u, self.gamma.shape, 1 + self.gamma, eps=reference.EPSILON).to(self.x.dtype)
            return y, reference.token_shift(y, self.shift)

        ours = {name: functools.partial(andromeda, of) for name, of in operations.backends(self.device).items()}
        return {**ours, operations.BASELINE: plain}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    operations.main(
        "token_shift_norm",
        f"residual, norm and token shift, {args.dim} channels",
        "one operation after the other: residual and norm in float32, y and its shift rounded",
        Inputs,
        args,
    )


if __name__ == "__main__":
    main()
