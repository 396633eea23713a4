"""AndromedaConfig and AndromedaForCausalLM: the same model, with the interface of transformers."""

import copy
import dataclasses
import inspect
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from andromeda import Andromeda
from andromeda.config import ModelConfig
from andromeda.generation import Cache
from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM, AndromedaModel

SIZES = {"num_tokens": 61, "max_seq_len": 64, "dim": 32, "depth": 2, "dim_head": 16, "heads": 4, "alibi_num_heads": 2}
VARIANTS = {
    "defaults": {},
    "pre-norm": {"deepnorm": False},
    "own key heads": {"attn_one_kv_head": False, "qk_norm": False},
    "absolute positions": {"use_abs_pos_emb": True, "rotary_xpos": False, "shift_tokens": 2},
}


def small_model(**options) -> Andromeda:
    """A model whose gains and scales are off their initial constants, so that a test notices a forgotten one."""
    torch.manual_seed(1)
    model = Andromeda(**{**SIZES, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(params=VARIANTS, ids=str)
def pair(request):
    """The same parameters with both interfaces."""
    model = small_model(**VARIANTS[request.param])
    return model, AndromedaForCausalLM.from_andromeda(model)


def tokens(batch=2, seqlen=11):
    return torch.randint(1, SIZES["num_tokens"], (batch, seqlen))


def left_padded(rows):
    """Rows of different lengths as (input_ids, attention_mask), padded on the left with token 0."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


# ---- config


def test_config_defaults_are_those_of_the_constructor():
    assert ModelConfig(**AndromedaConfig().to_arguments()) == ModelConfig()


def test_config_translates_every_argument_there_and_back():
    arguments = {**SIZES, "deepnorm": False, "attn_one_kv_head": False, "shift_tokens": 0, "alibi_num_heads": None}
    full = ModelConfig(**arguments)
    config = AndromedaConfig.from_arguments({name: getattr(full, name) for name in full.__dataclass_fields__})
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert ModelConfig(**config.to_arguments()) == full


def test_config_file_round_trip(tmp_path):
    config = AndromedaConfig(hidden_size=48, num_attention_heads=2, alibi_num_heads=1, head_dim=8, eos_token_id=3)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is AndromedaConfig
    assert loaded.to_arguments() == config.to_arguments()
    assert loaded.eos_token_id == 3


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"hidden_size": 0}, "dim must be at least 1"),
        ({"head_dim": 30}, "dim_head must be a multiple of 4"),
        ({"alibi_num_heads": 25}, "alibi_num_heads must be None or between 0 and heads = 24"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be 1 or num_attention_heads"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"deepnorm": 1.5}, "deepnorm"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config_refuses_what_no_model_has(wrong, text):
    with pytest.raises(StrictDataclassError, match=text):
        AndromedaConfig(**wrong)


# ---- the same model


def test_logits_and_loss_are_those_of_andromeda(pair):
    model, wrapped = pair
    ids = tokens()
    labels = ids.clone()
    labels[0, 3:6] = -100
    out = wrapped(ids, labels=ids)
    assert torch.equal(out.logits, model(ids))
    torch.testing.assert_close(out.loss, model(ids, return_loss=True), atol=2e-6, rtol=0)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(wrapped(ids, labels=labels).loss, expected, atol=2e-6, rtol=0)


def test_gradients_are_those_of_andromeda():
    model = small_model()
    wrapped = AndromedaForCausalLM.from_andromeda(model)
    ids = tokens()
    expected = torch.autograd.grad(model(ids, return_loss=True), list(model.parameters()))
    found = torch.autograd.grad(wrapped(ids, labels=ids).loss, list(wrapped.parameters()))
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_conversion_shares_parameters_under_the_same_names(pair):
    model, wrapped = pair
    back = wrapped.to_andromeda()
    for other in (wrapped, back):
        assert list(other.state_dict()) == list(model.state_dict())
        for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
            assert ours is theirs
    assert back.decoder.net is back.transformer is model.transformer
    assert back.config == model.config


def test_there_are_no_buffers(pair):
    assert list(pair[1].buffers()) == []


def test_a_new_model_has_the_initial_distribution():
    """transformers must not replace the modules' own initial weights by weights with std 0.02."""
    torch.manual_seed(0)
    model = AndromedaForCausalLM(AndromedaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=512))
    assert model.transformer.token_emb.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert model.transformer.to_logits.weight.abs().max().item() == pytest.approx(1 / 8, rel=0.01)


def test_logits_to_keep(pair):
    ids = tokens()
    # A product of fewer rows may add in another order.
    torch.testing.assert_close(pair[1](ids, logits_to_keep=3).logits, pair[1](ids).logits[:, -3:])


def test_key_start_reaches_the_model(pair):
    model, wrapped = pair
    ids = tokens()
    key_start = torch.tensor([[0] * 4 + [4] * 7, [0] * 11], dtype=torch.int32)
    assert torch.equal(wrapped(ids, key_start=key_start).logits, model(ids, key_start=key_start))


def test_return_dict_false_gives_a_tuple():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    ids = tokens()
    loss, logits = wrapped(ids, labels=ids, return_dict=False)
    assert loss.ndim == 0 and logits.shape == (2, 11, 61)


@pytest.mark.parametrize(
    "training, recorded, skip, logits",
    [
        (True, True, None, False),
        (True, True, False, True),
        (True, False, None, True),
        (False, True, None, True),
        (False, False, True, False),
    ],
)
def test_a_training_step_leaves_the_logits_out(training, recorded, skip, logits):
    wrapped = AndromedaForCausalLM.from_andromeda(small_model()).train(training)
    ids = tokens()
    with torch.set_grad_enabled(recorded):
        out = wrapped(ids, labels=ids, skip_logits=skip)
        expected = wrapped(ids, labels=ids, skip_logits=False)
        assert len(out.to_tuple()) == len(wrapped(ids, labels=ids, skip_logits=skip, return_dict=False)) == 1 + logits
        assert wrapped(ids, skip_logits=False).logits.shape == (2, 11, 61)
        assert wrapped(ids).logits is not None
    torch.testing.assert_close(out.loss, expected.loss, atol=2e-6, rtol=0)
    if recorded:
        parameters = list(wrapped.parameters())
        pairs = zip(*(torch.autograd.grad(result.loss, parameters) for result in (out, expected)), strict=True)
        for found, ref in pairs:
            torch.testing.assert_close(found, ref, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="skip_logits must be left out without labels"):
        wrapped(ids, skip_logits=True)


def test_labels_are_checked_without_logits():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    ids = tokens()
    with pytest.raises(ValueError, match="labels must be below the vocabulary size 61, or -100, got 61"):
        wrapped(ids, labels=torch.full_like(ids, 61), skip_logits=True)
    with pytest.raises(ValueError, match="labels must have the shape of input_ids"):
        wrapped(ids, labels=ids[:, 1:], skip_logits=True)
    with pytest.raises(ValueError, match="labels must hold a token to predict"):
        wrapped(ids, labels=torch.full_like(ids, -100), skip_logits=True)


# ---- gradient accumulation


def test_num_items_in_batch_makes_the_losses_of_parts_add_up():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    ids = tokens(batch=4)
    labels = ids.clone()
    labels[0, 1:] = -100  # a row without any target: alone its mean would be NaN
    labels[1, 2:8] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = wrapped(ids, labels=labels).loss
    parts = [wrapped(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(4)]
    assert parts[0].item() == 0
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=1e-6)
    expected = torch.autograd.grad(whole, list(wrapped.parameters()))
    found = torch.autograd.grad(sum(parts), list(wrapped.parameters()))
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


# ---- masks


@torch.no_grad()
def test_left_padding_gives_each_row_what_it_gives_alone(pair):
    rows = [[5, 9, 2, 33, 7], [12], [3, 4, 5, 6, 7, 8, 9]]
    ids, mask = left_padded(rows)
    logits = pair[1](ids, attention_mask=mask).logits
    for row, found in zip(rows, logits, strict=True):
        alone = pair[1](torch.tensor([row])).logits[0]
        torch.testing.assert_close(found[-len(row) :], alone, atol=2e-5, rtol=0)


@torch.no_grad()
def test_right_padding_needs_no_mask():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    ids = tokens(batch=1)
    padded = torch.cat((ids, torch.zeros(1, 3, dtype=torch.int64)), dim=1)
    mask = torch.tensor([[1] * 11 + [0] * 3])
    out = wrapped(padded, attention_mask=mask)
    torch.testing.assert_close(out.logits[:, :11], wrapped(ids).logits, atol=2e-5, rtol=0)
    assert out.past_key_values is None
    with pytest.raises(ValueError, match="padding on the left where a cache is used"):
        wrapped(padded, attention_mask=mask, use_cache=True)


@pytest.mark.parametrize(
    "mask, text",
    [
        ([[1, 1, 1]], r"must have shape .* = \(1, 4\), got \(1, 3\)"),
        ([[[[1, 1, 1, 1]]]], "must have shape"),
        ([[[1, 1, 1, 1]]], "must have shape"),
    ],
    ids=["short", "four dimensions", "three dimensions"],
)
def test_other_masks_are_refused(mask, text):
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    with pytest.raises(ValueError, match=text):
        wrapped(torch.tensor([[1, 2, 3, 4]]), attention_mask=torch.tensor(mask))


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"is_causal": False}, ValueError, "is_causal must be None or True, since the model is causal"),
        ({"inputs_embeds": torch.ones(1, 4, 32)}, ValueError, "one of input_ids and inputs_embeds must be given"),
        ({"past_key_values": ((1, 2),)}, TypeError, "must be a cache that this model returned, .* got tuple"),
        ({"labels": torch.ones(1, 4, dtype=torch.int64), "logits_to_keep": 1}, ValueError, "left out with labels"),
        ({"labels": torch.full((1, 4), 61)}, ValueError, "labels must be below the vocabulary size 61"),
        ({"labels": torch.ones(1, 3, dtype=torch.int64)}, ValueError, "labels must have the shape of input_ids"),
        (
            {"attention_mask": torch.ones(1, 4), "key_start": torch.zeros(1, 4, dtype=torch.int32)},
            ValueError,
            "must not both be given",
        ),
        ({"position_ids": torch.ones(1, 4)}, TypeError, "position_ids must be a tensor of integers"),
        ({"position_ids": torch.arange(3)}, ValueError, r"position_ids must have shape .* = \(1, 4\)"),
        ({"lables": torch.ones(1, 4)}, TypeError, "unexpected keyword 'lables'"),
    ],
    ids=[
        "not causal",
        "ids twice",
        "foreign cache",
        "labels and part",
        "label range",
        "label shape",
        "mask twice",
        "float positions",
        "few positions",
        "unknown name",
    ],
)
def test_forward_refuses(arguments, error, text):
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    with pytest.raises(error, match=text):
        wrapped(torch.tensor([[1, 2, 3, 4]]), **arguments)


