"""Training, exact continuation, and errors during a run."""

import dataclasses
import errno
import json
import math
import os
import shutil
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import (
    SIZES,
    Killed,
    Masked,
    Rows,
    assert_same,
    has_finite_weights,
    history,
    new_model,
    seal_again,
    settings,
    weights,
)
from transformers import TrainingArguments

from andromeda import Andromeda, AndromedaTokenizer
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.training import evaluate, latest_checkpoint, nonfinite_parameters, train, trainer
from andromeda.training.trainer import AndromedaTrainer, Guard


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
    """The loss is the mean over all tokens of a step: rows with few labels must not have a larger weight."""

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
    decayed = AndromedaTrainer(
        model=model, args=arguments, settings=settings(tmp_path), identity={}
    ).get_decay_parameter_names(model)
    others = [name for name, _ in model.named_parameters() if name not in decayed]
    assert {name.rpartition(".")[2] for name in decayed} == {"weight"}
    assert {name.rpartition(".")[2] for name in others} == {"gamma", "residual_scale", "q_scale", "k_scale", "bias"}


def test_worker_processes_change_nothing(tmp_path, uninterrupted):
    model = new_model()
    train(model, Rows(), settings(tmp_path, num_workers=2))
    assert_same(weights(model), uninterrupted)


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


@pytest.mark.parametrize(
    "owner, stage",
    [
        (AndromedaTrainer, "_save_rng_state"),
        (AndromedaTrainer, "_save_optimizer_and_scheduler"),
        (trainer, "install"),
    ],
)
def test_a_run_killed_while_it_writes_a_checkpoint(tmp_path, monkeypatch, uninterrupted, owner, stage):
    """There is no half-written second checkpoint; the run continues from the first one and removes the rest."""
    original = getattr(owner, stage)
    calls = []

    def killed_the_second_time(*arguments):
        calls.append(stage)
        if len(calls) == 2:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, stage, killed_the_second_time)
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


def test_a_finished_run_is_not_trained_further(tmp_path, uninterrupted):
    train(new_model(), Rows(), settings(tmp_path))
    shutil.rmtree(tmp_path / "model")  # as if killed between the last checkpoint and the model
    model = new_model()
    result = train(model, Rows(), settings(tmp_path), resume=True)
    assert result.steps == 8 and result.tokens == 0
    assert_same(weights(model), uninterrupted)
    assert (tmp_path / "model" / "model.safetensors").is_file()


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
        assert has_finite_weights(folder)
        model = AndromedaForCausalLM.from_pretrained(folder)
        assert math.isfinite(evaluate(model, Rows(2)).loss)
    newest = latest_checkpoint(tmp_path)
    assert (newest or f"start again in {tmp_path}") in str(raised.value)
    assert history(tmp_path)[-1]["error"] == str(raised.value)


class Poison:
    """Makes the loss or the gradient norm infinite or NaN, from the `step`-th step on. what: "loss" or "norm"."""

    def __init__(self, monkeypatch, step, what):
        original = AndromedaTrainer.compute_loss

        def compute_loss(trainer, model, inputs, *args, **kwargs):
            loss = original(trainer, model, inputs, *args, **kwargs)
            if trainer.state.global_step + 1 >= step and torch.is_grad_enabled():
                if what == "loss":
                    loss = loss + (loss.detach() * torch.inf)  # its gradient is finite
                else:
                    loss.register_hook(lambda gradient: gradient * torch.nan)
            return loss

        monkeypatch.setattr(AndromedaTrainer, "compute_loss", compute_loss)


@pytest.mark.parametrize(
    "what, said", [("loss", "loss inf and gradient norm [0-9]"), ("norm", "loss [0-9].* norm nan")]
)
@pytest.mark.parametrize("waiting", [False, True], ids=["at once", "looked at with the next figure"])
def test_the_first_step_that_is_not_finite_is_named(tmp_path, monkeypatch, what, said, waiting):
    """Even on an asynchronous device, when the steps since the last figure have not been checked yet."""
    if waiting:
        monkeypatch.setattr(
            Guard,
            "on_pre_optimizer_step",
            lambda self, args, state, *rest, **more: self.trainer.record.end_step(state.global_step + 1),
        )
    Poison(monkeypatch, 5, what)
    model = new_model()
    with pytest.raises(FloatingPointError, match=f"step 5 had {said}"):
        train(model, Rows(), settings(tmp_path, log_every=3, save_every=4, steps=12, bf16=False))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-4", "history.jsonl"]
    assert [line["step"] for line in history(tmp_path)] == [3, 5]
    if not waiting:  # the step was not made then
        assert nonfinite_parameters(model) == []


