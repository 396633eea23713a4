"""Bars: targets for the speed and the memory of the kernels, compared with the rows of a run.

A bar is met when the median of the rounds reaches it. All bars of attention are for the default shape of attn.py (one
sequence, 24 heads, one key head, head_dim 128). `BARS` are those of a CPU. Both sides of a comparison were timed in the
same rounds, except where float32 is compared with bfloat16: there both refer to the float32 matrix product of their own
rounds, and the spread is the widest that the two allow. `HOPPER_BARS` are those of an H100 or H200, whose rates are
known well enough to state some of them as numbers.
"""

from __future__ import annotations

import dataclasses

import cases
import checks
import timing
import torch

MATMUL = "matmul 2048^3 float32"  # torch's own product: the rate of this machine's arithmetic
COPY = "memory copy"
FLOAT32 = "float32"  # the same row of the same pass in float32
TFLOPS = "TFLOP/s"  # no comparison: the rate itself, of dense causal work
WINDOWS = checks.OURS  # with a logit bound, which permits windows
NO_WINDOWS = "andromeda, no windows"
TRITON_NO_WINDOWS = f"{checks.TRITON}, no windows"
CUDNN = "sdpa cudnn, no bias"

OF_COPY = 0.85  # of operations that are limited by memory, on a GPU
LOSS_SHAPE = "n4096 dim512 v50304"  # of the bars of linear_cross_entropy on a CPU
LOSS_WORKSPACE_MB = 64.0  # of linear_cross_entropy, beyond its inputs and results
TRAINING_SHAPE = "b1 n8192 dim512 depth4 h8/1 d64 v50304"  # of the bars of a training step on a CPU
TRAINING_MEMORY = 0.25  # of the peak memory of a step that keeps the logits
LONG_WORKSPACE_MB = 1000.0  # of a pass over 131 072 tokens, beyond its inputs and results


@dataclasses.dataclass(frozen=True)
class Bar:
    step: str
    dtype: str
    seqlen: int
    backend: str
    at_least: float
    against: str  # MATMUL, COPY: share of that rate; FLOAT32: times that share; TFLOPS; a contender: times its speed

    @property
    def what(self) -> str:
        return f"{self.step} {self.seqlen} {self.dtype}, {self.backend}"

    @property
    def requirement(self) -> str:
        if self.against == TFLOPS:
            return f">= {self.at_least:g} {TFLOPS}"
        rate = " rate" if self.against in (MATMUL, COPY, FLOAT32) else ""
        return f">= {self.at_least:g} x {self.against}{rate}"


BARS = (
    *(
        Bar("forward", "float32", seqlen, NO_WINDOWS, at_least, against)
        for seqlen in (2048, 8192)
        for at_least, against in ((0.95, MATMUL), (2.0, "flex_attention"), (1.5, "sdpa, no bias"))
    ),
    Bar("forward", "float32", 8192, WINDOWS, 1.35, NO_WINDOWS),
    *(
        Bar("forward", "bfloat16", seqlen, NO_WINDOWS, at_least, against)
        for seqlen in (2048, 8192)
        for at_least, against in ((1.6, FLOAT32), (3.0, "flex_attention"))
    ),
    *(
        Bar("backward", "float32", seqlen, NO_WINDOWS, at_least, against)
        for seqlen in (2048, 8192)
        for at_least, against in ((0.8, MATMUL), (2.5, "sdpa, bias tensor"))
    ),
    *(
        Bar("decode", dtype, seqlen, backend, 0.8, COPY)
        for dtype in ("float32", "bfloat16")
        for seqlen in (8192, 65536)
        for backend in (WINDOWS, NO_WINDOWS)
    ),
)

HOPPER_BARS = (
    Bar("forward", "bfloat16", 8192, NO_WINDOWS, 620, TFLOPS),
    Bar("forward", "bfloat16", 8192, WINDOWS, 900, TFLOPS),
    Bar("backward", "bfloat16", 8192, NO_WINDOWS, 450, TFLOPS),
    Bar("backward", "bfloat16", 8192, WINDOWS, 640, TFLOPS),
    *(Bar("decode", "bfloat16", 131072, backend, 0.8, COPY) for backend in (WINDOWS, NO_WINDOWS)),
    Bar("forward", "bfloat16", 8192, TRITON_NO_WINDOWS, 0.6, CUDNN),
)


def of_device(device: str) -> tuple[Bar, ...] | None:
    """The bars of attention on this machine; None if it has none."""
    if device == "cpu":
        return BARS
    return HOPPER_BARS if any(name in torch.cuda.get_device_name() for name in ("H100", "H200")) else None


@dataclasses.dataclass(frozen=True)
class MatrixProduct:
    """Torch's own product of two square matrices: the rate of a machine's arithmetic."""

    side: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"matmul {self.side}^3 {str(self.dtype).removeprefix('torch.')}"

    @property
    def flops(self) -> float:
        return 2.0 * self.side**3


def matmul(device: str, dtype: torch.dtype) -> MatrixProduct:
    """The product to compare with. A GPU has separate units for half precision and needs more work."""
    return MatrixProduct(8192, dtype) if device == "cuda" else MatrixProduct(2048, torch.float32)


