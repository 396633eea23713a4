"""QK normalisation, learned scales and rotary xPos in one pass over memory (docs/model.md#5.2, #5.3)."""

import functools
import math

import torch

from andromeda.ops import _checks, _rotary, _select, _transforms
from andromeda.reference import qk_norm_rotary as reference

NAME = "qk_norm_rotary"

# Both operands are stored with their xPos factors. A factor above 2 ** limit leaves too little room for the values.
_FACTOR_LIMIT_LOG2 = {torch.float16: 8, torch.bfloat16: 100, torch.float32: 100, torch.float64: 900}
# The fastest growing factor is that of pair 0, zeta_0 = 0.4 / 1.4: log2(3.5) bits every 512 positions.
_LOG2_PER_POSITION = math.log2(3.5) / 512
_FACTOR_REACH = {dtype: math.floor(limit / _LOG2_PER_POSITION) for dtype, limit in _FACTOR_LIMIT_LOG2.items()}

_CUDA_MAX_HEAD_DIM = 512  # kMaxHeadDim in csrc/cuda/qk_norm_rotary.cuh
_CUDA_MAX_SEQLEN = 2**31 - 256  # kMaxSeqlen

# Gradients of scales are summed over runs of tokens first, then over the runs. Their number depends on shapes alone, so
# the result depends on neither threads nor timing. Enough of them to fill the machine, and tokens to pay for each.
_MAX_CPU_PARTIALS = 64
_MIN_TOKENS_PER_PARTIAL = 16

_TABLE_BLOCK = 64  # the CPU's tables hold whole blocks of positions: token by token, every 64th call makes new ones


def qk_norm_rotary(
    q,
    k,
    *,
    q_scale=None,
    k_scale=None,
    normalize=True,
    rotary_dim=0,
    xpos=False,
    position=0,
    origin=None,
    backend=None,
):
    """Normalise, scale and rotate the rows of q and k (docs/model.md#5.2, #5.3).

        x = x / max(||x||, 1e-12)                       over head_dim, when `normalize`
        x = x * scale[head]                             when a scale is given
        out[2t]     = z * (x[2t] * cos(p * omega_t) - x[2t + 1] * sin(p * omega_t))         for 2t < rotary_dim
        out[2t + 1] = z * (x[2t + 1] * cos(p * omega_t) + x[2t] * sin(p * omega_t))
        omega_t = 10000 ** (-2t / rotary_dim)           p: position of the row
        zeta_t = (2t + 0.4 * rotary_dim) / (1.4 * rotary_dim)
        z = zeta_t ** (+-(p - origin) / 512)            + for q, - for k; 1 without `xpos`

    Positions are aligned at the end: the last query sits at the last key. Each part can be off. Differentiable in q, k
    and both scales, again and again with backend="reference"; float32 inside for half precision. The rotary tables are
    made in float64 on the host.

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
        backend: "cuda", "triton", "cpu" or "reference". Default: the first that supports the call.

    Returns:
        q and k transformed, contiguous, of the shapes and dtypes of q and k.

    Raises:
        ValueError, TypeError: the call is wrong on every machine.
        NotImplementedError: no backend (or not the one asked for) can run it here; says why, each.
    """
    if not _is_usual(q, k, q_scale, k_scale, normalize, rotary_dim, xpos, position, origin):
        q, k = _checked(q, k, q_scale, k_scale, normalize, rotary_dim, xpos, position, origin)
    if not xpos:
        origin = position
    elif origin is None:
        origin = reference.default_origin(q.shape[1], k.shape[1], position)
    if xpos:
        _check_factors(q.dtype, q.shape[1], position + k.shape[1], origin)
    compute_dtype = _compute_dtype(q)
    tensors = q, k, _to(compute_dtype, q_scale), _to(compute_dtype, k_scale)
    options = normalize, rotary_dim, xpos, position, origin, _select.backend_argument(NAME, backend)
    if _select.needs_function(NAME, *tensors):
        return _QkNormRotary.apply(*tensors, *options)
    return FORWARD(*tensors, *options)


