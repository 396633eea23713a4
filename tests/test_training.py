"""Training, exact continuation, checkpoints that are whole or absent, evaluation."""

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from andromeda import Andromeda, AndromedaTokenizer, files, training
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.training import TrainSettings, evaluate, latest_checkpoint, sample_text, token_bytes, train

SIZES = {"num_tokens": 320, "max_seq_len": 16, "dim": 16, "depth": 1, "dim_head": 8, "heads": 2, "alibi_num_heads": 1}
TEXTS = ["def add(a, b):\n    return a + b\n", "for name in names:\n    print(name)\n", "naïve café ☕"] * 40


class Rows(torch.utils.data.Dataset):
    """Rows that count up, with different starts: something a tiny model can learn.

    fail_at: as if killed when so many rows have been read since `begin`.
    """

    def __init__(self, count=24, seqlen=12, fail_at=None):
        start = torch.arange(count)[:, None] * 7
        self.ids = (start + torch.arange(seqlen)) % 50 + 2
        self.ids_read, self.fail_at = -(10**6), fail_at

    def begin(self):
        self.ids_read = 0

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        self.ids_read += 1
        if self.ids_read == self.fail_at:
            raise Killed
        return {"input_ids": self.ids[index], "labels": self.ids[index].clone()}


class Killed(BaseException):
    """Ends a run as a signal that cannot be caught would: nothing after it is executed."""


def new_model() -> Andromeda:
    torch.manual_seed(5)
    return Andromeda(**SIZES)


