"""How operators work on DTensors (torch.distributed.tensor): the axes along which their tensors may be sharded.

The axes of an operator are one text, such as those of `attention_backward`:

    dout:BnHd out:BnHd softmax_lse:BHn q:BnHd k:BmHd v:BmHd ... -> BnHd BmHd+H BmHd+H

Each letter is an axis, that of the same name in all tensors. Along an axis with a capital letter the tensors may be
sharded: then each process computes with its part of them, and with the whole of the tensors that lack the axis. A
result that lacks it is the same in all processes, or, after `+H`, a part of a sum over the axis H; an argument with
`+H` enters this sum once. An axis of size 1 counts as lacking, since it is shared by all others: with one key head,
each process has all keys, and its own part of their gradient. `*` stands for any number of axes, sharded or not.

torch redistributes arguments with other placements. It knows the operators from the first call with DTensors on:
importing torch.distributed.tensor takes half a second, which programs without DTensors should not pay.
"""

import dataclasses
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Axes = str | Callable[..., str]  # the text, or a function of the arguments of a call
_Placements = list[Any]  # a Placement for each tensor, None for other arguments


class _Operator(NamedTuple):
    overload: torch._ops.OpOverload
    axes: Axes
    fake: Callable[..., tuple[Tensor, ...]]


_operators: list[_Operator] = []  # those that torch.distributed.tensor does not know yet


def declare(overload: torch._ops.OpOverload, axes: Axes, fake: Callable[..., Any]) -> None:
    """Note the axes of an operator and its function of fake tensors."""
    _operators.append(_Operator(overload, axes, fake))


def registering(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch runs on fake tensors in place of an operator, so that it first registers the placements.

    For a call with DTensors torch runs it to know the shapes of the results, and looks for placements then.
    """

    def registering_function(*args: Any) -> Any:
        if _operators and "torch.distributed.tensor" in sys.modules:
            _register()
        return function(*args)

    return registering_function


def _register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    while _operators:
        operator = _operators.pop()
        register_sharding(operator.overload)(_Strategies(operator))
        # Strategies are remembered by the arguments from this one on. They depend on flags and numbers, which torch's
        # default leaves out.
        known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
        known[operator.overload] = dataclasses.replace(known[operator.overload], static_argnum=0)


class _Strategies:
    """(arguments) -> the placements of results and arguments that need no communication, as `register_sharding` asks.

    Among the arguments are descriptions of tensors, with `shape`, `mesh` and `tensor_meta`.
    """

    def __init__(self, operator: _Operator):
        self.operator = operator
        self.names = [argument.name for argument in operator.overload._schema.arguments]

    def __call__(self, *args: Any) -> list[tuple[_Placements, _Placements]]:
        axes = self.operator.axes
        text = axes if isinstance(axes, str) else axes(*args)
        before, _, after = text.partition("->")
        described = dict(item.split(":") for item in before.split())
        arguments = [
            _Tensor(described[name], arg.shape) if hasattr(arg, "tensor_meta") else None
            for name, arg in zip(self.names, args, strict=False)
        ]
        results = [_Tensor(item, shape) for item, shape in zip(after.split(), self._shapes(args), strict=True)]
        size = next(arg.mesh for arg in args if hasattr(arg, "tensor_meta")).size()
        tensors = [tensor for tensor in arguments if tensor is not None]
        return [
            ([tensor.placement(axis) for tensor in results], [x if x is None else x.placement(axis) for x in arguments])
            for axis in _divisible(tensors, size)
        ]

    def _shapes(self, args: tuple[Any, ...]) -> list[torch.Size]:
        """The shapes of the results."""
        from torch._guards import detect_fake_mode
        from torch._subclasses import FakeTensorMode

        def example(arg: Any) -> Any:
            if not hasattr(arg, "tensor_meta"):
                return arg
            shape, stride, dtype = arg.tensor_meta
            return torch.empty_strided(shape, stride, dtype=dtype, device=arg.mesh.device_type)

        with detect_fake_mode() or FakeTensorMode():  # that of a compiler, whose sizes may be symbols
            return [result.shape for result in self.operator.fake(*map(example, args))]


class _Tensor:
    """A tensor of a call. axes: axis -> its index, without those of size 1; sums: axes of which it has a part."""

    def __init__(self, text: str, shape: Sequence[int]):
        letters, _, sums = text.partition("+")
        self.shape = shape
        # The axes of `*`, from the last to the first, are the digits 0, 1, ...
        several = string.digits[: len(shape) - len(letters) + 1][::-1]
        letters = letters.replace("*", several)
        if tuple(shape) == (0,):  # in place of a result that is not wanted
            letters = sums = ""
        self.axes = {axis: index for index, axis in enumerate(letters) if shape[index] != 1}
        self.sums = sums.replace("*", string.digits)

    def placement(self, axis: str) -> Any:
        from torch.distributed.tensor import Partial, Replicate, Shard

        if axis in self.axes:
            return Shard(self.axes[axis])
        return Partial() if axis and axis in self.sums else Replicate()


def _divisible(tensors: Sequence[_Tensor], size: int) -> Iterator[str]:
    """The axes along which all tensors can be cut into corresponding parts, for `size` processes; "" for none."""
    yield ""
    for axis in sorted({axis for tensor in tensors for axis in tensor.axes}):
        if axis.isupper() or axis.isdigit():
            lengths = [tensor.shape[tensor.axes[axis]] for tensor in tensors if axis in tensor.axes]
            # Heads that share a key head must stay together.
            if all(length == lengths[0] for length in lengths) or all(length % size == 0 for length in lengths):
                yield axis


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of a sharded weight that this process has, of `count` equal ones along its first axis."""

    mesh: Any  # the DeviceMesh
    axes: tuple[int, ...]  # those of the mesh along which the weight is sharded
    index: int
    count: int

    def enter(self, x: Tensor) -> Tensor:
        """x, which is the same in all processes; its gradient becomes the sum of the gradients of all of them."""
        if not (torch.is_grad_enabled() and x.requires_grad):
            return x
        from torch.distributed.tensor import DTensor, Partial, Replicate

        same = [Replicate()] * self.mesh.ndim
        partial = [Partial() if axis in self.axes else Replicate() for axis in range(self.mesh.ndim)]
        return DTensor.from_local(x, self.mesh, same, run_check=False).to_local(grad_placements=partial)


def share_of(linear: torch.nn.Module) -> Share | None:
    """The share of this process in the weight of a map that torch or transformers has sharded; None if it has all."""
    weight: Any = getattr(linear, "weight", None)
    if is_dtensor(weight):
        mesh, placements = weight.device_mesh, weight.placements
        axes = tuple(axis for axis, placement in enumerate(placements) if placement.is_shard(0))
    elif (mesh := getattr(linear, "_hf_device_mesh", None)) is not None:  # transformers' own sharding of plain tensors
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh
        axes = (0,)
    else:
        return None
    index, count = 0, 1
    for axis in axes:
        index, count = index * mesh.size(axis) + mesh.get_local_rank(axis), count * mesh.size(axis)
    return Share(mesh, axes, index, count)


def is_dtensor(x: object) -> bool:
    """Whether x is a DTensor. Imports nothing, and torch.compile can trace it."""
    return hasattr(x, "device_mesh")
