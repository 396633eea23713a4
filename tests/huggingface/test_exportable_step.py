"""Decoding as an exported program."""

import io

import pytest
import torch
from transformers import GenerationConfig
from transformers.integrations.executorch import convert_and_export_with_cache

from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM, ExportableStep

VOCABULARY = 29
INPUTS = {"input_ids": torch.tensor([[1]]), "cache_position": torch.tensor([0])}
PROMPT, OTHER = torch.tensor([[3, 14, 15, 9, 2]]), torch.tensor([[27, 18, 2]])


def number(value):
    return torch.tensor([value])


def new(**options):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "head_dim": 16, "alibi_num_heads": 1, "hidden_size": 32, "num_hidden_layers": 2}
    return AndromedaForCausalLM(AndromedaConfig(vocab_size=VOCABULARY, **sizes, **options)).eval()


def exported(model, strict):
    with torch.no_grad():
        return torch.export.export(ExportableStep(model, batch_size=1, max_cache_len=24), (), INPUTS, strict=strict)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_a_saved_program_answers_one_prompt_after_the_other(strict):
    model = new()
    file = io.BytesIO()
    torch.export.save(exported(model, strict), file)
    file.seek(0)
    call = torch.export.load(file).module()
    for prompt in (PROMPT, OTHER):
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        tokens = prompt[0].tolist()
        for position in range(expected.shape[1] - 1):
            logits = call(input_ids=torch.tensor([tokens[position : position + 1]]), cache_position=number(position))
            if position + 1 == len(tokens):
                tokens.append(logits[0, 0].argmax().item())
        assert tokens == expected[0].tolist()


def test_the_recipe_of_transformers_is_refused():
    model = new()
    caches = {"batch_size": 1, "max_cache_len": 24}
    model.generation_config = GenerationConfig(use_cache=True, cache_implementation="static", cache_config=caches)
    with pytest.raises(NotImplementedError, match="ExportableStep"):
        convert_and_export_with_cache(model, strict=False)


@pytest.mark.parametrize("options", [{"deepnorm": False}, {"shift_tokens": 0}, {"use_abs_pos_emb": True}], ids=str)
def test_logits_of_other_models(options):
    model = new(**options)
    call = exported(model, strict=False).module()
    with torch.no_grad():
        expected = model(PROMPT).logits
        for position, token in enumerate(PROMPT.split(1, dim=1)):
            logits = call(input_ids=token, cache_position=number(position))
            torch.testing.assert_close(logits[:, 0], expected[:, position], rtol=1e-5, atol=1e-5)


def test_longer_texts_than_a_segment_are_refused():
    with pytest.raises(ValueError, match=r"max_cache_len must be at most 2048.*float16, got 4096"):
        ExportableStep(new().half(), batch_size=1, max_cache_len=4096)
