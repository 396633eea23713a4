"""`generate` as on a GPU: calls that differ in numbers on the device alone, and the graph that repeats them."""

import contextlib
import math
import threading
import unittest.mock
import warnings
import weakref

import pytest
import torch
from test_generation import FLAGS, SPLIT, V, build, largest
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import andromeda.model
from andromeda.generation import Cache, steps
from andromeda.ops import _checks


class Recording(TorchDispatchMode):
    """A stand-in for a CUDA graph: the operators of a call with their arguments. A replay runs them again.

    As in a graph, an operator gets the numbers and tensors that it got when it was recorded, and its result is written
    to the memory of the first one. A value that is read on the host is an error.
    """

    def __init__(self):
        super().__init__()
        self.steps, self.before = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported: a value is read\nmore about it")
        if func._schema.is_mutable:
            self.before += [(tensor, tensor.clone()) for tensor in tensors_of(args, kwargs)]
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result

    def undo(self):
        """A capture runs nothing: give all memory the content that it had."""
        for tensor, content in reversed(self.before):
            tensor.copy_(content)

    def replay(self):
        for func, args, kwargs, first in self.steps:
            given = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(args, kwargs)}
            for old, new in zip(tensors_of(first), tensors_of(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # else a view, or written in place
                    old.copy_(new)


def tensors_of(*trees):
    return [leaf for leaf in pytree.tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


class RecordedGraph:
    """Takes the place of `steps._Graph`."""

    made, replays, closed = [], 0, 0

    def __init__(self, device, function):
        self.recording = Recording()
        with unittest.mock.patch.object(_checks, "have_values", lambda *tensors: False), self.recording:
            self.result = function()
        self.recording.undo()
        self.result.fill_(math.nan)
        self.made.append(self)

    def replay(self):
        type(self).replays += 1
        self.recording.replay()
        return self.result

    def close(self):
        type(self).closed += 1


@pytest.fixture
def on_gpu(monkeypatch):
    """Steps on the CPU go the way of those on a GPU, and RecordedGraph stands for the graph; runs may be short."""
    made = type("Made", (RecordedGraph,), {"made": [], "replays": 0, "closed": 0})
    monkeypatch.setattr(steps, "_Graph", made)
    monkeypatch.setattr(steps, "_can_record", lambda net, device: True)
    monkeypatch.setattr(steps, "_not_recorded", weakref.WeakSet())
    monkeypatch.setattr(steps, "LEAST_STEPS", 3)
    monkeypatch.setattr(steps, "LEAST_ROOM", 16)
    resources = lambda net, keys: contextlib.nullcontext()  # noqa: E731
    monkeypatch.setattr(andromeda.model.TransformerWrapper, "graph_memory", resources)
    return made


def with_logits(model, *args, **options):
    """New tokens, and the logits of each step: (steps, batch, num_tokens)."""
    logits = []

    def keep(of_step):
        logits.append(of_step.clone())
        return of_step

    generator = torch.Generator().manual_seed(1)
    new = model.generate(*args, filter_logits_fn=keep, generator=generator, **options)
    return new, torch.stack(logits)


FIXED = {
    **FLAGS,
    "grouped": dict(attn_one_kv_head=False, heads=4),
    "deep": dict(depth=3, shift_tokens=2),
}


@pytest.mark.parametrize(("segment", "dtype"), ((16, torch.float32), (8192, torch.float64)), ids=str)
@pytest.mark.parametrize("flags", FIXED.values(), ids=FIXED)
def test_fixed_steps_change_no_bit(flags, segment, dtype, on_gpu, monkeypatch):
    """Left padding, several rows, several xPos segments; with a graph and without."""
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: segment)
    model = build(**flags, max_seq_len=70).to(dtype)
    prompts = [[3], [5, 1, 4, 1, 5, 9, 2], [2, 6, 5]]
    found = [with_logits(model, prompts, 60, cuda_graph=graph) for graph in (True, False)]
    made = len(on_gpu.made)
    assert made > (3 if segment == 16 else 1) and on_gpu.closed == made and on_gpu.replays > 60 - 3 * (made + 1) - 8
    with monkeypatch.context() as patch:
        patch.setattr(andromeda.model.TransformerWrapper, "graph_memory", lambda net, keys: None)
        new, logits = with_logits(model, prompts, 60)
    assert len(on_gpu.made) == made
    for fixed_new, fixed_logits in found:
        assert torch.equal(fixed_new, new) and torch.equal(fixed_logits, logits)


@pytest.mark.parametrize("prompts", ([[1, 2, 3]], [[3], [5, 1, 4, 1, 5, 9, 2]], [[1] * 40, [2] * 31]), ids=len)
@pytest.mark.parametrize("flags", (FLAGS["defaults"], FLAGS["multi_head"], FLAGS["plain"]), ids=str)
def test_fixed_steps_when_the_window_moves(flags, prompts, on_gpu, monkeypatch):
    """Rows before the window are hidden, not removed: the same tokens, and logits up to rounding."""
    model = build(**flags, max_seq_len=20)
    found = [with_logits(model, prompts, 90, cuda_graph=graph) for graph in (True, False)]
    assert torch.equal(found[0][1], found[1][1]) and on_gpu.replays > 45
    monkeypatch.setattr(andromeda.model.TransformerWrapper, "graph_memory", lambda net, keys: None)
    new, logits = with_logits(model, prompts, 90)
    assert torch.equal(found[0][0], new) and largest(found[0][1], logits) <= SPLIT


@pytest.mark.parametrize("temperature", (0, 1.0))
def test_fixed_steps_to_the_end_of_all_rows(temperature, on_gpu):
    model = build(shift_tokens=2)
    prompts = torch.randint(V, (3, 6))
    results = []
    for graph in (True, False):
        streamed = []
        options = {"on_token": streamed.append, "generator": torch.Generator().manual_seed(3), "cuda_graph": graph}
        new = model.generate(prompts, 200, eos_token=4, temperature=temperature, **options)
        assert torch.equal(torch.stack(streamed, dim=1), new)
        results.append(new)
    assert torch.equal(*results) and on_gpu.replays > 0


@pytest.mark.parametrize("mode", (torch.inference_mode, torch.no_grad, torch.enable_grad))
def test_fixed_steps_in_any_mode(mode, on_gpu):
    model = build()
    expected = model.generate([[1, 2, 3], [4]], 30, temperature=0, cuda_graph=False)
    with mode():
        assert torch.equal(model.generate([[1, 2, 3], [4]], 30, temperature=0), expected)
    assert on_gpu.replays > 10


def test_few_tokens_need_no_graph(on_gpu, monkeypatch):
    monkeypatch.setattr(steps, "LEAST_STEPS", 16)
    monkeypatch.setattr(steps, "LEAST_ROOM", 256)
    model = build()
    model.generate([1, 2, 3], 16)
    assert on_gpu.made == []
    model.generate([1, 2, 3], 17)
    assert len(on_gpu.made) == 1 and on_gpu.replays == 15


def test_a_graph_serves_until_the_cache_is_twice_as_large(on_gpu):
    model = build(max_seq_len=200)
    model.generate([1, 2, 3], 100)
    assert len(on_gpu.made) == 4  # up to 16, 32, 64 and 103 rows


class ReadsOnTheHost(torch.nn.Embedding):
    def forward(self, tokens):
        assert tokens.sum().item() >= 0
        return super().forward(tokens)


def test_a_module_that_reads_values_goes_without_a_graph(on_gpu):
    model = build()
    expected = model.generate([1, 2, 3], 30, temperature=0)
    table = model.transformer.token_emb
    model.transformer.token_emb = ReadsOnTheHost.from_pretrained(table.weight.detach())
    made = len(on_gpu.made)
    with pytest.warns(
        UserWarning, match="without a CUDA graph, because .* cudaErrorStreamCaptureUnsupported: a value is read$"
    ):
        new = model.generate([1, 2, 3], 30, temperature=0)
    assert torch.equal(new, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is not tried again
        assert torch.equal(model.generate([1, 2, 3], 30, temperature=0), expected)
    assert len(on_gpu.made) == made


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda x: x.sum().item(), "aten._local_scalar_dense.default"),
        (lambda x: x.nonzero(), "aten.nonzero.default"),
        (lambda x: x.to("cpu"), "aten._to_copy.default"),
        (lambda x: x.copy_(torch.ones(3)), "aten.copy_.default"),
        (lambda x: x[x > 0], "aten.index.Tensor"),
        (lambda x: x[torch.empty(2, dtype=torch.int64, device="meta")], None),
        (lambda x: (x * 2.0 + torch.ones(3, device="meta")).double().clone(), None),
        (lambda x: torch.ones(3).sum().item(), None),
    ],
    ids=str,
)
def test_what_cannot_be_recorded_is_found_before(call, found):
    """The device meta stands for a GPU."""
    with steps._HostAccess() as access, contextlib.suppress(RuntimeError, NotImplementedError):
        call(torch.empty(3, device="meta"))
    assert access.found == found


