"""The caches of the transformers interface: `AndromedaCache`, `AndromedaStaticCache`, and what to do with others.

transformers sees a list of layers with keys and values. Here a cache also holds the rows of the token shift, and keys
that are rotated for a segment of positions, so that the whole state is one layer, `AndromedaLayer`. A `DynamicCache` or
`StaticCache` that a caller hands in gets it in place of its own layers, and then works as usual.
"""

from typing import Any, NoReturn

import torch
import transformers
from transformers.cache_utils import CacheLayerMixin, DynamicCache, StaticCache
from transformers.utils.import_utils import is_torchdynamo_exporting

from andromeda.generation import Cache, FixedCache

ROLLBACK = 1024  # tokens that assisted decoding can take back, far more than any draft has


class AndromedaCache(Cache, transformers.Cache):
    """`andromeda.generation.Cache` for transformers.

    Args:
        capacity, rollback: see `andromeda.generation.Cache`.

    Attributes:
        mask_is_read: the attention mask of the first call is known; later tokens are real.
        max_cache_len: number of tokens that it can hold; -1: any.
        is_prefix: it holds nothing but a learned prefix.
        is_closed: its last tokens are padding, which nothing can follow.
    """

    is_compileable = False
    is_prefix = is_closed = _records_past = False
    is_croppable = True
    mask_is_read = False
    max_cache_len = -1

    def __init__(self, capacity: int = 0, rollback: int = 0):
        Cache.__init__(self, capacity, rollback)  # that of transformers wants layers

    @property
    def layers(self) -> list["AndromedaLayer"]:  # type: ignore[override]
        """The whole state as one layer."""
        return [AndromedaLayer(self)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.get_seq_length()} tokens)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens processed."""
        return self.position

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """`max_cache_len`."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys that `query_length` new tokens meet, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def begin(
        self, batch: int, seqlen: int, key_start: torch.Tensor | None, recorded: bool = False
    ) -> torch.Tensor | None:
        if self.is_closed:
            raise ValueError(
                f"{type(self).__name__}: no call may follow one with padding on the right, which its tokens would see; "
                "pad on the left"
            )
        return super().begin(batch, seqlen, key_start, recorded)

    def commit(self, batch: int, seqlen: int, key_start: torch.Tensor | None) -> None:
        super().commit(batch, seqlen, key_start)
        self.is_prefix = False

    def activate_past_recording(self) -> None:
        """Keep what it takes to drop tokens of several calls again, until `crop` is called."""
        self._records_past = True
        self.rollback = max(self.rollback, ROLLBACK)

    def crop(self, length: int) -> None:
        """See `Cache.crop`. While the past is recorded, further calls of it go back about 64 tokens from here."""
        super().crop(length)
        if self._records_past:
            self.forget_history()

    def reset(self) -> None:
        """Forget all tokens."""
        self.clear()

    def clear(self) -> None:
        """Forget all tokens."""
        super().clear()
        self.mask_is_read = self.is_prefix = self.is_closed = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """See `Cache.reorder`."""
        self.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each batch entry `repeats` times, one after the other."""
        if self.batch is not None:
            self.reorder(torch.arange(self.batch, device=self._device()).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these batch entries. indices: integers, or bool (batch,)."""
        if self.batch is not None:
            indices = torch.as_tensor(indices, device=self._device())
            self.reorder(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices.long())

    def _device(self) -> torch.device:
        return next(store.keys.device for store in self._attention.values() if store.keys is not None)

    @property
    def batch_size(self) -> int:
        """Number of batch entries; -1 before the first call."""
        return -1 if self.batch is None else self.batch

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the model writes keys, values and token-shift rows itself."""
        raise NotImplementedError(
            f"{type(self).__name__}: update must not be called, because keys alone are not the state of an Andromeda "
            "model; pass the cache to the model"
        )


class AndromedaStaticCache(AndromedaCache):
    """A cache of fixed memory, for calls on one token each that are one and the same program.

    After the prompt, whatever changes from token to token is a tensor on the device: such a call can be compiled, and
    recorded as a CUDA graph. Calls on several tokens are ordinary ones.

    Args:
        max_cache_len: number of tokens that it can hold.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, max_cache_len: int):
        if isinstance(max_cache_len, bool) or not isinstance(max_cache_len, int) or max_cache_len < 1:
            raise ValueError(f"AndromedaStaticCache: max_cache_len must be an int of at least 1, got {max_cache_len!r}")
        super().__init__(capacity=max_cache_len)
        self.max_cache_len = max_cache_len
        self._fixed: FixedCache | None = None  # for the calls on one token
        self._in_generate = False
        self._next_position = 0  # as `prepare` counts it

    def for_call(self, seqlen: int, new_mask: bool = False) -> Cache:
        """The cache that the model gets for a call on `seqlen` tokens.

        new_mask: the call brings the first mask, as that on the last token of a prompt in parts does.
        """
        if self._fixed is None or seqlen > 1 or new_mask:
            self._settle()
            return self
        if not self._in_generate and self._fixed.end < self.max_cache_len:
            raise ValueError(
                f"AndromedaStaticCache: max_cache_len must be at most {self._fixed.end}, where the xPos segment of the "
                f"prompt ends, got {self.max_cache_len}; generate moves the keys to the next segment by itself"
            )
        number = self._fixed.num_keys  # a GPU is not asked, and `generate` has counted
        if not self._in_generate and number.is_cpu and not torch.compiler.is_compiling():
            self._check_room(int(number) - 1, 1)
        return self._fixed

    def _check_room(self, tokens: int, more: int) -> None:
        if tokens + more > self.max_cache_len:
            raise ValueError(
                f"AndromedaStaticCache: max_cache_len must leave room for all tokens, got {self.max_cache_len} for "
                f"{tokens} tokens and {more} more"
            )

    def prepare(self, seqlen: int, is_first: bool) -> None:
        """Before each call of `generate`, outside of compiled programs: move the keys to the next xPos segment."""
        self._in_generate = True
        if is_first:
            self._next_position = self.get_seq_length()
        if self._fixed is not None and seqlen == 1 and self._next_position == self._fixed.end:
            self._fixed.enter_next_segment()
        self._next_position += seqlen

    def _settle(self) -> None:
        """Count the tokens of calls on one token."""
        if self._fixed is not None:
            position = self.get_seq_length()
            self.length += position - self.position
            self.position, self._fixed = position, None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens processed. After calls on one token it is read from the device."""
        return self.position if self._fixed is None else int(self._fixed.positions().item())

    def begin(
        self, batch: int, seqlen: int, key_start: torch.Tensor | None, recorded: bool = False
    ) -> torch.Tensor | None:
        if recorded:
            raise ValueError(
                "AndromedaStaticCache: gradients must not be recorded, its memory is written in place; call the model "
                "under torch.no_grad(), or use AndromedaCache"
            )
        self._check_room(self.position, seqlen)
        return super().begin(batch, seqlen, key_start)

    def commit(self, batch: int, seqlen: int, key_start: torch.Tensor | None) -> None:
        super().commit(batch, seqlen, key_start)
        with torch.inference_mode(False), torch.no_grad():  # calls outside inference mode may also write to it
            self._fixed = FixedCache(self, self.max_cache_len, self.max_cache_len)
        if not torch.compiler.is_compiling():
            for tensor in self._fixed.tensors():
                torch._dynamo.mark_static_address(tensor)

    def clear(self) -> None:
        """Forget all tokens; the memory stays."""
        self._fixed = None
        super().clear()

    def reorder(self, index: torch.Tensor) -> None:
        """See `Cache.reorder`; in place, so that the number of batch entries must stay."""
        if self.batch is not None and index.shape[0] != self.batch:
            raise ValueError(
                f"AndromedaStaticCache: the number of batch entries must stay {self.batch}, got {index.shape[0]}; use "
                "AndromedaCache"
            )
        if self._fixed is None:
            super().reorder(index)
        else:
            self._fixed.reorder(index)
            self.key_start = self._fixed.key_start

    def crop(self, length: int) -> None:
        """Refused but for 0 and for everything: a fixed memory keeps nothing to go back to."""
        if length != 0 and -length < self.get_seq_length():
            raise ValueError(
                f"AndromedaStaticCache: length must be 0, or minus the number of all tokens, got {length}; use "
                "AndromedaCache, which can go back"
            )
        if length != 0:
            self.clear()


class AndromedaLayer(CacheLayerMixin):
    """The state of all layers of an Andromeda model, as one layer of a cache of transformers.

    Attributes:
        cache: the state.
    """

    supports_early_init = False

    def __init__(self, cache: AndromedaCache):
        super().__init__()
        self.cache = cache

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether calls on one token are one program."""
        return self.cache.is_compileable

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether tokens can be dropped."""
        return self.cache.is_croppable

    @property
    def batch_size(self) -> int:
        """Number of batch entries; -1 before the first call."""
        return self.cache.batch_size

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> NoReturn:
        """Refused, as `update`."""
        self.cache.update()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        """See `AndromedaCache.update`."""
        self.cache.update()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """See `AndromedaCache`."""
        return self.cache.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """See `AndromedaCache`."""
        return self.cache.get_seq_length()

    def get_max_length(self) -> int:
        """See `AndromedaCache`."""
        return self.cache.max_cache_len

    def activate_past_recording(self) -> None:
        """See `AndromedaCache`."""
        self.cache.activate_past_recording()

    def reset(self) -> None:
        """See `AndromedaCache`."""
        self.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """See `AndromedaCache`."""
        self.cache.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """See `AndromedaCache`."""
        self.cache.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See `AndromedaCache`."""
        self.cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """See `AndromedaCache`."""
        self.cache.batch_select_indices(indices)