# ---- cache and generation


@torch.no_grad()
def test_a_cache_continues_the_sequence(pair):
    ids = tokens(seqlen=12)
    whole = pair[1](ids).logits
    first = pair[1](ids[:, :5], use_cache=True)
    second = pair[1](ids[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), dim=1), whole, atol=2e-5, rtol=0)
    assert second.past_key_values.get_seq_length() == 12


def test_training_makes_no_cache():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    assert wrapped(tokens()).past_key_values is None
    with torch.no_grad():
        assert isinstance(wrapped(tokens()).past_key_values, Cache)
        assert wrapped(tokens(), use_cache=False).past_key_values is None


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
def test_greedy_is_that_of_andromeda(pair, use_cache):
    model, wrapped = pair
    rows = [[5, 9, 2, 33, 7], [12, 3], [3, 4, 5, 6, 7, 8, 9]]
    expected = model.generate(rows, 9, temperature=0)
    ids, mask = left_padded(rows)
    found = wrapped.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, use_cache=use_cache)
    assert torch.equal(found[:, ids.shape[1] :], expected)
    alone = wrapped.generate(torch.tensor(rows[:1]), max_new_tokens=9, do_sample=False, use_cache=use_cache)
    assert torch.equal(alone[:, 5:], expected[:1])


def test_beam_search_reorders_the_cache():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    ids, mask = left_padded([[5, 9, 2, 33, 7], [12, 3]])
    found = [
        wrapped.generate(ids, attention_mask=mask, max_new_tokens=8, num_beams=4, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)
    greedy = wrapped.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert not torch.equal(found[0], greedy)  # else nothing had to be reordered


def test_sampling_does_not_depend_on_the_cache():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(wrapped.generate(tokens(1, 4) * 0 + 7, max_new_tokens=12, do_sample=True, use_cache=use_cache))
    assert torch.equal(*found)


def test_generation_stops_at_the_end_token():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    ids = torch.tensor([[5, 9, 2]])
    third = wrapped.generate(ids, max_new_tokens=3, do_sample=False)[0, -1].item()
    stopped = wrapped.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=third, pad_token_id=0)
    assert stopped.shape[1] <= 6 and stopped[0, -1].item() == third


