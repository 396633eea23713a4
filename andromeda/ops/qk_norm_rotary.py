"""QK normalisation, learned scales and rotary xPos in one pass over memory (docs/model.md#5.2, #5.3)."""

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from andromeda.ops import Backend, _checks, _operator, _rotary, _select, _transforms
from andromeda.ops._common import cast, compute_dtype, contiguous, dtype_name, sum_partials, with_dense_rows
from andromeda.reference import qk_norm_rotary as reference

NAME = "qk_norm_rotary"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the kernels
_MAX_TRITON_HEAD_DIM = 1024  # a row is in the registers of a warp or two

# Both operands are stored with their xPos factors. A factor above 2 ** limit leaves too little room for the values.
_FACTOR_LIMIT_LOG2 = {torch.float16: 8, torch.bfloat16: 100, torch.float32: 100, torch.float64: 900}
# The factor of pair 0 grows fastest, zeta_0 = 0.4 / 1.4: log2(3.5) bits every 512 positions.
_LOG2_PER_POSITION = math.log2(3.5) / 512
_FACTOR_REACH = {dtype: math.floor(limit / _LOG2_PER_POSITION) for dtype, limit in _FACTOR_LIMIT_LOG2.items()}

# The gradients of the scales are summed over runs of tokens first, then over the runs. The number of runs depends only
# on shapes, so the result depends on neither threads nor timing. There are enough runs to fill the machine, and each is
# long enough to outweigh the cost of its partial sum.
_MAX_CPU_PARTIALS = 64
_MIN_TOKENS_PER_PARTIAL = 16

# The kernels may multiply the inverse of a norm by it, which is at most 1e12, or a scale.
_MIN_MULTIPLIER, _MAX_MULTIPLIER = 2.0**-60, 2.0**60

MAX_STEP = 2**13 - 1  # the largest value of `step`: one more is the length of an xPos segment