def settings(folder, **options) -> TrainSettings:
    fast = {"steps": 8, "batch_size": 2, "learning_rate": 1e-2, "log_every": 2, "save_every": 2, "device": "cpu"}
    return TrainSettings(output_dir=str(folder), **{**fast, **options})


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: dict, expected: dict):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.fixture(scope="module")
def tokenizer():
    return AndromedaTokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Weights after 8 steps in one go."""
    model = new_model()
    train(model, Rows(), settings(tmp_path_factory.mktemp("whole")))
    return weights(model)


# ---- what training does


def test_the_loss_falls(tmp_path):
    model = new_model()
    before = evaluate(model, Rows()).loss
    result = train(model, Rows(), settings(tmp_path, steps=30, save_every=0))
    assert result.steps == 30 and result.tokens == 30 * 2 * 12
    assert result.history[0]["loss"] > result.loss
    assert evaluate(model, Rows()).loss < before - 0.5
    assert Path(result.checkpoint).name == "checkpoint-30"
    assert result.tokens_per_second == pytest.approx(result.tokens / result.seconds)
    assert result.mfu is None and result.interrupted is None


def test_the_saved_model_is_the_trained_one(tmp_path, tokenizer):
    model = new_model()
    train(model, Rows(), settings(tmp_path), tokenizer=tokenizer)
    loaded = AndromedaForCausalLM.from_pretrained(tmp_path / "model")
    assert_same(loaded.state_dict(), model.state_dict())
    assert AndromedaTokenizer(str(tmp_path / "model"), eos_token=None, pad_token=None).tokenizer.eos_token == "<eos>"


def test_checkpoints_hold_no_pickle_of_arguments_and_old_ones_go(tmp_path):
    train(new_model(), Rows(), settings(tmp_path, keep=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-6",
        "checkpoint-8",
        "history.jsonl",
        "model",
    ]
    for folder in tmp_path.iterdir():
        assert not (folder / "training_args.bin").exists()


def test_gradient_accumulation_is_one_large_batch(tmp_path):
    """The mean goes over all tokens of a step: rows with few labels must not weigh more."""

    class Uneven(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            row["labels"][: 1 + index % 11] = -100
            return row

    found = {}
    for size, parts in ((4, 1), (1, 4)):
        model = new_model()
        options = {"batch_size": size, "gradient_accumulation": parts, "steps": 3, "save_every": 0}
        train(model, Uneven(), settings(tmp_path / str(size), **options))
        found[size] = weights(model)
    for name, value in found[4].items():
        torch.testing.assert_close(found[1][name], value, atol=2e-4, rtol=0, msg=name)


def test_weight_decay_leaves_gains_scales_and_biases_alone(tmp_path):
    model = AndromedaForCausalLM.from_andromeda(new_model())
    arguments = settings(tmp_path).training_arguments()
    decayed = training._Trainer(model=model, args=arguments, identity={}, keep=1).get_decay_parameter_names(model)
    others = [name for name, _ in model.named_parameters() if name not in decayed]
    assert {name.rpartition(".")[2] for name in decayed} == {"weight"}
    assert {name.rpartition(".")[2] for name in others} == {"gamma", "residual_scale", "q_scale", "k_scale", "bias"}


def test_worker_processes_change_nothing(tmp_path, uninterrupted):
    model = new_model()
    train(model, Rows(), settings(tmp_path, num_workers=2))
    assert_same(weights(model), uninterrupted)


def test_progress_evaluations_and_samples_are_shown(tmp_path, tokenizer, capsys):
    options = {"eval_every": 4, "sample_every": 4, "sample_prompt": "def "}
    result = train(new_model(), Rows(), settings(tmp_path, **options), eval_dataset=Rows(8), tokenizer=tokenizer)
    shown = capsys.readouterr().err
    assert "step 4/8: loss " in shown and "tokens/s" in shown and "left" in shown
    assert "step 8: evaluation loss" in shown
    assert "step 4: a sample\n  | def " in shown
    assert [entry["step"] for entry in result.history if "eval_loss" in entry] == [4, 8]


# ---- continuing


def test_a_killed_run_continues_bit_for_bit(tmp_path, uninterrupted):
    rows = Rows(fail_at=10)
    with pytest.raises(Killed):
        train(new_model(), rows, settings(tmp_path), on_start=rows.begin)
    assert latest_checkpoint(tmp_path) is not None
    model = new_model()
    result = train(model, Rows(), settings(tmp_path), resume=True)
    assert result.steps == 8 and result.tokens < 8 * 2 * 12
    assert_same(weights(model), uninterrupted)


def test_continuing_across_epochs_with_accumulation(tmp_path):
    """Checkpoints in the middle and at the end of an epoch of 3 steps."""
    options = {"steps": 7, "gradient_accumulation": 2, "save_every": 1, "keep": 9}
    model = new_model()
    train(model, Rows(12), settings(tmp_path / "whole", **options))
    expected = weights(model)
    for step in (2, 3):
        folder = tmp_path / f"from-{step}"
        name = f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / name, folder / name)
        model = new_model()
        train(model, Rows(12), settings(folder, **options), resume=True)
        assert_same(weights(model), expected)


@pytest.mark.parametrize("stage", ["_save_rng_state", "_save_optimizer_and_scheduler", "_install"])
def test_a_run_killed_while_it_writes_a_checkpoint(tmp_path, monkeypatch, uninterrupted, stage):
    """The half-written second checkpoint is not there, the first one is used, and the rest is cleared away."""
    original = getattr(training._Trainer, stage)
    calls = []

    def killed_the_second_time(*arguments):
        calls.append(stage)
        if len(calls) == 2:
            raise Killed
        return original(*arguments)

    replacement = staticmethod(killed_the_second_time) if stage == "_install" else killed_the_second_time
    with monkeypatch.context() as patch:
        patch.setattr(training._Trainer, stage, replacement)
        with pytest.raises(Killed):
            train(new_model(), Rows(), settings(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial", "checkpoint-2", "history.jsonl"]
    model = new_model()
    train(model, Rows(), settings(tmp_path), resume=True)
    assert_same(weights(model), uninterrupted)
    assert not (tmp_path / ".partial").exists()


def test_what_a_run_leaves_is_on_the_disk(tmp_path, disk_log):
    train(new_model(), Rows(), settings(tmp_path, keep=9))
    written = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert {path.name for path in written} == {"model", "checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"}
    for path in written:
        disk_log.assert_durable(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "optimizer.pt").write_bytes(b"half"),
        lambda folder: (folder / "trainer_state.json").unlink(),
        lambda folder: (folder / training.MANIFEST).unlink(),
    ],
    ids=["truncated file", "missing file", "no manifest"],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, uninterrupted, damage):
    train(new_model(), Rows(), settings(tmp_path, keep=9))
    for step in (6, 8):
        damage(tmp_path / f"checkpoint-{step}")
    assert Path(latest_checkpoint(tmp_path)).name == "checkpoint-4"
    model = new_model()
    train(model, Rows(), settings(tmp_path, keep=9), resume=True)
    assert_same(weights(model), uninterrupted)


def test_nothing_whole_to_continue_from(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match=r"has none\s+checkpoint-7: andromeda_checkpoint.json is missing"):
        train(new_model(), Rows(), settings(tmp_path), resume=True)


def test_a_finished_run_is_not_trained_further(tmp_path, uninterrupted):
    train(new_model(), Rows(), settings(tmp_path))
    shutil.rmtree(tmp_path / "model")  # as if killed between the last checkpoint and the model
    model = new_model()
    result = train(model, Rows(), settings(tmp_path), resume=True)
    assert result.steps == 8 and result.tokens == 0
    assert_same(weights(model), uninterrupted)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_folder_with_checkpoints_is_refused(tmp_path):
    train(new_model(), Rows(), settings(tmp_path))
    with pytest.raises(ValueError, match=r"must not hold checkpoints of another run.*checkpoint-8; resume"):
        train(new_model(), Rows(), settings(tmp_path))


def test_another_run_is_not_continued(tmp_path):
    train(new_model(), Rows(), settings(tmp_path))
    with pytest.raises(
        ValueError, match=r"(?s)these differ:.*learning_rate: was 0.01, is 0.02.*data rows: was 24, is 20"
    ):
        train(new_model(), Rows(20), settings(tmp_path, learning_rate=2e-2), resume=True)
    other = Andromeda(**{**SIZES, "dim": 24})
    with pytest.raises(ValueError, match="model dim: was 16, is 24"):
        train(other, Rows(), settings(tmp_path), resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_the_step_saves_and_stops(tmp_path, uninterrupted, number):
    class Interrupting(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            if self.ids_read == 7:  # a row of the fourth step, which may be loaded ahead
                signal.raise_signal(number)
            return row

    before = signal.getsignal(number)
    rows = Interrupting()
    result = train(new_model(), rows, settings(tmp_path, save_every=0), on_start=rows.begin)
    assert result.interrupted == number.name
    assert 2 <= result.steps <= 4 and _step(result.checkpoint) == result.steps
    assert signal.getsignal(number) is before
    model = new_model()
    train(model, Rows(), settings(tmp_path, save_every=0), resume=True)
    assert_same(weights(model), uninterrupted)


def _step(checkpoint) -> int:
    return json.loads((Path(checkpoint) / training.MANIFEST).read_text())["step"]


# ---- what must be finite


def finite_weights(folder) -> bool:
    return all(bool(value.isfinite().all()) for value in load_file(Path(folder) / "model.safetensors").values())


def history(folder, without=("tokens_per_second",)) -> list[dict]:
    lines = [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in without} for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 30, "save_every": 1, "keep": 1},
        {"steps": 30, "max_grad_norm": 0, "gradient_accumulation": 2},
        {"steps": 30, "bf16": True},
        {"steps": 1, "learning_rate": 1e38},
        {"steps": 1, "learning_rate": 1e30},
    ],
    ids=["checkpoint each step", "no clipping", "bf16", "weights infinite after the last step", "weights useless then"],
)
def test_a_run_that_diverges_ends_with_an_error_and_keeps_what_is_good(tmp_path, options):
    with pytest.raises(FloatingPointError, match=r"(?s)step \d+ .*lower learning_rate.*warmup_steps, now 0") as raised:
        train(new_model(), Rows(), settings(tmp_path, **{"learning_rate": 1e3, "warmup_steps": 0, **options}))
    assert not (tmp_path / "model").exists() and not (tmp_path / ".partial").exists()
    for folder in tmp_path.glob("checkpoint-*"):
        assert finite_weights(folder)
        model = AndromedaForCausalLM.from_pretrained(folder)
        assert math.isfinite(evaluate(model, Rows(2)).loss)
    newest = latest_checkpoint(tmp_path)
    assert (newest or f"start again in {tmp_path}") in str(raised.value)
    assert history(tmp_path)[-1]["error"] == str(raised.value)


class Poison:
    """From the `step`-th step on, makes `what` of it not finite."""

    def __init__(self, monkeypatch, step, what):
        original = training._Trainer.compute_loss

        def compute_loss(trainer, model, inputs, *args, **kwargs):
            loss = original(trainer, model, inputs, *args, **kwargs)
            if trainer.state.global_step + 1 >= step and torch.is_grad_enabled():
                if what == "loss":
                    loss = loss + (loss.detach() * torch.inf)  # its gradient is finite
                else:
                    loss.register_hook(lambda gradient: gradient * torch.nan)
            return loss

        monkeypatch.setattr(training._Trainer, "compute_loss", compute_loss)


@pytest.mark.parametrize(
    "what, said", [("loss", "loss inf and gradient norm [0-9]"), ("norm", "loss [0-9].* norm nan")]
)
@pytest.mark.parametrize("waiting", [False, True], ids=["at once", "looked at with the next figure"])
def test_the_first_step_that_is_not_finite_is_named(tmp_path, monkeypatch, what, said, waiting):
    """Also where a device computes ahead, and nobody has looked at the steps since the last figure."""
    if waiting:
        monkeypatch.setattr(
            training._Guard,
            "on_pre_optimizer_step",
            lambda self, args, state, *rest, **more: self.trainer.record.end_step(state.global_step + 1),
        )
    Poison(monkeypatch, 5, what)
    model = new_model()
    with pytest.raises(FloatingPointError, match=f"step 5 had {said}"):
        train(model, Rows(), settings(tmp_path, log_every=3, save_every=4, steps=12, bf16=False))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-4", "history.jsonl"]
    assert [line["step"] for line in history(tmp_path)] == [3, 5]
    if not waiting:  # then the step was not made
        assert training.nonfinite_parameters(model) == []


@pytest.mark.parametrize("where", ["exp_avg_sq", "weight"])
def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path, monkeypatch, where):
    original = training._Trainer._save_checkpoint

    def spoilt(trainer, model, trial):
        if trainer.state.global_step == 4:
            weight = trainer.model.transformer.to_logits.weight
            spoilt = weight if where == "weight" else trainer.optimizer.state[weight]["exp_avg_sq"]
            with torch.no_grad():
                spoilt[0, 0] = math.inf
        return original(trainer, model, trial)

    monkeypatch.setattr(training._Trainer, "_save_checkpoint", spoilt)
    found = "transformer.to_logits.weight" if where == "weight" else "the averages of the optimiser"
    with pytest.raises(FloatingPointError, match=f"after step 4 NaN or Inf is in {found}"):
        train(new_model(), Rows(), settings(tmp_path, keep=1))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_no_model_is_saved_from_a_checkpoint_that_is_not_finite(tmp_path, checkpoints):
    """Of the last step: nothing is left to train, which would find it."""
    folder = tmp_path / "checkpoint-8"
    shutil.copytree(checkpoints / "checkpoint-8", folder)
    state = load_file(folder / "model.safetensors")
    state["transformer.to_logits.weight"][0, 0] = math.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    seal_again(folder)
    with pytest.raises(FloatingPointError, match=r"after step 8 NaN or Inf is in transformer.to_logits.weight"):
        train(new_model(), Rows(), settings(tmp_path), resume=True)
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_not_finite_is_neither_trained_nor_evaluated(tmp_path):
    model = new_model()
    with torch.no_grad():
        model.transformer.token_emb.weight[7, 3] = math.nan
        model.transformer.to_logits.weight[0, 0] = -math.inf
    names = ["transformer.token_emb.weight", "transformer.to_logits.weight"]
    assert training.nonfinite_parameters(model) == names
    with pytest.raises(FloatingPointError, match=f"the model must have finite weights, got NaN or Inf in {names[0]}"):
        train(model, Rows(), settings(tmp_path))
    with pytest.raises(FloatingPointError, match="evaluate: model must have finite weights"):
        evaluate(model, Rows())


def test_an_evaluation_never_gives_nan():
    model = new_model()
    with torch.no_grad():
        model.transformer.to_logits.weight.fill_(3e38)
    assert training.nonfinite_parameters(model) == []
    with pytest.raises(FloatingPointError, match=r"the loss must be finite, got (nan|inf) in the rows from 0 on"):
        evaluate(model, Rows())


def test_an_evaluation_loss_that_is_not_finite_is_said(tmp_path, monkeypatch, capsys):
    original = training._Trainer.evaluation_loop

    def infinite(trainer, *args, **kwargs):
        output = original(trainer, *args, **kwargs)
        output.metrics["eval_loss"] = math.nan
        return output

    monkeypatch.setattr(training._Trainer, "evaluation_loop", infinite)
    train(new_model(), Rows(), settings(tmp_path, eval_every=4), eval_dataset=Rows(8))
    assert "step 4: evaluation loss nan: it is not finite" in capsys.readouterr().err
    assert {"step": 4, "eval_loss": None} in history(tmp_path)


def test_float16_may_overflow_now_and_then():
    """The loss scale is lowered after each; only a long row of them, or a loss, ends the run."""
    record = training._StepRecord("cpu", scaled=True)

    def step(number, loss, norm):
        record.add_part(torch.tensor(loss), None)
        record.norm = torch.tensor(norm)
        record.end_step(number)
        return record.bad[0].item()

    for number in range(1, 40):
        assert step(number, 2.0, math.inf if number % 20 else 1.0) == 0
    record.overflows.zero_()
    assert [step(number, 2.0, math.inf) for number in range(40, 65)] == [0] * 23 + [63, 63]
    record = training._StepRecord("cpu", scaled=True)
    assert step(1, 2.0, 1.0) == 0 and step(2, math.nan, 1.0) == 2 and step(3, math.inf, 1.0) == 2


# ---- numbers


NUMBERS = [field.name for field in dataclasses.fields(TrainSettings) if field.type in (int, float, int | None)]


def test_every_number_has_bounds():
    assert set(NUMBERS) == set(TrainSettings._BOUNDS) and len(NUMBERS) == 17


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite_and_in_range(tmp_path, name):
    for value in (math.inf, -math.inf, math.nan, -1, 10**400, -(10**400)):
        with pytest.raises((ValueError, TypeError), match=f"TrainSettings: {name} must be .*, got {value}"):
            settings(tmp_path, **{name: value})
    for value in (True, False, "3", b"3", [3], 1j, torch.tensor(3)):
        with pytest.raises(TypeError, match=f"TrainSettings: {name} must be a .*number, got {re.escape(repr(value))}"):
            settings(tmp_path, **{name: value})
    if name != "warmup_steps":
        with pytest.raises(TypeError, match=f"{name} must be a .*number, got None"):
            settings(tmp_path, **{name: None})


@pytest.mark.parametrize(
    "options, text",
    [
        ({"steps": 2.0}, "steps must be a whole number, got 2.0"),
        ({"adam_beta1": 1.0}, r"adam_beta1 must be in \[0, 1\), got 1.0"),
        ({"adam_beta2": 1.5}, r"adam_beta2 must be in \[0, 1\), got 1.5"),
        ({"seed": 2**32}, r"seed must be in \[0, 4294967295\], got 4294967296"),
        ({"max_grad_norm": -0.1}, "max_grad_norm must be finite and at least 0, got -0.1"),
        ({"bf16": 1}, "bf16 must be None, True or False, got 1"),
        ({"output_dir": ""}, "output_dir must name a folder, got ''"),
        ({"output_dir": None}, "output_dir must be a path, got None"),
        ({"sample_prompt": 3}, "sample_prompt must be a text, got 3"),
        ({"trainer": [1]}, "trainer must be a dict"),
        ({"trainer": {"adam_epsilon": math.nan}}, r"trainer\['adam_epsilon'\] must be finite, got nan"),
        (
            {"trainer": {"lr_scheduler_kwargs": {"x": [1.0, math.inf]}}},
            r"trainer\['lr_scheduler_kwargs'\]\['x'\]\[1\] must be finite, got inf",
        ),
        ({"trainer": {"logging_nan_inf_filter": True}}, "must not repeat what has a name here, got logging_nan_inf_f"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_out_of_range(tmp_path, options, text):
    with pytest.raises((ValueError, TypeError), match=text):
        TrainSettings(**{"output_dir": str(tmp_path), "steps": 8, "device": "cpu", **options}).training_arguments()


def test_numbers_of_numpy_are_numbers(tmp_path):
    made = settings(tmp_path, steps=np.int64(3), learning_rate=np.float32(0.5), weight_decay=1)
    assert (type(made.steps), type(made.learning_rate), type(made.weight_decay)) == (int, float, float)


# ---- nothing to predict


class Masked(Rows):
    """Some rows without a label."""

    def __init__(self, *args, masked=(), **kwargs):
        super().__init__(*args, **kwargs)
        self.masked = masked

    def __getitem__(self, index):
        row = super().__getitem__(index)
        if index in self.masked:
            row["labels"][1:] = -100  # the first is predicted from nothing
        return row


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_without_a_label_changes_nothing_by_its_gradient(tmp_path, capsys, parts):
    """Its loss is left out of the mean, and that is said; never is it NaN."""
    options = {"steps": 12 // parts, "batch_size": 1, "gradient_accumulation": parts, "log_every": 12 // parts}
    model = new_model()
    rows = Masked(12, masked=range(0, 12) if parts == 3 else (1, 3, 4, 8, 9))
    result = train(model, rows, settings(tmp_path, learning_rate=1e-9, warmup_steps=0, save_every=0, **options))
    assert training.nonfinite_parameters(model) == []
    said = capsys.readouterr().err
    if parts == 1:
        assert "5 of the last steps had no token to predict" in said
        assert result.loss == pytest.approx(evaluate(new_model(), rows).loss, rel=1e-3)
    else:
        assert 4 < result.loss < 8


def test_an_evaluation_weighs_tokens_and_looks_at_every_row(tmp_path):
    """Batches without a label or with few of them weigh by their labels; the last one may be smaller."""

    class Uneven(Masked):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            row["labels"][: index % 9] = -100
            return row

    rows = Uneven(7, masked=(2, 3))
    options = {"steps": 1, "eval_every": 1, "learning_rate": 1e-20, "save_every": 0}
    result = train(new_model(), Rows(), settings(tmp_path, **options), eval_dataset=rows)
    (found,) = [entry["eval_loss"] for entry in result.history if "eval_loss" in entry]
    assert found == pytest.approx(evaluate(new_model(), rows, batch_size=2).loss, rel=1e-5)


@pytest.mark.parametrize("rank, own", [(0, 3), (1, 2), (2, 0)])
def test_rows_that_a_process_gets_a_second_time_are_not_counted(rank, own):
    """Three processes with batches of 3 and 5 rows left: 3, 2 and none of them, made up by rows from the beginning."""
    gradient_state = types.SimpleNamespace(end_of_dataloader=True, remainder=5)
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(world_size=3, process_index=rank),
        accelerator=types.SimpleNamespace(gradient_state=gradient_state),
    )
    labels = torch.ones(3, 4, dtype=torch.int64)
    found = training._Trainer._without_repeats(trainer, labels)
    assert ((found == 1).all(1)).tolist() == [index < own for index in range(3)] and bool((labels == 1).all())
    gradient_state.end_of_dataloader = False
    assert training._Trainer._without_repeats(trainer, labels) is labels


def test_data_with_nothing_to_predict_is_refused(tmp_path):
    for name, data in (
        ("dataset", (Masked(4, masked=range(4)), Rows())),
        ("eval_dataset", (Rows(), Masked(2, masked=(0, 1)))),
    ):
        with pytest.raises(ValueError, match=f"train: {name} must have a token to predict, got [24] rows"):
            train(new_model(), data[0], settings(tmp_path, eval_every=1), eval_dataset=data[1])
    with pytest.raises(ValueError, match="dataset must have rows with labels, got input_ids, text"):
        train(new_model(), [{"input_ids": torch.ones(4), "text": "x"}] * 2, settings(tmp_path))
    with pytest.raises(ValueError, match="dataset must have rows of at least 2 tokens, got 1 in row 0"):
        train(new_model(), Rows(seqlen=1), settings(tmp_path))
    assert list(tmp_path.iterdir()) == []


# ---- the history


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The history of 8 steps in one go, with figures and evaluations that no checkpoint falls together with."""
    folder = tmp_path_factory.mktemp("watched")
    train(new_model(), Rows(), settings(folder, **WATCHED), eval_dataset=Rows(5))
    return history(folder)


