"""The rules accept a correct kernel and reject every defect that a kernel has had."""

import math

import numerics
import pytest
import torch

from andromeda.reference.attention import attention

TILE = 64
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = {  # seqlen, head_dim, causal, slope
    "causal": (257, 64, True, 0.0),
    "causal-alibi": (300, 64, True, 0.05),
    "wide-alibi": (513, 128, True, 0.01),
    "full": (320, 32, False, 0.0),
}
DEFECTS = (
    "scale 1% too large",
    "bias off by one after the first tile",
    "mask off by one",
    "key column dropped",
    "last tile not rescaled",
    "rows swapped",
    "half-precision accumulator",
)
GRADIENT_DEFECTS = ("delta forgotten", "query tile dropped", "scale of dk forgotten", "mask off by one")


def make(seqlen, head_dim, dtype, copies=1):
    generator = torch.Generator().manual_seed(seqlen)
    return [torch.randn(2, seqlen, 1, head_dim, generator=generator).to(dtype) for _ in range(3 + copies)]


def tiled(q, k, v, causal, slope, defect=None):
    """A flash attention: tiles of keys, running maximum, products in float32, weights rounded to the input dtype."""
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    q, k, v = (t[:, :, 0].float() for t in (q, k, v))
    seqlen = q.shape[1]
    query = torch.arange(seqlen)[:, None]
    maximum = torch.full((*q.shape[:2], 1), -math.inf)
    total, out = torch.zeros_like(maximum), torch.zeros_like(q)
    if defect == "scale 1% too large":
        scale *= 1.01
    for start in range(0, seqlen, TILE):
        key = torch.arange(start, min(start + TILE, seqlen))
        shift = 1 if defect == "bias off by one after the first tile" and start > 0 else 0
        scores = q @ k[:, key].transpose(1, 2) * scale - slope * (query - key - shift).abs()
        if causal:
            scores = scores.masked_fill(key > query + (1 if defect == "mask off by one" else 0), -math.inf)
        if defect == "key column dropped" and start == TILE:
            scores[:, :, 0] = -math.inf
        bigger = torch.maximum(maximum, scores.amax(-1, keepdim=True))
        weights = (scores - bigger).exp().nan_to_num()
        rescale = (maximum - bigger).exp().nan_to_num()
        if defect == "last tile not rescaled" and start + TILE >= seqlen:
            rescale = torch.ones_like(rescale)
        if defect == "half-precision accumulator":
            out = out.to(dtype).float()
        total = total * rescale + weights.sum(-1, keepdim=True)
        out = out * rescale + weights.to(dtype).float() @ v[:, key]
        maximum = bigger
        if defect == "rows swapped" and start == TILE:
            out[:, [8, 9]] = out[:, [9, 8]]
    return (out / total).to(dtype)[:, :, None], (maximum + total.log()).transpose(1, 2)


def exact(q, k, v, causal, slope):
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    out, lse = attention(
        q, k, v, causal=causal, softmax_scale=q.shape[-1] ** -0.5, alibi_slopes=torch.tensor([slope]).double()
    )
    return (q, k, v), out, lse


def check(out, lse, ref, ref_lse, v):
    numerics.assert_rows_close(out, ref, v.dtype)
    numerics.assert_elements_close(out, ref, v.double().abs().max())
    numerics.assert_lse_close(lse, ref_lse)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepts_a_correct_kernel(case, dtype):
    seqlen, head_dim, *options = CASES[case]
    q, k, v, _ = make(seqlen, head_dim, dtype)
    _, ref, ref_lse = exact(q, k, v, *options)
    check(*tiled(q, k, v, *options), ref, ref_lse, v)


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_a_defect(defect, dtype):
    if defect == "half-precision accumulator" and dtype not in numerics.HALF:
        defect = "rows swapped"  # float32 has no narrower accumulator here
    seqlen, head_dim, *options = CASES["causal-alibi"]
    q, k, v, _ = make(seqlen, head_dim, dtype)
    _, ref, ref_lse = exact(q, k, v, *options)
    with pytest.raises(AssertionError):
        check(*tiled(q, k, v, *options, defect=defect), ref, ref_lse, v)


