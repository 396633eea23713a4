"""attention (docs/model.md#5): arguments, backend choice, allocation and gradients. The kernels are elsewhere."""

from typing import NamedTuple

import torch

from andromeda.ops import _checks, _persistent, _select, _transforms
from andromeda.reference import attention as reference

_DTYPES = {
    "cpu": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float16, torch.bfloat16),  # tensor cores; float32 would lose digits there and takes the reference
}
_CUDA_MAX_HEAD_DIM = 128  # kMaxAttentionHeadDim in csrc/include/andromeda/attention.h
_CUDA_MAX_SEQLEN = 2**31 - 256  # kMaxAttentionSeqlen
_CUDA_MIN_SOFTMAX_SCALE = 2.0**-60  # kMinSoftmaxScale
_NUM_SPLITS = 0  # tests: into how many shares the CUDA kernel for few queries cuts the keys; 0: it chooses
_REFERENCE_BLOCK_LOGITS = 2**24  # the reference holds this many logits at once, 64 MiB of float32


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    softmax_scale=None,
    alibi_slopes=None,
    logit_bound=None,
    key_start=None,
    return_lse=False,
    backend=None,
):
    """Softmax attention with an optional ALiBi bias (docs/model.md#5).

        score = softmax_scale * q @ k^T - alibi_slopes * |i - j|,   out = softmax(score) @ v

    Positions are aligned at the end: the last query and the last key have i == j. Differentiable in q, k and v, once;
    with backend="reference" again and again, which holds all scores at a time.
    The last dimension must be dense, the other strides are free; nothing is copied.

    Args:
        q: (batch, seqlen_q, num_heads, head_dim), float32, float16, bfloat16; float64 takes the reference, and on a
            GPU float32 does too: its kernels multiply in half precision.
        k, v: (batch, seqlen_k, num_kv_heads, head_dim), dtype and device of q. num_heads must be a multiple of
            num_kv_heads, consecutive heads share a key head; 1 is multi-query attention. Under autocast q, k, v are
            cast to its dtype first (float64 is not).
        causal: hide keys with j > i. For 2 queries and 4 keys (left) and for 4 queries and 2 keys (right) query i sees:
            1 1 1 0        0 0
            1 1 1 1        0 0
                           1 0
                           1 1
        softmax_scale: factor on q @ k^T, not on the bias; finite. Default: head_dim ** -0.5.
        alibi_slopes: (num_heads,), float32, finite, >= 0; 0 means no bias for that head. A constant: it gets no
            gradient and may not ask for one. Its values are checked on CPU tensors only.
        logit_bound: (num_heads,), float32: a promise that |softmax_scale * <q_i, k_j>| <= logit_bound for every
            visible pair, which QK norm gives. It permits a softmax without a running maximum and the skipping of keys
            so far away that ALiBi leaves them less than 2**-24 of a row (docs/attention.md#bounded-softmax). The result
            stays within the rounding error either way; a promise that is not kept gives wrong results. A constant:
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
        return_lse: also return the log-sum-exp of each row of scores. It is not differentiable.
        backend: "cuda", "triton", "cpu" or "reference". Default: the first that supports the call.

    Returns:
        out: (batch, seqlen_q, num_heads, head_dim), dtype of q; accumulated in float32 (float64 for float64). A row
            that sees no key is 0, and so are its gradients.
        softmax_lse, with return_lse: (batch, num_heads, seqlen_q), float32 (float64 for float64), natural logarithm;
            -inf for a row that sees no key.

        What a row does not see has no effect on its results and gradients, whatever is there: NaN and infinities in
        hidden keys and values, in queries and output gradients that do not see a key, between documents, in padding.

    Raises:
        ValueError, TypeError: the call is wrong on every machine.
        NotImplementedError: no backend (or not the one asked for) can run it here; says why, each.
    """
    if not _is_usual(q, k, v, alibi_slopes, logit_bound, key_start):
        q, k, v = _checked(q, k, v, alibi_slopes, logit_bound, key_start)
    if softmax_scale is None:
        softmax_scale = q.shape[3] ** -0.5
    else:
        softmax_scale = _checks.check_finite_number("attention", "softmax_scale", softmax_scale)
    if logit_bound is not None and logit_bound.requires_grad:
        logit_bound = logit_bound.detach()
    arguments = q, k, v, alibi_slopes, logit_bound, key_start
    options = bool(causal), softmax_scale, _select.backend_argument("attention", backend)
    if _select.needs_function("attention", q, k, v):
        out, softmax_lse = _Attention.apply(*arguments, *options)
    else:
        out, softmax_lse = FORWARD(*arguments, *options)
    return (out, softmax_lse) if return_lse else out


