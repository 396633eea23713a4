"""What people do with a model of transformers, done with a tiny Llama and a tiny Andromeda, one trial a feature.

Each trial checks a result: equal outputs, changed modules, a smaller footprint. A trial that a model refuses says so
here, with the reason that the user reads; to accept and ignore is a failure.
"""

import copy
import functools
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import NamedTuple

import accelerate
import huggingface_hub.errors
import numpy as np
import pytest
import torch
import transformers
from tiny_models import MODELS, new_model
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
    pipeline,
)


class Row(NamedTuple):
    """A feature and its trial (subject, temporary folder).

    Attributes:
        models: those on which it is tried.
        refused: for each model that refuses it the reason, a pattern.
    """

    feature: str
    trial: Callable
    models: tuple
    refused: dict


ROWS = []


def row(feature, models=MODELS, **refused):
    """Adds the trial below to the table."""

    def add(trial):
        assert feature not in [other.feature for other in ROWS]
        ROWS.append(Row(feature, trial, models, refused))
        return trial

    return add


# ---- what the trials share


def logits(model, ids, **options):
    with torch.no_grad():
        return model(ids, **options).logits


def assert_near(found, expected, bound=1e-5):
    """Equal up to `bound` times the largest expected value."""
    difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert difference <= bound, f"differs by {difference:.1e} of the largest value"


def assert_same_model(model, m, bound=1e-6, ids=None):
    ids = m.ids() if ids is None else ids
    assert not model.training
    assert_near(logits(model, ids).float(), logits(m.first, ids), bound)


@functools.cache
def _greedy(m, rows, length, seed, count):
    ids = m.ids(rows, length, seed)
    for _ in range(count):
        ids = torch.cat((ids, logits(m.first, ids, use_cache=False)[:, -1].argmax(-1, keepdim=True)), 1)
    return ids


def greedy(m, rows=2, length=9, seed=0, count=6):
    """The prompt `m.ids(rows, length, seed)` and the tokens that follow it, without a cache, one by one."""
    return _greedy(m, rows, length, seed, count)


def generate(model, ids, count=6, **options):
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=options.pop("attention_mask", torch.ones_like(ids)), **options)


def padded(m, lengths=(9, 5), side="left"):
    """Rows of these lengths, padded with token 0, and their mask."""
    longest = max(lengths)
    ids, mask = m.ids(len(lengths), longest), torch.ones(len(lengths), longest, dtype=torch.long)
    for at, length in enumerate(lengths):
        padding = slice(0, longest - length) if side == "left" else slice(length, longest)
        ids[at, padding], mask[at, padding] = 0, 0
    return ids, mask


# ---- saving and loading


@row("save_pretrained and from_pretrained")
def _(m, tmp):
    m.new().save_pretrained(tmp)
    assert_same_model(m.kinds.causal.from_pretrained(tmp), m, bound=0)


@row("save in shards")
def _(m, tmp):
    m.first.save_pretrained(tmp, max_shard_size="100KB")
    assert len(list(tmp.glob("model-*.safetensors"))) > 3
    assert_same_model(m.kinds.causal.from_pretrained(tmp), m, bound=0)


@row("load a .bin file")
def _(m, tmp):
    m.first.config.save_pretrained(tmp)
    torch.save(m.first.state_dict(), tmp / "pytorch_model.bin")
    assert_same_model(m.kinds.causal.from_pretrained(tmp), m, bound=0)


@row("save another state_dict")
def _(m, tmp):
    state = {name: 2 * value for name, value in m.first.state_dict().items()}
    m.first.save_pretrained(tmp, state_dict=state)
    loaded = m.kinds.causal.from_pretrained(tmp).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@row("key_mapping")
def _(m, tmp):
    m.first.save_pretrained(tmp, state_dict={f"old.{name}": value for name, value in m.first.state_dict().items()})
    assert_same_model(m.kinds.causal.from_pretrained(tmp, key_mapping={r"^old\.": ""}), m, bound=0)


