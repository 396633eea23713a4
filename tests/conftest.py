"""Shared settings. `--device cuda` runs the same tests on a GPU; `--hypothesis-profile nightly` looks longer."""

import os
from collections import Counter

import hypothesis
import pytest
import torch

from andromeda.ops import _select

hypothesis.settings.register_profile("quick", max_examples=12, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=500, deadline=None, print_blob=True)
hypothesis.settings.load_profile("quick")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the tensors under test: cpu (default), cuda, cuda:1")


def pytest_configure(config):
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch finds no CUDA device")


@pytest.fixture(scope="session")
def device(pytestconfig):
    """The device of the tensors under test."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session", params=_select.BACKENDS)
def backend(request):
    """Every backend in turn. A test asks the operation's `unsupported` and skips with its reasons."""
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    skipped = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped"))
    if skipped:
        terminalreporter.section("not run here, and why")
        for reason, count in skipped.most_common():
            terminalreporter.line(f"{count:5} x {reason}")
