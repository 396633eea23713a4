"""QK normalisation, scales and rotary xPos in one pass over memory, beside plain torch and torch.compile.

    python benchmarks/qk_norm_rotary.py [--device cpu|cuda] [--dtype bfloat16] [--seqlen 32768] [--short] [--json F]

Memory bandwidth limits it: `of_copy` is the row's gbps divided by those of torch's `copy_` of as many bytes, in the
same rounds. Forward reads and writes q and k once; backward reads them and the gradients of the results, and writes
their gradients.
"""

from __future__ import annotations

import argparse
import functools

import checks
import operations
import torch

from andromeda.ops.qk_norm_rotary import qk_norm_rotary
from andromeda.reference import qk_norm_rotary as reference


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = operations.parser(__doc__.split("\n")[0])
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    return operations.complete(parser.parse_args(argv), {"cpu": 4096, "cuda": 32768})


class Inputs:
    def __init__(self, args: argparse.Namespace, *, gradients: bool) -> None:
        dtype = checks.DTYPES[args.dtype]

        def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(shape, device=args.device).to(dtype)

        shapes = [(1, args.seqlen, heads, args.head_dim) for heads in (args.heads, 1)]
        self.q, self.k = (draw(*shape, dtype=dtype) for shape in shapes)
        self.douts = [draw(*shape, dtype=dtype) for shape in shapes]
        self.scales = [draw(*shape[2:], dtype=torch.float32) for shape in shapes]
        self.leaves = (self.q, self.k, *self.scales)
        for leaf in self.leaves:
            leaf.requires_grad_(gradients)
        self.device, self.rotary_dim = args.device, args.head_dim // 2
        self.shape = f"b1 n{args.seqlen} h{args.heads}/1 d{args.head_dim} r{self.rotary_dim}"
        once = (self.q.numel() + self.k.numel()) * dtype.itemsize
        self.flops: dict[str, float] = {}
        self.bytes = {"forward": 2 * once, "backward": 3 * once}

    def contenders(self) -> dict[str, operations.Forward]:
        seqlen = self.q.shape[1]
        origin = reference.default_origin(seqlen, seqlen, 0)
        tables = reference.rotary_tables(seqlen, seqlen, self.rotary_dim, True, 0, origin)
        tables = [table.to(self.device, torch.float32) for table in tables]

        def andromeda(backend: str) -> tuple[torch.Tensor, ...]:
            scales = dict(zip(("q_scale", "k_scale"), self.scales, strict=True))
            return qk_norm_rotary(self.q, self.k, **scales, rotary_dim=self.rotary_dim, xpos=True, backend=backend)

        def plain() -> tuple[torch.Tensor, ...]:
            operands = zip((self.q, self.k), self.scales, tables, strict=True)
            return tuple(reference.transform(x.float(), scale, table, True).to(x.dtype) for x, scale, table in operands)

        ours = {name: functools.partial(andromeda, of) for name, of in operations.backends(self.device).items()}
        return {**ours, operations.BASELINE: plain}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    operations.main(
        "qk_norm_rotary",
        f"QK norm and rotary xPos, {args.heads} heads and one key head",
        "the reference in float32 with rounded results",
        Inputs,
        args,
    )


if __name__ == "__main__":
    main()
