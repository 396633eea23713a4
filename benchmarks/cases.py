"""Inputs, flop and byte counts, and baselines of the attention benchmarks. Every baseline gets the same tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from andromeda.ops.attention import attention

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

LOGIT_SCALE = 10.0  # of unit queries and keys: QK norm without learned scales (docs/model.md#5.2)
LOGIT_BOUND = LOGIT_SCALE * (1 + 2**-7)  # bfloat16 rounds the unit vectors (docs/attention.md#bound)
FLEX_BLOCK = 128  # queries and keys of a block of FlexAttention's mask
CUDA_DTYPES = (torch.bfloat16, torch.float16)  # for which attention has compiled CUDA kernels


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    step: str  # forward, backward, decode
    seqlen: int  # keys; also queries, except in decode
    batch: int = 1
    num_heads: int = 24
    num_kv_heads: int = 1
    head_dim: int = 128
    alibi_heads: int = 12
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    causal: bool = True

    def __str__(self) -> str:
        return f"{self.step} {self.shape} {str(self.dtype).removeprefix('torch.')}"

    @property
    def seqlen_q(self) -> int:
        return 1 if self.step == "decode" else self.seqlen

    @property
    def shape(self) -> str:
        shape = f"b{self.batch} n{self.seqlen} h{self.num_heads}/{self.num_kv_heads} d{self.head_dim}"
        return shape if self.causal else f"{shape} non-causal"

    @property
    def flops(self) -> float:
        """Two products forward, five backward, over the visible part of the score matrix. Skipped tiles count as work,
        so that the number is the same for all backends."""
        products = 5 if self.step == "backward" else 2
        return 2.0 * products * self.batch * self.num_heads * self._pairs * self.head_dim

    @property
    def _pairs(self) -> float:
        """Visible pairs of query and key in one head."""
        hidden = self.seqlen_q * (self.seqlen_q - 1) / 2 if self.causal else 0
        return self.seqlen_q * self.seqlen - hidden

    @property
    def slopes(self) -> list[float]:
        """Slopes like the model's defaults (docs/model.md#5.4): 2^0 ... 2^-8, then no bias."""
        steep = [2.0 ** (-8 * head / self.alibi_heads) for head in range(1, self.alibi_heads + 1)]
        return steep + [0.0] * (self.num_heads - self.alibi_heads)

    @property
    def windows(self) -> list[int]:
        """For each head, the distance from which on keys hold less than 2^-24 of a row (docs/attention.md#windows)."""
        reach = 2 * LOGIT_BOUND + 24 * math.log(2)
        return [math.ceil(reach / slope) + 1 if slope > 0 else self.seqlen for slope in self.slopes]

    @property
    def effective_flops(self) -> float:
        """`flops` of the pairs inside the windows."""
        first = self.seqlen - self.seqlen_q  # keys before the first query
        inside = 0.0
        for window in self.windows:
            short = min(max(window - first, 0), self.seqlen_q)  # rows that see no more keys than the window holds
            inside += short * first + short * (short + 1) / 2 + (self.seqlen_q - short) * window
            if not self.causal:
                short = min(window, self.seqlen_q)  # rows that see fewer keys after them than the window holds
                inside += short * (short - 1) / 2 + (self.seqlen_q - short) * (window - 1)
        return self.flops * inside / (self.num_heads * self._pairs)

    @property
    def bytes(self) -> float:
        """Every operand and result once."""
        queries = self.batch * self.seqlen_q * self.num_heads * self.head_dim
        keys = self.batch * self.seqlen * self.num_kv_heads * self.head_dim
        times = 4 if self.step == "backward" else 2  # q, out, k, v; backward: also dq, dout, dk, dv
        return times * (queries + keys) * self.dtype.itemsize

    @property
    def cache_elements(self) -> int:
        """Numbers in K and V together."""
        return 2 * self.batch * self.seqlen * self.num_kv_heads * self.head_dim


