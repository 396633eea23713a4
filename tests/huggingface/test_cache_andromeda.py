"""The caches of the transformers interface: their own methods, those of transformers, and learned prefixes."""

import copy

import pytest
import torch
import transformers
from test_generation import SPLIT, V, build, largest
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import andromeda.model
from andromeda import qk_norm_rotary
from andromeda.generation import Cache
from andromeda.huggingface import AndromedaForCausalLM, AndromedaModel
from andromeda.huggingface.cache_andromeda import AndromedaCache, AndromedaStaticCache


@pytest.fixture(scope="module")
def model():
    return huggingface()


def huggingface(**options):
    return AndromedaForCausalLM.from_andromeda(build(**({"depth": 2, "max_seq_len": 60} | options))).eval()


def tokens(batch=1, seqlen=9, seed=0):
    return torch.randint(V, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


def filled(model, ids, kind=AndromedaCache, **options):
    cache = kind()
    with torch.no_grad():
        model(ids, past_key_values=cache, **options)
    return cache


KINDS = {"own": AndromedaCache, "DynamicCache": DynamicCache}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


# ---- the methods of transformers


@kinds
@torch.no_grad()
def test_crop_forgets_tokens(kind, model):
    ids, more = tokens(2, 12), tokens(2, 3, seed=1)
    cache = filled(model, ids, kind)
    assert isinstance(cache, transformers.Cache) and cache.get_seq_length() == 12 and cache.is_croppable
    cache.crop(0)
    assert cache.get_seq_length() == 12
    cache.crop(-4)
    assert cache.get_seq_length() == 8
    found = model(more, past_key_values=cache).logits
    assert largest(found, model(torch.cat((ids[:, :8], more), dim=1)).logits[:, 8:]) <= SPLIT


@kinds
@torch.no_grad()
def test_batch_entries_are_repeated_and_selected(kind, model):
    ids, more = tokens(2, 7), tokens(6, 3, seed=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    cache = filled(model, ids, kind, attention_mask=mask)
    cache.batch_repeat_interleave(3)
    assert cache.batch_size == 6
    found = model(more, past_key_values=copy.deepcopy(cache)).logits
    for row in range(6):
        alone = torch.cat((ids[row // 3, 2 * (row < 3) :], more[row]))
        assert largest(found[row], model(alone[None]).logits[0, -3:]) <= SPLIT
    for indices in (torch.tensor([0, 4]), torch.tensor([True, False, False, False, True, False])):
        some = copy.deepcopy(cache)
        some.batch_select_indices(indices)
        assert largest(model(more[[0, 4]], past_key_values=some).logits, found[[0, 4]]) <= SPLIT
    cache.reorder_cache(torch.tensor([5, 1]))
    assert largest(model(more[[5, 1]], past_key_values=cache).logits, found[[5, 1]]) <= SPLIT


@kinds
@torch.no_grad()
def test_a_cache_that_is_reset_begins_again(kind, model):
    cache = filled(model, tokens(), kind)
    cache.reset()
    assert cache.get_seq_length() == 0
    other = tokens(3, 5)
    assert largest(model(other, past_key_values=cache).logits, model(other).logits) <= SPLIT


@torch.no_grad()
def test_what_transformers_asks_a_cache(model):
    empty, cache, static = AndromedaCache(), filled(model, tokens(2)), AndromedaStaticCache(20)
    assert (empty.batch_size, cache.batch_size) == (-1, 2)
    assert (cache.get_max_length(), static.get_max_length()) == (-1, 20)
    assert cache.get_mask_sizes(3, 0) == (12, 0)
    assert not cache.is_compileable and static.is_compileable and not static.is_croppable
    assert [layer.get_seq_length() for layer in cache.layers] == [9]
    assert repr(cache) == "AndromedaCache(9 tokens)"
    with pytest.raises(NotImplementedError, match="keys alone are not the state of an Andromeda model"):
        cache.update(torch.ones(1), torch.ones(1), 0)
    with pytest.raises(NotImplementedError, match="keys alone"):
        filled(model, tokens(), DynamicCache).update(torch.ones(1), torch.ones(1), 0)


@torch.no_grad()
def test_recording_the_past_reaches_over_calls(model):
    ids = tokens(1, 30)
    for cache in (AndromedaCache(), DynamicCache()):
        if isinstance(cache, DynamicCache):
            model(ids[:, :10], past_key_values=cache)
            cache.activate_past_recording()
        else:
            cache.activate_past_recording()
            model(ids[:, :10], past_key_values=cache)
        for t in range(10, 20):
            model(ids[:, t : t + 1], past_key_values=cache)
        cache.crop(-9)
        found = model(ids[:, 11:], past_key_values=cache).logits
        assert largest(found, model(ids).logits[:, 11:]) <= SPLIT


@torch.no_grad()
def test_what_is_recorded_is_freed_by_crop(model):
    """A long prompt with a draft behind it: its rows are large, and only the draft may be dropped."""
    cache = AndromedaCache()
    cache.activate_past_recording()
    model(tokens(1, 400), past_key_values=cache)
    rows = lambda: sum(h.shape[1] for call in cache._calls for h in call.shift_rows.values()) // 4  # noqa: E731
    assert rows() == 400
    cache.crop(0)
    assert rows() == 65
    for _ in range(30):
        model(tokens(1, 9), past_key_values=cache)
        cache.crop(-7)
    assert rows() < 150 and cache.get_seq_length() == 460
    cache.crop(-50)
    with pytest.raises(ValueError, match="must drop at most"):
        cache.crop(-200)


# ---- caches that are handed in


@torch.no_grad()
def test_a_dynamic_cache_of_the_config_is_used(model):
    ids = tokens(2, 12)
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        output = model(ids[:, :5], past_key_values=cache)
        assert output.past_key_values is cache and cache.get_seq_length() == 5
        found = model(ids[:, 5:], past_key_values=cache).logits
        assert largest(found, model(ids).logits[:, 5:]) <= SPLIT


@pytest.mark.parametrize("make", (lambda model: StaticCache(model.config, 16), lambda model: AndromedaStaticCache(16)))
@torch.no_grad()
def test_a_static_cache_is_used(make, model):
    ids, mask = tokens(2, 16), torch.ones(2, 16, dtype=torch.int64)
    mask[0, :3] = 0
    whole = model(ids, attention_mask=mask).logits
    cache = make(model)
    pieces = [model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache).logits[:, 3:]]
    for start, stop in ((5, 6), (6, 7), (7, 11), (11, 12), (12, 16)):
        pieces.append(model(ids[:, start:stop], past_key_values=cache).logits)
        assert cache.get_seq_length() == stop
    assert largest(torch.cat(pieces, dim=1), whole[:, 3:]) <= SPLIT
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        model(ids[:, :2], past_key_values=cache)
    cache.reset()
    assert largest(model(ids[:1], past_key_values=cache).logits, model(ids[:1]).logits) <= SPLIT


def test_a_copy_of_a_static_cache_is_its_own(model):
    """Filled in inference mode, copied, and continued outside of it."""
    ids = tokens(2, 8)
    cache = AndromedaStaticCache(10)
    with torch.inference_mode():
        model(ids[:, :5], past_key_values=cache)
        model(ids[:, 5:6], past_key_values=cache)
    other = copy.deepcopy(cache)
    with torch.no_grad():
        for held in (cache, other):
            found = torch.cat([model(ids[:, t : t + 1], past_key_values=held).logits for t in (6, 7)], dim=1)
            assert largest(found, model(ids).logits[:, 6:]) <= SPLIT


@torch.no_grad()
def test_padding_and_a_token_shift_in_a_static_cache():
    """The first tokens after a short prompt shift what was padding before it."""
    model = huggingface(shift_tokens=3)
    ids, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.int64)
    mask[0, :4] = 0
    cache = AndromedaStaticCache(10)
    model(ids[:, :5], attention_mask=mask[:, :5], past_key_values=cache)
    found = torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(5, 10)], dim=1)
    assert largest(found[:1], model(ids[:1, 4:]).logits[:, 1:]) <= SPLIT
    assert largest(found[1:], model(ids[1:]).logits[:, 5:]) <= SPLIT


@torch.no_grad()
def test_the_first_mask_may_come_with_a_later_token_of_a_static_cache(model):
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    cache = AndromedaStaticCache(8)
    for stop in (4, 5):  # as a prompt in parts
        cache.mask_is_read = False
        found = model(
            ids[:, cache.get_seq_length() : stop], attention_mask=mask[:, :stop], past_key_values=cache
        ).logits
    rest = [model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits for t in (5, 6, 7)]
    expected = model(ids, attention_mask=mask).logits[:, 4:]
    assert largest(torch.cat((found[:, -1:], *rest), dim=1), expected) <= SPLIT


@torch.no_grad()
@pytest.mark.parametrize("kind", [AndromedaCache, lambda: AndromedaStaticCache(8)], ids=["dynamic", "static"])
def test_padding_on_the_left_may_come_in_several_calls(model, kind):
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[0, :6] = 0
    cache = kind()
    for start, stop in ((0, 3), (3, 8)):
        found = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits
    assert largest(found[:, -2:], model(ids, attention_mask=mask).logits[:, -2:]) <= SPLIT


@torch.no_grad()
def test_padding_after_tokens_of_the_cache_is_refused(model):
    cache = AndromedaCache()
    model(tokens(2, 4), attention_mask=torch.ones(2, 4), past_key_values=cache)
    mask = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 1, 1]])
    with pytest.raises(ValueError, match="padding between tokens"):
        model(tokens(2, 3), attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_what_a_static_cache_refuses(model, monkeypatch):
    with pytest.raises(ValueError, match="max_cache_len must be an int of at least 1, got 0"):
        AndromedaStaticCache(0)
    cache = filled(model, tokens(2, 5), lambda: AndromedaStaticCache(8))
    with pytest.raises(ValueError, match="must be given with the prompt where the cache is static"):
        model(tokens(2, 1), key_start=torch.zeros(2, 1, dtype=torch.int32), past_key_values=cache)
    with pytest.raises(ValueError, match="must leave room for all tokens, got 8 for 5 tokens and 4 more"):
        model(tokens(2, 4), past_key_values=cache)
    full = filled(model, tokens(2, 8), lambda: AndromedaStaticCache(8))
    with pytest.raises(ValueError, match="must leave room for all tokens, got 8 for 8 tokens and 1 more"):
        model(tokens(2, 1), past_key_values=full)
    with pytest.raises(ValueError, match="length must be 0, or minus the number of all tokens, got -1"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="number of batch entries must stay 2, got 4"):
        cache.batch_repeat_interleave(2)
    with torch.enable_grad(), pytest.raises(ValueError, match="gradients must not be recorded"):
        model(tokens(2, 2), past_key_values=cache)
    assert cache.get_seq_length() == 5
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: 16)
    cache = filled(model, tokens(1, 5), lambda: AndromedaStaticCache(20))
    with pytest.raises(ValueError, match=r"max_cache_len must be at most 16, where .* ends, got 20"):
        model(tokens(1, 1), past_key_values=cache)


