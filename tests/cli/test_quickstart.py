"""The quickstart with almost no time to train: every step runs once."""

import json
import signal

import pytest
from transformers import Trainer

from andromeda.cli import console, interrupts, quickstart
from andromeda.cli.main import main
from andromeda.data.packed import PackedDataset


@pytest.fixture
def small_corpus(monkeypatch):
    monkeypatch.setattr(quickstart, "_CORPUS_BYTES_PER_MINUTE", 10_000_000)
    monkeypatch.setattr(quickstart, "_VOCABULARY", 512)


def run(*words) -> int:
    return main(["quickstart", "--minutes", "0.02", "--device", "cpu", *map(str, words)])


def test_quickstart(small_corpus, tmp_path, capsys, monkeypatch):
    """Interrupted during training, continued to the end, refused the third time."""
    out = tmp_path / "quick start"
    original = Trainer.training_step
    steps = []

    def interrupting(*arguments, **options):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(quickstart, "_seconds_per_step", lambda *arguments: 0.2)
        patch.setattr(Trainer, "training_step", interrupting)
        assert run("--out", out) == 130
    said = capsys.readouterr().err
    assert f"andromeda quickstart --out '{out}' --minutes 0.02 --seed 0 --device cpu" in said
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_the_training(small_corpus, tmp_path, capsys, monkeypatch, number):
    original = quickstart._write_corpus

    def interrupted(folder, limit, seed):
        (folder / "half").write_text("")
        raise interrupts.Interrupted(number)

    monkeypatch.setattr(quickstart, "_write_corpus", interrupted)
    assert run("--out", tmp_path) == 128 + number
    assert "andromeda: interrupted; this continues:\n    andromeda quickstart --out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart.json"]

    def corpus_then_stop(folder, limit, seed):
        assert original(folder, limit, seed)["files"] > 0
        raise interrupts.Interrupted(number)

    monkeypatch.setattr(quickstart, "_write_corpus", corpus_then_stop)
    assert run("--out", tmp_path) == 128 + number
    assert "continuing the interrupted quickstart" in capsys.readouterr().err


def test_a_record_that_was_not_finished_blocks_nothing(tmp_path, monkeypatch, capsys):
    """The process was killed while it wrote its first quickstart.json."""
    (tmp_path / ".quickstart.json.0123456789abcdef").write_text("{")
    monkeypatch.setattr(quickstart, "_run_steps", lambda out, state, started: "went on")
    assert run("--out", tmp_path) == 0
    assert capsys.readouterr().out == "went on\n"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"status": "begun"}'])
def test_a_damaged_record_is_named_and_can_be_replaced(tmp_path, monkeypatch, capsys, content):
    record = tmp_path / "quickstart.json"
    record.write_text(content)
    monkeypatch.setattr(quickstart, "_run_steps", lambda out, state, started: "went on")
    assert run("--out", tmp_path) == 2
    said = capsys.readouterr().err
    assert f"{record} is damaged" in said and "--force starts anew" in said
    assert run("--out", tmp_path, "--force") == 0


@pytest.mark.parametrize(
    "options, text",
    [
        ({"minutes": float("nan")}, "--minutes must be positive and finite, got nan"),
        ({"minutes": float("inf")}, "--minutes must be positive and finite, got inf"),
        ({"minutes": -1}, "--minutes must be positive and finite, got -1"),
        ({"seed": -1}, "--seed must be from 0 to"),
        ({"seed": 2**32}, "--seed must be from 0 to"),
    ],
)
def test_arguments_out_of_range(tmp_path, options, text):
    with pytest.raises(console.UsageError, match=text):
        quickstart.quickstart(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_known_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="cannot write"):
        quickstart.quickstart(tmp_path / "file" / "out")


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
    """The calibration runs on rows of the builder and gives a plausible time."""
    from andromeda import AndromedaTokenizer
    from andromeda.cli.loading import pack

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
