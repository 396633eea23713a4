"""Settings: every number bounded, every refusal named."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from tiny_run import settings

from andromeda.training import TrainSettings
from andromeda.training.settings import BOUNDS

NUMBERS = [field.name for field in dataclasses.fields(TrainSettings) if field.type in (int, float, int | None)]


def test_every_number_has_bounds():
    assert set(NUMBERS) == set(BOUNDS) and len(NUMBERS) == 17


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
        ({"trainer": {"num_train_epochs": 1}}, "must not have num_train_epochs, since steps says how long a run is"),
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
