"""transformers' `generate` on an Andromeda model: each mode with each cache gives the tokens of no cache at all."""

import copy
import string

import pytest
import tokenizers
import torch
from test_generation import V, build
from transformers import (
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    StaticCache,
)
from transformers.generation.stopping_criteria import StoppingCriteria

import andromeda.model
from andromeda.generation import Cache
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.huggingface.cache_andromeda import AndromedaCache, AndromedaStaticCache

NEW = 24
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "return sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams returned": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "guidance": {"do_sample": False, "guidance_scale": 1.5},
}
CACHES = {
    "default": lambda model: {},
    "dynamic": lambda model: {"cache_implementation": "dynamic"},
    "static": lambda model: {"cache_implementation": "static"},
    "chunks": lambda model: {"prefill_chunk_size": 3},
    "static chunks": lambda model: {"prefill_chunk_size": 3, "cache_implementation": "static"},
    "own": lambda model: {"past_key_values": AndromedaCache(capacity=50)},
    "DynamicCache": lambda model: {"past_key_values": DynamicCache()},
    "DynamicCache of config": lambda model: {"past_key_values": DynamicCache(config=model.config)},
    "StaticCache": lambda model: {"past_key_values": StaticCache(config=model.config, max_cache_len=50)},
}
ASSISTED = {
    "assistant": lambda others: {"assistant_model": others["andromeda"]},
    "perfect assistant": lambda others: {"assistant_model": others["itself"]},
    "Llama as assistant": lambda others: {"assistant_model": others["llama"]},
    "lookup": lambda others: {"prompt_lookup_num_tokens": 4},
    "early exit": lambda others: {"assistant_early_exit": 1},
}


def huggingface(seed=0, **options):
    return AndromedaForCausalLM.from_andromeda(build(seed, **options), pad_token_id=1, eos_token_id=None).eval()


@pytest.fixture(scope="module")
def model():
    return huggingface(depth=2, max_seq_len=60, shift_tokens=2)


@pytest.fixture(scope="module")
def others(model):
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=None)).double().eval()
    return {"andromeda": huggingface(3, max_seq_len=60), "itself": copy.deepcopy(model), "llama": llama}


@pytest.fixture(scope="module")
def padded():
    """Three prompts, padded on the left; the last has one token."""
    ids = torch.randint(2, V, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :8] = 0
    return ids, mask


def generate(model, prompt, new=NEW, **options):
    torch.manual_seed(7)
    ids, mask = prompt if isinstance(prompt, tuple) else (prompt, torch.ones_like(prompt))
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)


# ---- every mode with every cache


@pytest.fixture(scope="module")
def without_cache(model, padded):
    return {name: generate(model, padded, use_cache=False, **options) for name, options in MODES.items()}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_are_those_without_a_cache(mode, cache, model, padded, without_cache):
    assert torch.equal(generate(model, padded, **MODES[mode], **CACHES[cache](model)), without_cache[mode])


@pytest.mark.parametrize("segment", (16, 8192))
@pytest.mark.parametrize("way", ASSISTED)
def test_assisted_decoding_is_greedy(way, segment, model, others, monkeypatch):
    """Also where the keys are moved to the next xPos segment every few tokens."""
    prompt = torch.randint(2, V, (1, 7), generator=torch.Generator().manual_seed(1)).repeat(1, 2)
    expected = generate(model, prompt, 40, do_sample=False, use_cache=False)
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: segment)
    assert torch.equal(generate(model, prompt, 40, do_sample=False, **ASSISTED[way](others)), expected)


def test_the_draft_of_a_llama(model, others):
    prompt = torch.randint(2, V, (1, 9), generator=torch.Generator().manual_seed(1))
    llama = others["llama"]
    expected = generate(llama, prompt, do_sample=False)
    assert torch.equal(generate(llama, prompt, do_sample=False, assistant_model=model), expected)


def test_a_good_draft_saves_calls(model, others):
    """Else nothing would show that drafts are taken."""
    others["itself"].generation_config.assistant_confidence_threshold = 0
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        generate(model, torch.tensor([[3, 4, 5]]), 40, do_sample=False, assistant_model=others["itself"])
    finally:
        handle.remove()
    assert len(calls) <= 4


