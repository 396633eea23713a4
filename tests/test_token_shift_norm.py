"""token_shift_norm: every backend against the float64 reference; the reference against docs/model.md#3, #4, #7."""

import math

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
from op_cases import TokenShiftNormCase as Case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from andromeda.ops import token_shift_norm as module
from andromeda.ops._select import BACKENDS
from andromeda.ops.token_shift_norm import token_shift_norm, unsupported
from andromeda.reference import token_shift_norm as reference

pytestmark = pytest.mark.usefixtures("nan_filled")

CASES = [
    Case("deepnorm", dim=512),
    Case("prenorm", residual=False),
    Case("shift_only", residual=False, norm=False),
    Case("norm_only", residual=False, shift=0),
    Case("residual_only", norm=False, shift=0),
    Case("residual_and_shift", norm=False, scaled=False),
    Case("no_shift", shift=0),
    Case("no_scale", scaled=False),
    Case("history", history=True, position=100),
    Case("history_of_three", seqlen=2, shift=3, history=True, position=9),
    Case("one_token", seqlen=1),
    Case("one_token_with_history", seqlen=1, history=True, position=5),
    Case("fewer_tokens_than_delays", seqlen=2, shift=4),
    Case("documents", documents=True, shift=2),
    Case("documents_and_history", documents=True, shift=3, history=True, position=40),
    Case("dim_1", dim=1, shift=0, norm=False),  # the norm of one channel is 0
    Case("dim_2", dim=2),
    Case("dim_15", dim=15, shift=1),
    Case("dim_16", dim=16, shift=2),
    Case("dim_17", dim=17, shift=3),
    Case("dim_33", dim=33, shift=32),
    Case("dim_100", dim=100, shift=2),
    Case("many_tokens", batch=3, seqlen=700, dim=48),
]
PLAIN = Case("plain", dim=40, shift=2)


def run(x, residual, residual_scale, gamma, **options):
    return token_shift_norm(x, residual=residual, residual_scale=residual_scale, gamma=gamma, **options)


def exact_run(x, residual, residual_scale, gamma, **options):
    """The reference in float64, from the rounded operands."""
    x, residual, residual_scale, gamma = doubles(x, residual, residual_scale, gamma)
    if options["history"] is not None:
        options["history"] = options["history"].double()
    return reference.token_shift_norm(x, residual=residual, residual_scale=residual_scale, gamma=gamma, **options)


def doubles(*tensors):
    return [None if t is None else t.double() for t in tensors]


# ---- against the float64 reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_forward(backend, tensors_for, device, case, dtype):
    tensors, options = tensors_for(case, dtype), case.options(device, dtype)
    y, shifted = run(*tensors, backend=backend, **options)
    exact_y, exact_shifted = exact_run(*tensors, **options)
    for out, ref in ((y, exact_y), (shifted, exact_shifted)):
        assert out.shape == tensors[0].shape and out.dtype == dtype and out.device == tensors[0].device
        assert out.is_contiguous()
        assert_rows_close(out, ref, dtype)
    # `shifted` holds the rounded y.
    again = reference.token_shift(y, case.shift, options["history"], options["key_start"], case.position)
    assert torch.equal(shifted, again)


