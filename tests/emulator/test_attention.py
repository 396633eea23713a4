"""The CUDA kernels of attention in the emulator with every check on: against the float64 reference and by the laws of
tests/test_attention.py, through autograd, operator, binding and launcher.

Without a GPU the kernels run only here; with one, tests/test_attention.py runs them on it.
"""

import dataclasses
import math

import hypothesis
import pytest
import test_attention as whole
import torch
from test_attention import BFLOAT16, FLOAT16, Case, bounded, check, check_beside_plain, make

from andromeda.ops import _select
from andromeda.ops import attention as op
from andromeda.ops.attention import attention
from emulator import DEVICES

HALF = (BFLOAT16, FLOAT16)
# Cases are small: three heads that share a key head, with a steep slope, a flat one and none.
SMALL = Case(batch=1, num_heads=3, head_dim=64, dtype=BFLOAT16)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def alternate(cases):
    """Every second case in float16, so that both types get every kind of case and each case runs once."""
    return [dataclasses.replace(case, dtype=HALF[index % 2]) for index, case in enumerate(cases)]


# Tiles are 128 queries and 64 keys (forward), 128 and 32 (dq), 64 and 64 (dk, dv).
LENGTHS = [(n, n) for n in (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 193, 257)]
LENGTHS += [(1, 147), (2, 96), (5, 97), (113, 203), (203, 113), (257, 1), (100, 2), (130, 400)]
HEADS = [(1, 1), (2, 1), (3, 3), (4, 2), (24, 1), (24, 4), (8, 8)]
CASES = alternate([small(seqlen_q=n, seqlen_k=t, causal=causal) for n, t in LENGTHS for causal in (True, False)])
# 17 tiles of keys: a pipeline that goes wrong only after several rounds.
CASES += [small(seqlen_q=1025, seqlen_k=1025, num_heads=1, alibi="all"), small(seqlen_q=20, seqlen_k=1300, num_heads=1)]
CASES += alternate(
    [small(batch=2, seqlen_q=n, seqlen_k=99, num_heads=h, num_kv_heads=g) for n in (7, 99) for h, g in HEADS]
)
CASES += [
    small(seqlen_q=70, seqlen_k=100, head_dim=d, dtype=dtype) for d in (4, 8, 20, 33, 64, 80, 96, 128) for dtype in HALF
]
CASES += alternate(
    [
        small(batch=2, seqlen_q=n, seqlen_k=130, alibi=alibi, causal=causal, mask=mask)
        for mask in ("documents", "padding", "window", "ahead", "blind")
        for n, alibi in ((60, "all"), (150, "none"))
        for causal in (True, False)
    ]
)
CASES += alternate(
    [
        small(batch=2, seqlen_q=70, seqlen_k=130, layout=layout, num_heads=4, num_kv_heads=2, head_dim=d)
        for layout in ("transposed", "seqlen first", "slice", "offset", "expanded")
        for d in (64, 128)
    ]
)
# One query, or a few, packed with their heads into the rows of one tile; the keys are split.
DECODE = alternate(
    [
        small(batch=2, seqlen_q=n, seqlen_k=t, num_heads=h, num_kv_heads=g, head_dim=d, mask=mask, alibi=alibi)
        for n, t, h, g, d, mask, alibi in (
            (1, 700, 24, 1, 128, "none", "some"),
            (1, 700, 24, 1, 128, "none", "all"),
            (1, 1500, 24, 1, 64, "padding", "some"),
            (1, 900, 4, 4, 64, "none", "none"),
            (1, 600, 8, 2, 128, "documents", "some"),
            (2, 500, 24, 1, 64, "window", "all"),
            (3, 333, 5, 1, 80, "none", "some"),
            (4, 500, 32, 1, 64, "ahead", "some"),
            (5, 400, 12, 3, 64, "blind", "all"),
            (1, 65, 24, 1, 128, "none", "some"),
        )
    ]
)
DECODE += [
    small(seqlen_q=2, seqlen_k=600, num_heads=6, causal=False, alibi="all"),
    small(seqlen_q=1, seqlen_k=800, num_heads=6, layout="slice", dtype=FLOAT16),
    small(batch=2, seqlen_q=1, seqlen_k=450, num_heads=6, layout="transposed"),
]
ODD_VALUES = alternate(
    [
        small(seqlen_q=n, seqlen_k=150, values=values, alibi=alibi)
        for values in ("peaked", "flat", "huge key", "ties", "offset", "heavy")
        for n, alibi in ((150, "none"), (40, "some"), (1, "some"))
    ]
)
LONG = small(seqlen_q=400, seqlen_k=400, num_heads=3)
# With 128 channels, q and dout leave little shared memory: an A100 has one stage of keys there, the others have two.
# Both iterate over several tiles, the last ones incomplete, with warps and tiles of queries (64) that do not exist.
WIDE = alternate(
    [
        small(seqlen_q=n, seqlen_k=t, head_dim=128, causal=causal)
        for n, t in ((1, 1), (32, 33), (63, 97), (64, 64), (65, 31), (128, 160), (129, 32), (193, 257), (300, 100))
        for causal in (True, False)
    ]
)
WIDE += alternate(
    [
        small(batch=2, seqlen_q=150, seqlen_k=130, head_dim=d, num_heads=4, num_kv_heads=2, mask=mask, layout=layout)
        for d, mask, layout in (
            (128, "documents", "contiguous"),
            (100, "window", "transposed"),
            (97, "blind", "offset"),
            (128, "ahead", "slice"),
        )
    ]
)
WIDE += [small(seqlen_q=20, seqlen_k=1300, num_heads=1, head_dim=128)]
BOUNDED = [
    (LONG, 1.0),
    (LONG, 10.0),
    (LONG, 39.0),
    (LONG, 60.0),  # above the limit: the softmax keeps a running maximum, the windows stay
    (dataclasses.replace(LONG, dtype=FLOAT16), 1.0),
    (dataclasses.replace(LONG, dtype=FLOAT16), 6.9),
    (dataclasses.replace(LONG, dtype=FLOAT16), 30.0),
    (dataclasses.replace(LONG, head_dim=128, alibi="all"), 5.0),
    (dataclasses.replace(LONG, causal=False), 5.0),
    (dataclasses.replace(LONG, causal=False, alibi="all"), 1.0),
    (dataclasses.replace(LONG, seqlen_q=1, seqlen_k=1500), 8.0),
    (dataclasses.replace(LONG, seqlen_q=1, seqlen_k=1500, alibi="all"), 1.0),
    (dataclasses.replace(LONG, seqlen_q=150, seqlen_k=700, num_heads=4, num_kv_heads=2), 3.0),
    (dataclasses.replace(LONG, seqlen_q=300, seqlen_k=120), 2.0),  # early rows have no key of their own
    (dataclasses.replace(LONG, mask="documents"), 4.0),
    (dataclasses.replace(LONG, mask="window"), 4.0),
    (dataclasses.replace(LONG, mask="ahead", causal=False), 4.0),  # the row's own key is hidden: no window holds
    (dataclasses.replace(LONG, mask="blind"), 4.0),
    (dataclasses.replace(LONG, alibi="none"), 20.0),
]
ALL = [*CASES, *DECODE, *(case for case in whole.CASES if case.dtype in HALF and case.head_dim <= 128)]


