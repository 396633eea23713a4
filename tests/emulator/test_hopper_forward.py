"""The forward kernel of attention for Hopper (csrc/cuda/hopper/attention_forward.cuh), in the emulator with every check
on: against the float64 reference, the rows of `test_attention.py`, and its laws.

A block takes its items one after the other: on `FEW` multiprocessors it takes several.
"""

import concurrent.futures
import dataclasses
import functools
import math

import hypothesis
import pytest
import test_attention as whole
import torch
from test_attention import BFLOAT16, FLOAT16, bounded, make

from andromeda.ops import attention as op
from andromeda.ops.attention import attention
from emulator import Device
from emulator.test_attention import alternate, emulate, small

FEW = Device(9, 0, 2, 227, 228, 2048, 32)
KERNEL, OTHER_KERNEL = "attention_forward_wgmma_kernel<", "attention_forward_kernel<"


@pytest.fixture(autouse=True)
def hopper(emulated, monkeypatch):
    emulated.settings.device = "H200"
    monkeypatch.setattr(op, "NUM_SPLITS", -1)  # not the kernel for few queries


def names(emulated):
    return [launch.kernel for launch in emulated.launches]


def check_forward(case, emulated, inputs=None, kernel=KERNEL, **options):
    emulate(emulated, case)
    inputs = make(case, torch.device("cpu")) if inputs is None else inputs
    results = whole.check_forward(inputs, "cuda", **{"values": whole.rules_for(case, "cuda"), **options})
    assert names(emulated) and all(kernel in name for name in names(emulated))
    return results


# Tiles are 128 queries and 128 keys with 128 channels, 192 and 128 with 64; a warpgroup has 64 queries. Under a causal
# mask: keys before and after a warpgroup's tile, two tiles with a mask, tiles that only one warpgroup sees; rows
# without keys. Without one: tiles on both sides of the diagonal, through which a bias bends.
LENGTHS = [(1, 1), (64, 129), (127, 128), (129, 127), (70, 300), (257, 64), (193, 260), (260, 500)]
CASES = alternate(
    [
        small(seqlen_q=n, seqlen_k=t, head_dim=d, causal=causal, num_heads=1 if n > 200 else 2, alibi=alibi)
        for index, (n, t) in enumerate(LENGTHS)
        for causal, alibi in ((True, "all"), (False, "some"))
        for d in ((64, 128)[index % 2],)
    ]
)
CASES += alternate(
    [
        small(batch=2, seqlen_q=n, seqlen_k=t, head_dim=d, mask=mask, alibi=alibi, causal=causal, num_heads=1)
        for mask, n, t, d, alibi, causal in (
            ("documents", 150, 300, 128, "none", True),
            ("documents", 150, 160, 64, "all", False),
            ("padding", 70, 290, 64, "all", True),
            ("window", 200, 200, 128, "all", True),
            ("window", 140, 300, 64, "none", False),
            ("ahead", 130, 260, 128, "all", False),
            ("blind", 130, 150, 64, "none", True),
            ("blind", 66, 150, 128, "all", False),
        )
    ]
)
CASES += alternate(
    [
        small(seqlen_q=70, seqlen_k=100, head_dim=d, num_heads=h, num_kv_heads=g)
        for d, h, g in ((8, 4, 2), (24, 2, 2), (56, 3, 1), (72, 4, 2), (120, 2, 1))
    ]
)


# More than 128 channels: 128 queries and 64 keys.
CASES += alternate(
    [
        small(batch=2, seqlen_q=n, seqlen_k=t, head_dim=d, num_heads=2, mask=mask, causal=causal, alibi=alibi)
        for n, t, d, mask, causal, alibi in (
            (1, 1, 256, "none", True, "none"),
            (130, 200, 256, "none", True, "some"),
            (70, 130, 256, "documents", False, "all"),
            (66, 150, 192, "window", True, "all"),
            (140, 60, 136, "blind", True, "none"),
        )
    ]
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case, emulated):
    check_forward(case, emulated)