# The CPU's tables hold whole blocks of positions: generation token by token makes new ones only at every 64th call.
_TABLE_BLOCK = 64


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    *,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    normalize: bool = True,
    rotary_dim: int = 0,
    xpos: bool = False,
    position: int = 0,
    origin: int | None = None,
    step: Tensor | None = None,
    q_multiplier: float = 1.0,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise, scale and rotate the rows of q and k (docs/model.md#5.2, #5.3).

        x = x / max(||x||, 1e-12)                       over head_dim, when `normalize`
        x = x * scale[head]                             when a scale is given
        out[2t]     = z * (x[2t] * cos(p * omega_t) - x[2t + 1] * sin(p * omega_t))         for 2t < rotary_dim
        out[2t + 1] = z * (x[2t + 1] * cos(p * omega_t) + x[2t] * sin(p * omega_t))
        omega_t = 10000 ** (-2t / rotary_dim)           p: position of the row
        zeta_t = (2t + 0.4 * rotary_dim) / (1.4 * rotary_dim)
        z = zeta_t ** (+-(p - origin) / 512)            + for q, - for k; 1 without `xpos`
        out = out * q_multiplier                        for q, before it is rounded

    Positions are aligned at the end: the last query and the last key have the same position. Each part can be turned
    off. Differentiable once in q, k and both scales; with backend="reference" any number of times. Half precision is
    computed in float32. The host makes the rotary tables in float64.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float32, bfloat16, float16; float64 takes the reference. The last
            dimension is dense, the other strides are free.
        k: (batch, seqlen_k, num_kv_heads, head_dim), dtype and device of q. Under autocast, q and k of different
            dtypes are both cast to the autocast dtype.
        q_scale, k_scale: (num_heads, head_dim) and (num_kv_heads, head_dim), floating point; float32 is the natural
            choice.
        rotary_dim: channels to rotate, even; the others pass through.
        xpos: multiply by the xPos factors z. Needs rotary_dim > 0.
        position: of the first key, in tokens.
        origin: the position whose xPos factor is 1. A score does not depend on it as long as its query and its key
            share it. Default: the middle of the queries. Keys kept in a cache must share the origin of later queries.
        step: (1,), int32, on the device of q, from 0 to 8191 (checked on CPU tensors): added to `position`, but not to
            `origin`. On a GPU it is read by the kernel, so that a CUDA graph uses the next position at each replay. The
            caller must see to it that the xPos factors stay in range, and no gradient may be recorded.
        q_multiplier: factor of every result for q, a constant between 2**-60 and 2**60. It costs nothing here and may
            replace a softmax_scale: after q_multiplier=softmax_scale / math.log(2), `attention` with
            softmax_scale=math.log(2) has the same scores, and <q, k> is the exponent of 2 that its kernels need.
        backend: "cuda", "triton", "cpu" or "reference". Default: the first that supports the call.

    Returns:
        q and k transformed, contiguous, of the shapes and dtypes of q and k.

    Raises:
        ValueError, TypeError: the call is wrong on every machine.
        NotImplementedError: no backend, or not the requested one, can run it here; gives the reasons for each.
    """
    options = normalize, rotary_dim, xpos, position, origin, step, q_multiplier
    is_usual = _is_usual(q, k, q_scale, k_scale, *options)
    if not is_usual:
        q, k, q_scale, k_scale, q_multiplier = _checked(q, k, q_scale, k_scale, *options)
    if not xpos:
        origin = position
    else:
        seqlen_q, seqlen_k = q.shape[1], k.shape[1]
        if origin is None:
            origin = reference.default_origin(seqlen_q, seqlen_k, position)
        _check_factors(q.dtype, seqlen_q, position + seqlen_k, origin)
    backend_argument = _select.backend_argument(NAME, backend)
    call = Call(
        *(q, k, q_scale, k_scale, normalize, rotary_dim, xpos, position, origin),
        *(backend_argument, step, q_multiplier),
    )
    if _select.needs_function(NAME, q, k, q_scale, k_scale):
        if step is not None:
            _checks.refuse_gradients(NAME, "step", "its value as a part of position")
        is_plain = is_usual and not _select.transforms_active()
        return (_plain_apply if is_plain else _QkNormRotary.apply)(*call)
    return forward(call) if is_usual and _operator.is_unobserved() else FORWARD(*call)


def unsupported(backend: str, q: Tensor, k: Tensor, *, step: Tensor | None = None) -> list[str]:
    """Why `backend` cannot run `qk_norm_rotary` on these (correct) arguments here; empty when it can."""
    if backend == "reference":
        return _select.unreadable("step", step)
    if (answer := _select.without_compiled_kernels(backend)) is not None:
        return answer
    reasons = _select.common_reasons(backend, _DTYPES, q=q, k=k)
    if backend == "cuda":
        limits = _select.extension.build_info()
        max_head_dim, max_seqlen = limits["max_rotary_head_dim"], limits["max_rotary_seqlen"]
        if q.shape[3] % 2 != 0 or q.shape[3] > max_head_dim:
            reasons.append(f"head_dim={q.shape[3]} (built for even ones up to {max_head_dim})")
        if (seqlen := max(q.shape[1], k.shape[1])) > max_seqlen:
            reasons.append(f"seqlen={seqlen} (built for up to 2**31 - {2**31 - max_seqlen})")
    if backend == "triton" and q.shape[3] > _MAX_TRITON_HEAD_DIM:
        reasons.append(f"head_dim={q.shape[3]} (there are kernels for up to {_MAX_TRITON_HEAD_DIM})")
    return reasons


class Call(NamedTuple):
    """The arguments of `qk_norm_rotary_forward`, in the order of its schema; `qk_norm_rotary` has checked them."""

    q: Tensor
    k: Tensor
    q_scale: Tensor | None
    k_scale: Tensor | None
    normalize: bool
    rotary_dim: int
    xpos: bool
    position: _operator.SymInt
    origin: _operator.SymInt
    backend: str
    step: Tensor | None = None
    q_multiplier: float = 1.0


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]  # dq, dk, dq_scale, dk_scale


def _promote(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast, operands of different dtypes are cast to the autocast dtype; float64 is never rounded."""
    device = q.device.type
    if q.dtype != k.dtype and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k))
    return q, k