def emulate(emulated, case):
    """Run a case; every case has its own order of warps and copies, the same in every run."""
    emulated.settings.schedule = ("fifo", "reverse", "random")[sum(map(ord, str(case))) % 3]


@pytest.mark.parametrize("case", ALL, ids=str)
def test_matches_the_reference(case, emulated):
    emulate(emulated, case)
    check(make(case, torch.device("cpu")), "cuda", values=whole.rules_for(case, "cuda"))


@pytest.mark.parametrize("device", ["A100", "L4"])
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_stages_of_keys_in_the_backward(case, device, emulated):
    emulate(emulated, case)
    emulated.settings.device = device
    check(make(case, torch.device("cpu")), "cuda", values=whole.rules_for(case, "cuda"))
    (name,) = (launch.kernel for launch in emulated.launches if "dq_kernel" in launch.kernel)
    assert f", 128, {1 if device == 'A100' else 2}>" in name


@pytest.mark.parametrize("case", ODD_VALUES, ids=str)
def test_odd_values(case, emulated):
    emulate(emulated, case)
    check_beside_plain(make(case, torch.device("cpu")), "cuda", case.values)


@pytest.mark.parametrize("adversarial", [False, True], ids=["random", "adversarial"])
@pytest.mark.parametrize("case, bound", BOUNDED, ids=str)
def test_logit_bound(case, bound, adversarial, emulated):
    emulate(emulated, case)
    whole.check_bounded(bounded(case, bound, torch.device("cpu"), adversarial), bound, adversarial, "cuda")


