"""Operations, loss and model under torch.func, fake tensors and tracing; second derivatives."""

import functools
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacrev, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from andromeda import Andromeda, attention, linear_cross_entropy, qk_norm_rotary
from andromeda.generation import Cache
from andromeda.model import cross_entropy
from andromeda.ops import _checks, _persistent
from andromeda.ops.feed_forward import feed_forward
from andromeda.ops.token_shift_norm import token_shift_norm

WIDE = torch.float64
START = torch.tensor([[0, 0, 1, 2, 2], [0, 1, 1, 3, 6]], dtype=torch.int32)  # the last row sees nothing
SLOPES = torch.tensor([0.5, 0.0])
LABELS = (torch.arange(10) % 7).masked_fill(torch.arange(10) == 3, -100).view(2, 5)


def attend(q, k, v, **options):
    return attention(q, k, v, causal=True, alibi_slopes=SLOPES, key_start=START, **options)


def rotate(q, k, q_scale, k_scale, **options):
    options |= dict(rotary_dim=4, xpos=True, position=3, q_multiplier=1.7)
    return torch.cat(qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, **options), dim=2)


def shift(x, residual, residual_scale, gamma, **options):
    options |= dict(residual=residual, residual_scale=residual_scale, gamma=gamma, alpha=1.5, shift=2, key_start=START)
    return torch.cat(token_shift_norm(x, **options), dim=2)


def shift_alone(x, **options):
    return token_shift_norm(x, shift=2, **options)[1]


def losses(logits, **options):
    return cross_entropy(logits.flatten(0, 1), LABELS.flatten())


def losses_of_hidden(hidden, weight, **options):
    return linear_cross_entropy(hidden, weight, LABELS, z_loss=0.1, **options)[None]


# name -> the function, the shapes of its tensors, the number of tensors with a batch
OPERATIONS = {
    "attention": (attend, ((2, 5, 2, 8), (2, 6, 1, 8), (2, 6, 1, 8)), 3),
    "qk_norm_rotary": (rotate, ((2, 5, 2, 8), (2, 5, 1, 8), (2, 8), (1, 8)), 2),
    "token_shift_norm": (shift, ((2, 5, 7), (2, 5, 7), (7,), (7,)), 2),
    "feed_forward": (feed_forward, ((2, 5, 7), (9, 7), (9,), (6, 9), (6,)), 1),
    "token shift alone": (shift_alone, ((2, 5, 7),), 1),
    "cross_entropy": (losses, ((2, 5, 7),), 1),
    "linear_cross_entropy": (losses_of_hidden, ((2, 5, 4), (7, 4)), 1),
}
# Their gradients have no derivative.
KERNELS = ["attention", "qk_norm_rotary", "token_shift_norm", "linear_cross_entropy", "feed_forward"]
operations = pytest.mark.parametrize("name", OPERATIONS)


def tensors_of(name, dtype=torch.float32, mapped=()):
    """Tensors for an operation; those whose numbers are in `mapped` have an axis of 3 in front."""
    _, shapes, _ = OPERATIONS[name]
    return [torch.rand(*(3,) * (i in mapped), *shape, dtype=dtype) + 0.1 for i, shape in enumerate(shapes)]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- torch.func -----------------------------------------------------------------------------------------------------


def each_mapped(name):
    """All tensors, each alone."""
    count = len(OPERATIONS[name][1])
    return [tuple(range(count)), *((i,) for i in range(count))]


def looped(function, tensors, mapped):
    calls = [function(*(t[i] if j in mapped else t for j, t in enumerate(tensors))) for i in range(3)]
    return torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *calls)


@operations
@pytest.mark.parametrize("chosen", [None, "reference"])
def test_vmap_equals_a_loop(name, chosen):
    function = functools.partial(OPERATIONS[name][0], backend=chosen)
    for mapped in each_mapped(name):
        tensors = tensors_of(name, mapped=mapped)
        in_dims = tuple(0 if i in mapped else None for i in range(len(tensors)))
        close(vmap(function, in_dims)(*tensors), looped(function, tensors, mapped))


@operations
@pytest.mark.parametrize("chosen", [None, "reference"])
def test_gradients_per_sample_equal_a_loop(name, chosen):
    function = functools.partial(OPERATIONS[name][0], backend=chosen)
    weights = torch.rand_like(function(*tensors_of(name)))
    for mapped in each_mapped(name):
        tensors = tensors_of(name, mapped=mapped)
        gradient = grad(lambda *t: (function(*t) * weights).sum(), argnums=tuple(range(len(tensors))))
        in_dims = tuple(0 if i in mapped else None for i in range(len(tensors)))
        close(vmap(gradient, in_dims)(*tensors), looped(gradient, tensors, mapped))


