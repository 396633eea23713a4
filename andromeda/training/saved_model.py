"""Models in a folder, from `Andromeda.save` or `save_pretrained`, and the duration of a training step."""

import contextlib
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from andromeda.huggingface import AndromedaForCausalLM
from andromeda.model import Andromeda
from andromeda.training.checkpoints import check_saved_model

SavedModel: TypeAlias = AndromedaForCausalLM


def load_saved_model(folder: Path, device: str | torch.device, dtype: torch.dtype) -> SavedModel:
    """The model in a folder, in evaluation mode. If the folder has a manifest, its files are compared with it first.

    A model with weights that are not finite is loaded without a warning: see `nonfinite_parameters`.

    Args:
        dtype: of the weights.

    Raises:
        ValueError: files are damaged, or do not describe a model; names the files.
    """
    check_saved_model(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* holds weights that are not finite")
        if (folder / "andromeda.json").is_file():
            model = AndromedaForCausalLM.from_andromeda(Andromeda.load(folder, device=device, dtype=dtype))
        else:
            try:
                with _transformers_quietly():
                    model = AndromedaForCausalLM.from_pretrained(folder, dtype=dtype)
            except StrictDataclassError as error:
                raise ValueError(f"{folder / 'config.json'} describes no model: {error}") from error
            model.to(device)  # type: ignore[arg-type]  # mypy misreads the wrapper that transformers puts around it
    model.eval()
    return model


@contextlib.contextmanager
def _transformers_quietly() -> Iterator[None]:
    """Silence the progress bars and the advice of transformers, because commands have their own messages."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def seconds_per_step(model: Andromeda, batch: Mapping[str, torch.Tensor]) -> float:
    """Measure the time of one training step of `model`, which it changes, on a batch of `collate`."""
    trained = AndromedaForCausalLM.from_andromeda(model)
    optimizer = torch.optim.AdamW(trained.parameters())
    batch = {name: value.to(trained.device) for name, value in batch.items()}
    times: list[float] = []
    while len(times) < 4 or (len(times) < 15 and sum(times) < 3):
        begin = time.perf_counter()
        loss = trained(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])  # the first ones warm up
