"""linear_cross_entropy: every backend against float64; the Triton kernel in the emulator."""

import dataclasses
import importlib
import math
from pathlib import Path

import pytest
import torch
from numerics import UNIT, assert_elements_close, assert_no_worse, assert_rows_close
from op_cases import BFLOAT16, DTYPES, FLOAT16, FLOAT32, assert_compiles, assert_functional_gradient, name_of, skip_for
from op_cases import Case as Base
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from andromeda import linear_cross_entropy
from andromeda.ops import linear_cross_entropy as module
from andromeda.ops._select import BACKENDS
from andromeda.ops.linear_cross_entropy import unsupported
from andromeda.reference import linear_cross_entropy as reference

pytestmark = pytest.mark.usefixtures("nan_filled")

LOSS = 1e-6  # relative error of a float32 loss
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@dataclasses.dataclass(frozen=True)
class Case(Base):
    name: str = ""
    shape: tuple = (2, 9)  # of the targets
    dim: int = 24
    num_tokens: int = 61
    ignored: float = 0.3  # share of the targets
    z_loss: float = 0.0
    scale: float = 1.0  # of the logits' standard deviation

    def tensors(self, dtype, device="cpu", seed=0):
        """hidden, weight and targets."""
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(*self.shape, self.dim, generator=generator, dtype=torch.float64)
        weight = torch.randn(self.num_tokens, self.dim, generator=generator, dtype=torch.float64)
        targets = torch.randint(self.num_tokens, self.shape, generator=generator)
        ignored = torch.rand(self.shape, generator=generator) < self.ignored
        weight *= self.scale / self.dim**0.5
        targets = targets.masked_fill(ignored, -100)
        return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)

    @staticmethod
    def unsupported(backend, hidden, weight, targets):
        return unsupported(backend, hidden, weight)


CASES = [
    Case("plain"),
    Case("z_loss", z_loss=0.05),
    Case("all_count", shape=(17,), ignored=0),
    Case("one_row", shape=(), ignored=0),
    Case("two_tokens", num_tokens=2, dim=3),
    Case("one_token", num_tokens=1),  # its loss is 0
    Case("peaked", scale=30, z_loss=1e-3),
    Case("huge", scale=3000, z_loss=1e-6),
    Case("wide", shape=(3, 50), dim=70, num_tokens=1025),
    Case("large_vocabulary", shape=(13,), dim=16, num_tokens=20011, z_loss=1e-3),
    Case("many_rows", shape=(4, 700), dim=8, num_tokens=33),
]
PLAIN = CASES[1]


def exact_loss(hidden, weight, targets, z_loss=0.0):
    logits = functional.linear(hidden, weight).reshape(-1, len(weight))
    counted = targets.flatten() != -100
    loss = functional.cross_entropy(logits, targets.flatten(), ignore_index=-100)
    return loss + z_loss * logits[counted].logsumexp(-1).square().mean()


def gradients(function, hidden, weight, targets):
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    return torch.autograd.grad(function(*leaves, targets), leaves)


def exact_results(hidden, weight, targets, z_loss=0.0):
    """In float64 the loss, its gradients, the sums of the absolute values of the terms of each, and the largest such
    sum of a logit."""
    hidden, weight = hidden.double(), weight.double()
    loss = exact_loss(hidden, weight, targets, z_loss)
    results = gradients(lambda *tensors: exact_loss(*tensors, z_loss), hidden, weight, targets)
    rows, index = hidden.reshape(-1, hidden.shape[-1]), targets.flatten()
    logits = rows @ weight.T
    counted = (index != -100)[:, None]
    terms = logits.softmax(-1) * (1 + 2 * z_loss * logits.logsumexp(-1, keepdim=True))
    terms = terms.scatter_add(1, index.clamp_min(0)[:, None], torch.ones_like(terms[:, :1])) * counted / counted.sum()
    sizes = (terms @ weight.abs()).view(hidden.shape), terms.T @ rows.abs()
    return loss, results, sizes, (rows.abs() @ weight.abs().T).max().item()


