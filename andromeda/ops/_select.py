"""Which backend runs a call, and how an operation is made known to torch.

A backend is a name of `BACKENDS`. Each operation has a function `unsupported(backend, ...) -> list[str]`: the reasons
why that backend cannot run a call, an empty list when it can. The same list feeds the choice, the error text, the tests
and `andromeda info`, so that a fallback is never secret.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Hashable

import torch
from torch.utils.flop_counter import register_flop_formula

from andromeda.ops import _transforms

BACKENDS = ("cuda", "triton", "cpu", "reference")  # in order of preference
DEVICE_TYPES = {
    "cuda": "cuda",
    "triton": "cuda",
    "cpu": "cpu",
}  # of the tensors that a backend takes; the reference: any
AUTO = "auto"  # what an operator receives for backend=None: it chooses when it runs, not when it is traced

LIB = torch.library.Library("andromeda", "DEF")

try:
    extension = importlib.import_module("andromeda._C")
    extension_error = None
except ModuleNotFoundError as error:
    if error.name != "andromeda._C":
        raise
    extension = None
    extension_error = "the extension andromeda._C is not built (`pip install -v .` in the source tree builds it)"
except ImportError as error:
    if "ANDROMEDA_CPU_ISA" in str(error):  # pybind11 turns every error of a module's start into an ImportError
        raise RuntimeError(str(error)) from None
    extension = None
    extension_error = f"the extension andromeda._C cannot be loaded: {error}"


def define(
    schema: str, *, implementation: Callable, fake: Callable, flops: Callable, rows, sums=()
) -> torch._ops.OpOverload:
    """Make `andromeda::<schema>` an operator and return it.

    implementation: runs on tensors of any device. It chooses the backend, so that a traced or exported program does
        not carry the choice of the machine that traced it.
    fake: the outputs for given inputs, without data. Like the implementation it must allocate with `new_empty(shape)`.
    flops: floating point operations from shapes, for `torch.utils.flop_counter`.
    rows, sums: see `_transforms.vmap_rule`.
    """
    name = schema.partition("(")[0]
    # The kernels read dense rows: a compiler may not permute the dimensions of an argument behind our back.
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    LIB.impl(name, implementation, "CompositeExplicitAutograd")  # every device: the reference runs on all of them
    torch.library.register_fake(f"andromeda::{name}", fake, lib=LIB)
    packet = getattr(torch.ops.andromeda, name)
    register_flop_formula(packet)(flops)
    torch.library.register_vmap(f"andromeda::{name}", _transforms.vmap_rule(packet.default, rows, sums), lib=LIB)
    return packet.default


def backend_argument(op: str, backend: str | None) -> str:
    """The `backend` argument of an operator from the `backend` argument of the public function."""
    if backend is None:
        return AUTO
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def choose(op: str, backend: str, unsupported: Callable[[str], list[str]]) -> str:
    """The backend that runs a call: the one asked for, or with `AUTO` the first that can.

    unsupported: the reasons why a backend cannot run this call.

    Raises:
        NotImplementedError: none can, or not the one asked for; with the reasons of each.
    """
    candidates = BACKENDS if backend == AUTO else (backend,)
    reasons = {}
    for candidate in candidates:
        reasons[candidate] = unsupported(candidate)
        if not reasons[candidate]:
            return candidate
    headline = f"{op}: no backend supports this call"
    if backend != AUTO:
        able = [other for other in BACKENDS if not unsupported(other)]
        headline = f"{op}: backend {backend!r} does not support this call (these do: {', '.join(able) or 'none'})"
    width = max(map(len, reasons)) + 1
    raise NotImplementedError(
        "\n".join([headline, *(f"    {name + ':':{width}} {'; '.join(why)}" for name, why in reasons.items())])
    )


_lasting_answers = {}  # device -> reasons
os.register_at_fork(after_in_child=_lasting_answers.clear)  # what worked in a process does not work in its children


def cuda_unavailable(device: torch.device) -> list[str]:
    """Why the compiled CUDA kernels cannot run on this device; empty when they can, or when it is no CUDA device.

    The first call makes the device ready. An answer that may change, such as memory that is short or a device that
    another process has to itself, is not kept: the next call asks again.
    """
    if (reasons := _lasting_answers.get(device)) is None:
        reasons, lasting = _first_obstacle(device)
        if lasting:
            _lasting_answers[device] = reasons
    return reasons


cuda_unavailable.cache_clear = _lasting_answers.clear


def _first_obstacle(device: torch.device) -> tuple[list[str], bool]:
    """The reasons of `cuda_unavailable` and whether they last as long as this process."""
    if extension is None:
        return [extension_error], True
    built_for = extension.build_info()["cuda_architectures"]
    if not built_for:
        return ["the extension was built without CUDA"], True
    if device.type != "cuda":
        return [], True
    status = extension.cuda_status(torch.cuda.current_device() if device.index is None else device.index)
    if error := status["device_error"]:  # before torch is asked, which may raise on such a device
        return [_with_versions(error)], status["lasting"]
    capability = torch.cuda.get_device_capability(device)
    if not any(_runs_on(architecture, *capability) for architecture in built_for):
        return [f"compute capability {capability[0]}.{capability[1]} (built for {', '.join(built_for)})"], True
    if error := status["kernel_error"]:
        return [_with_versions(error)], status["lasting"]
    return [], True


def _with_versions(error: str) -> str:
    versions = extension.cuda_versions()
    return f"{error} (built with CUDA {versions['runtime']}, the driver runs {versions['driver'] or 'none'})"


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code for an architecture in CMake's spelling ("80", "80-real", "90a-real") runs on a device."""
    number, _, kind = architecture.partition("-")
    if number.endswith("a"):  # features of one chip: no other runs it
        return number == f"{major}{minor}a"
    built_major, built_minor = divmod(int(number), 10)
    if kind != "virtual" and built_major == major and built_minor <= minor:
        return True  # machine code, which later chips of the generation run as well
    return kind != "real" and (built_major, built_minor) <= (major, minor)  # PTX, which the driver compiles


