"""Training and evaluation (DECISIONS 12): transformers' Trainer does the work, this module says how Andromeda wants it.

What is added to Trainer:

* checkpoints that are whole or absent: written under `.partial/`, flushed, listed in a manifest and renamed. A run that
  is killed at any moment leaves only whole `checkpoint-<step>` folders, and those are the only ones ever resumed from.
  The trained model is saved as `model/` in the same way;
* a resumed run does what an uninterrupted one would have done, bit for bit on a CPU, or refuses: every checkpoint
  carries the settings and a fingerprint of the data that its continuation needs;
* a first Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; a second one stops at once;
* a progress line (loss, tokens/s, time left, and model flops utilisation where the peak of the device is known), and a
  sample text every `sample_every` steps.

Everything of Trainer that is not named in `TrainSettings` is reached through `TrainSettings.trainer`: distributed
training is `torchrun` with `{"fsdp": True}`, nothing of it is made here.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from andromeda import files
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.model import Andromeda

MANIFEST = "andromeda_checkpoint.json"  # the last file written into a checkpoint: settings, and the size of every other
MODEL = "model"  # folder of the trained model in the output folder
_PARTIAL = ".partial"  # folder of what is being written
_MANIFEST_FORMAT = 1

# Dense bfloat16 peak of a device in TFLOP/s, without sparsity, from the vendors' data sheets; the first key found in
# the device's name counts, so the more special name comes first.
_PEAK_TFLOPS = {
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H20": 148.0,
    "GH200": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train. The defaults suit a model of some hundred million parameters and less.

    Attributes:
        output_dir: folder of the checkpoints.
        steps: optimiser steps of the whole run.
        batch_size: rows per device and forward pass.
        gradient_accumulation: forward passes per optimiser step.
        learning_rate: of AdamW, after `warmup_steps` linear steps (default: 1 step in 25); then a cosine down to
            `min_learning_rate_ratio` times that.
        weight_decay: on the matrices of linear maps and embeddings; never on gains, scales and biases.
        max_grad_norm: the gradient is scaled down to this norm.
        seed: order of the rows.
        bf16: autocast to bfloat16. Default: on a CUDA device that has it, not on a CPU.
        device: None for the best there is, or "cpu".
        log_every, save_every, eval_every, sample_every: steps between progress figures, checkpoints, evaluations and
            sample texts; 0 is never (the last step always saves).
        keep: how many checkpoints stay on disk.
        sample_prompt: what the sample texts continue.
        num_workers: processes that load rows; 0 loads them in this one, which is enough for packed rows.
        trainer: further keyword arguments of `transformers.TrainingArguments`, such as `{"fsdp": True}`.
    """

    output_dir: str
    steps: int
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float = 3e-4
    min_learning_rate_ratio: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    max_grad_norm: float = 1.0
    seed: int = 0
    bf16: bool | None = None
    device: str | None = None
    log_every: int = 10
    save_every: int = 500
    eval_every: int = 0
    sample_every: int = 0
    keep: int = 2
    sample_prompt: str = ""
    num_workers: int = 0
    trainer: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name in ("steps", "batch_size", "gradient_accumulation", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainSettings: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("save_every", "eval_every", "sample_every", "num_workers", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"TrainSettings: {name} must not be negative, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"TrainSettings: learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.min_learning_rate_ratio <= 1:
            raise ValueError(
                f"TrainSettings: min_learning_rate_ratio must be in [0, 1], got {self.min_learning_rate_ratio}"
            )
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= self.steps:
            raise ValueError(
                f"TrainSettings: warmup_steps must be between 0 and steps ({self.steps}), got {self.warmup_steps}"
            )
        if self.device not in (None, "cpu"):
            raise ValueError(
                f"TrainSettings: device must be None or 'cpu', got {self.device!r}; "
                "set CUDA_VISIBLE_DEVICES to choose among GPUs"
            )

    # What may change between the parts of one run without changing what it computes.
    _INCIDENTAL = ("output_dir", "device", "log_every", "save_every", "eval_every", "sample_every", "keep")
    _INCIDENTAL += ("sample_prompt", "num_workers")

    def decisive(self) -> dict:
        """The settings that the result depends on, with defaults filled in: a checkpoint continues only under these."""
        settings = dataclasses.asdict(self)
        for name in self._INCIDENTAL:
            del settings[name]
        return settings | {"warmup_steps": self._warmup(), "bf16": self._bf16()}

    def _warmup(self) -> int:
        return max(1, self.steps // 25) if self.warmup_steps is None else self.warmup_steps

    def _bf16(self) -> bool:
        if self.bf16 is not None:
            return self.bf16
        return self.device is None and torch.cuda.is_available() and torch.cuda.is_bf16_supported()

    def training_arguments(self) -> TrainingArguments:
        """These settings in the words of transformers.

        Raises:
            ValueError: `trainer` repeats a setting that has a name here, or has a name that transformers does not know.
        """
        words = {
            "output_dir": self.output_dir,
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": self.min_learning_rate_ratio},
            "warmup_steps": self._warmup(),
            "weight_decay": self.weight_decay,
            "adam_beta1": self.adam_beta1,
            "adam_beta2": self.adam_beta2,
            "max_grad_norm": self.max_grad_norm,
            "seed": self.seed,
            "bf16": self._bf16(),
            "use_cpu": self.device == "cpu",
            "logging_steps": self.log_every,
            "save_strategy": "steps",
            "save_steps": self.save_every or self.steps,
            "eval_strategy": "steps" if self.eval_every else "no",
            "eval_steps": self.eval_every or None,
            "dataloader_num_workers": self.num_workers,
        }
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        if unknown := sorted(set(self.trainer) - known):
            raise ValueError(
                f"TrainSettings: trainer must name arguments of TrainingArguments, got {', '.join(unknown)}"
            )
        if repeated := sorted(set(self.trainer) & (set(words) | {"save_total_limit"})):
            raise ValueError(f"TrainSettings: trainer must not repeat what has a name here, got {', '.join(repeated)}")
        habits = {
            "per_device_eval_batch_size": self.batch_size,
            "prediction_loss_only": True,
            "dataloader_drop_last": True,
            "dataloader_pin_memory": torch.cuda.is_available() and self.device is None,
            "dataloader_persistent_workers": self.num_workers > 0,
            "remove_unused_columns": False,  # a column that the model does not know is an error, not dropped in silence
            "include_num_input_tokens_seen": "all",
            "ddp_find_unused_parameters": False,
            "report_to": "none",
            "disable_tqdm": True,  # the progress line is ours
        }
        return TrainingArguments(**words, **{**habits, **self.trainer})


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a call of `train` did.

    Attributes:
        steps: optimiser steps of the run so far, those before a resume included.
        loss: mean training loss over the last logged interval, in nats per token; None if no step was made.
        tokens, seconds: seen and spent by this call.
        tokens_per_second: their ratio.
        mfu: share of the device's peak that the model's own flops amount to; None where the peak is not known.
        checkpoint: the newest checkpoint.
        interrupted: the signal that ended the run early, or None.
        history: one dict per logged interval: step, loss, learning_rate, grad_norm; and eval_loss per evaluation.
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


def train(model, dataset, settings: TrainSettings, *, eval_dataset=None, tokenizer=None, resume=False) -> TrainResult:
    """Train `model` in place; leave checkpoints in `settings.output_dir` and, at the end, the model in `model/` there.

    Args:
        model: `Andromeda` or `AndromedaForCausalLM`. The result is in its own parameters.
        dataset: rows of equal length: dicts of tensors `input_ids`, `labels` and, optionally, `key_start`, as
            `DatasetBuilder` makes them.
        settings: how to train.
        eval_dataset: rows for `settings.eval_every`.
        tokenizer: saved into every checkpoint and needed for sample texts; `AndromedaTokenizer` or one of transformers.
        resume: continue from the newest whole checkpoint in `settings.output_dir`; without one it is an error.

    Raises:
        ValueError: the output folder already holds checkpoints and `resume` is off, or holds none and it is on; the
            settings or the data differ from those of the checkpoint; the tokenizer has more ids than the model.
    """
    tokenizer = _hf_tokenizer(tokenizer)
    check_vocabulary(model, tokenizer)
    if settings.sample_every and tokenizer is None:
        raise ValueError("train: tokenizer must be given for sample_every, got None")
    if settings.eval_every and eval_dataset is None:
        raise ValueError("train: eval_dataset must be given for eval_every, got None")
    checkpoint = _starting_point(Path(settings.output_dir), resume)
    arguments = settings.training_arguments()
    rows = settings.batch_size * settings.gradient_accumulation * arguments.world_size
    if len(dataset) < rows:
        raise ValueError(f"train: dataset must have at least the {rows} rows of one step, got {len(dataset)}")
    if isinstance(model, Andromeda):
        model = AndromedaForCausalLM.from_andromeda(model)
    if tokenizer is not None:  # `generate` of a saved model ends where this tokenizer says
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            for holder in (model.config, model.generation_config):
                setattr(holder, name, getattr(tokenizer, name))
    identity = {
        "settings": settings.decisive(),
        "model": model.config.to_arguments(),
        "data": _fingerprint(dataset),
        "processes": {"number": arguments.world_size},
    }
    if checkpoint is not None:
        _check_identity(checkpoint, identity)

    progress = _Progress(settings, tokenizer)
    with _quiet(), _StopSignals(active=arguments.world_size == 1) as stop:
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=eval_dataset,
            data_collator=collate,
            processing_class=tokenizer,
            callbacks=[progress, _StopCallback(stop)],
            identity=identity,
            keep=settings.keep,
        )
        # Trainer adds one of these two by itself, depending on disable_tqdm.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if checkpoint is not None and _step_of(checkpoint) >= settings.steps:
            # Trainer would make one step more before it looks at the count.
            trainer._load_from_checkpoint(str(checkpoint))
            if not Path(settings.output_dir, MODEL).is_dir():
                trainer.save_whole_model()
            return _result(checkpoint=checkpoint, steps=_step_of(checkpoint))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
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
    )


def _result(*, steps, checkpoint, history=(), tokens=0, seconds=0.0, mfu=None, interrupted=None) -> TrainResult:
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
    )


