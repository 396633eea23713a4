"""The number of processors that this process may use: its affinity and the quotas of its control groups limit it.

More threads than a quota allows waste it: they spin while they wait for one another, until the kernel stops all of them
for the rest of the period. Under a quota of one processor, training with two threads has a twentieth of the speed of
training with one.

This module is loaded before torch, so that the commands can set the number of threads before torch starts any.
"""

import math
import os

from andromeda.cli.cgroups import quota

_VARIABLE = "OMP_NUM_THREADS"
_limit: tuple[int, str] | None = None  # the number of threads that limit_environment set, and the reason


def available_processors(root: str | os.PathLike[str] = "/") -> int:
    """Processors that this process may use: at least 1; a fractional quota is rounded up.

    Args:
        root: where /proc and /sys are.
    """
    granted = quota(root)
    allowed = affinity()
    return allowed if granted is None else max(1, min(allowed, math.ceil(granted)))


def affinity() -> int:
    """Processors that the affinity of this process allows (`taskset`, cpusets)."""
    return len(os.sched_getaffinity(0))


def use_available_processors() -> int:
    """Limit torch's threads to the processors that this process may use. Call it before the first tensor.

    Under a container's quota torch would start a thread for every processor of the machine, which is many times slower.
    The commands call this themselves. If OMP_NUM_THREADS is set, the user has chosen, and nothing changes.

    Returns:
        The number of threads that torch uses.
    """
    import torch

    if not _chosen_by_user():
        torch.set_num_threads(min(torch.get_num_threads(), available_processors()))
    return torch.get_num_threads()


def limit_environment() -> None:
    """Limit the threads of a process that has not loaded torch, and of its future child processes."""
    global _limit
    if _chosen_by_user():
        return
    count = available_processors()
    if count < affinity():
        os.environ[_VARIABLE] = str(count)
    if count < (cores := os.cpu_count() or 1):
        who = "the container's quota grants" if count < affinity() else "the affinity of the process allows"
        _limit = count, f"{count} thread{'s' * (count > 1)}: {who} {count} of {cores} processors"


def note() -> str | None:
    """The reason why there are fewer threads than processors, if `limit_environment` reduced them."""
    return None if _limit is None else _limit[1]


def _chosen_by_user() -> bool:
    return _limit is None and bool(os.environ.get(_VARIABLE))