@torch.no_grad()
def test_an_early_exit_is_that_of_the_drafts_alone(model):
    """Other threads may use the model at the same time."""
    ids, layers = torch.tensor([[3, 4, 5]]), model.transformer.attn_layers.layers
    expected, calls, found, busy = model(ids, use_cache=False).logits, [0, 0], [], []

    def count(layer, *_):
        if not busy:
            calls[layer.index // 2] += 1
            busy.append(1)
            found.append(model(ids, use_cache=False).logits)
            busy.clear()

    handles = [layer.register_forward_hook(count) for layer in (layers[0], layers[2])]
    try:
        generate(model, ids, do_sample=False, assistant_early_exit=1)
    finally:
        for handle in handles:
            handle.remove()
    assert calls[0] > calls[1] > 0
    assert all(torch.equal(logits, expected) for logits in found)


def test_speculative_sampling(model, others):
    """The assistant is the model itself: every draft is accepted, and the rest is drawn from the same distribution."""
    found = generate(model, torch.tensor([[3, 4, 5]]), do_sample=True, assistant_model=others["itself"])
    assert found.shape == (1, 3 + NEW)


@pytest.mark.parametrize("mode", ("greedy", "beams"))
def test_static_steps_across_segments(mode, model, padded, without_cache, monkeypatch):
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: 8)
    for cache in ("static", "static chunks", "default"):
        assert torch.equal(generate(model, padded, **MODES[mode], **CACHES[cache](model)), without_cache[mode])


