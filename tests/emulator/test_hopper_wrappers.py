"""The wrappers of wgmma, TMA and mbarriers (hopper_wrappers.cu) compared with plain torch: emulated, and with
--device cuda on a GPU of compute capability 9.0.

As in test_wrappers.py, both executors run the same PTX: a GPU checks what the emulator assumes about descriptors,
swizzles and layouts.
"""

import functools
import math
from pathlib import Path

import pytest
import torch

from emulator.test_wrappers import (
    BFLOAT16,
    FLOAT16,
    Result,
    TensorMap,
    assert_product,
    draw,
    kinds,
    ptx,
    run_on_emulator,
    run_on_gpu,
    tile_rows,
)

WARPGROUP = 128
DTYPES = {"bf16": BFLOAT16, "f16": FLOAT16}
text = functools.partial(ptx, Path(__file__).with_name("hopper_wrappers.cu"), "compute_90a")


@pytest.fixture(params=["emulator", "gpu"])
def run(request, device):
    """run(kernel, *arguments) -> the contents of each `Result` after the kernel."""
    if request.param == "emulator":
        return lambda kernel, *arguments: run_on_emulator(kernel, WARPGROUP, *arguments, text=text)
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0: --device cuda")
    return lambda kernel, *arguments: run_on_gpu(device, kernel, WARPGROUP, *arguments, text=text)


@kinds
@pytest.mark.parametrize(
    "name, columns, a_rows, a_row",
    [("bf16", 64, 64, 0), ("bf16", 96, 128, 64), ("bf16", 128, 128, 64), ("f16", 64, 128, 64), ("f16", 96, 64, 0),
     ("f16", 128, 64, 0)],
)  # fmt: skip
def test_products_of_two_tiles(run, name, columns, a_rows, a_row, kind):
    a, b = draw(kind, a_rows, 64, dtype=DTYPES[name]), draw(kind, columns, 64, dtype=DTYPES[name])
    before = draw(kind, 64, columns)
    (d,) = run(f"score_{name}_{columns}", a, b, Result(before), a_row)
    assert_product(d, a[a_row : a_row + 64], b.T, before, kind, f"score_{name}_{columns}")


@kinds
@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("name", DTYPES)
def test_products_of_weights_and_a_tile(run, name, columns, kind):
    weights, b = draw(kind, 64, 64), draw(kind, 64, columns, dtype=DTYPES[name])
    (d,) = run(f"multiply_weights_{name}_{columns}", weights, b, Result(torch.full((64, columns), math.nan)))
    zeros = torch.zeros(64, columns)
    assert_product(d, weights.to(DTYPES[name]), b, zeros, kind, f"multiply_weights_{name}_{columns}")


@pytest.mark.parametrize(
    "shape, row, head, batch",
    [
        ((1, 64, 1, 128), 0, 0, 0),
        ((2, 100, 3, 128), 64, 2, 1),  # ends inside the tile
        ((2, 70, 2, 104), 0, 1, 1),  # ends inside a row of the tile
        ((1, 70, 2, 40), 0, 1, 0),  # the second panel lies outside
        ((1, 64, 1, 64), 64, 0, 0),  # no row exists
    ],
)
def test_copies_by_tma(run, shape, row, head, batch):
    x = draw("normal", *shape, dtype=BFLOAT16)
    (tile,) = run("copy_by_tma", TensorMap(x), Result(torch.zeros(64 * 128, dtype=BFLOAT16)), row, head, batch)
    expected = torch.zeros(64, 128, dtype=BFLOAT16)
    found = x[batch, row : row + 64, head]
    expected[: len(found), : shape[3]] = found
    assert torch.equal(tile_rows(tile, 128), expected)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_ring_of_tiles(run, count):
    x = torch.randint(0, 100, (1, 64 * count, 1, 64), dtype=torch.int16)
    (total,) = run("add_through_ring", TensorMap(x), Result(torch.zeros(1, dtype=torch.int32)), count)
    words = x.view(torch.int32).view(count, -1).sum(1, dtype=torch.int64)
    expected = (words * torch.arange(1, count + 1)).sum().item() % 2**32
    assert total.item() % 2**32 == expected
