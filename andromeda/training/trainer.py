"""`train`, and the subclass of transformers' Trainer that it runs."""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging as transformers_logging

from andromeda import files
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.huggingface.model_card import CARD, is_foreign_card, write_model_card
from andromeda.huggingface.saving import explained_push
from andromeda.model import Andromeda
from andromeda.training.checkpoints import (
    HISTORY,
    MODEL,
    PARTIAL,
    check_identity,
    install,
    latest_checkpoint,
    remove_old,
    starting_point,
    step_of,
)
from andromeda.training.evaluation import Evaluation, evaluate
from andromeda.training.finite import StepRecord, are_finite, local, nonfinite_parameters
from andromeda.training.history import History
from andromeda.training.manifest import read_manifest, write_manifest
from andromeda.training.messages import first_few
from andromeda.training.model_checks import (
    Model,
    Tokenizer,
    check_model,
    check_saveable,
    check_vocabulary,
    hf_tokenizer,
    shared_parameters,
)
from andromeda.training.progress import Progress
from andromeda.training.rows import IGNORED_LABEL, Rows, check_rows, collate, fingerprint
from andromeda.training.run_card import run_card
from andromeda.training.settings import TrainSettings
from andromeda.training.stopping import StopCallback, StopSignals


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The outcome of a call of `train`.

    Attributes:
        steps: optimiser steps of the run so far, including those before a resume.
        loss: mean training loss over the last logged interval, in nats per token; None if there was none.
        tokens, seconds: tokens seen and time spent by this call.
        tokens_per_second: their ratio.
        mfu: the model's own flops per second as a share of the device's peak; None where the peak is not known.
        checkpoint: the newest checkpoint.
        interrupted: the signal that ended the run early, or None.
        history: one dict per logged interval: step, loss, learning_rate, grad_norm; and eval_loss per evaluation.
        damaged: the defects of checkpoints that are newer than the one resumed from, one line each.
        evaluation: with `evaluate_at_end`, the evaluation of the trained model.
    """

    steps: int
    loss: float | None
    tokens: int
    seconds: float
    tokens_per_second: float
    mfu: float | None
    checkpoint: str | None
    interrupted: str | None
    history: list[dict[str, float]]
    damaged: list[str] = dataclasses.field(default_factory=list)
    evaluation: Evaluation | None = None


def train(
    model: Model,
    dataset: Rows,
    settings: TrainSettings,
    *,
    eval_dataset: Rows | None = None,
    tokenizer: Tokenizer | None = None,
    resume: bool = False,
    evaluate_at_end: bool = False,
    on_start: Callable[[], None] | None = None,
) -> TrainResult:
    """Train `model` in place; leave checkpoints in `settings.output_dir` and, at the end, the model in `model/` there.

    `history.jsonl` in the same folder holds the figures of the run, see `andromeda.training`. `model/` has a model card
    with them; one that the user has written or changed there stays. With `push_to_hub` in `settings.trainer`, the
    finished `model/` is pushed to the hub; that it can be is checked before the training.

    Args:
        model: `Andromeda` or `AndromedaForCausalLM`. Its own parameters are trained.
        dataset: rows of equal length: dicts of tensors `input_ids`, `labels` and, optionally, `key_start`, as
            `DatasetBuilder` makes them.
        settings: how to train.
        eval_dataset: rows for `settings.eval_every`.
        tokenizer: saved into every checkpoint and needed for sample texts; `AndromedaTokenizer` or one of transformers.
        resume: continue from the newest whole checkpoint in `settings.output_dir`; it is an error if there is none.
            Checkpoints whose files have changed since they were written are skipped, with a message.
        evaluate_at_end: evaluate the trained model on `eval_dataset`, in one process; the card of the model has the
            figures.
        on_start: called once, in the process that writes, after all checks and before the first step.

    Raises:
        ValueError: the output folder already holds checkpoints and `resume` is off, or holds none and it is on; the
            settings or the data differ from those of the checkpoint; the tokenizer has more ids than the model; the
            model could not be saved and loaded again; no row has a token to predict.
        OSError: nothing can be written to the output folder.
        FloatingPointError: a loss, a gradient norm or a weight is not finite; names the step. Nothing was saved or
            deleted after the last good checkpoint.
    """
    check_model("train", model)
    check_vocabulary(model, tokenizer)
    check_hub(settings)
    tokenizer = None if tokenizer is None else hf_tokenizer(tokenizer)
    if settings.sample_every and tokenizer is None:
        raise ValueError("train: tokenizer must be given for sample_every, got None")
    if settings.eval_every and eval_dataset is None:
        raise ValueError("train: eval_dataset must be given for eval_every, got None")
    files.check_output_folder(settings.output_dir)
    checkpoint, damaged = starting_point(Path(settings.output_dir), resume)
    arguments = settings.training_arguments()
    if arguments.fsdp and arguments.device.type == "cpu":
        raise ValueError(
            f"train: trainer['fsdp'] must be left out on a CPU, where DDP would run in its place, got "
            f"{settings.trainer['fsdp']!r}; torchrun without it runs DDP"
        )
    if settings.sample_every and arguments.world_size > 1:
        raise ValueError(
            f"train: sample_every must be 0 with several processes, got {settings.sample_every}; `andromeda generate` "
            "shows texts of a checkpoint"
        )
    rows = settings.batch_size * settings.gradient_accumulation * arguments.world_size
    if len(dataset) < rows:
        raise ValueError(f"train: dataset must have at least the {rows} rows of one step, got {len(dataset)}")
    for name, data in (("dataset", dataset), ("eval_dataset", eval_dataset)):
        if data is not None:
            check_rows(name, data, verify=arguments.local_process_index == 0)
    if isinstance(model, Andromeda):
        model = AndromedaForCausalLM.from_andromeda(model)
    check_saveable(model, tokenizer)
    if tokenizer is not None:
        _take_token_ids(model, tokenizer)
    identity = _identity(settings, model, dataset, processes=arguments.world_size)
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
            settings=settings,
            identity=identity,
            resumed_from=checkpoint,
            progress=progress,
        )
        trainer.add_callback(Guard(trainer, on_start))
        trainer.add_callback(StopCallback(stop))
        # Trainer itself adds one of these two, depending on disable_tqdm.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if checkpoint is not None and step_of(checkpoint) >= settings.steps:
            trainer.finish_without_a_step(checkpoint)
        else:
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                if trainer.history is not None:
                    trainer.history.close()
            if stop.received is None:
                trainer.save_whole_model()
    evaluation = None
    if stop.received is None:
        if evaluate_at_end and eval_dataset is not None:
            evaluation = evaluate(
                model, eval_dataset, tokenizer=tokenizer, batch_size=settings.batch_size, progress=True
            )
            trainer.write_card(trainer.folder / MODEL, evaluation)
        if arguments.push_to_hub:
            trainer.push_to_hub()
    return _result(
        steps=trainer.state.global_step,
        history=trainer.state.log_history,
        tokens=progress.tokens,
        seconds=progress.seconds,
        mfu=progress.mfu(),
        checkpoint=latest_checkpoint(settings.output_dir),
        interrupted=stop.received,
        damaged=damaged,
        evaluation=evaluation,
    )


def check_hub(settings: TrainSettings) -> None:
    """ConnectionError if the model is to be pushed, and the hub cannot be reached or does not know the user."""
    if settings.trainer.get("push_to_hub"):
        with explained_push("train", "nothing was trained"):
            HfApi(library_name="andromeda-kernels").whoami(token=settings.trainer.get("hub_token"))


def _take_token_ids(model: AndromedaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Store the tokenizer's special tokens in the model: `generate` of the saved model then ends at its end token."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        for holder in (model.config, model.generation_config):
            setattr(holder, name, getattr(tokenizer, name))


def _identity(
    settings: TrainSettings, model: AndromedaForCausalLM, dataset: Rows, processes: int
) -> dict[str, dict[str, Any]]:
    """Everything that the result of a run depends on, after a JSON round trip: a resumed run must have the same."""
    identity = {
        "settings": settings.identity(),
        "model": model.config.to_arguments(),
        "data": fingerprint(dataset),
        "processes": {"number": processes},
    }
    try:
        return json.loads(json.dumps(identity))  # turns tuples into lists, as in a checkpoint
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"TrainSettings: trainer must hold what JSON can hold, for the checkpoints: {error}"
        ) from error


def _result(
    *,
    steps: int,
    checkpoint: str | None,
    damaged: list[str],
    history: Sequence[dict[str, float]] = (),
    tokens: int = 0,
    seconds: float = 0.0,
    mfu: float | None = None,
    interrupted: str | None = None,
    evaluation: Evaluation | None = None,
) -> TrainResult:
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return TrainResult(
        steps=steps,
        loss=losses[-1] if losses else None,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        mfu=mfu,
        checkpoint=checkpoint,
        interrupted=interrupted,
        history=list(history),
        damaged=damaged,
        evaluation=evaluation,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers and accelerate log only errors: their remarks at the start of every run are noise."""
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
    """Trainer with atomic checkpoints, weight decay by kind of parameter, and correct figures.

    A `StepRecord` holds the losses: it does not hide a loss that is not finite, and a checkpoint carries the part of an
    interval that lies before it, so that a resumed run logs the figures of an uninterrupted one.
    """

    def __init__(
        self,
        *args: Any,
        settings: TrainSettings,
        identity: dict[str, dict[str, Any]],
        resumed_from: Path | None = None,
        progress: Progress | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.model, PreTrainedModel) and self.args.output_dir is not None
        self.folder = Path(self.args.output_dir)
        self.settings = settings
        self.identity = identity
        self.resumed_from = resumed_from
        self.progress = progress
        self.history: History | None = None  # in the process that writes, from the first step on
        self.flops_per_token = 6 * self.model.num_parameters(exclude_embeddings=True)
        self.record = StepRecord(self.args.device, scaled=self.accelerator.scaler is not None)
        self.batch: dict[str, Any] | None = None  # the last one
        self.evaluated = torch.zeros(2, dtype=torch.float64, device=self.args.device)  # losses and their number
        self.writing = False  # whether a checkpoint is being written into `.partial/`
        clip = self.accelerator.clip_grad_norm_

        def clip_and_note(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.record.norm = norm = clip(*args, **kwargs)
            return norm

        self.accelerator.clip_grad_norm_ = clip_and_note

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        self.batch = inputs
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.record.add_part(loss, num_items_in_batch)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            total, counted, steps = self.accelerator.reduce(self.record.interval, reduction="mean").tolist()
            logs["loss"] = total / max(1.0, counted)
            if counted < steps:
                logs["steps_without_targets"] = round(steps - counted)
            self.record.interval.zero_()
            if self.progress is not None and (rate := self.progress.take_rate()) is not None:
                logs["tokens_per_second"] = rate
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Matrices of linear maps and embeddings; gains, residual and QK scales and biases do not decay."""
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return self.flops_per_token * inputs["input_ids"].numel()

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        # dataloader_drop_last is meant for training: an evaluation uses every row.
        self.args.dataloader_drop_last, kept = False, self.args.dataloader_drop_last
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = kept

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.evaluated.zero_()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total, count = self.accelerator.reduce(self.evaluated, reduction="sum").tolist()
        assert output.metrics is not None
        output.metrics[f"{metric_key_prefix}_loss"] = total / count  # `train` checked that there is a target
        return output

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        """Add the losses of a batch and their number to `evaluated`; Trainer would average means of batches."""
        inputs = dict(self._prepare_inputs(inputs))
        inputs["labels"] = self._without_repeats(inputs["labels"])
        count = (inputs["labels"][:, 1:] != IGNORED_LABEL).sum()
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs, num_items_in_batch=1, skip_logits=True).loss
        self.evaluated += torch.stack((loss, count)).to(self.evaluated.dtype)
        return loss / (count + (count == 0)), None, None

    def _without_repeats(self, labels: torch.Tensor) -> torch.Tensor:
        """Ignore the labels of repeated rows, which pad the last batches when several processes share the data."""
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return labels
        own = min(max(state.remainder - self.args.process_index * len(labels), 0), len(labels))
        labels = labels.clone()
        labels[own:] = IGNORED_LABEL
        return labels

    def stop_unless_finite(self) -> None:
        """End the run if a loss or gradient norm since the start was not finite; waits for the device."""
        entries = self.accelerator.gather(self.record.bad[None]).tolist()  # (processes, step and loss and norm)
        if bad := [entry for entry in entries if entry[0]]:
            step, loss, norm = min(bad)
            self._fail(round(step), f"step {step:.0f} had loss {loss:g} and gradient norm {norm:g}")

    def stop_unless_good(self, model: torch.nn.Module) -> None:
        """End the run if the state to be saved is useless, so that the last checkpoint is better.

        The weights and the averages that the optimiser keeps must be finite, and so must the loss of these weights on
        the last batch: finite weights may be so large that their results overflow.
        """
        assert self.model is not None
        names = nonfinite_parameters(self.model)
        state = {} if self.optimizer is None else self.optimizer.state
        averages = [
            local(value) for values in state.values() for value in values.values() if isinstance(value, torch.Tensor)
        ]
        found = torch.tensor([bool(names), not all(are_finite(averages)), False], device=self.args.device)
        if self.batch is not None:
            with torch.no_grad(), self.compute_loss_context_manager():
                inputs = self._prepare_inputs(self.batch) | {"skip_logits": True}
                loss = self.compute_loss(model, inputs, num_items_in_batch=1)
            assert isinstance(loss, torch.Tensor)
            found[2] = ~torch.isfinite(loss)
        faults = self.accelerator.reduce(found.to(torch.int64), reduction="sum").tolist()
        weights = first_few(names) or "the weights"
        places = weights, "the averages of the optimiser", "the loss that its last batch has now"
        for fault, place in zip(faults, places, strict=True):
            if fault:
                self._fail(self.state.global_step, f"after step {self.state.global_step} NaN or Inf is in {place}")

    def _fail(self, step: int, fault: str) -> None:
        newest = latest_checkpoint(self.folder)
        error = (
            f"train: loss, gradient norm and weights must be finite, {fault}. Nothing was saved since; the training is "
            f"unstable: lower learning_rate (now {self.args.learning_rate:g}), lengthen the warm-up (warmup_steps, now "
            f"{self.args.warmup_steps}) or clip gradients more (max_grad_norm, now {self.args.max_grad_norm:g})"
        )
        if newest is None:
            error += f". There is no checkpoint yet: start again in {self.args.output_dir} with other settings"
        else:
            error += (
                f". {Path(newest).name} is whole and finite: start another run from its weights (--from {newest} "
                "--out ANOTHER) with other settings"
            )
        if self.history is not None:
            self.history.write({"step": step, "error": error})
        raise FloatingPointError(error)

    def finish_without_a_step(self, checkpoint: Path) -> None:
        """Complete a run that was killed after its last step; Trainer would make one step before it checks the count.

        The weights of the checkpoint are loaded, the model is saved if it is missing, and leftovers are removed.
        """
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if not (self.folder / MODEL).is_dir():
            self.save_whole_model()
        if self.args.should_save:
            shutil.rmtree(self.folder / PARTIAL, ignore_errors=True)
            self._remove_old()

    def save_whole_model(self) -> None:
        """Save the model, its tokenizer and its card in the output folder as `model/`, atomically and never sharded."""
        partial = self.folder / PARTIAL / MODEL
        self.stop_unless_good(self.model_wrapped)
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        with self._written_whole("the model", "the last checkpoint is whole"):
            self.save_model(str(partial), _internal_call=True)  # else Trainer would push the unfinished folder
            if self.args.should_save:
                self.write_card(partial)
                write_manifest(partial, step=self.state.global_step, identity=self.identity, interval=None)
                install(partial, self.folder / MODEL)

    def write_card(self, folder: Path, evaluation: Evaluation | None = None) -> None:
        """Write the card of the run into a folder, unless the user has written the one in `model/`, which stays."""
        old = self.folder / MODEL / CARD
        if is_foreign_card(old):
            if folder != old.parent:
                shutil.copyfile(old, folder / CARD)
            return
        model: Any = self.model
        rows: Any = self.train_dataset
        tokenizer: Any = self.processing_class
        held_out: Any = self.eval_dataset
        card = run_card(
            model,
            self.settings,
            rows,
            steps=self.state.global_step,
            history=self.state.log_history,
            processes=self.args.world_size,
            tokenizer=tokenizer,
            eval_dataset=held_out,
            evaluation=evaluation,
        )
        write_model_card(folder, card)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        with explained_push("train", "nothing was trained"):
            super().init_hf_repo(*args, **kwargs)

    def push_to_hub(self, commit_message: str | None = "End of training", *args: Any, **kwargs: Any) -> Any:
        """Upload `model/`, which is whole, and nothing else of the output folder."""
        if not self.is_world_process_zero():
            return None
        folder, repository = self.folder / MODEL, str(self.hub_model_id)
        kept = f"the model is in {folder}, and `hf upload {repository} {folder}` pushes it"
        with explained_push("train", kept):
            return HfApi(library_name="andromeda-kernels").upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=commit_message,
                token=self.args.hub_token,
                revision=self.args.hub_revision,
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        partial = self.folder / PARTIAL / f"checkpoint-{self.state.global_step}"
        whole = self.folder / partial.name
        self.stop_unless_good(model)
        newest = latest_checkpoint(self.folder) if self.args.should_save else None
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
                write_manifest(partial, step=self.state.global_step, identity=self.identity, interval=interval)
                install(partial, whole)
                self._remove_old()

    def _remove_old(self) -> None:
        best = self.state.best_model_checkpoint
        remove_old(self.folder, step=self.state.global_step, keep=self.settings.keep, best=best)

    @contextlib.contextmanager
    def _written_whole(self, name: str, kept: str) -> Iterator[None]:
        """Around a block that fills `.partial/`: an error removes its files, so that they do not fill the disk.

        name: of the folder being written, for the message. kept: a clause about the checkpoint that is still whole.
        """
        partial = self.folder / PARTIAL
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)  # an earlier process may have left files there
        self.accelerator.wait_for_everyone()
        with files.writing(self.folder, name, whole=kept):
            try:
                yield
            except Exception:
                if self.args.should_save:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self.writing else folder

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle of the arguments, which nothing reads, because the manifest holds them as JSON.
        Path(output_dir or self.folder, "training_args.bin").unlink(missing_ok=True)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raise if a checkpoint lacks parameters: Trainer would only warn and train with other values."""
        assert self.model is not None
        tied = {name for names in shared_parameters(self.model) for name in names}
        missing = [name for name in load_result.missing_keys if name not in tied]
        if names := missing + list(load_result.unexpected_keys):
            raise ValueError(
                "train: the checkpoint must have the parameters of the model, by the same names, differs in "
                + first_few(names)
            )


class Guard(TrainerCallback):
    """Ends a run whose numbers are not finite, and writes its history."""

    def __init__(self, trainer: AndromedaTrainer, on_start: Callable[[], None] | None) -> None:
        self.trainer = trainer
        self.on_start = on_start

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        trainer.record = StepRecord(args.device, scaled=trainer.accelerator.scaler is not None)
        resumed = trainer.resumed_from
        interval = None if resumed is None else read_manifest(resumed).get("interval")
        if interval is not None:
            trainer.record.interval.copy_(torch.tensor(interval, dtype=torch.float64))
        assert trainer.model is not None
        if names := nonfinite_parameters(trainer.model):
            source = "the model" if resumed is None else resumed.name
            raise FloatingPointError(f"train: {source} must have finite weights, got NaN or Inf in {first_few(names)}")
        if state.is_world_process_zero:
            for path in trainer.folder.iterdir():
                if files.is_temporary(path.name) and path.is_file():  # a killed run was writing it
                    path.unlink()
            if self.on_start is not None:
                self.on_start()
            trainer.history = History(trainer.folder / HISTORY, state.log_history)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.record.end_step(state.global_step + 1)
        if args.world_size == 1 and args.device.type == "cpu":  # nothing to wait for: stop before it spoils the weights
            self.trainer.stop_unless_finite()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.trainer.stop_unless_finite()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.history is not None:
            self.trainer.history.write(state.log_history[-1])
