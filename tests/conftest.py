"""Shared settings. `--device cuda` tests on a GPU; `--hypothesis-profile nightly` (or `exhaustive`) tests more."""

import importlib.util
import os
from collections import Counter
from pathlib import Path

import emulator.build
import hypothesis
import numerics
import pytest
import torch
from emulator import EmulatedExtension, Emulator, triton_driver
from op_cases import skip_for, without_use

from andromeda.ops import _persistent, _rotary, _select

hypothesis.settings.register_profile("quick", max_examples=12, deadline=None, derandomize=True)
hypothesis.settings.register_profile("nightly", max_examples=500, deadline=None, print_blob=True)
hypothesis.settings.register_profile("exhaustive", max_examples=10_000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("quick")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="device of the tensors under test: cpu (default), cuda, cuda:1")


def pytest_configure(config):
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    device = torch.device(config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch finds no CUDA device")

    def announce(text):
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(f"\n{text}", flush=True)

    emulator.build.announce = announce


@pytest.fixture(scope="session")
def device(pytestconfig):
    """The device of the tensors under test."""
    return torch.device(pytestconfig.getoption("--device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def nan_filled():
    """Makes a test fail if an output is not written."""
    with numerics.nan_filled():
        yield


@pytest.fixture
def tensors_for(backend, device):
    """tensors_for(case, dtype, seed): the tensors of a case; skips, with the reasons, if the backend cannot run it."""

    def make(case, dtype=torch.float32, seed=0):
        tensors = case.tensors(dtype, device, seed)
        skip_for(backend, case.unsupported(backend, *tensors))
        return tensors

    return make


@pytest.fixture
def num_threads():
    """Sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_plans():
    """Plans depend on the extension and the devices of a backend, which tests change."""
    _select.plans.clear()
    yield
    _select.plans.clear()


@pytest.fixture
def emulated(request, monkeypatch):
    """The `Emulator` on which backend="cuda" runs in this test, with CPU tensors.

    Operator, binding and launcher are the real ones, and every call must be clean. Change `emulated.settings` between
    calls, or pass them: `parametrize("emulated", [{"schedule": "random", "seed": 7}], indirect=True)`.
    """
    emulator = Emulator(**getattr(request, "param", {}))
    monkeypatch.setattr(_select, "extension", EmulatedExtension(emulator))
    monkeypatch.setattr(_select, "cuda_unavailable", lambda device: [])
    # A kernel that does not leave its semaphores zero must not disturb other tests.
    monkeypatch.setattr(_persistent, "taken_semaphores", {})
    monkeypatch.setattr(_persistent, "free_semaphores", {})
    # Tables of exactly the rows that a call needs, so that any other row is outside the buffer.
    monkeypatch.setattr(_rotary, "window", lambda first, end: (first, end))
    monkeypatch.setattr(_select, "DEVICE_TYPES", {"cuda": "cpu", "triton": "no device", "cpu": "no device"})
    return emulator


@pytest.fixture
def emulated_triton(request, monkeypatch):
    """The `Emulator` on which backend="triton" runs in this test, with CPU tensors.

    Operator, host function and the launch by Triton's JIT are the real ones (tests/emulator/triton_driver.py), and
    every launch must be clean. Settings as for `emulated`; the device, A100 by default, says for what Triton compiles.
    With {"exact_tables": False} the tables of positions have their usual sizes, not just the rows that a call needs.
    """
    settings = dict(getattr(request, "param", {}))
    exact_tables = settings.pop("exact_tables", True)
    if importlib.util.find_spec("triton") is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("Triton is not installed")
    monkeypatch.setattr(_select, "triton_unavailable", lambda device: [])
    monkeypatch.setattr(_select, "DEVICE_TYPES", {"cuda": "no device", "triton": "cpu", "cpu": "no device"})
    if exact_tables:
        monkeypatch.setattr(_rotary, "window", lambda first, end: (first, end))
    with triton_driver.active(Emulator(**settings)) as emulator:
        yield emulator


left_out = {}  # backend -> operation -> reasons


def pytest_generate_tests(metafunc):
    """`backend`: in tests/test_<operation>.py, each backend that runs the operation on the device under test.

    A test passes its own call to the operation's `unsupported` and skips with the reasons.
    """
    if "backend" in metafunc.fixturenames:
        operation = metafunc.module.__name__.removeprefix("test_")
        without = without_use(operation, metafunc.config.getoption("--device"))
        for name, reasons in without.items():
            left_out.setdefault(name, {})[operation] = reasons
        able = [name for name in _select.BACKENDS if name not in without]
        metafunc.parametrize("backend", able, scope="session")


def pytest_terminal_summary(terminalreporter):
    skipped = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.getreports("skipped"))
    if skipped or left_out:
        terminalreporter.section("not run here, and why")
        for name, operations in left_out.items():
            why = "; ".join(f"{operation}: {', '.join(reasons)}" for operation, reasons in operations.items())
            terminalreporter.line(f"  all x {name}: {why}")
        for reason, count in skipped.most_common():
            terminalreporter.line(f"{count:5} x {reason}")


class DiskLog:
    """The files that this process has synced and renamed, in order."""

    def __init__(self):
        self.events = []  # ("sync", path) or ("rename", path, new path)

    def assert_durable(self, target):
        """Check that `target` and its content were synced before `target` got its name, and its folder afterwards."""
        last = max(i for i, event in enumerate(self.events) if event[0] == "rename" and event[2] == target)
        new = self.events[last][1]
        below = [path.relative_to(target) for path in target.rglob("*")] if target.is_dir() else []
        synced = {event[1] for event in self.events[:last] if event[0] == "sync"}
        unsynced = {new, *(new / path for path in below)} - synced
        assert not unsynced, f"renamed to {target} before they were synced: {unsynced}"
        assert ("sync", target.parent) in self.events[last:], f"the new name {target} was not synced"


@pytest.fixture
def disk_log(monkeypatch):
    """A `DiskLog` of the test; needs /proc to name the synced files."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc to read the names of open files from")
    log = DiskLog()
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def logged_fsync(descriptor):
        fsync(descriptor)
        log.events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))

    def logged(move):
        def move_and_log(source, target):
            move(source, target)
            log.events.append(("rename", Path(source), Path(target)))

        return move_and_log

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged(rename))
    monkeypatch.setattr(os, "replace", logged(replace))
    return log