# ---- files


def test_save_and_load_are_exact(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is AndromedaForCausalLM
    for (name, ours), (other, theirs) in zip(loaded.state_dict().items(), pair[1].state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs)
    ids = tokens()
    assert torch.equal(loaded(ids).logits, pair[1](ids).logits)


def test_load_in_bfloat16(tmp_path):
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    wrapped.save_pretrained(tmp_path)
    loaded = AndromedaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    ids = tokens()
    difference = (loaded(ids).logits.float() - wrapped(ids).logits).abs()
    assert difference.max() < 5e-2 and difference.mean() < 1e-2  # docs/model.md#15


def damage(folder, change):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda state: state.pop("transformer.to_logits.weight"), "missing: transformer.to_logits.weight"),
        (lambda state: state.update(extra=torch.zeros(2)), "unexpected: extra"),
    ],
    ids=["missing", "unexpected"],
)
def test_loading_names_what_does_not_fit(tmp_path, change, text):
    AndromedaForCausalLM.from_andromeda(small_model()).save_pretrained(tmp_path)
    damage(tmp_path, change)
    with pytest.raises(ValueError, match=text):
        AndromedaForCausalLM.from_pretrained(tmp_path)


def test_loading_a_truncated_file(tmp_path):
    AndromedaForCausalLM.from_andromeda(small_model()).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors must hold .* bytes"):
        AndromedaForCausalLM.from_pretrained(tmp_path)


