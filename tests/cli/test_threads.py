"""Processors that affinity and quotas grant, and the threads that torch and the commands use."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from control_groups import V2, machine

import andromeda
from andromeda.cli import threads

ROOT = Path(__file__).resolve().parents[2]


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
    """The command with a quota of one processor sets its threads before it loads torch."""
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