WATCHED = {"log_every": 3, "eval_every": 4, "save_every": 2}


def test_the_history_has_the_figures_of_a_run(tmp_path, watched):
    assert [(line["step"], "loss" in line, "eval_loss" in line) for line in watched] == [
        (3, True, False),
        (4, False, True),
        (6, True, False),
        (8, True, False),
        (8, False, True),
    ]
    assert watched[0].keys() == {"step", "loss", "learning_rate", "grad_norm"}
    result = train(new_model(), Rows(), settings(tmp_path, **WATCHED), eval_dataset=Rows(5))
    kept = [entry for entry in result.history if "loss" in entry]
    assert [entry["loss"] for entry in kept] == [line["loss"] for line in watched if "loss" in line]
    rates = [line["tokens_per_second"] for line in history(tmp_path, without=()) if "loss" in line]
    assert len(rates) == 3 and all(rate > 0 for rate in rates)


@pytest.mark.parametrize("how", ["killed", "signal", "killed in a half written line"])
def test_a_resumed_run_has_the_history_of_an_uninterrupted_one(tmp_path, watched, how):
    """The checkpoint that it continues from, of step 4 or 5, is in the middle of an interval."""

    class Interrupting(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            if self.ids_read == 10:
                assert history(tmp_path)[0] == watched[0], "written while the run goes on"
                if how == "signal":
                    signal.raise_signal(signal.SIGINT)
            return row

    rows = Interrupting(fail_at=None if how == "signal" else 12)
    with contextlib.suppress(Killed):
        result = train(new_model(), rows, settings(tmp_path, **WATCHED), eval_dataset=Rows(5), on_start=rows.begin)
        assert result.interrupted == "SIGINT" and result.steps in (4, 5)
    assert history(tmp_path) == watched[:2]
    assert _step(latest_checkpoint(tmp_path)) in (4, 5)
    if "half" in how:
        with open(tmp_path / "history.jsonl", "a") as file:
            file.write('{"step": 7, "lo')
    train(new_model(), Rows(), settings(tmp_path, **WATCHED), eval_dataset=Rows(5), resume=True)
    assert history(tmp_path) == watched


# ---- checkpoints that are as they were written


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A finished run with its checkpoints of steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("checkpoints")
    train(new_model(), Rows(), settings(folder, keep=9))
    return folder


def seal_again(folder):
    """As if what is in a checkpoint had been written so."""
    manifest = json.loads((folder / training.MANIFEST).read_text())
    del manifest["xxh3_128"]
    manifest["files"] = files.checksums(folder, manifest["files"])
    (folder / training.MANIFEST).write_text(json.dumps(training.sealed(manifest)))


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"])
def test_one_flipped_bit_makes_a_resumed_run_take_the_checkpoint_before(
    tmp_path, checkpoints, uninterrupted, capsys, name
):
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    for step in (6, 8):
        flip(tmp_path / f"checkpoint-{step}" / name)
    model = new_model()
    result = train(model, Rows(), settings(tmp_path, keep=1), resume=True)
    assert_same(weights(model), uninterrupted)
    assert result.damaged == [
        f"checkpoint-{step}: {name} has other content than was written (checksum differs)" for step in (8, 6)
    ]
    said = capsys.readouterr().err
    assert "continues from checkpoint-4, the newest checkpoint that is as it was written:" in said
    assert f"checkpoint-8: {name} has other content" in said
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_damaged_checkpoints_do_not_count_among_those_to_keep(tmp_path, checkpoints):
    """A run that continues before damaged ones must not delete its own for theirs."""
    for step in (2, 6, 8):
        shutil.copytree(checkpoints / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    for step in (6, 8):
        flip(tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    rows = Rows(fail_at=8)
    with pytest.raises(Killed):
        train(new_model(), rows, settings(tmp_path, keep=1), resume=True, on_start=rows.begin)
    assert training._defects(tmp_path / "checkpoint-4", contents=True) == []


def test_without_any_good_checkpoint_the_damages_are_listed(tmp_path, checkpoints):
    for step in (2, 4):
        shutil.copytree(checkpoints / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    flip(tmp_path / "checkpoint-2" / "model.safetensors")
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    text = r"(?s)has none\s+checkpoint-4: optimizer.pt is missing\s+checkpoint-2: model.safetensors has other content"
    with pytest.raises(ValueError, match=text):
        train(new_model(), Rows(), settings(tmp_path), resume=True)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "{}", '{"format": 2}', b"\xff\xfe\x00", "[" * 100_000],
    ids=["empty", "half", "list", "null", "number", "no keys", "few keys", "binary", "nested"],
)
def test_a_manifest_that_is_damaged_is_a_defect(tmp_path, checkpoints, text):
    shutil.copytree(checkpoints / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    manifest = tmp_path / "checkpoint-4" / training.MANIFEST
    manifest.write_bytes(text if isinstance(text, bytes) else text.encode())
    (defect,) = training._defects(tmp_path / "checkpoint-4")
    assert str(manifest) in defect and "is damaged" in defect
    assert Path(latest_checkpoint(tmp_path)).name == "checkpoint-2"


@pytest.mark.parametrize(
    "change, text",
    [
        ({"format": 99}, "must have format 1 or 2, got 99"),
        ({"step": 6}, "must be of step 4, got 6"),
        ({"files": []}, "files and run must be JSON objects"),
        ({"run": None}, "files and run must be JSON objects"),
        ({"files": {"config.json": None}}, "is damaged"),
        ({"files": {"config.json": {}}}, "is damaged"),
        ({"files": {"config.json": {"bytes": 3}}}, "config.json: 3 bytes expected"),
    ],
    ids=str,
)
def test_a_manifest_of_something_else_is_a_defect(tmp_path, checkpoints, change, text):
    shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / training.MANIFEST
    manifest = json.loads(path.read_text()) | change
    path.write_text(json.dumps(manifest))
    assert training._defects(path.parent, contents=True) != []  # the checksum of the manifest itself
    del manifest["xxh3_128"]
    path.write_text(json.dumps(training.sealed(manifest)))
    assert any(text in defect for defect in training._defects(path.parent))


def test_a_flipped_bit_in_a_manifest_is_found(tmp_path, checkpoints):
    shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / training.MANIFEST
    data = path.read_text()
    path.write_text(data.replace('"learning_rate": 0.01', '"learning_rate": 0.03'))
    assert "has other content than was written" in training._defects(path.parent)[0]


def test_checkpoints_of_format_1_are_resumed(tmp_path, checkpoints, uninterrupted):
    """They have sizes instead of checksums and know three rows of the data."""
    shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / training.MANIFEST
    manifest = json.loads(path.read_text())
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    run = manifest["run"] | {"data": {name: manifest["run"]["data"][name] for name in ("rows", "sha256")}}
    path.write_text(json.dumps({"format": 1, "step": 4, "run": run, "files": sizes}))
    model = new_model()
    train(model, Rows(), settings(tmp_path), resume=True)
    assert_same(weights(model), uninterrupted)


def test_a_checkpoint_without_the_state_of_the_optimiser_is_not_continued(tmp_path):
    options = {"trainer": {"save_only_model": True}}
    with pytest.raises(Killed):
        rows = Rows(fail_at=10)
        train(new_model(), rows, settings(tmp_path, **options), on_start=rows.begin)
    with pytest.raises(ValueError, match=r"has none\s+checkpoint-\d: the state of the optimiser is not in it"):
        train(new_model(), Rows(), settings(tmp_path, **options), resume=True)


@pytest.mark.parametrize("step, whole", [(2, "there is no earlier checkpoint"), (4, "checkpoint-2 is whole")])
def test_a_full_disk_is_said_with_what_is_still_whole(tmp_path, monkeypatch, step, whole):
    original = training._Trainer._save_optimizer_and_scheduler

    def full(trainer, folder):
        if trainer.state.global_step == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.path.join(folder, "optimizer.pt"))
        return original(trainer, folder)

    monkeypatch.setattr(training._Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match=rf"(?s)the checkpoint of step {step}.*No space left.*{whole}"):
        train(new_model(), Rows(), settings(tmp_path))
    assert not (tmp_path / ".partial").exists()


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_what_has_the_name_of_a_checkpoint_and_is_no_folder_is_refused(tmp_path, kind):
    """Before the training, not when it comes to this step."""
    path = tmp_path / "checkpoint-4"
    path.write_text("") if kind == "file" else path.symlink_to(tmp_path / "nowhere")
    for resume in (False, True):
        with pytest.raises(ValueError, match="checkpoint-4 must be a folder"):
            train(new_model(), Rows(), settings(tmp_path), resume=resume)


def test_half_checkpoints_neither_count_nor_go(tmp_path):
    """What something else left behind: `keep` counts whole ones."""
    train(new_model(), Rows(), settings(tmp_path, steps=2, save_every=0))
    half = tmp_path / "checkpoint-1"
    shutil.copytree(tmp_path / "checkpoint-2", half)
    (half / "optimizer.pt").unlink()
    torn = tmp_path / "checkpoint-3"
    torn.mkdir()
    options = {"steps": 2, "save_every": 0}
    with pytest.raises(ValueError, match="was 2, is 8"):
        train(new_model(), Rows(), settings(tmp_path), resume=True)
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="has none"):
        train(new_model(), Rows(), settings(tmp_path, **options), resume=True)
    for path in (half, torn):
        path.rename(tmp_path / f"kept-{path.name}")
    rows = Rows()

    def leave_half_ones():
        for path in (half, torn):
            (tmp_path / f"kept-{path.name}").rename(path)

    train(new_model(), rows, settings(tmp_path, keep=2, save_every=4), on_start=leave_half_ones)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-8",
    }