def test_saved_config_is_readable_json(tmp_path):
    AndromedaForCausalLM.from_andromeda(small_model()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "andromeda" and saved["architectures"] == ["AndromedaForCausalLM"]


def test_a_damaged_shard(tmp_path):
    AndromedaForCausalLM.from_andromeda(small_model()).save_pretrained(tmp_path, max_shard_size="60kB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="whole safetensors file"):
        AndromedaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_list_of_shards_is_named(text, tmp_path):
    AndromedaForCausalLM.from_andromeda(small_model()).save_pretrained(tmp_path, max_shard_size="60kB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is damaged"):
        AndromedaForCausalLM.from_pretrained(tmp_path)


def tied(**options):
    model = small_model(**options)
    model.transformer.to_logits.weight = model.transformer.token_emb.weight
    return model


@pytest.mark.parametrize("when", ["before", "afterwards"])
def test_a_tied_projection_is_saved_and_loaded_as_such(when, tmp_path):
    wrapped = AndromedaForCausalLM.from_andromeda(tied() if when == "before" else small_model())
    wrapped.transformer.to_logits.weight = wrapped.transformer.token_emb.weight
    wrapped.save_pretrained(tmp_path)
    assert "transformer.to_logits.weight" not in load_file(tmp_path / "model.safetensors")
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), tokens()
    assert loaded.config.tie_word_embeddings
    assert loaded.transformer.to_logits.weight is loaded.transformer.token_emb.weight
    assert torch.equal(loaded(ids).logits, wrapped(ids).logits)
    back = loaded.to_andromeda()
    assert back.transformer.to_logits.weight is back.transformer.token_emb.weight
    again = AndromedaForCausalLM.from_andromeda(back)
    assert again.transformer.to_logits.weight is back.transformer.token_emb.weight
    loaded.resize_token_embeddings(70)
    assert loaded.transformer.to_logits.weight is loaded.transformer.token_emb.weight


def test_a_projection_of_its_own_is_never_overwritten():
    model = small_model()
    before = model.transformer.to_logits.weight.clone()
    with pytest.raises(ValueError, match="tie_word_embeddings must be False"):
        AndromedaForCausalLM.from_andromeda(model, tie_word_embeddings=True)
    assert torch.equal(model.transformer.to_logits.weight, before)
    made = AndromedaForCausalLM(AndromedaForCausalLM.from_andromeda(tied()).config)
    assert made.transformer.to_logits.weight is made.transformer.token_emb.weight


def test_other_shared_parameters_are_named_before_anything_is_written(tmp_path):
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    layers = wrapped.transformer.attn_layers.layers
    layers[2] = layers[0]
    with pytest.raises(
        ValueError, match=r"got transformer\.attn_layers\.layers\.2.* and .*layers\.0.*to_andromeda\(\)\.save"
    ):
        wrapped.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    wrapped.to_andromeda().save(tmp_path / "model")
    assert torch.equal(Andromeda.load(tmp_path / "model")(tokens() * 0), wrapped(tokens() * 0).logits)


def test_a_config_that_does_not_describe_the_modules_is_not_saved(tmp_path):
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    wrapped.transformer = small_model(num_tokens=70, deepnorm=False).transformer
    with pytest.raises(ValueError, match=r"config must describe .* differ in deepnorm, num_tokens"):
        wrapped.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


# name of a changed setting -> parameters that are drawn again
RESIZED = {
    "vocab_size": (400, ["to_logits.weight", "token_emb.weight"]),
    "max_position_embeddings": (80, ["pos_emb.weight"]),
    "head_dim": (
        24,
        ["fn.k_scale", "fn.q_scale", "fn.to_k.weight", "fn.to_out.weight", "fn.to_q.weight", "fn.to_v.weight"],
    ),
    "hidden_size": (48, ["norm.gamma", "residual_scale", "fn.proj_in.weight", "fn.proj_out.bias", "token_emb.weight"]),
}


@pytest.mark.parametrize("deepnorm", [True, False])
@pytest.mark.parametrize("setting", RESIZED)
def test_ignored_sizes_are_drawn_anew_and_named(setting, deepnorm, tmp_path):
    """They come from the distribution of a new model, and all others from the checkpoint."""
    size, names = RESIZED[setting]
    original = small_model(use_abs_pos_emb=True, deepnorm=deepnorm)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.fill_(777.0)
    AndromedaForCausalLM.from_andromeda(original).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mismatched"):
        AndromedaForCausalLM.from_pretrained(tmp_path, **{setting: size})
    with pytest.warns(UserWarning, match="had other shapes in the checkpoint and were drawn anew") as warned:
        loaded = AndromedaForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **{setting: size})
    text = str(warned[0].message)
    fresh = AndromedaForCausalLM(loaded.config)
    for name, parameter in loaded.named_parameters():
        if drawn := f"{name}," in text or f"{name} had" in text:
            like = fresh.get_parameter(name)
            assert parameter.isfinite().all() and parameter.abs().max() < 100
            assert parameter.std().item() == pytest.approx(like.std().item(), rel=0.35, abs=1e-6)
            assert parameter.mean().item() == pytest.approx(like.mean().item(), abs=4 * like.std().item() + 1e-6)
        assert drawn == (tuple(parameter.shape) != tuple(original.get_parameter(name).shape))
        assert drawn or (parameter == 777).all()
    assert all((deepnorm is False and name == "residual_scale") or name in text for name in names)


