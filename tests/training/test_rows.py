"""Rows that cannot be trained on, and the fingerprint of a data set."""

import itertools
import shutil

import pytest
import torch
from tiny_run import Masked, Rows, new_model, settings

from andromeda.training import train
from andromeda.training.rows import fingerprint


def test_data_with_nothing_to_predict_is_refused(tmp_path):
    for name, data in (
        ("dataset", (Masked(4, masked=range(4)), Rows())),
        ("eval_dataset", (Rows(), Masked(2, masked=(0, 1)))),
    ):
        with pytest.raises(ValueError, match=f"train: {name} must have a token to predict, got [24] rows"):
            train(new_model(), data[0], settings(tmp_path, eval_every=1), eval_dataset=data[1])
    with pytest.raises(ValueError, match="dataset must have rows with labels, got input_ids, text"):
        train(new_model(), [{"input_ids": torch.ones(4), "text": "x"}] * 2, settings(tmp_path))
    with pytest.raises(ValueError, match="dataset must have rows of at least 2 tokens, got 1 in row 0"):
        train(new_model(), Rows(seqlen=1), settings(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("index", [0, 12, 23, 1, 13, 22])
def test_another_row_is_another_data_set(tmp_path, checkpoints, index):
    shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    rows = Rows()
    rows.ids[index, 5] += 1
    with pytest.raises(ValueError, match="data content: was"):
        train(new_model(), rows, settings(tmp_path), resume=True)


def test_the_fingerprint_looks_at_several_rows():
    rows = Rows(1000)
    known = fingerprint(rows)
    for index in (0, 500, 999):
        other = Rows(1000)
        other.ids[index, 11] += 1
        found = fingerprint(other)
        assert found["sha256"] != known["sha256"], index
    seen = []

    class Noting(Rows):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    fingerprint(Noting(1000))
    gaps = [after - before for before, after in itertools.pairwise(sorted(set(seen)))]
    assert {0, 999} < set(seen) and max(gaps) <= 33


def test_rows_that_know_their_checksum_are_asked(tmp_path):
    class Known(Rows):
        content_checksum = "0123"

    assert fingerprint(Known())["content"] == "0123"

    class Damaged(Rows):
        def verify(self):
            raise ValueError("data.arrow has other content than was written")

    with pytest.raises(ValueError, match=r"data.arrow has other content"):
        train(new_model(), Damaged(), settings(tmp_path))
    with pytest.raises(ValueError, match=r"data.arrow has other content"):
        train(new_model(), Rows(), settings(tmp_path), eval_dataset=Damaged())
    assert list(tmp_path.iterdir()) == []
