"""`attention`: every backend against the float64 reference, and the laws of docs/testing.md#laws."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import numerics
import pytest
import torch
from hypothesis import strategies as st
from op_cases import BFLOAT16, FLOAT16, FLOAT32, Inputs, lay_out, make, skip_for
from op_cases import AttentionCase as Case

from andromeda.ops import _select
from andromeda.ops import attention as op
from andromeda.ops.attention import attention
from andromeda.reference import attention as reference

# ---- one call and the rules for its results -------------------------------------------------------------------------


def require(backend, q, k, v, **options):
    options.pop("causal", None)
    skip_for(backend, op.unsupported(backend, q, k, v, **options))


def run(inputs, backend, **options):
    """out, softmax_lse, dq, dk, dv."""
    leaves = [t.detach().requires_grad_() for t in inputs.tensors()]
    out, lse = attention(*leaves, **{**inputs.options, **options}, return_lse=True, backend=backend)
    return (out.detach(), lse, *torch.autograd.grad(out, leaves, inputs.dout))


def run_exact(inputs, softmax_scale, dtype=torch.float64):
    """The same results from autograd through the reference, in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs.tensors()]
    options = {name: value for name, value in inputs.options.items() if name != "logit_bound"}
    out, lse = reference.attention(*leaves, softmax_scale=softmax_scale, **options)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, inputs.dout.to(dtype)))


NEGLIGIBLE = 2.0**-60  # a weight that a kernel may treat as 0 at any time
SKIPPED = 2.0**-24  # the share of a row that a kernel may leave out with `logit_bound`


def logit_range(inputs, lse, softmax_scale):
    """The largest value of sum |q| |k| over the channels + |bias| + |log-sum-exp|, among pairs with a relevant weight.

    The rounding errors of a float32 exponent are relative to it: the error of a dot product is relative to its terms,
    not to its sum, and the backward pass subtracts a log-sum-exp that was rounded to float32.
    """
    options = {"alibi_slopes": None, "key_start": None, "first_query": None, "logit_bound": None, **inputs.options}
    options.pop("logit_bound")
    q, k = inputs.q.double(), inputs.k.double()
    logits, hidden = reference.masked_logits(q, k, softmax_scale=softmax_scale, **options)
    scores, _ = reference.masked_logits(q, k, softmax_scale=softmax_scale, **{**options, "alibi_slopes": None})
    carries = (logits > lse.unflatten(1, (k.shape[2], -1))[..., None] + math.log(NEGLIGIBLE)) & ~hidden
    terms, _ = reference.masked_logits(
        q.abs(), k.abs(), softmax_scale=abs(softmax_scale), **{**options, "alibi_slopes": None}
    )
    row = lse.unflatten(1, (k.shape[2], -1))[..., None].abs()
    sizes = (terms + (logits - scores).abs() + row)[carries]
    return sizes.max().item() if sizes.numel() > 0 else 0.0


def seen_keys(inputs):
    """The number of rows of k that at least one query sees."""
    options = {"key_start": None, **inputs.options, "alibi_slopes": None, "softmax_scale": 1.0, "first_query": None}
    options.pop("logit_bound", None)
    _, hidden = reference.masked_logits(inputs.q, inputs.k, **options)
    return int((~hidden[:, :, 0]).any(-2).sum())  # of each key head


def check(inputs, backend, *, softmax_scale=None, values="normal", **options):
    """Forward and backward of a backend against the exact result, by every rule of `numerics`."""
    scale = inputs.q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    exact = out_ref, lse_ref, *gradient_refs = run_exact(inputs, scale)
    with numerics.nan_filled():
        out, lse, *gradients = run(inputs, backend, softmax_scale=softmax_scale, **options)
    dtype = inputs.q.dtype
    reach = logit_range(inputs, lse_ref, scale)
    check_rows(inputs, out, lse, exact, reach, values)
    masks = {"causal": inputs.options["causal"], "key_start": inputs.options.get("key_start")}
    terms = functools.partial(
        numerics.gradient_magnitudes,
        *(t.double() for t in (inputs.dout, *inputs.tensors(), out_ref, lse_ref)),
        softmax_scale=scale,
        alibi_slopes=inputs.options.get("alibi_slopes"),
        **masks,
    )
    left_out = terms(weight=NEGLIGIBLE if inputs.options.get("logit_bound") is None else SKIPPED)
    for gradient, ref, magnitude, absolute in zip(gradients, gradient_refs, terms(), left_out, strict=True):
        numerics.assert_elements_close(gradient, ref, magnitude, logit_range=reach, absolute=absolute)
        if values == "normal":
            limits = {"magnitude": magnitude, "logit_range": reach, "absolute": absolute}
            numerics.assert_rows_close(gradient, ref, dtype, kind="gradient", **limits)
    return (out, lse, *gradients), exact


def check_rows(inputs, out, lse, exact, reach, values="normal"):
    """The rules for out and softmax_lse; `reach` is their `logit_range`."""
    kind = "heavy" if values == "heavy" else "output"
    numerics.assert_rows_close(out, exact[0], inputs.q.dtype, kind=kind, logit_range=reach)
    numerics.assert_elements_close(out, exact[0], inputs.v.double().abs().max(), logit_range=reach)
    numerics.assert_lse_close(lse, exact[1])


def check_forward(inputs, backend, *, softmax_scale=None, values="normal"):
    """The same for a call without gradients, whose results it returns."""
    scale = inputs.q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    exact = run_exact(inputs, scale)
    with numerics.nan_filled():
        options = {**inputs.options, "softmax_scale": softmax_scale, "return_lse": True, "backend": backend}
        out, lse = attention(*inputs.tensors(), **options)
    check_rows(inputs, out, lse, exact, logit_range(inputs, exact[1], scale), values)
    return out, lse


def check_beside_plain(inputs, backend, values, softmax_scale=None):
    """The rule for half precision where few weights or equal scores decide a row: at most twice plain torch's error.

    Plain torch is autograd in half precision or, for gradients, the exact formula with the rounded output. The backward
    pass reads that output (docs/model.md#16.3), and where weights are concentrated, its rounding causes all of dq's
    error.
    """
    results, exact = check(inputs, backend, values=values, softmax_scale=softmax_scale)
    scale = inputs.q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    dtype = inputs.q.dtype
    plain = run_exact(inputs, scale, dtype)
    numerics.assert_no_worse(results[0], plain[0], exact[0])
    rounded_output = reference.attention_backward(
        *(t.double() for t in (inputs.dout, *inputs.tensors())),
        exact[0].to(dtype).double(),
        exact[1],
        softmax_scale=scale,
        **{name: value for name, value in inputs.options.items() if name != "logit_bound"},
    )
    for result, *naive, ref in zip(results[2:], plain[2:], rounded_output, exact[2:], strict=True):
        numerics.assert_no_worse(result, [gradient.to(dtype) for gradient in naive], ref)


def rounds_weights(backend, dtype):
    """Whether a kernel rounds the weights to half precision, for tensor cores."""
    return backend in ("cuda", "triton") and dtype in numerics.HALF


def rules_for(case, backend):
    """`values` for `check`: which rules apply to ordinary inputs of this size.

    Tensor cores take weights in half precision. In a row of few channels, the rounding of one weight dominates the
    error of the row (in float64 without any other rounding: up to 2.1 u for 4 channels). With two or three keys, dq and
    dk are differences of a few numbers, only as exact as the rounded output that the backward pass reads.
    """
    if not rounds_weights(backend, case.dtype):
        return "normal"
    if case.head_dim <= 8:
        return "heavy"
    return "normal" if case.seqlen_k > 3 else "few keys"


def check_bounded(inputs, bound, adversarial, backend):
    """Large logits and scores at the bound concentrate the weights, which tensor cores take in half precision."""
    if rounds_weights(backend, inputs.q.dtype) and (adversarial or bound > 10):
        check_beside_plain(inputs, backend, "heavy")
    else:
        check(inputs, backend)


# The number of splits of the keys in the GPU kernels for few queries: none, one level of combining them, and several.
SPLITS = (1, 2, 16, 17, 256)
SPLIT_CASES = [
    Case(batch=batch, seqlen_q=seqlen_q, num_heads=num_heads, head_dim=head_dim, dtype=dtype, mask=mask)
    for batch, seqlen_q, num_heads, mask in (
        (1, 1, 24, "none"),
        (2, 3, 5, "documents"),  # 15 rows; splits that no row sees
        (1, 3, 13, "none"),  # 39 rows in two tiles, few in the second
    )
    for head_dim, dtype in ((64, FLOAT16), (128, BFLOAT16))
]


def check_splits(case, num_splits, device, monkeypatch, backend="cuda"):
    """Check the forward pass of that kernel, with a step of 64 keys in each split, and return its results."""
    inputs = make(dataclasses.replace(case, seqlen_k=max(64 * num_splits - 27, 100)), device)
    monkeypatch.setattr(op, "NUM_SPLITS", num_splits)
    results = check_forward(inputs, backend)
    again = attention(*inputs.tensors(), **inputs.options, return_lse=True, backend=backend)
    assert all(map(torch.equal, again, results))  # semaphores are zero again
    return results