def rounded_logits(backend, dtype):
    """Whether the logits are rounded to the dtype of hidden, as in a model that computes them."""
    return backend == "triton" and dtype != FLOAT32


def assert_loss_close(loss, exact, hidden, weight, rounded):
    limit = LOSS * max(abs(exact.item()), 1.0)
    if rounded:
        limit += 2 * UNIT[hidden.dtype] * (hidden.double() @ weight.double().T).abs().max().item()
    assert abs(loss.double() - exact).item() <= limit


def assert_gradients_close(found, exact, sizes, logit_range, naive, rounded):
    for gradient, ref, size, plain in zip(found, exact, sizes, naive, strict=True):
        assert gradient.dtype == plain.dtype and gradient.shape == plain.shape
        if rounded:
            assert_no_worse(gradient, plain, ref)
        else:
            assert_rows_close(gradient, ref, gradient.dtype, kind="gradient", magnitude=size, logit_range=logit_range)
            assert_elements_close(gradient, ref, size, logit_range=logit_range)


def naive_loss(hidden, weight, targets, z_loss=0.0):
    """Logits in the dtype of hidden, the loss in float32."""
    logits = functional.linear(hidden, weight).float().reshape(-1, len(weight))
    loss = functional.cross_entropy(logits, targets.flatten(), ignore_index=-100)
    return loss + z_loss * logits[targets.flatten() != -100].logsumexp(-1).square().mean()


# ---- against float64 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_loss_and_gradients(backend, tensors_for, case, dtype):
    tensors, z_loss = tensors_for(case, dtype), case.z_loss
    loss = linear_cross_entropy(*tensors, z_loss=z_loss, backend=backend)
    assert loss.shape == () and loss.dtype == FLOAT32
    exact, *expected = exact_results(*tensors, z_loss)
    rounded = rounded_logits(backend, dtype)
    assert_loss_close(loss, exact, *tensors[:2], rounded)
    found = gradients(lambda *t: linear_cross_entropy(*t, z_loss=z_loss, backend=backend), *tensors)
    naive = gradients(lambda *t: naive_loss(*t, z_loss), *tensors)
    assert_gradients_close(found, *expected, naive, rounded)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_float64_takes_the_reference(case):
    tensors = case.tensors(torch.float64)
    exact, expected, *_ = exact_results(*tensors, case.z_loss)
    torch.testing.assert_close(linear_cross_entropy(*tensors, z_loss=case.z_loss), exact, rtol=1e-14, atol=1e-14)
    found = gradients(lambda *t: linear_cross_entropy(*t, z_loss=case.z_loss), *tensors)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_default_backend_is_the_first_that_can():
    tensors = PLAIN.tensors(FLOAT32)
    first = next(name for name in BACKENDS if not unsupported(name, *tensors[:2]))
    assert torch.equal(linear_cross_entropy(*tensors), linear_cross_entropy(*tensors, backend=first))


def test_blocks_change_nothing(backend, tensors_for, monkeypatch):
    """Blocks of few rows, and few tokens of the vocabulary at a time."""
    for name in ("REFERENCE_BLOCK_LOGITS", "CPU_BLOCK_LOGITS", "GPU_BLOCK_LOGITS"):
        monkeypatch.setattr(module, name, 7 * 203)
    monkeypatch.setattr(module, "CPU_TOKENS", 50)
    monkeypatch.setattr(module, "CPU_ROWS_WITHOUT_GRADIENT", 7)
    tensors = tensors_for(Case("", shape=(3, 171), num_tokens=203))

    def call(*tensors):
        return linear_cross_entropy(*tensors, z_loss=0.1, backend=backend)

    exact, *expected = exact_results(*tensors, 0.1)
    assert_loss_close(call(*tensors), exact, *tensors[:2], rounded=False)
    naive = gradients(lambda *t: naive_loss(*t, 0.1), *tensors)
    assert_gradients_close(gradients(call, *tensors), *expected, naive, rounded=False)