def test_static_steps_move_the_keys_to_the_next_segment(model, padded, monkeypatch):
    """The tokens alone would not show it: the factors of near segments differ little."""
    monkeypatch.setattr(andromeda.model, "segment_length", lambda dtype: 8)
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    static, ordinary = (
        torch.stack(generate(model, padded, **options, **cache).logits)
        for cache in ({"cache_implementation": "static"}, {"use_cache": False})
    )
    torch.testing.assert_close(static, ordinary, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", ({"deepnorm": False}, {"shift_tokens": 0, "attn_one_kv_head": False}), ids=str)
def test_other_models(options, padded, others):
    model = huggingface(depth=2, max_seq_len=60, **options)
    expected = generate(model, padded, do_sample=False, use_cache=False)
    for cache in ("default", "static"):
        assert torch.equal(generate(model, padded, do_sample=False, **CACHES[cache](model)), expected)
    for way in ("assistant", "lookup", "early exit"):
        assert torch.equal(generate(model, padded[0][:1], do_sample=False, **ASSISTED[way](others)), expected[:1])


def test_absolute_positions(padded):
    model = huggingface(depth=2, max_seq_len=40, use_abs_pos_emb=True)
    expected = generate(model, padded, use_cache=False, do_sample=False)
    for cache in CACHES.values():
        assert torch.equal(generate(model, padded, do_sample=False, **cache(model)), expected)
    with pytest.raises(ValueError, match=r'"static" must end before position 40 .* got a cache of 48 tokens'):
        generate(model, padded, 40, do_sample=False, cache_implementation="static")


def test_embeddings_as_a_prompt(model, padded):
    ids = padded[0][:1]
    expected = generate(model, ids, do_sample=False)[:, 9:]
    vectors = model.get_input_embeddings()(ids)
    for options in ({}, {"cache_implementation": "static"}):
        found = model.generate(inputs_embeds=vectors, max_new_tokens=NEW, do_sample=False, **options)
        assert torch.equal(found, expected)


# ---- conversations


@pytest.mark.parametrize("kind", (AndromedaCache, DynamicCache, lambda: AndromedaStaticCache(60)), ids=str)
def test_a_cache_continues_over_turns(kind, model, padded):
    """The caller's own object holds the state, also when it is one of transformers."""
    first, second = padded[0][:1], padded[0][1:2]
    cache = kind()
    answer = generate(model, first, 5, do_sample=False, past_key_values=cache)
    assert cache.get_seq_length() == 13
    whole = torch.cat((answer, second), dim=1)
    found = generate(model, whole, 5, do_sample=False, past_key_values=cache)
    assert torch.equal(found, generate(model, whole, 5, do_sample=False, use_cache=False))


def test_one_prefix_for_several_prompts(model, padded):
    prefix, prompts = padded[0][:1], torch.randint(2, V, (3, 4), generator=torch.Generator().manual_seed(2))
    whole = torch.cat((prefix.expand(3, -1), prompts), dim=1)
    expected = generate(model, whole, do_sample=False, use_cache=False)
    cache = AndromedaCache()
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    of_all = copy.deepcopy(cache)
    of_all.batch_repeat_interleave(3)
    assert torch.equal(generate(model, whole, do_sample=False, past_key_values=of_all), expected)
    of_all.crop(-1)
    for row in range(3):
        one = copy.deepcopy(cache)
        assert torch.equal(
            generate(model, whole[row : row + 1], do_sample=False, past_key_values=one)[0], expected[row]
        )


# ---- stopping


def test_stop_strings(model, padded):
    letters = {letter: token for token, letter in enumerate(string.ascii_letters[:V])}
    one_per_letter = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    one_per_letter.decoder = tokenizers.decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=one_per_letter)
    ids = padded[0][:1]
    text = tokenizer.decode(generate(model, ids, do_sample=False)[0, 9:])
    stop = text[4:6]
    found = generate(model, ids, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert found.shape[1] - 9 == text.index(stop) + 2 < NEW


def test_a_stopping_criterion_and_scores(model, padded):
    class AfterFive(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 14)

    options = {"return_dict_in_generate": True, "output_scores": True, "do_sample": False}
    found = generate(model, padded, stopping_criteria=[AfterFive()], **options)
    expected = generate(model, padded, use_cache=False, **options)
    assert found.sequences.shape == (3, 14) and len(found.scores) == 5
    for one, other in zip(found.scores, expected.scores, strict=False):
        torch.testing.assert_close(one, other)
    assert found.past_key_values.get_seq_length() == 13


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"cache_implementation": "offloaded"}, ValueError, "must be .* got 'offloaded': keys and values stay"),
        ({"cache_implementation": "offloaded_static"}, ValueError, "got 'offloaded_static': keys and values stay"),
        ({"cache_implementation": "quantized"}, ValueError, "got 'quantized': keys are stored with factors"),
        ({"cache_implementation": "hybrid"}, ValueError, "got 'hybrid': there are no layers with another window"),
        ({"cache_implementation": "sliding_window"}, ValueError, "got 'sliding_window': there are no layers"),
        ({"cache_implementation": "paged"}, NotImplementedError, "continuous batching keeps the keys"),
        ({"past_key_values": Cache()}, TypeError, "must be an AndromedaCache in generate, got a Cache"),
        ({"assistant_early_exit": 2}, ValueError, "assistant_early_exit must be a number of blocks from 1 to 1, got 2"),
        ({"prompt_lookup_num_tokens": 3, "cache_implementation": "static"}, ValueError, "Static cache"),
        ({"past_key_values": AndromedaStaticCache(20)}, ValueError, "must leave room for all tokens|out of range"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_generate_refuses(options, error, text, model):
    prompt = torch.randint(2, V, (1, 30))
    with pytest.raises(error, match=text):
        generate(model, prompt, do_sample=False, **options)


def test_hybrid_in_a_generation_config_is_refused(model):
    config = GenerationConfig(cache_implementation="hybrid", max_new_tokens=3)
    with pytest.raises(ValueError, match="got 'hybrid'"):
        model.generate(torch.tensor([[3, 4]]), generation_config=config)


@pytest.mark.parametrize("method", ("generate_batch", "init_continuous_batching"))
def test_continuous_batching_is_refused_at_once(method, model):
    with pytest.raises(NotImplementedError, match=f"{method} must not be called: .* padded on the left"):
        getattr(model, method)([[1, 2, 3]])
    with pytest.raises(NotImplementedError), model.continuous_batching_context_manager():
        pass


def test_no_value_is_read_back_for_a_mask(model, padded, monkeypatch):
    """After the prompt: on a GPU each read would wait for all work before it. The tensors of a CPU are checked."""
    reads = []
    with torch.no_grad():
        cache = model(*padded).past_key_values
        mask = torch.cat((padded[1], torch.ones(3, 1, dtype=torch.int64)), dim=1)
        monkeypatch.setattr(andromeda.huggingface.attention_masks, "read_mask", lambda *args, **kwargs: reads.append(1))
        model(padded[0][:, :1], attention_mask=mask, past_key_values=cache)
    assert not reads


# ---- compiled steps


@pytest.mark.parametrize("way", ("by hand", "generate"))
def test_steps_with_a_static_cache_compile_into_one_graph(way, padded, without_cache, model):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    if way == "by hand":
        step = torch.compile(model, backend=count, fullgraph=True)
        cache, found = AndromedaStaticCache(40), []
        with torch.no_grad():
            output = model(padded[0], attention_mask=padded[1], past_key_values=cache)
            for _ in range(NEW):
                found.append(output.logits[:, -1:].argmax(-1))
                output = step(found[-1], past_key_values=cache)
        assert cache.get_seq_length() == 9 + NEW
        assert torch.equal(torch.cat(found, dim=1), without_cache["greedy"][:, 9:])
    else:
        compiling = CompileConfig(backend=count, mode=None, fullgraph=True)
        compiling._compile_all_devices = True
        found = generate(model, padded, do_sample=False, cache_implementation="static", compile_config=compiling)
        assert torch.equal(found, without_cache["greedy"])
    assert len(graphs) == 1
