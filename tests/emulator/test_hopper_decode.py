"""The decode kernel with clusters in the emulator: the sums of up to eight splits through shared memory, then those of
the clusters through the workspace, on an H200. Its loop over keys is that of test_attention.py."""

import dataclasses
import math

import pytest
import test_attention as whole
import torch
from test_attention import BFLOAT16, FLOAT16, Case, bounded, make

from andromeda.ops import _select
from andromeda.ops import attention as op
from andromeda.ops.attention import attention

KERNEL = "attention_decode_cluster_kernel"
SCHEDULES = ("fifo", "reverse", "random")


@pytest.fixture(autouse=True)
def h200(emulated):
    emulated.settings.device = "H200"


def case_of(**changes):
    return dataclasses.replace(Case(batch=1, seqlen_q=1, num_heads=5, head_dim=64, dtype=BFLOAT16), **changes)


WIDE = {"num_heads": 24, "head_dim": 128}
# (case, splits that are asked for, blocks of a cluster, clusters). There is a step of 64 keys for each split asked for,
# and none for those that fill the last cluster.
SPLITS = [
    (case_of(), 2, 2, 1),
    (case_of(**WIDE, dtype=FLOAT16), 2, 2, 1),  # four vectors of channels for each thread
    (case_of(batch=2, seqlen_q=3, mask="documents"), 3, 4, 1),  # 15 rows; splits that no row sees
    (case_of(**WIDE), 4, 4, 1),
    (case_of(num_heads=24, dtype=FLOAT16), 7, 8, 1),
    (case_of(**WIDE), 8, 8, 1),
    (case_of(seqlen_q=3, num_heads=13, dtype=FLOAT16), 8, 8, 1),  # 39 rows in two tiles, few in the second
    (case_of(head_dim=128, layout="offset"), 8, 8, 1),  # rows that are not aligned
    (case_of(**WIDE, layout="slice"), 9, 8, 2),
    (case_of(batch=2, num_heads=6, num_kv_heads=2, head_dim=80, mask="padding", dtype=FLOAT16), 17, 8, 3),
    (case_of(seqlen_q=2, num_heads=17, head_dim=100, mask="window"), 16, 8, 2),
    (case_of(num_heads=1, alibi="all"), 130, 8, 17),  # more clusters than a thread adds at once
]


@pytest.mark.parametrize(("case", "num_splits", "cluster_size", "num_clusters"), SPLITS, ids=str)
def test_number_of_splits(case, num_splits, cluster_size, num_clusters, emulated, monkeypatch):
    results = []
    for emulated.settings.schedule in SCHEDULES[: 1 if num_splits == 130 else 3]:
        results.append(whole.check_splits(case, num_splits, torch.device("cpu"), monkeypatch))
    assert all(all(map(torch.equal, result, results[0])) for result in results)
    num_rows = case.seqlen_q * case.num_heads // case.num_kv_heads
    num_tiles = case.batch * case.num_kv_heads * math.ceil(num_rows / (16 if num_rows <= 16 else 32))
    assert all(KERNEL in launch.kernel for launch in emulated.launches)
    assert {tuple(launch.grid) for launch in emulated.launches} == {(num_tiles * cluster_size * num_clusters, 1, 1)}


def test_one_split_needs_no_cluster(emulated, monkeypatch):
    whole.check_splits(case_of(), 1, torch.device("cpu"), monkeypatch)
    assert not any(KERNEL in launch.kernel for launch in emulated.launches)