def unsupported(backend, q, k) -> list[str]:
    """Why `backend` cannot run `qk_norm_rotary` on these (correct) arguments here; empty when it can."""
    if backend == "reference":
        return []
    if backend == "triton":
        return ["no Triton kernel in this version"]
    if _select.extension is None:
        return [_select.extension_error]
    reasons = []
    if q.device.type != _select.DEVICE_TYPES[backend]:
        reasons.append(f"tensors on {q.device}")
    if q.dtype == torch.float64:
        reasons.append("dtype float64 (built for float32, float16, bfloat16)")
    if max(*q.shape, *k.shape) >= 2**31:
        reasons.append(f"a dimension of q {tuple(q.shape)} or k {tuple(k.shape)} above 2**31 - 1")
    if backend == "cuda":
        reasons += _select.cuda_unavailable(q.device)
        if q.shape[3] % 2 != 0 or q.shape[3] > _CUDA_MAX_HEAD_DIM:
            reasons.append(f"head_dim={q.shape[3]} (built for even ones up to {_CUDA_MAX_HEAD_DIM})")
        if (seqlen := max(q.shape[1], k.shape[1])) > _CUDA_MAX_SEQLEN:
            reasons.append(f"seqlen={seqlen} (built for up to 2**31 - 256)")
    return reasons


def _promote(q, k):
    """Under autocast, operands of different dtypes take the autocast dtype; float64 is never rounded."""
    device = q.device.type
    if q.dtype != k.dtype and device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k))
    return q, k


def _is_usual(q, k, q_scale, k_scale, normalize, rotary_dim, xpos, position, origin) -> bool:
    """Whether nothing is wrong and nothing to be cast, which most calls learn here in a few microseconds.

    What this does not let pass is looked at again by `_checked`, which finds the words for what is wrong.
    """
    if not (_checks.has_axes(q, 4) and _checks.has_axes(k, 4)):
        return False
    batch, _, num_heads, head_dim = q.shape
    k_batch, _, num_kv_heads, k_head_dim = k.shape
    dtype, device = q.dtype, q.device
    return (
        batch == k_batch
        and head_dim == k_head_dim > 0
        and dtype in _checks.FLOAT_DTYPES
        and k.dtype == dtype
        and k.device == device
        and (q_scale is None or _checks.is_floating(q_scale, (num_heads, head_dim), device))
        and (k_scale is None or _checks.is_floating(k_scale, (num_kv_heads, head_dim), device))
        and type(normalize) is type(xpos) is bool
        and type(rotary_dim) is type(position) is int
        and (origin is None or type(origin) is int)
        and xpos <= rotary_dim <= head_dim
        and rotary_dim >= 0
        and rotary_dim % 2 == 0
    )


def _checked(q, k, q_scale, k_scale, normalize, rotary_dim, xpos, position, origin):
    """q and k, cast under autocast.

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
    _checks.check_devices(NAME, q=q, k=k, q_scale=q_scale, k_scale=k_scale)
    for name, flag in (("normalize", normalize), ("xpos", xpos)):
        if not isinstance(flag, bool):
            raise TypeError(f"{NAME}: {name} must be True or False, got {flag!r}")
    for name, value in (("rotary_dim", rotary_dim), ("position", position), ("origin", origin)):
        if not _is_integer(value) and not (name == "origin" and value is None):
            raise TypeError(f"{NAME}: {name} must be an int, got {value!r} ({type(value).__name__})")
    if rotary_dim % 2 != 0 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"{NAME}: rotary_dim must be even and between 0 and head_dim={head_dim}, got {rotary_dim}")
    if xpos and rotary_dim == 0:
        raise ValueError(f"{NAME}: rotary_dim must be positive with xpos=True, got 0")
    return q, k


def _is_integer(value) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _check_factors(dtype, seqlen_q, end, origin) -> None:
    """The largest factors are those of the first query and of the last key, at `end - 1`. Small ones underflow without
    harm: the last query sits at the last key, so no query's factor is smaller than the inverse of the largest one."""
    limit, reach = _FACTOR_LIMIT_LOG2[dtype], _FACTOR_REACH[dtype]
    first_query = end - seqlen_q
    if end - 1 - origin > reach or origin - first_query > reach:
        raise ValueError(
            f"{NAME}: origin must be at most {reach} positions after the first query and before the last key, where "
            f"xPos factors reach 2**{limit} ({str(dtype).removeprefix('torch.')}), got origin {origin}, first query "
            f"{first_query}, last key {end - 1}; process the queries in segments, each with its own origin"
        )


