"""Cached calls and sampling (docs/model.md#10): `Cache`, `generate` and the filters `top_k`, `top_p`, `min_p`.

cache = Cache()
with torch.no_grad():
    model(prompt, cache=cache)          # any split of a sequence into calls
    logits = model(token, cache=cache)  # gives the logits of one call on the whole of it
"""

import collections
import contextlib
import math
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from andromeda.config import Tokens, read_rows, read_tokens

# A graph costs about as much as three steps, and a repeated step saves between a third of a step and nearly all of it.
LEAST_STEPS = 16  # with one graph
LEAST_ROOM = 256  # rows of the cache for one graph

LogitsFilter: TypeAlias = Callable[..., torch.Tensor]
"""Logits (batch, num_tokens) and keyword arguments -> the same logits, with -inf for the removed ones."""


class Network(Protocol):
    """The parts of `andromeda.model.TransformerWrapper` that `generate` uses."""

    max_seq_len: int

    @property
    def num_tokens(self) -> int: ...

    @property
    def use_abs_pos_emb(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    def modules(self) -> Iterator[torch.nn.Module]: ...

    def graph_memory(self, keys: torch.Tensor) -> contextlib.AbstractContextManager[None] | None: ...

    def __call__(
        self, tokens: torch.Tensor, *, key_start: torch.Tensor | None, cache: "Cache | None", logits_to_keep: int
    ) -> torch.Tensor: ...


class Cache:
    """A model's state of the tokens that it has processed (docs/model.md#10.1): keys, values and token-shift rows.

    It is made empty, filled by `model(tokens, cache=cache)` under `torch.no_grad()`, and belongs to one model and one
    batch. A call that fails leaves it as it was. Memory grows by half when it runs out, so a token costs O(1) copies.

    Args:
        capacity: number of tokens to make room for at once, if it is known.

    Attributes:
        position: number of tokens processed; the next one sits at this position.
        length: number of tokens whose keys are stored; less than `position` after `keep_last`.
        key_start: (batch,) int32, the first position that further tokens of a row see, from the last call that had
            one; None when they see everything. The caller passes left padding once, with the prompt.
        batch: number of rows; set at the end of the first call.
    """

    def __init__(self, capacity: int = 0):
        _check_count("Cache: capacity", capacity)
        self.capacity = capacity
        self.position = 0
        self.length = 0
        self.key_start: torch.Tensor | None = None
        self.batch: int | None = None
        self._attention: dict[int, KeyValueStore] = {}
        self._shift_rows: dict[int, torch.Tensor] = {}  # (batch, shift_tokens, dim) per sub-layer
        self._next_shift_rows: dict[int, torch.Tensor] = {}  # of the call in progress

    def keep_last(self, count: int) -> None:
        """Forget the keys and values of all but the last `count` tokens."""
        _check_count("Cache: count", count)
        surplus = self.length - count
        if surplus > 0:
            for store in self._attention.values():
                store.start += surplus
            self.length = count

    def reorder(self, index: torch.Tensor) -> None:
        """Row b becomes the old row index[b], in every piece of state; for beam search. index: (new_batch,) int64."""
        for store in self._attention.values():
            store.reorder(index, self.length)
        self._shift_rows = {layer: rows.index_select(0, index) for layer, rows in self._shift_rows.items()}
        if self.key_start is not None:
            self.key_start = self.key_start.index_select(0, index)
        self.batch = index.shape[0]

    # The model calls the methods below.

    def begin(self, batch: int, seqlen: int, key_start: torch.Tensor | None) -> torch.Tensor | None:
        """Start a call on `seqlen` tokens; returns its key_start (batch, seqlen), by default that of earlier calls."""
        if self.batch not in (None, batch):
            raise ValueError(f"Cache: batch must be that of earlier calls, {self.batch}, got {batch}")
        self._next_shift_rows = {}
        if key_start is None and self.key_start is not None:
            key_start = self.key_start[:, None].expand(batch, seqlen)
        return key_start

    def commit(self, batch: int, seqlen: int, key_start: torch.Tensor | None) -> None:
        """End a call: its tokens count as processed now."""
        self.batch = batch
        self.position += seqlen
        self.length += seqlen
        self._shift_rows |= self._next_shift_rows
        self._next_shift_rows = {}
        if key_start is not None:
            self.key_start = key_start[:, -1].clone()

    def attention(self, layer: int) -> "KeyValueStore":
        """The keys and values of an attention sub-layer."""
        return self._attention.setdefault(layer, KeyValueStore(self.capacity))

    def shift_rows(self, layer: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The rows of a sub-layer's shift input before this call, (batch, shift_tokens, dim); None stands for zeros."""
        rows = self._shift_rows.get(layer)
        if rows is not None and rows.dtype != dtype:
            raise TypeError(f"Cache: the model must have the dtype of earlier calls, {rows.dtype}, got {dtype}")
        return rows

    def keep_shift_rows(self, layer: int, h: torch.Tensor, count: int) -> None:
        """Keep the last `count` rows of the shift input `h`, (batch, seqlen, dim), for the next call."""
        surplus = h.shape[1] - count
        if surplus < 0:
            before = self._shift_rows.get(layer)
            before = h.new_zeros(h.shape[0], count, h.shape[2]) if before is None else before
            h = torch.cat((before[:, surplus:], h), dim=1)
        # A copy, so that the whole of `h` does not stay alive.
        self._next_shift_rows[layer] = h[:, surplus:].clone() if surplus > 0 else h


class KeyValueStore:
    """Keys and values of one attention sub-layer, (batch, capacity, num_kv_heads, head_dim) each.

    The live rows begin at `start`. Forgetting moves `start`; at the end of the memory the live rows are copied into new
    memory. Keys are stored rotated, for the xPos origin of one segment of positions (`enter_segment`).

    Attributes:
        segment, segment_length: number of that segment, and the number of positions of each.
        logit_bound: `Attention.logit_bound` of the layer; its parameters do not change during the life of a cache.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.start = 0
        self.segment, self.segment_length = 0, 1
        self.logit_bound: torch.Tensor | None = None

    def enter_segment(self, segment: int, segment_length: int, rotary_dim: int, stored: int) -> int:
        """Make the stored keys comparable with queries whose xPos origin is that of `segment`; returns the segment.

        Moving the origin by L multiplies pair t of a key by zeta_t ** (L / 512) <= 1 (docs/model.md#5.3): far keys
        underflow to zero, as their scores do. A store cannot go back: a call that fails may leave it in the next
        segment, which works equally well.
        """
        steps = segment - self.segment
        if steps > 0 and self.keys is not None and stored > 0:
            twice_t = torch.arange(0, rotary_dim, 2, dtype=torch.float64)
            zeta = (twice_t + 0.4 * rotary_dim) / (1.4 * rotary_dim)
            factor = (zeta ** (steps * segment_length / 512)).repeat_interleave(2)
            factor = factor.to(self.keys.device, torch.promote_types(self.keys.dtype, torch.float32))
            self.keys[:, self.start : self.start + stored, :, :rotary_dim] *= factor
        self.segment, self.segment_length = max(self.segment, segment), segment_length
        return self.segment

    def append(self, k: torch.Tensor, v: torch.Tensor, stored: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows after the first `stored` live ones; returns all live keys and values, as views."""
        if stored > 0 and self.keys is not None and k.dtype != self.keys.dtype:
            raise TypeError(f"Cache: the model must have the dtype of earlier calls, {self.keys.dtype}, got {k.dtype}")
        needed = stored + k.shape[1]
        keys, values = self.keys, self.values
        if keys is None or values is None or keys.shape[0] != k.shape[0] or self.start + needed > keys.shape[1]:
            # Once rows are forgotten, every token moves `start`: without slack every token would copy them all.
            room = self.capacity if self.start == 0 and needed <= self.capacity else needed + needed // 2
            keys, values = self._move(k, v, stored, room)
        begin, end = self.start + stored, self.start + needed
        keys[:, begin:end] = k
        values[:, begin:end] = v
        return keys[:, self.start : end], values[:, self.start : end]

    def _move(self, k: torch.Tensor, v: torch.Tensor, stored: int, room: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Move the first `stored` live rows into new memory for `room` rows like `k` and `v`; returns all of it."""
        keys, values = (_new_memory(like, like.shape[0], room) for like in (k, v))
        if stored > 0 and self.keys is not None and self.values is not None:
            keys[:, :stored] = self.keys[:, self.start : self.start + stored]
            values[:, :stored] = self.values[:, self.start : self.start + stored]
        self.keys, self.values, self.start = keys, values, 0
        return keys, values

    def reorder(self, index: torch.Tensor, stored: int) -> None:
        """`Cache.reorder` for the first `stored` live rows."""
        if self.keys is None or self.values is None:
            return
        keys, values = (_new_memory(old, index.shape[0], old.shape[1]) for old in (self.keys, self.values))
        keys[:, :stored] = self.keys[:, self.start : self.start + stored].index_select(0, index)
        values[:, :stored] = self.values[:, self.start : self.start + stored].index_select(0, index)
        self.keys, self.values, self.start = keys, values, 0


class FixedCache(Cache):
    """A cache for calls on one token each that are one and the same program, which a CUDA graph can repeat.

    Whatever changes from token to token is a tensor on the device, and each call adds one to it. The memory is that of
    an ordinary cache, which may be used again after the last call, when it has counted the tokens. The calls are valid
    for `room` stored rows, to the end of the xPos segment of the first one, and as long as the token shift of a padded
    row does not reach its padding.

    Args:
        cache: the ordinary cache. It has `room` rows of memory, and the xPos segment of its keys is that of its
            position.
        window: a token sees this many tokens, itself included.

    Attributes:
        position: the first position of the xPos segment.
        step: (1,) int32, how far after it the next token sits.
        num_keys: (1,) int32, the number of rows of `room` that exist, that of the next token included.
    """

    def __init__(self, cache: Cache, room: int, window: int):
        super().__init__()
        store = next(iter(cache._attention.values()))
        assert store.keys is not None
        device = store.keys.device

        def number(value: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.full((1,), value, dtype=dtype, device=device)

        self.batch, self.key_start, self.length = cache.batch, cache.key_start, cache.length
        self.position = store.segment * store.segment_length
        self.step = number(cache.position - self.position, torch.int32)
        self.num_keys = number(cache.length + 1, torch.int32)
        self._row = number(cache.length, torch.int64)
        self._attention = {layer: FixedStore(store, room, self._row) for layer, store in cache._attention.items()}
        # Copies, because the ordinary cache may have kept the model's own tensors.
        cache._shift_rows = {layer: rows.clone() for layer, rows in cache._shift_rows.items()}
        self._shift_rows = cache._shift_rows
        self._window = window if room > window else None
        self._padding: torch.Tensor | None = None  # (batch, 1) int32: the first row that each batch entry sees
        if cache.key_start is not None:
            self._padding = (cache.key_start - (cache.position - cache.length)).clamp_min(0)[:, None]

    def begin(self, batch: int, seqlen: int, key_start: torch.Tensor | None) -> torch.Tensor | None:
        assert (batch, seqlen) == (self.batch, 1) and key_start is None
        return None

    def commit(self, batch: int, seqlen: int, key_start: torch.Tensor | None) -> None:
        for number in (self.step, self.num_keys, self._row):
            number += 1

    def keep_shift_rows(self, layer: int, h: torch.Tensor, count: int) -> None:
        rows = self._shift_rows[layer]
        rows.copy_(h if count == 1 else torch.cat((rows[:, 1:], h), dim=1))

    def stored_key_start(self) -> torch.Tensor | None:
        """(batch, 1) int32, the first row of the memory that the next token sees; None when it sees all."""
        if self._window is None:
            return self._padding
        first = (self.num_keys - self._window).clamp_min(0)
        if self._padding is None:
            assert self.batch is not None
            return first.expand(self.batch, 1).contiguous()
        return torch.maximum(first, self._padding)

    def positions(self) -> torch.Tensor:
        """(1,) int64, the position of the next token."""
        return (self.step + self.position).long()


class FixedStore(KeyValueStore):
    """The keys and values of a `FixedCache`: `room` rows of an ordinary store from its first live row on.

    row: (1,) int64, the row of the next token.
    """

    def __init__(self, store: KeyValueStore, room: int, row: torch.Tensor):
        super().__init__(room)
        assert store.keys is not None and store.values is not None
        self._keys, self._values = (
            memory[:, store.start : store.start + room] for memory in (store.keys, store.values)
        )
        self._row = row
        self.segment, self.logit_bound = store.segment, store.logit_bound

    def enter_segment(self, segment: int, segment_length: int, rotary_dim: int, stored: int) -> int:
        assert segment == self.segment
        return segment

    def append(self, k: torch.Tensor, v: torch.Tensor, stored: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next row; returns all rows, those that do not exist yet included."""
        self._keys.index_copy_(1, self._row, k)
        self._values.index_copy_(1, self._row, v)
        return self._keys, self._values


def _new_memory(like: torch.Tensor, batch: int, room: int) -> torch.Tensor:
    with torch.inference_mode(False):  # calls outside inference mode may also write to it
        return torch.empty(batch, room, *like.shape[2:], dtype=like.dtype, device=like.device)


def top_k(logits: torch.Tensor, k: int | None = None, frac_num_tokens: float = 0.1) -> torch.Tensor:
    """Keep the k largest logits of each row, the others become -inf.

    k: default ceil(frac_num_tokens * num_tokens); at most num_tokens. logits: (batch, num_tokens).
    """
    num_tokens = logits.shape[-1]
    if k is None:
        _check_number("top_k: frac_num_tokens", frac_num_tokens)
        if not 0 < frac_num_tokens <= 1:
            raise ValueError(f"top_k: frac_num_tokens must be in (0, 1], got {frac_num_tokens}")
        k = math.ceil(frac_num_tokens * num_tokens)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"top_k: k must be an int of at least 1, got {k!r}")
    values, index = logits.topk(min(k, num_tokens), dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, index, values)


def top_p(logits: torch.Tensor, thres: float = 0.9) -> torch.Tensor:
    """Keep the largest logits of each row until their probability exceeds `thres`, the others become -inf.

    A logit is removed when the larger ones together have a probability above `thres`; the largest stays.
    logits: (batch, num_tokens).
    """
    _check_number("top_p: thres", thres)
    if not 0 <= thres <= 1:
        raise ValueError(f"top_p: thres must be in [0, 1], got {thres}")
    values, index = logits.sort(dim=-1, descending=True)
    removed = values.softmax(dim=-1).cumsum(dim=-1) > thres
    removed = removed.roll(1, dims=-1)
    removed[..., 0] = False
    return torch.empty_like(logits).scatter(-1, index, values.masked_fill(removed, -math.inf))


def min_p(logits: torch.Tensor, min_p: float = 0.1) -> torch.Tensor:
    """Remove logits with a probability below `min_p` times the largest one of the row. logits: (batch, num_tokens)."""
    _check_number("min_p: min_p", min_p)
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p: min_p must be in [0, 1], got {min_p}")
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < min_p * probabilities.amax(dim=-1, keepdim=True), -math.inf)


FILTERS: dict[str, LogitsFilter] = {"top_k": top_k, "top_p": top_p, "min_p": min_p}


@torch.no_grad()
def generate(
    net: Network,
    prompts: Tokens,
    seq_len: int,
    eos_token: int | None = None,
    temperature: float = 1.0,
    filter_logits_fn: str | LogitsFilter = "top_k",
    filter_kwargs: Mapping[str, Any] | None = None,
    cache_kv: bool = True,
    restrict_to_max_seq_len: bool = True,
    *,
    prompt_lengths: Sequence[int] | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
    on_token: Callable[[torch.Tensor], object] | None = None,
    cuda_graph: bool = True,
    pad_value: int = 0,
) -> torch.Tensor:
    """Continue the prompts by sampling (docs/model.md#10.3, #10.4).

    Runs in evaluation mode. Calls may run in several threads: when the last call on a module returns, the module goes
    back to its mode before the first call.

    Args:
        net: the `TransformerWrapper`.
        prompts: list of ints, list of lists of ints of any lengths, or int64 tensor (n,) or (batch, n). Rows of
            different lengths get hidden padding on the left: each row gives the same result as alone.
        seq_len: number of tokens to generate, >= 0.
        eos_token: a row ends with its first generated one, and `pad_value` follows; stops when all rows have ended.
        temperature: 0 takes the largest logit; otherwise samples from softmax(filter(logits) / temperature).
        filter_logits_fn: "top_k", "top_p", "min_p", or a callable that returns logits (batch, num_tokens) with -inf for
            those it removes. It sees the logits before the temperature. Not used at temperature 0.
        filter_kwargs: keyword arguments for the filter.
        cache_kv: keep keys and values of earlier tokens; False computes the whole window for each token.
        restrict_to_max_seq_len: each step sees at most the last max_seq_len tokens.
        prompt_lengths: for a tensor padded on the left, the number of real tokens at the end of each row: ints or an
            integer tensor (batch,).
        generator: `torch.Generator` on the model's device, for repeatable samples.
        on_token: called with the new token of every row, int64 (batch,), as soon as it is drawn: for streaming.
        cuda_graph: on a GPU, with `cache_kv`, record the work of a token as a CUDA graph and repeat it, which saves
            most of the host's time. The tokens are the same. Python code in modules of your own then runs only while it
            is recorded; networks with hooks and compiled ones run without.
        pad_value: fills rows that have ended.

    Returns:
        The new tokens, int64 (batch, <= seq_len), or (<= seq_len,) for a one-dimensional prompt.

    Raises:
        TypeError, ValueError: an argument is wrong, or absolute positions end before the continuation does; or the
            logits are not finite (reported at the end on a GPU).
    """
    tokens, padding, flat = _read_prompts(prompts, prompt_lengths, net)
    sampler = _Sampler(net.device, temperature, filter_logits_fn, filter_kwargs, generator)
    _check_count("generate: seq_len", seq_len)
    if seq_len >= 2**31:
        raise ValueError(f"generate: seq_len must be below 2**31, got {seq_len}")
    if eos_token is not None:
        _check_token("eos_token", eos_token, net.num_tokens)
    _check_token("pad_value", pad_value, net.num_tokens)
    if on_token is not None and not callable(on_token):
        raise TypeError(f"generate: on_token must be callable or None, got {on_token!r}")
    window = net.max_seq_len if restrict_to_max_seq_len else tokens.shape[1] + seq_len
    first = max(0, tokens.shape[1] - window)  # tokens before the window have no influence
    tokens = tokens[:, first:]
    if padding is not None:
        padding = (padding - first).clamp_min(0)
    prompt_length = tokens.shape[1]
    _check_absolute_positions(net, prompt_length, seq_len, cache_kv, restrict_to_max_seq_len)

    batch = tokens.shape[0]
    tokens = torch.cat((tokens, tokens.new_full((batch, seq_len), pad_value)), dim=1)
    ended = torch.zeros(batch, dtype=torch.bool, device=tokens.device)
    cache = Cache(capacity=min(prompt_length + seq_len, window)) if cache_kv else None
    end = prompt_length
    with _evaluation_mode(net), contextlib.closing(_Steps(net, cache, window, cuda_graph)) as steps:
        while end < tokens.shape[1]:
            if cache is None or cache.position == 0:
                start = max(0, end - window)
                key_start = None if padding is None else (padding - start).clamp_min(0)[:, None].expand(-1, end - start)
                logits = net(tokens[:, start:end], key_start=key_start, cache=cache, logits_to_keep=1)[:, -1]
            else:
                logits = steps.next(tokens[:, end - 1 : end], tokens.shape[1] - end)
            new = sampler.sample(logits)
            if eos_token is not None:
                new = new.masked_fill(ended, pad_value)
                ended |= new == eos_token
            tokens[:, end] = new
            end += 1
            if on_token is not None:
                on_token(new)
            if eos_token is not None and ended.all():
                break
    sampler.finish()
    new_tokens = tokens[:, prompt_length:end].clone()
    return new_tokens[0] if flat else new_tokens


def _read_prompts(
    prompts: Tokens, prompt_lengths: Sequence[int] | torch.Tensor | None, net: Network
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """Tokens (batch, n), number of padded tokens per row (batch,) or None, and whether the prompt had one dimension."""
    device = net.device
    padding: list[int] | None = None
    if isinstance(prompts, list | tuple):
        if prompt_lengths is not None:
            raise ValueError("generate: prompt_lengths must be None for lists, which know their lengths")
        rows = read_rows("generate", prompts)
        longest = max(len(row) for row in rows)
        padding = pads = [longest - len(row) for row in rows]
        flat = not isinstance(prompts[0], list | tuple)
        # Padded on the right at first, so that positions in errors match the caller's.
        rectangle = [row + [0] * pad for row, pad in zip(rows, pads, strict=True)]
        tokens = read_tokens("generate", rectangle, net.num_tokens, device)
        tokens = torch.stack([row.roll(pad) for row, pad in zip(tokens, pads, strict=True)])
    else:
        tokens = read_tokens("generate", prompts, net.num_tokens, device)
        flat = isinstance(prompts, torch.Tensor) and prompts.ndim == 1
        if prompt_lengths is not None:
            try:
                lengths = torch.as_tensor(prompt_lengths, device="cpu")
            except (TypeError, ValueError, RuntimeError):
                lengths = torch.empty(0)
            whole = not lengths.is_floating_point() and lengths.dtype != torch.bool
            if not whole or tuple(lengths.shape) != (tokens.shape[0],):
                raise ValueError(
                    f"generate: prompt_lengths must be {tokens.shape[0]} ints, one per row, got {prompt_lengths}"
                )
            if bool(((lengths < 1) | (lengths > tokens.shape[1])).any()):
                raise ValueError(
                    f"generate: prompt_lengths must be between 1 and {tokens.shape[1]}, got {lengths.tolist()}"
                )
            padding = (tokens.shape[1] - lengths).tolist()
    if padding is None or not any(padding):
        return tokens, None, flat
    return tokens, torch.tensor(padding, dtype=torch.int32, device=device), flat


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def _check_token(name: str, token: int, num_tokens: int) -> None:
    _check_count(f"generate: {name}", token)
    if token >= num_tokens:
        raise ValueError(f"generate: {name} must be below the vocabulary size {num_tokens}, got {token}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")


def _check_absolute_positions(net: Network, prompt_length: int, seq_len: int, cache_kv: bool, restrict: bool) -> None:
    """The last token that the model reads sits at prompt_length + seq_len - 2."""
    if not net.use_abs_pos_emb or seq_len == 0 or (restrict and not cache_kv):
        return
    needed = prompt_length + seq_len - 1
    if needed > net.max_seq_len:
        remedy = "pass cache_kv=False, which counts positions from the start of the window"
        if not restrict:
            remedy = "generate fewer tokens, or pass cache_kv=False and restrict_to_max_seq_len=True"
        raise ValueError(
            f"generate: seq_len must leave prompt and continuation within max_seq_len={net.max_seq_len} absolute "
            f"positions, got a prompt of {prompt_length} and seq_len={seq_len}; {remedy}"
        )


class _Sampler:
    """From logits (batch, num_tokens) to tokens (batch,).

    Logits that are not finite are an error. On a GPU `finish` raises it: reading values back at each token would stall
    the GPU.
    """

    def __init__(
        self,
        device: torch.device,
        temperature: float,
        filter_logits_fn: str | LogitsFilter,
        filter_kwargs: Mapping[str, Any] | None,
        generator: torch.Generator | None,
    ):
        _check_number("generate: temperature", temperature)
        if not 0 <= temperature <= sys.float_info.max:
            raise ValueError(f"generate: temperature must be finite and >= 0, got {temperature}")
        if filter_kwargs is not None and not isinstance(filter_kwargs, Mapping):
            raise TypeError(f"generate: filter_kwargs must be a dictionary or None, got {filter_kwargs!r}")
        self.filter_kwargs = dict(filter_kwargs or {})
        if isinstance(filter_logits_fn, str):
            if filter_logits_fn not in FILTERS:
                names = ", ".join(map(repr, FILTERS))
                raise ValueError(f"generate: filter_logits_fn must be {names} or a callable, got {filter_logits_fn!r}")
            filter_logits_fn = FILTERS[filter_logits_fn]
            filter_logits_fn(torch.zeros(1, 2), **self.filter_kwargs)  # raises for wrong keywords before the work
        elif not callable(filter_logits_fn):
            raise TypeError(f"generate: filter_logits_fn must be a name or a callable, got {filter_logits_fn!r}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generate: generator must be a torch.Generator or None, got {generator!r}")
        if generator is not None and generator.device.type != device.type:
            raise ValueError(f"generate: generator must be on the model's device {device}, got {generator.device}")
        self.temperature, self.filter_logits_fn, self.generator = float(temperature), filter_logits_fn, generator
        self.count = 0
        self.not_finite: torch.Tensor | None = None  # on a GPU: (batch,), NaN in rows whose logits were not finite

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        """A token for each row."""
        largest, greedy = logits.max(dim=-1)
        self._check_finite(
            "the model's logits must be finite; look for weights that are not, or for overflow in float16", largest
        )
        self.count += 1
        if self.temperature == 0:
            return greedy
        shape = logits.shape
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = self.filter_logits_fn(logits, **self.filter_kwargs)
        if not isinstance(logits, torch.Tensor) or logits.shape != shape:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else repr(logits)
            raise ValueError(f"generate: filter_logits_fn must return logits {tuple(shape)}, got {found}")
        largest = logits.amax(dim=-1)
        self._check_finite("filter_logits_fn must leave a finite logit in each row and no NaN", largest)
        logits = logits - largest[:, None]  # so that the quotient does not overflow at a small temperature
        probabilities = (logits / self.temperature).softmax(dim=-1)
        if self.not_finite is not None:
            probabilities = probabilities.nan_to_num(1.0)  # CUDA would end the process at a NaN
        with contextlib.nullcontext() if probabilities.device.type == "cpu" else _capture_lock:
            return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]

    def _check_finite(self, requirement: str, largest: torch.Tensor) -> None:
        """Check the largest logit of each row, (batch,): it is NaN or infinite if a logit of the row is NaN or +inf."""
        if largest.device.type != "cpu":
            self.not_finite = (largest - largest) + (0 if self.not_finite is None else self.not_finite)
        elif not math.isfinite(largest.sum().item()) and not bool(largest.isfinite().all()):
            row = (~largest.isfinite()).nonzero()[0, 0]
            raise ValueError(
                f"generate: {requirement}, got {largest[row].item()} in row {row} for new token {self.count}"
            )

    def finish(self) -> None:
        """On a GPU, read the results of the checks and raise their error."""
        if self.not_finite is not None and bool(self.not_finite.isnan().any()):
            row = self.not_finite.isnan().nonzero()[0, 0]
            raise ValueError(
                "generate: the model's logits must be finite, and some must be left by filter_logits_fn; they were not "
                f"in row {row} for one of {self.count} new tokens"
            )


class _Steps:
    """The calls of `generate` on one token each, after the prompt.

    Launching a step takes the host longer than it takes the GPU, unless the model is large. On a GPU most steps are
    therefore calls of a `_Run`, which differ in nothing but numbers on the device, so that a CUDA graph repeats them.
    Ordinary calls between two runs do what is rare: they give the cache more memory, and move the origin of xPos.

    Runs are the same with and without graphs, so that the tokens are, too: ordinary calls may split the keys between
    the blocks of a kernel in another way, and round a logit differently.
    """

    def __init__(self, net: Network, cache: Cache | None, window: int, cuda_graph: bool):
        self._net, self._window = net, window
        self._cache = Cache() if cache is None else cache
        self._may_run, self._may_record = _has_plain_modules(net), cuda_graph
        self._num_ordinary = 0  # calls so far
        self._run: _Run | None = None

    def next(self, token: torch.Tensor, remaining: int) -> torch.Tensor:
        """Logits (batch, num_tokens) after `token`, (batch, 1). remaining: number of calls to come, with this one."""
        cache = self._cache
        if self._run is not None and self._run.end == cache.position:
            self.close()
        if self._run is None and self._may_run:
            self._run = self._begin_run(token, remaining)
        if self._run is None:
            cache.keep_last(self._window - 1)
            self._num_ordinary += 1
            return self._net(token, key_start=None, cache=cache, logits_to_keep=1)[:, -1]
        logits = self._run.next(token)
        cache.position += 1
        cache.length += 1
        return logits

    def _begin_run(self, token: torch.Tensor, remaining: int) -> "_Run | None":
        """The run of the next calls, or None if it would be a short one."""
        cache = self._cache
        stores = list(cache._attention.values())
        memory = [store.keys for store in stores if store.keys is not None]
        if not stores:
            self._may_run = False  # another kind of network
            return None
        segment, length = stores[0].segment, stores[0].segment_length
        room = min(keys.shape[1] - store.start for keys, store in zip(memory, stores, strict=True))
        # The kernels plan for all rows, whether they exist or not: with many more the plan would be a poor one.
        room = min(room, cache.length + remaining, max(2 * cache.length, LEAST_ROOM))
        count = min(room - cache.length, (segment + 1) * length - cache.position)
        reach = max((rows.shape[1] for rows in cache._shift_rows.values()), default=0)
        shifts_padding = cache.key_start is not None and self._num_ordinary < reach - 1
        if count < LEAST_STEPS or shifts_padding:
            return None
        resources = self._net.graph_memory(memory[0])
        if resources is None:
            self._may_run = False
            return None
        fixed = FixedCache(cache, room, self._window)
        return _Run(self._net, fixed, cache.position + count, token, resources, self._may_record)

    def close(self) -> None:
        """Free the graph."""
        if self._run is not None:
            self._run.close()
        self._run = None


class _Run:
    """Consecutive calls of a network with a `FixedCache`. The first is an ordinary one, which warms up; at the second
    they are recorded as a CUDA graph, which then repeats them.

    Attributes:
        end: the position after the last call.
    """

    def __init__(
        self,
        net: Network,
        cache: FixedCache,
        end: int,
        token: torch.Tensor,
        resources: contextlib.AbstractContextManager[None],
        may_record: bool,
    ):
        self.end = end
        self._net, self._cache, self._resources, self._may_record = net, cache, resources, may_record
        self._token = torch.empty_like(token, memory_format=torch.contiguous_format)
        self._is_warm = False
        self._graph: _Graph | None = None

    def next(self, token: torch.Tensor) -> torch.Tensor:
        """Logits (batch, num_tokens) after `token`, (batch, 1)."""
        self._token.copy_(token)
        if self._graph is not None:
            return self._graph.replay().clone()  # the next replay writes to the same memory
        if not self._may_record or self._net in _not_recorded or not _can_record(self._net, self._token.device):
            return self._call()
        if not self._is_warm:
            self._is_warm = True
            with _HostAccess() as access:
                logits = self._call()
            if access.found is not None:
                self._refuse(f"a module of the network uses values on the host ({access.found})")
            return logits
        try:
            self._graph = _Graph(self._token.device, self._call)
        except RuntimeError as error:
            self._refuse(str(error).strip().partition("\n")[0], lasting=not isinstance(error, torch.OutOfMemoryError))
            return self._call()
        return self._graph.replay().clone()

    def _call(self) -> torch.Tensor:
        with self._resources:
            return self._net(self._token, key_start=None, cache=self._cache, logits_to_keep=1)[:, -1]

    def _refuse(self, reason: str, lasting: bool = True) -> None:
        """Go on without a graph. lasting: later calls of `generate` do not try again."""
        self._may_record = False
        if lasting:
            _not_recorded.add(self._net)
        warnings.warn(f"generate: runs without a CUDA graph, because a step cannot be recorded: {reason}", stacklevel=5)

    def close(self) -> None:
        """Free the graph."""
        if self._graph is not None:
            self._graph.close()
        self._graph = None


class _Graph:
    """The launches of a function as a CUDA graph, and the tensor that it returned, which every replay fills again.

    Other threads go on working meanwhile. There is one capture at a time, and one stream per device for all of them,
    because the workspaces of cuBLAS belong to a stream. A graph takes over the memory of a closed one: torch would not
    use it for anything else.
    """

    def __init__(self, device: torch.device, function: Callable[[], torch.Tensor]):
        self._device, self._graph = device, torch.cuda.CUDAGraph()
        with _capture_lock, torch.cuda.device(device):
            if device not in _capture_streams:
                _capture_streams[device] = torch.cuda.Stream(device, priority=-1)
            pool = torch.cuda.graph_pool_handle()
            if _closed_graphs[device]:
                closed, last_replay = _closed_graphs[device].pop()
                pool = closed.pool()
                last_replay.wait()
            with torch.cuda.stream(_capture_streams[device]):
                # `torch.cuda.graph` would also wait for the GPU, and return all unused memory to it.
                self._graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    self._result = function()
                except BaseException:
                    _abandon(self._graph, device, pool)
                    raise
                self._graph.capture_end()

    def replay(self) -> torch.Tensor:
        self._graph.replay()
        return self._result

    def close(self) -> None:
        """It replays no more, and the next graph may have its memory."""
        del self._result
        last_replay = torch.cuda.Event()
        last_replay.record(torch.cuda.current_stream(self._device))
        _closed_graphs[self._device].append((self._graph, last_replay))


def _abandon(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """End a capture that failed. If the end fails as well, torch leaves two states as they are in a capture: that of
    its memory, and before version 2.10 that of random numbers. A capture that succeeds resets the latter."""
    try:
        graph.capture_end()
    except RuntimeError:
        for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"):  # since 2.8; before
            if hasattr(torch._C, name):
                with contextlib.suppress(RuntimeError):
                    getattr(torch._C, name)(device.index, pool)
                break
        other = torch.cuda.CUDAGraph()
        with contextlib.suppress(RuntimeError):
            other.capture_begin(capture_error_mode="thread_local")
            torch.empty(1, device=device).zero_()
            other.capture_end()


class _HostAccess(TorchDispatchMode):
    """Finds out whether calls in its block can be recorded: a CUDA graph cannot wait for a value, nor copy from or to
    the memory of the host. A capture that fails leaves parts of torch in a bad state, so that it is not just tried.

    Attributes:
        found: the first operator that cannot, or None.
    """

    _READS = frozenset(("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"))

    def __init__(self) -> None:
        super().__init__()
        self.found: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        devices = [argument.device for argument in args if isinstance(argument, torch.Tensor)]
        if name == "_to_copy" and kwargs.get("device") is not None:
            devices.append(torch.device(kwargs["device"]))
        on_host = {device.type == "cpu" for device in devices}
        copies = name in ("_to_copy", "copy_") and len(on_host) == 2
        if self.found is None and (copies or (name in self._READS and False in on_host)):
            self.found = str(func)
        return func(*args, **kwargs)


_capture_lock = threading.Lock()  # also held while random numbers are drawn: torch may refuse them during a capture
_capture_streams: dict[torch.device, torch.cuda.Stream] = {}
# Each with the end of its last replay.
_closed_graphs: collections.defaultdict[torch.device, list[tuple[torch.cuda.CUDAGraph, torch.cuda.Event]]]
_closed_graphs = collections.defaultdict(list)
_not_recorded: weakref.WeakSet[Any] = weakref.WeakSet()  # networks of which a step could not be recorded


def _has_plain_modules(net: Network) -> bool:
    """Whether the network is no wrapper around one, is on one device, and none of its modules is compiled."""
    if not hasattr(type(net), "graph_memory"):
        return False
    modules = list(net.modules())
    devices = {weight.device for module in modules for weight in module._parameters.values() if weight is not None}
    compiled = any("_orig_mod" in module._modules or module._compiled_call_impl for module in modules)
    return len(devices) == 1 and not compiled


def _can_record(net: Network, device: torch.device) -> bool:
    """Whether a graph does all that a call does: it repeats the launches, but not what Python does beside them."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing() or torch._C._len_torch_dispatch_stack() > 0:
        return False
    of_all = torch.nn.modules.module
    if of_all._global_forward_hooks or of_all._global_forward_pre_hooks:
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


class _Evaluating:
    """The running calls of `generate` on a module, and the module's mode before them."""

    def __init__(self, mode: bool):
        self.calls, self.mode = 0, mode


_evaluating: weakref.WeakKeyDictionary[torch.nn.Module, _Evaluating] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def _renew_lock() -> None:
    """After a fork, nobody in the child would release a lock that another thread held."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


@contextlib.contextmanager
def _evaluation_mode(net: Network) -> Iterator[None]:
    """Evaluation mode in the block; when the last call on a module ends, the mode before the first call is restored."""
    modules = list(net.modules())
    with _lock:
        for module in modules:
            _evaluating.setdefault(module, _Evaluating(module.training)).calls += 1
            module.training = False
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                entry = _evaluating[module]
                entry.calls -= 1
                if entry.calls == 0:
                    module.training = entry.mode
                    del _evaluating[module]
