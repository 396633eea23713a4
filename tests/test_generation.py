"""Cached calls, sampling and filters (docs/model.md#10, #13.8)."""

import contextlib
import itertools
import math
import threading
import unittest.mock
import warnings
import weakref

import golden_cases
import hypothesis
import oracle
import pytest
import torch
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import andromeda.model
from andromeda import Andromeda, generation
from andromeda.generation import Cache, _Sampler, min_p, top_k, top_p
from andromeda.ops import _checks

V = oracle.SMALL["num_tokens"]
INF = math.inf

# Largest difference between cached and whole calls. The golden decode rows of larger cases are float64 results rounded
# to float32, or those of the oracle in float32, whose own error is below 1e-6.
SPLIT = 1e-10
DECODE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.bfloat16: 5e-2}


def build(seed=0, **arguments) -> Andromeda:
    """A float64 model whose parameters are all off their initial values."""
    torch.manual_seed(seed)
    model = Andromeda(**(oracle.SMALL | arguments)).double()
    oracle.perturb(model)
    return model


def largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


@torch.no_grad()
def in_pieces(model, tokens, lengths, key_start=None) -> torch.Tensor:
    """Logits of consecutive calls on pieces of these lengths, concatenated."""
    cache = Cache()
    logits, start = [], 0
    for length in lengths:
        piece = None if key_start is None else key_start[:, start : start + length]
        logits.append(model(tokens[:, start : start + length], cache=cache, key_start=piece))
        start += length
        assert cache.position == cache.length == start
    assert start == tokens.shape[1]
    return torch.cat(logits, dim=1)


FLAGS = {
    "defaults": {},
    "prenorm": dict(deepnorm=False, depth=2),
    "plain": dict(alibi_pos_bias=False, rotary_xpos=False, qk_norm=False, shift_tokens=0),
    "no_shift": dict(shift_tokens=0, heads=3, alibi_num_heads=3),
    "multi_head": dict(attn_one_kv_head=False, attn_qk_norm_dim_scale=False, shift_tokens=2),
    "absolute": dict(use_abs_pos_emb=True),
    "shift_three": dict(shift_tokens=3, depth=2, dim=25),
}
with_flags = pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)

switches = st.fixed_dictionaries(
    dict(max_seq_len=st.just(60))
    | dict.fromkeys(
        ("use_abs_pos_emb", "alibi_pos_bias", "rotary_xpos", "deepnorm", "attn_one_kv_head", "qk_norm", "attn_flash",
         "attn_qk_norm_dim_scale"),
        st.booleans(),
    )
    | dict(shift_tokens=st.integers(0, 3), depth=st.integers(1, 2), alibi_num_heads=st.sampled_from((0, 1, 3, None)))
)  # fmt: skip
splits = st.lists(st.integers(1, 9), min_size=1, max_size=6)


# ---- golden data


@pytest.mark.parametrize("dtype", DECODE, ids=str)
@pytest.mark.parametrize("name", golden_cases.CASES)
def test_golden_decode(name, dtype):
    """A prompt, then one token at a time."""
    model, description, tensors = golden_cases.model(name, dtype)
    prefill, steps = description["decode"]["prefill"], description["decode"]["steps"]
    logits = in_pieces(model, tensors["tokens"], (prefill, *[1] * steps))
    error = (logits[:, prefill:].double() - tensors["decode/logits"].double()).abs()
    assert error.max() <= DECODE[dtype]
    if dtype == torch.float64:
        assert largest(logits, tensors["logits_f64"]) <= SPLIT


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_half_precision(flags, dtype):
    """Cached calls and greedy generation in half precision, against the wide model (docs/model.md#15)."""
    model = build(**{"depth": 2, "dim_head": 16} | flags).to(dtype)
    exact = Andromeda(**(oracle.SMALL | {"depth": 2, "dim_head": 16} | flags)).double()
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(V, (2, 30))
    error = (in_pieces(model, tokens, (13, 1, 1, 4, *[1] * 11)).double() - exact(tokens)).abs()
    assert error.max() <= 5e-2 and error.mean() <= 1e-2

    lengths, padded = (7, 12), torch.randint(V, (2, 12))
    for cache_kv in (True, False):
        new = model.generate(padded, 14, temperature=0, cache_kv=cache_kv, prompt_lengths=lengths)
        for row, length, continuation in zip(padded, lengths, new, strict=True):
            logits = exact(torch.cat((row[12 - length :], continuation)))[0, length - 1 : -1]
            chosen = logits.gather(1, continuation[:, None])[:, 0]
            # Each of the two logits that were compared may be off by the limit.
            assert (logits.amax(1) - chosen).max() <= 2 * 5e-2