@operations
@pytest.mark.parametrize("chosen", [None, "reference"])
def test_a_gradient_through_vmap_is_that_of_a_loop(name, chosen):
    """Even if the tensors are leaves of ordinary autograd, which a mapped tensor does not know."""
    function = functools.partial(OPERATIONS[name][0], backend=chosen)
    for mapped in each_mapped(name):
        tensors = tensors_of(name, mapped=mapped)
        in_dims = tuple(0 if i in mapped else None for i in range(len(tensors)))
        out = looped(function, leaves := [t.clone().requires_grad_() for t in tensors], mapped)
        weights = torch.rand_like(out)
        expected = torch.autograd.grad((out * weights).sum(), leaves)
        out = vmap(function, in_dims)(*(leaves := [t.clone().requires_grad_() for t in tensors]))
        close(torch.autograd.grad((out * weights).sum(), leaves), expected)
        numbers = tuple(range(len(tensors)))
        found = grad(lambda *t: (vmap(function, in_dims)(*t) * weights).sum(), argnums=numbers)(*tensors)  # noqa: B023
        close(found, expected)


@operations
def test_any_axis_may_be_mapped_and_vmap_nested(name):
    function = OPERATIONS[name][0]
    tensors = tensors_of(name)
    first = torch.stack([tensors[0] + i for i in range(6)])
    expected = torch.stack([function(x, *tensors[1:]) for x in first])
    for axis in range(1, tensors[0].ndim):
        close(vmap(lambda x: function(x, *tensors[1:]), axis)(first.movedim(0, axis).contiguous()), expected)
    nested = vmap(vmap(lambda x: function(x, *tensors[1:])))(first.unflatten(0, (2, 3)))
    close(nested, expected.unflatten(0, (2, 3)))


@operations
def test_jacobian_equals_that_of_autograd(name):
    function = OPERATIONS[name][0]
    tensors = tensors_of(name)
    expected = torch.autograd.functional.jacobian(lambda x: function(x, *tensors[1:]), tensors[0])
    close(jacrev(lambda x: function(x, *tensors[1:]))(tensors[0]), expected)
    out, pull = vjp(lambda x: function(x, *tensors[1:]), tensors[0])
    close(pull(torch.ones_like(out))[0], expected.flatten(0, out.ndim - 1).sum(0) if out.ndim else expected)


def test_the_largest_promise_holds_for_all_calls():
    """logit_bound comes from parameters, so in an ensemble it is mapped. A bound too small would skip far keys."""
    k = torch.zeros(1, 600, 1, 8)
    k[:, :400, :, 0], k[:, 400:, :, 0] = 1.0, -1.0
    q = torch.zeros(2, 1, 600, 1, 8)
    q[1, ..., 0] = 60.0  # its scores are 21 far away and -21 near by
    options = {"causal": True, "alibi_slopes": torch.tensor([0.1])}
    bound = q.abs().amax((1, 2, 4)) * 8**-0.5
    v = torch.randn(1, 600, 1, 8)
    found = vmap(lambda q, bound: attention(q, k, v, logit_bound=bound, **options))(q, bound)
    close(found, torch.stack([attention(x, k, v, **options) for x in q]))


def test_mapped_slopes_and_documents():
    q, k = torch.randn(2, 5, 2, 8), torch.randn(2, 5, 1, 8)
    slopes, start = torch.rand(3, 2), torch.stack([START.clamp_max(n) for n in (0, 1, 4)])
    found = vmap(lambda s, t: attention(q, k, k, causal=True, alibi_slopes=s, key_start=t))(slopes, start)
    for i in range(3):
        close(found[i], attention(q, k, k, causal=True, alibi_slopes=slopes[i], key_start=start[i]))


@pytest.mark.parametrize("name", KERNELS)
def test_transforms_in_compiled_programs(name):
    """torch.compile would take only the forward operator and drop the gradient: this is an error."""
    torch.compiler.reset()
    function, tensors = OPERATIONS[name][0], tensors_of(name)

    def call(x):
        return function(x, *tensors[1:])[..., 0].sum()

    batch = torch.stack([tensors[0], 2 * tensors[0]])
    with pytest.raises(Exception, match=f"{name}: transforms of torch.func are not compiled"):
        torch.compile(grad(call), fullgraph=True, backend="eager")(tensors[0])
    compiled = torch.compile(call, backend="eager")
    close(vmap(grad(compiled))(batch), vmap(grad(call))(batch))


# ---- second derivatives ---------------------------------------------------------------------------------------------


