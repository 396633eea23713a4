"""feed_forward: every backend against the float64 reference; the reference against docs/model.md#6."""

import math

import pytest
import torch
from numerics import UNIT, assert_elements_close, assert_no_worse, assert_rows_close
from op_cases import (
    DTYPES,
    assert_compiles,
    assert_functional_gradient,
    gradients,
    in_two_threads,
    leaves_of,
    name_of,
    random_like,
    skip_for,
)
from op_cases import FeedForwardCase as Case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from andromeda.ops import feed_forward as module
from andromeda.ops._select import BACKENDS
from andromeda.ops.feed_forward import feed_forward, unsupported
from andromeda.reference import feed_forward as reference

pytestmark = pytest.mark.usefixtures("nan_filled")

CASES = [
    Case("model"),
    Case("other_width", dim_out=40),
    Case("no_biases", bias_in=False, bias_out=False),
    Case("no_bias_in", bias_in=False),
    Case("no_bias_out", bias_out=False),
    Case("one_row", rows=(1, 1)),
    Case("rows", rows=(33,)),
    Case("four_axes", rows=(2, 3, 5)),
    Case("narrow", dim=1, hidden=1, dim_out=1),
    Case("odd", dim=7, hidden=33, dim_out=5),
    Case("wide", dim=40, hidden=520),
    Case("large_products", size=8.0),  # most activations are 0 or the product itself
    Case("small_products", size=2.0**-6),  # the GELU is almost linear
    Case("many_rows", rows=(3, 211)),
]
PLAIN = Case("plain", rows=(2, 17), dim=12, hidden=40, dim_out=9)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of rows on the CPU, the last one ragged."""
    monkeypatch.setattr(module, "_MIN_BLOCK_ROWS", 10)
    monkeypatch.setattr(module, "_BLOCK_HIDDEN", 1000)


def plain(x, weight_in, bias_in, weight_out, bias_out):
    """torch's own functions, which round every step to the dtype of x."""
    return functional.linear(functional.gelu(functional.linear(x, weight_in, bias_in)), weight_out, bias_out)


def plain_product(x, weight_in, bias_in, weight_out, bias_out):
    """The same, but the product is rounded before the bias is added, as Triton has it."""
    product = functional.linear(x, weight_in)
    hidden = product if bias_in is None else product + bias_in
    return functional.linear(functional.gelu(hidden), weight_out, bias_out)


def doubles(*tensors):
    return [None if t is None else t.double() for t in tensors]


# ---- against the float64 reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_forward(backend, tensors_for, case, dtype):
    tensors = tensors_for(case, dtype)
    out = feed_forward(*tensors, backend=backend)
    exact = reference.feed_forward(*doubles(*tensors))
    assert out.shape == (*case.rows, case.dim_out) and out.dtype == dtype and out.device == tensors[0].device
    assert out.is_contiguous()
    # In half precision the product, the activation and the result are rounded.
    if case.name != "narrow":  # a plain result of one number may be exact by chance
        assert_no_worse(out, [plain(*tensors), plain_product(*tensors)], exact)
    if case.dim_out > 8 and case.bias_out:
        assert_rows_close(out, exact, dtype, kind="heavy")