@pytest.mark.parametrize("cache_kv", (True, False), ids=("cached", "recomputed"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("name", golden_cases.CASES)
def test_golden_greedy(name, dtype, cache_kv):
    model, description, tensors = golden_cases.model(name, dtype)
    prompt = tensors["tokens"][:, : description["greedy"]["prompt_len"]]
    expected = tensors["greedy/tokens"]
    new = model.generate(prompt, expected.shape[1], temperature=0, cache_kv=cache_kv)
    assert torch.equal(new, expected)


@pytest.mark.parametrize(
    ("tensor", "function", "arguments"),
    [("top_k_default", top_k, {}), ("top_k_5", top_k, {"k": 5}), ("top_p_0.9", top_p, {}), ("min_p_0.1", min_p, {})],
    ids=("top_k_default", "top_k_5", "top_p", "min_p"),
)
@pytest.mark.parametrize("name", golden_cases.CASES)
def test_golden_filters(name, tensor, function, arguments):
    _, tensors = golden_cases.load(name)
    assert torch.equal(function(tensors["logits"][:, -1], **arguments), tensors[f"filters/{tensor}"])


# ---- any split of a sequence is one call


@hypothesis.given(flags=switches, lengths=splits, batch=st.integers(1, 3), seed=st.integers(0, 99))
@hypothesis.settings(max_examples=60)
def test_any_split(flags, lengths, batch, seed):
    model = build(seed, heads=3, **flags)
    tokens = torch.randint(V, (batch, sum(lengths)))
    assert largest(in_pieces(model, tokens, lengths), model(tokens)) <= SPLIT


@hypothesis.given(flags=switches, lengths=splits, padding=st.lists(st.integers(0, 20), min_size=1, max_size=3))
@hypothesis.settings(max_examples=40)
def test_any_split_with_left_padding(flags, lengths, padding):
    """Each row gives the same logits as alone, for any padded ids and any starts of the calls."""
    model = build(heads=3, **flags)
    total = sum(lengths)
    padding = torch.tensor(padding).clamp_max(total - 1)
    tokens = torch.randint(V, (len(padding), total))
    key_start = padding[:, None].expand(-1, total).to(torch.int32)
    logits = in_pieces(model, tokens, lengths, key_start)
    for row, padded in enumerate(padding.tolist()):
        assert largest(logits[row, padded:], model(tokens[row, padded:])[0]) <= SPLIT


@with_flags
def test_padding_is_passed_once(flags):
    """Later calls continue with the key_start of the prompt."""
    model = build(**flags)
    tokens = torch.randint(V, (2, 12))
    key_start = torch.tensor([[0], [4]], dtype=torch.int32)
    cache = Cache()
    with torch.no_grad():
        model(tokens[:, :7], cache=cache, key_start=key_start.expand(2, 7))
        logits = torch.cat([model(tokens[:, t : t + 1], cache=cache) for t in range(7, 12)], dim=1)
    assert largest(logits[0], model(tokens[0])[0, 7:]) <= SPLIT
    assert largest(logits[1], model(tokens[1, 4:])[0, 3:]) <= SPLIT


@with_flags
@pytest.mark.parametrize("lengths", ((9, 9, 9), (1, 25, 1), (20, 1, 6)), ids=str)
def test_packed_documents_in_pieces(flags, lengths):
    model = build(**flags)
    tokens = torch.randint(V, (1, 27))
    ends = (0, 8, 10, 27)
    key_start = torch.cat([torch.full((1, b - a), a, dtype=torch.int32) for a, b in itertools.pairwise(ends)], dim=1)
    apart = torch.cat([model(tokens[:, a:b]) for a, b in itertools.pairwise(ends)], dim=1)
    assert largest(in_pieces(model, tokens, lengths, key_start), apart) <= SPLIT


@pytest.mark.parametrize("flags", (FLAGS["defaults"], FLAGS["prenorm"], FLAGS["multi_head"]), ids=str)
@pytest.mark.parametrize(
    "lengths", ((50, 50), (15, 1, 1, 1, 82), (16, 84), (1,) * 100, (70, 1, 29)), ids=lambda lengths: str(lengths[:6])
)
def test_segments_of_positions(flags, lengths, monkeypatch):
    """Calls begin at, end at and lie across the positions where the xPos origin moves."""
    model = build(**flags)
    tokens = torch.randint(V, (2, 100))
    whole = model(tokens)
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: 16)
    assert largest(in_pieces(model, tokens, lengths), whole) <= SPLIT


def test_segments_with_left_padding(monkeypatch):
    model = build()
    tokens = torch.randint(V, (1, 60))
    alone = model(tokens[:, 23:])
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: 16)
    key_start = torch.full((1, 60), 23, dtype=torch.int32)
    for lengths in ((60,), (20, 20, 20), (30, *[1] * 30)):
        assert largest(in_pieces(model, tokens, lengths, key_start)[:, 23:], alone) <= SPLIT


def test_far_keys_underflow_harmlessly():
    """In float32, beyond the real segment length: cached keys are rescaled, those of the whole call rotated again."""
    torch.manual_seed(0)
    model = Andromeda(**(oracle.SMALL | dict(dim=16, alibi_pos_bias=False, shift_tokens=0)))
    oracle.perturb(model)
    tokens = torch.randint(V, (1, 8300))
    with torch.no_grad():
        whole = model(tokens, logits_to_keep=150)
        cache = Cache()
        model(tokens[:, :8150], cache=cache, logits_to_keep=1)
        pieces = [model(tokens[:, t : t + 30], cache=cache) for t in range(8150, 8300, 30)]
        exact = model.double()(tokens, logits_to_keep=150)
    assert largest(torch.cat(pieces, dim=1), exact) <= 2e-5
    assert largest(whole, exact) <= 2e-5


# ---- reordering


@hypothesis.given(flags=switches, index=st.lists(st.integers(0, 2), min_size=1, max_size=4))
@hypothesis.settings(max_examples=25)
def test_reorder(flags, index):
    """Keys, values, shift rows and padding move together; the batch may grow and shrink."""
    model = build(heads=3, **flags)
    tokens, more = torch.randint(V, (3, 9)), torch.randint(V, (len(index), 5))
    padding = torch.tensor([0, 2, 5], dtype=torch.int32)
    index = torch.tensor(index)
    cache = Cache()
    with torch.no_grad():
        model(tokens, cache=cache, key_start=padding[:, None].expand(3, 9))
        cache.reorder(index)
        logits = torch.cat([model(more[:, :1], cache=cache), model(more[:, 1:], cache=cache)], dim=1)
    for row, source in enumerate(index.tolist()):
        alone = torch.cat((tokens[source, padding[source] :], more[row]))
        assert largest(logits[row], model(alone)[0, -5:]) <= SPLIT


