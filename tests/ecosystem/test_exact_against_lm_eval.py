"""`evaluate_documents` against the rolling log-likelihood of lm-eval, on the same documents."""

import math

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from andromeda import Andromeda, AndromedaTokenizer
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.training import evaluate_documents

TEXTS = [
    "def add(a, b):\n    return a + b\n" * 40,
    "naïve café ☕, " * 11,
    "a",
    " \n ",
    "".join(chr(32 + (7 * index) % 90) for index in range(700)),
]
WINDOW = 64


@pytest.fixture(scope="module")
def tokenizer():
    return AndromedaTokenizer.train(TEXTS, 300)


@pytest.fixture(scope="module", params=[{}, {"use_abs_pos_emb": True, "deepnorm": False}], ids=["defaults", "pre-norm"])
def model(request):
    torch.manual_seed(3)
    made = Andromeda(
        num_tokens=320, max_seq_len=WINDOW, dim=32, depth=2, dim_head=16, heads=2, alibi_num_heads=1, **request.param
    )
    with torch.no_grad():
        made.transformer.to_logits.weight.mul_(4)  # far from a uniform prediction
    return AndromedaForCausalLM.from_andromeda(made).eval()


def rolling(model, tokenizer, documents, **options):
    """Log-likelihoods in nats by lm-eval."""
    harness = HFLM(pretrained=model, tokenizer=tokenizer.tokenizer, device="cpu", **options)
    requests = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(documents)]
    return harness.loglikelihood_rolling(requests, disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_each_document_has_the_likelihood_of_lm_eval(model, tokenizer, batch_size):
    expected = rolling(model, tokenizer, TEXTS, batch_size=batch_size)
    found = []
    result = evaluate_documents(model, TEXTS, tokenizer=tokenizer, batch_size=batch_size, on_document=found.append)
    for document, text, likelihood in zip(found, TEXTS, expected, strict=True):
        assert document.bits_per_byte == pytest.approx(-likelihood / math.log(2) / len(text.encode()), abs=1e-5)
    size = sum(len(text.encode()) for text in TEXTS)
    assert result.bits_per_byte == pytest.approx(-sum(expected) / math.log(2) / size, abs=1e-5)
    assert result.window == WINDOW and result.tokens > 6 * WINDOW


def test_a_shorter_window_is_max_length(model, tokenizer):
    expected = rolling(model, tokenizer, TEXTS, batch_size=2, max_length=10)
    found = evaluate_documents(model, TEXTS, tokenizer=tokenizer, window=10)
    assert found.loss * found.tokens == pytest.approx(-sum(expected), rel=1e-5)


def test_the_prefix_token_of_a_tokenizer_with_bos(model, tokenizer):
    other = AndromedaTokenizer(tokenizer.tokenizer)
    other.tokenizer.bos_token = "<pad>"
    expected = rolling(model, other, TEXTS, batch_size=2)
    found = evaluate_documents(model, TEXTS, tokenizer=other)
    assert found.prefix_token_id == tokenizer.tokenizer.pad_token_id
    assert found.loss * found.tokens == pytest.approx(-sum(expected), rel=1e-5)
    assert found.loss != evaluate_documents(model, TEXTS, tokenizer=tokenizer).loss
