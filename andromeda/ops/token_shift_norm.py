"""Residual, layer norm and token shift in one pass over memory (docs/model.md#3, #4, #7)."""

import math

import torch

from andromeda.ops import _checks, _select, _transforms
from andromeda.reference import token_shift_norm as reference

NAME = "token_shift_norm"

# Gradients of gamma and residual_scale are summed over runs of tokens first, then over the runs. Their number depends
# on shapes and the kind of device alone, so the result depends on neither threads nor timing. On a GPU a run is a
# block, and there are at most as many as it works on at a time. A partial sum is as many bytes as a token of float32:
# it takes a number of tokens to pay for one.
_MAX_CPU_PARTIALS = 64
_MIN_TOKENS_PER_PARTIAL = 16


def token_shift_norm(
    x,
    *,
    gamma=None,
    residual=None,
    residual_scale=None,
    alpha=1.0,
    shift=0,
    history=None,
    key_start=None,
    position=0,
    backend=None,
):
    """Add a scaled residual, normalise, and delay segments of the channels (docs/model.md#3, #4, #7).

        u = alpha * residual_scale * residual + x                   u = x without a residual
        y = (u - mean(u)) / sqrt(var(u) + 1e-5) * (1 + gamma)       y = u without gamma
        shifted[:, t, segment k] = y[:, t - k, segment k]           k = 0 ... shift

    Segment k holds the channels k * width ... (k + 1) * width - 1 with width = dim // (shift + 1); those left over at
    the end are not delayed. Differentiable in x, residual, residual_scale and gamma, again and again with
    backend="reference"; float32 inside for half precision, and `shifted` holds the rounded values of y.

    Args:
        x: (batch, seqlen, dim), float32, bfloat16, float16; float64 takes the reference. The last dimension is dense,
            the other strides are free.
        gamma: (dim,), floating point; None: no norm.
        residual: shape, dtype and device of x.
        residual_scale: (dim,), floating point; needs residual. Default: 1.
        alpha: factor on the residual.
        shift: largest delay in tokens, 0 <= shift < dim.
        history: (batch, shift, dim), dtype and device of x: y of the tokens before. It gets no gradient.
            Default: zeros.
        key_start: (batch, seqlen), int32: `shifted` is 0 where it would take a row before this position of the
            sequence, which belongs to another document or is padding.
        position: of x[:, 0] in its sequence, in tokens; matters for key_start alone.
        backend: "cuda", "triton", "cpu" or "reference". Default: the first that supports the call.

    Returns:
        y and shifted, in the shape of x. What nothing was done to is not copied: without gamma and residual y is x, and
        with shift 0 shifted is y.

    Raises:
        ValueError, TypeError: the call is wrong on every machine.
        NotImplementedError: no backend (or not the one asked for) can run it here; says why, each.
    """
    if not _is_usual(x, gamma, residual, residual_scale, alpha, shift, history, key_start, position):
        alpha = _checked(x, gamma, residual, residual_scale, alpha, shift, history, key_start, position)
    backend = _select.backend_argument(NAME, backend)
    if gamma is None and residual is None and shift == 0:
        return x, x
    compute_dtype = _compute_dtype(x)
    residual_scale, gamma = _to(compute_dtype, residual_scale, gamma)
    differentiable = x, residual, residual_scale, gamma
    arguments = *differentiable, history, key_start, alpha, shift, position, backend
    if _select.needs_function(NAME, *differentiable):
        y, shifted = _TokenShiftNorm.apply(*arguments)
    else:
        y, shifted = FORWARD(*arguments)
    if gamma is None and residual is None:
        y = x
    return y, y if shift == 0 else shifted


def unsupported(backend, x) -> list[str]:
    """Why `backend` cannot run `token_shift_norm` on this (correct) x here; empty when it can."""
    if backend == "reference":
        return []
    if backend == "triton":
        return ["no Triton kernel in this version"]
    if _select.extension is None:
        return [_select.extension_error]
    reasons = []
    if x.device.type != _select.DEVICE_TYPES[backend]:
        reasons.append(f"tensors on {x.device}")
    if x.dtype == torch.float64:
        reasons.append("dtype float64 (built for float32, float16, bfloat16)")
    if max(x.shape) >= 2**31:
        reasons.append(f"a dimension of x {tuple(x.shape)} above 2**31 - 1")
    if backend == "cuda":
        reasons += _select.cuda_unavailable(x.device)
    return reasons


