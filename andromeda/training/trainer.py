"""`train`, and the subclass of transformers' Trainer that it runs."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from andromeda import files
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.model import Andromeda
from andromeda.training.checkpoints import (
    FORMAT,
    HISTORY,
    MANIFEST,
    MODEL,
    PARTIAL,
    check_identity,
    checkpoints_in,
    defects_of,
    latest_checkpoint,
    read_manifest,
    sealed,
    starting_point,
    step_of,
)
from andromeda.training.finite import StepRecord, are_finite, local, nonfinite_parameters
from andromeda.training.history import History
from andromeda.training.messages import first_few
from andromeda.training.model_checks import (
    check_model,
    check_saveable,
    check_vocabulary,
    hf_tokenizer,
    shared_parameters,
)
from andromeda.training.progress import Progress
from andromeda.training.rows import IGNORED_LABEL, check_rows, collate, fingerprint
from andromeda.training.settings import TrainSettings
from andromeda.training.stopping import StopCallback, StopSignals


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a call of `train` did.

    Attributes:
        steps: optimiser steps of the run so far, those before a resume included.
        loss: mean training loss over the last logged interval, in nats per token; None if there was none.
        tokens, seconds: seen and spent by this call.
        tokens_per_second: their ratio.
        mfu: share of the device's peak that the model's own flops amount to; None where the peak is not known.
        checkpoint: the newest checkpoint.
        interrupted: the signal that ended the run early, or None.
        history: one dict per logged interval: step, loss, learning_rate, grad_norm; and eval_loss per evaluation.
        damaged: what was found of newer checkpoints than the one resumed from, one line each.
    """

    steps: int
    loss: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    checkpoint: str | None
    interrupted: str | None
    history: list
    damaged: list = dataclasses.field(default_factory=list)


def train(
    model,
    dataset,
    settings: TrainSettings,
    *,
    eval_dataset=None,
    tokenizer=None,
    resume=False,
    on_start: Callable[[], None] | None = None,
) -> TrainResult:
    """Train `model` in place; leave checkpoints in `settings.output_dir` and, at the end, the model in `model/` there.

    `history.jsonl` in the same folder holds the figures of the run, see `andromeda.training`.

    Args:
        model: `Andromeda` or `AndromedaForCausalLM`. The result is in its own parameters.
        dataset: rows of equal length: dicts of tensors `input_ids`, `labels` and, optionally, `key_start`, as
            `DatasetBuilder` makes them.
        settings: how to train.
        eval_dataset: rows for `settings.eval_every`.
        tokenizer: saved into every checkpoint and needed for sample texts; `AndromedaTokenizer` or one of transformers.
        resume: continue from the newest whole checkpoint in `settings.output_dir`; without one it is an error. One
            whose files are not as they were written is passed over, with a message.
        on_start: called once, in the process that writes, when nothing is left to check and the first step begins.

    Raises:
        ValueError: the output folder already holds checkpoints and `resume` is off, or holds none and it is on; the
            settings or the data differ from those of the checkpoint; the tokenizer has more ids than the model; the
            model could not be saved and loaded again; no row has a token to predict.
        OSError: nothing can be written to the output folder.
        FloatingPointError: a loss, a gradient norm or a weight is not finite; names the step. Nothing was saved after
            the last good checkpoint, and nothing deleted.
    """
    tokenizer = hf_tokenizer(tokenizer)
    check_model("train", model)
    check_vocabulary(model, tokenizer)
    if settings.sample_every and tokenizer is None:
        raise ValueError("train: tokenizer must be given for sample_every, got None")
    if settings.eval_every and eval_dataset is None:
        raise ValueError("train: eval_dataset must be given for eval_every, got None")
    files.check_output_folder(settings.output_dir)
    checkpoint, damaged = starting_point(Path(settings.output_dir), resume)
    arguments = settings.training_arguments()
    rows = settings.batch_size * settings.gradient_accumulation * arguments.world_size
    if len(dataset) < rows:
        raise ValueError(f"train: dataset must have at least the {rows} rows of one step, got {len(dataset)}")
    for name, data in (("dataset", dataset), ("eval_dataset", eval_dataset)):
        if data is not None:
            check_rows(name, data, verify=arguments.local_process_index == 0)
    if isinstance(model, Andromeda):
        model = AndromedaForCausalLM.from_andromeda(model)
    check_saveable(model, tokenizer)
    if tokenizer is not None:  # `generate` of a saved model ends where this tokenizer says
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            for holder in (model.config, model.generation_config):
                setattr(holder, name, getattr(tokenizer, name))
    identity = {
        "settings": settings.decisive(),
        "model": model.config.to_arguments(),
        "data": fingerprint(dataset),
        "processes": {"number": arguments.world_size},
    }
    try:
        identity = json.loads(json.dumps(identity))  # as it will be read from a checkpoint: tuples become lists
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"TrainSettings: trainer must hold what JSON can hold, for the checkpoints: {error}"
        ) from error
    if checkpoint is not None:
        check_identity(checkpoint, identity)

    progress = Progress(settings, tokenizer)
    with _quiet(), StopSignals(active=arguments.world_size == 1) as stop, contextlib.closing(progress):
        trainer = AndromedaTrainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[progress],
            identity=identity,
            keep=settings.keep,
            resumed_from=checkpoint,
            progress=progress,
        )
        trainer.add_callback(Guard(trainer, on_start))
        trainer.add_callback(StopCallback(stop))
        # Trainer adds one of these two by itself, depending on disable_tqdm.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if checkpoint is not None and step_of(checkpoint) >= settings.steps:
            # Trainer would make one step more before it looks at the count.
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state.global_step = step_of(checkpoint)
            if not Path(settings.output_dir, MODEL).is_dir():
                trainer.save_whole_model()
            trainer.clear_away()
            return _result(checkpoint=checkpoint, steps=step_of(checkpoint), damaged=damaged)
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            if trainer.history is not None:
                trainer.history.close()
        if stop.received is None:
            trainer.save_whole_model()
    return _result(
        steps=trainer.state.global_step,
        history=trainer.state.log_history,
        tokens=progress.tokens,
        seconds=progress.seconds,
        mfu=progress.mfu(),
        checkpoint=latest_checkpoint(settings.output_dir),
        interrupted=stop.received,
        damaged=damaged,
    )


