"""attention (docs/model.md#5, #16.3) in plain torch."""

import torch


def _spans(q, k, causal, key_start, first_query):
    """first, end: query i sees the keys first[i] <= j < end[i]; and key j is seen by the queries of its own span.

    Returns:
        two pairs, of queries (1 or batch, seqlen_q) and of keys (1 or batch, seqlen_k).
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if first_query is None:
        first_query = seqlen_k - seqlen_q
    query, key = (torch.arange(seqlen, device=q.device)[None] for seqlen in (seqlen_q, seqlen_k))
    first, end = torch.zeros_like(query), torch.full_like(query, seqlen_k)
    first_of_key, end_of_key = torch.zeros_like(key), torch.full_like(key, seqlen_q)
    if causal:
        end = (query + first_query + 1).clamp(0, seqlen_k)
        first_of_key = (key - first_query).clamp(0, seqlen_q)
    if key_start is not None:
        first = key_start.long().clamp(0, seqlen_k)
        end_of_key = torch.searchsorted(
            key_start.contiguous(), key.expand(len(first), -1).contiguous().int(), right=True
        )
    return (first, torch.maximum(first, end)), (first_of_key, torch.maximum(first_of_key, end_of_key))


def _any_within(flags, span):
    """Whether any of flags[:, first:end] is set, for each first and end of a span."""
    counts = torch.nn.functional.pad(flags.cumsum(1, dtype=torch.int32), (0, 0, 0, 0, 1, 0))
    first, end = (counts.gather(1, edge[..., None, None].expand(len(flags), -1, *flags.shape[2:])) for edge in span)
    return first < end


def _sum(equation, weights, values, span, *, signed=False):
    """torch.einsum(equation, weights, values), to which hidden places, of weight 0, add nothing: 0 * nan would be nan.

    The product takes what is not finite for 0. A sum that sees such numbers is nan; or, of weights of one sign, the
    infinity that they all are.

    values: rows (batch, seqlen, num_kv_heads, head_dim), or with a group behind num_kv_heads, over which is summed too.
    span: of the rows that each sum sees.
    signed: weights of either sign.
    """
    finite = values.isfinite()
    total = torch.einsum(equation, weights, values.masked_fill(~finite, 0))
    kinds = [~finite] if signed else [values.isnan(), values.isposinf(), values.isneginf()]
    nan, *infinite = (_any_within(kind if kind.ndim == 4 else kind.any(3), span) for kind in kinds)
    for seen, limit in ((nan, torch.nan), *zip(infinite, (torch.inf, -torch.inf), strict=False)):
        seen = seen if seen.ndim == total.ndim else seen.unsqueeze(3)
        total = total + torch.zeros_like(total).masked_fill(seen, limit)
    return total


def _logits(q, k, causal, softmax_scale, alibi_slopes, key_start, first_query):
    """The logits, -inf where hidden, and the hidden places: (batch, num_kv_heads, group, seqlen_q, seqlen_k)."""
    seqlen_q, seqlen_k, num_kv_heads = q.shape[1], k.shape[1], k.shape[2]
    if first_query is None:
        first_query = seqlen_k - seqlen_q
    query = torch.arange(first_query, first_query + seqlen_q, device=q.device)[:, None]
    key = torch.arange(seqlen_k, device=q.device)
    (first, end), _ = _spans(q, k, causal, key_start, first_query)
    hidden = (key < first[..., None]) | (key >= end[..., None])
    hidden = hidden[:, None, None]
    logits = torch.einsum("bqhgd,bkhd->bhgqk", q.unflatten(2, (num_kv_heads, -1)), k) * softmax_scale
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(torch.promote_types(q.dtype, alibi_slopes.dtype))  # half precision would round them
        bias = slopes.view(num_kv_heads, -1, 1, 1) * (query - key).abs()
        logits = logits - bias.to(q.dtype)
    return logits.masked_fill(hidden, float("-inf")), hidden.expand_as(logits)


def attention(q, k, v, *, causal, softmax_scale, alibi_slopes=None, key_start=None, first_query=None):
    """Softmax attention; shapes and meaning as in `andromeda.ops.attention.attention`.

    first_query: position of q[:, 0] among the keys. Default: seqlen_k - seqlen_q, the last query sits at the last key.

    Returns:
        out, in the shape of q, and softmax_lse (batch, num_heads, seqlen_q), natural logarithm; both in the dtype of q.
    """
    logits, hidden = _logits(q, k, causal, softmax_scale, alibi_slopes, key_start, first_query)
    of_query, _ = _spans(q, k, causal, key_start, first_query)
    weights = logits.softmax(-1).masked_fill(
        hidden, 0
    )  # the softmax of a row that sees nothing is NaN, its weights are 0
    out = _sum("bhgqk,bkhd->bqhgd", weights, v, of_query).flatten(2, 3)
    return out, logits.logsumexp(-1).flatten(1, 2)


def attention_backward(
    dout, q, k, v, out, softmax_lse, *, causal, softmax_scale, alibi_slopes=None, key_start=None, first_query=None
):
    """Gradients dq, dk, dv of `attention` as a formula (docs/model.md#16.3): an operator must not call autograd."""
    num_kv_heads = k.shape[2]
    logits, hidden = _logits(q, k, causal, softmax_scale, alibi_slopes, key_start, first_query)
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
