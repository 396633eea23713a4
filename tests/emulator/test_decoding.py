"""`generate` with the CUDA kernels in the emulator: steps whose positions and lengths are read on the device."""

import numerics
import oracle
import pytest
import torch
from generation import test_steps

from andromeda import Andromeda
from andromeda.model import TransformerWrapper
from andromeda.ops import attention as attention_op

on_gpu, graph_memory = test_steps.on_gpu, TransformerWrapper.graph_memory
SIZES = dict(num_tokens=50, max_seq_len=400, dim=32, depth=2, dim_head=16, heads=4, alibi_num_heads=2)


def model_of(**arguments):
    torch.manual_seed(0)
    model = Andromeda(**SIZES | arguments).bfloat16()
    oracle.perturb(model)
    return model


@pytest.mark.parametrize(
    ("arguments", "prompts", "count"),
    [
        ({}, [list(range(20)), [3] * 150], 40),  # padding, several splits of the keys
        ({"shift_tokens": 2, "attn_one_kv_head": False}, [[1, 2, 3]], 30),
        ({"max_seq_len": 40, "deepnorm": False}, [list(range(33))], 30),  # the window moves
    ],
    ids=("padding", "heads", "window"),
)
def test_steps_of_the_kernels(arguments, prompts, count, emulated, on_gpu, monkeypatch):
    monkeypatch.setattr(attention_op, "NUM_SPLITS", 2 if len(prompts) > 1 else 0)
    check_steps(model_of(**arguments), prompts, count, on_gpu, monkeypatch)


def test_steps_of_the_triton_kernels(emulated_triton, on_gpu, monkeypatch):
    monkeypatch.setattr(attention_op, "NUM_SPLITS", 2)
    check_steps(model_of(), [[1, 2, 3], [3] * 130], 12, on_gpu, monkeypatch)


def check_steps(model, prompts, count, on_gpu, monkeypatch):
    """With a graph and without the same bits, and those of ordinary calls up to rounding."""
    monkeypatch.setattr(TransformerWrapper, "graph_memory", graph_memory)  # the real one
    with numerics.nan_filled():
        found = [test_steps.with_logits(model, prompts, count, cuda_graph=graph) for graph in (True, False)]
    assert all(map(torch.equal, *found)) and on_gpu.replays > count / 2
    monkeypatch.setattr(TransformerWrapper, "graph_memory", lambda net, keys: None)
    expected = test_steps.with_logits(model, prompts, count)
    # Ordinary calls round otherwise, and a sample may then be another one: compare up to the first such token.
    (new, logits), (other_new, other_logits) = found[0], expected
    agree = (new == other_new).all(0).int().cumprod(0).sum()
    assert agree >= 3
    assert (logits[: agree + 1] - other_logits[: agree + 1]).abs().max() < 0.05