def test_a_thread_without_a_context(emulated):
    # As autograd's, which may have launched nothing before: tensor maps come from the driver, which binds no context.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        thread.submit(check_forward, small(seqlen_q=3, seqlen_k=5), emulated).result()


@pytest.mark.parametrize(
    "case",
    [
        small(batch=2, seqlen_q=70, seqlen_k=130, num_heads=2, head_dim=d, layout=layout)
        for d, layout in ((64, "transposed"), (128, "seqlen first"))
    ],
    ids=str,
)
def test_strides(case, emulated):
    check_forward(case, emulated)


@pytest.mark.parametrize(
    "case",
    [
        small(batch=2, seqlen_q=40, seqlen_k=70, head_dim=d, layout=layout)
        for d, layout in ((64, "slice"), (128, "offset"), (64, "expanded"), (20, "contiguous"))
    ],
    ids=str,
)
def test_tensors_that_tma_cannot_copy_take_the_other_kernel(case, emulated):
    check_forward(case, emulated, kernel=OTHER_KERNEL)


@pytest.mark.parametrize("layout", ["offset", "slice", "expanded"])
def test_wide_tensors_that_tma_cannot_copy_are_copied(layout, emulated):
    check_forward(small(batch=2, seqlen_q=40, seqlen_k=70, head_dim=256, layout=layout), emulated)


def test_wide_heads_have_limits(emulated):
    """Above 128 channels there is the forward pass alone, on Hopper, and for multiples of 8."""
    inputs = make(small(seqlen_q=9, seqlen_k=9, head_dim=192), torch.device("cpu"))
    q, k, v = inputs.tensors()
    odd = q[..., :150], k[..., :150], v[..., :150]
    count = torch.tensor([5], dtype=torch.int32)
    unsupported = functools.partial(op.unsupported, "cuda")
    assert unsupported(q, k, v) == []
    assert unsupported(q, k, v, direction="backward") == ["gradients with head_dim=192 (built for 1 to 128)"]
    assert unsupported(*odd) == ["head_dim=150 (above 128 built for multiples of 8)"]
    assert unsupported(q, k, v, num_keys=count) == ["num_keys with head_dim=192 (built for 1 to 128)"]
    wider = make(small(seqlen_q=9, seqlen_k=9, head_dim=264), torch.device("cpu")).tensors()
    assert unsupported(*wider) == ["head_dim=264 (built for 1 to 256)"]
    with pytest.raises(NotImplementedError, match="cuda: gradients with head_dim=192"):
        attention(q.requires_grad_(), k, v, backend="cuda")
    assert emulated.launches == []
    emulated.settings.device = "A100"
    assert unsupported(q, k, v) == ["head_dim=192 (built for 1 to 128)"]
    with pytest.raises(NotImplementedError, match=r"cuda: head_dim=192 \(built for 1 to 128\)"):
        attention(q.detach(), k, v, backend="cuda")


LONG = small(seqlen_q=330, seqlen_k=330, num_heads=2, alibi="all")  # windows skip tiles
BOUNDED = [
    (LONG, 1.0, False),
    (dataclasses.replace(LONG, head_dim=128), 10.0, True),
    (dataclasses.replace(LONG, seqlen_q=150, causal=False), 39.0, False),
    (dataclasses.replace(LONG, head_dim=128, num_heads=1, seqlen_k=200), 60.0, True),  # above the limit: a maximum
    (dataclasses.replace(LONG, dtype=FLOAT16, seqlen_q=140), 6.9, True),
    (dataclasses.replace(LONG, dtype=FLOAT16, head_dim=128, seqlen_q=200, causal=False), 3.0, False),
    (dataclasses.replace(LONG, seqlen_q=300, seqlen_k=120), 2.0, False),  # early rows have no key of their own
    (dataclasses.replace(LONG, mask="documents", seqlen_q=200), 4.0, False),
    (dataclasses.replace(LONG, mask="ahead", causal=False, seqlen_q=130), 4.0, False),  # the own key is hidden
    (dataclasses.replace(LONG, head_dim=256, num_heads=1, seqlen_q=140), 5.0, False),
]


