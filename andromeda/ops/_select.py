"""Which backend runs a call, and why not another one.

A backend is a name of `BACKENDS`. Each operation has a function `unsupported(backend, ...) -> list[str]`: the reasons
why that backend cannot run a call; an empty list means that it can. The choice, the error messages, the tests and
`andromeda info` all read this list, so that no fallback is hidden.
"""

import contextlib
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, get_args

import torch
from torch import Tensor

from andromeda.ops import Backend, _transforms
from andromeda.ops._common import dtype_name

BACKENDS: tuple[Backend, ...] = get_args(Backend)  # in order of preference, except for the entries of `PREFERRED`


class Preference(NamedTuple):
    """The backend that comes first for an operator on an architecture, and the measurement that says so."""

    backend: Backend
    least_flops: int  # of a call: for smaller ones the host's time counts, and a launch by Triton takes longer
    reason: str


# (operator, architecture of `triton_kernels.launch`) -> the exception from the order of `BACKENDS`. What has been
# measured comes before what should be faster by counted instructions (docs/benchmarks.md#predictions).
_LEAST_FLOPS = 2**35  # 0.1 ms of work
PREFERRED: dict[tuple[str, str], Preference] = {
    ("attention_forward", "sm_90"): Preference(
        "triton",
        _LEAST_FLOPS,
        "H200, 8192 tokens, 24/1 heads of 128: 0.93 ms, of 64: 0.54 ms; CUDA's with wgmma are not measured yet",
    ),
    ("attention_backward", "sm_90"): Preference(
        "triton",
        _LEAST_FLOPS,
        "H200, 8192 tokens, 24/1 heads of 128: 2.70 ms, of 64: 1.66 ms; CUDA's with wgmma are not measured yet",
    ),
}
# The device type of the tensors that a backend accepts. The reference accepts any.
DEVICE_TYPES = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}
AUTO = "auto"  # the argument of an operator for backend=None: it chooses when it runs, not when it is traced

# The compiled kernels, or else the reason why they are missing.
if TYPE_CHECKING:
    import andromeda._C as _C

    extension = _C
    extension_error: str | None
else:
    extension, extension_error = None, None
    try:
        extension = importlib.import_module("andromeda._C")
    except ModuleNotFoundError as error:
        if error.name != "andromeda._C":
            raise
        extension_error = "the extension andromeda._C is not built (`pip install -v .` in the source tree builds it)"
    except ImportError as error:
        if "ANDROMEDA_CPU_ISA" in str(error):  # pybind11 makes every error at a module's start an ImportError
            raise RuntimeError(str(error)) from None
        extension_error = f"the extension andromeda._C cannot be loaded: {error}"


def backend_argument(op: str, backend: str | None) -> str:
    """The `backend` argument of an operator, from the `backend` argument of the public function."""
    if backend is None:
        return AUTO
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    return backend


def without_compiled_kernels(backend: str) -> list[str] | None:
    """The result of `unsupported` for a backend that does not call the extension; None for one that does."""
    if backend == "reference":
        return []
    return None if extension_error is None or backend == "triton" else [extension_error]


def unreadable(name: str, tensor: Tensor | None) -> list[str]:
    """The reason, if there is one, why a backend that reads the value of an argument cannot run now."""
    if tensor is None or tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        return []
    return [f"{name} on a GPU (its value cannot be read while a CUDA graph is captured)"]


def common_reasons(backend: str, dtypes: Sequence[torch.dtype], **tensors: Tensor) -> list[str]:
    """The reasons, common to all operations, why the kernels cannot run on these tensors of one dtype and device.

    dtypes: the dtypes for which the backend has kernels.
    """
    first = next(iter(tensors.values()))
    reasons = []
    if first.device.type != DEVICE_TYPES[backend]:
        reasons.append(f"tensors on {first.device}")
    if first.dtype not in dtypes:
        reasons.append(f"dtype {dtype_name(first.dtype)} (built for {', '.join(map(dtype_name, dtypes))})")
    if max(size for tensor in tensors.values() for size in tensor.shape) >= 2**31:
        shapes = " or ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        reasons.append(f"a dimension of {shapes} above 2**31 - 1")
    if backend == "cuda":
        reasons += cuda_unavailable(first.device)
    if backend == "triton":
        reasons += triton_unavailable(first.device)
    return reasons


def preferences(device: torch.device) -> dict[str, Preference]:
    """operator -> the exception from the order of `BACKENDS` on this device."""
    if device.type != "cuda":
        return {}
    from andromeda.triton_kernels import launch

    architecture = launch.architecture(device)
    return {operator: found for (operator, name), found in PREFERRED.items() if name == architecture}


