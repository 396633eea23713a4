"""`andromeda build-dataset`."""

import io
import json
import sys

import pytest
from commands import failing, run

from andromeda.data.packed import PackedDataset


def test_build_dataset_reports_and_saves_the_tokenizer(rows):

    packed = PackedDataset(rows)
    assert packed.seq_len == 32 and len(packed) > 100
    assert sorted(path.name for path in rows.iterdir()) == ["data.arrow", "metadata.json", "tokenizer"]


def test_build_dataset_does_not_overwrite(corpus, rows, capsys):
    code, said = failing(capsys, "build-dataset", corpus, "--train-tokenizer", "400", "--out", rows)
    assert code == 2 and said.startswith("andromeda: error: --out must be a new folder")


def test_build_dataset_leaves_nothing_behind_when_it_fails(corpus, tmp_path, capsys):
    words = ["build-dataset", corpus, "--train-tokenizer", "400", "--seq-len", "999999", "--out", tmp_path / "rows"]
    code, said = failing(capsys, *words)
    assert code == 1 and "must hold at least seq_len=999999 tokens" in said
    assert list(tmp_path.iterdir()) == []


def test_build_dataset_names_the_column_and_what_it_leaves_out(corpus, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    lines = corpus.read_text().replace('{"text"', '{"body"')
    for name, content in (("a.jsonl", lines), ("b.txt", "a text"), ("c.bin", "x"), ("d.md", "y"), ("info.json", "{}")):
        (source / name).write_text(content)
    words = ["--train-tokenizer", "400", "--seq-len", "32", "--exclude", "*.md", "--exclude", "*.tmp"]
    assert run("build-dataset", source, "--out", tmp_path / "rows", *words) == 0
    out, _ = capsys.readouterr()
    for line in (
        "formats      1 jsonl, 1 text",
        "text column  body",
        "left out     1 of no known kind: c.bin",
        "left out     1 excluded: d.md",
        "left out     1 single JSON objects without the text column: info.json",
        "note         the pattern '*.tmp' matches nothing",
    ):
        assert line in out.splitlines()


def test_build_dataset_of_a_pipe(corpus, rows, tmp_path, capsys, monkeypatch):
    """With a saved tokenizer one pass is enough; training one needs a copy of the pipe. Separators cut documents."""

    data = corpus.read_bytes()
    for index, which in enumerate((["--tokenizer", rows / "tokenizer"], ["--train-tokenizer", "400"])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        out = tmp_path / f"rows-{index}"
        assert run("build-dataset", "-", *which, "--seq-len", "32", "--out", out) == 0
        assert (out / "data.arrow").read_bytes() == (rows / "data.arrow").read_bytes()
    capsys.readouterr()
    text = "\n".join(json.loads(line)["text"] for line in corpus.read_text().splitlines()).replace("\n\n", "<|end|>")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    words = ["--tokenizer", rows / "tokenizer", "--seq-len", "32", "--document-separator", "<|end|>"]
    assert run("build-dataset", "-", *words, "--out", tmp_path / "cut") == 0
    documents = sum(1 for part in text.split("<|end|>") if part.strip())
    assert PackedDataset(tmp_path / "cut").statistics["documents"] == documents
    assert "formats      1 text\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "argument SOURCE: must not be empty, got ''"),
        ({"--out": " "}, "argument --out: must not be empty, got ' '"),
        ({"--tokenizer": ""}, "argument --tokenizer: must not be empty, got ''"),
    ],
    ids=["source", "out", "tokenizer"],
)
def test_build_dataset_refuses_empty_names(rows, tmp_path, capsys, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    options = {"source": "a.txt", "--out": "rows", "--tokenizer": str(rows / "tokenizer")} | changes
    source = options.pop("source")
    code, said = failing(capsys, "build-dataset", source, *(word for pair in options.items() for word in pair))
    assert code == 2 and message in said
    assert list(tmp_path.iterdir()) == []


def test_build_dataset_refuses_packed_rows(rows, tmp_path, capsys):
    code, said = failing(capsys, "build-dataset", rows, "--train-tokenizer", "400", "--out", tmp_path / "again")
    assert code == 1 and "got rows that are packed already: give them to `andromeda train`" in said
