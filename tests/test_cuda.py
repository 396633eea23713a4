"""Tests that need a GPU: streams, graphs, memory, tensors of more than 2^31 elements. Need `--device cuda`.

The results of the kernels are tested on any device by test_attention.py, test_qk_norm_rotary.py and
test_token_shift_norm.py, and without a GPU by tests/emulator. tests/gpu.sh runs all of them, and `test_small_calls`
once more under each tool of compute-sanitizer.
"""

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numerics
import pytest
import test_attention as attention_test
import torch

import andromeda.model
from andromeda import Andromeda
from andromeda.generation import steps
from andromeda.ops import _persistent, _select
from andromeda.ops import attention as op
from andromeda.ops.attention import attention
from andromeda.ops.qk_norm_rotary import qk_norm_rotary
from andromeda.ops.token_shift_norm import token_shift_norm
from andromeda.reference import qk_norm_rotary as rotary_reference
from andromeda.reference import token_shift_norm as shift_reference

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32
GIB = 2**30


@pytest.fixture(autouse=True)
def gpu(device):
    """`device`, made the current one; skips if the kernels cannot run."""
    if device.type != "cuda":
        pytest.skip("laws of a GPU: python -m pytest --device cuda")
    if reasons := _select.cuda_unavailable(device):
        pytest.skip(f"cuda: {'; '.join(reasons)}")
    with torch.cuda.device(device):
        yield


# ---- subjects -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Subject:
    """A call that launches kernels, as a function of tensors only, so that it can be captured and repeated."""

    name: str
    draw: Callable  # (device, seed) -> tensors
    call: Callable  # (*tensors) -> tensors

    def __str__(self):
        return self.name


def draw_attention(seqlen_q, seqlen_k, device, seed):
    """q, k, v, dout, slopes, bound: logits up to 4, and that bound for half of the heads."""
    generator = torch.Generator().manual_seed(seed)
    q, dout = torch.randn(2, 2, seqlen_q, 4, 64, generator=generator)
    k, v = torch.randn(2, 2, seqlen_k, 2, 64, generator=generator)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    slopes, bound = torch.tensor([[0.5, 0.0, 0.03, 0.0], [4.1, 4.1, torch.inf, torch.inf]])
    halves = (x.to(device, BFLOAT16) for x in (32 * q, k, v, dout))  # softmax_scale is 1/8
    return (*halves, slopes.to(device), bound.to(device))


def attend(q, k, v, dout, slopes, bound):
    return attention(q, k, v, causal=True, alibi_slopes=slopes, logit_bound=bound, return_lse=True, backend="cuda")


def attend_and_return(q, k, v, dout, slopes, bound):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, softmax_lse = attend(*leaves, dout, slopes, bound)
    return (out.detach(), softmax_lse, *torch.autograd.grad(out, leaves, dout))


def draw_rotary(device, seed):
    """q, k, their scales, and gradients of both results."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    halves = (x.to(device, BFLOAT16) for x in (draw(2, 150, 4, 64), draw(2, 150, 1, 64)))
    douts = (x.to(device, BFLOAT16) for x in (draw(2, 150, 4, 64), draw(2, 150, 1, 64)))
    return (*halves, draw(4, 64).to(device), draw(1, 64).to(device), *douts)


def rotate(q, k, q_scale, k_scale, *douts):
    return qk_norm_rotary(q, k, q_scale=q_scale, k_scale=k_scale, rotary_dim=32, xpos=True, backend="cuda")


def rotate_and_return(q, k, q_scale, k_scale, *douts):
    leaves = [x.detach().requires_grad_() for x in (q, k, q_scale, k_scale)]
    outs = rotate(*leaves)
    return (*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, douts))


def draw_shift(device, seed):
    """x, residual, history, residual_scale, gamma, and gradients of both results."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x, residual, dy, dshifted = (draw(2, 150, 640).to(device, BFLOAT16) for _ in range(4))
    history = draw(2, 2, 640).to(device, BFLOAT16)
    return x, residual, history, draw(640).to(device), draw(640).to(device), dy, dshifted


def shift(x, residual, history, residual_scale, gamma, *douts):
    return token_shift_norm(
        x, residual=residual, residual_scale=residual_scale, gamma=gamma, alpha=1.5, shift=2, history=history,
        backend="cuda",
    )  # fmt: skip


def shift_and_return(x, residual, history, residual_scale, gamma, *douts):
    leaves = x, residual, residual_scale, gamma = [
        tensor.detach().requires_grad_() for tensor in (x, residual, residual_scale, gamma)
    ]
    outs = shift(x, residual, history, residual_scale, gamma)
    return (*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, douts))


SUBJECTS = [
    Subject("attention forward", functools.partial(draw_attention, 300, 300), attend),
    Subject("attention backward", functools.partial(draw_attention, 300, 300), attend_and_return),
    Subject("attention decode", functools.partial(draw_attention, 1, 5000), attend),
    Subject("attention continuation", functools.partial(draw_attention, 7, 5000), attend_and_return),
    Subject("qk_norm_rotary forward", draw_rotary, rotate),
    Subject("qk_norm_rotary backward", draw_rotary, rotate_and_return),
    Subject("token_shift_norm forward", draw_shift, shift),
    Subject("token_shift_norm backward", draw_shift, shift_and_return),
]
every_subject = pytest.mark.parametrize("subject", SUBJECTS, ids=str)


