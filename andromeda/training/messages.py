"""Messages of a run, on stderr."""

import os
import sys
from collections.abc import Sequence

from tqdm import tqdm


def say(text: str) -> None:
    """Write a message without disturbing the progress line; of several processes, only the first one writes."""
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(text, file=sys.stderr)


def first_few(names: Sequence[str]) -> str:
    """Up to three names, and the number of further ones."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