def test_reorder_before_the_first_call():
    cache = Cache()
    cache.reorder(torch.tensor([0, 0]))
    assert cache.position == 0


# ---- the window


@with_flags
def test_keep_last_hides_older_keys(flags):
    """After keep_last(w) a query sees w earlier tokens and itself: the whole call with such a sliding window.

    One attention layer, because deeper ones see older tokens through younger ones (docs/model.md#10.4).
    """
    flags = flags | dict(depth=1, use_abs_pos_emb=False, shift_tokens=0)
    model = build(**flags)
    tokens, window = torch.randint(V, (2, 40)), 7
    cache = Cache()
    logits = []
    with torch.no_grad():
        for t in range(40):
            cache.keep_last(window - 1)
            logits.append(model(tokens[:, t : t + 1], cache=cache))
    assert (cache.position, cache.length) == (40, window)
    key_start = (torch.arange(40, dtype=torch.int32) - window + 1).clamp_min(0).expand(2, 40)
    assert largest(torch.cat(logits, dim=1), model(tokens, key_start=key_start)) <= SPLIT


@pytest.mark.parametrize("segment", (16, 8192))
def test_the_window_moves_across_segments(segment, monkeypatch):
    """Keys may be forgotten while origins move: only the forgotten ones are missing."""
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: segment)
    model = build(shift_tokens=0)
    tokens = torch.randint(V, (1, 90))
    ends = (0, 11, 12, 13, 31, 33, 50, 90)
    cache, logits = Cache(), []
    with torch.no_grad():
        for start, stop in itertools.pairwise(ends):
            cache.keep_last(9)
            logits.append(model(tokens[:, start:stop], cache=cache))
    begin = torch.cat([torch.full((1, b - a), max(0, a - 9)) for a, b in itertools.pairwise(ends)], dim=1)
    # All queries of a piece see the nine tokens before it.
    assert largest(torch.cat(logits, dim=1), model(tokens, key_start=begin)) <= SPLIT


def test_memory_of_a_window_is_bounded():
    """A cache that forgets does not grow, and forgetting more tokens than it holds does nothing."""
    model = build(shift_tokens=2)
    cache = Cache(capacity=10)
    cache.keep_last(3)
    with torch.no_grad():
        for _ in range(200):
            cache.keep_last(9)
            model([[1]], cache=cache)
    assert (cache.position, cache.length) == (200, 10)
    stored = sum(store.keys.numel() + store.values.numel() for store in cache._attention.values())
    assert stored <= 2 * 20 * 8  # two tensors of at most twice the window, one key head of width 8


# ---- what a cache refuses


def test_a_failed_call_changes_nothing():
    model = build(use_abs_pos_emb=True, max_seq_len=12)
    tokens = torch.randint(V, (1, 12))
    cache = Cache()
    with torch.no_grad():
        model(tokens[:, :8], cache=cache)
        with pytest.raises(ValueError, match=r"max_seq_len=12.*position 12"):
            model(tokens[:, :5], cache=cache)
        with pytest.raises(ValueError, match=f"got {V}"):
            model([[V]], cache=cache)
        assert cache.position == 8
        rest = model(tokens[:, 8:], cache=cache)
    assert largest(rest, model(tokens)[:, 8:]) <= SPLIT


@pytest.mark.parametrize("segment", (8, 8192))
def test_an_interrupted_call_changes_nothing(segment, monkeypatch):
    """The last sub-layer fails after the first has written keys and shift rows, and moved the xPos origin."""

    def fail(module, arguments):
        raise MemoryError("out of memory")

    model = build(depth=2, shift_tokens=2)
    tokens = torch.randint(V, (1, 20))
    whole = model(tokens)
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: segment)
    cache = Cache()
    with torch.no_grad():
        model(tokens[:, :8], cache=cache)
        failure = model.transformer.attn_layers.layers[3].fn.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(torch.randint(V, (1, 9)), cache=cache)
        failure.remove()
        rest = [model(tokens[:, 8:9], cache=cache), model(tokens[:, 9:], cache=cache)]
    assert largest(torch.cat(rest, dim=1), whole[:, 8:]) <= SPLIT


def test_another_batch_is_refused():
    model = build()
    cache = Cache()
    with torch.no_grad():
        model([[1, 2]], cache=cache)
        with pytest.raises(ValueError, match=r"^Cache: batch must .* 1, got 2$"):
            model([[1], [2]], cache=cache)


@pytest.mark.parametrize("shift_tokens", (0, 1))
def test_another_dtype_is_refused(shift_tokens):
    model = build(shift_tokens=shift_tokens)
    cache = Cache()
    with torch.no_grad():
        model([[1, 2]], cache=cache)
        with pytest.raises(TypeError, match=r"^Cache: .*dtype of earlier calls, torch\.float64, got torch\.float32$"):
            model.float()([[1]], cache=cache)


def test_training_with_a_cache_is_refused():
    model = build()
    with pytest.raises(ValueError, match=r"cache must be None where gradients are recorded"):
        model([[1, 2]], cache=Cache())
    with pytest.raises(ValueError, match=r"cache and logits_to_keep must be left out with return_loss=True"):
        model([[1, 2]], return_loss=True, cache=Cache())
    model.requires_grad_(False)
    assert not model([[1, 2]], cache=Cache()).requires_grad


def test_caches_work_in_and_out_of_inference_mode():
    model = build()
    cache = Cache()
    tokens = torch.randint(V, (1, 9))
    with torch.inference_mode():
        model(tokens[:, :4], cache=cache)
    with torch.no_grad():
        rest = model(tokens[:, 4:], cache=cache)
    assert largest(rest, model(tokens)[:, 4:]) <= SPLIT


