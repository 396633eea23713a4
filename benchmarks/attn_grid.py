"""Attention at many shapes, for a first overview of a GPU: this library, two kernels of torch, a product and a copy.

    python benchmarks/attn_grid.py [--device cpu|cuda] [--quick] [--resume] [--json F]

Each line of `GRID` is a call of benchmarks/attn.py, the most important first. All run in one process, since starting a
process takes as long as measuring several cases, and the rows are written after every case. A case that fails becomes a
note. After some errors a process cannot use the GPU any more: it ends with exit code 75, and --resume continues after
the line that failed, in a new process. --quick divides all lengths by 64.

Triton compiles the kernels of a line for ten seconds or more. On a GPU other processes therefore make all calls of the
Triton kernels once before anything is measured, each for some of the lines (--compile I/N: the lines I, I + N, ...).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import attn
import bars
import checks
import report
import torch

GRID = (
    "--pass forward backward --seqlen 8192",
    "--pass decode --keys 131072",
    "--pass forward backward --seqlen 8192 --head-dim 64",
    "--pass forward backward --seqlen 8192 --head-dim 256",
    "--pass decode --keys 8192 --batch 16",
    "--pass decode --keys 2048 --batch 64",
    "--pass forward backward --seqlen 2048",
    "--pass forward backward --seqlen 16384",
    "--pass forward backward --seqlen 16384 --head-dim 64",
    "--pass forward backward --seqlen 32768",
    "--pass forward backward --seqlen 8192 --heads 16 --kv-heads 16",
    "--pass forward backward --seqlen 8192 --dtype float16",
    "--pass forward backward --seqlen 8192 --no-causal",
    "--pass forward backward --seqlen 4096 --dtype float32 --contenders andromeda sdpa",
)
PEERS = (bars.CUDNN, "sdpa flash, no bias")
SPOILT = 75  # exit code: call again with --resume


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    report.add_device_argument(parser)
    parser.add_argument("--resume", action="store_true", help="leave out the lines that the file of --json has")
    parser.add_argument("--compile", metavar="I/N", help="measure nothing: let Triton compile what some lines need")
    report.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.resume and not args.json:
        parser.error("--resume needs --json FILE, the file to go on with")
    return args


def arguments_of(line: str, args: argparse.Namespace) -> argparse.Namespace:
    """The arguments of attn.py for a line of the grid."""
    words = line.split()
    if args.quick:
        words = [str(int(word) // 64) if word.isdecimal() and int(word) >= 2048 else word for word in words]
    common = ["--device", args.device, "--dtype", "bfloat16", "--contenders", checks.OURS, *PEERS]
    return attn.parse([*common, "--rounds", "2" if args.quick else "5", "--budget", "3", *words])


def compile_lines(args: argparse.Namespace) -> None:
    """Call the Triton kernels of some lines."""
    index, count = map(int, args.compile.split("/"))
    for line in GRID[index::count]:
        request = arguments_of(line, args)
        request.contenders = [checks.TRITON]
        for case in attn.all_cases(request):
            with torch.set_grad_enabled(case.step == "backward"), contextlib.suppress(Exception):
                attn.prepare(case, request)  # its errors are reported where the line is measured


def compile_all() -> None:
    """Call the Triton kernels of all lines, in other processes."""
    count = min(len(GRID), max(1, len(os.sched_getaffinity(0)) // 2))
    command = [sys.executable, __file__, "--device", "cuda", "--compile"]
    for process in [subprocess.Popen([*command, f"{index}/{count}"]) for index in range(count)]:
        process.wait()


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.compile:
        compile_lines(args)
        return
    rows, notes, done = [], [], []
    if args.resume and Path(args.json).exists():
        earlier = json.loads(Path(args.json).read_text())
        rows, notes, done = earlier["rows"], earlier["notes"], earlier["lines"]
    elif args.device == "cuda" and importlib.util.find_spec("triton") is not None:
        compile_all()

    def write(at_work_on: str | None = None) -> None:
        """Write the file so that it is correct even if the process ends now."""
        if args.json:
            known = bars.of_device(args.device) if args.device == "cuda" else None
            extra = {"lines": done, "bars": bars.evaluate(rows, known) if known else []}
            more = []
            if at_work_on:
                extra["unfinished"] = True
                more = [f"{checks.OURS}: the process ended at {at_work_on}"]
            report.write_json(args.json, rows, report.environment(args.device), notes + more, extra)

    for line in GRID:
        if line in done:
            continue
        done.append(line)  # before it runs, so that a line that ends the process is not tried again
        request = arguments_of(line, args)
        for case in attn.all_cases(request):
            print(f"{case} ...", file=sys.stderr)
            write(at_work_on=str(case))
            try:
                new_rows, new_notes = attn.run(case, request, memory=False)
            except Exception as error:  # one case less: too little memory, or a GPU unusable after an error
                new_rows, new_notes = [], [f"{checks.OURS} did not run {case}: {checks.describe(error, [])}"]
            rows += new_rows
            notes += new_notes
            if checks.is_spoilt(args.device):
                write(at_work_on=str(case))
                sys.exit(SPOILT)
    write()
    args.json = None  # the file is already written, with the lines
    report.finish(args, rows, device=args.device, title="Attention, many shapes", notes=notes)
    checks.exit_if_missing(notes)


if __name__ == "__main__":
    main()
