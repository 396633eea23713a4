"""attention (SPEC 5.4-5.6, 16.3) in plain torch."""

import torch


def _logits(q, k, causal, softmax_scale, alibi_slopes, key_start, first_query):
    """The logits, -inf where hidden, and the hidden places: (batch, num_kv_heads, group, seqlen_q, seqlen_k)."""
    seqlen_q, seqlen_k, num_kv_heads = q.shape[1], k.shape[1], k.shape[2]
    if first_query is None:
        first_query = seqlen_k - seqlen_q
    query = torch.arange(first_query, first_query + seqlen_q, device=q.device)[:, None]
    key = torch.arange(seqlen_k, device=q.device)
    logits = torch.einsum("bqhgd,bkhd->bhgqk", q.unflatten(2, (num_kv_heads, -1)), k) * softmax_scale
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(torch.promote_types(q.dtype, alibi_slopes.dtype))  # half precision would round them
        bias = slopes.view(num_kv_heads, -1, 1, 1) * (query - key).abs()
        logits = logits - bias.to(q.dtype)
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if causal:
        hidden = hidden | (key > query)
    if key_start is not None:
        hidden = hidden | (key < key_start[:, None, None, :, None])
    return logits.masked_fill(hidden, float("-inf")), hidden.expand_as(logits)


def attention(q, k, v, *, causal, softmax_scale, alibi_slopes=None, key_start=None, first_query=None):
    """Softmax attention; shapes and meaning as in `andromeda.ops.attention.attention`.

    first_query: position of q[:, 0] among the keys. Default: seqlen_k - seqlen_q, the last query sits at the last key.

    Returns:
        out, in the shape of q, and softmax_lse (batch, num_heads, seqlen_q), natural logarithm; both in the dtype of q.
    """
    logits, hidden = _logits(q, k, causal, softmax_scale, alibi_slopes, key_start, first_query)
    weights = logits.softmax(-1).masked_fill(
        hidden, 0
    )  # the softmax of a row that sees nothing is NaN, its weights are 0
    out = torch.einsum("bhgqk,bkhd->bqhgd", weights, v).flatten(2, 3)
    return out, logits.logsumexp(-1).flatten(1, 2)


def attention_backward(
    dout, q, k, v, out, softmax_lse, *, causal, softmax_scale, alibi_slopes=None, key_start=None, first_query=None
):
    """Gradients dq, dk, dv of `attention` as a formula (SPEC 16.3): autograd must not be called inside an operator."""
    num_kv_heads = k.shape[2]
    logits, hidden = _logits(q, k, causal, softmax_scale, alibi_slopes, key_start, first_query)
    weights = (logits - softmax_lse.unflatten(1, (num_kv_heads, -1))[..., None]).exp().masked_fill(hidden, 0)
    delta = (dout * out).sum(-1).transpose(1, 2).unflatten(1, (num_kv_heads, -1))
    q, dout = q.unflatten(2, (num_kv_heads, -1)), dout.unflatten(2, (num_kv_heads, -1))
    dweights = torch.einsum("bqhgd,bkhd->bhgqk", dout, v)
    dlogits = (weights * (dweights - delta[..., None])).masked_fill(hidden, 0)
    dq = torch.einsum("bhgqk,bkhd->bqhgd", dlogits, k).flatten(2, 3) * softmax_scale
    dk = torch.einsum("bhgqk,bqhgd->bkhd", dlogits, q) * softmax_scale
    dv = torch.einsum("bhgqk,bqhgd->bkhd", weights, dout)
    return dq, dk, dv
