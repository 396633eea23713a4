"""Cached calls and sampling (docs/model.md#10): `Cache`, `generate` and the filters `top_k`, `top_p`, `min_p`.

cache = Cache()
with torch.no_grad():
    model(prompt, cache=cache)          # any split of a sequence into calls
    logits = model(token, cache=cache)  # gives the logits of one call on the whole of it
"""

import contextlib
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from andromeda.config import Tokens, read_rows, read_tokens
from andromeda.generation.caches import Cache, FixedCache, KeyValueStore, check_count
from andromeda.generation.steps import Network, Steps, capture_lock

__all__ = ["FILTERS", "Cache", "FixedCache", "KeyValueStore", "LogitsFilter", "generate", "min_p", "top_k", "top_p"]


LogitsFilter: TypeAlias = Callable[..., torch.Tensor]
"""Logits (batch, num_tokens) and keyword arguments -> the same logits, with -inf for the removed ones."""


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
    check_count("generate: seq_len", seq_len)
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
    with _evaluation_mode(net), contextlib.closing(Steps(net, cache, window, cuda_graph)) as steps:
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


def _check_token(name: str, token: int, num_tokens: int) -> None:
    check_count(f"generate: {name}", token)
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
        with contextlib.nullcontext() if probabilities.device.type == "cpu" else capture_lock:
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