@pytest.mark.parametrize("where", ["exp_avg_sq", "weight"])
def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path, monkeypatch, where):
    original = AndromedaTrainer._save_checkpoint

    def spoilt(trainer, model, trial):
        if trainer.state.global_step == 4:
            weight = trainer.model.transformer.to_logits.weight
            spoilt = weight if where == "weight" else trainer.optimizer.state[weight]["exp_avg_sq"]
            with torch.no_grad():
                spoilt[0, 0] = math.inf
        return original(trainer, model, trial)

    monkeypatch.setattr(AndromedaTrainer, "_save_checkpoint", spoilt)
    found = "transformer.to_logits.weight" if where == "weight" else "the averages of the optimiser"
    with pytest.raises(FloatingPointError, match=f"after step 4 NaN or Inf is in {found}"):
        train(new_model(), Rows(), settings(tmp_path, keep=1))
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def test_no_model_is_saved_from_a_checkpoint_that_is_not_finite(tmp_path, checkpoints):
    """The checkpoint is from the last step, so no later step would find the error."""
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
    assert nonfinite_parameters(model) == names
    with pytest.raises(FloatingPointError, match=f"the model must have finite weights, got NaN or Inf in {names[0]}"):
        train(model, Rows(), settings(tmp_path))
    with pytest.raises(FloatingPointError, match="evaluate: model must have finite weights"):
        evaluate(model, Rows())


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_without_a_label_changes_nothing_by_its_gradient(tmp_path, capsys, parts):
    """Its loss is left out of the mean, with a message, and is never NaN."""
    options = {"steps": 12 // parts, "batch_size": 1, "gradient_accumulation": parts, "log_every": 12 // parts}
    model = new_model()
    rows = Masked(12, masked=(1, 3, 4, 8, 9))
    result = train(model, rows, settings(tmp_path, learning_rate=1e-9, warmup_steps=0, save_every=0, **options))
    assert nonfinite_parameters(model) == []
    said = capsys.readouterr().err
    if parts == 1:
        assert "5 of the last steps had no token to predict" in said
        assert result.loss == pytest.approx(evaluate(new_model(), rows).loss, rel=1e-3)
    else:
        assert 4 < result.loss < 8


def test_an_evaluation_weighs_tokens_and_looks_at_every_row(tmp_path):
    """The weight of a batch is its number of labels, possibly 0; the last batch may be smaller."""

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
    """Three processes take batches of 3 from the last 5 rows: 3, 2 and none; first rows pad the last two batches."""
    gradient_state = types.SimpleNamespace(end_of_dataloader=True, remainder=5)
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(world_size=3, process_index=rank),
        accelerator=types.SimpleNamespace(gradient_state=gradient_state),
    )
    labels = torch.ones(3, 4, dtype=torch.int64)
    found = AndromedaTrainer._without_repeats(trainer, labels)
    assert ((found == 1).all(1)).tolist() == [index < own for index in range(3)] and bool((labels == 1).all())
    gradient_state.end_of_dataloader = False
    assert AndromedaTrainer._without_repeats(trainer, labels) is labels


@pytest.mark.parametrize("step, whole", [(2, "there is no earlier checkpoint"), (4, "checkpoint-2 is whole")])
def test_a_full_disk_is_said_with_what_is_still_whole(tmp_path, monkeypatch, step, whole):
    original = AndromedaTrainer._save_optimizer_and_scheduler

    def full(trainer, folder):
        if trainer.state.global_step == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.path.join(folder, "optimizer.pt"))
        return original(trainer, folder)

    monkeypatch.setattr(AndromedaTrainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError, match=rf"(?s)the checkpoint of step {step}.*No space left.*{whole}"):
        train(new_model(), Rows(), settings(tmp_path))
    assert not (tmp_path / ".partial").exists()


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
    """Checkpoints and the saved model keep the tie, and a resumed run ends as an uninterrupted one."""

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
    with pytest.raises(ValueError, match=r"trainer\['fsdp'\] must be left out on a CPU, where DDP would run"):
        train(new_model(), Rows(), settings(tmp_path, trainer={"fsdp": True}))
    with (
        mock.patch.object(TrainingArguments, "world_size", 2),
        pytest.raises(ValueError, match="sample_every must be 0 with several processes, got 3"),
    ):
        train(new_model(), Rows(), settings(tmp_path, sample_every=3), tokenizer=tokenizer)
    small = Andromeda(**{**SIZES, "num_tokens": 299})
    with pytest.raises(ValueError, match=r"at most the 299 ids of the model \(num_tokens\), got 300"):
        train(small, Rows(), settings(tmp_path), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="at most the 299 ids"):
        evaluate(small, Rows(), tokenizer=tokenizer)


def test_results_are_plain_data(tmp_path):
    result = train(new_model(), Rows(), settings(tmp_path))
    assert json.loads(json.dumps(dataclasses.asdict(result)))["steps"] == 8
