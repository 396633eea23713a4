"""What takes the time of a call: the kernels that torch's profiler sees, and their shares by part of the model."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first pattern that a kernel's name contains, on a CPU an operator's, gives its part.
PARTS = (
    ("attention", r"attention|flash|fmha"),
    ("qk_norm_rotary", r"qk_norm_rotary"),
    ("token_shift_norm", r"token_shift_norm|layer_norm"),
    ("loss", r"cross_entropy|TokenLosses|softmax|nll_loss|logsumexp"),
    ("optimizer", r"[Aa]dam|multi_tensor|foreach|addcdiv|addcmul|lerp"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|cublas|aten::(add|b)?mm\b|splitK"),
    ("feed-forward", r"feed_forward|[gG]elu"),
    ("embedding", r"embedding|index_select|scatter|gather"),
    ("casts and copies", r"copy|Memcpy|Memset|fill"),
)
OTHER = "other"
KEPT = 12  # kernels that are listed
Kernel = tuple[str, float, int]  # name, milliseconds, launches


def part_of(name: str) -> str:
    return next((part for part, pattern in PARTS if re.search(pattern, name)), OTHER)


def kernels(call: Callable[[], object], device: str) -> list[Kernel]:
    """The kernels of one call, on a CPU its operators without those that they call, longest first."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    call()
    with profile(activities=activities) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    found = []
    for event in profiler.key_averages():
        if device == "cpu":
            spent = event.self_cpu_time_total
        else:
            spent = event.self_device_time_total if event.device_type == DeviceType.CUDA else 0.0
        if spent > 0:
            found.append((event.key, spent / 1e3, event.count))
    return sorted(found, key=lambda kernel: -kernel[1])


def summary(found: list[Kernel]) -> dict:
    """For the JSON file: shares by part, the longest kernels, and the sum of all."""
    total = sum(spent for _, spent, _ in found)
    shares: dict[str, float] = {}
    for name, spent, _ in found:
        shares[part_of(name)] = shares.get(part_of(name), 0.0) + spent / total
    return {
        "kernels_ms": round(total, 3),
        "shares": {part: round(share, 4) for part, share in sorted(shares.items(), key=lambda item: -item[1])},
        "longest": [[name[:120], round(spent, 3), count] for name, spent, count in found[:KEPT]],
    }


def sentence(shares: dict[str, float]) -> str:
    """The shares of at least one per cent."""
    return ", ".join(f"{part} {100 * share:.0f} %" for part, share in shares.items() if share >= 0.01)