# Calls on the first rows of a cache: (case, numbers of them).
NUM_KEYS_CASES = [
    (Case(batch=batch, seqlen_q=n, seqlen_k=t, num_heads=h, head_dim=d, dtype=dtype, mask=mask, alibi=alibi), counts)
    for batch, n, t, h, d, mask, alibi, counts in (
        (1, 1, 600, 24, 128, "none", "some", (1, 2, 16, 63, 64, 65, 599, 600)),
        (2, 1, 300, 5, 64, "padding", "all", (130, 290)),
        (2, 3, 200, 5, 80, "documents", "some", (2, 3, 150)),  # as many keys as queries, and fewer
        (1, 2, 130, 13, 64, "window", "none", (0, 70)),
    )
    for dtype in (FLOAT16, BFLOAT16)
]


def check_num_keys(case, count, backend, device):
    """The call on `count` of the keys is that on k and v cut to them, whatever the other rows hold."""
    inputs = make(dataclasses.replace(case, seqlen_k=count), device)
    memory = [x.new_full((case.batch, case.seqlen_k, *x.shape[2:]), math.nan) for x in (inputs.k, inputs.v)]
    for whole, part in zip(memory, (inputs.k, inputs.v), strict=True):
        whole[:, :count] = part
    num_keys = torch.tensor([count], dtype=torch.int32, device=device)
    options = {**inputs.options, "return_lse": True, "backend": backend}
    with numerics.nan_filled(), torch.no_grad():
        out, lse = attention(inputs.q, *memory, num_keys=num_keys, **options)
        cut = attention(*inputs.tensors(), **options)
    out_ref, lse_ref, *_ = run_exact(inputs, case.softmax_scale)
    reach = logit_range(inputs, lse_ref, case.softmax_scale) if count > 0 else 0.0
    kind = "heavy" if backend == "cuda" and count <= 3 else "output"
    numerics.assert_rows_close(out, out_ref, case.dtype, kind=kind, logit_range=reach)
    numerics.assert_lse_close(lse, lse_ref)
    return (out, lse), cut


# A tile is 96 queries by 192 keys on the CPU; on a GPU up to 128 queries by 64 keys, or 16 rows in the kernel for few
# queries. The lengths lie on both sides of each edge.
LENGTHS = [(n, n) for n in (1, 2, 3, 15, 16, 17, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193, 257)]
LENGTHS += [(1, 147), (2, 96), (5, 97), (31, 1025), (113, 203), (203, 113), (257, 1), (100, 2)]
HEADS = [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (24, 1), (24, 4), (24, 24)]
CASES = [Case(seqlen_q=n, seqlen_k=t, causal=causal) for n, t in LENGTHS for causal in (True, False)]
CASES += [Case(batch=1, seqlen_q=1025, seqlen_k=1025, num_heads=2, alibi="all")]
CASES += [Case(seqlen_q=n, seqlen_k=99, num_heads=h, num_kv_heads=g) for n in (1, 7, 99) for h, g in HEADS]
CASES += [
    Case(seqlen_q=100, seqlen_k=100, head_dim=d, dtype=dtype)
    for d in (4, 8, 16, 20, 33, 64, 80, 128, 192, 256)
    for dtype in (FLOAT32, FLOAT16, BFLOAT16)
]
CASES += [Case(seqlen_q=100, seqlen_k=100, head_dim=1)]  # only float32: a row of one number averages no roundings
CASES += [
    Case(seqlen_q=n, seqlen_k=130, alibi=alibi, causal=causal, mask=mask)
    for mask in ("documents", "padding", "window", "ahead", "blind")
    for n in (60, 130, 150)
    for alibi in ("none", "all")
    for causal in (True, False)
]
CASES += [Case(seqlen_q=40, seqlen_k=110, num_heads=6, num_kv_heads=2, mask="window", dtype=d) for d in numerics.HALF]
CASES += [
    Case(seqlen_q=70, seqlen_k=130, layout=layout, dtype=dtype, num_heads=4, num_kv_heads=2, head_dim=d)
    for layout in ("transposed", "seqlen first", "slice", "offset", "expanded")
    for dtype, d in ((FLOAT32, 32), (BFLOAT16, 64), (FLOAT16, 33))
]
ODD_VALUES = [
    Case(seqlen_q=120, seqlen_k=120, values=values, dtype=dtype, alibi=alibi)
    for values in ("peaked", "flat", "huge key", "ties", "offset", "heavy")
    for dtype in (FLOAT32, FLOAT16, BFLOAT16)
    for alibi in ("none", "some")
] + [Case(values="denormal"), Case(values="denormal", alibi="none", causal=False)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case, backend, device):
    inputs = make(case, device)
    require(backend, *inputs.tensors(), **inputs.options)
    check(inputs, backend, values=rules_for(case, backend))


@pytest.mark.parametrize(("case", "counts"), NUM_KEYS_CASES, ids=str)
def test_num_keys(case, counts, backend, device):
    for count in counts:
        inputs = make(dataclasses.replace(case, seqlen_k=count), device)
        require(backend, *inputs.tensors(), **inputs.options)
        results, cut = check_num_keys(case, count, backend, device)
        if backend in ("cpu", "reference"):
            assert all(map(torch.equal, results, cut))


def test_num_keys_is_checked(backend, device):
    inputs = make(Case(seqlen_q=1, seqlen_k=9), device)
    require(backend, *inputs.tensors(), **inputs.options)
    q, k, v = (tensor.detach() for tensor in inputs.tensors())
    three = torch.tensor([3], dtype=torch.int32, device=device)
    for wrong, error, message in (
        (3, TypeError, "num_keys must be a tensor, got int"),
        (three.long(), TypeError, r"num_keys\.dtype must be int32, got int64"),
        (three[0], ValueError, r"num_keys must have shape \(1,\) = \(1,\), got \(\)"),
    ):
        with pytest.raises(error, match=message):
            attention(q, k, v, num_keys=wrong, backend=backend)
    if device.type == "cpu":
        for count in (-1, 10):
            with pytest.raises(ValueError, match=f"num_keys must be between 0 and seqlen_k=9, got {count}"):
                attention(q, k, v, num_keys=three * 0 + count, backend=backend)
    with pytest.raises(ValueError, match="num_keys must be None where gradients are recorded"):
        attention(q.requires_grad_(), k, v, num_keys=three, backend=backend)


@pytest.mark.parametrize("case", ODD_VALUES, ids=str)
def test_odd_values(case, backend, device):
    inputs = make(case, device)
    require(backend, *inputs.tensors(), **inputs.options)
    if case.dtype in numerics.HALF:
        check_beside_plain(inputs, backend, case.values)
    else:  # plain torch in float32 has no rounded steps to compare with
        check(inputs, backend, values=case.values)


@pytest.mark.parametrize("softmax_scale", [1, 0.05, 0.0, -0.3], ids=str)
def test_softmax_scale_is_not_applied_to_the_bias(softmax_scale, backend, device):
    inputs = make(Case(seqlen_q=20, seqlen_k=110, alibi="all"), device)
    require(backend, *inputs.tensors(), **inputs.options, softmax_scale=softmax_scale)
    check(inputs, backend, softmax_scale=softmax_scale)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_float64_takes_the_reference(causal, device):
    case = Case(seqlen_q=9, seqlen_k=12, dtype=torch.float64, causal=causal, mask="window")
    inputs = make(case, device)
    for result, exact in zip(run(inputs, None), run_exact(inputs, case.softmax_scale), strict=True):
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_reference_in_blocks_of_queries(causal, device, monkeypatch):
    monkeypatch.setattr(op, "REFERENCE_BLOCK_LOGITS", 2000)  # a few rows at a time
    check(make(Case(seqlen_q=70, seqlen_k=50, causal=causal, mask="documents"), device), "reference")
    check(make(Case(seqlen_q=50, seqlen_k=70, causal=causal, mask="padding"), device), "reference")


# ---- logit_bound ----------------------------------------------------------------------------------------------------