def _is_usual(x, gamma, residual, residual_scale, alpha, shift, history, key_start, position) -> bool:
    """Whether nothing is wrong, which most calls learn here in a few microseconds.

    What this does not let pass is looked at again by `_checked`, which finds the words for what is wrong.
    """
    if not _checks.has_axes(x, 3):
        return False
    batch, seqlen, dim = x.shape
    dtype, device = x.dtype, x.device
    if not (
        dtype in _checks.FLOAT_DTYPES
        and type(shift) is type(position) is int
        and 0 <= shift < dim
        and type(alpha) is float
        and -math.inf < alpha < math.inf
    ):
        return False
    if residual is None:
        if residual_scale is not None:
            return False
    elif not (_checks.has_axes(residual, 3) and _checks.is_exact(residual, x.shape, dtype, device)):
        return False
    if history is not None and not (
        _checks.has_axes(history, 3)
        and _checks.is_exact(history, (batch, shift, dim), dtype, device)
        and not history.requires_grad
    ):
        return False
    for vector in (gamma, residual_scale):
        if vector is not None and not _checks.is_floating(vector, (dim,), device):
            return False
    return key_start is None or _checks.is_exact(key_start, (batch, seqlen), torch.int32, device)


def _checked(x, gamma, residual, residual_scale, alpha, shift, history, key_start, position) -> float:
    """alpha as a float.

    Raises:
        ValueError, TypeError: see `token_shift_norm`.
    """
    _checks.check_tensor(NAME, "x", x, ("batch", "seqlen", "dim"))
    if residual is not None:
        _checks.check_tensor(NAME, "residual", residual, ("batch", "seqlen", "dim"))
    _checks.check_dtypes(NAME, **{"x": x} if residual is None else {"x": x, "residual": residual})
    batch, seqlen, dim = x.shape
    _check_int("shift", shift)
    if not 0 <= shift < dim:
        raise ValueError(f"{NAME}: shift must be at least 0 and less than dim={dim}, got {shift}")
    _check_int("position", position)
    if residual is not None:
        axes, shape = ("batch", "seqlen", "dim"), (batch, seqlen, dim)
        _checks.check_exact(NAME, "residual", residual, axes, shape, *_checks.FLOAT_DTYPES)
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
    return _checks.check_finite_number(NAME, "alpha", alpha)


def _check_int(name, value) -> None:
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{NAME}: {name} must be an int, got {value!r} ({type(value).__name__})")


def _compute_dtype(x) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _to(dtype, *tensors):
    return (tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors)


def _dense(tensor):
    return None if tensor is None else tensor.contiguous()


def _forward(x, residual, residual_scale, gamma, history, key_start, alpha, shift, position, backend):
    backend, _ = _plan(backend, x)
    y, shifted = _fake_forward(x, residual, residual_scale, gamma, history, key_start, alpha, shift)
    if backend == "reference":
        wide_x, wide_residual, wide_history = _to(_compute_dtype(x), x, residual, history)
        exact_y, exact_shifted = reference.token_shift_norm(
            wide_x,
            gamma=gamma,
            residual=wide_residual,
            residual_scale=residual_scale,
            alpha=alpha,
            shift=shift,
            history=wide_history,
            key_start=key_start,
            position=position,
        )
        if y.ndim == 3:
            y.copy_(exact_y)
        if shift > 0:
            shifted.copy_(exact_shifted)
    else:
        with _select.device_guard(x.device):
            _select.extension.token_shift_norm_forward(
                x=x,
                residual=residual,
                residual_scale=_dense(residual_scale),
                gamma=_dense(gamma),
                history=history,
                key_start=_dense(key_start),
                y=y if y.ndim == 3 else None,
                shifted=shifted if shift > 0 else None,
                alpha=alpha,
                shift=shift,
                position=position,
                num_threads=torch.get_num_threads(),
                stream=_select.current_stream(x.device),
            )
    return y, shifted


def _backward(dy, dshifted, x, residual, residual_scale, gamma, key_start, alpha, shift, position, backend):
    backend, num_partials = _plan(backend, x)
    gradients = _fake_backward(dy, dshifted, x, residual, residual_scale, gamma)
    dx, dresidual, dresidual_scale, dgamma = gradients
    if backend == "reference":
        exact = _plain_backward(
            dy, dshifted, x, residual, residual_scale, gamma, key_start, alpha, shift, position, backend
        )
        for gradient, result in zip(gradients, exact, strict=True):
            if result is not None:
                gradient.copy_(result)
    else:
        scale_partial, gamma_partial = (
            None if vector is None else vector.new_empty((num_partials, *vector.shape))
            for vector in (residual_scale, gamma)
        )
        with _select.device_guard(x.device):
            _select.extension.token_shift_norm_backward(
                x=x,
                residual=residual,
                residual_scale=_dense(residual_scale),
                gamma=_dense(gamma),
                key_start=_dense(key_start),
                dy=dy,
                dshifted=dshifted,
                dx=dx,
                dresidual=None if residual is None else dresidual,
                dresidual_scale_partial=scale_partial,
                dgamma_partial=gamma_partial,
                alpha=alpha,
                shift=shift,
                position=position,
                num_threads=torch.get_num_threads(),
                stream=_select.current_stream(x.device),
            )
        for gradient, partial in ((dresidual_scale, scale_partial), (dgamma, gamma_partial)):
            if partial is not None:
                torch.sum(partial, dim=0, out=gradient)
    return gradients


