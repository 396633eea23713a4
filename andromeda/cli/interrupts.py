"""Signals (Ctrl-C, SIGTERM and SIGHUP) end a command quickly at any moment, even while a library loads or computes.

Before the commands are loaded, a signal ends the process: there is nothing to clean up. Later, it raises `Interrupted`,
so that every `with` and `finally` cleans up. A second signal, or a first one that Python does not handle within a few
seconds because a library is running, removes unfinished files and ends the process.

This module is loaded before torch.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

from andromeda import files

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_UNHEARD_SECONDS = 2.0  # how long a library may keep Python from handling a signal
_CLEAN_UP_SECONDS = 10.0  # how long the clean-up may take


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end.

    Attributes:
        number: the number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(error: BaseException | None = None) -> int:
    """The exit code after a signal: 128 + the number of the signal that `error` names, or else of the one seen."""
    return 128 + getattr(error, "number", _seen[0] if _seen else signal.SIGINT)


_seen: list[int] = []  # signals that `_raise` has handled
_arrived: list[int] = []  # all signals, whatever handles them
_patient = False


def seen() -> bool:
    """Whether a signal has raised `Interrupted` in this process. Later errors are consequences of it."""
    return bool(_seen)


def end(code: int) -> NoReturn:
    """End the process after a command has cleaned up. Python itself would need seconds to unload the libraries."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def be_patient() -> None:
    """From now on, give a first signal time to take effect: the training finishes its step, however long, and saves."""
    global _patient
    _patient = True


def leave_at_once() -> None:
    """Let signals end the process until `raise_in_commands`. Signals that are ignored (`nohup`) stay ignored."""
    for number in _not_ignored():
        signal.signal(number, _leave)


def raise_in_commands() -> None:
    """From now on, a signal raises `Interrupted`, and a thread makes sure that the process ends."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in _not_ignored():
        signal.signal(number, _raise)
    # SIGURG is ignored by default and otherwise unused. `_insist` sends it to find out whether Python handles signals.
    signal.signal(signal.SIGURG, lambda number, frame: _alive.set())
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_restore_defaults)
    threading.Thread(target=_watch, args=(reading,), name="andromeda-signals", daemon=True).start()


def _restore_defaults() -> None:
    """In a forked worker: restore the default effect of signals. The watching thread belongs to the parent."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _raise:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _not_ignored() -> list[int]:
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


_alive = threading.Event()


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    _seen.append(number)
    if len(_seen) > 1:
        _leave(number, frame)
    raise Interrupted(number)


def _leave(number: int, frame: FrameType | None = None) -> NoReturn:
    """End now, and end the line on the terminal, so that the shell's prompt begins a new one."""
    files.remove_unfinished()
    try:
        os.write(2, b"\nandromeda: interrupted\n")
    finally:
        os._exit(128 + (_seen[0] if _seen else number))


def _watch(descriptor: int) -> None:
    while data := os.read(descriptor, 64):
        for number in data:
            if number in SIGNALS:
                _arrived.append(number)
                threading.Thread(target=_insist, args=(number,), daemon=True).start()


def _insist(number: int) -> None:
    """End the process if the signal does not end it."""
    time.sleep(_UNHEARD_SECONDS)
    _alive.clear()
    main = threading.main_thread().ident
    assert main is not None  # it has started
    signal.pthread_kill(main, signal.SIGURG)
    if not _alive.wait(_UNHEARD_SECONDS):
        # A library is computing and does not return to Python.
        if len(_arrived) > 1 or not _patient:
            _leave(number)
        return
    if _seen:
        time.sleep(_CLEAN_UP_SECONDS)
        _leave(number)