def unsupported(
    backend, q, k, v, *, softmax_scale=None, alibi_slopes=None, logit_bound=None, key_start=None
) -> list[str]:
    """Why `backend` cannot run `attention` on these (correct) arguments here; empty when it can."""
    if backend == "reference":
        return []
    if backend == "triton":
        return ["no Triton kernel in this version"]
    if _select.extension is None:
        return [_select.extension_error]
    reasons = []
    if q.device.type != _select.DEVICE_TYPES[backend]:
        reasons.append(f"tensors on {q.device}")
    if q.dtype not in _DTYPES[backend]:
        reasons.append(f"dtype {_name(q.dtype)} (built for {', '.join(map(_name, _DTYPES[backend]))})")
    if max(*q.shape, *k.shape) >= 2**31:
        reasons.append(f"a dimension of q {tuple(q.shape)} or k {tuple(k.shape)} above 2**31 - 1")
    if backend == "cuda":
        reasons += _select.cuda_unavailable(q.device)
        if q.shape[3] > _CUDA_MAX_HEAD_DIM:
            reasons.append(f"head_dim={q.shape[3]} (built for 1 to {_CUDA_MAX_HEAD_DIM})")
        for name, seqlen in (("seqlen_q", q.shape[1]), ("seqlen_k", k.shape[1])):
            if seqlen > _CUDA_MAX_SEQLEN:
                reasons.append(f"{name}={seqlen} (built for up to 2**31 - 256)")
        if softmax_scale is not None and softmax_scale < _CUDA_MIN_SOFTMAX_SCALE:
            reasons.append(f"softmax_scale={softmax_scale} (built for at least 2**-60; -q has the opposite scale)")
    return reasons


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_usual(q, k, v, alibi_slopes, logit_bound, key_start) -> bool:
    """Whether nothing is wrong and nothing to be cast, which most calls learn here in a few microseconds.

    What this does not let pass is looked at again by `_checked`, which finds the words for what is wrong.
    """
    if not (isinstance(q, torch.Tensor) and isinstance(k, torch.Tensor) and isinstance(v, torch.Tensor)):
        return False
    if not q.ndim == k.ndim == v.ndim == 4:
        return False
    batch, seqlen_q, num_heads, head_dim = q.shape
    k_batch, _, num_kv_heads, k_head_dim = k_shape = k.shape
    dtype, device = q.dtype, q.device
    device_type = device.type
    return (
        head_dim == k_head_dim > 0
        and batch == k_batch
        and num_kv_heads > 0
        and num_heads % num_kv_heads == 0
        and v.shape == k_shape
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and dtype in _checks.FLOAT_DTYPES
        and k.dtype == v.dtype == dtype
        and k.device == v.device == device
        and device_type in ("cpu", "cuda")
        and not torch.is_autocast_enabled(device_type)
        and (alibi_slopes is None or (_is_per_head(alibi_slopes, num_heads, device) and not alibi_slopes.requires_grad))
        and (logit_bound is None or _is_per_head(logit_bound, num_heads, device))
        and (key_start is None or _checks.is_exact(key_start, (batch, seqlen_q), torch.int32, device))
    )


def _is_per_head(tensor, num_heads, device) -> bool:
    return _checks.is_exact(tensor, (num_heads,), torch.float32, device)


def _checked(q, k, v, alibi_slopes, logit_bound, key_start):
    """q, k and v, cast under autocast.

    Raises:
        ValueError, TypeError: see `attention`.
    """
    _checks.check_tensor("attention", "q", q, ("batch", "seqlen_q", "num_heads", "head_dim"))
    _checks.check_tensor("attention", "k", k, ("batch", "seqlen_k", "num_kv_heads", "head_dim"))
    _checks.check_tensor("attention", "v", v, ("batch", "seqlen_k", "num_kv_heads", "head_dim"))
    device = q.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v))
    batch, seqlen_q, num_heads, _ = q.shape
    _checks.check_dtypes("attention", q=q, k=k, v=v)
    _checks.check_equal_axis("attention", 0, "batch", q=q, k=k, v=v)
    _checks.check_equal_axis("attention", 1, "seqlen_k", k=k, v=v)
    _checks.check_equal_axis("attention", 2, "num_kv_heads", k=k, v=v)
    _checks.check_equal_axis("attention", 3, "head_dim", k=k, v=v)
    _checks.check_heads("attention", q, k)
    for name, tensor in (("alibi_slopes", alibi_slopes), ("logit_bound", logit_bound)):
        if tensor is not None:
            _checks.check_exact("attention", name, tensor, ("num_heads",), (num_heads,), torch.float32)
    if key_start is not None:
        _checks.check_exact("attention", "key_start", key_start, ("batch", "seqlen_q"), (batch, seqlen_q), torch.int32)
    _checks.check_devices(
        "attention", q=q, k=k, v=v, alibi_slopes=alibi_slopes, logit_bound=logit_bound, key_start=key_start
    )
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "attention: alibi_slopes must not require a gradient, got requires_grad=True; pass alibi_slopes.detach()"
        )
    return q, k, v


