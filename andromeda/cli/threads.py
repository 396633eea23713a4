"""How many processors this process may use: what its affinity and the quotas of its control groups grant.

Threads beyond a quota do not share it, they burn it: they spin for one another until the kernel stops all of them for
the rest of the period. Under a quota of one processor, training with two threads has a twentieth of the speed of one.

Nothing here imports torch: the commands set the number of threads before torch starts any.
"""

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

_VARIABLE = "OMP_NUM_THREADS"
_limit: tuple[int, str] | None = None  # what limit_environment set, and why


def available_processors(root: str | os.PathLike = "/") -> int:
    """Processors that this process may use: at least 1, a quota of parts of one counts as a whole one.

    Args:
        root: where /proc and /sys are.
    """
    granted = quota(root)
    allowed = affinity()
    return allowed if granted is None else max(1, min(allowed, math.ceil(granted)))


def affinity() -> int:
    """Processors that the affinity of this process allows (`taskset`, cpusets)."""
    return len(os.sched_getaffinity(0))


def quota(root: str | os.PathLike = "/") -> float | None:
    """Processors that control groups grant: the least of the own group and those above it; None without a quota.

    Both versions of control groups are read where /proc/self/mountinfo says that they are mounted. In a container the
    mount may begin at the own group, and the groups above it are not to be seen.

    Args:
        root: where /proc and /sys are.
    """
    root = Path(root)
    groups = dict(_groups(_read(root / "proc/self/cgroup")))
    found = []
    for kind, mount_root, mount_point in _mounts(_read(root / "proc/self/mountinfo")):
        top = root / mount_point.lstrip("/")
        own = top / groups.get(kind, "/").removeprefix(mount_root).lstrip("/")  # what is not there has no limit
        for group in (own, *own.parents):
            value = _unified(group) if kind == "" else _legacy(group)
            if value is not None:
                found.append(value)
            if group == top:
                break
    return min(found, default=None)


def use_available_processors() -> int:
    """Let torch use no more threads than there are processors for this process; to be called before the first tensor.

    Under a container's quota torch would start a thread per processor of the machine, which is many times slower. The
    commands do this by themselves. If OMP_NUM_THREADS is set, that is what somebody wants, and nothing changes.

    Returns:
        The number of threads that torch uses.
    """
    import torch

    if not _chosen_by_user():
        torch.set_num_threads(min(torch.get_num_threads(), available_processors()))
    return torch.get_num_threads()


def limit_environment() -> None:
    """`use_available_processors` for a process that has not loaded torch, and for the processes that it will start."""
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
    """Why there are fewer threads than processors, if `limit_environment` saw to that."""
    return None if _limit is None else _limit[1]


def _chosen_by_user() -> bool:
    return _limit is None and bool(os.environ.get(_VARIABLE))


# ---- control groups


def _groups(text: str) -> Iterator[tuple[str, str]]:
    """From /proc/self/cgroup: the path of the own group in version 2, as of "", and of the "cpu" controller in 1."""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield "", path
        elif "cpu" in controllers.split(","):
            yield "cpu", path


def _mounts(text: str) -> Iterator[tuple[str, str, str]]:
    """From /proc/self/mountinfo: "" or "cpu" as above, the group that is mounted, and where."""
    for line in text.splitlines():
        fields, _, rest = line.partition(" - ")
        fields, rest = fields.split(" "), rest.split(" ")
        if len(fields) < 5 or len(rest) < 3:
            continue
        place = _unescaped(fields[3]), _unescaped(fields[4])
        if rest[0] == "cgroup2":
            yield "", *place
        elif rest[0] == "cgroup" and "cpu" in rest[2].split(","):
            yield "cpu", *place


def _unescaped(name: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)


def _unified(group: Path) -> float | None:
    limit, _, period = _read(group / "cpu.max").partition(" ")
    return _ratio(limit, period)


def _legacy(group: Path) -> float | None:
    return _ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _ratio(limit: str, period: str) -> float | None:
    """None for "max", -1, and what is not there."""
    with contextlib.suppress(ValueError):
        if int(limit) > 0 and int(period) > 0:
            return int(limit) / int(period)
    return None


def _read(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")
    return ""
