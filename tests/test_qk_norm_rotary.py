"""qk_norm_rotary: backends against the float64 reference, and that against docs/model.md#5.2, #5.3 and the oracle."""

import math
import re

import pytest
import torch
from numerics import UNIT, assert_elements_close, assert_rows_close
from op_cases import (
    DTYPES,
    assert_compiles,
    assert_functional_gradient,
    gradients,
    in_two_threads,
    name_of,
    random_like,
    skip_for,
)
from op_cases import QkNormRotaryCase as Case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from andromeda.ops import qk_norm_rotary as module
from andromeda.ops._select import BACKENDS
from andromeda.ops.attention import attention
from andromeda.ops.qk_norm_rotary import qk_norm_rotary, unsupported
from andromeda.reference import qk_norm_rotary as reference

pytestmark = pytest.mark.usefixtures("nan_filled")

CASES = [
    Case("model", num_heads=24, head_dim=128, rotary_dim=64),
    Case("all_rotated", rotary_dim=64),
    Case("no_rotation", rotary_dim=0, xpos=False),
    Case("rotation_without_xpos", xpos=False),
    Case("no_norm", normalize=False),
    Case("no_scale", scaled=False),
    Case("rotation_only", normalize=False, scaled=False),
    Case("identity", normalize=False, scaled=False, rotary_dim=0, xpos=False),
    Case("cached", batch=1, seqlen_q=3, seqlen_k=130, position=1000),
    Case("one_token", seqlen_q=1, seqlen_k=1, position=7),
    Case("more_queries_than_keys", seqlen_q=9, seqlen_k=2),
    Case("many_key_heads", num_kv_heads=3),
    Case("rotation_ends_inside_a_vector", head_dim=40, rotary_dim=6),
    Case("rotation_ends_inside_the_last_vector", head_dim=36, rotary_dim=34),
    Case("head_dim_1", head_dim=1, rotary_dim=0, xpos=False),
    Case("head_dim_2", head_dim=2, rotary_dim=2),
    Case("head_dim_7", head_dim=7, rotary_dim=4),
    Case("head_dim_33", head_dim=33, rotary_dim=16),
    Case("many_tokens", batch=3, seqlen_q=257, seqlen_k=257, head_dim=32, rotary_dim=16),
    Case("multiplied", num_heads=24, head_dim=128, rotary_dim=64, q_multiplier=128**-0.5 / math.log(2)),
    Case("multiplied_without_norm", normalize=False, q_multiplier=0.13),
    Case("multiplied_without_scale", scaled=False, q_multiplier=10 / math.log(2)),
    Case("multiplied_identity", normalize=False, scaled=False, rotary_dim=0, xpos=False, q_multiplier=3.3),
]
PLAIN = Case("plain")


def scores(q, k):
    return torch.einsum("b q h d, b k h d -> b h q k", q, k.expand(-1, -1, q.shape[2], -1))


# ---- against the float64 reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_forward(backend, tensors_for, case, dtype):
    q, k, q_scale, k_scale = tensors_for(case, dtype)
    outputs = qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, backend=backend, **case.options())
    q_scale, k_scale = (None if scale is None else scale.double() for scale in (q_scale, k_scale))
    exact = reference.qk_norm_rotary(q.double(), k.double(), q_scale=q_scale, k_scale=k_scale, **case.options())
    for out, x, ref in zip(outputs, (q, k), exact, strict=True):
        assert out.shape == x.shape and out.dtype == dtype and out.device == x.device and out.is_contiguous()
        assert_rows_close(out, ref, dtype)


STEP_CASES = [
    Case("token", seqlen_q=1, seqlen_k=1, head_dim=128, rotary_dim=64, position=4096, q_multiplier=14.4),
    Case("tokens", batch=3, seqlen_q=2, seqlen_k=5, position=30),
    Case("rotation_ends_inside_a_vector", seqlen_q=1, seqlen_k=1, head_dim=40, rotary_dim=6),
    Case("without_xpos", seqlen_q=1, seqlen_k=1, xpos=False),
    Case("no_rotation", seqlen_q=1, seqlen_k=1, rotary_dim=0, xpos=False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", STEP_CASES, ids=name_of)
def test_step(backend, tensors_for, case, dtype):
    """The call with a step is the one at a later position and the same origin, bit for bit."""
    q, k, q_scale, k_scale = tensors_for(case, dtype)
    options = {**case.options(), "origin": case.position + 600 if case.xpos else None, "backend": backend}
    position = options.pop("position")
    for value in (0, 1, 77, 1024, module.MAX_STEP if dtype != torch.float16 or not case.xpos else 2047):
        step = torch.tensor([value], dtype=torch.int32, device=q.device)
        moved = qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, position=position, step=step, **options)
        later = qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, position=position + value, **options)
        assert all(map(torch.equal, moved, later))


def test_step_is_checked(backend, tensors_for, device):
    q, k, *_ = tensors_for(PLAIN, torch.float32)
    three = torch.tensor([3], dtype=torch.int32, device=device)
    for wrong, error, message in (
        (3, TypeError, "step must be a tensor, got int"),
        (three.long(), TypeError, r"step\.dtype must be int32, got int64"),
        (three[0], ValueError, r"step must have shape \(1,\) = \(1,\), got \(\)"),
    ):
        with pytest.raises(error, match=message):
            qk_norm_rotary(q, k, step=wrong, backend=backend)
    if device.type == "cpu":
        for value in (-1, 8192):
            with pytest.raises(ValueError, match=f"step must be between 0 and 8191, got {value}"):
                qk_norm_rotary(q, k, step=three * 0 + value, backend=backend)
    with pytest.raises(ValueError, match="step must be None where gradients are recorded"):
        qk_norm_rotary(q.requires_grad_(), k, step=three, backend=backend)