def _is_usual(
    q: Tensor,
    k: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    normalize: bool,
    rotary_dim: int,
    xpos: bool,
    position: int,
    origin: int | None,
    step: Tensor | None,
    q_multiplier: float,
) -> bool:
    """Whether the call is correct and needs no cast. Most calls are, and this takes a microsecond.

    `_checked` examines every other call again and reports its errors.
    """
    return (
        not torch.compiler.is_compiling()
        and _select.extension_error is None
        and _select.extension.qk_norm_rotary_is_usual(q, k, q_scale, k_scale, step)
        and type(normalize) is type(xpos) is bool
        and type(rotary_dim) is type(position) is int
        and (origin is None or type(origin) is int)
        and xpos <= rotary_dim <= q.shape[3]
        and rotary_dim >= 0
        and rotary_dim % 2 == 0
        and type(q_multiplier) is float
        and _MIN_MULTIPLIER <= q_multiplier <= _MAX_MULTIPLIER
    )


def _checked(
    q: Tensor,
    k: Tensor,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
    normalize: bool,
    rotary_dim: int,
    xpos: bool,
    position: int,
    origin: int | None,
    step: Tensor | None,
    q_multiplier: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
    """q and k, cast under autocast, the scales in the dtype of the computation, and q_multiplier as a float.

    Raises:
        ValueError, TypeError: see `qk_norm_rotary`.
    """
    _checks.check_tensor(NAME, "q", q, ("batch", "seqlen_q", "num_heads", "head_dim"))
    _checks.check_tensor(NAME, "k", k, ("batch", "seqlen_k", "num_kv_heads", "head_dim"))
    q, k = _promote(q, k)
    _checks.check_dtypes(NAME, q=q, k=k)
    _checks.check_equal_axis(NAME, 0, "batch", q=q, k=k)
    _checks.check_equal_axis(NAME, 3, "head_dim", q=q, k=k)
    head_dim = q.shape[3]
    if head_dim == 0:
        raise ValueError(f"{NAME}: q.shape[3] (head_dim) must be at least 1, got 0")
    for name, scale, heads, x in (("q_scale", q_scale, "num_heads", q), ("k_scale", k_scale, "num_kv_heads", k)):
        if scale is not None:
            _checks.check_exact(NAME, name, scale, (heads, "head_dim"), x.shape[2:], *_checks.FLOAT_DTYPES)
    if step is not None:
        _checks.check_exact(NAME, "step", step, ("1",), (1,), torch.int32)
    _checks.check_devices(NAME, q=q, k=k, q_scale=q_scale, k_scale=k_scale, step=step)
    for name, flag in (("normalize", normalize), ("xpos", xpos)):
        if not isinstance(flag, bool):
            raise TypeError(f"{NAME}: {name} must be True or False, got {flag!r}")
    for name, value in (("rotary_dim", rotary_dim), ("position", position), ("origin", origin)):
        if not (name == "origin" and value is None):
            _checks.check_int(NAME, name, value)
    if rotary_dim % 2 != 0 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"{NAME}: rotary_dim must be even and between 0 and head_dim={head_dim}, got {rotary_dim}")
    if xpos and rotary_dim == 0:
        raise ValueError(f"{NAME}: rotary_dim must be positive with xpos=True, got 0")
    q_multiplier = _checks.check_finite_number(NAME, "q_multiplier", q_multiplier)
    if not _MIN_MULTIPLIER <= q_multiplier <= _MAX_MULTIPLIER:
        raise ValueError(
            f"{NAME}: q_multiplier must be between 2**-60 and 2**60, got {q_multiplier}; give q_scale any other factor"
        )
    dtype = compute_dtype(q.dtype)
    return q, k, cast(q_scale, dtype), cast(k_scale, dtype), q_multiplier