def other_caches(model):
    of_another_model = StaticCache(model.config, 8)
    of_another_model.update(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8), 0)
    return {
        "of two": (EncoderDecoderCache(DynamicCache(), DynamicCache()), TypeError, "got a EncoderDecoderCache"),
        "offloaded": (DynamicCache(offloading=True), TypeError, "got a DynamicCache with offloading"),
        "static and filled": (of_another_model, ValueError, "must be empty where it is a StaticCache"),
        "tuple": (((1, 2),), TypeError, "must be a cache that this model returned, .* got tuple"),
        "few layers": (DynamicCache([prefix(1, 2, 1)[0]]), ValueError, r"= \(1, 1, 2, 8\) for each of 2 blocks, got"),
        "many heads": (DynamicCache(prefix(1, 2, heads=4)), ValueError, r"got \(1, 4, 2, 8\) in 2 blocks"),
    }


@pytest.mark.parametrize("name", ("of two", "offloaded", "static and filled", "tuple", "few layers", "many heads"))
def test_other_caches_are_refused(name, model):
    cache, error, text = other_caches(model)[name]
    with torch.no_grad(), pytest.raises(error, match=text):
        model(tokens(), past_key_values=cache)


# ---- learned prefixes


def prefix(batch, seqlen, blocks=2, heads=1):
    """Keys and values (batch, heads, seqlen, head_dim) of each block, as prefix tuning makes them."""
    generator = torch.Generator().manual_seed(5)
    sizes = batch, heads, seqlen, 8
    return [tuple(torch.randn(sizes, generator=generator).double() for _ in range(2)) for _ in range(blocks)]


