"""Training and evaluation: transformers' Trainer does the work, this module says how Andromeda wants it.

What is added to Trainer:

* checkpoints that are whole or absent: written under `.partial/`, flushed, listed in a manifest with a checksum of each
  file and renamed. A run that is killed at any moment leaves only whole `checkpoint-<step>` folders, and only those
  whose files are still as they were written are resumed from. The trained model is saved as `model/` in the same way;
* a run whose loss, gradient norm or weights are no longer finite ends with an error that names the step. It saves
  nothing, so that every checkpoint on the disk has finite weights, which gave a finite loss when it was written;
* a resumed run does what an uninterrupted one would have done, bit for bit on a CPU, or refuses: every checkpoint
  carries the settings and a fingerprint of the data that its continuation needs;
* a first Ctrl-C (or SIGTERM) finishes the step, saves a checkpoint and stops; a second one, or one before the training
  proper, stops at once;
* a progress line (loss, tokens/s, time left, and model flops utilisation where the peak of the device is known), a
  sample text every `sample_every` steps, and the same figures in `history.jsonl`: one JSON object per line, with
  `step`, `loss`, `learning_rate`, `grad_norm` (before clipping) and `tokens_per_second` for each logged interval, with
  `step` and `eval_loss` for each evaluation. A figure that is not finite is null, and a line with `error` ends a run
  that failed so. A resumed run goes on with the lines up to its checkpoint.

Everything of Trainer that is not named in `TrainSettings` is reached through `TrainSettings.trainer`: distributed
training is `torchrun` with `{"fsdp": True}`, nothing of it is made here.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import numbers
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from andromeda import files
from andromeda.checkpoint import is_plain_embedding, plain_name
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.model import Andromeda

MANIFEST = "andromeda_checkpoint.json"  # the last file written into a checkpoint: settings, checksums of all others
MODEL = "model"  # folder of the trained model in the output folder
HISTORY = "history.jsonl"  # the figures of the run in the output folder
_PARTIAL = ".partial"  # folder of what is being written
LEFT_BY_A_START = (HISTORY, _PARTIAL)  # what a run without a checkpoint has written, which a new one writes anew
_MANIFEST_FORMAT = 2  # 1 had sizes in place of checksums, and no seal
_IGNORED = -100  # label of a token that is not predicted
_SEAL = "xxh3_128"  # key of a JSON object that holds the checksum of all others

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
class _Bounds:
    """The numbers that a setting may be; never NaN or infinity."""

    kind: type  # int or float
    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def check(self, owner: str, name: str, value):
        """`value` as an `int` or `float`.

        Raises:
            TypeError: it is no number, or not a whole one where only those make sense; bools are no numbers.
            ValueError: it is not finite or out of bounds.
        """
        wanted = numbers.Integral if self.kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, wanted):
            what = "a whole number" if self.kind is int else "a number"
            raise TypeError(f"{owner}: {name} must be {what}, got {value!r}")
        try:
            result = self.kind(value)
        except OverflowError:  # a whole number beyond all of float
            result = math.nan
        above = result > self.low if self.open_low else result >= self.low
        below = result < self.high if self.open_high else result <= self.high
        if not (above and below):  # NaN is neither
            raise ValueError(f"{owner}: {name} must be {self}, got {value}")
        return result

    def __str__(self) -> str:
        if self.high == _LARGEST:
            return "positive and finite" if self.open_low else f"finite and at least {self.low}"
        return f"in {'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}"


_LARGEST = sys.float_info.max
_MOST = 2**31 - 1  # no count is larger: some libraries below hold it in 32 bits


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train. The defaults suit a model of some hundred million parameters and less.

    Attributes:
        output_dir: folder of the checkpoints, of the model and of `history.jsonl`.
        steps: optimiser steps of the whole run.
        batch_size: rows per device and forward pass.
        gradient_accumulation: forward passes per optimiser step.
        learning_rate: of AdamW, after `warmup_steps` linear steps (default: 1 step in 25); then a cosine down to
            `min_learning_rate_ratio` times that.
        weight_decay: on the matrices of linear maps and embeddings; never on gains, scales and biases.
        adam_beta1, adam_beta2: of AdamW, in [0, 1).
        max_grad_norm: the gradient is scaled down to this norm; 0 leaves it as it is.
        seed: order of the rows, below 2**32.
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

    _BOUNDS = {  # noqa: RUF012 - no field
        **dict.fromkeys(("steps", "batch_size", "gradient_accumulation", "log_every", "keep"), _Bounds(int, 1, _MOST)),
        **dict.fromkeys(("save_every", "eval_every", "sample_every", "num_workers"), _Bounds(int, 0, _MOST)),
        "warmup_steps": _Bounds(int, 0, _MOST),
        "learning_rate": _Bounds(float, 0, _LARGEST, open_low=True),
        "min_learning_rate_ratio": _Bounds(float, 0, 1),
        "weight_decay": _Bounds(float, 0, _LARGEST),
        "adam_beta1": _Bounds(float, 0, 1, open_high=True),
        "adam_beta2": _Bounds(float, 0, 1, open_high=True),
        "max_grad_norm": _Bounds(float, 0, _LARGEST),
        "seed": _Bounds(int, 0, 2**32 - 1),  # numpy takes no larger one
    }

    def __post_init__(self):
        for name, bounds in self._BOUNDS.items():
            value = getattr(self, name)
            if value is not None or name != "warmup_steps":
                object.__setattr__(self, name, bounds.check("TrainSettings", name, value))
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise ValueError(
                f"TrainSettings: warmup_steps must be between 0 and steps ({self.steps}), got {self.warmup_steps}"
            )
        if not isinstance(self.output_dir, str | os.PathLike):
            raise TypeError(f"TrainSettings: output_dir must be a path, got {self.output_dir!r}")
        if not os.fspath(self.output_dir):
            raise ValueError("TrainSettings: output_dir must name a folder, got ''; '.' is the current one")
        object.__setattr__(self, "output_dir", os.fspath(self.output_dir))
        if self.bf16 is not None and not isinstance(self.bf16, bool):
            raise TypeError(f"TrainSettings: bf16 must be None, True or False, got {self.bf16!r}")
        if not isinstance(self.sample_prompt, str):
            raise TypeError(f"TrainSettings: sample_prompt must be a text, got {self.sample_prompt!r}")
        if self.device not in (None, "cpu"):
            raise ValueError(
                f"TrainSettings: device must be None or 'cpu', got {self.device!r}; "
                "set CUDA_VISIBLE_DEVICES to choose among GPUs"
            )
        if not isinstance(self.trainer, dict):
            raise TypeError(f"TrainSettings: trainer must be a dict, got {self.trainer!r}")
        for name, value in _numbers_in(self.trainer, "trainer"):
            if not math.isfinite(value):
                raise ValueError(f"TrainSettings: {name} must be finite, got {value}")

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
            "logging_nan_inf_filter": False,  # it shows other losses in place of those that are not finite
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


def _numbers_in(value, name: str):
    """(name, number) of each float in nested dicts and lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers_in(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _numbers_in(item, f"{name}[{index}]")
    elif isinstance(value, float):
        yield name, value


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
    tokenizer = _hf_tokenizer(tokenizer)
    _check_model("train", model)
    check_vocabulary(model, tokenizer)
    if settings.sample_every and tokenizer is None:
        raise ValueError("train: tokenizer must be given for sample_every, got None")
    if settings.eval_every and eval_dataset is None:
        raise ValueError("train: eval_dataset must be given for eval_every, got None")
    files.check_output_folder(settings.output_dir)
    checkpoint, damaged = _starting_point(Path(settings.output_dir), resume)
    arguments = settings.training_arguments()
    rows = settings.batch_size * settings.gradient_accumulation * arguments.world_size
    if len(dataset) < rows:
        raise ValueError(f"train: dataset must have at least the {rows} rows of one step, got {len(dataset)}")
    for name, data in (("dataset", dataset), ("eval_dataset", eval_dataset)):
        if data is not None:
            _check_rows(name, data, verify=arguments.local_process_index == 0)
    if isinstance(model, Andromeda):
        model = AndromedaForCausalLM.from_andromeda(model)
    _check_saveable(model, tokenizer)
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
    try:
        identity = json.loads(json.dumps(identity))  # as it will be read from a checkpoint: tuples become lists
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"TrainSettings: trainer must hold what JSON can hold, for the checkpoints: {error}"
        ) from error
    if checkpoint is not None:
        _check_identity(checkpoint, identity)

    progress = _Progress(settings, tokenizer)
    with _quiet(), _StopSignals(active=arguments.world_size == 1) as stop, contextlib.closing(progress):
        trainer = _Trainer(
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
        trainer.add_callback(_Guard(trainer, on_start))
        trainer.add_callback(_StopCallback(stop))
        # Trainer adds one of these two by itself, depending on disable_tqdm.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if checkpoint is not None and _step_of(checkpoint) >= settings.steps:
            # Trainer would make one step more before it looks at the count.
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state.global_step = _step_of(checkpoint)
            if not Path(settings.output_dir, MODEL).is_dir():
                trainer.save_whole_model()
            trainer.clear_away()
            return _result(checkpoint=checkpoint, steps=_step_of(checkpoint), damaged=damaged)
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


def _check_model(owner: str, model):
    if not isinstance(model, Andromeda | AndromedaForCausalLM):
        raise TypeError(
            f"{owner}: model must be an Andromeda or AndromedaForCausalLM, not wrapped in something else, got a "
            f"{type(model).__name__}; trainer={{'torch_compile': True}} compiles it"
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
    from andromeda.data.tokenizer import AndromedaTokenizer

    return tokenizer.tokenizer if isinstance(tokenizer, AndromedaTokenizer) else tokenizer


def collate(rows: list) -> dict:
    """Stack rows, dicts of tensors of equal shape, into one dict of batches."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _fingerprint(dataset) -> dict:
    """Enough of a dataset to notice that it is another one.

    Its length, a hash of its first, middle and last row, and the checksum of all its rows where the dataset knows one
    (`content_checksum`, as `PackedDataset` does), or else a hash of up to 32 rows spread over it.
    """
    last = len(dataset) - 1
    content = getattr(dataset, "content_checksum", None)
    if content is None:
        content = _hash_of_rows(dataset, sorted({last * part // 31 for part in range(32)}))
    return {"rows": len(dataset), "sha256": _hash_of_rows(dataset, (0, len(dataset) // 2, last)), "content": content}


def _hash_of_rows(dataset, indices) -> str:
    digest = hashlib.sha256()
    for index in indices:
        for name, value in sorted(dataset[index].items()):
            digest.update(name.encode())
            digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _check_rows(name: str, dataset, verify: bool):
    """ValueError if rows are not as they were written, where the dataset can tell, or nothing in them is predicted."""
    if verify and callable(check := getattr(dataset, "verify", None)) and check() is False:
        _say(f"train: {name} is of an older version and has no checksums: damage would not be noticed")
    for index in range(len(dataset)):  # as a rule the first one
        row = dataset[index]
        if missing := [column for column in ("input_ids", "labels") if column not in row]:
            raise ValueError(f"train: {name} must have rows with {', '.join(missing)}, got {', '.join(row)}")
        labels = row["labels"]
        if len(labels) < 2:
            raise ValueError(f"train: {name} must have rows of at least 2 tokens, got {len(labels)} in row {index}")
        if (labels[1:] != _IGNORED).any():
            return
    raise ValueError(
        f"train: {name} must have a token to predict, got {len(dataset)} rows with the label {_IGNORED} (ignored) at "
        "every position that has a token before it"
    )


def _check_saveable(model: AndromedaForCausalLM, tokenizer):
    """ValueError if what is trained could not be saved, or not be loaded again from what was saved."""
    owner = "train: the model must be one that can be saved and loaded again"
    if not is_plain_embedding(model.get_input_embeddings()):
        raise ValueError(
            f"{owner}, with the default embedding_provider, got a {type(model.get_input_embeddings()).__name__}"
        )
    if without := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{owner}, with its parameters in memory, got {', '.join(without[:3])} on the meta device")
    with torch.device("meta"):
        fresh = AndromedaForCausalLM(model.config)
    expected = {name: tuple(value.shape) for name, value in fresh.state_dict().items()}
    found = {  # saved without what wrappers, such as torch.compile, put into names
        plain_name(name, expected): tuple(value.shape) for name, value in model.state_dict().items()
    }
    if different := [name for name in {**expected, **found} if expected.get(name) != found.get(name)]:
        lines = [f"\n    {name}: {expected.get(name)} expected, got {found.get(name)}" for name in different[:5]]
        raise ValueError(f"{owner}, with the parameters that its config describes, got others:{''.join(lines)}")
    if ties := _shared_parameters(model):
        _check_ties(model, ties, owner)
    if tokenizer is not None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)


def _shared_parameters(model) -> list[list[str]]:
    """Names of the parameters that are one and the same, in groups."""
    groups = collections.defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].append(name)
    return [names for names in groups.values() if len(names) > 1]


def _check_ties(model: AndromedaForCausalLM, ties: list[list[str]], owner: str):
    """Save and load a small model with the same ties: transformers decides by the names which of them it can keep."""
    sizes = {"num_tokens": 8, "max_seq_len": 8, "dim": 16, "dim_head": 8}
    with torch.random.fork_rng(devices=[]):  # it draws weights
        small = AndromedaForCausalLM.from_andromeda(Andromeda(**{**model.config.to_arguments(), **sizes}))
    for first, *others in ties:
        for name in others:
            holder, _, attribute = name.rpartition(".")
            setattr(small.get_submodule(holder), attribute, small.get_parameter(first))
    try:
        with tempfile.TemporaryDirectory() as folder:
            small.save_pretrained(folder)
            AndromedaForCausalLM.from_pretrained(folder)
    except (RuntimeError, ValueError) as error:  # not those of the disk: they say nothing of the ties
        shared = "; ".join(" = ".join(names) for names in ties)
        raise ValueError(f"{owner}, got parameters that share one tensor ({shared}): {error}") from error


def nonfinite_parameters(model: torch.nn.Module) -> list[str]:
    """Names of the parameters of `model` that hold a NaN or an infinite number; waits once for the device."""
    named = [(name, _local(value.detach())) for name, value in model.named_parameters() if not value.is_meta]
    return [
        name for name, finite in zip((n for n, _ in named), _are_finite(v for _, v in named), strict=True) if not finite
    ]


def _are_finite(tensors: list[torch.Tensor]) -> list[bool]:
    finite = [torch.isfinite(tensor).all() for tensor in tensors]
    return torch.stack([flag.to(finite[0].device) for flag in finite]).tolist() if finite else []


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that is in this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


# ---- checkpoints


def latest_checkpoint(output_dir) -> str | None:
    """The whole checkpoint with the most steps below `output_dir`, or None. Looks at the sizes of the files only."""
    found = [path for path in _checkpoints(Path(output_dir)) if not _defects(path)]
    return str(found[-1]) if found else None


def check_saved_model(folder) -> None:
    """ValueError if a model that `train` saved, in `model/` or a checkpoint, is not as it was written.

    What belongs to the training alone (optimiser, random state) is not read. A folder without a manifest of this module
    passes.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return
    defects = _defects(folder, contents=True, of_training=False)
    if defects:
        others = [path.name for path in _checkpoints(folder.parent) if path != folder and not _defects(path)]
        raise ValueError(
            f"{folder} is damaged: {'; '.join(defects)}; "
            + (f"use another one ({', '.join(others)}), " if others else "")
            + f"restore it, or remove {MANIFEST} in it if it was changed on purpose"
        )


def _checkpoints(folder: Path) -> list[Path]:
    """Everything with the name of a checkpoint in `folder`, by steps."""
    return sorted((path for path in folder.glob("checkpoint-*") if _step_of(path) is not None), key=_step_of)


def _step_of(path: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", Path(path).name)
    return int(match.group(1)) if match else None


def _defects(path: Path, *, contents=False, of_training=True) -> list[str]:
    """What is wrong with a checkpoint folder, one line each; an empty list for a whole one.

    contents: read the files and compare their checksums, not only their sizes.
    of_training: look also at the files that only a continuation needs.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        return [f"{MANIFEST} is missing"]
    try:
        recorded = _read_manifest(path)["files"]
        if not of_training:
            recorded = {name: entry for name, entry in recorded.items() if not name.endswith((".pt", ".pth"))}
        if contents and not any(isinstance(entry, int) for entry in recorded.values()):
            return files.damages(path, recorded)
        sizes = {name: entry if isinstance(entry, int) else entry["bytes"] for name, entry in recorded.items()}
        found = {name: (path / name).stat().st_size if (path / name).is_file() else None for name in sizes}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [str(error) if isinstance(error, OSError | ValueError) else f"{manifest} is damaged: {error!r}"]
    return [
        f"{name}: {size} bytes expected, {'none' if found[name] is None else found[name]} found"
        for name, size in sizes.items()
        if found[name] != size
    ]


def _read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint or a saved model; OSError or ValueError if it is not what this module wrote."""
    path = folder / MANIFEST
    manifest = files.read_json(path, ("format", "step", "run", "files"))
    if manifest["format"] not in (1, _MANIFEST_FORMAT):
        raise ValueError(f"{path} must have format 1 or {_MANIFEST_FORMAT}, got {manifest['format']!r}")
    if manifest["format"] == _MANIFEST_FORMAT:
        _check_seal(path, manifest)
    if not isinstance(manifest["files"], dict) or not isinstance(manifest["run"], dict):
        raise ValueError(f"{path} is damaged: files and run must be JSON objects")
    if _step_of(folder) not in (None, manifest["step"]):
        raise ValueError(f"{path} must be of step {_step_of(folder)}, got {manifest['step']!r}")
    return manifest


def sealed(value: dict) -> dict:
    """`value` with a checksum of itself, which `read_sealed` compares."""
    return {**value, _SEAL: _seal_of(value)}


def read_sealed(path: Path, keys=()) -> dict:
    """A JSON object from a file; ValueError, with its name, if it is damaged. One without a checksum is taken as it is.

    keys: names that it must have.
    """
    value = files.read_json(path, keys)
    if _SEAL in value:
        _check_seal(path, value)
    return value


def _check_seal(path: Path, value: dict):
    rest = {name: item for name, item in value.items() if name != _SEAL}
    if value.get(_SEAL) != _seal_of(rest):
        raise ValueError(f"{path} is damaged: it has other content than was written (checksum differs)")


def _seal_of(value: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def _starting_point(folder: Path, resume: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, or None to begin, and what is wrong with newer ones; refuses to guess."""
    present = _checkpoints(folder)
    for path in present:
        if not path.is_dir():  # the run would fail when it comes to this step
            raise ValueError(
                f"train: {path} must be a folder, as a checkpoint is; remove it or choose another output_dir"
            )
    if not resume:
        if present:
            raise ValueError(
                f"train: output_dir must not hold checkpoints of another run, got {folder} with {present[-1].name}; "
                "resume that run (resume=True, --resume) or choose another folder"
            )
        return None, []
    damaged = []
    for path in reversed(present):
        defects = _defects(path, contents=True) or _not_to_continue(path)
        if not defects:
            if damaged:
                lines = "".join(f"\n    {line}" for line in damaged)
                _say(f"train: continues from {path.name}, the newest checkpoint that is as it was written:{lines}")
            return path, damaged
        damaged.append(f"{path.name}: {'; '.join(defects[:3])}")
    seen = "".join(f"\n    {line}" for line in damaged)
    raise ValueError(f"train: output_dir must hold a whole checkpoint to resume from, {folder} has none{seen}")


def _not_to_continue(path: Path) -> list[str]:
    """What a whole checkpoint lacks for a continuation: Trainer would begin it anew without a word."""
    names = _read_manifest(path)["files"]
    wanted = {"trainer_state.json": "the state of the run", "optimizer": "the state of the optimiser"}
    return [f"{what} is not in it" for name, what in wanted.items() if not any(n.startswith(name) for n in names)]


def _say(text: str):
    """A message beside the progress line, from the one process that speaks."""
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(text, file=sys.stderr)


def _check_identity(checkpoint: Path, identity: dict):
    """Refuse to continue a run as another one, naming every difference."""
    manifest = _read_manifest(checkpoint)
    stored = manifest["run"]
    was, now = (
        {f"{part} {name}": value for part, values in run.items() for name, value in values.items()}
        for run in (stored, identity)
    )
    if manifest["format"] == 1:  # knew less of the data
        now.pop("data content", None)
    different = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if different:
        lines = [f"\n    {name}: was {was.get(name)!r}, is {now.get(name)!r}" for name in different]
        raise ValueError(
            f"train: settings and data must be those of {checkpoint.name} to resume it exactly, these differ:"
            + "".join(lines)
        )


class _Trainer(Trainer):
    """Trainer with whole-or-absent checkpoints, weight decay by kind of parameter, and figures that are true.

    Losses are kept in a `_StepRecord` of our own: a loss that is not finite is not hidden, and a checkpoint carries the
    part of an interval that lies before it, so that a resumed run logs what an uninterrupted one does.
    """

    def __init__(self, *args, identity: dict, keep: int, resumed_from: Path | None = None, progress=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.identity = identity
        self.keep = keep
        self.progress = progress
        self.writing = False
        self.flops_per_token = 6 * self.model.num_parameters(exclude_embeddings=True)
        self.record = _StepRecord(self.args.device, scaled=self.accelerator.scaler is not None)
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
        count = (inputs["labels"][:, 1:] != _IGNORED).sum()
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
        labels[own:] = _IGNORED
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
            _local(value) for values in state.values() for value in values.values() if isinstance(value, torch.Tensor)
        ]
        found = torch.tensor([bool(names), not all(_are_finite(averages)), False], device=self.args.device)
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
        return os.path.join(folder, _PARTIAL) if self.writing else folder

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        # A pickle of the arguments that nothing reads back: the manifest holds them as JSON.
        Path(output_dir or self.args.output_dir, "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model, trial):
        folder = Path(self.args.output_dir)
        partial = folder / _PARTIAL / f"checkpoint-{self.state.global_step}"
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
                if self.state.best_model_checkpoint and _PARTIAL in Path(self.state.best_model_checkpoint).parts:
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
            shutil.rmtree(folder / _PARTIAL, ignore_errors=True)  # what an earlier process did not finish
        self.accelerator.wait_for_everyone()
        with files.writing(folder, what, whole=kept):
            try:
                yield
            except Exception:
                if self.args.should_save:
                    shutil.rmtree(folder / _PARTIAL, ignore_errors=True)
                raise
        self.accelerator.wait_for_everyone()

    def _write_manifest(self, folder: Path, interval=None):
        manifest = {
            "format": _MANIFEST_FORMAT,
            "step": self.state.global_step,
            "run": self.identity,
            "interval": interval,  # what `_StepRecord.interval` has summed up for the next figure
            "files": files.checksums(folder),
        }
        files.write_json(folder / MANIFEST, sealed(manifest))

    def save_whole_model(self):
        """Save the model and its tokenizer in the output folder as `model/`: whole or absent, unsharded if it was."""
        partial = Path(self.args.output_dir, _PARTIAL, MODEL)
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
            shutil.rmtree(folder / _PARTIAL, ignore_errors=True)
            self._drop_old(folder)

    def _issue_warnings_after_load(self, load_result):
        """Trainer warns of parameters that a checkpoint lacks, and would go on with others."""
        tied = {name for names in _shared_parameters(self.model) for name in names}
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
        whole = [path for path in _checkpoints(folder) if _step_of(path) <= step and not _defects(path)]
        best = self.state.best_model_checkpoint
        for path in whole[: -self.keep]:
            if best is None or path != Path(best):
                # A checkpoint that is half removed has no longer the name of one.
                trash = folder / _PARTIAL / path.name
                trash.parent.mkdir(exist_ok=True)
                os.rename(path, trash)
                shutil.rmtree(trash.parent)


class _StepRecord:
    """Losses and gradient norms, kept on the device: to note them, no step waits for it.

    Attributes:
        interval: float64 (3,): sum of the losses of the steps since the last figure, how many of them had a token to
            predict, and how many they were.
        bad: float64 (3,): the first step that was not finite, its loss and its gradient norm; zeros if there is none.
        norm: gradient norm of the step under way.
    """

    # The loss scale of float16 begins at 2**16 and is halved each time that a gradient overflows. When that has
    # happened so often in a row, the gradients themselves are not finite.
    _OVERFLOWS = 24

    def __init__(self, device, scaled: bool):
        self.scaled = scaled
        self.interval = torch.zeros(3, dtype=torch.float64, device=device)
        self.bad = torch.zeros_like(self.interval)
        self.overflows = torch.zeros((), dtype=torch.int64, device=device)
        self.norm = None
        self._begin()

    def _begin(self):
        self.loss = torch.zeros_like(self.bad[0])
        self.has_targets = torch.ones_like(self.loss)

    def add_part(self, loss: torch.Tensor, targets):
        """One forward pass of a step. targets: number of labels of the whole step, None where it is not known."""
        self.loss += loss
        if targets is not None:
            self.has_targets = (torch.as_tensor(targets, device=self.loss.device).sum() != 0).to(self.loss.dtype)

    def end_step(self, step: int):
        norm = self.norm
        norm = 0.0 if norm is None else norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norm = torch.as_tensor(norm, device=self.loss.device).to(self.loss.dtype)
        good = torch.isfinite(norm)
        if self.scaled:
            self.overflows = torch.where(good, 0, self.overflows + 1)
            good = self.overflows < self._OVERFLOWS
        good = good & torch.isfinite(self.loss)
        found = torch.stack((torch.full_like(self.loss, step), self.loss, norm))
        self.bad = torch.where(good | (self.bad[0] > 0), self.bad, found)
        self.interval += torch.stack((self.loss, self.has_targets, torch.ones_like(self.loss)))
        self.norm = None
        self._begin()


class _Guard(TrainerCallback):
    """Watches a run: what must be finite, and the history."""

    def __init__(self, trainer: _Trainer, on_start: Callable[[], None] | None):
        self.trainer = trainer
        self.on_start = on_start

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.record = _StepRecord(args.device, scaled=trainer.accelerator.scaler is not None)
        interval = None
        if trainer.resumed_from is not None:
            interval = _read_manifest(trainer.resumed_from).get("interval")
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
            trainer.history = _History(Path(args.output_dir, HISTORY), state.log_history)

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


class _History:
    """`history.jsonl`: begun anew with what a checkpoint remembers, then appended to line by line."""

    _FIGURES = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "error")

    def __init__(self, path: Path, entries: list[dict]):
        files.write_text(path, "".join(map(self._line, entries)))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def write(self, entry: dict):
        self.file.write(self._line(entry))
        self.file.flush()

    def close(self):
        self.file.close()

    def _line(self, entry: dict) -> str:
        """One line; nothing for an entry without a figure of ours, such as the total time at the end."""
        if not entry.keys() & {"loss", "eval_loss", "error"}:
            return ""
        figures = {name: entry[name] for name in self._FIGURES if name in entry}
        infinite = {name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)}
        return json.dumps(figures | dict.fromkeys(infinite)) + "\n"


def first_few(names: list[str]) -> str:
    """Some names for a message, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- stopping


class _StopSignals:
    """While active, the first SIGINT or SIGTERM is noted in `received`; the second acts as it always would.

    Only in the main thread, where Python lets handlers be set, and only for one process: several would have to agree on
    the step at which they stop.
    """

    def __init__(self, active: bool):
        self.active = active and threading.current_thread() is threading.main_thread()
        self.process = os.getpid()
        self.received = None
        self.previous = {}

    def __enter__(self):
        if self.active:
            self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        self._restore()

    def _note(self, number, frame):
        if os.getpid() != self.process:  # a process that loads rows gets the Ctrl-C of its terminal, too
            return
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
        if state.global_step >= state.max_steps:
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


class _Pace:
    """Notices, once, that steps take three times as long as at the start."""

    _WARM_UP, _STEPS, _FACTOR = 5, 20, 3.0  # steps that do not count, steps of a median, how much longer

    def __init__(self):
        self.ignored = 0
        self.first = []  # seconds of the first steps
        self.recent = collections.deque(maxlen=self._STEPS)
        self.said = False

    def add(self, seconds: float, device: str) -> str | None:
        """Seconds of a step; what to say about the pace, or None."""
        if self.said:
            return None
        if self.ignored < self._WARM_UP:
            self.ignored += 1
            return None
        if len(self.first) < self._STEPS:
            self.first.append(seconds)
            return None
        self.recent.append(seconds)
        if len(self.recent) < self._STEPS:
            return None
        before, now = statistics.median(self.first), statistics.median(self.recent)
        if now < self._FACTOR * before:
            return None
        self.said = True
        text = f"steps take {now / before:.1f} times as long as at the start ({now:.3g} s, were {before:.3g} s): "
        if device != "cpu":
            return text + f"other programs may use the {device} device or the processors that feed it"
        return text + (
            "other programs use the cores. Stop them, or stop this run and resume it with fewer threads: threads that "
            "wait for each other lose most, so OMP_NUM_THREADS=1 may be faster beside a busy program"
        )


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
        self.taken = (0, 0.0)  # tokens and seconds of the figures before
        self.pace = _Pace()
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
        seconds = time.perf_counter() - self.mark
        self.seconds += seconds
        if (advice := self.pace.add(seconds, args.device.type)) and self.bar is not None:
            self._write(f"step {state.global_step}: {advice}")
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
        if without := logs.get("steps_without_targets"):
            self._write(
                f"step {state.global_step}: {without} of the last steps had no token to predict (every label is "
                f"{_IGNORED}); their loss counts as nothing"
            )
        if "eval_loss" in logs:
            loss = logs["eval_loss"]
            finite = "" if math.isfinite(loss) else ": it is not finite, look at the rows of the evaluation"
            self._write(f"step {state.global_step}: evaluation loss {loss:.4f}{finite}")
        elif "loss" in logs:
            self.loss = float(logs["loss"])
            if self.bar.disable:
                rate = self.seconds / max(1, state.global_step - self.begin_step)
                left = (state.max_steps - state.global_step) * rate
                self._write(
                    f"step {state.global_step}/{state.max_steps}: {self._figures()}, {tqdm.format_interval(left)} left"
                )

    def close(self):
        if self.bar is not None:
            self.bar.close()

    def take_rate(self) -> float | None:
        """Tokens per second since the last call."""
        tokens, seconds = self.tokens - self.taken[0], self.seconds - self.taken[1]
        self.taken = (self.tokens, self.seconds)
        return tokens / seconds if seconds else None

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
        _say(text)

    def _show_sample(self, model, step: int):
        text = sample_text(model, self.tokenizer, self.settings.sample_prompt, tokens=48, seed=self.settings.seed)
        self._write(f"step {step}: a sample\n" + "\n".join(f"  | {line}" for line in text.splitlines()))


def sample_text(model, tokenizer, prompt: str, *, tokens: int, temperature: float = 0.8, seed: int = 0) -> str:
    """`prompt` and its continuation by `tokens` sampled tokens. Leaves the random generators as they were."""
    from andromeda.data.tokenizer import token_ids

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
        FloatingPointError: the weights or a loss are not finite.
    """
    _check_model("evaluate", model)
    check_vocabulary(model, tokenizer)
    for name, value, low in (("batch_size", batch_size, 1), ("max_rows", max_rows, 0)):
        if value is not None:
            _Bounds(int, low, _MOST).check("evaluate", name, value)
    if isinstance(model, Andromeda):
        model = AndromedaForCausalLM.from_andromeda(model)
    if names := nonfinite_parameters(model):
        raise FloatingPointError(f"evaluate: model must have finite weights, got NaN or Inf in {first_few(names)}")
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
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"evaluate: the loss must be finite, got {loss.item()} in the rows from {begin} on, though the weights "
                "are finite; try another dtype (float32) or look at these rows"
            )
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
