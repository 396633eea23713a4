"""Records of arguments: their schemas, and operators that take them."""

import inspect
import sys
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from andromeda.ops import _operator, _select
from andromeda.ops import attention as attention_op
from andromeda.ops import feed_forward as feed_forward_op
from andromeda.ops import linear_cross_entropy as loss_op
from andromeda.ops import qk_norm_rotary as rotary_op
from andromeda.ops import token_shift_norm as shift_op


class Call(NamedTuple):
    x: Tensor
    y: Tensor | None
    flag: bool
    count: int
    position: _operator.SymInt
    scale: float
    backend: str


def test_schema_of_a_record():
    expected = "Tensor x, Tensor? y, bool flag, int count, SymInt position, float scale, str backend"
    assert _operator.parameters(Call) == expected
    assert _operator.num_tensors(Call) == 2
    assert _operator.indices(Call, "x", "scale") == (0, 5)


@pytest.mark.parametrize(
    "module", [attention_op, rotary_op, shift_op, loss_op, feed_forward_op], ids=lambda module: module.NAME
)
def test_operators_end_with_their_record(module):
    record = module.Call
    for operator in (module.FORWARD, module.BACKWARD):
        names = [argument.name for argument in operator._schema.arguments]
        assert tuple(names[-len(record._fields) :]) == record._fields
    count = _operator.num_tensors(record)
    types = [str(argument.type) for argument in module.FORWARD._schema.arguments if not argument.has_default_value()]
    assert all("Tensor" in name for name in types[:count]) and not any("Tensor" in name for name in types[count:])


def test_the_schemas():
    """Exported programs store the schemas: a change of a forward schema breaks programs of earlier versions, unless it
    is an argument with a default at the end."""
    assert str(attention_op.FORWARD._schema) == (
        "andromeda::attention_forward(Tensor q, Tensor k, Tensor v, Tensor? alibi_slopes, Tensor? logit_bound, "
        "Tensor? key_start, bool causal, float softmax_scale, str backend, Tensor? num_keys=None) -> (Tensor, Tensor)"
    )
    assert str(rotary_op.FORWARD._schema) == (
        "andromeda::qk_norm_rotary_forward(Tensor q, Tensor k, Tensor? q_scale, Tensor? k_scale, bool normalize, "
        "int rotary_dim, bool xpos, SymInt position, SymInt origin, str backend, Tensor? step=None, "
        "float q_multiplier=1.) -> (Tensor, Tensor)"
    )
    assert str(feed_forward_op.FORWARD._schema) == (
        "andromeda::feed_forward_forward(Tensor x, Tensor weight_in, Tensor? bias_in, Tensor weight_out, "
        "Tensor? bias_out, str backend) -> (Tensor, Tensor)"
    )
    assert str(shift_op.FORWARD._schema) == (
        "andromeda::token_shift_norm_forward(Tensor x, Tensor? residual, Tensor? residual_scale, Tensor? gamma, "
        "Tensor? history, Tensor? key_start, float alpha, int shift, SymInt position, str backend) -> (Tensor, Tensor)"
    )
    assert str(loss_op.FORWARD._schema) == (
        "andromeda::linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, "
        "float z_loss, bool with_dhidden, bool with_dweight, str backend) -> (Tensor, Tensor, Tensor)"
    )


def test_functions_take_what_leads_and_the_record():
    seen = []

    def double(lead, call):
        seen.append((lead, call))
        return call.x * 2, lead.clone()

    operator = _operator.define(
        f"double_of_test(Tensor lead, {_operator.parameters(Call)}) -> (Tensor, Tensor)",
        Call,
        implementation=double,
        fake=lambda lead, call: (torch.empty_like(call.x), torch.empty_like(lead)),
        flops=lambda lead, call: lead.numel() + call.x.numel() * call.count,
        rows=("lead", "x"),
        axes="lead:r x:rd y:rd -> rd r",
        sums=("y",),
    )
    x, lead = torch.ones(2, 3), torch.zeros(7)
    call = Call(x, None, True, 5, 6, 0.5, "cpu")
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(operator(lead, *call)[0], x * 2)
    assert counter.get_total_flops() == 7 + 6 * 5
    assert seen[0][0] is lead and type(seen[0][1]) is Call and seen[0][1][1:] == call[1:]
    batch = torch.stack([x, 2 * x])
    found = torch.func.vmap(lambda x: operator(lead[:2], *call._replace(x=x))[0])(batch)
    assert torch.equal(found, batch * 2)


class Later(NamedTuple):
    x: Tensor
    count: int
    y: Tensor | None = None
    z: Tensor | None = None


