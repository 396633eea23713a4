"""Andromeda as a transformers model.

Importing this package registers its classes, so that `AutoConfig` and `AutoModelForCausalLM` load a saved Andromeda:

    import andromeda.huggingface
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("path/to/model")
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from andromeda.huggingface.cache_andromeda import AndromedaCache, AndromedaStaticCache
from andromeda.huggingface.configuration_andromeda import AndromedaConfig
from andromeda.huggingface.exportable_step import ExportableStep
from andromeda.huggingface.modeling_andromeda import (
    AndromedaForCausalLM,
    AndromedaForSequenceClassification,
    AndromedaForTokenClassification,
    AndromedaModel,
)

AutoConfig.register(AndromedaConfig.model_type, AndromedaConfig, exist_ok=True)
AutoModel.register(AndromedaConfig, AndromedaModel, exist_ok=True)
AutoModelForCausalLM.register(AndromedaConfig, AndromedaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(AndromedaConfig, AndromedaForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(AndromedaConfig, AndromedaForTokenClassification, exist_ok=True)
# Trainer shifts the labels for label smoothing only for the classes named here; model cards and servers look here, too.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[AndromedaConfig.model_type] = AndromedaForCausalLM.__name__

__all__ = [
    "AndromedaCache",
    "AndromedaConfig",
    "AndromedaForCausalLM",
    "AndromedaForSequenceClassification",
    "AndromedaForTokenClassification",
    "AndromedaModel",
    "AndromedaStaticCache",
    "ExportableStep",
]