def _plain_backward(dy, dshifted, x, residual, residual_scale, gamma, key_start, alpha, shift, position, backend):
    """The gradients by operations that torch can differentiate again."""
    wide_dy, wide_dshifted, wide_x, wide_residual = _to(_compute_dtype(x), dy, dshifted, x, residual)
    dx, dresidual, dresidual_scale, dgamma = reference.token_shift_norm_backward(
        wide_dy,
        wide_dshifted,
        wide_x,
        gamma=gamma,
        residual=wide_residual,
        residual_scale=residual_scale,
        alpha=alpha,
        shift=shift,
        key_start=key_start,
        position=position,
    )
    dx, dresidual = _to(x.dtype, dx, dresidual)
    return dx, dresidual, dresidual_scale, dgamma


def _plan(backend, x) -> tuple[str, int]:
    """The backend of a call and, for its gradients, the number of partial sums."""

    def make():
        chosen = _select.choose(NAME, backend, lambda name: unsupported(name, x))
        return chosen, 0 if chosen == "reference" else _num_partials(chosen, x)

    return _select.plan((NAME, backend, x.device, x.dtype, x.shape), x.device, make)


def _num_partials(backend, x) -> int:
    most = _MAX_CPU_PARTIALS
    if backend == "cuda":
        with _select.device_guard(x.device):
            most = _select.extension.token_shift_norm_backward_runs(x=x)
    return min(most, 1 + x.shape[0] * x.shape[1] // _MIN_TOKENS_PER_PARTIAL)


def _fake_forward(x, residual, residual_scale, gamma, history, key_start, alpha, shift, *args):
    """An output that equals another tensor is empty: an operator must not return one of its inputs."""
    y = x.new_empty(0 if gamma is None and residual is None else x.shape)
    return y, x.new_empty(0 if shift == 0 else x.shape)


def _fake_backward(dy, dshifted, x, residual, residual_scale, gamma, *args):
    return x.new_empty(x.shape), *(
        x.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)
        for tensor in (residual, residual_scale, gamma)
    )


def _forward_flops(x_shape, residual, residual_scale, gamma, *args, **kwargs) -> int:
    """Per channel: two or three operations for the residual, eight for the norm."""
    return math.prod(x_shape) * ((residual is not None) * 2 + (residual_scale is not None) + (gamma is not None) * 8)


def _backward_flops(dy_shape, dshifted_shape, *args, **kwargs) -> int:
    """The forward pass again, then its transpose."""
    return 2 * _forward_flops(*args, **kwargs)


_TENSORS = "Tensor x, Tensor? residual, Tensor? residual_scale, Tensor? gamma"
_OPTIONS = "Tensor? key_start, float alpha, int shift, SymInt position, str backend"
# The operators themselves, for policies that name them.
FORWARD = _select.define(
    f"token_shift_norm_forward({_TENSORS}, Tensor? history, {_OPTIONS}) -> (Tensor, Tensor)",
    implementation=_forward,
    fake=_fake_forward,
    flops=_forward_flops,
    rows=(0, 1, 4, 5),
)
BACKWARD = _select.define(
    f"token_shift_norm_backward(Tensor? dy, Tensor? dshifted, {_TENSORS}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    implementation=_backward,
    fake=_fake_backward,
    flops=_backward_flops,
    rows=(0, 1, 2, 3, 6),
    sums=(4, 5),
)


class _TokenShiftNorm(torch.autograd.Function):
    """The two operators as one differentiable function."""

    @staticmethod
    def forward(x, residual, residual_scale, gamma, history, key_start, alpha, shift, position, backend):
        return FORWARD(x, residual, residual_scale, gamma, history, key_start, alpha, shift, position, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, residual_scale, gamma, _, key_start, *ctx.options = inputs
        ctx.save_for_backward(x, residual, residual_scale, gamma, key_start)
        ctx.set_materialize_grads(False)  # an output that is not used costs nothing

    @staticmethod
    def backward(ctx, dy, dshifted):
        if dy is None and dshifted is None:
            return (None,) * 10
        saved = ctx.saved_tensors
        tensors = *(_readable(dout, saved[0]) for dout in (dy, dshifted)), *saved
        results = _transforms.gradients(
            NAME,
            ctx.options[-1],
            tensors[:-1],
            lambda: _transforms.given(BACKWARD(*tensors, *ctx.options), saved[:4]),
            lambda: _plain_backward(*tensors, *ctx.options),
        )
        return *results, *(None,) * 6

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap(info, in_dims, *args)


_vmap = _transforms.vmap_rule(_TokenShiftNorm.apply, rows=(0, 1, 4, 5))


def _readable(dout, x):
    """A gradient with a dense last dimension, which the one expanded number that is the gradient of a sum has not."""
    if dout is None or dout.shape != x.shape:
        return None
    return dout if dout.stride(-1) == 1 else dout.contiguous()
