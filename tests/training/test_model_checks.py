"""Models that cannot be saved and loaded again are not trained."""

import pytest
import torch
from tiny_run import SIZES, Rows, new_model, settings

from andromeda import Andromeda
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.training import train
from andromeda.training.model_checks import check_saveable


class OwnEmbedding(torch.nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens) * 2


def own_embedding():
    class Provider:
        def get_embedding(self, num_tokens, dim):
            return OwnEmbedding(num_tokens, dim)

    return Andromeda(**SIZES, embedding_provider=Provider())


def on_meta():
    with torch.device("meta"):
        return Andromeda(**SIZES)


def with_another_module():
    model = new_model()
    model.transformer.extra = torch.nn.Linear(2, 2)
    return model


def with_another_shape():
    model = new_model()
    model.transformer.to_logits = torch.nn.Linear(16, 321, bias=False)
    return model


@pytest.mark.parametrize("make", [own_embedding, on_meta, with_another_module, with_another_shape])
def test_a_model_that_cannot_be_saved_is_not_trained(tmp_path, make):
    with pytest.raises(ValueError, match="the model must be one that can be saved and loaded again, with"):
        train(make(), Rows(), settings(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_compiled_part_can_be_saved():
    """It is saved under its own name, without the wrapper's."""
    model = new_model()
    model.transformer.to_logits = torch.compile(model.transformer.to_logits)
    check_saveable(AndromedaForCausalLM.from_andromeda(model), None)


def test_ties_that_cannot_be_saved_are_refused_before_the_training(tmp_path):
    torch.manual_seed(5)
    model = Andromeda(**{**SIZES, "depth": 2})
    first, second = (model.transformer.attn_layers.layers[index].fn for index in (0, 2))
    second.to_q.weight = first.to_q.weight
    state = torch.get_rng_state()
    with pytest.raises(
        ValueError, match=r"share one tensor \(transformer.*layers.0.fn.to_q.weight = .*layers.2.fn.to_q"
    ):
        train(model, Rows(), settings(tmp_path))
    assert list(tmp_path.iterdir()) == [] and torch.equal(torch.get_rng_state(), state)
