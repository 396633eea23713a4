"""Attention with ALiBi on half of the heads: this library beside what torch and other packages offer.

    python benchmarks/attn.py [--device cpu|cuda] [--dtype float32] [--seqlen 2048 8192]
                              [--pass forward backward decode] [--quick] [--json F] [--plot F]

Same tensors, same process, interleaved rounds. Results are compared before anything is timed. `ratio` is the baseline's
time divided by the row's: above 1 is faster. `tflops` counts causal work that a backend may skip (benchmarks/cases.py).
"""

from __future__ import annotations

import argparse
import sys

import cases
import report
import timing
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest difference between two ways to compute an output of magnitude about 1, checked before timing.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+")
    parser.add_argument("--seqlen", type=int, nargs="+")
    parser.add_argument("--pass", dest="steps", choices=("forward", "backward", "decode"), nargs="+")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--baseline", default="sdpa, bias tensor", help="the row that ratios refer to")
    parser.add_argument("--rounds", type=int, default=10, help="samples per row, fewer when they take long")
    report.add_arguments(parser)
    args = parser.parse_args(argv)
    args.seqlen = args.seqlen or ([256] if args.quick else [2048, 8192])
    args.steps = args.steps or ["forward", "backward", "decode"]
    args.dtype = args.dtype or (["float32"] if args.device == "cpu" else ["bfloat16"])
    if args.quick:
        args.rounds = 2
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; --device cpu runs the CPU kernels")
    if min(args.seqlen) < 1 or args.rounds < 2:
        parser.error("--seqlen must be at least 1 and --rounds at least 2")
    return args


def prepare(case: cases.AttentionCase) -> tuple[dict, list[str]]:
    """A function to time per contender that can run the case; what could not run, and why."""
    inputs = cases.AttentionInputs(case)
    functions, notes, expected = {}, [], None
    for contender in cases.contenders(case):
        try:
            forward = contender.build(inputs)
            out = forward()
            function = forward
            if case.step == "backward":
                leaves = (inputs.q, inputs.k, inputs.v)

                def function(out=out, leaves=leaves):
                    return torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)

                function()
        except (RuntimeError, NotImplementedError, ValueError, torch.OutOfMemoryError) as error:
            notes.append(f"{contender.name} did not run {case.step} {case.shape}: {str(error).splitlines()[0]}")
            continue
        if contender.exact:
            expected = out.detach() if expected is None else expected
            difference = (out.detach().float() - expected.float()).abs().max().item()
            if not difference <= AGREEMENT[case.dtype]:
                sys.exit(f"attn.py: {contender.name} differs by {difference:.2g} from the first row: not timed")
        functions[contender.name] = function
    return functions, notes


def run(case: cases.AttentionCase, args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    with torch.set_grad_enabled(case.step == "backward"):
        functions, notes = prepare(case)
        side = 256 if args.quick else 2048
        left, right = (torch.randn(side, side, device=case.device, dtype=case.dtype) for _ in range(2))
        functions[f"matmul {side}^3"] = lambda: left @ right
        timings = timing.measure(functions, device=case.device, rounds=args.rounds, budget_s=60)
        memory = {name: timing.peak_memory_mb(function, case.device) for name, function in functions.items()}
    rows = []
    baseline = timings.get(args.baseline)
    for name, measured in timings.items():
        product = name.startswith("matmul")
        flops = 2.0 * side**3 if product else case.flops
        row = {
            "op": "matmul" if product else "attention",
            "pass": case.step,
            "shape": case.shape,
            "dtype": str(case.dtype).removeprefix("torch."),
            "device": case.device,
            "backend": name,
            "median_ms": measured.median_ms,
            "p20_ms": measured.p20_ms,
            "p80_ms": measured.p80_ms,
            "tflops": flops / measured.median_ms / 1e9,
            "gbps": None if product else case.bytes / measured.median_ms / 1e6,
            "ratio": None if product or baseline is None else timing.paired_ratio(baseline, measured)[0],
            "peak_memory_mb": memory[name],
        }
        rows.append(row)
    return rows, notes


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = []
    notes = [f"Ratios refer to `{args.baseline}`. `sdpa, no bias` computes less than asked: it is there for its speed."]
    for dtype in args.dtype:
        for step in args.steps:
            for seqlen in args.seqlen:
                case = cases.AttentionCase(
                    step, seqlen, args.batch, args.heads, 1, args.head_dim, args.heads // 2, DTYPES[dtype], args.device
                )
                print(f"{step} {case.shape} {dtype} ...", file=sys.stderr)
                new_rows, new_notes = run(case, args)
                rows += new_rows
                notes += new_notes
    title = f"Causal attention, ALiBi on {args.heads // 2} of {args.heads} heads, one key head"
    report.finish(args, rows, device=args.device, title=title, notes=notes)


if __name__ == "__main__":
    main()
