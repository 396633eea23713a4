"""The logits of a training step: computed if somebody reads them."""

import pytest
import torch
from torch import nn
from torch.utils import _pytree

from andromeda.huggingface.outputs import TrainingOutput, UnreadLogits


class CountedHead(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.fixture
def head():
    torch.manual_seed(0)
    return CountedHead(4, 7)


@pytest.fixture
def output(head):
    features = torch.randn(2, 3, 4, requires_grad=True)
    return TrainingOutput(loss=features.sum(), logits=UnreadLogits(head, features))


READERS = {
    "attribute": lambda out: out.logits,
    "name": lambda out: out["logits"],
    "number": lambda out: out[1],
    "slice": lambda out: out[1:][0],
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_reading_computes_them_once(read, output, head):
    assert head.calls == 0 and len(output.to_tuple()) == 1 and output[0] is output.loss
    assert head.calls == 0
    logits = read(output)
    assert logits.shape == (2, 3, 7) and logits.requires_grad
    assert read(output) is logits and head.calls == 1


def test_gradients_are_recorded_where_they_are_needed(output, head):
    with torch.no_grad():
        assert not output.logits.requires_grad
    output.logits.sum().backward()
    assert head.weight.grad is not None and head.calls == 2


def test_copies_can_read_them(output, head):
    """accelerate and torch make a new output from the entries of this one."""
    leaves, structure = _pytree.tree_flatten(output)
    for copy in (_pytree.tree_unflatten(leaves, structure), type(output)(dict(output.items()))):
        assert copy.logits.shape == (2, 3, 7) and copy.loss is output.loss
    assert head.calls == 1


def test_autocast_of_the_forward_pass(head):
    features = torch.randn(2, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = TrainingOutput(loss=features.sum(), logits=UnreadLogits(head, features))
    assert output.logits.dtype == torch.bfloat16


def test_ordinary_logits_and_none():
    logits = torch.ones(1, 2, 3)
    assert TrainingOutput(loss=torch.ones(()), logits=logits).logits is logits
    assert TrainingOutput(loss=torch.ones(())).logits is None
