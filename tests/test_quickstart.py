"""The quickstart with next to no time to train: everything in it runs once."""

import json
import signal

import pytest

from andromeda import quickstart, training
from andromeda.cli import main


@pytest.fixture
def small_corpus(monkeypatch):
    monkeypatch.setattr(quickstart, "_CORPUS_BYTES_PER_MINUTE", 10_000_000)
    monkeypatch.setattr(quickstart, "_VOCABULARY", 512)


def run(*words) -> int:
    return main(["quickstart", "--minutes", "0.02", "--device", "cpu", *map(str, words)])


def test_quickstart(small_corpus, tmp_path, capsys, monkeypatch):
    """Interrupted in the training, continued, finished, refused the third time."""
    out = tmp_path / "quick start"
    original = training.collate
    batches = []

    def interrupting(batch):
        batches.append(1)
        if len(batches) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(batch)

    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "_seconds_per_step", lambda *arguments: 0.2)
        patch.setattr(training, "collate", interrupting)
        assert run("--out", out) == 130
    said = capsys.readouterr().err
    assert f"andromeda quickstart --out '{out}' --minutes 0.02 --device cpu" in said
    assert json.loads((out / "quickstart.json").read_text())["status"] == "begun"

    assert run("--out", out, "--seed", "1") == 2
    assert "holds an interrupted quickstart with minutes 0.02, seed 0" in capsys.readouterr().err

    assert run("--out", out) == 0
    shown = capsys.readouterr().out
    for part in (
        "quickstart, done in",
        " tokens at ",
        "bits per byte",
        "same logits",
        "A sample, from 'def '",
        "What to do",
    ):
        assert part in shown
    record = json.loads((out / "quickstart.json").read_text())
    assert record["status"] == "done" and record["training"]["steps"] == record["steps"] == 6
    assert record["evaluation"]["bits_per_byte"] > 0
    assert (out / "run" / "model" / "model.safetensors").is_file()

    assert run("--out", out) == 2
    assert "holds a finished quickstart; --force replaces it" in capsys.readouterr().err


def test_quickstart_touches_no_other_folder(tmp_path, capsys):
    (tmp_path / "letter.txt").write_text("mine")
    for words in ((), ("--force",)):
        assert run("--out", tmp_path, *words) == 2
        assert "--out must be a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_the_corpus_is_the_same_every_time_and_held_out_files_are_apart(tmp_path):
    found = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        counts = quickstart._write_corpus(tmp_path / name, 300_000, seed=3)
        files = {
            part: [json.loads(line)["file"] for line in (tmp_path / name / part).read_text().splitlines()]
            for part in ("train.jsonl", "heldout.jsonl")
        }
        assert not set(files["train.jsonl"]) & set(files["heldout.jsonl"])
        assert counts["files"] == len(files["train.jsonl"]) and counts["held_out_files"] == len(files["heldout.jsonl"])
        assert 300_000 <= counts["bytes"] < 2_000_000
        found.append(files)
    assert found[0] == found[1]
    assert not any("test" in name.split("/") or "site-packages" in name for name in found[0]["train.jsonl"])


def test_the_measured_step_takes_time(tmp_path, small_corpus):
    """The calibration runs on rows as the builder makes them and gives a plausible figure."""
    from andromeda import AndromedaTokenizer
    from andromeda.dataset import PackedDataset
    from andromeda.runs import pack

    (tmp_path / "corpus.txt").write_text("for item in items:\n    total += item\n" * 200)
    tokenizer = AndromedaTokenizer.train(["for item in items: total += item"], 260, min_frequency=1)
    pack(tmp_path / "corpus.txt", tmp_path / "rows", tokenizer, seq_len=16)
    model = {
        "num_tokens": 384,
        "max_seq_len": 16,
        "dim": 16,
        "depth": 1,
        "dim_head": 8,
        "heads": 2,
        "alibi_num_heads": 1,
    }
    rows = PackedDataset(tmp_path / "rows", doc_mask=True)
    assert 1e-4 < quickstart._seconds_per_step(model, rows, "cpu") < 30
