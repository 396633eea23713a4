"""Andromeda as a transformers model.

Importing this package registers both classes, so that `AutoConfig` and `AutoModelForCausalLM` load a saved Andromeda:

    import andromeda.huggingface
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("path/to/model")
"""

from transformers import AutoConfig, AutoModelForCausalLM

from andromeda.huggingface.configuration_andromeda import AndromedaConfig
from andromeda.huggingface.modeling_andromeda import AndromedaForCausalLM

AutoConfig.register(AndromedaConfig.model_type, AndromedaConfig, exist_ok=True)
AutoModelForCausalLM.register(AndromedaConfig, AndromedaForCausalLM, exist_ok=True)

__all__ = ["AndromedaConfig", "AndromedaForCausalLM"]