def test_ignored_sizes_leave_other_faults(tmp_path):
    AndromedaForCausalLM.from_andromeda(small_model()).save_pretrained(tmp_path)
    damage(tmp_path, lambda state: state.pop("transformer.to_logits.weight"))
    with pytest.raises(ValueError, match=r"missing: transformer\.to_logits\.weight"):
        AndromedaForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("depth", [3, 100_000])
def test_more_layers_than_the_checkpoint_has_are_refused_at_once(depth, tmp_path):
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    for shards, options in (("one", {}), ("several", {"max_shard_size": "60kB"})):
        wrapped.save_pretrained(tmp_path / shards, **options)
        with pytest.raises(ValueError, match=f"depth {depth} needs {2 * depth} sub-layers, found 4"):
            AndromedaForCausalLM.from_pretrained(tmp_path / shards, num_hidden_layers=depth)
    saved = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps(saved | {"num_hidden_layers": depth}))
    with pytest.raises(ValueError, match=f"depth {depth} needs"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "one")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(dtype, tmp_path):
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    with torch.no_grad():
        wrapped.transformer.to_logits.weight[3, 4] = torch.nan
    wrapped.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"not finite.*transformer\.to_logits\.weight \(1 of 1952\)"):
        AndromedaForCausalLM.from_pretrained(tmp_path, dtype=dtype)


def test_names_of_wrappers_are_left_out(tmp_path):
    wrapped, ids = AndromedaForCausalLM.from_andromeda(small_model()), tokens()
    expected = wrapped(ids).logits
    layers = wrapped.transformer.attn_layers.layers
    layers[1] = torch.compile(layers[1], backend="eager")
    wrapped.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(small_model().state_dict())
    damage(
        tmp_path, lambda state: [state.update({f"_orig_mod.module.{name}": state.pop(name)}) for name in list(state)]
    )
    torch.testing.assert_close(AndromedaForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


def test_a_foreign_embedding_is_not_saved(tmp_path):
    class Doubled(torch.nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    class Provider:
        def get_embedding(self, num_tokens, dim):
            return Doubled(num_tokens, dim)

    wrapped = AndromedaForCausalLM.from_andromeda(small_model(embedding_provider=Provider()))
    with pytest.raises(ValueError, match="embedding_provider must be the default"):
        wrapped.save_pretrained(tmp_path)


# ---- other services of transformers


def test_activation_checkpointing_changes_no_gradient():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model()).train()
    ids = tokens()
    expected = torch.autograd.grad(wrapped(ids, labels=ids).loss, list(wrapped.parameters()))
    wrapped.activation_checkpointing_enable()
    assert wrapped.transformer.attn_layers.gradient_checkpointing
    found = torch.autograd.grad(wrapped(ids, labels=ids).loss, list(wrapped.parameters()))
    for theirs, ours in zip(expected, found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}, {"every_n_layers": 3}], ids=str)