@operations
def test_second_derivatives_by_the_reference(name):
    function = functools.partial(OPERATIONS[name][0], backend="reference")
    tensors = [tensor.requires_grad_() for tensor in tensors_of(name, WIDE)]
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("name", KERNELS)
def test_second_derivatives_of_kernels_are_no_zeros(name):
    """Neither in autograd, where the gradient of the output is a constant, nor in nested transforms."""
    function, tensors = OPERATIONS[name][0], tensors_of(name)
    for number in range(len(tensors)):
        leaf = tensors[number].clone().requires_grad_()

        def call(x, number=number):
            return function(*tensors[:number], x, *tensors[number + 1 :])[..., 0].sum()

        (gradient,) = torch.autograd.grad(call(leaf), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match=f'{name}: .* pass backend="reference"'):
            (gradient.sum() + leaf.sum()).backward()
        for nested in (lambda x: jacrev(grad(call))(x), lambda x: grad(lambda y: grad(call)(y).sum())(x)):
            with pytest.raises(NotImplementedError, match=f'{name}: .* pass backend="reference"'):
                nested(tensors[number])


def test_nested_transforms_by_the_reference():
    q, k, v = tensors_of("attention", WIDE)

    def call(q):
        return attend(q, k, v, backend="reference").square().sum()

    expected = torch.autograd.functional.hessian(call, q)
    torch.testing.assert_close(jacrev(grad(call))(q), expected)
    found = vmap(lambda x: grad(lambda y: grad(call)(y).square().sum())(x))(torch.stack([q, 2 * q]))
    leaf = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(leaf), leaf, create_graph=True)
    torch.testing.assert_close(found[0], torch.autograd.grad(gradient.square().sum(), leaf)[0])


@pytest.mark.parametrize("name", KERNELS)
def test_forward_mode_is_refused(name):
    function, tensors = OPERATIONS[name][0], tensors_of(name)
    plain = function(*tensors)
    with pytest.raises(NotImplementedError, match=f"{name}: forward-mode .* use reverse mode"):
        torch.func.jacfwd(lambda x: function(x, *tensors[1:]))(tensors[0])
    with pytest.raises(NotImplementedError, match=f"{name}: forward-mode"):
        torch.func.jvp(function, tuple(tensors), tuple(map(torch.ones_like, tensors)))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=f"{name}: forward-mode"):
            function(torch.autograd.forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:])
        close(function(*tensors), plain)  # next to a tangent of another tensor
    with pytest.raises(NotImplementedError):  # torch's own, since the tangent is hidden inside of another transform
        hessian(lambda x: function(x, *tensors[1:]).sum())(tensors[0])


# ---- documents of different lengths ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_nested_and_sparse_tensors_are_refused(name):
    function, tensors = OPERATIONS[name][0], tensors_of(name)
    first = tensors[0]
    jagged = torch.nested.nested_tensor([first[0, :3], first[1]], layout=torch.jagged)
    argument = {"attention": "q", "qk_norm_rotary": "q", "linear_cross_entropy": "hidden"}.get(name, "x")
    remedy = re.escape(f"{argument}.values()[None]")
    for needs_grad in (False, True):
        with pytest.raises(TypeError, match=f"{name}: {argument} must .* nested one; .*{remedy}"):
            function(jagged.clone().requires_grad_(needs_grad), *tensors[1:])
    with pytest.raises(TypeError, match=rf"{name}: {argument} must be a dense tensor, .*{argument}\.to_dense"):
        function(first.to_sparse(), *tensors[1:])


