"""Tensors with more elements than 32 bits can count: the offsets of the kernels, their grids, and refusals.

A sparse tensor takes memory only where it is accessed. The same numbers, once close together and once far apart (up to
32 GiB), must give the same bits; an offset that was computed in 32 bits is an access outside every buffer.
"""

import re

import pytest
import torch

from emulator import DeviceTensor, EmulatedExtension, Emulator
from emulator.test_mutants import HOPPER_OF_ONE, ONE_MULTIPROCESSOR, kernel_text

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 64
AXES = {"batch": 0, "seqlen": 1, "head": 2}
# Elements from the first to the last index of an axis. The lower 32 bits are those of a negative number, so that a
# truncated offset is before its buffer.
REACHES = {"2**31": 2**31 + 2**30, "2**34": 2**34 + 2**31 + 2**30}


@pytest.fixture
def emu():
    return Emulator()


class Memory:
    """Places the operands of a call close together, or far apart along one axis."""

    def __init__(self, emu, axis=None, reach=0):
        self.emu, self.axis, self.reach = emu, axis, reach
        self.generator = torch.Generator().manual_seed(0)

    def given(self, name, *shape):
        values = torch.randn(shape, generator=self.generator).bfloat16()
        if self.axis is None:
            return self.emu.tensor(values, name=name)
        tensor = self._sparse(name, shape)
        tensor.memory.copy_(values)
        return tensor

    def result(self, name, *shape):
        return self.emu.empty(shape, torch.bfloat16, name=name) if self.axis is None else self._sparse(name, shape)

    def floats(self, name, *shape, values=None):
        if values is not None:
            return self.emu.tensor(values, name=name)
        return self.emu.empty(shape, torch.float32, name=name)

    def _sparse(self, name, shape):
        strides, size = [0] * len(shape), 1
        for axis in sorted(
            range(len(shape)), key=lambda axis: (axis == self.axis, -axis)
        ):  # the axis with far elements is the outermost
            strides[axis] = size
            size *= shape[axis]
        strides[self.axis] = -(-self.reach // (shape[self.axis] - 1) // 8) * 8  # rows are aligned to 16 bytes
        return self.emu.sparse(shape, torch.bfloat16, name=name, strides=tuple(strides))


def resources(emu, direction, q, k, causal=True, **options):
    batch, seqlen_q, num_heads, head_dim = q.shape
    with emu:
        num_partials, num_semaphores, *_ = getattr(emu.extension, f"attention_{direction}_workspace")(
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=k.shape[1],
            num_heads=num_heads,
            num_kv_heads=k.shape[2],
            head_dim=head_dim,
            causal=causal,
            **options,
        )
    partials = emu.sparse((num_partials,), torch.float32, name="partials") if num_partials else None
    semaphores = torch.zeros(num_semaphores, dtype=torch.int32)
    semaphores = emu.tensor(semaphores, name="semaphores", writable=True) if num_semaphores else None
    return {"partials": partials, "semaphores": semaphores, "num_threads": 1, "stream": 0}


def attention_call(emu, q, k, v, out, softmax_lse, key_start=None):
    slopes = emu.tensor(torch.tensor([2.0**-i for i in range(q.shape[2])]), name="alibi_slopes")
    return {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "softmax_lse": softmax_lse,
        "alibi_slopes": slopes,
        "logit_bound": None,
        "key_start": key_start,
        "causal": True,
        "softmax_scale": 0.125,
    }


def operands(memory, seqlen_q, seqlen_k):
    q = memory.given("q", BATCH, seqlen_q, HEADS, HEAD_DIM)
    k, v = (memory.given(name, BATCH, seqlen_k, KV_HEADS, HEAD_DIM) for name in "kv")
    out = memory.result("out", BATCH, seqlen_q, HEADS, HEAD_DIM)
    softmax_lse = memory.floats("softmax_lse", BATCH, HEADS, seqlen_q)
    return attention_call(memory.emu, q, k, v, out, softmax_lse)


def forward(memory, seqlen_q=70, seqlen_k=90, num_splits=0):
    emu = memory.emu
    call = operands(memory, seqlen_q, seqlen_k)
    memory_of_call = resources(emu, "forward", call["q"], call["k"], num_splits=num_splits)
    EmulatedExtension(emu).attention_forward(**call, **memory_of_call, num_splits=num_splits)
    return call["out"].memory, call["softmax_lse"].cpu()


def decode(memory):
    return forward(memory, seqlen_q=2)


def decode_in_clusters(memory):
    return forward(memory, seqlen_q=2, seqlen_k=600, num_splits=9)  # two clusters


def backward(memory):
    emu, seqlen_q, seqlen_k = memory.emu, 70, 90
    call = operands(memory, seqlen_q, seqlen_k)
    extension = EmulatedExtension(emu)
    extension.attention_forward(**call, **resources(emu, "forward", call["q"], call["k"]))
    dout = memory.given("dout", BATCH, seqlen_q, HEADS, HEAD_DIM)
    dq = memory.result("dq", BATCH, seqlen_q, HEADS, HEAD_DIM)
    dk, dv = (memory.result(name, BATCH, seqlen_k, KV_HEADS, HEAD_DIM) for name in ("dk", "dv"))
    extension.attention_backward(
        **call, dout=dout, dq=dq, dk=dk, dv=dv, **resources(emu, "backward", call["q"], call["k"])
    )
    return dq.memory, dk.memory, dv.memory


def rotary_operands(memory):
    tables = torch.randn(2, 12, 32, generator=memory.generator)
    scales = torch.randn(HEADS + KV_HEADS, HEAD_DIM, generator=memory.generator)
    return {
        "q": memory.given("q", BATCH, 12, HEADS, HEAD_DIM),
        "k": memory.given("k", BATCH, 12, KV_HEADS, HEAD_DIM),
        "q_scale": memory.floats("q_scale", values=scales[:HEADS]),
        "k_scale": memory.floats("k_scale", values=scales[HEADS:]),
        "q_table": memory.floats("q_table", values=tables[0]),
        "k_table": memory.floats("k_table", values=tables[1]),
        "normalize": True,
        "num_threads": 1,
        "stream": 0,
    }


def rotary_forward(memory):
    call = rotary_operands(memory)
    q_out, k_out = (memory.result(f"{name}_out", *call[name].shape) for name in "qk")
    EmulatedExtension(memory.emu).qk_norm_rotary_forward(**call, q_out=q_out, k_out=k_out)
    return q_out.memory, k_out.memory


def rotary_backward(memory):
    call = rotary_operands(memory)
    dq_out, dk_out = (memory.given(f"d{name}_out", *call[name].shape) for name in "qk")
    dq, dk = (memory.result(f"d{name}", *call[name].shape) for name in "qk")
    partials = {
        f"d{name}_scale_partial": memory.floats(f"d{name}_scale_partial", 3, *call[f"{name}_scale"].shape)
        for name in "qk"
    }
    EmulatedExtension(memory.emu).qk_norm_rotary_backward(
        **call, dq_out=dq_out, dk_out=dk_out, dq=dq, dk=dk, **partials
    )
    return dq.memory, dk.memory, *(partial.cpu() for partial in partials.values())


def shift_operands(memory):
    batch, seqlen, dim, shift = BATCH, 12, 64, 3
    vectors = torch.randn(2, dim, generator=memory.generator)
    return {
        "x": memory.given("x", batch, seqlen, dim),
        "residual": memory.given("residual", batch, seqlen, dim),
        "residual_scale": memory.floats("residual_scale", values=vectors[0]),
        "gamma": memory.floats("gamma", values=vectors[1]),
        "key_start": None,
        "alpha": 1.5,
        "shift": shift,
        "position": 0,
        "num_threads": 1,
        "stream": 0,
    }


def shift_forward(memory):
    call = shift_operands(memory)
    history = memory.given("history", BATCH, call["shift"], 64)
    y, shifted = (memory.result(name, *call["x"].shape) for name in ("y", "shifted"))
    EmulatedExtension(memory.emu).token_shift_norm_forward(**call, history=history, y=y, shifted=shifted)
    return y.memory, shifted.memory


def shift_backward(memory):
    call = shift_operands(memory)
    given = {name: memory.given(name, *call["x"].shape) for name in ("dy", "dshifted")}
    results = {name: memory.result(name, *call["x"].shape) for name in ("dx", "dresidual")}
    partials = {name: memory.floats(name, 3, 64) for name in ("dresidual_scale_partial", "dgamma_partial")}
    EmulatedExtension(memory.emu).token_shift_norm_backward(**call, **given, **results, **partials)
    return *(result.memory for result in results.values()), *(partial.cpu() for partial in partials.values())


# Operation: its kernels, the call.
OPERATIONS = {
    "forward": (["attention_forward_kernelI13__nv_bfloat16Li64E"], forward),
    "forward on Hopper": (["attention_forward_wgmma_kernelI13__nv_bfloat16Li64E"], forward),
    "decode": (["attention_decode_kernelI13__nv_bfloat16Li64ELi1E"], decode),
    "decode, clusters": (["attention_decode_cluster_kernelI13__nv_bfloat16Li64ELi1E"], decode_in_clusters),
    "backward": (
        [f"attention_backward_{name}_kernelI13__nv_bfloat16Li64E" for name in ("dq", "dkdv", "sum")],
        backward,
    ),
    "backward on Hopper": (
        [f"attention_backward_{name}_wgmma_kernelI13__nv_bfloat16Li64E" for name in ("dq", "dkdv")],
        backward,
    ),
    "qk_norm_rotary_forward": (
        ["qk_norm_rotary_forward_kernelI13__nv_bfloat16LNS0_6AccessE0ELi1ELi2E"],
        rotary_forward,
    ),
    "qk_norm_rotary_backward": (
        ["qk_norm_rotary_backward_kernelI13__nv_bfloat16LNS0_6AccessE0ELi1E"],
        rotary_backward,
    ),
    "token_shift_norm_forward": (
        ["token_shift_norm_forward_kernelI13__nv_bfloat16LNS0_6AccessE0E"],
        shift_forward,
    ),
    "token_shift_norm_backward": (
        ["token_shift_norm_backward_kernelI13__nv_bfloat16LNS0_6AccessE0E"],
        shift_backward,
    ),
}
# Tensors of token_shift_norm have no heads.
every_axis = pytest.mark.parametrize(
    ("name", "axis"), [(name, axis) for name in OPERATIONS for axis in AXES if axis != "head" or "shift" not in name]
)


def device_for(name):
    """With one multiprocessor the decode kernel gains nothing; with many, the backward pass splits the heads,
    which the kernel of dk and dv on Hopper must not do here: it would not write them itself."""
    hopper = {"decode, clusters": "H200", "forward on Hopper": HOPPER_OF_ONE, "backward on Hopper": HOPPER_OF_ONE}
    return {"forward": ONE_MULTIPROCESSOR, **hopper}.get(name, "A100")


@pytest.mark.parametrize("reach", REACHES)
@every_axis
def test_offsets_beyond_32_bits(name, axis, reach, emu):
    emu.settings.device = device_for(name)
    kernels, call = OPERATIONS[name]
    results = call(Memory(emu, AXES[axis], REACHES[reach]))
    for kernel in kernels:
        assert any(kernel in launch.entry for launch in emu.launches), f"{kernel} was not launched"
    for far, close in zip(results, call(Memory(emu)), strict=True):
        assert torch.equal(far, close)


def in_32_bits(text):
    """A kernel whose 64-bit products are cut to 32 bits and extended again, as products of `int` would be."""
    return re.sub(
        r"^(\s*(?:mul|mad)\.lo\.[su]64\s+(%rd\d+),.*)$",
        r"\1\n shl.b64 \2, \2, 32;\n shr.s64 \2, \2, 32;",
        text,
        flags=re.MULTILINE,
    )


@every_axis
def test_products_in_32_bits_are_found(name, axis, emu):
    """As an access outside every buffer, or as wrong numbers if another huge tensor is at that address."""
    emu.settings.device = device_for(name)
    kernels, call = OPERATIONS[name]
    right = call(Memory(emu))
    for kernel in kernels:
        entry, text = kernel_text(emu.ptx_texts(), kernel)
        with emu.replaced(entry, in_32_bits(text)):
            try:
                results = call(Memory(emu, AXES[axis], REACHES["2**34"]))
            except AssertionError as error:
                assert "[out-of-bounds]" in str(error)
            else:
                assert not all(map(torch.equal, results, right)), f"{kernel}: nothing was found"
        emu.reports.clear()


def test_more_heads_than_y_and_z_of_a_grid_hold(emu):
    """Blocks are counted along x. Only two of them run."""
    emu.settings.device, emu.settings.blocks = ONE_MULTIPROCESSOR, (0, 69_999)
    q, k, v = (emu.sparse((1, 200 if name == "q" else 2, 70_000, 8), torch.bfloat16, name=name) for name in "qkv")
    out = emu.sparse(q.shape, torch.bfloat16, name="out")
    softmax_lse = emu.sparse((1, 70_000, 200), torch.float32, name="softmax_lse")
    call = attention_call(emu, q, k, v, out, softmax_lse)
    with emu:
        emu.extension.attention_forward(**call, **resources(emu, "forward", q, k))
    emu.assert_clean()
    assert tuple(emu.launches[-1].grid) == (140_000, 1, 1)


@pytest.fixture
def row(emu):
    """The memory of every operand: each is this row, expanded."""
    return emu.tensor(torch.zeros(64, dtype=torch.bfloat16), name="row")


def expanded(row, batch, seqlen):
    return DeviceTensor(row.data_ptr(), (batch, seqlen, 1, 64), (0, 0, 0, 1), torch.bfloat16)


def test_a_grid_beyond_its_limit_is_refused(emu, row):
    batch, seqlen = 2**31 - 1, 200
    q, k = (expanded(row, batch, n) for n in (seqlen, 1))
    softmax_lse = DeviceTensor(row.data_ptr(), (batch, 1, seqlen), (seqlen, seqlen, 1), torch.float32)
    with emu, pytest.raises(ValueError, match=r"attention_forward: batch=2147483647, .* more than a grid can have"):
        emu.extension.attention_forward(
            **attention_call(emu, q, k, k, q, softmax_lse), partials=None, semaphores=None, num_threads=1, stream=0
        )
    assert emu.launches == []


LONGEST = 2**31 - 256  # kMaxAttentionSeqlen, kMaxSeqlen
TOO_LONG = [("seqlen_q", LONGEST + 1, 1), ("seqlen_k", 1, LONGEST + 1)]


@pytest.mark.parametrize(("name", "seqlen_q", "seqlen_k"), TOO_LONG)
def test_positions_beyond_an_int_are_refused_by_attention(name, seqlen_q, seqlen_k, emu, row):
    sizes = {"batch": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 64, "causal": True}
    refused = rf"{name} must be at most 2147483392 on CUDA, got 2147483393"
    q, k = (expanded(row, 1, n) for n in (seqlen_q, seqlen_k))
    softmax_lse = DeviceTensor(row.data_ptr(), (1, 1, seqlen_q), (seqlen_q, seqlen_q, 1), torch.float32)
    call = attention_call(emu, q, k, k, q, softmax_lse)
    memory = {"partials": None, "semaphores": None, "num_threads": 1, "stream": 0}
    with emu:
        emu.extension.attention_forward_workspace(
            seqlen_q=min(seqlen_q, LONGEST), seqlen_k=min(seqlen_k, LONGEST), **sizes
        )
        for direction, gradients in (("forward", {}), ("backward", {"dout": q, "dq": q, "dk": k, "dv": k})):
            with pytest.raises(ValueError, match=refused):
                getattr(emu.extension, f"attention_{direction}_workspace")(
                    seqlen_q=seqlen_q, seqlen_k=seqlen_k, **sizes
                )
            with pytest.raises(ValueError, match=refused):
                getattr(emu.extension, f"attention_{direction}")(**call, **gradients, **memory)
    assert emu.launches == []


@pytest.mark.parametrize("operand", "qk")
def test_positions_beyond_an_int_are_refused_by_qk_norm_rotary(operand, emu, row):
    lengths = dict.fromkeys("qk", 1) | {operand: LONGEST + 1}
    tensors = {name: expanded(row, 1, lengths[name.removesuffix("_out")]) for name in ("q", "k", "q_out", "k_out")}
    tables = dict.fromkeys(("q_scale", "k_scale", "q_table", "k_table"))
    with emu, pytest.raises(ValueError, match="seqlen must be at most 2147483392 on CUDA, got 2147483393"):
        emu.extension.qk_norm_rotary_forward(**tensors, **tables, normalize=True, num_threads=1, stream=0)
    assert emu.launches == []
