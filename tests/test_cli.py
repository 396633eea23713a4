"""The commands, run in this process on a small corpus; one as a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from andromeda import Andromeda, training
from andromeda.cli import main

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


def test_the_module_runs_the_same_command():
    from andromeda import __main__

    assert __main__.main is main


# ---- build-dataset


def test_build_dataset_reports_and_saves_the_tokenizer(rows):
    from andromeda.dataset import PackedDataset

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
        patch.setattr(training, "collate", interrupting)
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
        ("train rows --out run --steps 0", "steps must be at least 1, got 0"),
        ("quickstart --minutes 0", "--minutes must be positive"),
    ],
    ids=["no command", "no such command", "misspelt", "no rows", "nothing to resume", "no steps", "no time"],
)
def test_wrong_usage_is_one_line_and_code_2(capsys, tmp_path, monkeypatch, words, text):
    monkeypatch.chdir(tmp_path)
    code, said = failing(capsys, *words.split())
    assert code == 2
    assert said.startswith("andromeda: error: ") and text in said and said.count("\n") == 1


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
