"""Signals that end a run after the current step."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeAlias

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_Handler: TypeAlias = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class StopSignals:
    """While active, records the first SIGINT or SIGTERM in `received`; the second one has its usual effect.

    Only in the main thread, where Python allows handlers, and only for one process: several would have to agree on the
    step after which they stop.
    """

    def __init__(self, active: bool) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.process = os.getpid()
        self.received: str | None = None
        self.previous: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> "StopSignals":
        if self.active:
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a process that loads rows also gets the Ctrl-C of its terminal
            return
        self.received = signal.Signals(number).name
        self._restore()
        print("\nstopping after this step (once more to stop at once)", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


class StopCallback(TrainerCallback):
    """Ends the run with a checkpoint after the step in which a signal arrived; logs the last step of every run."""

    def __init__(self, stop: StopSignals) -> None:
        self.stop = stop

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stop.received:
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last figure belongs to the last step