def assert_same(results, expected, what):
    """Equal bit for bit."""
    for index, (result, other) in enumerate(zip(results, expected, strict=True)):
        if not torch.equal(result, other):
            difference = (result.double() - other.double()).abs()
            raise AssertionError(f"{what}: result {index} differs, by {difference.max().item():.3g} at most")


def wait_long():
    """Keep the current stream busy for about a quarter of a second."""
    torch.cuda._sleep(500_000_000)


# ---- streams --------------------------------------------------------------------------------------------------------


@every_subject
def test_launches_on_the_current_stream(subject, device):
    """The inputs are written late, on a separate stream. A kernel on any other stream would read NaN."""
    fresh = subject.draw(device, 1)
    expected = subject.call(*fresh)
    late = tuple(torch.full_like(x, torch.nan) for x in fresh)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        subject.call(*fresh)  # the first call on a stream prepares memory, here before the wait
        wait_long()
        for tensor, value in zip(late, fresh, strict=True):
            tensor.copy_(value)
        results = subject.call(*late)
        assert not stream.query(), "the call waited for the GPU"
    stream.synchronize()
    assert_same(results, expected, subject)


@every_subject
def test_two_threads_with_a_stream_each(subject, device):
    expected = {seed: subject.call(*subject.draw(device, seed)) for seed in (1, 2)}
    torch.cuda.synchronize()

    def work(seed):
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
            tensors = subject.draw(device, seed)
            for _ in range(20):
                results = subject.call(*tensors)
            torch.cuda.current_stream().synchronize()
            return seed, results

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for seed, results in pool.map(work, expected):
            assert_same(results, expected[seed], subject)


@every_subject
def test_two_threads_on_one_stream(subject, device):
    """Their launches run one after the other and share the memory of the stream."""
    expected = {seed: subject.call(*subject.draw(device, seed)) for seed in (1, 2)}
    torch.cuda.synchronize()

    def work(seed):
        with torch.cuda.device(device):
            tensors = subject.draw(device, seed)
            results = [subject.call(*tensors) for _ in range(20)]
            torch.cuda.current_stream().synchronize()
            return seed, results

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for seed, results in pool.map(work, expected):
            for result in results:
                assert_same(result, expected[seed], subject)


@contextlib.contextmanager
def stream_of_its_own(device):
    """A stream that CUDA makes and destroys: another one may get its address."""
    runtime, handle = torch.cuda.cudart(), ctypes.c_void_p()
    assert int(runtime.cudaStreamCreate(ctypes.addressof(handle))) == 0
    with torch.cuda.stream(torch.cuda.ExternalStream(handle.value, device=device)):
        yield
    torch.cuda.synchronize()
    assert int(runtime.cudaStreamDestroy(handle.value)) == 0


@every_subject
def test_streams_that_are_destroyed_and_made_again(subject, device):
    tensors = subject.draw(device, 1)
    expected = subject.call(*tensors)
    torch.cuda.synchronize()
    for number in range(20):
        with stream_of_its_own(device):
            results = [subject.call(*tensors) for _ in range(3)]
        for result in results:
            assert_same(result, expected, f"{subject}, stream {number}")


@every_subject
def test_repeats_bit_for_bit_beside_other_work(subject, device):
    tensors = subject.draw(device, 1)
    expected = subject.call(*tensors)
    other = torch.cuda.Stream()
    left, right = torch.randn(2, 2048, 2048, device=device)
    other.wait_stream(torch.cuda.current_stream())
    for repetition in range(200):
        with torch.cuda.stream(other):
            for _ in range(5):
                left @ right
        assert_same(subject.call(*tensors), expected, f"{subject}, repetition {repetition}")


