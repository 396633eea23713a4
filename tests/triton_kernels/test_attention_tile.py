"""The device functions of Triton's attention kernels that decide which keys are read, against plain Python."""

import itertools
import math

import pytest
import torch
from emulator import Emulator, triton_driver

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from andromeda.triton_kernels import attention_tile as tile  # noqa: E402 (needs Triton)

ROWS, KEYS = 64, 32


@pytest.fixture(autouse=True)
def gpu():
    with triton_driver.active(Emulator()) as emulator:
        yield emulator


@triton.jit
def range_kernel(
    out, rows, key_start, first_query, seqlen_q, seqlen_k, window, kRows: tl.constexpr, kCausal: tl.constexpr
):
    row = tl.arange(0, kRows)
    query = first_query + row
    position, first, end = tile.describe_rows(key_start, query, seqlen_q, seqlen_k, kCausal)
    found = tile.range_of_keys(position, first, end, query < seqlen_q, window)
    tl.store(rows + row, position)
    tl.store(rows + kRows + row, first)
    tl.store(rows + 2 * kRows + row, end)
    tl.store(out, found[0])
    tl.store(out + 1, found[1])
    tl.store(out + 2, found[2])
    tl.store(out + 3, found[3])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "key_start"])
def test_range_of_keys(causal, masked):
    generator = torch.Generator().manual_seed(0)
    lengths = ((64, 64), (100, 100), (30, 70), (90, 20), (1, 1))
    for (seqlen_q, seqlen_k), window in itertools.product(lengths, (1, 10, 2**30)):
        first_query = ROWS if seqlen_q > ROWS else 0
        start = torch.randint(-5, seqlen_k + 5, (seqlen_q,), generator=generator).sort().values.int()
        out, rows = torch.zeros(4, dtype=torch.int32), torch.zeros(3, ROWS, dtype=torch.int32)
        arguments = (start if masked else None, first_query, seqlen_q, seqlen_k, window)
        range_kernel[(1,)](out, rows, *arguments, kRows=ROWS, kCausal=causal, num_warps=2, enable_fp_fusion=True)

        queries = range(first_query, min(seqlen_q, first_query + ROWS))
        seen, near = [], []
        for query in queries:
            position = query + seqlen_k - seqlen_q
            keys = [
                key
                for key in range(seqlen_k)
                if key >= (start[query] if masked else 0) and (key <= position or not causal)
            ]
            row = rows[:, query - first_query].tolist()
            assert row[0] == position
            assert [key for key in range(seqlen_k) if row[1] <= key < row[2]] == keys
            seen.append(set(keys))
            near.append({key for key in keys if position not in keys or abs(key - position) < window})
        begin, end, unmasked_begin, unmasked_end = out.tolist()
        needed = set().union(*near)
        assert all(begin <= key < end for key in needed)
        if needed and window == 2**30:
            assert (begin, end) == (min(needed), max(needed) + 1)
        assert set(range(unmasked_begin, min(unmasked_end, seqlen_k))) == set.intersection(*seen)


@triton.jit
def head_kernel(out, alibi_slopes, logit_bound, head):
    slope, bound, window = tile.describe_head(alibi_slopes, logit_bound, head)
    tl.store(out, slope)
    tl.store(out + 1, bound)
    tl.store(out + 2, window.to(tl.float32))


@pytest.mark.parametrize(
    "slope, bound",
    [(0.5, 1.0), (2.0**-8, 10.0), (0.0, 1.0), (2.0**-30, 1.0), (0.5, math.nan), (0.5, math.inf), (0.5, -1.0)],
)
def test_windows_of_heads(slope, bound):
    slopes, bounds = torch.tensor([0.25, slope]), torch.tensor([3.0, bound])
    expected_bound = bound if bound >= 0 else math.inf
    window = (2 * expected_bound + 24 * math.log(2)) / slope if slope > 0 else math.inf
    for given in ((slopes, bounds), (slopes, None), (None, bounds), (None, None)):
        out = torch.zeros(3)
        head_kernel[(1,)](out, *given, 1)
        found_slope, found_bound, found_window = out.tolist()
        assert found_slope == (0.0 if given[0] is None else slope)
        assert found_bound == (math.inf if given[1] is None else expected_bound)
        if None in given or window >= 1e9:
            assert found_window == 2**30
        else:
            assert window <= found_window <= window + 3


@triton.jit
def order_kernel(out, bare_first, bare_end, end_tile, count):
    for index in range(count):
        tl.store(out + index, tile.masked_tile(index, bare_first, bare_end, end_tile))


def test_masked_tiles_come_once_each():
    for first, bare_first, bare_end, end in ((0, 0, 5, 7), (2, 4, 9, 9), (1, 3, 6, 8), (0, 0, 0, 3)):
        out = torch.zeros(end - first - (bare_end - bare_first), dtype=torch.int32)
        order_kernel[(1,)](out, bare_first, bare_end, end, len(out))
        assert out.tolist() == [*reversed(range(bare_end, end)), *reversed(range(first, bare_first))]


@triton.jit
def bias_kernel(out, position, key, slope, kRows: tl.constexpr, kKeys: tl.constexpr, kCausal: tl.constexpr):
    row = tl.arange(0, kRows)
    slopes = tl.zeros((kRows,), tl.float32) + slope
    bias = tile.bias_of(slopes, position + row, key, kKeys, kCausal)
    tl.store(out + row[:, None] * kKeys + tl.arange(0, kKeys)[None, :], bias)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_bias_is_exact_near_the_diagonal_of_a_long_sequence(causal):
    position, key, slope = 2**27 + 17, 2**27 - 24, 2.0**-8
    out = torch.zeros(16, KEYS)
    bias_kernel[(1,)](out, position, key, slope, kRows=16, kKeys=KEYS, kCausal=causal, num_warps=1)
    distance = position + torch.arange(16)[:, None] - key - torch.arange(KEYS)[None, :]
    visible = distance >= (0 if causal else -(2**30))
    assert torch.equal(out[visible], (-slope * distance.abs().float())[visible])
