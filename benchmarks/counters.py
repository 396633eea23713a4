"""Hardware counters of each kernel, from Nsight Compute: do the kernels spend their time where their comments claim?

    python benchmarks/counters.py [--ncu PATH] [--json F]
    python benchmarks/counters.py --without-ncu [--device cpu] [--quick]   # only the calls that ncu would profile

Each of `SUBJECTS` runs in its own process, so that a failure does not affect the others, and its rows are written when
it ends. First calls, which build things, are not profiled. The columns, per launch:

    shared_per_tile   wavefronts of shared memory, 128 bytes and a clock each, per tile of the score matrix (TILES:
                      queries and keys); without the operands of wgmma and the copies of TMA
    hmma_per_tile     tensor instructions of all warps, per tile: mma.sync
    gmma_per_tile     the same of wgmma, of which each of the four warps issues a part
    slots_per_tile    instructions of each of the four sub-cores, per tile, with those outside of the loop over tiles
    conflicts         share of the wavefronts caused by bank conflicts
    shared_share      share of the clocks in which shared memory was busy
    hmma_share        share of the clocks that the tensor cores need for mma.sync
    tensor_share      share of the clocks in which the tensor cores were busy
    xu_share          share of the clocks that exponentials need
    issued            instructions per clock of a multiprocessor, at most 4
    dram_of_least     bytes read from memory, divided by the bytes of the operands

Exit code 77: there is no ncu, or it may not read the counters; the last line of output gives the reason.
"""

from __future__ import annotations

import argparse
import csv
import glob
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import bars
import cases
import checks
import report
import torch

from andromeda.ops.qk_norm_rotary import qk_norm_rotary
from andromeda.ops.token_shift_norm import token_shift_norm

TIME, CYCLES = "gpu__time_duration.sum", "sm__cycles_elapsed.max"
HMMA, GMMA = "sm__inst_executed_pipe_tensor_op_hmma.sum", "sm__inst_executed_pipe_tensor_op_gmma.sum"
TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
EXECUTED, ISSUED = "sm__inst_executed.sum", "sm__inst_issued.avg.per_cycle_active"
XU = "sm__inst_executed_pipe_xu.sum"
WAVEFRONTS = "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum"
CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"
DRAM_READ = "dram__bytes_read.sum"
STALLS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "lg_throttle", "long_scoreboard", "math_pipe_throttle",
    "membar", "mio_throttle", "no_instruction", "not_selected", "selected", "short_scoreboard", "sleeping", "wait",
)  # fmt: skip
METRICS = (
    TIME, CYCLES, HMMA, GMMA, TENSOR, XU, EXECUTED, ISSUED, WAVEFRONTS, CONFLICTS, DRAM_READ, "dram__bytes_write.sum",
    "lts__t_bytes.sum", "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    *(f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio" for reason in STALLS),
)  # fmt: skip

# Kernels of the namespace hopper have its name, as in tests/kernel_budget.toml. Their tiles are those of
# tests/sass_clocks.py.
TILES = {
    "attention_forward": (128, 64),
    "attention_backward_dq": (64, 64),
    "attention_backward_dkdv": (64, 64),
    "hopper::attention_forward_wgmma": (128, 128),
    "hopper::attention_backward_dq_wgmma": (128, 128),
    "hopper::attention_backward_dkdv_wgmma": (128, 128),
}
READS_ONCE = ("attention_forward", "attention_decode")  # and whose names begin so, with or without hopper::
SUB_CORES, XU_CLOCKS = 4, 8  # of a multiprocessor; of a warp's exponentials on one of them
HMMA_CLOCKS = {8: 8, 9: 6}  # clocks of an m16n8k16 on one of the four tensor cores, by major compute capability
NOT_RUN = 77
NOT_ALLOWED = ("ERR_NVGPUCTRPERM", "LibraryNotLoaded", "not supported", "Failed to initialize the profiler")


Call = Callable[[], object]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    report.add_device_argument(parser)
    parser.add_argument("--ncu", help="the program (default: on PATH, of CUDA_HOME, of /opt/nvidia)")
    parser.add_argument("--without-ncu", action="store_true", help="only make the calls")
    parser.add_argument(
        "--subject", choices=SUBJECTS, help="make the calls of this one, as the process that ncu starts"
    )
    report.add_arguments(parser)
    return parser.parse_args(argv)