def magnitudes(x, scale, dout, table, normalize):
    """Sums of |term| of dx and dscale (docs/model.md#16.3): rounding errors are relative to them."""
    x, dout = x.double(), dout.double()
    unrotated = reference.rotate(dout, table, transpose=True)
    rotary_dim = table.shape[-1]
    pairs = unrotated[..., :rotary_dim].unflatten(-1, (rotary_dim // 2, 2))
    pair_norms = pairs.norm(dim=-1, keepdim=True).expand_as(pairs).flatten(-2)
    size = torch.cat((pair_norms, unrotated[..., rotary_dim:].abs()), dim=-1)
    norm = x.norm(dim=-1, keepdim=True) if normalize else torch.ones_like(x[..., :1])
    x_hat = (x / norm).abs()
    e = size if scale is None else size * scale.double().abs()
    along = x_hat * (x_hat * e).sum(-1, keepdim=True) if normalize else torch.zeros_like(x)
    return (e + along) / norm, (size * x_hat).sum((0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_backward(backend, tensors_for, case, dtype):
    tensors = tensors_for(case, dtype)
    douts = random_like(tensors[:2])

    def run(function, **kwargs):
        return lambda q, k, q_scale, k_scale: function(
            q, k, q_scale=q_scale, k_scale=k_scale, **case.options(), **kwargs
        )

    found = gradients(run(qk_norm_rotary, backend=backend), tensors, douts)
    exact = gradients(
        run(reference.qk_norm_rotary),
        [None if t is None else t.double() for t in tensors],
        [dout.double() for dout in douts],
    )
    tables = reference.rotary_tables(
        case.seqlen_q, case.seqlen_k, case.rotary_dim, case.xpos, case.position, origin=None
    )
    of_q = case.q_multiplier * douts[0].double()  # the gradient of q before it was multiplied
    (dq_size, dq_scale_size), (dk_size, dk_scale_size) = (
        magnitudes(*operand, case.normalize)
        for operand in zip(tensors[:2], tensors[2:], (of_q, douts[1]), tables, strict=True)
    )
    sizes = (dq_size, dk_size, dq_scale_size, dk_scale_size)[: len(found)]
    given = [t for t in tensors if t is not None]
    for gradient, ref, tensor, size in zip(found, exact, given, sizes, strict=True):
        assert gradient.shape == tensor.shape and gradient.dtype == tensor.dtype
        assert_rows_close(gradient, ref, tensor.dtype, kind="gradient", magnitude=size)
        assert_elements_close(gradient, ref, size)


def test_default_backend_is_the_first_that_can():
    q, k, *_ = PLAIN.tensors(torch.float32)
    first = next(name for name in BACKENDS if not unsupported(name, q, k))
    for default, chosen in zip(qk_norm_rotary(q, k), qk_norm_rotary(q, k, backend=first), strict=True):
        assert torch.equal(default, chosen)


def test_float64_takes_the_reference():
    q, k, q_scale, k_scale = PLAIN.tensors(torch.float64)
    options = {"q_scale": q_scale, "k_scale": k_scale, **PLAIN.options()}
    for out, ref in zip(qk_norm_rotary(q, k, **options), reference.qk_norm_rotary(q, k, **options), strict=True):
        assert torch.equal(out, ref)


def test_reference_computes_in_the_dtype_it_is_handed():
    q, k, *_ = PLAIN.tensors(torch.bfloat16)
    assert [out.dtype for out in reference.qk_norm_rotary(q, k, **PLAIN.options())] == [torch.bfloat16] * 2


# ---- the reference against docs/model.md and x-transformers ----------------------------------------------------------


@pytest.mark.parametrize("rotary_dim", [0, 8, 16])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(7, 7), (3, 12), (1, 5)])
def test_score_is_the_product_of_the_specification(seqlen_q, seqlen_k, rotary_dim):
    case = Case("", batch=1, seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=1, head_dim=16, position=40)
    q, k, q_scale, k_scale = case.tensors(torch.float64)
    q_out, k_out = qk_norm_rotary(
        q, k, q_scale=q_scale, k_scale=k_scale, rotary_dim=rotary_dim, xpos=rotary_dim > 0, position=40
    )
    found = scores(q_out, k_out)[0, 0]
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            delta = i + seqlen_k - seqlen_q - j
            q_til = (q[0, i, 0] / math.sqrt(sum(x * x for x in q[0, i, 0].tolist())) * q_scale[0]).tolist()
            k_til = (k[0, j, 0] / math.sqrt(sum(x * x for x in k[0, j, 0].tolist())) * k_scale[0]).tolist()
            expected = sum(q_til[u] * k_til[u] for u in range(rotary_dim, 16))
            for t in range(rotary_dim // 2):
                omega, zeta = 10000 ** (-2 * t / rotary_dim), (2 * t + 0.4 * rotary_dim) / (1.4 * rotary_dim)
                q0, q1, k0, k1 = *q_til[2 * t : 2 * t + 2], *k_til[2 * t : 2 * t + 2]
                along, across = q0 * k0 + q1 * k1, q1 * k0 - q0 * k1
                expected += zeta ** (delta / 512) * (along * math.cos(delta * omega) - across * math.sin(delta * omega))
            assert found[i, j].item() == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize("xpos", [True, False], ids=["xpos", "rotary"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "rotary_dim"), [(9, 9, 8), (4, 700, 32), (1, 33, 4)])
def test_rotation_is_that_of_x_transformers(seqlen_q, seqlen_k, rotary_dim, xpos):
    x_transformers = pytest.importorskip("x_transformers.x_transformers")
    oracle = x_transformers.RotaryEmbedding(rotary_dim, use_xpos=xpos)
    twice_t = torch.arange(0, rotary_dim, 2, dtype=torch.float64)
    oracle.inv_freq = 10000.0 ** (-twice_t / rotary_dim)  # its own buffers are rounded to float32
    if xpos:
        oracle.scale = (twice_t + 0.4 * rotary_dim) / (1.4 * rotary_dim)
    freqs, scale = oracle.forward_from_seq_len(seqlen_k)

    case = Case("", seqlen_q=seqlen_q, seqlen_k=seqlen_k, scaled=False)
    q, k, *_ = case.tensors(torch.float64)
    options = {"normalize": False, "rotary_dim": rotary_dim, "xpos": xpos, "origin": seqlen_k // 2}
    q_out, k_out = qk_norm_rotary(q, k, **options)
    for out, x, factor in ((q_out, q, scale), (k_out, k, 1 / scale)):
        expected = x_transformers.apply_rotary_pos_emb(x.transpose(1, 2), freqs, factor).transpose(1, 2)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-11)


def test_norm_has_a_floor(backend, tensors_for):
    q, k, *_ = tensors_for(PLAIN)
    q[0, 0] = 0
    q[0, 1] *= 1e-14
    dout = random_like([q])[0]
    q.requires_grad_()
    q_out, _ = qk_norm_rotary(q, k, backend=backend)
    (dq,) = torch.autograd.grad(q_out, q, dout)
    # Below the floor the map is linear: x / 1e-12.
    assert torch.equal(q_out[0, 0], torch.zeros_like(q_out[0, 0]))
    torch.testing.assert_close(q_out[0, 1], q[0, 1] * 1e12)
    torch.testing.assert_close(dq[0, :2], dout[0, :2] * 1e12)
    assert dq[0, 2:].abs().max() < 10


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_bad_number_stays_in_its_row(backend, tensors_for, value):
    q, k, q_scale, k_scale = tensors_for(PLAIN)
    options = {"q_scale": q_scale, "k_scale": k_scale, "backend": backend, **PLAIN.options()}
    q_good, k_good = qk_norm_rotary(q, k, **options)
    q[1, 3, 1, 5] = value
    q_bad, k_bad = qk_norm_rotary(q, k, **options)
    assert q_bad[1, 3, 1, 5].isnan()
    assert not math.isnan(value) or q_bad[1, 3, 1].isnan().all()
    q_bad[1, 3, 1] = q_good[1, 3, 1]
    assert torch.equal(q_bad, q_good) and torch.equal(k_bad, k_good)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["norm", "no_norm"])
def test_a_row_without_gradient_adds_nothing(backend, tensors_for, normalize, value):
    """A row whose gradient is 0, such as a hidden key, changes no gradient, whatever it holds."""
    q, k, q_scale, k_scale = tensors_for(PLAIN)
    options = {"normalize": normalize, "rotary_dim": 8, "backend": backend}
    douts = random_like([q, k])
    douts[0][1, 3], douts[1][0, 2] = 0.0, 0.0

    def gradients(number):
        leaves = [t.clone() for t in (q, k, q_scale, k_scale)]
        leaves[0][1, 3, 1], leaves[1][0, 2, :, 5] = number, number
        leaves = [t.requires_grad_() for t in leaves]
        outputs = qk_norm_rotary(*leaves[:2], q_scale=leaves[2], k_scale=leaves[3], **options)
        return torch.autograd.grad(outputs, leaves, douts)

    for found, expected in zip(gradients(value), gradients(1.0), strict=True):
        assert torch.equal(found, expected) and found.isfinite().all()


# ---- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides_do_not_matter(backend, tensors_for, dtype):
    """Exact: operands that are transposed, expanded, or sliced from NaN at an odd offset equal contiguous ones."""
    q, k, q_scale, k_scale = tensors_for(PLAIN, dtype)
    k = k[:1].expand(2, -1, 3, -1)
    k_scale = k_scale.expand(3, -1)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    surrounding = torch.full((2, 20, 5, 77), math.nan, dtype=dtype, device=q.device)
    sliced = surrounding[:, 2:19, 1:4, 5:69]
    sliced.copy_(q)
    douts = random_like([q, k])

    def run(q, k, q_scale, k_scale):
        return qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, backend=backend, **PLAIN.options())

    dense = (q, k.contiguous(), q_scale, k_scale.contiguous())
    expected = (*run(*dense), *gradients(run, dense, douts))
    for x in (transposed, sliced):
        given = (x, k, q_scale, k_scale)
        assert not x.is_contiguous()
        for found, ref in zip((*run(*given), *gradients(run, given, douts)), expected, strict=True):
            # Rows that are not aligned to 16 bytes are summed in another order; so are sums of torch on a GPU.
            if (backend in ("cuda", "triton") and x is sliced) or (backend == "reference" and q.is_cuda):
                assert (found.double() - ref).norm() <= 32 * UNIT[found.dtype] * ref.double().norm()
            else:
                assert torch.equal(found, ref)
    assert surrounding.isnan().sum() == surrounding.numel() - q.numel()


@pytest.mark.parametrize("normalize", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_multiplying_by_a_power_of_two_is_exact(backend, tensors_for, dtype, normalize):
    """q and its gradients are those without q_multiplier times the number, and those of k the same bits."""
    tensors = tensors_for(PLAIN, dtype)
    douts = random_like(tensors[:2])
    options = {**PLAIN.options(), "normalize": normalize, "backend": backend}

    def run(number):
        def transform(q, k, q_scale, k_scale):
            return qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, **options | {"q_multiplier": number})

        return *transform(*tensors), *gradients(transform, tensors, douts)

    plain = run(1.0)
    for number in (8.0, 0.5):
        of_q, of_k = (0, 2, 4), (1, 3, 5)
        found = run(number)
        for index in of_q:
            # Half precision is finer below its normal numbers.
            normal = plain[index].abs() > 4 * torch.finfo(plain[index].dtype).tiny
            assert torch.equal(found[index][normal], (plain[index] * number)[normal]) and normal.float().mean() > 0.99
        assert all(torch.equal(found[index], plain[index]) for index in of_k)


def test_an_int_multiplies_too(backend, tensors_for):
    q, k, *_ = tensors_for(PLAIN)
    found, expected = (qk_norm_rotary(q, k, backend=backend, q_multiplier=number)[0] for number in (3, 3.0))
    assert torch.equal(found, expected)


def test_a_multiplied_query_takes_the_softmax_scale():
    """With softmax_scale / ln(2) in the queries and ln(2) in attention nothing changes: neither log-sum-exps, the bias,
    the promise of logit_bound, nor gradients."""
    tensors = Case("", seqlen_q=30, seqlen_k=40).tensors(torch.float64)
    v, dout = random_like([tensors[1], tensors[0]])
    options = {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.0, 0.1]), "return_lse": True}
    options |= {"logit_bound": torch.full((3,), 90.0)}

    def run(q_multiplier, softmax_scale):
        leaves = [tensor.requires_grad_() for tensor in (*tensors, v)]
        q, k, q_scale, k_scale, _ = leaves
        q, k = qk_norm_rotary(
            q, k, q_scale=q_scale, k_scale=k_scale, rotary_dim=32, xpos=True, q_multiplier=q_multiplier
        )
        out, softmax_lse = attention(q, k, v, softmax_scale=softmax_scale, **options)
        return out, softmax_lse, *torch.autograd.grad(out, leaves, dout)

    for found, expected in zip(run(0.37 / math.log(2), math.log(2)), run(1.0, 0.37), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


def test_multiplied_queries_fit_float16(backend, tensors_for):
    """No element of a normalised query is above 1: the model's largest scale, 10 / ln(2), and the largest xPos factor
    of float16, 2**8, leave a factor of 17 to the largest number."""
    q, k, *_ = tensors_for(Case("", seqlen_q=1, seqlen_k=1), torch.float16)
    q.zero_()[..., 0] = 1
    options = {"rotary_dim": 32, "xpos": True, "origin": 2266, "q_multiplier": 10 / math.log(2), "backend": backend}
    q_out, _ = qk_norm_rotary(q, k, **options)
    assert 3600 < q_out.max() < 65504 / 17


def test_strided_gradients(backend, tensors_for):
    q, k, *_ = tensors_for(PLAIN)
    q.requires_grad_()
    q_out, _ = qk_norm_rotary(q, k, backend=backend, **PLAIN.options())
    (dense,) = torch.autograd.grad(q_out, q, torch.ones_like(q_out), retain_graph=True)
    (of_sum,) = torch.autograd.grad(q_out.sum(), q, retain_graph=True)  # strides (0, 0, 0, 0)
    transposed = torch.ones_like(q_out).transpose(1, 2).contiguous().transpose(1, 2)
    (strided,) = torch.autograd.grad(q_out, q, transposed)
    assert torch.equal(of_sum, dense) and torch.equal(strided, dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_scores_do_not_depend_on_the_first_position(backend, tensors_for, dtype):
    """Shifting all positions changes no score (docs/testing.md#laws)."""
    q, k, q_scale, k_scale = tensors_for(PLAIN, dtype)
    options = {"q_scale": q_scale, "k_scale": k_scale, "backend": backend, "rotary_dim": 32, "xpos": True}
    here = scores(*(x.double() for x in qk_norm_rotary(q, k, position=0, **options)))
    there = scores(*(x.double() for x in qk_norm_rotary(q, k, position=10**5, **options)))
    # Both round q and k once: every score moves by at most 2 u |q| |k| on either side.
    u = torch.finfo(dtype).eps / 2
    norms = q_scale.abs().amax().item() * k_scale.abs().amax().item()
    assert (here - there).abs().max() <= 5 * u * norms
    assert here.abs().max() > 0.5


@pytest.mark.parametrize("origin", [-200, 0, 500])
def test_scores_do_not_depend_on_the_origin(origin):
    q, k, *_ = PLAIN.tensors(torch.float64)
    default = scores(*qk_norm_rotary(q, k, rotary_dim=32, xpos=True))
    torch.testing.assert_close(scores(*qk_norm_rotary(q, k, rotary_dim=32, xpos=True, origin=origin)), default)


@pytest.mark.parametrize("new", [1, 4, 16])
def test_keys_of_one_origin_can_be_cached(new):
    q, k, *_ = PLAIN.tensors(torch.float64)
    options = {"rotary_dim": 32, "xpos": True, "origin": 9}
    q_all, k_all = qk_norm_rotary(q, k, **options)
    q_new, k_new = qk_norm_rotary(q[:, -new:], k[:, -new:], position=17 - new, **options)
    torch.testing.assert_close(q_new, q_all[:, -new:], rtol=0, atol=1e-14)
    torch.testing.assert_close(k_new, k_all[:, -new:], rtol=0, atol=1e-14)


def test_default_origin_is_the_middle_of_the_queries():
    q, k, *_ = Case("", seqlen_q=6, seqlen_k=20, scaled=False).tensors(torch.float64)
    default = qk_norm_rotary(q, k, rotary_dim=32, xpos=True, position=100)
    middle = qk_norm_rotary(q, k, rotary_dim=32, xpos=True, position=100, origin=117)
    assert all(torch.equal(a, b) for a, b in zip(default, middle, strict=True))


def test_positive_factors_vanish_under_the_norm(backend, tensors_for):
    """Exact for powers of two."""
    q, k, *_ = tensors_for(PLAIN)
    factors = torch.ldexp(torch.ones(2, 17, 1, 1), torch.arange(17).view(1, 17, 1, 1) - 8).to(q)
    expected = qk_norm_rotary(q, k, backend=backend, **PLAIN.options())
    found = qk_norm_rotary(q * factors, k * factors, backend=backend, **PLAIN.options())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradient_under_the_norm_is_orthogonal(backend, tensors_for):
    tensors = tensors_for(PLAIN)
    q, k = tensors[:2]
    dq, dk, *_ = gradients(
        lambda q, k, q_scale, k_scale: qk_norm_rotary(
            q, k, q_scale=q_scale, k_scale=k_scale, backend=backend, **PLAIN.options()
        ),
        tensors,
        random_like([q, k]),
    )
    for x, dx in ((q, dq), (k, dk)):
        along = (x * dx).sum(-1).abs() / (x.norm(dim=-1) * dx.norm(dim=-1))
        assert along.max() < 1e-6


def test_batch_entries_and_heads_are_independent(backend, tensors_for):
    """Exact: permuting entries or heads permutes the result (docs/testing.md#laws)."""
    q, k, q_scale, k_scale = tensors_for(PLAIN)
    q_out, k_out = qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, backend=backend, **PLAIN.options())
    heads = torch.tensor([2, 0])
    q_part, k_part = qk_norm_rotary(
        q[1:, :, heads], k[1:], q_scale=q_scale[heads], k_scale=k_scale, backend=backend, **PLAIN.options()
    )
    assert torch.equal(q_part, q_out[1:, :, heads]) and torch.equal(k_part, k_out[1:])


@pytest.mark.parametrize(
    "shape", [(0, 5, 3, 16), (2, 0, 3, 16), (2, 5, 0, 16)], ids=["no_batch", "no_tokens", "no_heads"]
)
def test_empty(backend, device, shape):
    x = torch.empty(shape, device=device, requires_grad=True)
    skip_for(backend, unsupported(backend, x, x))
    scale = torch.ones(shape[2:], device=x.device, requires_grad=True)
    q_out, k_out = qk_norm_rotary(x, x, q_scale=scale, rotary_dim=8, xpos=True, backend=backend)
    dx, dscale = torch.autograd.grad([q_out.sum(), k_out.sum()], [x, scale])
    assert q_out.shape == k_out.shape == dx.shape == shape
    assert torch.equal(dscale, torch.zeros_like(scale))


def test_no_new_queries(backend, tensors_for):
    q, k, *_ = tensors_for(Case("", seqlen_q=0))
    q_out, k_out = qk_norm_rotary(q, k, rotary_dim=32, xpos=True, backend=backend)
    assert q_out.shape == q.shape and k_out.isfinite().all()


# ---- threads --------------------------------------------------------------------------------------------------------


LARGE = Case("large", seqlen_q=300, seqlen_k=300, num_heads=5, head_dim=48, rotary_dim=24)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_result_does_not_depend_on_the_number_of_threads(num_threads, dtype):
    """Exact: forward and all four gradients, twice with each number of threads."""
    tensors = LARGE.tensors(dtype)
    skip_for("cpu", unsupported("cpu", *tensors[:2]))
    douts = random_like(tensors[:2])

    def run(q, k, q_scale, k_scale):
        return qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, backend="cpu", **LARGE.options())

    results = []
    for threads in (1, 2, 3, 2):
        num_threads(threads)
        results.append((*run(*tensors), *gradients(run, tensors, douts)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_two_runs_agree(backend, tensors_for):
    tensors = tensors_for(LARGE)
    douts = random_like(tensors[:2])

    def run(q, k, q_scale, k_scale):
        return qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, backend=backend, **LARGE.options())

    first, second = ((*run(*tensors), *gradients(run, tensors, douts)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_two_callers_at_once(backend, tensors_for):
    tensors = [tensors_for(LARGE, seed=seed) for seed in range(2)]

    def run(index, repeats):
        q, k, q_scale, k_scale = tensors[index]
        options = {**LARGE.options(), "position": index}
        return [
            qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, backend=backend, **options) for _ in range(repeats)
        ]

    expected = [run(index, 1)[0] for index in range(2)]
    for results, expected_outputs in zip(in_two_threads(lambda index: run(index, 10)), expected, strict=True):
        for outputs in results:
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected_outputs, strict=True))