def test_logits_to_keep():
    model = build()
    tokens = torch.randint(V, (2, 9))
    # A product of fewer rows may add in another order.
    torch.testing.assert_close(model(tokens, logits_to_keep=2), model(tokens)[:, -2:], rtol=1e-12, atol=1e-12)


# ---- generate


def greedy(model, prompt: list[int], steps: int, window: int | None = None) -> list[int]:
    """The arg-max continuation, with everything recomputed for each token."""
    tokens = list(prompt)
    for _ in range(steps):
        seen = tokens if window is None else tokens[-window:]
        tokens.append(model(seen)[0, -1].argmax().item())
    return tokens[len(prompt) :]


@with_flags
@pytest.mark.parametrize("cache_kv", (True, False), ids=("cached", "recomputed"))
def test_greedy(flags, cache_kv):
    model = build(**flags)
    prompts = torch.randint(V, (3, 6))
    new = model.generate(prompts, 12, temperature=0, cache_kv=cache_kv)
    assert new.dtype == torch.int64 and new.tolist() == [greedy(model, row, 12) for row in prompts.tolist()]


@with_flags
@pytest.mark.parametrize("cache_kv", (True, False), ids=("cached", "recomputed"))
def test_unequal_prompts(flags, cache_kv):
    """Each row gives the same tokens as alone."""
    model = build(**flags)
    prompts = [[3], [5, 1, 4, 1, 5, 9, 2], [2, 6, 5]]
    new = model.generate(prompts, 10, temperature=0, cache_kv=cache_kv)
    assert new.tolist() == [greedy(model, row, 10) for row in prompts]


def test_unequal_prompts_as_a_tensor():
    model = build()
    padded = torch.tensor([[9, 9, 9, 3], [5, 1, 4, 1]])
    for lengths in ([1, 4], torch.tensor([1, 4])):
        new = model.generate(padded, 8, temperature=0, prompt_lengths=lengths)
        assert new.tolist() == [greedy(model, [3], 8), greedy(model, [5, 1, 4, 1], 8)]


@pytest.mark.parametrize(("prompt_length", "steps"), ((5, 20), (14, 6)), ids=("slides", "long_prompt"))
def test_the_window_of_generate(prompt_length, steps):
    """Without a cache each step sees the last max_seq_len tokens; a cached run agrees until it drops some."""
    model = build(max_seq_len=8, depth=2)
    prompt = torch.randint(V, (prompt_length,)).tolist()
    expected = greedy(model, prompt, steps, window=8)
    assert model.generate(prompt, steps, temperature=0, cache_kv=False).tolist() == expected
    inside = max(1, 8 - prompt_length + 1)
    assert model.generate(prompt, steps, temperature=0).tolist()[:inside] == expected[:inside]
    free = model.generate(prompt, steps, temperature=0, restrict_to_max_seq_len=False).tolist()
    assert free == greedy(model, prompt, steps)


@pytest.mark.parametrize("prompt_length", (3, 8, 20))
def test_the_window_of_a_cached_run(prompt_length):
    """The oldest keys are dropped once max_seq_len - 1 are stored (docs/model.md#10.4)."""
    model = build(max_seq_len=8, depth=2)
    prompt = torch.randint(V, (2, prompt_length))
    new = model.generate(prompt, 25, temperature=0)
    cache, expected = Cache(), []
    with torch.no_grad():
        fed = prompt[:, -8:]
        for _ in range(25):
            cache.keep_last(7)
            fed = model(fed, cache=cache)[:, -1:].argmax(-1)
            expected.append(fed)
    assert torch.equal(new, torch.cat(expected, dim=1))


def test_unequal_prompts_longer_than_the_window():
    model = build(max_seq_len=8)
    prompts = [torch.randint(V, (length,)).tolist() for length in (3, 7, 12, 20)]
    new = model.generate(prompts, 6, temperature=0, cache_kv=False)
    for row, prompt in zip(new.tolist(), prompts, strict=True):
        assert row == greedy(model, prompt, 6, window=8)


@pytest.mark.parametrize("form", ("list", "tuple", "tensor"))
def test_one_dimensional_prompts(form):
    model = build()
    prompt = {"list": [3, 1, 4], "tuple": (3, 1, 4), "tensor": torch.tensor([3, 1, 4])}[form]
    assert model.generate(prompt, 7, temperature=0).tolist() == greedy(model, [3, 1, 4], 7)


def test_nothing_to_generate():
    assert build().generate([1, 2], 0).shape == (0,)
    assert build().generate([[1, 2], [3, 4]], 0).shape == (2, 0)


def scripted(model, rows, monkeypatch):
    """Make the model 'prefer' the tokens of `rows` (one list per batch row), step after step."""
    steps = iter(zip(*rows, strict=True))
    forward = type(model.transformer).forward

    def predict(self, tokens, **options):
        logits = forward(self, tokens, **options).zero_()
        for row, token in enumerate(next(steps)):
            logits[row, -1, token] = 50.0
        return logits

    monkeypatch.setattr(type(model.transformer), "forward", predict)


@pytest.mark.parametrize("temperature", (0, 1.0))
def test_eos(temperature, monkeypatch):
    """The first one stays and padding follows; the run stops when all rows have ended."""
    model = build()
    scripted(model, [[5, 7, 7, 9, 1, 1], [4, 4, 4, 7, 8, 8]], monkeypatch)
    new = model.generate([[7, 1], [2, 7]], 6, eos_token=7, temperature=temperature, filter_kwargs={"k": 1})
    assert new.tolist() == [[5, 7, 0, 0], [4, 4, 4, 7]]


