"""Models of either format are loaded from a folder; a training step is measured."""

import json

import pytest
import torch
from tiny_run import SIZES, Rows, new_model

from andromeda import Andromeda
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.training import MANIFEST, collate, load_saved_model, seconds_per_step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("save", ["save", "save_pretrained"])
def test_both_formats(tmp_path, save, dtype):
    model = new_model() if save == "save" else AndromedaForCausalLM.from_andromeda(new_model())
    getattr(model, save)(tmp_path / "model")
    loaded = load_saved_model(tmp_path / "model", "cpu", dtype)
    assert not loaded.training
    expected = model.transformer.state_dict()
    for name, value in loaded.transformer.state_dict().items():
        assert value.dtype == dtype and torch.equal(value, expected[name].to(dtype)), name


def test_damage_is_found_before_the_weights_are_read(tmp_path):
    new_model().save(tmp_path / "model")
    (tmp_path / "model" / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=f"{MANIFEST} is damaged"):
        load_saved_model(tmp_path / "model", "cpu", torch.float32)


def test_a_config_that_describes_no_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "andromeda", "hidden_size": 0}))
    with pytest.raises(ValueError, match=r"config.json describes no model: .*"):
        load_saved_model(tmp_path, "cpu", torch.float32)


def test_seconds_per_step():
    rows = Rows()
    assert 1e-5 < seconds_per_step(Andromeda(**SIZES), collate([rows[0], rows[1]])) < 30