@pytest.mark.parametrize("softmax_scale", [1, 0.05, 2.0**-20], ids=str)
def test_softmax_scale_is_not_applied_to_the_bias(softmax_scale, emulated):
    inputs = make(small(seqlen_q=20, seqlen_k=110, alibi="all"), torch.device("cpu"))
    check_beside_plain(inputs, "cuda", "normal" if softmax_scale < 1 else "peaked", softmax_scale)


@pytest.mark.parametrize("softmax_scale", [0.0, -0.3, 2.0**-61])
def test_a_scale_that_the_kernels_refuse_takes_another_backend(softmax_scale, emulated):
    inputs = make(small(), torch.device("cpu"))
    with pytest.raises(NotImplementedError, match=r"softmax_scale=.*built for at least 2\*\*-60"):
        attention(*inputs.tensors(), softmax_scale=softmax_scale, backend="cuda")
    check(inputs, None, softmax_scale=softmax_scale)


@pytest.mark.parametrize("seqlen_q", [1, 400])
def test_windows_skip_far_keys(seqlen_q, emulated):
    check_windows_skip_far_keys(seqlen_q, "cuda")


def check_windows_skip_far_keys(seqlen_q, backend):
    """Far keys and values are not read: a NaN there changes nothing."""
    case = small(seqlen_q=seqlen_q, seqlen_k=700, num_heads=1, alibi="all")  # slope 2**-0.5
    inputs = bounded(case, 1.0, torch.device("cpu"))
    expected = attention(*inputs.tensors(), **inputs.options, backend=backend)
    window = math.ceil((2 * inputs.options["logit_bound"].item() + 24 * math.log(2)) * 2**0.5)
    unread = 700 - seqlen_q - window - 64  # whole tiles before the first query's window
    inputs.k[:, :unread], inputs.v[:, :unread] = math.nan, math.nan
    assert torch.equal(attention(*inputs.tensors(), **inputs.options, backend=backend), expected)


# One number that is not finite, hidden from some or all rows of a tile: of the forward kernel (both widths), of the one
# for few queries, of both backward kernels.
HIDDEN = alternate(
    [
        small(seqlen_q=n, seqlen_k=t, head_dim=d, num_heads=h, alibi=alibi, causal=causal, mask=mask)
        for n, t, d, h, alibi, causal, mask in (
            (70, 70, 64, 2, "some", True, "none"),
            (130, 150, 128, 1, "none", True, "documents"),
            (40, 110, 64, 2, "all", True, "window"),
            (40, 75, 100, 1, "some", False, "padding"),
            (100, 60, 64, 1, "none", True, "none"),  # rows that see nothing
            (60, 130, 64, 2, "none", False, "ahead"),
            (2, 150, 64, 8, "some", True, "none"),
            (1, 150, 128, 5, "none", True, "padding"),
            (3, 140, 80, 6, "all", True, "documents"),
        )
    ]
)


