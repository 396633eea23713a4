"""The shared part of the benchmarks of operations other than attention: the command, the rounds, the rows.

The passes are `forward`, `backward`, and `training`: both in one call, for operations that may do work of the backward
pass in the forward pass. Where bytes are counted, `of_copy` is a row's gbps divided by those of torch's `copy_` of as
many bytes; where floating-point operations are, `of_matmul` is its tflops divided by those of torch's product of two
matrices (benchmarks/bars.py). Both from the same rounds. `workspace_mb` is the peak memory of a call without its
results.
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

    shape: for the table. bytes, flops: of each pass; bytes count every operand and result once. A pass without an entry
        has no such column.
    leaves, douts: the tensors that get gradients, and the gradients of the results, of their shapes and dtypes.
    """

    shape: str
    bytes: dict[str, int]
    flops: dict[str, float]
    leaves: tuple[torch.Tensor, ...]
    douts: list[torch.Tensor]

    def contenders(self) -> dict[str, Forward]:
        """This library's kernels as `checks.OURS` and `checks.TRITON`, plain torch as `BASELINE`, the others under
        their own names."""
        ...


def backends(device: str, *, cuda: bool = True) -> dict[str, str]:
    """The kernels of this library on a device: the name of a row, and the backend, requested by name.

    cuda: the operation has compiled CUDA kernels.
    """
    if device == "cpu":
        return {checks.OURS: "cpu"}
    return {**({checks.OURS: "cuda"} if cuda else {}), checks.TRITON: "triton"}


def parser(description: str, *, dtype: str | None = "bfloat16") -> argparse.ArgumentParser:
    """The arguments that all of these commands take; each command adds its widths."""
    parser = argparse.ArgumentParser(description=description)
    report.add_device_argument(parser)
    parser.add_argument("--dtype", choices=checks.DTYPES, default=dtype)
    parser.add_argument("--seqlen", type=int, help="tokens of a call")
    parser.add_argument("--pass", dest="steps", choices=("forward", "backward", "training"), nargs="+")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--short", action="store_true", help="the usual size, few rounds, nothing that torch compiles")
    report.add_arguments(parser)
    return parser


def complete(
    args: argparse.Namespace, seqlen: dict[str, int], steps: tuple[str, ...] = ("forward", "backward")
) -> argparse.Namespace:
    """Fill in what the command line does not set. seqlen: by device; with --quick it is 256."""
    args.seqlen = args.seqlen or (256 if args.quick else seqlen[args.device])
    args.steps = args.steps or list(steps)
    args.short = args.short or args.quick
    if args.short:
        args.rounds = 2 if args.quick else 3
    return args


def compiled(function: Forward) -> Forward:
    torch.compiler.reset()
    return torch.compile(function)


def call_of(step: str, forward: Forward, inputs: Inputs) -> Forward:
    """The function to time."""
    if step == "forward":
        return forward
    if step == "training":
        return lambda: torch.autograd.grad(forward(), inputs.leaves, inputs.douts)
    return functools.partial(torch.autograd.grad, forward(), inputs.leaves, inputs.douts, retain_graph=True)


def prepare(op: str, step: str, inputs: Inputs, args: argparse.Namespace) -> tuple[dict[str, Forward], list[str]]:
    """A function to time for each contender; notes about those that could not run, or differ from plain torch."""
    functions: dict[str, Forward] = {}
    notes: list[str] = []
    expected: list[torch.Tensor] | None = None
    contenders = inputs.contenders()
    if not args.short:
        contenders["torch.compile"] = compiled(contenders[BASELINE])
    # Plain torch first, because the others are compared with it; one result at a time, because it may be large.
    for name in sorted(contenders, key=lambda name: name != BASELINE):
        try:
            function = call_of(step, contenders[name], inputs)
            found = [result.detach().float() for result in function()]
            if args.device == "cuda":
                torch.cuda.synchronize()  # an error of the call surfaces here, not in the next contender
        except Exception as error:  # only its row is missing
            notes.append(checks.absence(name, f"{step} of {op}", error, []))
            continue
        if name == BASELINE:
            expected = found
        if expected and (objection := disagreement(found, expected, AGREEMENT[checks.DTYPES[args.dtype]])):
            notes.append(f"{name}, {step} of {op}, {objection}: not timed")
            continue
        functions[name] = function
    return {name: functions[name] for name in contenders if name in functions}, notes


def disagreement(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float) -> str:
    """How the results of a contender differ from plain torch; empty if they do not."""
    for index, (result, other) in enumerate(zip(found, expected, strict=True)):
        difference = ((result - other).norm() / other.norm()).item()
        if not difference <= limit:
            return f"is off by {difference:.2g} in result {index}"
    return ""


