"""The model, in the order of docs/model.md: embedding, token shift, attention, feed-forward, decoder, logits, loss.

        tokens (batch, n)
           |
        token_emb (+ pos_emb / sqrt(dim))                         AndromedaEmbedding, TransformerWrapper
           |
           x ------------------------------+                      Sublayer, 2 * depth times,
           |                               |                      attention and feed-forward in turn:
        norm (pre-norm only)               |
           |                               |                        pre-norm: x + fn(shift(norm(x)))
        token_shift                        |                        DeepNorm: norm(alpha * rho * x + fn(shift(x)))
           |                               | * alpha * rho (DeepNorm only)
        Attention:   to_q, to_k, to_v -> qk_norm_rotary -> attention -> to_out
        FeedForward: proj_in -> gelu -> proj_out
           |                               |
           + ------------------------------+
           |
        norm (DeepNorm only)
           |
        final_norm (pre-norm only)
           |
        to_logits -> logits (batch, n, num_tokens)                TransformerWrapper
           |
        cross-entropy with the next tokens                        AutoregressiveWrapper gives them

Logits and cross-entropy are one operation, `linear_cross_entropy`, where nobody asks for the logits.

Tensors are (batch, n, dim), those of heads (batch, n, num_heads, head_dim): the output of a projection is viewed, never
transposed or copied. Residual, norm and token shift, which lie between two maps, are one pass over memory
(`token_shift_norm`): with DeepNorm a sub-layer ends with it and passes the next one its input, already shifted.
"""

import contextlib
import contextvars
import copy
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from typing_extensions import Unpack

from andromeda import checkpoint, generation
from andromeda.config import (
    DecoderConfig,
    DecoderOptions,
    EmbeddingProvider,
    KeyStart,
    ModelConfig,
    Tokens,
    checked,
    read_key_start,
    read_tokens,
)
from andromeda.ops import _checks, _persistent, _select, _sharding, _transforms
from andromeda.ops import attention as attention_op
from andromeda.ops import qk_norm_rotary as rotary_op
from andromeda.ops._common import compute_dtype
from andromeda.ops.attention import attention, attention_weights
from andromeda.ops.feed_forward import feed_forward
from andromeda.ops.linear_cross_entropy import linear_cross_entropy
from andromeda.ops.qk_norm_rotary import qk_norm_rotary
from andromeda.ops.token_shift_norm import token_shift_norm

_LN2 = math.log(2)
_LOSS_BLOCK_LOGITS = 2**22  # the loss holds float32 copies of this many logits at once, 16 MiB
# For so few tokens without gradients feed-forward calls its two modules: there is nothing to save, the operation would
# take the host 70 us longer, and autocast remembers the rounded weights only of torch's own functions.
_FEW_TOKENS = 64
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# `andromeda.huggingface`, which does not know the operations, asks these, too.
have_values, is_tracing = _checks.have_values, _checks.is_tracing


def segment_length(dtype: torch.dtype) -> int:
    """Number of consecutive positions that share an xPos origin (docs/attention.md#xpos).

    xPos multiplies pair t of a query by zeta_t ** (distance / 512) and of a key by zeta_t ** (-distance / 512). Here
    distance is the position relative to the origin, and zeta_t is at least 0.4 / 1.4 (docs/model.md#5.3). The origin is
    the middle of a segment of this length. Positions of the segment are therefore at most length / 2 away from it, and
    their factors are at most 3.5 ** (length / 1024): 2**3.6 in float16, 2**14.5 in the other dtypes. Keys of earlier
    segments have factors below 1.
    """
    return 2048 if dtype == torch.float16 else 8192


_undrawn = contextvars.ContextVar("undrawn", default=False)


@contextlib.contextmanager
def undrawn() -> Iterator[None]:
    """Parts of models that this thread makes inside have arbitrary weights; `draw` draws them afterwards."""
    token = _undrawn.set(True)
    try:
        yield
    finally:
        _undrawn.reset(token)


class _UndrawnLinear(nn.Linear):
    def reset_parameters(self) -> None:
        """Does nothing: `new_linear` draws."""


def new_linear(fan_in: int, fan_out: int, *, bias: bool = False, gain: float | None = None) -> nn.Linear:
    """A linear map that is drawn once, from the distribution of docs/model.md#11.

    It is no subclass of `nn.Linear`: tools that quantise a model replace modules of exactly that type.

    gain: None for uniform in +-1 / sqrt(fan_in); else the weight is normal with std gain * sqrt(2 / (fan_in + fan_out))
        and the bias 0. The map keeps it as an attribute, for `draw_linear`.
    """
    linear: nn.Linear = _UndrawnLinear(fan_in, fan_out, bias=bias)
    linear.__class__ = nn.Linear
    linear.gain = gain  # type: ignore[assignment]
    if not _undrawn.get():
        for name, _ in linear.named_parameters():
            draw_linear(linear, name)
    return linear


def draw_linear(linear: nn.Linear, name: str) -> None:
    """Draw the "weight" or "bias" of a map of `new_linear` again."""
    parameter, gain = linear.get_parameter(name), getattr(linear, "gain", None)
    bound = linear.in_features**-0.5
    if gain is None:
        nn.init.uniform_(parameter, -bound, bound)
    elif name == "bias":
        nn.init.zeros_(parameter)
    else:
        nn.init.normal_(parameter, std=gain * (2 / (linear.in_features + linear.out_features)) ** 0.5)


def is_plain(linear: nn.Module) -> bool:
    """Whether calling this module is only its product: no adapter, quantisation, hook or replaced `forward`.

    Then an operation may use its weight and bias in place of the call.
    """
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return (
        type(linear) is nn.Linear
        and "forward" not in vars(linear)
        and not any(hooks)
        and not is_traceable_wrapper_subclass(linear.weight)
    )


class AndromedaEmbedding:
    """The default `andromeda.config.EmbeddingProvider`: a table of normal numbers (docs/model.md#2)."""

    def get_embedding(self, num_tokens: int, dim: int) -> nn.Module:
        """A new table, which maps int64 (batch, n) to (batch, n, dim)."""
        return _new_table(num_tokens, dim, (2 / dim) ** 0.5)


def _new_table(rows: int, dim: int, std: float) -> nn.Embedding:
    table = torch.empty(rows, dim)
    if not _undrawn.get():
        nn.init.normal_(table, std=std)
    return nn.Embedding.from_pretrained(table, freeze=False)


class LayerNorm(nn.Module):
    """Layer norm with gain 1 + gamma and no bias (docs/model.md#3)."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x and its token shift; options: of `token_shift_norm`, among them the residual."""
        return token_shift_norm(x, gamma=self.gamma, **options)


