"""What a card says, in a form that the hub reads, and that it never replaces one of the user's."""

import pytest
import torch
from huggingface_hub import ModelCard

from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM, AndromedaForSequenceClassification
from andromeda.huggingface.model_card import CARD, is_foreign_card, model_card, write_model_card

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "alibi_num_heads": 1}


def config():
    return AndromedaConfig(vocab_size=300, max_position_embeddings=64, **SIZES)


@pytest.fixture(scope="module")
def model():
    return AndromedaForCausalLM(config())


def row(card, name):
    """The value beside a name in a table."""
    (line,) = [line for line in card.text.splitlines() if line.startswith(f"| {name} |")]
    return line.split("|")[2].strip()


def test_metadata_and_figures(model):
    training = {"steps": 2000, "tokens": 8_192_000, "learning_rate": 0.0003, "data": "a | b\nc"}
    evaluation = {"loss": 2.123456, "bits_per_byte": 1.0625, "tokens": 4000}
    card = model_card(
        model, name="me/tiny", training=training, evaluation=evaluation, evaluated_on="books", tags=["toy"]
    )
    data = ModelCard(str(card)).data  # as the hub reads it
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert {"andromeda", "custom_code", "toy"} <= {*data.tags}
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "loss": 2.1235,
        "bits_per_byte": 1.0625,
    }
    assert data.eval_results[0].dataset_name == "books" and data.model_name == "tiny"
    assert (
        row(card, "steps") == "2,000"
        and "| tokens | 8,192,000 |" in card.text
        and "| tokens | 4,000 |" in card.text
        and row(card, "loss") == "2.123"
    )
    assert row(card, "learning rate") == "0.0003" and r"| a \| b c |" in card.text
    assert row(card, "parameters") == f"{sum(p.numel() for p in model.parameters()):,}"
    assert row(card, "width") == "16" and row(card, "positions") == "ALiBi, rotary xPos"


def test_ways_to_load(model):
    card = model_card(model)
    assert 'AndromedaForCausalLM.from_pretrained("path/to/this/folder")' in card.text
    assert 'AutoModelForCausalLM.from_pretrained("path/to/this/folder", trust_remote_code=True)' in card.text
    assert "andromeda generate path/to/this/folder" in card.text and "model-index" not in str(card)
    assert "hf download me/tiny --local-dir model" in model_card(model, name="me/tiny").text
    card = model_card(AndromedaForSequenceClassification(config()))
    assert "AutoModelForSequenceClassification.from_pretrained" in card.text and "andromeda generate" not in card.text
    assert card.data.pipeline_tag == "text-classification"


def test_parameters_of_a_model_on_the_device_meta_or_of_half_size(model):
    with torch.device("meta"):
        other = AndromedaForCausalLM(config()).to(torch.bfloat16)
    assert row(model_card(other), "parameters") == row(model_card(model), "parameters")
    assert row(model_card(other), "dtype") == "bfloat16"


def test_a_card_is_replaced_until_somebody_changes_it(model, tmp_path):
    path = tmp_path / CARD
    assert not is_foreign_card(path)
    assert write_model_card(tmp_path, model_card(model, training={"steps": 1}))
    assert write_model_card(tmp_path, model_card(model, training={"steps": 2}))
    text = path.read_text()
    assert "| steps | 2 |" in text and ModelCard.load(path).data.library_name == "transformers"
    path.write_text(text.replace("decoder-only", "remarkable"))
    assert not write_model_card(tmp_path, model_card(model)) and "remarkable" in path.read_text()


@pytest.mark.parametrize("text", [b"", b"# Mine\n", b"\xff\xfe"], ids=["empty", "text", "not UTF-8"])
def test_a_card_of_the_user_stays(model, tmp_path, text):
    (tmp_path / CARD).write_bytes(text)
    assert not write_model_card(tmp_path, model_card(model))
    assert (tmp_path / CARD).read_bytes() == text
