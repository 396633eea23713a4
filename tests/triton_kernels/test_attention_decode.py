"""The Triton kernels of attention for few query rows, in the emulator: packed heads, splits of the keys, their sum."""

import dataclasses
import math

import pytest
import test_attention as whole
import torch
from emulator.test_attention import HIDDEN, alternate, check_visible_numbers, check_windows_skip_far_keys, small
from op_cases import BFLOAT16, FLOAT32, make
from test_attention import bounded, check_forward
from triton_kernels.test_attention_forward import CPU, emulate, gpu, on_devices_in_turn, place_far_apart

from andromeda.ops import attention as op
from andromeda.ops.attention import attention

__all__ = ["gpu"]  # a fixture

KERNELS = ["attention_decode_kernel", "add_splits_kernel"]

# Tiles have 16, 32 or 64 rows; 24 heads and 3 tokens are 72.
CASES = [small(seqlen_q=1, seqlen_k=n) for n in (1, 64, 65, 300)]
CASES += [small(seqlen_q=n, seqlen_k=150, num_heads=24) for n in (1, 2, 3)]
CASES += [
    small(batch=2, seqlen_q=3, seqlen_k=300, num_heads=6, num_kv_heads=2, mask=mask, causal=causal)
    for mask in ("documents", "padding", "window", "ahead", "blind")
    for causal in (True, False)
]
CASES += [
    small(batch=2, seqlen_q=2, seqlen_k=200, num_heads=6, alibi="none", causal=causal) for causal in (True, False)
]
CASES += [small(batch=2, seqlen_q=3, seqlen_k=150, num_heads=6, layout=layout) for layout in ("transposed", "slice")]
CASES += [small(seqlen_q=5, seqlen_k=3, num_heads=2, num_kv_heads=2)]  # rows that see nothing
CASES += [
    small(seqlen_q=1, seqlen_k=300, num_heads=5, head_dim=d, dtype=dtype)
    for dtype in (BFLOAT16, FLOAT32)
    for d in (16, 40, 128, 256)
]


@pytest.mark.parametrize("case, device", on_devices_in_turn(alternate(CASES[:19]) + CASES[19:]))
def test_matches_the_reference(case, device, emulated_triton):
    emulated_triton.settings.device = device
    emulate(emulated_triton, case)
    check_forward(make(case, CPU), "triton", values=whole.rules_for(case, "triton"))
    num_launches = 2 if case.seqlen_k > 3 * 64 else 1  # a split has at least two tiles of keys
    assert [launch.kernel for launch in emulated_triton.launches] == KERNELS[:num_launches]


SPLIT_CASES = [dataclasses.replace(case, head_dim=64, dtype=BFLOAT16) for case in whole.SPLIT_CASES[::2]]


@pytest.mark.parametrize("num_splits", [0, 3])
@pytest.mark.parametrize(
    ("case", "counts"),
    [(case, counts) for case, counts in whole.NUM_KEYS_CASES if case.head_dim == 64 and case.dtype == BFLOAT16],
    ids=str,
)
def test_num_keys(case, counts, num_splits, gpu, monkeypatch):
    monkeypatch.setattr(op, "NUM_SPLITS", num_splits)
    for count in counts:
        whole.check_num_keys(case, count, "triton", CPU)


def test_num_keys_in_the_kernel_for_many_queries(gpu, monkeypatch):
    monkeypatch.setattr(op, "NUM_SPLITS", -1)
    case = small(seqlen_q=70, seqlen_k=150)
    for count in (20, 71, 150):
        whole.check_num_keys(case, count, "triton", CPU)
    assert "attention_forward_kernel" in gpu.launches[0].kernel


@pytest.mark.parametrize("num_splits", [2, 17, 33])
@pytest.mark.parametrize("case", SPLIT_CASES, ids=str)
def test_number_of_splits(case, num_splits, gpu, monkeypatch):
    results = []
    for schedule in ("fifo", "random"):
        gpu.settings.schedule = schedule
        results.append(whole.check_splits(case, num_splits, CPU, monkeypatch, "triton"))
    assert all(map(torch.equal, *results))
    num_rows = case.seqlen_q * case.num_heads
    num_tiles = case.batch * math.ceil(num_rows / (16 if num_rows <= 16 else 32 if num_rows <= 32 else 64))
    assert {launch.grid[0] for launch in gpu.launches} == {num_tiles * num_splits, case.batch * num_rows}