def _result(
    *, steps, checkpoint, damaged, history=(), tokens=0, seconds=0.0, mfu=None, interrupted=None
) -> TrainResult:
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return TrainResult(
        steps=steps,
        loss=losses[-1] if losses else None,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        mfu=mfu,
        checkpoint=None if checkpoint is None else str(checkpoint),
        interrupted=interrupted,
        history=list(history),
        damaged=damaged,
    )


@contextlib.contextmanager
def _quiet():
    """Errors only from transformers and accelerate: what they have to say at the start of every run is known."""
    loggers = [logging.getLogger(name) for name in ("transformers", "accelerate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


class AndromedaTrainer(Trainer):
    """Trainer with whole-or-absent checkpoints, weight decay by kind of parameter, and figures that are true.

    Losses are kept in a `StepRecord` of our own: a loss that is not finite is not hidden, and a checkpoint carries the
    part of an interval that lies before it, so that a resumed run logs what an uninterrupted one does.
    """

    def __init__(self, *args, identity: dict, keep: int, resumed_from: Path | None = None, progress=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.identity = identity
        self.keep = keep
        self.progress = progress
        self.writing = False
        self.flops_per_token = 6 * self.model.num_parameters(exclude_embeddings=True)
        self.record = StepRecord(self.args.device, scaled=self.accelerator.scaler is not None)
        self.history = None
        self.batch = None  # the last one
        self.evaluated = None
        self.resumed_from = resumed_from
        clip = self.accelerator.clip_grad_norm_

        def clip_and_note(*args, **kwargs):
            self.record.norm = norm = clip(*args, **kwargs)
            return norm

        self.accelerator.clip_grad_norm_ = clip_and_note

    # ---- losses

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batch = inputs
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.record.add_part(loss, num_items_in_batch)
        return loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            total, counted, steps = self.accelerator.reduce(self.record.interval, reduction="mean").tolist()
            logs["loss"] = total / max(1.0, counted)
            if counted < steps:
                logs["steps_without_targets"] = round(steps - counted)
            self.record.interval.zero_()
            if self.progress is not None:
                logs["tokens_per_second"] = self.progress.take_rate()
        super().log(logs, *args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        # dataloader_drop_last is meant for training: an evaluation looks at every row.
        self.args.dataloader_drop_last, kept = False, self.args.dataloader_drop_last
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = kept

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Adds the losses of a batch and their number to `evaluated`; Trainer would average means of batches."""
        inputs = dict(self._prepare_inputs(inputs))
        inputs["labels"] = self._without_repeats(inputs["labels"])
        count = (inputs["labels"][:, 1:] != IGNORED_LABEL).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs, num_items_in_batch=1).loss
        self.evaluated += torch.stack((loss, count)).to(self.evaluated.dtype)
        return loss / (count + (count == 0)), None, None

    def _without_repeats(self, labels):
        """Several processes get batches of one size: rows that were taken a second time for that are not counted."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return labels
        own = min(max(state.remainder - self.args.process_index * len(labels), 0), len(labels))
        labels = labels.clone()
        labels[own:] = IGNORED_LABEL
        return labels

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self.evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        total, count = self.accelerator.reduce(self.evaluated, reduction="sum").tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = total / count  # `train` saw that there is something to predict
        return output

    # ---- what must be finite

    def stop_unless_finite(self):
        """End the run if a loss or gradient norm since the start was not finite; waits for the device."""
        bad = self.accelerator.gather(self.record.bad[None]).tolist()  # (processes, step and loss and norm)
        if bad := [entry for entry in bad if entry[0]]:
            step, loss, norm = min(bad)
            self._fail(round(step), f"step {step:.0f} had loss {loss:g} and gradient norm {norm:g}")

    def stop_unless_good(self, model):
        """End the run if what is to be saved now is useless: the last checkpoint is better.

        The weights and the averages that the optimiser keeps must be finite, and so must be the loss that the weights
        give, on the last batch: finite weights may be so large that nothing can be computed with them.
        """
        names = nonfinite_parameters(self.model)
        state = {} if self.optimizer is None else self.optimizer.state
        averages = [
            local(value) for values in state.values() for value in values.values() if isinstance(value, torch.Tensor)
        ]
        found = torch.tensor([bool(names), not all(are_finite(averages)), False], device=self.args.device)
        if self.batch is not None:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(self.batch), num_items_in_batch=1)
            found[2] = ~torch.isfinite(loss)
        faults = self.accelerator.reduce(found.to(torch.int64), reduction="sum").tolist()
        weights = first_few(names) or "the weights"
        places = weights, "the averages of the optimiser", "the loss that its last batch has now"
        for fault, place in zip(faults, places, strict=True):
            if fault:
                self._fail(self.state.global_step, f"after step {self.state.global_step} NaN or Inf is in {place}")

    def _fail(self, step: int, what: str):
        newest = latest_checkpoint(self.args.output_dir)
        folder = self.args.output_dir
        error = (
            f"train: loss, gradient norm and weights must be finite, {what}. Nothing was saved since; the training is "
            f"unstable: lower learning_rate (now {self.args.learning_rate:g}), lengthen the warm-up (warmup_steps, now "
            f"{self.args.warmup_steps}) or clip gradients more (max_grad_norm, now {self.args.max_grad_norm:g})"
        )
        if newest is None:
            error += f". There is no checkpoint yet: start again in {folder} with other settings"
        else:
            error += (
                f". {Path(newest).name} is whole and finite: start another run from its weights (--from {newest} "
                "--out ANOTHER) with other settings"
            )
        if self.history is not None:
            self.history.write({"step": step, "error": error})
        raise FloatingPointError(error)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Matrices of linear maps and embeddings: gains, residual and QK scales and biases are left alone."""
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)]

    def floating_point_ops(self, inputs) -> int:
        return self.flops_per_token * inputs["input_ids"].numel()

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self.writing else folder

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # A pickle of the arguments that nothing reads back: the manifest holds them as JSON.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        partial = folder / PARTIAL / f"checkpoint-{self.state.global_step}"
        whole = folder / partial.name
        self.stop_unless_good(model)
        newest = latest_checkpoint(folder) if self.args.should_save else None
        kept = f"{Path(newest).name} is whole" if newest else "there is no earlier checkpoint"
        with self._written_whole(f"the checkpoint of step {self.state.global_step}", kept):
            self.writing = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.writing = False
            interval = self.accelerator.reduce(self.record.interval.clone(), reduction="mean").tolist()
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.state.best_model_checkpoint and PARTIAL in Path(self.state.best_model_checkpoint).parts:
                    self.state.best_model_checkpoint = str(whole)
                    self.state.save_to_json(str(partial / "trainer_state.json"))
                self._write_manifest(partial, interval)
                self._install(partial, whole)
                self._drop_old(folder)

    @contextlib.contextmanager
    def _written_whole(self, what: str, kept: str):
        """A block that fills `.partial/`: an error says what and where, and leaves nothing of it to fill the disk."""
        folder = Path(self.args.output_dir)
        if self.args.should_save:
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)  # what an earlier process did not finish
        self.accelerator.wait_for_everyone()
        with files.writing(folder, what, whole=kept):
            try:
                yield
            except Exception:
                if self.args.should_save:
                    shutil.rmtree(folder / PARTIAL, ignore_errors=True)
                raise
        self.accelerator.wait_for_everyone()

    def _write_manifest(self, folder: Path, interval=None):
        manifest = {
            "format": FORMAT,
            "step": self.state.global_step,
            "run": self.identity,
            "interval": interval,  # what `StepRecord.interval` has summed up for the next figure
            "files": files.checksums(folder),
        }
        files.write_json(folder / MANIFEST, sealed(manifest))

    def save_whole_model(self):
        """Save the model and its tokenizer in the output folder as `model/`: whole or absent, unsharded if it was."""
        partial = Path(self.args.output_dir, PARTIAL, MODEL)
        self.stop_unless_good(self.model_wrapped)
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        with self._written_whole("the model", "the last checkpoint is whole"):
            self.save_model(str(partial))
            if self.args.should_save:
                self._write_manifest(partial)
                self._install(partial, Path(self.args.output_dir, MODEL))

    def clear_away(self):
        """Remove what the process that ended this run did not come to remove."""
        if self.args.should_save:
            folder = Path(self.args.output_dir)
            shutil.rmtree(folder / PARTIAL, ignore_errors=True)
            self._drop_old(folder)

    def _issue_warnings_after_load(self, load_result):
        """Trainer warns of parameters that a checkpoint lacks, and would go on with others."""
        tied = {name for names in shared_parameters(self.model) for name in names}
        missing = [name for name in load_result.missing_keys if name not in tied]
        if names := missing + list(load_result.unexpected_keys):
            raise ValueError(
                "train: the checkpoint must have the parameters of the model, by the same names, differs in "
                + first_few(names)
            )

    @staticmethod
    def _install(partial: Path, target: Path):
        """Give what was written its name."""
        files.replace_folder(partial, target)
        shutil.rmtree(partial.parent, ignore_errors=True)

    def _drop_old(self, folder: Path):
        """Keep the newest whole checkpoints; half ones that something else left behind do not count, and stay.

        Neither do those of later steps count, which a resumed run passed over because they are damaged.
        """
        step = self.state.global_step
        whole = [path for path in checkpoints_in(folder) if step_of(path) <= step and not defects_of(path)]
        best = self.state.best_model_checkpoint
        for path in whole[: -self.keep]:
            if best is None or path != Path(best):
                # A checkpoint that is half removed has no longer the name of one.
                trash = folder / PARTIAL / path.name
                trash.parent.mkdir(exist_ok=True)
                os.rename(path, trash)
                shutil.rmtree(trash.parent)


class Guard(TrainerCallback):
    """Watches a run: what must be finite, and the history."""

    def __init__(self, trainer: AndromedaTrainer, on_start: Callable[[], None] | None):
        self.trainer = trainer
        self.on_start = on_start

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.record = StepRecord(args.device, scaled=trainer.accelerator.scaler is not None)
        interval = None
        if trainer.resumed_from is not None:
            interval = read_manifest(trainer.resumed_from).get("interval")
        if interval is not None:
            trainer.record.interval.copy_(torch.tensor(interval, dtype=torch.float64))
        if names := nonfinite_parameters(trainer.model):
            source = "the model" if trainer.resumed_from is None else trainer.resumed_from.name
            raise FloatingPointError(f"train: {source} must have finite weights, got NaN or Inf in {first_few(names)}")
        if state.is_world_process_zero:
            for path in Path(args.output_dir).iterdir():
                if files.is_temporary(path.name) and path.is_file():  # a killed start was writing it
                    path.unlink()
            if self.on_start is not None:
                self.on_start()
            trainer.history = History(Path(args.output_dir, HISTORY), state.log_history)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.record.end_step(state.global_step + 1)
        if args.world_size == 1 and args.device.type == "cpu":  # nothing to wait for: before it spoils the weights
            self.trainer.stop_unless_finite()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.trainer.stop_unless_finite()

    def on_log(self, args, state, control, **kwargs):
        if self.trainer.history is not None:
            self.trainer.history.write(state.log_history[-1])