# ---- torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("normalize", [True, False], ids=["norm", "no_norm"])
def test_gradcheck(normalize, scaled):
    case = Case("", seqlen_q=2, seqlen_k=3, num_heads=2, head_dim=6, scaled=scaled)
    tensors = [None if t is None else t.requires_grad_() for t in case.tensors(torch.float64)]

    def run(q, k, q_scale, k_scale):
        return qk_norm_rotary(
            *(q, k),
            q_scale=q_scale,
            k_scale=k_scale,
            normalize=normalize,
            rotary_dim=4,
            xpos=True,
            position=50,
            q_multiplier=1.7,
        )

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
def test_opcheck(backend, tensors_for, scaled):
    q, k, q_scale, k_scale = tensors_for(Case("", seqlen_k=20, scaled=scaled))
    arguments = (q, k, q_scale, k_scale, True, 32, True, 3, 11, backend, None, 14.4)
    torch.library.opcheck(module.FORWARD, arguments)
    torch.library.opcheck(module.BACKWARD, (*random_like([q, k]), *arguments))


def test_opcheck_step(backend, tensors_for, device):
    step = torch.tensor([5], dtype=torch.int32, device=device)
    arguments = (*tensors_for(PLAIN), True, 32, True, 3, 11, backend, step)
    torch.library.opcheck(module.FORWARD, arguments)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(backend, tensors_for, dynamic):
    q, k, q_scale, k_scale = tensors_for(PLAIN)

    def step(q, k, q_scale, k_scale, position):
        q_out, k_out = qk_norm_rotary(
            *(q, k),
            q_scale=q_scale,
            k_scale=k_scale,
            rotary_dim=32,
            xpos=True,
            position=position,
            q_multiplier=14.4,
            backend=backend,
        )
        return (q_out * k_out).sum()

    lengths = ((17, 2), (17, 3), (11, 5))
    calls = [((q[:, :seqlen], k[:, :seqlen], q_scale, k_scale), position) for seqlen, position in lengths]
    assert_compiles(step, calls, dynamic)