def test_an_error_in_a_step_is_the_caller_s(on_gpu):
    class Broken(torch.nn.Embedding):
        def forward(self, tokens):
            if tokens.shape[1] == 1:
                raise ValueError("broken")
            return super().forward(tokens)

    model = build()
    model.transformer.token_emb = Broken(V, model.config.dim).double()
    with pytest.raises(ValueError, match="broken"):
        model.generate([1, 2, 3], 30)


@pytest.mark.parametrize("kind", ("hook", "pre-hook", "global hook", "mode"))
def test_what_watches_every_call_goes_without_a_graph(kind):
    """Python beside the launches would not run in a replay."""
    net = build().transformer
    cuda = torch.device("cuda")
    with unittest.mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False):
        assert steps._can_record(net, cuda) and not steps._can_record(net, torch.device("cpu"))
        ignore = lambda *args: None  # noqa: E731
        with contextlib.ExitStack() as stack:
            if kind == "hook":
                stack.callback(net.attn_layers.layers[0].fn.register_forward_hook(ignore).remove)
            elif kind == "pre-hook":
                stack.callback(net.token_emb.register_forward_pre_hook(ignore).remove)
            elif kind == "global hook":
                stack.callback(torch.nn.modules.module.register_module_forward_hook(ignore).remove)
            else:
                stack.enter_context(FlopCounterMode(display=False))
            assert not steps._can_record(net, cuda)
    with unittest.mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
        assert not steps._can_record(net, cuda)