def bounded(case, bound, device, adversarial=False):
    """Inputs with |softmax_scale * <q, k>| <= bound, as QK norm makes them, and that bound as `logit_bound`.

    adversarial: every score is at the bound. In blocks of 20 tokens, a row's own block scores -bound, the next one to
        the left +bound, and so on: far keys outweigh the near ones as much as the bound permits.
    """
    inputs = make(case, device)
    q, k = (torch.nn.functional.normalize(t.float(), dim=-1) for t in inputs.tensors()[:2])
    if adversarial:
        key = torch.arange(case.seqlen_k, device=device)
        query = torch.arange(case.seqlen_q, device=device) + case.seqlen_k - case.seqlen_q
        for tensor, position, sign in ((q, query, 1.0), (k, key, -1.0)):
            tensor.zero_()
            tensor[..., 0] = torch.where(position // 20 % 2 == 0, sign, -sign)[None, :, None]
    q, k = (lay_out(t.to(case.dtype), case.layout) for t in (q * bound / case.softmax_scale, k))
    promise = torch.full((case.num_heads,), bound * (1 + 2**-7), device=device)  # QK norm in half precision rounds
    return Inputs(q, k, inputs.v, inputs.dout, {**inputs.options, "logit_bound": promise})


LONG = Case(batch=1, seqlen_q=700, seqlen_k=700, num_heads=4, head_dim=16)
BOUNDED = [
    (LONG, 1.0),
    (LONG, 10.0),
    (LONG, 39.0),
    (LONG, 60.0),  # above 40 the softmax keeps a running maximum; the windows remain
    (dataclasses.replace(LONG, causal=False), 5.0),
    (dataclasses.replace(LONG, causal=False), 50.0),
    (dataclasses.replace(LONG, seqlen_q=1, seqlen_k=1500), 8.0),
    (dataclasses.replace(LONG, seqlen_q=30, seqlen_k=1100, num_heads=6, num_kv_heads=2), 3.0),
    (dataclasses.replace(LONG, seqlen_q=500, seqlen_k=120), 2.0),  # early rows have no key of their own
    (dataclasses.replace(LONG, seqlen_q=500, seqlen_k=120, causal=False), 2.0),
    (dataclasses.replace(LONG, mask="documents"), 4.0),
    (dataclasses.replace(LONG, mask="window"), 4.0),
    (dataclasses.replace(LONG, mask="ahead", causal=False), 4.0),  # the row's own key is hidden: no window holds
    (dataclasses.replace(LONG, mask="blind"), 4.0),
    (dataclasses.replace(LONG, alibi="none"), 20.0),
    (dataclasses.replace(LONG, dtype=BFLOAT16), 10.0),
    (dataclasses.replace(LONG, dtype=FLOAT16), 10.0),
]


@pytest.mark.parametrize("case, bound", BOUNDED, ids=lambda value: str(value))
@pytest.mark.parametrize("adversarial", [False, True], ids=["random", "adversarial"])
def test_logit_bound(case, bound, adversarial, backend, device):
    inputs = bounded(case, bound, device, adversarial)
    require(backend, *inputs.tensors(), **inputs.options)
    check_bounded(inputs, bound, adversarial, backend)


@pytest.mark.parametrize("bound", [2.0, 60.0])
def test_logit_bound_changes_nothing_but_rounding(bound, backend, device):
    inputs = bounded(LONG, bound, device, adversarial=True)
    require(backend, *inputs.tensors(), **inputs.options)
    with_bound = attention(*inputs.tensors(), **inputs.options, backend=backend)
    without = attention(*inputs.tensors(), **{**inputs.options, "logit_bound": None}, backend=backend)
    # The skipped keys hold at most 2^-24 of a row; the rest is the rounding of the exponents, up to `bound`.
    limit = (4 + 2 * bound) * numerics.UNIT[FLOAT32] * inputs.v.abs().max()
    assert (with_bound - without).abs().max() <= limit


def test_logit_bound_and_slope_skip_far_keys(backend, device):
    """Far values are never read: a NaN there does not reach rows whose window ends before it."""
    inputs = bounded(dataclasses.replace(LONG, num_heads=1), 1.0, device)
    require(backend, *inputs.tensors(), **inputs.options)
    if backend == "reference":
        pytest.skip("reference: reads every key")
    slope = inputs.options["alibi_slopes"].item()
    window = math.ceil((2 * inputs.options["logit_bound"].item() + 24 * math.log(2)) / slope)
    inputs.v[:, :100] = math.nan
    out = attention(*inputs.tensors(), **inputs.options, backend=backend)
    tiles = 2 * 128  # a window is rounded outwards to whole tiles of queries and keys
    assert out[:, 100 + window + tiles :].isfinite().all()


@pytest.mark.parametrize("promise", [math.inf, math.nan], ids=str)
def test_logit_bound_that_is_not_finite_promises_nothing(promise, backend, device):
    inputs = make(Case(seqlen_q=150, seqlen_k=300, values="peaked", alibi="all"), device)
    require(backend, *inputs.tensors(), **inputs.options)
    inputs.options["logit_bound"] = torch.full((3,), promise, device=device)
    check(inputs, backend)


def test_logit_bounds_of_heads_that_share_a_tile(backend, device):
    case = Case(seqlen_q=3, seqlen_k=400, num_heads=6, head_dim=16)
    inputs = bounded(case, 1.0, device)
    require(backend, *inputs.tensors(), **inputs.options)
    factor = torch.tensor([1.0, 60, 5, 45, 0.1, 20], device=device)
    inputs.q = inputs.q * factor[:, None]
    inputs.options["logit_bound"] = inputs.options["logit_bound"] * factor
    check(inputs, backend)


@pytest.mark.parametrize("num_kv_heads", [1, 3, 6])
def test_gradients_of_more_heads_than_fit_at_once(num_kv_heads, backend, device):
    """The CPU kernel keeps dq in float32 for as many heads as fit into 128 MiB, here two."""
    inputs = make(Case(1, 250_000, 5, num_heads=6, num_kv_heads=num_kv_heads, head_dim=4, causal=False), device)
    require(backend, *inputs.tensors(), **inputs.options)
    check(inputs, backend, values="tall")


# ---- random cases ---------------------------------------------------------------------------------------------------


lengths = st.one_of(st.integers(1, 40), st.sampled_from((63, 64, 65, 95, 96, 97, 128, 130)))
heads = st.sampled_from(((1, 1), (2, 1), (2, 2), (4, 2), (3, 1), (5, 5)))


@st.composite
def cases(
    draw,
    dtypes=(FLOAT32, FLOAT16, BFLOAT16),
    masks=("none", "documents", "padding", "window", "blind"),
    lengths=lengths,
    **fixed,
):
    num_heads, num_kv_heads = draw(heads)
    seqlen_q = draw(lengths)
    drawn = {
        "batch": draw(st.integers(1, 3)),
        "seqlen_q": seqlen_q,
        "seqlen_k": draw(st.one_of(st.just(seqlen_q), lengths)),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": draw(st.sampled_from((4, 8, 20, 32, 64))),
        "dtype": draw(st.sampled_from(dtypes)),
        "causal": draw(st.booleans()),
        "alibi": draw(st.sampled_from(("none", "some", "all"))),
        "mask": draw(st.sampled_from(masks)),
        "seed": draw(st.integers(0, 999)),
    }
    return Case(**{**drawn, **fixed})


VALUES = ("normal", "peaked", "flat", "huge key", "ties", "offset", "heavy", "denormal")
LAYOUTS = ("contiguous", "transposed", "seqlen first", "slice", "offset", "expanded")
MASKS = ("none", "documents", "padding", "window", "ahead", "blind")


@hypothesis.given(
    case=st.builds(
        dataclasses.replace,
        cases(masks=MASKS, lengths=st.one_of(lengths, st.sampled_from((193, 257, 500)))),
        head_dim=st.sampled_from((4, 8, 20, 32, 33, 64, 80, 128)),
        values=st.sampled_from(VALUES),
        layout=st.sampled_from(LAYOUTS),
    ),
    bound=st.none() | st.floats(0.25, 80),
    adversarial=st.booleans(),
)
def test_random_cases(backend, device, case, bound, adversarial):
    """Any combination of arguments that a call may have; `--hypothesis-profile exhaustive` tries 10 000 of them."""
    hypothesis.assume(case.dtype != FLOAT16 or case.values != "heavy")  # exact gradients beyond 65504
    inputs = make(case, device) if bound is None else bounded(case, bound, device, adversarial)
    require(backend, *inputs.tensors(), **inputs.options)
    # The rules for rows of ordinary inputs need many different rows. With two visible keys, dq is a difference of two
    # numbers, only as exact as the rounded output that the backward pass reads. Equal scores repeat a row and its
    # rounding error; with large scores, gradients cancel down to the rounding of the saved output.
    many = min(inputs.q[..., 0].numel(), seen_keys(inputs)) >= numerics.MEDIAN_NEEDS_ROWS
    ordinary = case.values == "normal" and bound is None and rules_for(case, backend) == "normal"
    check(inputs, backend, values="heavy" if not ordinary else "normal" if many else "few rows")


# ---- laws (docs/testing.md#laws) ------------------------------------------------------------------------------------


def law(**fixed):
    """Turn test(case, inputs, backend) into a hypothesis test over the cases, for each backend that supports them.

    Its attribute `law` is (test, fixed): tests/emulator/test_attention.py applies the law to emulated kernels.
    """

    def decorate(test):
        def over_cases(backend, device, case):
            inputs = make(case, device)
            require(backend, *inputs.tensors(), **inputs.options)
            test(case, inputs, backend)

        over_cases.__name__, over_cases.__qualname__, over_cases.__doc__ = test.__name__, test.__name__, test.__doc__
        over_cases = hypothesis.given(case=cases(**fixed))(over_cases)
        over_cases.law = test, fixed
        return over_cases

    return decorate


def assert_same(result, expected, backend):
    """Equal bit for bit; close for the reference, because torch's products may round differently in another layout."""
    assert result.dtype == expected.dtype
    if backend != "reference":
        assert torch.equal(result, expected), f"differs by {(result - expected).abs().max()}"
    else:
        assert_near(result, expected)


def tolerance(dtype, limit):
    """`limit` roundings of float32; half precision also rounds inputs and results: limit / 16 roundings of its own."""
    return limit * numerics.UNIT[FLOAT32] + (limit / 16 * numerics.UNIT[dtype] if dtype in numerics.HALF else 0.0)


def assert_near(result, expected, limit=64, dtype=None):
    """Within `limit` roundings of the largest element; `dtype`: of the inputs, if not that of the result."""
    dtype = dtype or result.dtype
    assert result.shape == expected.shape
    assert torch.equal(result == -math.inf, expected == -math.inf)
    result, expected = (t.double().clamp(min=-1e300) for t in (result, expected))
    expected, result = (t[t > -1e300] for t in (expected, result))
    if expected.numel() == 0:
        return
    size = max(1.0, expected.abs().max().item())
    assert (result - expected).abs().max() <= tolerance(dtype, limit) * size


def change(inputs, **tensors):
    return dataclasses.replace(inputs, **tensors)


def with_options(inputs, **options):
    return change(inputs, options={**inputs.options, **options})


def positions(case, device):
    return torch.arange(case.seqlen_q, device=device) + case.seqlen_k - case.seqlen_q


@law()
def test_p1_permuting_batch_entries_and_heads_permutes_the_result(case, inputs, backend):
    generator = torch.Generator().manual_seed(case.seed)
    entry = torch.randperm(case.batch, generator=generator)
    kv_head = torch.randperm(case.num_kv_heads, generator=generator)
    within = torch.randperm(case.num_heads // case.num_kv_heads, generator=generator)
    head = torch.arange(case.num_heads).view(case.num_kv_heads, -1)[kv_head][:, within].flatten()
    options = dict(inputs.options)
    if (slopes := options.get("alibi_slopes")) is not None:
        options["alibi_slopes"] = slopes[head]
    if (start := options["key_start"]) is not None:
        options["key_start"] = start[entry]
    permuted = Inputs(
        inputs.q[entry][:, :, head],
        inputs.k[entry][:, :, kv_head],
        inputs.v[entry][:, :, kv_head],
        inputs.dout[entry][:, :, head],
        options,
    )
    out, lse, dq, dk, dv = run(inputs, backend)
    permuted_out, permuted_lse, permuted_dq, permuted_dk, permuted_dv = run(permuted, backend)
    assert_same(permuted_out, out[entry][:, :, head], backend)
    assert_same(permuted_lse, lse[entry][:, head], backend)
    assert_same(permuted_dq, dq[entry][:, :, head], backend)
    if case.dtype == FLOAT32:  # dk and dv sum over the heads of a group, whose order has changed
        assert_near(permuted_dk, dk[entry][:, :, kv_head])
        assert_near(permuted_dv, dv[entry][:, :, kv_head])


@law()
def test_p1_a_batch_entry_does_not_depend_on_its_neighbours(case, inputs, backend):
    last = slice(case.batch - 1, case.batch)
    start = inputs.options["key_start"]
    alone = Inputs(
        *(t[last] for t in (inputs.q, inputs.k, inputs.v, inputs.dout)),
        {**inputs.options, "key_start": None if start is None else start[last]},
    )
    inputs.q[: case.batch - 1] = math.nan
    names = ("out", "softmax_lse", "dq", "dk", "dv")
    for name, result, expected in zip(names, run(inputs, backend), run(alone, backend), strict=True):
        # On a GPU the number of splits of the heads of dk and dv depends on the batch.
        if backend in ("cuda", "triton") and name in ("dk", "dv"):
            assert_near(result[last], expected)
        else:
            assert_same(result[last], expected, backend)


@law(causal=True, seqlen_q=97, seqlen_k=97)
def test_p2_later_tokens_do_not_change_earlier_rows(case, inputs, backend):
    first = 1 + case.seed % 96
    out, lse, dq, *_ = run(inputs, backend)
    later = change(inputs, k=inputs.k.clone(), v=inputs.v.clone(), q=inputs.q.clone(), dout=inputs.dout.clone())
    for tensor in (later.q, later.k, later.v, later.dout):
        tensor[:, first:] = 3 * tensor[:, first:].flip(1) + 1
    changed_out, changed_lse, changed_dq, *_ = run(later, backend)
    assert_same(changed_out[:, :first], out[:, :first], backend)
    assert_same(changed_lse[:, :, :first], lse[:, :, :first], backend)
    assert_same(changed_dq[:, :first], dq[:, :first], backend)
    later.k[:, first:] = math.nan
    nan_out, nan_lse, *_ = run(later, backend)
    assert_same(nan_out[:, :first], out[:, :first], backend)
    assert_same(nan_lse[:, :, :first], lse[:, :, :first], backend)


@law()
def test_p3_p4_layout_and_foreign_memory_change_nothing(case, inputs, backend):
    expected = run(inputs, backend)
    for layout in ("transposed", "seqlen first", "slice", "offset"):
        moved = (lay_out(t, layout) for t in (inputs.q, inputs.k, inputs.v, inputs.dout))
        for result, other in zip(run(Inputs(*moved, inputs.options), backend), expected, strict=True):
            assert_same(result, other, backend)


@law(causal=False, alibi="none", mask="none", dtypes=(FLOAT32,))
def test_p5_parts_merge_by_their_log_sum_exp(case, inputs, backend):
    cut = case.seed % (case.seqlen_k + 1)
    q, k, v = inputs.tensors()
    whole, whole_lse = attention(q, k, v, return_lse=True, backend=backend)
    parts = [attention(q, k[:, s], v[:, s], return_lse=True, backend=backend) for s in (slice(cut), slice(cut, None))]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out.float() * (part - lse).exp().transpose(1, 2)[..., None] for out, part in parts)
    assert_near(merged, whole, dtype=case.dtype)
    assert_near(lse, whole_lse)


@law(dtypes=(FLOAT32,))
def test_p6_adding_a_vector_to_all_keys_shifts_the_log_sum_exp(case, inputs, backend):
    shift = torch.randn(case.head_dim, generator=torch.Generator().manual_seed(case.seed)).to(inputs.q)
    out, lse, *_ = run(inputs, backend)
    shifted_out, shifted_lse, *_ = run(change(inputs, k=inputs.k + shift), backend)
    assert_near(shifted_out, out, limit=256)
    moved = case.softmax_scale * (inputs.q.float() @ shift.float()).transpose(1, 2)
    assert_near(shifted_lse, lse + moved, limit=256, dtype=case.dtype)  # k + shift is rounded


@law(dtypes=(FLOAT32,))
def test_p7_outputs_are_weighted_means_of_the_values(case, inputs, backend):
    out, lse, *_ = run(inputs, backend)
    sees = (lse > -math.inf).transpose(1, 2)[..., None]
    constant = run(change(inputs, v=torch.full_like(inputs.v, 3.0)), backend)[0]
    assert_near(constant, torch.where(sees, 3.0, 0.0).expand_as(out))
    group = case.num_heads // case.num_kv_heads
    low, high = (f(1, keepdim=True).repeat_interleave(group, 2) for f in (inputs.v.amin, inputs.v.amax))
    slack = 1e-5 + tolerance(case.dtype, 64)
    assert ((out >= low - slack) & (out <= high + slack) | ~sees).all()
    other = torch.randn(inputs.v.shape, generator=torch.Generator().manual_seed(case.seed)).to(out)
    other_out = run(change(inputs, v=other), backend)[0]
    combined = run(change(inputs, v=inputs.v + 2 * other), backend)[0]
    assert_near(combined, out + 2 * other_out)


@law(causal=True, alibi="all", masks=("none", "documents", "window"), dtypes=(FLOAT32,))
def test_p8_alibi_is_a_bias_linear_in_the_key(case, inputs, backend):
    """-m (i - j) = m j - m i: another channel of q and k gives m j, and m i does not change the softmax."""
    slopes = inputs.options["alibi_slopes"]
    key = torch.arange(case.seqlen_k, device=slopes.device) + 0.0
    q_channel = (slopes / case.softmax_scale)[None, None, :, None].expand(*inputs.q.shape[:3], 1)
    k_channel = key[None, :, None, None].expand(*inputs.k.shape[:3], 1)
    q, k = torch.cat((inputs.q, q_channel), -1), torch.cat((inputs.k, k_channel), -1)
    v = torch.nn.functional.pad(inputs.v, (0, 1))
    options = {**inputs.options, "alibi_slopes": None, "softmax_scale": case.softmax_scale, "backend": backend}
    out, lse = attention(q, k, v, **options, return_lse=True)
    biased, biased_lse, *_ = run(inputs, backend)
    assert_near(out[..., :-1], biased, limit=1000)  # the new channel adds a term of 130 * 0.7 to scores of about 1
    assert_near(lse, biased_lse + slopes[:, None] * positions(case, slopes.device), limit=256)


@law(alibi="none")
def test_p8_slope_zero_is_no_bias(case, inputs, backend):
    zero = with_options(inputs, alibi_slopes=torch.zeros(case.num_heads, device=inputs.q.device))
    for result, expected in zip(run(zero, backend), run(inputs, backend), strict=True):
        assert_same(result, expected, backend)


@law(dtypes=(FLOAT32,))
def test_p11_one_key_head_is_that_head_repeated(case, inputs, backend):
    group = case.num_heads // case.num_kv_heads
    repeated = change(inputs, k=inputs.k.repeat_interleave(group, 2), v=inputs.v.repeat_interleave(group, 2))
    out, lse, dq, dk, dv = run(inputs, backend)
    repeated_out, repeated_lse, repeated_dq, *gradients = run(repeated, backend)
    assert_near(out, repeated_out)
    assert_near(lse, repeated_lse)
    assert_near(dq, repeated_dq)
    for gradient, parts in zip((dk, dv), gradients, strict=True):
        assert_near(gradient, parts.unflatten(2, (case.num_kv_heads, -1)).sum(3))


@law(causal=True, dtypes=(FLOAT32,))
def test_p12_queries_in_pieces_are_one_call(case, inputs, backend):
    cut = case.seed % (case.seqlen_q + 1)
    q, k, v = inputs.tensors()
    whole, whole_lse = attention(q, k, v, **inputs.options, return_lse=True, backend=backend)
    start = inputs.options["key_start"]
    for queries, end in ((slice(cut), case.seqlen_k - case.seqlen_q + cut), (slice(cut, None), case.seqlen_k)):
        options = {**inputs.options, "key_start": None if start is None else start[:, queries]}
        if end < 0:  # these queries are before the first key, which alignment at the end cannot express
            continue
        out, lse = attention(q[:, queries], k[:, :end], v[:, :end], **options, return_lse=True, backend=backend)
        assert_near(out, whole[:, queries])
        assert_near(lse, whole_lse[:, :, queries])


@law(seqlen_q=100, seqlen_k=100, mask="none", causal=True, dtypes=(FLOAT32,))
def test_p13_packed_documents_are_separate_documents(case, inputs, backend):
    cut = 1 + case.seed % 99
    start = torch.zeros(case.batch, 100, dtype=torch.int32, device=inputs.q.device)
    start[:, cut:] = cut
    packed = run(with_options(inputs, key_start=start), backend)
    for tokens in (slice(cut), slice(cut, None)):
        pieces = (t[:, tokens] for t in (inputs.q, inputs.k, inputs.v, inputs.dout))
        out, lse, *gradients = run(Inputs(*pieces, inputs.options), backend)
        assert_near(packed[0][:, tokens], out)
        assert_near(packed[1][:, :, tokens], lse)
        for result, expected in zip(packed[2:], gradients, strict=True):
            assert_near(result[:, tokens], expected)


@law(mask="none", dtypes=(FLOAT32,))
def test_p13_left_padding_is_the_row_alone(case, inputs, backend):
    """This also tests shifted positions: padding shifts all of them and changes no score."""
    pad = 1 + case.seed % 120
    padded = [torch.nn.functional.pad(t, (0, 0, 0, 0, pad, 0), value=7.0) for t in inputs.tensors()[1:]]
    start = torch.full((1, 1), pad, dtype=torch.int32, device=inputs.q.device).expand(case.batch, case.seqlen_q)
    out, lse, dq, dk, dv = run(inputs, backend)
    results = run(change(with_options(inputs, key_start=start), k=padded[0], v=padded[1]), backend)
    for result, expected in zip(results, (out, lse, dq), strict=False):
        assert_near(result, expected)
    for result, expected in zip(results[3:], (dk, dv), strict=True):
        assert (result[:, :pad] == 0).all()
        assert_near(result[:, pad:], expected)


@law()
def test_p14_value_gradients_sum_to_the_output_gradients(case, inputs, backend):
    _, lse, _, _, dv = run(inputs, backend)
    seen = inputs.dout.double() * (lse > -math.inf).transpose(1, 2)[..., None]
    expected = seen.sum(1).unflatten(1, (case.num_kv_heads, -1)).sum(2)
    error = (dv.double().sum(1) - expected).norm()
    # Each element of dv is rounded once.
    rounding = numerics.UNIT[case.dtype] * dv.double().norm() + 64 * numerics.UNIT[FLOAT32] * seen.norm()
    if rounds_weights(backend, case.dtype):  # rounded weights multiply all of a row of dout, so errors add up
        rounding = rounding + numerics.UNIT[case.dtype] * seen.norm()
    assert error <= 2 * rounding + 1e-30


@law(dtypes=(FLOAT32,))
def test_p15_key_gradients_sum_to_zero(case, inputs, backend):
    """A softmax does not change when all its scores shift by a constant."""
    dk = run(inputs, backend)[3].double()
    limit = 1e-4 + tolerance(case.dtype, 16)
    assert dk.sum(1).abs().max() <= limit * max(1.0, dk.abs().sum(1).max().item())


@law(dtypes=(FLOAT32,), seqlen_q=21, seqlen_k=25)
def test_p16_gradients_are_those_of_the_reference_by_differences(case, inputs, backend):
    generator = torch.Generator().manual_seed(case.seed)
    steps = [torch.randn(t.shape, generator=generator).double().to(t.device) for t in inputs.tensors()]

    def loss(step):
        moved = [t.double() + step * d for t, d in zip(inputs.tensors(), steps, strict=True)]
        out, _ = reference.attention(*moved, softmax_scale=case.softmax_scale, **inputs.options)
        return (out * inputs.dout.double()).sum().item()

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    terms = [(g.double() * d).sum().item() for g, d in zip(run(inputs, backend)[2:], steps, strict=True)]
    size = sum((g.double() * d).norm().item() for g, d in zip(run(inputs, backend)[2:], steps, strict=True))
    assert abs(sum(terms) - slope) <= (1e-5 + tolerance(case.dtype, 16)) * max(1.0, size)


@law()
def test_p17_two_runs_agree_bit_for_bit(case, inputs, backend):
    for result, again in zip(run(inputs, backend), run(inputs, backend), strict=True):
        assert torch.equal(result, again)


EMPTY = [
    Case(batch=0),
    Case(seqlen_q=0),
    Case(num_heads=0),
    Case(num_heads=0, num_kv_heads=0),
    Case(seqlen_k=0),
    Case(seqlen_k=0, causal=False, mask="window"),
    Case(seqlen_q=0, seqlen_k=0),
]


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_p18_empty_inputs(case, backend, device):
    inputs = make(case, device)
    require(backend, *inputs.tensors(), **inputs.options)
    with numerics.nan_filled():
        out, lse, *gradients = run(inputs, backend)
    assert out.shape == inputs.q.shape and (out == 0).all()
    assert lse.shape == (case.batch, case.num_heads, case.seqlen_q) and (lse == -math.inf).all()
    for gradient, tensor in zip(gradients, inputs.tensors(), strict=True):
        assert gradient.shape == tensor.shape and (gradient == 0).all()


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_p19_gradcheck(causal, masked, device):
    case = Case(seqlen_q=5, seqlen_k=4, num_heads=4, num_kv_heads=2, head_dim=3, dtype=torch.float64, causal=causal)
    inputs = make(dataclasses.replace(case, mask="blind" if masked else "none"), device)
    leaves = [t.requires_grad_() for t in inputs.tensors()]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, **inputs.options), leaves)
    plain = {"softmax_scale": 0.4, **inputs.options}
    assert torch.autograd.gradcheck(lambda *t: reference.attention(*t, **plain)[0], leaves)


