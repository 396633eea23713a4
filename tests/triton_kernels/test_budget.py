"""Every Triton kernel as the JIT compiles it for every architecture: registers, stack memory, shared memory.

Operations run with backend="triton" on small tensors, on a driver that compiles and launches nothing: what it compiles
is what a launch on such a device would compile, with the tiles of that device and the JIT's own attributes. No GPU is
needed. What they use of stack memory is in tests/triton_budget.toml. To print all, and the lines of that file:

    python tests/triton_kernels/test_budget.py [WORD ...]      of calls whose name has the words: attend bfloat16 128
"""

import concurrent.futures
import dataclasses
import functools
import inspect
import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS)]  # for the processes that compile, which pytest does not start

from emulator import triton_driver  # noqa: E402

from andromeda import attention, qk_norm_rotary  # noqa: E402
from andromeda.ops import _select  # noqa: E402
from andromeda.ops.feed_forward import feed_forward  # noqa: E402
from andromeda.ops.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from andromeda.ops.token_shift_norm import token_shift_norm  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

KERNELS = Path(inspect.getfile(_select)).parents[1] / "triton_kernels"
BUDGET = tomllib.loads((TESTS / "triton_budget.toml").read_text())
# The names of `launch.SHARED_MEMORY` -> what Triton compiles for.
TARGETS = {
    "sm_80": ("cuda", 80),
    "sm_86": ("cuda", 86),
    "sm_90": ("cuda", 90),
    "sm_100": ("cuda", 100),
    "sm_120": ("cuda", 120),
    "gfx942": ("hip", "gfx942"),
}
VERSION = "3.6."  # whose compilers' results the budget holds
REGISTERS = {"cuda": 65536, "hip": 4 * 512 * 64}  # of a multiprocessor, in lanes
TENSOR_MEMORY = 512  # columns of a multiprocessor of sm_100


# ---- the calls ------------------------------------------------------------------------------------------------------

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
CALLS = {}  # name -> function
ARCHITECTURES = {}  # name -> the names in TARGETS for which it is compiled
# Without sm_86, which has the tiles and the limits of sm_120 and, with a few registers more, the code of sm_80.
MOST = tuple(name for name in TARGETS if name != "sm_86")
SOME = ("sm_80", "sm_90", "gfx942")  # for variants that have the tiles of another one


def call(*variants, architectures=MOST):
    """Register a function of keyword arguments once for each of the variants."""

    def register(function):
        for variant in variants:
            words = [name if value is True else str(value).removeprefix("torch.") for name, value in variant.items()]
            name = " ".join([function.__name__, *words])
            CALLS[name] = functools.partial(function, **variant)
            ARCHITECTURES[name] = architectures
        return function

    return register


def placed(*shape, dtype, odd=False):
    """A tensor; odd: with rows that begin at no multiple of 16 bytes, at distances that are no multiples either."""
    *outer, width = shape
    if not odd:
        return torch.zeros(shape, dtype=dtype)
    rows = torch.zeros((*outer, width + 3), dtype=dtype).flatten()
    memory = torch.zeros(len(rows) + 1, dtype=dtype)
    return memory[1:].view(*outer, width + 3)[..., :width]