def test_wrapped_and_compiled_networks_take_ordinary_calls(on_gpu):
    model = build()
    net = model.transformer
    assert steps._has_plain_modules(net)
    assert not steps._has_plain_modules(torch.compile(net, backend="eager"))
    layer = net.attn_layers.layers[0]
    layer.compile(backend="eager")
    assert not steps._has_plain_modules(net)
    layer._compiled_call_impl = None
    net.attn_layers = torch.compile(net.attn_layers, backend="eager")
    assert not steps._has_plain_modules(net)


def test_two_threads_generate_in_runs(on_gpu):
    model = build()
    prompts = ([1, 2, 3], [4, 5, 6, 7])
    alone = [model.generate(prompt, 40, temperature=0, cuda_graph=False) for prompt in prompts]
    results = [None, None]

    def work(index):
        results[index] = model.generate(prompts[index], 40, temperature=0, cuda_graph=False)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, results, alone))


def test_the_ordinary_cache_continues_after_a_run(on_gpu):
    """A run leaves the cache as ordinary calls would, so that any call may follow."""
    model = build(shift_tokens=2)
    tokens = torch.randint(V, (2, 30))
    cache = Cache(capacity=24)
    with torch.no_grad():
        model(tokens[:, :9], cache=cache, logits_to_keep=1)
        run = steps.Steps(model.transformer, cache, 100, True)
        logits = [run.next(tokens[:, t : t + 1], 12 - t + 9) for t in range(9, 21)]
        run.close()
        logits += [model(tokens[:, 21:26], cache=cache)[:, -1], model(tokens[:, 26:], cache=cache)[:, -1]]
    assert on_gpu.replays > 5 and (cache.position, cache.length) == (30, 30)
    index = [*range(9, 21), 25, 29]
    assert largest(torch.stack(logits, dim=1), model(tokens)[:, index]) <= SPLIT
