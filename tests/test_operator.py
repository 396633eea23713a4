"""Records of arguments: their schemas, and operators that take them."""

import inspect
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from andromeda.ops import _operator
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
        "int rotary_dim, bool xpos, SymInt position, SymInt origin, str backend, Tensor? step=None) -> (Tensor, Tensor)"
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
