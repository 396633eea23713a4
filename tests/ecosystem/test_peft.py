"""PEFT on Andromeda, beside a Llama of the same size: methods train, save, load and merge, with right values."""

import copy

import peft
import pytest
import torch
from peft import (
    AdaLoraConfig,
    HiraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM

VOCABULARY = 64
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
NAMES = {
    "andromeda": {
        "attention": ["to_q", "to_k", "to_v", "to_out"],
        "feed-forward": ["proj_in", "proj_out"],
        "down": ["proj_out"],
        "embedding": "token_emb",
        "head": "to_logits",
        "norms": ["norm"],
    },
    "llama": {
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "feed-forward": ["gate_proj", "up_proj", "down_proj"],
        "down": ["down_proj"],
        "embedding": "embed_tokens",
        "head": "lm_head",
        "norms": ["input_layernorm", "post_attention_layernorm", "norm"],
    },
}


def new_model(family, **options):
    """A small model, always with the same weights."""
    torch.manual_seed(0)
    options = {**TOKENS, **SIZES, "max_position_embeddings": 64, **options}
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**options, intermediate_size=64))
    return AndromedaForCausalLM(AndromedaConfig(**options, alibi_num_heads=2))


def new_batch():
    """Two rows of different lengths, padded on the right."""
    ids = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[1, 9:], mask[1, 9:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def causal(config, **options):
    return config(task_type=TaskType.CAUSAL_LM, **options)


def all_linear(names):
    return names["attention"] + names["feed-forward"]


# name -> the config for the names of a family, and whether the adapter can be merged into the weights.
METHODS = {
    "lora": (lambda n: causal(LoraConfig, target_modules="all-linear", r=4, init_lora_weights=False), True),
    "lora without target_modules": (lambda n: causal(LoraConfig, r=4, init_lora_weights=False), True),
    "adalora without target_modules": (lambda n: causal(AdaLoraConfig, init_r=4, total_step=10), True),
    "hira without target_modules": (lambda n: causal(HiraConfig, r=4), True),
    "lora on embeddings": (
        lambda n: causal(LoraConfig, target_modules=[n["embedding"]], r=4, init_lora_weights=False),
        True,
    ),
    "lora and the head": (
        lambda n: causal(LoraConfig, target_modules=n["attention"], r=4, modules_to_save=[n["head"]]),
        True,
    ),
    "lora and new tokens": (
        lambda n: causal(
            LoraConfig, target_modules=n["attention"], r=4, trainable_token_indices={n["embedding"]: [5, 7]}
        ),
        True,
    ),
    "dora and the head": (
        lambda n: causal(
            LoraConfig,
            target_modules=all_linear(n),
            r=4,
            use_dora=True,
            init_lora_weights=False,
            modules_to_save=[n["head"]],
        ),
        True,
    ),
    "adalora": (lambda n: causal(AdaLoraConfig, target_modules=all_linear(n), init_r=4, total_step=10), True),
    "ia3": (
        lambda n: causal(IA3Config, target_modules=n["attention"][1:3] + n["down"], feedforward_modules=n["down"]),
        True,
    ),
    "ia3 without target_modules": (lambda n: causal(IA3Config), True),
    "loha": (lambda n: causal(LoHaConfig, target_modules=all_linear(n), r=4), True),
    "lokr": (lambda n: causal(LoKrConfig, target_modules=all_linear(n), r=4), True),
    "oft": (lambda n: causal(OFTConfig, target_modules=all_linear(n), oft_block_size=8), True),
    "vera": (lambda n: causal(VeraConfig, target_modules=n["attention"][:1], r=4), True),
    "norms": (lambda n: causal(LNTuningConfig, target_modules=n["norms"]), False),
    "prompt tuning": (lambda n: causal(PromptTuningConfig, num_virtual_tokens=3), False),
    "p-tuning": (lambda n: causal(PromptEncoderConfig, num_virtual_tokens=3, encoder_hidden_size=16), False),
    "prefix tuning": (lambda n: causal(PrefixTuningConfig, num_virtual_tokens=3), False),
}
FAMILIES = pytest.mark.parametrize("family", ["andromeda", "llama"])
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


def adapted(family, method, base=None):
    """A model with an adapter of this method."""
    return get_peft_model(new_model(family) if base is None else base, METHODS[method][0](NAMES[family]))


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits(model):
    return model.eval()(**{**new_batch(), "labels": None}).logits


def difference(left, right):
    return (left - right).abs().max().item()


@FAMILIES
@EVERY_METHOD
def test_trains_saves_loads_and_merges(family, method, tmp_path):
    model = adapted(family, method)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(model.train()(**new_batch()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and changed <= set(trainable(model))

    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(new_model(family), tmp_path / "adapter")
    assert difference(logits(loaded), expected) == 0

    if METHODS[method][1]:
        merged = model.merge_and_unload()
        assert type(merged) is type(new_model(family))
        assert difference(logits(merged), expected) < 1e-5
        expected = logits(merged)
        merged.save_pretrained(tmp_path / "merged")
        assert difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected) == 0


@EVERY_METHOD
def test_gradients_are_the_slopes_of_the_loss(method):
    """Along a random direction in the space of the adapter's parameters, in float64."""
    model = adapted("andromeda", method).double().train()
    parameters = trainable(model)
    if "dora" in method:  # its paper takes the norm of the weight for a constant: no true derivative in these
        parameters = {name: p for name, p in parameters.items() if "lora_A" not in name and "lora_B" not in name}
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.02 * torch.randn_like(parameter)  # also those that begin at zero
    model(**new_batch()).loss.backward()
    directions = {name: torch.randn_like(parameter) for name, parameter in parameters.items()}
    slope = sum((parameter.grad * directions[name]).sum() for name, parameter in parameters.items())

    @torch.no_grad()
    def loss_at(step):
        for name, parameter in parameters.items():
            parameter += step * directions[name]
        loss = model(**new_batch()).loss
        for name, parameter in parameters.items():
            parameter -= step * directions[name]
        return loss

    step = 1e-5
    torch.testing.assert_close(slope, (loss_at(step) - loss_at(-step)) / (2 * step), rtol=1e-5, atol=1e-9)
    assert slope.abs() > 1e-5


def test_float32_gradients_are_those_of_the_merged_weights():
    """With an adapter the maps are called one by one, without it fused operations read their weights."""
    model = adapted("andromeda", "lora").train()
    merged = copy.deepcopy(model).merge_and_unload().requires_grad_(True).train()
    model(**new_batch()).loss.backward()
    merged(**new_batch()).loss.backward()
    names = set()
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            names.add(name.rpartition(".")[-1])
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            scale, dweight = module.scaling["default"], merged.get_submodule(name).weight.grad
            torch.testing.assert_close(down.grad, scale * up.T @ dweight, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(up.grad, scale * dweight @ down.T, rtol=1e-4, atol=1e-6)
    assert names == {"to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out"}


@FAMILIES
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(family, reentrant):
    gradients = []
    for checkpointing in (False, True):
        base = new_model(family)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = adapted(family, "lora", base).train()
        torch.manual_seed(5)
        model(**new_batch()).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trainable(model).items()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@FAMILIES
def test_an_adapter_can_be_switched_off_and_exchanged(family):
    plain = logits(new_model(family))
    model = adapted(family, "lora")
    first = logits(model)
    model.add_adapter("second", METHODS["lora"][0](NAMES[family]))
    model.set_adapter("second")
    second = logits(model)
    with model.disable_adapter():
        assert difference(logits(model), plain) == 0
    model.set_adapter("default")
    assert difference(logits(model), first) == 0
    assert min(difference(first, second), difference(first, plain), difference(second, plain)) > 1e-3
    rows = {**new_batch(), "labels": None, "adapter_names": ["second", "__base__"]}
    with torch.no_grad():
        mixed = model(**rows).logits
    assert difference(mixed[0], second[0]) < 1e-5 and difference(mixed[1], plain[1]) < 1e-5


@FAMILIES
def test_adapters_of_transformers(family, tmp_path):
    """`add_adapter` of the model itself, and an adapter folder opened by `AutoModelForCausalLM`."""
    model = new_model(family)
    plain = logits(model)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(LoraConfig(target_modules=NAMES[family]["attention"], r=4, init_lora_weights=False))
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json"}
    assert not list((tmp_path / "adapter").glob("model*"))
    model.disable_adapters()
    assert difference(logits(model), plain) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert difference(logits(loaded), expected) == 0 < difference(expected, plain)


@FAMILIES
@pytest.mark.parametrize("method", ["lora", "ia3", "prompt tuning", "prefix tuning"])
def test_generates_the_same_with_a_cache(family, method):
    model = adapted(family, method).eval()
    with torch.no_grad():
        for name, parameter in trainable(model).items():
            if "lora" not in name:
                parameter += torch.randn_like(parameter)
    ids = new_batch()["input_ids"][:1]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(input_ids=ids, **options)
    rows = ids
    for _ in range(6):  # the model of PEFT forwards to the whole sequence, without a cache
        with torch.no_grad():
            scores = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, -1]
        scores[:, 1] = -torch.inf  # min_new_tokens
        rows = torch.cat((rows, scores.argmax(-1, keepdim=True)), dim=1)
    assert cached[:, -6:].tolist() == rows[:, -6:].tolist()
    adapted_scores = model(input_ids=ids).logits[:, -1]
    with model.disable_adapter():
        assert difference(model(input_ids=ids).logits[:, -1], adapted_scores) > 1e-3


@pytest.mark.parametrize("method", ["lora", "prompt tuning", "p-tuning"])
def test_a_padded_row_equals_the_row_alone(method):
    """Padding on the left stands between virtual tokens and the row: 1 1 1 0 0 0 1 1 1 1."""
    model = adapted("andromeda", method).eval()
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter += torch.randn_like(parameter)
    first, row = new_batch()["input_ids"][0], new_batch()["input_ids"][1:, :9]
    ids = torch.stack((first, torch.cat((torch.zeros(3, dtype=torch.long), row[0]))))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask).logits[1, -9:]
        alone = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0, -9:]
    assert difference(together, alone) < 1e-5
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    together = model.generate(input_ids=ids, attention_mask=mask, **options)[1, -5:]
    alone = model.generate(input_ids=row, attention_mask=torch.ones_like(row), **options)[0, -5:]
    assert together.tolist() == alone.tolist()


