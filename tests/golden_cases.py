"""The golden cases (docs/model.md#15): the small ones of tests/golden, and larger ones where they exist.

Larger ones are looked for in the folder that ANDROMEDA_GOLDEN names, or in `shared/golden` beside the checkout.
"""

import functools
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file

from andromeda import Andromeda

SMALL = Path(__file__).resolve().parent / "golden"
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "golden"


def find() -> dict[str, Path]:
    """Names of cases -> the folders that hold them."""
    named = os.environ.get("ANDROMEDA_GOLDEN")
    folders = [SMALL, Path(named) if named else BESIDE]
    found = {path.stem: folder for folder in folders for path in sorted(folder.glob("*.safetensors"))}
    if named and folders[1] not in found.values():
        raise FileNotFoundError(f"ANDROMEDA_GOLDEN must name a folder with golden cases, got {named!r}")
    return found


CASES = find()


@functools.cache
def load(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """The description and the tensors of a case."""
    description = json.loads((CASES[name] / f"{name}.json").read_text())
    # Copies begin at multiples of 16 bytes, as on a GPU; in the file they may begin anywhere.
    tensors = {key: value.clone() for key, value in load_file(CASES[name] / f"{name}.safetensors").items()}
    # Where the oracle's cache does not work, decoding must give the rows of the whole pass.
    tensors.setdefault("decode/logits", tensors["logits_f64"][:, description["decode"]["prefill"] :])
    return description, tensors


def model(name: str, dtype: torch.dtype) -> tuple[Andromeda, dict, dict[str, torch.Tensor]]:
    """The model of a case with its weights, the description and the tensors."""
    description, tensors = load(name)
    made = Andromeda(**description["andromeda_kwargs"])
    made.load_x_transformers(weights(tensors))
    return made.to(dtype), description, tensors


def weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of x-transformers among the tensors of a case."""
    prefix = "weights/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