# ---- keys that a row does not see -----------------------------------------------------------------------------------

NOT_FINITE = (math.nan, math.inf, -math.inf)
TENSORS = ("q", "k", "v", "dout")


def visible_pairs(inputs):
    """(batch, num_heads, seqlen_q, seqlen_k): whether a query sees a key."""
    masks = {"causal": inputs.options["causal"], "key_start": inputs.options.get("key_start")}
    zeros = (torch.zeros_like(t) for t in (inputs.q, inputs.k))
    _, hidden = reference.masked_logits(*zeros, softmax_scale=1.0, alibi_slopes=None, first_query=None, **masks)
    return ~hidden.flatten(1, 2)


def check_hidden(inputs, backend, name, entry, row, head, channel, value):
    """A number that is not finite changes only the rows that see it; for all others it has the effect of a 0.

    name, entry, row, head, channel: the position of the number; channel may be a slice.
    """
    place = getattr(inputs, name)[entry, row, head]
    place[channel] = 0.0
    expected = run(inputs, backend)
    place[channel] = value
    results = run(inputs, backend)

    visible = visible_pairs(inputs)
    rows = torch.zeros_like(visible[..., 0])  # of out and dq: the rows that see it
    group = rows.shape[1] // inputs.k.shape[2]
    if name in ("q", "dout"):
        rows[entry, head, row] = visible[entry, head, row].any()
    else:
        rows[entry, head * group : (head + 1) * group] = visible[entry, head * group : (head + 1) * group, :, row]
    keys = (visible & rows[..., None]).any(2).unflatten(1, (-1, group)).any(2)  # of dk and dv: the keys of these rows
    rows, keys = rows.transpose(1, 2), keys.transpose(1, 2)
    for index, seen in enumerate((rows, rows, rows, keys, keys)):
        result, clean = results[index], expected[index]
        if index == 1:
            result, clean = result.transpose(1, 2), clean.transpose(1, 2)
        assert_same(result[~seen], clean[~seen], backend)
    if not math.isnan(value) or "logit_bound" in inputs.options:  # a window may hide it from some of these rows
        return
    out, _, dq, dk, dv = results
    if name in ("q", "k"):
        assert out[rows].isnan().all() and dk[keys].isnan().all() and dv[keys].isnan().all()
    elif name == "v":
        assert out[rows][:, channel].isnan().all() and dk[keys].isnan().all()
    else:
        assert dk[keys].isnan().all() and dv[keys][:, channel].isnan().all()
    assert dq[rows].isnan().all()