# ---- the calls that are watched -------------------------------------------------------------------------------------


def attention_case(step: str, quick: bool) -> cases.AttentionCase:
    """The shape of the headline rows."""
    seqlen = 131072 if step == "decode" else 8192
    device = "cpu" if quick else "cuda"
    return cases.AttentionCase(step, seqlen // 64 if quick else seqlen, dtype=torch.bfloat16, device=device)


# The shapes of benchmarks/qk_norm_rotary.py and token_shift_norm.py on a GPU, and the minimum that a pass reads: q and
# k, or x and the residual, and in the backward pass the gradients of two results.
TOKENS, HEADS, HEAD_DIM, ROTARY_DIM, DIM = 32768, 24, 128, 64, 2560
ROTARY_SHAPE = f"b1 n{TOKENS} h{HEADS}/1 d{HEAD_DIM} r{ROTARY_DIM}"
SHIFT_SHAPE = f"b1 n{TOKENS} dim{DIM} s1"
LEAST_BYTES = {
    "qk_norm_rotary_forward": 2 * TOKENS * (HEADS + 1) * HEAD_DIM,
    "qk_norm_rotary_backward": 2 * 2 * TOKENS * (HEADS + 1) * HEAD_DIM,
    "token_shift_norm_forward": 2 * 2 * TOKENS * DIM,
    "token_shift_norm_backward": 2 * 4 * TOKENS * DIM,
}


def call_attention(step: str, args: argparse.Namespace) -> Call:
    inputs = cases.AttentionInputs(attention_case(step, args.device == "cpu"))
    forward = cases.andromeda(inputs, windows=False)
    if step != "backward":
        return torch.no_grad()(forward)
    out, leaves = forward(), (inputs.q, inputs.k, inputs.v)
    return lambda: torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)


def call_rotary(step: str, args: argparse.Namespace) -> Call:
    q, k = (torch.randn(1, tokens(args), heads, HEAD_DIM, device=args.device).bfloat16() for heads in (HEADS, 1))
    q_scale, k_scale = (torch.rand(x.shape[2:], device=args.device) for x in (q, k))

    def forward() -> tuple[torch.Tensor, ...]:
        options = {"q_scale": q_scale, "k_scale": k_scale, "rotary_dim": ROTARY_DIM, "xpos": True}
        return qk_norm_rotary(q, k, **options, backend=args.device)

    return pass_of(step, forward, (q, k, q_scale, k_scale))


def call_shift(step: str, args: argparse.Namespace) -> Call:
    x, residual = (torch.randn(1, tokens(args), DIM, device=args.device).bfloat16() for _ in range(2))
    scale, gamma = torch.rand(2, DIM, device=args.device)

    def forward() -> tuple[torch.Tensor, ...]:
        return token_shift_norm(
            x, gamma=gamma, residual=residual, residual_scale=scale, alpha=2.0, shift=1, backend=args.device
        )

    return pass_of(step, forward, (x, residual, scale, gamma))


def tokens(args: argparse.Namespace) -> int:
    return 64 if args.device == "cpu" else TOKENS


def pass_of(step: str, forward: Callable[[], tuple[torch.Tensor, ...]], leaves: tuple[torch.Tensor, ...]) -> Call:
    """The forward pass, or only its backward pass."""
    for leaf in leaves:
        leaf.requires_grad_(step == "backward")
    if step == "forward":
        return forward
    outs = forward()
    douts = [torch.randn_like(out) for out in outs]
    return lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True)


SUBJECTS = {
    "attention forward": (call_attention, ["forward"]),
    "attention backward": (call_attention, ["backward"]),
    "attention decode": (call_attention, ["decode"]),
    "qk_norm_rotary": (call_rotary, ["forward", "backward"]),
    "token_shift_norm": (call_shift, ["forward", "backward"]),
}


def make_calls(subject: str, args: argparse.Namespace) -> None:
    """For each pass, make one call that is not profiled, and one that is."""
    build, steps = SUBJECTS[subject]
    for step in steps:
        call = build(step, args)
        call()
        if args.device == "cpu":
            call()
            continue
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


