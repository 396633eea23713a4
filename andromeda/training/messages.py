"""Messages of a run."""

import os
import sys

from tqdm import tqdm


def say(text: str):
    """A message beside the progress line, from the one process that speaks."""
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(text, file=sys.stderr)


def first_few(names: list[str]) -> str:
    """Some names for a message, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