@every_subject
def test_another_device_is_current(subject, device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    away = torch.device("cuda", (torch.cuda.current_device() + 1) % torch.cuda.device_count())
    if reasons := _select.cuda_unavailable(away):
        pytest.skip(f"{away}: {'; '.join(reasons)}")
    results = subject.call(*subject.draw(away, 1))
    assert torch.cuda.current_device() != away.index
    assert all(result.device == away for result in results)
    with torch.cuda.device(away):
        assert_same(results, subject.call(*subject.draw(away, 1)), subject)


# ---- graphs ---------------------------------------------------------------------------------------------------------


def capture(call):
    """A graph of `call`, its results and its stream. Earlier calls on that stream allocate the memory that is kept."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = call()
    torch.cuda.synchronize()
    return graph, results, stream


@every_subject
def test_graph_replays(subject, device):
    tensors = subject.draw(device, 0)
    graph, results, _ = capture(lambda: subject.call(*tensors))
    for seed in (1, 2):
        fresh = subject.draw(device, seed)
        for tensor, value in zip(tensors, fresh, strict=True):
            tensor.copy_(value)
        graph.replay()
        assert_same(results, subject.call(*fresh), f"{subject}, replay with seed {seed}")
        graph.replay()
        assert_same(results, subject.call(*fresh), f"{subject}, replayed again")


@every_subject
def test_graph_outlives_the_memory_that_calls_keep(subject, device):
    """Tables and counters that calls share must not be freed or changed while a graph reads them."""
    tensors = subject.draw(device, 0)
    graph, results, stream = capture(lambda: subject.call(*tensors))
    expected = subject.call(*tensors)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for seqlen in range(20, 60):  # more shapes than are kept
            q = torch.randn(1, seqlen, 2, 64, device=device, dtype=BFLOAT16)
            k = q[:, :, :1]
            qk_norm_rotary(q, k, rotary_dim=32, xpos=True, position=64 * seqlen, backend="cuda")
            attention(q[:, :1], k, k, causal=True, backend="cuda")
        sizes = [size for size in (2**6, 2**10, 2**14, 2**18) for _ in range(50)]
        poison = [torch.full((size,), torch.nan, device=device) for size in sizes]  # in freed memory
    torch.cuda.synchronize()
    graph.replay()
    assert_same(results, expected, subject)
    del poison


def test_decode_loop_in_a_graph(device):
    """64 tokens, one after the other, in one graph: equal to the loop without a graph bit for bit, and to one pass."""
    before, steps = 200, 64
    q, k, v, _, slopes, bound = draw_attention(steps, before + steps, device, 0)
    key_cache, value_cache = (torch.full_like(x, torch.nan) for x in (k, v))
    key_cache[:, :before], value_cache[:, :before] = k[:, :before], v[:, :before]

    def loop():
        outs = []
        for step in range(steps):
            end = before + step + 1
            key_cache[:, end - 1], value_cache[:, end - 1] = k[:, end - 1], v[:, end - 1]
            keys, values = key_cache[:, :end], value_cache[:, :end]
            outs.append(attend(q[:, step : step + 1], keys, values, None, slopes, bound)[0])
        return (torch.cat(outs, dim=1),)

    graph, results, _ = capture(loop)
    fresh = draw_attention(steps, before + steps, device, 1)
    q.copy_(fresh[0])
    k[:, before:], v[:, before:] = fresh[1][:, before:], fresh[2][:, before:]
    key_cache[:, before:] = value_cache[:, before:] = torch.nan
    graph.replay()
    out = results[0].clone()
    key_cache[:, before:] = value_cache[:, before:] = torch.nan
    assert_same((out,), loop(), "the loop")
    inputs = attention_test.Inputs(q, k, v, None, {"causal": True, "alibi_slopes": slopes})
    leaves = [x.double() for x in (q, k, v)]
    exact = op.reference.attention(*leaves, softmax_scale=64**-0.5, **inputs.options)[0]
    numerics.assert_rows_close(out, exact, BFLOAT16)


def private_pools_at(addresses):
    """The addresses that are in memory of a graph."""
    owned = [segment for segment in torch.cuda.memory_snapshot() if tuple(segment["segment_pool_id"]) != (0, 0)]
    return [
        address
        for address in addresses
        if any(0 <= address - segment["address"] < segment["total_size"] for segment in owned)
    ]


def test_a_capture_may_be_the_first_to_need_a_table(device):
    """The table is made outside the capture, and belongs neither to the graph nor to its pool."""
    q, k = (torch.randn(1, 3, heads, 64, device=device, dtype=BFLOAT16) for heads in (4, 1))

    def call(position):
        return qk_norm_rotary(q, k, rotary_dim=32, xpos=True, position=position, backend="cuda")

    def first(position):  # warm-up calls use other positions: the capture is the first to need this window
        return lambda: call(next(position))

    for number in range(1, 4):
        far = 2**20 * number
        graph, results, _ = capture(first(iter((0, 0, far))))
        kept = [table.data_ptr() for entries in _persistent.entries.values() for table in entries.values()]
        assert private_pools_at(kept) == []
        graph.replay()
        assert_same(results, call(far), f"position {far}")


def test_graphs_beside_each_other(device):
    """Graphs of calls that combine results of several blocks, on streams of their own at the same time."""
    subject = next(subject for subject in SUBJECTS if subject.name == "attention decode")
    graphs = []
    for seed in range(4):
        tensors = subject.draw(device, seed)
        expected = subject.call(*tensors)
        graph, results, _ = capture(functools.partial(subject.call, *tensors))
        graphs.append((graph, results, expected, torch.cuda.Stream(), tensors))
    torch.cuda.synchronize()
    for _ in range(50):
        for graph, _, _, stream, _ in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for graph, results, expected, _, _ in graphs:
        assert_same(results, expected, graph)


# ---- numbers on the device, and generation as a graph ---------------------------------------------------------------


def test_a_graph_reads_the_number_of_keys(device):
    """Each replay sees as many keys as the number says, and nothing of the rows after them."""
    q, k, v, _, slopes, bound = draw_attention(1, 5000, device, 0)
    num_keys = torch.ones(1, dtype=torch.int32, device=device)
    keys, values = (x.clone() for x in (k, v))

    def call():
        options = {"causal": True, "alibi_slopes": slopes, "logit_bound": bound, "num_keys": num_keys}
        return attention(q, keys, values, return_lse=True, backend="cuda", **options)

    with torch.no_grad():
        graph, results, _ = capture(call)
        for count in (5000, 1, 2, 63, 64, 65, 1000, 2049, 4999):
            num_keys.fill_(count)
            for whole, part in ((keys, k), (values, v)):
                whole.copy_(part)
                whole[:, count:] = torch.nan
            graph.replay()
            assert_same(results, call(), f"{count} keys")
            cut = attention_test.Inputs(q, k[:, :count], v[:, :count], None, {"causal": True, "alibi_slopes": slopes})
            leaves = [x.double() for x in cut.tensors()]
            exact = op.reference.attention(*leaves, softmax_scale=64**-0.5, **cut.options)[0]
            numerics.assert_rows_close(results[0], exact, BFLOAT16, kind="heavy")


def test_a_graph_reads_the_step(device):
    q, k, q_scale, k_scale, *_ = draw_rotary(device, 0)
    step = torch.zeros(1, dtype=torch.int32, device=device)
    options = {
        "q_scale": q_scale,
        "k_scale": k_scale,
        "rotary_dim": 32,
        "xpos": True,
        "origin": 4096,
        "backend": "cuda",
    }
    with torch.no_grad():
        graph, results, _ = capture(lambda: qk_norm_rotary(q, k, position=0, step=step, **options))
        for value in (0, 1, 500, 8000):
            step.fill_(value)
            graph.replay()
            assert_same(results, qk_norm_rotary(q, k, position=value, **options), f"step {value}")


GENERATED = {
    "one row": ({}, [[5, 1, 4]], 300, {}),
    "padding": ({}, [[3], [5, 1, 4, 1, 5, 9, 2], [2, 6, 5]], 100, {}),
    "shift two, many key heads": (dict(shift_tokens=2, attn_one_kv_head=False), [[5, 1, 4], [7]], 100, {}),
    "pre-norm, absolute": (dict(deepnorm=False, use_abs_pos_emb=True), [[5, 1, 4], [7]], 100, {}),
    "the window moves": (dict(max_seq_len=64), [[1] * 50, [2] * 64], 200, {}),
    "sampled": ({}, [[5, 1, 4]] * 4, 100, dict(temperature=1.0)),
    "with an end": ({}, [[5, 1, 4]] * 2, 300, dict(eos_token=3, temperature=1.0)),
}


def language_model(device, dtype=BFLOAT16, **arguments):
    torch.manual_seed(0)
    sizes = dict(num_tokens=256, max_seq_len=1024, dim=256, depth=3, dim_head=64, heads=4, alibi_num_heads=2)
    return Andromeda(**sizes | arguments).to(device, dtype)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that `generate` makes; a step that cannot be recorded fails the test."""
    made = []

    class Graph(steps._Graph):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(steps, "_Graph", Graph)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="generate: runs without a CUDA graph")
        yield made