# ---- ncu ------------------------------------------------------------------------------------------------------------


def find_ncu() -> str | None:
    installed = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "ncu")
    return shutil.which("ncu") or shutil.which(installed) or next(iter(sorted(glob.glob(OTHER_NCU))[::-1]), None)


OTHER_NCU = "/opt/nvidia/nsight-compute/*/ncu"


class Refused(Exception):
    """ncu cannot read any counters here."""


def profile(ncu: str, subject: str, folder: Path) -> tuple[list[dict[str, str]], list[str]]:
    """A dict of metrics per launch, and notes. Metrics that this ncu or GPU does not have are left out."""
    metrics = list(METRICS)
    notes: list[str] = []
    only_between = ["--profile-from-start", "off"]  # between start and stop of the CUDA profiler
    for attempt in range(4):
        log = folder / f"{attempt}.csv"
        command = [ncu, "--target-processes", "all", "--clock-control", "none", *only_between]
        command += ["--kernel-name-base", "demangled", "--kernel-name", "regex:.*andromeda.*"]
        command += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(log)]
        command += ["--metrics", ",".join(metrics), sys.executable, __file__, "--device", "cuda", "--subject", subject]
        result = subprocess.run(command, capture_output=True, text=True)
        said = log.read_text(errors="replace") if log.exists() else ""
        launches = read_csv(said)
        if launches:
            return launches, notes
        lines = [line.strip() for text in (said, result.stdout, result.stderr) for line in text.splitlines() if line]
        errors = [line for line in lines if "==ERROR==" in line]
        for line in errors:
            if any(word in line for word in NOT_ALLOWED):
                raise Refused(line)
        unknown = [name for name in metrics if any(re.search(rf"\b{re.escape(name)}", line) for line in errors)]
        if unknown and len(unknown) < len(metrics):
            notes.append(f"{subject}: ncu does not know {', '.join(unknown)}")
            metrics = [name for name in metrics if name not in unknown]
        elif not errors and result.returncode == 0 and only_between:  # the profiler's marks did not reach ncu
            notes.append(f"{subject}: watched from the start, the last launch of a kernel is the one that counts")
            only_between = []
        else:
            last = [line for line in result.stderr.splitlines() if line.strip()][-1:]  # from the calls themselves
            raise RuntimeError(f"ncu, exit code {result.returncode}: {' '.join(errors + last) or 'nothing watched'}")
    raise RuntimeError(f"ncu watched nothing in {attempt + 1} attempts")


def read_csv(text: str) -> list[dict[str, str]]:
    """The launches in the output of ncu. After messages, there is a line per launch under two lines of names and units,
    or (older versions, or another page) a line per metric. Another header may follow."""
    launches: dict[str, dict[str, str]] = {}
    header: list[str] = []
    for fields in csv.reader(line for line in text.splitlines() if line.startswith('"')):
        if fields[:1] == ["ID"]:
            header = fields
            continue
        if not header or not fields or not fields[0].isdecimal():  # the line of units has no number
            continue
        row = dict(zip(header, fields, strict=False))
        launch = launches.setdefault(row["ID"], {"kernel": row.get("Kernel Name", "")})
        if "Metric Name" in row:
            launch[row["Metric Name"]] = row.get("Metric Value", "")
        else:
            launch.update({name: value for name, value in row.items() if "__" in name})
    return list(launches.values())


