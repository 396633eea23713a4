"""feed_forward in Triton: its own tests and laws, on an emulated A100 and H200; its kernels against float64."""

import math

import pytest
import test_feed_forward as operation
import torch
from numerics import UNIT, assert_rows_close, nan_filled

from andromeda.triton_kernels import feed_forward as kernels

pytest.importorskip("triton")
CPU = torch.device("cpu")
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
A100, H200 = {"device": "A100"}, {"device": "H200"}


def on(*settings):
    """Parametrises a test by the settings of its emulated GPU."""
    return pytest.mark.parametrize("emulated_triton", settings, indirect=True, ids=name_of)


def name_of(value):
    if isinstance(value, dict):
        return " ".join(map(str, value.values()))
    return value.__name__.removeprefix("test_") if callable(value) else operation.name_of(value)


on_one, on_both = on(A100), on(A100, H200)


def tensors_for(case, dtype=FLOAT32, seed=0):
    return case.tensors(dtype, seed=seed)


CASES = [
    *[(case, BFLOAT16) for case in operation.CASES if case.name in ("model", "no_biases", "odd", "many_rows")],
    *[(case, FLOAT16) for case in operation.CASES if case.name in ("wide", "large_products")],
    *[
        (case, FLOAT32)
        for case in operation.CASES
        if case.name in ("no_bias_in", "narrow", "one_row", "large_products")
    ],
]


@pytest.mark.parametrize(("case", "dtype"), CASES, ids=name_of)
@on_both
def test_cases(emulated_triton, case, dtype):
    with nan_filled():
        operation.test_forward("triton", tensors_for, case, dtype)
        operation.test_backward("triton", tensors_for, case, dtype)
    assert {launch.kernel for launch in emulated_triton.launches} == {"forward_kernel", "backward_kernel"}


LAWS = [
    (operation.test_a_bad_number_stays_in_its_row, math.nan),
    (operation.test_a_bad_number_stays_in_its_row, math.inf),
    (operation.test_strides_do_not_matter, BFLOAT16),
    (operation.test_strided_gradients,),
    (operation.test_rows_are_independent,),
    (operation.test_one_vector,),
    (operation.test_two_runs_agree,),
    (operation.test_what_is_kept_for_the_backward_pass,),
    (operation.test_opcheck, True),
    (operation.test_opcheck, False),
    (operation.test_func_grad,),
    (operation.test_second_derivatives_of_kernels_and_tangents_are_refused,),
    *[(operation.test_only_requested_gradients_are_computed, index) for index in (0, 2, 3, 4)],
    (operation.test_autocast, BFLOAT16),
    (operation.test_a_backward_pass_under_autocast_is_not_rounded,),
]


@pytest.mark.parametrize(("law", "arguments"), [(law, rest) for law, *rest in LAWS], ids=name_of)
@on_one
def test_laws(emulated_triton, law, arguments):
    law("triton", tensors_for, *arguments)


@on({**A100, "schedule": "reverse"}, {**H200, "schedule": "random", "seed": 7})
def test_in_another_order(emulated_triton):
    operation.test_backward("triton", tensors_for, operation.Case("", rows=(150,), hidden=300), BFLOAT16)


@pytest.mark.parametrize("shape", [(0, 5, 16), (0, 16)], ids=str)
@on_one
def test_of_nothing(emulated_triton, shape):
    operation.test_empty("triton", CPU, shape)
    assert emulated_triton.launches == []


def exact(product, bias, dactivation):
    """activation, dproduct and dbias in float64."""
    u = (product.double() + bias.double()).requires_grad_()
    activation = torch.nn.functional.gelu(u)
    (dproduct,) = torch.autograd.grad(activation, u, dactivation.double())
    return activation.detach(), dproduct, dproduct.sum(0)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=name_of)