def magnitudes(tensors, dout):
    """What the rounding errors of the five gradients are relative to: the sums of the absolute values of their terms.

    The terms of GELU and of its slope are those of u * (1 + erf) / 2 and (1 + erf) / 2 + u * phi, of which the last is
    at most 1/4. The argument u is rounded, too, relative to its own terms; its error is multiplied by the derivative.
    """
    x, weight_in, bias_in, weight_out, _ = doubles(*tensors)
    hidden = functional.linear(x, weight_in, bias_in).requires_grad_()
    size = functional.linear(x.abs(), weight_in.abs(), None if bias_in is None else bias_in.abs())
    (slope,) = torch.autograd.grad(functional.gelu(hidden).sum(), hidden, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), hidden)
    dout = dout.double().abs()
    dhidden = (dout @ weight_out.abs()) * (1.25 + bend.abs() * size)
    activation = (hidden.abs() + slope.abs() * size).detach()
    of_rows = [t.flatten(0, -2) for t in (dout, x.abs(), dhidden, activation)]
    return (
        dhidden @ weight_in.abs(),
        of_rows[2].T @ of_rows[1],
        of_rows[2].sum(0),
        of_rows[0].T @ of_rows[3],
        of_rows[0].sum(0),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_backward(backend, tensors_for, case, dtype):
    tensors = tensors_for(case, dtype)
    (dout,) = random_like([torch.empty(*case.rows, case.dim_out, dtype=dtype, device=tensors[0].device)])
    found = gradients(lambda *leaves: feed_forward(*leaves, backend=backend), tensors, dout)
    rounded = [gradients(function, tensors, dout) for function in (plain, plain_product)]
    exact = gradients(plain, doubles(*tensors), dout.double())
    given = [index for index, tensor in enumerate(tensors) if tensor is not None]
    sizes = magnitudes(tensors, dout)
    for gradient, *naive, ref, index in zip(found, *rounded, exact, given, strict=True):
        assert gradient.shape == tensors[index].shape and gradient.dtype == dtype
        if case.name != "narrow":
            assert_no_worse(gradient, naive, ref)
        assert_elements_close(gradient, ref, sizes[index])


def test_default_backend_is_the_first_that_can():
    tensors = PLAIN.tensors(torch.float32)
    first = next(name for name in BACKENDS if not unsupported(name, tensors[0]))
    assert torch.equal(feed_forward(*tensors), feed_forward(*tensors, backend=first))


def test_float64_takes_the_reference():
    tensors = PLAIN.tensors(torch.float64)
    assert torch.equal(feed_forward(*tensors), reference.feed_forward(*tensors))


def test_reference_computes_in_the_dtype_it_is_handed():
    assert reference.feed_forward(*PLAIN.tensors(torch.bfloat16)).dtype == torch.bfloat16


def test_the_formula_of_the_specification():
    tensors = Case("", rows=(2, 3), dim=4, hidden=5, dim_out=3).tensors(torch.float64)
    out = feed_forward(*tensors)
    x, weight_in, bias_in, weight_out, bias_out = (tensor.tolist() for tensor in tensors)
    for b in range(2):
        for t in range(3):
            hidden = []
            for row, bias in zip(weight_in, bias_in, strict=True):
                u = math.fsum(w * h for w, h in zip(row, x[b][t], strict=True)) + bias
                hidden.append(u * (1 + math.erf(u / math.sqrt(2))) / 2)
            for channel, (row, bias) in enumerate(zip(weight_out, bias_out, strict=True)):
                expected = math.fsum(w * h for w, h in zip(row, hidden, strict=True)) + bias
                assert out[b, t, channel].item() == pytest.approx(expected, rel=1e-13)


def test_torch_gives_the_same():
    """Exact, on the CPU for one block: the same functions of torch on the same numbers."""
    tensors = Case("", rows=(2, 4)).tensors(torch.float32)
    for backend in ("cpu", "reference"):
        assert torch.equal(feed_forward(*tensors, backend=backend), plain(*tensors))


# ---- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_bad_number_stays_in_its_row(backend, tensors_for, value):
    tensors = tensors_for(PLAIN)
    good = feed_forward(*tensors, backend=backend)
    tensors[0][1, 3, 5] = value
    leaves = leaves_of(tensors)
    bad = feed_forward(*leaves, backend=backend)
    assert bad[1, 3].isnan().all()
    (dx,) = torch.autograd.grad(bad, leaves[:1], torch.ones_like(bad))
    others = torch.ones(2, 17, dtype=torch.bool)
    others[1, 3] = False
    assert torch.equal(bad[others], good[others]) and dx[others].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides_do_not_matter(backend, tensors_for, dtype):
    """Tensors that are transposed, expanded, or sliced from NaN at an odd offset."""
    tensors = tensors_for(PLAIN, dtype)
    x, weight_in, bias_in, weight_out, bias_out = tensors
    surrounding = x.new_full((2, 20, 17), math.nan)
    sliced = surrounding[:, 2:19, 3:15]
    sliced.copy_(x)
    transposed = x.transpose(0, 2).contiguous().transpose(0, 2)
    columns = [t.T.contiguous().T for t in (weight_in, weight_out)]
    wide = torch.stack((bias_in, torch.full_like(bias_in, math.nan)), dim=1)[:, 0]
    same_bias = bias_out[:1].expand(9)
    (dout,) = random_like([x.new_empty(2, 17, 9)])

    def results(*given):
        return (
            feed_forward(*given, backend=backend),
            *gradients(lambda *t: feed_forward(*t, backend=backend), given, dout),
        )

    expected = results(x, weight_in, bias_in, weight_out, same_bias.contiguous())
    for strided in (sliced, transposed):
        assert not strided.is_contiguous()
        found = results(strided, columns[0], wide, columns[1], same_bias)
        for out, ref in zip(found, expected, strict=True):  # torch's products sum in an order of their own
            assert (out.double() - ref).norm() <= 4 * UNIT[dtype] * ref.double().norm()
    assert surrounding.isnan().sum() == surrounding.numel() - x.numel()


def test_strided_gradients(backend, tensors_for):
    tensors = tensors_for(PLAIN)
    ones = torch.ones(2, 17, 9, device=tensors[0].device)
    dense = gradients(lambda *t: feed_forward(*t, backend=backend), tensors, ones)
    of_sum = gradients(lambda *t: feed_forward(*t, backend=backend).sum(), tensors, None)  # strides (0, 0, 0)
    transposed = ones.transpose(0, 2).contiguous().transpose(0, 2)
    strided = gradients(lambda *t: feed_forward(*t, backend=backend), tensors, transposed)
    for found in (of_sum, strided):
        for gradient, ref in zip(found, dense, strict=True):
            torch.testing.assert_close(gradient, ref)


def test_rows_are_independent(backend, tensors_for):
    x, *rest = tensors_for(PLAIN)
    whole = feed_forward(x, *rest, backend=backend)
    torch.testing.assert_close(feed_forward(x[1:, 3:9], *rest, backend=backend), whole[1:, 3:9])


def test_one_vector(backend, tensors_for):
    x, *rest = tensors_for(PLAIN)
    found = feed_forward(x[1, 3], *rest, backend=backend)
    assert found.shape == (9,)
    torch.testing.assert_close(found, feed_forward(x, *rest, backend=backend)[1, 3])


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16), (0, 16)], ids=str)
def test_empty(backend, device, shape):
    x = torch.empty(shape, device=device, requires_grad=True)
    skip_for(backend, unsupported(backend, x))
    parameters = [torch.ones(size, device=device, requires_grad=True) for size in ((8, 16), (8,), (3, 8), (3,))]
    out = feed_forward(x, *parameters, backend=backend)
    assert out.shape == (*shape[:-1], 3)
    dx, *found = torch.autograd.grad(out.sum(), [x, *parameters])
    assert dx.shape == shape and not any(gradient.any() for gradient in found)


