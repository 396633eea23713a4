"""Finished tiny runs and a tokenizer, made once for all training tests."""

import pytest
from tiny_run import TEXTS, Rows, new_model, settings, weights

from andromeda import AndromedaTokenizer
from andromeda.training import train


@pytest.fixture(scope="session")
def tokenizer():
    return AndromedaTokenizer.train(TEXTS, 300)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """Weights after 8 steps in one go."""
    model = new_model()
    train(model, Rows(), settings(tmp_path_factory.mktemp("whole")))
    return weights(model)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A finished run with its checkpoints of steps 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("checkpoints")
    train(new_model(), Rows(), settings(folder, keep=9))
    return folder
