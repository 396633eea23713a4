"""Signals that end a run after the step under way."""

import os
import signal
import sys
import threading

from transformers import TrainerCallback


class StopSignals:
    """While active, the first SIGINT or SIGTERM is noted in `received`; the second acts as it always would.

    Only in the main thread, where Python lets handlers be set, and only for one process: several would have to agree on
    the step at which they stop.
    """

    def __init__(self, active: bool):
        self.active = active and threading.current_thread() is threading.main_thread()
        self.process = os.getpid()
        self.received = None
        self.previous = {}

    def __enter__(self):
        if self.active:
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        self._restore()

    def _note(self, number, frame):
        if os.getpid() != self.process:  # a process that loads rows gets the Ctrl-C of its terminal, too
            return
        self.received = signal.Signals(number).name
        self._restore()
        print("\nstopping after this step (once more to stop at once)", file=sys.stderr, flush=True)

    def _restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


class StopCallback(TrainerCallback):
    """Ends the run with a checkpoint after the step in which a signal arrived; logs the last step of any run."""

    def __init__(self, stop: StopSignals):
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop.received:
            control.should_save = control.should_training_stop = True
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last figure belongs to the last step
