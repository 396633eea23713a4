"""Cached calls: any split, going back, padding, segments, windows, reordering, gradients (docs/model.md#10.1)."""

import copy
import itertools

import hypothesis
import oracle
import pytest
import torch
from hypothesis import strategies as st
from test_generation import FLAGS, SPLIT, V, build, in_pieces, largest, with_flags

import andromeda.model
from andromeda import Andromeda
from andromeda.generation import Cache

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


# ---- going back


def continued(model, cache, tokens):
    """Logits of the tokens, one call each."""
    return torch.cat([model(tokens[:, t : t + 1], cache=cache) for t in range(tokens.shape[1])], dim=1)


@hypothesis.given(
    flags=switches,
    work=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4),
    padding=st.lists(st.integers(0, 3), min_size=1, max_size=3),
    segment=st.sampled_from((24, 8192)),
)
@hypothesis.settings(max_examples=40)
def test_dropped_tokens_leave_no_trace(flags, work, padding, segment):
    """Calls that are dropped again, in part or as a whole, then the tokens that stay: the logits of one call."""
    model = build(heads=3, **flags)
    tokens = torch.randint(V, (len(padding), 40))
    key_start = torch.tensor(padding, dtype=torch.int32)[:, None].expand(-1, 40)
    whole = model(tokens, key_start=key_start)
    cache = Cache(rollback=20)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(andromeda.model, "segment_length", lambda dtype: segment)
        model(tokens[:, :4], cache=cache, key_start=key_start[:, :4])
        for seqlen, dropped in work:
            last = cache.position
            wrong = torch.randint(V, (len(padding), dropped))
            logits = model(torch.cat((tokens[:, last : last + seqlen], wrong), dim=1), cache=cache)
            for row, padded in enumerate(padding):
                found, expected = logits[row, :seqlen], whole[row, last : last + seqlen]
                first = max(padded - last, 0)
                assert largest(found[first:], expected[first:]) <= SPLIT
            cache.crop(-dropped)
            assert cache.position == cache.length == last + seqlen


@with_flags
def test_a_dropped_call_is_undone_to_the_bit(flags):
    model = build(**flags)
    tokens, dropped, more = (torch.randint(V, (2, n)) for n in (9, 7, 3))
    cache = Cache()
    with torch.no_grad():
        model(tokens, cache=cache)
        expected = continued(model, copy.deepcopy(cache), more)
        model(dropped, cache=cache)
        cache.crop(9)
        assert torch.equal(continued(model, cache, more), expected)


@pytest.mark.parametrize("deepnorm", (True, False))
def test_going_back_over_several_calls(deepnorm):
    """A draft model writes one token at a time, all of which may be dropped."""
    model = build(shift_tokens=2, deepnorm=deepnorm)
    tokens, more = torch.randint(V, (1, 30)), torch.randint(V, (1, 3))
    cache, fresh = Cache(rollback=12), Cache()
    with torch.no_grad():
        model(tokens[:, :10], cache=cache)
        continued(model, cache, tokens[:, 10:])
        cache.crop(-12)
        model(tokens[:, :10], cache=fresh)
        continued(model, fresh, tokens[:, 10:18])
        assert torch.equal(continued(model, cache, more), continued(model, fresh, more))


def test_going_back_to_a_document_before():
    """Each token has the key_start of its own document again."""
    model = build(shift_tokens=2)
    tokens, more = torch.randint(V, (1, 12)), torch.randint(V, (1, 4))
    key_start = torch.tensor([[0] * 5 + [5] * 4 + [9] * 3], dtype=torch.int32)
    cache = Cache()
    with torch.no_grad():
        model(tokens, cache=cache, key_start=key_start)
        cache.crop(-4)
        logits = model(more, cache=cache)
        assert largest(logits, model(torch.cat((tokens[:, 5:8], more), dim=1))[:, 3:]) <= SPLIT


@pytest.mark.parametrize("recorded", (False, True))
def test_going_back_after_a_reorder(recorded):
    """All state of a batch entry moves with it, also where autograd holds the memory."""
    model, index = build(shift_tokens=2), [2, 0, 0]
    tokens, more = torch.randint(V, (3, 9)), torch.randint(V, (3, 4))
    padding = torch.tensor([0, 2, 4])
    cache = Cache()
    with torch.set_grad_enabled(recorded):
        model(tokens, cache=cache, key_start=padding[:, None].expand(3, 9))
        cache.reorder(torch.tensor(index))
        cache.crop(-2)
        logits = model(more, cache=cache)
        for row, old in enumerate(index):
            alone = model(torch.cat((tokens[old : old + 1, padding[old] : 7], more[row : row + 1]), dim=1))
            assert largest(logits[row : row + 1], alone[:, -4:]) <= SPLIT


def test_going_back_to_the_start():
    """A cache without tokens takes another batch, padding and dtype."""
    model = build()
    cache = Cache()
    with torch.no_grad():
        model([[1, 2, 3]], cache=cache, key_start=torch.ones(1, 3, dtype=torch.int32))
        cache.crop(-99)
        assert (cache.position, cache.length, cache.key_start) == (0, 0, None)
        tokens = torch.randint(V, (2, 6))
        assert largest(model(tokens, cache=cache), model(tokens)) <= SPLIT
        cache.crop(-6)
        model.float()(tokens, cache=cache)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16))