@row("dtype=bfloat16")
def _(m, tmp):
    model = m.load(dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_same_model(model, m, bound=0.1)


@row("dtype=float16")
def _(m, tmp):
    model = m.load(dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert_same_model(model, m, bound=0.02)


@row("dtype=auto")
def _(m, tmp):
    m.new().to(torch.bfloat16).save_pretrained(tmp)
    assert m.kinds.causal.from_pretrained(tmp, dtype="auto").dtype == torch.bfloat16


for place in ("cpu", "auto", "balanced", "sequential"):

    @row(f"device_map={place}")
    def _(m, tmp, place=place):
        model = m.load(device_map=place)
        assert_same_model(model, m, bound=0)


@row("device_map with a part on disk")
def _(m, tmp):
    list_of_layers = next(name for name, child in m.first.named_modules() if isinstance(child, torch.nn.ModuleList))
    device_map = {}

    def place(name, module):
        if name == list_of_layers:
            half = len(module) // 2
            device_map.update({f"{name}.{at}": "cpu" if at < half else "disk" for at in range(len(module))})
        elif list_of_layers.startswith(name + "."):
            for child, submodule in module.named_children():
                place(f"{name}.{child}", submodule)
        else:
            device_map[name] = "cpu"

    for name, module in m.first.named_children():
        place(name, module)
    model = m.load(device_map=device_map, offload_folder=tmp)
    assert any(p.is_meta for p in model.parameters())
    assert_same_model(model, m, bound=0)


@row("device_map=auto with max_memory")
def _(m, tmp):
    model = m.load(device_map="auto", max_memory={"cpu": "800KB"}, offload_folder=tmp)
    assert {*model.hf_device_map.values()} == {"cpu", "disk"}
    assert_same_model(model, m, bound=0)


@row("low_cpu_mem_usage")
def _(m, tmp):
    assert_same_model(m.load(low_cpu_mem_usage=True), m, bound=0)


@row("accelerate.dispatch_model")
def _(m, tmp):
    model = accelerate.dispatch_model(m.new(), {"": "cpu"}, force_hooks=True)
    assert hasattr(model, "_hf_hook")
    assert_same_model(model, m, bound=0)


@row("accelerate.init_empty_weights")
def _(m, tmp):
    with accelerate.init_empty_weights():
        model = m.kinds.causal(m.config())
    assert all(p.is_meta for p in model.parameters())
    model.load_state_dict(m.first.state_dict(), assign=True)
    model.tie_weights()
    if m.name == "llama":  # its rotary table is a buffer
        model.model.rotary_emb = copy.deepcopy(m.first.model.rotary_emb)
    assert_same_model(model.eval(), m, bound=0)


@row("to(meta)")
def _(m, tmp):
    model = m.new().to("meta")
    found = model(m.ids().to("meta")).logits
    assert found.is_meta and found.shape == (2, 9, 1088)


@row("deepcopy")
def _(m, tmp):
    assert_same_model(copy.deepcopy(m.first), m, bound=0)


@row("pickle")
def _(m, tmp):
    assert_same_model(pickle.loads(pickle.dumps(m.first)), m, bound=0)


@row("accelerate.disk_offload")
def _(m, tmp):
    model = m.new()
    accelerate.disk_offload(model, tmp, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert_same_model(model, m, bound=0)


@row("accelerate.cpu_offload")
def _(m, tmp):
    model = m.new()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert_same_model(model, m, bound=0)


def load_without_head(m, tmp, **options):
    head = "lm_head.weight" if m.name == "llama" else "transformer.to_logits.weight"
    state = {name: value for name, value in m.first.state_dict().items() if name != head}
    m.first.config.save_pretrained(tmp)
    torch.save(state, tmp / "pytorch_model.bin")
    model, report = m.kinds.causal.from_pretrained(tmp, output_loading_info=True, **options)
    assert set(report["missing_keys"]) == {head}
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    assert 0 < found[head].std() < 1


@row("a checkpoint that lacks parameters", andromeda="missing: transformer.to_logits.weight[^$]*strict=False draws")
def _(m, tmp):
    load_without_head(m, tmp)


@row("a checkpoint that lacks parameters, when asked for")
def _(m, tmp):
    load_without_head(m, tmp, **({} if m.name == "llama" else {"strict": False}))


@row("ignore_mismatched_sizes")
def _(m, tmp):
    model = m.load(config=m.config(vocab_size=96), ignore_mismatched_sizes=True)
    assert logits(model, m.ids() % 96).shape == (2, 9, 96)
    kept = [name for name, _ in model.named_parameters() if ".layers." in name]
    assert len(kept) > 10
    assert all(torch.equal(model.state_dict()[name], m.first.state_dict()[name]) for name in kept)


@row("tie_word_embeddings")
def _(m, tmp):
    model = m.kinds.causal(m.config(tie_word_embeddings=True))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp)
    loaded = m.kinds.causal.from_pretrained(tmp)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded, m.ids()), logits(model.eval(), m.ids()))


@row("resize_token_embeddings")
def _(m, tmp):
    model = m.new()
    model.resize_token_embeddings(1100, mean_resizing=False)
    found = logits(model, m.ids())
    assert found.shape[-1] == 1100 == model.config.vocab_size
    assert_near(found[..., :1088], logits(m.first, m.ids()), 1e-6)
    assert logits(model, torch.tensor([[1099]])).isfinite().all()


# ---- automatic classes and pipelines


@row("AutoConfig")
def _(m, tmp):
    config = AutoConfig.from_pretrained(m.folder)
    assert type(config) is m.kinds.config and config.hidden_size == 64


@row("AutoModelForCausalLM")
def _(m, tmp):
    assert_same_model(m.load(AutoModelForCausalLM), m, bound=0)


@row("AutoModelForCausalLM.from_config")
def _(m, tmp):
    model = AutoModelForCausalLM.from_config(m.config())
    assert type(model) is m.kinds.causal and all(p.std() < 2 for p in model.parameters())


@row("AutoModel")
def _(m, tmp):
    model = m.load(AutoModel)
    with torch.no_grad():
        found = model(m.ids()).last_hidden_state
    assert found.shape == (2, 9, 64)
    assert_near(m.first.get_output_embeddings()(found), logits(m.first, m.ids()), 1e-6)


