"""Makes operators of torch from functions that take one record.

Each operation has a record `Call`, a NamedTuple with the arguments of its operators, each once, in the order of their
schemas, tensors first. Arguments with a default come last, tensors or not: programs that were exported before a schema
had them still run. torch passes arguments by position. Only this file converts positions into a record.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch._decomp import decomposition_table, register_decomposition
from torch.utils.flop_counter import register_flop_formula

from andromeda.ops import _sharding, _transforms

SymInt = Annotated[int, "SymInt"]  # an int that a traced program may keep as a symbol

_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_is_jit_tracing, _is_profiling = torch._C._is_tracing, torch._C._autograd._profiler_enabled
_includes_key, _PRE_DISPATCH = torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch

_Function = TypeVar("_Function", bound=Callable[..., Any])
_LIB = torch.library.Library("andromeda", "DEF")
FORMULAS: dict[torch._ops.OpOverload, Callable[..., Any]] = {}  # operator -> plain torch that may replace it
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    SymInt: "SymInt",
    float: "float",
    str: "str",
}


def parameters(record: type[tuple[Any, ...]]) -> str:
    """The fields of a record as the arguments of a schema: "Tensor q, Tensor? alibi_slopes, bool causal, ..."."""
    hints = get_type_hints(record, include_extras=True)
    defaults = _defaults(record)
    return ", ".join(
        f"{_SCHEMA_TYPES[hint]} {name}" + (f"={defaults[name]}" if name in defaults else "")
        for name, hint in hints.items()
    )


def num_tensors(record: type[tuple[Any, ...]]) -> int:
    """The number of fields without a default that are tensors; they come first."""
    hints, defaults = get_type_hints(record), _defaults(record)
    return sum(hint in (Tensor, Tensor | None) and name not in defaults for name, hint in hints.items())


def indices(record: type[tuple[Any, ...]], *names: str) -> tuple[int, ...]:
    """The indices of fields in a record."""
    fields = list(get_type_hints(record))
    return tuple(map(fields.index, names))


def takes(record: type[tuple[Any, ...]]) -> Callable[[_Function], _Function]:
    """Give a function of `*fields` the signature of a record: torch.compile counts the arguments of a `forward`."""

    def decorate(function: _Function) -> _Function:
        vars(function)["__signature__"] = inspect.signature(record)
        return function

    return decorate


def is_unobserved() -> bool:
    """Whether nothing in this thread records or changes the operators that it calls: no mode, tracer or profiler.

    Then the implementation of an operator may be called itself, which saves torch's dispatcher (4 us), if also: all
    tensors are of the type torch.Tensor or Parameter, with memory on a CPU or a GPU; autocast, autograd and transforms
    of torch.func have nothing to do; and torch.compile is not tracing the caller.
    """
    return not (
        _dispatch_modes() or _function_modes() or _is_jit_tracing() or _is_profiling() or _includes_key(_PRE_DISPATCH)
    )


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without binding the arguments to the signature of `forward`, which takes 40 us.

    For calls with all arguments by position, of tensors as in `is_unobserved`, without transforms of torch.func and
    torch.compile.
    """
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def define(
    schema: str,
    record: type[tuple[Any, ...]],
    *,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    flops: Callable[..., int],
    rows: Sequence[str],
    axes: _sharding.Axes,
    sums: Sequence[str] = (),
    plain: Callable[..., Any] | None = None,
) -> torch._ops.OpOverload:
    """Make `andromeda::<schema>` an operator and return it.

    The last arguments of the schema are the fields of `record`. The functions take the arguments before these, and then
    the record.

    Args:
        implementation: runs on tensors of any device. It chooses the backend at run time, so that a traced or exported
            program does not contain the choice of the machine that traced it.
        fake: the outputs for given inputs, without data. Like the implementation it must allocate with
            `new_empty(*shape)`, whose memory is dense (a tuple of four sizes costs 0.8 us more).
        flops: floating point operations of a call, for `torch.utils.flop_counter`.
        rows, sums: names of arguments; see `_transforms.vmap_rule`.
        axes: of the tensors, see `_sharding`: a text, or a function of the arguments before the record and the record.
        plain: the outputs by plain torch, in tensors that are not written to: the formulas that replace the operator
            where it has no kernel, as in `torch.onnx.export`.
    """
    name = schema.partition("(")[0]
    # The kernels read dense rows, so a compiler must not permute the dimensions of an argument.
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    packet = getattr(torch.ops.andromeda, name)
    operator = packet.default
    names = [argument.name for argument in operator._schema.arguments]
    leading = len(names) - len(record.__annotations__)
    by_position = functools.partial(_by_position, record, leading)
    _LIB.impl(name, by_position(implementation), "CompositeExplicitAutograd")  # every device: the reference runs on all
    _sharding.declare(operator, axes if isinstance(axes, str) else by_position(axes), by_position(fake))
    of_fake = _sharding.registering(by_position(fake))
    if plain is not None:
        FORMULAS[operator] = _sharding.registering(by_position(plain))
        of_fake = _with_formulas(operator, of_fake)
    torch.library.register_fake(f"andromeda::{name}", of_fake, lib=_LIB)
    count = by_position(flops)
    register_flop_formula(packet, get_raw=True)(lambda *args, out_val=None: count(*args))
    rule = _transforms.vmap_rule(operator, [names.index(row) for row in rows], [names.index(total) for total in sums])
    torch.library.register_vmap(f"andromeda::{name}", rule, lib=_LIB)
    return operator


def _with_formulas(operator: torch._ops.OpOverload, fake: Callable[..., Any]) -> Callable[..., Any]:
    """`fake`, which also keeps the formulas in torch's table of decompositions as long as `torch.onnx` exports.

    It asks for the table after it has traced the program. At other times the operator must not be there: where the
    variable CI is set, Inductor takes it for a mistake.
    """

    def fake_of_exported(*args: Any) -> Any:
        if "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export():
            decomposition_table[operator] = FORMULAS[operator]
        else:
            decomposition_table.pop(operator, None)
        return fake(*args)

    # With a rule for tensors without data, torch never takes the formulas to learn the shapes of results.
    register_decomposition(operator, type="meta")(fake_of_exported)
    return fake_of_exported


def _defaults(record: type[tuple[Any, ...]]) -> dict[str, Any]:
    """The fields of a record that have a default, and it."""
    found: dict[str, Any] = getattr(record, "_field_defaults", {})
    return found


def _by_position(record: type[tuple[Any, ...]], leading: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """function(*leading arguments, record) as a function of all arguments by position."""
    make = functools.partial(tuple.__new__, record)  # `record._make` without its Python frame
    if defaults := tuple(_defaults(record).values()):  # torch leaves out arguments that are equal to them
        most = leading + len(record.__annotations__)

        def function_of_all(*args: Any) -> Any:
            if missing := most - len(args):
                args += defaults[-missing:]
            return function(*args[:leading], make(args[leading:]))

        return function_of_all
    if leading == 0:
        return lambda *args: function(make(args))
    return lambda *args: function(*args[:leading], make(args[leading:]))