PACKED = {
    "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]]),
    "seq_idx": torch.tensor([[0] * 5 + [1] * 7]),
    "cu_seq_lens_q": torch.tensor([0, 5, 12]),
}


@pytest.mark.parametrize("name", PACKED)
def test_packed_documents_after_a_prefix_are_refused(name):
    """Only the first document of a row would see the prefix."""
    model = adapted("andromeda", "prefix tuning")
    with pytest.raises(ValueError, match="one document per row after a learned prefix"):
        model(input_ids=new_batch()["input_ids"][:1], **{name: PACKED[name]})
    model(input_ids=new_batch()["input_ids"][:1], position_ids=torch.arange(12)[None])


@pytest.mark.parametrize("name", ["seq_idx", "cu_seq_lens_q"])
def test_packed_documents_after_virtual_tokens_are_refused(name):
    """They belong to no document. PEFT itself drops `position_ids`, with a warning."""
    model = adapted("andromeda", "prompt tuning")
    with pytest.raises(ValueError, match=f"{name} must .* got"):
        model(input_ids=new_batch()["input_ids"][:1], **{name: PACKED[name]})


def test_an_adapter_compiles_to_one_graph():
    model = adapted("andromeda", "lora", new_model("andromeda", num_hidden_layers=1)).train()
    results = []
    for call in (model, torch.compile(model, backend="eager", fullgraph=True)):
        loss = call(**new_batch()).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in trainable(model).values())])
        model.zero_grad()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-7)


