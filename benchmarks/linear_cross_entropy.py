"""Logits and cross-entropy in one operation that never holds all logits, beside plain torch and other packages.

    python benchmarks/linear_cross_entropy.py [--device cpu|cuda] [--dtype float32] [--seqlen 4096] [--dim 512]
                                              [--num-tokens 50304] [--pass forward training] [--short] [--quick]
                                              [--json F]

`training` is the loss with its gradients, of the hidden states and of the weight; `forward` is the loss alone, without
gradients. `torch` is `linear`, float32 logits, `cross_entropy`; "andromeda, logits kept" the same with this library's
cross-entropy of logits. Liger and cut-cross-entropy have rows where they can be imported and run; the latter without
its filter, which leaves out small gradients, and on a CPU by its variant for torch.compile. `tflops` counts the matrix
products without recomputation: one forward, three with gradients. On a GPU the kernel between the products has a row of
its own, op `cross_entropy`: it replaces a block of logits by their gradient, beside a copy that moves as many bytes.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util

import bars
import checks
import operations
import torch
from torch.nn import functional

from andromeda.model import cross_entropy
from andromeda.ops.linear_cross_entropy import GPU_BLOCK_LOGITS, linear_cross_entropy

KEPT = f"{checks.OURS}, logits kept"
WIDTHS = {"cpu": 512, "cuda": 2560}
IGNORED = -100


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = operations.parser(__doc__.split("\n")[0], dtype=None)
    parser.add_argument("--dim", type=int)
    parser.add_argument("--num-tokens", type=int, default=50304)
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.dim = args.dim or (64 if args.quick else WIDTHS[args.device])
    if args.quick:
        args.num_tokens = min(args.num_tokens, 2000)
    return operations.complete(args, {"cpu": 4096, "cuda": 8192}, steps=("forward", "training"))


class Inputs:
    def __init__(self, args: argparse.Namespace, *, gradients: bool) -> None:
        dtype = checks.DTYPES[args.dtype]
        self.x = torch.randn(args.seqlen, args.dim, device=args.device).to(dtype)
        self.weight = (torch.randn(args.num_tokens, args.dim, device=args.device) * args.dim**-0.5).to(dtype)
        self.targets = torch.randint(args.num_tokens, (args.seqlen,), device=args.device)
        self.targets[:: max(args.seqlen // 8, 1)] = IGNORED
        self.leaves = (self.x, self.weight)
        for leaf in self.leaves:
            leaf.requires_grad_(gradients)
        self.douts = [torch.ones((), device=args.device)]
        self.device = args.device
        self.shape = f"n{args.seqlen} dim{args.dim} v{args.num_tokens}"
        product = 2.0 * args.seqlen * args.dim * args.num_tokens
        self.bytes: dict[str, int] = {}
        self.flops = {"forward": product, "training": 3 * product}

    def contenders(self) -> dict[str, operations.Forward]:
        def andromeda(backend: str) -> tuple[torch.Tensor, ...]:
            return (linear_cross_entropy(self.x, self.weight, self.targets, backend=backend),)

        def logits() -> torch.Tensor:
            return functional.linear(self.x, self.weight)

        def kept() -> tuple[torch.Tensor, ...]:
            return (cross_entropy(logits(), self.targets),)

        def plain() -> tuple[torch.Tensor, ...]:
            return (functional.cross_entropy(logits().float(), self.targets, ignore_index=IGNORED),)

        backends = operations.backends(self.device, cuda=False)
        ours = {name: functools.partial(andromeda, of) for name, of in backends.items()}
        return {**ours, KEPT: kept, operations.BASELINE: plain, **self.packages()}

    def packages(self) -> dict[str, operations.Forward]:
        """Other packages with this operation; one that is installed and fails gives a note with the reason."""
        found: dict[str, operations.Forward] = {}

        def liger() -> tuple[torch.Tensor, ...]:
            function = importlib.import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
            loss = function(self.x, self.weight, self.targets, ignore_index=IGNORED)
            return (loss[0] if isinstance(loss, tuple) else loss,)

        def cut() -> tuple[torch.Tensor, ...]:
            function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
            options = {"filter_eps": None} if self.device == "cuda" else {"impl": "torch_compile"}
            return (function(self.x, self.weight, self.targets, ignore_index=IGNORED, **options),)

        for name, module, call in (
            ("liger", "liger_kernel", liger),
            ("cut_cross_entropy", "cut_cross_entropy", cut),
        ):
            if importlib.util.find_spec(module) is not None:
                found[name] = call
        return found


def kernel_rows(args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    """The Triton kernel alone, on as many rows of logits as a call holds at once, and a copy of as many bytes."""
    from andromeda.triton_kernels import linear_cross_entropy as kernels

    dtype, rows = checks.DTYPES[args.dtype], min(args.seqlen, GPU_BLOCK_LOGITS // args.num_tokens)
    logits = torch.randn(rows, args.num_tokens, device=args.device).to(dtype)
    targets = torch.randint(args.num_tokens, (rows,), device=args.device)
    losses = torch.empty(rows, device=args.device)
    expected = functional.cross_entropy(logits.float(), targets, reduction="none")

    def kernel() -> None:  # its own results are the logits of the next call
        kernels.forward(
            logits=logits, targets=targets, losses=losses, ignore_index=IGNORED, z_loss=0.0, with_gradient=True
        )

    kernel()
    if objection := operations.disagreement([losses], [expected], operations.AGREEMENT[dtype]):
        return [], [f"{checks.TRITON}, kernel of cross_entropy, {objection}: not timed"]
    shape = f"n{rows} v{args.num_tokens}"
    return operations.beside_copy("cross_entropy", "training", shape, kernel, 2 * logits.nbytes, args), []


def judge(rows: list[dict]) -> list[dict] | None:
    return bars.evaluate_loss(rows) or bars.of_copy(rows)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    operations.main(
        "linear_cross_entropy",
        f"Logits and cross-entropy, {args.num_tokens} tokens",
        "`linear` and `cross_entropy` on float32 logits",
        Inputs,
        args,
        judge,
        kernel_rows if args.device == "cuda" else None,
    )


if __name__ == "__main__":
    main()