def check_vocabulary(model, tokenizer):
    """ValueError if `tokenizer` (or None) has ids that `model` has no embedding for."""
    tokenizer = _hf_tokenizer(tokenizer)
    rows = model.config.vocab_size if isinstance(model, AndromedaForCausalLM) else model.config.num_tokens
    if tokenizer is not None and len(tokenizer) > rows:
        raise ValueError(
            f"tokenizer: must have at most the {rows} ids of the model (num_tokens), got {len(tokenizer)}; "
            "build the model with a larger num_tokens or use the tokenizer it was trained with"
        )


def _hf_tokenizer(tokenizer):
    """The transformers tokenizer inside an `AndromedaTokenizer`, or the argument itself."""
    from andromeda.tokenizer import AndromedaTokenizer

    return tokenizer.tokenizer if isinstance(tokenizer, AndromedaTokenizer) else tokenizer


def collate(rows: list) -> dict:
    """Stack rows, dicts of tensors of equal shape, into one dict of batches."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _fingerprint(dataset) -> dict:
    """Enough of a dataset to notice that it is another one: its length and a hash of its first, middle and last row."""
    digest = hashlib.sha256()
    for index in (0, len(dataset) // 2, len(dataset) - 1):
        for name, value in sorted(dataset[index].items()):
            digest.update(name.encode())
            digest.update(value.numpy().tobytes())
    return {"rows": len(dataset), "sha256": digest.hexdigest()}


# ---- checkpoints


def latest_checkpoint(output_dir) -> str | None:
    """The whole checkpoint with the most steps below `output_dir`, or None."""
    folder = Path(output_dir)
    found = [path for path in folder.glob("checkpoint-*") if _step_of(path) is not None and not _defects(path)]
    return str(max(found, key=_step_of)) if found else None


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", Path(path).name)
    return int(match.group(1)) if match else None


def _defects(path: Path) -> list[str]:
    """What is missing from a checkpoint folder; an empty list for a whole one."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        return [f"{MANIFEST} is missing"]
    sizes = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    found = {name: (path / name).stat().st_size if (path / name).is_file() else None for name in sizes}
    return [
        f"{name}: {size} bytes expected, {'none' if found[name] is None else found[name]} found"
        for name, size in sizes.items()
        if found[name] != size
    ]


