"""`attention` (docs/model.md#5): arguments, choice of backend, allocation and gradients. The kernels are elsewhere."""

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from andromeda.ops import Backend, _checks, _operator, _persistent, _select, _transforms
from andromeda.ops._common import cast, compute_dtype, contiguous, with_dense_rows
from andromeda.reference import attention as reference

NAME = "attention"

_DTYPES = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),  # tensor cores, on which float32 would lose digits
    "triton": (torch.float32, torch.float16, torch.bfloat16),
}
# What `_C.build_info` says of the CUDA kernels. The sum of two positions fits in 32 bits.
_TRITON_LIMITS = {"max_attention_head_dim": 256, "max_attention_seqlen": 2**30, "min_softmax_scale": 2.0**-60}
NUM_SPLITS = 0  # number of splits of the keys in the GPU kernels for few queries; 0: chosen. Tests change it
_FEW_QUERIES = 32
_WIDE_MULTIPLE = 8  # of head_dim, in the GPU kernel for more than 128 channels: TMA copies 16 bytes
_Direction = Literal["forward", "backward"]
REFERENCE_BLOCK_LOGITS = 2**24  # the reference holds at most this many logits at once: 64 MiB of float32


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    logit_bound: Tensor | None = ...,
    key_start: Tensor | None = ...,
    num_keys: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backend | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    logit_bound: Tensor | None = ...,
    key_start: Tensor | None = ...,
    num_keys: Tensor | None = ...,
    return_lse: Literal[True],
    backend: Backend | None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    alibi_slopes: Tensor | None = ...,
    logit_bound: Tensor | None = ...,
    key_start: Tensor | None = ...,
    num_keys: Tensor | None = ...,
    return_lse: bool,
    backend: Backend | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    logit_bound: Tensor | None = None,
    key_start: Tensor | None = None,
    num_keys: Tensor | None = None,
    return_lse: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention with an optional ALiBi bias (docs/model.md#5).

        score = softmax_scale * q @ k^T - alibi_slopes * |i - j|,   out = softmax(score) @ v

    Positions are aligned at the end: the last query and the last key have i == j. Differentiable once in q, k and v;
    with backend="reference" any number of times, but then all scores are held at once. The last dimension must be
    dense, the other strides are free; nothing is copied.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float32, float16, bfloat16. The reference also computes float64.
        k, v: (batch, seqlen_k, num_kv_heads, head_dim), dtype and device of q. num_heads must be a multiple of
            num_kv_heads: consecutive heads share a key head; with one key head it is multi-query attention. Under
            autocast q, k, v are cast to its dtype first (float64 is not).
        causal: hide keys with j > i. For 2 queries and 4 keys (left) and for 4 queries and 2 keys (right) query i sees:
            1 1 1 0        0 0
            1 1 1 1        0 0
                           1 0
                           1 1
        softmax_scale: factor on q @ k^T, not on the bias; finite. Default: head_dim ** -0.5. It is a constant of a
            compiled program: torch.compile makes one for each value. For a scale that varies or is learned multiply q
            by a tensor, and pass 1.
        alibi_slopes: (num_heads,), float32, finite, >= 0; 0 means no bias for that head. A constant: it gets no
            gradient and must not require one. Its values are checked on CPU tensors only.
        logit_bound: (num_heads,), float32: a promise that |softmax_scale * <q_i, k_j>| <= logit_bound for every
            visible pair; QK norm gives such a bound. It permits a softmax without a running maximum, and skipping keys
            so far away that ALiBi leaves them less than 2**-24 of a row. The result stays within the rounding error
            either way (docs/attention.md#bounded-softmax); a wrong bound gives wrong results. A constant: it is
            detached. Values that are not finite promise nothing.
        key_start: (batch, seqlen_q), int32, non-decreasing along a row (checked on CPU tensors): query i sees only keys
            j >= key_start[i]. For packed documents it is the start of the query's document, for left padding the number
            of padded keys, for a sliding window i - window + 1. May be expanded. Five tokens, documents of 2 and 3,
            causal, key_start = [0, 0, 2, 2, 2]:
            1 0 0 0 0
            1 1 0 0 0
            0 0 1 0 0
            0 0 1 1 0
            0 0 1 1 1
            From cu_seqlens, (documents + 1,) such as [0, 2, 5], without reading it back from a GPU:
            token = torch.arange(seqlen, device=cu_seqlens.device)
            key_start = cu_seqlens[torch.bucketize(token, cu_seqlens, right=True) - 1].to(torch.int32)[None]
        num_keys: (1,), int32, on the device of q: only so many first rows of k and v exist, and the call is the one on
            k[:, :num_keys] and v[:, :num_keys]. On a GPU the kernel reads it, so that a CUDA graph on a cache of fixed
            size sees more keys at each replay. It must be between 0 and seqlen_k (checked on CPU tensors), and no
            gradient may be recorded.
        return_lse: also return the log-sum-exp of each row of scores. It is not differentiable.
        backend: "cuda", "triton", "cpu" or "reference". Default: the first that supports the call.

    Returns:
        out: (batch, seqlen_q, num_heads, head_dim), dtype of q; accumulated in float32 (float64 for float64). A row
            that sees no key is 0, and so are its gradients.
        softmax_lse, with return_lse: (batch, num_heads, seqlen_q), float32 (float64 for float64), natural logarithm;
            -inf for a row that sees no key.

        The results and gradients of a row do not depend on data hidden from it, even if these are NaN or infinite:
        hidden keys and values, queries and output gradients that do not see a key, other documents, padding.

    Raises:
        ValueError, TypeError: the call is wrong on every machine.
        NotImplementedError: no backend, or not the requested one, can run it here; gives the reasons for each.
    """
    is_usual = _is_usual(q, k, v, alibi_slopes, logit_bound, key_start, num_keys)
    if not is_usual:
        q, k, v = _checked(q, k, v, alibi_slopes, logit_bound, key_start, num_keys)
    if softmax_scale is None:
        softmax_scale = q.shape[3] ** -0.5
    else:
        softmax_scale = _checks.check_finite_number(NAME, "softmax_scale", softmax_scale)
    if logit_bound is not None and logit_bound.requires_grad:
        logit_bound = logit_bound.detach()
    backend_argument = _select.backend_argument(NAME, backend)
    call = Call(q, k, v, alibi_slopes, logit_bound, key_start, bool(causal), softmax_scale, backend_argument, num_keys)
    if _select.needs_function(NAME, q, k, v):
        if backend == "cuda" and not torch.compiler.is_compiling():
            _plan("backward", call)  # a call without kernels for its gradients is refused now, not in the backward pass
        if num_keys is not None:
            _checks.refuse_gradients(NAME, "num_keys", "k and v cut to that many keys")
        is_plain = is_usual and not _select.transforms_active()
        out, softmax_lse = (_plain_apply if is_plain else _Attention.apply)(*call)
    elif is_usual and _operator.is_unobserved():
        out, softmax_lse = forward(call)
    else:
        out, softmax_lse = FORWARD(*call)
    return (out, softmax_lse) if return_lse else out


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    key_start: Tensor | None = None,
) -> Tensor:
    """The softmax weights that `attention` gives the keys, (batch, num_heads, seqlen_q, seqlen_k), in plain torch.

    Arguments as there, without checks. Differentiable any number of times. All weights are held at once, in the
    accumulator's dtype (float32, or float64 for float64); a hidden key, and each key of a row that sees none, has 0.
    """
    q, k = (tensor.to(compute_dtype(tensor.dtype)) for tensor in (q, k))
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    logits, hidden = reference.masked_logits(q, k, causal, scale, alibi_slopes, key_start, None)
    return logits.softmax(-1).masked_fill(hidden, 0).flatten(1, 2)


def unsupported(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    alibi_slopes: Tensor | None = None,
    logit_bound: Tensor | None = None,
    key_start: Tensor | None = None,
    num_keys: Tensor | None = None,
    direction: _Direction = "forward",
) -> list[str]:
    """Why `backend` cannot run a direction of `attention` on these (correct) arguments here; empty when it can."""
    if backend == "reference":
        return _select.unreadable("num_keys", num_keys)
    if (answer := _select.without_compiled_kernels(backend)) is not None:
        return answer
    reasons = _select.common_reasons(backend, _DTYPES[backend], q=q, k=k)
    if backend in ("cuda", "triton"):
        limits = _TRITON_LIMITS if backend == "triton" else _select.extension.build_info()
        if q.shape[3] > (max_head_dim := limits["max_attention_head_dim"]):
            can_ask = backend == "cuda" and not reasons
            reasons += _beyond_head_dim(int(max_head_dim), q, num_keys, direction if can_ask else None)
        for name, seqlen in (("seqlen_q", q.shape[1]), ("seqlen_k", k.shape[1])):
            if seqlen > (max_seqlen := limits["max_attention_seqlen"]):
                most = "2**30" if max_seqlen == 2**30 else f"2**31 - {2**31 - max_seqlen}"
                reasons.append(f"{name}={seqlen} (built for up to {most})")
        if softmax_scale is not None and softmax_scale < (smallest := limits["min_softmax_scale"]):
            power = f"2**{math.log2(smallest):.0f}"
            reasons.append(f"softmax_scale={softmax_scale} (built for at least {power}; -q has the opposite scale)")
    return reasons


def _beyond_head_dim(max_head_dim: int, q: Tensor, num_keys: Tensor | None, direction: _Direction | None) -> list[str]:
    """The reasons against a head_dim above the limit that all devices share.

    direction: of a call of the compiled kernels; a device may have a wider one for the forward pass. None otherwise.
    """
    head_dim = q.shape[3]
    widest = max_head_dim
    if direction is not None:
        with _select.device_guard(q.device):
            widest = _select.extension.attention_forward_max_head_dim()
    if head_dim > widest:
        return [f"head_dim={head_dim} (built for 1 to {widest})"]
    if direction == "backward":
        return [f"gradients with head_dim={head_dim} (built for 1 to {max_head_dim})"]
    if head_dim % _WIDE_MULTIPLE != 0:
        return [f"head_dim={head_dim} (above {max_head_dim} built for multiples of {_WIDE_MULTIPLE})"]
    if num_keys is not None:
        return [f"num_keys with head_dim={head_dim} (built for 1 to {max_head_dim})"]
    return []


class Call(NamedTuple):
    """The arguments of `attention_forward`, in the order of its schema; `attention` has checked them."""

    q: Tensor
    k: Tensor
    v: Tensor
    alibi_slopes: Tensor | None
    logit_bound: Tensor | None
    key_start: Tensor | None
    causal: bool
    softmax_scale: float
    backend: str
    num_keys: Tensor | None = None


def _is_usual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    logit_bound: Tensor | None,
    key_start: Tensor | None,
    num_keys: Tensor | None,
) -> bool:
    """Whether the call is correct and needs no cast. Most calls are, and this takes a microsecond.

    `_checked` examines every other call again and reports its errors.
    """
    return (
        not torch.compiler.is_compiling()
        and _select.extension_error is None
        and _select.extension.attention_is_usual(q, k, v, alibi_slopes, logit_bound, key_start, num_keys)
        and not (alibi_slopes is not None and alibi_slopes.requires_grad)
        and _checks.autocast_keeps(q)
    )


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    logit_bound: Tensor | None,
    key_start: Tensor | None,
    num_keys: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, cast under autocast.

    Raises:
        ValueError, TypeError: see `attention`.
    """
    _checks.check_tensor(NAME, "q", q, ("batch", "seqlen_q", "num_heads", "head_dim"))
    _checks.check_tensor(NAME, "k", k, ("batch", "seqlen_k", "num_kv_heads", "head_dim"))
    _checks.check_tensor(NAME, "v", v, ("batch", "seqlen_k", "num_kv_heads", "head_dim"))
    device = q.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v))
    batch, seqlen_q, num_heads, _ = q.shape
    _checks.check_dtypes(NAME, q=q, k=k, v=v)
    _checks.check_equal_axis(NAME, 0, "batch", q=q, k=k, v=v)
    _checks.check_equal_axis(NAME, 1, "seqlen_k", k=k, v=v)
    _checks.check_equal_axis(NAME, 2, "num_kv_heads", k=k, v=v)
    _checks.check_equal_axis(NAME, 3, "head_dim", k=k, v=v)
    _checks.check_heads(NAME, q, k)
    for name, tensor in (("alibi_slopes", alibi_slopes), ("logit_bound", logit_bound)):
        if tensor is not None:
            _checks.check_exact(NAME, name, tensor, ("num_heads",), (num_heads,), torch.float32)
    if key_start is not None:
        _checks.check_exact(NAME, "key_start", key_start, ("batch", "seqlen_q"), (batch, seqlen_q), torch.int32)
    if num_keys is not None:
        _checks.check_exact(NAME, "num_keys", num_keys, ("1",), (1,), torch.int32)
    _checks.check_devices(
        NAME,
        q=q,
        k=k,
        v=v,
        alibi_slopes=alibi_slopes,
        logit_bound=logit_bound,
        key_start=key_start,
        num_keys=num_keys,
    )
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "attention: alibi_slopes must not require a gradient, got requires_grad=True; pass alibi_slopes.detach()"
        )
    return q, k, v


