"""Feed-forward: two linear maps with bias and exact GELU between them (docs/model.md#6)."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from andromeda.ops import Backend, _checks, _operator, _select, _transforms
from andromeda.ops._common import cast, compute_dtype, contiguous
from andromeda.reference import feed_forward as reference

NAME = "feed_forward"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# The CPU works on blocks of rows with this many hidden numbers, 8 MiB of float32. A block stays in the processor's
# cache, and the next one reuses its memory: malloc would return the memory of a whole hidden tensor to the system each
# time, and a page fault per 4 KiB costs as much as the GELU. The gradients of the weights are read and written once for
# each block, which therefore has at least this many rows.
_BLOCK_HIDDEN = 2**21
_MIN_BLOCK_ROWS = 256

aten = torch.ops.aten
_Result = TypeVar("_Result")


def feed_forward(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Two linear maps with the exact GELU between them (docs/model.md#6).

        out = gelu(x @ weight_in^T + bias_in) @ weight_out^T + bias_out,   gelu(u) = u * (1 + erf(u / sqrt(2))) / 2

    Differentiable once in all tensors; with backend="reference" any number of times. No activation is kept for the
    backward pass: Triton keeps x and the first product, the others keep x alone and repeat that product. Under autocast
    all tensors are cast to its dtype, as for `torch.nn.functional.linear`.

    Args:
        x: (..., dim), float32, bfloat16, float16; float64 takes the reference. Any strides.
        weight_in: (hidden, dim), dtype and device of x.
        bias_in: (hidden,), or None.
        weight_out: (dim_out, hidden).
        bias_out: (dim_out,), or None.
        backend: "triton", "cpu" or "reference". Default: the first that supports the call. The products are always
            torch's, with its settings of precision.

    Returns:
        (..., dim_out), dtype of x.

    Raises:
        ValueError, TypeError: the call is wrong on every machine.
        NotImplementedError: no backend, or not the requested one, can run it here; gives the reasons for each.
    """
    call = Call(x, weight_in, bias_in, weight_out, bias_out, _select.backend_argument(NAME, backend))
    if not _is_usual(call):
        call = _checked(call)
        if x.ndim == 1:
            call = call._replace(x=call.x[None])
    needs_function = _select.needs_function(NAME, *call.tensors)
    out: Tensor = (_FeedForward.apply(*call) if needs_function else FORWARD(*call))[0]
    return out[0] if x.ndim == 1 else out


def unsupported(backend: str, x: Tensor) -> list[str]:
    """Why `backend` cannot run `feed_forward` on this (correct) x here; empty when it can."""
    if backend == "reference":
        return []
    if backend == "cuda":
        return ["no CUDA kernel: the products are torch's on every backend, and Triton has the rest"]
    return _select.common_reasons(backend, _DTYPES, x=x)


class Call(NamedTuple):
    """The arguments of `feed_forward_forward`, in the order of its schema."""

    x: Tensor
    weight_in: Tensor
    bias_in: Tensor | None
    weight_out: Tensor
    bias_out: Tensor | None
    backend: str

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
        return self[:5]


class Wanted(NamedTuple):
    """Which gradients to compute. That of a tensor which is not given is not wanted."""

    x: bool
    weight_in: bool
    bias_in: bool
    weight_out: bool
    bias_out: bool


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of the tensors of a Call


def _is_usual(call: Call) -> bool:
    """Whether the call is correct and needs no cast. Most calls are, and this takes a few microseconds.

    `_checked` examines every other call again and reports its errors.
    """
    x, weight_in, bias_in, weight_out, bias_out, _ = call
    if not all(isinstance(tensor, Tensor) for tensor in (x, weight_in, weight_out)):
        return False
    if x.is_nested or x.layout != torch.strided or x.ndim < 2 or weight_in.ndim != 2 or weight_out.ndim != 2:
        return False
    dtype, device = x.dtype, x.device
    device_type = device.type
    hidden = weight_in.shape[0]
    return (
        dtype in _checks.FLOAT_DTYPES
        and x.shape[-1] == weight_in.shape[1]
        and weight_out.shape[1] == hidden
        and weight_in.dtype == weight_out.dtype == dtype
        and weight_in.device == weight_out.device == device
        and device_type in ("cpu", "cuda")
        and not torch.is_autocast_enabled(device_type)
        and (bias_in is None or _checks.is_exact(bias_in, (hidden,), dtype, device))
        and (bias_out is None or _checks.is_exact(bias_out, (weight_out.shape[0],), dtype, device))
    )


