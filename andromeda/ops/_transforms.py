"""The behaviour of operations under torch.func and in second derivatives.

vmap      The mapped axis is folded into the batch where that gives the same result. Where tensors without a batch axis
          are mapped, and where a gradient is a sum over the batch, the slices are computed one after the other.
tangents  There is no forward mode: a call with tangents is an error.
twice     The gradients of kernels have no derivative: requesting it is an error that names backend="reference", whose
          gradients are plain torch. Under `torch.func` and with `create_graph=True` that backend keeps all its
          intermediate results.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

ONLY_BACKWARD = (
    "{op}: forward-mode derivatives (jvp, jacfwd) do not exist; use reverse mode (grad, vjp, jacrev), or "
    "andromeda.reference, which is plain torch"
)
ONLY_ONCE = (
    '{op}: the gradients of kernels cannot be differentiated again; pass backend="reference" (a model: '
    "attn_flash=False), which is plain torch"
)


def refuse_tangents(op: str, tensors: Iterable[Tensor | None]) -> None:
    """Raise if one of the tensors has a tangent. Every Function would also raise, but without a reason."""
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(ONLY_BACKWARD.format(op=op))


def gradients(
    op: str,
    backend: str,
    tensors: Sequence[Tensor | None],
    kernel: Callable[[], Sequence[Tensor | None]],
    plain: Callable[[], Sequence[Tensor | None]],
) -> tuple[Tensor | None, ...]:
    """The gradients that the `backward` of a Function returns first.

    Args:
        tensors: all tensors that the gradients depend on; None for one that is not given.
        kernel: computes the gradients by an operator.
        plain: computes them in plain torch, for a backend "reference" whose gradients are differentiated again.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tuple(kernel())
    if backend == "reference":
        return tuple(plain())
    with torch.no_grad():
        results = list(kernel())
    dependencies = [tensor for tensor in tensors if tensor is not None]
    # Under a transform a tensor does not know whether an outer level differentiates it.
    if not torch._C._are_functorch_transforms_active() and not any(t.requires_grad for t in dependencies):
        return tuple(results)
    given = [index for index, result in enumerate(results) if result is not None]
    outputs = _Once.apply(op, len(given), *(results[index] for index in given), *dependencies)
    for index, output in zip(given, outputs, strict=True):
        results[index] = output
    return tuple(results)


def given(gradients: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of the given tensors, and None for the others."""
    return tuple(None if tensor is None else grad for grad, tensor in zip(gradients, tensors, strict=True))


class _Once(torch.autograd.Function):
    """The identity on gradients; its derivative is an error. Further inputs: the tensors that these depend on."""

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: object) -> None:
        raise NotImplementedError(ONLY_ONCE.format(op=ctx.op))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], op: str, count: int, *tensors: Tensor) -> tuple[Any, Any]:
        return _Once.apply(op, count, *tensors), in_dims[2 : 2 + count]


def vmap_rule(
    function: Callable[..., tuple[Tensor, ...]], rows: Iterable[int], sums: Iterable[int] = ()
) -> Callable[..., tuple[tuple[Tensor, ...], tuple[int | None, ...]]]:
    """The `vmap` of a Function, or of an operator: (info, in_dims, *args) -> (outputs, out_dims).

    function: takes the arguments by position; each output is (batch, ...), or (0,) where there is none.
    rows: indices of the arguments that are tensors (batch, ...) or None; other tensors have no batch.
    sums: indices of the arguments that, if given, make an output a sum over the batch.
    """
    rows, sums = frozenset(rows), tuple(sums)

    def rule(
        info: Any, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        size = info.batch_size
        mapped = [index for index, dim in enumerate(in_dims) if dim is not None]
        if not rows.issuperset(mapped) or any(args[index] is not None for index in sums):
            slices = [
                function(*(arg if dim is None else arg.select(dim, i) for arg, dim in zip(args, in_dims, strict=True)))
                for i in range(size)
            ]
            outputs = tuple(torch.stack(parts) for parts in zip(*slices, strict=True))
            return outputs, (0,) * len(outputs)
        # An argument that is not mapped is repeated: by a stride of 0 where possible, as for attention's keys.
        folded = [
            _fold(arg, in_dims[index], size) if index in rows and arg is not None else arg
            for index, arg in enumerate(args)
        ]
        outputs = function(*folded)
        batch = folded[mapped[0]].shape[0] // size
        empty = [output.shape == (0,) for output in outputs]  # such an output means none, or has no rows
        return (
            tuple(o if none else o.unflatten(0, (size, batch)) for o, none in zip(outputs, empty, strict=True)),
            tuple(None if none else 0 for none in empty),
        )

    return rule


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """(batch, ...) with a mapped axis, or without one (dim None), as (size * batch, ...)."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)