@pytest.mark.parametrize(("case", "bound", "adversarial"), BOUNDED, ids=str)
def test_logit_bound(case, bound, adversarial, emulated):
    inputs = bounded(case, bound, torch.device("cpu"), adversarial)
    check_forward(case, emulated, inputs, values="heavy" if adversarial or bound > 10 else "normal")


def test_a_scale_of_one_needs_no_product(emulated):
    """softmax_scale = ln 2: the scores are exponents of 2."""
    case = small(seqlen_q=140, seqlen_k=300, head_dim=128, num_heads=2)
    inputs = bounded(case, 4.0, torch.device("cpu"))
    inputs.q = (inputs.q.float() * (case.softmax_scale / math.log(2))).bfloat16()
    check_forward(case, emulated, inputs, softmax_scale=math.log(2))


@pytest.mark.parametrize("values", ["peaked", "huge key", "ties", "offset", "heavy"])
def test_odd_values(values, emulated):
    case = small(seqlen_q=140, seqlen_k=200, head_dim=128, num_heads=2, values=values)
    emulate(emulated, case)
    inputs = make(case, torch.device("cpu"))
    exact, plain = (whole.run_exact(inputs, case.softmax_scale, dtype) for dtype in (torch.float64, case.dtype))
    out, _ = check_forward(case, emulated, inputs, values=values)
    whole.numerics.assert_no_worse(out, plain[0], exact[0])


def test_windows_skip_far_keys(emulated):
    """Far keys and values are not read: a NaN there changes nothing."""
    case = small(seqlen_q=260, seqlen_k=700, num_heads=1, alibi="all", head_dim=128)  # slope 2**-0.5
    inputs = bounded(case, 1.0, torch.device("cpu"))
    call = {**inputs.options, "backend": "cuda"}
    expected = attention(*inputs.tensors(), **call)
    window = math.ceil((2 * inputs.options["logit_bound"].item() + 24 * math.log(2)) * 2**0.5)
    unread = (700 - 260 - window) // 128 * 128  # whole tiles before the first query's window
    assert unread > 128
    inputs.k[:, :unread], inputs.v[:, :unread] = math.nan, math.nan
    assert torch.equal(attention(*inputs.tensors(), **call), expected)
    assert all(KERNEL in name for name in names(emulated))


HIDDEN = alternate(
    [
        small(seqlen_q=n, seqlen_k=t, head_dim=d, num_heads=2, alibi=alibi, causal=causal, mask=mask)
        for n, t, d, alibi, causal, mask in (
            (130, 150, 128, "some", True, "none"),
            (70, 70, 64, "none", True, "documents"),
            (40, 110, 64, "all", False, "window"),
            (100, 60, 128, "none", True, "none"),  # rows that see nothing
            (70, 90, 256, "none", True, "documents"),
        )
    ]
)