def _checked(call: Call) -> Call:
    """The call, cast under autocast.

    Raises:
        ValueError, TypeError: see `feed_forward`.
    """
    axes = {"weight_in": ("hidden", "dim"), "weight_out": ("dim_out", "hidden")}
    for name, tensor in call._asdict().items():
        if name != "backend" and (tensor is not None or name in ("x", *axes)):
            _checks.check_is_tensor(NAME, name, tensor)
    device = call.x.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        call = Call._make((*(_rounded(tensor, dtype) for tensor in call.tensors), call.backend))
    given = {name: tensor for name, tensor in zip(Call._fields, call.tensors, strict=False) if tensor is not None}
    x, weight_in, _, weight_out, *_ = call
    if x.ndim == 0:
        raise ValueError(f"{NAME}: x must have at least 1 dimension (..., dim), got shape ()")
    for name, names in axes.items():
        if given[name].ndim != 2:
            shape = tuple(given[name].shape)
            raise ValueError(f"{NAME}: {name} must have 2 dimensions ({', '.join(names)}), got shape {shape}")
    _checks.check_dtypes(NAME, **given)
    hidden, dim_out = weight_in.shape[0], weight_out.shape[0]
    _checks.check_exact(NAME, "weight_in", weight_in, axes["weight_in"], (hidden, x.shape[-1]), x.dtype)
    _checks.check_exact(NAME, "weight_out", weight_out, axes["weight_out"], (dim_out, hidden), x.dtype)
    for name, axis, size in (("bias_in", "hidden", hidden), ("bias_out", "dim_out", dim_out)):
        if name in given:
            _checks.check_exact(NAME, name, given[name], (axis,), (size,), x.dtype)
    _checks.check_devices(NAME, **given)
    return call