def generated(model, prompts, count, device, **options):
    generator = torch.Generator(device).manual_seed(1)
    return model.generate(prompts, count, generator=generator, **{"temperature": 0, **options})


@pytest.mark.parametrize("segment", [64, 8192])
@pytest.mark.parametrize("name", GENERATED)
def test_generate_as_a_graph(name, segment, device, graphs, monkeypatch):
    """The same tokens with a graph and without; by ordinary calls, tokens whose logits are as large up to rounding."""
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: segment)
    arguments, prompts, count, options = GENERATED[name]
    model = language_model(device, **arguments)
    new = generated(model, prompts, count, device, **options)
    assert len(graphs) > 0
    made = len(graphs)
    assert torch.equal(generated(model, prompts, count, device, cuda_graph=False, **options), new)
    assert len(graphs) == made
    if name in ("the window moves", "sampled", "with an end"):
        return
    for prompt, continuation in zip(prompts, new, strict=True):
        row = torch.cat((torch.tensor(prompt, device=device), continuation))
        with torch.no_grad():
            logits = model(row)[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, continuation[:, None])[:, 0]
        assert (logits.amax(1) - chosen).max() <= 0.1


def test_generate_as_a_graph_in_float32(device, graphs):
    """Kernels read the numbers on the device, or else the steps are ordinary calls; never an error."""
    model = language_model(device, torch.float32)
    assert torch.equal(
        generated(model, [[5, 1, 4]], 60, device), generated(model, [[5, 1, 4]], 60, device, cuda_graph=False)
    )


def test_generate_as_a_graph_under_autocast(device, graphs):
    model = language_model(device, torch.float32)
    with torch.autocast("cuda", dtype=BFLOAT16):
        new = generated(model, [[5, 1, 4], [7]], 100, device)
        assert len(graphs) > 0
        assert torch.equal(generated(model, [[5, 1, 4], [7]], 100, device, cuda_graph=False), new)