def _starting_point(folder: Path, resume: bool) -> Path | None:
    """The checkpoint to continue from, or None to begin; refuses to guess."""
    present = sorted((path for path in folder.glob("checkpoint-*") if _step_of(path) is not None), key=_step_of)
    if not resume:
        if present:
            raise ValueError(
                f"train: output_dir must not hold checkpoints of another run, got {folder} with {present[-1].name}; "
                "resume that run (resume=True, --resume) or choose another folder"
            )
        return None
    newest = latest_checkpoint(folder)
    if newest is None:
        seen = "".join(f"\n    {path.name}: {'; '.join(_defects(path)[:3])}" for path in present)
        raise ValueError(f"train: output_dir must hold a whole checkpoint to resume from, {folder} has none{seen}")
    return Path(newest)


def _check_identity(checkpoint: Path, identity: dict):
    """Refuse to continue a run as another one, naming every difference."""
    stored = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["run"]
    wanted = json.loads(json.dumps(identity))  # tuples become lists, as in the file
    was, now = (
        {f"{part} {name}": value for part, values in run.items() for name, value in values.items()}
        for run in (stored, wanted)
    )
    different = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if different:
        lines = [f"\n    {name}: was {was.get(name)!r}, is {now.get(name)!r}" for name in different]
        raise ValueError(
            f"train: settings and data must be those of {checkpoint.name} to resume it exactly, these differ:"
            + "".join(lines)
        )