def test_a_saved_model_is_checked(tmp_path, checkpoints):
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    for name in ("model", "checkpoint-8", "checkpoint-6"):
        training.check_saved_model(tmp_path / name)
    flip(tmp_path / "checkpoint-6" / "optimizer.pt")  # the model is whole without it
    training.check_saved_model(tmp_path / "checkpoint-6")
    for name in ("model", "checkpoint-8"):
        flip(tmp_path / name / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{name} is damaged: model.safetensors has other content.*checkpoint-4"):
            training.check_saved_model(tmp_path / name)
    (tmp_path / "model" / training.MANIFEST).unlink()
    training.check_saved_model(tmp_path / "model")


# ---- the data of a run


@pytest.mark.parametrize("index", [0, 12, 23, 1, 13, 22])
def test_another_row_is_another_data_set(tmp_path, checkpoints, index):
    shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    rows = Rows()
    rows.ids[index, 5] += 1
    with pytest.raises(ValueError, match="data content: was"):
        train(new_model(), rows, settings(tmp_path), resume=True)


def test_the_fingerprint_looks_at_several_rows():
    rows = Rows(1000)
    known = training._fingerprint(rows)
    for index in (0, 500, 999):
        other = Rows(1000)
        other.ids[index, 11] += 1
        found = training._fingerprint(other)
        assert found["sha256"] != known["sha256"], index
    seen = []

    class Noting(Rows):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    training._fingerprint(Noting(1000))
    gaps = [after - before for before, after in itertools.pairwise(sorted(set(seen)))]
    assert {0, 999} < set(seen) and max(gaps) <= 33


def test_rows_that_know_their_checksum_are_asked(tmp_path):
    class Known(Rows):
        content_checksum = "0123"

    assert training._fingerprint(Known())["content"] == "0123"

    class Damaged(Rows):
        def verify(self):
            raise ValueError("data.arrow has other content than was written")

    with pytest.raises(ValueError, match=r"data.arrow has other content"):
        train(new_model(), Damaged(), settings(tmp_path))
    with pytest.raises(ValueError, match=r"data.arrow has other content"):
        train(new_model(), Rows(), settings(tmp_path), eval_dataset=Damaged())
    assert list(tmp_path.iterdir()) == []


# ---- models that cannot be saved


class OwnEmbedding(torch.nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens) * 2


def own_embedding():
    class Provider:
        def get_embedding(self, num_tokens, dim):
            return OwnEmbedding(num_tokens, dim)

    return Andromeda(**SIZES, embedding_provider=Provider())


def on_meta():
    with torch.device("meta"):
        return Andromeda(**SIZES)


def with_another_module():
    model = new_model()
    model.transformer.extra = torch.nn.Linear(2, 2)
    return model


def with_another_shape():
    model = new_model()
    model.transformer.to_logits = torch.nn.Linear(16, 321, bias=False)
    return model


@pytest.mark.parametrize("make", [own_embedding, on_meta, with_another_module, with_another_shape])
def test_a_model_that_cannot_be_saved_is_not_trained(tmp_path, make):
    with pytest.raises(ValueError, match="the model must be one that can be saved and loaded again, with"):
        train(make(), Rows(), settings(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_compiled_part_can_be_saved():
    """Under its own name, without that of the wrapper."""
    model = new_model()
    model.transformer.to_logits = torch.compile(model.transformer.to_logits)
    training._check_saveable(AndromedaForCausalLM.from_andromeda(model), None)


def test_a_checkpoint_of_other_names_is_not_continued_with_other_weights(tmp_path, checkpoints):
    folder = tmp_path / "checkpoint-4"
    shutil.copytree(checkpoints / "checkpoint-4", folder)
    state = load_file(folder / "model.safetensors")
    state["transformer.to_logits.other"] = state.pop("transformer.to_logits.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    seal_again(folder)
    with pytest.raises(
        ValueError, match=r"by the same names, differs in transformer.to_logits.weight, transformer.to_l"
    ):
        train(new_model(), Rows(), settings(tmp_path), resume=True)


def test_a_tied_projection_is_trained_saved_and_resumed(tmp_path):
    """Kept in checkpoints and in the model; a resumed run ends as the uninterrupted one."""

    def tied():
        model = new_model()
        model.transformer.to_logits.weight = model.transformer.token_emb.weight
        return model

    model = tied()
    train(model, Rows(), settings(tmp_path / "whole"))
    loaded = AndromedaForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert_same(loaded.state_dict(), model.state_dict())
    assert loaded.transformer.to_logits.weight is loaded.transformer.token_emb.weight
    rows = Rows(fail_at=12)
    with pytest.raises(Killed):
        train(tied(), rows, settings(tmp_path / "parts"), on_start=rows.begin)
    again = tied()
    train(again, Rows(), settings(tmp_path / "parts"), resume=True)
    assert_same(again.state_dict(), model.state_dict())
    assert again.transformer.to_logits.weight is again.transformer.token_emb.weight


def test_ties_that_cannot_be_saved_are_refused_before_the_training(tmp_path):
    torch.manual_seed(5)
    model = Andromeda(**{**SIZES, "depth": 2})
    first, second = (model.transformer.attn_layers.layers[index].fn for index in (0, 2))
    second.to_q.weight = first.to_q.weight
    state = torch.get_rng_state()
    with pytest.raises(
        ValueError, match=r"share one tensor \(transformer.*layers.0.fn.to_q.weight = .*layers.2.fn.to_q"
    ):
        train(model, Rows(), settings(tmp_path))
    assert list(tmp_path.iterdir()) == [] and torch.equal(torch.get_rng_state(), state)


# ---- signals and the pace


def test_a_second_signal_within_one_step_stops_at_once(tmp_path):
    class Impatient(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            if self.ids_read == 7:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return row

    rows = Impatient()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(new_model(), rows, settings(tmp_path, save_every=0), on_start=rows.begin)
    assert rows.ids_read == 7 and not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is before


def test_processes_that_load_rows_leave_a_signal_to_the_one_that_trains(capfd):
    """A terminal sends Ctrl-C to all of them."""
    with training._StopSignals(active=True) as stop:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert stop.received is None and "stopping" not in capfd.readouterr().err
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT"


def test_steps_that_take_three_times_as_long_are_noticed_once():
    pace = training._Pace()
    assert [pace.add(9.0, "cpu") for _ in range(5)] == [None] * 5  # the warm-up
    assert [pace.add(1.0, "cpu") for _ in range(40)] == [None] * 40
    assert [pace.add(2.9, "cpu") for _ in range(40)] == [None] * 40
    said = [pace.add(3.1, "cpu") for _ in range(40)]
    (text,) = filter(None, said)
    assert "3.0 times as long as at the start (3 s, were 1 s)" in text and "OMP_NUM_THREADS=1" in text
    short = training._Pace()
    assert not any(short.add(seconds, "cpu") for seconds in [1.0] * 30 + [9.0] * 8 + [1.0] * 30), "a passing load"


def test_the_progress_line_says_what_helps_against_slow_steps(tmp_path, monkeypatch, capsys):
    now = [0.0]

    class Clock(Rows):
        def __getitem__(self, index):
            now[0] += 0.1 if self.ids_read < 80 else 0.5
            return super().__getitem__(index)

    monkeypatch.setattr(training, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    rows = Clock()
    train(new_model(), rows, settings(tmp_path, steps=75, save_every=0, log_every=80), on_start=rows.begin)
    said = capsys.readouterr().err
    assert said.count("times as long as at the start") == 1 and "OMP_NUM_THREADS=1" in said


# ---- refusals


@pytest.mark.parametrize(
    "options, text",
    [
        ({"steps": 0}, r"steps must be in \[1, 2147483647\], got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"warmup_steps": 9}, r"warmup_steps must be between 0 and steps \(8\), got 9"),
        ({"seed": -1}, r"seed must be in \[0, 4294967295\], got -1"),
        ({"min_learning_rate_ratio": 2.0}, "min_learning_rate_ratio must be in"),
        ({"device": "tpu"}, "device must be None or 'cpu', got 'tpu'"),
        ({"trainer": {"max_step": 3}}, "must name arguments of TrainingArguments, got max_step"),
        ({"trainer": {"max_steps": 3}}, "must not repeat what has a name here, got max_steps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        settings(tmp_path, **options).training_arguments()


def test_arguments_of_trainer_pass_through(tmp_path):
    arguments = settings(tmp_path, trainer={"adam_epsilon": 1e-6, "torch_empty_cache_steps": 3}).training_arguments()
    assert arguments.adam_epsilon == 1e-6 and arguments.torch_empty_cache_steps == 3
    assert not arguments.logging_nan_inf_filter  # it would wait for the device after each forward pass


def test_calls_that_make_no_sense(tmp_path, tokenizer):
    for model in (torch.nn.DataParallel(new_model()), None):
        for call in (lambda model: train(model, Rows(), settings(tmp_path)), lambda model: evaluate(model, Rows())):
            with pytest.raises(TypeError, match="model must be an Andromeda or AndromedaForCausalLM, not wrapped"):
                call(model)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="it is no folder"):
        train(new_model(), Rows(), settings(tmp_path / "file"))
    with pytest.raises(ValueError, match="trainer must hold what JSON can hold"):
        train(new_model(), Rows(), settings(tmp_path, trainer={"label_names": {"labels"}}))
    with pytest.raises(ValueError, match="at least the 2 rows of one step, got 1"):
        train(new_model(), Rows(1), settings(tmp_path))
    with pytest.raises(ValueError, match="eval_dataset must be given"):
        train(new_model(), Rows(), settings(tmp_path, eval_every=1))
    with pytest.raises(ValueError, match="tokenizer must be given"):
        train(new_model(), Rows(), settings(tmp_path, sample_every=1))
    small = Andromeda(**{**SIZES, "num_tokens": 299})
    with pytest.raises(ValueError, match=r"at most the 299 ids of the model \(num_tokens\), got 300"):
        train(small, Rows(), settings(tmp_path), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="at most the 299 ids"):
        evaluate(small, Rows(), tokenizer=tokenizer)


# ---- figures


def test_flops_count_matrices_and_visible_scores():
    model = AndromedaForCausalLM.from_andromeda(new_model())
    table = model.transformer.token_emb.weight.numel()
    scores = 1 * 2 * 8 * 100  # layers, heads, head width, sequence
    assert training.training_flops_per_token(model, 100) == 6 * (model.num_parameters() - table + scores)


def test_the_peak_of_a_cpu_is_not_known():
    assert training.peak_flops(torch.device("cpu")) is None


def test_a_sample_disturbs_no_random_numbers(tokenizer):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = sample_text(new_model(), tokenizer, "def ", tokens=8, seed=3)
    torch.manual_seed(0)
    assert sample_text(AndromedaForCausalLM.from_andromeda(_seeded()), tokenizer, "def ", tokens=8, seed=3) == first
    assert torch.equal(torch.rand(3), expected)
    assert first.startswith("def ")


def _seeded():
    with torch.random.fork_rng():
        return new_model()


# ---- evaluation


def test_evaluation_is_the_mean_over_tokens(tokenizer):
    class Uneven(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            row["labels"][2 + index % 10 :] = -100
            return row

    model, rows = new_model(), Uneven(7)
    total, count, size = 0.0, 0, 0
    widths = token_bytes(tokenizer)
    for index in range(7):
        row = rows[index]
        logits = model(row["input_ids"][None]).double()[0, :-1].log_softmax(-1)
        for position, target in enumerate(row["labels"][1:].tolist()):
            if target != -100:
                total -= logits[position, target].item()
                count += 1
                size += widths[target].item()
    found = evaluate(model, rows, tokenizer=tokenizer, batch_size=3)
    assert found.tokens == count and found.bytes == size
    assert found.loss == pytest.approx(total / count, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert evaluate(model, rows).bits_per_byte is None
    assert evaluate(model, rows, max_rows=2).tokens < count


def test_evaluation_without_targets_is_refused():
    class Ignored(Rows):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "labels": torch.full((12,), -100)}

    with pytest.raises(ValueError, match="must have a token to predict"):
        evaluate(new_model(), Ignored())


def test_token_bytes_are_those_of_the_text(tokenizer):
    widths = token_bytes(tokenizer)
    for text in TEXTS[:3]:
        ids = tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert widths[ids].sum().item() == len(text.encode())
    assert widths[tokenizer.tokenizer.eos_token_id] == 0


def test_token_bytes_are_unknown_without_a_byte_level_tokenizer():
    from tokenizers import Tokenizer, models

    words = AndromedaTokenizer(Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")))
    assert token_bytes(words) is None


def test_results_are_plain_data(tmp_path):
    result = train(new_model(), Rows(), settings(tmp_path))
    assert json.loads(json.dumps(dataclasses.asdict(result)))["steps"] == 8
