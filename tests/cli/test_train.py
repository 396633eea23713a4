"""`andromeda train`."""

import json
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from commands import FAST, MODEL, failing, run
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import Trainer

from andromeda import training
from andromeda.data.packed import PackedDataset


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
    original = Trainer.training_step
    steps = []

    def interrupting(*arguments, **options):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", interrupting)
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
        with pytest.raises(SystemExit, match="99"):  # training is reached
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
    """A run without a checkpoint may change its options: nothing depends on the old ones yet."""
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


def test_push_to_hub_without_the_hub_is_one_line_before_any_work(corpus, tmp_path, capsys, monkeypatch):
    def whoami(self, token=None):
        raise OfflineModeIsEnabled("Cannot reach the hub: offline mode is on.")

    monkeypatch.setattr(HfApi, "whoami", whoami)
    words = ["--steps", "1", "--push_to_hub", "--hub_model_id", "me/tiny", *FAST]
    code, said = failing(capsys, "train", corpus, "--tokenizer", corpus, "--out", tmp_path / "run", *words)
    assert code == 1 and "train: cannot push to https://" in said
    assert "nothing was trained. To push, unset HF_HUB_OFFLINE" in said and said.count("\n") == 2  # and --debug
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_pushed_with_its_evaluation_and_the_token_is_not_stored(rows, tmp_path, capsys, monkeypatch):
    pushed = []
    monkeypatch.setattr(HfApi, "whoami", lambda self, token=None: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: pushed.append(options))
    folder = tmp_path / "run"
    words = ["--eval-data", rows, "--steps", "1", *FAST]
    assert run("train", rows, "--out", folder, *words) == 0
    assert pushed == [] and capsys.readouterr().out.count("bits per byte") == 1
    code, said = failing(capsys, "train", "--out", folder, "--resume", "--hub_model_id", "me/tiny")
    assert code == 2 and "argument --hub_model_id/--hub-model-id: expected one argument; write --option=value" in said
    hub = ["--push_to_hub", "--hub_model_id=me/tiny", "--hub_token=secret"]
    assert run("train", "--out", folder, "--resume", *hub) == 0
    (options,) = pushed
    assert (options["repo_id"], options["folder_path"], options["token"]) == ("me/tiny", folder / "model", "secret")
    card = (folder / "model" / "README.md").read_text()
    assert "bits per byte" in card and "perplexity" in card and 'from_pretrained("me/tiny"' in card
    assert [path for path in folder.rglob("*") if path.is_file() and b"secret" in path.read_bytes()] == []
    assert capsys.readouterr().out.count("bits per byte") == 1
