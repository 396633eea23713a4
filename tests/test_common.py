"""The small functions that the operations share."""

import pytest
import torch

from andromeda.ops import _common


@pytest.mark.parametrize(
    ("dtype", "wide", "name"),
    [
        (torch.float16, torch.float32, "float16"),
        (torch.bfloat16, torch.float32, "bfloat16"),
        (torch.float32, torch.float32, "float32"),
        (torch.float64, torch.float64, "float64"),
    ],
)
def test_dtypes(dtype, wide, name):
    assert _common.compute_dtype(dtype) == wide
    assert _common.dtype_name(dtype) == name


def test_a_cast_keeps_what_it_can():
    tensor = torch.ones(3)
    assert _common.cast(tensor, torch.float32) is tensor
    assert _common.cast(tensor, torch.float64).dtype == torch.float64
    assert _common.cast(None, torch.float64) is None


def test_contiguous():
    columns = torch.ones(3, 4).T
    assert _common.contiguous(columns).is_contiguous()
    assert _common.contiguous(None) is None


def test_dense_rows():
    tensor = torch.ones(3, 8)[:, 2:6]
    assert _common.with_dense_rows(tensor) is tensor
    expanded = torch.ones(()).expand(3, 4)
    assert _common.with_dense_rows(expanded).stride() == (4, 1)


def test_sum_of_partials(device):
    partial = torch.arange(60, dtype=torch.float32, device=device).view(5, 3, 4)
    out = torch.empty(3, 4, device=device)
    with torch.autocast(device.type, torch.bfloat16):  # it would round the operands of a product
        _common.sum_partials(partial + 1000, out)
    assert torch.equal(out, (partial + 1000).sum(0))
