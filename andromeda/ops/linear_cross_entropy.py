"""`linear_cross_entropy` (docs/model.md#8, #9): the output projection and the loss, without holding the logits."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from andromeda.ops import Backend, _checks, _operator, _select, _transforms
from andromeda.ops._common import cast, compute_dtype
from andromeda.reference import linear_cross_entropy as reference

NAME = "linear_cross_entropy"

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the backends other than the reference
REFERENCE_BLOCK_LOGITS = (
    2**24
)  # the reference holds several tensors of at most this many logits: 64 MiB of float32 each
# Exponentials of a block of rows, 52 MiB of float32. A block reads the weight twice and adds to its gradient, so that
# smaller blocks spend more time on memory.
CPU_BLOCK_LOGITS = 13 * 2**20
# Tokens of the vocabulary whose logits are computed together: with 256 rows 2 MiB, which stay in the cache until they
# are exponentials. Without gradients nothing else is held, and blocks may have more rows.
CPU_TOKENS, CPU_ROWS_WITHOUT_GRADIENT = 2048, 1024
# The logits of a block, 256 MiB in half precision: large enough that few blocks add to the gradient of the weight.
GPU_BLOCK_LOGITS = 2**27
_GPU_ROWS = 128  # rows of a block are a multiple of this, and so are those of the tiles of a matrix product
_GPU_ALIGNMENT = 64  # logits; each row starts at a multiple, so that a kernel loads 16 bytes at a time
_transforms_active = torch._C._are_functorch_transforms_active


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    count: int | float | Tensor | None = None,
    z_loss: float = 0.0,
    backend: Backend | None = None,
) -> Tensor:
    """Mean cross-entropy of the logits hidden @ weight^T, which are never held for more than a block of rows.

        logits = hidden @ weight^T,   lse = logsumexp(logits)
        loss = sum(lse - logits[target] + z_loss * lse^2) / count      over targets other than ignore_index

    Differentiable once in hidden and weight; with backend="reference" any number of times, but then all logits are held
    at once. The gradients are computed together with the loss, which saves the backward pass a product, and scaled by
    the backward pass; in half precision they are held in float32 in between. Under autocast hidden and weight are cast
    to its dtype first (float64 is not).

    Args:
        hidden: (..., dim), float32, bfloat16, float16; float64 takes the reference.
        weight: (num_tokens, dim), dtype and device of hidden.
        targets: (...), int64, on the device of hidden.
        ignore_index: a target that does not count. Data in such a row of hidden has no effect, even NaN.
        count: a number or scalar tensor when several calls share one mean, as in gradient accumulation; it gets no
            gradient. Default: the number of targets that count. Without targets the loss and its gradients are 0 for
            any count.
        z_loss: weight of the square of the log-sum-exp.
        backend: "triton", "cpu" or "reference". Default: the first that supports the call.

    Returns:
        Scalar, float32 (float64 for float64).

    Raises:
        ValueError, TypeError: the call is wrong on every machine. That there is no target and no `count`, and that a
            target is outside the vocabulary, is checked only on the CPU, since reading values back would stall a GPU;
            there, the loss is 0 or NaN.
        NotImplementedError: no backend, or not the requested one, can run it here; gives the reasons for each.
    """
    hidden, weight, z_loss = _checked(hidden, weight, targets, ignore_index, z_loss)
    if count is None:
        counted = targets != ignore_index
        if targets.is_cpu and _checks.have_values(counted) and not bool(counted.any()):
            raise ValueError(
                f"{NAME}: targets must hold one other than ignore_index={ignore_index}, got none; pass count, where "
                "several calls share one mean"
            )
        count = counted.sum()
    elif isinstance(count, Tensor):
        if count.numel() != 1:
            raise ValueError(f"{NAME}: count must be a number or a scalar tensor, got shape {tuple(count.shape)}")
        count = count.detach().reshape(())
    else:
        count = _checks.check_finite_number(NAME, "count", count)
    needs_function = _select.needs_function(NAME, hidden, weight)
    recorded = needs_function and torch.is_grad_enabled()
    # Under a transform a tensor does not know whether an outer one differentiates it.
    every = recorded and _transforms_active()
    call = Call(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        ignore_index,
        z_loss,
        every or (recorded and hidden.requires_grad),
        every or (recorded and weight.requires_grad),
        _select.backend_argument(NAME, backend),
    )
    total, _, _ = _LinearCrossEntropy.apply(*call) if needs_function else FORWARD(*call)
    return total / (count + (count == 0))  # no target at all: 0 / 1


def unsupported(backend: str, hidden: Tensor, weight: Tensor) -> list[str]:
    """Why `backend` cannot run `linear_cross_entropy` on these (correct) arguments here; empty when it can."""
    if backend == "reference":
        return []
    if backend == "cuda":
        return ["no CUDA kernel: the products are torch's own, and Triton does the rest"]
    return _select.common_reasons(backend, _DTYPES, hidden=hidden, weight=weight)


class Call(NamedTuple):
    """The arguments of `linear_cross_entropy_forward`, in the order of its schema."""

    hidden: Tensor  # (rows, dim)
    weight: Tensor
    targets: Tensor  # (rows,)
    ignore_index: int
    z_loss: float
    with_dhidden: bool
    with_dweight: bool
    backend: str


def _checked(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor, float]:
    """hidden and weight, cast under autocast, and z_loss as a float.

    Raises:
        ValueError, TypeError: see `linear_cross_entropy`.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        _checks.check_is_tensor(NAME, name, tensor)
    if hidden.ndim < 1 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{NAME}: hidden and weight must have shapes (..., dim) and (num_tokens, dim), got {tuple(hidden.shape)} "
            f"and {tuple(weight.shape)}"
        )
    device = hidden.device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = (
            t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (hidden, weight)
        )
    _checks.check_dtypes(NAME, hidden=hidden, weight=weight)
    axes = tuple(f"hidden.shape[{axis}]" for axis in range(hidden.ndim - 1))
    _checks.check_exact(NAME, "targets", targets, axes, tuple(hidden.shape[:-1]), torch.int64)
    _checks.check_devices(NAME, hidden=hidden, weight=weight, targets=targets)
    _checks.check_int(NAME, "ignore_index", ignore_index)
    return hidden, weight, _checks.check_finite_number(NAME, "z_loss", z_loss)


