"""`from_pretrained` of an adapter checks the model that the adapter belongs to."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM


def test_the_model_of_an_adapter_is_checked(tmp_path):
    config = AndromedaConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8, alibi_num_heads=2
    )
    AndromedaForCausalLM(config).save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    adapted = get_peft_model(base, LoraConfig(target_modules=["to_q"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(1, 9)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(ids).logits, adapted(ids).logits)
    weights = tmp_path / "model" / "model.safetensors"
    state = load_file(weights)
    del state["transformer.token_emb.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: transformer\.token_emb\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"drawn anew: transformer\.token_emb\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", strict=False)
