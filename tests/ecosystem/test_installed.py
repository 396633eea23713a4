"""The only test of this folder that runs without the packages of the extra `ecosystem`."""

import os

import pytest


def test_the_extra_is_installed(missing):
    if missing:
        reason = f"tests/ecosystem needs {', '.join(missing)}: pip install -c constraints.txt '.[ecosystem]'"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