@pytest.mark.parametrize("name", whole.TENSORS)
@pytest.mark.parametrize("case", HIDDEN, ids=str)
def test_hidden_numbers_stay_hidden(case, name, emulated):
    emulate(emulated, case)
    inputs = make(case, torch.device("cpu"))
    seqlen = getattr(inputs, name).shape[1]
    for index, row in enumerate(sorted({0, seqlen // 2, seqlen - 1})):
        value = whole.NOT_FINITE[(index + case.seqlen_q) % 3]
        channel = slice(None) if index == 1 else (37 * index + 5) % case.head_dim
        spoilt = whole.change(inputs, **{name: getattr(inputs, name).clone()})
        whole.check_hidden(spoilt, "cuda", name, 0, row, 0, channel, value)


@pytest.mark.parametrize("name", whole.TENSORS)
def test_one_infinite_row_leaves_the_others_their_digits(name, emulated):
    """Gradients in float16 share a scale, and an infinity must not influence it."""
    case = small(seqlen_q=96, seqlen_k=96, num_heads=1, dtype=FLOAT16, mask="documents", seed=3)
    whole.check_hidden(make(case, torch.device("cpu")), "cuda", name, 0, 95, 0, 7, math.inf)


def test_visible_numbers_are_not_hidden(emulated):
    check_visible_numbers("cuda")


def check_visible_numbers(backend):
    """Even in tiles with hidden keys, an infinite value reaches only its own channel."""
    case = small(seqlen_q=70, seqlen_k=70, num_heads=2)
    inputs = make(case, torch.device("cpu"))
    inputs.v[:, 66, :, 5], inputs.v[:, 67, :, 6] = -math.inf, math.nan
    for queries in (slice(0, 70), slice(67, 70)):  # of both kernels
        out = attention(inputs.q[:, queries], inputs.k, inputs.v, causal=True, backend=backend)
        assert out[:, -4:, :, 5].isneginf().all() if out.shape[1] > 3 else out[..., 5].isneginf().all()
        assert out[:, -3:, :, 6].isnan().all() and out[..., 7:].isfinite().all()
        assert out[:, :-4].isfinite().all() and out[:, :-3, :, 6].isfinite().all()


# ---- laws -----------------------------------------------------------------------------------------------------------

LAWS = {name: test.law for name, test in vars(whole).items() if hasattr(test, "law")}
# A channel for the bias would have to hold slope * position exactly.
NOT_IN_HALF_PRECISION = {"test_p8_alibi_is_a_bias_linear_in_the_key"}


@pytest.mark.parametrize("name", sorted(LAWS.keys() - NOT_IN_HALF_PRECISION))
def test_law(name, emulated):
    test, fixed = LAWS[name]

    @hypothesis.settings(max_examples=min(4, hypothesis.settings.default.max_examples))
    @hypothesis.given(case=whole.cases(**{**fixed, "dtypes": HALF}))
    def over_cases(case):
        emulate(emulated, case)
        test(case, make(case, torch.device("cpu")), "cuda")

    over_cases()


@pytest.mark.parametrize("case", whole.EMPTY, ids=str)
def test_p18_empty_inputs(case, emulated):
    whole.test_p18_empty_inputs(dataclasses.replace(case, dtype=BFLOAT16), "cuda", torch.device("cpu"))


@pytest.mark.parametrize(
    "case", [small(seqlen_q=1, seqlen_k=900, num_heads=24), small(seqlen_q=200, seqlen_k=200)], ids=str
)
def test_schedules_change_no_bit(case, emulated):
    """The result does not depend on the order of warps, copies and blocks."""
    inputs = make(case, torch.device("cpu"))
    results = []
    for schedule, seed in (("fifo", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        emulated.settings.schedule, emulated.settings.seed = schedule, seed
        results.append(whole.run(inputs, "cuda"))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


# ---- splits of the keys ---------------------------------------------------------------------------------------------

WITHOUT_CLUSTERS = dataclasses.replace(DEVICES["H200"], major=8)  # test_hopper_decode.py has them


@pytest.mark.parametrize("num_splits", whole.SPLITS)
@pytest.mark.parametrize("case", whole.SPLIT_CASES, ids=str)
def test_number_of_splits(case, num_splits, emulated, monkeypatch):
    results = []
    for schedule in ("fifo", "reverse", "random")[: 1 if num_splits == 256 else 3]:
        emulated.settings.schedule = schedule
        results.append(whole.check_splits(case, num_splits, torch.device("cpu"), monkeypatch))
    assert all(all(map(torch.equal, result, results[0])) for result in results)
    num_rows = case.seqlen_q * case.num_heads
    num_tiles = case.batch * math.ceil(num_rows / (16 if num_rows <= 16 else 32))
    assert {tuple(launch.grid) for launch in emulated.launches} == {(num_tiles * num_splits, 1, 1)}


@pytest.mark.parametrize("num_splits", [0, 1, 3, 9])
@pytest.mark.parametrize(("case", "counts"), whole.NUM_KEYS_CASES, ids=str)
def test_num_keys(case, counts, num_splits, emulated, monkeypatch):
    emulate(emulated, case)
    monkeypatch.setattr(op, "NUM_SPLITS", num_splits)
    for count in counts:
        results, cut = whole.check_num_keys(case, count, "cuda", torch.device("cpu"))
        if 0 < 64 * num_splits <= count:  # the cut call has as many splits
            assert all(map(torch.equal, results, cut))
    launches = [launch for launch in emulated.launches if launch.grid == emulated.launches[0].grid]
    assert len(launches) >= len(counts)  # the grid does not depend on the value


def test_num_keys_needs_the_kernel_for_few_queries(emulated, monkeypatch):
    """It takes any number of queries, unless it is told not to."""
    inputs = make(small(seqlen_q=90, seqlen_k=100), torch.device("cpu"))
    q, k, v = (tensor.detach() for tensor in inputs.tensors())
    num_keys = torch.tensor([95], dtype=torch.int32)
    out = attention(q, k, v, causal=True, num_keys=num_keys, backend="cuda")
    expected = attention(q.float(), k[:, :95].float(), v[:, :95].float(), causal=True, backend="reference")
    assert (out - expected).abs().max() < 0.02
    assert "attention_decode_kernel" in emulated.launches[0].kernel
    monkeypatch.setattr(op, "NUM_SPLITS", -1)
    with pytest.raises(ValueError, match=r"num_splits must be positive with num_keys, got -1"):
        attention(q, k, v, causal=True, num_keys=num_keys, backend="cuda")


def test_no_more_splits_than_steps(emulated, monkeypatch):
    monkeypatch.setattr(op, "NUM_SPLITS", 50)
    case = small(seqlen_q=1, seqlen_k=150)  # three steps of 64 keys
    check(make(case, torch.device("cpu")), "cuda")
    assert emulated.launches[0].grid[0] == 3
    monkeypatch.setattr(op, "NUM_SPLITS", -2)
    with pytest.raises(ValueError, match=r"num_splits must be at least 0 \(0: chosen\), or -1, got -2"):
        check(make(case, torch.device("cpu")), "cuda")


def test_splits_keep_numbers_that_are_not_finite(emulated, monkeypatch):
    """Sums are rounded between blocks: an infinity stays an infinity, and a NaN of any bits stays a NaN."""
    case = small(seqlen_q=1, seqlen_k=64 * 17, num_heads=5)
    inputs = make(case, torch.device("cpu"))
    largest = torch.finfo(case.dtype).max
    for key, channel, value in ((3, 0, math.inf), (700, 1, -math.inf), (1000, 2, math.nan), (90, 3, largest)):
        inputs.v[:, key, :, channel] = value
    inputs.v.view(torch.int16)[:, 400, :, 4] = -1  # a NaN whose bits are all set
    results = []
    for num_splits in (1, 17):
        monkeypatch.setattr(op, "NUM_SPLITS", num_splits)
        results.append(attention(*inputs.tensors(), causal=True, backend="cuda").float())
    whole_keys, split_keys = results
    assert torch.equal(whole_keys.isnan(), split_keys.isnan()) and torch.equal(whole_keys.isinf(), split_keys.isinf())
    assert whole_keys[..., 0].isposinf().all() and whole_keys[..., 1].isneginf().all()
    assert (
        whole_keys[..., 2].isnan().all() and whole_keys[..., 4].isnan().all() and whole_keys[..., 5:].isfinite().all()
    )


def test_bytes_on_the_way_of_the_last_block(emulated, monkeypatch):
    """131072 keys are 128 splits on a device like an H200, but without clusters. The last block to arrive writes a
    partial result for each level and reads the others of its groups; no other work hides this traffic."""
    heads, head_dim, num_splits = 24, 128, 128
    sizes = {"batch": 1, "seqlen_q": 1, "num_heads": heads, "num_kv_heads": 1, "head_dim": head_dim, "causal": True}
    emulated.settings.device = WITHOUT_CLUSTERS
    chosen = _select.extension.attention_forward_workspace(seqlen_k=131072, **sizes)
    few_keys = {"seqlen_k": 64 * num_splits, "num_splits": num_splits}
    assert chosen == _select.extension.attention_forward_workspace(**few_keys, **sizes)

    # 6 + 6 + 4 in three levels. The first block comes last, so that all its groups are full.
    partial_bytes = heads * (3 * head_dim + 8)
    assert chosen == ((128 + 22 + 4) * partial_bytes / 4, 22 + 4 + 1, num_splits)
    emulated.settings.blocks = (*range(1, num_splits), 0)
    monkeypatch.setattr(op, "NUM_SPLITS", num_splits)
    case = small(seqlen_q=1, seqlen_k=64 * num_splits, num_heads=heads, head_dim=head_dim)
    attention(*make(case, torch.device("cpu")).tensors(), causal=True, backend="cuda")
    read = emulated.launches[-1].counters.foreign_bytes
    assert read == (5 + 5 + 3) * partial_bytes


@pytest.mark.parametrize(
    "batch, seqlen_k, measured", [(1, 131072, (128, 132)), (16, 8192, (8, 8)), (64, 2048, (2, 4)), (1, 8192, (24, 64))]
)
def test_number_of_splits_is_the_fastest_measured(emulated, batch, seqlen_k, measured):
    """On an H200 without clusters, 24 heads of 128 channels: within 4 % of the best number of splits of these keys."""
    emulated.settings.device = WITHOUT_CLUSTERS
    sizes = {"seqlen_q": 1, "num_heads": 24, "num_kv_heads": 1, "head_dim": 128, "causal": True}
    chosen = _select.extension.attention_forward_workspace(batch=batch, seqlen_k=seqlen_k, **sizes)[2]
    assert measured[0] <= chosen <= measured[1]