def state_of(owner: str, past_key_values: object, depth: int, num_kv_heads: int, head_dim: int) -> Cache | None:
    """The cache of this package that an argument `past_key_values` is or holds; None stays None.

    An empty `DynamicCache` or `StaticCache` of transformers is made to hold one. The keys of a filled `DynamicCache`
    become a learned prefix, as in prefix tuning: the tokens see them as they are, with gradients.

    Raises:
        TypeError, ValueError: another kind of cache, or a prefix of other shapes.
    """
    if past_key_values is None or isinstance(past_key_values, Cache):
        return past_key_values
    if not isinstance(past_key_values, transformers.Cache):
        raise TypeError(
            f"{owner}: past_key_values must be a cache that this model returned, an AndromedaCache, or an empty "
            f"DynamicCache, got {type(past_key_values).__name__}"
        )
    layers: list[Any] = getattr(past_key_values, "layers", [])
    if layers and isinstance(layers[0], AndromedaLayer):
        return layers[0].cache
    if is_torchdynamo_exporting():
        raise NotImplementedError(
            f"{owner}: past_key_values must be None in a program for torch.export, got a "
            f"{type(past_key_values).__name__}, which has no room for the rows of the token shift; export an "
            "andromeda.huggingface.ExportableStep, whose buffers are the whole state"
        )
    kind = type(past_key_values)
    offloading = getattr(past_key_values, "offloading", False)
    if kind not in (DynamicCache, StaticCache) or offloading:
        name = f"{kind.__name__} with offloading" if offloading else kind.__name__
        raise TypeError(
            f"{owner}: past_key_values must be an AndromedaCache, or a DynamicCache or StaticCache without offloading, "
            f"got a {name}, which would store the keys in another form"
        )
    cache: AndromedaCache
    filled = any(layer.is_initialized and layer.get_seq_length() > 0 for layer in layers)
    if kind is StaticCache:
        if filled:
            raise ValueError(
                f"{owner}: past_key_values must be empty where it is a StaticCache, got one with keys of another model"
            )
        cache = AndromedaStaticCache(past_key_values.get_max_length())
    elif filled:
        cache = _of_prefix(owner, [(layer.keys, layer.values) for layer in layers], depth, num_kv_heads, head_dim)
    else:
        cache = AndromedaCache()
        if any(getattr(layer, "record_past", False) for layer in layers):
            cache.activate_past_recording()
    past_key_values.layers = [AndromedaLayer(cache)]
    past_key_values.layer_class_to_replicate = None
    return cache


def _of_prefix(
    owner: str, prefix: list[tuple[torch.Tensor, torch.Tensor]], depth: int, num_kv_heads: int, head_dim: int
) -> AndromedaCache:
    """A cache that begins with learned keys and values, (batch, num_kv_heads, seqlen, head_dim) of each block."""
    batch, _, seqlen, _ = prefix[0][0].shape
    wanted = (batch, num_kv_heads, seqlen, head_dim)
    for tensors in prefix:
        for name, tensor in zip(("keys", "values"), tensors, strict=True):
            if tensor is None or tuple(tensor.shape) != wanted or len(prefix) != depth:
                found = "none" if tensor is None else tuple(tensor.shape)
                raise ValueError(
                    f"{owner}: past_key_values must hold {name} (batch, key heads, seqlen, head_dim) = {wanted} for "
                    f"each of {depth} blocks, got {found} in {len(prefix)} blocks"
                )
    cache = AndromedaCache()
    cache.begin_with([(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in prefix])
    cache.is_prefix = True
    return cache


__all__ = ["AndromedaCache", "AndromedaLayer", "AndromedaStaticCache", "state_of"]