def _compute_dtype(x) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward(q, k, q_scale, k_scale, normalize, rotary_dim, xpos, position, origin, backend):
    backend, rotation, _ = _plan(backend, q, k, rotary_dim, xpos, position, origin)
    q_out, k_out = _fake_forward(q, k)
    if backend == "reference":
        dtype = _compute_dtype(q)
        q_table, k_table = _whole_tables(q, k, rotary_dim, xpos, position, origin)
        q_out.copy_(reference.transform(q.to(dtype), q_scale, q_table, normalize))
        k_out.copy_(reference.transform(k.to(dtype), k_scale, k_table, normalize))
    else:
        with _select.device_guard(q.device):
            _select.extension.qk_norm_rotary_forward(
                q=q,
                k=k,
                q_scale=_dense(q_scale),
                k_scale=_dense(k_scale),
                **(rotation or _host_rotation(q, k, rotary_dim, xpos, position, origin)),
                q_out=q_out,
                k_out=k_out,
                normalize=normalize,
                num_threads=torch.get_num_threads(),
                stream=_select.current_stream(q.device),
            )
    return q_out, k_out


def _backward(dq_out, dk_out, q, k, q_scale, k_scale, normalize, rotary_dim, xpos, position, origin, backend):
    backend, rotation, num_partials = _plan(backend, q, k, rotary_dim, xpos, position, origin)
    dq, dk, dq_scale, dk_scale = _fake_backward(dq_out, dk_out, q, k, q_scale, k_scale)
    if backend == "reference":
        tables = _whole_tables(q, k, rotary_dim, xpos, position, origin)
        exact = _exact_gradients(dq_out, dk_out, q, k, q_scale, k_scale, normalize, tables)
        for gradient, result in zip((dq, dk, dq_scale, dk_scale), exact, strict=True):
            if result is not None:
                gradient.copy_(result)
    else:
        dq_scale_partial, dk_scale_partial = (
            None if scale is None else scale.new_empty((num_partials, *scale.shape)) for scale in (q_scale, k_scale)
        )
        with _select.device_guard(q.device):
            _select.extension.qk_norm_rotary_backward(
                q=q,
                k=k,
                q_scale=_dense(q_scale),
                k_scale=_dense(k_scale),
                **(rotation or _host_rotation(q, k, rotary_dim, xpos, position, origin)),
                dq_out=dq_out,
                dk_out=dk_out,
                dq=dq,
                dk=dk,
                dq_scale_partial=dq_scale_partial,
                dk_scale_partial=dk_scale_partial,
                normalize=normalize,
                num_threads=torch.get_num_threads(),
                stream=_select.current_stream(q.device),
            )
        for dscale, partial in ((dq_scale, dq_scale_partial), (dk_scale, dk_scale_partial)):
            if partial is not None:
                torch.sum(partial, dim=0, out=dscale)
    return dq, dk, dq_scale, dk_scale


def _plain_backward(dq_out, dk_out, q, k, q_scale, k_scale, normalize, rotary_dim, xpos, position, origin, backend):
    """The gradients by operations that torch can differentiate again."""
    tables = reference.rotary_tables(q.shape[1], k.shape[1], rotary_dim, xpos, position, origin, q.device)
    dq, dk, dq_scale, dk_scale = _exact_gradients(dq_out, dk_out, q, k, q_scale, k_scale, normalize, tables)
    return dq.to(q.dtype), dk.to(k.dtype), dq_scale, dk_scale


