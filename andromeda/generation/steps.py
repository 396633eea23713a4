"""The calls of `generate` on one token each after the prompt, and the CUDA graph that repeats them."""

import collections
import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from andromeda.generation.caches import Cache, FixedCache

# A graph costs about as much as three steps, and a repeated step saves between a third of a step and nearly all of it.
LEAST_STEPS = 16  # with one graph
LEAST_ROOM = 256  # rows of the cache for one graph


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
        self, tokens: torch.Tensor, *, key_start: torch.Tensor | None, cache: Cache | None, logits_to_keep: int
    ) -> torch.Tensor: ...


class Steps:
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
        shifts_padding = cache.key_start is not None and self._num_ordinary < cache.shift_tokens - 1
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
        if not self._is_warm:
            self._is_warm = True
            self._may_record &= self._net not in _not_recorded and _can_record(self._net, self._token.device)
            with _HostAccess() if self._may_record else contextlib.nullcontext() as access:
                logits = self._call()
            if access is not None and access.found is not None:
                self._refuse(f"a module of the network uses values on the host ({access.found})")
            return logits
        if not self._may_record:
            return self._call()
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
        warnings.warn(f"generate: runs without a CUDA graph, because a step cannot be recorded: {reason}", stacklevel=6)

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
        with capture_lock, torch.cuda.device(device):
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
        counts = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if self.found is None and (copies or (False in on_host and (counts or name in self._READS))):
            self.found = str(func)
        return func(*args, **kwargs)


capture_lock = threading.Lock()  # also held while random numbers are drawn: torch may refuse them during a capture
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
    return not any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in net.modules()
    )
