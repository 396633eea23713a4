"""A training pass of attention with ALiBi on half of the heads, over sequence lengths: time and memory.

    python benchmarks/scaling.py [--device cpu|cuda] [--dtype float32] [--seqlen 1024 2048 4096] [--quick] [--json F]

One pass is forward and backward with 24 heads over one key head, head_dim 128, causal. This library, with the bound on
scores that QK norm gives, is compared with two others: `sdpa, bias tensor` is torch's scaled_dot_product_attention with
the bias as a tensor; `flex_attention` computes the same bias in a compiled function, and `flex_attention, windows` also
has the windows of this library in its block mask. On a CPU FlexAttention has no backward pass and is left out.

`peak_memory_mb` is the peak memory of a pass beyond q, k, v and the gradient of the result. It includes `held_mb`, the
tensors that a contender keeps for all passes of a length: the bias, the block mask.

Outputs are compared before anything is timed, and the contenders of a length take turns. If a contender runs out of
memory, or would take longer than --limit seconds for a pass, a note reports it and its curve ends; both quantities are
assumed to grow quadratically with the length. Compiled contenders run only at the lengths of --compiled-seqlen, since
each length needs a compilation, and start none after --compile-until seconds. The rows are written after each length.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path

import cases
import checks
import report
import timing
import torch

BASELINE = "sdpa, bias tensor"
STEP = "forward and backward"
LENGTHS = {"cpu": [1024, 2048, 4096, 8192, 16384], "cuda": [1 << power for power in range(10, 18)]}
COMPILED_LENGTHS = [2048, 16384, 131072]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    report.add_device_argument(parser)
    parser.add_argument("--dtype", choices=checks.DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--seqlen", type=int, nargs="+", help="in rising order")
    parser.add_argument("--compiled-seqlen", type=int, nargs="+", default=COMPILED_LENGTHS)
    parser.add_argument("--compile-until", type=float, default=90.0, metavar="SECONDS")
    parser.add_argument("--limit", type=float, default=30.0, metavar="SECONDS", help="longest pass")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of a length in which rounds may begin")
    parser.add_argument("--resume", action="store_true", help="leave out the lengths that the file of --json has")
    report.add_arguments(parser)
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.seqlen = sorted(args.seqlen or ([128, 256] if args.quick else LENGTHS[args.device]))
    if args.quick:
        args.rounds = 2
    if args.resume and not args.json:
        parser.error("--resume needs --json FILE, the file to go on with")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    record = Record(args)
    for seqlen in args.seqlen:
        if seqlen in record.lengths:
            continue
        case = cases.AttentionCase("backward", seqlen, dtype=checks.DTYPES[args.dtype], device=args.device)
        print(f"{STEP} {case.shape} {args.dtype} ...", file=sys.stderr)
        record.rows += measure(case, args, record)
        record.lengths.append(seqlen)
        record.save()
        if checks.is_spoilt(args.device):  # nothing more can run in this process
            go_on_in_another_process(args)
    report.finish(args, record.rows, device=args.device, title="Attention over sequence lengths", notes=record.notes)
    checks.exit_if_missing(record.notes)


class Record:
    """The measurements so far, and the curves that have ended."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: list[dict] = []
        self.notes: list[str] = [
            "peak_memory_mb counts what a contender needs beyond q, k, v and the gradient of the result.",
            f"Ratios refer to `{BASELINE}`.",
        ]
        if args.device == "cpu":
            self.notes.append("FlexAttention has no backward pass on a CPU.")
        self.lengths: list[int] = []
        self.ended: list[str] = []
        self.begin = time.monotonic()
        if args.resume and Path(args.json).exists():
            earlier = json.loads(Path(args.json).read_text())
            self.rows, self.notes, self.lengths, self.ended = (
                earlier[name] for name in ("rows", "notes", "lengths", "ended")
            )

    def end(self, name: str, note: str) -> None:
        """End a curve: the contender gets no longer sequences. A note that begins with this library's name makes the
        command fail."""
        self.notes.append(note)
        self.ended.append(name)

    def last_row(self, name: str) -> dict | None:
        return next((row for row in reversed(self.rows) if row["backend"] == name), None)

    def save(self) -> None:
        if self.args.json:
            extra = {"unfinished": True, "lengths": self.lengths, "ended": self.ended}
            report.write_json(self.args.json, self.rows, report.environment(self.args.device), self.notes, extra)


def contenders(case: cases.AttentionCase, args: argparse.Namespace) -> list[cases.Contender]:
    found = cases.contenders(case, compiled=case.seqlen in args.compiled_seqlen and not args.quick)
    return [c for c in found if c.name in (checks.OURS, BASELINE) or c.name.startswith("flex")]


