"""dq of attention_backward on Hopper, in the emulator with every check on: against the float64 reference."""

import dataclasses
import math

import pytest
import test_attention as whole
import torch
from test_attention import BFLOAT16, FLOAT16, Case, bounded, check, check_beside_plain, make

from andromeda.ops import attention as op
from emulator.hopper_cases import alternate, expect_kernel, set_schedule

KERNEL = "attention_backward_dq_wgmma_kernel"
# Three heads that share a key head, with a steep slope, a flat one and none.
SMALL = Case(batch=1, num_heads=3, head_dim=64, dtype=BFLOAT16)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.fixture
def hopper(emulated, monkeypatch):
    with expect_kernel(emulated, monkeypatch, KERNEL):
        yield emulated


# A block has 128 queries in two warpgroups of 64, a tile 128 keys, two of which are in shared memory.
CASES = alternate(
    [
        small(seqlen_q=n, seqlen_k=t, head_dim=d, causal=causal, num_heads=h)
        for n, t, d, causal, h in (
            (1, 1, 64, True, 3),
            (64, 64, 64, False, 2),
            (65, 127, 128, True, 1),
            (128, 129, 64, True, 2),
            (130, 400, 128, True, 1),  # tiles without a mask, between those with one
            (130, 520, 64, False, 2),  # and the bias of keys right of the diagonal
            (203, 113, 64, True, 2),  # rows that see nothing
            (113, 203, 128, False, 1),
            (5, 700, 128, True, 2),  # one warpgroup has no rows
            (64, 192, 64, True, 1),
        )
    ]
)
CASES += alternate(
    [
        small(batch=2, seqlen_q=n, seqlen_k=t, head_dim=d, num_heads=h, num_kv_heads=g, mask=mask, layout=layout)
        for n, t, d, h, g, mask, layout in (
            (150, 260, 64, 2, 2, "documents", "contiguous"),
            (140, 300, 128, 2, 1, "documents", "transposed"),
            (60, 200, 72, 4, 2, "padding", "contiguous"),
            (130, 140, 40, 2, 1, "window", "seqlen first"),
            (70, 130, 104, 2, 2, "ahead", "contiguous"),
            (100, 300, 8, 4, 2, "blind", "contiguous"),
        )
    ]
)
CASES += [
    small(seqlen_q=257, seqlen_k=640, num_heads=1, alibi="none", causal=False),  # 5 rounds, no bias, no masks
    small(seqlen_q=140, seqlen_k=300, num_heads=1, mask="documents", causal=False, alibi="all", dtype=FLOAT16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case, hopper):
    set_schedule(hopper, case)
    check(make(case, torch.device("cpu")), "cuda", values=whole.rules_for(case, "cuda"))


@pytest.mark.parametrize("values", ["peaked", "huge key", "heavy"])
def test_odd_values(values, hopper):
    """In float16 the gradients share a scale, which large ones lower."""
    case = small(seqlen_q=100, seqlen_k=300, num_heads=1, values=values, dtype=FLOAT16)
    set_schedule(hopper, case)
    check_beside_plain(make(case, torch.device("cpu")), "cuda", values)


@pytest.mark.parametrize(
    ("case", "bound"),
    [
        (small(seqlen_q=200, seqlen_k=420, num_heads=2, alibi="all", head_dim=128), 1.0),
        (small(seqlen_q=130, seqlen_k=420, num_heads=1, alibi="all", causal=False, dtype=FLOAT16), 2.0),
    ],
    ids=str,
)
def test_windows(case, bound, hopper):
    set_schedule(hopper, case)
    whole.check_bounded(bounded(case, bound, torch.device("cpu")), bound, False, "cuda")


def test_windows_skip_far_keys(hopper):
    """Far keys and values are not read: a NaN there changes nothing."""
    case = small(seqlen_q=192, seqlen_k=700, num_heads=1, alibi="all")  # slope 2**-0.5
    inputs = bounded(case, 1.0, torch.device("cpu"))
    expected = whole.run(inputs, "cuda")
    window = math.ceil((2 * inputs.options["logit_bound"].item() + 24 * math.log(2)) * 2**0.5)
    unread = (700 - 192 - window) // 128 * 128
    inputs.k[:, :unread], inputs.v[:, :unread] = math.nan, math.nan
    _, _, dq, *_ = whole.run(inputs, "cuda")
    assert torch.equal(dq, expected[2])


# One number that is not finite, hidden from some or all rows of a tile.
HIDDEN = alternate(
    [
        small(seqlen_q=n, seqlen_k=t, head_dim=d, num_heads=1, alibi=alibi, causal=causal, mask=mask)
        for n, t, d, alibi, causal, mask in (
            (130, 150, 128, "none", True, "documents"),
            (70, 140, 64, "all", True, "window"),
            (100, 60, 64, "none", True, "none"),  # rows that see nothing
            (60, 130, 64, "all", False, "ahead"),
        )
    ]
)


@pytest.mark.parametrize("name", whole.TENSORS)
@pytest.mark.parametrize("case", HIDDEN, ids=str)
def test_hidden_numbers_stay_hidden(case, name, hopper):
    set_schedule(hopper, case)
    inputs = make(case, torch.device("cpu"))
    seqlen = getattr(inputs, name).shape[1]
    index = HIDDEN.index(case) + whole.TENSORS.index(name)
    row, value = (0, seqlen // 2, seqlen - 1)[index % 3], whole.NOT_FINITE[index % 3]
    channel = slice(None) if index % 2 == 1 else (37 * index + 5) % case.head_dim
    spoilt = whole.change(inputs, **{name: getattr(inputs, name).clone()})
    whole.check_hidden(spoilt, "cuda", name, 0, row, 0, channel, value)


def test_schedules_change_no_bit(hopper):
    """The result does not depend on the order of warps, copies and blocks."""
    inputs = make(small(seqlen_q=140, seqlen_k=400, num_heads=2), torch.device("cpu"))
    results = []
    for schedule in ("fifo", "reverse", "random"):
        hopper.settings.schedule = schedule
        results.append(whole.run(inputs, "cuda"))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize(
    "case",
    [
        small(seqlen_q=20, seqlen_k=40, head_dim=36),  # rows that do not start at multiples of 16 bytes
        small(seqlen_q=20, seqlen_k=40, layout="offset"),
        small(batch=2, seqlen_q=20, seqlen_k=40, layout="expanded"),  # strides of 0
    ],
    ids=str,
)
def test_other_tensors_take_the_other_kernels(case, emulated, monkeypatch):
    emulated.settings.device = "H200"
    monkeypatch.setattr(op, "NUM_SPLITS", -1)
    check(make(case, torch.device("cpu")), "cuda", values=whole.rules_for(case, "cuda"))
    assert not any(KERNEL in launch.kernel for launch in emulated.launches)