def _check_values(alibi_slopes, key_start) -> None:
    """Reading values back would stall a GPU, and a traced call has none: this runs inside the operator, on the CPU."""
    if alibi_slopes is not None and alibi_slopes.numel() > 0:
        low, high = (value.item() for value in torch.aminmax(alibi_slopes))
        if not (low >= 0 and high < float("inf")):  # NaN fails both
            raise ValueError(f"attention: alibi_slopes must be finite and >= 0, got values in [{low}, {high}]")
    if key_start is not None and key_start.shape[1] > 1:
        falls = key_start[:, 1:] < key_start[:, :-1]
        if falls.any():
            entry, query = falls.nonzero()[0].tolist()
            raise ValueError(
                f"attention: key_start must not decrease along a row, got {key_start[entry, query].item()} followed by "
                f"{key_start[entry, query + 1].item()} at [{entry}, {query + 1}]"
            )


def _forward(q, k, v, alibi_slopes, logit_bound, key_start, causal, softmax_scale, backend):
    if q.is_cpu:
        _check_values(alibi_slopes, key_start)
    plan = _plan("forward", backend, q, k, causal, softmax_scale)
    out, softmax_lse = _fake_forward(q, k, v, alibi_slopes, logit_bound, key_start, causal, softmax_scale, backend)
    if plan.is_empty:
        out.zero_()
        softmax_lse.fill_(float("-inf"))
    elif plan.backend in ("cpu", "cuda"):
        with _select.device_guard(q.device):
            _select.extension.attention_forward(
                **_arguments(q, k, v, alibi_slopes, logit_bound, key_start, out, softmax_lse, causal, softmax_scale),
                **_resources(plan, q.device),
            )
    else:
        _reference_forward(q, k, v, alibi_slopes, key_start, causal, softmax_scale, out, softmax_lse)
    return out, softmax_lse


def _backward(dout, q, k, v, out, softmax_lse, alibi_slopes, logit_bound, key_start, causal, softmax_scale, backend):
    plan = _plan("backward", backend, q, k, causal, softmax_scale)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    if plan.is_empty:
        for gradient in (dq, dk, dv):
            gradient.zero_()
    elif plan.backend in ("cpu", "cuda"):
        with _select.device_guard(q.device):
            _select.extension.attention_backward(
                **_arguments(q, k, v, alibi_slopes, logit_bound, key_start, out, softmax_lse, causal, softmax_scale),
                dout=dout,
                dq=dq,
                dk=dk,
                dv=dv,
                **_resources(plan, q.device),
            )
    else:
        _reference_backward(dout, q, k, v, out, softmax_lse, alibi_slopes, key_start, causal, softmax_scale, dq, dk, dv)
    return dq, dk, dv


class Plan(NamedTuple):
    """What does not depend on the data of a call."""

    backend: str
    is_empty: bool  # there is nothing to compute
    num_values: int  # of the workspace, floats
    num_semaphores: int
    splits: dict  # the argument num_splits, where a direction has it: what the workspace was made for


def _plan(direction, backend, q, k, causal, softmax_scale) -> Plan:
    """The backend of a call and the memory it works with besides its tensors."""
    key = direction, backend, q.device, q.dtype, q.shape, k.shape, causal, softmax_scale, _NUM_SPLITS
    return _select.plan(key, q.device, lambda: _make_plan(*key[:2], q, k, causal, softmax_scale))