def _check_factors(dtype: torch.dtype, seqlen_q: int, end: int, origin: int) -> None:
    """Require that the largest factors fit: those of the first query and of the last key, at `end - 1`. Small factors
    underflow harmlessly: the last query has the position of the last key, so no factor of a query is smaller than the
    inverse of the largest one."""
    limit, reach = _FACTOR_LIMIT_LOG2[dtype], _FACTOR_REACH[dtype]
    first_query = end - seqlen_q
    if end - 1 - origin > reach or origin - first_query > reach:
        raise ValueError(
            f"{NAME}: origin must be at most {reach} positions after the first query and before the last key, where "
            f"xPos factors reach 2**{limit} ({dtype_name(dtype)}), got origin {origin}, first query "
            f"{first_query}, last key {end - 1}; process the queries in segments, each with its own origin"
        )


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The operator `qk_norm_rotary_forward`: q and k transformed."""
    if call.step is not None and call.q.is_cpu:
        _check_step(call.step)
    plan = _plan(call)
    if call.step is not None and plan.backend in ("cpu", "reference"):
        call = call._replace(position=call.position + int(call.step.item()), step=None)
    q_out, k_out = _fake_forward(call)
    if plan.backend == "reference":
        dtype = compute_dtype(call.q.dtype)
        q_table, k_table = _whole_tables(call)
        q_out.copy_(reference.transform(call.q.to(dtype), call.q_scale, q_table, call.normalize, call.q_multiplier))
        k_out.copy_(reference.transform(call.k.to(dtype), call.k_scale, k_table, call.normalize))
    elif plan.backend == "triton":
        from andromeda.triton_kernels import qk_norm_rotary as kernels

        with _select.device_guard(call.q.device):
            kernels.forward(**_triton_arguments(call, plan), q_out=q_out, k_out=k_out, step=call.step)
    else:
        q, k, q_scale, k_scale, normalize, *_ = call
        rotation = plan.rotation or _host_rotation(call)
        _select.extension.qk_norm_rotary_forward(
            q,
            k,
            contiguous(q_scale),
            contiguous(k_scale),
            rotation.q_table,
            rotation.k_table,
            q_out,
            k_out,
            normalize,
            torch.get_num_threads(),
            _select.current_stream(q.device),
            rotation.q_row,
            rotation.k_row,
            rotation.factors,
            rotation.q_factor_row,
            rotation.k_factor_row,
            call.q_multiplier,
            call.step,
        )
    return q_out, k_out


def _check_step(step: Tensor) -> None:
    """Check the value. Only for the operator on a CPU: a traced call has none, and reading it would stall a GPU."""
    if not 0 <= (value := int(step.item())) <= MAX_STEP:
        raise ValueError(f"{NAME}: step must be between 0 and {MAX_STEP}, got {value}")


def backward(dq_out: Tensor, dk_out: Tensor, call: Call) -> Gradients:
    """The operator `qk_norm_rotary_backward`. The gradient of a scale that is not given is an empty tensor."""
    assert call.step is None  # `qk_norm_rotary` refuses it where gradients are recorded
    plan = _plan(call)
    dq, dk, dq_scale, dk_scale = gradients = _fake_backward(dq_out, dk_out, call)
    if plan.backend == "reference":
        exact = _exact_gradients(dq_out, dk_out, call, _whole_tables(call))
        for gradient, result in zip(gradients, exact, strict=True):
            if result is not None:
                gradient.copy_(result)
    else:
        dq_scale_partial, dk_scale_partial = (
            None if scale is None else scale.new_empty(plan.num_partials, *scale.shape)
            for scale in (call.q_scale, call.k_scale)
        )
        q, k, q_scale, k_scale, normalize, *_ = call
        if plan.backend == "triton":
            from andromeda.triton_kernels import qk_norm_rotary as kernels

            with _select.device_guard(q.device):
                kernels.backward(
                    **_triton_arguments(call, plan),
                    dq_out=dq_out,
                    dk_out=dk_out,
                    dq=dq,
                    dk=dk,
                    dq_scale_partial=dq_scale_partial,
                    dk_scale_partial=dk_scale_partial,
                )
        else:
            rotation = plan.rotation or _host_rotation(call)
            _select.extension.qk_norm_rotary_backward(
                q,
                k,
                contiguous(q_scale),
                contiguous(k_scale),
                rotation.q_table,
                rotation.k_table,
                dq_out,
                dk_out,
                dq,
                dk,
                dq_scale_partial,
                dk_scale_partial,
                normalize,
                torch.get_num_threads(),
                _select.current_stream(q.device),
                rotation.q_row,
                rotation.k_row,
                rotation.factors,
                rotation.q_factor_row,
                rotation.k_factor_row,
                call.q_multiplier,
            )
        for dscale, partial in ((dq_scale, dq_scale_partial), (dk_scale, dk_scale_partial)):
            if partial is not None:
                sum_partials(partial, dscale)
    return gradients


def _triton_arguments(call: Call, plan: "Plan") -> dict[str, Any]:
    """The arguments that a Triton kernel takes in both directions."""
    assert plan.rotation is not None
    return {
        "q": call.q,
        "k": call.k,
        "q_scale": contiguous(call.q_scale),
        "k_scale": contiguous(call.k_scale),
        **plan.rotation._asdict(),
        "normalize": call.normalize,
        "q_multiplier": call.q_multiplier,
    }


def _plain_forward(call: Call) -> tuple[Tensor, Tensor]:
    """The outputs by operations that a program without the operator can hold."""
    q, k, options = call.q, call.k, (call.rotary_dim, call.xpos, call.position, call.origin)
    dtype = compute_dtype(q.dtype)
    q_table, k_table = reference.rotary_tables(q.shape[1], k.shape[1], *options, q.device, call.step)
    q_out = reference.transform(cast(q, dtype), call.q_scale, q_table, call.normalize, call.q_multiplier)
    k_out = reference.transform(cast(k, dtype), call.k_scale, k_table, call.normalize)
    return cast(q_out, q.dtype), cast(k_out, k.dtype)


def _plain_backward(dq_out: Tensor, dk_out: Tensor, call: Call) -> tuple[Tensor | None, ...]:
    """The gradients by operations that torch can differentiate again."""
    q, k = call.q, call.k
    tables = reference.rotary_tables(
        q.shape[1], k.shape[1], call.rotary_dim, call.xpos, call.position, call.origin, q.device
    )
    dq, dk, dq_scale, dk_scale = _exact_gradients(dq_out, dk_out, call, tables)
    return dq.to(q.dtype), dk.to(k.dtype), dq_scale, dk_scale


def _exact_gradients(
    dq_out: Tensor, dk_out: Tensor, call: Call, tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients by the reference, in the dtype in which it computes."""
    q, k, q_scale, k_scale, normalize, *_ = call
    dtype = compute_dtype(q.dtype)
    dq, dq_scale = reference.transform_backward(
        dq_out.to(dtype), q.to(dtype), q_scale, tables[0], normalize, call.q_multiplier
    )
    dk, dk_scale = reference.transform_backward(dk_out.to(dtype), k.to(dtype), k_scale, tables[1], normalize)
    return dq, dk, dq_scale, dk_scale