def magnitudes(tensors, douts, options):
    """Sums of the absolute values of the terms of the four gradients: rounding errors are relative to them."""
    x, residual, residual_scale, gamma = doubles(*tensors)
    dy, dshifted = (dout.double().abs() for dout in douts)
    shift, key_start, position = options["shift"], options["key_start"], options["position"]
    size = dy if shift == 0 else dy + reference.token_shift_transposed(dshifted, shift, key_start, position)
    size = dy + dshifted if shift == 0 else size
    dgamma = None
    if gamma is not None:
        u = reference.norm_input(x, residual, residual_scale, options["alpha"])
        inverse = (u.var(-1, correction=0, keepdim=True) + reference.EPSILON).rsqrt()
        u_hat = ((u - u.mean(-1, keepdim=True)) * inverse).abs()
        dgamma = (size * u_hat).sum((0, 1))
        e = size * (1 + gamma).abs()
        size = inverse * (e + e.mean(-1, keepdim=True) + u_hat * (e * u_hat).mean(-1, keepdim=True))
    if residual is None:
        return size, None, None, dgamma
    factor = abs(options["alpha"]) * (1.0 if residual_scale is None else residual_scale.abs())
    return size, size * factor, abs(options["alpha"]) * (size * residual.abs()).sum((0, 1)), dgamma


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_backward(backend, tensors_for, device, case, dtype):
    tensors, options = tensors_for(case, dtype), case.options(device, dtype)
    douts = random_like([tensors[0]] * 2)
    if case.shift == 0:  # y and shifted are one tensor: only the sum of two gradients in half precision is inexact
        douts[1] = torch.zeros_like(douts[1])
    found = gradients(lambda *leaves: run(*leaves, backend=backend, **options), tensors, douts)
    exact = gradients(lambda *leaves: exact_run(*leaves, **options), doubles(*tensors), doubles(*douts))
    given = [index for index, tensor in enumerate(tensors) if tensor is not None]
    sizes = magnitudes(tensors, douts, options)
    for gradient, ref, index in zip(found, exact, given, strict=True):
        tensor, size = tensors[index], sizes[index]
        assert gradient.shape == tensor.shape and gradient.dtype == tensor.dtype
        assert_rows_close(gradient, ref, tensor.dtype, kind="gradient", magnitude=size)
        assert_elements_close(gradient, ref, size)


def test_default_backend_is_the_first_that_can():
    tensors, options = PLAIN.tensors(torch.float32), PLAIN.options()
    first = next(name for name in BACKENDS if not unsupported(name, tensors[0]))
    for default, chosen in zip(run(*tensors, **options), run(*tensors, backend=first, **options), strict=True):
        assert torch.equal(default, chosen)


def test_float64_takes_the_reference():
    tensors, options = PLAIN.tensors(torch.float64), PLAIN.options()
    for out, ref in zip(run(*tensors, **options), exact_run(*tensors, **options), strict=True):
        assert torch.equal(out, ref)


def test_reference_computes_in_the_dtype_it_is_handed():
    x, residual, residual_scale, gamma = PLAIN.tensors(torch.bfloat16)
    scale, gamma = residual_scale.bfloat16(), gamma.bfloat16()
    outputs = reference.token_shift_norm(x, residual=residual, residual_scale=scale, gamma=gamma, shift=1)
    assert [out.dtype for out in outputs] == [torch.bfloat16] * 2


# ---- the reference against docs/model.md -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.seqlen < 100], ids=name_of)
def test_the_formula_of_the_specification(case):
    tensors, options = case.tensors(torch.float64), case.options(dtype=torch.float64)
    x, residual, residual_scale, gamma = (None if t is None else t.tolist() for t in tensors)
    history, key_start = (None if options[k] is None else options[k].tolist() for k in ("history", "key_start"))
    y, shifted = run(*tensors, **options)
    width = case.dim // (case.shift + 1)
    for b in range(case.batch):
        for t in range(case.seqlen):
            row = list(x[b][t])
            if residual is not None:
                scale = residual_scale or [1.0] * case.dim
                row = [case.alpha * rho * r + f for rho, r, f in zip(scale, residual[b][t], row, strict=True)]
            if gamma is not None:
                mean = sum(row) / case.dim
                deviation = math.sqrt(sum((u - mean) ** 2 for u in row) / case.dim + 1e-5)
                row = [(u - mean) / deviation * (1 + g) for u, g in zip(row, gamma, strict=True)]
            assert y[b, t].tolist() == pytest.approx(row, rel=1e-11, abs=1e-12)
        for t in range(case.seqlen):
            for channel in range(case.dim):
                delay = channel // width if channel < (case.shift + 1) * width else 0
                expected = 0.0
                if key_start is not None and case.position + t - delay < key_start[b][t]:
                    assert delay > 0
                elif t >= delay:
                    expected = y[b, t - delay, channel].item()
                elif history is not None:
                    expected = history[b][case.shift + t - delay][channel]
                assert shifted[b, t, channel].item() == expected


