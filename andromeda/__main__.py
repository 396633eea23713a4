"""`python -m andromeda ...` and the script `andromeda`: the preparations that come before torch is loaded.

In the process of the command the package does not load torch (see `__init__.py`). From the first moment, therefore, a
signal ends the process without a traceback, and the number of threads can still be set.
"""

import os
import sys

from andromeda.cli import interrupts, threads


def main() -> int:
    """Run the command that the arguments of this process name; returns its exit code."""
    interrupts.leave_at_once()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (`>&-`): a file opened later must not get its number
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (until the end)
    threads.limit_environment()
    from andromeda.cli import main as command

    interrupts.raise_in_commands()
    code = command.main()
    if code > 128:  # a signal ended it
        interrupts.end(code)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
