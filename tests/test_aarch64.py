"""The CPU kernels on another processor: cross-compiled for aarch64, run by QEMU's user-mode emulation.

A small program (aarch64/driver.cpp) replaces the extension: every kernel call of andromeda.ops runs it once. The tests
are those of test_attention.py and test_qk_norm_rotary.py, on fewer cases. The same program, built for this machine,
distinguishes faults of the program from faults of the kernels.
"""

import dataclasses
import functools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import test_attention
import test_qk_norm_rotary
import torch
from numerics import nan_filled
from test_attention import Case

from andromeda import _C
from andromeda.ops import _select

ROOT = Path(__file__).resolve().parent.parent
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FLOAT32, FLOAT16, BFLOAT16)
DTYPE_NUMBERS = (*DTYPES, torch.int32)  # in the order of DType in andromeda/tensor_view.h
WRITTEN = {
    "attention_forward": ("out", "softmax_lse"),
    "attention_backward": ("dq", "dk", "dv"),
    "qk_norm_rotary_forward": ("q_out", "k_out"),
    "qk_norm_rotary_backward": ("dq", "dk", "dq_scale_partial", "dk_scale_partial"),
}
OF_CUDA = ("stream", "partials", "semaphores", "num_splits", "num_keys", "step")
OF_CUDA += ("q_row", "k_row", "factors", "q_factor_row", "k_factor_row")
NAN = b"\xff"  # as a byte of any floating dtype
LINE = 64  # the alignment of torch's memory and of the driver's


# ---- the program ----------------------------------------------------------------------------------------------------


def missing(tool):
    """Skip the tests, or fail them in CI where .ci/run could have installed the tool, as root with apt-get."""
    message = f"{tool} is not installed"
    if os.environ.get("CI") == "true" and os.geteuid() == 0 and shutil.which("apt-get"):
        pytest.fail(message)
    pytest.skip(message)


