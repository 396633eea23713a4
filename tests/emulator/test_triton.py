"""Kernels that Triton compiles without a GPU run in the emulator: a second opinion on layouts and opcodes."""

import math

import pytest
import torch

from emulator import Emulator

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


def compiled(kernel, signature, constants, architecture, **options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = signature | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if signature[name][0] == "*"}
    source = ASTSource(kernel, types, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def launch(emu, program, name, grid, arguments):
    """Run the kernel. A missing proxy fence between cp.async and wgmma is allowed: Triton omits it on Hopper."""
    # The compiled kernel has two further parameters: scratch memory of the launch and of profiling.
    parameters, metadata = (*arguments, 0, 0), program.metadata
    emu.run_ptx(program.asm["ptx"], name, grid, 32 * metadata.num_warps, parameters, metadata.shared)
    assert [report for report in emu.reports if report.kind != "proxy" or "wgmma" not in report.text] == []


@pytest.mark.parametrize("architecture", [80, 90])
def test_softmax(architecture):
    signature = {"out": "*bf16", "values": "*bf16", "columns": "i32"}
    program = compiled(softmax_kernel, signature, {"kBlock": 256}, architecture)
    values = torch.randn(3, 200).bfloat16()
    emu = Emulator()
    out = emu.empty(values.shape, values.dtype, name="out")
    launch(emu, program, "softmax_kernel", 3, (out, emu.tensor(values, name="values"), 200))
    torch.testing.assert_close(out.cpu().float(), values.float().softmax(1), rtol=2**-8, atol=0)


@pytest.mark.parametrize("schedule", ["fifo", "random"])
@pytest.mark.parametrize("architecture", [80, 90])
def test_attention(architecture, schedule):
    seqlen, head_dim = 300, 64
    signature = dict.fromkeys(("out", "q", "k", "v"), "*bf16") | {"seqlen": "i32", "scale": "fp32"}
    constants = {"kBlock": BLOCK, "kHeadDim": head_dim}
    program = compiled(attention_kernel, signature, constants, architecture, num_stages=3)
    instruction = "wgmma" if architecture == 90 else "mma.sync"
    assert instruction in program.asm["ptx"]
    q, k, v = (torch.randn(seqlen, head_dim).bfloat16() for _ in range(3))
    emu = Emulator(schedule=schedule)
    out = emu.empty(q.shape, q.dtype, name="out")
    given = [emu.tensor(tensor, name=name) for tensor, name in ((q, "q"), (k, "k"), (v, "v"))]
    grid = -(-seqlen // BLOCK)
    launch(emu, program, "attention_kernel", grid, (out, *given, seqlen, head_dim**-0.5 / math.log(2)))
    exact = (q.double() @ k.double().T * head_dim**-0.5).softmax(1) @ v.double()
    error = (out.cpu().double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.median() < 0.58 * 2**-8
    assert error.max() < 1.25 * 2**-8