def test_func_grad(backend, tensors_for):
    tensors = tensors_for(PLAIN)

    def loss(q, k, q_scale, k_scale):
        q_out, k_out = qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, backend=backend, **PLAIN.options())
        return (q_out * k_out).sum()

    assert_functional_gradient(loss, tensors)


def test_second_derivatives_of_kernels_and_tangents_are_refused(backend, tensors_for):
    q, k, q_scale, _ = tensors_for(PLAIN)
    leaf = q.clone().requires_grad_()
    (dq,) = torch.autograd.grad(qk_norm_rotary(leaf, k, backend=backend)[0].sum(), leaf, create_graph=True)
    if backend == "reference":
        dq.square().sum().backward()
        assert leaf.grad.any()
    else:
        with pytest.raises(NotImplementedError, match=r'qk_norm_rotary: .* again; pass backend="reference"'):
            (dq.sum() + leaf.sum()).backward()
    with pytest.raises(NotImplementedError, match="qk_norm_rotary: forward-mode"):  # dropped, the tangent would be zero
        torch.func.jvp(lambda q: qk_norm_rotary(q, k, backend=backend), (q,), (q,))
    with pytest.raises(NotImplementedError, match="qk_norm_rotary: forward-mode"):
        torch.func.jvp(lambda scale: qk_norm_rotary(q, k, q_scale=scale, backend=backend), (q_scale,), (q_scale,))