def _make_plan(direction, backend, q, k, causal, softmax_scale) -> Plan:
    backend = _select.choose("attention", backend, lambda name: unsupported(name, q, k, k, softmax_scale=softmax_scale))
    is_empty = 0 in (*q.shape, k.shape[1])
    if backend != "cuda" or is_empty:
        return Plan(backend, is_empty, 0, 0, {})
    splits = {"num_splits": _NUM_SPLITS} if direction == "forward" else {}
    batch, seqlen_q, num_heads, head_dim = q.shape
    with _select.device_guard(q.device):
        sizes = getattr(_select.extension, f"attention_{direction}_workspace")(
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=k.shape[1],
            num_heads=num_heads,
            num_kv_heads=k.shape[2],
            head_dim=head_dim,
            causal=causal,
            **splits,
        )
    if direction == "forward":
        splits = {"num_splits": sizes[2]}
    return Plan(backend, False, *sizes[:2], splits)


def _arguments(q, k, v, alibi_slopes, logit_bound, key_start, out, softmax_lse, causal, softmax_scale):
    """What both directions hand to a compiled kernel."""
    return {
        "q": q,
        "k": k,
        "v": v,
        "alibi_slopes": _dense(alibi_slopes),
        "logit_bound": _dense(logit_bound),
        "key_start": _dense(key_start),
        "out": out,
        "softmax_lse": softmax_lse,
        "causal": causal,
        "softmax_scale": softmax_scale,
    }


def _resources(plan, device):
    """What a compiled kernel works with besides its tensors: threads on the CPU; memory and a stream on a GPU."""
    stream = _select.current_stream(device)
    return {
        "num_threads": torch.get_num_threads(),
        "workspace": torch.empty(plan.num_values, dtype=torch.float32, device=device) if plan.num_values else None,
        "semaphores": _persistent.semaphores(device, plan.num_semaphores, stream),
        "stream": stream,
        **plan.splits,
    }


def _dense(tensor):
    return None if tensor is None else tensor.contiguous()


def _fake_forward(q, k, v, alibi_slopes, logit_bound, key_start, causal, softmax_scale, backend):
    batch, seqlen_q, num_heads, _ = q.shape
    softmax_lse = q.new_empty((batch, num_heads, seqlen_q), dtype=_accumulator(q.dtype))
    return torch.empty_like(q, memory_format=torch.contiguous_format), softmax_lse