def test_two_runs_agree(backend, tensors_for):
    """Exact: the order of every sum is fixed."""
    tensors = tensors_for(Case("", rows=(700,), hidden=300), torch.bfloat16)
    dout = torch.ones(700, 24, dtype=torch.bfloat16, device=tensors[0].device)
    runs = [gradients(lambda *t: feed_forward(*t, backend=backend), tensors, dout) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_two_callers_at_once(backend, tensors_for):
    tensors = [tensors_for(Case("", rows=(300,)), seed=seed) for seed in range(2)]
    expected = [feed_forward(*given, backend=backend) for given in tensors]

    def work(index):
        return [feed_forward(*tensors[index], backend=backend) for _ in range(5)]

    for results, ref in zip(in_two_threads(work), expected, strict=True):
        assert all(torch.equal(out, ref) for out in results)


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_what_is_kept_for_the_backward_pass(backend, tensors_for):
    """x and, for Triton, the first product; never the activation."""
    tensors = tensors_for(PLAIN)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        feed_forward(*leaves_of(tensors), backend=backend)
    own = {tensor.data_ptr() for tensor in tensors}
    others = [t.shape for t in kept if t.numel() > 0 and t.data_ptr() not in own]
    assert others == ([(2, 17, 40)] if backend == "triton" else [])


@pytest.mark.parametrize("rows", [1, 7, 34])
def test_blocks_of_rows(rows, monkeypatch):
    tensors, (dout,) = PLAIN.tensors(torch.float64), random_like([torch.empty(2, 17, 9, dtype=torch.float64)])
    monkeypatch.setattr(module, "unsupported", lambda backend, x: [] if backend == "cpu" else ["not this"])
    monkeypatch.setattr(module, "_DTYPES", (torch.float64,))
    monkeypatch.setattr(module, "_MIN_BLOCK_ROWS", 1)
    monkeypatch.setattr(module, "_BLOCK_HIDDEN", rows * 40 + 5)
    torch.testing.assert_close(feed_forward(*tensors), plain(*tensors), rtol=1e-13, atol=1e-13)
    found, expected = (gradients(function, tensors, dout) for function in (feed_forward, plain))
    for gradient, ref in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, ref, rtol=1e-13, atol=1e-13)