def test_only_requested_tensors_get_a_gradient(backend, tensors_for):
    q, k, q_scale, _ = tensors_for(PLAIN)
    assert all(out.grad_fn is None for out in qk_norm_rotary(q, k, q_scale=q_scale, backend=backend))
    q_scale.requires_grad_()
    q_out, k_out = qk_norm_rotary(q, k, q_scale=q_scale, backend=backend)
    (q_out.sum() + k_out.sum()).backward()
    assert q_scale.grad is not None and q.grad is None and k.grad is None
    with torch.no_grad():
        assert qk_norm_rotary(q, k, q_scale=q_scale, backend=backend)[0].grad_fn is None


def test_scales_may_have_the_dtype_of_the_model(backend, tensors_for):
    q, k, q_scale, k_scale = tensors_for(PLAIN, torch.bfloat16)
    q_scale, k_scale = (scale.bfloat16().requires_grad_() for scale in (q_scale, k_scale))
    q_out, k_out = qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, backend=backend)
    expected = qk_norm_rotary(q, k, q_scale=q_scale.float(), k_scale=k_scale.float(), backend=backend)
    assert torch.equal(q_out, expected[0]) and torch.equal(k_out, expected[1])
    (q_out.sum() + k_out.sum()).backward()
    assert q_scale.grad.dtype == k_scale.grad.dtype == torch.bfloat16


