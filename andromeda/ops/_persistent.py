"""Memory on a device that outlives calls: tables, semaphores, constants. It is made once, and never freed on a GPU.

torch allocates memory from pools. While a CUDA graph is captured, and also while
`torch.compile(mode="reduce-overhead")` runs a program to warm up, which captures nothing, the allocations of that
thread or stream belong to the graph: it reuses them at every replay, and torch refuses tensors that survive. Memory
that is kept must therefore be made elsewhere:

    thread    its own. The pools of a warm-up belong to the thread that warms up, and so do modes of torch (inference,
              fake tensors, a default device, autocast).
    stream    one that is not being captured. `keep` waits for it, so the memory is complete when it is returned: any
              stream, thread or graph may read it without further synchronisation.
    lifetime  forever: a graph may read it at every replay, and nobody knows when the last graph is gone. There must
              therefore be few keys: windows of positions, streams, captures. Whoever makes many graphs, and knows when
              they are gone, brings `OwnSemaphores`.

A CPU has no pools and no graphs: there, new entries replace the oldest ones.
"""

import collections
import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor

from andromeda.ops import _checks, _select

CPU_ENTRIES = 64  # of each kind
_SLAB = 2**14  # semaphores that are allocated at once: 64 KiB
_SMALLEST = 2**8  # semaphores that one stream gets

# (kind, device) -> key -> tensor
entries: collections.defaultdict[tuple[str, torch.device], dict[Hashable, Tensor]] = collections.defaultdict(dict)
taken_semaphores: dict[tuple[torch.device, int, int], Tensor] = {}  # (device, stream, capture) -> int32 zeros
free_semaphores: dict[torch.device, Tensor] = {}  # device -> the rest of its newest slab
_lock = threading.Lock()
_own = threading.local()  # .semaphores: the `OwnSemaphores` in whose block this thread is


def keep(kind: str, device: torch.device, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """The tensor of this kind and key on a device: `make()`, called at the first request.

    make: returns a tensor on `device`. It must not depend on a mode of the calling thread. It is never called while the
        lock of this module is held; if two threads make the same tensor, the first result is kept.
    """
    of_kind = entries[kind, device]
    tensor = of_kind.get(key)
    if tensor is None:
        tensor = of_kind.setdefault(key, made_apart(device, make))
        while device.type == "cpu" and len(of_kind) > CPU_ENTRIES:
            of_kind.pop(next(iter(of_kind)), None)
    return tensor


def semaphores(device: torch.device, count: int, stream: int) -> Tensor | None:
    """At least `count` counters of a kernel whose last block combines the others' results: int32 zeros; None for 0.

    Every launch leaves them zero. The launches of one stream run one after the other and therefore share them, and no
    launch is needed to clear them. The launches of one stream inside one captured graph also share them. Each capture
    has its own, because its graph may run concurrently with any stream and any other graph.

    stream: the current stream of the device, from `_select.current_stream`.
    """
    if count == 0:
        return None
    own: OwnSemaphores | None = getattr(_own, "semaphores", None)
    if own is not None and own.device == device:
        return own.take(count)
    place = device, stream, _select.capture_id(device)
    found = taken_semaphores.get(place)
    if found is None or found.numel() < count:
        with _lock:
            found = taken_semaphores[place] = _take(device, max(_SMALLEST, 1 << (count - 1).bit_length()))
    return found


class OwnSemaphores:
    """Counters for the launches in its block, made by this thread on the current stream, and free with this object.

    For the calls of one graph, first those that warm up and then those that are captured: it must live as long as the
    graph, which replays on that stream.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._counters: Tensor | None = None
        self._before: list[OwnSemaphores | None] = []

    def take(self, count: int) -> Tensor:
        if self._counters is None or self._counters.numel() < count:
            self._counters = torch.zeros(max(_SMALLEST, count), dtype=torch.int32, device=self.device)
        return self._counters

    def __enter__(self) -> None:
        self._before.append(getattr(_own, "semaphores", None))
        _own.semaphores = self

    def __exit__(self, *_: object) -> None:
        _own.semaphores = self._before.pop()


def _take(device: torch.device, count: int) -> Tensor:
    """`count` zeros that no other key uses: a smaller tensor that this key got earlier may still be in use."""
    if device not in free_semaphores or free_semaphores[device].numel() < count:
        size = max(_SLAB, count)
        free_semaphores[device] = made_apart(device, lambda: torch.zeros(size, dtype=torch.int32, device=device))
    slab = free_semaphores[device]
    taken, free_semaphores[device] = slab[:count], slab[count:]
    return taken


def constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The values in float32. Not a buffer of the model, because `.bfloat16()` would round it with the model."""
    if _checks.is_tracing():
        # The recorded program makes the tensor itself. `torch.tensor` would become a constant on the CPU that every run
        # copies, and torch makes no CUDA graph of a program that uses the CPU. Fake tensors do not mix with real ones.
        return torch.cat([torch.full((1,), value, dtype=torch.float32, device=device) for value in values])
    return keep("constant", device, values, lambda: torch.tensor(values, dtype=torch.float32, device=device))


def made_apart(device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """The complete result of `make()`, called where no memory pool, no capture and no mode of this thread applies."""
    made: list[Tensor] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with _apart(device):
                made.append(make())
        except BaseException as error:
            errors.append(error)

    # Each tensor gets its own thread, since there are few: a thread that waits for work would not survive a fork.
    thread = threading.Thread(target=work, name="andromeda: persistent memory", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return made[0]


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    permit = _select.permit_work_beside_captures
    before = permit(True)
    try:
        with torch.cuda.device(device), torch.cuda.stream(_uncaptured_stream(device)):
            yield
            torch.cuda.current_stream().synchronize()
    finally:
        permit(before)


def _uncaptured_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that is not being captured. torch has few streams and returns them in turn, so another thread may be
    capturing one of them.

    The stream has a high priority, because torch's own graphs do not use such a stream: in some versions the pool of a
    warm-up owns all allocations on its stream, whichever thread makes them.
    """
    for _ in range(64):
        stream = torch.cuda.Stream(device, priority=-1)
        with torch.cuda.stream(stream):
            if not torch.cuda.is_current_stream_capturing():
                return stream
    raise RuntimeError(
        "andromeda: all of torch's streams are being captured into graphs, and tables must be made beside them; call "
        "the model once before the captures"
    )