def _fake_backward(
    dout, q, k, v, out, softmax_lse, alibi_slopes, logit_bound, key_start, causal, softmax_scale, backend
):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _query_blocks(q, k, key_start, causal):
    """Cuts the queries so that the logits of a block fit in memory.

    Yields (queries, keys, options): slices of the two sequence axes, and the arguments of the reference that depend on
    them.
    """
    batch, seqlen_q, num_heads, _ = q.shape
    seqlen_k = k.shape[1]
    rows = max(1, _REFERENCE_BLOCK_LOGITS // (batch * num_heads * seqlen_k))
    first_key = seqlen_k - seqlen_q  # the key at the position of the first query
    for start in range(0, seqlen_q, rows):
        stop = min(start + rows, seqlen_q)
        keys = slice(0, max(0, first_key + stop)) if causal else slice(0, seqlen_k)  # later keys are hidden anyway
        options = {"first_query": first_key + start}
        if key_start is not None:
            options["key_start"] = key_start[:, start:stop]
        yield slice(start, stop), keys, options


def _reference_forward(q, k, v, alibi_slopes, key_start, causal, softmax_scale, out, softmax_lse) -> None:
    dtype = softmax_lse.dtype
    # Inside torch.autocast the products of the reference would be rounded to half precision.
    with torch.autocast(q.device.type, enabled=False):
        k, v = k.to(dtype), v.to(dtype)
        for queries, keys, options in _query_blocks(q, k, key_start, causal):
            out[:, queries], softmax_lse[:, :, queries] = reference.attention(
                q[:, queries].to(dtype),
                k[:, keys],
                v[:, keys],
                causal=causal,
                softmax_scale=softmax_scale,
                alibi_slopes=alibi_slopes,
                **options,
            )


def _reference_backward(
    dout, q, k, v, out, softmax_lse, alibi_slopes, key_start, causal, softmax_scale, dq, dk, dv
) -> None:
    dtype = softmax_lse.dtype
    with torch.autocast(q.device.type, enabled=False):
        k, v = k.to(dtype), v.to(dtype)
        dk_sum, dv_sum = torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys, options in _query_blocks(q, k, key_start, causal):
            dq[:, queries], dk_block, dv_block = reference.attention_backward(
                dout[:, queries].to(dtype),
                q[:, queries].to(dtype),
                k[:, keys],
                v[:, keys],
                out[:, queries].to(dtype),
                softmax_lse[:, :, queries],
                causal=causal,
                softmax_scale=softmax_scale,
                alibi_slopes=alibi_slopes,
                **options,
            )
            dk_sum[:, keys] += dk_block
            dv_sum[:, keys] += dv_block
        dk.copy_(dk_sum)
        dv.copy_(dv_sum)


def _plain_backward(dout, q, k, v, alibi_slopes, logit_bound, key_start, causal, softmax_scale, backend):
    """dq, dk and dv by operations that torch can differentiate again. Holds all scores at once."""
    options = {
        "causal": causal,
        "softmax_scale": softmax_scale,
        "alibi_slopes": alibi_slopes,
        "key_start": key_start,
    }
    with torch.autocast(q.device.type, enabled=False):
        wide = [tensor.to(_accumulator(q.dtype)) for tensor in (dout, q, k, v)]
        out, softmax_lse = reference.attention(*wide[1:], **options)
        results = reference.attention_backward(*wide, out, softmax_lse, **options)
    return tuple(result.to(q.dtype) for result in results)


def _visible_pairs(q_shape, k_shape, causal) -> int:
    """Pairs of query and key in one head. A square causal call has half of them, and the diagonal."""
    seqlen_q, seqlen_k = q_shape[1], k_shape[1]
    if not causal:
        return seqlen_q * seqlen_k
    rows = min(seqlen_q, seqlen_k)  # rows that see a key: the last one sees all, each one before it sees one less
    return rows * seqlen_k - rows * (rows - 1) // 2


def _forward_flops(q_shape, k_shape, v_shape, slopes, bound, key_start, causal, *args, out_shape=None, **kwargs) -> int:
    """Two products of 2 * head_dim operations per visible pair; what `key_start` and windows skip is counted."""
    batch, _, num_heads, head_dim = q_shape
    return 4 * batch * num_heads * head_dim * _visible_pairs(q_shape, k_shape, causal)


def _backward_flops(
    dout_shape, q_shape, k_shape, v_shape, o_shape, lse_shape, slopes, bound, key_start, causal, *args, **kwargs
) -> int:
    """Five products: the scores again, and one for each of the gradients of weights, q, k and v."""
    batch, _, num_heads, head_dim = q_shape
    return 10 * batch * num_heads * head_dim * _visible_pairs(q_shape, k_shape, causal)


_TENSORS = "Tensor q, Tensor k, Tensor v"
_OPTIONS = "Tensor? alibi_slopes, Tensor? logit_bound, Tensor? key_start, bool causal, float softmax_scale, str backend"
# The operators themselves, for policies that name them (selective activation checkpointing should save FORWARD).
FORWARD = _select.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    implementation=_forward,
    fake=_fake_forward,
    flops=_forward_flops,
    rows=(0, 1, 2, 5),
)
BACKWARD = _select.define(
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, {_OPTIONS})"
    " -> (Tensor, Tensor, Tensor)",
    implementation=_backward,
    fake=_fake_backward,
    flops=_backward_flops,
    rows=(0, 1, 2, 3, 4, 5, 8),
)


class _Attention(torch.autograd.Function):
    """The two operators as one differentiable function."""

    @staticmethod
    def forward(q, k, v, alibi_slopes, logit_bound, key_start, causal, softmax_scale, backend):
        return FORWARD(q, k, v, alibi_slopes, logit_bound, key_start, causal, softmax_scale, backend)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, alibi_slopes, logit_bound, key_start, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, *output, alibi_slopes, logit_bound, key_start)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, _):
        if dout is None:
            return (None,) * 9
        if dout.stride(-1) != 1:  # the gradient of a sum is one expanded number
            dout = dout.contiguous()
        saved = ctx.saved_tensors
        results = _transforms.gradients(
            "attention",
            ctx.options[-1],
            (dout, *saved[:3]),
            lambda: BACKWARD(dout, *saved, *ctx.options),
            lambda: _plain_backward(dout, *saved[:3], *saved[5:], *ctx.options),
        )
        return *results, *(None,) * 6

    @staticmethod
    def vmap(info, in_dims, *args):
        return _vmap(info, in_dims, *args)


def _vmap(info, in_dims, q, k, v, alibi_slopes, logit_bound, *args):
    """Of promises for each of the mapped calls the largest holds for all."""
    if in_dims[4] is not None:
        logit_bound = logit_bound.amax(in_dims[4])
        in_dims = (*in_dims[:4], None, *in_dims[5:])
    return _fold(info, in_dims, q, k, v, alibi_slopes, logit_bound, *args)


_fold = _transforms.vmap_rule(_Attention.apply, rows=(0, 1, 2, 5))