def test_autocast_keeps_a_common_dtype_and_promotes_mixed_ones(backend, tensors_for):
    q, k, *_ = tensors_for(PLAIN)
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        same = qk_norm_rotary(q, k, backend=backend, **PLAIN.options())
        mixed = qk_norm_rotary(q, k.bfloat16(), backend=backend, **PLAIN.options())
    expected = qk_norm_rotary(q, k, backend=backend, **PLAIN.options())
    assert all(torch.equal(a, b) for a, b in zip(same, expected, strict=True))
    rounded = qk_norm_rotary(q.bfloat16(), k.bfloat16(), backend=backend, **PLAIN.options())
    assert all(torch.equal(a, b) for a, b in zip(mixed, rounded, strict=True))


def test_meta_and_fake_tensors():
    q, k, *_ = PLAIN.tensors(torch.bfloat16)
    for out, x in zip(qk_norm_rotary(q.to("meta"), k.to("meta"), **PLAIN.options()), (q, k), strict=True):
        assert out.device.type == "meta" and out.shape == x.shape and out.dtype == x.dtype
    with FakeTensorMode() as mode:
        fakes = qk_norm_rotary(mode.from_tensor(q), mode.from_tensor(k), **PLAIN.options())
    for out, x in zip(fakes, (q, k), strict=True):
        assert out.shape == x.shape and out.dtype == x.dtype