class _Trainer(Trainer):
    """Trainer with whole-or-absent checkpoints, and weight decay by kind of parameter."""

    def __init__(self, *args, identity: dict, keep: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.identity = identity
        self.keep = keep
        self.writing = False
        self.flops_per_token = 6 * self.model.num_parameters(exclude_embeddings=True)

    def get_decay_parameter_names(self, model) -> list[str]:
        """Matrices of linear maps and embeddings: gains, residual and QK scales and biases are left alone."""
        kinds = (torch.nn.Linear, torch.nn.Embedding)
        return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)]

    def floating_point_ops(self, inputs) -> int:
        return self.flops_per_token * inputs["input_ids"].numel()

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _PARTIAL) if self.writing else folder

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # A pickle of the arguments that nothing reads back: the manifest holds them as JSON.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        partial = folder / _PARTIAL / f"checkpoint-{self.state.global_step}"
        whole = folder / partial.name
        if self.args.should_save:
            shutil.rmtree(folder / _PARTIAL, ignore_errors=True)  # what an earlier process did not finish
        self.accelerator.wait_for_everyone()
        self.writing = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.writing = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_model_checkpoint and _PARTIAL in Path(self.state.best_model_checkpoint).parts:
                self.state.best_model_checkpoint = str(whole)
                self.state.save_to_json(str(partial / "trainer_state.json"))
            written = sorted(path for path in partial.rglob("*") if path.is_file())
            manifest = {
                "format": _MANIFEST_FORMAT,
                "step": self.state.global_step,
                "run": self.identity,
                "files": {path.relative_to(partial).as_posix(): path.stat().st_size for path in written},
            }
            (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
            self._install(partial, whole)
            self._drop_old(folder)
        self.accelerator.wait_for_everyone()

    def save_whole_model(self):
        """Save the model and its tokenizer in the output folder as `model/`: whole or absent, unsharded if it was."""
        partial = Path(self.args.output_dir, _PARTIAL, MODEL)
        if self.args.should_save:
            shutil.rmtree(partial.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self.save_model(str(partial))
        if self.args.should_save:
            self._install(partial, Path(self.args.output_dir, MODEL))
        self.accelerator.wait_for_everyone()

    @staticmethod
    def _install(partial: Path, target: Path):
        """Give what was written its name."""
        files.replace_folder(partial, target)
        shutil.rmtree(partial.parent, ignore_errors=True)

    def _drop_old(self, folder: Path):
        """Keep the newest whole checkpoints; half ones that something else left behind do not count, and stay."""
        whole = sorted(
            (path for path in folder.glob("checkpoint-*") if _step_of(path) and not _defects(path)), key=_step_of
        )
        best = self.state.best_model_checkpoint
        for path in whole[: -self.keep]:
            if best is None or path != Path(best):
                shutil.rmtree(path)


# ---- stopping


class _StopSignals:
    """While active, the first SIGINT or SIGTERM is noted in `received`; the second acts as it always would.

    Only in the main thread, where Python lets handlers be set, and only for one process: several would have to agree on
    the step at which they stop.
    """

    def __init__(self, active: bool):
        self.active = active and threading.current_thread() is threading.main_thread()
        self.received = None
        self.previous = {}

    def __enter__(self):
        if self.active:
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        self._restore()

    def _note(self, number, frame):
        self.received = signal.Signals(number).name
        self._restore()
        print("\nstopping after this step (once more to stop at once)", file=sys.stderr, flush=True)

    def _restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


class _StopCallback(TrainerCallback):
    """Ends the run with a checkpoint after the step in which a signal arrived; logs the last step of any run."""

    def __init__(self, stop: _StopSignals):
        self.stop = stop

    def on_step_end(self, args, state, control, **kwargs):
        if self.stop.received:
            control.should_save = control.should_training_stop = True
        if control.should_training_stop:
            control.should_log = True  # the last figure belongs to the last step


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


# ---- progress


def training_flops_per_token(model: AndromedaForCausalLM, seqlen: int) -> int:
    """Floating point operations of one token, forward and backward, without recomputation.

    6 per parameter that multiplies (a multiplication and an addition, three times; the token table only looks up) and,
    for each layer, 6 * num_heads * head_dim * seqlen for the scores and the weighted sum under the causal mask.
    """
    config = model.config
    table = sum(parameter.numel() for parameter in model.get_input_embeddings().parameters())
    parameters = sum(parameter.numel() for parameter in model.parameters()) - table
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * seqlen
    return 6 * (parameters + attention)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 peak of a device in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for key, tflops in _PEAK_TFLOPS.items() if key in name), None)