def _check_values(
    alibi_slopes: Tensor | None, key_start: Tensor | None, num_keys: Tensor | None, seqlen_k: int
) -> None:
    """Check values. Only for the operator on a CPU: a traced call has no values, and reading them would stall a GPU."""
    if alibi_slopes is not None and alibi_slopes.numel() > 0:
        low, high = (value.item() for value in torch.aminmax(alibi_slopes))
        if not (low >= 0 and high < float("inf")):  # NaN fails both
            raise ValueError(f"attention: alibi_slopes must be finite and >= 0, got values in [{low}, {high}]")
    if num_keys is not None and not 0 <= (count := int(num_keys.item())) <= seqlen_k:
        raise ValueError(f"attention: num_keys must be between 0 and seqlen_k={seqlen_k}, got {count}")
    if key_start is not None and key_start.shape[1] > 1:
        falls = key_start[:, 1:] < key_start[:, :-1]
        if falls.any():
            entry, query = falls.nonzero()[0].tolist()
            raise ValueError(
                f"attention: key_start must not decrease along a row, got {key_start[entry, query].item()} followed by "
                f"{key_start[entry, query + 1].item()} at [{entry}, {query + 1}]"
            )


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """The operator `attention_forward`: out and softmax_lse."""
    if call.q.is_cpu:
        _check_values(call.alibi_slopes, call.key_start, call.num_keys, call.k.shape[1])
    plan = _plan("forward", call)
    if call.num_keys is not None and plan.backend in ("cpu", "reference"):
        call = _cut(call, call.num_keys)
        plan = _plan("forward", call)
    q, k, v, alibi_slopes, logit_bound, key_start, causal, softmax_scale, _, num_keys = call
    device = q.device
    out, softmax_lse = _fake_forward(call)
    if plan.is_empty:
        out.zero_()
        softmax_lse.fill_(float("-inf"))
    elif plan.backend == "reference":
        _reference_forward(call, out, softmax_lse)
    elif plan.backend == "triton":
        from andromeda.triton_kernels import attention as kernels

        with _select.device_guard(device):
            kernels.forward(*_tensors(call, out, softmax_lse), num_splits=plan.num_splits, num_keys=num_keys)
    else:
        if plan.needs_aligned:
            q, k, v = map(_aligned, (q, k, v))
        stream = _select.current_stream(device)
        partials, semaphores = _workspace(plan, softmax_lse, stream)
        _select.extension.attention_forward(
            q,
            k,
            v,
            contiguous(alibi_slopes),
            contiguous(logit_bound),
            contiguous(key_start),
            out,
            softmax_lse,
            causal,
            softmax_scale,
            torch.get_num_threads(),
            partials,
            semaphores,
            stream,
            plan.num_splits,
            num_keys,
        )
    return out, softmax_lse