def test_a_nested_tensor_is_no_batch_of_tokens():
    tokens = torch.nested.nested_tensor([torch.arange(3), torch.arange(5)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"tokens must have one length for all rows, got a nested tensor; .* key_start"):
        small()(tokens)


def test_the_values_of_a_jagged_tensor_are_packed_documents():
    """The conversion from cumulative lengths that the docstring of `attention` gives, with gradients."""
    lengths = (3, 1, 5)
    rows = [[torch.randn(n, heads, 8) for n in lengths] for heads in (2, 1, 1)]
    q, k, v = (torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True) for parts in rows)
    cu_seqlens = q.offsets()
    token = torch.arange(sum(lengths))
    key_start = cu_seqlens[torch.bucketize(token, cu_seqlens, right=True) - 1].to(torch.int32)[None]
    assert key_start.tolist() == [[0, 0, 0, 3, 4, 4, 4, 4, 4]]
    packed = (tensor.values()[None] for tensor in (q, k, v))
    found = attention(*packed, causal=True, alibi_slopes=SLOPES, key_start=key_start)
    weights = torch.randn_like(found)
    gradients = torch.autograd.grad((found * weights).sum(), (q, k, v))
    for number, (begin, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        leaves = [parts[number][None].requires_grad_() for parts in rows]
        alone = attention(*leaves, causal=True, alibi_slopes=SLOPES)
        close(found[:, begin:end], alone)
        expected = torch.autograd.grad((alone * weights[:, begin:end]).sum(), leaves)
        for gradient, other in zip(gradients, expected, strict=True):
            close(gradient.values()[begin:end], other[0])


def test_a_softmax_scale_that_varies_in_a_compiled_program():
    """Each float makes a program; a tensor that multiplies q does not."""
    q, k, v = tensors_of("attention")
    programs = []

    def backend(program, inputs):
        programs.append(program)
        return program

    torch.compiler.reset()
    scales = (0.1, 0.2, 0.3, 0.4)
    by_float = torch.compile(lambda scale: attend(q, k, v, softmax_scale=scale), backend=backend, fullgraph=True)
    for scale in scales:
        close(by_float(scale), attend(q, k, v, softmax_scale=scale))
    assert len(programs) == len(scales)
    programs.clear()
    by_tensor = torch.compile(lambda scale: attend(q * scale, k, v, softmax_scale=1.0), backend=backend, fullgraph=True)
    for scale in scales:
        close(by_tensor(torch.tensor(scale)), attend(q, k, v, softmax_scale=scale))
    assert len(programs) == 1


# ---- the model ------------------------------------------------------------------------------------------------------


def small(**options):
    sizes = dict(num_tokens=23, max_seq_len=32, dim=24, depth=1, dim_head=8, heads=2, alibi_num_heads=1)
    return Andromeda(**(sizes | options))


FLAGS = {"defaults": {}, "pre-norm": dict(deepnorm=False, use_abs_pos_emb=True), "plain torch": dict(attn_flash=False)}
flags = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
TOKENS = torch.arange(21).view(3, 7)


def loss_of(model):
    """A function from parameters and tokens (n,) to the loss."""
    return lambda parameters, tokens: functional_call(model, parameters, (tokens[None],), {"return_loss": True})


@flags
def test_gradients_of_the_model_per_sample(flags):
    model = small(**flags)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = vmap(grad(loss_of(model)), (None, 0))(parameters, TOKENS)
    for row, tokens in enumerate(TOKENS):
        expected = torch.autograd.grad(model(tokens, return_loss=True), list(model.parameters()))
        for gradient, other in zip(found.values(), expected, strict=True):
            close(gradient[row], other)
    sums = grad(lambda p: functional_call(model, p, (TOKENS,), {"return_loss": True}))(parameters)
    for gradient, other in zip(found.values(), sums.values(), strict=True):
        close(gradient.mean(0), other)


@flags
def test_an_ensemble_of_models(flags):
    """vmap over stacked parameters, with gradients."""
    models = [small(**flags) for _ in range(3)]
    stacked, _ = torch.func.stack_module_state(models)
    found = vmap(loss_of(models[0]))(stacked, TOKENS)
    close(found, torch.stack([model(row, return_loss=True) for model, row in zip(models, TOKENS, strict=True)]))
    found = vmap(grad(loss_of(models[0])), (0, None))(stacked, TOKENS[0])
    for number, model in enumerate(models):
        expected = torch.autograd.grad(model(TOKENS[0], return_loss=True), list(model.parameters()))
        for gradient, other in zip(found.values(), expected, strict=True):
            close(gradient[number], other)


@pytest.mark.parametrize("flags", [{}, dict(deepnorm=False, use_abs_pos_emb=True)], ids=["defaults", "pre-norm"])
def test_second_derivative_of_the_model_in_plain_torch(flags):
    model = small(attn_flash=False, **flags).double()

    def penalty():
        gradients = torch.autograd.grad(model(TOKENS, return_loss=True), list(model.parameters()), create_graph=True)
        return sum(gradient.square().sum() for gradient in gradients)

    weight = model.transformer.attn_layers.layers[0].fn.to_q.weight
    (found,) = torch.autograd.grad(penalty(), weight)
    step = 1e-6
    with torch.no_grad():
        weight[3, 5] += step
        above = penalty_value(penalty)
        weight[3, 5] -= 2 * step
        below = penalty_value(penalty)
        weight[3, 5] += step
    torch.testing.assert_close(found[3, 5].item(), (above - below) / (2 * step), rtol=1e-5, atol=1e-8)
    with pytest.raises(NotImplementedError, match="attn_flash=False"):
        model = small()
        gradients = torch.autograd.grad(model(TOKENS, return_loss=True), list(model.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()


def penalty_value(penalty):
    with torch.enable_grad():
        return penalty().item()


# ---- fake tensors and tracing ---------------------------------------------------------------------------------------


@pytest.fixture
def nothing_kept(monkeypatch):
    """Removes constants of earlier tests, so that the first call of a test makes them."""
    monkeypatch.setattr(_persistent, "entries", type(_persistent.entries)(dict))


@flags
def test_a_fake_call_leaves_nothing_behind(flags, nothing_kept):
    """The model on fake tensors first, then on real ones: loss, logits, generation."""
    model, expected = small(**flags), small(**flags)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(TOKENS)
        assert model(fake).shape == (3, 7, 23)
        assert model(TOKENS, return_loss=True).shape == ()
        with torch.no_grad():
            model(fake, cache=Cache())
    expected.load_state_dict(model.state_dict())
    for out in (model(TOKENS), model(TOKENS, return_loss=True)):
        assert type(out) is torch.Tensor
    close(model(TOKENS), expected(TOKENS))
    assert torch.equal(model.generate(TOKENS, 5, temperature=0), expected.generate(TOKENS, 5, temperature=0))
    for kept in _persistent.entries.values():
        assert all(type(tensor) is torch.Tensor for tensor in kept.values())


@flags
def test_a_fake_model_trains(flags):
    """All parameters and tokens are fake, as for estimates of memory."""
    with FakeTensorMode():
        model = small(**flags)
        tokens = torch.zeros(3, 7, dtype=torch.int64)
        model(tokens, return_loss=True, key_start=torch.zeros(3, 7, dtype=torch.int32)).backward()
        assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


@flags
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(flags, mode, pre_dispatch, nothing_kept):
    model = small(**flags)
    start = torch.tensor([[0] * 7, [0] * 3 + [3] * 4, [2] * 7])
    with torch.no_grad():
        call = lambda tokens, start: model(tokens, key_start=start)  # noqa: E731
        program = make_fx(call, tracing_mode=mode, pre_dispatch=pre_dispatch, _allow_non_fake_inputs=True)(
            TOKENS, start
        )
        other = (TOKENS + 1) % 23
        close(program(other, start), call(other, start))
        close(model(TOKENS, key_start=start), program(TOKENS, start))


def test_gradients_are_traced():
    model = small()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    program = make_fx(vmap(grad(loss_of(model)), (None, 0)))(parameters, TOKENS)
    changed = {name: parameter * 1.1 for name, parameter in parameters.items()}
    found = program(changed, TOKENS)
    for name, gradient in vmap(grad(loss_of(model)), (None, 0))(changed, TOKENS).items():
        close(found[name], gradient)


def test_export():
    model = small().eval()
    program = torch.export.export(model, (TOKENS,))
    close(program.module()((TOKENS + 1) % 23), model((TOKENS + 1) % 23))


def test_what_has_values():
    real = torch.ones(2)
    assert _checks.have_values(real, torch.nn.Parameter(real))
    seen = []
    vmap(lambda x: seen.append(_checks.have_values(x)) or x)(real)
    grad(lambda x: seen.append(_checks.have_values(x)) or x.sum())(real)
    with FakeTensorMode() as mode:
        seen += [_checks.have_values(real), _checks.have_values(mode.from_tensor(real))]
    seen += [_checks.have_values(mode.from_tensor(real)), _checks.have_values(real.to("meta"))]
    for tracing in ("real", "fake", "symbolic"):
        for pre_dispatch in (False, True):
            trace = make_fx(
                lambda x: (seen.append(_checks.have_values(x)), x + 1)[1],
                tracing_mode=tracing,
                pre_dispatch=pre_dispatch,
            )
            trace(real)
    torch.jit.trace(lambda x: (seen.append(_checks.have_values(x)), x + 1)[1], real, check_trace=False)
    assert len(seen) == 13 and not any(seen)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert _checks.have_values(real)


@pytest.mark.parametrize("form", ["tokens", "loss", "positions"])
def test_checks_of_values_look_at_real_tensors_alone(form):
    model = small(use_abs_pos_emb=True)
    wrong = torch.full((3, 7), 99)
    start = torch.zeros(3, 40, dtype=torch.int32)
    call = {
        "tokens": lambda: model(wrong),
        "loss": lambda: model(torch.full((3, 7), -100), return_loss=True),
        "positions": lambda: model(torch.zeros(3, 40, dtype=torch.int64), key_start=start),
    }[form]
    with pytest.raises(ValueError, match="Andromeda: "):
        call()
    with FakeTensorMode(allow_non_fake_inputs=True):
        call()
