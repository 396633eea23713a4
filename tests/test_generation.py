"""Cached calls and sampling (SPEC 10): the cache equals one call for any split, `generate` does what it says."""

import math

import golden
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model import golden_model, largest, small

import andromeda.model
from andromeda.generation import Cache, generate, min_p, top_k, top_p

MODEL_FLAGS = st.fixed_dictionaries(
    {
        "use_abs_pos_emb": st.booleans(),
        "alibi_pos_bias": st.booleans(),
        "rotary_xpos": st.booleans(),
        "deepnorm": st.booleans(),
        "shift_tokens": st.integers(0, 3),
        "attn_one_kv_head": st.booleans(),
        "qk_norm": st.booleans(),
        "attn_qk_norm_dim_scale": st.booleans(),
        "heads": st.integers(1, 3),
        "alibi_num_heads": st.sampled_from([None, 0, 1]),
        "depth": st.integers(1, 2),
    }
)


def split_calls(model, tokens, lengths, key_start=None) -> torch.Tensor:
    """Logits of consecutive cached calls of the given lengths."""
    cache, logits, begin = Cache(), [], 0
    for length in lengths:
        end = begin + length
        start = None if key_start is None else key_start[:, begin:end]
        with torch.no_grad():
            logits.append(model(tokens[:, begin:end], cache=cache, key_start=start))
        begin = end
    assert begin == tokens.shape[1] == cache.position
    return torch.cat(logits, dim=1)


# ---- the cache


