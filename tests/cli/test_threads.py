"""Processors by affinity and by quotas of control groups, read from copies of the files of other machines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import andromeda
from andromeda.cli import threads

ROOT = Path(__file__).resolve().parents[2]

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:27 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755\n"
    "32 31 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    "34 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
)


def machine(root, cgroup, mounts, limits):
    """A root with these files in it."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text(f"23 1 8:1 / / rw - ext4 /dev/sda1 rw\n{mounts}")
    for name, text in limits.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


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
        # The mount begins at the own group, which has its whole path without a namespace of control groups.
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
    assert threads.quota(machine(tmp_path, cgroup, mounts, limits)) == expected


def test_quota_without_proc(tmp_path):
    assert threads.quota(tmp_path) is None


@pytest.mark.parametrize(
    "limit, allowed, expected", [(1, 8, 1), (100, 8, 1), (120, 8, 2), (150, 8, 2), (800, 4, 4), ("max", 3, 3)]
)
def test_processors_are_the_least_of_quota_and_affinity(tmp_path, monkeypatch, limit, allowed, expected):
    root = machine(tmp_path, "0::/\n", V2, {"cpu.max": f"{limit} 100\n"})
    monkeypatch.setattr(threads, "affinity", lambda: allowed)
    assert threads.available_processors(root) == expected


def test_affinity():
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert threads.affinity() == 1 == threads.available_processors()
    finally:
        os.sched_setaffinity(0, allowed)
    assert threads.affinity() == len(allowed)


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("granted, own, expected", [(1, 2, 1), (3, 2, 2), (2, 2, 2)])
def test_torch_gets_no_more_threads_than_there_are_processors(monkeypatch, torch_threads, granted, own, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "available_processors", lambda: granted)
    torch.set_num_threads(own)
    assert andromeda.use_available_processors() == torch.get_num_threads() == expected


def test_what_the_user_chose_stays(monkeypatch, torch_threads):
    monkeypatch.setattr(threads, "available_processors", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    threads.limit_environment()
    assert threads.use_available_processors() == 2
    assert os.environ["OMP_NUM_THREADS"] == "2" and threads.note() is None


@pytest.mark.parametrize(
    "processors, allowed, cores, variable, note",
    [
        (1, 2, 2, "1", "1 thread: the container's quota grants 1 of 2 processors"),
        (3, 8, 16, "3", "3 threads: the container's quota grants 3 of 16 processors"),
        (2, 2, 8, None, "2 threads: the affinity of the process allows 2 of 8 processors"),
        (8, 8, 8, None, None),
    ],
)
def test_the_environment_of_a_command(monkeypatch, processors, allowed, cores, variable, note):
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # for the end of the test
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "_limit", None)
    monkeypatch.setattr(threads, "available_processors", lambda: processors)
    monkeypatch.setattr(threads, "affinity", lambda: allowed)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    threads.limit_environment()
    assert os.environ.get("OMP_NUM_THREADS") == variable and threads.note() == note


def test_a_command_under_a_quota_says_so_and_torch_follows():
    """As the command on a machine whose quota is one processor; its threads are set before torch is loaded."""
    program = """
import os, sys
sys.argv = ["andromeda", *sys.argv[1:]]
from andromeda.cli import threads
threads.quota = lambda root="/": 1.0
threads.affinity = os.cpu_count = lambda: 64
from andromeda.__main__ import main
assert "torch" not in sys.modules
main()
print(sys.modules["torch"].get_num_threads())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "generate", "model", "--prompt", "x", "--device", "none"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"},
    )
    said = "andromeda: 1 thread: the container's quota grants 1 of 64 processors\n"
    assert (done.stdout, done.stderr.count(said)) == ("1\n", 1)