def test_fields_with_a_default_may_be_left_out():
    """torch leaves them out by itself; exported programs of earlier versions do not know them."""
    assert _operator.parameters(Later) == "Tensor x, int count, Tensor? y=None, Tensor? z=None"
    assert _operator.num_tensors(Later) == 1
    seen = []

    def add(lead, call):
        seen.append(call)
        return call.x + lead, call.x * 2

    operator = _operator.define(
        f"add_of_test(Tensor lead, {_operator.parameters(Later)}) -> (Tensor, Tensor)",
        Later,
        implementation=add,
        fake=lambda lead, call: (torch.empty_like(call.x), torch.empty_like(call.x)),
        flops=lambda lead, call: call.count,
        rows=("lead", "x"),
        axes="lead:rd x:rd y:rd z:rd -> rd rd",
    )
    x, lead = torch.ones(2, 3), torch.zeros(2, 3)
    for given in ((), (None,), (lead,), (lead, None), (None, lead)):
        with FlopCounterMode(display=False) as counter:
            operator(lead, x, 5, *given)
        assert counter.get_total_flops() == 5 and type(seen[-1]) is Later
        padded = (*given, None, None)[:2]
        assert seen[-1].y is padded[0] and seen[-1].z is padded[1]
    found = torch.func.vmap(lambda x: operator(lead, x, 5)[1])(torch.stack([x, 3 * x]))
    assert torch.equal(found, torch.stack([2 * x, 6 * x]))


def test_a_function_of_fields_has_the_signature_of_its_record():
    @_operator.takes(Call)
    def forward(*fields):
        return fields

    assert list(inspect.signature(forward).parameters) == list(Call._fields)
    assert forward(1, 2) == (1, 2)


# ---- programs without the operators ---------------------------------------------------------------------------------

Q, K, V = torch.randn(2, 5, 4, 16), torch.randn(2, 9, 2, 16), torch.randn(2, 9, 2, 16)
STARTS = torch.tensor([[0, 0, 3, 3, 8], [2, 2, 2, 7, 7]], dtype=torch.int32)
SLOPES, SCALES, GAMMA = torch.tensor([0.5, 0.25, 0.0, 1.0]), (torch.rand(4, 16), torch.rand(2, 16)), torch.randn(12)
X, WEIGHT = torch.randn(2, 5, 12), torch.randn(20, 12)
TARGETS = torch.tensor([3, -100, 19, 0, 7])


def number(value):
    return torch.tensor([value], dtype=torch.int32)


