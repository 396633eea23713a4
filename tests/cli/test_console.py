"""Messages go to stderr only."""

import sys

from andromeda.cli import console


def test_messages_do_not_get_into_results(monkeypatch, capsys):
    """With stderr closed, `print` would use stdout."""
    monkeypatch.setattr(sys, "stderr", None)
    console.say("hello")
    assert capsys.readouterr().out == ""
