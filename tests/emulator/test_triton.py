"""Kernels of the tests' own that Triton compiles run in the emulator: a second opinion on layouts and opcodes."""

import math

import pytest
import torch

from emulator import Emulator, triton_driver

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

BLOCK = 64


@triton.jit
def softmax_kernel(out, values, columns, kBlock: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, kBlock)
    inside = column < columns
    x = tl.load(values + row * columns + column, mask=inside, other=-float("inf")).to(tl.float32)
    weights = tl.exp(x - tl.max(x, 0))
    tl.store(out + row * columns + column, (weights / tl.sum(weights, 0)).to(tl.bfloat16), mask=inside)


@triton.jit
def attention_kernel(out, q, k, v, seqlen, scale, kBlock: tl.constexpr, kHeadDim: tl.constexpr):
    query = tl.program_id(0) * kBlock + tl.arange(0, kBlock)
    channel = tl.arange(0, kHeadDim)
    q_tile = tl.load(q + query[:, None] * kHeadDim + channel[None, :], mask=query[:, None] < seqlen, other=0.0)
    largest = tl.full((kBlock,), -float("inf"), tl.float32)
    total = tl.zeros((kBlock,), tl.float32)
    sums = tl.zeros((kBlock, kHeadDim), tl.float32)
    for start in range(0, seqlen, kBlock):
        key = start + tl.arange(0, kBlock)
        k_tile = tl.load(k + key[:, None] * kHeadDim + channel[None, :], mask=key[:, None] < seqlen, other=0.0)
        v_tile = tl.load(v + key[:, None] * kHeadDim + channel[None, :], mask=key[:, None] < seqlen, other=0.0)
        scores = tl.where(key[None, :] < seqlen, tl.dot(q_tile, tl.trans(k_tile)) * scale, -float("inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_largest[:, None])
        rescale = tl.exp2(largest - new_largest)
        total = total * rescale + tl.sum(weights, 1)
        sums = tl.dot(weights.to(tl.bfloat16), v_tile, sums * rescale[:, None])
        largest = new_largest
    sums = sums / total[:, None]
    tl.store(out + query[:, None] * kHeadDim + channel[None, :], sums.to(tl.bfloat16), mask=query[:, None] < seqlen)


devices = pytest.mark.parametrize("device", ["A100", "H200"])


@devices
def test_softmax(device):
    values = torch.randn(3, 200).bfloat16()
    out = torch.empty_like(values)
    with triton_driver.active(Emulator(device=device)):
        softmax_kernel[(3,)](out, values, 200, kBlock=256, enable_fp_fusion=True)
    torch.testing.assert_close(out.float(), values.float().softmax(1), rtol=2**-8, atol=0)


@pytest.mark.parametrize("schedule", ["fifo", "random"])
@devices
def test_attention(device, schedule):
    seqlen, head_dim = 300, 64
    q, k, v = (torch.randn(seqlen, head_dim).bfloat16() for _ in range(3))
    out = torch.empty_like(q)
    with triton_driver.active(Emulator(device=device, schedule=schedule)):
        program = attention_kernel[(-(-seqlen // BLOCK),)](
            out, q, k, v, seqlen, head_dim**-0.5 / math.log(2), BLOCK, head_dim, num_stages=3, enable_fp_fusion=True
        )
    instruction = "wgmma" if device == "H200" else "mma.sync"
    assert instruction in program.asm["ptx"]
    exact = (q.double() @ k.double().T * head_dim**-0.5).softmax(1) @ v.double()
    error = (out.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.median() < 0.58 * 2**-8
    assert error.max() < 1.25 * 2**-8