def expected_trouble(case: cases.AttentionCase, last: dict | None, args: argparse.Namespace) -> str | None:
    """Why a pass should not be tried, judging by the contender's last row. Without enough memory a GPU raises an error,
    but the system of a CPU may kill the process."""
    if last is None:
        return None
    growth = (case.seqlen / last["seqlen"]) ** 2
    seconds = last["median_ms"] / 1e3 * growth
    if seconds > args.limit:
        return f"a pass would take about {seconds:.0f} s"
    memory = (last["peak_memory_mb"] or 0) * growth
    if case.device == "cpu" and memory > available_mb():
        return f"a pass would need about {memory / 1024:.0f} GiB"
    return None


def available_mb() -> float:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) / 1024


class Pass:
    """Forward and backward pass of one contender. An error in a call carries the contender's name."""

    def __init__(self, contender: cases.Contender, inputs: cases.AttentionInputs) -> None:
        self.name, self.inputs = contender.name, inputs
        self.forward, self.held_mb = timing.held_memory_mb(lambda: contender.build(inputs), inputs.case.device)

    def __call__(self) -> torch.Tensor:
        inputs = self.inputs
        try:
            out = self.forward()
            torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), inputs.dout)
        except Exception as error:
            raise PassError(self.name, checks.describe(error, [])) from None
        return out.detach()


class PassError(Exception):
    """A contender's name and one line about the error."""


def measure(case: cases.AttentionCase, args: argparse.Namespace, record: Record) -> list[dict]:
    """The rows of one length."""
    torch.compiler.reset()
    inputs = cases.AttentionInputs(case)
    passes, peaks = prepare(case, inputs, args, record)
    timings: dict[str, timing.Timing] = {}
    while passes and not timings:
        try:
            timings = timing.measure(passes, device=case.device, rounds=args.rounds, budget_s=args.budget)
        except PassError as error:
            name, reason = error.args
            record.end(name, f"{name} ends before {case.seqlen} tokens: {reason}.")
            del passes[name]
        except RuntimeError as error:  # an error of a kernel, which appears only after the call
            record.notes.append(f"{case.shape} was not timed: {checks.describe(error, [])}.")
            return []
        release(case.device)
    rows = []
    for name, measured in timings.items():
        held = passes[name].held_mb
        row = report.make_row(
            measured,
            op="attention",
            step=STEP,
            shape=case.shape,
            dtype=args.dtype,
            device=case.device,
            backend=name,
            flops=7 / 5 * case.flops,  # two products forward, five backward
            spreads={"ratio": timing.paired_ratio(timings[BASELINE], measured)} if BASELINE in timings else {},
            peak_memory_mb=None if peaks[name] is None or held is None else held + peaks[name],
            held_mb=held,
            seqlen=case.seqlen,
        )
        rows.append(row)
    return rows


def prepare(
    case: cases.AttentionCase, inputs: cases.AttentionInputs, args: argparse.Namespace, record: Record
) -> tuple[dict[str, Pass], dict[str, float | None]]:
    """The passes that run and agree, and the peak memory of each, by contender."""
    judge = checks.Judge(inputs)
    passes: dict[str, Pass] = {}
    peaks: dict[str, float | None] = {}
    for contender in contenders(case, args):
        name = contender.name
        if name in record.ended:
            continue
        if name.startswith("flex") and time.monotonic() - record.begin > args.compile_until:
            record.notes.append(f"{name} was not compiled for {case.seqlen} tokens: no time was left")
            continue
        if reason := expected_trouble(case, record.last_row(name), args):
            record.end(name, f"The curve of {name} ends before {case.seqlen} tokens: {reason}.")
            continue
        objection = None
        try:
            candidate = Pass(contender, inputs)
            objection = judge.objection(name, candidate())  # the first call, which builds things
            if objection is None:
                peaks[name] = timing.peak_memory_mb(candidate, case.device)
                passes[name] = candidate
        except PassError as error:
            objection = error.args[1]
        except Exception as error:  # out of memory for the tensors it holds, or any error of another package
            objection = checks.describe(error, [])
        if objection:
            record.end(name, f"{name} ends before {case.seqlen} tokens: {objection}.")
        candidate = None
        if checks.is_spoilt(case.device):  # by this contender: the others must not be blamed
            return {}, {}
        release(case.device)
    return passes, peaks


def release(device: str) -> None:
    """Release unreferenced memory: the next contender may need all memory."""
    gc.collect()
    if device == "cuda" and not checks.is_spoilt(device):
        torch.cuda.empty_cache()


def go_on_in_another_process(args: argparse.Namespace) -> None:
    if not args.json:
        sys.exit("scaling.py: an error of the GPU keeps this process from going on; with --json FILE another one would")
    words = [word for word in sys.argv[1:] if word != "--resume"]
    os.execv(sys.executable, [sys.executable, __file__, *words, "--resume"])


if __name__ == "__main__":
    main()