@FAMILIES
def test_qlora(family, tmp_path):
    new_model(family, hidden_size=64, head_dim=32).save_pretrained(tmp_path)  # whole blocks of 64 numbers
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    model = get_peft_model(prepare_model_for_kbit_training(model), METHODS["lora"][0](NAMES[family]))
    layers = [module for module in model.modules() if isinstance(module, peft.tuners.lora.bnb.Linear4bit)]
    assert len(layers) == 2 * len(all_linear(NAMES[family]))
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(model.train()(**new_batch()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    assert all("lora" in name for name in trainable(model))

    @torch.no_grad()
    def result(model):  # in training mode: else bitsandbytes computes in bfloat16 on some processors
        return model.train()(**new_batch()).loss

    expected = result(model)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
    assert difference(result(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected) == 0
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization).dequantize()
    assert difference(result(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected) < 1e-5


@FAMILIES
def test_a_classification_head_is_trained_and_saved_with_the_adapter(family, tmp_path):
    new_model(family).save_pretrained(tmp_path / "base")
    options = {"num_labels": 2, "pad_token_id": 0}

    def base():
        torch.manual_seed(6)
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **options)

    model = get_peft_model(base(), LoraConfig(task_type=TaskType.SEQ_CLS, target_modules="all-linear", r=4))
    batch = {**new_batch(), "labels": torch.tensor([0, 1])}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(model.train()(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(7)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert difference(logits(loaded), expected) == 0