def _exact_gradients(dq_out, dk_out, q, k, q_scale, k_scale, normalize, tables):
    """Those of q, k and their scales by the reference, in the dtype that is computed in."""
    dtype = _compute_dtype(q)
    dq, dq_scale = reference.transform_backward(dq_out.to(dtype), q.to(dtype), q_scale, tables[0], normalize)
    dk, dk_scale = reference.transform_backward(dk_out.to(dtype), k.to(dtype), k_scale, tables[1], normalize)
    return dq, dk, dq_scale, dk_scale


def _plan(backend, q, k, rotary_dim, xpos, position, origin):
    """The backend of a call, what it rotates by on a GPU, and the number of partial sums for the gradients of scales:
    all layers of a step share a plan."""

    def make():
        chosen = _select.choose(NAME, backend, lambda name: unsupported(name, q, k))
        if chosen == "reference":
            return chosen, None, 0
        if chosen != "cuda":
            return chosen, None, _num_partials(_MAX_CPU_PARTIALS, q, k)
        rotation = _device_rotation(q.shape[1], k.shape[1], rotary_dim, xpos, position, origin, q.device)
        with _select.device_guard(q.device):
            most = _select.extension.qk_norm_rotary_backward_runs(q=q, k=k)
        return chosen, rotation, _num_partials(most, q, k)

    key = NAME, backend, q.device, q.dtype, q.shape, k.shape, rotary_dim, xpos, position, origin
    return _select.plan(key, q.device, make)


