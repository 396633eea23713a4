"""The shared part of the benchmarks of operations that are limited by memory: the command, the rounds, the rows.

`of_copy` is a row's gbps divided by those of torch's `copy_` of as many bytes, in the same rounds.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Protocol

import bars
import checks
import report
import timing
import torch

BASELINE = "torch"
AGREEMENT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative to the norm of a result
Forward = Callable[[], tuple[torch.Tensor, ...]]


class Inputs(Protocol):
    """The operands of one call.

    shape: for the table. bytes: moved by each pass, every operand and result once.
    leaves, douts: the tensors that get gradients, and the gradients of the results.
    """

    shape: str
    bytes: dict[str, int]
    leaves: tuple[torch.Tensor, ...]
    douts: list[torch.Tensor]

    def contenders(self) -> dict[str, Forward]:
        """This library's kernels as `checks.OURS`, plain torch as `BASELINE`, the others under their own names."""
        ...


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that all of these commands take; each command adds its widths."""
    parser = argparse.ArgumentParser(description=description)
    report.add_device_argument(parser)
    parser.add_argument("--dtype", choices=checks.DTYPES, default="bfloat16")
    parser.add_argument("--seqlen", type=int, help="default: more than the caches of the device hold")
    parser.add_argument("--pass", dest="steps", choices=("forward", "backward"), nargs="+")
    parser.add_argument("--rounds", type=int, default=10)
    report.add_arguments(parser)
    return parser


def complete(args: argparse.Namespace) -> argparse.Namespace:
    args.seqlen = args.seqlen or (256 if args.quick else 32768 if args.device == "cuda" else 4096)
    args.steps = args.steps or ["forward", "backward"]
    if args.quick:
        args.rounds = 2
    return args


def compiled(function: Forward) -> Forward:
    torch.compiler.reset()
    return torch.compile(function)


def prepare(op: str, step: str, inputs: Inputs, args: argparse.Namespace) -> tuple[dict[str, Forward], list[str]]:
    """A function to time for each contender; notes about those that could not run, or differ from plain torch."""
    functions: dict[str, Forward] = {}
    notes: list[str] = []
    results: dict[str, list[torch.Tensor]] = {}
    contenders = inputs.contenders()
    if not args.quick:
        contenders["torch.compile"] = compiled(contenders[BASELINE])
    for name, forward in contenders.items():
        function = forward
        try:
            if step == "backward":
                function = functools.partial(
                    torch.autograd.grad, forward(), inputs.leaves, inputs.douts, retain_graph=True
                )
            results[name] = [result.detach().float() for result in function()]
        except Exception as error:  # only its row is missing
            notes.append(f"{name} did not run {step} of {op}: {checks.describe(error, [])}")
            continue
        functions[name] = function
    for name, found in results.items():
        if objection := disagreement(found, results.get(BASELINE, found), AGREEMENT[checks.DTYPES[args.dtype]]):
            notes.append(f"{name}, {step} of {op}, {objection}: not timed")
            del functions[name]
    return functions, notes


def disagreement(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float) -> str:
    """How the results of a contender differ from plain torch; empty if they do not."""
    for index, (result, other) in enumerate(zip(found, expected, strict=True)):
        difference = ((result - other).norm() / other.norm()).item()
        if not difference <= limit:
            return f"is off by {difference:.2g} in result {index}"
    return ""


def run(
    op: str, step: str, make_inputs: Callable[..., Inputs], args: argparse.Namespace
) -> tuple[list[dict], list[str]]:
    inputs = make_inputs(args, gradients=step == "backward")
    with torch.set_grad_enabled(step == "backward"):
        functions, notes = prepare(op, step, inputs, args)
        moved = inputs.bytes[step]
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
            op="copy" if name == bars.COPY else op,
            step=step,
            shape=inputs.shape,
            dtype=args.dtype,
            device=args.device,
            backend=name,
            bytes_moved=moved,
            spreads=spreads,
            peak_memory_mb=memory[name],
        )
        rows.append(row)
    return rows, notes


def main(
    op: str, title: str, note: str, make_inputs: Callable[..., Inputs], args: argparse.Namespace, at_least: float
) -> None:
    """note: how plain torch computes the operation. at_least: the share of a copy's rate that is the bar on a GPU."""
    rows, notes = [], [f"Ratios refer to `{BASELINE}`, {note}."]
    for step in args.steps:
        print(f"{op} {step} {args.seqlen} {args.dtype} ...", file=sys.stderr)
        new_rows, new_notes = run(op, step, make_inputs, args)
        rows += new_rows
        notes += new_notes
        lines = bars.evaluate_copy(rows, at_least) if args.device == "cuda" else None
        report.save_unfinished(args, rows, device=args.device, notes=notes, bars=lines)
    report.finish(args, rows, device=args.device, title=title, notes=notes, bars=lines)
    checks.exit_if_missing(notes)
