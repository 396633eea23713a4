"""The state of the tokens that a model has processed: `Cache`, and `FixedCache` for steps that are repeated."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

# The tokens of the last call, up to so many, can always be dropped again.
LAST_TOKENS = 64


class _Call(NamedTuple):
    """What a call leaves behind besides keys and values.

    Attributes:
        seqlen: number of its last tokens that are described here.
        shift_rows: sub-layer -> their rows of the shift input, (batch, seqlen, dim).
        key_start: (batch, seqlen) int32, or None when they see everything.
    """

    seqlen: int
    shift_rows: dict[int, torch.Tensor]
    key_start: torch.Tensor | None

    def without(self, count: int) -> "_Call":
        """The same without the last `count` < seqlen tokens."""
        rows = {layer: h[:, :-count] for layer, h in self.shift_rows.items()}
        return _Call(self.seqlen - count, rows, None if self.key_start is None else self.key_start[:, :-count])

    def without_first(self, count: int) -> "_Call":
        """The same without the first `count` < seqlen tokens, in memory of its own."""
        rows = {layer: h[:, count:].clone() for layer, h in self.shift_rows.items()}
        return _Call(self.seqlen - count, rows, None if self.key_start is None else self.key_start[:, count:])

    def select(self, index: torch.Tensor) -> "_Call":
        """The same for the batch entries `index`."""
        rows = {layer: h.index_select(0, index) for layer, h in self.shift_rows.items()}
        return _Call(self.seqlen, rows, None if self.key_start is None else self.key_start.index_select(0, index))


class Cache:
    """A model's state of the tokens that it has processed (docs/model.md#10.1): keys, values and token-shift rows.

    It is made empty, filled by `model(tokens, cache=cache)`, and belongs to one model and one batch. A call that fails
    leaves it as it was. Memory grows by half when it runs out, so a token costs O(1) copies. Where gradients are
    recorded, keys and values are concatenated instead, and gradients flow through earlier calls.

    Args:
        capacity: number of tokens to make room for at once, if it is known.
        rollback: number of last tokens that `crop` can drop, whatever calls they came in. They cost memory for
            2 * depth * dim values each. Those of the last call, up to 64, can be dropped in any case.

    Attributes:
        position: number of tokens processed; the next one sits at this position.
        length: number of tokens whose keys are stored; less than `position` after `keep_last`.
        key_start: (batch,) int32, the first position that further tokens of a row see, from the last call that had
            one; None when they see everything. The caller passes left padding once, with the prompt.
        batch: number of rows; set at the end of the first call.
        shift_tokens: number of tokens that the token shift goes back.
        blocks: number of blocks of the model that run, where a model drafts its own continuation; None is all.
    """

    blocks: int | None = None

    def __init__(self, capacity: int = 0, rollback: int = 0):
        check_count("Cache: capacity", capacity)
        check_count("Cache: rollback", rollback)
        self.capacity, self.rollback = capacity, rollback
        self.position = 0
        self.length = 0
        self.key_start: torch.Tensor | None = None
        self.batch: int | None = None
        self.shift_tokens = 0
        self._attention: dict[int, KeyValueStore] = {}
        self._calls: list[_Call] = []  # the last ones: they end at `position`
        self._next_shift_rows: dict[int, torch.Tensor] = {}  # of the call in progress
        self._recorded = False  # whether the call in progress records gradients

    def keep_last(self, count: int) -> None:
        """Forget the keys and values of all but the last `count` tokens."""
        check_count("Cache: count", count)
        surplus = self.length - count
        if surplus > 0:
            for store in self._attention.values():
                store.start += surplus
            self.length = count

    def crop(self, length: int) -> None:
        """Forget the last tokens, as if they had never been processed.

        length: how many to keep where it is positive, minus the number to drop where it is negative; 0 drops none.

        Raises:
            ValueError: the cache no longer holds what it held before these tokens. Nothing is changed then.
        """
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"Cache: length must be an int, got {length!r} ({type(length).__name__})")
        count = min(-length, self.position) if length <= 0 else max(self.position - length, 0)
        target = self.position - count
        if count == 0:
            return
        if target == 0:
            return self.clear()
        if count > self.length:
            raise ValueError(
                f"Cache: length must leave tokens whose keys are stored, got {length} with {self.length} of "
                f"{self.position} stored; keep_last has made the cache forget the others"
            )
        for store in self._attention.values():
            store.check_return(target)
        first = self.position - sum(call.seqlen for call in self._calls)  # of the tokens that _calls describe
        needs_calls = self.shift_tokens > 0 or self.key_start is not None
        if needs_calls and first > 0 and target - first < max(self.shift_tokens, 1):
            raise ValueError(
                f"Cache: length must drop at most the {max(self.position - first - max(self.shift_tokens, 1), 0)} last "
                f"tokens, got {length} with {self.position} tokens, which drops {count}: the token-shift rows before "
                "them are gone; make the cache with a larger rollback"
            )
        self.position, self.length = target, self.length - count
        while self._calls and count >= self._calls[-1].seqlen:
            count -= self._calls.pop().seqlen
        if self._calls and count > 0:
            self._calls[-1] = self._calls[-1].without(count)
        if needs_calls:
            key_start = self._calls[-1].key_start if self._calls else None
            self.key_start = None if key_start is None else key_start[:, -1]

    def begin_with(self, prefix: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Begin with learned keys and values, which take the first positions.

        They are not normalised or rotated, and get gradients. xPos counts distances from the end of the prefix. The
        first real token has no token before it to shift.

        prefix: of each block, keys and values (batch, seqlen, num_kv_heads, head_dim).
        """
        keys = prefix[0][0]
        for block, pair in enumerate(prefix):
            self.attention(2 * block).begin_with(*pair)
        self.batch, self.position, self.length = keys.shape[0], keys.shape[1], keys.shape[1]

    def forget_history(self) -> None:
        """Free what `crop` needs to drop more than about the last 64 tokens."""
        needed = self.shift_tokens + LAST_TOKENS
        surplus = self._forget_calls(needed) - needed
        if surplus > LAST_TOKENS:  # not for a few tokens after each crop
            self._calls[0] = self._calls[0].without_first(surplus)

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        for store in self._attention.values():
            store.start, store.segment, store.learned = 0, 0, False
        self.position = self.length = 0
        self.key_start = self.batch = None
        self._calls.clear()

    def reorder(self, index: torch.Tensor) -> None:
        """Row b becomes the old row index[b], in every piece of state; for beam search. index: (new_batch,) int64."""
        for store in self._attention.values():
            store.reorder(index, self.length)
        self._calls = [call.select(index) for call in self._calls]
        if self.key_start is not None:
            self.key_start = self.key_start.index_select(0, index)
        if self.batch is not None:
            self.batch = index.shape[0]

    # The model calls the methods below.

    def begin(
        self, batch: int, seqlen: int, key_start: torch.Tensor | None, recorded: bool = False
    ) -> torch.Tensor | None:
        """Start a call on `seqlen` tokens; returns its key_start (batch, seqlen), by default that of earlier calls.

        recorded: autograd records the call.
        """
        if self.batch not in (None, batch):
            raise ValueError(f"Cache: batch must be that of earlier calls, {self.batch}, got {batch}")
        self._next_shift_rows = {}
        self._recorded = recorded or (
            torch.is_grad_enabled()
            and any(store.keys is not None and store.keys.requires_grad for store in self._attention.values())
        )
        if key_start is None and self.key_start is not None:
            key_start = self.key_start[:, None].expand(batch, seqlen)
        return key_start

    def commit(self, batch: int, seqlen: int, key_start: torch.Tensor | None) -> None:
        """End a call: its tokens count as processed now."""
        self.batch = batch
        self.position += seqlen
        self.length += seqlen
        kept = min(seqlen, self._kept_rows(self.shift_tokens))
        if key_start is not None:
            key_start = key_start[:, -kept:].clone()
            self.key_start = key_start[:, -1]
        self._calls.append(_Call(kept, self._next_shift_rows, key_start))
        self._next_shift_rows = {}
        self._forget_calls(self.shift_tokens + max(self.rollback, min(seqlen, LAST_TOKENS)))

    def _forget_calls(self, needed: int) -> int:
        """Forget whole calls before the last `needed` tokens; returns the number of tokens that are left."""
        held = sum(call.seqlen for call in self._calls)
        while self._calls and held - self._calls[0].seqlen >= needed:
            held -= self._calls.pop(0).seqlen
        return held

    def attention(self, layer: int) -> "KeyValueStore":
        """The keys and values of an attention sub-layer."""
        store = self._attention.setdefault(layer, KeyValueStore(self.capacity))
        store.recorded = self._recorded
        return store

    def shift_rows(self, layer: int, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The last rows of a sub-layer's shift input before this call, (batch, count, dim); None stands for zeros."""
        pieces: list[torch.Tensor] = []
        missing = count
        for call in reversed(self._calls):
            if missing <= 0 or layer not in call.shift_rows:
                break
            pieces.append(call.shift_rows[layer])
            missing -= call.seqlen
        if not pieces:
            return None
        if pieces[0].dtype != dtype:
            raise TypeError(f"Cache: the model must have the dtype of earlier calls, {pieces[0].dtype}, got {dtype}")
        if missing > 0:
            pieces.append(pieces[0].new_zeros(pieces[0].shape[0], missing, pieces[0].shape[2]))
        rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces[::-1], dim=1)
        return rows if missing >= 0 else rows[:, -missing:]

    def keep_shift_rows(self, layer: int, h: torch.Tensor, count: int) -> None:
        """Keep the last rows of the shift input `h`, (batch, seqlen, dim); the next call needs `count` of them."""
        self.shift_tokens = count
        most = self._kept_rows(count)
        # A copy of a part, so that the whole of `h` does not stay alive.
        self._next_shift_rows[layer] = h[:, -most:].clone() if h.shape[1] > most else h

    def _kept_rows(self, shift_tokens: int) -> int:
        return shift_tokens + max(self.rollback, LAST_TOKENS)

    def settle(self) -> dict[int, torch.Tensor]:
        """Sub-layer -> its last shift_tokens rows in memory of their own, which a `FixedCache` then writes to.

        What happened before can no longer be undone.
        """
        layers = list(self._calls[-1].shift_rows) if self._calls else []
        key_start = None
        if self.key_start is not None:
            key_start = self.key_start[:, None].expand(-1, max(self.shift_tokens, 1))
        rows = {}
        for layer in layers:
            held = self.shift_rows(layer, self.shift_tokens, self._calls[-1].shift_rows[layer].dtype)
            assert held is not None
            rows[layer] = held.clone()
        self._calls = [_Call(max(self.shift_tokens, 1), rows, key_start)]
        return rows