def number(text: str | None) -> float | None:
    """ncu groups digits by commas and writes "n/a" for values that it could not read."""
    try:
        value = float((text or "").replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# ---- rows -----------------------------------------------------------------------------------------------------------


def visible_tiles(case: cases.AttentionCase, queries: int, keys: int) -> int:
    """Tiles of the score matrix with a visible pair, over all heads, under a causal mask with equally many queries and
    keys."""
    ends = [min(first + queries, case.seqlen) for first in range(0, case.seqlen, queries)]
    return case.batch * case.num_heads * sum(math.ceil(end / keys) for end in ends)


def make_row(launch: dict[str, str], multiprocessors: int, major: int) -> dict:
    """A row like those of the benchmarks, from the metrics of a launch."""
    match = re.search(r"((?:hopper::)?\w+)_kernel", launch["kernel"])
    name = match[1] if match else launch["kernel"]
    value = {metric: number(launch.get(metric)) for metric in METRICS}
    tiles, least = None, LEAST_BYTES.get(name)
    if name.removeprefix("hopper::").startswith("attention"):
        case = attention_case("decode" if "decode" in name else "forward", quick=False)
        shape, backend = case.shape, bars.NO_WINDOWS
        if name.removeprefix("hopper::").startswith(READS_ONCE):  # all operands but out
            least = case.bytes - case.dtype.itemsize * case.batch * case.seqlen_q * case.num_heads * case.head_dim
        tiles = visible_tiles(case, *TILES[name]) if name in TILES else None
    else:
        shape = SHIFT_SHAPE if name.startswith("token_shift_norm") else ROTARY_SHAPE
        backend = checks.OURS

    def ratio(top: float | None, bottom: float | None, scale: float = 1.0) -> float | None:
        return None if top is None or not bottom else scale * top / bottom

    clocks = None if value[CYCLES] is None else value[CYCLES] * multiprocessors
    hmma_clocks = HMMA_CLOCKS.get(major)
    return {
        "op": "kernel",
        "pass": name,
        "shape": shape,
        "dtype": "bfloat16",
        "device": "cuda",
        "backend": backend,
        "median_ms": ratio(value[TIME], 1e6),
        "shared_per_tile": ratio(value[WAVEFRONTS], tiles),
        "hmma_per_tile": ratio(value[HMMA], tiles),
        "gmma_per_tile": ratio(value[GMMA], tiles),
        "slots_per_tile": ratio(value[EXECUTED], tiles, 1 / SUB_CORES),
        "conflicts": ratio(value[CONFLICTS], value[WAVEFRONTS]),
        "shared_share": ratio(value[WAVEFRONTS], clocks),
        "hmma_share": None if hmma_clocks is None else ratio(value[HMMA], clocks, hmma_clocks / SUB_CORES),
        "tensor_share": ratio(value[TENSOR], 100),
        "xu_share": ratio(value[XU], clocks, XU_CLOCKS / SUB_CORES),
        "issued": value[ISSUED],
        "dram_of_least": ratio(value[DRAM_READ], least),
        "kernel": launch["kernel"],
        "counters": {metric: found for metric, found in value.items() if found is not None},
    }


COLUMNS = (
    "op", "pass", "shape", "median_ms", "shared_per_tile", "hmma_per_tile", "gmma_per_tile", "slots_per_tile",
    "conflicts", "shared_share", "hmma_share", "tensor_share", "xu_share", "issued", "dram_of_least",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.subject:
        make_calls(args.subject, args)
        return
    if args.without_ncu:
        for subject in SUBJECTS:
            print(f"{subject} ...", file=sys.stderr)
            make_calls(subject, args)
        return
    ncu = args.ncu or find_ncu()
    if ncu is None:
        print(f"ncu (Nsight Compute) not found: PATH, CUDA_HOME, {OTHER_NCU}")
        sys.exit(NOT_RUN)
    gpu = torch.cuda.get_device_properties(0)
    facts, rows, notes = report.environment("cuda"), [], []
    with tempfile.TemporaryDirectory() as folder:
        for subject in SUBJECTS:
            print(f"{subject} ...", file=sys.stderr)
            try:
                launches, new_notes = profile(ncu, subject, Path(tempfile.mkdtemp(dir=folder)))
            except Refused as error:
                print(f"ncu may not read the counters here: {error}")
                sys.exit(NOT_RUN)
            except (RuntimeError, OSError) as error:
                launches, new_notes = [], [f"{checks.OURS}: {subject}: {error}"]
            rows += [make_row(launch, gpu.multi_processor_count, gpu.major) for launch in launches]
            notes += new_notes
            if args.json:
                report.write_json(args.json, rows, facts, notes)
    print(report.table(rows, COLUMNS), *notes, sep="\n")
    checks.exit_if_missing(notes)


if __name__ == "__main__":
    main()
