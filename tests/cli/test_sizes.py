"""Sizes of new models."""

import pytest

from andromeda.cli import sizes


@pytest.mark.parametrize("value, expected", [(1, 128), (128, 128), (129, 256)])
def test_round_up(value, expected):
    assert sizes.round_up(value, 128) == expected
