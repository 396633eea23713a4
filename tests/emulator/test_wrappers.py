"""Single instructions and tile functions (wrappers.cu) compared with plain torch: emulated, and with --device cuda on a
GPU.

Both executors run the same PTX in the same test, so a GPU checks the assumptions of the emulator: the layouts of
operands, zero-filled copies, roundings. Exact results are compared exactly.
"""

import ctypes
import functools
import math
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from emulator import Emulator, build

BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
SOURCE = Path(__file__).with_name("wrappers.cu")
ROWS, COLUMNS, WARP = 64, 64, 32
INT_MAX = 2**31 - 1


class Result:
    """An argument that the kernel writes, with its initial contents."""

    def __init__(self, tensor):
        self.tensor = tensor


# ---- two executors --------------------------------------------------------------------------------------------------


class TensorMap:
    """An argument that describes a 16-bit tensor to TMA: (batch, seqlen, num_heads, head_dim), boxes of 64 x 64."""

    def __init__(self, tensor):
        self.tensor = tensor
        strides = [2 * tensor.stride(axis) if tensor.shape[axis] > 1 else 16 for axis in (1, 2, 0)]
        self.sizes, self.strides = [tensor.shape[axis] for axis in (3, 1, 2, 0)], strides


@functools.cache
def ptx(source=SOURCE, architecture="compute_80"):
    nvcc = build._setup_py().find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip(f"no nvcc to compile {source.name} with")
    csrc = build.ROOT / "csrc"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "wrappers.ptx"
        options = ["-ptx", f"-arch={architecture}", "-std=c++17", "-O3", "-lineinfo"]
        includes = [f"-I{csrc / 'include'}", f"-I{csrc / 'cuda'}"]
        subprocess.run([nvcc, *options, *includes, str(source), "-o", str(target)], check=True)
        return target.read_text()


def run_on_emulator(kernel, threads, *arguments, text=ptx):
    """The contents of each `Result` after the kernel. Numbers are int32 or float32 parameters; others ctypes."""
    emulator = Emulator()
    given, results, mapped = [], [], []
    for index, argument in enumerate(arguments):
        if isinstance(argument, Result):
            results.append(emulator.tensor(argument.tensor, name=f"argument {index}", writable=True))
            given.append(results[-1])
        elif isinstance(argument, torch.Tensor):
            given.append(emulator.tensor(argument, name=f"argument {index}"))
        elif isinstance(argument, TensorMap):
            mapped.append(emulator.tensor(argument.tensor, name=f"argument {index}"))
            address = mapped[-1].data_ptr()
            given.append(emulator._host.tensor_map(address, 2, argument.sizes, argument.strides, [64, 64, 1, 1], 128))
        else:
            given.append(argument)
    emulator.run_ptx(text(), kernel, 1, threads, given)
    emulator.assert_clean()
    return [result.cpu() for result in results]


@functools.cache
def driver():
    return ctypes.CDLL("libcuda.so.1")


def call(function, *arguments):
    if code := getattr(driver(), function)(*arguments):
        raise RuntimeError(f"{function} returned {code}")


@functools.cache
def module(device, text):
    """The PTX, compiled by the driver, in torch's context."""
    torch.empty(1, device=device)
    handle = ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(handle), text().encode())
    return handle


def encode_on_gpu(tensor_map, address):
    """The 128 bytes that the driver makes of a `TensorMap` whose tensor is at `address`, aligned to 64 bytes."""
    memory = (ctypes.c_uint64 * 24)()
    place = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
    bfloat16, no_interleave, swizzle_128b, promotion_256b, zeros = 9, 0, 3, 3, 0
    sizes, strides = (ctypes.c_uint64 * 4)(*tensor_map.sizes), (ctypes.c_uint64 * 3)(*tensor_map.strides)
    box, ones = (ctypes.c_uint32 * 4)(64, 64, 1, 1), (ctypes.c_uint32 * 4)(1, 1, 1, 1)
    options = no_interleave, swizzle_128b, promotion_256b, zeros
    given = ctypes.c_void_p(address), sizes, strides, box, ones
    call("cuTensorMapEncodeTiled", ctypes.c_void_p(place), bfloat16, 4, *given, *options)
    value = (ctypes.c_uint64 * 16).from_address(place)
    value.memory = memory
    return value