_plans = {}  # what was decided for calls of one kind: see `plan`
_MAX_PLANS = 4096
os.register_at_fork(after_in_child=_plans.clear)  # they hold the answers above
_NOT_COMPILED = "{op}: transforms of torch.func are not compiled; leave torch.compile out where they are used"
_NO_GUARD = contextlib.nullcontext()
# An int instead of a torch.cuda.Stream, in a tenth of the time; not every torch has it.
_transforms_active = torch._C._are_functorch_transforms_active
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def plan(key: Hashable, device: torch.device, make: Callable[[], tuple]) -> tuple:
    """`make()`, a plan whose first element is the backend, remembered for later calls with this key.

    key: all that the plan depends on. Where a GPU's kernels are passed over, the reason may pass as well: nothing is
        remembered.
    """
    found = _plans.get(key)
    if found is None:
        found = make()
        if device.type != DEVICE_TYPES["cuda"] or found[0] == "cuda":
            if len(_plans) >= _MAX_PLANS:
                _plans.clear()
            _plans[key] = found
    return found


# These functions are on the way of every call. They take the device of a tensor, which has an index if it is a GPU's:
# to read that is quicker than to compare its type.


def device_guard(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one for a launch; costs next to nothing where it is that already."""
    if device.index is None or device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> int:
    """The cudaStream_t on which torch works on this device, as a number; 0 for the CPU."""
    if device.index is None:
        return 0
    return torch.cuda.current_stream(device).cuda_stream if _raw_stream is None else _raw_stream(device.index)


def capture_id(device: torch.device) -> int:
    """The number of the CUDA graph that the calls of this moment become part of; 0 when they run at once."""
    if device.index is None or not torch.cuda.is_current_stream_capturing():
        return 0
    return extension.capture_id(current_stream(device))


def permit_work_beside_captures(permitted: bool) -> bool:
    """Whether this thread may allocate and wait while others capture graphs; returns what was in force before."""
    return permitted if extension is None else extension.permit_work_beside_captures(permitted)


def needs_function(op: str, *tensors: torch.Tensor | None) -> bool:
    """Whether a call must go through the operation's autograd Function instead of straight to its operator.

    It must where a gradient may be asked for, and in forward mode: an operator without a rule for tangents drops them
    silently, here they are refused. Under a transform of torch.func a tensor does not know whether an outer one
    follows it.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        _transforms.refuse_tangents(op, tensors)
        return True
    if torch.is_grad_enabled():
        if torch.compiler.is_dynamo_compiling() and _transforms_active():
            # A compiled transform takes the forward pass of a Function alone: it would drop the gradient.
            raise NotImplementedError(_NOT_COMPILED.format(op=op))
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return _transforms_active()


def usual_dtype(device: str) -> torch.dtype:
    """What models are run in on a device: the dtype of the calls that `report` is about."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def report(device: str | None = None, dtype: torch.dtype | None = None) -> dict[str, dict[str, list[str]]]:
    """Per operation and backend the reasons why it would not run a typical call on this machine.

    The first backend of an operation with an empty list is the one that would run. The call is of `dtype` (default:
    `usual_dtype`), on `device` (default: the GPU if there is one), with 24 heads of width 128 and one key head.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = usual_dtype(device)
    q, k = (torch.empty(1, 16, heads, 128, device=device, dtype=dtype) for heads in (24, 1))
    calls = {"attention": (q, k, k), "qk_norm_rotary": (q, k), "token_shift_norm": (q[:, :, 0],)}
    modules = {op: importlib.import_module(f"andromeda.ops.{op}") for op in calls}
    return {op: {name: modules[op].unsupported(name, *calls[op]) for name in BACKENDS} for op in calls}