def test_generate_as_a_graph_in_two_threads(device, graphs):
    model = language_model(device)
    prompts = ([[5, 1, 4]], [[7, 7], [3, 1]])
    expected = [generated(model, prompt, 200, device, temperature=1.0) for prompt in prompts]
    torch.cuda.synchronize()

    def work(index):
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
            return [generated(model, prompts[index], 200, device, temperature=1.0) for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for results, other in zip(pool.map(work, range(2)), expected, strict=True):
            for new in results:
                assert torch.equal(new, other)


def test_many_calls_of_generate_keep_no_memory(device, graphs):
    model = language_model(device)
    for _ in range(3):
        generated(model, [[5, 1, 4]], 300, device)
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    kept = len(_persistent.taken_semaphores)
    for _ in range(20):
        generated(model, [[5, 1, 4]], 300, device)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= allocated and len(_persistent.taken_semaphores) == kept
    assert torch.cuda.memory_reserved() <= reserved + 2**21


class ReadsOnTheHost(torch.nn.Embedding):
    def forward(self, tokens):
        assert tokens.sum().item() >= 0
        return super().forward(tokens)


def test_a_step_that_reads_values_is_not_recorded(device):
    model = language_model(device)
    expected = generated(model, [[5, 1, 4]], 60, device)
    table = model.transformer.token_emb
    model.transformer.token_emb = ReadsOnTheHost.from_pretrained(table.weight.detach())
    with pytest.warns(UserWarning, match="runs without a CUDA graph, because .* values on the host"):
        new = generated(model, [[5, 1, 4]], 60, device)
    assert torch.equal(new, expected)
    assert torch.equal(generated(model, [[5, 1, 4]], 60, device), expected)


def test_a_capture_that_fails_leaves_torch_in_order(device, monkeypatch):
    """An operation that nobody knew to be impossible: later samples, allocations and captures work."""
    model = language_model(device)
    expected = generated(model, [[5, 1, 4]], 60, device, temperature=1.0)

    class Synchronizes(torch.nn.Embedding):
        def forward(self, tokens):
            torch.cuda.current_stream().synchronize()
            return super().forward(tokens)

    table = model.transformer.token_emb
    model.transformer.token_emb = Synchronizes.from_pretrained(table.weight.detach())
    with pytest.warns(UserWarning, match="runs without a CUDA graph"):
        new = generated(model, [[5, 1, 4]], 60, device, temperature=1.0)
    assert torch.equal(new, expected)
    torch.randn(1000, device=device)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    other = language_model(device)
    assert torch.equal(generated(other, [[5, 1, 4]], 60, device, temperature=1.0), expected)


# ---- torch.compile --------------------------------------------------------------------------------------------------


@pytest.fixture
def reduce_overhead():
    """reduce_overhead(function) compiles the function into CUDA graphs; the test fails if it makes none."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("torch.compile needs triton on a GPU")
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield functools.partial(torch.compile, mode="reduce-overhead", fullgraph=True, dynamic=False)
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.compiler.reset()


def cloned(results):
    """Copies, because the next run of a graph overwrites its results."""
    return tuple(result.clone() for result in results)


# The indices of the arguments that get gradients.
LEAVES = {attend: (0, 1, 2), rotate: (0, 1, 2, 3), shift: (0, 1, 3, 4)}
FORWARDS = [subject for subject in SUBJECTS if subject.call in LEAVES]


@pytest.mark.parametrize("subject", FORWARDS, ids=str)
def test_reduce_overhead(subject, device, reduce_overhead):
    """The first run warms up in a pool of the graph, the second is captured, later ones are replays."""
    compiled = reduce_overhead(subject.call)
    for seed in range(5):
        tensors = subject.draw(device, seed)
        torch.compiler.cudagraph_mark_step_begin()
        results = cloned(compiled(*tensors))
        assert_same(results, subject.call(*tensors), f"{subject}, run {seed}")


@pytest.mark.parametrize("subject", FORWARDS, ids=str)
def test_reduce_overhead_with_gradients(subject, device, reduce_overhead):
    compiled = reduce_overhead(subject.call)

    def step(function, seed):
        tensors = list(subject.draw(device, seed))
        for index in LEAVES[subject.call]:
            tensors[index] = tensors[index].detach().requires_grad_()
        leaves = [tensor for tensor in tensors if tensor.requires_grad]
        torch.compiler.cudagraph_mark_step_begin()
        outs = [out for out in function(*tensors) if out.requires_grad]
        generator = torch.Generator(device).manual_seed(seed)
        douts = [torch.randn(out.shape, device=device, generator=generator).to(out) for out in outs]
        return cloned([*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, douts)])

    for seed in range(5):
        assert_same(step(compiled, seed), step(subject.call, seed), f"{subject}, run {seed}")


def test_reduce_overhead_of_decoding_with_two_lengths(device, reduce_overhead):
    """Two graphs whose warm-ups, captures and replays take turns."""
    compiled = reduce_overhead(lambda *tensors: attend(*tensors)[0])
    for seed in range(5):
        for length in (5000, 9000):
            tensors = draw_attention(1, length, device, seed)
            torch.compiler.cudagraph_mark_step_begin()
            result = compiled(*tensors).clone()
            assert_same((result,), attend(*tensors)[:1], f"{length} keys, run {seed}")


def test_reduce_overhead_of_a_model(device, reduce_overhead):
    """Training steps of a model whose every operation is a kernel, forward and backward."""
    model = Andromeda(num_tokens=256, max_seq_len=256, dim=128, depth=2, dim_head=64, heads=4, alibi_num_heads=2).to(
        device, BFLOAT16
    )
    compiled = reduce_overhead(model)

    def step(function, tokens):
        model.zero_grad(set_to_none=True)
        torch.compiler.cudagraph_mark_step_begin()
        logits = function(tokens)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]

    for seed in range(4):
        tokens = torch.randint(0, 256, (2, 200), device=device, generator=torch.Generator(device).manual_seed(seed))
        (loss, gradients), (expected, expected_gradients) = (step(f, tokens) for f in (compiled, model))
        assert abs(loss - expected) < 0.02 * expected
        for gradient, other in zip(gradients, expected_gradients, strict=True):
            assert (gradient - other).norm() <= 0.1 * other.norm() + 1e-6


@pytest.mark.parametrize("loading", ["EAGER", "LAZY"])
def test_kernels_load_in_either_way(loading, device):
    """CUDA loads all kernels at once, or each at its first launch, perhaps during a capture."""
    program = (
        "import torch, test_cuda\n"
        f"device = torch.device({str(device)!r})\n"
        "torch.cuda.set_device(device.index or 0)\n"
        "for subject in test_cuda.SUBJECTS:\n"
        "    tensors = subject.draw(device, 0)\n"
        "    expected = subject.call(*tensors)\n"
        "    graph, results, _ = test_cuda.capture(lambda: subject.call(*tensors))\n"
        "    graph.replay()\n"
        "    test_cuda.assert_same(results, expected, subject)\n"
        "print('all the same')\n"
    )
    environment = os.environ | {"CUDA_MODULE_LOADING": loading}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=Path(__file__).parent
    )
    assert result.returncode == 0 and result.stdout.strip() == "all the same", result.stderr


# ---- memory ---------------------------------------------------------------------------------------------------------


@every_subject
def test_memory_of_a_thousand_calls_is_that_of_one(subject, device):
    tensors = subject.draw(device, 0)
    for _ in range(10):
        subject.call(*tensors)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    subject.call(*tensors)
    before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    free, _ = torch.cuda.mem_get_info()
    for _ in range(1000):
        subject.call(*tensors)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() == peak
    lost = free - torch.cuda.mem_get_info()[0]  # memory allocated without torch
    assert lost < 2**20 * 64, f"{lost / 2**20:.0f} MiB of the GPU's memory are gone"


def require_memory(gib):
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def judge(inputs, results):
    """out, softmax_lse, dq, dk, dv against the exact result, by the rules of `numerics` for ordinary values."""
    scale = inputs.q.shape[-1] ** -0.5
    out_ref, lse_ref, *gradient_refs = attention_test.run_exact(inputs, scale)
    out, softmax_lse, *gradients = results
    dtype = inputs.q.dtype
    reach = attention_test.logit_range(inputs, lse_ref, scale)
    numerics.assert_rows_close(out, out_ref, dtype, logit_range=reach)
    numerics.assert_lse_close(softmax_lse, lse_ref)
    operands = (x.double() for x in (inputs.dout, *inputs.tensors(), out_ref, lse_ref))
    masks = {"causal": inputs.options["causal"], "key_start": inputs.options.get("key_start")}
    slopes = inputs.options.get("alibi_slopes")
    terms = functools.partial(
        numerics.gradient_magnitudes, *operands, softmax_scale=scale, alibi_slopes=slopes, **masks
    )
    promised = inputs.options.get("logit_bound") is not None
    negligible = attention_test.SKIPPED if promised else attention_test.NEGLIGIBLE
    if dtype == FLOAT16:  # products take half-precision weights: below 2^-14 they are multiples of 2^-24
        negligible = max(negligible, 2.0**-25)
    left_out = terms(weight=negligible)
    for gradient, ref, magnitude, absolute in zip(gradients, gradient_refs, terms(), left_out, strict=True):
        limits = {"logit_range": reach, "absolute": absolute}
        numerics.assert_elements_close(gradient, ref, magnitude, **limits)
        numerics.assert_rows_close(gradient, ref, dtype, kind="gradient", magnitude=magnitude, **limits)


def assert_written(tensor):
    """No NaN of `nan_filled` is left; one batch entry or token at a time, so that no copy is made."""
    rows = tensor.flatten(0, 1) if tensor.shape[0] == 1 else tensor
    assert rows.sum(dim=tuple(range(1, rows.dim())), dtype=FLOAT32).isfinite().all(), "not everything was written"


def test_offsets_beyond_32_bits_in_queries(device):
    """q, out, dout and dq have more than 2^31 elements each: 4 GiB, and a short sequence in every batch entry."""
    require_memory(40)
    batch, seqlen, heads, head_dim = 5500, 128, 24, 128
    assert batch * seqlen * heads * head_dim > 2**31
    q, dout = (torch.randn(batch, seqlen, heads, head_dim, device=device, dtype=BFLOAT16) for _ in range(2))
    k, v = (torch.randn(batch, seqlen, 1, head_dim, device=device, dtype=BFLOAT16) for _ in range(2))
    slopes = torch.tensor([0.3, 0.0] * (heads // 2), device=device)
    inputs = attention_test.Inputs(q, k, v, dout, {"causal": True, "alibi_slopes": slopes})
    with numerics.nan_filled():
        results = attention_test.run(inputs, "cuda")
    for result in results:
        assert_written(result)
    for entry in (0, batch // 2, batch - 1):
        part = slice(entry, entry + 1)
        one = attention_test.Inputs(q[part], k[part], v[part], dout[part], inputs.options)
        judge(one, [result[part] for result in results])


@pytest.mark.parametrize("seqlen_q", [1, 40], ids=["decode", "prefill"])
def test_offsets_beyond_32_bits_in_keys(seqlen_q, device):
    """k, v, dk and dv have more than 2^31 elements each: 4 GiB."""
    require_memory(26)
    seqlen_k, heads, head_dim = 700_000, 24, 128
    assert seqlen_k * heads * head_dim > 2**31
    k, v = (torch.randn(1, seqlen_k, heads, head_dim, device=device, dtype=BFLOAT16) for _ in range(2))
    q, dout = (torch.randn(1, seqlen_q, heads, head_dim, device=device, dtype=BFLOAT16) for _ in range(2))
    slopes = torch.tensor([0.3] + [0.0] * (heads - 1), device=device)
    inputs = attention_test.Inputs(q, k, v, dout, {"causal": True, "alibi_slopes": slopes})
    with numerics.nan_filled():
        out, softmax_lse, *gradients = attention_test.run(inputs, "cuda")
    for result in (out, softmax_lse, *gradients):
        assert_written(result)
    for head in (0, heads - 1):
        part = slice(head, head + 1)
        operands = [x[:, :, part] for x in (*inputs.tensors(), dout)]
        one = attention_test.Inputs(*operands, {"causal": True, "alibi_slopes": slopes[part]})
        judge(one, (out[:, :, part], softmax_lse[:, part], *(x[:, :, part] for x in gradients)))


def test_offsets_beyond_32_bits_in_qk_norm_rotary(device):
    require_memory(10)
    batch, seqlen, heads, head_dim = 5500, 128, 24, 128
    q = torch.randn(batch, seqlen, heads, head_dim, device=device, dtype=BFLOAT16)
    k = torch.randn(batch, seqlen, 1, head_dim, device=device, dtype=BFLOAT16)
    with numerics.nan_filled():
        results = qk_norm_rotary(q, k, rotary_dim=64, xpos=True, backend="cuda")
    for result in results:
        assert_written(result)
    for entry in (0, batch // 2, batch - 1):
        part = slice(entry, entry + 1)
        expected = qk_norm_rotary(q[part], k[part], rotary_dim=64, xpos=True, backend="cuda")
        assert_same([result[part] for result in results], expected, f"entry {entry}")


def test_offsets_beyond_32_bits_in_token_shift_norm(device):
    require_memory(30)
    batch, seqlen, dim = 6600, 128, 2560
    assert batch * seqlen * dim > 2**31
    x, residual, dshifted = (torch.randn(batch, seqlen, dim, device=device, dtype=BFLOAT16) for _ in range(3))
    gamma = torch.randn(dim, device=device)

    def call(x, residual, dshifted):
        leaves = [x.detach().requires_grad_(), residual.detach().requires_grad_()]
        outs = token_shift_norm(leaves[0], residual=leaves[1], gamma=gamma, shift=1, backend="cuda")
        return (*(out.detach() for out in outs), *torch.autograd.grad(outs[1], leaves, dshifted))

    with numerics.nan_filled():
        results = call(x, residual, dshifted)
    for result in results:
        assert_written(result)
    for entry in (0, batch // 2, batch - 1):
        part = slice(entry, entry + 1)
        expected = call(x[part], residual[part], dshifted[part])
        assert_same([result[part] for result in results], expected, f"entry {entry}")


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(3, 3), (1, 40)], ids=["prefill", "decode"])
def test_more_entries_than_a_grid_has_rows(seqlen_q, seqlen_k, device):
    """The y and z axes of a grid end at 65 535."""
    case = attention_test.Case(70_000, seqlen_q, seqlen_k, num_heads=1, head_dim=64, dtype=BFLOAT16, alibi="all")
    inputs = attention_test.make(case, device)
    with numerics.nan_filled():
        judge(inputs, attention_test.run(inputs, "cuda"))


# ---- the default backend --------------------------------------------------------------------------------------------


def test_float32_takes_the_reference(device):
    tensors = [x.float() for x in draw_attention(30, 30, device, 0)[:3]]
    assert any("float32" in reason for reason in op.unsupported("cuda", *tensors))
    with pytest.raises(NotImplementedError, match="float32"):
        attention(*tensors, causal=True, backend="cuda")
    expected = attention(*tensors, causal=True, backend="reference")
    assert_same((attention(*tensors, causal=True),), (expected,), "float32")


def test_autocast_rounds_once_and_takes_the_kernel(device):
    halves = draw_attention(30, 30, device, 0)[:3]
    with torch.autocast("cuda", dtype=BFLOAT16):
        out = attention(*(x.float() for x in halves), causal=True, backend="cuda")
    assert out.dtype == BFLOAT16
    assert_same((out,), (attention(*halves, causal=True, backend="cuda"),), "autocast")


@every_subject
def test_kernels_are_the_default(subject, device, monkeypatch):
    """The default gives the same bits as backend="cuda"."""
    tensors = subject.draw(device, 0)
    expected = subject.call(*tensors)
    chosen = []
    choose = _select.choose

    def watched(name, backend, unsupported, *call):
        chosen.append(choose(name, _select.AUTO, unsupported, *call))
        return chosen[-1]

    monkeypatch.setattr(_select, "choose", watched)
    _select.plans.clear()  # the choices for the calls above
    assert_same(subject.call(*tensors), expected, subject)
    assert set(chosen) == {"cuda"}


def test_unsupported_gpu_is_named(device, monkeypatch):
    tensors = draw_attention(30, 30, device, 0)[:3]
    expected = attention(*tensors, causal=True, backend="reference")
    _select.lasting_answers.clear()
    try:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        with pytest.raises(NotImplementedError, match=r"compute capability 7\.5 \(built for "):
            attention(*tensors, causal=True, backend="cuda")
        assert_same((attention(*tensors, causal=True),), (expected,), "the fallback")
    finally:
        _select.lasting_answers.clear()


# ---- splits of the keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_splits", attention_test.SPLITS)
@pytest.mark.parametrize("case", attention_test.SPLIT_CASES, ids=str)
def test_number_of_splits(case, num_splits, device, monkeypatch):
    attention_test.check_splits(case, num_splits, device, monkeypatch)


# ---- for compute-sanitizer ------------------------------------------------------------------------------------------

SMALL = [
    attention_test.Case(batch=1, seqlen_q=70, seqlen_k=70, head_dim=64, dtype=BFLOAT16),
    attention_test.Case(batch=1, seqlen_q=70, seqlen_k=150, head_dim=128, dtype=FLOAT16, mask="documents"),
    attention_test.Case(seqlen_q=33, seqlen_k=40, head_dim=40, dtype=BFLOAT16, causal=False, num_kv_heads=3),
    attention_test.Case(seqlen_q=20, seqlen_k=45, head_dim=33, dtype=FLOAT16, layout="slice", mask="padding"),
    attention_test.Case(batch=1, seqlen_q=1, seqlen_k=700, num_heads=24, head_dim=128, dtype=BFLOAT16),
    attention_test.Case(seqlen_q=3, seqlen_k=300, num_heads=4, num_kv_heads=2, head_dim=64, dtype=FLOAT16),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("bounded", [False, True], ids=["online", "bounded"])
def test_small_calls_of_attention(case, bounded, device):
    """The exact result comes from the CPU, so a sanitizer watches hardly any other kernels."""

    def make(device):
        return attention_test.bounded(case, 4.0, device) if bounded else attention_test.make(case, device)

    inputs = make(device)
    attention_test.require("cuda", *inputs.tensors(), **inputs.options)
    results = attention_test.run(inputs, "cuda")
    judge(make("cpu"), [result.cpu() for result in results])


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
def test_small_calls_of_qk_norm_rotary(dtype, device):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 17, heads, 64, generator=generator).to(dtype) for heads in (3, 1))
    douts = [torch.randn(x.shape, generator=generator).to(dtype) for x in (q, k)]
    q_scale, k_scale = torch.rand(3, 64, generator=generator) + 0.5, torch.rand(1, 64, generator=generator) + 0.5

    def run(function, device, dtype):
        leaves = [x.to(device, dtype).requires_grad_() for x in (q, k)]
        scale_dtype = torch.float64 if dtype == torch.float64 else FLOAT32
        leaves += [x.to(device, scale_dtype).requires_grad_() for x in (q_scale, k_scale)]
        outs = function(*leaves)
        gradients = torch.autograd.grad(outs, leaves, [x.to(device, dtype) for x in douts])
        return [x.detach().cpu() for x in (*outs, *gradients)]

    def transform(*leaves):
        tables = rotary_reference.rotary_tables(17, 17, 32, True, 0, rotary_reference.default_origin(17, 17, 0))
        pairs = zip(leaves[:2], leaves[2:], tables, strict=True)
        return tuple(rotary_reference.transform(x, scale, table.double(), True) for x, scale, table in pairs)

    results = run(rotate, device, dtype)
    for index, (result, exact) in enumerate(zip(results, run(transform, "cpu", torch.float64), strict=True)):
        if index < 4:
            numerics.assert_rows_close(result, exact, dtype, kind="output" if index < 2 else "gradient")
        else:  # of scales: sums over tokens, in float32
            torch.testing.assert_close(result.double(), exact, rtol=2e-2 if dtype in numerics.HALF else 1e-5, atol=1e-2)


# Rows of one warp and of several, aligned and not; rows longer than a block holds.
@pytest.mark.parametrize("dim", [64, 1032, 517, 8200])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32], ids=str)
def test_small_calls_of_token_shift_norm(dtype, dim, device):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2, 9, dim, generator=generator).to(dtype) for _ in range(4)]
    vectors = torch.rand(2, dim, generator=generator) + 0.5
    history = torch.randn(2, 2, dim, generator=generator).to(dtype)
    key_start = torch.tensor([[0] * 4 + [4] * 5, [0] * 9], dtype=torch.int32)

    def run(function, device, dtype, **options):
        x, residual, *douts = (tensor.to(device, dtype) for tensor in rows)
        scale, gamma = vectors.to(device, torch.float64 if dtype == torch.float64 else FLOAT32)
        leaves = x, residual, scale, gamma = [leaf.detach().requires_grad_() for leaf in (x, residual, scale, gamma)]
        outs = function(
            x, residual=residual, residual_scale=scale, gamma=gamma, alpha=1.5, shift=2,
            history=history.to(device, dtype), key_start=key_start.to(device), **options,
        )  # fmt: skip
        gradients = torch.autograd.grad(outs, leaves, douts)
        return [result.detach().cpu() for result in (*outs, *gradients)]

    results = run(token_shift_norm, device, dtype, backend="cuda")
    exact = run(shift_reference.token_shift_norm, "cpu", torch.float64)
    for index, (result, expected) in enumerate(zip(results, exact, strict=True)):
        if index < 4:
            numerics.assert_rows_close(result, expected, dtype, kind="output" if index < 2 else "gradient")
        else:  # of vectors: sums over tokens, in float32
            torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-4)