class Rotation(NamedTuple):
    """The tables of a kernel and where its tokens begin in them, as arguments of the binding."""

    q_table: Tensor | None = None
    k_table: Tensor | None = None
    q_row: int = 0
    k_row: int = 0
    factors: Tensor | None = None
    q_factor_row: int = 0
    k_factor_row: int = 0


class Plan(NamedTuple):
    """Everything about a call that does not depend on its data. All layers of a step share a plan."""

    backend: str
    rotation: Rotation | None  # of a kernel on a GPU
    num_partials: int  # partial sums for the gradients of the scales


def _plan(call: Call) -> Plan:
    q, k = call.q, call.k
    rotation = call.rotary_dim, call.xpos, call.position, call.origin
    key = NAME, call.backend, q.device, q.dtype, q.shape, k.shape, rotation, call.step is not None
    return _select.plan(key, q.device, _make_plan, call)


def _make_plan(call: Call) -> Plan:
    q, k = call.q, call.k
    backend = _select.choose(NAME, call.backend, lambda name: unsupported(name, q, k, step=call.step), q.device)
    if backend == "reference":
        return Plan(backend, None, 0)
    if backend == "cpu":
        return Plan(backend, None, _num_partials(_MAX_CPU_PARTIALS, q, k))
    rotation = _device_rotation(call)
    with _select.device_guard(q.device):
        if backend == "triton":
            from andromeda.triton_kernels import qk_norm_rotary as kernels

            most = kernels.backward_runs(q=q, k=k)
        else:
            most = _select.extension.qk_norm_rotary_backward_runs(q=q, k=k)
    return Plan(backend, rotation, _num_partials(most, q, k))


