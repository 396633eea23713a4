"""dk and dv of attention_backward on Hopper, in the emulator with every check on: against the float64 reference, and by
the laws that their kernel could break. test_hopper_backward_dq.py has the cases of dq."""

import dataclasses

import pytest
import test_attention as whole
import torch
from test_attention import BFLOAT16, FLOAT16, Case, bounded, check, check_beside_plain, make

from emulator import Device
from emulator.hopper_cases import alternate, expect_kernel, set_schedule

KERNEL = "attention_backward_dkdv_wgmma_kernel"
SUM = "attention_backward_sum_kernel"
# Three heads that share a key head, with a steep slope, a flat one and none.
SMALL = Case(batch=1, num_heads=3, head_dim=64, dtype=BFLOAT16)
# With one multiprocessor a block has all query heads of its keys; with many, each has blocks of its own.
ONE_MULTIPROCESSOR = Device(9, 0, 1, 227, 228, 2048, 32)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


@pytest.fixture
def hopper(emulated, monkeypatch):
    with expect_kernel(emulated, monkeypatch, KERNEL):
        yield emulated


# A block has 128 keys in two groups of 64, and tiles of 64 queries, of which three (128 channels) or four (64) are in
# shared memory.
CASES = alternate(
    [
        small(seqlen_q=n, seqlen_k=t, head_dim=d, causal=causal, num_heads=h)
        for n, t, d, causal, h in (
            (1, 64, 64, True, 2),  # the second group has no keys
            (63, 65, 128, False, 1),  # it has one
            (65, 127, 64, True, 3),
            (129, 128, 128, True, 1),
            (128, 193, 64, False, 2),  # queries on both sides of the diagonal
            (300, 129, 128, False, 1),  # five tiles: the ring begins again
            (400, 70, 64, True, 1),  # queries that see nothing; seven tiles
            (257, 257, 128, True, 2),  # tiles that one group skips, in two blocks
            (20, 300, 64, False, 1),
        )
    ]
)
# The walk over query tiles looks at 32 of them at a time.
CASES += [small(seqlen_q=2200, seqlen_k=10, num_heads=1, alibi="all", causal=False)]
CASES += alternate(
    [
        small(batch=2, seqlen_q=n, seqlen_k=t, head_dim=d, num_heads=h, num_kv_heads=g, mask=mask, layout=layout)
        for n, t, d, h, g, mask, layout in (
            (130, 150, 64, 2, 2, "documents", "contiguous"),
            (140, 200, 128, 2, 2, "documents", "transposed"),
            (70, 200, 72, 4, 2, "padding", "contiguous"),
            (130, 300, 40, 2, 1, "window", "seqlen first"),  # keys that no query sees, whole blocks of them
            (70, 140, 128, 2, 2, "ahead", "seqlen first"),
            (100, 150, 8, 4, 2, "blind", "contiguous"),
        )
    ]
)
# Of one key head: all query heads in one block, or splits of them.
HEADS = [(ONE_MULTIPROCESSOR, 5, 1, 128), (ONE_MULTIPROCESSOR, 6, 2, 64), ("H200", 6, 2, 128), ("H200", 5, 1, 64)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case, hopper):
    set_schedule(hopper, case)
    check(make(case, torch.device("cpu")), "cuda", values=whole.rules_for(case, "cuda"))


@pytest.mark.parametrize(("device", "num_heads", "num_kv_heads", "head_dim"), HEADS)
def test_heads_that_share_keys(device, num_heads, num_kv_heads, head_dim, hopper):
    case = small(
        seqlen_q=90, seqlen_k=200, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=FLOAT16
    )
    set_schedule(hopper, case)
    hopper.settings.device = device
    check(make(case, torch.device("cpu")), "cuda", values=whole.rules_for(case, "cuda"))
    assert any(SUM in launch.kernel for launch in hopper.launches) == (device == "H200")


@pytest.mark.parametrize(("values", "dtype"), [("peaked", BFLOAT16), ("huge key", FLOAT16), ("heavy", FLOAT16)])
def test_odd_values(values, dtype, hopper):
    """In float16 the gradients share a scale, which large ones lower."""
    case = small(seqlen_q=150, seqlen_k=140, num_heads=1, values=values, dtype=dtype)
    set_schedule(hopper, case)
    check_beside_plain(make(case, torch.device("cpu")), "cuda", values)


WINDOWS = [
    (small(seqlen_q=420, seqlen_k=420, num_heads=2, alibi="all", head_dim=128), 1.0),
    (small(seqlen_q=300, seqlen_k=130, num_heads=1, alibi="all", causal=False, dtype=FLOAT16), 2.0),
    # 35 tiles of queries. No key is visible before the last three, and the window ends within them.
    (small(seqlen_q=2200, seqlen_k=140, num_heads=1, alibi="all"), 1.0),
]


@pytest.mark.parametrize(("case", "bound"), WINDOWS, ids=str)
def test_windows(case, bound, hopper):
    set_schedule(hopper, case)
    whole.check_bounded(bounded(case, bound, torch.device("cpu")), bound, False, "cuda")


# One number that is not finite, hidden from some or all keys of a tile.
HIDDEN = alternate(
    [
        small(seqlen_q=n, seqlen_k=t, head_dim=d, num_heads=1, alibi=alibi, causal=causal, mask=mask)
        for n, t, d, alibi, causal, mask in (
            (150, 130, 128, "none", True, "documents"),
            (140, 70, 64, "all", True, "window"),
            (100, 200, 64, "none", True, "none"),
            (130, 60, 128, "all", False, "ahead"),
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
    row, value = (seqlen - 1, 0, seqlen // 2)[index % 3], whole.NOT_FINITE[index % 3]
    channel = slice(None) if index % 2 == 1 else (37 * index + 5) % case.head_dim
    spoilt = whole.change(inputs, **{name: getattr(inputs, name).clone()})
    whole.check_hidden(spoilt, "cuda", name, 0, row, 0, channel, value)


@pytest.mark.parametrize("name", ["q", "dout"])
def test_one_infinite_row_leaves_the_others_their_digits(name, hopper):
    """Gradients in float16 share a scale, and an infinity must not influence it."""
    case = small(seqlen_q=96, seqlen_k=96, num_heads=1, dtype=FLOAT16, mask="documents", seed=3)
    whole.check_hidden(make(case, torch.device("cpu")), "cuda", name, 0, 95, 0, 7, float("inf"))


@pytest.mark.parametrize(
    "case",
    [small(seqlen_q=200, seqlen_k=200), small(seqlen_q=150, seqlen_k=260, num_heads=2, head_dim=128, dtype=FLOAT16)],
    ids=str,
)
def test_schedules_change_no_bit(case, hopper):
    """The result does not depend on the order of warps, copies and blocks."""
    inputs = make(case, torch.device("cpu"))
    results = []
    for schedule in ("fifo", "reverse", "random"):
        hopper.settings.schedule = schedule
        results.append(whole.run(inputs, "cuda"))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))
