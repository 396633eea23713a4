"""The calls of the operations' tests: a case describes a call briefly and makes its tensors."""

import concurrent.futures
import dataclasses
import functools
import math

import pytest
import torch

from andromeda.ops import _select, feed_forward, qk_norm_rotary, token_shift_norm

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (FLOAT32, BFLOAT16, FLOAT16)


# ---- all operations -------------------------------------------------------------------------------------------------


@functools.cache
def without_use(operation, device):
    """The backends that run no call of `operation` on tensors of `device` in any dtype: name -> reasons.

    On the CPU, "cpu" is never left out: every test must fail if the extension is missing.
    """
    reports = [_select.report(device, dtype)[operation] for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    kept = ("cpu", "reference") if torch.device(device).type == "cpu" else ("reference",)
    return {
        name: reports[0][name]
        for name in _select.BACKENDS
        if name not in kept and all(report[name] for report in reports)
    }


class Case:
    """Base of the dataclasses below. Its string is the id of a test: its name, or the fields without their defaults."""

    name = ""

    def __str__(self):
        fields = [field for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]
        changed = ",".join(f"{field.name}={getattr(self, field.name)}".replace("torch.", "") for field in fields)
        return self.name or changed or "default"


def name_of(value):
    """The id of a parameter."""
    return str(value).removeprefix("torch.")


def skip_for(backend, reasons):
    if reasons:
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


def normal(generator, *shape, dtype, device="cpu"):
    """Random numbers, drawn in float64 so that every dtype rounds the same ones."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def random_like(tensors, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [normal(generator, *t.shape, dtype=t.dtype, device=t.device) for t in tensors]


def lay_out(tensor, layout):
    """The same numbers with other strides, with NaN between and after them."""
    batch, seqlen, heads, width = tensor.shape
    if layout == "transposed":  # (batch, heads, seqlen, head_dim) in memory
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "seqlen first":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "slice":  # of a larger tensor; rows start at odd elements, so no alignment is left
        larger = tensor.new_full((batch + 1, seqlen + 2, heads + 1, width + 3), math.nan)
        larger[1:, 1:-1, :heads, 1 : 1 + width] = tensor
        return larger[1:, 1:-1, :heads, 1 : 1 + width]
    if layout == "offset":  # dense, one element off any alignment
        memory = tensor.new_full((tensor.numel() + 2,), math.nan)
        memory[1:-1] = tensor.flatten()
        return memory[1:-1].view(tensor.shape)
    if layout == "expanded":  # one batch entry, shared by all
        return tensor[:1].expand(batch, -1, -1, -1)
    return tensor


def leaves_of(tensors):
    return [t if t is None else t.detach().requires_grad_() for t in tensors]


def gradients(function, tensors, douts):
    """The gradients of the tensors that are not None."""
    leaves = leaves_of(tensors)
    outputs = function(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    return torch.autograd.grad(outputs, given, douts)


def in_two_threads(work):
    """The results of work(0) and work(1), run at the same time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(work, range(2)))


def assert_compiles(step, calls, dynamic):
    """step(*tensors, position) is one graph with the same result and gradients; `calls`: (tensors, position)."""
    torch._dynamo.reset()  # the limit on recompilations counts all parameters of a test
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tensors, position in calls:
        leaves = leaves_of(tensors)
        found, expected = (function(*leaves, position) for function in (compiled, step))
        torch.testing.assert_close(found, expected)
        pairs = zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True)
        for gradient, ref in pairs:
            torch.testing.assert_close(gradient, ref)


def assert_functional_gradient(loss, tensors):
    """torch.func.grad agrees with autograd."""
    found = torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*tensors)
    leaves = leaves_of(tensors)
    for gradient, ref in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(gradient, ref)


# ---- attention ------------------------------------------------------------------------------------------------------

SLOPES = (2**-0.5, 2**-2, 0.0, 2**-4, 2**-8)  # of consecutive heads: steep and flat ones, and one without a bias


