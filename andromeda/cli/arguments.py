"""Types of command line options (numbers within bounds, names that are not empty), and options that commands share.

argparse puts the name of the option before the message of a type.
"""

import argparse
import math
import re
from collections.abc import Callable

MOST = 2**31 - 1  # the upper bound of counts that have no smaller one


def integer(least: int, most: int = MOST) -> Callable[[str], int]:
    """A whole number in decimal digits from `least` to `most`."""

    def read(text: str) -> int:
        digits = re.fullmatch(r"[+-]?[0-9]{1,40}", text)  # int() would also take "1_000", " 5" and other digits
        if digits is None or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least} to {most}, got {_shown(text)}")
        return int(text)

    return read


def number(least: float, most: float = math.inf, *, above: bool = False, below: bool = False) -> Callable[[str], float]:
    """A finite number from `least` to `most`; `above` and `below` leave the bound itself out."""
    bounds = f"{'above' if above else 'at least'} {least:g}"
    if most < math.inf:
        bounds += f" and {'below' if below else 'at most'} {most:g}"

    def read(text: str) -> float:
        try:
            value = float(text) if re.fullmatch(r"[0-9.eE+-]+", text) else math.nan
        except ValueError:
            value = math.nan
        fits = math.isfinite(value) and least <= value <= most
        if not fits or (above and value == least) or (below and value == most):
            raise argparse.ArgumentTypeError(f"must be a finite number, {bounds}, got {_shown(text)}")
        return value

    return read


def not_empty(text: str) -> str:
    """A name, for example of a file or a folder. An empty path would often mean the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"must not be empty, got {text!r} (an unset variable?)")
    return text


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


SEED = integer(0, 2**32 - 1)  # the range that every random generator accepts
DOC_MASK = "keep attention from looking beyond the start of a document"  # the help of --doc-mask


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for loading a saved model."""
    parser.add_argument("--tokenizer", metavar="NAME", help="default: the one saved with the model")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")
