"""Shared by the tests of the attention kernels for many queries on Hopper: how their cases are drawn and run."""

import contextlib
import dataclasses

from test_attention import BFLOAT16, FLOAT16

from andromeda.ops import attention as op


def alternate(cases):
    """Every second case in float16, so that both types get every kind of case and each case runs once."""
    return [dataclasses.replace(case, dtype=(BFLOAT16, FLOAT16)[index % 2]) for index, case in enumerate(cases)]


def set_schedule(emulated, case):
    """Every case has its own order of warps and copies, the same in every run."""
    emulated.settings.schedule = ("fifo", "reverse", "random")[sum(map(ord, str(case))) % 3]


@contextlib.contextmanager
def expect_kernel(emulated, monkeypatch, kernel):
    """Calls go to an H200, and none to the kernel for few queries. At the end: `kernel` has run."""
    emulated.settings.device = "H200"
    monkeypatch.setattr(op, "NUM_SPLITS", -1)
    yield
    assert any(kernel in launch.kernel for launch in emulated.launches)