@dataclasses.dataclass(frozen=True)
class Call:
    """The state that all sub-layers of one forward pass share.

    Attributes:
        position: position of the first new token in its sequence.
        stored: number of earlier tokens whose keys the cache holds.
        key_start: (batch, n) int32, the first position that each new token sees, or None.
        stored_key_start: the same place as an index into the keys that attention receives; the cache may have forgotten
            the first keys of the sequence.
        cache: the cache with the earlier tokens, or None.
        step, num_keys: with a `FixedCache`, as `qk_norm_rotary` and `attention` take them: the new token sits `step`
            positions after `position`, and the first `num_keys` rows of the keys exist.
        attentions: None, or a list to which each attention sub-layer appends its weights
            (batch, num_heads, n, stored + n), which plain torch then computes.
    """

    position: int = 0
    stored: int = 0
    key_start: torch.Tensor | None = None
    stored_key_start: torch.Tensor | None = None
    cache: generation.Cache | None = None
    step: torch.Tensor | None = None
    num_keys: torch.Tensor | None = None
    attentions: list[torch.Tensor] | None = None

    @classmethod
    def begin(
        cls,
        key_start: torch.Tensor | None,
        cache: generation.Cache | None,
        attentions: list[torch.Tensor] | None = None,
    ) -> "Call":
        """The state of a call with this `key_start` (batch, n), which `Cache.begin` has completed."""
        if cache is None:
            return cls(key_start=key_start, stored_key_start=key_start, attentions=attentions)
        if isinstance(cache, generation.FixedCache):
            # No token before key_start is near enough for the token shift.
            first, rows = cache.position, cache.stored_key_start()
            return cls(first, 0, None, rows, cache, cache.step, cache.num_keys, attentions)
        forgotten, stored_key_start = cache.position - cache.length, key_start
        if key_start is not None and forgotten > 0:
            stored_key_start = (key_start - forgotten).clamp_min(0)
        return cls(cache.position, cache.length, key_start, stored_key_start, cache, attentions=attentions)


class _Heads(NamedTuple):
    """What belongs to the query heads of this process: to all of them, or under tensor parallelism to its part."""

    number: int
    alibi_slopes: tuple[float, ...] | None
    q_scale: torch.Tensor | None  # (num_heads, head_dim)
    k_scale: torch.Tensor | None  # (num_kv_heads, head_dim)