class AttentionInputs:
    def __init__(self, case: AttentionCase) -> None:
        generator = torch.Generator(device=case.device).manual_seed(0)

        def draw(seqlen: int, heads: int) -> torch.Tensor:
            shape = (case.batch, seqlen, heads, case.head_dim)
            return torch.randn(shape, generator=generator, device=case.device)

        self.case = case
        self.q = F.normalize(draw(case.seqlen_q, case.num_heads), dim=-1).to(case.dtype)
        self.k = F.normalize(draw(case.seqlen, case.num_kv_heads), dim=-1).to(case.dtype)
        self.v = draw(case.seqlen, case.num_kv_heads).to(case.dtype)
        self.dout = draw(case.seqlen_q, case.num_heads).to(case.dtype)
        self.slopes = torch.tensor(case.slopes, device=case.device)
        self.bound = torch.full((case.num_heads,), LOGIT_BOUND, device=case.device)
        if case.step == "backward":
            for tensor in (self.q, self.k, self.v):
                tensor.requires_grad_()

    def bias(self) -> torch.Tensor:
        """The dense bias with the causal mask, (1, num_heads, seqlen_q, seqlen), for a kernel without
        ALiBi."""
        case = self.case
        query = torch.arange(case.seqlen - case.seqlen_q, case.seqlen, dtype=torch.int32, device=case.device)[:, None]
        key = torch.arange(case.seqlen, dtype=torch.int32, device=case.device)[None, :]
        bias = torch.empty(
            (1, case.num_heads, case.seqlen_q, case.seqlen), dtype=case.dtype, device=case.device
        )  # filled head by head: all of it in float32 would need twice the final memory
        distance = (query - key).abs_()
        hidden = key > query if case.causal else None
        for head, slope in enumerate(self.slopes):
            bias[0, head] = -slope * distance
            if hidden is not None:
                bias[0, head].masked_fill_(hidden, float("-inf"))
        return bias

    def exact_rows(self, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
        """Up to `count` queries, spread over all, and their outputs (batch, count, num_heads, head_dim) by plain torch
        in float32. They judge all kernels, even at lengths where the complete output would not fit in memory."""
        case = self.case
        rows = torch.linspace(0, case.seqlen_q - 1, min(count, case.seqlen_q), device=case.device).round().long()
        query = (rows + case.seqlen - case.seqlen_q)[:, None]
        key = torch.arange(case.seqlen, device=case.device)[None, :]
        q, k, v = (tensor.detach().float() for tensor in (self.q[:, rows], self.k, self.v))
        q = q.unflatten(2, (case.num_kv_heads, -1))  # heads of one key head beside each other
        scores = LOGIT_SCALE * torch.einsum("bqghd,bkgd->bghqk", q, k).flatten(1, 2)
        scores -= self.slopes[:, None, None] * (query - key).abs()
        if case.causal:
            scores.masked_fill_(key > query, float("-inf"))
        weights = scores.softmax(dim=-1).unflatten(1, (case.num_kv_heads, -1))
        return rows, torch.einsum("bghqk,bkgd->bqghd", weights, v).flatten(2, 3)


Forward = Callable[[], torch.Tensor]  # returns (batch, seqlen_q, num_heads, head_dim)


def andromeda(inputs: AttentionInputs, *, windows: bool, backend: str | None = None) -> Forward:
    """The kernels of a backend (default: the compiled ones of the device), requested by name: otherwise the reference
    might run in their place."""
    case, bound = inputs.case, inputs.bound if windows else None
    backend = case.device if backend is None else backend

    def forward() -> torch.Tensor:
        return attention(
            inputs.q, inputs.k, inputs.v, causal=case.causal, softmax_scale=LOGIT_SCALE, alibi_slopes=inputs.slopes,
            logit_bound=bound, backend=backend,
        )  # fmt: skip

    return forward


def sdpa(inputs: AttentionInputs, *, biased: bool, kernel: str | None = None) -> Forward:
    """kernel: the name in torch.nn.attention.SDPBackend of the only kernel allowed; None leaves the choice to torch."""
    case = inputs.case
    bias = inputs.bias() if biased else None
    causal = case.causal and not biased and case.step != "decode"
    groups = case.num_heads // case.num_kv_heads
    # One of these kernels requires as many key heads as heads: they are expanded, a single key head without a copy.
    expanded = kernel == "EFFICIENT_ATTENTION"

    def forward() -> torch.Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
        if expanded:
            k, v = (x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
        with contextlib.nullcontext() if kernel is None else sdpa_kernel(getattr(SDPBackend, kernel)):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=causal, scale=LOGIT_SCALE, enable_gqa=groups > 1 and not expanded
            )
        return out.transpose(1, 2)

    return forward


def flex(inputs: AttentionInputs, *, windows: bool = False) -> Forward:
    """windows: the block mask skips the keys that `logit_bound` permits this library to skip."""
    from torch.nn.attention.flex_attention import flex_attention

    case, slopes = inputs.case, inputs.slopes
    shift = case.seqlen - case.seqlen_q

    def score_mod(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return score - slopes[head] * (query + shift - key).abs()

    mask = block_mask(case, windows=windows)
    # torch.compile makes programs for arbitrary lengths after a second length. They are slower, and the one for a
    # single query is not valid C++ (torch 2.13). It gives up after eight programs, so each case starts with
    # torch.compiler.reset().
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> torch.Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
        grouped = case.num_heads != case.num_kv_heads
        out = compiled(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=grouped, scale=LOGIT_SCALE)
        return out.transpose(1, 2)

    return forward


def block_mask(case: AttentionCase, *, windows: bool) -> BlockMask:
    """FlexAttention's mask of a case. A head sees a range of distances, so the corners of a block show whether any or
    all of its pairs are visible. `create_block_mask` would examine every pair of every head, which for 24 heads of
    8192 queries needs tens of gigabytes."""
    from torch.nn.attention.flex_attention import BlockMask

    shift = case.seqlen - case.seqlen_q
    reach = torch.tensor(case.windows if windows else [case.seqlen], device=case.device)
    first = torch.zeros_like(reach) if case.causal else 1 - reach  # a head sees the distances first ... reach - 1

    def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query + shift >= key if case.causal else query >= 0

    def visible_in_window(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        distance = query + shift - key
        return (distance >= first[head]) & (distance < reach[head])

    def corners(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        begin = torch.arange(0, length, FLEX_BLOCK, device=case.device)
        return begin, begin + FLEX_BLOCK - 1

    (query, last_query), (key, last_key) = corners(case.seqlen_q), corners(case.seqlen)
    whole = (last_query < case.seqlen_q)[:, None] & (last_key < case.seqlen)
    last_query, last_key = last_query.clamp_max(case.seqlen_q - 1), last_key.clamp_max(case.seqlen - 1)
    nearest, farthest = (query + shift)[:, None] - last_key, (last_query + shift)[:, None] - key
    first_of, reach_of = first[:, None, None], reach[:, None, None]
    some = (farthest >= first_of) & (nearest < reach_of)
    every = (nearest >= first_of) & (farthest < reach_of) & whole

    def ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From (heads, query blocks, key blocks): the number of set blocks in a row, and indices with these first."""
        number = blocks.sum(dim=-1, dtype=torch.int32)
        return number[None], blocks.int().argsort(dim=-1, descending=True, stable=True).int()[None]

    return BlockMask.from_kv_blocks(
        *ordered(some & ~every), *ordered(every), BLOCK_SIZE=FLEX_BLOCK, 
        mask_mod=visible_in_window if windows else visible, seq_lengths=(case.seqlen_q, case.seqlen),
    )  # fmt: skip


def flash_attn(inputs: AttentionInputs, *, module: str, biased: bool) -> Forward:
    """The packages flash_attn (2), flash_attn_interface (3) and flash_attn.cute (4); only 2 has ALiBi."""
    function = importlib.import_module(module).flash_attn_func
    options = {"alibi_slopes": inputs.slopes} if biased else {}

    def forward() -> torch.Tensor:
        out = function(inputs.q, inputs.k, inputs.v, softmax_scale=LOGIT_SCALE, causal=inputs.case.causal, **options)
        return out[0] if isinstance(out, tuple) else out  # later versions also return the log-sum-exp

    return forward


@dataclasses.dataclass(frozen=True)
class Contender:
    name: str
    build: Callable[[AttentionInputs], Forward]
    exact: bool = True  # computes the case's function; False: without the bias, for its speed only
    windowed: bool = False  # leaves out the keys outside the windows


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def has_cuda_kernel(case: AttentionCase) -> bool:
    largest = 256 if case.step == "forward" and on_hopper() else 128
    return case.dtype in CUDA_DTYPES and case.head_dim <= largest


def contenders(case: AttentionCase, *, compiled: bool = True) -> list[Contender]:
    """The contenders that could run the case; with `compiled`, also those that need a compiler."""
    found = []
    if case.device == "cpu" or has_cuda_kernel(case):
        found.append(Contender("andromeda", lambda inputs: andromeda(inputs, windows=True), windowed=True))
        found.append(Contender("andromeda, no windows", lambda inputs: andromeda(inputs, windows=False)))
    if case.device == "cuda":  # on a CPU, Triton's kernels run in the emulator of the tests only
        for windows, name in ((True, "andromeda, triton"), (False, "andromeda, triton, no windows")):
            build = functools.partial(andromeda, windows=windows, backend="triton")
            found.append(Contender(name, build, windowed=windows))
    found += [
        Contender("sdpa, bias tensor", lambda inputs: sdpa(inputs, biased=True)),
        Contender("sdpa, no bias", lambda inputs: sdpa(inputs, biased=False), exact=False),
    ]
    if case.device == "cuda":
        found += _cuda_contenders()
    # Last, because compiling takes longest. On a CPU, FlexAttention is compiled for inference only.
    if compiled and not (case.device == "cpu" and case.step == "backward"):
        found.append(Contender("flex_attention", flex))
        if case.device == "cuda":
            found.append(Contender("flex_attention, windows", lambda inputs: flex(inputs, windows=True), windowed=True))
    return found


def _cuda_contenders() -> list[Contender]:
    def named(kernel: str, biased: bool) -> Callable[[AttentionInputs], Forward]:
        return lambda inputs: sdpa(inputs, biased=biased, kernel=kernel)

    def package(module: str, biased: bool) -> Callable[[AttentionInputs], Forward]:
        return lambda inputs: flash_attn(inputs, module=module, biased=biased)

    found = [
        Contender("sdpa math, bias tensor", named("MATH", True)),
        Contender("sdpa efficient, bias tensor", named("EFFICIENT_ATTENTION", True)),
        Contender("sdpa cudnn, bias tensor", named("CUDNN_ATTENTION", True)),
        Contender("sdpa cudnn, no bias", named("CUDNN_ATTENTION", False), exact=False),
        Contender("sdpa flash, no bias", named("FLASH_ATTENTION", False), exact=False),
    ]
    if _installed("flash_attn"):
        found.append(Contender("flash_attn 2", package("flash_attn", True)))
    if _installed("flash_attn_interface"):
        found.append(Contender("flash_attn 3, no bias", package("flash_attn_interface", False), exact=False))
    if _installed("flash_attn") and _installed("flash_attn.cute"):
        found.append(Contender("flash_attn 4, no bias", package("flash_attn.cute", False), exact=False))
    return found


def _installed(module: str) -> bool:
    """Whether a package is installed; if it cannot be imported, its contender fails and reports the reason."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the parent package
        return True
