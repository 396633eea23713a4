"""Records which tests are skipped, and says why in words of this project."""

import pytest
from skips import reason

_outcomes: dict[str, set[str]] = {}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report):
    _, _, name = report.nodeid.rpartition("::")
    _outcomes.setdefault(name, set()).add(report.outcome)
    if report.skipped and (why := reason(name)):
        file, line, _ = report.longrepr
        report.longrepr = file, line, f"Skipped: {why}"


@pytest.fixture
def outcomes():
    """The outcomes of each test so far; a test with parts has several."""
    return _outcomes
