"""Times and memory of several functions in one process: one after the other in every round, so that a slow moment of
the machine affects all of them. The order rotates between rounds, so that none always follows the same other one."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

Built = TypeVar("Built")

L2_FLUSH_BYTES = 256 << 20  # larger than any second-level cache of a GPU
MIN_SAMPLE_MS = 20.0  # a single call of 1 ms would measure the caches that the previous function left
MAX_GPU_CALLS = 20  # of a sample: the caches are flushed before each call, so more calls are not more accurate
# If the GPU waited for the host, the host's time would count: Python needs tens of microseconds to launch a kernel of
# ten, and hundreds for a backward pass, which another thread of torch queues. The GPU is therefore kept busy for about
# a millisecond while the host queues the call and both events.
HEAD_START_CYCLES = 2_000_000
WARM_UP_MS = 1000.0


@dataclasses.dataclass
class Timing:
    samples_ms: list[float]
    interval: tuple[float, float] | None = None  # seconds since 1970: when the rounds began and ended

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
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(HEAD_START_CYCLES)
        if flush is not None:
            flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def _warm_up(function: Callable[[], object], device: str, flush: torch.Tensor | None) -> int:
    """The number of calls in a sample. The first call may build things, so the second decides unless calls are slow."""
    elapsed = _time_once(function, device, flush)
    if elapsed < WARM_UP_MS:
        elapsed = min(elapsed, _time_once(function, device, flush))
    calls = max(1, math.ceil(MIN_SAMPLE_MS / max(elapsed, 1e-3)))
    return min(calls, MAX_GPU_CALLS) if device == "cuda" else calls


def _sample(function: Callable[[], object], calls: int, device: str, flush: torch.Tensor | None) -> float:
    """Mean milliseconds of `calls` consecutive calls."""
    if device == "cuda":  # the events exclude the flush before each call
        return statistics.fmean(_time_once(function, device, flush) for _ in range(calls))
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) * 1e3 / calls


def measure(
    functions: Mapping[str, Callable[[], object]], *, device: str, rounds: int, budget_s: float
) -> dict[str, Timing]:
    """Times of each function; sample number i of all of them comes from the same round.

    One or two warm-up calls each, then rounds until there are `rounds` samples or the budget is spent (at least two
    rounds). A sample is the mean of as many calls as take about 20 ms (on a GPU at most 20 calls), or of one longer
    call; the number is fixed after the warm-up. A function that is slow to build (torch.compile) should have been
    called before.
    """
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
    calls = {name: _warm_up(function, device, flush) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    begin, begin_of_day = time.perf_counter(), time.time()
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - begin > budget_s:
            break
        first = done % max(len(names), 1)
        for name in names[first:] + names[:first]:
            samples[name].append(_sample(functions[name], calls[name], device, flush))
    interval = begin_of_day, time.time()
    return {name: Timing(values, interval) for name, values in samples.items()}


def measure_once(function: Callable[[], object], device: str) -> tuple[Timing, float | None]:
    """Time and peak memory (see `peak_memory_mb`) of a single call, for calls that take minutes."""
    samples: list[float] = []
    peak = peak_memory_mb(lambda: samples.append(_time_once(function, device, None)), device)
    return Timing(samples), peak


def paired_ratio(numerator: Timing, denominator: Timing, scale: float = 1.0) -> tuple[float, float, float]:
    """Median, smallest and largest of `scale` x the ratio of two functions over their common rounds."""
    ratios = [scale * a / b for a, b in zip(numerator.samples_ms, denominator.samples_ms, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def peak_memory_mb(function: Callable[[], object], device: str) -> float | None:
    """The peak memory of one call in MiB, minus the memory in use before it; None if unknown."""
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
    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator keeps after a free would hide a lower peak
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark to the memory that is resident now
    except OSError:
        return None
    before = _status_mb("VmRSS")
    function()
    return _status_mb("VmHWM") - before


def held_memory_mb(build: Callable[[], Built], device: str) -> tuple[Built, float | None]:
    """The result of `build`, and the MiB that it keeps in use; None if unknown."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        built = build()
        gc.collect()
        return built, (torch.cuda.memory_allocated() - before) / 2**20
    if not sys.platform.startswith("linux"):
        return build(), None
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    before = _status_mb("VmRSS")
    built = build()
    gc.collect()
    libc.malloc_trim(0)
    return built, max(_status_mb("VmRSS") - before, 0.0)


def _status_mb(field: str) -> float:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024