@pytest.mark.parametrize("flags", ({}, {"deepnorm": False, "shift_tokens": 2}, {"rotary_xpos": False}), ids=str)
@pytest.mark.parametrize("segment", (16, 8192))
def test_a_filled_cache_is_a_learned_prefix_with_gradients(flags, segment, monkeypatch):
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: segment)
    model = huggingface(**flags).requires_grad_(False)
    ids = tokens(2, 6)
    flat = [tensor.requires_grad_() for pair in prefix(2, 3) for tensor in pair]

    def loss(*tensors):
        cache = DynamicCache([tensors[:2], tensors[2:]])
        return model(ids, past_key_values=cache, labels=ids).loss

    assert torch.autograd.gradcheck(loss, flat, fast_mode=True)
    assert not torch.equal(loss(*flat), model(ids, labels=ids).loss)


@torch.no_grad()
def test_tokens_after_a_prefix_may_come_in_pieces(model):
    ids = tokens(2, 9)
    whole = model(ids, past_key_values=DynamicCache(prefix(2, 3))).logits
    cache = DynamicCache(prefix(2, 3))
    pieces = []
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        pieces.append(model(ids[:, start:stop], past_key_values=cache).logits)
        assert cache.get_seq_length() == 3 + stop
    assert largest(torch.cat(pieces, dim=1), whole) <= SPLIT
    cache.crop(-4)
    assert largest(model(ids[:, 5:], past_key_values=cache).logits, whole[:, 5:]) <= SPLIT