# ---- torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biases", [True, False])
def test_gradcheck(biases):
    case = Case("", rows=(2, 3), dim=4, hidden=5, dim_out=3, bias_in=biases, bias_out=biases)
    tensors = [None if t is None else t.requires_grad_() for t in case.tensors(torch.float64)]
    assert torch.autograd.gradcheck(feed_forward, tensors)


@pytest.mark.parametrize("biases", [True, False])
def test_opcheck(backend, tensors_for, biases):
    tensors = tensors_for(Case("", bias_in=biases, bias_out=biases))
    call = module.Call(*tensors, backend)
    torch.library.opcheck(module.FORWARD, tuple(call))
    out, product = module.FORWARD(*call)
    for wanted in ((True, True, biases, True, biases), (False, False, False, True, False)):
        torch.library.opcheck(module.BACKWARD, (torch.ones_like(out), product, *wanted, *call))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(backend, tensors_for, dynamic):
    x, *parameters = tensors_for(PLAIN)

    def step(x, *rest):
        *parameters, _ = rest
        return feed_forward(x, *parameters, backend=backend).square().sum()

    assert_compiles(step, [((x[:, :seqlen], *parameters), 0) for seqlen in (17, 11, 5)], dynamic)


def test_func_grad(backend, tensors_for):
    assert_functional_gradient(lambda *t: feed_forward(*t, backend=backend).square().sum(), tensors_for(PLAIN))


def test_second_derivatives_of_kernels_and_tangents_are_refused(backend, tensors_for):
    x, *rest = tensors_for(PLAIN)
    x.requires_grad_()
    out = feed_forward(x, *rest, backend=backend)
    (dx,) = torch.autograd.grad(out[..., 0].sum(), x, create_graph=True)
    if backend == "reference":
        dx.square().sum().backward()
        assert x.grad.any()
    else:
        with pytest.raises(NotImplementedError, match=r'feed_forward: .* again; pass backend="reference"'):
            (dx.sum() + x.sum()).backward()
    with pytest.raises(NotImplementedError, match="feed_forward: forward-mode"):
        torch.func.jvp(lambda x: feed_forward(x, *rest, backend=backend), (x,), (x,))


@pytest.mark.parametrize("index", range(5))
def test_only_requested_gradients_are_computed(backend, tensors_for, index):
    tensors = tensors_for(PLAIN)
    assert feed_forward(*tensors, backend=backend).grad_fn is None
    expected = gradients(lambda *t: feed_forward(*t, backend=backend).square().sum(), tensors, None)
    tensors[index].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        (found,) = torch.autograd.grad(feed_forward(*tensors, backend=backend).square().sum(), tensors[index])
    torch.testing.assert_close(found, expected[index])
    # Products with the first and the second weight: those of the forward pass, then those that gradients need; the CPU
    # repeats the first product, Triton needs the gradient of the activation for the activation.
    first, second = [(2, 2), (2, 2), (1, 2), (1, 2), (1, 1)][index]
    if index < 4:
        first, second = (first, second + (index == 3)) if backend == "triton" else (first + 1, second)
    assert counter.get_total_flops() == 2 * 34 * 40 * (12 * first + 9 * second)
    with torch.no_grad():
        assert feed_forward(*tensors, backend=backend).grad_fn is None


