"""The commands, run in this process on a small corpus; one as a process of its own."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import safetensors
import torch

from andromeda import Andromeda, cli, info, interrupts, training
from andromeda.cli import main
from andromeda.data.packed import PackedDataset

MODEL = ["--dim", "32", "--depth", "1", "--heads", "2", "--dim-head", "16", "--alibi-num-heads", "1"]
FAST = [*MODEL, "--batch-size", "2", "--learning-rate", "1e-2", "--device", "cpu"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """30 kB of Python source."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    text = Path(json.__file__).with_name("decoder.py").read_text() + Path(json.__file__).read_text()
    parts = [text[begin : begin + 1500] for begin in range(0, 30_000, 1500)]
    path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts if part))
    return path


@pytest.fixture(scope="module")
def rows(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "rows"
    assert run("build-dataset", corpus, "--train-tokenizer", "400", "--seq-len", "32", "--out", folder) == 0
    return folder


@pytest.fixture(scope="module")
def trained(rows, tmp_path_factory):
    """A finished run of 6 steps with checkpoints every 2."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run("train", rows, "--out", folder, "--steps", "6", "--save-every", "2", *FAST) == 0
    return folder


def run(*words) -> int:
    return main([str(word) for word in words])


def failing(capsys, *words) -> tuple[int, str]:
    """Exit code and what was said; argparse leaves by SystemExit."""
    try:
        code = run(*words)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return code, err


# ---- help


@pytest.mark.parametrize("command", ["info", "quickstart", "build-dataset", "train", "generate", "eval"])
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


# ---- build-dataset


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
    """Read once with a tokenizer that exists, kept when one is trained first; separators cut documents."""

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


# ---- train


def test_train_leaves_a_model_and_figures(rows, tmp_path, capsys):
    words = ["--out", tmp_path / "run", "--steps", "4", "--eval-data", rows, "--json", tmp_path / "figures.json"]
    assert run("train", rows, *words, *FAST) == 0
    out, err = capsys.readouterr()
    assert "steps        4, loss " in out and "perplexity" in out and "bits per byte" in out
    assert "training " in err
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["training"]["steps"] == 4 and figures["evaluation"]["bits_per_byte"] > 0
    assert (tmp_path / "run" / "model" / "tokenizer.json").is_file()


def test_train_compares_rows_with_their_checksums_once(rows, tmp_path, monkeypatch):
    verify, compared = PackedDataset.verify, []
    monkeypatch.setattr(PackedDataset, "verify", lambda self: compared.append(self.path) or verify(self))
    assert run("train", rows, "--out", tmp_path / "run", "--steps", "1", *FAST) == 0
    assert compared == [rows]


def test_rows_without_checksums_are_said(rows, trained, tmp_path, capsys):
    old = shutil.copytree(rows, tmp_path / "old")
    metadata = json.loads((old / "metadata.json").read_text())
    del metadata["xxh3_128"], metadata["metadata_xxh3_128"]
    (old / "metadata.json").write_text(json.dumps(metadata))
    for words in (["train", old, "--out", tmp_path / "run", "--steps", "1", *FAST], ["eval", trained, old]):
        assert run(*words) == 0
        assert "is of an older version and has no checksums" in capsys.readouterr().err


def test_train_resumes_with_the_options_it_was_started_with(rows, tmp_path, capsys, monkeypatch, trained):
    """Ctrl-C in the third step; the continued run ends with the weights of the uninterrupted one."""
    folder = tmp_path / "run"
    original = training.collate
    batches = []

    def interrupting(batch):
        batches.append(1)
        if len(batches) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(batch)

    with monkeypatch.context() as patch:
        patch.setattr(training.trainer, "collate", interrupting)
        code = run("train", rows, "--out", folder, "--steps", "6", "--save-every", "2", *FAST)
    assert code == 130
    said = capsys.readouterr().err
    assert f"andromeda train --out {folder} --resume" in said
    assert not (folder / "model").exists()
    assert run("train", "--out", folder, "--resume", "--log-every", "1") == 0
    for name in ("model.safetensors", "config.json"):
        assert (folder / "model" / name).read_bytes() == (trained / "model" / name).read_bytes()


def test_train_refuses_a_used_folder_and_changed_options(rows, trained, capsys):
    code, said = failing(capsys, "train", rows, "--out", trained, "--steps", "6")
    assert code == 2 and "holds a run; continue it with --resume" in said
    code, said = failing(capsys, "train", "--out", trained, "--resume", "--steps", "7")
    assert code == 2 and "steps: was 6, is 7" in said


BAD_STARTS = {
    "vocabulary": ("--num-tokens", 10),
    "rows of a step": ("--batch-size", 100_000),
    "warm-up": ("--warmup-steps", 9),
    "evaluation data": ("--eval-every", 1),
    "evaluation rows": ("--eval-data", "nowhere"),
    "weights": ("--from", "nowhere"),
    "tokenizer": ("--tokenizer", "nowhere"),
    "heads": ("--alibi-num-heads", 3),
    "arguments of transformers": ("--max_steps", 3),
}


@pytest.mark.parametrize("words", BAD_STARTS.values(), ids=BAD_STARTS)
def test_a_start_that_fails_its_checks_leaves_no_run(rows, tmp_path, capsys, monkeypatch, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = ["train", rows, "--out", tmp_path / "run", "--steps", "1", *FAST]
    code, _ = failing(capsys, *command, *words)
    assert code in (1, 2) and not (tmp_path / "run" / "train.json").exists()
    monkeypatch.setattr(training, "train", lambda *args, **options: sys.exit(99))
    for resume in ([], ["--resume"]) if (tmp_path / "run").exists() else ([],):
        with pytest.raises(SystemExit, match="99"):  # it comes to the training
            run(*command, *resume)


LEFT_BY_KILLS = {
    "before the file of the run": [],
    "while it is written": [".train.json.0123456789abcdef"],
    "after it": ["train.json"],
    "after the history": ["train.json", "history.jsonl"],
    "in the first checkpoint": ["train.json", "history.jsonl", ".partial/checkpoint-1/model.safetensors"],
}


@pytest.mark.parametrize("resume", [False, True], ids=["start", "--resume"])
@pytest.mark.parametrize("names", LEFT_BY_KILLS.values(), ids=LEFT_BY_KILLS)
def test_a_run_killed_before_its_first_checkpoint_starts_over(rows, tmp_path, names, resume):
    """With other options, too: nothing depends on the old ones yet."""
    folder = tmp_path / "run"
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"data": str(rows), "steps": 7, "depth": 1, "num_tokens": 10}
        path.write_text(json.dumps(training.sealed({"options": options})) if name == "train.json" else '{"half')
    folder.mkdir(exist_ok=True)
    words = [*FAST, "--num-tokens", "512", "--seed", "3", *(["--resume"] if resume else [])]
    assert run("train", rows, "--out", folder, "--steps", "2", *words) == 0
    assert {path.name for path in folder.iterdir()} == {"train.json", "history.jsonl", "checkpoint-2", "model"}
    stored = json.loads((folder / "train.json").read_text())["options"]
    assert (stored["steps"], stored["seed"], stored["num_tokens"]) == (2, 3, 512)


def test_a_folder_with_something_else_is_no_place_for_a_run(rows, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("keep me")
    code, said = failing(capsys, "train", rows, "--out", tmp_path, "--steps", "1", *FAST)
    assert code == 2 and "is not empty; remove what is in it, or choose another" in said
    code, said = failing(capsys, "train", "--out", tmp_path, "--resume")
    assert code == 2 and "has no train.json; give ROWS and all options again" in said


def test_free_options_that_are_given_on_resume_win(rows, trained, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    seen = []
    monkeypatch.setattr(training, "train", lambda *args, **options: seen.append(args[2]) or sys.exit(99))
    words = ["--keep", "5", "--log-every", "3", "--sample-prompt", "def", "--save-every", "1"]
    with pytest.raises(SystemExit, match="99"):
        run("train", "--out", folder, "--resume", *words)
    (settings,) = seen
    assert (settings.keep, settings.log_every, settings.sample_prompt, settings.save_every) == (5, 3, "def", 1)
    assert (settings.steps, settings.learning_rate) == (6, 1e-2)


@pytest.mark.parametrize("damage", ["{", "[]", '{"andromeda": "0.1"}', "\0", "flip"])
def test_a_damaged_file_of_a_run_is_named(rows, trained, tmp_path, capsys, damage):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    record = folder / "train.json"
    record.write_text(record.read_text().replace('"steps": 6', '"steps": 7') if damage == "flip" else damage)
    code, said = failing(capsys, "train", "--out", folder, "--resume")
    assert code == 2 and f"{record} is damaged" in said and "remove it and give ROWS and all options again" in said
    record.unlink()
    shutil.rmtree(folder / "checkpoint-6")
    assert run("train", rows, "--out", folder, "--resume", "--steps", "6", "--save-every", "2", *FAST) == 0
    assert json.loads(record.read_text())["options"]["steps"] == 6
    assert (folder / "model" / "model.safetensors").read_bytes() == (
        trained / "model" / "model.safetensors"
    ).read_bytes()


def test_files_of_runs_without_a_checksum_are_read(rows, trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    stored = json.loads((folder / "train.json").read_text())
    assert stored.pop("xxh3_128")
    (folder / "train.json").write_text(json.dumps(stored))
    assert run("train", "--out", folder, "--resume") == 0


def test_a_run_that_diverges_is_an_error(rows, tmp_path, capsys):
    words = ["--steps", "30", "--learning-rate", "1e3", "--warmup-steps", "1", "--save-every", "2", "--device", "cpu"]
    code, said = failing(capsys, "train", rows, "--out", tmp_path / "run", *MODEL, "--batch-size", "2", *words)
    assert code == 1 and "step " in said and "lower learning_rate (now 1000)" in said and "loss 0.000" not in said
    assert not (tmp_path / "run" / "model").exists()


def test_train_passes_options_on_to_transformers(rows, tmp_path, capsys):
    words = ["train", rows, "--out", tmp_path / "run", "--steps", "1", *FAST]
    assert run(*words, "--adam_epsilon", "1e-6", "--optim", "adamw_torch") == 0
    stored = json.loads((tmp_path / "run" / "train.json").read_text())["options"]["trainer"]
    assert stored == {"adam_epsilon": 1e-6, "optim": "adamw_torch"}
    capsys.readouterr()
    code, said = failing(capsys, *words[:3], tmp_path / "other", *words[4:], "--no-such-option", "3")
    assert code == 2 and "unrecognized arguments: --no-such-option 3" in said
    code, said = failing(capsys, *words[:3], tmp_path / "other", *words[4:], "--max_steps", "3")
    assert code == 2 and "must not repeat what has a name here, got max_steps" in said


def test_train_from_a_saved_model(rows, trained, tmp_path):
    words = ["--from", trained, "--out", tmp_path / "run", "--steps", "1", "--batch-size", "2", "--device", "cpu"]
    assert run("train", rows, *words, "--learning-rate", "1e-9") == 0
    from andromeda.huggingface import AndromedaForCausalLM

    before, after = (AndromedaForCausalLM.from_pretrained(folder / "model") for folder in (trained, tmp_path / "run"))
    for (name, ours), theirs in zip(after.state_dict().items(), before.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0, msg=name)


# ---- generate


def test_generate_streams_prompt_and_continuation(trained, capsys):
    words = ["generate", trained, "--prompt", "def naïve(", "--tokens", "12", "--device", "cpu", "--seed", "1"]
    assert run(*words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("def naïve(") and out.endswith("\n") and len(out) > len("def naïve(\n")
    assert "12 tokens in" in err
    assert run(*words, "--no-prompt") == 0
    assert "def naïve(" + capsys.readouterr().out == out


@pytest.mark.parametrize("sampling", ["--top-k 5", "--top-p 0.5", "--min-p 0.2", "--temperature 0"])
def test_generate_samples_as_told(trained, tmp_path, capsys, sampling):
    (tmp_path / "prompt.txt").write_text("class ")
    words = ["--prompt-file", tmp_path / "prompt.txt", "--tokens", "5", "--device", "cpu", *sampling.split()]
    assert run("generate", trained / "checkpoint-6", *words) == 0
    assert capsys.readouterr().out.startswith("class ")


def test_generate_with_a_model_saved_by_andromeda(trained, tmp_path, capsys):
    torch.manual_seed(0)
    model = Andromeda(num_tokens=400, max_seq_len=32, dim=32, depth=1, dim_head=16, heads=2, alibi_num_heads=1)
    model.save(tmp_path / "plain")
    words = ["--prompt", "x", "--tokens", "3", "--device", "cpu"]
    code, said = failing(capsys, "generate", tmp_path / "plain", *words)
    assert code == 2 and "say which tokenizer with --tokenizer" in said
    assert run("generate", tmp_path / "plain", *words, "--tokenizer", trained / "model") == 0


def test_generate_refuses(trained, tmp_path, capsys):
    code, said = failing(capsys, "generate", tmp_path / "nowhere", "--prompt", "x")
    assert code == 2 and "nowhere does not exist" in said
    code, said = failing(capsys, "generate", tmp_path, "--prompt", "x")
    assert code == 2 and "is no saved model" in said
    code, said = failing(capsys, "generate", trained)
    assert code == 2 and "one of the arguments --prompt --prompt-file is required" in said


# ---- eval


def test_eval_prints_and_writes_the_same_figures(trained, rows, corpus, tmp_path, capsys):
    words = ["--device", "cpu", "--json", tmp_path / "figures.json"]
    assert run("eval", trained, rows, "--max-rows", "9", *words) == 0
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert f"loss           {figures['loss']:.4f} nats per token, over {figures['tokens']:,} tokens" in shown
    assert f"bits per byte  {figures['bits_per_byte']:.4f}" in shown
    assert figures["tokens"] == 9 * 31


def test_eval_packs_a_text_itself(trained, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ANDROMEDA_CACHE", str(tmp_path))
    assert run("eval", trained, corpus, "--max-rows", "4", "--device", "cpu") == 0
    assert "over 124 tokens" in capsys.readouterr().out  # rows as long as the window of the model
    assert run("eval", trained, corpus, "--max-rows", "4", "--device", "cpu", "--seq-len", "16") == 0
    assert "over 60 tokens" in capsys.readouterr().out


def test_eval_refuses_rows_of_another_tokenizer(trained, corpus, tmp_path, capsys):
    assert run("build-dataset", corpus, "--train-tokenizer", "300", "--seq-len", "32", "--out", tmp_path / "rows") == 0
    capsys.readouterr()
    code, said = failing(capsys, "eval", trained, tmp_path / "rows", "--device", "cpu")
    assert code == 2 and "packed with another tokenizer" in said


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
    """Bounds of later options are not forgotten: none reads its number by itself."""
    (commands,) = [action for action in cli._parser()._actions if action.dest == "command"]
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
    ],
)
@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_names_are_refused(capsys, tmp_path, monkeypatch, words, empty):
    """As of a variable that is not set: to a path it would mean the current folder."""
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
    """As the panics of libraries in Rust, which are no Exception."""


def in_finally():
    try:
        raise OSError("the first one")
    finally:
        raise ValueError("the second one")


def out_of_recursion():
    return out_of_recursion()


def allocation():
    torch.empty(2**60, dtype=torch.uint8)


def raising(error):
    def function():
        raise error

    return function


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
    """As transformers does with an interruption while it loads a module."""

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
        # What is left in the buffer is no complaint of Python at exit.
        assert os.readlink(f"/proc/self/fd/{full.fileno()}") == "/dev/null"
    said = capsys.readouterr().err
    assert said.startswith("andromeda: error: cannot write to standard output: No space left on device\n")


def test_a_device_that_is_not_here(trained, rows, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["generate", trained, "--prompt", "x"], ["eval", trained, rows], ["quickstart", "--out", "never"]):
        for device in ("cuda", "mps", "gpu"):
            code, said = failing(capsys, *words, "--device", device)
            assert code == 2 and said.startswith(f"andromeda: error: --device must be cpu, got '{device}'; torch ")


def test_weights_that_are_not_finite(trained, rows, tmp_path, capsys):
    """The text is generated all the same, after a warning; figures of such a model would be none."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(trained / "model", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for recorded in folder.glob("andromeda*.json"):
        recorded.unlink()  # a training that diverged saved them so
    words = ["--prompt", "x", "--tokens", "2", "--device", "cpu", "--temperature", "0"]
    run("generate", folder, *words)
    assert "parameters of" in capsys.readouterr().err
    code, said = failing(capsys, "eval", folder, rows, "--device", "cpu")
    assert code == 1 and "are not finite" in said and "take an earlier checkpoint" in said


@pytest.mark.parametrize("way", ["--prompt", "--prompt-file"])
def test_a_prompt_that_is_not_utf8(trained, tmp_path, capsys, way):
    (tmp_path / "prompt.txt").write_bytes(b"caf\xe9")
    value = "caf\udce9" if way == "--prompt" else tmp_path / "prompt.txt"
    code, said = failing(capsys, "generate", trained, way, value)
    assert code == 2 and "UTF-8, got the byte 0xe9 at offset 3" in said


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
    program = "import sys; from andromeda.cli import main; sys.exit(main())"
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
