"""The tables that all calls share: their rows, and that every call finds its own rows."""

import pytest
import torch

from andromeda import qk_norm_rotary
from andromeda.ops import _persistent, _rotary
from andromeda.reference import qk_norm_rotary as reference

CPU = torch.device("cpu")
WINDOW = _rotary.window  # the fixture `emulated` replaces it
SIZES = (1, 2, 63, 2**14, 2**14 + 1, 2**15, 100_000)
POSITIONS = (0, 1, 2**14 - 1, 2**15, 131_071, 10**6, 10**9, -1, -70_000)


@pytest.fixture
def made(monkeypatch):
    """The tables that have been kept since: (kind, rows)."""
    monkeypatch.setattr(_persistent, "entries", type(_persistent.entries)(dict))
    return lambda: sorted((kind, key[1:]) for (kind, _), entries in _persistent.entries.items() for key in entries)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first", POSITIONS)
def test_a_window_holds_the_rows_and_little_more(first, size):
    begin, end = WINDOW(first, first + size)
    assert begin <= first and first + size <= end
    assert end - begin <= max(2**15, 4 * size)


def test_calls_near_each_other_share_a_window():
    assert len({WINDOW(position, position + 1) for position in range(2**16)}) == 2**16 // 2**14
    assert WINDOW(0, 4096) == WINDOW(17, 18) == (0, 2**15)


@pytest.mark.parametrize("first", [0, 8191, 10**6, -20])
def test_rows_are_those_of_the_reference(first):
    table, row = _rotary.angles(first, first + 30, 16, CPU)
    assert table.dtype == torch.float32 and table.is_contiguous()
    assert torch.equal(table[row : row + 30], reference.angles(first, first + 30, 16).float())
    table, row = _rotary.factors(first, first + 30, 16, CPU)
    assert torch.equal(table[row : row + 30], reference.factors(first, first + 30, 16).float())


def test_the_tables_of_both_operands_are_made_of_them():
    """z * cos and z * sin, with exponents that grow for queries and fall for keys."""
    position, origin, seqlen_q, seqlen_k = 40, 47, 3, 9
    q_table, k_table = reference.rotary_tables(seqlen_q, seqlen_k, 16, True, position, origin)
    for table, sign in ((q_table, 1), (k_table, -1)):
        for row, p in enumerate(range(position + seqlen_k - len(table), position + seqlen_k)):
            exponent = sign * (p - origin)
            z = reference.factors(exponent, exponent + 1, 16).repeat_interleave(2, dim=1)
            torch.testing.assert_close(table[row : row + 1], reference.angles(p, p + 1, 16) * z, rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "position", "origin"),
    [
        (1, 1, 0, 0),
        (1, 1, 9000, 8192 + 4096),
        (70, 70, 8150, 8192),
        (5, 90, 0, 88),
        (90, 5, 0, 40),  # queries before the first key
        (3, 3, 10**6, 10**6 - 400),
        (2, 3, -50, -48),
    ],
)
def test_a_call_reads_its_own_rows(seqlen_q, seqlen_k, position, origin, emulated, monkeypatch):
    monkeypatch.setattr(_rotary, "window", WINDOW)
    q, k = torch.randn(2, seqlen_q, 3, 64), torch.randn(2, seqlen_k, 1, 64)
    options = {"rotary_dim": 32, "xpos": True, "position": position, "origin": origin}
    found = qk_norm_rotary(q, k, backend="cuda", **options)
    exact = reference.qk_norm_rotary(q.double(), k.double(), **options)
    for out, ref in zip(found, exact, strict=True):
        torch.testing.assert_close(out.double(), ref, rtol=2e-6, atol=2e-6 * ref.abs().max().item())


def test_decoding_and_layers_share_tables(made, emulated, monkeypatch):
    """A step beyond half a window of 2**15 rows makes the next one; a step before does not, whatever the origin."""
    monkeypatch.setattr(_rotary, "window", WINDOW)
    q, k = torch.randn(1, 1, 2, 64), torch.randn(1, 1, 1, 64)
    for position in (5, 6, 4095, 8191, 8192, 8200, 16383, 16384):
        origin = position // 8192 * 8192 + 4096
        for _layer in range(2):
            qk_norm_rotary(q, k, rotary_dim=32, xpos=True, position=position, origin=origin, backend="cuda")
    windows = [(0, 2**15), (2**14, 2**14 + 2**15)]
    assert made() == [("angles", windows[0]), ("angles", windows[1]), ("factors", (-(2**14), 2**14))]


def test_without_xpos_there_are_no_factors(made, emulated):
    q, k = torch.randn(1, 2, 2, 64), torch.randn(1, 2, 1, 64)
    qk_norm_rotary(q, k, rotary_dim=32, backend="cuda")
    assert made() == [("angles", (0, 2))]
    qk_norm_rotary(q, k, backend="cuda")
    assert len(made()) == 1