def test_the_most_splits(gpu, monkeypatch):
    """Most of them have no key: they do not change the sum, nor do they where the largest exponent is far below 0."""
    inputs = make(small(seqlen_q=1, seqlen_k=150), CPU)
    inputs.q[..., 0], inputs.k[..., 0] = -200.0, 8.0
    monkeypatch.setattr(op, "NUM_SPLITS", 256)
    _, lse = check_forward(inputs, "triton", values="heavy")
    assert lse.max() < -150
    monkeypatch.setattr(op, "NUM_SPLITS", 257)
    with pytest.raises(ValueError, match=r"num_splits must be -1 \(the kernel for many queries\) to 256, got 257"):
        attention(*inputs.tensors(), backend="triton")


def test_which_kernel_runs():
    from andromeda.triton_kernels import attention as kernels

    def choose(batch, seqlen_q, seqlen_k, num_heads=24, num_kv_heads=1):
        group = num_heads // num_kv_heads
        rows = min(64, max(16, 1 << (seqlen_q * group - 1).bit_length()))
        return kernels.choose_num_splits(
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            group=group,
            keys=64,
            decode_tiles=batch * num_kv_heads * -(-seqlen_q * group // rows),
            forward_tiles=batch * num_heads * -(-seqlen_q // 128),
            multiprocessors=132,
        )

    assert choose(1, 1, 131072) == 256
    assert choose(1, 1, 8192) == 64 and choose(16, 1, 8192) == 16
    assert choose(1, 1, 100) == 1 and choose(400, 1, 8192) == 1
    assert choose(1, 1, 2**30) == 256
    assert choose(1, 8192, 8192) == kernels.NOT_SPLIT
    assert choose(1, 64, 64) == kernels.NOT_SPLIT
    assert choose(1, 64, 8192) > 1  # 24 tiles of queries leave most of a card idle
    assert choose(8, 64, 8192) == kernels.NOT_SPLIT


def test_splits_keep_numbers_that_are_not_finite(gpu):
    inputs = make(small(seqlen_q=1, seqlen_k=64 * 17, num_heads=5), CPU)
    for key, channel, value in ((3, 0, math.inf), (700, 1, -math.inf), (1000, 2, math.nan)):
        inputs.v[:, key, :, channel] = value
    out = attention(*inputs.tensors(), causal=True, backend="triton")
    assert [launch.kernel for launch in gpu.launches] == KERNELS
    assert out[..., 0].isposinf().all() and out[..., 1].isneginf().all() and out[..., 2].isnan().all()
    assert out[..., 3:].isfinite().all()


@pytest.mark.parametrize("factor", [1.0, 60.0])
def test_logit_bounds_of_heads_that_share_a_tile(factor, gpu):
    case = small(seqlen_q=3, seqlen_k=400, num_heads=6)
    inputs = bounded(case, 1.0, CPU)
    factors = torch.tensor([1.0, factor, 5, 1, 0.1, 20])
    inputs.q = (inputs.q * factors[:, None]).to(case.dtype)
    inputs.options["logit_bound"] = inputs.options["logit_bound"] * factors
    check_forward(inputs, "triton", values="heavy")


def test_windows_skip_far_keys(gpu):
    check_windows_skip_far_keys(1, "triton")


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("case, device", on_devices_in_turn(HIDDEN[6:]))
def test_hidden_numbers_stay_hidden(case, device, name, emulated_triton):
    emulated_triton.settings.device = device
    inputs = make(dataclasses.replace(case, head_dim=64, dtype=BFLOAT16), CPU)
    seqlen = getattr(inputs, name).shape[1]
    for index, row in enumerate(sorted({0, seqlen // 2, seqlen - 1})):
        spoilt = whole.change(inputs, **{name: getattr(inputs, name).clone()})
        channel = slice(None) if index == 1 else (37 * index + 5) % 64
        whole.check_hidden(spoilt, "triton", name, 0, row, 0, channel, whole.NOT_FINITE[index])


def test_visible_numbers_are_not_hidden(gpu):
    check_visible_numbers("triton")


def test_offsets_beyond_32_bits(gpu, monkeypatch):
    inputs = make(small(batch=2, seqlen_q=2, seqlen_k=90, num_heads=2), CPU)
    expected = attention(*inputs.tensors(), **inputs.options, backend="triton")
    far = place_far_apart(gpu, inputs, monkeypatch)
    assert torch.equal(attention(*far.tensors(), **far.options, backend="triton"), expected)