def test_options_of_activation_checkpointing(options):
    """A layer of transformers is a block of two sub-layers here."""
    if not {*options} <= {*inspect.signature(AndromedaForCausalLM.activation_checkpointing_enable).parameters}:
        pytest.skip("this version of transformers does not have the option")
    wrapped, ids = AndromedaForCausalLM.from_andromeda(small_model(depth=4)).train(), tokens()
    layers, computed = wrapped.transformer.attn_layers.layers, []
    for layer in layers:
        layer.fn.register_forward_pre_hook(lambda module, inputs, layer=layer: computed.append(layer.index))
    wrapped.activation_checkpointing_enable(**options)
    assert wrapped.is_activation_checkpointing
    expected = [index for index in range(8) if index // 2 % options.get("every_n_layers", 1) == 0]
    wrapped(ids, labels=ids).loss.backward()
    assert sorted(computed) == sorted([*range(8), *expected])
    computed.clear()
    wrapped.activation_checkpointing_disable()
    assert not wrapped.is_activation_checkpointing
    wrapped(ids, labels=ids).loss.backward()
    assert sorted(computed) == list(range(8))
    with pytest.raises(ValueError, match="every_n_layers must be at least 1, got 0"):
        wrapped.activation_checkpointing_enable(every_n_layers=0)


def test_resized_vocabulary_is_known_to_the_modules():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    wrapped.resize_token_embeddings(70)
    assert wrapped(torch.tensor([[69, 1]])).logits.shape == (1, 2, 70)
    assert wrapped.to_andromeda().config.num_tokens == 70


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("way", ["from_andromeda", "config", "from_pretrained"])
def test_a_fresh_model_compiles_into_one_graph_with_labels(way, padding, tmp_path):
    torch.compiler.reset()
    wrapped = AndromedaForCausalLM.from_andromeda(small_model(depth=1))
    if way == "config":
        wrapped = AndromedaForCausalLM(wrapped.config)
    elif way == "from_pretrained":
        wrapped.save_pretrained(tmp_path)
        wrapped = AndromedaForCausalLM.from_pretrained(tmp_path)
    ids = tokens()
    mask = torch.tensor([[1] * 11, [0] * 4 + [1] * 7] if padding == "left" else [[1] * 11, [1] * 4 + [0] * 7])
    batch = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}
    out = torch.compile(wrapped, fullgraph=True, backend="eager")(**batch)
    out.loss.backward()
    found = [parameter.grad.clone() for parameter in wrapped.parameters()]
    expected = wrapped(**batch).loss
    torch.testing.assert_close(out.loss, expected)
    for gradient, other in zip(found, torch.autograd.grad(expected, list(wrapped.parameters())), strict=True):
        torch.testing.assert_close(gradient, other)


def test_the_model_runs_on_fake_tensors():
    wrapped, ids = AndromedaForCausalLM.from_andromeda(small_model()), tokens()
    wrong = torch.full_like(ids, 99)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert wrapped(ids, labels=wrong).loss.shape == ()
        with torch.no_grad():
            assert wrapped(ids, attention_mask=torch.ones(2, 11)).logits.shape == (2, 11, 61)
    with pytest.raises(ValueError, match="labels must be below"):
        wrapped(ids, labels=wrong)
    assert type(wrapped(ids, labels=ids).loss) is torch.Tensor


def test_a_replaced_transformer_is_used_everywhere():
    wrapped, other = AndromedaForCausalLM.from_andromeda(small_model()), small_model(num_tokens=70)
    wrapped.transformer = other.transformer
    ids = torch.tensor([[69, 3, 5]])
    assert torch.equal(wrapped(ids).logits, other(ids))
    torch.testing.assert_close(wrapped(ids, labels=ids).loss, other(ids, return_loss=True))
    assert torch.equal(
        wrapped.generate(ids, max_new_tokens=4, do_sample=False)[0, 3:], other.generate(ids, 4, temperature=0)[0]
    )
    back = wrapped.to_andromeda()
    assert back.config == other.config and torch.equal(back(ids), other(ids))
    assert back.decoder.net is other.transformer


@pytest.mark.parametrize(
    "wanted", [torch.tensor([4]), torch.tensor([1, 3]), torch.tensor([-1, 0], dtype=torch.int32)], ids=str
)
def test_logits_at_positions(pair, wanted):
    ids = tokens()
    torch.testing.assert_close(pair[1](ids, logits_to_keep=wanted).logits, pair[1](ids).logits[:, wanted.long()])


@pytest.mark.parametrize(
    "wanted", [-1, True, 1.0, [1], None, torch.tensor([True] * 11), torch.tensor(2), torch.tensor([11])], ids=str
)
def test_wrong_logits_to_keep(wanted):
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    with pytest.raises((TypeError, ValueError), match="AndromedaForCausalLM: logits_to_keep must"):
        wrapped(tokens(), logits_to_keep=wanted)


# ---- the contract of forward


@torch.no_grad()
def test_the_base_model_gives_what_the_head_reads(pair):
    model, wrapped = pair
    ids = tokens()
    found = wrapped.base_model(input_ids=ids)
    assert isinstance(wrapped.base_model, AndromedaModel) and found.past_key_values.position == 11
    logits = wrapped.get_output_embeddings()(found.last_hidden_state)
    torch.testing.assert_close(logits, model(ids), atol=2e-5, rtol=0)
    assert wrapped.get_decoder() is wrapped.base_model is wrapped.transformer
    assert wrapped.get_input_embeddings() is model.transformer.token_emb


def test_two_faces_have_the_same_children(pair):
    wrapped = pair[1]
    base, wrapper = wrapped.transformer, wrapped.transformer.wrapper
    wrapped.set_input_embeddings(torch.nn.Embedding(61, 32))
    assert base.token_emb is wrapper.token_emb
    other = copy.deepcopy(wrapped)
    other.transformer.to_logits = torch.nn.Linear(32, 61)
    assert other.transformer.wrapper.to_logits is other.transformer.to_logits is not base.to_logits
    assert other.transformer.wrapper is not wrapper