@dataclasses.dataclass(frozen=True)
class AttentionCase(Case):
    batch: int = 2
    seqlen_q: int = 50
    seqlen_k: int = 50
    num_heads: int = 3
    num_kv_heads: int = 1
    head_dim: int = 32
    dtype: torch.dtype = FLOAT32
    causal: bool = True
    alibi: str = "some"  # none, some, all
    mask: str = "none"  # the purpose of key_start
    values: str = "normal"
    layout: str = "contiguous"
    seed: int = 0

    @property
    def softmax_scale(self):
        return self.head_dim**-0.5

    def key_start(self, device):
        """(batch, seqlen_q) int32, or None."""
        generator = torch.Generator().manual_seed(self.seed)
        position = torch.arange(self.seqlen_q)[None] + self.seqlen_k - self.seqlen_q
        position = position.expand(self.batch, -1)
        if self.mask == "none":
            return None
        if self.mask == "documents":
            starts = torch.randint(1, max(2, self.seqlen_k), (self.batch, 3), generator=generator).sort().values
            starts = torch.cat([torch.zeros(self.batch, 1, dtype=starts.dtype), starts], dim=1)
            document = torch.searchsorted(starts, position.contiguous().clamp(min=0), right=True) - 1
            start = starts.gather(1, document)
        elif self.mask == "padding":
            start = torch.randint(0, self.seqlen_k + 1, (self.batch, 1), generator=generator).expand(-1, self.seqlen_q)
        elif self.mask == "window":
            start = position - 7
        elif self.mask == "ahead":  # a row does not see its own key; without causal it sees only later ones
            start = position + 5
        elif self.mask == "blind":  # from one row on, nothing is visible
            start = torch.where(position < self.seqlen_k // 2, 0, self.seqlen_k + 3)
        return start.to(torch.int32).to(device)


@dataclasses.dataclass
class Inputs:
    """The arguments of one call of attention, and the gradient of its output."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    options: dict

    def tensors(self):
        return self.q, self.k, self.v


def make(case, device):
    """The `Inputs` of an `AttentionCase`."""
    generator = torch.Generator().manual_seed(1000 + case.seed)
    q = torch.randn(case.batch, case.seqlen_q, case.num_heads, case.head_dim, generator=generator)
    k, v = torch.randn(2, case.batch, case.seqlen_k, case.num_kv_heads, case.head_dim, generator=generator)
    dout = torch.randn(q.shape, generator=generator)
    if case.values == "peaked":
        q = 30 * q
    elif case.values == "flat":
        q = 0.01 * q
    elif case.values == "huge key":
        k[:, case.seqlen_k // 2] *= 100
    elif case.values == "ties":
        k[:] = k[:, :1].clone()
    elif case.values == "denormal":
        k = k * 1e-39
    elif case.values == "heavy":
        v = v * torch.exp(2 * torch.randn(v.shape, generator=generator))
    elif case.values == "offset":
        v = v + 5
    q, k, v, dout = (lay_out(t.to(device, case.dtype), case.layout) for t in (q, k, v, dout))
    options = {"causal": case.causal, "key_start": case.key_start(device)}
    if case.alibi != "none":
        slopes = [SLOPES[head % len(SLOPES)] for head in range(case.num_heads)]
        if case.alibi == "all":
            slopes = [slope or 2**-6 for slope in slopes]
        options["alibi_slopes"] = torch.tensor(slopes, device=device)
    return Inputs(q, k, v, dout, options)


# ---- qk_norm_rotary -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class QkNormRotaryCase(Case):
    name: str = ""
    batch: int = 2
    seqlen_q: int = 17
    seqlen_k: int = 17
    num_heads: int = 3
    num_kv_heads: int = 1
    head_dim: int = 64
    rotary_dim: int = 32
    xpos: bool = True
    normalize: bool = True
    scaled: bool = True
    position: int = 0
    q_multiplier: float = 1.0

    def options(self):
        names = ("rotary_dim", "xpos", "normalize", "position", "q_multiplier")
        return {name: getattr(self, name) for name in names}

    def tensors(self, dtype, device="cpu", seed=0):
        """q, k and both scales (None without)."""
        generator = torch.Generator().manual_seed(seed)
        q = normal(generator, self.batch, self.seqlen_q, self.num_heads, self.head_dim, dtype=dtype, device=device)
        k = normal(generator, self.batch, self.seqlen_k, self.num_kv_heads, self.head_dim, dtype=dtype, device=device)
        q_scale = k_scale = None
        if self.scaled:
            kind = {"dtype": torch.float64 if dtype == torch.float64 else FLOAT32, "device": device}
            q_scale = normal(generator, self.num_heads, self.head_dim, **kind) + 3
            k_scale = normal(generator, self.num_kv_heads, self.head_dim, **kind) - 3
        return q, k, q_scale, k_scale

    @staticmethod
    def unsupported(backend, q, k, *scales):
        return qk_norm_rotary.unsupported(backend, q, k)


# ---- token_shift_norm -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TokenShiftNormCase(Case):
    name: str = ""
    batch: int = 2
    seqlen: int = 17
    dim: int = 64
    shift: int = 1
    norm: bool = True
    residual: bool = True
    scaled: bool = True
    history: bool = False
    documents: bool = False
    position: int = 0
    alpha: float = 1.5

    def options(self, device="cpu", dtype=FLOAT32):
        """All arguments that get no gradient."""
        history = key_start = None
        if self.history:
            generator = torch.Generator().manual_seed(7)
            history = normal(generator, self.batch, self.shift, self.dim, dtype=dtype, device=device)
        if self.documents:  # of 1, 2, 3 ... tokens; the first one began before this call
            starts, length = [], 1
            while len(starts) < self.seqlen:
                starts += [self.position + len(starts) - (2 if not starts else 0)] * length
                length += 1
            key_start = torch.tensor(starts[: self.seqlen], dtype=torch.int32, device=device).clamp_min(0)
            key_start = torch.stack([key_start, torch.zeros_like(key_start)])[: self.batch]
        return {
            "alpha": self.alpha if self.residual else 1.0,
            "shift": self.shift,
            "history": history,
            "key_start": key_start,
            "position": self.position,
        }

    def tensors(self, dtype, device="cpu", seed=0):
        """x, residual, residual_scale, gamma (None without)."""
        generator = torch.Generator().manual_seed(seed)
        wide = {"dtype": torch.float64 if dtype == torch.float64 else FLOAT32, "device": device}
        narrow = {"dtype": dtype, "device": device}
        shape = self.batch, self.seqlen, self.dim
        x = normal(generator, *shape, **narrow)
        residual = normal(generator, *shape, **narrow) if self.residual else None
        residual_scale = normal(generator, self.dim, **wide) + 1 if self.residual and self.scaled else None
        return x, residual, residual_scale, normal(generator, self.dim, **wide) if self.norm else None

    @staticmethod
    def unsupported(backend, x, *rest):
        return token_shift_norm.unsupported(backend, x)


# ---- feed_forward ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FeedForwardCase(Case):
    name: str = ""
    rows: tuple = (2, 17)
    dim: int = 24
    hidden: int = 96
    dim_out: int = 24
    bias_in: bool = True
    bias_out: bool = True
    size: float = 1.0  # of the first product

    def tensors(self, dtype, device="cpu", seed=0):
        """x, weight_in, bias_in, weight_out, bias_out (None without)."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, scale):
            return (normal(generator, *shape, dtype=torch.float64) * scale).to(device, dtype)

        return (
            draw(*self.rows, self.dim, scale=1.0),
            draw(self.hidden, self.dim, scale=self.size * self.dim**-0.5),
            draw(self.hidden, scale=self.size) if self.bias_in else None,
            draw(self.dim_out, self.hidden, scale=self.hidden**-0.5),
            draw(self.dim_out, scale=1.0) if self.bias_out else None,
        )

    @staticmethod
    def unsupported(backend, x, *rest):
        return feed_forward.unsupported(backend, x)
