"""Attention with ALiBi on half of the heads: this library compared with torch and other packages.

    python benchmarks/attn.py [--device cpu|cuda] [--dtype float32 bfloat16] [--seqlen 2048 8192] [--keys 8192 131072]
                              [--pass forward backward decode] [--batch 1] [--heads 24] [--kv-heads 1] [--head-dim 128]
                              [--no-causal] [--contenders andromeda "sdpa cudnn"] [--quick] [--json F] [--plot F]
    python benchmarks/attn.py --long 131072 [--heads 24]   # one forward and backward pass: time and memory

All contenders get the same tensors, in one process, in interleaved rounds. Results are compared before anything is
timed: some rows with plain torch in float32, all rows with each other. A contender that differs is left out and named;
if it is this library, the exit code is 1. On a GPU, `andromeda` is the compiled CUDA kernel, `andromeda, triton` the
Triton kernel. `ratio` is the baseline's time divided by the row's: above 1 is faster.
`tflops` counts the causal work, including work that a backend may skip (benchmarks/cases.py); `effective_tflops`
counts only the work inside the windows of the rows that use them.

Each section also times a matrix product and a copy, which show the limits of the machine. `of_matmul` is the row's
tflops divided by those of torch's product of two matrices: on a CPU float32 and 2048 x 2048, whatever the dtype of the
section, on a GPU 8192 x 8192 of that dtype. `of_copy` (decode) is the row's gbps, which counts K, V, q and out once,
divided by those of torch's `copy_` of a buffer as large as K and V together; the copy counts every byte twice, once
read and once written, although attention only reads. Both are medians over the rounds. At the default shape the bars of
benchmarks/bars.py follow the table: those of a CPU, or of an H100 or H200.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import warnings
from collections.abc import Callable

import bars
import cases
import checks
import report
import timing
import torch

DEFAULT_SHAPE = (1, 24, 1, 128, True)  # batch, heads, key heads, head_dim, causal: the shape of the bars


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    report.add_device_argument(parser)
    parser.add_argument("--dtype", choices=checks.DTYPES, nargs="+")
    parser.add_argument("--seqlen", type=int, nargs="+", help="queries and keys of forward and backward")
    parser.add_argument("--keys", type=int, nargs="+", help="keys of decode, which has one query")
    parser.add_argument("--pass", dest="steps", choices=("forward", "backward", "decode"), nargs="+")
    parser.add_argument("--long", type=int, metavar="SEQLEN", help="instead: time and memory of one pass")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="only rows whose names begin so (default: all)")
    parser.add_argument("--baseline", default="sdpa, bias tensor", help="the row that ratios refer to")
    parser.add_argument("--rounds", type=int, default=10, help="samples per row, fewer when they take long")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of a case in which rounds may begin")
    report.add_arguments(parser)
    args = parser.parse_args(argv)
    args.seqlen = args.seqlen or ([256] if args.quick else [2048, 8192])
    args.keys = args.keys or ([256] if args.quick else [8192, 131072 if args.device == "cuda" else 65536])
    args.steps = args.steps or ["forward", "backward", "decode"]
    if args.dtype is None and args.device == "cuda":
        args.dtype = ["bfloat16"]
    elif args.dtype is None:
        args.dtype = ["float32"] if args.long else ["float32", "bfloat16"]
    if args.quick:
        args.rounds = 2
    if min(*args.seqlen, *args.keys, 1 if args.long is None else args.long) < 1 or args.rounds < 2:
        parser.error("--seqlen, --keys and --long must be at least 1 and --rounds at least 2")
    return args


def make_case(step: str, seqlen: int, dtype: str, args: argparse.Namespace) -> cases.AttentionCase:
    return cases.AttentionCase(
        step, seqlen, args.batch, args.heads, args.kv_heads, args.head_dim, args.heads // 2, checks.DTYPES[dtype],
        args.device, args.causal,
    )  # fmt: skip


def contenders(case: cases.AttentionCase, args: argparse.Namespace) -> list[cases.Contender]:
    found = cases.contenders(case, compiled=not args.quick)
    return [c for c in found if args.contenders is None or c.name.startswith(tuple(args.contenders))]


def prepare(case: cases.AttentionCase, args: argparse.Namespace) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """A function to time for each contender that can run the case; notes about those that cannot, or differ."""
    torch.compiler.reset()  # drops the programs of the previous case
    inputs = cases.AttentionInputs(case)
    judge = checks.Judge(inputs)
    functions: dict[str, Callable[[], object]] = {}
    notes: list[str] = []
    for contender in contenders(case, args):
        with warnings.catch_warnings(record=True) as warned:  # torch gives the reasons for a refusal in warnings
            warnings.simplefilter("always")
            try:
                forward = contender.build(inputs)
                out = forward()
                function: Callable[[], object] = forward
                if case.step == "backward":
                    leaves = (inputs.q, inputs.k, inputs.v)
                    function = functools.partial(torch.autograd.grad, out, leaves, inputs.dout, retain_graph=True)
                    function()
                if case.device == "cuda":
                    torch.cuda.synchronize()  # an error of the call surfaces here, not in the next contender
            except Exception as error:  # any error of another package: only its row is missing
                reasons = [str(reason.message) for reason in warned]
                notes.append(checks.absence(contender.name, str(case), error, reasons))
                continue
        if contender.exact and (objection := judge.objection(contender.name, out.detach())):
            notes.append(f"{contender.name}, {case}, {objection}: not timed")
            continue
        functions[contender.name] = function
    return functions, notes


def yardsticks(case: cases.AttentionCase) -> dict[str, Callable[[], object]]:
    """A matrix product and, for decode, a copy: the limits of the machine, to be timed in the same rounds."""
    product = bars.matmul(case.device, case.dtype)
    left, right = (torch.randn(product.side, product.side, device=case.device).to(product.dtype) for _ in range(2))
    found: dict[str, Callable[[], object]] = {product.name: lambda: left @ right}
    if case.step == "decode":
        source = torch.ones(case.cache_elements, dtype=case.dtype, device=case.device)
        target = torch.empty_like(source)
        found[bars.COPY] = lambda: target.copy_(source)
    return found


def run(case: cases.AttentionCase, args: argparse.Namespace, *, memory: bool = True) -> tuple[list[dict], list[str]]:
    """Rows and notes. memory: also measure the peak of one more call of each, after a garbage collection."""
    with torch.set_grad_enabled(case.step == "backward"):
        functions, notes = prepare(case, args)
        functions |= yardsticks(case)
        timings = timing.measure(functions, device=case.device, rounds=args.rounds, budget_s=args.budget)
        watched = functions.items() if memory else ()
        peaks = {name: timing.peak_memory_mb(function, case.device) for name, function in watched}
    # Floating-point operations and bytes of one call; every name that is missing here is attention.
    matmul = bars.matmul(case.device, case.dtype).name
    product, copied = bars.matmul(case.device, case.dtype).flops, 2.0 * case.cache_elements * case.dtype.itemsize
    work = {matmul: (product, None), bars.COPY: (None, copied)}
    operations = {matmul: "matmul", bars.COPY: "copy"}
    windowed = {contender.name for contender in cases.contenders(case) if contender.windowed}
    rows = []
    for name, measured in timings.items():
        flops, bytes_moved = work.get(name, (case.flops, case.bytes))
        spreads = {}
        if name not in work:
            columns = {
                "ratio": (args.baseline, 1.0),
                "of_matmul": (matmul, case.flops / product),
                "of_copy": (bars.COPY, case.bytes / copied),
            }
            spreads = {
                column: timing.paired_ratio(timings[other], measured, scale)
                for column, (other, scale) in columns.items()
                if other in timings
            }
        row = report.make_row(
            measured,
            op=operations.get(name, "attention"),
            step=case.step,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            device=case.device,
            backend=name,
            flops=flops,
            bytes_moved=bytes_moved,
            spreads=spreads,
            peak_memory_mb=peaks.get(name),
            effective_tflops=case.effective_flops / measured.median_ms / 1e9 if name in windowed else None,
        )
        rows.append(row)
    return rows, notes


def run_long(case: cases.AttentionCase) -> list[dict]:
    """One forward and one backward pass with windows, without a warm-up. `workspace_mb` is the peak of a pass minus the
    tensors it leaves behind: out and softmax_lse; dq, dk and dv."""
    inputs = cases.AttentionInputs(case)
    leaves = (inputs.q, inputs.k, inputs.v)
    attend = cases.andromeda(inputs, windows=True)
    results: dict[str, tuple[torch.Tensor, ...]] = {}

    def forward() -> None:
        results["forward"] = (attend(),)

    def backward() -> None:
        results["backward"] = torch.autograd.grad(results["forward"], leaves, inputs.dout)

    rows = []
    for step, function in (("forward", forward), ("backward", backward)):
        this = dataclasses.replace(case, step=step)
        measured, peak = timing.measure_once(function, case.device)
        if not all(tensor.sum(dtype=torch.float32).isfinite() for tensor in results[step]):
            sys.exit(f"attn.py: {step} {case.shape} gave values that are not finite")
        kept = sum(tensor.nbytes for tensor in results[step])
        if step == "forward":
            kept += 4 * case.batch * case.num_heads * case.seqlen  # softmax_lse, float32, saved for the backward pass
        row = report.make_row(
            measured,
            op="attention",
            step=step,
            shape=case.shape,
            dtype=str(case.dtype).removeprefix("torch."),
            device=case.device,
            backend=bars.WINDOWS,
            flops=this.flops,
            bytes_moved=this.bytes,
            peak_memory_mb=peak,
            workspace_mb=None if peak is None else peak - kept / 2**20,
        )
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    title = f"{'Causal attention' if args.causal else 'Attention'}, ALiBi on {args.heads // 2} of {args.heads} heads, "
    title += "one key head" if args.kv_heads == 1 else f"{args.kv_heads} key heads"
    rows = []
    if args.long:
        for dtype in args.dtype:
            case = make_case("backward", args.long, dtype, args)
            print(f"forward and backward {case.shape} {dtype} ...", file=sys.stderr)
            rows += run_long(case)
        notes = ["Each pass ran once, with windows and without a warm-up."]
        report.finish(args, rows, device=args.device, title=title, notes=notes, bars=bars.evaluate_long(rows))
        return
    notes = [f"Ratios refer to `{args.baseline}`. `sdpa, no bias` computes less than asked: it is there for its speed."]
    if args.quick:
        notes.append("--quick leaves out flex_attention: compiling it takes longer than everything else.")
    for case in all_cases(args):
        print(f"{case} ...", file=sys.stderr)
        new_rows, new_notes = run(case, args)
        rows += new_rows
        notes += new_notes
        report.save_unfinished(args, rows, device=args.device, notes=notes, bars=judged_by_bars(rows, args))
    report.finish(args, rows, device=args.device, title=title, notes=notes, bars=judged_by_bars(rows, args))
    checks.exit_if_missing(notes)


def all_cases(args: argparse.Namespace) -> list[cases.AttentionCase]:
    return [
        make_case(step, seqlen, dtype, args)
        for dtype in args.dtype
        for step in args.steps
        for seqlen in (args.keys if step == "decode" else args.seqlen)
    ]


def judged_by_bars(rows: list[dict], args: argparse.Namespace) -> list[dict] | None:
    known = bars.of_device(args.device)
    default_shape = (args.batch, args.heads, args.kv_heads, args.head_dim, args.causal) == DEFAULT_SHAPE
    return bars.evaluate(rows, known) if known and default_shape else None


if __name__ == "__main__":
    main()
