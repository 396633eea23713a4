"""Memory that outlives calls: made outside pools, captures and modes, and kept as long as a graph may read it."""

import contextlib
import functools
import gc
import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from andromeda import attention, qk_norm_rotary
from andromeda.ops import _persistent, _rotary, _select
from andromeda.ops import attention as attention_op
from andromeda.ops import qk_norm_rotary as rotary_op
from andromeda.ops import token_shift_norm as shift_op
from andromeda.ops.token_shift_norm import token_shift_norm

CPU = torch.device("cpu")
WINDOW = _rotary.window  # the fixture `emulated` replaces it


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    for name in ("entries", "taken_semaphores", "free_semaphores"):
        monkeypatch.setattr(_persistent, name, type(getattr(_persistent, name))())
    _persistent.entries.default_factory = dict


def ones(size=3):
    return lambda: torch.ones(size)


# ---- entries --------------------------------------------------------------------------------------------------------


def test_an_entry_is_made_once():
    calls = []

    def make():
        calls.append(threading.get_ident())
        return torch.ones(2)

    first = _persistent.keep("kind", CPU, 1, make)
    assert _persistent.keep("kind", CPU, 1, make) is first
    assert _persistent.keep("kind", CPU, 2, make) is not first
    assert _persistent.keep("other", CPU, 1, make) is not first
    assert len(calls) == 3 and threading.get_ident() not in calls


def test_no_mode_of_the_caller_reaches_it():
    with torch.inference_mode():
        made = _persistent.keep("kind", CPU, "inference", ones())
    assert not made.is_inference()
    with FakeTensorMode():
        made = _persistent.keep("kind", CPU, "fake", ones())
    assert type(made) is torch.Tensor and made.tolist() == [1, 1, 1]
    with torch.device("meta"):
        assert _persistent.keep("kind", CPU, "meta", ones()).device == CPU


def test_an_error_reaches_the_caller_and_nothing_is_kept():
    def fail():
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        _persistent.keep("kind", CPU, 1, fail)
    assert _persistent.keep("kind", CPU, 1, ones()).tolist() == [1, 1, 1]


def test_of_two_threads_the_first_result_is_kept():
    barrier = threading.Barrier(2)
    made = []

    def work():
        def make():
            barrier.wait(timeout=60)
            return torch.ones(1)

        made.append(_persistent.keep("kind", CPU, 1, make))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0] is made[1]


def test_on_the_cpu_the_oldest_make_room():
    kept = [weakref.ref(_persistent.keep("kind", CPU, key, ones())) for key in range(100)]
    assert sum(entry() is not None for entry in kept) == _persistent.CPU_ENTRIES
    assert kept[-1]() is not None


def test_constants_are_shared_and_usable_with_gradients():
    with torch.inference_mode():
        made = _persistent.constant((0.5, 2.0**-0.5), CPU)
    assert _persistent.constant((0.5, 2.0**-0.5), CPU) is made
    assert made.tolist() == [0.5, torch.tensor(2.0**-0.5).item()]
    assert made.dtype == torch.float32 and not made.is_inference()


def test_a_recorded_program_makes_its_own_constants():
    with FakeTensorMode():
        made = _persistent.constant((0.5, 2.0), CPU)
    assert isinstance(made, FakeTensor) and made.dtype == torch.float32 and made.shape == (2,)
    assert not isinstance(_persistent.constant((0.5, 2.0), CPU), FakeTensor)


# ---- semaphores of an owner -----------------------------------------------------------------------------------------


def test_own_semaphores_are_those_of_the_block():
    own, other = _persistent.OwnSemaphores(CPU), _persistent.OwnSemaphores(CPU)
    outside = _persistent.semaphores(CPU, 3, 1)
    with own:
        assert _persistent.semaphores(CPU, 0, 1) is None
        mine = _persistent.semaphores(CPU, 3, 1)
        assert mine.dtype == torch.int32 and mine.numel() >= 3 and not mine.any()
        assert _persistent.semaphores(CPU, 3, 2) is mine  # of every stream: its launches run one after the other
        with other:
            assert _persistent.semaphores(CPU, 3, 1) is not mine
        more = _persistent.semaphores(CPU, 5000, 1)
        assert more.numel() >= 5000 and not more.any()
        assert _persistent.semaphores(torch.device("meta"), 3, 1) is not more
    assert _persistent.semaphores(CPU, 3, 1) is outside
    with own:
        assert _persistent.semaphores(CPU, 3, 1) is more


def test_own_semaphores_are_those_of_the_thread():
    own, found = _persistent.OwnSemaphores(CPU), []
    with own:
        thread = threading.Thread(target=lambda: found.append(_persistent.semaphores(CPU, 3, 1)))
        thread.start()
        thread.join()
        assert found[0] is not _persistent.semaphores(CPU, 3, 1)


def test_own_semaphores_end_with_their_owner():
    own = _persistent.OwnSemaphores(CPU)
    before = dict(_persistent.taken_semaphores)
    with own:
        counters = weakref.ref(_persistent.semaphores(CPU, 3, 1))
    del own
    assert counters() is None and _persistent.taken_semaphores == before