def _rounded(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor as `torch.nn.functional.linear` takes it under autocast."""
    wide = tensor is None or tensor.dtype == torch.float64 or not tensor.is_floating_point()
    return tensor if wide else cast(tensor, dtype)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The operator `feed_forward_forward`: out, and for Triton the first product."""
    backend = _plan(call).backend
    out, product = _fake_forward(call)
    if backend == "cpu":
        _cpu_forward(call, _rows(out))
    elif backend == "triton":
        _triton_forward(call, _rows(out), _rows(product))
    else:
        with torch.autocast(call.x.device.type, enabled=False):  # it would round the products
            out.copy_(reference.feed_forward(*call.tensors))
    return out, product


def backward(dout: Tensor, product: Tensor, wanted: Wanted, call: Call) -> Gradients:
    """The operator `feed_forward_backward`. A gradient that is not wanted is an empty tensor.

    product: the second result of `feed_forward_forward`.
    """
    backend = _plan(call).backend
    gradients = _fake_backward(dout, product, wanted, call)
    if backend == "cpu":
        _cpu_backward(_rows(dout), wanted, call, gradients)
    elif backend == "triton":
        _triton_backward(_rows(dout), _rows(product), wanted, call, gradients)
    else:
        for gradient, result, is_wanted in zip(gradients, _plain_backward(dout, call), wanted, strict=True):
            if is_wanted:
                gradient.copy_(result)
    return gradients


# Products write into a given tensor, because torch.autocast would round those of other forms to half precision.


def _cpu_forward(call: Call, out: Tensor) -> None:
    x, size = _rows(call.x), _block_rows(call)
    workspace = x.new_empty(min(size, len(x)), len(call.weight_in))
    for block, out_block in zip(x.split(size), out.split(size), strict=True):
        hidden = workspace[: len(block)]
        _linear(block, call.weight_in, call.bias_in, hidden)
        _linear(aten.gelu_(hidden), call.weight_out, call.bias_out, out_block)


def _cpu_backward(dout: Tensor, wanted: Wanted, call: Call, gradients: Gradients) -> None:
    """Half precision sums the blocks in float32."""
    x = _rows(call.x)
    dx, *of_parameters = gradients
    dtype = compute_dtype(x.dtype)
    sums = [gradient if gradient.dtype == dtype else gradient.to(dtype) for gradient in of_parameters]
    for total in sums:
        total.zero_()
    dweight_in, dbias_in, dweight_out, dbias_out = sums
    size = _block_rows(call)
    workspaces = x.new_empty(3, min(size, len(x)), len(call.weight_in))
    before_x = wanted.x or wanted.weight_in or wanted.bias_in
    for start in range(0, len(x), size):
        rows = slice(start, start + size)
        block, dblock = x[rows], dout[rows]
        hidden, activation, dhidden = workspaces[:, : len(block)].unbind()
        if wanted.bias_out:
            dbias_out += dblock.sum(0, dtype=dtype)
        if before_x or wanted.weight_out:
            _linear(block, call.weight_in, call.bias_in, hidden)
        if wanted.weight_out:
            _add_product(dweight_out, dblock.T, aten.gelu.out(hidden, out=activation))
        if before_x:
            torch.mm(dblock, call.weight_out, out=dhidden)
            aten.gelu_backward.grad_input(dhidden, hidden, grad_input=dhidden)
        if wanted.bias_in:
            dbias_in += dhidden.sum(0, dtype=dtype)
        if wanted.weight_in:
            _add_product(dweight_in, dhidden.T, block)
        if wanted.x:
            torch.mm(dhidden, call.weight_in, out=_rows(dx)[rows])
    for gradient, total in zip(of_parameters, sums, strict=True):
        if gradient is not total:
            gradient.copy_(total)


def _triton_forward(call: Call, out: Tensor, product: Tensor) -> None:
    from andromeda.triton_kernels import feed_forward as kernels

    torch.mm(_rows(call.x), call.weight_in.T, out=product)
    activation = torch.empty_like(product)
    with _select.device_guard(product.device):
        kernels.forward(product=product, bias=contiguous(call.bias_in), activation=activation)
    _linear(activation, call.weight_out, call.bias_out, out)


def _triton_backward(dout: Tensor, product: Tensor, wanted: Wanted, call: Call, gradients: Gradients) -> None:
    from andromeda.triton_kernels import feed_forward as kernels

    dx, dweight_in, dbias_in, dweight_out, dbias_out = gradients
    if wanted.x or wanted.weight_in or wanted.bias_in or wanted.weight_out:
        activation, dhidden = torch.empty_like(product), torch.empty_like(product)
        torch.mm(dout, call.weight_out, out=dhidden)
        with _select.device_guard(product.device):
            kernels.backward(
                product=product,
                bias=contiguous(call.bias_in),
                dactivation=dhidden,
                activation=activation,
                dproduct=dhidden,
                dbias=dbias_in if wanted.bias_in else None,
            )
    if wanted.weight_out:
        torch.mm(dout.T, activation, out=dweight_out)
    if wanted.bias_out:
        torch.sum(dout, dim=0, out=dbias_out)
    if wanted.weight_in:
        torch.mm(dhidden.T, _rows(call.x), out=dweight_in)
    if wanted.x:
        torch.mm(dhidden, call.weight_in, out=_rows(dx))


def _plain_forward(call: Call) -> tuple[Tensor, Tensor]:
    """The outputs by operations that a program without the operator can hold."""
    product = torch.nn.functional.linear(call.x, call.weight_in) if _keeps_product(call) else call.x.new_empty(0)
    return reference.feed_forward(*call.tensors), product


def _plain_backward(dout: Tensor, call: Call) -> tuple[Tensor, ...]:
    """The gradients by operations that torch can differentiate again."""
    with torch.autocast(call.x.device.type, enabled=False):
        return reference.feed_forward_backward(dout, call.x, call.weight_in, call.bias_in, call.weight_out)


def _rows(tensor: Tensor) -> Tensor:
    """(..., width) as (rows, width)."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.T, out=out)
    else:
        torch.addmm(bias, x, weight.T, out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b, out=a.new_empty(total.shape))


def _block_rows(call: Call) -> int:
    return max(_MIN_BLOCK_ROWS, _BLOCK_HIDDEN // max(1, len(call.weight_in)))


class Plan(NamedTuple):
    """Everything about a call that does not depend on its data."""

    backend: str


def _plan(call: Call) -> Plan:
    x = call.x
    key = (NAME, call.backend, x.device, x.dtype, x.shape)
    return _select.plan(key, x.device, lambda: _make_plan(call))


def _make_plan(call: Call) -> Plan:
    return Plan(_select.choose(NAME, call.backend, lambda name: unsupported(name, call.x), call.x.device))


def _keeps_product(call: Call) -> bool:
    """Whether Triton should run the call, as far as a trace can know. If it is missing, the result stays unused."""
    if call.backend != _select.AUTO:
        return call.backend == "triton"
    return call.x.device.type == _select.DEVICE_TYPES["triton"] and call.x.dtype in _DTYPES


def _fake_forward(call: Call) -> tuple[Tensor, Tensor]:
    x = call.x
    out = x.new_empty((*x.shape[:-1], call.weight_out.shape[0]))
    return out, x.new_empty((*x.shape[:-1], call.weight_in.shape[0]) if _keeps_product(call) else 0)


def _fake_backward(dout: Tensor, product: Tensor, wanted: Wanted, call: Call) -> Gradients:
    dx, dweight_in, dbias_in, dweight_out, dbias_out = (
        call.x.new_empty(tensor.shape if is_wanted and tensor is not None else 0)
        for tensor, is_wanted in zip(call.tensors, wanted, strict=True)
    )
    return dx, dweight_in, dbias_in, dweight_out, dbias_out


def _forward_flops(call: Call) -> int:
    """The two products."""
    return 2 * math.prod(call.x.shape[:-1]) * (math.prod(call.weight_in.shape) + math.prod(call.weight_out.shape))


def _backward_flops(dout: Tensor, product: Tensor, wanted: Wanted, call: Call) -> int:
    """The products of the gradients, and the first product again where it was not kept."""
    keeps, before_x = _keeps_product(call), wanted.x or wanted.weight_in or wanted.bias_in
    needs_hidden = before_x or wanted.weight_out
    through_first = wanted.x + wanted.weight_in + (needs_hidden and not keeps)
    through_second = (needs_hidden if keeps else before_x) + wanted.weight_out
    rows = math.prod(call.x.shape[:-1])
    return (
        2 * rows * (through_first * math.prod(call.weight_in.shape) + through_second * math.prod(call.weight_out.shape))
    )


_WANTED = ", ".join(f"bool d{name}" for name in Wanted._fields)


def _with_wanted(function: Callable[[Tensor, Tensor, Wanted, Call], _Result]) -> Callable[..., _Result]:
    """The function of the fields of `Wanted`, since a schema has no type for the record."""

    return lambda dout, product, *rest: function(dout, product, Wanted(*rest[:-1]), rest[-1])


_AXES = "x:*d weight_in:Hd bias_in:H weight_out:oH"

# The operators themselves, for policies that name them.
FORWARD = _operator.define(
    f"feed_forward_forward({_operator.parameters(Call)}) -> (Tensor, Tensor)",
    Call,
    implementation=forward,
    fake=_fake_forward,
    flops=_forward_flops,
    rows=("x",),
    axes=f"{_AXES} bias_out:o+H -> *o+H *H",
    plain=_plain_forward,
)
BACKWARD = _operator.define(
    f"feed_forward_backward(Tensor dout, Tensor product, {_WANTED}, {_operator.parameters(Call)})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    Call,
    implementation=_with_wanted(backward),
    fake=_with_wanted(_fake_backward),
    flops=_with_wanted(_backward_flops),
    rows=("dout", "product", "x"),
    axes=f"dout:*o product:*H {_AXES} bias_out:o -> *d+H Hd+* H+* oH+* o+*",
    sums=("weight_in", "bias_in", "weight_out", "bias_out"),
)


class _FeedForward(torch.autograd.Function):
    """The two operators as one differentiable function of the fields of a `Call`."""

    @staticmethod
    @_operator.takes(Call)
    def forward(*fields: Any) -> Any:
        return FORWARD(*fields)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return (None,) * len(Call._fields)
        saved = ctx.saved_tensors
        call, product = Call._make((*saved[:-1], ctx.backend)), saved[-1]
        needed = zip(call.tensors, ctx.needs_input_grad, strict=False)
        wanted = [tensor is not None and bool(flag) for tensor, flag in needed]
        results = _transforms.gradients(
            NAME,
            call.backend,
            (dout, *call.tensors),
            lambda: _where(wanted, BACKWARD(dout, product, *wanted, *call)),
            lambda: _where(wanted, _plain_backward(dout, call)),
        )
        return *results, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *fields: Any) -> tuple[Any, Any]:
        return _vmap(info, in_dims, *fields)


def _where(wanted: Sequence[bool], gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if flag else None for gradient, flag in zip(gradients, wanted, strict=True))


_vmap = _transforms.vmap_rule(_FeedForward.apply, rows=_operator.indices(Call, "x"))
