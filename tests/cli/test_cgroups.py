"""Quotas of control groups, read from copies of other machines' files."""

import pytest
from control_groups import V1, V2, machine

from andromeda.cli import cgroups


def cfs(folder, limit, period=100_000):
    return {f"{folder}/cpu.cfs_quota_us": f"{limit}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    "cgroup, mounts, limits, expected",
    [
        ("0::/\n", V2, {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", V2, {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", V2, {}, None),
        ("0::/a/b\n", V2, {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000", "cpu.max": "max 1000"}, 0.5),
        ("0::/a/b\n", V2, {"a/b/cpu.max": "300000 100000", "a/cpu.max": "400000 100000"}, 3),
        ("0::/a\n", V2, {"a/cpu.max": "max 100000", "b/cpu.max": "100000 100000"}, None),
        ("0::/../..\n", V2, {"cpu.max": "100000 100000"}, 1),
        # The mount begins at the group of the process. Without a cgroup namespace its path is given in full.
        ("0::/docker/abc\n", V2.replace("0:26 /", "0:26 /docker/abc"), {"cpu.max": "200000 100000"}, 2),
        ("0::/docker/abc/job\n", V2.replace("0:26 /", "0:26 /docker/abc"), {"job/cpu.max": "200000 100000"}, 2),
        ("0::/docker/abcd\n", V2.replace("0:26 /", "0:26 /docker/abc"), {"cpu.max": "200000 100000"}, 2),
        ("4:cpu,cpuacct:/\n3:memory:/m\n", V1, cfs("cpu,cpuacct", 100_000), 1),
        ("4:cpu,cpuacct:/a\n", V1, cfs("cpu,cpuacct/a", -1) | cfs("cpu,cpuacct", 250_000), 2.5),
        ("4:cpu,cpuacct:/b\n2:cpuset:/a\n", V1, cfs("cpu,cpuacct/a", 1000) | cfs("cpu,cpuacct/b", 50_000), 0.5),
        ("", V1, cfs("cpu,cpuacct", 100_000), 1),
        ("0::/\n", V1, {"cpu,cpuacct/cpu.cfs_quota_us": "100000\n"}, None),
        # Both versions, as systemd mounts them in its hybrid mode.
        (
            "4:cpu,cpuacct:/a\n0::/a\n",
            V1 + V2.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified"),
            cfs("cpu,cpuacct/a", 300_000) | {"unified/a/cpu.max": "200000 100000"},
            2,
        ),
        ("0::/a\n", V2.replace("/sys/fs/cgroup", r"/sys/fs/cgroup/a\040b"), {"a b/a/cpu.max": "100000 100000"}, 1),
        ("0::/\n", V2, {"cpu.max": "rubbish"}, None),
        ("rubbish\n", "rubbish\n - \n", {}, None),
    ],
)
def test_quota(tmp_path, cgroup, mounts, limits, expected):
    assert cgroups.quota(machine(tmp_path, cgroup, mounts, limits)) == expected


def test_quota_without_proc(tmp_path):
    assert cgroups.quota(tmp_path) is None
