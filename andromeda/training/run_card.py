"""The model card of a training run: its figures, for the hub and for readers of the folder."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerBase

from andromeda.huggingface import AndromedaForCausalLM
from andromeda.huggingface.model_card import model_card
from andromeda.training.evaluation import Evaluation
from andromeda.training.rows import Rows
from andromeda.training.settings import TrainSettings


def run_card(
    model: AndromedaForCausalLM,
    settings: TrainSettings,
    dataset: Rows,
    *,
    steps: int,
    history: Sequence[Mapping[str, Any]],
    processes: int = 1,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_dataset: Rows | None = None,
    evaluation: Evaluation | None = None,
) -> ModelCard:
    """The card of the model that a run has trained.

    Args:
        model: the trained model.
        settings: of the run.
        dataset: the rows that it was trained on; a `PackedDataset` knows the name of its text.
        steps: optimiser steps of the whole run.
        history: `TrainResult.history`; the last loss and the last evaluation in it are shown.
        processes: that shared the batch.
        tokenizer: of transformers.
        eval_dataset, evaluation: the data and the result of an evaluation after the training. Without it the last
            evaluation of the run is shown.
    """
    row = len(dataset[0]["input_ids"])
    batch = settings.batch_size * settings.gradient_accumulation * processes
    training = {
        "steps": steps,
        "tokens": steps * batch * row,
        "data": f"{_name(dataset)}, {len(dataset):,} rows of {row:,} tokens",
        "rows per step": batch,
        "tokenizer": "unknown" if tokenizer is None else _kind(tokenizer),
        "last training loss": _last(history, "loss"),
        "peak learning rate": settings.learning_rate,
        "precision": "bfloat16 autocast" if settings.identity()["bf16"] else "float32",
        "seed": settings.seed,
    }
    figures: dict[str, Any] = {}
    if evaluation is not None:
        figures = {**dataclasses.asdict(evaluation), "seconds": None, "bytes": None}
    elif (loss := _last(history, "eval_loss")) is not None:
        figures = {"loss": loss}
    hub_name = settings.trainer.get("hub_model_id")
    return model_card(
        model,
        name=hub_name or settings.name(),
        training={name: value for name, value in training.items() if value is not None},
        evaluation={name: value for name, value in figures.items() if value is not None},
        evaluated_on=_name(eval_dataset) if eval_dataset is not None else "held-out text",
    )


def _name(dataset: Rows) -> str:
    """The name of the text, without the folders of this machine: others will read the card."""
    source = str(getattr(dataset, "metadata", {}).get("source") or type(dataset).__name__)
    return Path(source).name if Path(source).is_absolute() or Path(source).exists() else source


def _kind(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kind = type(tokenizer).__name__ if backend is None else type(backend.model).__name__
    return f"{kind}, {len(tokenizer):,} ids"


def _last(history: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((entry[name] for entry in reversed(history) if name in entry), None)