def hide_somewhere(case, inputs, backend):
    """`check_hidden` for every tensor, at positions that depend on the case's seed."""
    generator = torch.Generator().manual_seed(case.seed)
    for index, name in enumerate(TENSORS):
        shape = getattr(inputs, name).shape
        entry, row, head, channel = (torch.randint(size, (), generator=generator).item() for size in shape)
        channels = channel if index % 2 == 0 else slice(None)
        value = NOT_FINITE[(case.seed + index) % 3]
        check_hidden(
            change(inputs, **{name: getattr(inputs, name).clone()}), backend, name, entry, row, head, channels, value
        )


@law(masks=MASKS)
def test_numbers_that_are_not_finite_reach_only_rows_that_see_them(case, inputs, backend):
    hide_somewhere(case, inputs, backend)


# A number in each corner of tiles, blocks of rows and panels, and of windows and documents that end inside them.
HIDDEN = [
    Case(batch=1, seqlen_q=n, seqlen_k=t, num_heads=2, head_dim=d, alibi=alibi, causal=causal, mask=mask)
    for n, t, d, alibi, causal, mask in (
        (5, 5, 8, "none", True, "none"),
        (100, 100, 16, "some", True, "none"),
        (200, 200, 20, "none", True, "documents"),
        (97, 193, 33, "all", True, "window"),
        (13, 210, 64, "some", False, "padding"),
        (60, 130, 8, "none", False, "ahead"),
        (130, 60, 16, "all", True, "blind"),
        (1, 400, 40, "some", True, "padding"),  # decoding: values are read in place
        (3, 400, 40, "none", True, "window"),
    )
]