# ---- semaphores -----------------------------------------------------------------------------------------------------


@pytest.fixture
def place(monkeypatch):
    """place(capture=0): sets the capture that calls are part of."""
    state = {"capture": 0}
    monkeypatch.setattr(_select, "capture_id", lambda device: state["capture"])
    return lambda **changes: state.update(changes)


def addresses(semaphores):
    return set(range(semaphores.data_ptr(), semaphores.data_ptr() + 4 * semaphores.numel(), 4))


def test_each_stream_and_each_capture_has_its_own(place):
    assert _persistent.semaphores(CPU, 0, 1) is None
    seen = set()
    for stream, capture in ((1, 0), (2, 0), (1, 5), (2, 5), (1, 6)):
        place(capture=capture)
        semaphores = _persistent.semaphores(CPU, 3, stream)
        assert semaphores.dtype == torch.int32 and semaphores.numel() >= 3 and not semaphores.any()
        assert _persistent.semaphores(CPU, 3, stream) is semaphores
        assert not addresses(semaphores) & seen
        seen |= addresses(semaphores)


def test_a_larger_request_leaves_the_smaller_one_to_who_has_it():
    small = _persistent.semaphores(CPU, 3, 1)
    large = _persistent.semaphores(CPU, 1000, 1)
    assert large.numel() >= 1000 and not addresses(large) & addresses(small)
    assert _persistent.semaphores(CPU, 3, 1) is large
    huge = _persistent.semaphores(CPU, 10**6, 1)
    assert huge.numel() >= 10**6 and not huge.any()
    assert not addresses(_persistent.semaphores(CPU, 3, 2)) & (addresses(small) | addresses(large) | addresses(huge))


def test_many_captures_share_few_allocations(place, monkeypatch):
    made = []
    apart = _persistent.made_apart
    monkeypatch.setattr(_persistent, "made_apart", lambda *arguments: made.append(1) or apart(*arguments))
    for capture in range(60):
        place(capture=capture)
        _persistent.semaphores(CPU, 200, 1)
    assert len(made) == 1


# ---- apart, on a GPU: what is asked of torch ------------------------------------------------------------------------


class Streams:
    """A stand-in for torch.cuda: `capturing` streams come first, and every request is recorded."""

    def __init__(self, capturing):
        self.capturing, self.events, self.current = capturing, [], None

    def Stream(self, device, priority):
        assert priority < 0
        self.capturing -= 1
        return self.capturing >= 0

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def is_current_stream_capturing(self):
        return self.current

    def current_stream(self):
        return self

    def synchronize(self):
        self.events.append("waited")

    @contextlib.contextmanager
    def device(self, device):
        self.events.append(device)
        yield


@pytest.fixture
def streams(monkeypatch):
    def install(capturing):
        fake = Streams(capturing)
        monkeypatch.setattr(torch, "cuda", fake)
        permit = lambda permitted: fake.events.append(permitted) or False  # noqa: E731
        monkeypatch.setattr(_select, "permit_work_beside_captures", permit)
        return fake

    return install


GPU = torch.device("cuda", 1)


def test_on_a_gpu_the_work_is_permitted_and_waited_for(streams):
    fake = streams(capturing=3)
    made = _persistent.keep("kind", GPU, 1, lambda: fake.events.append(fake.current) or torch.ones(1))
    assert made.item() == 1
    assert fake.events == [True, GPU, False, "waited", False]  # the stream is not a capturing one; permission ends


