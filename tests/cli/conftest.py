"""A small corpus, its packed rows and a run trained on them, all made by the commands."""

import json
from pathlib import Path

import pytest
from commands import FAST, run


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """30 kB of Python source."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    text = Path(json.__file__).with_name("decoder.py").read_text() + Path(json.__file__).read_text()
    parts = [text[begin : begin + 1500] for begin in range(0, 30_000, 1500)]
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts if part))
    return path


@pytest.fixture(scope="session")
def rows(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "rows"
    assert run("build-dataset", corpus, "--train-tokenizer", "400", "--seq-len", "32", "--out", folder) == 0
    return folder


@pytest.fixture(scope="session")
def trained(rows, tmp_path_factory):
    """A finished run of 6 steps with checkpoints every 2."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run("train", rows, "--out", folder, "--steps", "6", "--save-every", "2", *FAST) == 0
    return folder
