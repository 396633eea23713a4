"""The target modules that PEFT takes where a config of it names none, such as `LoraConfig()`.

PEFT has a table per method, from a model type to names of modules, and no other place to ask. The entries for this
model are those for Llama in its names. PEFT is not imported here: whoever calls it has imported it.
"""

import sys

_OURS = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "o_proj": "to_out",
    "gate_proj": "proj_in",
    "up_proj": "proj_in",
    "down_proj": "proj_out",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
    "norm": "final_norm",
}


def register(model_type: str) -> None:
    """Complete the tables of PEFT, if it is imported, for this model type; entries that are there stay."""
    constants = sys.modules.get("peft.utils.constants")
    for name, table in list(vars(constants).items()) if constants else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            modules = [_OURS.get(module) for module in table["llama"]]
            if None not in modules:
                table.setdefault(model_type, list(dict.fromkeys(modules)))


__all__ = ["register"]