@settings(max_examples=60)
@given(flags=MODEL_FLAGS, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_any_split_equals_one_call(flags, lengths, seed):
    torch.manual_seed(seed)
    model = small(**flags, max_seq_len=80).double()
    oracle.perturb(model)
    tokens = torch.randint(23, (2, sum(lengths)))
    assert largest(split_calls(model, tokens, lengths), model(tokens)) <= 1e-10


@settings(max_examples=30)
@given(flags=MODEL_FLAGS, lengths=st.lists(st.integers(1, 6), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_any_split_of_padded_rows(flags, lengths, seed):
    """Left-padded rows in one batch, prefilled and continued in any pieces, each equal to the row alone."""
    torch.manual_seed(seed)
    model = small(**flags, max_seq_len=80).double()
    oracle.perturb(model)
    n = sum(lengths)
    padding = [0, seed % lengths[0]]
    tokens = torch.randint(23, (2, n))
    key_start = torch.tensor(padding, dtype=torch.int32)[:, None].expand(2, n)
    logits = split_calls(model, tokens, lengths, key_start)
    for row, pad in enumerate(padding):
        assert largest(logits[row, pad:], model(tokens[row : row + 1, pad:])[0]) <= 1e-10


@settings(max_examples=15)
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=6), length=st.sampled_from([16, 23]))
def test_any_split_across_segments(lengths, length):
    """The stored keys follow the xPos origin from segment to segment."""
    with pytest.MonkeyPatch.context() as patch:
        model = small(depth=2).double()
        oracle.perturb(model)
        tokens = torch.randint(23, (2, sum(lengths)))
        whole = model(tokens)
        patch.setattr(andromeda.model, "segment_length", lambda dtype: length)
        assert largest(split_calls(model, tokens, lengths), whole) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_split_in_working_precision(dtype):
    model = small(depth=2, dim=32, dim_head=16).to(dtype)
    exact = small(depth=2, dim=32, dim_head=16).double()
    exact.load_state_dict(model.state_dict())
    tokens = torch.randint(23, (2, 300))
    error = (split_calls(model, tokens, [200, 1, 1, 97, 1]).double() - exact(tokens)).abs()
    limits = (2e-5, 2e-5) if dtype == torch.float32 else (5e-2, 1e-2)
    assert error.max() <= limits[0] and error.mean() <= limits[1]


@pytest.mark.parametrize("name", golden.CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_golden_decode(name, dtype):
    model, description, tensors = golden_model(name, dtype)
    tokens, prefill = tensors["tokens"], description["decode"]["prefill"]
    # The stored rows are float64 results rounded to float32, or the oracle's own cache in float32.
    limit = 2e-5 if dtype == torch.float32 else 1e-6
    lengths = [prefill] + [1] * (tokens.shape[1] - prefill)
    logits = split_calls(model, tokens, lengths)
    assert largest(logits[:, -tensors["decode/logits"].shape[1] :], tensors["decode/logits"]) <= limit
    assert largest(logits, model(tokens)) <= (2e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("name", golden.CASES)
@pytest.mark.parametrize("cache_kv", [True, False])
def test_golden_greedy(name, cache_kv):
    model, description, tensors = golden_model(name, torch.float32)
    expected = tensors["greedy/tokens"]
    prompt = tensors["tokens"][:, : description["greedy"]["prompt_len"]]
    assert torch.equal(model.generate(prompt, expected.shape[1], temperature=0, cache_kv=cache_kv), expected)


@pytest.mark.parametrize("name", golden.CASES)
def test_golden_filters(name):
    _, tensors = golden.load(name)
    last = tensors["logits"][:, -1]
    assert torch.equal(top_k(last), tensors["filters/top_k_default"])
    assert torch.equal(top_k(last, k=5), tensors["filters/top_k_5"])
    assert torch.equal(top_p(last, thres=0.9), tensors["filters/top_p_0.9"])
    assert torch.equal(min_p(last, min_p=0.1), tensors["filters/min_p_0.1"])


def test_reorder_moves_every_piece_of_state():
    model = small(depth=2, shift_tokens=2).double()
    tokens = torch.randint(23, (3, 9))
    order = torch.tensor([2, 0, 0, 1])
    cache = Cache()
    with torch.no_grad():
        model(tokens[:, :6], cache=cache, key_start=torch.tensor([[0], [2], [3]], dtype=torch.int32).expand(3, 6))
        cache.reorder(order)
        out = model(tokens[order, 6:], cache=cache)
    start = torch.tensor([[0], [2], [3]], dtype=torch.int32).expand(3, 9)
    assert largest(out, model(tokens, key_start=start)[order, 6:]) <= 1e-12


def test_failed_call_leaves_the_cache():
    model = small(depth=2).double()
    tokens = torch.randint(23, (1, 9))
    cache = Cache()
    with torch.no_grad():
        model(tokens[:, :5], cache=cache)
        with pytest.raises(ValueError, match="batch"):
            model(tokens[:, 5:].repeat(2, 1), cache=cache)
        with pytest.raises(ValueError, match="vocabulary"):
            model([[99]], cache=cache)
        out = model(tokens[:, 5:], cache=cache)
    assert largest(out, model(tokens)[:, 5:]) <= 1e-12


def test_cache_refuses_gradients():
    with pytest.raises(ValueError, match=r"cache must be None where gradients are recorded.*no_grad"):
        small()([1, 2], cache=Cache())


# ---- generate


def greedy(model, row, count, window) -> list[int]:
    """Arg-max continuation by the plain forward pass on the last `window` tokens."""
    row = list(row)
    for _ in range(count):
        row.append(int(model([row[-window:]])[0, -1].argmax()))
    return row[-count:]


@pytest.mark.parametrize("use_abs_pos_emb", [False, True])
def test_greedy_is_recomputation(use_abs_pos_emb):
    model = small(depth=2, use_abs_pos_emb=use_abs_pos_emb).double()
    prompt = torch.randint(23, (7,))
    expected = greedy(model, prompt.tolist(), 12, 48)
    assert model.generate(prompt, 12, temperature=0).tolist() == expected
    assert model.generate(prompt.tolist(), 12, temperature=0, cache_kv=False).tolist() == expected


def test_rows_of_different_lengths_equal_rows_alone():
    model = small(depth=2).double()
    rows = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]
    out = model.generate(rows, 10, temperature=0)
    assert out.shape == (3, 10)
    for row, continuation in zip(rows, out, strict=True):
        assert torch.equal(model.generate(row, 10, temperature=0), continuation)
    padded = torch.tensor([[1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 7], [0, 0, 0, 8, 9, 10]])
    assert torch.equal(model.generate(padded, 10, temperature=0, prompt_lengths=[6, 1, 3]), out)


def test_window_without_cache_is_exact():
    model = small(max_seq_len=6).double()
    prompt = torch.randint(23, (9,))
    assert model.generate(prompt, 8, temperature=0, cache_kv=False).tolist() == greedy(model, prompt.tolist(), 8, 6)


def test_window_with_cache_drops_the_oldest():
    """One layer: dropped keys are the only difference, and a window of M keys sees M - 1 stored ones and its own."""
    model = small(max_seq_len=6, shift_tokens=0, depth=1).double()
    prompt = torch.randint(23, (4,))
    assert torch.equal(
        model.generate(prompt, 14, temperature=0), model.generate(prompt, 14, temperature=0, cache_kv=False)
    )


def test_beyond_the_window_when_unrestricted():
    model = small(max_seq_len=6).double()
    prompt = torch.randint(23, (4,))
    out = model.generate(prompt, 12, temperature=0, restrict_to_max_seq_len=False)
    assert out.tolist() == greedy(model, prompt.tolist(), 12, 100)


def test_absolute_positions_end():
    model = small(max_seq_len=8, use_abs_pos_emb=True)
    assert model.generate([1, 2, 3], 6, temperature=0).shape == (6,)
    with pytest.raises(ValueError, match=r"max_seq_len=8.*cache_kv=False"):
        model.generate([1, 2, 3], 7, temperature=0)
    assert model.generate([1, 2, 3], 20, temperature=0, cache_kv=False).shape == (20,)


def test_eos_ends_rows():
    model = small().double()
    tokens = torch.randint(23, (4, 5))
    free = model.generate(tokens, 12, temperature=0)
    eos = int(free[0, 3])
    out = model.generate(tokens, 12, temperature=0, eos_token=eos)
    for row, expected in zip(out.tolist(), free.tolist(), strict=True):
        if eos in expected:
            end = expected.index(eos) + 1
            expected = expected[:end] + [0] * (12 - end)
        assert row == expected[: len(row)] and not any(expected[len(row) :])


def test_eos_in_the_prompt_does_not_stop():
    """SPEC 13.8: only generated tokens count."""
    model = small().double()
    free = model.generate([5, 6, 7], 6, temperature=0)
    eos = next(token for token in range(23) if token not in free.tolist())
    assert torch.equal(model.generate([eos, 6, 7], 6, temperature=0, eos_token=eos)[:1],
                       model.generate([eos, 6, 7], 6, temperature=0)[:1])  # fmt: skip
    assert model.generate([eos, 6, 7], 6, temperature=0, eos_token=eos).shape[0] > 1


def test_sampling_is_repeatable_and_filtered():
    model = small()
    prompt = torch.randint(23, (2, 5))
    draws = [model.generate(prompt, 6, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    one = model.generate(prompt, 6, filter_logits_fn="top_k", filter_kwargs={"k": 1})
    assert torch.equal(one, model.generate(prompt, 6, temperature=0))
    assert torch.equal(model.generate(prompt, 6, temperature=1e-6), one)
    custom = model.generate(
        prompt, 6, filter_logits_fn=lambda logits, keep: top_k(logits, keep), filter_kwargs={"keep": 1}
    )
    assert torch.equal(custom, one)


def test_sampling_follows_the_distribution():
    """The filter sees logits, the temperature comes after it; frequencies of 4000 draws within five deviations."""
    model = small()
    prompt = torch.tensor([[4, 5]]).repeat(4000, 1)
    draws = model.generate(prompt, 1, temperature=0.7, filter_kwargs={"k": 6})[:, 0]
    logits = top_k(model(prompt[:1])[:, -1], k=6)[0]
    expected = (logits / 0.7).softmax(-1).double()
    observed = torch.bincount(draws, minlength=23) / 4000
    assert ((observed - expected).abs() <= 5 * (expected * (1 - expected) / 4000).sqrt()).all()


def test_mode_is_restored():
    model = small().train()
    model.generate([1, 2], 2)
    assert all(module.training for module in model.modules())

    def fail(logits):
        raise RuntimeError("filter failed")

    with pytest.raises(RuntimeError, match="filter failed"):
        model.generate([1, 2], 2, filter_logits_fn=fail)
    assert all(module.training for module in model.modules())


def test_streaming_and_nothing():
    model = small()
    seen = []
    out = model.generate([1, 2], 4, temperature=0, on_token=lambda new: seen.append(int(new)))
    assert seen == out.tolist()
    assert model.generate([[1, 2]], 0).shape == (1, 0)
    assert torch.equal(generate(model.transformer, [1, 2], 4, temperature=0), out)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(seq_len=-1), ValueError, "seq_len"),
        (dict(seq_len=2.0), TypeError, "seq_len"),
        (dict(temperature=-1), ValueError, "temperature"),
        (dict(temperature=math.nan), ValueError, "temperature"),
        (dict(temperature="hot"), TypeError, "temperature"),
        (dict(filter_logits_fn="top_q"), ValueError, "'top_k', 'top_p', 'min_p'"),
        (dict(filter_logits_fn=3), TypeError, "filter_logits_fn"),
        (dict(eos_token=23), ValueError, "vocabulary size 23"),
        (dict(eos_token="x"), TypeError, "eos_token"),
        (dict(prompts=[]), ValueError, "at least one token"),
        (dict(prompts=[[1], []]), ValueError, "empty row 1"),
        (dict(prompts=[40]), ValueError, "40"),
        (dict(prompts=torch.tensor([[1, 2]]), prompt_lengths=[3]), ValueError, "prompt_lengths"),
        (dict(unknown=1), TypeError, "unknown"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_calls(arguments, error, match):
    with pytest.raises(error, match=match):
        small().generate(**({"prompts": [1, 2], "seq_len": 2} | arguments))


# ---- filters


def test_top_k_keeps_the_largest():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    assert top_k(logits, k=2).tolist() == [[-math.inf, 3.0, 2.0, -math.inf]]
    assert torch.equal(top_k(logits, k=9), logits)
    assert top_k(torch.zeros(1, 25)).isfinite().sum() == 3  # ceil(0.1 * 25), ties cut to the count


def test_top_p_keeps_until_the_threshold_is_exceeded():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert top_p(logits, thres=0.6).isfinite().tolist() == [[True, True, False, False]]
    assert top_p(logits, thres=0.0).isfinite().tolist() == [[True, False, False, False]]
    assert top_p(logits, thres=1.0).isfinite().all()


def test_min_p_is_relative_to_the_largest():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    assert min_p(logits, min_p=0.4).isfinite().tolist() == [[True, True, False]]
    assert min_p(logits, min_p=0.0).isfinite().all()


@pytest.mark.parametrize(
    ("function", "arguments"), [(top_k, dict(k=0)), (top_k, dict(frac_num_tokens=0.0)), (top_p, dict(thres=2)),
                                (min_p, dict(min_p=-1))]
)  # fmt: skip
def test_filters_refuse(function, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        function(torch.zeros(1, 4), **arguments)
