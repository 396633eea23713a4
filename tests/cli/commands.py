"""Runs commands in this process, with models that train in a second."""

from andromeda.cli.main import main

MODEL = ["--dim", "32", "--depth", "1", "--heads", "2", "--dim-head", "16", "--alibi-num-heads", "1"]
FAST = [*MODEL, "--batch-size", "2", "--learning-rate", "1e-2", "--device", "cpu"]


def run(*words) -> int:
    return main([str(word) for word in words])


def failing(capsys, *words) -> tuple[int, str]:
    """The exit code (or argparse's SystemExit code) and the messages of a command that fails."""
    try:
        code = run(*words)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return code, err


def raising(error):
    def function():
        raise error

    return function
