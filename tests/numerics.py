"""The rules for rounding errors and their limits (docs/numerics.md).

References are float64, computed from the rounded inputs. A row is the last dimension: one query, one head.
"""

import contextlib
import math

import torch

from andromeda.reference import attention as reference

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}  # round-off
HALF = (torch.bfloat16, torch.float16)

# Worst row, in units of round-off. Only ordinary half-precision outputs have a limit for the median row: their error is
# the rounding of the result, while that of float32 is the rounding of the sums, which depends on the inputs.
MEDIAN_ROW = 0.58
MEDIAN_NEEDS_ROWS = 200
WORST_ROW = {"output": 1.25, "heavy": 3.0, "gradient": 8.0}
WORST_ROW_NARROW = 1.5  # outputs of head size 32 and below: the roundings of few channels average out less
WORST_ROW_FLOAT32 = 400.0
WHOLE_TENSOR = 1.0
ELEMENT = 8.0
LSE = 4e-6

# If cancellation makes a gradient row smaller than this share of its terms, only the element rule applies: its error is
# that of the terms. The same holds for a row near the subnormal numbers, whose spacing is constant.
CANCELLED = 2.0**-4
SUBNORMAL_MARGIN = 16


def row_errors(out, ref):
    """||out_r - ref_r|| / ||ref_r|| for each row; for a zero row of the reference, 0 if `out` is zero too, else inf."""
    out, ref = out.double(), ref.double()
    error, norm = (out - ref).norm(dim=-1), ref.norm(dim=-1)
    return torch.where(norm == 0, torch.where(error == 0, 0.0, math.inf), error / norm)


def assert_rows_close(out, ref, dtype, *, kind="output", magnitude=None, logit_range=0.0, absolute=None):
    """The row rule, and for gradients in half precision the whole-tensor rule.

    kind: "output", "heavy" for the output of heavy-tailed values, or "gradient".
    magnitude: for gradients, the sums of the absolute values of the terms of `ref` (`CANCELLED`).
    logit_range: the largest sum of the absolute values of the terms of a logit. The error of a float32 logit and the
        relative error of its weight are a few u times this sum.
    absolute: for gradients, an error that is allowed in any row, such as that of weights treated as 0.
    """
    assert out.dtype == dtype, f"{out.dtype} instead of {dtype}"
    assert out.shape == ref.shape, f"shape {tuple(out.shape)} instead of {tuple(ref.shape)}"
    if out.numel() == 0:
        return
    unit = UNIT[dtype]
    errors = row_errors(out, ref) / unit
    if absolute is not None:
        errors = (errors - absolute.norm(dim=-1) / ref.double().norm(dim=-1) / unit).clamp(min=0)
    if magnitude is not None:
        norm = ref.double().norm(dim=-1)
        smallest = SUBNORMAL_MARGIN * torch.finfo(dtype).smallest_normal
        errors = errors[(norm > CANCELLED * magnitude.double().norm(dim=-1)) & (norm > smallest)]
        if errors.numel() == 0:
            return
    assert not errors.isnan().any(), f"{int(errors.isnan().sum())} of {errors.numel()} rows hold NaN"
    limit = WORST_ROW[kind]
    if kind == "output" and out.shape[-1] <= 32:
        limit = WORST_ROW_NARROW
    if dtype not in HALF:
        limit = WORST_ROW_FLOAT32 + 4 * logit_range
    worst = errors.max().item()
    assert worst <= limit, f"worst row {worst:.3f} u, limit {limit} u"
    if kind == "output" and dtype in HALF and errors.numel() >= MEDIAN_NEEDS_ROWS:
        median = errors.median().item()
        assert median <= MEDIAN_ROW, f"median row {median:.3f} u, limit {MEDIAN_ROW} u"
    if kind == "gradient" and dtype in HALF:
        whole = ((out.double() - ref).norm() / ref.norm()).item() / unit
        assert whole <= WHOLE_TENSOR, f"whole tensor {whole:.3f} u, limit {WHOLE_TENSOR} u"


