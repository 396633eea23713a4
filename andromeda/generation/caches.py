"""The state of the tokens that a model has processed: `Cache`, and `FixedCache` for steps that are repeated."""

import torch


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
        check_count("Cache: capacity", capacity)
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
        check_count("Cache: count", count)
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


def check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
