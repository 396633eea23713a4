"""attention (docs/model.md#5, #16.3) in plain torch."""

import torch
from torch import Tensor

Span = tuple[Tensor, Tensor]  # first, end: integers of one shape


def _spans(
    q: Tensor,
    k: Tensor,
    causal: bool,
    key_start: Tensor | None,
    first_query: int | Tensor | None,
    num_keys: Tensor | None = None,
) -> tuple[Span, Span]:
    """The keys that each query sees, and the queries that see each key (without num_keys): first <= index < end.

    Returns:
        of_query: first and end, each (1 or batch, seqlen_q).
        of_key: first and end, each (1 or batch, seqlen_k).
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if first_query is None:
        first_query = seqlen_k - seqlen_q
    query, key = (torch.arange(seqlen, device=q.device)[None] for seqlen in (seqlen_q, seqlen_k))
    first, end = torch.zeros_like(query), torch.full_like(query, seqlen_k)
    if num_keys is not None:
        end = torch.zeros_like(query) + num_keys
    first_of_key, end_of_key = torch.zeros_like(key), torch.full_like(key, seqlen_q)
    if causal:
        end = (query + first_query + 1).clamp(0, seqlen_k)
        first_of_key = (key - first_query).clamp(0, seqlen_q)
    if key_start is not None:
        first = key_start.long().clamp(0, seqlen_k)
        keys = key.expand(first.shape[0], -1).contiguous().int()
        end_of_key = torch.searchsorted(key_start.contiguous(), keys, right=True)
    return (first, torch.maximum(first, end)), (first_of_key, torch.maximum(first_of_key, end_of_key))


def _any_within(flags: Tensor, span: Span) -> Tensor:
    """Whether any of flags[:, first:end] is set, for each first and end of a span."""
    counts = torch.nn.functional.pad(flags.cumsum(1, dtype=torch.int32), (0, 0, 0, 0, 1, 0))
    first, end = (counts.gather(1, edge[..., None, None].expand(flags.shape[0], -1, *flags.shape[2:])) for edge in span)
    return first < end


def _sum(equation: str, weights: Tensor, values: Tensor, span: Span, *, signed: bool = False) -> Tensor:
    """torch.einsum(equation, weights, values) without contributions of hidden rows, of weight 0: 0 * nan would be nan.

    The product treats numbers that are not finite as 0. A sum that sees such numbers is nan or, where all weights have
    one sign and all these numbers are the same infinity, that infinity.

    values: rows (batch, seqlen, num_kv_heads, head_dim), or (batch, seqlen, num_kv_heads, group, head_dim): then the
        sum also goes over the group.
    span: the rows in each sum.
    signed: weights may have either sign.
    """
    finite = values.isfinite()
    total = torch.einsum(equation, weights, values.masked_fill(~finite, 0))
    kinds = [~finite] if signed else [values.isnan(), values.isposinf(), values.isneginf()]
    nan, *infinite = (_any_within(kind if kind.ndim == 4 else kind.any(3), span) for kind in kinds)
    for seen, limit in ((nan, torch.nan), *zip(infinite, (torch.inf, -torch.inf), strict=False)):
        seen = seen if seen.ndim == total.ndim else seen.unsqueeze(3)
        total = total + torch.zeros_like(total).masked_fill(seen, limit)
    return total


def masked_logits(
    q: Tensor,
    k: Tensor,
    causal: bool,
    softmax_scale: float,
    alibi_slopes: Tensor | None,
    key_start: Tensor | None,
    first_query: int | Tensor | None,
    num_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The logits, -inf where the key is hidden, and whether it is: (batch, num_kv_heads, group, seqlen_q, seqlen_k)."""
    seqlen_q, seqlen_k, num_kv_heads = q.shape[1], k.shape[1], k.shape[2]
    if first_query is None:
        first_query = seqlen_k - seqlen_q
    query = (torch.arange(seqlen_q, device=q.device) + first_query)[:, None]
    key = torch.arange(seqlen_k, device=q.device)
    (first, end), _ = _spans(q, k, causal, key_start, first_query, num_keys)
    hidden = (key < first[..., None]) | (key >= end[..., None])
    hidden = hidden[:, None, None]
    logits = torch.einsum("bqhgd,bkhd->bhgqk", q.unflatten(2, (num_kv_heads, -1)), k) * softmax_scale
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(torch.promote_types(q.dtype, alibi_slopes.dtype))  # half precision would round them
        bias = slopes.view(num_kv_heads, -1, 1, 1) * (query - key).abs()
        logits = logits - bias.to(q.dtype)
    return logits.masked_fill(hidden, float("-inf")), hidden.expand_as(logits)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    softmax_scale: float,
    alibi_slopes: Tensor | None = None,
    key_start: Tensor | None = None,
    first_query: int | Tensor | None = None,
    num_keys: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention; shapes and meaning as in `andromeda.ops.attention.attention`.

    first_query: position of q[:, 0] among the keys. Default: that which aligns the last query and the last key.

    Returns:
        out, in the shape of q, and softmax_lse (batch, num_heads, seqlen_q), natural logarithm; both in the dtype of q.
    """
    if num_keys is not None and first_query is None:
        first_query = num_keys - q.shape[1]
    logits, hidden = masked_logits(q, k, causal, softmax_scale, alibi_slopes, key_start, first_query, num_keys)
    of_query, _ = _spans(q, k, causal, key_start, first_query, num_keys)
    weights = logits.softmax(-1).masked_fill(hidden, 0)  # the softmax of a row that sees no key is NaN
    out = _sum("bhgqk,bkhd->bqhgd", weights, v, of_query).flatten(2, 3)
    return out, logits.logsumexp(-1).flatten(1, 2)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    *,
    causal: bool,
    softmax_scale: float,
    alibi_slopes: Tensor | None = None,
    key_start: Tensor | None = None,
    first_query: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq, dk, dv of `attention` as formulas (docs/model.md#16.3): an operator must not call autograd."""
    num_kv_heads = k.shape[2]
    logits, hidden = masked_logits(q, k, causal, softmax_scale, alibi_slopes, key_start, first_query)
    of_query, of_key = _spans(q, k, causal, key_start, first_query)
    weights = (logits - softmax_lse.unflatten(1, (num_kv_heads, -1))[..., None]).exp().masked_fill(hidden, 0)
    delta = (dout * out).sum(-1).transpose(1, 2).unflatten(1, (num_kv_heads, -1))
    q, dout = q.unflatten(2, (num_kv_heads, -1)), dout.unflatten(2, (num_kv_heads, -1))
    dweights = torch.einsum("bqhgd,bkhd->bhgqk", dout, v)
    dlogits = (weights * (dweights - delta[..., None])).masked_fill(hidden, 0)
    dq = _sum("bhgqk,bkhd->bqhgd", dlogits, k, of_query, signed=True).flatten(2, 3) * softmax_scale
    dk = _sum("bhgqk,bqhgd->bkhd", dlogits, q, of_key, signed=True) * softmax_scale
    dv = _sum("bhgqk,bqhgd->bkhd", weights, dout, of_key)
    return dq, dk, dv