@torch.no_grad()
def test_ids_of_32_bits_and_embeddings(pair):
    wrapped, ids = pair[1], tokens()
    expected = wrapped(ids).logits
    assert torch.equal(wrapped(ids.int()).logits, expected)
    assert torch.equal(wrapped(inputs_embeds=wrapped.get_input_embeddings()(ids)).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("form", ["position_ids", "seq_idx", "cu_seq_lens_q", "4-D mask", "key_start"])
def test_packed_documents_are_as_alone(form):
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    ids, lengths = tokens(1, 12), [5, 4, 3]
    key_start = torch.tensor([[0] * 5 + [5] * 4 + [9] * 3], dtype=torch.int32)
    token = torch.arange(12)
    options = {
        "position_ids": {"position_ids": token - key_start},
        "seq_idx": {"seq_idx": torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])},
        "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, 5, 9, 12]), "cu_seq_lens_k": torch.tensor([0, 5, 9, 12])},
        "4-D mask": {"attention_mask": ((token >= key_start.T) & (token <= token[:, None]))[None, None]},
        "key_start": {"key_start": key_start},
    }
    packed = wrapped(ids, **options[form]).logits
    alone = [wrapped(document).logits for document in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=2e-5, rtol=0)


@torch.no_grad()
def test_documents_described_twice_see_what_both_allow(pair):
    wrapped, ids = pair[1], tokens(1, 8)
    rows = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1]])  # of an absolute table
    positions = torch.arange(8) if wrapped.transformer.pos_emb is None else rows
    expected = wrapped(ids, cu_seq_lens_q=torch.tensor([0, 3, 6, 8])).logits
    numbers = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1]])
    found = wrapped(ids, cu_seq_lens_q=torch.tensor([0, 3, 8]), position_ids=positions, seq_idx=numbers).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    for name, value in {"seq_idx": numbers, "cu_seq_lens_q": torch.tensor([0, 3, 8])}.items():
        with pytest.raises(ValueError, match=f"{name} and key_start must not both be given"):
            wrapped(ids, key_start=torch.zeros(1, 8, dtype=torch.int32), **{name: value})
    with pytest.raises(ValueError, match="cu_seq_lens_q must be given with cu_seq_lens_k"):
        wrapped(ids, cu_seq_lens_k=torch.tensor([0, 3, 8]))


@torch.no_grad()
def test_documents_beside_padding_between_tokens_are_refused(pair):
    wrapped, ids = pair[1], tokens(1, 8)
    mask, positions = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 0]]), torch.tensor([[0, 1, 2, 0, 0, 1, 2, 0]])
    others = {
        "position_ids": positions,
        "seq_idx": torch.tensor([[0] * 4 + [1] * 4]),
        "cu_seq_lens_q": torch.tensor([0, 4, 8]),
    }
    alone = wrapped(ids[:, 4:7]).logits
    for name, value in others.items():
        with pytest.raises(ValueError, match=f"{name} must describe one document .* leave the mask out"):
            wrapped(ids, attention_mask=mask, **{name: value})
        torch.testing.assert_close(wrapped(ids, **{name: value}).logits[:, 4:7], alone, atol=2e-5, rtol=0)
    expected = wrapped(ids, attention_mask=mask).logits
    for one in (mask.cumsum(1) - 1, torch.arange(8)):
        assert torch.equal(wrapped(ids, attention_mask=mask, position_ids=one).logits, expected)


@torch.no_grad()
def test_padding_between_tokens_gives_each_row_what_it_gives_alone(pair):
    """Prompt tuning puts its vectors before prompts that are padded on the left."""
    wrapped, ids = pair[1], tokens(2, 7)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 0, 1, 0]])
    out = wrapped(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    for row, (shown, visible) in enumerate(zip(ids, mask.bool(), strict=True)):
        alone = wrapped(shown[visible][None], output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(out.logits[row, visible], alone.logits[0], atol=2e-5, rtol=0)
        for states, expected in zip(out.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(states[row, visible], expected[0], atol=2e-5, rtol=0)
        for weights, expected in zip(out.attentions, alone.attentions, strict=True):
            torch.testing.assert_close(weights[row][:, visible][:, :, visible], expected[0], atol=2e-5, rtol=0)
            assert not weights[row][:, visible][:, :, ~visible].any()


@torch.no_grad()
def test_padding_between_tokens_before_a_cache():
    wrapped, ids = AndromedaForCausalLM.from_andromeda(small_model()), tokens(1, 7)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1, 1]])
    found = wrapped.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    expected = wrapped.generate(ids[mask.bool()][None], max_new_tokens=6, do_sample=False)
    assert torch.equal(found[0, 7:], expected[0, 5:])