def test_memory_without_the_logits(monkeypatch):
    """Of 1024 rows and 50304 tokens the logits take 206 MB: a call adds no more than 64 MB to its gradients."""
    if not BENCHMARKS.exists():
        pytest.skip("the benchmarks, which measure memory, are not part of this copy")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    peak_memory_mb = importlib.import_module("timing").peak_memory_mb
    hidden, weight, targets = Case("", shape=(1024,), dim=32, num_tokens=50304).tensors(FLOAT32)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step():
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, targets, backend="cpu").backward()

    step()
    if (peak := peak_memory_mb(step, "cpu")) is None:
        pytest.skip("the peak memory of a process is not known here")
    assert peak <= 64 + (hidden.numel() + weight.numel()) * 4 / 2**20


# ---- what counts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [7, 7.0, "tensor", "integer tensor"])
def test_calls_that_share_a_mean(backend, tensors_for, device, count):
    tensors = tensors_for(PLAIN)
    if isinstance(count, str):
        count = torch.tensor(7, dtype=FLOAT32 if count == "tensor" else torch.int64, device=device)
    options = {"z_loss": PLAIN.z_loss, "backend": backend}
    mean, counted = linear_cross_entropy(*tensors, **options), (tensors[2] != -100).sum()
    shared = linear_cross_entropy(*tensors, count=count, **options)
    torch.testing.assert_close(shared, mean * counted / 7)
    found = gradients(lambda *t: linear_cross_entropy(*t, count=count, **options), *tensors)
    whole = gradients(lambda *t: linear_cross_entropy(*t, **options), *tensors)
    torch.testing.assert_close(found, tuple(gradient * counted / 7 for gradient in whole))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=name_of)