class Attention(nn.Module):
    """Attention sub-layer (docs/model.md#5).

    Tensor parallelism may give each process an equal part of the query heads, by sharding to_q by rows and to_out by
    columns. to_k and to_v stay whole with one key head, and are else sharded as to_q.

    index: number of the sub-layer, by which a cache names its keys and values.
    """

    q_scale: nn.Parameter | None
    k_scale: nn.Parameter | None

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        q_dim, kv_dim = config.heads * config.dim_head, config.num_kv_heads * config.dim_head
        self._widths = q_dim, kv_dim, kv_dim  # of the projections
        # Read here, because torch.compile would end its graph at a cached property.
        self._alibi_slopes = config.alibi_slopes
        gain, gain_value = (1.0, config.beta) if config.deepnorm else (None, None)
        self.to_q = new_linear(config.dim, q_dim, gain=gain)
        self.to_k = new_linear(config.dim, kv_dim, gain=gain)
        self.to_v = new_linear(config.dim, kv_dim, gain=gain_value)
        self.to_out = new_linear(q_dim, config.dim, gain=gain_value)
        if config.learned_scales:
            start = config.dim_head**0.25
            self.q_scale = nn.Parameter(torch.full((config.heads, 1, config.dim_head), start))
            self.k_scale = nn.Parameter(torch.full((config.num_kv_heads, 1, config.dim_head), start))
        else:
            self.q_scale = self.k_scale = None

    def forward(self, h: torch.Tensor, call: Call) -> torch.Tensor:
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        share = self._share(q, k, v)
        # Not by `unflatten`, which torch.compile cannot trace while a default device is set.
        shape = (*h.shape[:2], -1, self.config.dim_head)
        q = q.view(shape)  # (batch, n, num_heads, head_dim)
        k, v = k.view(shape), v.view(shape)  # (batch, n, num_kv_heads, head_dim)
        if share is not None:
            k, v = (self._part(x, 2, self.config.num_kv_heads, share) for x in (k, v))
        heads = self._heads(share)
        store = None if call.cache is None else call.cache.attention(self.index)
        if share is not None and store is not None and store.learned:  # its gradient would be that of these heads
            raise ValueError(
                "Attention: past_key_values must not begin with a learned prefix under tensor parallelism, got one; "
                "train the prefix in one process, or by DistributedDataParallel or fully_shard"
            )
        bound = self._logit_bound(heads, q.device, store)
        outs, weights = [], []
        for start, stop, segment, length in self._segments(call.position, q):
            if store is None:  # all keys so far, rotated for an xPos origin near these queries
                queries, keys = self._normalise_and_rotate(heads, q[:, start:stop], k[:, :stop])
                values = v[:, :stop]
            else:
                stored = call.stored + start
                segment = store.enter_segment(segment, length, self.config.rotary_dim, stored)
                position, origin = call.position + start, segment * length + length // 2
                queries, keys = self._normalise_and_rotate(
                    heads, q[:, start:stop], k[:, start:stop], position, origin, call.step
                )
                keys, values = store.append(keys, v[:, start:stop], stored)
            key_start = None if call.stored_key_start is None else call.stored_key_start[:, start:stop]
            if call.attentions is None:
                outs.append(self._attend(heads, queries, keys, values, key_start, bound, call.num_keys))
            else:
                out, seen = self._attend_with_weights(heads, queries, keys, values, key_start)
                outs.append(out)
                weights.append(seen)
        if call.attentions is not None:  # a single tensor is the one that gradients pass
            total = weights[-1].shape[3]
            later = [functional.pad(seen, (0, total - seen.shape[3])) for seen in weights]
            call.attentions.append(weights[0] if len(weights) == 1 else torch.cat(later, dim=2))
        out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        return self.to_out(out.flatten(2))

    def _share(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> _sharding.Share | None:
        """The share of this process in the query heads; None if it has all. q, k, v: the outputs of the projections."""
        widths = q.shape[-1], k.shape[-1], v.shape[-1]
        if type(q) is torch.Tensor and widths == self._widths:
            return None
        all_heads, all_kv_heads, dim_head = self.config.heads, self.config.num_kv_heads, self.config.dim_head
        for name, x, width in zip(("to_q", "to_k", "to_v"), (q, k, v), widths, strict=True):
            if width % dim_head or _sharding.is_dtensor(x):
                got = "a DTensor" if _sharding.is_dtensor(x) else f"{width} numbers per token"
                raise ValueError(
                    f"Attention: {name} must give heads of {dim_head} numbers in a plain tensor, got {got}; for tensor "
                    f"parallelism choose a number of processes that divides heads={all_heads} and "
                    "use_local_output=True, and with one key head leave to_k and to_v out of the plan"
                )
        if widths == self._widths:
            return None
        heads, k_heads, v_heads = (width // dim_head for width in widths)
        share = _sharding.share_of(self.to_q)
        if share is None or heads * share.count != all_heads:
            raise ValueError(
                f"Attention: to_q must give heads={all_heads} heads, or an equal part of them in each process after "
                f"torch's parallelize_module or with transformers' tp_plan, got {heads} heads"
            )
        if k_heads != v_heads or k_heads not in (all_kv_heads, heads):
            raise ValueError(
                f"Attention: to_k and to_v must give all {all_kv_heads} key heads, or as many as to_q in this process "
                f"({heads}), got {k_heads} and {v_heads}"
            )
        return share

    @staticmethod
    def _part(x: torch.Tensor, axis: int, size: int, share: _sharding.Share) -> torch.Tensor:
        """What belongs to the query heads of this process, of a tensor with all `size` heads at `axis`, or with them.

        One key head belongs to all query heads.
        """
        if x.shape[axis] != size:
            return x
        x = share.enter(x)
        return x if size == 1 else x.chunk(share.count, axis)[share.index]

    def _heads(self, share: _sharding.Share | None) -> _Heads:
        number, slopes = self.config.heads, self._alibi_slopes
        if share is not None:
            number //= share.count
            slopes = None if slopes is None else slopes[share.index * number : (share.index + 1) * number]
        if self.q_scale is None or self.k_scale is None:
            return _Heads(number, slopes, None, None)
        q_scale: torch.Tensor = self.q_scale
        k_scale: torch.Tensor = self.k_scale
        if share is not None:
            q_scale = self._part(q_scale, 0, self.config.heads, share)
            k_scale = self._part(k_scale, 0, self.config.num_kv_heads, share)
        return _Heads(number, slopes, q_scale.squeeze(1), k_scale.squeeze(1))

    def _attend(
        self,
        heads: _Heads,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_start: torch.Tensor | None,
        bound: torch.Tensor | None,
        num_keys: torch.Tensor | None,
    ) -> torch.Tensor:
        return attention(
            q,
            k,
            v,
            causal=True,
            softmax_scale=self._score_scale,
            alibi_slopes=self._constant(heads.alibi_slopes, q.device),
            logit_bound=bound,
            key_start=key_start,
            num_keys=num_keys,
            backend=self.config.backend,
        )

    def _attend_with_weights(
        self, heads: _Heads, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_start: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in plain torch, and the weights (batch, num_heads, seqlen_q, seqlen_k)."""
        weights = attention_weights(
            q,
            k,
            causal=True,
            softmax_scale=self._score_scale,
            alibi_slopes=self._constant(heads.alibi_slopes, q.device),
            key_start=key_start,
        )
        of_kv_heads = weights.to(v.dtype).unflatten(1, (v.shape[2], -1))  # (batch, num_kv_heads, group, n, seqlen_k)
        return torch.einsum("bhgqk,bkhd->bqhgd", of_kv_heads, v).flatten(2, 3), weights

    def _segments(self, position: int, q: torch.Tensor) -> Iterator[tuple[int, int, int, int]]:
        """Cut the new tokens so that the xPos factors of a piece stay in range (docs/attention.md#xpos).

        Yields (start, stop, segment, length): the tokens start ... stop - 1 of this call lie in positions
        segment * length ... (segment + 1) * length - 1.
        """
        n = q.shape[1]
        length = segment_length(q.dtype)
        start = 0
        while start < n:
            segment = (position + start) // length
            stop = (segment + 1) * length - position
            if stop >= n or not self.config.rotary_xpos:  # not a minimum, which would enter every size of a program
                stop = n
            yield start, stop, segment, length
            start = stop

    @property
    def _transforms_queries(self) -> bool:
        return self.config.norm_on or self.config.rotary_xpos

    @property
    def _score_scale(self) -> float:
        """The `softmax_scale` of `attention`.

        Queries that are transformed take all of it but ln(2). The scores are the same, and <q, k> is the exponent of 2
        that the kernels need: they multiply no score.
        """
        return _LN2 if self._transforms_queries else self.config.softmax_scale

    def _normalise_and_rotate(
        self,
        heads: _Heads,
        q: torch.Tensor,
        k: torch.Tensor,
        position: int = 0,
        origin: int | None = None,
        step: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._transforms_queries:
            return q, k
        return qk_norm_rotary(
            q,
            k,
            q_scale=heads.q_scale,
            k_scale=heads.k_scale,
            normalize=self.config.norm_on,
            rotary_dim=self.config.rotary_dim,
            xpos=self.config.rotary_xpos,
            position=position,
            origin=origin,
            step=step,
            q_multiplier=self.config.softmax_scale / _LN2,
            backend=self.config.backend,
        )

    def _logit_bound(
        self, heads: _Heads, device: torch.device, store: generation.KeyValueStore | None
    ) -> torch.Tensor | None:
        """An upper bound per head, (num_heads,), of |softmax_scale * <q, k>| over visible pairs; None without QK norm.

        It is Cauchy-Schwarz per rotated pair and per plain channel: rotation keeps the length of a pair, and xPos only
        shrinks it for keys before the query. The factor 1 + 2**-7 covers the rounding of q and k to bfloat16
        (docs/attention.md#bound). How softmax_scale is shared out among q and `attention` does not change the product.
        """
        margin = 1 + 2**-7
        if not self.config.norm_on or (store is not None and store.learned):
            return None
        if heads.q_scale is None or heads.k_scale is None:
            return self._constant((self.config.softmax_scale * margin,) * heads.number, device)
        if store is not None and store.logit_bound is not None:
            return store.logit_bound
        largest = []  # scale of each pair and plain channel: (num_heads or num_kv_heads, pairs + plain channels)
        for head_scale in (heads.q_scale, heads.k_scale):
            scale = head_scale.detach().float().abs()  # (num_heads or num_kv_heads, head_dim)
            rotated, plain = scale.split((self.config.rotary_dim, self.config.dim_head - self.config.rotary_dim), dim=1)
            pairs = rotated.reshape(rotated.shape[0], -1, 2)
            largest.append(torch.cat((pairs.amax(2), plain), dim=1))
        bound = (largest[0] * largest[1]).amax(1) * (self.config.softmax_scale * margin)
        if store is not None:
            store.logit_bound = bound
        return bound

    @staticmethod
    def _constant(values: tuple[float, ...] | None, device: torch.device) -> torch.Tensor | None:
        return None if values is None else _persistent.constant(values, device)


class FeedForward(nn.Module):
    """Feed-forward sub-layer (docs/model.md#6)."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        gain = config.beta if config.deepnorm else None
        self.config = config
        self.proj_in = new_linear(config.dim, 4 * config.dim, bias=True, gain=gain)
        self.proj_out = new_linear(4 * config.dim, config.dim, bias=True, gain=gain)

    def forward(self, h: torch.Tensor, call: Call) -> torch.Tensor:
        first, second = self.proj_in, self.proj_out
        # A compiler fuses and recomputes by itself. It is asked first: it would guard the number of tokens.
        if (
            _checks.is_tracing()
            or (not torch.is_grad_enabled() and h.shape[0] * h.shape[1] <= _FEW_TOKENS)
            or not (is_plain(first) and is_plain(second))
        ):
            return second(functional.gelu(first(h)))
        return feed_forward(h, first.weight, first.bias, second.weight, second.bias, backend=self.config.backend)


class Sublayer(nn.Module):
    """A map, attention or feed-forward, with its norm, token shift and residual (docs/model.md#3, #7).

    With `gradient_checkpointing`, a training step keeps only the stream before the sub-layer, and computes the rest
    again when it needs it. Hooks of the module see the first computation alone.

    index: 0 ... 2 * depth - 1.
    """

    def __init__(self, config: DecoderConfig, index: int):
        super().__init__()
        self.config, self.index = config, index
        # transformers switches activation checkpointing on through these two names.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        self.norm = LayerNorm(config.dim)
        self.fn = FeedForward(config) if index % 2 else Attention(config, index)
        self.residual_scale = nn.Parameter(torch.ones(config.dim)) if config.deepnorm else None

    def forward(
        self, x: torch.Tensor, shifted: torch.Tensor | None, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The stream and its token shift after this sub-layer, from the stream x and its token shift before it.

        The token shift is None if the previous sub-layer has not computed it together with the stream.
        """
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            x, _ = self._gradient_checkpointing_func(self._forward, x, None, call)
            return x, None  # else the token shift would be kept, too
        return self._forward(x, shifted, call)

    def _forward(
        self, x: torch.Tensor, shifted: torch.Tensor | None, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.config.deepnorm:
            _, shifted = self._shift(self.norm, x, self.index, call)
            return x + self.fn(shifted, call), None
        if shifted is None:
            _, shifted = self._shift(token_shift_norm, x, self.index, call)
        out = self.fn(shifted, call).to(x.dtype)  # under autocast the stream keeps its precision
        residual = {"residual": x, "residual_scale": self.residual_scale, "alpha": self.config.alpha}
        if self.index + 1 == 2 * self.config.depth:
            return self.norm(out, backend=self.config.backend, **residual)[0], None
        return self._shift(self.norm, out, self.index + 1, call, **residual)

    def _shift(
        self,
        function: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        x: torch.Tensor,
        index: int,
        call: Call,
        **residual: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The results of `function`, a form of `token_shift_norm`, with the token shift of sub-layer `index`."""
        shift = self.config.shift_tokens
        cache = call.cache if shift > 0 else None
        history = None if cache is None else cache.shift_rows(index, shift, x.dtype)
        if history is not None and history.requires_grad and torch.is_grad_enabled():
            return self._shift_after(history, function, x, index, call, **residual)
        y, shifted = function(
            x,
            shift=shift,
            history=history,
            key_start=call.key_start,
            position=call.position,
            backend=self.config.backend,
            **residual,
        )
        if cache is not None:
            cache.keep_shift_rows(index, y, shift)
        return y, shifted

    def _shift_after(
        self,
        history: torch.Tensor,
        function: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        x: torch.Tensor,
        index: int,
        call: Call,
        **residual: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_shift` after rows of an earlier call that get a gradient, which the operation does not give to them."""
        shift, key_start, backend = self.config.shift_tokens, call.key_start, self.config.backend
        y = x  # the operation refuses a call that does nothing
        if function is not token_shift_norm or residual:
            y, _ = function(x, backend=backend, **residual)
        if key_start is not None:
            key_start = torch.cat((key_start[:, :1].expand(-1, shift), key_start), dim=1)
        rows = torch.cat((history, y), dim=1)
        _, shifted = token_shift_norm(
            rows, shift=shift, key_start=key_start, position=call.position - shift, backend=backend
        )
        assert call.cache is not None
        call.cache.keep_shift_rows(index, y, shift)
        return y, shifted[:, shift:]


class Decoder(nn.Module):
    """The stack of sub-layers (docs/model.md#3): from (batch, n, dim) to (batch, n, dim).

    Args:
        dim, depth, **options: see `andromeda.config.DecoderConfig`.
    """

    def __init__(self, dim: int, depth: int, **options: Unpack[DecoderOptions]):
        super().__init__()
        self.config = DecoderConfig(dim=dim, depth=depth, **options)
        self.layers = nn.ModuleList(Sublayer(self.config, index) for index in range(2 * depth))
        self.final_norm = None if self.config.deepnorm else LayerNorm(dim)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether some sub-layer checkpoints its activations; set it for all of them."""
        return any(layer.gradient_checkpointing for layer in self.layers)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        for layer in self.layers:
            setattr(layer, "gradient_checkpointing", value)  # noqa: B010 - mypy does not know the name

    @property
    def checkpoints_now(self) -> bool:
        """Whether a call would checkpoint activations: without gradients there are none."""
        return self.training and torch.is_grad_enabled() and self.gradient_checkpointing

    def forward(
        self,
        x: torch.Tensor,
        *,
        key_start: KeyStart = None,
        cache: generation.Cache | None = None,
        hidden_states: list[torch.Tensor] | None = None,
        attentions: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The stream after the last block.

        Args:
            key_start, cache: see `TransformerWrapper.forward`.
            hidden_states: a list, to which the stream before each block and the result are appended.
            attentions: a list, to which each block appends its weights (batch, num_heads, n, stored + n); attention is
                computed in plain torch then, and holds all of them.
        """
        batch, n, _ = x.shape
        x = x if x.stride(-1) == 1 else x.contiguous()  # a user's embedding may give any strides
        key_start = read_key_start("Decoder", key_start, batch, n, x.device)
        if cache is not None:
            recorded = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
            if recorded and isinstance(cache, generation.FixedCache):
                raise ValueError(
                    "Decoder: cache must grow where gradients are recorded, got a fixed one; call the model under "
                    "torch.no_grad(), or use generation.Cache"
                )
            if self.checkpoints_now:
                raise ValueError(
                    "Decoder: cache must be None with activation checkpointing, which computes each layer twice, got a "
                    "Cache; switch checkpointing off, or pass the whole sequence without a cache"
                )
            if attentions is not None and isinstance(cache, generation.FixedCache):
                raise ValueError(
                    "Decoder: attentions must be None with a cache of fixed size, got a list; use an ordinary cache"
                )
            key_start = cache.begin(batch, n, key_start, recorded)
        call = Call.begin(key_start, cache, attentions)
        blocks = None if cache is None else cache.blocks
        shifted = None
        for index, layer in enumerate(self.layers):
            if blocks is not None and index == 2 * blocks:
                break
            if hidden_states is not None and index % 2 == 0:
                hidden_states.append(x)
            x, shifted = layer(x, shifted, call)
        if cache is not None:
            cache.commit(batch, n, key_start)
        if self.final_norm is not None:
            x, _ = self.final_norm(x, backend=self.config.backend)
        if hidden_states is not None:
            hidden_states.append(x)
        return x


class Backbone:
    """Embedding and decoder, the part of a model below the logits: methods for modules with these children.

    to_logits: only modules with a head have it.
    """

    token_emb: nn.Module
    pos_emb: nn.Embedding | None
    attn_layers: Decoder
    to_logits: nn.Linear
    max_seq_len: int
    register_module: Callable[[str, nn.Module | None], None]  # of nn.Module

    def build(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: Decoder,
        use_abs_pos_emb: bool = False,
        embedding_provider: EmbeddingProvider = AndromedaEmbedding(),  # noqa: B008 - it holds no state
    ) -> None:
        """Make the three children; arguments as for `TransformerWrapper`."""
        if not isinstance(attn_layers, Decoder):
            raise TypeError(f"TransformerWrapper: attn_layers must be a Decoder, got {type(attn_layers).__name__}")
        if not callable(getattr(embedding_provider, "get_embedding", None)):
            raise TypeError(
                "TransformerWrapper: embedding_provider must have a method get_embedding(num_tokens, dim), got "
                f"{embedding_provider!r}"
            )
        dim = ModelConfig(
            num_tokens=num_tokens,
            max_seq_len=max_seq_len,
            use_abs_pos_emb=use_abs_pos_emb,
            **dataclasses.asdict(attn_layers.config),
        ).dim
        self.max_seq_len = max_seq_len
        self.token_emb = embedding_provider.get_embedding(num_tokens, dim)
        if not isinstance(self.token_emb, nn.Module):
            raise TypeError(
                "TransformerWrapper: embedding_provider.get_embedding must return a torch.nn.Module, got "
                f"{type(self.token_emb).__name__}"
            )
        self.register_module("pos_emb", _new_table(max_seq_len, dim, 1.0) if use_abs_pos_emb else None)
        self.attn_layers = attn_layers

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (batch, n) to vectors (batch, n, dim), without their positions."""
        x: torch.Tensor = self.token_emb(tokens)
        expected = (*tokens.shape, self.attn_layers.config.dim)
        if tuple(x.shape) != expected:
            raise ValueError(
                f"Andromeda: the module of embedding_provider must return (batch, n, dim) = {expected}, got "
                f"{tuple(x.shape)}"
            )
        return x

    def decode(
        self,
        x: torch.Tensor,
        *,
        key_start: torch.Tensor | None = None,
        cache: generation.Cache | None = None,
        positions: torch.Tensor | None = None,
        **records: list[torch.Tensor] | None,
    ) -> torch.Tensor:
        """The output of the decoder for the vectors of `embed`.

        Args:
            key_start, cache: see `TransformerWrapper.forward`.
            positions: (batch or 1, n), rows of the absolute position table. Default: tokens since key_start.
            **records: `hidden_states` and `attentions`, see `Decoder.forward`.
        """
        if self.pos_emb is not None:
            if positions is None:
                positions = self._absolute_positions(x, key_start, cache)
            else:
                self._check_positions(positions)
            x = x + self.attn_layers.config.dim**-0.5 * self.pos_emb(positions)
        return self.attn_layers(x, key_start=checked(key_start), cache=cache, **records)

    def loss(
        self,
        features: torch.Tensor,
        targets: torch.Tensor,
        *,
        ignore_index: int = -100,
        count: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The `cross_entropy` of the logits of features (batch, n, dim) with targets (batch, n).

        The logits are held only if `to_logits` does more than its product.
        """
        if not is_plain(self.to_logits) or getattr(self.to_logits, "bias", None) is not None:
            logits = self.to_logits(features).flatten(0, 1)
            return cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, count=count)
        return linear_cross_entropy(
            features,
            self.to_logits.weight,
            targets,
            ignore_index=ignore_index,
            count=_checked_count(targets, self.to_logits.out_features, ignore_index, count),
            backend=self.attn_layers.config.backend,
        )

    def _absolute_positions(
        self, x: torch.Tensor, key_start: torch.Tensor | None, cache: generation.Cache | None
    ) -> torch.Tensor:
        """(n,) or (batch, n): tokens since key_start; padding, which no token sees, takes position 0."""
        first, n = 0 if cache is None else cache.position, x.shape[1]
        if isinstance(cache, generation.FixedCache):  # `generate` has checked where it will end
            positions = cache.positions()
        else:
            positions = torch.arange(first, first + n, device=x.device)
        last = first + n - 1
        if key_start is None and cache is not None and cache.key_start is not None:
            key_start = cache.key_start[:, None]
        if key_start is not None:
            positions = (positions - key_start).clamp_min(0)
            if last >= self.max_seq_len:  # rare; reading a value back stalls a GPU
                last = int(positions.max().item()) if _checks.have_values(positions) else 0
        if last >= self.max_seq_len:
            self._refuse_position(last)
        return positions

    def _check_positions(self, positions: torch.Tensor) -> None:
        if positions.device.type == "cpu" and _checks.have_values(positions):
            low, high = (int(value) for value in torch.aminmax(positions))
            if low < 0 or high >= self.max_seq_len:
                self._refuse_position(low if low < 0 else high)

    def _refuse_position(self, position: int) -> None:
        raise ValueError(
            f"Andromeda: tokens must end before position max_seq_len={self.max_seq_len} of the absolute position "
            f"table, got a token at position {position}"
        )


class TransformerWrapper(nn.Module, Backbone):
    """Embedding, decoder and logits (docs/model.md#2, #8).

    Args:
        num_tokens: size of the vocabulary.
        max_seq_len: window of generation, and number of rows of the absolute position table.
        attn_layers: the `Decoder`.
        use_abs_pos_emb: add a learned vector per position.
        embedding_provider: object whose `get_embedding(num_tokens, dim)` makes the embedding module.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        max_seq_len: int,
        attn_layers: Decoder,
        use_abs_pos_emb: bool = False,
        embedding_provider: EmbeddingProvider = AndromedaEmbedding(),  # noqa: B008 - it holds no state
    ):
        super().__init__()
        self.build(
            num_tokens=num_tokens,
            max_seq_len=max_seq_len,
            attn_layers=attn_layers,
            use_abs_pos_emb=use_abs_pos_emb,
            embedding_provider=embedding_provider,
        )
        self.to_logits = new_linear(attn_layers.config.dim, num_tokens)

    @classmethod
    def of_modules(cls, modules: dict[str, nn.Module | None], max_seq_len: int) -> "TransformerWrapper":
        """A wrapper of the children of another module, `modules`: the dictionary is shared, also when it changes."""
        wrapper = cls.__new__(cls)
        nn.Module.__init__(wrapper)
        wrapper.max_seq_len = max_seq_len
        wrapper.__dict__["_modules"] = modules
        return wrapper

    # The inner modules may be replaced, so the properties read from them.

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return self.to_logits.out_features

    @property
    def use_abs_pos_emb(self) -> bool:
        """Whether a learned vector per position is added."""
        return self.pos_emb is not None

    @property
    def config(self) -> ModelConfig:
        """The arguments of a model that consists of these modules."""
        return ModelConfig(
            num_tokens=self.num_tokens,
            max_seq_len=self.max_seq_len,
            use_abs_pos_emb=self.use_abs_pos_emb,
            **dataclasses.asdict(self.attn_layers.config),
        )

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.parameters()).device

    def forward(
        self,
        tokens: Tokens,
        *,
        key_start: KeyStart = None,
        cache: generation.Cache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        targets: torch.Tensor | None = None,
        ignore_index: int = -100,
    ) -> torch.Tensor:
        """Logits of the next token after each token; with `targets` their mean cross-entropy, without the logits.

        Args:
            tokens: int64 (batch, n) or (n,), list of ints or list of equally long lists.
            key_start: (batch, n) int32 or int64, non-decreasing along a row. Token t sees tokens from key_start[t] on,
                in attention and in the token shift, and its absolute position counts from there: the start of its
                document, or the number of padded tokens on its left. Positions count from the start of the sequence,
                also in later calls with a cache; calls without this argument use the last value of each row.
            cache: `andromeda.generation.Cache` with the earlier tokens; the call appends these tokens to it.
            logits_to_keep: compute logits only for this number of last tokens (0: all), or only for the positions in a
                one-dimensional integer tensor.
            targets: int64 (batch, n), the token after each token, or `ignore_index` where none counts.

        Returns:
            (batch, n or the number of positions kept, num_tokens); with `targets` a scalar, float32 or float64.
        """
        if targets is not None and not keeps_all(logits_to_keep):
            raise ValueError("Andromeda: logits_to_keep must be left out with targets")
        features = self.features(tokens, key_start=key_start, cache=cache)
        if targets is not None:
            return self.loss(features, targets, ignore_index=ignore_index)
        return self.to_logits(kept_positions("Andromeda", features, logits_to_keep))

    def features(
        self, tokens: Tokens, *, key_start: KeyStart = None, cache: generation.Cache | None = None
    ) -> torch.Tensor:
        """The output of the decoder, (batch, n, dim), to which `to_logits` is applied; arguments as for `forward`."""
        tokens = read_tokens("Andromeda", tokens, self.num_tokens, self.device, have_values=_checks.have_values)
        key_start = read_key_start("Andromeda", key_start, tokens.shape[0], tokens.shape[1], self.device)
        return self.decode(self.embed(tokens), key_start=key_start, cache=cache)

    def graph_memory(self, keys: torch.Tensor) -> contextlib.AbstractContextManager[None] | None:
        """For `generate`: a context for the calls with a `FixedCache` that a CUDA graph repeats, or None if the kernels
        that run here would read its numbers on the host.

        The object owns the memory that their launches share, and must live as long as the graph.

        keys: some of the cache.
        """
        config = self.attn_layers.config
        q, k = keys.new_empty(1, 1, config.heads, config.dim_head), keys[:1, :1]
        number = torch.empty(1, dtype=torch.int32, device=keys.device)
        calls: dict[str, Callable[[str], list[str]]] = {
            attention_op.NAME: lambda name: attention_op.unsupported(name, q, k, k, num_keys=number),
            rotary_op.NAME: lambda name: rotary_op.unsupported(name, q, k, step=number),
        }
        backend = _select.backend_argument("generate", config.backend)
        chosen = [_select.choose(op, backend, unsupported, keys.device) for op, unsupported in calls.items()]
        if not {"cuda", "triton"}.issuperset(chosen):
            return None
        return _persistent.OwnSemaphores(keys.device)


def draw(net: Backbone, module: nn.Module) -> bool:
    """Draw the parameters of a module of `net` again, those of its children excepted, as docs/model.md#11 says.

    Returns:
        False, and nothing is drawn, if no part of this model looks like the module.
    """
    own = dict(module.named_parameters(recurse=False))
    with torch.no_grad():
        if isinstance(module, nn.Linear):
            for name in own:
                draw_linear(module, name)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0 if module is net.pos_emb else (2 / module.embedding_dim) ** 0.5)
        elif isinstance(module, LayerNorm | Sublayer | Attention):
            for name, parameter in own.items():
                start = {"gamma": 0.0, "residual_scale": 1.0}.get(name, parameter.shape[-1] ** 0.25)
                nn.init.constant_(parameter, start)  # else a learned scale of queries or keys
        else:
            return not own
    return True


def kept_positions(owner: str, x: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of x (batch, n, dim) whose logits are requested, see `TransformerWrapper.forward`.

    owner: the class that error messages name.
    """
    if isinstance(logits_to_keep, torch.Tensor):
        index, n = logits_to_keep, x.shape[1]
        if index.ndim != 1 or index.dtype not in _INDEX_DTYPES:
            raise TypeError(
                f"{owner}: logits_to_keep must be an int >= 0 or a one-dimensional tensor of integers, got a tensor "
                f"{tuple(index.shape)} of {str(index.dtype).removeprefix('torch.')}"
            )
        index = index.to(torch.int64)  # torch would treat a tensor of bytes as a mask
        if index.device.type == "cpu" and _checks.have_values(index):
            outside = index[(index < -n) | (index >= n)]
            if len(outside):
                raise ValueError(
                    f"{owner}: logits_to_keep must hold positions of the {n} tokens of this call, got "
                    f"{outside[0].item()}"
                )
        return x[:, index.to(x.device)]
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int | torch.SymInt):
        raise TypeError(
            f"{owner}: logits_to_keep must be an int >= 0 or a one-dimensional tensor of integers, got "
            f"{logits_to_keep!r} ({type(logits_to_keep).__name__})"
        )
    if logits_to_keep < 0:
        raise ValueError(f"{owner}: logits_to_keep must be at least 0, which is all, got {logits_to_keep}")
    return x[:, -logits_to_keep:] if logits_to_keep > 0 else x


def keeps_all(logits_to_keep: int | torch.Tensor) -> bool:
    """Whether the argument has its default, which keeps all logits."""
    return not isinstance(logits_to_keep, torch.Tensor) and logits_to_keep == 0 and logits_to_keep is not False


class AutoregressiveWrapper(nn.Module):
    """Loss and generation (docs/model.md#9, #10.3) around a `TransformerWrapper`.

    Args:
        net: the `TransformerWrapper`.
        ignore_index: a label that does not count in the loss.
        pad_value: the token that replaces this label in the input; in `generate` it fills rows that have ended.
    """

    net: TransformerWrapper

    def __init__(self, net: TransformerWrapper, ignore_index: int = -100, pad_value: int = 0):
        super().__init__()
        self.net = net
        self.ignore_index = ignore_index
        self.pad_value = pad_value

    def forward(self, tokens: Tokens, *, key_start: KeyStart = None) -> torch.Tensor:
        """Mean cross-entropy of each token after the first, given those before it; a scalar, float32 or float64.

        tokens: as for `TransformerWrapper.forward`, with `ignore_index` where no token should be predicted.
        key_start: as there. The first token of a packed document is predicted from the document before: ignore it.
        """
        tokens = read_tokens(
            "Andromeda",
            tokens,
            self.net.num_tokens,
            self.net.device,
            ignore_index=self.ignore_index,
            have_values=_checks.have_values,
        )
        if tokens.shape[1] < 2:
            raise ValueError("Andromeda: tokens must hold at least 2 tokens per row for a loss, got 1")
        batch, n = tokens.shape
        key_start = read_key_start("Andromeda", key_start, batch, n, self.net.device)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        inputs = inputs.masked_fill(inputs == self.ignore_index, self.pad_value)
        key_start = None if key_start is None else key_start[:, :-1]
        return self.net(inputs, key_start=checked(key_start), targets=targets, ignore_index=self.ignore_index)

    def generate(
        self,
        prompts: Tokens,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: str | generation.LogitsFilter = "top_k",
        filter_kwargs: Mapping[str, Any] | None = None,
        cache_kv: bool = True,
        restrict_to_max_seq_len: bool = True,
        *,
        prompt_lengths: Sequence[int] | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        on_token: Callable[[torch.Tensor], object] | None = None,
        cuda_graph: bool = True,
    ) -> torch.Tensor:
        """See `andromeda.generation.generate`."""
        return generation.generate(
            self.net,
            prompts,
            seq_len,
            eos_token,
            temperature,
            filter_logits_fn,
            filter_kwargs,
            cache_kv,
            restrict_to_max_seq_len,
            prompt_lengths=prompt_lengths,
            generator=generator,
            on_token=on_token,
            cuda_graph=cuda_graph,
            pad_value=self.pad_value,
        )


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int = -100,
    count: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum of logsumexp(logits) - logits[target] over targets other than `ignore_index`, divided by `count`.

    Args:
        logits: (rows, num_tokens).
        targets: (rows,) int64.
        count: a number or scalar tensor when several calls share one mean, as in gradient accumulation. Default: the
            number of these targets, which gives their mean. Without targets the sum and its gradient are 0 for any
            count.

    Returns:
        Scalar, float32 or float64.

    Raises:
        ValueError: there is no target and no `count`, or a target is outside the vocabulary. This is checked only on
            the CPU, since reading values back would stall a GPU; on a GPU the result without a target is 0.
    """
    counted = targets != ignore_index
    count = _checked_count(targets, logits.shape[1], ignore_index, count)
    losses, _ = _TokenLosses.apply(logits, targets.masked_fill(~counted, 0))
    return losses.masked_fill(~counted, 0).sum() / (count + (count == 0))  # no target at all: 0 / 1


def _checked_count(
    targets: torch.Tensor, num_tokens: int, ignore_index: int, count: int | torch.Tensor | None
) -> int | torch.Tensor:
    """The divisor of the sum of the losses of these targets, whose values are checked, see `cross_entropy`."""
    counted = targets != ignore_index
    if targets.device.type == "cpu" and _checks.have_values(targets):
        _checks.check_targets("Andromeda", "labels", targets, num_tokens, ignore_index)
        if count is None and not bool(counted.any()):
            raise ValueError(
                f"Andromeda: labels must hold a token to predict, got {ignore_index} (ignored) at every position that "
                "has a token before it; leave the batch out, or give the number of targets of the whole step "
                "(num_items_in_batch) where batches share one mean"
            )
    return counted.sum() if count is None else count


class _TokenLosses(torch.autograd.Function):
    """logsumexp(logits) - logits[target] of each row, and the logsumexp: (rows,) each, float32 or better.

    Works on blocks of rows, so that neither pass holds a float32 copy of all half-precision logits, and the backward
    pass holds only the gradient: a vocabulary of 50304 makes the logits the largest tensor of a training step.
    """

    @staticmethod
    def forward(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # (rows, num_tokens), (rows,)
        rows = max(1, _LOSS_BLOCK_LOGITS // logits.shape[1])
        wide = compute_dtype(logits.dtype)
        lse = torch.cat([block.to(wide).logsumexp(-1) for block in logits.split(rows)])
        return lse - logits.gather(1, targets[:, None])[:, 0], lse

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dlosses: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, None]:
        if dlosses is None:
            return None, None
        logits, targets, lse = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # A transform of torch.func is active, or the gradient will be differentiated again.
            probability = logits.to(lse.dtype).softmax(-1)
            hot = probability.scatter_add(1, targets[:, None], -torch.ones_like(probability[:, :1]))
            return (hot * dlosses[:, None]).to(logits.dtype), None
        dlogits = torch.empty_like(logits)
        rows = max(1, _LOSS_BLOCK_LOGITS // logits.shape[1])
        blocks = (tensor.split(rows) for tensor in (dlogits, logits, targets, lse, dlosses))
        for dblock, block, target, block_lse, dloss in zip(*blocks, strict=True):
            probability = dblock if dblock.dtype == block_lse.dtype else block_lse.new_empty(block.shape)
            torch.sub(block, block_lse[:, None], out=probability).exp_()
            probability.scatter_add_(1, target[:, None], probability.new_full((len(target), 1), -1.0))
            probability.mul_(dloss[:, None])
            if probability is not dblock:
                dblock.copy_(probability)
        return dlogits, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: torch.Tensor) -> Any:
        return _vmap_losses(info, in_dims, *args)


_vmap_losses = _transforms.vmap_rule(_TokenLosses.apply, rows=(0, 1))


class _ModelDecoder(AutoregressiveWrapper):
    """`Andromeda.decoder`: its network is the model's `transformer`, looked up at each use.

    modules: the children of the model by name. A reference to the model itself would be a cycle, which delays freeing
        its memory.
    """

    def __init__(self, modules: dict[str, nn.Module | None]):
        self.__dict__["_of_model"] = modules
        super().__init__(self.net)

    @property
    def net(self) -> TransformerWrapper:
        return cast(TransformerWrapper, self.__dict__["_of_model"]["transformer"])  # or a wrapper around one

    @net.setter
    def net(self, value: TransformerWrapper) -> None:
        self.__dict__["_of_model"]["transformer"] = value

    @property
    def _modules(self) -> dict[str, nn.Module | None]:
        return {"net": self.net}

    @_modules.setter
    def _modules(self, modules: dict[str, nn.Module | None]) -> None:
        """torch gives every new module an empty dictionary, which is not needed here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "net":
            object.__setattr__(self, name, value)  # torch's own would not use the property
        else:
            super().__setattr__(name, value)


class Andromeda(nn.Module):
    """Decoder-only language model: multi-query attention with ALiBi, rotary xPos and QK norm, DeepNorm, token shift.

    `model.transformer` is the `TransformerWrapper` with all parameters, `model.decoder` the `AutoregressiveWrapper`
    around it. `model.config` holds the arguments, which `andromeda.config` describes. `model.transformer` and its
    modules may be replaced; `decoder` and `config` then use the new ones.

    Args:
        embedding_provider: object whose `get_embedding(num_tokens, dim)` makes the embedding module (docs/model.md#2).

    Raises:
        TypeError, ValueError: an argument is wrong; names it and its value.
    """

    embedding_provider: EmbeddingProvider

    def __init__(
        self,
        num_tokens: int = 50304,
        max_seq_len: int = 8192,
        dim: int = 2560,
        depth: int = 32,
        dim_head: int = 128,
        heads: int = 24,
        use_abs_pos_emb: bool = False,
        alibi_pos_bias: bool = True,
        alibi_num_heads: int | None = 12,
        rotary_xpos: bool = True,
        attn_flash: bool = True,
        deepnorm: bool = True,
        shift_tokens: int = 1,
        attn_one_kv_head: bool = True,
        qk_norm: bool = True,
        attn_qk_norm: bool = True,
        attn_qk_norm_dim_scale: bool = True,
        embedding_provider: EmbeddingProvider = AndromedaEmbedding(),  # noqa: B008 - it holds no state
    ):
        super().__init__()
        config = ModelConfig(
            num_tokens=num_tokens,
            max_seq_len=max_seq_len,
            dim=dim,
            depth=depth,
            dim_head=dim_head,
            heads=heads,
            use_abs_pos_emb=use_abs_pos_emb,
            alibi_pos_bias=alibi_pos_bias,
            alibi_num_heads=alibi_num_heads,
            rotary_xpos=rotary_xpos,
            attn_flash=attn_flash,
            deepnorm=deepnorm,
            shift_tokens=shift_tokens,
            attn_one_kv_head=attn_one_kv_head,
            qk_norm=qk_norm,
            attn_qk_norm=attn_qk_norm,
            attn_qk_norm_dim_scale=attn_qk_norm_dim_scale,
        )
        self.transformer = TransformerWrapper(
            num_tokens=num_tokens,
            max_seq_len=max_seq_len,
            attn_layers=Decoder(**config.decoder_arguments()),
            use_abs_pos_emb=use_abs_pos_emb,
            embedding_provider=embedding_provider,
        )
        # Not registered as children: a provider may itself be a module, and the wrapper has the same parameters as
        # `transformer`, which must be listed only once.
        self.__dict__["embedding_provider"] = embedding_provider
        self.__dict__["_decoder"] = _ModelDecoder(self._modules)

    @property
    def config(self) -> ModelConfig:
        """The arguments of the constructor."""
        return self.transformer.config

    @property
    def decoder(self) -> AutoregressiveWrapper:
        """Loss and generation around `transformer`."""
        held: AutoregressiveWrapper = self.__dict__["_decoder"]
        if held.__dict__["_of_model"] is not self._modules:  # this is a shallow copy, such as a replica
            held = copy.copy(held)
            held.__dict__["_of_model"] = self._modules
            self.__dict__["_decoder"] = held
        return held

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "decoder":
            raise AttributeError(
                "Andromeda: decoder is made around transformer and follows it; set model.transformer, or attributes of "
                "model.decoder such as pad_value"
            )
        super().__setattr__(name, value)

    def forward(
        self,
        text_tokens: Tokens,
        return_loss: bool = False,
        *,
        key_start: KeyStart = None,
        cache: generation.Cache | None = None,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        """Logits (batch, n, num_tokens), see `TransformerWrapper.forward`; with `return_loss` the scalar of
        `AutoregressiveWrapper.forward`, where -100 marks tokens that should not be predicted."""
        if not return_loss:
            return self.transformer(text_tokens, key_start=key_start, cache=cache, logits_to_keep=logits_to_keep)
        if cache is not None or not keeps_all(logits_to_keep):
            raise ValueError("Andromeda: cache and logits_to_keep must be left out with return_loss=True")
        return self.decoder(text_tokens, key_start=key_start)

    def generate(
        self,
        prompts: Tokens,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_logits_fn: str | generation.LogitsFilter = "top_k",
        filter_kwargs: Mapping[str, Any] | None = None,
        cache_kv: bool = True,
        restrict_to_max_seq_len: bool = True,
        *,
        prompt_lengths: Sequence[int] | torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        on_token: Callable[[torch.Tensor], object] | None = None,
        cuda_graph: bool = True,
    ) -> torch.Tensor:
        """See `andromeda.generation.generate`."""
        return self.decoder.generate(
            prompts,
            seq_len,
            eos_token,
            temperature,
            filter_logits_fn,
            filter_kwargs,
            cache_kv,
            restrict_to_max_seq_len,
            prompt_lengths=prompt_lengths,
            generator=generator,
            on_token=on_token,
            cuda_graph=cuda_graph,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """See `andromeda.checkpoint.save`."""
        checkpoint.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        embedding_provider: EmbeddingProvider | None = None,
    ) -> "Andromeda":
        """See `andromeda.checkpoint.load`."""
        return checkpoint.load(cls, path, device, dtype, embedding_provider)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """See torch. Parts of names that come from torch.compile, DDP, FSDP and other wrappers are removed."""
        return super().load_state_dict(checkpoint.for_model(self, state_dict), strict, assign)

    def load_x_transformers(self, state_dict: Mapping[str, torch.Tensor], version: str = "2.31.10") -> None:
        """See `andromeda.checkpoint.load_x_transformers`."""
        checkpoint.load_x_transformers(self, state_dict, version)