@row("AutoModelForSequenceClassification")
def _(m, tmp):
    model = m.load(AutoModelForSequenceClassification, num_labels=3)
    ids, mask = padded(m)
    found = model(ids, attention_mask=mask, labels=torch.tensor([0, 2]))
    assert found.logits.shape == (2, 3)
    alone = model(ids[1:, 4:]).logits
    assert_near(found.logits[1:], alone)
    assert_near(found.loss, functional.cross_entropy(found.logits, torch.tensor([0, 2])))


@row("AutoModelForTokenClassification")
def _(m, tmp):
    model = m.load(AutoModelForTokenClassification, num_labels=3)
    labels = torch.randint(3, (2, 9))
    found = model(m.ids(), labels=labels)
    assert found.logits.shape == (2, 9, 3)
    assert_near(found.loss, functional.cross_entropy(found.logits.flatten(0, 1), labels.flatten()))


@row("pipeline feature-extraction")
def _(m, tmp):
    found = pipeline("feature-extraction", model=str(m.folder))("for name in names", return_tensors=True)
    ids = m.tokenizer("for name in names", return_tensors="pt").input_ids
    assert_near(m.first.get_output_embeddings()(found), logits(m.first, ids), 1e-6)


@row("pipeline text-classification")
def _(m, tmp):
    m.load(AutoModelForSequenceClassification, num_labels=3).save_pretrained(tmp)
    m.tokenizer.save_pretrained(tmp)
    texts, run = ["def add(a, b):", "for name"], pipeline("text-classification", model=str(tmp), top_k=None)
    together, apart = run(texts, batch_size=2), [run([text])[0] for text in texts]
    for one, other in zip(together, apart, strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
        assert [entry["score"] for entry in one] == pytest.approx([entry["score"] for entry in other])


def text_generation(m):
    return pipeline("text-generation", model=m.first, tokenizer=m.tokenizer)


PIPELINE = {"max_new_tokens": 4, "do_sample": False}


@row("pipeline text-generation")
def _(m, tmp):
    text = "def add(a, b):"
    [found] = text_generation(m)(text, return_full_text=False, **PIPELINE)
    ids = m.tokenizer(text, return_tensors="pt").input_ids
    expected = m.tokenizer.decode(
        generate(m.first, ids, 4, min_new_tokens=0)[0, ids.shape[1] :], skip_special_tokens=True
    )
    assert found["generated_text"] == expected


@row("pipeline, batch with padding")
def _(m, tmp):
    texts, run = ["def add(a, b):", "for name"], text_generation(m)
    assert run(texts, batch_size=2, **PIPELINE) == [run(text, **PIPELINE) for text in texts]


@row("pipeline, chat")
def _(m, tmp):
    chat = [{"role": "user", "content": "for name"}]
    [found] = text_generation(m)(chat, **PIPELINE)
    assert [message["role"] for message in found["generated_text"]] == ["user", "assistant"]
    prompt = m.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    [plain] = text_generation(m)(prompt, return_full_text=False, **PIPELINE)
    assert found["generated_text"][1]["content"] == plain["generated_text"]


@row("streaming")
def _(m, tmp):
    ids = m.ids(1)
    streamer = transformers.TextIteratorStreamer(m.tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=generate, args=(m.first, ids), kwargs={"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == m.tokenizer.decode(greedy(m, 1)[0, 9:])


# ---- attention


def fused(model, m):
    """Whether attention is one operator: whether no softmax of plain torch runs."""
    with torch.profiler.profile() as profile:
        logits(model, m.ids())
    return not any(event.name == "aten::softmax" for event in profile.events())


@row("attn_implementation=eager")
def _(m, tmp):
    model = m.load(attn_implementation="eager")
    assert model.config._attn_implementation == "eager" and not fused(model, m)
    assert_same_model(model, m)


@row("attn_implementation=sdpa")
def _(m, tmp):
    model = m.load(attn_implementation="sdpa")
    assert fused(model, m)
    assert_same_model(model, m, bound=0)


@row("set_attn_implementation")
def _(m, tmp):
    model = m.load()
    default = model.config._attn_implementation
    model.set_attn_implementation("eager")
    assert not fused(model, m)
    assert_same_model(model, m)
    model.set_attn_implementation(default)
    assert fused(model, m)


# Not for Llama, for which it is compiled for 25 s on a CPU.
@row("attn_implementation=flex_attention", ["andromeda"], andromeda='one of "andromeda" .*got "flex_attention"')
def _(m, tmp):
    m.load(attn_implementation="flex_attention")


@row(
    "attn_implementation=flash_attention_2",
    llama="FlashAttention2",
    andromeda='one of "andromeda" .*got "flash_attention_2"',
)
def _(m, tmp):
    assert_same_model(m.load(attn_implementation="flash_attention_2"), m)


# ---- generate


@row("greedy")
def _(m, tmp):
    assert torch.equal(generate(m.first, m.ids()), greedy(m))


@row("sampling with all filters")
def _(m, tmp):
    filters = {
        "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "epsilon_cutoff": 1e-4,
        "eta_cutoff": 1e-4, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3,
    }  # fmt: skip
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(generate(m.first, m.ids(), do_sample=True, use_cache=use_cache, **filters))
    assert torch.equal(*found) and not torch.equal(found[0], greedy(m))


@row("beam search")
def _(m, tmp):
    with_cache, without = (generate(m.first, m.ids(), num_beams=4, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(with_cache, without)


@row("beam search with sampling")
def _(m, tmp):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        found.append(generate(m.first, m.ids(), num_beams=3, do_sample=True, use_cache=use_cache))
    assert torch.equal(*found)


@row("num_return_sequences")
def _(m, tmp):
    found = generate(m.first, m.ids(), num_beams=4, num_return_sequences=3, return_dict_in_generate=True)
    assert found.sequences.shape == (6, 15) and len({tuple(one) for one in found.sequences.tolist()}) == 6
    assert torch.equal(found.sequences[0], generate(m.first, m.ids(), num_beams=4)[0])


@row("left padding")
def _(m, tmp):
    ids, mask = padded(m)
    found = generate(m.first, ids, attention_mask=mask)
    for at, length in enumerate((9, 5)):
        assert torch.equal(found[at, 9 - length :], generate(m.first, ids[at : at + 1, 9 - length :])[0])


@row("classifier-free guidance")
def _(m, tmp):
    ids = m.ids(1)
    with_cache, without = (
        generate(m.first, ids, guidance_scale=1.5, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)
    assert torch.equal(generate(m.first, ids, guidance_scale=1.0), greedy(m, 1))


@row("scores")
def _(m, tmp):
    found = generate(m.first, m.ids(), return_dict_in_generate=True, output_scores=True, output_logits=True)
    expected = logits(m.first, greedy(m))[:, 8:-1]
    assert_near(torch.stack(found.logits, 1), expected)
    likely = m.first.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    assert likely.shape == (2, 6) and (likely < 0).all()


@row("hidden states and attentions of generate")
def _(m, tmp):
    model = m.load(attn_implementation="eager")
    wanted = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    found = generate(model, m.ids(), 3, **wanted)
    whole = model(greedy(m, count=3)[:, :-1], output_hidden_states=True, output_attentions=True)
    for step, (states, attentions) in enumerate(zip(found.hidden_states, found.attentions, strict=True)):
        rows = slice(0, 9) if step == 0 else slice(8 + step, 9 + step)
        assert_near(states[-1], whole.hidden_states[-1][:, rows])
        assert_near(attentions[1], whole.attentions[1][:, :, rows, : 9 + step])


@row("prefix_allowed_tokens_fn")
def _(m, tmp):
    found = generate(m.first, m.ids(), prefix_allowed_tokens_fn=lambda row, ids: [20 + row, 30 + row])
    assert found[0, 9:].unique().tolist() in ([20], [30], [20, 30])
    assert found[1, 9:].unique().tolist() in ([21], [31], [21, 31])


@row("bad_words_ids")
def _(m, tmp):
    banned = greedy(m)[:, 9].tolist()
    found = generate(m.first, m.ids(), bad_words_ids=[[token] for token in banned])
    assert not set(banned) & set(found[:, 9:].flatten().tolist())


@row("watermark")
def _(m, tmp):
    config = transformers.WatermarkingConfig(bias=8.0, seeding_scheme="lefthash")
    found = generate(m.first, m.ids(1), 24, watermarking_config=config)
    detector = transformers.WatermarkDetector(m.first.config, "cpu", config)
    assert detector(found[:, 9:], return_dict=True).prediction.all()


@row("inference_mode")
def _(m, tmp):
    with torch.inference_mode():
        assert torch.equal(generate(m.first, m.ids()), greedy(m))


@row("more tokens than max_position_embeddings")
def _(m, tmp):
    found = generate(m.first, m.ids(1, 120), 16)
    assert found.shape == (1, 136)
    assert torch.equal(found[0, -1], logits(m.first, found[:, :-1])[0, -1].argmax())


@row("stop_strings")
def _(m, tmp):
    new = greedy(m, 1, count=12)[0, 9:]
    words = [m.tokenizer.decode(token) for token in new]
    at = next(at for at, word in enumerate(words) if at > 1 and word.isascii())
    found = m.first.generate(
        m.ids(1), max_new_tokens=12, do_sample=False, stop_strings=words[at], tokenizer=m.tokenizer, eos_token_id=-1
    )
    count = found.shape[1] - 9
    assert 1 <= count <= at + 1 < 12
    assert torch.equal(found[0, 9:], new[:count]) and words[at] in m.tokenizer.decode(found[0, 9:])


def other(m):
    """A model of the same family and other weights, which proposes tokens."""
    torch.manual_seed(8)
    model = m.new()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@row("assisted decoding")
def _(m, tmp):
    assert torch.equal(generate(m.first, m.ids(1), 12, assistant_model=other(m)), greedy(m, 1, count=12))


@row("prompt lookup")
def _(m, tmp):
    ids = torch.cat((greedy(m, 1, count=12), greedy(m, 1, count=12)[:, :9]), 1)
    expected = generate(m.first, ids, 12, use_cache=False)
    assert torch.equal(generate(m.first, ids, 12, prompt_lookup_num_tokens=4), expected)


@row("assistant_early_exit")
def _(m, tmp):
    assert torch.equal(generate(m.first, m.ids(1), 12, assistant_early_exit=1), greedy(m, 1, count=12))


@row("as the draft of another model")
def _(m, tmp):
    target = new_model("llama", {"eos_token_id": 2, "pad_token_id": 0})[0]
    expected = generate(target, m.ids(1), 12, use_cache=False)
    assert torch.equal(generate(target, m.ids(1), 12, assistant_model=m.first), expected)


# ---- caches

NEEDS_CUDA = {} if torch.cuda.is_available() else {"llama": "CUDA|NVIDIA"}


@row("cache_implementation=dynamic")
def _(m, tmp):
    assert torch.equal(generate(m.first, m.ids(), cache_implementation="dynamic"), greedy(m))


@row("cache_implementation=static")
def _(m, tmp):
    found = generate(
        m.first, m.ids(), cache_implementation="static", return_dict_in_generate=True, disable_compile=True
    )
    assert torch.equal(found.sequences, greedy(m))
    assert "StaticCache" in type(found.past_key_values).__name__


@row("cache_implementation=offloaded", **NEEDS_CUDA, andromeda="cache_implementation")
def _(m, tmp):
    found = generate(m.first, m.ids(), cache_implementation="offloaded", return_dict_in_generate=True)
    assert torch.equal(found.sequences, greedy(m))
    assert found.past_key_values.offloading


@row("cache_implementation=offloaded_static", **NEEDS_CUDA, andromeda="cache_implementation")
def _(m, tmp):
    options = {"return_dict_in_generate": True, "disable_compile": True}
    found = generate(m.first, m.ids(), cache_implementation="offloaded_static", **options)
    assert torch.equal(found.sequences, greedy(m))
    assert found.past_key_values.offloading


# Not for Llama, for which quanto first compiles an extension for a minute.
@row("cache_implementation=quantized", ["andromeda"], andromeda="cache_implementation")
def _(m, tmp):
    generate(m.first, m.ids(), cache_implementation="quantized", cache_config={"backend": "quanto", "nbits": 4})


@row("cache_implementation=hybrid", andromeda="cache_implementation")
def _(m, tmp):
    found = generate(
        m.first, m.ids(), cache_implementation="hybrid", return_dict_in_generate=True, disable_compile=True
    )
    assert torch.equal(found.sequences, greedy(m))


@row("a new DynamicCache in generate")
def _(m, tmp):
    cache = DynamicCache(config=m.first.config)
    assert torch.equal(generate(m.first, m.ids(), past_key_values=cache), greedy(m))
    assert cache.get_seq_length() == 14


@row("a new StaticCache in generate")
def _(m, tmp):
    cache = StaticCache(config=m.first.config, max_cache_len=32)
    assert torch.equal(generate(m.first, m.ids(), past_key_values=cache, disable_compile=True), greedy(m))
    assert cache.get_seq_length() == 14


@row("a new DynamicCache in forward")
def _(m, tmp):
    cache = DynamicCache(config=m.first.config)
    logits(m.first, m.ids()[:, :5], past_key_values=cache)
    assert_near(logits(m.first, m.ids()[:, 5:], past_key_values=cache), logits(m.first, m.ids())[:, 5:])


@row("a cache over several turns")
def _(m, tmp):
    first = generate(m.first, m.ids(), return_dict_in_generate=True)
    longer = torch.cat((first.sequences, m.ids(seed=1)), 1)
    found = generate(m.first, longer, past_key_values=first.past_key_values)
    assert torch.equal(found, generate(m.first, longer, use_cache=False))


def prefix_cache(m, rows=1):
    with torch.no_grad():
        return m.first(m.ids(rows)[:, :6], use_cache=True).past_key_values


@row("deepcopy of a prefix's cache")
def _(m, tmp):
    prefix = prefix_cache(m)
    for seed in (1, 2):
        ids = torch.cat((m.ids(1)[:, :6], m.ids(1, 4, seed)), 1)
        found = generate(m.first, ids, past_key_values=copy.deepcopy(prefix))
        assert torch.equal(found, generate(m.first, ids, use_cache=False))


@row("Cache.batch_repeat_interleave")
def _(m, tmp):
    cache = prefix_cache(m)
    cache.batch_repeat_interleave(3)
    following = m.ids(3, 4, 1)
    whole = torch.cat((m.ids(1)[:, :6].expand(3, -1), following), 1)
    assert_near(logits(m.first, following, past_key_values=cache), logits(m.first, whole)[:, 6:])


@row("Cache.batch_select_indices")
def _(m, tmp):
    cache = prefix_cache(m, 3)
    cache.batch_select_indices(torch.tensor([2, 0]))
    following = m.ids(2, 4, 1)
    whole = torch.cat((m.ids(3)[:, :6][[2, 0]], following), 1)
    assert_near(logits(m.first, following, past_key_values=cache), logits(m.first, whole)[:, 6:])


@row("Cache.crop")
def _(m, tmp):
    cache = prefix_cache(m)
    logits(m.first, m.ids(1, 5, 3), past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == 6
    whole = m.ids(1)
    assert_near(logits(m.first, whole[:, 6:], past_key_values=cache), logits(m.first, whole)[:, 6:])


@row("prefill_chunk_size")
def _(m, tmp):
    assert torch.equal(generate(m.first, m.ids(2, 12), prefill_chunk_size=5), greedy(m, 2, 12))


# Not for Llama, whose manager takes minutes to begin on a CPU.
@row("continuous batching", ["andromeda"], andromeda="continuous batching")
def _(m, tmp):
    m.first.init_continuous_batching()


@row("generate_batch", ["andromeda"], andromeda="continuous batching")
def _(m, tmp):
    m.first.generate_batch([m.ids()[0].tolist()])


@row("right padding with a cache", andromeda="padding")
def _(m, tmp):
    ids, mask = padded(m, side="right")
    generate(m.first, ids, attention_mask=mask)


# ---- forward


@row("inputs_embeds")
def _(m, tmp):
    embeds = m.first.get_input_embeddings()(m.ids())
    with torch.no_grad():
        assert_near(m.first(inputs_embeds=embeds).logits, logits(m.first, m.ids()), 1e-6)
    assert torch.equal(generate(m.first, m.ids(), inputs_embeds=embeds)[:, -6:], greedy(m)[:, 9:])


@row("position_ids")
def _(m, tmp):
    positions = torch.arange(9).expand(2, -1)
    assert_near(logits(m.first, m.ids(), position_ids=positions), logits(m.first, m.ids()), 1e-6)


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])


@row("packed position_ids")
def _(m, tmp):
    ids = m.ids(1)
    found = logits(m.first, ids, position_ids=PACKED, use_cache=False)
    assert_near(found[:, :4], logits(m.first, ids[:, :4]))
    assert_near(found[:, 4:], logits(m.first, ids[:, 4:]))


@row("4-D attention_mask")
def _(m, tmp):
    ids, document = m.ids(1), (PACKED == 0).cumsum(1)
    visible = (document[:, :, None] == document[:, None, :]) & torch.ones(9, 9, dtype=torch.bool).tril()
    found = logits(m.first, ids, attention_mask=visible[:, None], position_ids=PACKED)
    assert_near(found[:, 4:], logits(m.first, ids[:, 4:]))


@row("token_type_ids from a tokenizer")
def _(m, tmp):
    batch = m.tokenizer("for name in", return_tensors="pt", return_token_type_ids=True)
    assert "token_type_ids" in batch
    found = m.first(**batch).logits
    assert_near(found, logits(m.first, batch["input_ids"]), 1e-6)


@row("cache_position")
def _(m, tmp):
    found = logits(m.first, m.ids(), cache_position=torch.arange(9))
    assert_near(found, logits(m.first, m.ids()), 1e-6)


@row("DataCollatorWithFlattening")
def _(m, tmp):
    documents = [m.ids(1, length, length)[0].tolist() for length in (4, 7)]
    batch = transformers.DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": ids} for ids in documents])
    batch = {name: value for name, value in batch.items() if name != "attention_mask"}
    found = m.first(**batch, use_cache=False).loss
    apart = [m.first(torch.tensor([ids]), labels=torch.tensor([ids])).loss for ids in documents]
    assert_near(found, (apart[0] * 3 + apart[1] * 6) / 9)


@row("logits_to_keep, a number")
def _(m, tmp):
    assert_near(logits(m.first, m.ids(), logits_to_keep=2), logits(m.first, m.ids())[:, -2:], 1e-6)


@row("logits_to_keep, positions")
def _(m, tmp):
    kept = torch.tensor([1, 4, 8])
    assert_near(logits(m.first, m.ids(), logits_to_keep=kept), logits(m.first, m.ids())[:, kept], 1e-6)


@row("int32 ids")
def _(m, tmp):
    assert_near(logits(m.first, m.ids().int()), logits(m.first, m.ids()), 0)


@row("use_cache while gradients are recorded")
def _(m, tmp):
    model = m.new()
    first = model(m.ids()[:, :5], use_cache=True)
    second = model(m.ids()[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    torch.cat((first.logits, second.logits), 1).logsumexp(-1).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(m.ids(), use_cache=False).logits.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert_near(found[name], parameter.grad, 1e-4)


@row("output_hidden_states")
def _(m, tmp):
    found = m.first(m.ids(), output_hidden_states=True)
    assert len(found.hidden_states) >= 3 and all(state.shape == (2, 9, 64) for state in found.hidden_states)
    assert_near(m.first.get_output_embeddings()(found.hidden_states[-1]), found.logits, 1e-6)


@row("output_attentions")
def _(m, tmp):
    model = m.load(attn_implementation="eager")
    found = model(m.ids(), output_attentions=True)
    assert len(found.attentions) == 2
    for weights in found.attentions:
        assert weights.shape == (2, 4, 9, 9) and weights.triu(1).abs().max() == 0
        assert_near(weights.sum(-1), torch.ones(2, 4, 9))


@row("return_dict=False")
def _(m, tmp):
    found = m.first(m.ids(), labels=m.ids(), return_dict=False)
    whole = m.first(m.ids(), labels=m.ids())
    assert isinstance(found, tuple)
    assert torch.equal(found[0], whole.loss) and torch.equal(found[1], whole.logits)


def cross_entropy(m, ids, labels, **options):
    return functional.cross_entropy(logits(m.first, ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


@row("labels")
def _(m, tmp):
    assert_near(m.first(m.ids(), labels=m.ids()).loss, cross_entropy(m, m.ids(), m.ids()))


@row("num_items_in_batch")
def _(m, tmp):
    found = m.first(m.ids(), labels=m.ids(), num_items_in_batch=40).loss
    assert_near(found, cross_entropy(m, m.ids(), m.ids(), reduction="sum") / 40)


@row("a collator that pads on the right")
def _(m, tmp):
    tokenizer = copy.deepcopy(m.tokenizer)
    tokenizer.padding_side = "right"
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    documents = [m.ids(1, length, length)[0].tolist() for length in (4, 7)]
    found = m.first(**collate([{"input_ids": ids} for ids in documents])).loss
    apart = [m.first(torch.tensor([ids]), labels=torch.tensor([ids])).loss for ids in documents]
    assert_near(found, (apart[0] * 3 + apart[1] * 6) / 9)


@row("labels that are all -100")
def _(m, tmp):
    model = m.new().train()
    loss = model(m.ids(), labels=torch.full((2, 9), -100), num_items_in_batch=4).loss
    loss.backward()
    assert loss == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


@row("shift_labels")
def _(m, tmp):
    shifted = torch.cat((m.ids()[:, 1:], torch.full((2, 1), -100)), 1)
    found = m.first(m.ids(), labels=m.ids(), shift_labels=shifted).loss
    assert_near(found, cross_entropy(m, m.ids(), m.ids()))
    half = torch.where(torch.arange(9) < 4, shifted, -100)
    found = m.first(m.ids(), labels=m.ids(), shift_labels=half).loss
    assert_near(found, cross_entropy(m, m.ids()[:, :5], m.ids()[:, :5]))


# ---- training


def gradients(model, m):
    model.train()
    model(m.ids(), labels=m.ids()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


for reentrant in (True, False):

    @row(f"gradient checkpointing, reentrant={reentrant}")
    def _(m, tmp, reentrant=reentrant):
        model = m.new()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert model.is_gradient_checkpointing
        calls = []
        inner = next(child for name, child in model.named_modules() if name.endswith(("q_proj", "to_q")))
        inner.register_forward_pre_hook(lambda *_: calls.append(1))
        found, expected = gradients(model, m), gradients(m.new(), m)
        assert len(calls) == 2, "not computed again"
        for name, gradient in expected.items():
            assert_near(found[name], gradient, 1e-6)


def rows_of(m, count=8):
    return [{"input_ids": row, "labels": row} for row in m.ids(count, 12, 5)]


def train(m, tmp, model=None, data=None, trainer=None, **options):
    """A run of a few steps; returns the trainer."""
    arguments = TrainingArguments(
        **{
            "output_dir": str(tmp / "run"), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
            "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "seed": 1, **options,
        }
    )  # fmt: skip
    trainer = Trainer(
        m.new() if model is None else model, arguments, train_dataset=data or rows_of(m), **(trainer or {})
    )
    resume = options.pop("resume", None)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(model, other, bound):
    for (name, found), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        difference = (found - expected).abs().max()
        assert difference <= bound, f"{name} differs by {difference:.1e}"


@row("Trainer")
def _(m, tmp):
    trainer = train(m, tmp, data=rows_of(m, 2), max_steps=6, learning_rate=5e-3)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.3


@row("Trainer: gradient accumulation")
def _(m, tmp):
    options = {"max_steps": 2, "max_grad_norm": 0, "optim": "sgd", "learning_rate": 0.1}
    parts = train(m, tmp, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    whole = train(m, tmp, per_device_train_batch_size=8, **options)
    assert_same_weights(parts.model, whole.model, 1e-5)


@row("Trainer: bf16")
def _(m, tmp):
    low, full = train(m, tmp, bf16=True, max_steps=2), train(m, tmp, max_steps=2)
    assert low.model.dtype == torch.float32
    assert 0 < abs(losses(low)[0] - losses(full)[0]) < 0.05


@row("Trainer: gradient_checkpointing")
def _(m, tmp):
    low, full = train(m, tmp, gradient_checkpointing=True, max_steps=2), train(m, tmp, max_steps=2)
    assert low.model.is_gradient_checkpointing
    assert_same_weights(low.model, full.model, 1e-6)


@row("Trainer: evaluate")
def _(m, tmp):
    trainer = train(m, tmp, max_steps=1, trainer={"eval_dataset": rows_of(m, 4)})
    model, pairs = trainer.model.eval(), [(row["input_ids"][None], row["labels"][None]) for row in rows_of(m, 4)]
    expected = np.mean([model(ids, labels=labels).loss.item() for ids, labels in pairs])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@row("Trainer: compute_metrics")
def _(m, tmp):
    def accuracy(prediction):
        found, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
        return {"accuracy": float((found == labels).mean())}

    trainer = train(m, tmp, max_steps=1, trainer={"eval_dataset": rows_of(m, 4), "compute_metrics": accuracy})
    ids = torch.stack([row["input_ids"] for row in rows_of(m, 4)])
    expected = (logits(trainer.model, ids)[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(float(expected))


@row("Trainer: predict")
def _(m, tmp):
    trainer = train(m, tmp, max_steps=1)
    found = torch.tensor(trainer.predict(rows_of(m, 4)).predictions)
    assert_near(found, logits(trainer.model, torch.stack([row["input_ids"] for row in rows_of(m, 4)])))


@row("Trainer: load_best_model_at_end")
def _(m, tmp):
    strategy = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    trainer = train(
        m, tmp, max_steps=2, learning_rate=0.5, load_best_model_at_end=True, trainer={"eval_dataset": rows_of(m, 4)},
        **strategy,
    )  # fmt: skip
    seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(seen), rel=1e-4)


@row("Trainer: label_smoothing_factor")
def _(m, tmp):
    trainer = train(m, tmp, max_steps=1, label_smoothing_factor=0.2)
    model = m.new()
    batch = trainer.get_train_dataloader().__iter__().__next__()
    found = trainer.compute_loss(model, dict(batch))
    likely = logits(model, batch["input_ids"])[:, :-1].log_softmax(-1).flatten(0, 1)
    plain = functional.nll_loss(likely, batch["labels"][:, 1:].flatten())
    assert_near(found, 0.8 * plain - 0.2 * likely.mean())


@row("Trainer: NEFTune")
def _(m, tmp):
    noisy, plain = train(m, tmp, neftune_noise_alpha=20.0, max_steps=2), train(m, tmp, max_steps=2)
    assert losses(noisy)[0] != losses(plain)[0]
    assert not noisy.model.get_input_embeddings()._forward_hooks


@row("Trainer: adafactor")
def _(m, tmp):
    trainer = train(m, tmp, data=rows_of(m, 2), max_steps=4, optim="adafactor", learning_rate=1e-2)
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    assert "exp_avg_sq_row" in next(iter(trainer.optimizer.state.values()))


@row("Trainer: tensorboard")
def _(m, tmp):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp / "events"))
        train(m, tmp, max_steps=1, report_to="tensorboard")
    [events] = (tmp / "events").rglob("events.*")
    assert b"train/loss" in events.read_bytes()


@row("Trainer: resume_from_checkpoint")
def _(m, tmp):
    whole = train(m, tmp, save_strategy="steps", save_steps=2)
    resumed = Trainer(m.new(), whole.args, train_dataset=rows_of(m))
    resumed.train(resume_from_checkpoint=str(tmp / "run" / "checkpoint-2"))
    assert_same_weights(resumed.model, whole.model, 0)


@row("Trainer: torch_compile")
def _(m, tmp):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = m.kinds.causal(m.config(num_hidden_layers=1))
    options = {"torch_compile": True, "torch_compile_backend": "eager"}  # the graph matters here
    compiled = train(m, tmp, copy.deepcopy(model), max_steps=2, **options)
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] > 0 and not counted["graph_break"]
    assert_same_weights(compiled.model, train(m, tmp, model, max_steps=2).model, 1e-6)


# ---- adapters, cards, the hub


def lora(m):
    from peft import LoraConfig

    return LoraConfig(target_modules=list(m.linear), r=4, init_lora_weights=False)


@row("add_adapter")
def _(m, tmp):
    model = m.new()
    model.add_adapter(lora(m))
    adapted = logits(model, m.ids())
    assert (adapted - logits(m.first, m.ids())).abs().max() > 1e-2
    model.disable_adapters()
    assert_same_model(model.eval(), m)


@row("an adapter's folder in AutoModelForCausalLM")
def _(m, tmp):
    model = m.load()
    model.add_adapter(lora(m))
    model.save_pretrained(tmp)
    assert sorted(path.suffix for path in tmp.iterdir() if path.stat().st_size > 10_000) == [".safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp)
    assert_near(logits(loaded.eval(), m.ids()), logits(model.eval(), m.ids()), 1e-6)


@row("Trainer.create_model_card")
def _(m, tmp):
    trainer = train(m, tmp, max_steps=1)
    trainer.create_model_card(model_name="tiny")
    assert "tiny" in (tmp / "run" / "README.md").read_text()


@row("push_to_hub without a network")
def _(m, tmp):
    with pytest.raises((huggingface_hub.errors.OfflineModeIsEnabled, OSError)) as error:
        m.first.push_to_hub("someone/tiny")
    assert "offline" in str(error.value).lower()


@pytest.mark.parametrize(
    "row, subject",
    [pytest.param(row, model, id=f"{row.feature}-{model}") for row in ROWS for model in row.models],
    indirect=["subject"],
)
def test_row(row, subject, tmp_path, record_property):
    warnings.simplefilter("ignore")
    reason = row.refused.get(subject.name)
    if reason is None:
        row.trial(subject, tmp_path)
        return
    record_property("outcome", "refused")
    with pytest.raises(Exception, match=reason):
        row.trial(subject, tmp_path)
