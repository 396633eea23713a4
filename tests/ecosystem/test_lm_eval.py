"""lm-eval on Andromeda, beside a Llama of the same size: its figures are those of plain calls, for any batch size."""

import json
import math

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM

END = 1
WINDOW = 32
SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": END,
}
DOCUMENTS = ["the cat sat", "a dog on the mat, and then it went to sleep in the sun until dusk", "é", "so it goes on"]
QUESTIONS = [
    {"question": "the cat", "choices": [" sat", " flew away"], "label": 0},
    {"question": "a dog on the", "choices": [" mat", " sun", " moon"], "label": 1},
    {"question": "so", "choices": [" it goes", " what"], "label": 0},
    {"question": "until dusk it", "choices": [" slept", " barked"], "label": 1},
]
FAMILIES = pytest.mark.parametrize("family", ["andromeda", "llama"])


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The names of three tasks on local files, and the manager that knows them."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in {"documents": [{"text": text} for text in DOCUMENTS], "questions": QUESTIONS}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {
        "rolling": {
            "data": "documents",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "choice": {
            "data": "questions",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "generation": {
            "data": "questions",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[label]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, kind in kinds.items():
        data = str(folder / f"{kind.pop('data')}.jsonl")
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": data}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **kind}))  # YAML contains JSON
    return list(kinds), TaskManager(include_path=str(folder), include_defaults=False)


def new_model(family):
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=64)).eval()
    return AndromedaForCausalLM(AndromedaConfig(**SIZES, alibi_num_heads=2)).eval()


@torch.no_grad()
def log_likelihoods(model, ids):
    """log p of each token but the first, (n - 1,)."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    return -functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")


def rolling(model, ids):
    """Windows that do not overlap but for the token that each begins with, the last one filled up to the left."""
    ids, total, start = [END, *ids], 0.0, 1
    while start < len(ids):
        stop = min(start + WINDOW, len(ids))
        first = start - 1 if stop - start == WINDOW or start == 1 else max(0, stop - WINDOW - 1)
        total += log_likelihoods(model, ids[first:stop])[start - stop :].sum().item()
        start = stop
    return total


@FAMILIES
def test_tasks(family, tasks, tokenizer):
    names, manager = tasks
    model = new_model(family)
    results = {}
    for batch_size in (1, 4):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=WINDOW)
        results[batch_size] = simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0)
    ones, fours = (
        {name: [sample["filtered_resps"] for sample in result["samples"][name]] for name in names}
        for result in results.values()
    )
    assert ones["generation"] == fours["generation"]
    assert all(len(text) > 0 for (text,) in ones["generation"])
    for name in ("rolling", "choice"):
        for one, four in zip(ones[name], fours[name], strict=True):
            assert torch.tensor(one).flatten().tolist() == pytest.approx(
                torch.tensor(four).flatten().tolist(), abs=1e-4
            )

    expected = [rolling(model, tokenizer(text).input_ids) for text in DOCUMENTS]
    assert [value for (value,) in ones["rolling"]] == pytest.approx(expected, abs=1e-3)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    found = results[1]["results"]["rolling"]["bits_per_byte,none"]
    assert found == pytest.approx(-sum(expected) / size / math.log(2), abs=1e-3)

    for question, responses in zip(QUESTIONS, ones["choice"], strict=True):
        ids = tokenizer(question["question"]).input_ids
        for text, (value, _) in zip(question["choices"], responses, strict=True):
            choice = tokenizer(text).input_ids
            likelihood = log_likelihoods(model, ids + choice)[-len(choice) :].sum().item()
            assert value == pytest.approx(likelihood, abs=1e-3)

    for question, (text,) in zip(QUESTIONS, ones["generation"], strict=True):
        ids = torch.tensor([tokenizer(question["question"]).input_ids])
        greedy = model.generate(ids, max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(ids))
        assert tokenizer.decode(greedy[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0] == text


@FAMILIES
def test_a_saved_model(family, tasks, tokenizer, tmp_path):
    """`lm_eval --model hf --model_args pretrained=DIR`, here in a process that has imported the package."""
    _, manager = tasks
    model = new_model(family)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = {"model_args": f"pretrained={tmp_path},dtype=float32", "tasks": ["rolling"], "task_manager": manager}
    result = simple_evaluate("hf", **arguments, device="cpu", batch_size=2, bootstrap_iters=0)
    expected = sum(rolling(model, tokenizer(text).input_ids) for text in DOCUMENTS)
    size = sum(len(text.encode()) for text in DOCUMENTS)
    found = result["results"]["rolling"]["bits_per_byte,none"]
    assert found == pytest.approx(-expected / size / math.log(2), abs=1e-3)