def _num_partials(most, q, k) -> int:
    return min(most, 1 + q.shape[0] * max(q.shape[1], k.shape[1]) // _MIN_TOKENS_PER_PARTIAL)


def _to(dtype, scale):
    return scale if scale is None or scale.dtype == dtype else scale.to(dtype)


def _dense(tensor):
    return None if tensor is None else tensor.contiguous()


# Tables are made inside the operators: so they are neither saved for the backward pass nor part of a compiled graph,
# and what is kept never meets a fake or a traced tensor.


def _host_rotation(q, k, rotary_dim, xpos, position, origin):
    """What a kernel of the CPU rotates by: the arguments q_table and k_table of the binding."""
    if rotary_dim == 0:
        return {"q_table": None, "k_table": None}
    q_table, k_table = _whole_tables(q, k, rotary_dim, xpos, position, origin)
    return {"q_table": q_table, "k_table": k_table}


def _device_rotation(seqlen_q, seqlen_k, rotary_dim, xpos, position, origin, device):
    """What a kernel of a GPU rotates by: the arguments q_table ... k_factor_row of the binding."""
    if rotary_dim == 0:
        return {"q_table": None, "k_table": None}
    end = position + seqlen_k
    first_query = end - seqlen_q  # the last query sits at the last key
    first = min(position, first_query)
    table, row = _rotary.angles(first, end, rotary_dim, device)
    rotation = {"q_table": table, "k_table": table, "q_row": row + first_query - first, "k_row": row + position - first}
    if xpos:
        # The exponent is position - origin for q and origin - position for k.
        lowest = min(first_query - origin, origin - end + 1)
        highest = max(end - 1 - origin, origin - position)
        table, row = _rotary.factors(lowest, highest + 1, rotary_dim, device)
        rotation |= {
            "factors": table,
            "q_factor_row": row + first_query - origin - lowest,
            "k_factor_row": row + origin - position - lowest,
        }
    return rotation


def _whole_tables(q, k, rotary_dim, xpos, position, origin):
    """Tables for q and k with the xPos factors in them, of the dtype that is computed in."""
    dtype = _compute_dtype(q)
    end = position + k.shape[1]
    seqlens = q.shape[1], k.shape[1]
    if q.device.type != "cpu":  # plain torch, which a graph repeats
        tables = reference.rotary_tables(*seqlens, rotary_dim, xpos, position, origin, q.device)
        return tuple(table.to(dtype) for table in tables)
    last = -(-end // _TABLE_BLOCK) * _TABLE_BLOCK
    # The last position of every table is `last`; what lies after `end` is cut off again.
    rows = (last - (end - seqlen) // _TABLE_BLOCK * _TABLE_BLOCK for seqlen in seqlens)
    surplus = last - end
    return tuple(
        table[len(table) - surplus - seqlen : len(table) - surplus]
        for table, seqlen in zip(_cached_tables(*rows, rotary_dim, xpos, last, origin, dtype), seqlens, strict=True)
    )


@functools.lru_cache(maxsize=16)  # all layers of a forward and backward pass ask for the same few tables
def _cached_tables(rows_q, rows_k, rotary_dim, xpos, end, origin, dtype):
    tables = reference.rotary_tables(rows_q, rows_k, rotary_dim, xpos, end - rows_k, origin)
    return tuple(table.to(dtype) for table in tables)


def _fake_forward(q, k, *args):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))


def _fake_backward(dq_out, dk_out, q, k, q_scale, k_scale, *args):
    dq_scale, dk_scale = (
        q.new_empty(0) if scale is None else scale.new_empty(scale.shape) for scale in (q_scale, k_scale)
    )
    return q.new_empty(q.shape), k.new_empty(k.shape), dq_scale, dk_scale


def _forward_flops(q_shape, k_shape, q_scale, k_scale, normalize, rotary_dim, *args, **kwargs) -> int:
    """Per channel: three operations to normalise, one to scale, three to rotate."""
    return sum(
        math.prod(shape[:3]) * (3 * normalize * shape[3] + (scale is not None) * shape[3] + 3 * rotary_dim)
        for shape, scale in ((q_shape, q_scale), (k_shape, k_scale))
    )


def _backward_flops(dq_shape, dk_shape, *args, **kwargs) -> int:
    """The forward pass again, then its transpose."""
    return 2 * _forward_flops(*args, **kwargs)


_TENSORS = "Tensor q, Tensor k, Tensor? q_scale, Tensor? k_scale"
_OPTIONS = "bool normalize, int rotary_dim, bool xpos, SymInt position, SymInt origin, str backend"
# The operators themselves, for policies that name them.
FORWARD = _select.define(
    f"qk_norm_rotary_forward({_TENSORS}, {_OPTIONS}) -> (Tensor, Tensor)",
    implementation=_forward,
    fake=_fake_forward,
    flops=_forward_flops,
    rows=(0, 1),
)
BACKWARD = _select.define(
    f"qk_norm_rotary_backward(Tensor dq_out, Tensor dk_out, {_TENSORS}, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    implementation=_backward,
    fake=_fake_backward,
    flops=_backward_flops,
    rows=(0, 1, 2, 3),
    sums=(4, 5),
)


class _QkNormRotary(torch.autograd.Function):
    """The two operators as one differentiable function."""

    @staticmethod
    def forward(q, k, q_scale, k_scale, normalize, rotary_dim, xpos, position, origin, backend):
        return FORWARD(q, k, q_scale, k_scale, normalize, rotary_dim, xpos, position, origin, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, normalize, rotary_dim, xpos, position, origin, backend = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = normalize, rotary_dim, xpos, position, origin, backend

    @staticmethod
    def backward(ctx, dq_out, dk_out):
        # The gradient of a sum is one expanded number: its last dimension is not dense.
        douts = (dout if dout.stride(-1) == 1 else dout.contiguous() for dout in (dq_out, dk_out))
        saved = ctx.saved_tensors
        tensors = *douts, *saved
        results = _transforms.gradients(
            NAME,
            ctx.options[-1],
            tensors,
            lambda: _transforms.given(BACKWARD(*tensors, *ctx.options), saved),
            lambda: _plain_backward(*tensors, *ctx.options),
        )
        return *results, *(None,) * 6

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap(info, in_dims, *args)


_vmap = _transforms.vmap_rule(_QkNormRotary.apply, rows=(0, 1))