@torch.no_grad()
def test_a_prefix_does_not_depend_on_the_origin_of_xpos(monkeypatch):
    """Its keys have the xPos factors of the place where it ends, wherever the segments begin."""
    model = huggingface(alibi_pos_bias=False)
    found = []
    for segment in (8, 64, 8192):
        monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype, length=segment: length)
        found.append(model(tokens(2, 20), past_key_values=DynamicCache(prefix(2, 3))).logits)
    assert largest(found[0], found[1]) <= SPLIT and largest(found[0], found[2]) <= SPLIT
    assert largest(found[0], model(tokens(2, 20)).logits) > 1e-3


@torch.no_grad()
def test_the_first_token_sees_a_prefix_as_it_was_learned(model):
    """xPos counts from the end of the prefix: there neither queries nor keys are shrunk."""
    seqlen, inputs = 40, []
    attention = model.transformer.attn_layers.layers[0].fn
    hook = attention.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    cache = DynamicCache(prefix(1, seqlen))
    weights = model(tokens(1, 1), past_key_values=cache, output_attentions=True).attentions[0]
    hook.remove()
    config = attention.config
    q, k = (map_(inputs[0]).view(1, 1, -1, config.dim_head) for map_ in (attention.to_q, attention.to_k))
    scales = {"q_scale": attention.q_scale.squeeze(1), "k_scale": attention.k_scale.squeeze(1)}
    q, _ = qk_norm_rotary(q, k, **scales, rotary_dim=config.rotary_dim, position=seqlen, origin=seqlen)
    learned = prefix(1, seqlen)[0][0]
    scores = config.softmax_scale * (q.transpose(1, 2) @ learned.transpose(2, 3))[0, :, 0]  # (num_heads, seqlen)
    distance = seqlen - torch.arange(seqlen)
    scores = scores - torch.tensor(config.alibi_slopes)[:, None] * distance
    found = weights[0, :, 0, :seqlen]
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), scores.softmax(-1), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_keys_of_a_prefix_may_be_long():
    """They have no norm, so that the bound of the other scores does not hold for them."""
    ids, exact = tokens(2, 6), huggingface()
    long = [(200 * keys, values) for keys, values in prefix(2, 3)]
    found = huggingface().float()(ids, past_key_values=DynamicCache([(k.float(), v.float()) for k, v in long])).logits
    torch.testing.assert_close(found.double(), exact(ids, past_key_values=DynamicCache(long)).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_cache_that_was_reset_is_new(model):
    """It has forgotten the mask, and that it ended with padding."""
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    cache = DynamicCache(prefix(2, 3))
    model(ids, attention_mask=torch.nn.functional.pad(mask, (3, 0), value=1), past_key_values=cache)
    state = cache.layers[0].cache
    state.reset()
    assert largest(model(ids, past_key_values=state).logits, model(ids).logits) <= SPLIT
    state.reset()
    mask = mask.flip(1)
    found = model(ids, attention_mask=mask, past_key_values=state).logits
    assert largest(found[1, 2:], model(ids[1:, 2:]).logits[0]) <= SPLIT
    state.reset()
    model(ids[:, :4], past_key_values=state)
    found = model(ids[:, 4:], attention_mask=mask, past_key_values=state).logits  # the first mask, though a late one
    assert largest(found[1], model(ids[1:]).logits[0, 4:]) > 1e-6
    assert largest(found[0], model(ids[:1]).logits[0, 4:]) <= SPLIT


@torch.no_grad()
def test_a_call_that_fails_has_not_read_the_mask(model, monkeypatch):
    ids, mask = tokens(2, 6), torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    found = []
    for fails in (True, False):
        cache = filled(model, ids[:, :4])
        if fails:
            with monkeypatch.context() as patch, pytest.raises(MemoryError):
                patch.setattr(AndromedaModel, "decode", lambda *args, **options: (_ for _ in ()).throw(MemoryError))
                model(ids[:, 4:], attention_mask=mask, past_key_values=cache)
        found.append(model(ids[:, 4:], attention_mask=mask, past_key_values=cache).logits)
    assert torch.equal(*found)


@torch.no_grad()
def test_rows_of_a_static_cache_change_places_with_their_padding(model):
    ids, more, swapped = tokens(2, 6), tokens(2, 2, seed=1), torch.tensor([1, 0])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    found = []
    for cache in (AndromedaStaticCache(12), AndromedaCache()):
        model(ids, attention_mask=mask, past_key_values=cache)
        model(more[:, :1], past_key_values=cache)
        cache.reorder(swapped)
        found.append(model(more[:, 1:], past_key_values=cache).logits)
    alone = [model(torch.cat((ids[row, mask[row] == 1], more[row, :1], more[1 - row, 1:]))[None]) for row in (1, 0)]
    assert largest(found[0], found[1]) <= SPLIT
    assert largest(found[0][:, 0], torch.cat([out.logits[:, -1] for out in alone])) <= SPLIT


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("shift_tokens", [1, 2])
def test_documents_and_padding_in_later_calls(shift_tokens, recorded):
    """Padding of the first call stays hidden, from the token shift, too; a document may begin in a later call."""
    model = huggingface(shift_tokens=shift_tokens)
    ids = tokens(2, 12)
    padding = torch.tensor([4, 0])
    mask = (torch.arange(12) >= padding[:, None]).long()
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])  # of the last eight tokens
    with torch.set_grad_enabled(recorded):
        cache = AndromedaCache()
        first = model(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache, use_cache=True).logits
        second = model(
            ids[:, 4:], attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits
    found = torch.cat((first, second), dim=1)
    for row, hidden in enumerate(padding.tolist()):
        for begin, end in ((hidden, 9), (9, 12)):
            alone = model(ids[row : row + 1, begin:end]).logits[0]
            assert largest(found[row, begin:end], alone) <= SPLIT


def test_a_later_call_leaves_what_gradients_need(monkeypatch):
    """It moves the stored keys to the next xPos segment, of which autograd holds the old ones."""
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: 16)
    model = huggingface()
    ids, parameter = tokens(1, 24), model.transformer.token_emb.weight

    def gradient(later):
        cache = AndromedaCache()
        model(ids[:, :8], past_key_values=cache, use_cache=True)
        loss = model(ids[:, 8:16], past_key_values=cache, use_cache=True).logits.square().mean()
        if later:
            with torch.no_grad():
                model(ids[:, 16:], past_key_values=cache)
        return torch.autograd.grad(loss, parameter)[0]

    assert torch.equal(gradient(later=True), gradient(later=False))