def evaluate(rows: list[dict], bars: tuple[Bar, ...] = BARS) -> list[dict]:
    """Each bar as a dict of report.BAR_COLUMNS: a line to print and an entry of the JSON file."""
    by_key = {(row["pass"], row["shape"], row["dtype"], row["backend"]): row for row in rows}

    def find(bar: Bar, dtype: str, backend: str) -> dict | None:
        return by_key.get((bar.step, cases.AttentionCase(bar.step, bar.seqlen).shape, dtype, backend))

    def share(row: dict, column: str) -> tuple[float, float, float] | None:
        return None if row.get(column) is None else (row[column], *row[f"{column}_range"])

    def figure(bar: Bar) -> tuple[float, float, float] | None:
        row = find(bar, bar.dtype, bar.backend)
        if row is None:
            return None
        if bar.against == TFLOPS:
            rates = [row["tflops"] * row["median_ms"] / sample for sample in row["samples_ms"]]
            return row["tflops"], min(rates), max(rates)
        if bar.against in (MATMUL, COPY):
            return share(row, "of_matmul" if bar.against == MATMUL else "of_copy")
        if bar.against == FLOAT32:
            base = find(bar, "float32", bar.backend)
            own, other = share(row, "of_matmul"), None if base is None else share(base, "of_matmul")
            return own and other and (own[0] / other[0], own[1] / other[2], own[2] / other[1])
        other = find(bar, bar.dtype, bar.against)
        if other is None:
            return None
        return timing.paired_ratio(timing.Timing(other["samples_ms"]), timing.Timing(row["samples_ms"]))

    lines = []
    for bar in bars:
        spread = figure(bar)
        lines.append(_line(bar.what, bar.requirement, spread, spread is not None and spread[0] >= bar.at_least))
    return lines


def evaluate_copy(rows: list[dict], at_least: float) -> list[dict]:
    """The bar on bandwidth for this library's rows of an operation that is limited by memory."""
    lines = []
    for row in rows:
        if row["backend"] in (checks.OURS, checks.TRITON) and row.get("of_copy") is not None:
            spread = (row["of_copy"], *row["of_copy_range"])
            what = f"{row['op']}, {row['pass']} {row['shape']} {row['dtype']}, {row['backend']}"
            lines.append(_line(what, f">= {at_least:g} x {COPY} rate", spread, spread[0] >= at_least))
    return lines


def of_copy(rows: list[dict]) -> list[dict] | None:
    """The bars of an operation that is limited by memory: only a GPU has them."""
    return evaluate_copy([row for row in rows if row["device"] == "cuda"], OF_COPY) or None


def evaluate_loss(rows: list[dict]) -> list[dict] | None:
    """The bars of linear_cross_entropy on a CPU: its speed beside plain torch, and its memory."""
    lines = []
    for row in rows:
        place = row["device"], row["backend"], row["pass"], row["shape"]
        if place == ("cpu", checks.OURS, "training", LOSS_SHAPE):
            what = f"{row['op']}, {row['pass']} {row['shape']} {row['dtype']}"
            spread = None if row.get("ratio") is None else (row["ratio"], *row["ratio_range"])
            lines.append(_line(what, ">= 1 x torch", spread, spread is not None and spread[0] >= 1))
            used = row["workspace_mb"]
            met = used is not None and used < LOSS_WORKSPACE_MB
            requirement = f"< {LOSS_WORKSPACE_MB:g}"
            what += ": MiB beyond inputs and results"
            lines.append(_line(what, requirement, None if used is None else (used,), met))
    return lines or None


def evaluate_training(rows: list[dict], kept: str) -> list[dict] | None:
    """The bars of a training step on a CPU beside the row `kept`, which keeps the logits: memory and speed."""
    by_key = {(row["shape"], row["backend"]): row for row in rows if row["pass"] == "training"}
    lines = []
    for (shape, backend), row in by_key.items():
        other = by_key.get((shape, kept))
        if (row["device"], shape, backend) != ("cpu", TRAINING_SHAPE, checks.OURS) or other is None:
            continue
        what = f"training {shape} {row['dtype']}, {backend}"
        if row["peak_memory_mb"] is not None:
            share = row["peak_memory_mb"] / other["peak_memory_mb"]
            lines.append(
                _line(f"{what}: peak memory", f"<= {TRAINING_MEMORY:g} x {kept}", (share,), share <= TRAINING_MEMORY)
            )
        spread = timing.paired_ratio(timing.Timing(other["samples_ms"]), timing.Timing(row["samples_ms"]))
        lines.append(_line(f"{what}: tokens/s", f">= 1 x {kept}", spread, spread[0] >= 1))
    return lines or None


def evaluate_long(rows: list[dict]) -> list[dict]:
    """The bar on memory for rows that carry `workspace_mb`."""
    lines = []
    for row in rows:
        used = row["workspace_mb"]
        what = f"{row['pass']} {row['shape']} {row['dtype']}, {row['backend']}: MiB beyond inputs and results"
        met = used is not None and used < LONG_WORKSPACE_MB
        lines.append(_line(what, f"< {LONG_WORKSPACE_MB:g}", None if used is None else (used,), met))
    return lines


def _line(what: str, requirement: str, spread: tuple[float, ...] | None, met: bool) -> dict:
    """spread: median, lowest and highest of the rounds; one number when there were none."""
    return {
        "what": what,
        "bar": requirement,
        "measured": None if spread is None else spread[0],
        "rounds": list(spread[1:]) if spread and len(spread) > 1 else None,
        "verdict": "not measured" if spread is None else "met" if met else "missed",
    }
