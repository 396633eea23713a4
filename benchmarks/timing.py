"""Times and memory of several functions in one process: one after the other in every round, so that a slow moment of
the machine hits all of them."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable

import torch

L2_FLUSH_BYTES = 256 << 20  # larger than any second-level cache of a GPU


@dataclasses.dataclass
class Timing:
    samples_ms: list[float]

    def quantile(self, fraction: float) -> float:
        ordered = sorted(self.samples_ms)
        position = fraction * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def p20_ms(self) -> float:
        return self.quantile(0.2)

    @property
    def p80_ms(self) -> float:
        return self.quantile(0.8)


def _time_once(function: Callable[[], object], device: str, flush: torch.Tensor | None) -> float:
    if device == "cuda":
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def measure(
    functions: dict[str, Callable[[], object]], *, device: str, rounds: int, budget_s: float
) -> dict[str, Timing]:
    """Median, 20th and 80th percentile per function.

    One warm-up call each, then rounds until there are `rounds` samples or the budget is spent (at least two rounds).
    """
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
    for function in functions.values():
        _time_once(function, device, flush)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - begin > budget_s:
            break
        for name, function in functions.items():
            samples[name].append(_time_once(function, device, flush))
    return {name: Timing(values) for name, values in samples.items()}


def paired_ratio(numerator: Timing, denominator: Timing) -> tuple[float, float, float]:
    """Median, smallest and largest ratio of two functions over the rounds they ran in together."""
    ratios = [a / b for a, b in zip(numerator.samples_ms, denominator.samples_ms, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def peak_memory_mb(function: Callable[[], object], device: str) -> float | None:
    """Memory in use at the worst moment of one call, beyond what was in use before it; None where that is not known."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide a peak below it
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the high-water mark back to what is resident now
    except OSError:
        return None
    before = _status_mb("VmRSS")
    function()
    return _status_mb("VmHWM") - before


def _status_mb(field: str) -> float:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024
