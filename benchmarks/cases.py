"""Inputs, flop and byte counts, and baselines of the attention benchmarks. Every baseline gets the same tensors."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from andromeda.ops.attention import attention

LOGIT_BOUND = 10.0  # unit queries and keys times this scale: QK norm without learned scales (SPEC 5.2)


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

    @property
    def seqlen_q(self) -> int:
        return 1 if self.step == "decode" else self.seqlen

    @property
    def shape(self) -> str:
        return f"b{self.batch} n{self.seqlen} h{self.num_heads}/{self.num_kv_heads} d{self.head_dim}"

    @property
    def flops(self) -> float:
        """Two products forward, five backward, over the visible half of the score matrix; skipped tiles count as work
        done, so that all backends are compared by the same number."""
        pairs = self.seqlen_q * self.seqlen - self.seqlen_q * (self.seqlen_q - 1) / 2
        products = 5 if self.step == "backward" else 2
        return 2.0 * products * self.batch * self.num_heads * pairs * self.head_dim

    @property
    def bytes(self) -> float:
        """Every operand and result once."""
        queries = self.batch * self.seqlen_q * self.num_heads * self.head_dim
        keys = self.batch * self.seqlen * self.num_kv_heads * self.head_dim
        times = 4 if self.step == "backward" else 2  # q, out, k, v; backward: dq, dout, dk, dv too
        return times * (queries + keys) * self.dtype.itemsize

    @property
    def cache_elements(self) -> int:
        """Numbers in K and V together."""
        return 2 * self.batch * self.seqlen * self.num_kv_heads * self.head_dim


class AttentionInputs:
    def __init__(self, case: AttentionCase):
        generator = torch.Generator(device=case.device).manual_seed(0)

        def draw(seqlen: int, heads: int) -> torch.Tensor:
            shape = (case.batch, seqlen, heads, case.head_dim)
            return torch.randn(shape, generator=generator, device=case.device)

        self.case = case
        self.q = F.normalize(draw(case.seqlen_q, case.num_heads), dim=-1).to(case.dtype)
        self.k = F.normalize(draw(case.seqlen, case.num_kv_heads), dim=-1).to(case.dtype)
        self.v = draw(case.seqlen, case.num_kv_heads).to(case.dtype)
        self.dout = draw(case.seqlen_q, case.num_heads).to(case.dtype)
        # The slopes of SPEC 5.4 for the model's default of twelve heads are of this kind: 2^0 ... 2^-8.
        exponents = torch.arange(1, case.alibi_heads + 1, device=case.device) * (-8 / max(case.alibi_heads, 1))
        self.slopes = torch.cat([2.0**exponents, torch.zeros(case.num_heads - case.alibi_heads, device=case.device)])
        # 2^-7: bfloat16 rounds the unit vectors (gpu_kernels 1.2).
        self.bound = torch.full((case.num_heads,), LOGIT_BOUND * (1 + 2**-7), device=case.device)
        if case.step == "backward":
            for tensor in (self.q, self.k, self.v):
                tensor.requires_grad_()

    def bias(self) -> torch.Tensor:
        """The dense bias with the causal mask, (1, num_heads, seqlen_q, seqlen): what a kernel without ALiBi needs."""
        case = self.case
        query = torch.arange(case.seqlen - case.seqlen_q, case.seqlen, device=case.device)[:, None]
        key = torch.arange(case.seqlen, device=case.device)[None, :]
        bias = -self.slopes[:, None, None] * (query - key)
        return bias.masked_fill_(key > query, float("-inf")).to(case.dtype)[None]


Forward = Callable[[], torch.Tensor]  # returns (batch, seqlen_q, num_heads, head_dim)


def andromeda(inputs: AttentionInputs, *, windows: bool, backend: str | None = None) -> Forward:
    bound = inputs.bound if windows else None

    def forward() -> torch.Tensor:
        return attention(
            inputs.q, inputs.k, inputs.v, causal=True, softmax_scale=LOGIT_BOUND, alibi_slopes=inputs.slopes,
            logit_bound=bound, backend=backend,
        )  # fmt: skip

    return forward


def sdpa(inputs: AttentionInputs, *, biased: bool) -> Forward:
    case = inputs.case
    bias = inputs.bias() if biased else None
    grouped = case.num_heads != case.num_kv_heads

    def forward() -> torch.Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
        causal = not biased and case.step != "decode"
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=causal, scale=LOGIT_BOUND, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    return forward


def flex(inputs: AttentionInputs) -> Forward:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case, slopes = inputs.case, inputs.slopes
    shift = case.seqlen - case.seqlen_q

    def score_mod(score, batch, head, query, key):
        return score - slopes[head] * (query + shift - key)

    mask = create_block_mask(
        lambda b, h, query, key: query + shift >= key, None, None, case.seqlen_q, case.seqlen, device=case.device
    )
    # After a second length torch.compile makes programs for any length: slower ones, and the one for a single query is
    # not valid C++ (torch 2.13). It also gives up after eight programs. Each case therefore starts afresh.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention)

    def forward() -> torch.Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (inputs.q, inputs.k, inputs.v))
        grouped = case.num_heads != case.num_kv_heads
        out = compiled(q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=grouped, scale=LOGIT_BOUND)
        return out.transpose(1, 2)

    return forward


def flash_attn(inputs: AttentionInputs) -> Forward:
    from flash_attn import flash_attn_func

    def forward() -> torch.Tensor:
        return flash_attn_func(
            inputs.q, inputs.k, inputs.v, softmax_scale=LOGIT_BOUND, causal=True, alibi_slopes=inputs.slopes
        )

    return forward


@dataclasses.dataclass(frozen=True)
class Contender:
    name: str
    build: Callable[[AttentionInputs], Forward]
    exact: bool = True  # computes the case's function; False: without the bias, for its speed only


def contenders(case: AttentionCase, *, compiled: bool = True) -> list[Contender]:
    """Those that could run the case; without the ones that need a compiler unless `compiled`."""
    found = [
        Contender("andromeda", lambda inputs: andromeda(inputs, windows=True)),
        Contender("andromeda, no windows", lambda inputs: andromeda(inputs, windows=False)),
        Contender("sdpa, bias tensor", lambda inputs: sdpa(inputs, biased=True)),
        Contender("sdpa, no bias", lambda inputs: sdpa(inputs, biased=False), exact=False),
    ]
    # On a CPU, FlexAttention is compiled for inference only.
    if compiled and not (case.device == "cpu" and case.step == "backward"):
        found.append(Contender("flex_attention", flex))
    if case.device == "cuda" and importlib.util.find_spec("flash_attn"):
        found.append(Contender("flash_attn", flash_attn))
    return found