def test_an_unchanged_tensor_is_not_copied(backend, tensors_for):
    x, *_, gamma = tensors_for(PLAIN)
    y, shifted = token_shift_norm(x, backend=backend)
    assert y is x and shifted is x
    y, shifted = token_shift_norm(x, shift=1, backend=backend)
    assert y is x and shifted is not x
    y, shifted = token_shift_norm(x, gamma=gamma, backend=backend)
    assert y is not x and shifted is y


def test_norm_of_a_row_far_from_zero(backend, tensors_for):
    """The variance is summed around the mean; it is not a difference of two large sums."""
    x, *_, gamma = tensors_for(Case("", dim=512))
    x += 1000
    y, _ = token_shift_norm(x, gamma=gamma, backend=backend)
    exact = torch.layer_norm(x.double(), (512,), 1 + gamma.double())
    # The error of x_hat is the rounding of the mean, 2**-24 * 1000.
    assert (y.double() - exact).abs().max() <= 3 * 2**-24 * 1000 * (1 + gamma).abs().max()


def test_norm_of_equal_channels(backend, tensors_for):
    x, *_, gamma = tensors_for(PLAIN)
    x[0, 3] = 2.5
    x.requires_grad_()
    y, _ = token_shift_norm(x, gamma=gamma, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(y[0, 3], torch.zeros_like(y[0, 3])) and dx.isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_bad_number_stays_in_its_row(backend, tensors_for, value):
    tensors, options = tensors_for(PLAIN), PLAIN.options()
    y_good, shifted_good = run(*tensors, backend=backend, **options)
    tensors[0][1, 3, 5] = value
    y_bad, shifted_bad = run(*tensors, backend=backend, **options)
    assert y_bad[1, 3].isnan().all()
    y_bad[1, 3] = y_good[1, 3]
    width = 40 // 3
    for delay in range(3):
        channels = slice(delay * width, (delay + 1) * width)
        assert shifted_bad[1, 3 + delay, channels].isnan().all()
        shifted_bad[1, 3 + delay, channels] = shifted_good[1, 3 + delay, channels]
    shifted_bad[1, 3, 3 * width :] = shifted_good[1, 3, 3 * width :]
    assert torch.equal(y_bad, y_good) and torch.equal(shifted_bad, shifted_good)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
def test_hidden_rows_do_not_count(backend, tensors_for, device, norm, value):
    """Rows before their own `key_start`, and gradients that reach them, change no results and gradients of others."""
    case = Case("", batch=1, seqlen=11, dim=40, shift=2, norm=norm)
    x, residual, residual_scale, gamma = tensors_for(case)
    starts = [5] * 8 + [8] * 3  # five rows of padding, then two documents
    key_start = torch.tensor([starts], dtype=torch.int32, device=device)
    (dshifted,) = random_like([x])

    def results(number, document):
        tensors = [x.clone(), residual.clone(), residual_scale, gamma]
        dout = dshifted.clone()
        for tensor in (*tensors[:2], dout):
            tensor[:, :5] = number
        dout[:, 5, 40 // 3 : 3 * (40 // 3)] = number  # of the first row's delayed segments
        tensors[0][:, 5:8] += document
        used = [None if t is None else t.requires_grad_() for t in tensors]
        _, shifted = run(*used, alpha=1.5, shift=2, key_start=key_start, backend=backend)
        leaves = [t for t in used if t is not None]
        return shifted, *torch.autograd.grad(shifted, leaves, dout)

    for found, expected in zip(results(value, 0.0), results(0.0, 0.0), strict=True):
        assert torch.equal(found, expected) and found.isfinite().all()
    for found, expected in zip(results(0.0, value)[:3], results(0.0, 0.0)[:3], strict=True):
        others = [row for row in range(11) if not 5 <= row < 8]
        assert torch.equal(found[:, others], expected[:, others])


# ---- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides_do_not_matter(backend, tensors_for, device, dtype):
    """Exact: operands that are transposed, expanded, or sliced from NaN at an odd offset equal contiguous ones."""
    case = Case("", dim=40, shift=2, history=True, documents=True, position=30)
    (x, residual, residual_scale, gamma), options = tensors_for(case, dtype), case.options(device, dtype)
    residual = residual[:1].expand(2, -1, -1)
    residual_scale = residual_scale[:1].expand(40)
    gamma = torch.stack((gamma, torch.full_like(gamma, math.nan)), dim=1)[:, 0]
    history = options["history"]
    options["history"] = history.transpose(0, 1).contiguous().transpose(0, 1)
    options["key_start"] = options["key_start"].T.contiguous().T
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    surrounding = torch.full((2, 20, 45), math.nan, dtype=dtype, device=device)
    sliced = surrounding[:, 2:19, 3:43]
    sliced.copy_(x)
    douts = random_like([x, x])

    def call(*tensors, **changed):
        return run(*tensors, backend=backend, **options | changed)

    dense = (x, residual.contiguous(), residual_scale.contiguous(), gamma.contiguous())
    straight = {"history": history, "key_start": options["key_start"].contiguous()}
    expected = (*call(*dense, **straight), *gradients(lambda *t: call(*t, **straight), dense, douts))
    for strided in (transposed, sliced):
        given = (strided, residual, residual_scale, gamma)
        assert not strided.is_contiguous()
        for found, ref in zip((*call(*given), *gradients(call, given, douts)), expected, strict=True):
            # Rows that are not aligned to 16 bytes are summed in another order.
            if backend in ("cuda", "triton") and strided is sliced:
                assert (found.double() - ref).norm() <= 32 * UNIT[found.dtype] * ref.double().norm()
            else:
                assert torch.equal(found, ref)
    assert surrounding.isnan().sum() == surrounding.numel() - x.numel()


def test_strided_gradients(backend, tensors_for):
    tensors, options = tensors_for(PLAIN), PLAIN.options()

    def call(*leaves):
        return run(*leaves, backend=backend, **options)

    ones = torch.ones_like(tensors[0])
    dense = gradients(call, tensors, (ones, ones))
    transposed = ones.transpose(0, 1).contiguous().transpose(0, 1)
    strided = gradients(call, tensors, (transposed, transposed))
    of_sum = gradients(lambda *leaves: [out.sum() for out in call(*leaves)], tensors, None)  # strides (0, 0, 0)
    for found in (strided, of_sum):
        assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


@pytest.mark.parametrize("documents", [False, True], ids=["one_document", "documents"])
@pytest.mark.parametrize("lengths", [(9, 8), (1,) * 17, (1, 2, 13, 1)], ids=str)
def test_calls_on_pieces_equal_one_call(backend, tensors_for, device, lengths, documents):
    """Exact: each piece gets the last rows of y before it."""
    case = Case("", shift=3, documents=documents)
    (x, residual, residual_scale, gamma), options = tensors_for(case), case.options(device)
    whole_y, whole_shifted = run(x, residual, residual_scale, gamma, backend=backend, **options)
    key_start = options["key_start"]
    history, first = torch.zeros(2, 3, 64, device=device), 0
    for length in lengths:
        piece = slice(first, first + length)
        y, shifted = token_shift_norm(
            x[:, piece],
            residual=residual[:, piece],
            residual_scale=residual_scale,
            alpha=1.5,
            gamma=gamma,
            shift=3,
            history=history,
            key_start=None if key_start is None else key_start[:, piece],
            position=first,
            backend=backend,
        )
        assert torch.equal(y, whole_y[:, piece]) and torch.equal(shifted, whole_shifted[:, piece])
        history, first = torch.cat((history, y), dim=1)[:, -3:], first + length
    assert first == 17


def test_documents_are_separate(backend, tensors_for, device):
    """Exact, for gradients too: nothing flows back across a boundary."""
    case = Case("", batch=1, shift=2)
    x, residual, residual_scale, gamma = tensors_for(case)
    lengths = (1, 5, 2, 9)
    starts = [start for start, length in zip((0, 1, 6, 8), lengths, strict=True) for _ in range(length)]
    key_start = torch.tensor([starts], dtype=torch.int32, device=device)
    options = {"alpha": 1.5, "shift": 2, "backend": backend}
    dout = random_like([x])[0]

    def packed(x, residual):
        return run(x, residual, residual_scale, gamma, key_start=key_start, **options)[1]

    def apart(x, residual):
        pieces = zip(x.split(lengths, dim=1), residual.split(lengths, dim=1), strict=True)
        return torch.cat([run(*piece, residual_scale, gamma, **options)[1] for piece in pieces], dim=1)

    assert torch.equal(packed(x, residual), apart(x, residual))
    for found, ref in zip(*(gradients(f, (x, residual), dout) for f in (packed, apart)), strict=True):
        assert torch.equal(found, ref)


def test_later_tokens_change_nothing_before(backend, tensors_for):
    """Exact; gradients of earlier rows do not reach later tokens."""
    tensors, options = tensors_for(PLAIN), PLAIN.options()
    before = run(*tensors, backend=backend, **options)
    leaf = tensors[0].clone().requires_grad_()
    y, shifted = run(leaf, *tensors[1:], backend=backend, **options)
    (dx,) = torch.autograd.grad((y[:, :9] + shifted[:, :9]).sum(), leaf)
    assert not dx[:, 9:].any() and dx[:, :9].any(-1).all()
    tensors[0][:, 9:] = math.nan
    after = run(*tensors, backend=backend, **options)
    assert all(torch.equal(a[:, :9], b[:, :9]) for a, b in zip(after, before, strict=True))


def test_batch_entries_are_independent(backend, tensors_for):
    """Exact: permuting entries permutes the result (docs/testing.md#laws)."""
    (x, residual, *vectors), options = tensors_for(PLAIN), PLAIN.options()
    whole = run(x, residual, *vectors, backend=backend, **options)
    part = run(x[1:], residual[1:], *vectors, backend=backend, **options)
    assert all(torch.equal(a, b[1:]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("shape", [(0, 5, 16), (2, 0, 16)], ids=["no_batch", "no_tokens"])
def test_empty(backend, device, shape):
    x = torch.empty(shape, device=device, requires_grad=True)
    residual = torch.empty(shape, device=device, requires_grad=True)
    skip_for(backend, unsupported(backend, x))
    scale, gamma = (torch.ones(16, device=device, requires_grad=True) for _ in range(2))
    outputs = run(x, residual, scale, gamma, shift=1, backend=backend)
    found = torch.autograd.grad([out.sum() for out in outputs], [x, residual, scale, gamma])
    assert all(t.shape == shape for t in (*outputs, *found[:2]))
    assert not found[2].any() and not found[3].any()


# ---- threads --------------------------------------------------------------------------------------------------------


LARGE = Case("large", seqlen=700, dim=96, shift=3, documents=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_result_does_not_depend_on_the_number_of_threads(num_threads, dtype):
    """Exact: outputs and all four gradients, twice with one number of threads."""
    tensors, options = LARGE.tensors(dtype), LARGE.options(dtype=dtype)
    skip_for("cpu", unsupported("cpu", tensors[0]))
    douts = random_like([tensors[0]] * 2)

    def call(*leaves):
        return run(*leaves, backend="cpu", **options)

    results = []
    for threads in (1, 2, 3, 2):
        num_threads(threads)
        results.append((*call(*tensors), *gradients(call, tensors, douts)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_two_callers_at_once(backend, tensors_for, device):
    tensors, options = [tensors_for(LARGE, seed=seed) for seed in range(2)], LARGE.options(device)
    expected = [run(*given, backend=backend, **options) for given in tensors]

    def work(index):
        return [run(*tensors[index], backend=backend, **options) for _ in range(10)]

    for results, expected_outputs in zip(in_two_threads(work), expected, strict=True):
        for outputs in results:
            assert all(torch.equal(a, b) for a, b in zip(outputs, expected_outputs, strict=True))


# ---- torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("residual", ["scaled", "unscaled", "none"])
@pytest.mark.parametrize("documents", [False, True], ids=["one_document", "documents"])
def test_gradcheck(norm, residual, documents):
    case = Case(
        "", seqlen=4, dim=7, shift=2, norm=norm, residual=residual != "none", scaled=residual == "scaled",
        documents=documents, history=documents, position=3,
    )  # fmt: skip
    tensors = [None if t is None else t.requires_grad_() for t in case.tensors(torch.float64)]
    options = case.options(dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *leaves: run(*leaves, **options), tensors)


@pytest.mark.parametrize("name", ["deepnorm", "shift_only", "norm_only", "documents_and_history"])
def test_opcheck(backend, tensors_for, device, name):
    case = next(case for case in CASES if case.name == name)
    tensors, options = tensors_for(case), case.options(device)
    call = module.Call(
        *tensors, options["history"], options["key_start"], options["alpha"], case.shift, case.position, backend
    )
    torch.library.opcheck(module.FORWARD, tuple(call))
    dy, dshifted = random_like([tensors[0]] * 2)
    douts = (dy, dshifted) if case.shift else (dy, None)
    torch.library.opcheck(module.BACKWARD, (*douts, *call._replace(history=None)))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(backend, tensors_for, dynamic):
    x, residual, residual_scale, gamma = tensors_for(PLAIN)

    def step(x, residual, residual_scale, gamma, position):
        y, shifted = run(x, residual, residual_scale, gamma, shift=2, position=position, backend=backend)
        _, unused_y = run(y, None, None, gamma, shift=1, backend=backend)
        return (y * shifted).sum() + unused_y.square().sum()

    lengths = ((17, 2), (17, 3), (11, 5))
    calls = [((x[:, :seqlen], residual[:, :seqlen], residual_scale, gamma), position) for seqlen, position in lengths]
    assert_compiles(step, calls, dynamic)


def test_func_grad(backend, tensors_for):
    tensors, options = tensors_for(PLAIN), PLAIN.options()

    def loss(*tensors):
        y, shifted = run(*tensors, backend=backend, **options)
        return (y * shifted).sum()

    assert_functional_gradient(loss, tensors)


def test_second_derivatives_of_kernels_and_tangents_are_refused(backend, tensors_for):
    x, *_, gamma = tensors_for(PLAIN)
    x.requires_grad_()
    y, _ = token_shift_norm(x, gamma=gamma, backend=backend)
    (dx,) = torch.autograd.grad(y[..., 0].sum(), x, create_graph=True)
    if backend == "reference":
        dx.square().sum().backward()
        assert x.grad.any()
    else:
        with pytest.raises(NotImplementedError, match=r'token_shift_norm: .* again; pass backend="reference"'):
            (dx.sum() + x.sum()).backward()
    with pytest.raises(NotImplementedError, match="token_shift_norm: forward-mode"):
        torch.func.jvp(lambda x: token_shift_norm(x, gamma=gamma, backend=backend), (x,), (x,))


@pytest.mark.parametrize("used", [0, 1], ids=["y", "shifted"])
def test_one_output_alone(backend, tensors_for, used):
    tensors, options = tensors_for(PLAIN), PLAIN.options()
    dout = random_like(tensors[:1])[0]
    zero = torch.zeros_like(dout)

    def call(*leaves):
        return run(*leaves, backend=backend, **options)

    found = gradients(lambda *leaves: call(*leaves)[used], tensors, dout)
    expected = gradients(call, tensors, (dout, zero) if used == 0 else (zero, dout))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_only_requested_tensors_get_a_gradient(backend, tensors_for):
    x, residual, residual_scale, gamma = tensors_for(PLAIN)
    assert all(out.grad_fn is None for out in run(x, residual, residual_scale, gamma, shift=1, backend=backend))
    gamma.requires_grad_()
    y, shifted = run(x, residual, residual_scale, gamma, shift=1, backend=backend)
    (y + shifted).sum().backward()
    assert gamma.grad is not None and x.grad is None and residual.grad is None and residual_scale.grad is None
    with torch.no_grad():
        assert run(x, residual, residual_scale, gamma, shift=1, backend=backend)[0].grad_fn is None


def test_vectors_may_have_the_dtype_of_the_model(backend, tensors_for):
    x, residual, *vectors = tensors_for(PLAIN, torch.bfloat16)
    scale, gamma = (vector.bfloat16().requires_grad_() for vector in vectors)
    outputs = run(x, residual, scale, gamma, shift=1, backend=backend)
    expected = run(x, residual, scale.float(), gamma.float(), shift=1, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    sum(out.float().sum() for out in outputs).backward()
    assert scale.grad.dtype == gamma.grad.dtype == torch.bfloat16


def test_small_gammas_survive_half_precision(backend, tensors_for):
    """1 + gamma is formed in float32: in bfloat16 it would be 1."""
    x, *_ = tensors_for(Case("", dim=64), torch.bfloat16)
    gamma = torch.full((64,), 2**-10, dtype=torch.bfloat16, device=x.device)
    y, _ = token_shift_norm(x, gamma=gamma, backend=backend)
    plain, _ = token_shift_norm(x, gamma=torch.zeros_like(gamma), backend=backend)
    exact = torch.layer_norm(x.double(), (64,), 1 + gamma.double())
    assert_rows_close(y, exact, torch.bfloat16)
    assert not torch.equal(y, plain)


def test_meta_and_fake_tensors():
    tensors, options = PLAIN.tensors(torch.bfloat16), PLAIN.options()
    with FakeTensorMode() as mode:
        fakes = run(*map(mode.from_tensor, tensors), **options)
    for out in (*run(*(t.to("meta") for t in tensors), **options), *fakes):
        assert out.shape == tensors[0].shape and out.dtype == torch.bfloat16


def test_flops_are_counted():
    tensors, options = PLAIN.tensors(torch.float32), PLAIN.options()
    tensors[0].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        y, _ = run(*tensors, **options)
    forward = counter.get_total_flops()
    assert forward == 2 * 17 * 40 * (3 + 8)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


# ---- refusals -------------------------------------------------------------------------------------------------------


X, ROW = torch.ones(2, 5, 16), torch.ones(16)
WRONG_CALLS = {
    "x_list": ({"x": [1.0]}, TypeError, r"x must be a tensor, got list"),
    "x_ndim": ({"x": X[0]}, ValueError, r"x must have 3 dimensions \(batch, .*\), got shape \(5, 16\)"),
    "x_stride": ({"x": X.mT}, ValueError, r"x must be dense in its last dimension .* pass x.contiguous\(\)"),
    "dtype": ({"x": X.int()}, TypeError, r"x.dtype must be one of float32, .*, got int32"),
    "residual_type": ({"residual": 1.0}, TypeError, r"residual must be a tensor, got float"),
    "residual_shape": (
        {"residual": X[:1]},
        ValueError,
        r"residual must have shape \(batch, seqlen, dim\) = \(2, 5, 16\), got \(1, 5, 16\)",
    ),
    "residual_stride": ({"residual": X[:, :, :5].mT}, ValueError, r"residual must be dense in its last dimension"),
    "mixed_dtypes": ({"residual": X.half()}, TypeError, r"x, residual must have one dtype, got float32, float16"),
    "scale_alone": ({"residual_scale": ROW}, ValueError, r"residual_scale must be None without a residual"),
    "scale_shape": (
        {"residual": X, "residual_scale": ROW[:8]},
        ValueError,
        r"residual_scale must have shape \(dim,\) = \(16,\), got \(8,\)",
    ),
    "gamma_type": ({"gamma": 1.0}, TypeError, r"gamma must be a tensor, got float"),
    "gamma_shape": ({"gamma": X[0]}, ValueError, r"gamma must have shape \(dim,\) = \(16,\), got \(5, 16\)"),
    "gamma_dtype": ({"gamma": ROW.int()}, TypeError, r"gamma.dtype must be .*, got int32"),
    "device": ({"gamma": ROW.to("meta")}, ValueError, r"must be on one device, got cpu, meta"),
    "alpha": ({"alpha": "1"}, TypeError, r"alpha must be a number, got str"),
    "alpha_infinite": ({"alpha": math.inf}, ValueError, r"alpha must be finite, got inf"),
    "shift_type": ({"shift": 1.0}, TypeError, r"shift must be an int, got 1.0 \(float\)"),
    "shift_bool": ({"shift": True}, TypeError, r"shift must be an int, got True \(bool\)"),
    "shift_negative": ({"shift": -1}, ValueError, r"shift must be at least 0 and less than dim=16, got -1"),
    "shift_large": ({"shift": 16}, ValueError, r"shift must be at least 0 and less than dim=16, got 16"),
    "history_shape": (
        {"shift": 2, "history": X[:, :1]},
        ValueError,
        r"history must have shape \(batch, shift, dim\) = \(2, 2, 16\), got \(2, 1, 16\)",
    ),
    "history_dtype": (
        {"shift": 1, "history": X[:, :1].half()},
        TypeError,
        r"history.dtype must be float32, got float16",
    ),
    "history_stride": (
        {"shift": 5, "history": torch.ones(2, 16, 5).mT},
        ValueError,
        r"history must be dense in its last dimension",
    ),
    "history_gradient": (
        {"shift": 1, "history": X[:, :1].clone().requires_grad_()},
        ValueError,
        r"history must not require a gradient",
    ),
    "key_start_dtype": (
        {"shift": 1, "key_start": torch.zeros(2, 5, dtype=torch.int64)},
        TypeError,
        r"key_start.dtype must be int32, got int64",
    ),
    "key_start_shape": (
        {"shift": 1, "key_start": torch.zeros(2, 4, dtype=torch.int32)},
        ValueError,
        r"key_start must have shape \(batch, seqlen\) = \(2, 5\), got \(2, 4\)",
    ),
    "position": ({"position": 0.5}, TypeError, r"position must be an int, got 0.5 \(float\)"),
    "backend": ({"backend": "tpu"}, ValueError, r"backend must be None or one of .*, got 'tpu'"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_call(change, error, message):
    with pytest.raises(error, match=f"^token_shift_norm: .*{message}"):
        token_shift_norm(**{"x": X, **change})


def test_a_backend_that_cannot_says_why():
    with pytest.raises(NotImplementedError, match=r"(?s)backend 'triton' .* triton: +tensors on cpu"):
        token_shift_norm(X, gamma=ROW, backend="triton")
    with pytest.raises(NotImplementedError, match=r"(?s)backend 'cuda' .* cuda: "):
        token_shift_norm(X, gamma=ROW, backend="cuda")
    with pytest.raises(NotImplementedError, match=r"(?s)backend 'cpu' .* cpu: +dtype float64"):
        token_shift_norm(X.double(), gamma=ROW, backend="cpu")


def test_rows_before_their_key_start(backend, device):
    """Rows of padding, whose key_start is after them, contribute nothing, not even to themselves."""
    x = torch.arange(1.0, 16, device=device).reshape(1, 3, 5)  # segments of two channels, one left over
    key_start = torch.full((1, 3), 2, dtype=torch.int32, device=device)
    x.requires_grad_()
    _, shifted = token_shift_norm(x, shift=1, key_start=key_start, backend=backend)
    assert shifted[0].tolist() == [[0] * 5, [0] * 5, [11, 12, 0, 0, 15]]
    shifted.sum().backward()
    assert x.grad[0].tolist() == [[0] * 5, [0] * 5, [1, 1, 0, 0, 1]]