@pytest.mark.parametrize("shape", [(4,), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("num_tokens", [5, 0])
def test_no_target(backend, device, dtype, shape, num_tokens):
    """It is an error on its own; as a part of a mean over several calls it is 0 with gradients of 0."""
    hidden = torch.ones(*shape, 3, device=device, dtype=dtype)
    weight = torch.ones(num_tokens, 3, device=device, dtype=dtype)
    skip_for(backend, unsupported(backend, hidden, weight))
    none = torch.full(shape, -100, device=device)
    for count in (0, torch.tensor(0, device=device), 3):
        loss = linear_cross_entropy(hidden, weight, none, count=count, backend=backend)
        found = gradients(lambda *t: linear_cross_entropy(*t, count=count, backend=backend), hidden, weight, none)  # noqa: B023
        assert loss.item() == 0 and not found[0].any() and not found[1].any()
    if device.type == "cpu":
        with pytest.raises(ValueError, match="targets must hold one other than ignore_index=-100"):
            linear_cross_entropy(hidden, weight, none, backend=backend)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_rows_that_do_not_count_change_nothing(backend, tensors_for, value):
    hidden, weight, targets = tensors_for(PLAIN)
    ignored = (targets == -100)[..., None]

    def call(*tensors):
        return linear_cross_entropy(*tensors, z_loss=0.1, backend=backend)

    spoilt = hidden.masked_fill(ignored, value)
    assert torch.equal(call(spoilt, weight, targets), call(hidden, weight, targets))
    found, expected = gradients(call, spoilt, weight, targets), gradients(call, hidden, weight, targets)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not found[0].masked_select(ignored).any()


def test_another_ignored_label(backend, tensors_for):
    hidden, weight, targets = tensors_for(PLAIN)
    expected = linear_cross_entropy(hidden, weight, targets, backend=backend)
    moved = targets.masked_fill(targets == 5, 6)
    found = linear_cross_entropy(hidden, weight, moved.masked_fill(targets == -100, 5), ignore_index=5, backend=backend)
    torch.testing.assert_close(found, linear_cross_entropy(hidden, weight, moved, backend=backend))
    assert torch.equal(moved, targets) or not torch.equal(found, expected)


def test_a_bad_number_in_a_row_that_counts_is_seen(backend, tensors_for):
    hidden, weight, targets = tensors_for(Case("", ignored=0))
    hidden[0, 3, 5] = math.nan
    assert linear_cross_entropy(hidden, weight, targets, backend=backend).isnan()


@pytest.mark.parametrize("wrong", [-1, 61, 2**40])
def test_targets_outside_the_vocabulary(wrong):
    hidden, weight, targets = PLAIN.tensors(FLOAT32)
    targets[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"targets must be below the vocabulary size 61, or -100, got {wrong}"):
        linear_cross_entropy(hidden, weight, targets)
    call, options = (hidden[1], weight, targets[1]), {"ignore_index": -100, "z_loss": 0.0}
    total = reference.linear_cross_entropy(*call, **options)
    dhidden, _ = reference.linear_cross_entropy_backward(torch.ones(()), *call, **options)
    assert total.isnan() and dhidden[2].isnan().all()


# ---- laws -----------------------------------------------------------------------------------------------------------


def test_strides_do_not_matter(backend, tensors_for, device):
    hidden, weight, targets = tensors_for(PLAIN)

    def call(*tensors):
        return linear_cross_entropy(*tensors, backend=backend)

    around = torch.full((2, 12, 30), math.nan, device=device)
    around[:, 2:11, 3:27] = hidden
    wide = torch.full((70, 31), math.nan, device=device)
    wide[4:65, 5:29] = weight
    expected = call(hidden, weight, targets), *gradients(call, hidden, weight, targets)
    for given in (
        (around[:, 2:11, 3:27], wide[4:65, 5:29], targets),
        (hidden.transpose(0, 1).contiguous().transpose(0, 1), weight.T.contiguous().T, targets.T.contiguous().T),
        (hidden.transpose(0, 2).contiguous().transpose(0, 2), weight, targets),
    ):
        for found, ref in zip((call(*given), *gradients(call, *given)), expected, strict=True):
            torch.testing.assert_close(found, ref)
    one = hidden[:, :1].expand(-1, 9, -1)
    torch.testing.assert_close(call(one, weight, targets), call(one.contiguous(), weight, targets))


def test_two_runs_agree_bit_for_bit(backend, tensors_for):
    tensors = tensors_for(Case("", shape=(300,), num_tokens=999))

    def call(*tensors):
        return linear_cross_entropy(*tensors, backend=backend)

    first, second = ((call(*tensors), *gradients(call, *tensors)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_requested_gradients_are_computed(backend, tensors_for):
    hidden, weight, targets = tensors_for(PLAIN)
    whole = gradients(lambda *t: linear_cross_entropy(*t, backend=backend), hidden, weight, targets)
    for number in range(2):
        leaves = [hidden.clone(), weight.clone()]
        leaves[number].requires_grad_()
        linear_cross_entropy(*leaves, targets, backend=backend).backward()
        assert leaves[1 - number].grad is None
        torch.testing.assert_close(leaves[number].grad, whole[number])
    for with_dhidden, with_dweight in ((True, False), (False, True), (False, False)):
        call = module.Call(
            hidden.flatten(0, 1), weight, targets.flatten(), -100, 0.0, with_dhidden, with_dweight, backend
        )
        _, dhidden, dweight = module.FORWARD(*call)
        assert dhidden.numel() == with_dhidden * hidden.numel() and dweight.numel() == with_dweight * weight.numel()
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight.clone().requires_grad_(), targets, backend=backend).grad_fn is None


def test_a_graph_that_is_kept(backend, tensors_for):
    """The gradients of one pass are the caller's: neither pass changes those of the other."""
    hidden, weight, targets = tensors_for(PLAIN)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy(*leaves, targets, backend=backend)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    copies = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    for gradient in second:
        gradient.zero_()
    third = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
    torch.testing.assert_close(third, first)
    loss = linear_cross_entropy(*leaves, targets, backend=backend)
    for _ in range(2):
        loss.backward(retain_graph=True)
    torch.testing.assert_close([leaf.grad for leaf in leaves], [2 * gradient for gradient in first])


def test_two_losses_of_one_weight(backend, tensors_for):
    hidden, weight, targets = tensors_for(PLAIN)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def call(scale):
        return linear_cross_entropy(scale * leaves[0], leaves[1], targets, backend=backend)

    (call(1.0) + 2 * call(0.5)).backward()
    one, half = (torch.autograd.grad(call(scale), leaves) for scale in (1.0, 0.5))
    for leaf, a, b in zip(leaves, one, half, strict=True):
        torch.testing.assert_close(leaf.grad, a + 2 * b)


def test_saved_tensors_may_be_moved_or_recomputed(backend, tensors_for):
    tensors = tensors_for(PLAIN)

    def call(*tensors):
        return linear_cross_entropy(*tensors, backend=backend)

    expected = gradients(call, *tensors)
    found = gradients(lambda *t: checkpoint(call, *t, use_reentrant=False), *tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    with torch.autograd.graph.save_on_cpu():
        found = gradients(call, *tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ---- torch ----------------------------------------------------------------------------------------------------------


def test_autocast(backend, tensors_for, device):
    """hidden and weight are cast as for a product; float64 is not."""
    hidden, weight, targets = tensors_for(PLAIN)
    skip_for(backend, unsupported(backend, hidden.bfloat16(), weight))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast(device.type, torch.bfloat16):
        loss = linear_cross_entropy(*leaves, targets, backend=backend)
    expected = linear_cross_entropy(*(leaf.bfloat16() for leaf in leaves), targets, backend=backend)
    assert torch.equal(loss, expected)
    found, ref = (torch.autograd.grad(result, leaves) for result in (loss, expected))
    assert all(torch.equal(a, b) and a.dtype == FLOAT32 for a, b in zip(found, ref, strict=True))
    with torch.autocast(device.type, torch.bfloat16):
        wide = linear_cross_entropy(hidden.double(), weight.double(), targets)
    assert wide.dtype == torch.float64 and wide == linear_cross_entropy(hidden.double(), weight.double(), targets)


def test_gradcheck():
    hidden, weight, targets = Case("", shape=(4,), dim=3, num_tokens=6).tensors(torch.float64)
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, targets, z_loss=0.2), leaves)
    assert torch.autograd.gradgradcheck(
        lambda *t: linear_cross_entropy(*t, targets, z_loss=0.2, backend="reference"), leaves
    )


def test_second_derivatives_of_kernels_and_tangents_are_refused(backend, tensors_for):
    hidden, weight, targets = tensors_for(PLAIN)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, backend=backend)
    (dhidden,) = torch.autograd.grad(loss, hidden, create_graph=True)
    if backend == "reference":
        dhidden.square().sum().backward()
        assert hidden.grad.any()
    else:
        with pytest.raises(NotImplementedError, match=r'linear_cross_entropy: .* again; pass backend="reference"'):
            (dhidden.sum() + hidden.sum()).backward()
    with pytest.raises(NotImplementedError, match="linear_cross_entropy: forward-mode"):
        torch.func.jvp(lambda x: linear_cross_entropy(x, weight, targets, backend=backend), (hidden,), (hidden,))


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_opcheck(backend, tensors_for, wanted):
    hidden, weight, targets = tensors_for(PLAIN)
    call = module.Call(hidden.flatten(0, 1), weight, targets.flatten(), -100, 0.1, *wanted, backend)
    torch.library.opcheck(module.FORWARD, tuple(call))
    torch.library.opcheck(module.BACKWARD, (torch.ones((), device=hidden.device), *call))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(backend, tensors_for, dynamic):
    hidden, weight, targets = tensors_for(PLAIN)

    def step(hidden, weight, seqlen):
        return linear_cross_entropy(hidden * 2, weight, targets[:, :seqlen], z_loss=0.1, backend=backend)

    assert_compiles(step, [((hidden[:, :seqlen], weight), seqlen) for seqlen in (9, 9, 6)], dynamic)


def test_func_grad(backend, tensors_for):
    hidden, weight, targets = tensors_for(PLAIN)
    assert_functional_gradient(
        lambda *t: linear_cross_entropy(*t, targets, z_loss=0.1, backend=backend), (hidden, weight)
    )


def test_meta_and_fake_tensors():
    hidden, weight, targets = PLAIN.tensors(BFLOAT16)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (hidden, weight, targets)]
        fakes[1].requires_grad_()
        loss = linear_cross_entropy(*fakes)
        loss.backward()
    assert loss.shape == () and loss.dtype == FLOAT32
    assert fakes[1].grad.shape == weight.shape and fakes[1].grad.dtype == BFLOAT16
    assert linear_cross_entropy(*(t.to("meta") for t in (hidden, weight, targets))).dtype == FLOAT32


def test_flops_are_counted():
    hidden, weight, targets = PLAIN.tensors(FLOAT32)
    product = 2 * 18 * 24 * 61
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, targets)
    assert counter.get_total_flops() == product
    with FlopCounterMode(display=False) as counter:
        loss = linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), targets)
        loss.backward(retain_graph=True)
    assert counter.get_total_flops() == 3 * product
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counter.get_total_flops() == 3 * product