def yardsticks(step: str, inputs: Inputs, args: argparse.Namespace) -> dict[str, tuple[Forward, float, float]]:
    """Column -> what it refers to: a function, its operations and its bytes."""
    found: dict[str, tuple[Forward, float, float]] = {}
    if (moved := inputs.bytes.get(step)) is not None:
        source = torch.ones(moved // 2, dtype=torch.uint8, device=args.device)
        target = torch.empty_like(source)
        found["of_copy"] = (lambda: (target.copy_(source),), 0.0, moved)
    if step in inputs.flops:
        product = bars.matmul(args.device, checks.DTYPES[args.dtype])
        left, right = (torch.randn(product.side, product.side, device=args.device).to(product.dtype) for _ in range(2))
        found["of_matmul"] = (lambda: (left @ right,), product.flops, 0.0)
    return found


def run(
    op: str, step: str, make_inputs: Callable[..., Inputs], args: argparse.Namespace
) -> tuple[list[dict], list[str]]:
    inputs = make_inputs(args, gradients=step != "forward")
    names = {"of_copy": bars.COPY, "of_matmul": bars.matmul(args.device, checks.DTYPES[args.dtype]).name}
    with torch.set_grad_enabled(step != "forward"):
        functions, notes = prepare(op, step, inputs, args)
        limits = {names[column]: (column, *limit) for column, limit in yardsticks(step, inputs, args).items()}
        functions |= {name: limit[1] for name, limit in limits.items()}
        timings = timing.measure(functions, device=args.device, rounds=args.rounds, budget_s=60)
        memory = {name: timing.peak_memory_mb(function, args.device) for name, function in functions.items()}
    results = sum(tensor.nbytes for tensor in (inputs.douts if step == "forward" else inputs.leaves)) / 2**20
    rows = []
    for name, measured in timings.items():
        spreads, flops, moved = {}, inputs.flops.get(step), inputs.bytes.get(step)
        workspace = None
        if name in limits:
            flops, moved = (work or None for work in limits[name][2:])
        else:
            for other, (column, _, product, copied) in limits.items():
                scale = flops / product if column == "of_matmul" else moved / copied
                spreads[column] = timing.paired_ratio(timings[other], measured, scale)
            if BASELINE in timings:
                spreads["ratio"] = timing.paired_ratio(timings[BASELINE], measured)
            workspace = None if memory[name] is None else memory[name] - results
        row = report.make_row(
            measured,
            op={bars.COPY: "copy", names["of_matmul"]: "matmul"}.get(name, op),
            step=step,
            shape=inputs.shape,
            dtype=args.dtype,
            device=args.device,
            backend=name,
            flops=flops,
            bytes_moved=moved,
            spreads=spreads,
            peak_memory_mb=memory[name],
            workspace_mb=workspace,
        )
        rows.append(row)
    return rows, notes


def beside_copy(
    op: str, step: str, shape: str, kernel: Callable[[], None], moved: int, args: argparse.Namespace
) -> list[dict]:
    """The rows of a Triton kernel that operations call between matrix products, and of a copy of as many bytes."""
    source = torch.ones(moved // 2, dtype=torch.uint8, device=args.device)
    target = torch.empty_like(source)
    functions = {checks.TRITON: kernel, bars.COPY: lambda: target.copy_(source)}
    timings = timing.measure(functions, device=args.device, rounds=args.rounds, budget_s=20)
    return [
        report.make_row(
            measured,
            op="copy" if name == bars.COPY else op,
            step=step,
            shape=shape,
            dtype=args.dtype,
            device=args.device,
            backend=name,
            bytes_moved=moved,
            spreads={} if name == bars.COPY else {"of_copy": timing.paired_ratio(timings[bars.COPY], measured)},
        )
        for name, measured in timings.items()
    ]


def main(
    op: str,
    title: str,
    note: str,
    make_inputs: Callable[..., Inputs],
    args: argparse.Namespace,
    judge: Callable[[list[dict]], list[dict] | None] = bars.of_copy,
    more: Callable[[argparse.Namespace], tuple[list[dict], list[str]]] | None = None,
) -> None:
    """note: how plain torch computes the operation. judge: the bars of rows. more: measures something beside it."""
    rows, notes, lines = [], [f"Ratios refer to `{BASELINE}`, {note}."], None
    for step in [*args.steps, *([] if more is None else [None])]:
        print(f"{op} {step or 'kernels'} {args.seqlen} {args.dtype} ...", file=sys.stderr)
        new_rows, new_notes = run(op, step, make_inputs, args) if step else more(args)
        rows += new_rows
        notes += new_notes
        lines = judge(rows)
        report.save_unfinished(args, rows, device=args.device, notes=notes, bars=lines)
    report.finish(args, rows, device=args.device, title=title, notes=notes, bars=lines)
    checks.exit_if_missing(notes)
