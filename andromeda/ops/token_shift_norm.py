"""Residual, layer norm and token shift in one pass over memory (docs/model.md#3, #4, #7)."""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from andromeda.ops import Backend, _checks, _operator, _select, _transforms
from andromeda.ops._common import cast, compute_dtype, contiguous, sum_partials, with_dense_rows
from andromeda.reference import token_shift_norm as reference

NAME = "token_shift_norm"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the kernels
_MAX_TRITON_DIM = 8192  # a row is in the registers of a program

# The gradients of gamma and residual_scale are summed over runs of tokens first, then over the runs. The number of runs
# depends only on shapes and the kind of device, so the result depends on neither threads nor timing. On a GPU a run is
# a block, and there are at most as many blocks as the GPU holds at a time. A partial sum has as many bytes as a token
# in float32, so a run needs several tokens to outweigh its cost.
_MAX_CPU_PARTIALS = 64
_MIN_TOKENS_PER_PARTIAL = 16


def token_shift_norm(
    x: Tensor,
    *,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    alpha: float = 1.0,
    shift: int = 0,
    history: Tensor | None = None,
    key_start: Tensor | None = None,
    position: int = 0,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a scaled residual, normalise, and delay segments of the channels (docs/model.md#3, #4, #7).

        u = alpha * residual_scale * residual + x                   u = x without a residual
        y = (u - mean(u)) / sqrt(var(u) + 1e-5) * (1 + gamma)       y = u without gamma
        shifted[:, t, segment k] = y[:, t - k, segment k]           k = 0 ... shift

    Segment k holds the channels k * width ... (k + 1) * width - 1 with width = dim // (shift + 1); the channels that
    are left over at the end are not delayed. Differentiable once in x, residual, residual_scale and gamma; with
    backend="reference" any number of times. Half precision is computed in float32, and `shifted` holds the rounded
    values of y.

    Args:
        x: (batch, seqlen, dim), float32, bfloat16, float16; float64 takes the reference. The last dimension is dense,
            the other strides are free.
        gamma: (dim,), floating point; None: no norm.
        residual: shape, dtype and device of x.
        residual_scale: (dim,), floating point; needs residual. Default: 1.
        alpha: factor on the residual.
        shift: largest delay in tokens, 0 <= shift < dim.
        history: (batch, shift, dim), dtype and device of x: y of the previous tokens. It gets no gradient.
            Default: zeros.
        key_start: (batch, seqlen), int32: `shifted` is 0 where it would take a row before this position of the
            sequence, which belongs to another document or is padding.
        position: of x[:, 0] in its sequence, in tokens; used only with key_start.
        backend: "cuda", "triton", "cpu" or "reference". Default: the first that supports the call.

    Returns:
        y and shifted, in the shape of x. Unchanged tensors are not copied: without gamma and residual, y is x, and with
        shift 0, shifted is y.

    Raises:
        ValueError, TypeError: the call is wrong on every machine.
        NotImplementedError: no backend, or not the requested one, can run it here; gives the reasons for each.
    """
    backend_argument = _select.backend_argument(NAME, backend)
    call = Call(x, residual, residual_scale, gamma, history, key_start, alpha, shift, position, backend_argument)
    is_usual = _is_usual(call)
    if not is_usual:
        call = _checked(call)
    if gamma is None and residual is None and shift == 0:
        return x, x
    if _select.needs_function(NAME, x, residual, call.residual_scale, call.gamma):
        is_plain = is_usual and not _select.transforms_active()
        y, shifted = (_plain_apply if is_plain else _TokenShiftNorm.apply)(*call)
    else:
        y, shifted = forward(call) if is_usual and _operator.is_unobserved() else FORWARD(*call)
    if gamma is None and residual is None:
        y = x
    return y, y if shift == 0 else shifted


def unsupported(backend: str, x: Tensor) -> list[str]:
    """Why `backend` cannot run `token_shift_norm` on this (correct) x here; empty when it can."""
    if (answer := _select.without_compiled_kernels(backend)) is not None:
        return answer
    reasons = _select.common_reasons(backend, _DTYPES, x=x)
    if backend == "triton" and x.shape[2] > _MAX_TRITON_DIM:
        reasons.append(f"dim={x.shape[2]} (there are kernels for up to {_MAX_TRITON_DIM})")
    return reasons


class Call(NamedTuple):
    """The arguments of `token_shift_norm_forward`, in the order of its schema."""

    x: Tensor
    residual: Tensor | None
    residual_scale: Tensor | None
    gamma: Tensor | None
    history: Tensor | None
    key_start: Tensor | None
    alpha: float
    shift: int
    position: _operator.SymInt
    backend: str


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # dx, dresidual, dresidual_scale, dgamma


def _is_usual(call: Call) -> bool:
    """Whether the call is correct and needs no cast. Most calls are, and this takes a microsecond.

    `_checked` examines every other call again and reports its errors.
    """
    x, residual, residual_scale, gamma, history, key_start, alpha, shift, position, _ = call
    return (
        not torch.compiler.is_compiling()
        and _select.extension_error is None
        and type(shift) is type(position) is int
        and type(alpha) is float
        and -math.inf < alpha < math.inf
        and _select.extension.token_shift_norm_is_usual(x, residual, residual_scale, gamma, history, key_start, shift)
        and not (history is not None and history.requires_grad)
    )


def _checked(call: Call) -> Call:
    """The call, with alpha as a float and the vectors in the dtype of the computation.

    Raises:
        ValueError, TypeError: see `token_shift_norm`.
    """
    x, residual, residual_scale, gamma, history, key_start, alpha, shift, position, _ = call
    axes = "batch", "seqlen", "dim"
    _checks.check_tensor(NAME, "x", x, axes)
    if residual is not None:
        _checks.check_tensor(NAME, "residual", residual, axes)
    _checks.check_dtypes(NAME, **{"x": x} if residual is None else {"x": x, "residual": residual})
    batch, seqlen, dim = x.shape
    _checks.check_int(NAME, "shift", shift)
    if not 0 <= shift < dim:
        raise ValueError(f"{NAME}: shift must be at least 0 and less than dim={dim}, got {shift}")
    _checks.check_int(NAME, "position", position)
    if residual is not None:
        _checks.check_exact(NAME, "residual", residual, axes, (batch, seqlen, dim), *_checks.FLOAT_DTYPES)
    for name, vector in (("gamma", gamma), ("residual_scale", residual_scale)):
        if vector is not None:
            _checks.check_exact(NAME, name, vector, ("dim",), (dim,), *_checks.FLOAT_DTYPES)
    if residual_scale is not None and residual is None:
        raise ValueError(f"{NAME}: residual_scale must be None without a residual, got a tensor")
    if history is not None:
        _checks.check_tensor(NAME, "history", history, ("batch", "shift", "dim"))
        _checks.check_exact(NAME, "history", history, ("batch", "shift", "dim"), (batch, shift, dim), x.dtype)
        if torch.is_grad_enabled() and history.requires_grad:
            raise ValueError(f"{NAME}: history must not require a gradient, it gets none; pass history.detach()")
    if key_start is not None:
        _checks.check_exact(NAME, "key_start", key_start, ("batch", "seqlen"), (batch, seqlen), torch.int32)
    _checks.check_devices(
        NAME,
        x=x,
        gamma=gamma,
        residual=residual,
        residual_scale=residual_scale,
        history=history,
        key_start=key_start,
    )
    dtype = compute_dtype(x.dtype)
    return call._replace(
        alpha=_checks.check_finite_number(NAME, "alpha", alpha),
        residual_scale=cast(residual_scale, dtype),
        gamma=cast(gamma, dtype),
    )


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The operator `token_shift_norm_forward`. An output that equals another tensor is empty."""
    plan = _plan(call)
    y, shifted = _fake_forward(call)
    has_y, has_shifted = y.ndim == 3, call.shift > 0
    if plan.backend == "reference":
        dtype = compute_dtype(call.x.dtype)
        exact_y, exact_shifted = reference.token_shift_norm(
            cast(call.x, dtype),
            residual=cast(call.residual, dtype),
            history=cast(call.history, dtype),
            **_options(call),
        )
        if has_y:
            y.copy_(exact_y)
        if has_shifted:
            shifted.copy_(exact_shifted)
    else:
        results = y if has_y else None, shifted if has_shifted else None
        _run("forward", call, plan, *_vectors(call), call.history, contiguous(call.key_start), *results)
    return y, shifted


def backward(dy: Tensor | None, dshifted: Tensor | None, call: Call) -> Gradients:
    """The operator `token_shift_norm_backward`. The gradient of a tensor that is not given is an empty tensor.

    dy, dshifted: None for 0, but not both. The backward pass ignores the history of the call.
    """
    plan = _plan(call)
    dx, dresidual, dresidual_scale, dgamma = gradients = _fake_backward(dy, dshifted, call)
    if plan.backend == "reference":
        for gradient, result in zip(gradients, _plain_backward(dy, dshifted, call), strict=True):
            if result is not None:
                gradient.copy_(result)
    else:
        dresidual_scale_partial, dgamma_partial = (
            None if vector is None else vector.new_empty(plan.num_partials, *vector.shape)
            for vector in (call.residual_scale, call.gamma)
        )
        results = dx, None if call.residual is None else dresidual, dresidual_scale_partial, dgamma_partial
        _run("backward", call, plan, *_vectors(call), contiguous(call.key_start), dy, dshifted, *results)
        for gradient, partial in ((dresidual_scale, dresidual_scale_partial), (dgamma, dgamma_partial)):
            if partial is not None:
                sum_partials(partial, gradient)
    return gradients


def _vectors(call: Call) -> tuple[Tensor | None, ...]:
    """The first arguments of a kernel in both directions: x to gamma."""
    return call.x, call.residual, contiguous(call.residual_scale), contiguous(call.gamma)


def _run(direction: Literal["forward", "backward"], call: Call, plan: "Plan", *tensors: Tensor | None) -> None:
    """Run the kernel of the plan's backend. tensors: its arguments before alpha."""
    arguments: tuple[Any, ...] = *tensors, call.alpha, call.shift, call.position
    device = call.x.device
    if plan.backend == "triton":
        from andromeda.triton_kernels import token_shift_norm as kernels

        with _select.device_guard(device):
            getattr(kernels, direction)(*arguments)
    else:
        kernel = getattr(_select.extension, f"token_shift_norm_{direction}")
        kernel(*arguments, torch.get_num_threads(), _select.current_stream(device))


def _options(call: Call) -> dict[str, Any]:
    """The arguments that the reference takes unchanged in both directions."""
    return {
        "gamma": call.gamma,
        "residual_scale": call.residual_scale,
        "alpha": call.alpha,
        "shift": call.shift,
        "key_start": call.key_start,
        "position": call.position,
    }


def _plain_forward(call: Call) -> tuple[Tensor, Tensor]:
    """The outputs by operations that a program without the operator can hold."""
    dtype, empty = compute_dtype(call.x.dtype), call.x.new_empty(0)
    y, shifted = reference.token_shift_norm(
        cast(call.x, dtype), residual=cast(call.residual, dtype), history=cast(call.history, dtype), **_options(call)
    )
    has_y, has_shifted = call.gamma is not None or call.residual is not None, call.shift > 0
    return cast(y, call.x.dtype) if has_y else empty, cast(shifted, call.x.dtype) if has_shifted else empty


def _plain_backward(dy: Tensor | None, dshifted: Tensor | None, call: Call) -> tuple[Tensor | None, ...]:
    """The gradients by operations that torch can differentiate again."""
    dtype = compute_dtype(call.x.dtype)
    dx, dresidual, dresidual_scale, dgamma = reference.token_shift_norm_backward(
        cast(dy, dtype),
        cast(dshifted, dtype),
        cast(call.x, dtype),
        residual=cast(call.residual, dtype),
        **_options(call),
    )
    return cast(dx, call.x.dtype), cast(dresidual, call.x.dtype), dresidual_scale, dgamma


class Plan(NamedTuple):
    """Everything about a call that does not depend on its data."""

    backend: str
    num_partials: int  # partial sums for the gradients of residual_scale and gamma


def _plan(call: Call) -> Plan:
    x = call.x
    return _select.plan((NAME, call.backend, x.device, x.dtype, x.shape), x.device, _make_plan, call)


def _make_plan(call: Call) -> Plan:
    x = call.x
    backend = _select.choose(NAME, call.backend, lambda name: unsupported(name, x), x.device)
    if backend == "reference":
        return Plan(backend, 0)
    most = _MAX_CPU_PARTIALS
    with _select.device_guard(x.device):
        if backend == "cuda":
            most = _select.extension.token_shift_norm_backward_runs(x=x)
        elif backend == "triton":
            from andromeda.triton_kernels import token_shift_norm as kernels

            most = kernels.backward_runs(x=x)
    return Plan(backend, min(most, 1 + x.shape[0] * x.shape[1] // _MIN_TOKENS_PER_PARTIAL))


def _fake_forward(call: Call) -> tuple[Tensor, Tensor]:
    """An output that equals another tensor is empty: an operator must not return one of its inputs."""
    x = call.x
    y = x.new_empty(0) if call.gamma is None and call.residual is None else x.new_empty(*x.shape)
    return y, x.new_empty(0) if call.shift == 0 else x.new_empty(*x.shape)


def _fake_backward(dy: Tensor | None, dshifted: Tensor | None, call: Call) -> Gradients:
    x = call.x
    dresidual, dresidual_scale, dgamma = (
        x.new_empty(0) if tensor is None else tensor.new_empty(*tensor.shape)
        for tensor in (call.residual, call.residual_scale, call.gamma)
    )
    return x.new_empty(*x.shape), dresidual, dresidual_scale, dgamma


def _forward_flops(call: Call) -> int:
    """Per channel: two or three operations for the residual, eight for the norm."""
    per_channel = (call.residual is not None) * 2 + (call.residual_scale is not None) + (call.gamma is not None) * 8
    return math.prod(call.x.shape) * per_channel


def _backward_flops(dy: Tensor | None, dshifted: Tensor | None, call: Call) -> int:
    """The forward pass again, then its transpose."""
    return 2 * _forward_flops(call)


def _axes(text: str, call: Call) -> str:
    """Tokens are independent of each other where none is shifted."""
    arguments = "x:BNd residual:BNd residual_scale:d gamma:d history:Bsd key_start:BN"
    return text.format(arguments=arguments).replace("N", "n" if call.shift > 0 else "N")


# The operators themselves, for policies that name them.
FORWARD = _operator.define(
    f"token_shift_norm_forward({_operator.parameters(Call)}) -> (Tensor, Tensor)",
    Call,
    implementation=forward,
    fake=_fake_forward,
    flops=_forward_flops,
    rows=("x", "residual", "history", "key_start"),
    axes=lambda call: _axes("{arguments} -> BNd BNd", call),
    plain=_plain_forward,
)
BACKWARD = _operator.define(
    f"token_shift_norm_backward(Tensor? dy, Tensor? dshifted, {_operator.parameters(Call)})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    Call,
    implementation=backward,
    fake=_fake_backward,
    flops=_backward_flops,
    rows=("dy", "dshifted", "x", "residual", "history", "key_start"),
    axes=lambda dy, dshifted, call: _axes("dy:BNd dshifted:BNd {arguments} -> BNd BNd d+BN d+BN", call),
    sums=("residual_scale", "gamma"),
)


class _TokenShiftNorm(torch.autograd.Function):
    """The two operators as one differentiable function of the fields of a `Call`."""

    @staticmethod
    @_operator.takes(Call)
    def forward(*fields: Any) -> Any:
        return FORWARD(*fields)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        call = Call(*inputs)._replace(history=None)  # the backward pass does not read it
        ctx.save_for_backward(*call[:_NUM_TENSORS])
        ctx.options = call[_NUM_TENSORS:]
        ctx.set_materialize_grads(False)  # an output that is not used costs nothing

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dshifted: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None and dshifted is None:
            return _NO_GRADIENTS
        call = Call(*ctx.saved_tensors, *ctx.options)
        douts = _readable(dy, call.x), _readable(dshifted, call.x)
        differentiable = call.x, call.residual, call.residual_scale, call.gamma
        results = _transforms.gradients(
            NAME,
            call.backend,
            (*douts, *differentiable),
            lambda: _transforms.given(BACKWARD(*douts, *call), differentiable),
            lambda: _plain_backward(*douts, call),
        )
        return *results, *_NO_GRADIENTS[len(results) :]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *fields: Any) -> tuple[Any, Any]:
        return _vmap(info, in_dims, *fields)


_plain_apply = _operator.plain_apply(_TokenShiftNorm)
_NUM_TENSORS = _operator.num_tensors(Call)
_NO_GRADIENTS = (None,) * len(Call._fields)
_vmap = _transforms.vmap_rule(
    _TokenShiftNorm.apply, rows=_operator.indices(Call, "x", "residual", "history", "key_start")
)


def _readable(dout: Tensor | None, x: Tensor) -> Tensor | None:
    """The gradient of an output, readable by the kernels; None for an output that is empty."""
    return None if dout is None or dout.shape != x.shape else with_dense_rows(dout)