# ---- refusals -------------------------------------------------------------------------------------------------------


HIDDEN, WEIGHT, TARGETS = torch.ones(2, 5, 8), torch.ones(11, 8), torch.zeros(2, 5, dtype=torch.int64)
WRONG_CALLS = {
    "hidden_list": ({"hidden": [1.0]}, TypeError, r"hidden must be a tensor, got list"),
    "targets_list": ({"targets": [1]}, TypeError, r"targets must be a tensor, got list"),
    "hidden_ndim": ({"hidden": torch.tensor(1.0)}, ValueError, r"must have shapes \(..., dim\) and .* got \(\) and"),
    "weight_ndim": ({"weight": WEIGHT[0]}, ValueError, r"must have shapes .* got \(2, 5, 8\) and \(8,\)"),
    "dim": ({"weight": WEIGHT[:, :7]}, ValueError, r"must have shapes .* got \(2, 5, 8\) and \(11, 7\)"),
    "dtype": ({"hidden": HIDDEN.int()}, TypeError, r"hidden.dtype must be one of float32, .*, got int32"),
    "mixed_dtypes": ({"weight": WEIGHT.half()}, TypeError, r"hidden, weight must have one dtype, got float32, float16"),
    "targets_shape": (
        {"targets": TARGETS[:, :4]},
        ValueError,
        r"targets must have shape \(hidden.shape\[0\], hidden.shape\[1\]\) = \(2, 5\), got \(2, 4\)",
    ),
    "targets_dtype": ({"targets": TARGETS.int()}, TypeError, r"targets.dtype must be int64, got int32"),
    "device": ({"weight": WEIGHT.to("meta")}, ValueError, r"must be on one device, got cpu, meta, cpu"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, r"ignore_index must be an int, got 1.5 \(float\)"),
    "count": ({"count": "1"}, TypeError, r"count must be a number, got str"),
    "count_shape": (
        {"count": torch.ones(2)},
        ValueError,
        r"must be a number or a scalar tensor, got shape \(2,\)",
    ),
    "z_loss": ({"z_loss": math.nan}, ValueError, r"z_loss must be finite, got nan"),
    "backend": ({"backend": "tpu"}, ValueError, r"backend must be None or one of .*, got 'tpu'"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG_CALLS.values(), ids=WRONG_CALLS)
def test_wrong_call(change, error, message):
    with pytest.raises(error, match=f"^linear_cross_entropy: .*{message}"):
        linear_cross_entropy(**{"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, **change})


def test_a_backend_that_cannot_says_why():
    with pytest.raises(NotImplementedError, match=r"(?s)backend 'triton' .* triton: +tensors on cpu"):
        linear_cross_entropy(HIDDEN, WEIGHT, TARGETS, backend="triton")
    with pytest.raises(NotImplementedError, match=r"(?s)backend 'cuda' .* cuda: +no CUDA kernel"):
        linear_cross_entropy(HIDDEN, WEIGHT, TARGETS, backend="cuda")
    with pytest.raises(NotImplementedError, match=r"(?s)backend 'cpu' .* cpu: +dtype float64"):
        linear_cross_entropy(HIDDEN.double(), WEIGHT.double(), TARGETS, backend="cpu")


# ---- the Triton kernel, emulated ------------------------------------------------------------------------------------

GPUS = [{"device": "A100"}, {"device": "H200"}]


@pytest.mark.parametrize("emulated_triton", GPUS, indirect=True, ids=lambda settings: settings["device"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("num_tokens", [61, 1024, 17000])
def test_emulated_operation(emulated_triton, dtype, num_tokens):
    """A small vocabulary, one that fills a tile, one of two tiles and a rest; blocks of rows with a rest."""
    case = Case("", shape=(2, 4), num_tokens=num_tokens, z_loss=0.05)
    tensors = case.tensors(dtype)

    def call(*tensors):
        return linear_cross_entropy(*tensors, z_loss=0.05, backend="triton")

    exact, *expected = exact_results(*tensors, 0.05)
    rounded = rounded_logits("triton", dtype)
    assert_loss_close(call(*tensors), exact, *tensors[:2], rounded)
    found, naive = gradients(call, *tensors), gradients(lambda *t: naive_loss(*t, 0.05), *tensors)
    assert_gradients_close(found, *expected, naive, rounded)
    assert [launch.grid for launch in emulated_triton.launches] == [(8, 1, 1)] * 2


def exact_rows(logits, targets, z_loss):
    """The losses of rows of logits and their gradients, in float64."""
    logits = logits.double().requires_grad_()
    losses = functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    losses = losses + z_loss * logits.logsumexp(-1).square().masked_fill(targets == -100, 0)
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("kind", ["aligned", "odd stride", "peaked", "equal", "huge", "large vocabulary"])
def test_emulated_rows(emulated_triton, dtype, kind):
    """The kernel alone: each row's loss, and its gradient in place of the logits; NaN between the rows stays."""
    from andromeda.triton_kernels import linear_cross_entropy as kernels

    num_tokens = 16391 if kind == "large vocabulary" else 777
    stride = num_tokens + (4 if kind == "odd stride" else 64 - num_tokens % 64)
    memory = torch.full((5, stride), math.nan, dtype=dtype)
    scale = {"peaked": 100.0, "equal": 0.0, "huge": 3e3}.get(kind, 3.0)
    memory[:, :num_tokens] = scale * torch.randn(5, num_tokens)
    logits, targets = memory[:, :num_tokens], torch.tensor([0, num_tokens - 1, -100, 5, 600])
    expected, gradient = exact_rows(logits, targets, 0.01)
    for with_gradient in (False, True):
        losses = torch.empty(5)
        kernels.forward(
            logits=logits, targets=targets, losses=losses, ignore_index=-100, z_loss=0.01, with_gradient=with_gradient
        )
        assert ((losses.double() - expected).abs() <= LOSS * expected.abs().clamp_min(scale)).all()
    # An exponential's relative error is that of its exponent, some units of the largest logit.
    assert_rows_close(logits, gradient, dtype, kind="gradient", magnitude=gradient.abs(), logit_range=0.0)
    assert_elements_close(logits, gradient, gradient.abs() + UNIT[dtype], logit_range=4 * scale)
    assert memory[:, num_tokens:].isnan().all()


def test_emulated_target_outside_the_vocabulary(emulated_triton):
    """No access outside the row, and a loss and gradient that cannot be overlooked."""
    from andromeda.triton_kernels import linear_cross_entropy as kernels

    logits, targets, losses = torch.randn(4, 61), torch.tensor([-1, 61, 2**40, 3]), torch.empty(4)
    kernels.forward(logits=logits, targets=targets, losses=losses, ignore_index=-100, z_loss=0.0, with_gradient=True)
    assert losses.isnan().tolist() == [True, True, True, False]
    assert logits.isnan().all(1).tolist() == [True, True, True, False] and not logits[3].isnan().any()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_emulated_rows_that_do_not_count(emulated_triton, value):
    hidden, weight, targets = PLAIN.tensors(FLOAT16)
    ignored = (targets == -100)[..., None]

    def call(hidden):
        return linear_cross_entropy(hidden, weight, targets, backend="triton")

    assert torch.equal(call(hidden.masked_fill(ignored, value)), call(hidden))
