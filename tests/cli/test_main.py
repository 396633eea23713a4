"""Parsing of the command line, refusals before any work, and error messages."""

import json
import os
import pickle
import signal
import subprocess
import sys

import pyarrow
import pytest
import safetensors
import torch
from commands import FAST, failing, raising, run

from andromeda.cli import info, interrupts, main

# ---- help


@pytest.mark.parametrize("command", ["info", "quickstart", "build-dataset", "train", "generate", "eval", "serve"])
def test_help_of_every_command(capsys, command):
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: andromeda {command}" in shown and "%" not in shown


def test_help_shows_a_default_of_zero(capsys):
    with pytest.raises(SystemExit):
        run("quickstart", "--help")
    shown = capsys.readouterr().out
    assert "sample (default: 0)" in " ".join(shown.split()) and "(default: False)" not in shown


# ---- errors


@pytest.mark.parametrize(
    "words, text",
    [
        ("", "the following arguments are required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("info --jsn", "unrecognized arguments: --jsn (see `andromeda info --help`)"),
        ("train --out run", "train needs ROWS and --steps (or --resume)"),
        ("train --out run --resume", "which has no train.json"),
        ("train rows --out run --steps 0", "argument --steps: must be a whole number from 1 to 2147483647, got '0'"),
        ("quickstart --minutes 0", "argument --minutes: must be a finite number, above 0 and at most 1e+06, got '0'"),
    ],
    ids=["no command", "no such command", "misspelt", "no rows", "nothing to resume", "no steps", "no time"],
)
def test_wrong_usage_is_one_line_and_code_2(capsys, tmp_path, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    code, said = failing(capsys, *words.split())
    assert code == 2
    assert said.startswith("andromeda: error: ") and text in said and said.count("\n") == 1


# ---- bounds


BAD_NUMBERS = ["0", "-1", "inf", "nan", "1e400", "1_000", "", "x", str(2**31)]
INTEGERS = {
    "build-dataset corpus --tokenizer t --out new": ["seq-len", "num-cpu"],
    "build-dataset corpus --out new": ["train-tokenizer"],
    "train rows --out new --steps 1": [
        *("steps", "seq-len", "batch-size", "gradient-accumulation", "log-every", "keep"),
        *("dim", "depth", "dim-head", "heads", "num-tokens", "max-seq-len"),
    ],
    "generate model --prompt x": ["tokens", "top-k"],
    "eval model text": ["seq-len", "batch-size", "max-rows"],
    "serve model": ["port"],
}
NOT_NEGATIVE = {
    "train rows --out new --steps 1": [
        *("warmup-steps", "seed", "save-every", "eval-every", "sample-every", "num-workers"),
        *("shift-tokens", "alibi-num-heads"),
    ],
    "generate model --prompt x": ["seed"],
    "quickstart --out new": ["seed"],
}
NUMBERS = {
    "train rows --out new --steps 1": {"learning-rate": "0", "weight-decay": "-1", "max-grad-norm": "-0.1"},
    "generate model --prompt x": {"temperature": "-1", "top-p": "1.5", "min-p": "2"},
    "quickstart --out new": {"minutes": "0"},
}
BOUNDS = [(words, f"--{option}", BAD_NUMBERS) for words, options in INTEGERS.items() for option in options]
BOUNDS += [
    (words, f"--{option}", ["-1", "inf", "1.5", "1_0", "9" * 30])
    for words, options in NOT_NEGATIVE.items()
    for option in options
]
BOUNDS += [
    (words, f"--{option}", [bad, "nan", "inf", "-inf", "1e400", ""])
    for words, options in NUMBERS.items()
    for option, bad in options.items()
]


@pytest.mark.parametrize("words, option, values", BOUNDS, ids=lambda value: value if isinstance(value, str) else "")
def test_numbers_out_of_bounds_name_option_and_bounds(capsys, tmp_path, monkeypatch, words, option, values):
    monkeypatch.chdir(tmp_path)
    for value in values:
        code, said = failing(capsys, *words.split(), f"{option}={value}")
        assert code == 2 and said.startswith(f"andromeda: error: argument {option}: must be a "), (value, said)
    assert list(tmp_path.iterdir()) == []


def test_every_option_that_takes_a_number_has_bounds():
    """No option converts a number with plain int or float, which have no bounds."""
    (commands,) = [action for action in main.make_parser()._actions if action.dest == "command"]
    types = [(name, a.dest, a.type) for name, parser in commands.choices.items() for a in parser._actions]
    assert len(types) > 80
    assert [(name, dest) for name, dest, kind in types if kind in (int, float)] == []
    known = {"read", None, "str"}
    assert {getattr(kind, "__name__", None) for _, _, kind in types} == known


@pytest.mark.parametrize(
    "words",
    [
        "build-dataset ? --tokenizer t --out new",
        "build-dataset corpus --tokenizer ? --out new",
        "build-dataset corpus --tokenizer t --out ?",
        "build-dataset corpus --tokenizer t --out new --text-column ?",
        "build-dataset corpus --tokenizer t --out new --split ?",
        "build-dataset corpus --tokenizer t --out new --hub-repo ?",
        "train ? --out new --steps 1",
        "train rows --out ? --steps 1",
        "train rows --out new --steps 1 --json ?",
        "train rows --out new --steps 1 --eval-data ?",
        "train rows --out new --steps 1 --tokenizer ?",
        "train rows --out new --steps 1 --from ?",
        "generate ? --prompt x",
        "generate model --prompt-file ?",
        "generate model --prompt x --tokenizer ?",
        "generate model --prompt x --device ?",
        "eval ? text",
        "eval model ?",
        "eval model text --json ?",
        "eval model text --tokenizer ?",
        "quickstart --out ?",
        "serve ?",
        "serve model --host ?",
        "serve model --name ?",
        "serve model --chat-template ?",
    ],
)
@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_names_are_refused(capsys, tmp_path, monkeypatch, words, empty):
    """Empty names come from unset variables. As a path, an empty name would mean the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.txt").write_text("")
    code, said = failing(capsys, *(empty if word == "?" else word for word in words.split()))
    assert code == 2 and "must not be empty" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["private.txt"]


# ---- outputs


WITH_FILE = ["eval model text --json ?", "train rows --out new --steps 1 --json ?"]
WITH_FOLDER = [
    "build-dataset corpus --tokenizer t --out ?",
    "train rows --steps 1 --out ?",
    "quickstart --out ?",
]


@pytest.mark.parametrize(
    "words, output, text",
    [(words, output, "--json: cannot write ") for words in WITH_FILE for output in ("missing/x", ".", "file/x", "loop")]
    + [(words, output, "--out: cannot write ") for words in WITH_FOLDER for output in ("file", "file/x", "loop")],
)
def test_outputs_are_checked_before_the_work(capsys, tmp_path, monkeypatch, words, output, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    code, said = failing(capsys, *words.replace("?", output).split())
    assert code == 2 and said.startswith(f"andromeda: error: {text}{output}: ") and said.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]


def test_figures_may_go_into_the_folder_of_the_run(rows, tmp_path):
    run_folder = tmp_path / "run"
    assert run("train", rows, "--out", run_folder, "--steps", "1", "--json", run_folder / "x.json", *FAST) == 0
    assert json.loads((run_folder / "x.json").read_text())["training"]["steps"] == 1


def test_figures_do_not_replace_what_is_read(trained, corpus, tmp_path, capsys):
    (tmp_path / "link").symlink_to(corpus)
    before = corpus.read_bytes()
    for output in (corpus, tmp_path / "link"):
        code, said = failing(capsys, "eval", trained, corpus, "--json", output)
        assert code == 2 and "is what the command reads" in said
    assert corpus.read_bytes() == before


@pytest.mark.parametrize("output", ["new", "new/model", "new/train.json", "new/checkpoint-3", "new/history.jsonl"])
def test_figures_do_not_take_a_name_of_the_run(capsys, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    code, said = failing(capsys, "train", "rows", "--out", "new", "--steps", "1", "--json", output)
    assert code == 2 and said.startswith(f"andromeda: error: --json: {output} is ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "andromeda_checkpoint.json"])
def test_figures_do_not_replace_a_file_of_a_model(trained, rows, tmp_path, capsys, name):
    (tmp_path / "link.json").symlink_to(trained / "model" / name)
    before = (trained / "model" / name).read_bytes()
    for output in (trained / "model" / name, tmp_path / "link.json"):
        code, said = failing(capsys, "eval", trained, rows, "--json", output)
        assert code == 2 and "is a file of a model" in said
    assert (trained / "model" / name).read_bytes() == before


def test_figures_into_a_pipe_and_to_stdout(trained, rows, tmp_path, capfd):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    assert run("eval", trained, rows, "--max-rows", "2", "--device", "cpu", "--json", tmp_path / "pipe") == 0
    figures = json.loads(reader.communicate()[0])
    assert figures["tokens"] == 62 and (tmp_path / "pipe").is_fifo()
    capfd.readouterr()
    assert run("eval", trained, rows, "--max-rows", "2", "--device", "cpu", "--json", "/dev/stdout") == 0
    shown = capfd.readouterr().out
    assert json.loads(shown[shown.index("{") :])["loss"] == figures["loss"] and shown.startswith("loss  ")


# ---- the last handler


class Panic(BaseException):
    """Like panics of Rust libraries, which are not an Exception."""


def in_finally():
    try:
        raise OSError("the first one")
    finally:
        raise ValueError("the second one")


def out_of_recursion():
    return out_of_recursion()


def allocation():
    torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize(
    "fail, said",
    [
        (raising(ValueError("text")), "text"),
        (raising(ValueError("")), "ValueError"),
        (raising(Exception("bare")), "Exception: bare"),
        (raising(Exception()), "Exception"),
        (raising(KeyError("files")), "KeyError: 'files'"),
        (raising(AttributeError("no such attribute")), "AttributeError: no such attribute"),
        (raising(AssertionError()), "AssertionError"),
        (raising(StopIteration()), "StopIteration"),
        (raising(pickle.UnpicklingError("truncated")), "UnpicklingError: truncated"),
        (raising(safetensors.SafetensorError("header")), "SafetensorError: header"),
        (raising(pyarrow.ArrowInvalid("no stream")), "no stream"),
        (raising(Panic("index out of bounds")), "Panic: index out of bounds"),
        (raising(MemoryError()), "not enough memory; a smaller"),
        (raising(torch.OutOfMemoryError("tried to allocate")), "not enough memory (tried to allocate); a smaller"),
        (allocation, "not enough memory ("),
        (out_of_recursion, "RecursionError: maximum recursion depth exceeded"),
        (raising(RuntimeError("first\nsecond\n  third\n")), "first\n    second\n  third\n"),
        (in_finally, "the second one\n    (after OSError: the first one)\n"),
        (raising(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")), "'utf-8' codec can't decode"),
    ],
)
def test_every_error_is_said_in_words(capsys, monkeypatch, fail, said):
    monkeypatch.setattr(info, "gather_info", fail)
    code, shown = failing(capsys, "info")
    assert code == 1 and shown.startswith(f"andromeda: error: {said}")
    assert shown.endswith("\nandromeda: --debug shows where this happened\n")
    with pytest.raises(BaseException):  # noqa: B017 (whatever it is)
        run("info", "--debug")


def turned_into_another(error, cause=True):
    """transformers turns an interruption into this error while it loads a module."""

    def function():
        try:
            raise error
        except BaseException as caught:
            raise ModuleNotFoundError("Could not import module 'Trainer'") from (caught if cause else None)

    return function


@pytest.mark.parametrize(
    "fail, code",
    [
        (raising(KeyboardInterrupt()), 130),
        (raising(interrupts.Interrupted(signal.SIGTERM)), 143),
        (raising(interrupts.Interrupted(signal.SIGHUP)), 129),
        (turned_into_another(KeyboardInterrupt()), 130),
        (turned_into_another(interrupts.Interrupted(signal.SIGTERM)), 143),
        (turned_into_another(interrupts.Interrupted(signal.SIGTERM), cause=False), 143),
    ],
)
def test_interruptions(capsys, monkeypatch, fail, code):
    monkeypatch.setattr(info, "gather_info", fail)
    for words in (["info"], ["info", "--debug"]):
        assert failing(capsys, *words) == (code, "andromeda: interrupted\n")


def test_an_error_that_followed_from_a_signal_is_an_interruption(capsys, monkeypatch):
    monkeypatch.setattr(interrupts, "_seen", [signal.SIGHUP])
    monkeypatch.setattr(info, "gather_info", raising(RuntimeError("a worker died")))
    assert failing(capsys, "info") == (129, "andromeda: interrupted\n")


def test_results_that_cannot_be_printed(monkeypatch, capsys):
    monkeypatch.setattr(info, "gather_info", lambda: {})
    monkeypatch.setattr(info, "info_table", lambda facts: "x" * 100_000)
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert run("info") == 1
        # Python can discard the rest of its buffer at exit without an error.
        assert os.readlink(f"/proc/self/fd/{full.fileno()}") == "/dev/null"
    said = capsys.readouterr().err
    assert said.startswith("andromeda: error: cannot write to standard output: No space left on device\n")


# ---- one process


def test_debug_shows_the_traceback(rows, tmp_path, monkeypatch):
    damaged = tmp_path / "model"
    damaged.mkdir()
    (damaged / "config.json").write_text("{}")
    words = ["eval", damaged, rows, "--tokenizer", rows / "tokenizer", "--device", "cpu"]
    assert run(*words) == 1
    with pytest.raises(OSError):
        run(*words, "--debug")
    monkeypatch.setenv("ANDROMEDA_DEBUG", "1")
    with pytest.raises(OSError):
        run(*words)


def test_a_closed_pipe_is_no_traceback(trained):
    program = "import sys; from andromeda.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        f'"{sys.executable}" -c "{program}" info | head -c 1; echo "${{PIPESTATUS[0]}}"',
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        check=True,
    )
    assert done.stdout.startswith("a") and "Traceback" not in done.stderr