@on_both
def test_kernels_round_once(emulated_triton, dtype):
    """The row rule, and each number by itself: the error of erf is that of float32 numbers near 1."""
    product, dactivation = 3 * torch.randn(200, 320), torch.randn(200, 320)
    product, dactivation, bias = product.to(dtype), dactivation.to(dtype), torch.randn(320).to(dtype)
    expected = exact(product, bias, dactivation)
    first, again, dproduct = (torch.full_like(product, math.nan) for _ in range(3))
    dbias = torch.full_like(bias, math.nan)
    kernels.forward(product=product, bias=bias, activation=first)
    kernels.backward(
        product=product, bias=bias, dactivation=dactivation, activation=again, dproduct=dproduct, dbias=dbias
    )
    assert torch.equal(first, again)
    for found, ref in ((first, expected[0]), (dproduct, expected[1])):
        assert_rows_close(found, ref, dtype)
        size = 1 + dactivation.double().abs() + (product.double() + bias.double()).abs()
        assert ((found.double() - ref).abs() <= UNIT[dtype] * ref.abs() + 8 * UNIT[FLOAT32] * size).all()
    assert (dbias.double() - expected[2]).abs().max() <= 1.01 * UNIT[dtype] * expected[2].abs().max() + 1e-4


@on_one
def test_far_from_zero(emulated_triton):
    """The function is 0 or its argument, its slope 0 or 1; no overflow and no 0 * inf before infinity itself."""
    product = torch.tensor([[-3e38, -200.0, -30.0, -0.0, 0.0, 30.0, 200.0, 3e38, math.inf, math.nan]])
    activation, dproduct = torch.empty_like(product), torch.empty_like(product)
    kernels.backward(
        product=product,
        bias=None,
        dactivation=torch.ones_like(product),
        activation=activation,
        dproduct=dproduct,
        dbias=None,
    )
    expected = torch.nn.functional.gelu(product.double()).float()
    torch.testing.assert_close(activation, expected, equal_nan=True)
    torch.testing.assert_close(dproduct[0, :8], torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1]))


@on_one
def test_a_misaligned_bias(emulated_triton):
    product, bias = torch.randn(9, 64), torch.randn(65)[1:]
    activation = torch.empty_like(product)
    kernels.forward(product=product, bias=bias, activation=activation)
    torch.testing.assert_close(activation, torch.nn.functional.gelu(product + bias))


@on_both
def test_one_read_and_one_write(emulated_triton):
    """In vectors of 8 numbers, and the bias once for each tile: two tiles across, and three runs of 64 rows."""
    tensors = operation.Case("", rows=(130,), hidden=512, dim=16, dim_out=16).tensors(BFLOAT16)
    operation.gradients(
        lambda *t: operation.feed_forward(*t, backend="triton"), tensors, torch.ones(130, 16).bfloat16()
    )
    forward, backward = emulated_triton.launches
    assert forward.grid == (66, 1, 1) and backward.grid == (6, 1, 1)
    assert forward.block == backward.block == (64, 1, 1)
    vectors = 130 * 512 // 8
    assert forward.counters.global_accesses == 2 * vectors + 66 * 64  # every thread loads its part of the bias
    assert backward.counters.global_accesses == 4 * vectors + 6 * (64 + 64)


@on_one
def test_matrices_beyond_32_bits(emulated_triton):
    """The last tiles of matrices of 5e9 numbers; the programs before them do not run."""
    emulator, shape = emulated_triton, (2**21 + 3, 2400)
    given = [emulator.sparse(shape, FLOAT16, name=name) for name in ("product", "dactivation")]
    results = [emulator.sparse(shape, FLOAT16, name=name) for name in ("activation", "again", "dproduct")]
    bias = torch.zeros(2400).half()
    values = torch.randn(2, 3, 2400).half()
    for tensor, rows in zip(given, values, strict=True):
        tensor.memory[-3:] = rows
    across, down = 10, 2**19
    emulator.settings.blocks = tuple(range(across * down, across * (down + 1)))
    kernels.forward(product=given[0], bias=emulator.tensor(bias, name="bias"), activation=results[0])
    emulator.settings.blocks = tuple(range(across * down // 16, across * (down // 16 + 1)))
    options = {"bias": emulator.tensor(bias, name="bias"), "dbias": None}
    kernels.backward(product=given[0], dactivation=given[1], activation=results[1], dproduct=results[2], **options)
    activation, dproduct, _ = exact(values[0], bias, values[1])
    for tensor, ref in zip(results, (activation, activation, dproduct), strict=True):
        assert_rows_close(tensor.memory[-3:], ref, FLOAT16)