Outputs = tuple[Tensor, Tensor, Tensor]  # the sum of the losses and its gradients dhidden and dweight


def forward(call: Call) -> Outputs:
    """The operator `linear_cross_entropy_forward`. A gradient that is not wanted is an empty tensor."""
    if call.targets.is_cpu:
        _checks.check_targets(NAME, "targets", call.targets, len(call.weight), call.ignore_index)
    plan = _plan(call)
    outputs = _fake_forward(call)
    for output in outputs:
        output.zero_()
    if plan.block_rows > 0:
        with torch.autocast(call.hidden.device.type, enabled=False):  # it would round the products
            _BACKENDS[plan.backend](call, plan.block_rows, *outputs)
    return outputs


def backward(dtotal: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """The operator `linear_cross_entropy_backward`: the gradients, from the arguments of the forward pass alone.

    The gradients of the first backward pass are scaled where they are. Only a second one through the same graph
    computes them again.
    """
    _, dhidden, dweight = forward(call)
    return dhidden.mul_(dtotal).to(call.hidden.dtype), dweight.mul_(dtotal).to(call.weight.dtype)


class Plan(NamedTuple):
    """Everything about a call that does not depend on its data."""

    backend: str
    block_rows: int  # 0: there is nothing to compute


def _plan(call: Call) -> Plan:
    hidden, weight, with_gradient = call.hidden, call.weight, call.with_dhidden or call.with_dweight
    key = NAME, call.backend, hidden.device, hidden.dtype, hidden.shape, weight.shape, with_gradient
    return _select.plan(key, hidden.device, lambda: _make_plan(call, with_gradient))


def _make_plan(call: Call, with_gradient: bool) -> Plan:
    rows, num_tokens = len(call.hidden), len(call.weight)
    backend = _select.choose(
        NAME, call.backend, lambda name: unsupported(name, call.hidden, call.weight), call.hidden.device
    )
    if rows == 0 or num_tokens == 0:
        return Plan(backend, 0)
    most, multiple = REFERENCE_BLOCK_LOGITS // num_tokens, 1
    if backend == "cpu":
        most = CPU_BLOCK_LOGITS // num_tokens if with_gradient else CPU_ROWS_WITHOUT_GRADIENT
    elif backend == "triton":
        most, multiple = GPU_BLOCK_LOGITS // num_tokens, _GPU_ROWS
    blocks = -(-rows // max(most, multiple))  # of equal size
    return Plan(backend, -(-rows // (blocks * multiple)) * multiple)


def _blocks(rows: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def _reference(call: Call, block_rows: int, total: Tensor, dhidden: Tensor, dweight: Tensor) -> None:
    weight = cast(call.weight, total.dtype)
    options: dict[str, Any] = {"ignore_index": call.ignore_index, "z_loss": call.z_loss}
    for rows in _blocks(len(call.hidden), block_rows):
        block, targets = cast(call.hidden[rows], total.dtype), call.targets[rows]
        total += reference.linear_cross_entropy(block, weight, targets, **options)
        if call.with_dhidden or call.with_dweight:
            dblock, dweight_block = reference.linear_cross_entropy_backward(
                torch.ones_like(total), block, weight, targets, **options
            )
            if call.with_dhidden:
                dhidden[rows] = dblock
            if call.with_dweight:
                dweight += dweight_block


def _cpu(call: Call, block_rows: int, total: Tensor, dhidden: Tensor, dweight: Tensor) -> None:
    """The rows that count, in blocks; the logits of a block for some tokens of the vocabulary at a time.

        first sweep over the vocabulary      e = exp(logits - m),   m = max(logits)
        from m and sum(e) of all parts       lse,   f = exp(m - lse) * (1 + 2 * z_loss * lse)
        second sweep                         dhidden += f * (e^T @ weight),   dweight += e @ (f * hidden)
        targets                              dhidden -= weight[target],     dweight[target] -= hidden

    f * e is never computed: a factor per row can be applied to the smaller operands of the products. So each logit is
    written once as such and once as an exponential. Logits are transposed, (tokens, rows): for few rows a product that
    transposes the weight takes 20 % longer.
    """
    dtype, num_tokens = total.dtype, len(call.weight)
    with_gradient = call.with_dhidden or call.with_dweight
    counted = (call.targets != call.ignore_index).nonzero().squeeze(1)
    parts = list(_blocks(num_tokens, CPU_TOKENS))
    # One matrix after the other, each dense. Without gradients one place is enough for all.
    memory = total.new_empty(min(block_rows, len(counted)) * (num_tokens if with_gradient else CPU_TOKENS))
    for block in _blocks(len(counted), block_rows):
        rows = counted[block]
        hidden, targets = cast(call.hidden[rows], dtype), call.targets[rows]
        largest, sums = hidden.new_empty(2, len(parts), len(rows))
        exponentials = []
        for part, m, s in zip(parts, largest, sums, strict=True):
            start, size = part.start if with_gradient else 0, part.stop - part.start
            e = memory[len(rows) * start :][: len(rows) * size].view(size, len(rows))
            torch.mm(cast(call.weight[part], dtype), hidden.T, out=e)
            torch.amax(e, 0, out=m)
            e.sub_(m).exp_()
            torch.sum(e, 0, out=s)
            exponentials.append(e)
        # Relative to the largest logit of the row: the rounding error of lse itself would be that of a large logit.
        m = largest.amax(0)
        factors = (largest - m).exp_()
        sums = (factors * sums).sum(0)
        lse = m + sums.log()
        at_targets = cast(call.weight[targets], dtype)
        total += (lse - torch.linalg.vecdot(hidden, at_targets) + call.z_loss * lse.square()).sum()
        if not with_gradient:
            continue
        factors *= (1 + 2 * call.z_loss * lse) / sums
        dblock = at_targets.neg_()
        for part, e, f in zip(parts, exponentials, factors[:, :, None], strict=True):
            if call.with_dhidden:
                dblock.addcmul_(torch.mm(e.T, cast(call.weight[part], dtype)), f)
            if call.with_dweight:
                dweight[part].addmm_(e, f * hidden)
        if call.with_dhidden:
            dhidden[rows] = dblock
        if call.with_dweight:
            dweight.index_add_(0, targets, hidden, alpha=-1)


def _triton(call: Call, block_rows: int, total: Tensor, dhidden: Tensor, dweight: Tensor) -> None:
    """Blocks of rows: logits by torch's product; a kernel replaces them by their gradient; two more products."""
    from andromeda.triton_kernels import linear_cross_entropy as kernels

    hidden, weight, targets = call.hidden, call.weight, call.targets
    num_tokens = len(weight)
    counted = targets != call.ignore_index
    losses = total.new_empty(len(hidden))
    stride = -(-num_tokens // _GPU_ALIGNMENT) * _GPU_ALIGNMENT
    memory = hidden.new_empty(min(block_rows, len(hidden)), stride)[:, :num_tokens]
    for rows in _blocks(len(hidden), block_rows):
        block = hidden[rows].masked_fill(~counted[rows, None], 0)  # in a sum over rows 0 * nan would be nan
        logits = torch.mm(block, weight.T, out=memory[: len(block)])
        with _select.device_guard(hidden.device):
            kernels.forward(
                logits=logits,
                targets=targets[rows],
                losses=losses[rows],
                ignore_index=call.ignore_index,
                z_loss=call.z_loss,
                with_gradient=call.with_dhidden or call.with_dweight,
            )
        if call.with_dhidden:
            dhidden[rows] = torch.mm(logits, weight)
        if call.with_dweight and dweight.dtype == logits.dtype:
            dweight.addmm_(logits.T, block)
        elif call.with_dweight:
            dweight += torch.mm(logits.T, block)
    torch.sum(losses, 0, out=total)


_BACKENDS = {"reference": _reference, "cpu": _cpu, "triton": _triton}


def _plain_forward(call: Call) -> Outputs:
    """The outputs by operations that a program without the operator can hold. Holds all logits at once."""
    options: dict[str, Any] = {"ignore_index": call.ignore_index, "z_loss": call.z_loss}
    dtype = compute_dtype(call.hidden.dtype)
    tensors = cast(call.hidden, dtype), cast(call.weight, dtype), call.targets
    total = reference.linear_cross_entropy(*tensors, **options)
    gradients = tensors[0].new_empty(0), tensors[1].new_empty(0)
    if call.with_dhidden or call.with_dweight:
        dhidden, dweight = reference.linear_cross_entropy_backward(torch.ones_like(total), *tensors, **options)
        gradients = dhidden if call.with_dhidden else gradients[0], dweight if call.with_dweight else gradients[1]
    return total, *gradients


def _plain_backward(dtotal: Tensor, call: Call) -> tuple[Tensor | None, ...]:
    """The gradients by operations that torch can differentiate again. Holds all logits at once."""
    options: dict[str, Any] = {"ignore_index": call.ignore_index, "z_loss": call.z_loss}
    dtype = compute_dtype(call.hidden.dtype)
    with torch.autocast(call.hidden.device.type, enabled=False):
        tensors = cast(call.hidden, dtype), cast(call.weight, dtype), call.targets
        gradients = reference.linear_cross_entropy_backward(dtotal, *tensors, **options)
    return _wanted(call, (gradient.to(call.hidden.dtype) for gradient in gradients))


def _wanted(call: Call, gradients: Iterable[Tensor]) -> tuple[Tensor | None, ...]:
    """dhidden and dweight; None for one that is not wanted."""
    flags = call.with_dhidden, call.with_dweight
    return tuple(gradient if flag else None for gradient, flag in zip(gradients, flags, strict=True))


def _fake_forward(call: Call) -> Outputs:
    hidden, weight = call.hidden, call.weight
    dtype = compute_dtype(hidden.dtype)
    return (
        hidden.new_empty((), dtype=dtype),
        hidden.new_empty(hidden.shape if call.with_dhidden else 0, dtype=dtype),
        weight.new_empty(weight.shape if call.with_dweight else 0, dtype=dtype),
    )


def _fake_backward(dtotal: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    hidden, weight = call.hidden, call.weight
    return (
        hidden.new_empty(hidden.shape if call.with_dhidden else 0),
        weight.new_empty(weight.shape if call.with_dweight else 0),
    )


def _forward_flops(call: Call) -> int:
    """A product for the logits and one for each gradient."""
    products = 1 + call.with_dhidden + call.with_dweight
    return 2 * math.prod(call.hidden.shape) * len(call.weight) * products


def _backward_flops(dtotal: Tensor, call: Call) -> int:
    return _forward_flops(call)


_AXES = "hidden:Rd weight:vd targets:R"

# The operators themselves, for policies that name them (selective activation checkpointing should save FORWARD).
FORWARD = _operator.define(
    f"linear_cross_entropy_forward({_operator.parameters(Call)}) -> (Tensor, Tensor, Tensor)",
    Call,
    implementation=forward,
    fake=_fake_forward,
    flops=_forward_flops,
    rows=(),  # the sum goes over the rows: mapped calls run one after the other
    axes=f"{_AXES} -> +R Rd vd+R",
    plain=_plain_forward,
)
BACKWARD = _operator.define(
    f"linear_cross_entropy_backward(Tensor dtotal, {_operator.parameters(Call)}) -> (Tensor, Tensor)",
    Call,
    implementation=backward,
    fake=_fake_backward,
    flops=_backward_flops,
    rows=(),
    axes=f"dtotal: {_AXES} -> Rd vd+R",
)


class _LinearCrossEntropy(torch.autograd.Function):
    """The operator as a differentiable function of the fields of a `Call`."""

    @staticmethod
    @_operator.takes(Call)
    def forward(*fields: Any) -> Any:
        return FORWARD(*fields)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output[1:])
        ctx.options = inputs[_NUM_TENSORS:]
        ctx.is_spent = False
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        if dtotal is None:
            return _NO_GRADIENTS
        hidden, weight, targets, *held = ctx.saved_tensors
        call = Call(hidden, weight, targets, *ctx.options)
        results = _transforms.gradients(
            NAME,
            call.backend,
            (dtotal, hidden, weight),
            lambda: _wanted(call, _scaled(ctx, dtotal, call, held)),
            lambda: _plain_backward(dtotal, call),
        )
        return *results, *_NO_GRADIENTS[len(results) :]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *fields: Any) -> tuple[Any, Any]:
        return _vmap(info, in_dims, *fields)


_NUM_TENSORS = _operator.num_tensors(Call)
_NO_GRADIENTS = (None,) * len(Call._fields)
_vmap = _transforms.vmap_rule(_LinearCrossEntropy.apply, rows=())


def _scaled(ctx: Any, dtotal: Tensor, call: Call, held: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients that the forward pass left, times dtotal.

    They are scaled in place, because a copy of the weight's gradient would be the largest tensor of a call. After that
    they belong to the caller: if the graph is kept and asked again, they are computed anew. `data` keeps the version of
    the tensors, by which autograd would refuse to give them out once more.
    """
    dtypes = call.hidden.dtype, call.weight.dtype
    if torch.compiler.is_compiling() or _transforms_active():
        return tuple((gradient * dtotal).to(dtype) for gradient, dtype in zip(held, dtypes, strict=True))
    if ctx.is_spent:
        return BACKWARD(dtotal, *call)
    ctx.is_spent = True
    return tuple(gradient.data.mul_(dtotal).to(dtype) for gradient, dtype in zip(held, dtypes, strict=True))
