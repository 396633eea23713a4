"""Cached calls, sampling and filters (docs/model.md#10, #13.8)."""

import math
import threading

import golden_cases
import hypothesis
import oracle
import pytest
import torch
from hypothesis import strategies as st

from andromeda import Andromeda
from andromeda.generation import Cache, _Sampler, min_p, top_k, top_p

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
