"""Memory on a device that outlives calls: tables, semaphores, constants. Made once, complete, and never freed on a GPU.

Who owns what a call allocates? torch hands out memory by pools. While a CUDA graph is captured, and while
`torch.compile(mode="reduce-overhead")` runs a program to warm up, which captures nothing, the allocations of that
thread or stream belong to the graph: it hands them out again at every replay, and torch refuses tensors that survive.
So what is kept must come from elsewhere:

    thread    one of its own. Pools of a warm-up belong to the thread that warms up; modes of torch (inference, fake
              tensors, a default device, autocast) belong to theirs.
    stream    one that is not being captured. It is waited for, so the memory is complete when it is handed out: any
              stream, thread or graph may read it without further order.
    lifetime  a graph may read it at every replay, and nobody can say when the last graph is gone. It is never freed,
              so its keys must be few: positions by windows, streams, captures.

A CPU has no pools and no graphs: there the oldest entries make room for new ones.
"""

import collections
import contextlib
import threading
from collections.abc import Callable, Hashable

import torch

from andromeda.ops import _select

_CPU_ENTRIES = 64  # of each kind
_SLAB = 2**14  # semaphores that are allocated at once: 64 KiB
_SMALLEST = 2**8  # semaphores that one stream gets

_entries = collections.defaultdict(dict)  # (kind, device) -> key -> tensor
_semaphores = {}  # (device, stream, capture) -> int32 zeros
_free = {}  # device -> what is left of the newest slab
_lock = threading.Lock()


def keep(kind: str, device: torch.device, key: Hashable, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The tensor of this kind and key on a device: `make()`, called at the first request.

    make: returns a tensor on `device`. It must not need a mode of the calling thread. Never called while the lock of
        this module is held; of two threads that make the same tensor, the first one's is kept.
    """
    entries = _entries[kind, device]
    tensor = entries.get(key)
    if tensor is None:
        tensor = entries.setdefault(key, _made_apart(device, make))
        while device.type == "cpu" and len(entries) > _CPU_ENTRIES:
            entries.pop(next(iter(entries)), None)
    return tensor


def semaphores(device: torch.device, count: int, stream: int) -> torch.Tensor | None:
    """At least `count` counters of a kernel whose last block combines the others' results: int32 zeros; None for 0.

    Every launch leaves them zero, so the launches of one stream, which follow each other, share them, and none of them
    needs a launch of its own. The launches of one stream inside one captured graph do so too; each capture has its own,
    because its graph may run beside any stream and any other graph.

    stream: the current one of the device, as `_select.current_stream` gives it.
    """
    if count == 0:
        return None
    place = device, stream, _select.capture_id(device)
    found = _semaphores.get(place)
    if found is None or found.numel() < count:
        with _lock:
            found = _semaphores[place] = _take(device, max(_SMALLEST, 1 << (count - 1).bit_length()))
    return found


def _take(device, count):
    """`count` zeros, which nobody else gets. What a smaller request of the same place got may still be in use."""
    if device not in _free or _free[device].numel() < count:
        size = max(_SLAB, count)
        _free[device] = _made_apart(device, lambda: torch.zeros(size, dtype=torch.int32, device=device))
    taken, _free[device] = _free[device][:count], _free[device][count:]
    return taken


def constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """The values in float32."""
    return keep("constant", device, values, lambda: torch.tensor(values, dtype=torch.float32, device=device))


def _made_apart(device, make):
    """What `make` returns, called where no memory pool, no capture and no mode of this thread applies; complete."""
    result = []

    def work():
        try:
            with _apart(device):
                result.append(make())
        except BaseException as error:
            result.append(error)

    # A thread for each, since there are few: one that waits for work would be gone after a fork.
    thread = threading.Thread(target=work, name="andromeda: persistent memory", daemon=True)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


@contextlib.contextmanager
def _apart(device):
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


def _uncaptured_stream(device):
    """torch has few streams and hands them out in turn: one may be the stream that another thread captures.

    Of those with a high priority, which torch's own graphs do not take: in some versions the pool of a warm-up owns
    what is allocated on its stream, whichever thread asks.
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
