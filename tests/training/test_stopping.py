"""Signals that end a run."""

import os
import signal

import pytest
from tiny_run import Rows, assert_same, new_model, settings, step_of_checkpoint, weights

from andromeda.training import train
from andromeda.training.stopping import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_the_step_saves_and_stops(tmp_path, uninterrupted, number):
    class Interrupting(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            if self.ids_read == 7:  # a row of the fourth step, which may be loaded ahead
                signal.raise_signal(number)
            return row

    before = signal.getsignal(number)
    rows = Interrupting()
    result = train(new_model(), rows, settings(tmp_path, save_every=0), on_start=rows.begin)
    assert result.interrupted == number.name
    assert 2 <= result.steps <= 4 and step_of_checkpoint(result.checkpoint) == result.steps
    assert signal.getsignal(number) is before
    model = new_model()
    train(model, Rows(), settings(tmp_path, save_every=0), resume=True)
    assert_same(weights(model), uninterrupted)


def test_a_second_signal_within_one_step_stops_at_once(tmp_path):
    class Impatient(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            if self.ids_read == 7:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return row

    rows = Impatient()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), rows, settings(tmp_path, save_every=0), on_start=rows.begin)
    assert rows.ids_read == 7 and not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is before


def test_processes_that_load_rows_leave_a_signal_to_the_one_that_trains(capfd):
    """A terminal sends Ctrl-C to all processes."""
    with StopSignals(active=True) as stop:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert stop.received is None and "stopping" not in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT"