def assert_elements_close(out, ref, magnitude, *, logit_range=0.0, absolute=0.0):
    """The element rule: |out - ref| <= 8 u magnitude everywhere, and no NaN or Inf where the reference has none.

    magnitude: max |v| for an output; for a gradient the sums of the absolute values of its terms.
    logit_range: as in `assert_rows_close`.
    absolute: an error that is allowed whatever the magnitude.
    """
    assert out.shape == ref.shape, f"shape {tuple(out.shape)} instead of {tuple(ref.shape)}"
    spoilt = (~out.isfinite() & ref.isfinite()).sum().item()
    assert spoilt == 0, f"{spoilt} of {out.numel()} elements are not finite"
    relative = ELEMENT * UNIT[out.dtype] + 4 * UNIT[torch.float32] * logit_range
    # Subnormal numbers are spaced evenly: the result is rounded to them once, and so is every float32 term.
    spacing = [torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps for dtype in (out.dtype, torch.float32)]
    excess = (out.double() - ref).abs() - relative * magnitude - absolute - spacing[0] - 1000 * spacing[1]
    if out.numel() > 0 and excess.max() > 0:
        index = tuple(torch.unravel_index(excess.argmax(), excess.shape))
        place = [int(i) for i in index]
        raise AssertionError(f"at {place}: {out[index].item():.9g} instead of {ref[index].item():.9g}")


def assert_lse_close(lse, ref):
    """The log-sum-exp rule; -inf where, and only where, the reference has it."""
    assert lse.shape == ref.shape, f"shape {tuple(lse.shape)} instead of {tuple(ref.shape)}"
    empty = ref == -math.inf
    assert torch.equal(lse == -math.inf, empty), "rows that see no key differ"
    if empty.all():
        return
    lse, ref = lse.double()[~empty], ref.double()[~empty]
    error, limit = (lse - ref).abs().max().item(), LSE * max(1.0, ref.abs().max().item())
    assert error <= limit, f"log-sum-exp off by {error:.3g}, limit {limit:.3g}"


def assert_no_worse(out, naive, exact, factor=2):
    """The relative rule: error at most `factor` times that of plain torch rounding each step to the tested dtype.

    Both the largest error and the error of the whole tensor count. One rounding of the result is always allowed, since
    a plain result may be exact by chance. `naive` may be several results that round at other steps: the worst counts.
    """
    naive = naive if isinstance(naive, list | tuple) else [naive]
    assert {out.dtype} == {result.dtype for result in naive}, f"{out.dtype} instead of {naive[0].dtype}"
    assert out.shape == exact.shape, f"shape {tuple(out.shape)} instead of {tuple(exact.shape)}"
    if out.numel() == 0:
        return
    unit = UNIT[out.dtype]
    for name, size in (("largest error", lambda x: x.abs().max()), ("whole tensor", torch.linalg.vector_norm)):
        error, rounding = (size(x).item() for x in (out.double() - exact, exact))
        plain = max(size(result.double() - exact).item() for result in naive)
        limit = factor * plain + unit * rounding
        assert error <= limit, f"{name} {error:.3g}, limit {limit:.3g}: plain torch has {plain:.3g}"


def gradient_magnitudes(dout, q, k, v, out, softmax_lse, *, softmax_scale, weight=None, **options):
    """Sums of the absolute values of the terms of dq, dk, dv of `attention`: rounding errors are relative to them.

    The terms are weight * (dout * v - dout * out) * (k or q), docs/model.md#16.3. Arguments are those of the reference.

    weight: this weight for each visible pair instead of that of the softmax.
    """
    num_kv_heads = k.shape[2]
    logits, hidden = reference.masked_logits(q, k, softmax_scale=softmax_scale, **{"first_query": None, **options})
    weights = (logits - softmax_lse.unflatten(1, (num_kv_heads, -1))[..., None]).exp()
    weights = (weights if weight is None else torch.full_like(weights, weight)).masked_fill(hidden, 0)
    dout, q, k, v, out = (t.abs() for t in (dout, q, k, v, out))
    delta = (dout * out).sum(-1).transpose(1, 2).unflatten(1, (num_kv_heads, -1))
    q, dout = q.unflatten(2, (num_kv_heads, -1)), dout.unflatten(2, (num_kv_heads, -1))
    terms = weights * (torch.einsum("bqhgd,bkhd->bhgqk", dout, v) + delta[..., None]) * abs(softmax_scale)
    dq = torch.einsum("bhgqk,bkhd->bqhgd", terms, k).flatten(2, 3)
    return dq, torch.einsum("bhgqk,bqhgd->bkhd", terms, q), torch.einsum("bhgqk,bqhgd->bkhd", weights, dout)


@contextlib.contextmanager
def nan_filled():
    """In the block, `torch.empty` and similar functions return NaN (integers: their largest value), so that tests
    notice unwritten elements."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