class KeyValueStore:
    """Keys and values of one attention sub-layer, (batch, capacity, num_kv_heads, head_dim) each.

    The live rows begin at `start`. Forgetting moves `start`; at the end of the memory the live rows are copied into new
    memory. Keys are stored rotated, for the xPos origin of one segment of positions (`enter_segment`).

    Attributes:
        segment, segment_length: number of that segment, and the number of positions of each.
        rotary_dim: number of channels with xPos factors.
        logit_bound: `Attention.logit_bound` of the layer; its parameters do not change during the life of a cache.
        learned: the first keys are learned and not normalised, so that there is no logit_bound.
        recorded: autograd records the call in progress.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.start = 0
        self.segment, self.segment_length = 0, 1
        self.logit_bound: torch.Tensor | None = None
        self.learned = self.recorded = False
        self._learned_origin: int | None = None  # xPos origin of learned keys, until the first call moves it
        self.rotary_dim = 0
        self._in_graph = False  # autograd may hold the memory, which is therefore not written to

    def begin_with(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Hold learned keys and values (batch, seqlen, num_kv_heads, head_dim), which get gradients."""
        self.keys, self.values, self._learned_origin = keys, values, keys.shape[1]
        self.learned = self._in_graph = True

    def enter_segment(self, segment: int, segment_length: int, rotary_dim: int, stored: int) -> int:
        """Make the stored keys comparable with queries whose xPos origin is that of `segment`; returns the segment.

        Moving the origin by L multiplies pair t of a key by zeta_t ** (L / 512) <= 1 (docs/model.md#5.3): far keys
        underflow to zero, as their scores do. A store never goes back: after a call that failed, or tokens that were
        dropped, it stays in the later segment, which works equally well for tokens that are not far before it.
        """
        distance = max(segment - self.segment, 0) * segment_length
        if self._learned_origin is not None:
            distance = segment * segment_length + segment_length // 2 - self._learned_origin
            self._learned_origin = None
        if distance != 0 and rotary_dim > 0 and stored > 0 and self.keys is not None:
            self._move_origin(distance, rotary_dim, stored)
        self.segment, self.segment_length = max(self.segment, segment), segment_length
        self.rotary_dim = rotary_dim
        return self.segment

    def _move_origin(self, distance: int, rotary_dim: int, stored: int) -> None:
        assert self.keys is not None
        twice_t = torch.arange(0, rotary_dim, 2, dtype=torch.float64)
        zeta = (twice_t + 0.4 * rotary_dim) / (1.4 * rotary_dim)
        factor = (zeta ** (distance / 512)).repeat_interleave(2)
        factor = factor.to(self.keys.device, torch.promote_types(self.keys.dtype, torch.float32))
        if self.recorded or self._in_graph:
            rest = self.keys.shape[-1] - rotary_dim
            self.keys = (self.keys * torch.nn.functional.pad(factor, (0, rest), value=1.0)).to(self.keys.dtype)
            self._in_graph = True
        else:
            self.keys[:, self.start : self.start + stored, :, :rotary_dim] *= factor

    def check_return(self, position: int) -> None:
        """ValueError if xPos factors of tokens at `position` leave their range for the origin of the keys."""
        first = self.segment * self.segment_length - self.segment_length // 2
        if self.rotary_dim > 0 and position < first:
            raise ValueError(
                f"Cache: length must keep at least {first} tokens, got {position}: the keys have been moved to the "
                f"xPos segment of positions from {self.segment * self.segment_length} on, from which they cannot be "
                "restored; process the tokens again with a new cache"
            )

    def append(self, k: torch.Tensor, v: torch.Tensor, stored: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write rows after the first `stored` live ones; returns all live keys and values, as views."""
        needed = stored + k.shape[1]
        keys, values = self.keys, self.values
        if stored > 0 and keys is not None and values is not None and k.dtype != keys.dtype:
            if not self.learned:
                raise TypeError(f"Cache: the model must have the dtype of earlier calls, {keys.dtype}, got {k.dtype}")
            keys, values = keys.to(k.dtype), values.to(k.dtype)
        if self.recorded:
            if stored > 0 and keys is not None and values is not None:
                live = slice(self.start, self.start + stored)
                k, v = torch.cat((keys[:, live], k), dim=1), torch.cat((values[:, live], v), dim=1)
            self.keys, self.values, self.start, self._in_graph = k, v, 0, True
            return k, v
        fits = keys is not None and (keys.shape[0], keys.dtype) == (k.shape[0], k.dtype)
        if keys is None or values is None or not fits or self._in_graph or self.start + needed > keys.shape[1]:
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
        self.keys, self.values, self.start, self._in_graph = keys, values, 0, False
        return keys, values

    def reorder(self, index: torch.Tensor, stored: int) -> None:
        """`Cache.reorder` for the first `stored` live rows."""
        if self.keys is None or self.values is None:
            return
        live = slice(self.start, self.start + stored)
        if self._in_graph:
            self.keys, self.values = (old[:, live].index_select(0, index) for old in (self.keys, self.values))
            self.start = 0
            return
        keys, values = (_new_memory(old, index.shape[0], old.shape[1]) for old in (self.keys, self.values))
        keys[:, :stored] = self.keys[:, live].index_select(0, index)
        values[:, :stored] = self.values[:, live].index_select(0, index)
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
        self._shift_rows = cache.settle()
        if cache.key_start is not None:  # no later token is padding: the token shift need not look again
            first = cache.position - cache.shift_tokens
            positions = torch.arange(first, cache.position, device=device)
            hidden = (positions < cache.key_start[:, None])[..., None]
            for rows in self._shift_rows.values():
                rows.masked_fill_(hidden, 0)
        self._window = window if room > window else None
        self._padding: torch.Tensor | None = None  # (batch, 1) int32: the first row that each batch entry sees
        if cache.key_start is not None:
            self._padding = (cache.key_start - (cache.position - cache.length)).clamp_min(0)[:, None]

    def begin(
        self, batch: int, seqlen: int, key_start: torch.Tensor | None, recorded: bool = False
    ) -> torch.Tensor | None:
        assert (batch, seqlen) == (self.batch, 1) and key_start is None and not recorded
        return None

    def commit(self, batch: int, seqlen: int, key_start: torch.Tensor | None) -> None:
        for number in (self.step, self.num_keys, self._row):
            number += 1

    def shift_rows(self, layer: int, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        return self._shift_rows[layer]

    def keep_shift_rows(self, layer: int, h: torch.Tensor, count: int) -> None:
        rows = self._shift_rows[layer]
        rows.copy_(h if count == 1 else torch.cat((rows[:, 1:], h), dim=1))

    @property
    def end(self) -> int:
        """The first position after the xPos segment."""
        return self.position + next(iter(self._attention.values())).segment_length

    def enter_next_segment(self) -> None:
        """Go on behind `end`, which is the position of the next token: move the keys, in place."""
        length = self.end - self.position
        for store in self._attention.values():
            assert isinstance(store, FixedStore)
            store.enter_next_segment()
        self.position += length
        self.step -= length

    def use(self, tensors: Sequence[torch.Tensor]) -> None:
        """Go on in other memory. tensors: in the order of `tensors`."""
        self.step, self.num_keys, self._row, *rest = tensors
        self._shift_rows = dict(zip(self._shift_rows, rest, strict=False))
        rest = rest[len(self._shift_rows) :]
        for store in self._attention.values():
            assert isinstance(store, FixedStore)
            store.memory, store._row, rest = rest[:2], self._row, rest[2:]
        if self._padding is not None:
            (self._padding,) = rest

    def go_to(self, position: torch.Tensor) -> None:
        """The next token sits at `position`, (1,) integers in the first xPos segment; at 0 a new text begins."""
        self.step.copy_(position)
        self.num_keys.copy_(position + 1)
        self._row.copy_(position)
        for rows in self._shift_rows.values():
            rows.masked_fill_(position == 0, 0)

    def reorder(self, index: torch.Tensor) -> None:
        """See `Cache.reorder`; in place, for as many batch entries as before."""
        for tensor in self.tensors():
            if tensor.shape[0] == self.batch and tensor.ndim > 1:
                tensor.copy_(tensor.index_select(0, index))
        if self.key_start is not None:
            self.key_start = self.key_start.index_select(0, index)

    def tensors(self) -> list[torch.Tensor]:
        """Everything that a call reads or writes."""
        found = [self.step, self.num_keys, self._row, *self._shift_rows.values()]
        for store in self._attention.values():
            assert isinstance(store, FixedStore)
            found += store.memory
        return found if self._padding is None else [*found, self._padding]

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
        self.memory = [memory[:, store.start : store.start + room] for memory in (store.keys, store.values)]
        self._store, self._row = store, row
        self.segment, self.segment_length = store.segment, store.segment_length
        self.logit_bound, self.learned = store.logit_bound, store.learned

    def enter_segment(self, segment: int, segment_length: int, rotary_dim: int, stored: int) -> int:
        assert segment == self.segment
        return segment

    def enter_next_segment(self) -> None:
        """Move the keys of the ordinary store, in place; rows that do not exist yet do not matter."""
        store = self._store
        self.segment = store.enter_segment(self.segment + 1, self.segment_length, store.rotary_dim, self.capacity)

    def append(self, k: torch.Tensor, v: torch.Tensor, stored: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next row; returns all rows, those that do not exist yet included."""
        keys, values = self.memory
        keys.index_copy_(1, self._row, k)
        values.index_copy_(1, self._row, v)
        return keys, values


def _new_memory(like: torch.Tensor, batch: int, room: int) -> torch.Tensor:
    with torch.inference_mode(False):  # calls outside inference mode may also write to it
        return torch.empty(batch, room, *like.shape[2:], dtype=like.dtype, device=like.device)


def check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
