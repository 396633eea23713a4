"""Checks of arguments, shared by the operations. Each error reads `<op>: <argument> must <requirement>, got <value>`.

They use only types, shapes, dtypes, devices and strides, which a traced call also has. Values are checked inside the
operators, or where `have_values` says that there are any.
"""

import math
from collections.abc import Callable

import torch

from andromeda.ops._common import dtype_name

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_MODES = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))
_mode_of, _num_modes = torch._C._get_dispatch_mode, torch._C._len_torch_dispatch_stack
_early_modes = torch._ops.mode_stack_state_for_pre_dispatch()  # of make_fx(pre_dispatch=True)
_is_jit_tracing = torch._C._is_tracing
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_any_autocast_enabled: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def is_tracing() -> bool:
    """Whether this call is being recorded into a program, or runs on fake tensors.

    Then no tensor made elsewhere may enter the program, and no decision may depend on the value of a tensor.
    """
    if torch.compiler.is_compiling() or _is_jit_tracing():
        return True
    if _num_modes() > 0 and any(_mode_of(key) is not None for key in _MODES):
        return True
    return _early_modes.count() > 0


def have_values(*tensors: torch.Tensor) -> bool:
    """Whether the values of these tensors may be read: none is fake, on the device meta, traced or batched.

    Values on a GPU may also be read, but this waits for the GPU.
    """
    if is_tracing():
        return False
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.is_meta or _is_wrapped(tensor):
            return False
    return True


def check_is_tensor(op: str, name: str, tensor: object) -> None:
    """Require a tensor that is neither nested nor sparse."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(
            f"{op}: {name} must be a tensor with one length for all rows, got a nested one; pack its rows into one, "
            f"{name}.values()[None] (layout torch.jagged), where key_start keeps documents apart"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {tensor.layout}; pass {name}.to_dense()")


def check_tensor(op: str, name: str, tensor: torch.Tensor, axes: tuple[str, ...]) -> None:
    """Require a tensor with the named axes, dense in the last one."""
    check_is_tensor(op, name, tensor)
    if tensor.ndim != len(axes):
        raise ValueError(
            f"{op}: {name} must have {len(axes)} dimensions ({', '.join(axes)}), got shape {tuple(tensor.shape)}"
        )
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{op}: {name} must be dense in its last dimension ({axes[-1]}), got strides {tensor.stride()}; "
            f"pass {name}.contiguous()"
        )


def check_dtypes(op: str, **tensors: torch.Tensor) -> None:
    """Require one of FLOAT_DTYPES, the same for all."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            known = ", ".join(map(dtype_name, FLOAT_DTYPES))
            raise TypeError(f"{op}: {name}.dtype must be one of {known}, got {dtype_name(tensor.dtype)}")
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        found = ", ".join(dtype_name(tensor.dtype) for tensor in tensors.values())
        raise TypeError(f"{op}: {', '.join(tensors)} must have one dtype, got {found}; cast them or use torch.autocast")


def check_devices(op: str, **tensors: torch.Tensor | None) -> None:
    """Require one device for all given tensors."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if len({tensor.device for tensor in given.values()}) > 1:
        found = ", ".join(str(tensor.device) for tensor in given.values())
        raise ValueError(f"{op}: {', '.join(given)} must be on one device, got {found}")


def check_equal_axis(op: str, axis: int, axis_name: str, **tensors: torch.Tensor) -> None:
    """Require that all tensors have the first tensor's size of one axis."""
    (first, leader), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape[axis] != leader.shape[axis]:
            raise ValueError(
                f"{op}: {name}.shape[{axis}] ({axis_name}) must equal {first}.shape[{axis}], "
                f"got {tensor.shape[axis]} and {leader.shape[axis]}"
            )


def check_heads(op: str, q: torch.Tensor, k: torch.Tensor) -> None:
    """Require that axis 2 of q is a multiple of axis 2 of k, and that axis 3 is the same and not empty."""
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_heads != num_kv_heads and (num_kv_heads == 0 or num_heads % num_kv_heads != 0):
        raise ValueError(
            f"{op}: q.shape[2] (num_heads) must be a multiple of k.shape[2] (num_kv_heads), "
            f"got {num_heads} and {num_kv_heads}"
        )
    check_equal_axis(op, 3, "head_dim", q=q, k=k)
    if q.shape[3] == 0:
        raise ValueError(f"{op}: q.shape[3] (head_dim) must be at least 1, got 0")


def check_exact(
    op: str, name: str, tensor: torch.Tensor, axes: tuple[str, ...], shape: tuple[int, ...], *dtypes: torch.dtype
) -> None:
    """Require a tensor of exactly this shape and one of these dtypes; any strides."""
    check_is_tensor(op, name, tensor)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{op}: {name} must have shape ({', '.join(axes)}{',' if len(axes) == 1 else ''}) = {tuple(shape)}, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.dtype not in dtypes:
        allowed = " or ".join(map(dtype_name, dtypes))
        raise TypeError(f"{op}: {name}.dtype must be {allowed}, got {dtype_name(tensor.dtype)}")


def autocast_keeps(tensor: torch.Tensor) -> bool:
    """Whether an operation that casts its arguments under autocast leaves tensors of this dtype and device alone."""
    if not _is_any_autocast_enabled():
        return True
    device = tensor.device.type
    return not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == tensor.dtype


def is_exact(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether it is a tensor of this shape, dtype and device; any strides."""
    return (
        isinstance(tensor, torch.Tensor) and tensor.shape == shape and tensor.dtype == dtype and tensor.device == device
    )


def refuse_gradients(op: str, name: str, remedy: str) -> None:
    """Raise for an argument that has no rule for gradients and transforms of torch.func."""
    raise ValueError(
        f"{op}: {name} must be None where gradients are recorded or torch.func transforms the call, got a tensor; call "
        f"it under torch.no_grad(), or pass {remedy}"
    )


def check_int(op: str, name: str, value: object) -> None:
    """Require an int, or a symbol for one, but not a bool."""
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be an int, got {value!r} ({type(value).__name__})")


def check_finite_number(op: str, name: str, value: float) -> float:
    """Require a finite number; returns it as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # math.isfinite would end a graph that is traced with symbolic numbers
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return float(value)


def check_targets(owner: str, name: str, targets: torch.Tensor, num_tokens: int, ignore_index: int) -> None:
    """Require token ids of a vocabulary, or `ignore_index`. Reads the values, see `have_values`."""
    outside = ((targets < 0) | (targets >= num_tokens)) & (targets != ignore_index)
    if outside.any():
        raise ValueError(
            f"{owner}: {name} must be below the vocabulary size {num_tokens}, or {ignore_index}, got "
            f"{targets[outside][0].item()}"
        )