def place_on_gpu(tensor, device):
    """A copy with the same strides and the same alignment."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    offset = tensor.storage_offset() % (256 // tensor.dtype.itemsize)
    memory = torch.empty(offset + span, dtype=tensor.dtype, device=device)
    memory[offset:].copy_(tensor.as_strided((span,), (1,)))
    return memory[offset:].as_strided(tensor.shape, tensor.stride())


def run_on_gpu(device, kernel, threads, *arguments, text=ptx):
    with torch.cuda.device(device):
        function = ctypes.c_void_p()
        call("cuModuleGetFunction", ctypes.byref(function), module(device, text), kernel.encode())
        placed, results, values = [], [], []
        for argument in arguments:
            if isinstance(argument, Result | torch.Tensor):
                source = argument.tensor if isinstance(argument, Result) else argument
                placed.append(place_on_gpu(source, device))
                values.append(ctypes.c_void_p(placed[-1].data_ptr()))
                if isinstance(argument, Result):
                    results.append(placed[-1])
            elif isinstance(argument, TensorMap):
                placed.append(place_on_gpu(argument.tensor, device))
                values.append(encode_on_gpu(argument, placed[-1].data_ptr()))
            elif isinstance(argument, int):
                values.append(ctypes.c_int32(argument))
            elif isinstance(argument, float):
                values.append(ctypes.c_float(argument))
            else:
                values.append(argument)
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        call("cuLaunchKernel", function, 1, 1, 1, threads, 1, 1, 0, stream, addresses, None)
        torch.cuda.synchronize()
        return [result.cpu() for result in results]


@pytest.fixture(params=["emulator", "gpu"])
def run(request, device):
    """run(kernel, threads, *arguments) -> the contents of each `Result` after the kernel."""
    if request.param == "emulator":
        return run_on_emulator
    if device.type != "cuda":
        pytest.skip("needs a GPU: --device cuda")
    return functools.partial(run_on_gpu, device)


# ---- numbers --------------------------------------------------------------------------------------------------------


def draw(kind, *shape, dtype=torch.float32):
    """ "integers" make every product and sum exact, so that the order of a sum does not matter."""
    values = torch.randint(-8, 9, shape).float() if kind == "integers" else torch.randn(shape)
    return values.to(dtype)


kinds = pytest.mark.parametrize("kind", ["integers", "normal"])


def assert_product(result, a, b, c, kind, name):
    """result = c + a b by steps of 16, each of which adds 16 products to the earlier sum.

    Tensor cores align the 17 terms of a step to the largest and cut them off; the emulator rounds once. Either error is
    at most 17 * 2^-23 of the largest term or sum.
    """
    steps = a.shape[1] // 16
    terms = a.double()[:, :, None] * b.double()[None]
    sums = c.double()[:, None] + terms.unflatten(1, (steps, 16)).sum(2).cumsum(1)
    exact = sums[:, -1]
    largest = torch.maximum(terms.abs().amax(1), torch.maximum(sums.abs().amax(1), c.double().abs()))
    error = (result.double() - exact).abs()
    print(f"{name}, {kind}: worst error {(error / largest).max().item() * 2**23:.3g} * 2^-23 of the largest term")
    if kind == "integers":
        assert torch.equal(result.double(), exact)
    else:
        assert (error <= steps * 17 * 2**-23 * largest).all()


def strided(values, stride, offset, fill):
    """The rows of `values` at a distance of `stride` elements, `offset` elements after a 256-byte boundary, with `fill`
    between them. Memory ends with the last element."""
    rows, width = values.shape
    memory = torch.full((offset + (rows - 1) * stride + width,), fill, dtype=values.dtype)
    view = memory[offset:].as_strided((rows, width), (stride, 1))
    view.copy_(values)
    return view


# ---- mma.cuh --------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("name, dtype", [("bf16", BFLOAT16), ("f16", FLOAT16)])
def test_mma(run, name, dtype, kind):
    a, b, c = draw(kind, 16, 16, dtype=dtype), draw(kind, 16, 8, dtype=dtype), draw(kind, 16, 8)
    (d,) = run(f"mma_{name}", WARP, a, b, c, Result(torch.zeros(16, 8)))
    assert_product(d, a, b, c, kind, f"mma_{name}")


def test_ldmatrix(run):
    source = torch.randperm(512).to(torch.int16).view(64, 8)
    rows = torch.randperm(64)[:32]
    received = run("load_matrices", WARP, source, rows.int(), *(Result(torch.zeros(32, 4).int()) for _ in range(2)))
    plain, transposed = (registers.view(torch.int16).view(32, 4, 2) for registers in received)
    lane, matrix, half = torch.meshgrid(torch.arange(32), torch.arange(4), torch.arange(2), indexing="ij")
    g, pair = lane // 4, 2 * (lane % 4) + half
    assert torch.equal(plain, source[rows[8 * matrix + g], pair])
    assert torch.equal(transposed, source[rows[8 * matrix + pair], g])


def test_cp_async_fills_with_zeros_and_arrives_by_groups(run):
    sizes = torch.randint(0, 9, (64,))  # elements of each chunk that are read
    sizes[:3] = torch.tensor([0, 8, 3])
    sizes[-1] = 5
    source = torch.randint(1, 1000, (64 * 8,)).to(torch.int16)
    expected = torch.where(torch.arange(8) < sizes[:, None], source.view(64, 8), 0)
    source = source[: 63 * 8 + 5].clone()  # the last chunk ends with the bytes that are read
    (target,) = run("copy_vecs", WARP, source, (2 * sizes).int(), Result(torch.zeros(64 * 8).to(torch.int16)))
    assert torch.equal(target.view(64, 8), expected)


@pytest.mark.parametrize("name, dtype", [("bf16", BFLOAT16), ("f16", FLOAT16)])
def test_pack_rounds_to_nearest_even(run, name, dtype):
    unit = torch.finfo(dtype).eps
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * unit
    ties = [1 + unit / 2, 1 + 3 * unit / 2, smallest / 2, 3 * smallest / 2, largest * (1 + unit / 4)]
    beside = [math.nextafter(x, y) for x in ties[:2] for y in (0.0, 4.0)]  # float64: float32 rounds them back to ties
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 65519.0, 65520.0, 1e-40, smallest]
    values = torch.tensor([*ties, *beside, *special, *(-x for x in ties)])
    values = torch.cat([values, torch.nextafter(values, torch.tensor(0.0)), torch.randn(128 - 2 * len(values)) * 100])
    low, high = values, values.flip(0).contiguous()
    (packed,) = run(f"pack_{name}", 128, low, high, Result(torch.zeros(128, dtype=torch.int32)), 128)
    pairs = packed.view(torch.int16).view(dtype).view(128, 2)
    for result, given in ((pairs[:, 0], low), (pairs[:, 1], high)):
        assert torch.equal(result.isnan(), given.isnan())
        same = result.view(torch.int16) == given.to(dtype).view(torch.int16)
        assert (same | given.isnan()).all(), f"{given[~same]} became {result[~same]}"


def test_exp2(run, device):
    special = torch.tensor([0.0, 1.0, -1.0, -126.0, 127.0, 128.0, 200.0, -150.0, -1e30, math.inf, -math.inf, math.nan])
    x = torch.cat([special, torch.tensor([1e-40, -1e-40]), torch.linspace(-125.9, 127.9, 1001), torch.randn(1001)])
    (result,) = run("power_of_two", 256, x, Result(torch.zeros_like(x)), len(x))
    exact = torch.exp2(x.double())
    exact[exact < 2.0**-126] = 0.0  # subnormal results are 0
    exact[x >= 128] = math.inf
    assert torch.equal(result[:3], torch.tensor([1.0, 2.0, 0.5]))
    finite = exact.isfinite() & (exact > 0)
    torch.testing.assert_close(result[~finite].double(), exact[~finite], rtol=0, atol=0, equal_nan=True)
    error = ((result.double() - exact) / exact)[finite].abs().max().item()
    print(f"exp2: worst relative error {error * 2**22:.3g} * 2^-22")
    assert error <= 2**-21


# ---- attention/ ------------------------------------------------------------------------------------------------------


def tile_rows(data, width):
    """(64, width) from the bytes of a tile: panels of 64 channels, chunk x of row r at position x ^ (r % 8)."""
    row, channel = torch.arange(ROWS)[:, None], torch.arange(width)[None]
    chunk = channel // 8
    place = (chunk // 8) * (ROWS * 64) + row * 64 + ((chunk ^ row) % 8) * 8 + channel % 8
    return data.flatten()[place]


TILES = [
    # width, head_dim, rows, stride, offset, chunks, first
    (64, 64, 64, 64, 0, True, 0),
    (128, 128, 200, 256, 8, True, 100),
    (128, 128, 100, 128, 0, True, 64),  # ends inside the tile
    (64, 64, 40, 64, 0, True, 64),  # no row exists
    (64, 64, 100, 64, 0, True, -20),  # begins before the first row
    (64, 40, 64, 48, 0, True, 0),  # ends inside a row of the tile
    (128, 8, 30, 72, 0, True, 0),
    (128, 104, 64, 104, 16, False, 0),
    (64, 33, 64, 33, 0, False, 0),
    (64, 33, 50, 37, 1, False, 10),
    (128, 127, 100, 131, 3, False, -5),
    (128, 1, 64, 1, 5, False, 0),
    (64, 64, 64, 65, 0, False, 64),
]


@pytest.mark.parametrize("width, head_dim, rows, stride, offset, chunks, first", TILES)
def test_load_tile(run, width, head_dim, rows, stride, offset, chunks, first):
    data = strided(draw("normal", rows, head_dim, dtype=BFLOAT16), stride, offset, math.nan)
    tile = Result(torch.zeros(ROWS, width, dtype=BFLOAT16))
    given = data, ctypes.c_int64(stride), rows, head_dim, int(chunks), first
    (tile,) = run(f"load_tile_{width}", 128, *given, tile)
    expected = torch.zeros(ROWS, width, dtype=BFLOAT16)
    for row in range(ROWS):
        if 0 <= first + row < rows:
            expected[row, :head_dim] = data[first + row]
    assert torch.equal(tile_rows(tile, width), expected)


@kinds
@pytest.mark.parametrize(
    "kernel, dtype, threads", [("bf16_64", BFLOAT16, 128), ("bf16_128", BFLOAT16, 64), ("f16_128", FLOAT16, 128)]
)
def test_multiply_transposed(run, kernel, dtype, threads, kind):
    width = int(kernel.rpartition("_")[2])
    a, b = (draw(kind, ROWS, width, dtype=dtype) for _ in range(2))
    before = draw(kind, ROWS, COLUMNS)
    (scores,) = run(f"score_{kernel}", threads, a, b, Result(before))
    assert_product(scores, a, b.T, before, kind, f"score_{kernel}")


@kinds
@pytest.mark.parametrize(
    "kernel, dtype, threads", [("bf16_64", BFLOAT16, 64), ("bf16_128", BFLOAT16, 128), ("f16_64", FLOAT16, 128)]
)
def test_multiply_step_and_pack_operand(run, kernel, dtype, threads, kind):
    width = int(kernel.rpartition("_")[2])
    weights, v = draw(kind, ROWS, COLUMNS), draw(kind, COLUMNS, width, dtype=dtype)
    before = draw(kind, ROWS, width)
    (result,) = run(f"multiply_weights_{kernel}", threads, weights, v, Result(before))
    assert_product(result, weights.to(dtype), v, before, kind, f"multiply_weights_{kernel}")


STORES = [
    # kernel, head_dim, rows, stride, offset, chunks, first
    ("bf16_64", 64, 64, 64, 0, True, 0),
    ("bf16_64", 64, 130, 72, 8, True, 64),
    ("bf16_64", 64, 50, 64, 0, True, 0),  # ends inside the tile
    ("bf16_64", 40, 64, 40, 0, True, 0),  # ends inside a row of the tile
    ("f16_128", 128, 100, 136, 0, True, 64),
    ("f16_128", 128, 64, 129, 3, False, 0),
    ("f16_128", 127, 70, 127, 1, False, 64),
    ("bf16_64", 33, 64, 35, 1, False, 0),
    ("bf16_64", 1, 40, 2, 0, False, 0),
]


@pytest.mark.parametrize("kernel, head_dim, rows, stride, offset, chunks, first", STORES)
def test_store_rows(run, kernel, head_dim, rows, stride, offset, chunks, first):
    dtype, threads = {"bf16_64": (BFLOAT16, 64), "f16_128": (FLOAT16, 128)}[kernel]
    width = int(kernel.rpartition("_")[2])
    values, factor = draw("normal", ROWS, width), torch.rand(ROWS) + 0.5
    target = strided(torch.full((rows, head_dim), 7.0, dtype=dtype), stride, offset, 9.0)
    memory = target.as_strided(((rows - 1) * stride + head_dim,), (1,))
    given = Result(memory), ctypes.c_int64(stride), rows, head_dim, int(chunks), first
    (stored,) = run(f"store_rows_{kernel}", threads, values, factor, *given)
    expected = memory.clone()
    written = expected.as_strided((rows, head_dim), (stride, 1))
    rounded = (values * factor[:, None]).to(dtype)
    count = min(ROWS, rows - first)
    written[first : first + count] = rounded[:count, :head_dim]
    assert torch.equal(stored, expected)


@pytest.mark.parametrize("slope", [0.0, 0.25, 8.0, 2**-0.5, 0.003])
@pytest.mark.parametrize(
    "position, key, left",
    [(63, 0, True), (1000, 64, True), (2**24 + 40, 2**24 - 64, True), (5, 0, False), (64, 64, False), (0, 640, False),
     (2**24 - 3, 2**24, False), (-30, 0, False)],
)  # fmt: skip
def test_seed_bias(run, slope, position, key, left):
    (scores,) = run("bias", WARP, slope, position, key, int(left), Result(torch.zeros(32, COLUMNS)))
    row, column = torch.arange(32)[:, None], torch.arange(COLUMNS)[None]
    distance = (key + column - position - row).abs().double()
    lowered = 8.0 * (row % 16 < 8)
    raw = torch.tensor(slope).double()  # as the kernel receives it
    exact = -raw * distance - raw * lowered
    if math.log2(slope or 1).is_integer():
        assert torch.equal(scores.double(), exact)
    else:
        assert ((scores.double() - exact).abs() <= 2**-22 * raw * (distance + 16)).all()


@pytest.mark.parametrize("key", [0, 128])
def test_hide(run, key):
    ranges = [[0, INT_MAX], [INT_MAX, 0], [key + 3, key + 60], [0, key + 17], [key + 63, key + 64], [key + 9, key + 9],
              [key + 64, key + 90], [0, key]]  # fmt: skip
    extra = torch.randint(0, 2 * COLUMNS + key, (32 - len(ranges), 2)).sort(dim=1).values
    ranges = torch.cat([torch.tensor(ranges), extra]).int()
    column = key + torch.arange(COLUMNS)[None]
    visible = (ranges[:, :1] <= column) & (column < ranges[:, 1:])
    scores = torch.where(visible, draw("normal", 32, COLUMNS), math.nan)  # a hidden NaN must not survive
    (result,) = run("mask_keys", WARP, ranges, key, Result(scores))
    assert torch.equal(result, torch.where(visible, scores, -math.inf))