def test_eos_in_the_prompt_does_not_stop(monkeypatch):
    model = build()
    scripted(model, [[5, 6, 7, 8]], monkeypatch)
    assert model.generate([7, 7, 7], 4, eos_token=7, temperature=0).tolist() == [5, 6, 7]


def test_eos_may_be_the_padding_id(monkeypatch):
    model = build()
    scripted(model, [[5, 0, 3, 3], [4, 4, 4, 4]], monkeypatch)
    assert model.generate([[0, 1], [2, 0]], 4, eos_token=0, temperature=0).tolist() == [[5, 0, 0, 0], [4, 4, 4, 4]]


def test_eos_that_never_comes():
    model = build()
    expected = greedy(model, [1], 6)
    absent = next(token for token in range(V) if token not in expected)
    assert model.generate([1], 6, eos_token=absent, temperature=0).tolist() == expected


def test_samples_are_repeatable():
    model = build()
    prompts = torch.randint(V, (2, 4))

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(prompts, 30).tolist()

    assert sample(1) == sample(1) != sample(2)
    with_generator = [model.generate(prompts, 30, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*with_generator)


def test_cached_samples_are_those_of_recomputation():
    model = build()
    runs = []
    for cache_kv in (True, False):
        torch.manual_seed(3)
        runs.append(model.generate([[1, 2, 3], [4, 5, 6]], 20, cache_kv=cache_kv).tolist())
    assert runs[0] == runs[1]


@pytest.mark.parametrize("temperature", (0.5, 1, 2.0))
def test_the_distribution_of_samples(temperature):
    """Frequencies of a first token against softmax(filter(logits) / temperature): six standard errors."""
    model = build(1)
    count = 20_000
    new = model.generate(torch.tensor([[1, 2, 3]]).expand(count, 3), 1, temperature=temperature,
                         filter_kwargs={"k": 6})  # fmt: skip
    frequency = torch.bincount(new[:, 0], minlength=V) / count
    expected = (top_k(model([1, 2, 3])[:, -1], k=6) / temperature).softmax(-1)[0]
    assert (frequency[expected == 0] == 0).all() and (expected > 0).sum() == 6
    error = (expected * (1 - expected) / count).sqrt()
    assert ((frequency - expected).abs() <= 6 * error).all()


@pytest.mark.parametrize(
    ("name", "arguments"), [("top_k", {"k": 1}), ("top_p", {"thres": 0}), ("min_p", {"min_p": 1.0})], ids=str
)
def test_filters_by_name(name, arguments):
    """With their narrowest settings all filters are greedy."""
    model = build()
    new = model.generate([1, 2], 10, filter_logits_fn=name, filter_kwargs=arguments)
    assert new.tolist() == greedy(model, [1, 2], 10)


def test_the_default_filter_is_top_k_of_a_tenth():
    model = build()
    allowed = top_k(model([1, 2, 3])[:, -1], k=3)[0].isfinite()  # ceil(0.1 * 23)
    new = model.generate([[1, 2, 3]] * 200, 1)[:, 0]
    assert set(new.tolist()) == set(allowed.nonzero()[:, 0].tolist())


def test_a_filter_of_ones_own_sees_logits_before_the_temperature():
    model = build()
    seen = []

    def only(logits, token):
        seen.append(logits)
        return torch.full_like(logits, -INF).index_fill(1, torch.tensor([token]), 0.0)

    new = model.generate([[1, 2, 3]], 1, temperature=0.25, filter_logits_fn=only, filter_kwargs={"token": 11})
    assert new.tolist() == [[11]]
    assert largest(seen[0], model([1, 2, 3])[:, -1]) <= SPLIT


def test_temperature_zero_ignores_filters():
    def refuse(logits):
        raise AssertionError("called")

    build().generate([1], 3, temperature=0, filter_logits_fn=refuse)


@pytest.mark.parametrize("temperature", (1e-300, 1e-9, 1e9))
def test_extreme_temperatures(temperature):
    model = build()
    new = model.generate([1, 2], 10, temperature=temperature, filter_kwargs={"k": V})
    assert ((new >= 0) & (new < V)).all()
    if temperature < 1:
        assert new.tolist() == greedy(model, [1, 2], 10)


def test_tokens_are_announced():
    heard = []
    new = build().generate([[1], [2]], 5, temperature=0, on_token=lambda tokens: heard.append(tokens.clone()))
    assert torch.equal(torch.stack(heard, dim=1), new)


def test_the_filter_arguments_are_left_alone():
    arguments = {"k": 2}
    build().generate([1], 2, filter_kwargs=arguments)
    assert arguments == {"k": 2}


def test_prompts_are_left_alone():
    prompts = torch.tensor([[1, 2, 3]])
    build().generate(prompts, 4)
    assert prompts.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("fails", (False, True), ids=("returns", "raises"))
def test_the_mode_is_restored(fails):
    model = build()
    model.train()
    model.transformer.attn_layers.layers[0].eval()
    modes = [module.training for module in model.modules()]
    seen = []

    def watch(logits):
        seen.append((model.transformer.training, torch.is_grad_enabled()))
        if fails:
            raise RuntimeError("from the filter")
        return logits

    if fails:
        with pytest.raises(RuntimeError, match="from the filter"):
            model.generate([1], 2, filter_logits_fn=watch)
    else:
        model.generate([1], 2, filter_logits_fn=watch)
    assert set(seen) == {(False, False)}
    assert [module.training for module in model.modules()] == modes and torch.is_grad_enabled()


def test_absolute_positions_end():
    model = build(use_abs_pos_emb=True, max_seq_len=8)
    assert model.generate([1] * 5, 4, temperature=0).shape == (4,)
    with pytest.raises(
        ValueError, match=r"^generate: seq_len must .*max_seq_len=8.*prompt of 5 and seq_len=5.*cache_kv=False"
    ):
        model.generate([1] * 5, 5)
    with pytest.raises(ValueError, match=r"seq_len=5.*restrict_to_max_seq_len=True"):
        model.generate([1] * 5, 5, cache_kv=False, restrict_to_max_seq_len=False)
    prompt = torch.randint(V, (5,)).tolist()
    assert model.generate(prompt, 12, temperature=0, cache_kv=False).tolist() == greedy(model, prompt, 12, window=8)


SIX = torch.ones(2, 3, dtype=torch.int64)
WRONG = {
    "seq_len_negative": (dict(seq_len=-1), ValueError, "seq_len must not be negative, got -1"),
    "seq_len_float": (dict(seq_len=2.5), TypeError, "seq_len must be an int, got 2.5"),
    "seq_len_bool": (dict(seq_len=True), TypeError, "seq_len must be an int, got True"),
    "temperature_negative": (dict(temperature=-0.5), ValueError, "temperature must be .*, got -0.5"),
    "temperature_infinite": (dict(temperature=INF), ValueError, "temperature must be .*, got inf"),
    "temperature_nan": (dict(temperature=math.nan), ValueError, "temperature must be .*, got nan"),
    "temperature_text": (dict(temperature="hot"), TypeError, "temperature must be a number, got 'hot'"),
    "filter_unknown": (dict(filter_logits_fn="top_a"), ValueError, "filter_logits_fn must be 'top_k'.*got 'top_a'"),
    "filter_number": (dict(filter_logits_fn=3), TypeError, "filter_logits_fn must be .*got 3"),
    "eos_too_large": (dict(eos_token=V), ValueError, f"eos_token must be .*{V}, got {V}"),
    "eos_negative": (dict(eos_token=-1), ValueError, "eos_token must not be negative, got -1"),
    "eos_float": (dict(eos_token=1.0), TypeError, "eos_token must be an int, got 1.0"),
    "prompt_empty": (dict(prompts=[]), ValueError, "at least one token"),
    "prompt_row_empty": (dict(prompts=[[1], []]), ValueError, "at least one token.* row 1"),
    "prompt_too_large": (dict(prompts=[[1], [2, V]]), ValueError, f"got {V} at row 1, position 1"),
    "prompt_text": (dict(prompts="hello"), TypeError, "got str"),
    "prompt_floats": (dict(prompts=torch.ones(1, 2)), TypeError, "got float32"),
    "lengths_for_lists": (dict(prompts=[[1], [2]], prompt_lengths=[1, 1]), ValueError, "prompt_lengths must be None"),
    "seq_len_huge": (dict(seq_len=2**31), ValueError, "seq_len must be below"),
    "temperature_huge": (dict(temperature=10**400), ValueError, "temperature must be finite"),
    "temperature_bool": (dict(temperature=True), TypeError, "temperature must be a number, got True"),
    "filter_kwargs_list": (dict(filter_kwargs=[1]), TypeError, "filter_kwargs must be a dictionary"),
    "generator_number": (dict(generator=3), TypeError, r"generator must be a torch\.Generator"),
    "on_token_list": (dict(on_token=[]), TypeError, "on_token must be callable"),
    "eos_bool": (dict(eos_token=True), TypeError, "eos_token must be an int, got True"),
    "lengths_text": (dict(prompts=SIX, prompt_lengths="ab"), ValueError, "2 ints, one per row"),
    "lengths_bool": (dict(prompts=SIX, prompt_lengths=[True, True]), ValueError, "2 ints, one per row"),
    "lengths_short": (dict(prompts=SIX, prompt_lengths=[1]), ValueError, "2 ints, one per row"),
    "lengths_zero": (dict(prompts=SIX, prompt_lengths=[0, 3]), ValueError, r"1 and 3, got \[0, 3\]"),
    "lengths_long": (dict(prompts=SIX, prompt_lengths=[2, 4]), ValueError, r"1 and 3, got \[2, 4\]"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "match"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=f"^generate: .*{match}"):
        build().generate(**(dict(prompts=[1, 2], seq_len=2) | arguments))


@pytest.mark.parametrize("pad_value", [-1, V, 1.5, True, None])
def test_wrong_pad_values(pad_value):
    """The model reads the pad value where a row has ended, so it must be a token."""
    model = build()
    model.decoder.pad_value = pad_value
    with pytest.raises((TypeError, ValueError), match="generate: pad_value must"):
        model.generate([[1], [2]], 3, eos_token=1)


def test_wrong_filter_arguments_are_told_before_the_work(monkeypatch):
    model = build()
    monkeypatch.setattr(type(model.transformer), "forward", None)
    for name, arguments in (("top_k", {"k": 0}), ("top_p", {"thres": 2}), ("min_p", {"min_p": math.nan})):
        with pytest.raises(ValueError, match=name):
            model.generate([1], 3, filter_logits_fn=name, filter_kwargs=arguments)


def test_caches_take_counts():
    for wrong in (-1, 2.5, True):
        with pytest.raises((TypeError, ValueError), match="Cache: capacity must"):
            Cache(wrong)
        with pytest.raises((TypeError, ValueError), match="Cache: count must"):
            Cache().keep_last(wrong)


# ---- logits that are not finite


def with_logit(model, value, step, monkeypatch):
    """The model gives `value` for one token of the last row, from its call number `step` on."""
    calls = []
    forward = type(model.transformer).forward

    def predict(self, tokens, **options):
        logits = forward(self, tokens, **options)
        calls.append(1)
        if len(calls) > step:
            logits[-1, -1, 4] = value
        return logits

    monkeypatch.setattr(type(model.transformer), "forward", predict)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("told", ["at once", "at the end"])
def test_logits_that_are_not_finite(value, temperature, told, monkeypatch):
    """A GPU reports them at the end, and no sampling before that ends the process."""
    model = build()
    if told == "at the end":
        check = _Sampler._check_finite

        class Elsewhere:
            """A tensor of another device."""

            def __init__(self, tensor):
                self.tensor, self.device = tensor, torch.device("meta")

            def __sub__(self, other):
                return self.tensor - other.tensor

        elsewhere = lambda self, requirement, largest: check(self, requirement, Elsewhere(largest))  # noqa: E731
        monkeypatch.setattr(_Sampler, "_check_finite", elsewhere)
    with_logit(model, value, 2, monkeypatch)
    heard = []
    place = "for new token 2" if told == "at once" else "one of 6 new tokens"
    with pytest.raises(ValueError, match=f"logits must be finite.* row 1 .*{place}"):
        model.generate([[1, 2], [3, 4]], 6, temperature=temperature, on_token=heard.append)
    assert len(heard) == (2 if told == "at once" else 6)
    assert model.transformer.training


@pytest.mark.parametrize(
    "bad", [lambda logits: logits - INF, lambda logits: logits * math.nan, lambda logits: logits[:, 1:], lambda _: None]
)
def test_filters_that_leave_nothing(bad):
    with pytest.raises(ValueError, match="generate: filter_logits_fn must"):
        build().generate([1], 3, filter_logits_fn=bad)


def test_tokens_may_be_removed_by_the_model():
    """A logit of -inf is not an error of a model."""
    model = build()
    first = torch.arange(9)
    model.transformer.to_logits.register_forward_hook(lambda module, _, logits: logits.index_fill(-1, first, -INF))
    assert (model.generate([1], 20) >= 9).all()


# ---- modes, in threads


class Waiting(torch.nn.Module):
    """An embedding that waits for another thread in each call, and records the mode of the model."""

    def __init__(self, embedding, meet):
        super().__init__()
        self.embedding, self.meet, self.seen = embedding, meet, []

    def forward(self, tokens):
        self.meet()
        self.seen.append(self.training)
        return self.embedding(tokens)


@pytest.mark.parametrize("fails", [False, True])
def test_the_mode_is_restored_by_the_last_of_several_calls(fails):
    model = build().train()
    model.transformer.attn_layers.layers[0].eval()
    modes = [module.training for module in model.modules()]
    barrier = threading.Barrier(2)
    turn = {"calls": 0}

    def meet():
        turn["calls"] += 1
        if turn["calls"] <= 2:
            barrier.wait(timeout=60)  # both are in the middle of a call

    waiting = Waiting(model.transformer.token_emb, meet)
    model.transformer.token_emb = waiting
    errors = []

    def work(steps, announce):
        try:
            model.generate([1, 2], steps, temperature=0, on_token=announce)
        except ZeroDivisionError as error:
            errors.append(error)

    threads = [
        threading.Thread(target=work, args=(1, (lambda _: 1 // 0) if fails else None)),
        threading.Thread(target=work, args=(30, None)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == fails and not any(waiting.seen) and len(waiting.seen) == 31
    model.transformer.token_emb = waiting.embedding
    assert [module.training for module in model.modules()] == modes


def test_models_that_share_modules_and_calls_within_calls():
    model = build().train()
    other = build().train()
    other.transformer.token_emb = model.transformer.token_emb
    model.generate([1], 2, on_token=lambda _: other.generate([2], 2))
    assert all(module.training for module in (*model.modules(), *other.modules()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_generate_in_any_mode(mode):
    model = build()
    with mode():
        found = model.generate([1, 2], 4, temperature=0)
    assert found.tolist() == greedy(model, [1, 2], 4)
    assert torch.cat((found, found)).tolist() == 2 * found.tolist()


def test_misspelt_keywords():
    with pytest.raises(TypeError, match="temprature"):
        build().generate([1], 2, temprature=1.0)
    with pytest.raises(TypeError, match="kk"):
        build().generate([1], 2, filter_kwargs={"kk": 1})


# ---- filters, against their definitions (docs/model.md#10.3)


def kept(filtered: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The positions of the remaining entries; these must be unchanged, and the others -inf."""
    left = filtered != -INF
    assert torch.equal(filtered[left], logits[left])
    return left


@hypothesis.given(num_tokens=st.integers(1, 40), k=st.none() | st.integers(1, 60), seed=st.integers(0, 999))
def test_top_k(num_tokens, k, seed):
    torch.manual_seed(seed)
    logits = torch.randn(3, num_tokens)
    left = kept(top_k(logits) if k is None else top_k(logits, k=k), logits)
    count = min(num_tokens, math.ceil(0.1 * num_tokens) if k is None else k)
    assert (left.sum(1) == count).all()
    for row, mask in zip(logits, left, strict=True):
        assert mask.all() or row[mask].min() >= row[~mask].max()


def test_top_k_keeps_k_of_equal_logits():
    assert kept(top_k(torch.zeros(2, 9), k=4), torch.zeros(2, 9)).sum(1).tolist() == [4, 4]
    assert kept(top_k(torch.zeros(1, 20), frac_num_tokens=0.5), torch.zeros(1, 20)).sum() == 10


@hypothesis.given(num_tokens=st.integers(1, 40), thres=st.floats(0, 1), seed=st.integers(0, 999))
def test_top_p(num_tokens, thres, seed):
    """An entry is removed when the larger ones have a probability above thres; float64 sums, in exact order."""
    torch.manual_seed(seed)
    logits = 3 * torch.randn(3, num_tokens, dtype=torch.float64)
    left = kept(top_p(logits, thres=thres), logits)
    for row, mask in zip(logits, left, strict=True):
        before = 0.0
        probability = row.softmax(0)
        for index in row.argsort(descending=True).tolist():
            if abs(before - thres) > 1e-12:
                assert mask[index] == (before == 0 or before <= thres)
            before += probability[index].item()


def test_top_p_at_its_ends():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0]])
    assert kept(top_p(logits, thres=0), logits).sum(1).tolist() == [1, 1]
    assert kept(top_p(logits, thres=0), logits)[0].tolist() == [False, True, False]
    assert kept(top_p(logits, thres=1), logits).all()
    spread = torch.tensor([[50.0, 0.0, 0.0]])
    assert kept(top_p(spread, thres=0.9), spread).tolist() == [[True, False, False]]
    # Halves and quarters are exact: 1/2 is not more than thres, 3/4 is.
    exact = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert kept(top_p(exact, thres=0.6), exact).tolist() == [[True, True, False, False]]


@hypothesis.given(num_tokens=st.integers(1, 40), least=st.floats(0, 1), seed=st.integers(0, 999))
def test_min_p(num_tokens, least, seed):
    torch.manual_seed(seed)
    logits = 3 * torch.randn(3, num_tokens, dtype=torch.float64)
    left = kept(min_p(logits, min_p=least), logits)
    relative = (logits - logits.amax(1, keepdim=True)).exp()
    clear = (relative - least).abs() > 1e-12
    assert torch.equal(left[clear], (relative >= least)[clear])
    assert left.gather(1, logits.argmax(1, keepdim=True)).all()


def test_min_p_at_its_ends():
    logits = torch.tensor([[1.0, 3.0, 3.0, -90.0]])
    assert kept(min_p(logits, min_p=0), logits).all()
    assert kept(min_p(logits, min_p=1), logits).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("function", (top_k, top_p, min_p))
def test_filters_leave_their_argument_alone(function):
    logits = torch.randn(2, 30)
    before = logits.clone()
    function(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("function", "arguments", "match"),
    [
        (top_k, {"k": 0}, "top_k: k must be .*got 0"),
        (top_k, {"k": 2.5}, "top_k: k must be .*got 2.5"),
        (top_k, {"frac_num_tokens": 0}, "top_k: frac_num_tokens must be .*got 0"),
        (top_k, {"frac_num_tokens": 1.5}, "top_k: frac_num_tokens must be .*got 1.5"),
        (top_p, {"thres": -0.1}, "top_p: thres must be .*got -0.1"),
        (top_p, {"thres": 1.1}, "top_p: thres must be .*got 1.1"),
        (min_p, {"min_p": 1.1}, "min_p: min_p must be .*got 1.1"),
        (min_p, {"min_p": math.nan}, "min_p: min_p must be .*got nan"),
    ],
    ids=str,
)
def test_wrong_filter_arguments(function, arguments, match):
    with pytest.raises(ValueError, match=f"^{match}"):
        function(torch.randn(1, 9), **arguments)


# ---- generate on a GPU: calls that differ in numbers on the device alone, and their graph


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
    """Takes the place of `generation._Graph`."""

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
    monkeypatch.setattr(generation, "_Graph", made)
    monkeypatch.setattr(generation, "_can_record", lambda net, device: True)
    monkeypatch.setattr(generation, "_not_recorded", weakref.WeakSet())
    monkeypatch.setattr(generation, "LEAST_STEPS", 3)
    monkeypatch.setattr(generation, "LEAST_ROOM", 16)
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


def test_few_tokens_need_no_graph(on_gpu, monkeypatch):
    monkeypatch.setattr(generation, "LEAST_STEPS", 16)
    monkeypatch.setattr(generation, "LEAST_ROOM", 256)
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
        (lambda x: (x * 2.0 + torch.ones(3, device="meta")).double().clone(), None),
        (lambda x: torch.ones(3).sum().item(), None),
    ],
    ids=str,
)
def test_what_cannot_be_recorded_is_found_before(call, found):
    """The device meta stands for a GPU."""
    with generation._HostAccess() as access, contextlib.suppress(RuntimeError, NotImplementedError):
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
        assert generation._can_record(net, cuda) and not generation._can_record(net, torch.device("cpu"))
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
            assert not generation._can_record(net, cuda)
    with unittest.mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
        assert not generation._can_record(net, cuda)


def test_wrapped_and_compiled_networks_take_ordinary_calls(on_gpu):
    model = build()
    net = model.transformer
    assert generation._has_plain_modules(net)
    assert not generation._has_plain_modules(torch.compile(net, backend="eager"))
    layer = net.attn_layers.layers[0]
    layer.compile(backend="eager")
    assert not generation._has_plain_modules(net)
    layer._compiled_call_impl = None
    net.attn_layers = torch.compile(net.attn_layers, backend="eager")
    assert not generation._has_plain_modules(net)


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
        steps = generation._Steps(model.transformer, cache, 100, True)
        logits = [steps.next(tokens[:, t : t + 1], 12 - t + 9) for t in range(9, 21)]
        steps.close()
        logits += [model(tokens[:, 21:26], cache=cache)[:, -1], model(tokens[:, 26:], cache=cache)[:, -1]]
    assert on_gpu.replays > 5 and (cache.position, cache.length) == (30, 30)
    index = [*range(9, 21), 25, 29]
    assert largest(torch.stack(logits, dim=1), model(tokens)[:, index]) <= SPLIT