def order(operator: str, device: torch.device | None, flops: int) -> tuple[Backend, ...]:
    """The backends of a call on a device, the one to try first at the front."""
    found = None if device is None else preferences(device).get(operator)
    if found is None or flops < found.least_flops:
        return BACKENDS
    return (found.backend, *(name for name in BACKENDS if name != found.backend))


def choose(
    op: str,
    backend: str,
    unsupported: Callable[[str], list[str]],
    device: torch.device | None = None,
    operator: str = "",
    flops: int = 0,
) -> str:
    """The backend that runs a call: the requested one, or with `AUTO` the first that can.

    unsupported: gives the reasons why a backend cannot run this call.
    device, operator, flops: of the call; they decide the order (`PREFERRED`).

    Raises:
        NotImplementedError: no backend can, or the requested one cannot; gives the reasons for each.
    """
    candidates: Sequence[str] = order(operator, device, flops) if backend == AUTO else (backend,)
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


lasting_answers: dict[torch.device, list[str]] = {}  # of `cuda_unavailable`
os.register_at_fork(after_in_child=lasting_answers.clear)  # a forked child cannot use its parent's CUDA


def cuda_unavailable(device: torch.device) -> list[str]:
    """Why the compiled CUDA kernels cannot run on this device; empty when they can, or when it is not a CUDA device.

    The first call initialises the device. An answer that may change is not kept, and the next call asks again: for
    instance when memory is short, or another process has exclusive use of the device.
    """
    if (reasons := lasting_answers.get(device)) is None:
        reasons, lasting = _first_obstacle(device)
        if lasting:
            lasting_answers[device] = reasons
    return reasons


def _first_obstacle(device: torch.device) -> tuple[list[str], bool]:
    """The reasons of `cuda_unavailable` and whether they last as long as this process."""
    if extension_error is not None:
        return [extension_error], True
    built_for = extension.build_info()["cuda_architectures"]
    if not built_for:
        return ["the extension was built without CUDA"], True
    if device.type != "cuda":
        return [], True
    status = extension.cuda_status(torch.cuda.current_device() if device.index is None else device.index)
    if error := status["device_error"]:  # checked first: on such a device the next call of torch may raise
        return [_with_versions(error)], status["lasting"]
    capability = torch.cuda.get_device_capability(device)
    if not any(_runs_on(architecture, *capability) for architecture in built_for):
        return [f"compute capability {capability[0]}.{capability[1]} (built for {', '.join(built_for)})"], True
    if error := status["kernel_error"]:
        return [_with_versions(error)], status["lasting"]
    return [], True


triton_answers: dict[torch.device, list[str]] = {}  # of `triton_unavailable`
os.register_at_fork(after_in_child=triton_answers.clear)


def triton_unavailable(device: torch.device) -> list[str]:
    """Why Triton kernels cannot run on this device; empty when they can, or when it is not a GPU.

    The first call for a GPU imports Triton and lets it find its driver. A call for another device imports nothing.
    """
    if (reasons := triton_answers.get(device)) is None:
        reasons = triton_answers[device] = _triton_obstacles(device)
    return reasons


def _triton_obstacles(device: torch.device) -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["Triton is not installed (`pip install triton`)"]
    if device.type != "cuda":
        return []
    try:
        triton: Any = importlib.import_module("triton")
        version = str(triton.__version__)
    except Exception as error:  # it loads libraries of its own, which fail in many ways
        return [f"Triton cannot be imported: {_one_line(error)}"]
    from andromeda.triton_kernels import launch

    try:
        architecture = launch.architecture(device)
        if architecture is None:
            return [f"{launch.describe(device)} (there are Triton kernels for {', '.join(launch.SHARED_MEMORY)})"]
        oldest = launch.OLDEST_TRITON[architecture]
        numbers = re.match(r"(\d+)\.(\d+)", version)
        if numbers is None or tuple(map(int, numbers.groups())) < oldest:
            return [f"Triton {version} (on {architecture} these kernels need {'.'.join(map(str, oldest))} or newer)"]
        with device_guard(device):
            triton.runtime.driver.active.get_current_target()  # finds the driver, with a C compiler at the first time
    except Exception as error:  # no driver, no compiler, a device that cannot be used
        return [f"Triton {version} does not run on {device}: {_one_line(error)}"]
    return []


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _with_versions(error: str) -> str:
    versions = extension.cuda_versions()
    return f"{error} (built with CUDA {versions['runtime']}, the driver runs {versions['driver'] or 'none'})"


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code for an architecture in CMake's spelling ("80", "80-real", "90a-real") runs on a device."""
    number, _, kind = architecture.partition("-")
    if number.endswith("a"):  # it uses features of one chip and runs on no other
        return number == f"{major}{minor}a"
    built_major, built_minor = divmod(int(number), 10)
    if kind != "virtual" and built_major == major and built_minor <= minor:
        return True  # machine code, which also runs on later chips of the generation
    return kind != "real" and (built_major, built_minor) <= (major, minor)  # PTX, which the driver compiles


