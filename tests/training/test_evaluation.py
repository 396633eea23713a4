"""Loss, perplexity and bits per byte of a model."""

import math
from unittest import mock

import pytest
import torch
from tiny_run import TEXTS, Rows, new_model

from andromeda import AndromedaTokenizer
from andromeda.training import evaluate, nonfinite_parameters, token_bytes


def test_an_evaluation_never_gives_nan():
    model = new_model()
    with torch.no_grad():
        model.transformer.to_logits.weight.fill_(3e38)
    assert nonfinite_parameters(model) == []
    with pytest.raises(FloatingPointError, match=r"the loss must be finite, got (nan|inf) in the rows from 0 on"):
        evaluate(model, Rows())


def test_evaluation_is_the_mean_over_tokens(tokenizer):
    class Uneven(Rows):
        def __getitem__(self, index):
            row = super().__getitem__(index)
            row["labels"][2 + index % 10 :] = -100
            return row

    model, rows = new_model(), Uneven(7)
    total, count, size = 0.0, 0, 0
    widths = token_bytes(tokenizer)
    for index in range(7):
        row = rows[index]
        logits = model(row["input_ids"][None]).double()[0, :-1].log_softmax(-1)
        for position, target in enumerate(row["labels"][1:].tolist()):
            if target != -100:
                total -= logits[position, target].item()
                count += 1
                size += widths[target].item()
    found = evaluate(model, rows, tokenizer=tokenizer, batch_size=3)
    assert found.tokens == count and found.bytes == size
    assert found.loss == pytest.approx(total / count, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert evaluate(model, rows).bits_per_byte is None
    assert evaluate(model, rows, max_rows=2).tokens < count


def test_evaluation_needs_no_logits():
    with mock.patch("andromeda.huggingface.modeling_andromeda.kept_positions", side_effect=AssertionError("logits")):
        assert math.isfinite(evaluate(new_model(), Rows()).loss)


def test_evaluation_without_targets_is_refused():
    class Ignored(Rows):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "labels": torch.full((12,), -100)}

    with pytest.raises(ValueError, match="must have a token to predict"):
        evaluate(new_model(), Ignored())


def test_token_bytes_are_those_of_the_text(tokenizer):
    widths = token_bytes(tokenizer)
    for text in TEXTS[:3]:
        ids = tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert widths[ids].sum().item() == len(text.encode())
    assert widths[tokenizer.tokenizer.eos_token_id] == 0


def test_token_bytes_are_unknown_without_a_byte_level_tokenizer():
    from tokenizers import Tokenizer, models

    words = AndromedaTokenizer(Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")))
    assert token_bytes(words) is None