def test_meta_and_fake_tensors():
    tensors = PLAIN.tensors(torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = feed_forward(*map(mode.from_tensor, tensors))
    for out in (feed_forward(*(t.to("meta") for t in tensors)), fake):
        assert out.shape == (2, 17, 9) and out.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast(backend, tensors_for, dtype):
    """As for torch's functions: everything is cast, results stay in half precision, gradients come back wide."""
    tensors = tensors_for(PLAIN)
    skip_for(backend, unsupported(backend, tensors[0].to(dtype)))
    leaves, others = leaves_of(tensors), leaves_of(tensors)
    leaves[0], others[0] = (x.detach().to(torch.float32).requires_grad_() for x in (leaves[0], others[0]))
    with torch.autocast(tensors[0].device.type, dtype=dtype):
        out, expected = feed_forward(*leaves, backend=backend), plain(*others)
    assert out.dtype == expected.dtype == dtype
    assert (out.double() - expected).norm() <= 2 * UNIT[dtype] * expected.double().norm()
    out.float().sum().backward()
    expected.float().sum().backward()
    for leaf, other in zip(leaves, others, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert (leaf.grad - other.grad).norm() <= 2 * UNIT[dtype] * other.grad.norm()


def test_a_backward_pass_under_autocast_is_not_rounded(backend, tensors_for):
    tensors = tensors_for(PLAIN)
    leaves, others = leaves_of(tensors), leaves_of(tensors)
    feed_forward(*others, backend=backend).sum().backward()
    out = feed_forward(*leaves, backend=backend).sum()
    with torch.autocast(tensors[0].device.type, dtype=torch.bfloat16):
        out.backward()
    assert all(torch.equal(leaf.grad, other.grad) for leaf, other in zip(leaves, others, strict=True))


def test_autocast_leaves_float64_alone():
    tensors = PLAIN.tensors(torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(feed_forward(*tensors), reference.feed_forward(*tensors))


# ---- refusals -------------------------------------------------------------------------------------------------------


X, W1, B1, W2, B2 = torch.ones(2, 5, 16), torch.ones(8, 16), torch.ones(8), torch.ones(3, 8), torch.ones(3)
WRONG_CALLS = {
    "x_list": ({"x": [1.0]}, TypeError, r"x must be a tensor, got list"),
    "x_scalar": ({"x": X[0, 0, 0]}, ValueError, r"x must have at least 1 dimension \(..., dim\), got shape \(\)"),
    "x_width": (
        {"x": X[..., :9]},
        ValueError,
        r"weight_in must have shape \(hidden, dim\) = \(8, 9\), got \(8, 16\)",
    ),
    "dtype": ({"x": X.int()}, TypeError, r"x.dtype must be one of float32, .*, got int32"),
    "mixed": ({"weight_in": W1.half()}, TypeError, r"must have one dtype, got float32, float16"),
    "weight_missing": ({"weight_in": None}, TypeError, r"weight_in must be a tensor, got NoneType"),
    "weight_ndim": (
        {"weight_out": B1},
        ValueError,
        r"weight_out must have 2 dimensions \(dim_out, hidden\), got shape \(8,\)",
    ),
    "weight_shape": (
        {"weight_out": W2[:, :7]},
        ValueError,
        r"weight_out must have shape \(dim_out, hidden\) = \(3, 8\), got \(3, 7\)",
    ),
    "bias_in_shape": ({"bias_in": B2}, ValueError, r"bias_in must have shape \(hidden,\) = \(8,\), got \(3,\)"),
    "bias_out_type": ({"bias_out": 1.0}, TypeError, r"bias_out must be a tensor, got float"),
    "device": ({"bias_out": B2.to("meta")}, ValueError, r"must be on one device, got cpu, .*meta"),
    "backend": ({"backend": "tpu"}, ValueError, r"backend must be None or one of .*, got 'tpu'"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_call(change, error, message):
    given = {"x": X, "weight_in": W1, "bias_in": B1, "weight_out": W2, "bias_out": B2}
    with pytest.raises(error, match=f"^feed_forward: .*{message}"):
        feed_forward(**given | change)


def test_a_backend_that_cannot_says_why():
    with pytest.raises(NotImplementedError, match=r"(?s)backend 'triton' .* triton: +tensors on cpu"):
        feed_forward(X, W1, B1, W2, B2, backend="triton")
    with pytest.raises(NotImplementedError, match=r"(?s)backend 'cuda' .* cuda: +no CUDA kernel"):
        feed_forward(X, W1, B1, W2, B2, backend="cuda")
    with pytest.raises(NotImplementedError, match=r"(?s)backend 'cpu' .* cpu: +dtype float64"):
        feed_forward(*(t.double() for t in (X, W1, B1, W2, B2)), backend="cpu")
