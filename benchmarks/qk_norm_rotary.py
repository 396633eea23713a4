"""QK normalisation, scales and rotary xPos in one pass over memory, beside plain torch and torch.compile.

    python benchmarks/qk_norm_rotary.py [--device cpu|cuda] [--dtype bfloat16] [--seqlen 32768] [--quick] [--json F]

What limits it is memory: `of_copy` is the row's gbps divided by those of torch's `copy_` of as many bytes, in the same
rounds. Forward reads and writes q and k once; backward reads them and the gradients of the results, and writes theirs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import attn
import bars
import report
import timing
import torch

from andromeda.ops.qk_norm_rotary import qk_norm_rotary
from andromeda.reference import qk_norm_rotary as reference

BASELINE = "torch"
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of the norm of a result


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    report.add_device_argument(parser)
    parser.add_argument("--dtype", choices=attn.DTYPES, default="bfloat16")
    parser.add_argument("--seqlen", type=int, help="default: more than the caches of the device hold")
    parser.add_argument("--pass", dest="steps", choices=("forward", "backward"), nargs="+")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    report.add_arguments(parser)
    args = parser.parse_args(argv)
    args.seqlen = args.seqlen or (256 if args.quick else 32768 if args.device == "cuda" else 4096)
    args.steps = args.steps or ["forward", "backward"]
    if args.quick:
        args.rounds = 2
    return args


class Inputs:
    def __init__(self, args: argparse.Namespace, *, gradients: bool):
        dtype = attn.DTYPES[args.dtype]

        def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.randn(shape, device=args.device).to(dtype)

        shapes = [(1, args.seqlen, heads, args.head_dim) for heads in (args.heads, 1)]
        self.q, self.k = (draw(*shape, dtype=dtype) for shape in shapes)
        self.douts = [draw(*shape, dtype=dtype) for shape in shapes]
        self.scales = [draw(*shape[2:], dtype=torch.float32) for shape in shapes]
        self.leaves = (self.q, self.k, *self.scales)
        for leaf in self.leaves:
            leaf.requires_grad_(gradients)
        self.rotary_dim = args.head_dim // 2
        self.bytes = (self.q.numel() + self.k.numel()) * dtype.itemsize


def contenders(inputs: Inputs, device: str, *, compiled: bool) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    seqlen = inputs.q.shape[1]
    origin = reference.default_origin(seqlen, seqlen, 0)
    tables = reference.rotary_tables(seqlen, seqlen, inputs.rotary_dim, True, 0, origin)
    tables = [table.to(device, torch.float32) for table in tables]

    def andromeda() -> tuple[torch.Tensor, ...]:
        scales = dict(zip(("q_scale", "k_scale"), inputs.scales, strict=True))
        return qk_norm_rotary(inputs.q, inputs.k, **scales, rotary_dim=inputs.rotary_dim, xpos=True, backend=device)

    def plain() -> tuple[torch.Tensor, ...]:
        operands = zip((inputs.q, inputs.k), inputs.scales, tables, strict=True)
        return tuple(reference.transform(x.float(), scale, table, True).to(x.dtype) for x, scale, table in operands)

    found = {bars.WINDOWS: andromeda, BASELINE: plain}
    if compiled:
        torch.compiler.reset()
        found["torch.compile"] = torch.compile(plain)
    return found


def prepare(step: str, inputs: Inputs, args: argparse.Namespace) -> tuple[dict, list[str]]:
    """A function to time per contender; what could not run, and why. Results are compared with plain torch first."""
    functions, notes, results = {}, [], {}
    for name, forward in contenders(inputs, args.device, compiled=not args.quick).items():
        function = forward
        try:
            if step == "backward":
                outs = forward()

                def function(outs=outs):
                    return torch.autograd.grad(outs, inputs.leaves, inputs.douts, retain_graph=True)

            results[name] = [result.detach().float() for result in function()]
        except Exception as error:  # its row is missing, the others are not
            notes.append(f"{name} did not run {step} of qk_norm_rotary: {attn.describe(error, [])}")
            continue
        functions[name] = function
    for name, found in results.items():
        for index, (result, expected) in enumerate(zip(found, results.get(BASELINE, found), strict=True)):
            difference = ((result - expected).norm() / expected.norm()).item()
            if not difference <= AGREEMENT[attn.DTYPES[args.dtype]]:
                sys.exit(f"qk_norm_rotary.py: {step} of {name}: result {index} is off by {difference:.2g}: not timed")
    return functions, notes


def run(step: str, args: argparse.Namespace) -> tuple[list[dict], list[str]]:
    inputs = Inputs(args, gradients=step == "backward")
    with torch.set_grad_enabled(step == "backward"):
        functions, notes = prepare(step, inputs, args)
        moved = (3 if step == "backward" else 2) * inputs.bytes
        source = torch.ones(moved // 2, dtype=torch.uint8, device=args.device)
        target = torch.empty_like(source)
        functions[bars.COPY] = lambda: target.copy_(source)
        timings = timing.measure(functions, device=args.device, rounds=args.rounds, budget_s=60)
        memory = {name: timing.peak_memory_mb(function, args.device) for name, function in functions.items()}
    rows = []
    for name, measured in timings.items():
        spreads = {}
        if name != bars.COPY:
            spreads = {"of_copy": timing.paired_ratio(timings[bars.COPY], measured)}
            if BASELINE in timings:
                spreads["ratio"] = timing.paired_ratio(timings[BASELINE], measured)
        row = report.make_row(
            measured,
            op="copy" if name == bars.COPY else "qk_norm_rotary",
            step=step,
            shape=f"b1 n{args.seqlen} h{args.heads}/1 d{args.head_dim} r{inputs.rotary_dim}",
            dtype=args.dtype,
            device=args.device,
            backend=name,
            bytes_moved=moved,
            spreads=spreads,
            peak_memory_mb=memory[name],
        )
        rows.append(row)
    return rows, notes


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows, notes = [], [f"Ratios refer to `{BASELINE}`, the reference in float32 with rounded results."]
    for step in args.steps:
        print(f"qk_norm_rotary {step} {args.seqlen} {args.dtype} ...", file=sys.stderr)
        new_rows, new_notes = run(step, args)
        rows += new_rows
        notes += new_notes
    lines = bars.evaluate_rotary(rows) if args.device == "cuda" else None
    title = f"QK norm and rotary xPos, {args.heads} heads and one key head"
    report.finish(args, rows, device=args.device, title=title, notes=notes, bars=lines)
    attn.exit_if_missing(notes)


if __name__ == "__main__":
    main()