def test_going_back_over_the_end_of_a_segment(dtype, monkeypatch):
    """The keys stay in the later segment. In float16 an error of 2**-11 per step is what every call makes."""
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: 64)
    model = build(depth=2, alibi_pos_bias=False).to(dtype)
    tokens = torch.randint(V, (1, 100))
    cache = Cache(rollback=20)
    with torch.no_grad():
        whole = model(tokens)
        model(tokens[:, :60], cache=cache)
        model(torch.randint(V, (1, 12)), cache=cache)
        cache.crop(-15)
        logits = torch.cat((model(tokens[:, 57:62], cache=cache), continued(model, cache, tokens[:, 62:])), dim=1)
    assert largest(logits, whole[:, 57:]) <= (SPLIT if dtype == torch.float64 else 0.02 * whole.abs().max())


def test_what_cannot_be_undone_is_refused_and_changes_nothing(monkeypatch):
    model = build()
    tokens = torch.randint(V, (1, 90))
    cache = Cache()
    with torch.no_grad():
        model(tokens[:, :80], cache=cache)
        continued(model, cache, tokens[:, 80:85])
        with pytest.raises(ValueError, match=r"must drop at most the 1 last .* 85 tokens, which drops 3"):
            cache.crop(-3)
        assert cache.position == 85
        assert largest(continued(model, cache, tokens[:, 85:]), model(tokens)[:, 85:]) <= SPLIT
        cache.keep_last(2)
        with pytest.raises(ValueError, match=r"with 2 of 90 stored"):
            cache.crop(80)
    for wrong in (1.0, True, None):
        with pytest.raises(TypeError, match=r"^Cache: length must be an int, got"):
            cache.crop(wrong)


def test_keys_that_were_moved_far_are_not_taken_back(monkeypatch):
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: 16)
    model = build(shift_tokens=0)
    tokens = torch.randint(V, (1, 40))
    cache = Cache()
    with torch.no_grad():
        model(tokens, cache=cache)
        with pytest.raises(ValueError, match=r"^Cache: length must keep at least 24 tokens, got 23: .* from 32 on"):
            cache.crop(23)
        cache.crop(24)
        assert largest(model(tokens[:, 24:], cache=cache), model(tokens)[:, 24:]) <= SPLIT


def test_what_is_kept_to_go_back_is_little():
    """After a long call and many short ones, the rows of the last token and of the token shift."""
    model = build(shift_tokens=2)
    cache = Cache()
    with torch.no_grad():
        model(torch.randint(V, (1, 200)), cache=cache)
        assert sum(call.seqlen for call in cache._calls) == 66
        continued(model, cache, torch.randint(V, (1, 5)))
        assert sum(call.seqlen for call in cache._calls) == 3


# ---- gradients


@with_flags
@pytest.mark.parametrize("segment", (8, 8192))
def test_gradients_flow_through_earlier_calls(flags, segment, monkeypatch):
    model = build(**flags)
    tokens = torch.randint(V, (2, 20))
    key_start = torch.tensor([[0], [3]], dtype=torch.int32).expand(2, 20)
    weight = torch.randn(2, 20, V, dtype=torch.float64)
    weight[1, :3] = 0
    parameters = list(model.parameters())
    expected = torch.autograd.grad((model(tokens, key_start=key_start) * weight).sum(), parameters, allow_unused=True)
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: segment)
    cache, logits = Cache(), []
    for start, stop in ((0, 6), (6, 7), (7, 9), (9, 20)):
        logits.append(model(tokens[:, start:stop], cache=cache, key_start=key_start[:, start:stop]))
    found = torch.autograd.grad((torch.cat(logits, dim=1) * weight).sum(), parameters, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert largest(one, other) <= SPLIT * max(1, other.abs().max().item())


def test_gradients_after_a_prompt_without():
    """The prompt is a constant: only the later tokens give gradients, and dropping tokens does not spoil them."""
    model = build()
    model.transformer.attn_layers.layers[0].fn.to_k.requires_grad_(False)
    tokens = torch.randint(V, (1, 14))
    cache = Cache()
    with torch.no_grad():
        model(tokens[:, :8], cache=cache)
    constant = copy.deepcopy(cache)
    first = model(tokens[:, 8:12], cache=cache)
    kept = copy.copy(first)
    cache.crop(-1)
    with torch.no_grad():
        model(tokens[:, 11:], cache=cache)  # writes where the dropped token was
    first.sum().backward()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    again = model(tokens[:, 8:12], cache=constant)
    again.sum().backward()
    assert torch.equal(kept, again)
    assert all(map(torch.equal, found, [p.grad for p in model.parameters() if p.grad is not None]))


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


def test_training_on_a_loss_with_a_cache_is_refused():
    model = build()
    with pytest.raises(ValueError, match=r"cache and logits_to_keep must be left out with return_loss=True"):
        model([[1, 2]], return_loss=True, cache=Cache())
    model.transformer.attn_layers.gradient_checkpointing = True
    with pytest.raises(ValueError, match=r"^Decoder: cache must be None with activation checkpointing"):
        model.train()([[1, 2]], cache=Cache())


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


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(90, 3), (40, 40, 3), (3, 90)], ids=str)
def test_each_crop_is_right_or_refused(lengths):
    """Rows of the token shift are kept for the last tokens alone; no crop goes on without them."""
    model = build(depth=1, shift_tokens=2, max_seq_len=128).eval()
    total = sum(lengths)
    tokens = torch.randint(model.config.num_tokens, (1, total + 2), generator=torch.Generator().manual_seed(3))
    cache, start = Cache(), 0
    for length in lengths:
        model(tokens[:, start : start + length], cache=cache)
        start += length
    whole, refused = model(tokens[:, :total]), 0
    for count in range(1, total):
        other = copy.deepcopy(cache)
        try:
            other.crop(-count)
        except ValueError:
            refused += 1
            continue
        kept = total - count
        assert other.position == kept
        assert largest(model(tokens[:, kept : kept + 1], cache=other)[:, 0], whole[:, kept]) <= SPLIT
    assert refused > 0
