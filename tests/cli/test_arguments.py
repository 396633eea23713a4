"""Bounds of numbers, and names, on the command line."""

import argparse

import pytest

from andromeda.cli.arguments import integer, not_empty, number


@pytest.mark.parametrize("text", ["1", "7", "+7", "007", "10"])
def test_whole_numbers_within_bounds(text):
    assert integer(1, 10)(text) == int(text)


@pytest.mark.parametrize(
    "text", ["0", "11", "-1", "1.0", "1e1", "inf", "nan", "", " 5", "1_0", "٣", "0x5", "9" * 30, "9" * 5000]
)
def test_whole_numbers_out_of_bounds(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number from 1 to 10, got '") as caught:
        integer(1, 10)(text)
    assert len(str(caught.value)) < 120


def test_counts_fit_where_they_are_used():
    assert integer(0)("2147483647") == 2**31 - 1
    with pytest.raises(argparse.ArgumentTypeError):
        integer(0)("2147483648")


@pytest.mark.parametrize("text", ["0", "0.5", "1", "1.", ".5", "5e-1", "+0.25", "1E-400"])
def test_numbers_within_bounds(text):
    assert number(0, 1)(text) == float(text)


@pytest.mark.parametrize(
    "text", ["-0.1", "1.5", "inf", "-inf", "Infinity", "nan", "1e400", "", " 1", "1_0", "x", "--", "."]
)
def test_numbers_out_of_bounds(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be a finite number, at least 0 and at most 1, got '"):
        number(0, 1)(text)


def test_bounds_that_are_left_out():
    rate = number(0, 1, above=True, below=True)
    assert rate("0.5") == 0.5
    for text in ("0", "1"):
        with pytest.raises(argparse.ArgumentTypeError, match="above 0 and below 1"):
            rate(text)
    assert number(0)("1e300") == 1e300
    for text in ("inf", "1e400", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="finite number, at least 0, got"):
            number(0)(text)


@pytest.mark.parametrize("text", ["", " ", "\t\n"])
def test_names_are_not_empty(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must not be empty"):
        not_empty(text)
    assert not_empty(" a ") == " a "
