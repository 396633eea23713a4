"""The figures of a run, resumed or not, in `history.jsonl`."""

import contextlib
import signal

import pytest
from tiny_run import Killed, Rows, history, new_model, settings, step_of_checkpoint

from andromeda.training import latest_checkpoint, train


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The history of 8 steps in one go, whose figures and evaluations do not all coincide with checkpoints."""
    folder = tmp_path_factory.mktemp("watched")
    train(new_model(), Rows(), settings(folder, **WATCHED), eval_dataset=Rows(5))
    return history(folder)


WATCHED = {"log_every": 3, "eval_every": 4, "save_every": 2}


def test_the_history_has_the_figures_of_a_run(tmp_path, watched):
    assert [(line["step"], "loss" in line, "eval_loss" in line) for line in watched] == [
        (3, True, False),
        (4, False, True),
        (6, True, False),
        (8, True, False),
        (8, False, True),
    ]
    assert watched[0].keys() == {"step", "loss", "learning_rate", "grad_norm"}
    result = train(new_model(), Rows(), settings(tmp_path, **WATCHED), eval_dataset=Rows(5))
    kept = [entry for entry in result.history if "loss" in entry]
    assert [entry["loss"] for entry in kept] == [line["loss"] for line in watched if "loss" in line]
    rates = [line["tokens_per_second"] for line in history(tmp_path, without=()) if "loss" in line]
    assert len(rates) == 3 and all(rate > 0 for rate in rates)


@pytest.mark.parametrize("how", ["killed", "signal", "killed in a half written line"])
def test_a_resumed_run_has_the_history_of_an_uninterrupted_one(tmp_path, watched, how):
    """It continues from a checkpoint of step 4 or 5, in the middle of an interval."""

    class Interrupting(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            if self.ids_read == 10:
                assert history(tmp_path)[0] == watched[0], "written while the run goes on"
                if how == "signal":
                    signal.raise_signal(signal.SIGINT)
            return row

    rows = Interrupting(fail_at=None if how == "signal" else 12)
    with contextlib.suppress(Killed):
        result = train(new_model(), rows, settings(tmp_path, **WATCHED), eval_dataset=Rows(5), on_start=rows.begin)
        assert result.interrupted == "SIGINT" and result.steps in (4, 5)
    assert history(tmp_path) == watched[:2]
    assert step_of_checkpoint(latest_checkpoint(tmp_path)) in (4, 5)
    if "half" in how:
        with open(tmp_path / "history.jsonl", "a") as file:
            file.write('{"step": 7, "lo')
    train(new_model(), Rows(), settings(tmp_path, **WATCHED), eval_dataset=Rows(5), resume=True)
    assert history(tmp_path) == watched