def _cut(call: Call, num_keys: Tensor) -> Call:
    """The same call on the keys that exist. Reads a value, and on a GPU waits for it."""
    count = int(num_keys.item())
    return call._replace(k=call.k[:, :count], v=call.v[:, :count], num_keys=None)


def backward(dout: Tensor, out: Tensor, softmax_lse: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `attention_backward`: dq, dk and dv."""
    assert call.num_keys is None  # `attention` refuses it where gradients are recorded
    q, k, v, alibi_slopes, logit_bound, key_start, causal, softmax_scale, *_ = call
    device = q.device
    plan = _plan("backward", call)
    dq, dk, dv = gradients = _fake_backward(dout, out, softmax_lse, call)
    if plan.is_empty:
        for gradient in gradients:
            gradient.zero_()
    elif plan.backend == "reference":
        _reference_backward(dout, out, softmax_lse, call, gradients)
    elif plan.backend == "triton":
        from andromeda.triton_kernels import attention as kernels

        with _select.device_guard(device):
            kernels.backward(*_tensors(call, out, softmax_lse), dout=dout, dq=dq, dk=dk, dv=dv)
    else:
        stream = _select.current_stream(device)
        partials, semaphores = _workspace(plan, softmax_lse, stream)
        _select.extension.attention_backward(
            q,
            k,
            v,
            contiguous(alibi_slopes),
            contiguous(logit_bound),
            contiguous(key_start),
            out,
            softmax_lse,
            causal,
            softmax_scale,
            dout,
            dq,
            dk,
            dv,
            torch.get_num_threads(),
            partials,
            semaphores,
            stream,
        )
    return gradients


class Plan(NamedTuple):
    """Everything about a call that does not depend on its data."""

    backend: str
    is_empty: bool  # there is nothing to compute
    num_partials: int  # float32 numbers of the workspace
    num_semaphores: int
    num_splits: int  # the argument of the kernels, where a direction has it: the workspace is for this many
    needs_aligned: bool = False  # the kernel takes only tensors that `_aligned` leaves as they are


def _plan(direction: _Direction, call: Call) -> Plan:
    """The backend of a call and the sizes of its workspace."""
    q, shape_k = call.q, call.k.shape
    options = call.num_keys is not None, call.causal, call.softmax_scale, NUM_SPLITS
    key = direction, call.backend, q.device, q.dtype, q.shape, shape_k, *options
    return _select.plan(key, q.device, _make_plan, direction, call)


def _make_plan(direction: _Direction, call: Call) -> Plan:
    q, k, scale = call.q, call.k, call.softmax_scale
    options: dict[str, Any] = {"softmax_scale": scale, "num_keys": call.num_keys, "direction": direction}
    flops = {"forward": 4, "backward": 10}[direction] * q.shape[3] * _visible_pairs(call)
    if q.shape[1] <= _FEW_QUERIES:  # such calls are limited by memory and by their launch
        flops = 0
    backend = _select.choose(
        NAME, call.backend, lambda name: unsupported(name, q, k, k, **options), q.device, f"{NAME}_{direction}", flops
    )
    is_empty = 0 in (*q.shape, k.shape[1])
    if backend == "triton" and direction == "forward":
        return Plan(backend, is_empty, 0, 0, NUM_SPLITS)
    if backend != "cuda" or is_empty:
        return Plan(backend, is_empty, 0, 0, 0)
    batch, seqlen_q, num_heads, head_dim = q.shape
    shape = {
        "batch": batch,
        "seqlen_q": seqlen_q,
        "seqlen_k": k.shape[1],
        "num_heads": num_heads,
        "num_kv_heads": k.shape[2],
        "head_dim": head_dim,
    }
    with _select.device_guard(q.device):
        if direction == "backward":
            num_partials, num_semaphores = _select.extension.attention_backward_workspace(**shape, causal=call.causal)
            return Plan(backend, False, num_partials, num_semaphores, 0)
        num_partials, num_semaphores, num_splits = _select.extension.attention_forward_workspace(
            **shape, causal=call.causal, num_splits=NUM_SPLITS, has_num_keys=call.num_keys is not None
        )
        is_wide = head_dim > _select.extension.build_info()["max_attention_head_dim"]
        return Plan(backend, False, num_partials, num_semaphores, num_splits, is_wide)


def _tensors(call: Call, out: Tensor, softmax_lse: Tensor) -> tuple[Any, ...]:
    """The first arguments of a Triton kernel in both directions: q to softmax_scale."""
    q, k, v, alibi_slopes, logit_bound, key_start, causal, softmax_scale, *_ = call
    constants = contiguous(alibi_slopes), contiguous(logit_bound), contiguous(key_start)
    return (q, k, v, *constants, out, softmax_lse, causal, softmax_scale)


def _workspace(plan: Plan, softmax_lse: Tensor, stream: int) -> tuple[Tensor | None, Tensor | None]:
    """The arguments partials, in the dtype of softmax_lse, and semaphores of a compiled kernel."""
    if plan.num_partials == plan.num_semaphores == 0:
        return None, None
    partials = softmax_lse.new_empty(plan.num_partials) if plan.num_partials else None
    return partials, _persistent.semaphores(softmax_lse.device, plan.num_semaphores, stream)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor with rows that start at multiples of 16 bytes, and no axis repeated by a stride of 0."""
    strides = [stride for stride, size in zip(tensor.stride()[:3], tensor.shape, strict=False) if size > 1]
    if tensor.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in strides):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _fake_forward(call: Call) -> tuple[Tensor, Tensor]:
    q = call.q
    batch, seqlen_q, num_heads, _ = q.shape
    softmax_lse = q.new_empty(batch, num_heads, seqlen_q, dtype=compute_dtype(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), softmax_lse


def _fake_backward(dout: Tensor, out: Tensor, softmax_lse: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    return q.new_empty(*q.shape), k.new_empty(*k.shape), v.new_empty(*v.shape)


def _query_blocks(call: Call) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """Cut the queries so that the logits of a block fit in memory.

    Yields (queries, keys, options): slices of the two sequence axes, and the arguments of the reference.
    """
    batch, seqlen_q, num_heads, _ = call.q.shape
    seqlen_k = call.k.shape[1]
    rows = max(1, REFERENCE_BLOCK_LOGITS // (batch * num_heads * seqlen_k))
    first_query = seqlen_k - seqlen_q  # its position among the keys
    for start in range(0, seqlen_q, rows):
        stop = min(start + rows, seqlen_q)
        # Under a causal mask the keys after the last query of the block are hidden.
        keys = slice(0, max(0, first_query + stop) if call.causal else seqlen_k)
        options = _reference_options(call) | {"first_query": first_query + start}
        if call.key_start is not None:
            options["key_start"] = call.key_start[:, start:stop]
        yield slice(start, stop), keys, options


def _reference_options(call: Call) -> dict[str, Any]:
    return {
        "causal": call.causal,
        "softmax_scale": call.softmax_scale,
        "alibi_slopes": call.alibi_slopes,
        "key_start": call.key_start,
    }


def _reference_forward(call: Call, out: Tensor, softmax_lse: Tensor) -> None:
    dtype = softmax_lse.dtype
    # torch.autocast would round the products of the reference to half precision.
    with torch.autocast(call.q.device.type, enabled=False):
        k, v = call.k.to(dtype), call.v.to(dtype)
        for queries, keys, options in _query_blocks(call):
            q = call.q[:, queries].to(dtype)
            out[:, queries], softmax_lse[:, :, queries] = reference.attention(q, k[:, keys], v[:, keys], **options)


def _reference_backward(
    dout: Tensor, out: Tensor, softmax_lse: Tensor, call: Call, gradients: tuple[Tensor, Tensor, Tensor]
) -> None:
    dtype = softmax_lse.dtype
    dq, dk, dv = gradients
    with torch.autocast(call.q.device.type, enabled=False):
        k, v = call.k.to(dtype), call.v.to(dtype)
        dk_sum, dv_sum = torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys, options in _query_blocks(call):
            dq[:, queries], dk_block, dv_block = reference.attention_backward(
                dout[:, queries].to(dtype),
                call.q[:, queries].to(dtype),
                k[:, keys],
                v[:, keys],
                out[:, queries].to(dtype),
                softmax_lse[:, :, queries],
                **options,
            )
            dk_sum[:, keys] += dk_block
            dv_sum[:, keys] += dv_block
        dk.copy_(dk_sum)
        dv.copy_(dv_sum)


def _plain_forward(call: Call) -> tuple[Tensor, Tensor]:
    """The outputs by operations that a program without the operator can hold. Holds all scores at once."""
    q, k, v = (cast(tensor, compute_dtype(call.q.dtype)) for tensor in (call.q, call.k, call.v))
    out, softmax_lse = reference.attention(q, k, v, num_keys=call.num_keys, **_reference_options(call))
    return cast(out, call.q.dtype), softmax_lse


def _plain_backward(dout: Tensor, call: Call) -> tuple[Tensor, ...]:
    """dq, dk and dv, by operations that torch can differentiate again. Holds all scores at once."""
    options = _reference_options(call)
    with torch.autocast(call.q.device.type, enabled=False):
        dout, q, k, v = (cast(tensor, compute_dtype(call.q.dtype)) for tensor in (dout, call.q, call.k, call.v))
        out, softmax_lse = reference.attention(q, k, v, **options)
        results = reference.attention_backward(dout, q, k, v, out, softmax_lse, **options)
    return tuple(result.to(call.q.dtype) for result in results)


def _visible_pairs(call: Call) -> int:
    """Visible pairs of query and key in all heads: half of all pairs and the diagonal in a square causal call.

    Pairs that `key_start` hides or that windows skip count as visible.
    """
    batch, seqlen_q, num_heads, _ = call.q.shape
    seqlen_k = call.k.shape[1]
    if not call.causal:
        return batch * num_heads * seqlen_q * seqlen_k
    rows = min(seqlen_q, seqlen_k)  # rows that see a key: the last one sees all keys, each one before it one key less
    return batch * num_heads * (rows * seqlen_k - rows * (rows - 1) // 2)


def _forward_flops(call: Call) -> int:
    """Two products of 2 * head_dim operations per visible pair."""
    return 4 * call.q.shape[3] * _visible_pairs(call)


def _backward_flops(dout: Tensor, out: Tensor, softmax_lse: Tensor, call: Call) -> int:
    """Five products: the scores again, and one for each gradient, those of the weights, q, k and v."""
    return 10 * call.q.shape[3] * _visible_pairs(call)


_AXES = "q:BnHd k:BmHd v:BmHd alibi_slopes:H logit_bound:H key_start:Bn num_keys:i"

# The operators themselves, for policies that name them (selective activation checkpointing should save FORWARD).
FORWARD = _operator.define(
    f"attention_forward({_operator.parameters(Call)}) -> (Tensor, Tensor)",
    Call,
    implementation=forward,
    fake=_fake_forward,
    flops=_forward_flops,
    rows=("q", "k", "v", "key_start"),
    axes=f"{_AXES} -> BnHd BHn",
    plain=_plain_forward,
)
BACKWARD = _operator.define(
    f"attention_backward(Tensor dout, Tensor out, Tensor softmax_lse, {_operator.parameters(Call)})"
    " -> (Tensor, Tensor, Tensor)",
    Call,
    implementation=backward,
    fake=_fake_backward,
    flops=_backward_flops,
    rows=("dout", "out", "softmax_lse", "q", "k", "v", "key_start"),
    axes=f"dout:BnHd out:BnHd softmax_lse:BHn {_AXES} -> BnHd BmHd+H BmHd+H",
)


class _Attention(torch.autograd.Function):
    """The two operators as one differentiable function of the fields of a `Call`."""

    @staticmethod
    @_operator.takes(Call)
    def forward(*fields: Any) -> Any:
        return FORWARD(*fields)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *inputs[:_NUM_TENSORS])
        ctx.options = inputs[_NUM_TENSORS:]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: object) -> tuple[Tensor | None, ...]:
        if dout is None:
            return _NO_GRADIENTS
        dense_dout = with_dense_rows(dout)
        out, softmax_lse, *tensors = ctx.saved_tensors
        call = Call(*tensors, *ctx.options)
        results = _transforms.gradients(
            NAME,
            call.backend,
            (dense_dout, call.q, call.k, call.v),
            lambda: BACKWARD(dense_dout, out, softmax_lse, *call),
            lambda: _plain_backward(dense_dout, call),
        )
        return *results, *_NO_GRADIENTS[len(results) :]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *fields: Any) -> tuple[Any, Any]:
        return _vmap(info, in_dims, *fields)


_plain_apply = _operator.plain_apply(_Attention)
_NUM_TENSORS = _operator.num_tensors(Call)
_NO_GRADIENTS = (None,) * len(Call._fields)
_LOGIT_BOUND = Call._fields.index("logit_bound")
_fold = _transforms.vmap_rule(_Attention.apply, rows=_operator.indices(Call, "q", "k", "v", "key_start"))


def _vmap(info: Any, in_dims: tuple[int | None, ...], *fields: Any) -> tuple[Any, Any]:
    """Each of the mapped calls has its own logit_bound; the largest holds for all."""
    mapped = in_dims[_LOGIT_BOUND]
    if mapped is not None:
        call = Call(*fields)
        assert call.logit_bound is not None  # it has an axis
        fields = call._replace(logit_bound=call.logit_bound.amax(mapped))
        in_dims = (*in_dims[:_LOGIT_BOUND], None, *in_dims[_LOGIT_BOUND + 1 :])
    return _fold(info, in_dims, *fields)