def test_permission_ends_with_an_error(streams):
    fake = streams(capturing=0)
    with pytest.raises(ZeroDivisionError):
        _persistent.keep("kind", GPU, 1, lambda: 1 // 0)
    assert fake.events == [True, GPU, False]


def test_when_every_stream_is_being_captured(streams):
    fake = streams(capturing=10**9)
    with pytest.raises(RuntimeError, match="call the model once before the captures"):
        _persistent.keep("kind", GPU, 1, ones())
    assert fake.events[-1] is False


def test_on_a_gpu_nothing_is_ever_freed(streams):
    streams(capturing=0)
    kept = [weakref.ref(_persistent.keep("kind", GPU, key, ones())) for key in range(100)]
    assert all(entry() is not None for entry in kept)


# ---- the rule of private pools --------------------------------------------------------------------------------------


IMPLEMENTATIONS = {
    operator: (implementation, module.Call)
    for module in (attention_op, rotary_op, shift_op)
    for operator, implementation in ((module.FORWARD, module.forward), (module.BACKWARD, module.backward))
}


class PrivatePool(TorchDispatchMode):
    """A memory pool like torch's for a CUDA graph: it owns all allocations of this thread, also those of operators.

    torch refuses memory that outlives the block, except for the outputs ("not tracked as outputs"); without that check
    it would reuse the memory.
    """

    def __init__(self):
        super().__init__()
        self.storages, self.names = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        if function in IMPLEMENTATIONS:
            implementation, record = IMPLEMENTATIONS[function]
            leading = len(function._schema.arguments) - len(record._fields)
            with self:
                results = implementation(*args[:leading], record(*args[leading:]))
        else:
            results = function(*args, **(kwargs or {}))
        given = {storage_of(tensor).cdata for tensor in tensors_in((args, kwargs))}
        made = map(storage_of, tensors_in(results))
        self.storages += [storage for storage in made if storage.cdata not in given]
        return results

    def survivors(self, outputs):
        gc.collect()
        tracked = {storage_of(tensor).cdata for tensor in outputs}
        return [storage for storage in self.storages if not storage.expired() and storage.cdata not in tracked]


def storage_of(tensor):
    return StorageWeakRef(tensor.untyped_storage())


def tensors_in(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def test_the_pool_sees_what_outlives_it():
    kept = functools.lru_cache(lambda: torch.zeros(5))
    with PrivatePool() as pool:
        out = kept() + torch.ones(5)
    assert len(pool.survivors([out])) == 1
    assert len(pool.survivors([out, kept()])) == 0
    with PrivatePool() as pool:
        made = _persistent.keep("kind", CPU, 1, ones())
        out = made + made
    assert pool.survivors([out]) == []


def rotate(q, k):
    return qk_norm_rotary(q, k, rotary_dim=32, xpos=True, position=100, backend="cuda")


def attend(q, k):
    return (attention(q, k, k, causal=True, backend="cuda"),)


def with_gradients(call, q, k):
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    outs = call(*leaves)
    gradients = torch.autograd.grad([out.sum() for out in outs], leaves, allow_unused=True)
    return [out.detach() for out in outs], [gradient for gradient in gradients if gradient is not None]


def shift(q, k):
    x = q.flatten(2)
    return token_shift_norm(x, residual=x, gamma=torch.ones(x.shape[2]), shift=1, backend="cuda")


CALLS = {
    "token_shift_norm": (5, 9, shift),
    "token_shift_norm, gradients": (40, 9, functools.partial(with_gradients, shift)),
    "qk_norm_rotary": (5, 9, rotate),
    "qk_norm_rotary, gradients": (5, 9, functools.partial(with_gradients, rotate)),
    "attention": (140, 140, attend),
    "attention, gradients": (140, 140, functools.partial(with_gradients, attend)),
    "decode in splits": (1, 1100, attend),
    "decode in splits, gradients": (1, 1100, functools.partial(with_gradients, attend)),
}


def operands(seqlen_q, seqlen_k):
    return torch.randn(1, seqlen_q, 4, 64).bfloat16(), torch.randn(1, seqlen_k, 1, 64).bfloat16()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("capture", [0, 7], ids=["warm-up", "capture"])
def test_operators_leave_nothing_in_a_pool(name, capture, emulated, monkeypatch):
    """Neither while torch.compile warms up a graph, when nothing is being captured, nor during the capture."""
    seqlen_q, seqlen_k, call = CALLS[name]
    q, k = operands(seqlen_q, seqlen_k)
    expected = call(q, k)
    for kept in (_persistent.entries, _persistent.taken_semaphores, _select.plans):
        kept.clear()
    emulated.settings.capture = capture
    monkeypatch.setattr(_select, "capture_id", lambda device: capture)
    with PrivatePool() as pool:
        outs = call(q, k)
    assert pool.storages and pool.survivors(tensors_in(outs)) == []
    for out, other in zip(tensors_in(outs), tensors_in(expected), strict=True):
        assert torch.equal(out, other)
    if "splits" in name:
        assert [place[2] for place in _persistent.taken_semaphores] == [capture]


def test_a_captured_step_holds_kernels_of_this_library_alone(emulated, monkeypatch):
    """No memset for semaphores and no kernels that make tables: only allocations, which are not part of a graph."""
    monkeypatch.setattr(_rotary, "window", WINDOW)
    monkeypatch.setattr(_select, "capture_id", lambda device: 7)
    monkeypatch.setattr(_select, "extension", Unobserved(_select.extension))
    emulated.settings.capture = 7
    for position in (1000, 1001):  # the first one makes the tables, outside the capture
        with torch.inference_mode(), PrivatePool() as pool:
            q, k = operands(1, 1)
            pool.names.clear()
            q, k = qk_norm_rotary(q, k, rotary_dim=32, xpos=True, position=position, origin=1024, backend="cuda")
            attention(q, k.expand(1, 1100, 1, 64), k.expand(1, 1100, 1, 64), causal=True, backend="cuda")
            launching = [name for name in pool.names if name.split("::")[1] not in FREE]
        assert [name for name in launching if not name.startswith("andromeda::")] == []
        assert launching == ["andromeda::qk_norm_rotary_forward", "andromeda::attention_forward"]
    assert emulated.calls == []


class Unobserved:
    """An extension whose calls are hidden from modes: the emulator copies tensors where a GPU would not."""

    def __init__(self, extension):
        self._extension = extension

    def __getattr__(self, name):
        function = getattr(self._extension, name)

        def call(*args, **kwargs):
            with _disable_current_modes():
                return function(*args, **kwargs)

        return call


FREE = (
    "new_empty",
    "empty_like",
    "empty.memory_format",
    "expand",
    "slice.Tensor",
    "detach",
    "alias",
)  # of kernels and copies