class Plan(Protocol):
    """Everything about a call that does not depend on its data."""

    @property
    def backend(self) -> str: ...


AnyPlan = TypeVar("AnyPlan", bound=Plan)
plans: dict[Hashable, Any] = {}  # key -> plan: see `plan`
_MAX_PLANS = 4096
os.register_at_fork(after_in_child=plans.clear)  # they hold the answers above
_NOT_COMPILED = "{op}: transforms of torch.func are not compiled; leave torch.compile out where they are used"
_NO_GUARD = contextlib.nullcontext()
transforms_active = torch._C._are_functorch_transforms_active
# It returns an int instead of a torch.cuda.Stream, in a tenth of the time; not every torch has it.
_raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def plan(key: Hashable, device: torch.device, make: Callable[..., AnyPlan], *arguments: Any) -> AnyPlan:
    """`make(*arguments)`, remembered for later calls with this key.

    key: everything that the plan depends on. A plan for a GPU is not remembered when the reason for it may go away.
    """
    found = plans.get(key)
    if found is None:
        found = make(*arguments)
        if _lasts(found.backend, device):
            if len(plans) >= _MAX_PLANS:
                plans.clear()
            plans[key] = found
    return found


def _lasts(backend: str, device: torch.device) -> bool:
    """Whether the choice of this backend holds as long as this process: the reasons against better ones may not."""
    if device.type not in (DEVICE_TYPES["cuda"], DEVICE_TYPES["triton"]) or backend == "cuda":
        return True
    if backend != "triton":
        return False
    # Triton's own answers do not change. It may replace CUDA kernels that lack memory only at this moment.
    cuda_unavailable(device)
    return device in lasting_answers


# Every call runs the following functions. They take the device of a tensor, which has an index if it is a GPU: reading
# the index is quicker than comparing the type.


def device_guard(device: torch.device) -> contextlib.AbstractContextManager:
    """Make a GPU the current one for a launch; costs almost nothing if it already is."""
    if device.index is None or device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(device)


def current_stream(device: torch.device) -> int:
    """The cudaStream_t on which torch works on this device, as a number; 0 for the CPU."""
    if _raw_stream is None:
        return 0 if device.index is None else torch.cuda.current_stream(device).cuda_stream
    return 0 if device.index is None else _raw_stream(device.index)


def capture_id(device: torch.device) -> int:
    """The number of the CUDA graph that is capturing calls at this moment; 0 when calls run at once."""
    return 0 if device.index is None else extension.capture_id(current_stream(device), device.index)


def permit_work_beside_captures(permitted: bool) -> bool:
    """Set whether this thread may allocate and wait while others capture graphs; returns the earlier setting."""
    return permitted if extension_error is not None else extension.permit_work_beside_captures(permitted)


def needs_function(op: str, *tensors: torch.Tensor | None) -> bool:
    """Whether a call must go through the operation's autograd Function instead of straight to its operator.

    It must where a gradient may be requested, and in forward mode: an operator without a rule for tangents would drop
    them silently, while the Function refuses them. It must under every transform of torch.func, because there a tensor
    does not know whether an outer transform differentiates it.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        _transforms.refuse_tangents(op, tensors)
        return True
    if torch.is_grad_enabled():
        if torch.compiler.is_dynamo_compiling() and transforms_active():
            # A compiled transform takes only the forward pass of a Function: it would drop the gradient.
            raise NotImplementedError(_NOT_COMPILED.format(op=op))
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return transforms_active()


def usual_dtype(device: str) -> torch.dtype:
    """The dtype in which models run on a device, and therefore of the calls in `report`."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def report(device: str | None = None, dtype: torch.dtype | None = None) -> dict[str, dict[str, list[str]]]:
    """operation -> backend -> the reasons why this backend would not run a typical call on this machine.

    The first backend with an empty list would run the operation. The call has tensors of `dtype` (default:
    `usual_dtype`) on `device` (default: the GPU if there is one), with 24 heads of width 128 and one key head.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = usual_dtype(device)
    q, k = (torch.empty(1, 16, heads, 128, device=device, dtype=dtype) for heads in (24, 1))
    calls = {"attention": (q, k, k), "qk_norm_rotary": (q, k), "token_shift_norm": (q[:, :, 0],)}
    calls["linear_cross_entropy"] = (q[:, :, 0], k[0, :, 0])
    calls["feed_forward"] = (q[:, :, 0],)
    modules = {op: importlib.import_module(f"andromeda.ops.{op}") for op in calls}
    return {op: {name: modules[op].unsupported(name, *calls[op]) for name in BACKENDS} for op in calls}