def find(*names):
    """The path of the first of these programs that is installed, next to this Python or on PATH."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None) or missing(names[0])


def build(folder, *options):
    """The driver, built in this folder by the project's own CMakeLists.txt, with warnings as errors."""
    cmake, ninja = find("cmake"), find("ninja")
    configure = [cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    configure += ["-DANDROMEDA_EXTENSION=OFF", "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", *options]
    for command in (configure, [cmake, "--build", folder, "--target", "driver"]):
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert result.returncode == 0, result.stdout
    return folder / "driver"


@pytest.fixture(scope="session", params=["native", "aarch64"])
def driver(request, tmp_path_factory):
    """The command that runs the driver."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "native":
        return [build(folder)]
    emulator, compiler = find("qemu-aarch64", "qemu-aarch64-static"), find("aarch64-linux-gnu-g++")
    return [
        emulator,
        build(
            folder,
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            f"-DCMAKE_CXX_COMPILER={compiler}",
            "-DCMAKE_EXE_LINKER_FLAGS=-static",  # the emulator needs no path of libraries
        ),
    ]


def memory_of(tensor):
    """All bytes of a tensor's memory, including those between its elements."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def run_kernel(driver, folder, name, names, *values, **arguments):
    """Run `andromeda._C.<name>(*values, **arguments)` in the driver, with two threads; names: of all arguments.

    All tensors are in one memory with NaN between them, which must neither reach the results nor change.
    """
    arguments |= zip(names, values, strict=False)
    of_cuda = {argument: arguments.pop(argument, None) for argument in OF_CUDA}
    assert not any(of_cuda.values()), of_cuda  # None or 0
    arguments.update(num_threads=2, dtype=DTYPE_NUMBERS.index(arguments["q"].dtype))
    call, memory, places = [name], bytearray(NAN * LINE), {}
    for argument, value in arguments.items():
        if isinstance(value, torch.Tensor):
            places[argument] = len(memory)
            offset = len(memory) + value.storage_offset() * value.element_size()
            call.append(" ".join(map(str, (argument, offset, *value.shape, *value.stride()))))
            memory += memory_of(value).tobytes()
            memory += NAN * (LINE + -len(memory) % LINE)
        else:
            call.append(argument if value is None else f"{argument} {float(value)!r}")
    (folder / "call").write_text("\n".join(call))
    (folder / "memory").write_bytes(memory)
    command = [*driver, folder / "call", folder / "memory"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, ""), f"{name}: {result.returncode} {result.stderr}"
    after = (folder / "memory").read_bytes()
    for output in WRITTEN[name]:
        if (tensor := arguments[output]) is not None:
            target = memory_of(tensor)
            span = slice(places[output], places[output] + target.size)
            memory[span] = after[span]
            target.data[:] = after[span]
    assert after == memory, f"{name} wrote outside its outputs"


@pytest.fixture
def driven(driver, tmp_path, monkeypatch):
    """Passes kernel calls to the driver."""
    for name in WRITTEN:
        signature = getattr(_select.extension, name).__doc__.splitlines()[0]
        names = re.findall(r"(\w+): ", signature)  # "f(q: torch.Tensor, k: ..."
        monkeypatch.setattr(_select.extension, name, functools.partial(run_kernel, driver, tmp_path, name, names))


# ---- attention ------------------------------------------------------------------------------------------------------

SQUARE = Case(batch=1, seqlen_q=97, seqlen_k=97)
CASES = [Case(batch=1, seqlen_q=n, seqlen_k=n, causal=causal) for n in (1, 97, 200) for causal in (True, False)]
CASES += [
    dataclasses.replace(SQUARE, dtype=dtype, head_dim=head_dim)
    for dtype, head_dim in ((FLOAT16, 64), (BFLOAT16, 64), (FLOAT16, 33), (BFLOAT16, 33), (FLOAT32, 128))
]
CASES += [Case(seqlen_q=1, seqlen_k=200, num_heads=4, dtype=dtype) for dtype in DTYPES]  # decode
CASES += [
    dataclasses.replace(SQUARE, num_heads=4, num_kv_heads=2, layout=layout, dtype=dtype)
    for layout, dtype in (("transposed", FLOAT32), ("slice", BFLOAT16), ("slice", FLOAT16), ("offset", FLOAT32))
]
CASES += [
    dataclasses.replace(SQUARE, mask=mask, causal=causal, alibi=alibi)
    for mask, causal, alibi in (
        ("documents", True, "all"),
        ("padding", True, "none"),
        ("window", False, "all"),
        ("blind", True, "all"),
    )
]
CASES += [Case(batch=1, seqlen_q=n, seqlen_k=t) for n, t in ((40, 130), (130, 40))]
LONG = Case(batch=1, seqlen_q=200, seqlen_k=200, num_heads=4, head_dim=16)
BOUNDED = [
    (LONG, 1.0),
    (LONG, 60.0),  # too large: the softmax needs a running maximum
    (dataclasses.replace(LONG, causal=False, dtype=BFLOAT16), 5.0),
    (dataclasses.replace(LONG, seqlen_q=1, seqlen_k=400, dtype=FLOAT16), 8.0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_matches_the_reference(driven, case):
    test_attention.check(test_attention.make(case, "cpu"), "cpu")


@pytest.mark.parametrize("case", [dataclasses.replace(SQUARE, values=v) for v in ("peaked", "denormal")], ids=str)
def test_attention_of_odd_values(driven, case):
    test_attention.check(test_attention.make(case, "cpu"), "cpu", values=case.values)


@pytest.mark.parametrize("case, bound", BOUNDED, ids=str)
def test_attention_with_a_logit_bound(driven, case, bound):
    adversarial = case.dtype == FLOAT32  # in half precision these gradients cancel to below the rounding of `out`
    test_attention.check(test_attention.bounded(case, bound, "cpu", adversarial), "cpu")


# ---- qk_norm_rotary -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=test_qk_norm_rotary.name_of)
@pytest.mark.parametrize("case", test_qk_norm_rotary.CASES, ids=test_qk_norm_rotary.name_of)
def test_qk_norm_rotary_matches_the_reference(driven, case, dtype):
    def tensors_for(case, dtype):
        return case.tensors(dtype)

    with nan_filled():
        test_qk_norm_rotary.test_forward("cpu", tensors_for, case, dtype)
        test_qk_norm_rotary.test_backward("cpu", tensors_for, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=test_qk_norm_rotary.name_of)
def test_qk_norm_rotary_of_strided_tensors(driven, dtype):
    test_qk_norm_rotary.test_strides_do_not_matter("cpu", lambda case, dtype: case.tensors(dtype), dtype)


# ---- the program itself ---------------------------------------------------------------------------------------------


SMALL = Case(batch=1, seqlen_q=2, seqlen_k=2)


def test_the_instruction_sets(driver, driven, monkeypatch):
    monkeypatch.setenv("ANDROMEDA_CPU_ISA", "sse9")
    choices = "baseline" if len(driver) > 1 else ", ".join(_C.cpu_isas())
    with pytest.raises(AssertionError, match=re.escape(f"must be one of {{{choices}}} on this machine, got 'sse9'")):
        test_attention.check(test_attention.make(SMALL, "cpu"), "cpu")


def test_a_dtype_without_kernels(driven):
    q = torch.ones(1, 2, 1, 4, dtype=torch.int32)
    call = {"q": q, "k": q, "v": q, "out": torch.empty_like(q), "softmax_lse": torch.empty(1, 1, 2)}
    call |= {"alibi_slopes": None, "logit_bound": None, "key_start": None, "causal": True, "softmax_scale": 1.0}
    message = "dtype must be one of {float32, float16, bfloat16}, got int32"
    with pytest.raises(AssertionError, match=re.escape(message)):
        _select.extension.attention_forward(**call)
    call |= {"dout": q, "dq": torch.empty_like(q), "dk": torch.empty_like(q), "dv": torch.empty_like(q)}
    with pytest.raises(AssertionError, match=re.escape(message)):
        _select.extension.attention_backward(**call)


def test_arguments_that_the_driver_does_not_know(driven):
    q = torch.ones(1, 2, 1, 4)
    call = {"q": q, "k": q, "v": q, "out": torch.empty_like(q), "softmax_lse": torch.empty(1, 1, 2)}
    call |= {"alibi_slopes": None, "logit_bound": None, "key_start": None, "causal": True, "softmax_scale": 1.0}
    _select.extension.attention_forward(**call)
    with pytest.raises(AssertionError, match="attention_forward has no argument surprise"):
        _select.extension.attention_forward(**call, surprise=1)
    del call["causal"]
    with pytest.raises(AssertionError, match="attention_forward needs the argument causal"):
        _select.extension.attention_forward(**call)
