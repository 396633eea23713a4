"""The processors that control groups (cgroups, versions 1 and 2) grant to this process.

This module is loaded before torch.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path


def quota(root: str | os.PathLike[str] = "/") -> float | None:
    """Processors that control groups grant: the smallest quota of this process's group and the groups above, or None.

    /proc/self/mountinfo says where both versions of control groups are mounted. In a container the mount may begin at
    the process's own group, which hides the groups above it.

    Args:
        root: where /proc and /sys are.
    """
    root = Path(root)
    groups = dict(_groups(_read(root / "proc/self/cgroup")))
    found = []
    for kind, mount_root, mount_point in _mounts(_read(root / "proc/self/mountinfo")):
        top = root / mount_point.lstrip("/")
        own = top / groups.get(kind, "/").removeprefix(mount_root).lstrip("/")  # a missing group has no limit
        for group in (own, *own.parents):
            value = _unified(group) if kind == "" else _legacy(group)
            if value is not None:
                found.append(value)
            if group == top:
                break
    return min(found, default=None)


def _groups(text: str) -> Iterator[tuple[str, str]]:
    """From /proc/self/cgroup: ("", group in version 2) and ("cpu", group of the cpu controller in version 1)."""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield "", path
        elif "cpu" in controllers.split(","):
            yield "cpu", path


def _mounts(text: str) -> Iterator[tuple[str, str, str]]:
    """From /proc/self/mountinfo: "" or "cpu" as in `_groups`, the group that is mounted, and the mount point."""
    for line in text.splitlines():
        fields, kind = (part.split(" ") for part in line.partition(" - ")[::2])
        if len(fields) < 5 or len(kind) < 3:
            continue
        place = _unescaped(fields[3]), _unescaped(fields[4])
        if kind[0] == "cgroup2":
            yield "", *place
        elif kind[0] == "cgroup" and "cpu" in kind[2].split(","):
            yield "cpu", *place


def _unescaped(name: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)


def _unified(group: Path) -> float | None:
    limit, _, period = _read(group / "cpu.max").partition(" ")
    return _ratio(limit, period)


def _legacy(group: Path) -> float | None:
    return _ratio(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))


def _ratio(limit: str, period: str) -> float | None:
    """The quota in processors; None for "max", -1 and missing files."""
    with contextlib.suppress(ValueError):
        if int(limit) > 0 and int(period) > 0:
            return int(limit) / int(period)
    return None


def _read(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8")
    return ""
