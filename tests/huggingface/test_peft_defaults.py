"""The entries that this model makes in PEFT's tables; what PEFT does with them is in tests/ecosystem/test_peft.py."""

import sys
from types import ModuleType

import pytest

from andromeda.huggingface import AndromedaConfig

LORA = "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"


@pytest.fixture
def tables(monkeypatch):
    """A function: PEFT with these tables, as if a script had imported it."""

    def install(**tables):
        monkeypatch.setitem(sys.modules, "peft.utils.constants", module := ModuleType("peft.utils.constants"))
        vars(module).update(tables)
        return tables

    return install


def test_the_entries_are_those_of_llama_in_the_names_of_this_model(tables):
    other = "TRANSFORMERS_MODELS_TO_OSF_TARGET_MODULES_MAPPING"
    found = tables(**{LORA: {"llama": ["q_proj", "v_proj"]}, other: {"llama": ["gate_proj", "up_proj", "down_proj"]}})
    AndromedaConfig().to_dict()
    assert found[LORA]["andromeda"] == ["to_q", "to_v"]
    assert found[other]["andromeda"] == ["proj_in", "proj_out"]


@pytest.mark.parametrize(
    "table",
    [
        {"llama": ["q_proj"], "andromeda": ["to_out"]},
        {"llama": ["q_proj", "something_new"]},
        {"llama": r".*\.q_proj"},
        {"gpt2": ["c_attn"]},
    ],
    ids=["there already", "an unknown name", "a pattern", "no entry to follow"],
)
def test_other_tables_stay(tables, table):
    found = tables(**{LORA: dict(table)})
    AndromedaConfig().to_dict()
    assert found[LORA] == table


def test_without_peft(monkeypatch):
    monkeypatch.delitem(sys.modules, "peft.utils.constants", raising=False)
    assert AndromedaConfig().to_dict()["model_type"] == "andromeda"
    assert "peft.utils.constants" not in sys.modules