def test_tables_serve_every_mode(backend, tensors_for):
    """Tables made under inference mode, a fake mode, func.grad or another default device serve an ordinary call."""
    q, k, *_ = tensors_for(PLAIN)
    options = {"rotary_dim": 32, "xpos": True, "backend": backend}
    module.cached_tables.cache_clear()
    with torch.inference_mode():
        qk_norm_rotary(q, k, position=100, **options)
    with FakeTensorMode() as mode:
        qk_norm_rotary(mode.from_tensor(q), mode.from_tensor(k), position=200, **options)
    torch.func.grad(lambda q: qk_norm_rotary(q, k, position=300, **options)[0].sum())(q)
    with torch.device("meta"):
        qk_norm_rotary(q, k, position=400, **options)
    for position in (100, 200, 300, 400):
        leaf = q.detach().requires_grad_()
        q_out, _ = qk_norm_rotary(leaf, k, position=position, **options)
        exact, _ = reference.qk_norm_rotary(q.double(), k.double(), rotary_dim=32, xpos=True, position=position)
        torch.testing.assert_close(q_out.double(), exact, rtol=0, atol=1e-6)
        q_out.sum().backward()
        assert leaf.grad.isfinite().all()


def tables_made(device, count):
    """`count` on a CPU, which makes tables here; for the tables of a GPU see test_rotary.py."""
    return count if device.type == "cpu" else 0


def test_layers_share_the_tables(backend, tensors_for, device):
    q, k, *_ = tensors_for(PLAIN)
    module.cached_tables.cache_clear()
    for _ in range(5):
        qk_norm_rotary(q, k, backend=backend, **PLAIN.options())
    assert module.cached_tables.cache_info().misses == tables_made(device, 1)


def test_decoding_makes_tables_rarely(backend, tensors_for, device):
    q, k, *_ = tensors_for(Case("", seqlen_q=1, seqlen_k=1))
    module.cached_tables.cache_clear()
    for position in range(900, 1030):
        q_out, k_out = qk_norm_rotary(q, k, rotary_dim=32, xpos=True, position=position, origin=500, backend=backend)
        exact = reference.qk_norm_rotary(
            q.double(), k.double(), rotary_dim=32, xpos=True, position=position, origin=500
        )
        for out, ref in zip((q_out, k_out), exact, strict=True):
            assert_rows_close(out, ref, torch.float32)
    assert module.cached_tables.cache_info().misses == tables_made(device, 3)  # positions 896 ..., 960 ..., 1024 ...


def test_flops_are_counted():
    q, k, q_scale, k_scale = PLAIN.tensors(torch.float32)
    q.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        q_out, k_out = qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, **PLAIN.options())
    forward = counter.get_total_flops()
    assert forward == 2 * 17 * (3 + 1) * (4 * 64 + 3 * 32)
    with FlopCounterMode(display=False) as counter:
        (q_out.sum() + k_out.sum()).backward()
    assert counter.get_total_flops() == 2 * forward


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "reach"),
    [(torch.float16, 2266), (torch.bfloat16, 28328), (torch.float32, 28328), (torch.float64, 254958)],
    ids=name_of,
)
def test_xpos_factors_that_overflow_are_refused(dtype, reach):
    q, k, *_ = Case("", seqlen_q=1, seqlen_k=1).tensors(dtype)
    options = {"rotary_dim": 32, "xpos": True, "position": 10**6}
    for origin in (10**6 - reach, 10**6 + reach):
        assert all(out.isfinite().all() for out in qk_norm_rotary(q, k, origin=origin, **options))
    for origin in (10**6 - reach - 1, 10**6 + reach + 1):
        with pytest.raises(ValueError, match="process the queries in segments, each with its own origin"):
            qk_norm_rotary(q, k, origin=origin, **options)
    qk_norm_rotary(q, k, rotary_dim=32, position=10**6, origin=0)  # without xPos there are no factors


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_far_keys_may_underflow(dtype):
    """Keys before the origin have factors below 1, whatever the distance: they vanish instead of overflowing."""
    q, k, *_ = Case("", batch=1, seqlen_q=8, seqlen_k=70_000, num_heads=1, head_dim=4).tensors(dtype)
    q_out, k_out = qk_norm_rotary(q, k, rotary_dim=2, xpos=True)
    assert q_out.isfinite().all() and k_out.isfinite().all()
    assert scores(q_out.double(), k_out.double()).abs().max() < 1.02