def tiled_backward(dout, q, k, v, slope, defect=None):
    """Gradients of the causal `tiled`, weights and their gradients rounded to the input dtype before each product."""
    dtype, scale, seqlen = q.dtype, q.shape[-1] ** -0.5, q.shape[1]
    out, lse = tiled(q, k, v, True, slope)
    dout, q, k, v, out = (t[:, :, 0].float() for t in (dout, q, k, v, out))
    query, key = torch.arange(seqlen)[:, None], torch.arange(seqlen)
    scores = q @ k.transpose(1, 2) * scale - slope * (query - key).abs()
    weights = (scores - lse.transpose(1, 2)).exp()
    weights = weights.masked_fill(key > query + (1 if defect == "mask off by one" else 0), 0)
    delta = 0 if defect == "delta forgotten" else (dout * out).sum(-1, keepdim=True)
    dscores = (weights * (dout @ v.transpose(1, 2) - delta)).to(dtype).float()
    used = slice(TILE, None) if defect == "query tile dropped" else slice(None)
    dq = dscores @ k * scale
    dk = dscores[:, used].transpose(1, 2) @ q[:, used] * (1 if defect == "scale of dk forgotten" else scale)
    dv = weights.to(dtype).float().transpose(1, 2) @ dout
    return [t.to(dtype)[:, :, None] for t in (dq, dk, dv)]


def check_gradients(defect, dtype):
    seqlen, head_dim, causal, slope = CASES["causal-alibi"]
    q, k, v, dout = make(seqlen, head_dim, dtype)
    inputs, out, lse = exact(q, k, v, causal, slope)
    refs = torch.autograd.grad(out, inputs, dout.double())
    options = {"causal": True, "softmax_scale": head_dim**-0.5, "alibi_slopes": torch.tensor([slope]).double()}
    magnitudes = numerics.gradient_magnitudes(dout.double(), *inputs, out, lse, key_start=None, **options)
    gradients = tiled_backward(dout, q, k, v, slope, defect)
    for gradient, ref, magnitude in zip(gradients, refs, magnitudes, strict=True):
        numerics.assert_rows_close(gradient, ref, dtype, kind="gradient", magnitude=magnitude)
        numerics.assert_elements_close(gradient, ref, magnitude, logit_range=slope * seqlen + 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepts_correct_gradients(dtype):
    check_gradients(None, dtype)


@pytest.mark.parametrize("defect", GRADIENT_DEFECTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_wrong_gradients(defect, dtype):
    with pytest.raises(AssertionError):
        check_gradients(defect, dtype)


def test_no_worse_than_plain_torch():
    q, k, v, _ = make(129, 64, torch.bfloat16)
    _, ref, _ = exact(q, k, v, True, 0.05)
    slopes = torch.tensor([0.05])
    naive, _ = attention(q, k, v, causal=True, softmax_scale=64**-0.5, alibi_slopes=slopes)
    out, _ = tiled(q, k, v, True, 0.05)
    numerics.assert_no_worse(out, naive, ref)
    with pytest.raises(AssertionError, match="largest error"):
        numerics.assert_no_worse(out + 0.1, naive, ref)


def test_zero_rows_must_be_zero():
    ref = torch.zeros(2, 3, dtype=torch.float64)
    ref[0] = 1
    out = ref.float()
    numerics.assert_rows_close(out, ref, torch.float32)
    out[1, 2] = 1e-30
    with pytest.raises(AssertionError, match="worst row inf"):
        numerics.assert_rows_close(out, ref, torch.float32)


def test_nan_is_never_close():
    ref = torch.ones(2, 3, dtype=torch.float64)
    out = ref.float()
    out[1, 2] = math.nan
    with pytest.raises(AssertionError, match="1 of 2 rows hold NaN"):
        numerics.assert_rows_close(out, ref, torch.float32)
    with pytest.raises(AssertionError, match="1 of 6 elements are not finite"):
        numerics.assert_elements_close(out, ref, 1.0)
    with pytest.raises(AssertionError, match="rows that see no key differ"):
        numerics.assert_lse_close(torch.tensor([-math.inf, 0.0]), torch.tensor([0.0, 0.0]))


def test_nan_filled_covers_every_allocation_of_the_operations():
    like = torch.zeros(3, dtype=torch.bfloat16)
    with numerics.nan_filled():
        assert like.new_empty((2, 2)).isnan().all()
        assert like.new_empty((2, 2), dtype=torch.float64).isnan().all()
        assert torch.empty(5).isnan().all()
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
