"""The settings of a training run, the bounds of each number, and the arguments for transformers."""

import dataclasses
import math
import numbers
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainingArguments

LARGEST_COUNT = 2**31 - 1  # upper bound of every count: some libraries hold counts in 32 bits
_LARGEST_FLOAT = sys.float_info.max


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The interval in which a number must lie; NaN and infinity are always outside."""

    kind: type[int] | type[float]
    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def check(self, owner: str, name: str, value: object) -> int | float:
        """`value` as an `int` or `float`.

        Raises:
            TypeError: it is not a number, or not a whole number where one is needed; bools are not numbers.
            ValueError: it is not finite or out of bounds.
        """
        result = self._convert(value)
        if result is None:
            kind = "a whole number" if self.kind is int else "a number"
            raise TypeError(f"{owner}: {name} must be {kind}, got {value!r}")
        above = result > self.low if self.open_low else result >= self.low
        below = result < self.high if self.open_high else result <= self.high
        if not (above and below):  # NaN is neither
            raise ValueError(f"{owner}: {name} must be {self}, got {value}")
        return result

    def _convert(self, value: object) -> int | float | None:
        """`value` as a number of this kind, or None if it is not one."""
        if isinstance(value, bool):
            return None
        if self.kind is int:
            return int(value) if isinstance(value, numbers.Integral) else None
        try:
            return float(value) if isinstance(value, numbers.Real) else None
        except OverflowError:  # a whole number that no float can hold
            return math.nan

    def __str__(self) -> str:
        if self.high == _LARGEST_FLOAT:
            return "positive and finite" if self.open_low else f"finite and at least {self.low}"
        return f"in {'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}"


BOUNDS = {  # of every number in `TrainSettings`
    **dict.fromkeys(
        ("steps", "batch_size", "gradient_accumulation", "log_every", "keep"), Bounds(int, 1, LARGEST_COUNT)
    ),
    **dict.fromkeys(("save_every", "eval_every", "sample_every", "num_workers"), Bounds(int, 0, LARGEST_COUNT)),
    "warmup_steps": Bounds(int, 0, LARGEST_COUNT),
    "learning_rate": Bounds(float, 0, _LARGEST_FLOAT, open_low=True),
    "min_learning_rate_ratio": Bounds(float, 0, 1),
    "weight_decay": Bounds(float, 0, _LARGEST_FLOAT),
    "adam_beta1": Bounds(float, 0, 1, open_high=True),
    "adam_beta2": Bounds(float, 0, 1, open_high=True),
    "max_grad_norm": Bounds(float, 0, _LARGEST_FLOAT),
    "seed": Bounds(int, 0, 2**32 - 1),  # numpy accepts no larger seed
}

# The result of a run does not depend on these: they may change when it is resumed.
NON_IDENTITY_FIELDS = (
    "output_dir",
    "device",
    "log_every",
    "save_every",
    "eval_every",
    "sample_every",
    "keep",
    "sample_prompt",
    "num_workers",
)


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """The settings of a training run. The defaults suit models of up to a few hundred million parameters.

    Attributes:
        output_dir: folder of the checkpoints, of the model and of `history.jsonl`.
        steps: optimiser steps of the whole run.
        batch_size: rows per device and forward pass.
        gradient_accumulation: forward passes per optimiser step.
        learning_rate: peak rate of AdamW, reached after `warmup_steps` linear steps (default: 1 step in 25); a cosine
            then lowers it to `min_learning_rate_ratio` times the peak.
        weight_decay: on the matrices of linear maps and embeddings; never on gains, scales and biases.
        adam_beta1, adam_beta2: of AdamW, in [0, 1).
        max_grad_norm: a larger gradient is scaled down to this norm; 0 never scales it.
        seed: of the order of the rows, below 2**32.
        bf16: autocast to bfloat16. Default: on a CUDA device that supports it, not on a CPU.
        device: None for the best available device, or "cpu".
        log_every, save_every, eval_every, sample_every: steps between progress figures, checkpoints, evaluations and
            sample texts; 0 means never (but a checkpoint is always saved after the last step).
        keep: number of checkpoints that stay on the disk.
        sample_prompt: the text that the sample texts continue.
        num_workers: processes that load rows; 0 loads them in this one, which is fast enough for packed rows.
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
    trainer: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, bounds in BOUNDS.items():
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
        for name, value in _floats_in(self.trainer, "trainer"):
            if not math.isfinite(value):
                raise ValueError(f"TrainSettings: {name} must be finite, got {value}")

    def identity(self) -> dict[str, Any]:
        """The settings that the result depends on, with defaults filled in.

        A checkpoint is continued only with settings of the same identity.
        """
        settings = dataclasses.asdict(self)
        for name in NON_IDENTITY_FIELDS:
            del settings[name]
        # Where the model is pushed does not change it; and a token of the hub must not get into the checkpoints.
        settings["trainer"] = {name: value for name, value in self.trainer.items() if not of_hub(name)}
        return settings | {"warmup_steps": self._warmup(), "bf16": self._bf16()}

    def name(self) -> str:
        """The name of the run, that of its folder."""
        return os.path.basename(os.path.abspath(self.output_dir))

    def _warmup(self) -> int:
        return max(1, self.steps // 25) if self.warmup_steps is None else self.warmup_steps

    def _bf16(self) -> bool:
        if self.bf16 is not None:
            return self.bf16
        return self.device is None and torch.cuda.is_available() and torch.cuda.is_bf16_supported()

    def training_arguments(self) -> TrainingArguments:
        """The arguments of transformers for these settings.

        Raises:
            ValueError: `trainer` repeats a setting of this class, or has a name that transformers does not know.
        """
        arguments: dict[str, Any] = {
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
            "logging_nan_inf_filter": False,  # the filter would replace losses that are not finite
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
        if repeated := sorted(set(self.trainer) & (set(arguments) | {"save_total_limit"})):
            raise ValueError(f"TrainSettings: trainer must not repeat what has a name here, got {', '.join(repeated)}")
        if "num_train_epochs" in self.trainer:
            raise ValueError(
                "TrainSettings: trainer must not have num_train_epochs, since steps says how long a run is, got "
                f"{self.trainer['num_train_epochs']!r}"
            )
        strategy = self.trainer.get("hub_strategy", "end")
        if strategy != "end":
            raise ValueError(
                f"TrainSettings: trainer['hub_strategy'] must be 'end', got {strategy!r}: only the finished model is "
                "pushed, because checkpoints are removed while the training goes on"
            )
        defaults: dict[str, Any] = {  # `trainer` may change these
            "hub_strategy": strategy,
            "per_device_eval_batch_size": self.batch_size,
            "prediction_loss_only": True,
            "dataloader_drop_last": True,
            "dataloader_pin_memory": torch.cuda.is_available() and self.device is None,
            "dataloader_persistent_workers": self.num_workers > 0,
            "remove_unused_columns": False,  # a column that the model does not know is an error, not silently dropped
            "include_num_input_tokens_seen": "all",
            "ddp_find_unused_parameters": False,
            "report_to": "none",
            "disable_tqdm": True,  # this package has its own progress line
        }
        return TrainingArguments(**arguments, **(defaults | self.trainer))


def of_hub(name: str) -> bool:
    """Whether an argument of TrainingArguments is about pushing to the hub."""
    return name == "push_to_hub" or name.startswith("hub_")


def _floats_in(value: object, name: str) -> Iterator[tuple[str, float]]:
    """(name, number) of each float in nested dicts and lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _floats_in(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _floats_in(item, f"{name}[{index}]")
    elif isinstance(value, float):
        yield name, value
