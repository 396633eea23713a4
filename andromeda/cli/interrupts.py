"""Leaving a command at once: Ctrl-C, SIGTERM and SIGHUP, at any moment, also while other libraries load or compute.

Before the commands are loaded a signal ends the process: there is nothing to clean up. Later it raises `Interrupted`,
so that every `with` and `finally` cleans up. A second signal, or a first one that some library does not let through for
a few seconds, removes the files that are being written and ends the process.

Nothing here imports torch.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time

from andromeda import files

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_UNHEARD_SECONDS = 2.0  # how long a library may keep Python from seeing a signal
_CLEAN_UP_SECONDS = 10.0  # how long the clean-up may take


class Interrupted(KeyboardInterrupt):
    """A signal asked the command to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(error: BaseException | None = None) -> int:
    """What a shell expects of a process that a signal ended: 128 and its number. Default: that of the signal seen."""
    return 128 + getattr(error, "number", _seen[0] if _seen else signal.SIGINT)


_seen: list[int] = []  # signals that `_raise` has handled
_arrived: list[int] = []  # all signals, whoever handles them
_patient = False


def seen() -> bool:
    """Whether a signal has raised `Interrupted` in this process: what failed afterwards failed because of it."""
    return bool(_seen)


def end(code: int) -> None:
    """End the process after a command has cleaned up: Python would take seconds to take libraries apart."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def be_patient() -> None:
    """From now on a first signal is not insisted on: the training finishes its step, which may take long, and saves."""
    global _patient
    _patient = True


def leave_at_once() -> None:
    """Until `raise_in_commands`: a signal ends the process. Signals that are ignored (`nohup`) stay so."""
    for number in _heeded():
        signal.signal(number, _leave)


def raise_in_commands() -> None:
    """From now on a signal raises `Interrupted`, and a watch sees to it that the process ends."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in _heeded():
        signal.signal(number, _raise)
    # Ignored by default and never sent to us: shows whether Python gets to handle signals.
    signal.signal(signal.SIGURG, lambda number, frame: _alive.set())
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_as_ever)
    threading.Thread(target=_watch, args=(reading,), name="andromeda-signals", daemon=True).start()


def _as_ever() -> None:
    """In a worker that was forked: signals act on it alone, and as workers expect. The watch is the parent's."""
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        if signal.getsignal(number) is _raise:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _heeded() -> list[int]:
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


_alive = threading.Event()


def _raise(number, frame):
    _seen.append(number)
    if len(_seen) > 1:
        _leave(number, frame)
    raise Interrupted(number)


def _leave(number, frame=None):
    """End now. The terminal's line is ended, too: the shell's prompt begins a new one."""
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
    """End the process if the signal does not."""
    time.sleep(_UNHEARD_SECONDS)
    _alive.clear()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGURG)
    if not _alive.wait(_UNHEARD_SECONDS):
        # Some library computes and lets nothing through.
        if len(_arrived) > 1 or not _patient:
            _leave(number)
        return
    if _seen:
        time.sleep(_CLEAN_UP_SECONDS)
        _leave(number)
