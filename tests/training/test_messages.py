"""Messages of a run: from one process, and short."""

import pytest

from andromeda.training.messages import first_few, say


@pytest.mark.parametrize("rank, expected", [(None, "said\n"), ("0", "said\n"), ("1", "")])
def test_one_process_speaks(monkeypatch, capsys, rank, expected):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    say("said")
    assert capsys.readouterr() == ("", expected)


def test_many_names_are_counted():
    assert first_few(["a", "b", "c"]) == "a, b, c"
    assert first_few(list("abcde")) == "a, b, c and 2 more"