@pytest.mark.parametrize("num_splits", [8, 24])
@pytest.mark.parametrize("case", [case_of(dtype=FLOAT16), case_of(**WIDE)], ids=str)
def test_the_sums_of_a_tree_are_the_same(case, num_splits, emulated, monkeypatch):
    """Other cards add the same splits in another order, and round their sums to 16 bits on the way."""
    monkeypatch.setattr(op, "NUM_SPLITS", num_splits)
    inputs = make(dataclasses.replace(case, seqlen_k=64 * num_splits), torch.device("cpu"))
    options = {**inputs.options, "return_lse": True, "backend": "cuda"}
    out, lse = attention(*inputs.tensors(), **options)
    emulated.settings.device = "A100"
    _select.plans.clear()
    tree_out, tree_lse = attention(*inputs.tensors(), **options)
    assert KERNEL in emulated.launches[0].kernel and KERNEL not in emulated.launches[1].kernel
    ulp = torch.finfo(case.dtype).eps
    torch.testing.assert_close(out, tree_out, rtol=ulp, atol=2**-14)
    torch.testing.assert_close(lse, tree_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_splits", [4, 9])
@pytest.mark.parametrize(("case", "counts"), whole.NUM_KEYS_CASES[1::3], ids=str)
def test_num_keys(case, counts, num_splits, emulated, monkeypatch):
    monkeypatch.setattr(op, "NUM_SPLITS", num_splits)
    for count in counts:
        whole.check_num_keys(case, count, "cuda", torch.device("cpu"))
    assert any(KERNEL in launch.kernel for launch in emulated.launches)


@pytest.mark.parametrize("alibi", ["some", "all"])
def test_windows(alibi, emulated, monkeypatch):
    """The splits share the keys within the window of some row."""
    monkeypatch.setattr(op, "NUM_SPLITS", 10)
    inputs = bounded(case_of(seqlen_k=900, alibi=alibi), 1.0, torch.device("cpu"))
    whole.check_forward(inputs, "cuda")


@pytest.mark.parametrize("name", ["k", "v"])
def test_hidden_numbers_stay_hidden(name, emulated, monkeypatch):
    """Before the start of a document, and after the position of the first of three queries."""
    monkeypatch.setattr(op, "NUM_SPLITS", 10)
    inputs = make(case_of(seqlen_q=3, seqlen_k=640), torch.device("cpu"))
    key_start = torch.full((1, 3), 70, dtype=torch.int32)
    options = {**inputs.options, "key_start": key_start, "return_lse": True, "backend": "cuda"}
    expected = attention(*inputs.tensors(), **options)
    getattr(inputs, name)[:, 69], getattr(inputs, name)[:, 638:] = math.nan, math.inf
    results = attention(*inputs.tensors(), **options)
    assert torch.equal(results[0][:, 0], expected[0][:, 0]) and torch.equal(results[1][..., 0], expected[1][..., 0])


def test_numbers_that_are_not_finite_pass_through_both_levels(emulated, monkeypatch):
    inputs = make(case_of(seqlen_k=64 * 16), torch.device("cpu"))
    for key, channel, value in ((3, 0, math.inf), (700, 1, -math.inf), (1000, 2, math.nan)):
        inputs.v[:, key, :, channel] = value
    monkeypatch.setattr(op, "NUM_SPLITS", 16)
    out = attention(*inputs.tensors(), causal=True, backend="cuda")
    assert out[..., 0].isposinf().all() and out[..., 1].isneginf().all() and out[..., 2].isnan().all()
    assert out[..., 3:].isfinite().all()


def test_a_captured_call(emulated, monkeypatch):
    monkeypatch.setattr(op, "NUM_SPLITS", 16)
    emulated.settings.capture = 1
    whole.check_forward(make(case_of(seqlen_k=1000), torch.device("cpu")), "cuda")
    assert KERNEL in emulated.launches[0].kernel


# ---- the plan -------------------------------------------------------------------------------------------------------

SIZES = {"seqlen_q": 1, "num_heads": 24, "num_kv_heads": 1, "head_dim": 128, "causal": True}


@pytest.mark.parametrize(
    ("batch", "seqlen_k", "expected"), [(1, 131072, (128,)), (16, 8192, (8,)), (64, 2048, (2, 4)), (1, 8192, (64, 128))]
)
def test_chosen_number_of_splits(batch, seqlen_k, expected, emulated):
    """All multiprocessors that clusters can use have a block, and no split has less than a step of keys."""
    assert _select.extension.attention_forward_workspace(batch=batch, seqlen_k=seqlen_k, **SIZES)[2] in expected


def test_workspace(emulated):
    """Slices of 16 channels of each cluster, 24 rows of float32 with their statistics; a semaphore for each slice."""

    def workspace(num_splits):
        return _select.extension.attention_forward_workspace(batch=2, seqlen_k=9000, num_splits=num_splits, **SIZES)

    assert workspace(8) == (0, 0, 8)
    assert workspace(17) == (2 * 3 * 8 * 24 * (16 + 2), 2 * 8, 17)


def test_bytes_on_the_way_of_the_last_block(emulated, monkeypatch):
    """16 clusters: the last block for a slice reads it from the others. No other work hides this traffic."""
    monkeypatch.setattr(op, "NUM_SPLITS", 128)
    case = case_of(num_heads=24, head_dim=64, seqlen_k=64 * 128)
    attention(*make(case, torch.device("cpu")).tensors(), causal=True, backend="cuda")
    # 24 rows of eight channels; both threads of a row read its statistics.
    assert emulated.launches[-1].counters.foreign_bytes == 15 * 24 * (8 * 4 + 2 * 8)


def test_a_workspace_of_another_device_is_refused(emulated, monkeypatch):
    monkeypatch.setattr(op, "NUM_SPLITS", 8)
    inputs = make(case_of(seqlen_k=1000), torch.device("cpu"))
    attention(*inputs.tensors(), backend="cuda")  # one cluster needs no workspace, which is remembered
    emulated.settings.device = "A100"
    with pytest.raises(ValueError, match=r"the workspace must have 2016 values, .* got 0 and 0; size it on the device"):
        attention(*inputs.tensors(), backend="cuda")
