"""The golden cases themselves: their size, their coverage of the flags, and their reproduction by x-transformers."""

import json

import golden_cases
import pytest
import torch
from golden import make
from safetensors.torch import load_file

MEASURED = ("loss_f64", "max_abs_logit", "float32_error", "greedy")
SMALL = [name for name, folder in golden_cases.CASES.items() if folder == golden_cases.SMALL]


def test_the_small_cases_are_there():
    assert sorted(SMALL) == sorted(make.CASES)
    files = [path for path in golden_cases.SMALL.iterdir() if path.is_file()]
    assert len(files) == 2 * len(SMALL) + 1 and sum(path.stat().st_size for path in files) <= 500_000


@pytest.mark.parametrize("flag", [name for name, value in make.DEFAULTS.items() if isinstance(value, bool)])
def test_the_small_cases_cover_both_values_of_a_flag(flag):
    values = {json.loads((golden_cases.SMALL / f"{name}.json").read_text())["andromeda_kwargs"][flag] for name in SMALL}
    assert values == {False, True}


@pytest.mark.parametrize("name", make.CASES)
def test_x_transformers_makes_them_again(name):
    """The same weights and tokens on every machine, and the same results up to the rounding of their dtype."""
    description, tensors = make.make_case(name)
    stored = json.loads((golden_cases.SMALL / f"{name}.json").read_text())
    assert description.keys() == stored.keys()
    for key, value in stored.items():
        assert description[key] == (pytest.approx(value, abs=1e-6) if key in MEASURED else value), key
    kept = load_file(golden_cases.SMALL / f"{name}.safetensors")
    assert tensors.keys() == kept.keys()
    for key, value in kept.items():
        assert tensors[key].dtype == value.dtype
        exact = key.startswith("weights/") or not value.is_floating_point()
        limit = 0 if exact else 1e-12 if value.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(tensors[key], value, rtol=0, atol=limit, msg=lambda text, key=key: f"{key}: {text}")


def test_a_folder_without_cases_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("ANDROMEDA_GOLDEN", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="ANDROMEDA_GOLDEN must name a folder with golden cases"):
        golden_cases.find()
    (tmp_path / "large.safetensors").touch()
    assert golden_cases.find()["large"] == tmp_path