PLAIN = {
    "attention": (attention_op, (Q, K, V, SLOPES, None, STARTS, True, 0.3, "auto")),
    "attention, no mask": (attention_op, (Q, K, V, None, None, None, False, 0.3, "auto")),
    "attention, keys that exist": (attention_op, (Q, K, V, SLOPES, None, STARTS, True, 0.3, "auto", number(7))),
    "attention, all that exist": (attention_op, (Q, K, V, None, None, STARTS, False, 0.3, "auto", number(6))),
    "qk_norm_rotary": (rotary_op, (Q, K, *SCALES, True, 8, True, 3, 7, "auto", None, 0.5)),
    "qk_norm_rotary, step": (rotary_op, (Q, K, None, None, False, 8, True, 3, 7, "auto", number(11), 1.0)),
    "token_shift_norm": (shift_op, (X, X.flip(0), GAMMA.abs(), GAMMA, X[:, :2], STARTS, 1.5, 2, 3, "auto")),
    "token_shift_norm, no norm": (shift_op, (X, None, None, None, None, None, 1.0, 1, 0, "auto")),
    "token_shift_norm, no shift": (shift_op, (X, None, None, GAMMA, None, None, 1.0, 0, 0, "auto")),
    "linear_cross_entropy": (loss_op, (X[0], WEIGHT, TARGETS, -100, 0.1, False, False, "auto")),
    "linear_cross_entropy, gradients": (loss_op, (X[0], WEIGHT, TARGETS, -100, 0.0, True, True, "auto")),
    "feed_forward": (feed_forward_op, (X, WEIGHT, WEIGHT[:, 0], WEIGHT.T.contiguous(), None, "auto")),
}
OF_THE_MODEL = {  # the arguments in the dtype of the model; others are float32
    attention_op: ("q", "k", "v"),
    rotary_op: ("q", "k"),
    shift_op: ("x", "residual", "history"),
    loss_op: ("hidden", "weight"),
    feed_forward_op: ("x", "weight_in", "bias_in", "weight_out"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_formulas_replace_an_operator(name, dtype):
    """They write to no tensor and have the operator's outputs."""
    module, fields = PLAIN[name]
    call = module.Call(*fields)
    given = [field for field in OF_THE_MODEL[module] if getattr(call, field) is not None]
    call = call._replace(**{field: getattr(call, field).to(dtype) for field in given})
    graph = make_fx(lambda: module.FORWARD(*call), decomposition_table=_operator.FORMULAS)()
    assert not any(node.target in (module.FORWARD, torch.ops.aten.copy_.default) for node in graph.graph.nodes)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for found, expected in zip(graph(), module.FORWARD(*call), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_formulas_are_in_torchs_table_while_onnx_exports(monkeypatch):
    """Inductor refuses operators that are in the table, where the variable CI is set."""
    import torch.onnx

    def trace():
        with FakeTensorMode():
            attention_op.attention(*(torch.empty(1, 4, 2, 8) for _ in range(3)))

    table, operator = torch._decomp.decomposition_table, attention_op.FORWARD
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    trace()
    assert table[operator] is _operator.FORMULAS[operator]
    monkeypatch.undo()
    trace()
    assert operator not in table


@pytest.mark.parametrize("name", PLAIN)
def test_a_program_of_any_size_is_traced_without_formulas(name, monkeypatch):
    """torch would take them to learn the shapes of the results, where sizes are symbols."""
    import torch.onnx

    module, fields = PLAIN[name]
    calls = []
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    monkeypatch.setitem(_operator.FORMULAS, module.FORWARD, lambda *args: calls.append(args))
    tensors = [field for field in fields if isinstance(field, torch.Tensor)]

    def call(*given):
        rest = iter(given)
        return module.FORWARD(*(next(rest) if isinstance(field, torch.Tensor) else field for field in fields))

    with torch.no_grad():
        found = torch.compile(call, dynamic=True, backend="eager")(*tensors)
    monkeypatch.undo()
    for result, expected in zip(found, module.FORWARD(*fields), strict=True):
        torch.testing.assert_close(result, expected)
    assert calls == []
    torch._decomp.decomposition_table.pop(module.FORWARD, None)


# ---- calls without torch's dispatcher -------------------------------------------------------------------------------


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen = [*getattr(self, "seen", []), function]
        return function(*args, **kwargs or {})


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **kwargs or {})


def traced(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(lambda x: call() or x, torch.zeros(1), check_trace=False)


OBSERVERS = {
    "dispatch mode": lambda call: call_in(Dispatched(), call),
    "function mode": lambda call: call_in(Functions(), call),
    "fake tensors": lambda call: call_in(FakeTensorMode(allow_non_fake_inputs=True), call),
    "flops": lambda call: call_in(FlopCounterMode(display=False), call),
    "profiler": lambda call: call_in(torch.autograd.profiler.profile(), call),
    "jit.trace": traced,
    "make_fx": lambda call: make_fx(lambda x: call() or x)(torch.zeros(1)),
    "make_fx before dispatch": lambda call: make_fx(lambda x: call() or x, pre_dispatch=True)(torch.zeros(1)),
}


def call_in(context, call):
    with context:
        call()


@pytest.mark.parametrize("observer", OBSERVERS)
def test_observers_of_operators_are_seen(observer):
    answers = []
    OBSERVERS[observer](lambda: answers.append(_operator.is_unobserved()))
    assert answers and not any(answers)
    assert _operator.is_unobserved()


ATTENTION = (torch.randn(1, 3, 2, 16), torch.randn(1, 5, 1, 16), torch.randn(1, 5, 1, 16))
CALLS = {
    "attention": (attention_op, lambda: attention_op.attention(*ATTENTION)),
    "qk_norm_rotary": (rotary_op, lambda: rotary_op.qk_norm_rotary(*ATTENTION[:2], rotary_dim=8)),
    "token_shift_norm": (
        shift_op,
        lambda: shift_op.token_shift_norm(torch.randn(1, 3, 16), gamma=torch.ones(16), shift=1),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_mode_sees_the_operator_and_a_plain_call_does_without(name, monkeypatch):
    module, call = CALLS[name]
    with Dispatched() as mode:
        call()
    assert module.FORWARD in mode.seen
    with torch.autograd.profiler.profile() as profile:
        call()
    assert f"andromeda::{name}_forward" in {event.name for event in profile.function_events}

    def refuse(*arguments):
        raise AssertionError("the operator was called")

    monkeypatch.setattr(module, "FORWARD", refuse)
    call()
    with pytest.raises(AssertionError, match="the operator was called"), Dispatched():
        call()


@pytest.mark.parametrize("name", CALLS)
def test_a_plain_call_takes_few_steps(name):
    """The time on the host is that of the steps: frames of Python and functions in C that it calls."""
    if _select.extension_error is not None:
        pytest.skip(_select.extension_error)
    _, call = CALLS[name]
    call()  # makes plans and tables
    steps = []
    sys.setprofile(lambda frame, event, argument: steps.append(event))
    try:
        call()
    finally:
        sys.setprofile(None)
    assert steps.count("call") <= 30 and steps.count("c_call") <= 24  # 22 and 16 for attention