def hide_at_edges(case, inputs, name, backend):
    seqlen = getattr(inputs, name).shape[1]
    rows = {0, 1, seqlen // 2, seqlen - 2, seqlen - 1, *(edge + side for edge in (12, 96, 192) for side in (-1, 0))}
    for row in sorted(row for row in rows if 0 <= row < seqlen):
        spoilt = change(inputs, **{name: getattr(inputs, name).clone()})
        channel = slice(None) if row % 2 else row % case.head_dim
        check_hidden(spoilt, backend, name, 0, row, 0, channel, NOT_FINITE[row % 3])


@pytest.mark.parametrize("case", HIDDEN, ids=str)
@pytest.mark.parametrize("name", TENSORS)
def test_every_place_is_hidden_from_rows_that_do_not_see_it(name, case, backend, device):
    inputs = make(case, device)
    require(backend, *inputs.tensors(), **inputs.options)
    hide_at_edges(case, inputs, name, backend)


@pytest.mark.parametrize("isa", _select.extension.cpu_isas()[:-1] if _select.extension else [])
def test_every_place_is_hidden_with_each_instruction_set(isa):
    """The other tests run the last instruction set."""
    code = """
import torch
from test_attention import HIDDEN, TENSORS, hide_at_edges, make
for case in HIDDEN:
    for name in TENSORS:
        hide_at_edges(case, make(case, torch.device("cpu")), name, "cpu")
"""
    environ = os.environ | {"ANDROMEDA_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, env=environ, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("mask", ["documents", "none", "window"])
def test_windows_of_a_bound_hide_as_well(mask, name, value, backend, device):
    case = Case(batch=1, seqlen_q=300, seqlen_k=300, num_heads=2, head_dim=16, alibi="all", mask=mask)
    inputs = bounded(case, 1.0, device)
    require(backend, *inputs.tensors(), **inputs.options)
    check_hidden(inputs, backend, name, 0, 150, 0, slice(None), value)


def test_every_number_hidden_from_a_document_at_once(backend, device):
    """A packed document that is not finite in any tensor changes no bit of the other documents."""
    case = Case(batch=1, seqlen_q=200, seqlen_k=200, num_heads=4, num_kv_heads=2)
    inputs = make(case, device)
    starts = torch.tensor([0] * 50 + [50] * 70 + [120] * 80, dtype=torch.int32, device=device)[None]
    inputs = with_options(inputs, key_start=starts)
    require(backend, *inputs.tensors(), **inputs.options)
    document = slice(50, 120)
    for tensor in (inputs.q, inputs.k, inputs.v, inputs.dout):
        tensor[:, document] = 0.0
    expected = run(inputs, backend)
    inputs.q[:, document], inputs.k[:, document] = math.inf, math.nan
    inputs.v[:, document], inputs.dout[:, document] = -math.inf, math.nan
    others = torch.ones(200, dtype=torch.bool, device=device)
    others[document] = False
    for index, (result, clean) in enumerate(zip(run(inputs, backend), expected, strict=True)):
        axis = 2 if index == 1 else 1
        assert_same(result.transpose(0, axis)[others], clean.transpose(0, axis)[others], backend)


# ---- memory, threads, processes -------------------------------------------------------------------------------------


def test_inputs_stay_in_their_batch_entry_and_head(backend, device):
    case = Case(num_heads=4, num_kv_heads=2, seqlen_q=70, seqlen_k=70)
    clean, spoilt = make(case, device), make(case, device)
    require(backend, *clean.tensors(), **clean.options)
    spoilt.q[1, 3, 3], spoilt.k[1, 40, 1], spoilt.v[1, 41, 1] = math.inf, math.nan, -math.inf
    results = zip(run(spoilt, backend), run(clean, backend), strict=True)
    for index, (result, expected) in enumerate(results):
        if index == 1:
            result, expected = result.transpose(1, 2), expected.transpose(1, 2)
        own = result.shape[2] // 2  # heads of the key head that stayed clean
        assert_same(result[0], expected[0], backend)
        assert_same(result[1, :, :own], expected[1, :, :own], backend)


def test_offsets_beyond_32_bits(backend, device):
    """The second batch entry starts 2^31 + 64 elements after the first; the pages between them are never touched."""
    if device.type != "cpu":
        pytest.skip(f"memory of {device} is not allocated page by page")
    memory = torch.empty(2**31 + 4096, dtype=BFLOAT16)
    q, k, v = (memory[at:].as_strided((2, 10, 1, 32), (2**31 + 64, 32, 32, 1)) for at in (0, 640, 1280))
    require(backend, q, k, v)
    inputs = make(Case(seqlen_q=10, seqlen_k=10, num_heads=1, dtype=BFLOAT16), device)
    for near, far in zip(inputs.tensors(), (q, k, v), strict=True):
        far.copy_(near)
    far = Inputs(q, k, v, inputs.dout, inputs.options)
    for result, expected in zip(run(far, backend), run(inputs, backend), strict=True):
        assert_same(result, expected, backend)


def test_the_number_of_threads_changes_no_bit(backend, device):
    if backend == "reference":
        pytest.skip("reference: torch promises no order of summation")
    inputs = make(Case(seqlen_q=200, seqlen_k=300, num_heads=6, num_kv_heads=2, mask="documents"), device)
    require(backend, *inputs.tensors(), **inputs.options)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(inputs, backend))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for result, expected in zip(other, results[0], strict=True):
            assert torch.equal(result, expected)


def test_two_threads_at_once(backend, device):
    inputs = [make(Case(seqlen_q=150, seqlen_k=150, seed=seed), device) for seed in range(2)]
    require(backend, *inputs[0].tensors(), **inputs[0].options)
    expected = [run(each, backend) for each in inputs]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        rounds = [pool.submit(run, inputs[index % 2], backend) for index in range(12)]
        for index, future in enumerate(rounds):
            for result, other in zip(future.result(timeout=60), expected[index % 2], strict=True):
                assert_same(result, other, backend)


def test_forked_child(backend, device):
    """A forked data loader does not have the OpenMP workers of its parent."""
    if device.type != "cpu" or not hasattr(os, "fork"):
        pytest.skip(f"no fork with tensors on {device}")
    if backend == "reference":
        pytest.skip("reference: torch's own operators hang in the child of a process that used its threads")
    inputs = make(Case(seqlen_q=150, seqlen_k=150), device)
    require(backend, *inputs.tensors(), **inputs.options)
    expected = attention(*inputs.tensors(), **inputs.options, backend=backend)  # starts the workers of this process
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        out = attention(*inputs.tensors(), **inputs.options, backend=backend)
        os.write(write, out.numpy().tobytes()[:1000])
        os._exit(0)
    os.close(write)
    try:
        assert os.read(read, 1000) == expected.numpy().tobytes()[:1000]
    finally:
        os.close(read)
        os.waitpid(child, 0)


# ---- torch ----------------------------------------------------------------------------------------------------------


def operator_arguments(inputs, backend):
    options = inputs.options
    return (
        *(t.detach() for t in inputs.tensors()),
        options.get("alibi_slopes"),
        options.get("logit_bound"),
        options.get("key_start"),
        options["causal"],
        0.3,
        backend,
        options.get("num_keys"),
    )


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_opcheck(layout, backend, device):
    inputs = make(Case(seqlen_q=6, seqlen_k=9, head_dim=8, mask="documents", layout=layout), device)
    require(backend, *inputs.tensors(), **inputs.options)
    arguments = operator_arguments(inputs, backend)
    torch.library.opcheck(op.FORWARD, arguments)
    torch.library.opcheck(op.BACKWARD, (inputs.dout, *op.FORWARD(*arguments), *arguments))


def test_opcheck_num_keys(backend, device):
    inputs = make(Case(seqlen_q=1, seqlen_k=9, head_dim=8), device)
    num_keys = torch.tensor([5], dtype=torch.int32, device=device)
    require(backend, *inputs.tensors(), **inputs.options)
    with_num_keys = with_options(inputs, num_keys=num_keys)
    torch.library.opcheck(op.FORWARD, operator_arguments(with_num_keys, backend))


def test_compiles_into_one_graph(backend, device):
    inputs = make(Case(mask="documents", layout="transposed"), device)
    require(backend, *inputs.tensors(), **inputs.options)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: attention(2 * q, k, v, **inputs.options, return_lse=True, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    leaves = [t.detach().requires_grad_() for t in inputs.tensors()]
    out, lse = compiled(*leaves)
    gradients = torch.autograd.grad(out, leaves, inputs.dout)
    expected = run(change(inputs, q=2 * inputs.q), backend)
    assert not lse.requires_grad
    for result, other in zip((out.detach(), lse, gradients[0] / 2, *gradients[1:]), expected, strict=True):
        assert_same(result, other, backend)


def test_exports_without_the_choice_of_a_backend(device):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v, causal=True)

    inputs = make(Case(alibi="none"), device)
    program = torch.export.export(Layer(), inputs.tensors())
    assert "auto" in program.graph_module.code
    torch.testing.assert_close(program.module()(*inputs.tensors()), attention(*inputs.tensors(), causal=True))


def test_functional_gradient(backend, device):
    inputs = make(Case(seqlen_q=20, seqlen_k=20), device)
    require(backend, *inputs.tensors(), **inputs.options)

    def loss(q, k, v):
        return (attention(q, k, v, **inputs.options, backend=backend) * inputs.dout).sum()

    gradients = torch.func.grad(loss, argnums=(0, 1, 2))(*inputs.tensors())
    for result, expected in zip(gradients, run(inputs, backend)[2:], strict=True):
        assert_same(result, expected, backend)


def test_second_derivatives_of_kernels_and_tangents_are_refused(backend, device):
    inputs = make(Case(seqlen_q=5, seqlen_k=5), device)
    require(backend, *inputs.tensors(), **inputs.options)
    q, k, v = inputs.tensors()
    leaf = q.clone().requires_grad_()
    out = attention(leaf, k, v, backend=backend)
    (dq,) = torch.autograd.grad(out.sum(), leaf, create_graph=True)
    if backend == "reference":
        dq.square().sum().backward()
        assert leaf.grad.any()
    else:
        with pytest.raises(NotImplementedError, match=r'attention: .* differentiated again; pass backend="reference"'):
            (dq.sum() + leaf.sum()).backward()
    with pytest.raises(NotImplementedError, match="attention: forward-mode"):  # dropped, the tangent would be zero
        torch.func.jvp(lambda q: attention(q, k, v, backend=backend), (q,), (q,))


def test_expanded_output_gradient(backend, device):
    """out.sum().backward() passes an expanded scalar, whose strides are 0."""
    inputs = make(Case(), device)
    require(backend, *inputs.tensors(), **inputs.options)
    expected = run(change(inputs, dout=torch.ones_like(inputs.dout)), backend)
    leaves = [t.requires_grad_() for t in inputs.tensors()]
    attention(*leaves, **inputs.options, backend=backend).sum().backward()
    for leaf, gradient in zip(leaves, expected[2:], strict=True):
        assert_same(leaf.grad, gradient, backend)


def test_expanded_inputs_sum_their_gradients(backend, device):
    inputs = make(Case(batch=3), device)
    require(backend, *inputs.tensors(), **inputs.options)
    shared = inputs.k[:1].clone().requires_grad_()
    out = attention(inputs.q, shared.expand(3, -1, -1, -1), inputs.v, **inputs.options, backend=backend)
    out.backward(inputs.dout)
    expected = run(change(inputs, k=inputs.k[:1].expand(3, -1, -1, -1).clone()), backend)[3].sum(0, keepdim=True)
    assert_near(shared.grad, expected)


def test_only_the_log_sum_exp_used(backend, device):
    inputs = make(Case(), device)
    require(backend, *inputs.tensors(), **inputs.options)
    leaf = inputs.q.requires_grad_()
    out, lse = attention(leaf, inputs.k, inputs.v, return_lse=True, backend=backend)
    assert out.requires_grad and not lse.requires_grad


def test_autocast(backend, device):
    inputs = make(Case(alibi="all"), device)
    require(backend, *inputs.tensors(), **inputs.options)
    leaves = [inputs.q.requires_grad_(), inputs.k.to(BFLOAT16).requires_grad_(), inputs.v.requires_grad_()]
    with torch.autocast(device.type, dtype=BFLOAT16):
        out = attention(*leaves, **inputs.options, backend=backend)
        out.backward(inputs.dout.to(BFLOAT16))
    cast = Inputs(*(t.detach().to(BFLOAT16) for t in (*inputs.tensors(), inputs.dout)), inputs.options)
    expected = run(cast, backend)
    assert_same(out.detach(), expected[0], backend)
    for leaf, gradient in zip(leaves, expected[2:], strict=True):
        assert_same(leaf.grad, gradient.to(leaf.dtype), backend)


def test_autocast_leaves_float64_alone(device):
    inputs = make(Case(dtype=torch.float64), device)
    with torch.autocast(device.type, dtype=BFLOAT16):
        out = attention(*inputs.tensors(), **inputs.options)
    torch.testing.assert_close(out, attention(*inputs.tensors(), **inputs.options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "seqlen_q, seqlen_k, causal, pairs",
    [(4, 6, False, 24), (4, 6, True, 18), (6, 4, True, 10), (1, 9, True, 9), (5, 5, True, 15)],
)
def test_flop_counter(seqlen_q, seqlen_k, causal, pairs, device):
    inputs = make(Case(seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal), device)
    leaves = [t.requires_grad_() for t in inputs.tensors()]
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        attention(*leaves, **inputs.options).sum().backward()
    per_product = 2 * 2 * 3 * 32 * pairs  # multiply and add, batch, heads, head_dim
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.andromeda.attention_forward] == 2 * per_product
    assert counts[torch.ops.andromeda.attention_backward] == 5 * per_product


def test_meta_tensors():
    inputs = make(Case(dtype=BFLOAT16, mask="window"), torch.device("meta"))
    out, lse, *gradients = run(inputs, None)
    assert out.device.type == "meta" and out.shape == inputs.q.shape and out.dtype == BFLOAT16
    assert lse.shape == (2, 3, 50) and lse.dtype == FLOAT32
    assert [g.shape for g in gradients] == [t.shape for t in inputs.tensors()]


def test_selective_checkpointing_runs_the_forward_kernel_once(device):
    from torch.utils import checkpoint

    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    def policy(context, function, *args, **kwargs):
        wanted = checkpoint.CheckpointPolicy
        return wanted.MUST_SAVE if function is op.FORWARD else wanted.PREFER_RECOMPUTE

    inputs = make(Case(), device)
    leaves = [t.requires_grad_() for t in inputs.tensors()]
    with Count():
        out = checkpoint.checkpoint(
            lambda q, k, v: attention(q.sin(), k, v, **inputs.options).sin(),
            *leaves,
            use_reentrant=False,
            context_fn=lambda: checkpoint.create_selective_checkpoint_contexts(policy),
        )
        out.sum().backward()
    assert calls.count(op.FORWARD) == 1 and calls.count(op.BACKWARD) == 1


# ---- wrong calls ----------------------------------------------------------------------------------------------------


def tensor(*shape, dtype=FLOAT32, **options):
    return torch.zeros(shape, dtype=dtype, **options)


Q, K = tensor(2, 5, 4, 8), tensor(2, 7, 2, 8)
WRONG = {
    "no tensor": ((None, K, K), {}, TypeError, "q must be a tensor, got NoneType"),
    "rank": (
        (Q, K[0], K),
        {},
        ValueError,
        r"k must have 4 dimensions \(batch, seqlen_k, num_kv_heads, head_dim\), got shape \(7, 2, 8\)",
    ),
    "batch": ((Q, K[:1], K), {}, ValueError, r"k.shape\[0\] \(batch\) must equal q.shape\[0\], got 1 and 2"),
    "value batch": ((Q, K, K[:1]), {}, ValueError, r"v.shape\[0\] \(batch\) must equal q.shape\[0\], got 1 and 2"),
    "key length": ((Q, K, K[:, :6]), {}, ValueError, r"v.shape\[1\] \(seqlen_k\) must equal k.shape\[1\], got 6 and 7"),
    "key heads": ((Q, K, K[:, :, :1]), {}, ValueError, r"v.shape\[2\] \(num_kv_heads\) must equal k.shape\[2\]"),
    "head multiple": (
        (Q, tensor(2, 7, 3, 8), tensor(2, 7, 3, 8)),
        {},
        ValueError,
        r"q.shape\[2\] \(num_heads\) must be a multiple of k.shape\[2\] \(num_kv_heads\), got 4 and 3",
    ),
    "no key head": ((Q, K[:, :, :0], K[:, :, :0]), {}, ValueError, "must be a multiple of .*, got 4 and 0"),
    "head_dim": (
        (Q, tensor(2, 7, 2, 9), tensor(2, 7, 2, 9)),
        {},
        ValueError,
        r"k.shape\[3\] \(head_dim\) must equal q.shape\[3\], got 9 and 8",
    ),
    "no head_dim": (
        (Q[..., :0], K[..., :0], K[..., :0]),
        {},
        ValueError,
        r"q.shape\[3\] \(head_dim\) must be at least 1",
    ),
    "dtypes": (
        (Q, K.half(), K.bfloat16()),
        {},
        TypeError,
        "q, k, v must have one dtype, got float32, float16, bfloat16; cast them or use torch.autocast",
    ),
    "integers": (
        (Q.int(), K.int(), K.int()),
        {},
        TypeError,
        "q.dtype must be one of float32, float16, bfloat16, float64, got int32",
    ),
    "devices": ((Q, K.to("meta"), K), {}, ValueError, "q, k, v must be on one device, got cpu, meta, cpu"),
    "stride": (
        (Q, tensor(2, 7, 8, 2).transpose(2, 3), K),
        {},
        ValueError,
        r"k must be dense in its last dimension \(head_dim\), got strides \(112, 16, 1, 2\); pass k.contiguous\(\)",
    ),
    "expanded width": ((tensor(2, 5, 4, 1).expand(2, 5, 4, 8), K, K), {}, ValueError, "pass q.contiguous"),
    "slopes shape": (
        (Q, K, K),
        {"alibi_slopes": tensor(2)},
        ValueError,
        r"alibi_slopes must have shape \(num_heads,\) = \(4,\), got \(2,\)",
    ),
    "slopes dtype": (
        (Q, K, K),
        {"alibi_slopes": tensor(4, dtype=BFLOAT16)},
        TypeError,
        "alibi_slopes.dtype must be float32, got bfloat16",
    ),
    "slopes list": ((Q, K, K), {"alibi_slopes": [1.0] * 4}, TypeError, "alibi_slopes must be a tensor, got list"),
    "slopes device": ((Q, K, K), {"alibi_slopes": tensor(4, device="meta")}, ValueError, "must be on one device"),
    "slopes negative": (
        (Q, K, K),
        {"alibi_slopes": tensor(4) - 1},
        ValueError,
        r"alibi_slopes must be finite and >= 0, got values in \[-1.0, -1.0\]",
    ),
    "slopes infinite": ((Q, K, K), {"alibi_slopes": tensor(4) + math.inf}, ValueError, "must be finite and >= 0"),
    "slopes nan": ((Q, K, K), {"alibi_slopes": tensor(4) + math.nan}, ValueError, "must be finite and >= 0"),
    "slopes gradient": (
        (Q, K, K),
        {"alibi_slopes": tensor(4, requires_grad=True)},
        ValueError,
        r"alibi_slopes must not require a gradient, got requires_grad=True; pass alibi_slopes.detach\(\)",
    ),
    "bound shape": ((Q, K, K), {"logit_bound": tensor(1)}, ValueError, r"logit_bound must have shape \(num_heads,\)"),
    "bound dtype": (
        (Q, K, K),
        {"logit_bound": tensor(4, dtype=torch.float64)},
        TypeError,
        "logit_bound.dtype must be float32, got float64",
    ),
    "start shape": (
        (Q, K, K),
        {"key_start": tensor(2, 7, dtype=torch.int32)},
        ValueError,
        r"key_start must have shape \(batch, seqlen_q\) = \(2, 5\), got \(2, 7\)",
    ),
    "start dtype": (
        (Q, K, K),
        {"key_start": tensor(2, 5, dtype=torch.int64)},
        TypeError,
        "key_start.dtype must be int32, got int64",
    ),
    "start falls": (
        (Q, K, K),
        {"key_start": torch.tensor([[0, 1, 1, 2, 2], [0, 0, 3, 1, 4]], dtype=torch.int32)},
        ValueError,
        r"key_start must not decrease along a row, got 3 followed by 1 at \[1, 3\]",
    ),
    "scale nan": ((Q, K, K), {"softmax_scale": math.nan}, ValueError, "softmax_scale must be finite, got nan"),
    "scale tensor": ((Q, K, K), {"softmax_scale": tensor(1)}, TypeError, "softmax_scale must be a number, got Tensor"),
    "backend": (
        (Q, K, K),
        {"backend": "flash"},
        ValueError,
        "backend must be None or one of 'cuda', 'triton', 'cpu', 'reference', got 'flash'",
    ),
}


@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls(call):
    arguments, options, error, message = WRONG[call]
    with pytest.raises(error, match=f"^attention: .*{message}"):
        attention(*arguments, **options)


def test_misspelt_argument():
    with pytest.raises(TypeError, match="alibi_slope"):
        attention(Q, K, K, alibi_slope=None)


def test_constants_may_require_gradients_where_none_are_made(device):
    inputs = make(Case(), device)
    inputs.options["alibi_slopes"].requires_grad_()
    with torch.no_grad():
        attention(*inputs.tensors(), **inputs.options)
    inputs.options["alibi_slopes"].requires_grad_(False)
    bound = torch.full((3,), 50.0, device=device, requires_grad=True)
    leaf = inputs.q.requires_grad_()
    attention(leaf, inputs.k, inputs.v, **inputs.options, logit_bound=bound).sum().backward()
    assert bound.grad is None and leaf.grad is not None


def test_out_of_memory_leaves_the_arguments_alone(backend, device):
    """Every operand is small; only the result does not fit into any machine."""
    if device.type != "cpu":
        pytest.skip(f"the sizes are meant for host memory, not {device}")
    q = tensor(1, 1, 1, 64).expand(2**31 - 1, 2**20, 64, 64)
    k = tensor(1, 1, 1, 64).expand(2**31 - 1, 1, 1, 64)
    require(backend, q, k, k)
    with pytest.raises(RuntimeError, match=r"(?i)memory|overflow|allocate"):
        attention(q, k, k, backend=backend)
    small = make(Case(), device)
    check(small, backend)


def test_backend_that_cannot_run_says_why(device):
    q, k, v = make(Case(dtype=torch.float64), device).tensors()
    with pytest.raises(NotImplementedError, match=r"(?s)attention: backend 'cpu' does not support this call.*cpu: "):
        attention(q, k, v, backend="cpu")
    assert op.unsupported("cpu", q, k, v)
    assert op.unsupported("reference", q, k, v) == []


def test_the_longest_sequence_on_a_gpu():
    """The CUDA kernels count positions in an int, up to a tile past the end."""
    longest, one = 2**31 - 256, tensor(1, 1, 1, 64)
    for seqlen_q, seqlen_k, reason in (
        (longest, longest, None),
        (longest + 1, 1, f"seqlen_q={longest + 1} (built for up to 2**31 - 256)"),
        (1, longest + 1, f"seqlen_k={longest + 1} (built for up to 2**31 - 256)"),
    ):
        q, k = one.expand(1, seqlen_q, 1, 64), one.expand(1, seqlen_k, 1, 64)
        found = [text for text in op.unsupported("cuda", q, k, k) if text.startswith("seqlen")]
        assert found == ([reason] if reason else [])


def test_the_first_backend_that_can_is_chosen(device):
    q, k, v = make(Case(alibi="none"), device).tensors()
    able = [name for name in _select.BACKENDS if not op.unsupported(name, q, k, v)]
    assert able[-1] == "reference"
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend=able[0]))


def test_without_the_extension_the_reference_runs(device, monkeypatch):
    monkeypatch.setattr(_select, "extension", None)
    monkeypatch.setattr(_select, "extension_error", "not built")
    inputs = make(Case(), device)
    check(inputs, None)
    with pytest.raises(NotImplementedError, match="cpu: not built"):
        attention(*inputs.tensors(), backend="cpu")