@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("case", HIDDEN, ids=str)
def test_hidden_numbers_stay_hidden(case, name, emulated):
    """A number that is not finite reaches only the rows that see it; for all others it has the effect of a 0."""
    emulate(emulated, case)
    inputs = make(case, torch.device("cpu"))
    visible = whole.visible_pairs(inputs)[0]  # (head, query, key)
    seqlen = getattr(inputs, name).shape[1]
    for index, row in enumerate((0, seqlen // 2, seqlen - 1)):
        value = whole.NOT_FINITE[(index + case.seqlen_q) % 3]
        channel = 37 + index if index < 2 else case.head_dim - 1
        results = []
        for number in (0.0, value):
            getattr(inputs, name)[0, row, 0, channel] = number
            results.append(attention(*inputs.tensors(), **inputs.options, return_lse=True, backend="cuda"))
        getattr(inputs, name)[0, row, 0, channel] = 0.0
        if name == "q":
            sees = torch.zeros_like(visible[..., 0])
            sees[0, row] = visible[0, row].any()
        else:
            sees = visible[..., row]
        (clean, clean_lse), (out, lse) = results
        hidden = ~sees.T
        assert torch.equal(out[0][hidden], clean[0][hidden]) and torch.equal(lse[0][hidden.T], clean_lse[0][hidden.T])
        if math.isnan(value):
            channels = slice(channel, channel + 1) if name == "v" else slice(None)
            assert out[0][sees.T][:, channels].isnan().all()


def test_visible_numbers_are_not_hidden(emulated):
    """Even in tiles with hidden keys, an infinite value reaches only its own channel."""
    inputs = make(small(seqlen_q=200, seqlen_k=200, num_heads=2, head_dim=128), torch.device("cpu"))
    inputs.v[:, 196, :, 5], inputs.v[:, 197, :, 6] = -math.inf, math.nan
    out = attention(*inputs.tensors(), causal=True, backend="cuda")
    assert out[:, -4:, :, 5].isneginf().all() and out[:, -3:, :, 6].isnan().all() and out[..., 7:].isfinite().all()
    assert out[:, :-4].isfinite().all() and out[:, :-3, :, 6].isfinite().all()


MANY = [
    small(batch=2, seqlen_q=300, seqlen_k=300, num_heads=2, head_dim=128, mask="documents"),
    small(batch=2, seqlen_q=130, seqlen_k=400, num_heads=3, head_dim=64, dtype=FLOAT16),
    small(batch=2, seqlen_q=200, seqlen_k=70, num_heads=2, head_dim=64),  # items without a key between others
]


@pytest.mark.parametrize("case", MANY, ids=str)
def test_a_block_takes_several_items(case, emulated):
    emulated.settings.device = FEW
    results = check_forward(case, emulated)
    assert emulated.launches[-1].grid[0] == FEW.multiprocessors
    again = whole.check_forward(make(case, torch.device("cpu")), "cuda")  # the counter is zero again
    assert all(map(torch.equal, again, results))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_schedules_change_no_bit(head_dim, emulated):
    """The result does not depend on the order of warps, copies and blocks, nor on which block takes an item."""
    case = small(seqlen_q=200, seqlen_k=300, head_dim=head_dim, num_heads=2)
    inputs = make(case, torch.device("cpu"))
    results = []
    for device, schedule, seed in ((FEW, "fifo", 0), ("H200", "reverse", 0), (FEW, "random", 1), (FEW, "random", 2)):
        emulated.settings.device, emulated.settings.schedule, emulated.settings.seed = device, schedule, seed
        results.append(attention(*inputs.tensors(), **inputs.options, return_lse=True, backend="cuda"))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


LAWS = {name: test.law for name, test in vars(whole).items() if hasattr(test, "law")}
FORWARD_LAWS = [
    "test_p1_permuting_batch_entries_and_heads_permutes_the_result",
    "test_p2_later_tokens_do_not_change_earlier_rows",
    "test_p5_parts_merge_by_their_log_sum_exp",
    "test_p7_outputs_are_weighted_means_of_the_values",
    "test_p12_queries_in_pieces_are_one_call",
]


@pytest.mark.parametrize("name", FORWARD_LAWS)
def test_law(name, emulated):
    test, fixed = LAWS[name]

    @hypothesis.settings(max_examples=1)
    @hypothesis.given(case=whole.cases(**{**fixed, "dtypes": (FLOAT16, BFLOAT16), "head_dim": 64}))
    def over_cases(case):
        emulate(emulated, case)
        test(case, make(case, torch.device("cpu")), "cuda")

    over_cases()
    assert any(KERNEL in name for name in names(emulated))
