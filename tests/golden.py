"""Where the golden data lies (docs/model.md#15): ANDROMEDA_GOLDEN, or `shared/golden` beside the checkout."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from andromeda import Andromeda

CASES = (
    "p01_all_defaults",
    "p02_wide_six_heads",
    "p03_prenorm_depth3",
    "p04_no_qk_norm_unfused",
    "p05_fixed_scale_mha",
    "p06_alibi_only",
    "p07_xpos_only",
    "p08_shift_two_no_positions",
    "p09_absolute_positions",
    "p10_long_ignored_labels",
)


def folder() -> Path:
    """The folder of the golden data. Without it the test is skipped; in CI that is a failure."""
    default = Path(__file__).resolve().parents[2] / "shared" / "golden"
    found = Path(os.environ.get("ANDROMEDA_GOLDEN", default))
    if not (found / "index.json").is_file():
        message = f"no golden data in {found} (ANDROMEDA_GOLDEN names another folder)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@functools.cache
def load(name: str) -> tuple[dict, dict]:
    """The description and the tensors of a case."""
    return json.loads((folder() / f"{name}.json").read_text()), load_file(folder() / f"{name}.safetensors")


def model(name: str, dtype: torch.dtype) -> tuple[Andromeda, dict, dict]:
    """The model of a case with its weights, the description and the tensors."""
    description, tensors = load(name)
    made = Andromeda(**description["andromeda_kwargs"])
    made.load_x_transformers(weights(tensors))
    return made.to(dtype), description, tensors


def weights(tensors: dict) -> dict[str, torch.Tensor]:
    """The state dict of x-transformers among the tensors of a case."""
    prefix = "weights/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