def test_shifted_labels_and_a_mask_on_both_sides():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    ids = tokens()
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    expected = wrapped(ids, labels=ids).loss
    torch.testing.assert_close(wrapped(ids, shift_labels=shifted).loss, expected)
    torch.testing.assert_close(wrapped(ids, shift_labels=shifted, labels=ids).loss, expected)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, -2:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100  # the padding before it predicts nothing
    losses = [wrapped(row[m.bool()][None], labels=row[m.bool()][None]).loss for row, m in zip(ids, mask, strict=True)]
    found = wrapped(ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(found, (losses[0] * 7 + losses[1] * 8) / 15)


@pytest.mark.parametrize("deepnorm", [True, False])
def test_hidden_states_and_attentions(deepnorm):
    wrapped = AndromedaForCausalLM.from_andromeda(small_model(deepnorm=deepnorm))
    ids, mask = left_padded([[5, 9, 2, 33, 7], [12, 3]])
    out = wrapped(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(out.logits, wrapped(ids, attention_mask=mask).logits, atol=2e-5, rtol=0)
    assert torch.equal(out.hidden_states[0], wrapped.transformer.token_emb(ids))
    assert torch.equal(wrapped.transformer.to_logits(out.hidden_states[-1]), out.logits)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    for weights in out.attentions:
        assert weights.shape == (2, 4, 5, 5) and not weights.triu(1).any() and not weights[1, :, 3:, :3].any()
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(4, 5))
    with torch.no_grad():
        first = wrapped(ids[:, :3], attention_mask=mask[:, :3], use_cache=True)
        second = wrapped(ids[:, 3:], past_key_values=first.past_key_values, output_attentions=True)
    torch.testing.assert_close(second.attentions[1], out.attentions[1][:, :, 3:], atol=2e-5, rtol=0)
    wrapped.config.output_hidden_states = True
    assert len(wrapped(ids).hidden_states) == 3


def test_gradients_flow_through_attentions_and_embeddings():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model())
    ids = tokens()
    embeddings = wrapped.get_input_embeddings()(ids).detach().requires_grad_()
    expected = torch.autograd.grad(wrapped(inputs_embeds=embeddings, labels=ids).loss, embeddings)[0]
    out = wrapped(inputs_embeds=embeddings, labels=ids, output_attentions=True)
    found, *weights = torch.autograd.grad(out.loss, (embeddings, *out.attentions))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert all(gradient.any() for gradient in weights)


def test_positions_of_the_table_are_those_given():
    wrapped = AndromedaForCausalLM.from_andromeda(small_model(use_abs_pos_emb=True, rotary_xpos=False))
    ids = tokens(1, 6)
    shifted = wrapped(ids, position_ids=torch.arange(9, 15)[None]).logits
    table = wrapped.transformer.pos_emb.weight
    with torch.no_grad():
        table.copy_(table.roll(-9, dims=0))
    torch.testing.assert_close(wrapped(ids).logits, shifted)
    with pytest.raises(ValueError, match="max_seq_len=64 of the absolute position table, got a token at position 64"):
        wrapped(ids, position_ids=torch.arange(59, 65)[None])


@pytest.mark.parametrize("kind", ["sequence", "token"])
def test_classification_heads(kind, tmp_path):
    model = AndromedaForCausalLM.from_andromeda(small_model())
    model.config.pad_token_id, model.config.num_labels = 0, 3
    auto = AutoModelForSequenceClassification if kind == "sequence" else AutoModelForTokenClassification
    classifier = auto.from_config(model.config).eval()
    classifier.transformer.load_state_dict(model.transformer.state_dict(), strict=False)
    ids, mask = left_padded([[5, 9, 2, 33, 7], [12, 3]])
    labels = torch.tensor([2, 0]) if kind == "sequence" else torch.full_like(ids, 1)
    out = classifier(ids, attention_mask=mask, labels=labels)
    out.loss.backward()
    features = model.base_model(ids, attention_mask=mask).last_hidden_state
    expected = classifier.score(features)
    torch.testing.assert_close(out.logits, expected[:, -1] if kind == "sequence" else expected)
    assert classifier.transformer.token_emb.weight.grad.any() and not classifier.accepts_loss_kwargs


def test_attention_of_a_model_without_kernels():
    config = AndromedaConfig.from_arguments(dataclasses.asdict(small_model(attn_flash=False).config))
    assert AndromedaForCausalLM(config).config._attn_implementation == "eager"
    with pytest.raises(ValueError, match='must be "eager" where attn_flash is False, got "sdpa"'):
        AndromedaForCausalLM._from_config(config, attn_implementation="sdpa")


def test_eager_attention_is_not_saved(tmp_path):
    model = AndromedaForCausalLM.from_andromeda(small_model())
    model.set_attn_implementation("eager")
    assert not model.to_andromeda().config.attn_flash
    model.save_pretrained(tmp_path)
    loaded = AndromedaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "andromeda" and loaded.to_andromeda().config.attn_flash