def _num_partials(most: int, q: Tensor, k: Tensor) -> int:
    return min(most, 1 + q.shape[0] * max(q.shape[1], k.shape[1]) // _MIN_TOKENS_PER_PARTIAL)


# The operators make the tables. The tables are therefore neither saved for the backward pass nor part of a compiled
# graph, and a kept table never meets a fake or a traced tensor.


def _host_rotation(call: Call) -> Rotation:
    """The tables of a kernel on the CPU."""
    return Rotation() if call.rotary_dim == 0 else Rotation(*_whole_tables(call))


def _device_rotation(call: Call) -> Rotation:
    """The tables of a kernel on a GPU."""
    rotary_dim, position, origin, device = call.rotary_dim, call.position, call.origin, call.q.device
    if rotary_dim == 0:
        return Rotation()
    end = position + call.k.shape[1]
    first_query = end - call.q.shape[1]  # the last query sits at the last key
    first = min(position, first_query)
    more = 0 if call.step is None else MAX_STEP  # the device may move every row this far on
    table, row = _rotary.angles(first, end + more, rotary_dim, device)
    rotation = Rotation(table, table, row + first_query - first, row + position - first)
    if not call.xpos:
        return rotation
    # The exponent is position - origin for q and origin - position for k.
    lowest = min(first_query - origin, origin - end + 1 - more)
    highest = max(end - 1 + more - origin, origin - position)
    factors, row = _rotary.factors(lowest, highest + 1, rotary_dim, device)
    return rotation._replace(
        factors=factors,
        q_factor_row=row + first_query - origin - lowest,
        k_factor_row=row + origin - position - lowest,
    )


def _whole_tables(call: Call) -> tuple[Tensor, Tensor]:
    """Tables for q and k that include the xPos factors, in the dtype in which the reference computes."""
    q, origin = call.q, call.origin
    dtype = compute_dtype(q.dtype)
    seqlen_q, seqlen_k = q.shape[1], call.k.shape[1]
    end = call.position + seqlen_k
    if q.device.type != "cpu":  # plain torch, which a graph repeats
        q_table, k_table = reference.rotary_tables(
            seqlen_q, seqlen_k, call.rotary_dim, call.xpos, call.position, origin, q.device
        )
        return q_table.to(dtype), k_table.to(dtype)
    last = (
        -(-end // _TABLE_BLOCK) * _TABLE_BLOCK
    )  # the last position of every table; rows after `end` are cut off again
    rows_q, rows_k = (last - (end - seqlen) // _TABLE_BLOCK * _TABLE_BLOCK for seqlen in (seqlen_q, seqlen_k))
    q_table, k_table = cached_tables(rows_q, rows_k, call.rotary_dim, call.xpos, last, origin, dtype)
    stop_q, stop_k = rows_q - (last - end), rows_k - (last - end)
    return q_table[stop_q - seqlen_q : stop_q], k_table[stop_k - seqlen_k : stop_k]


@functools.lru_cache(maxsize=16)  # all layers of a forward and backward pass ask for the same few tables
def cached_tables(
    rows_q: int, rows_k: int, rotary_dim: int, xpos: bool, end: int, origin: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    q_table, k_table = reference.rotary_tables(rows_q, rows_k, rotary_dim, xpos, end - rows_k, origin)
    return q_table.to(dtype), k_table.to(dtype)


def _fake_forward(call: Call) -> tuple[Tensor, Tensor]:
    dense = torch.contiguous_format
    return torch.empty_like(call.q, memory_format=dense), torch.empty_like(call.k, memory_format=dense)


def _fake_backward(dq_out: Tensor, dk_out: Tensor, call: Call) -> Gradients:
    q, k = call.q, call.k
    dq_scale, dk_scale = (
        q.new_empty(0) if scale is None else scale.new_empty(*scale.shape) for scale in (call.q_scale, call.k_scale)
    )
    return q.new_empty(*q.shape), k.new_empty(*k.shape), dq_scale, dk_scale


def _forward_flops(call: Call) -> int:
    """Per channel: three operations to normalise, one to scale, three to rotate."""
    return sum(
        math.prod(x.shape[:3])
        * (3 * call.normalize * x.shape[3] + (scale is not None) * x.shape[3] + 3 * call.rotary_dim)
        for x, scale in ((call.q, call.q_scale), (call.k, call.k_scale))
    )


def _backward_flops(dq_out: Tensor, dk_out: Tensor, call: Call) -> int:
    """The forward pass again, then its transpose."""
    return 2 * _forward_flops(call)


_AXES = "q:BnHd k:BmHd q_scale:Hd k_scale:Hd step:i"

# The operators themselves, for policies that name them.
FORWARD = _operator.define(
    f"qk_norm_rotary_forward({_operator.parameters(Call)}) -> (Tensor, Tensor)",
    Call,
    implementation=forward,
    fake=_fake_forward,
    flops=_forward_flops,
    rows=("q", "k"),
    axes=f"{_AXES} -> BnHd BmHd",
    plain=_plain_forward,
)
BACKWARD = _operator.define(
    f"qk_norm_rotary_backward(Tensor dq_out, Tensor dk_out, {_operator.parameters(Call)})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    Call,
    implementation=backward,
    fake=_fake_backward,
    flops=_backward_flops,
    rows=("dq_out", "dk_out", "q", "k"),
    axes=f"dq_out:BnHd dk_out:BmHd {_AXES} -> BnHd BmHd Hd+B Hd+B",
    sums=("q_scale", "k_scale"),
)


class _QkNormRotary(torch.autograd.Function):
    """The two operators as one differentiable function of the fields of a `Call`."""

    @staticmethod
    @_operator.takes(Call)
    def forward(*fields: Any) -> Any:
        return FORWARD(*fields)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:_NUM_TENSORS])
        ctx.options = inputs[_NUM_TENSORS:]

    @staticmethod
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        call = Call(*tensors, *ctx.options)
        douts = with_dense_rows(dq_out), with_dense_rows(dk_out)
        results = _transforms.gradients(
            NAME,
            call.backend,
            (*douts, *tensors),
            lambda: _transforms.given(BACKWARD(*douts, *call), tensors),
            lambda: _plain_backward(*douts, call),
        )
        return *results, *_NO_GRADIENTS[len(results) :]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *fields: Any) -> tuple[Any, Any]:
        return _vmap(info, in_dims, *fields)


_plain_apply = _operator.plain_apply(_QkNormRotary)
_NUM_TENSORS = _operator.num_tensors(Call)
_NO_GRADIENTS = (None,) * len(Call._fields)
_vmap = _transforms.vmap_rule(_QkNormRotary.apply, rows=_operator.indices(Call, "q", "k"))