@torch.no_grad()
def test_padding_on_the_right_after_a_prefix():
    """A batch of training: its rows end at different places, and no token may follow."""
    model = huggingface()
    ids, mask = tokens(2, 7), torch.ones(2, 10, dtype=torch.int64)
    mask[1, -3:] = 0
    cache = DynamicCache(prefix(2, 3))
    found = model(ids, attention_mask=mask, past_key_values=cache, labels=ids).logits
    alone = model(ids[1:, :4], past_key_values=DynamicCache([(k[1:], v[1:]) for k, v in prefix(2, 3)])).logits
    assert largest(found[1:, :4], alone) <= SPLIT
    with pytest.raises(ValueError, match="no call may follow one with padding on the right"):
        model(ids[:, :1], past_key_values=cache)


# ---- gradients


def test_use_cache_while_gradients_are_recorded():
    model = huggingface()
    ids = tokens(2, 12)
    expected = torch.autograd.grad(model(ids).logits.square().sum(), list(model.parameters()))
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], past_key_values=first.past_key_values)
    loss = first.logits.square().sum() + second.logits.square().sum()
    for one, other in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        assert largest(one, other) <= SPLIT * max(1, other.abs().max().item())


def test_gradient_checkpointing_makes_no_cache():
    model = huggingface().train()
    model.gradient_checkpointing_enable()
    assert model(tokens(), use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="cache must be None with activation checkpointing"):
        model(tokens(), past_key_values=AndromedaCache())
    with torch.no_grad():  # nothing is checkpointed, for example where a trainer shows what the model writes
        ids = tokens(2, 8)
        found = model(ids[:, 5:], past_key_values=model(ids[:, :5]).past_key_values)
        assert largest(found.logits, model(ids).logits[:, 5:]) <= SPLIT


def test_the_model_without_a_head_takes_the_same_caches():
    model = AndromedaModel(huggingface().config).eval()
    ids = tokens(2, 8)
    with torch.no_grad():
        cache = DynamicCache()
        first = model(ids[:, :5], past_key_values=cache)
        assert first.past_key_values is cache
        plain = Cache()
        model(ids[:, :5], past_key_values=plain)
        expected = model(ids).last_hidden_state[:, 5:]
        for held in (cache, plain):
            found = model(ids[:, 5:], past_key_values=held).last_hidden_state
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