class _Progress(TrainerCallback):
    """A line with loss, tokens/s and time left: a bar on a terminal, a plain line per logged interval elsewhere."""

    def __init__(self, settings: TrainSettings, tokenizer):
        self.settings = settings
        self.tokenizer = tokenizer
        self.bar = None
        self.loss = None
        self.tokens = 0  # of this call, over all processes
        self.seconds = 0.0  # of this call's steps, without evaluations, samples and checkpoints
        self.mark = 0.0  # when the step began: rows are loaded after it, evaluations and checkpoints made before it
        self.flops_per_token = None
        self.peak = None

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        self.begin_step = state.global_step
        self.begin_tokens = state.num_input_tokens_seen
        seqlen = train_dataloader.dataset[0]["input_ids"].shape[-1]
        if isinstance(model, AndromedaForCausalLM):  # a sharded model cannot count its own parameters
            self.flops_per_token = training_flops_per_token(model, seqlen)
        peak = peak_flops(args.device) if args.bf16 or args.fp16 else None
        self.peak = None if peak is None else peak * args.world_size
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
                file=sys.stderr,
            )
        self.mark = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.mark = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seconds += time.perf_counter() - self.mark
        self.tokens = state.num_input_tokens_seen - self.begin_tokens
        if self.bar is not None:
            self.bar.set_postfix_str(self._figures(), refresh=False)
            self.bar.update()
            every = self.settings.sample_every
            if every and state.global_step % every == 0 and args.world_size == 1:
                self._show_sample(model, state.global_step)
        self.mark = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is None or not logs:
            return
        if "eval_loss" in logs:
            self._write(f"step {state.global_step}: evaluation loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            self.loss = float(logs["loss"])
            if self.bar.disable:
                rate = self.seconds / max(1, state.global_step - self.begin_step)
                left = (state.max_steps - state.global_step) * rate
                self._write(
                    f"step {state.global_step}/{state.max_steps}: {self._figures()}, {tqdm.format_interval(left)} left"
                )

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def mfu(self) -> float | None:
        """Model flops utilisation: the model's own flops per second over the peak of all devices."""
        if self.peak is None or self.flops_per_token is None or not self.seconds:
            return None
        return self.tokens * self.flops_per_token / (self.seconds * self.peak)

    def _figures(self) -> str:
        figures = [] if self.loss is None else [f"loss {self.loss:.3f}"]
        if self.seconds:
            figures.append(f"{self.tokens / self.seconds:,.0f} tokens/s")
        if (mfu := self.mfu()) is not None:
            figures.append(f"MFU {100 * mfu:.1f} %")
        return ", ".join(figures)

    def _write(self, text: str):
        tqdm.write(text, file=sys.stderr)

    def _show_sample(self, model, step: int):
        text = sample_text(model, self.tokenizer, self.settings.sample_prompt, tokens=48, seed=self.settings.seed)
        self._write(f"step {step}: a sample\n" + "\n".join(f"  | {line}" for line in text.splitlines()))


def sample_text(model, tokenizer, prompt: str, *, tokens: int, temperature: float = 0.8, seed: int = 0) -> str:
    """`prompt` and its continuation by `tokens` sampled tokens. Leaves the random generators as they were."""
    from andromeda.tokenizer import token_ids

    tokenizer = _hf_tokenizer(tokenizer)
    ids = token_ids(tokenizer, prompt) or [tokenizer.eos_token_id or 0]
    plain = model.to_andromeda() if isinstance(model, AndromedaForCausalLM) else model
    device = next(plain.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    continuation = plain.generate(
        torch.tensor(ids, device=device), tokens, temperature=temperature, generator=generator
    )
    return prompt + tokenizer.decode(continuation.tolist(), skip_special_tokens=True)


# ---- evaluation


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicts some text.

    Attributes:
        loss: mean negative log-likelihood in nats per token.
        perplexity: its exponential.
        bits_per_byte: the same likelihood in bits per byte of text, which compares across tokenizers; None where the
            bytes of a token are not known.
        tokens: predicted tokens.
        bytes: bytes of text they stand for, or None.
        seconds: time it took.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: int | None
    seconds: float


@torch.no_grad()
def evaluate(model, dataset, *, tokenizer=None, batch_size=8, max_rows=None, progress=False) -> Evaluation:
    """Loss, perplexity and bits per byte of `model` on the rows of `dataset`, each token weighted alike.

    Args:
        model: `Andromeda` or `AndromedaForCausalLM`.
        dataset: rows as in `train`.
        tokenizer: gives the bytes of each token; only byte-level tokenizers have them.
        max_rows: look at the first so many rows only.
        progress: a bar on stderr, on a terminal.

    Raises:
        ValueError: no token is predicted, or the tokenizer has more ids than the model.
    """
    check_vocabulary(model, tokenizer)
    if isinstance(model, Andromeda):
        model = AndromedaForCausalLM.from_andromeda(model)
    device = model.device
    widths = None if tokenizer is None else token_bytes(tokenizer)
    rows = len(dataset) if max_rows is None else min(max_rows, len(dataset))
    total, tokens, size = 0.0, 0, 0
    started = time.perf_counter()
    bar = tqdm(
        range(0, rows, batch_size), unit="batch", file=sys.stderr, disable=not (progress and sys.stderr.isatty())
    )
    for begin in bar:
        batch = collate([dataset[index] for index in range(begin, min(begin + batch_size, rows))])
        targets = batch["labels"][:, 1:]
        targets = targets[targets != -100]
        if not len(targets):
            continue
        loss = model(**{name: value.to(device) for name, value in batch.items()}, use_cache=False).loss
        total += loss.item() * len(targets)
        tokens += len(targets)
        size += 0 if widths is None else int(widths[targets].sum())
    if not tokens:
        raise ValueError(f"evaluate: dataset must have a token to predict, got {rows} rows without one")
    loss = total / tokens
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),  # exp overflows a double beyond 709
        bits_per_byte=total / math.log(2) / size if size else None,
        tokens=tokens,
        bytes=size or None,
        seconds=time.perf_counter() - started,
    )


def token_bytes(tokenizer) -> torch.Tensor | None:
    """Bytes of text of each token id, int64 (len(tokenizer),), special tokens 0; None unless it is byte-level.

    A byte-level vocabulary writes one character per byte, so the length of an entry is the number of its bytes; tokens
    added later are written as themselves.
    """
    tokenizer = _hf_tokenizer(tokenizer)
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder") or {}
    if "ByteLevel" not in {decoder.get("type"), *(part["type"] for part in decoder.get("decoders", ()))}:
        return None
    widths = torch.zeros(len(tokenizer), dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        widths[index] = len(token)
    for index, token in tokenizer.added_tokens_decoder.items():
        widths[index] = 0 if token.special else len(token.content.encode())
    return widths