Q, K = torch.ones(2, 5, 3, 16), torch.ones(2, 7, 1, 16)
WRONG_CALLS = {
    "q_list": ({"q": [1.0]}, TypeError, r"q must be a tensor, got list"),
    "q_ndim": ({"q": Q[0]}, ValueError, r"q must have 4 dimensions \(batch, .*\), got shape \(5, 3, 16\)"),
    "q_stride": (
        {"q": Q.transpose(1, 3)},
        ValueError,
        r"q must be dense in its last dimension .* got strides \(240, 1, 16, 48\); pass q.contiguous\(\)",
    ),
    "batch": ({"k": K[:1]}, ValueError, r"k.shape\[0\] \(batch\) must equal q.shape\[0\], got 1 and 2"),
    "head_dim": ({"k": K[..., :8]}, ValueError, r"k.shape\[3\] \(head_dim\) must equal q.shape\[3\], got 8 and 16"),
    "no_head_dim": ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, r"\(head_dim\) must be at least 1, got 0"),
    "dtype": ({"q": Q.int(), "k": K.int()}, TypeError, r"q.dtype must be one of float32, .*, got int32"),
    "mixed_dtypes": ({"k": K.half()}, TypeError, r"q, k must have one dtype, got float32, float16"),
    "device": ({"k": K.to("meta")}, ValueError, r"must be on one device, got cpu, meta"),
    "scale_type": ({"q_scale": 1.0}, TypeError, r"q_scale must be a tensor, got float"),
    "scale_shape": (
        {"q_scale": torch.ones(3, 1, 16)},
        ValueError,
        r"q_scale must have shape \(num_heads, head_dim\) = \(3, 16\), got \(3, 1, 16\)",
    ),
    "k_scale_shape": (
        {"k_scale": torch.ones(3, 16)},
        ValueError,
        r"k_scale must have shape \(num_kv_heads, head_dim\) = \(1, 16\), got \(3, 16\)",
    ),
    "scale_dtype": ({"q_scale": torch.ones(3, 16).int()}, TypeError, r"q_scale.dtype must be .*, got int32"),
    "scale_device": ({"q_scale": torch.ones(3, 16).to("meta")}, ValueError, r"must be on one device"),
    "normalize": ({"normalize": 1}, TypeError, r"normalize must be True or False, got 1"),
    "xpos": ({"xpos": None}, TypeError, r"xpos must be True or False, got None"),
    "xpos_alone": ({"xpos": True}, ValueError, r"rotary_dim must be positive with xpos=True, got 0"),
    "rotary_dim_odd": ({"rotary_dim": 7}, ValueError, r"rotary_dim must be even and between 0 and head_dim=16, got 7"),
    "rotary_dim_large": ({"rotary_dim": 18}, ValueError, r"rotary_dim must be even .*, got 18"),
    "rotary_dim_negative": ({"rotary_dim": -2}, ValueError, r"rotary_dim must be even .*, got -2"),
    "rotary_dim_type": ({"rotary_dim": 8.0}, TypeError, r"rotary_dim must be an int, got 8.0 \(float\)"),
    "position_type": ({"position": 0.5}, TypeError, r"position must be an int, got 0.5 \(float\)"),
    "position_tensor": ({"position": torch.tensor(1)}, TypeError, r"position must be an int, got .* \(Tensor\)"),
    "position_bool": ({"position": True}, TypeError, r"position must be an int, got True \(bool\)"),
    "position_none": ({"position": None}, TypeError, r"position must be an int, got None"),
    "origin_type": ({"origin": 1.5}, TypeError, r"origin must be an int, got 1.5 \(float\)"),
    "multiplier_type": ({"q_multiplier": "2"}, TypeError, r"q_multiplier must be a number, got str"),
    "multiplier_tensor": ({"q_multiplier": torch.ones(1)}, TypeError, r"q_multiplier must be a number, got Tensor"),
    "multiplier_bool": ({"q_multiplier": True}, TypeError, r"q_multiplier must be a number, got bool"),
    "multiplier_nan": ({"q_multiplier": math.nan}, ValueError, r"q_multiplier must be finite, got nan"),
    "multiplier_inf": ({"q_multiplier": math.inf}, ValueError, r"q_multiplier must be finite, got inf"),
    **{
        f"multiplier_{number}": (
            {"q_multiplier": number},
            ValueError,
            rf"q_multiplier must be between 2\*\*-60 and 2\*\*60, got {re.escape(str(number))}; "
            r"give q_scale any other factor$",
        )
        for number in (0.0, -1.0, 2.0**-61, 2.0**61)
    },
    "backend": ({"backend": "tpu"}, ValueError, r"backend must be None or one of .*, got 'tpu'"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_call(change, error, message):
    arguments = {"q": Q, "k": K, **change}
    with pytest.raises(error, match=f"^qk_norm_rotary: .*{message}"):
        qk_norm_rotary(arguments.pop("q"), arguments.pop("k"), **arguments)


def test_the_longest_sequence_on_a_gpu():
    longest, one = 2**31 - 256, torch.ones(1, 1, 1, 64)
    for seqlen, reasons in ((longest, []), (longest + 1, [f"seqlen={longest + 1} (built for up to 2**31 - 256)"])):
        for q, k in ((one, one.expand(1, seqlen, 1, 64)), (one.expand(1, seqlen, 1, 64), one)):
            assert [text for text in unsupported("cuda", q, k) if text.startswith("seqlen")] == reasons


def test_a_backend_that_cannot_says_why():
    with pytest.raises(NotImplementedError, match=r"(?s)backend 'triton' .* triton: +tensors on cpu"):
        qk_norm_rotary(Q, K, backend="triton")
    with pytest.raises(NotImplementedError, match=r"(?s)backend 'cuda' .* cuda: "):
        qk_norm_rotary(Q, K, backend="cuda")
    with pytest.raises(NotImplementedError, match=r"(?s)backend 'cpu' .* cpu: "):
        qk_norm_rotary(Q.double(), K.double(), backend="cpu")