def differentiate(function, *tensors):
    """Run both passes."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [output for output in outputs if output is not None]
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(output) for output in outputs])


# Each entry of the tables for attention, half precision first.
WIDTHS = [{"dtype": dtype, "head_dim": width} for dtype in (BFLOAT16, FLOAT32) for width in (64, 128, 256)]
ODD = {"dtype": BFLOAT16, "head_dim": 128, "odd": True, "documents": True}


def attention_arguments(queries, head_dim, dtype, odd, documents):
    keys, heads = (257, 3) if odd else (256, 4)
    q = placed(1, queries, heads, head_dim, dtype=dtype, odd=odd)
    k, v = (placed(1, keys, 1, head_dim, dtype=dtype, odd=odd) for _ in range(2))
    key_start = torch.zeros(1, queries, dtype=torch.int32) if documents else None
    options = {"alibi_slopes": torch.ones(heads), "logit_bound": torch.ones(heads), "key_start": key_start}
    return (q, k, v), options | {"causal": True, "backend": "triton"}


@call(*WIDTHS[:3], architectures=tuple(TARGETS))
@call(*WIDTHS[3:])
@call(ODD, {"dtype": FLOAT16, "head_dim": 128}, architectures=SOME)
def attend(dtype, head_dim, odd=False, documents=False):
    tensors, options = attention_arguments(256, head_dim, dtype, odd, documents)
    differentiate(lambda q, k, v: attention(q, k, v, **options), *tensors)


@call(*WIDTHS[:3], architectures=tuple(TARGETS))
@call(*WIDTHS[3:])
@call(ODD, {"dtype": BFLOAT16, "head_dim": 128, "num_keys": True}, architectures=SOME)
def decode(dtype, head_dim, odd=False, documents=False, num_keys=False):
    tensors, options = attention_arguments(1, head_dim, dtype, odd, documents)
    attention(*tensors, **options, num_keys=torch.tensor([200], dtype=torch.int32) if num_keys else None)


@call(
    {"dtype": BFLOAT16, "head_dim": 128},
    {"dtype": BFLOAT16, "head_dim": 64, "odd": True},
    {"dtype": FLOAT32, "head_dim": 128},
)
def normalise_and_rotate(dtype, head_dim, odd=False):
    q, k = (placed(2, 32, heads, head_dim, dtype=dtype, odd=odd) for heads in (3 if odd else 4, 1))
    scales = [torch.ones(x.shape[2:]) for x in (q, k)]
    differentiate(
        lambda q, k, q_scale, k_scale: qk_norm_rotary(
            q, k, q_scale=q_scale, k_scale=k_scale, rotary_dim=head_dim // 2, xpos=True, backend="triton"
        ),
        *(q, k, *scales),
    )


@call({"dtype": BFLOAT16, "head_dim": 128})
def rotate_at_a_step(dtype, head_dim):
    q, k = (placed(1, 1, heads, head_dim, dtype=dtype) for heads in (4, 1))
    step = torch.tensor([5], dtype=torch.int32)
    qk_norm_rotary(q, k, rotary_dim=head_dim // 2, xpos=True, step=step, backend="triton")


@call(
    {"dtype": BFLOAT16, "dim": 2560},
    {"dtype": BFLOAT16, "dim": 771, "odd": True, "documents": True},
    {"dtype": FLOAT32, "dim": 8192},
)
def shift_and_normalise(dtype, dim, odd=False, documents=False):
    x, residual = (placed(2, 32, dim, dtype=dtype, odd=odd) for _ in range(2))
    gamma, residual_scale = torch.ones(dim, dtype=dtype), torch.ones(dim, dtype=dtype)
    key_start = torch.zeros(2, 32, dtype=torch.int32) if documents else None
    differentiate(
        lambda x, residual, gamma, scale: token_shift_norm(
            x, gamma=gamma, residual=residual, residual_scale=scale, alpha=2.0, shift=1, key_start=key_start,
            backend="triton",
        ),
        *(x, residual, gamma, residual_scale),
    )  # fmt: skip


@call({"dtype": BFLOAT16, "num_tokens": 50304}, {"dtype": FLOAT32, "num_tokens": 1001, "odd": True})
def cross_entropy(dtype, num_tokens, odd=False):
    hidden = placed(16, 32, dtype=dtype, odd=odd)
    weight = placed(num_tokens, 32, dtype=dtype, odd=odd)
    targets = torch.zeros(16, dtype=torch.int64)
    differentiate(lambda h, w: linear_cross_entropy(h, w, targets, backend="triton"), hidden, weight)


@call(
    {"dtype": BFLOAT16, "hidden": 512}, {"dtype": FLOAT16, "hidden": 77, "odd": True}, {"dtype": FLOAT32, "hidden": 512}
)
def bias_and_gelu(dtype, hidden, odd=False):
    x, weight_out = placed(16, 32, dtype=dtype), torch.zeros(32, hidden, dtype=dtype)
    parameters = (torch.zeros(hidden, 32, dtype=dtype), placed(hidden, dtype=dtype, odd=odd), weight_out)
    differentiate(lambda *tensors: feed_forward(*tensors, None, backend="triton"), x, *parameters)


# ---- measurements ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one program needs."""

    kernel: str  # with its module
    call: str
    architecture: str
    registers: int  # per lane
    stack: int  # bytes per lane: registers that were spilled, and arrays that are indexed at run time
    shared: int  # bytes per block
    tensor_memory: int  # columns, on sm_100
    lanes: int  # of a block

    def excess(self, shared_memory):
        """What keeps the program from running on a card, in words."""
        backend, _ = TARGETS[self.architecture]
        # A warp gets registers by the 256 or 512, which is 8 for each lane.
        needed = {
            "lanes": (self.lanes, 1024),
            "registers": (-(-self.registers // 8) * 8 * self.lanes, REGISTERS[backend]),
            "shared memory": (self.shared, shared_memory[self.architecture]),
            "tensor memory": (self.tensor_memory, TENSOR_MEMORY),
            "stack": (self.stack, permitted_stack(self)),
        }
        return [f"{name}: {used}, there are {limit}" for name, (used, limit) in needed.items() if used > limit]


def permitted_stack(usage):
    return BUDGET.get(usage.kernel, {}).get(usage.call, {}).get(usage.architecture, 0)


def measure(architecture, name):
    """The usage of every program that a call compiles."""
    driver = triton_driver.CompilingDriver(*TARGETS[architecture])
    _select.plans.clear()
    with (
        mock.patch.object(_select, "triton_unavailable", lambda device: []),
        mock.patch.object(_select, "DEVICE_TYPES", {"cuda": "no device", "triton": "cpu", "cpu": "no device"}),
        triton_driver.installed(driver),
    ):
        try:
            CALLS[name]()
        except Exception as error:
            raise RuntimeError(f"{name}, {architecture}: {error}") from error
    return [usage_of(*program, architecture, name) for program in driver.compiled.values()]


def usage_of(source, metadata, architecture, name):
    backend, _ = TARGETS[architecture]
    if backend == "cuda":
        listing = resources(triton_driver.cached_file(metadata.hash, source.name, "cubin"))
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", listing)}
        registers, stack = numbers["REG"], numbers["STACK"] + numbers["LOCAL"]
    else:
        listing = triton_driver.cached_file(metadata.hash, source.name, "amdgcn").read_text()
        numbers = {key: int(value) for key, value in re.findall(r"^[ -]+\.(\w+): +(\d+)$", listing, re.MULTILINE)}
        registers, stack = numbers["vgpr_count"], numbers["private_segment_fixed_size"]
    return Usage(
        kernel=f"{source.fn.__module__.rpartition('.')[2]}.{metadata.name}",
        call=name,
        architecture=architecture,
        registers=registers,
        stack=stack,
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", None) or 0,
        lanes=metadata.num_warps * metadata.target.warp_size,
    )


def resources(cubin):
    """The line of resources that NVIDIA's disassembler prints; Triton brings it."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [program, "--dump-resource-usage", cubin]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def measured():
    """The usage of every program of every call on every architecture."""
    return list(measure_all(CALLS))


def measure_all(names):
    """The usage of every program of these calls, as it becomes known."""
    tasks = [(architecture, name) for name in names for architecture in ARCHITECTURES[name]]
    # Processes, because much of the compiler runs in Python.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        for usages in pool.map(measure, *zip(*tasks, strict=True)):
            yield from usages


def stack_used(usages):
    """kernel -> call -> architecture -> bytes of stack memory, without zeros."""
    used = {}
    for usage in usages:
        if usage.stack > 0:
            of_call = used.setdefault(usage.kernel, {}).setdefault(usage.call, {})
            of_call[usage.architecture] = max(usage.stack, of_call.get(usage.architecture, 0))
    return used


# ---- tests ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_memory():
    triton = pytest.importorskip("triton")
    if not triton.__version__.startswith(VERSION):
        pytest.skip(f"the budget is of Triton {VERSION}, this is {triton.__version__}")
    from andromeda.triton_kernels import launch

    assert launch.SHARED_MEMORY.keys() == TARGETS.keys()
    return launch.SHARED_MEMORY


@pytest.mark.parametrize("architecture", TARGETS)
def test_programs_fit(architecture, shared_memory):
    usages = [usage for usage in measured() if usage.architecture == architecture]
    excess = {f"{usage.kernel}, {usage.call}": usage.excess(shared_memory) for usage in usages}
    assert {name: words for name, words in excess.items() if words} == {}


def test_every_kernel_is_compiled_for_every_architecture(shared_memory):
    defined = {
        f"{path.stem}.{kernel}"
        for path in KERNELS.glob("*.py")
        for kernel in re.findall(r"^def (\w+_kernel)\($", path.read_text(), re.MULTILINE)
    }
    assert defined
    for architecture in MOST:
        compiled = {usage.kernel for usage in measured() if usage.architecture == architecture}
        assert defined - compiled == set()


def test_every_entry_of_the_table_is_compiled(shared_memory):
    from andromeda.triton_kernels import tiles

    tables = {name: table for name, table in vars(tiles).items() if name.isupper() and isinstance(table, dict)}
    assert tables
    widths = {(architecture, size): {64, 128, 256} for architecture in TARGETS for size in (2, 4)}
    for table in tables.values():
        assert {key: set(by_width) for key, by_width in table.items()} == widths
        assert all(table["sm_86", size] == table["sm_120", size] for size in (2, 4))
    compiled = {(name, architecture) for name in CALLS for architecture in ARCHITECTURES[name]}
    for function in ("attend", "decode"):
        for dtype in ("bfloat16", "float32"):
            names = {f"{function} {dtype} {width}" for width in (64, 128, 256)}
            assert {(name, architecture) for name in names for architecture in MOST} <= compiled


def test_the_budget_is_tight(shared_memory):
    """It has no bytes that no program uses. Other operations than attention use none on sm_90."""
    assert stack_used(measured()) == BUDGET
    on_hopper = {usage.kernel for usage in measured() if usage.architecture == "sm_90" and usage.stack > 0}
    assert all(name.startswith("attention_") and "decode" not in name for name in on_hopper)


def report(words):
    from andromeda.triton_kernels.launch import SHARED_MEMORY

    print(f"{'kernel':42} {'call':36} {'':8} lanes registers  stack  shared")
    usages = []
    for usage in measure_all([name for name in CALLS if all(word in name.split() for word in words)]):
        line = f"{usage.kernel:42} {usage.call:36} {usage.architecture:8} {usage.lanes:5} {usage.registers:9}"
        print(f"{line} {usage.stack:6} {usage.shared:7}  {'; '.join(usage.excess(SHARED_MEMORY))}".rstrip(), flush=True)
        usages.append(usage)
    print("\n# as tests/triton_budget.toml has it")
    for kernel, calls in stack_used(usages).items():
        print(f'["{kernel}"]')
        for name, by_architecture in calls.items():
            print(f'"{name}" = {{ {", ".join(f"{key} = {size}" for key, size in by_architecture.items())} }}')


if __name__ == "__main__":
    report(sys.argv[1:])
