"""`from_pretrained` of all classes: what is refused, what is drawn anew, and what the user is told."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import andromeda
from andromeda.huggingface import (
    AndromedaConfig,
    AndromedaForCausalLM,
    AndromedaForSequenceClassification,
    AndromedaForTokenClassification,
    AndromedaModel,
)

CLASSES = (AndromedaModel, AndromedaForCausalLM, AndromedaForSequenceClassification, AndromedaForTokenClassification)
PROJECTION, EMBEDDING = "transformer.to_logits.weight", "transformer.token_emb.weight"
IDS = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def config(**options):
    sizes = {
        "vocab_size": 61,
        "max_position_embeddings": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 8,
        "alibi_num_heads": 2,
        "pad_token_id": 0,
    }
    return AndromedaConfig(**{**sizes, **options})


def marked(model_class, **options):
    """A model whose gains and scales are off their initial constants."""
    torch.manual_seed(5)
    model = model_class(config(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(model_class, **settings): the folder of a saved model, and the model."""
    made = {}

    def save(model_class, **options):
        key = model_class, *options.items()
        if key not in made:
            folder, model = tmp_path_factory.mktemp(model_class.__name__), marked(model_class, **options)
            model.save_pretrained(folder)
            made[key] = folder, model
        return made[key]

    return save


def damaged(folder, tmp_path, change):
    """A copy of the folder whose weights are changed."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


@pytest.fixture
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def assert_drawn(name, parameter):
    """The parameter has the distribution of docs/model.md#11."""
    own = name.rpartition(".")[2]
    if own in ("gamma", "residual_scale", "q_scale", "k_scale"):
        expected = {"gamma": 0.0, "residual_scale": 1.0}.get(own, 8**0.25)
        assert (parameter == expected).all(), name
        return
    beta = (8 * 2) ** -0.25
    fan_out, fan_in = parameter.shape if parameter.ndim == 2 else (len(parameter), 32)
    if "token_emb" in name:
        std = (2 / 32) ** 0.5
    elif ".fn." in name:
        std = (beta if "to_q" not in name and "to_k" not in name else 1) * (2 / (fan_in + fan_out)) ** 0.5
        std = 0 if own == "bias" else std
    else:
        std = (3 * fan_in) ** -0.5
    assert parameter.std().item() == pytest.approx(std, rel=0.6 if parameter.numel() < 100 else 0.25), name
    assert abs(parameter.mean().item()) <= 5 * std / parameter.numel() ** 0.5, name


# ---- what is damaged


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
def test_damage_is_refused_and_named(model_class, saved, tmp_path):
    folder, _ = saved(model_class)
    prefix = "" if model_class is AndromedaModel else "transformer."

    def change(state):
        state.pop(f"{prefix}attn_layers.layers.1.fn.proj_in.weight")
        state.pop(f"{prefix}token_emb.weight")
        state["extra"] = torch.zeros(2)

    path = damaged(folder, tmp_path, change)
    with pytest.raises(ValueError, match=f"^{model_class.__name__}: the checkpoint must have") as raised:
        model_class.from_pretrained(path)
    assert isinstance(raised.value, RuntimeError)  # as transformers raises it for shapes
    text = str(raised.value)
    assert f"missing: {prefix}attn_layers.layers.1.fn.proj_in.weight, {prefix}token_emb.weight\n" in text
    assert "unexpected: extra\n" in text
    assert "strict=False" in text and "ignore_mismatched_sizes" not in text


def test_other_shapes_are_refused_and_named(saved):
    folder, _ = saved(AndromedaForSequenceClassification)
    for options in ({}, {"strict": False}):
        with pytest.raises(
            ValueError, match=r"mismatched: .*score\.weight.*\n.*ignore_mismatched_sizes=True"
        ) as raised:
            AndromedaForSequenceClassification.from_pretrained(folder, num_labels=7, **options)
        assert "strict=False" not in str(raised.value)


# ---- what is asked for


def test_without_strict_what_is_missing_is_drawn_and_the_rest_is_loaded(saved, tmp_path):
    folder, model = saved(AndromedaForCausalLM)
    gone = [name for name in model.state_dict() if ".layers.1." in name or ".layers.2." in name or "token_emb" in name]

    def change(state):
        for name in gone:
            del state[name]
        state["extra"] = torch.zeros(2)

    path = damaged(folder, tmp_path, change)
    with pytest.warns(UserWarning, match="has other parameters than the model") as warned:
        loaded = AutoModelForCausalLM.from_pretrained(path, strict=False)
    assert len(warned) == 1 and all(name in str(warned[0].message) for name in gone)
    assert "unexpected, left out: extra" in str(warned[0].message)
    for name, parameter in loaded.named_parameters():
        if name in gone:
            assert_drawn(name, parameter)
        else:
            assert torch.equal(parameter, model.get_parameter(name)), name


def test_without_strict_a_model_may_be_deeper_than_its_checkpoint(saved):
    folder, model = saved(AndromedaForCausalLM)
    with pytest.warns(UserWarning, match=r"missing, drawn anew: .*layers\.4\.fn\.to_q\.weight"):
        loaded = AndromedaForCausalLM.from_pretrained(folder, strict=False, num_hidden_layers=3)
    assert torch.equal(loaded.get_parameter(PROJECTION), model.get_parameter(PROJECTION))
    assert loaded(IDS).logits.isfinite().all()


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
def test_a_state_dict_may_be_a_part(model_class, silent):
    model = marked(model_class)
    state = model.state_dict()
    loaded = model_class.from_pretrained(None, config=model.config, state_dict=state)
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(ValueError, match="missing: "):
        model_class.from_pretrained(None, config=model.config, state_dict={}, strict=True)
    with pytest.warns(UserWarning, match="missing, drawn anew"):
        loaded = model_class.from_pretrained(None, config=model.config, state_dict={})
    for name, parameter in loaded.named_parameters():
        assert_drawn(name, parameter)


def test_ignored_shapes_are_drawn(saved):
    folder, model = saved(AndromedaForSequenceClassification)
    with pytest.warns(UserWarning, match=r"score\.weight had other shapes .* drawn anew") as warned:
        loaded, report = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=50, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert len(warned) == 1
    assert {name for name, *_ in report["mismatched_keys"]} == {"score.weight"}
    assert_drawn("score.weight", loaded.score.weight)
    assert torch.equal(loaded.get_parameter(EMBEDDING), model.get_parameter(EMBEDDING))


# ---- heads


@pytest.mark.parametrize(
    "source, target, drawn",
    [
        (AndromedaModel, AndromedaForCausalLM, [PROJECTION]),
        (AndromedaModel, AndromedaForSequenceClassification, ["score.weight"]),
        (AndromedaModel, AndromedaForTokenClassification, ["score.bias", "score.weight"]),
        (AndromedaForCausalLM, AndromedaForSequenceClassification, ["score.weight"]),
        (AndromedaForCausalLM, AndromedaForTokenClassification, ["score.bias", "score.weight"]),
        (AndromedaForSequenceClassification, AndromedaForCausalLM, [PROJECTION]),
        (AndromedaForCausalLM, AndromedaModel, []),
        (AndromedaForSequenceClassification, AndromedaModel, []),
        (AndromedaForTokenClassification, AndromedaModel, []),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_head_is_exchanged(source, target, drawn, saved):
    folder, model = saved(source)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        loaded = target.from_pretrained(folder)
    texts = [str(warning.message) for warning in warned if warning.category is UserWarning]
    assert len(texts) == bool(drawn)
    assert all(", ".join(drawn) in text and "drawn anew" in text for text in texts)
    own = {name.removeprefix("transformer."): value for name, value in model.named_parameters()}
    for name, parameter in loaded.named_parameters():
        if name in drawn:
            assert_drawn(name, parameter)
        else:
            assert torch.equal(parameter, own[name.removeprefix("transformer.")]), name


def test_a_damaged_base_is_no_reason_for_new_parameters(saved, tmp_path):
    folder, _ = saved(AndromedaModel)
    path = damaged(folder, tmp_path, lambda state: state.pop("token_emb.weight"))
    with pytest.raises(ValueError, match=r"missing: transformer\.token_emb\.weight\n"):
        AndromedaForCausalLM.from_pretrained(path)


def test_a_head_of_the_class_that_saved_is_not_drawn(saved, tmp_path):
    folder, _ = saved(AndromedaForTokenClassification)
    path = damaged(folder, tmp_path, lambda state: state.pop("score.bias"))
    for options in ({}, {"config": config(num_labels=2)}):
        with pytest.raises(ValueError, match=r"missing: score\.bias\n"):
            AndromedaForTokenClassification.from_pretrained(path, **options)


# ---- ties


def test_ties(saved, silent):
    folder, _ = saved(AndromedaForCausalLM, tie_word_embeddings=True)
    assert PROJECTION not in load_file(folder / "model.safetensors")
    tied = AndromedaForCausalLM.from_pretrained(folder)
    assert tied.get_parameter(PROJECTION) is tied.get_parameter(EMBEDDING)
    base = AndromedaModel.from_pretrained(folder)
    assert torch.equal(base.token_emb.weight, tied.get_parameter(EMBEDDING))
    other, _ = saved(AndromedaModel)
    from_base = AndromedaForCausalLM.from_pretrained(other, tie_word_embeddings=True)
    assert from_base.get_parameter(PROJECTION) is from_base.get_parameter(EMBEDDING)


def test_a_projection_that_differs_is_not_tied(saved):
    folder, model = saved(AndromedaForCausalLM)
    with pytest.raises(ValueError, match="tie_word_embeddings must be False for a checkpoint whose projection differs"):
        AndromedaForCausalLM.from_pretrained(folder, tie_word_embeddings=True)
    loaded = AndromedaForCausalLM.from_pretrained(folder)
    loaded.config.tie_word_embeddings = True
    loaded.tie_weights()
    assert loaded.get_parameter(PROJECTION) is loaded.get_parameter(EMBEDDING)
    assert torch.equal(loaded.get_parameter(EMBEDDING), model.get_parameter(EMBEDDING))


# ---- new models


class Drawn(TorchDispatchMode):
    """Counts the random numbers that are drawn."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default) and not args[0].is_meta:
            self.numbers += args[0].numel()
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
def test_every_number_of_a_new_model_is_drawn_once(model_class, saved):
    folder, _ = saved(model_class, use_abs_pos_emb=True, deepnorm=False)
    settings = config(use_abs_pos_emb=True, deepnorm=False)
    constant = ("gamma", "q_scale", "k_scale", "residual_scale")
    with Drawn() as drawn:
        model = model_class(settings)
    expected = sum(p.numel() for name, p in model.named_parameters() if not name.endswith(constant))
    expected += sum(p.numel() for name, p in model.named_parameters() if "score" in name)  # torch's own layer
    assert drawn.numbers == expected
    with Drawn() as drawn:
        model_class._from_config(settings)
    assert drawn.numbers == expected
    with Drawn() as drawn:
        model_class.from_pretrained(folder)
        if model_class is AndromedaForCausalLM:
            model_class.from_andromeda(model.to_andromeda())
    assert drawn.numbers == 0


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
def test_a_model_without_memory_is_drawn_afterwards(model_class):
    with torch.device("meta"):
        model = model_class(config(use_abs_pos_emb=False))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    for name, parameter in model.named_parameters():
        assert_drawn(name, parameter)


def test_new_rows_of_a_larger_vocabulary():
    model = marked(AndromedaForCausalLM)
    before = model.get_parameter(EMBEDDING).detach().clone()
    model.resize_token_embeddings(2061, mean_resizing=False)
    assert torch.equal(model.get_parameter(EMBEDDING)[:61], before)
    assert_drawn(EMBEDDING, model.get_parameter(EMBEDDING)[61:])
    assert_drawn(PROJECTION, model.get_parameter(PROJECTION)[61:])


# ---- places and forms


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload], ids=["cpu", "disk"])
@pytest.mark.parametrize("options", [{}, {"use_abs_pos_emb": True, "qk_norm": False, "deepnorm": False}], ids=str)
@torch.no_grad()
def test_everything_offloaded(offload, options, tmp_path):
    for model_class in CLASSES:
        model = marked(model_class, **options)
        expected = model(IDS)[0]
        where = (tmp_path / model_class.__name__,) if offload is disk_offload else ()
        offload(model, *where, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        torch.testing.assert_close(model(IDS)[0], expected)
        if model_class is AndromedaForCausalLM:
            mask = torch.ones_like(IDS)
            mask[1, :3] = 0
            found = model.generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False)
            alone = marked(model_class, **options).generate(IDS, attention_mask=mask, max_new_tokens=5, do_sample=False)
            assert torch.equal(found, alone)


@pytest.mark.parametrize(
    "device_map",
    [
        "cpu",
        "auto",
        "balanced",
        "sequential",
        {"": "cpu"},
        {
            "transformer.token_emb": "cpu",
            "transformer.attn_layers.layers.0": "cpu",
            "transformer.attn_layers.layers.1": "disk",
            "transformer.attn_layers.layers.2": "disk",
            "transformer.attn_layers.layers.3": "disk",
            "transformer.to_logits": "disk",
        },
    ],
    ids=["cpu", "auto", "balanced", "sequential", "one", "parts on disk"],
)
@torch.no_grad()
def test_device_maps(device_map, saved, tmp_path, silent):
    folder, model = saved(AndromedaForCausalLM)
    loaded = AndromedaForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    assert loaded._no_split_modules == {"Sublayer"}


@pytest.mark.parametrize("model_class", CLASSES, ids=lambda c: c.__name__)
@torch.no_grad()
def test_forms_of_files(model_class, saved, tmp_path, silent):
    _, model = saved(model_class)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    (tmp_path / "bin").mkdir()
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies += [model_class.from_pretrained(tmp_path / "shards"), model_class.from_pretrained(tmp_path / "bin")]
    for other in copies:
        assert torch.equal(other(IDS)[0], model(IDS)[0])
        assert list(other.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "auto", torch.bfloat16], ids=str)
def test_dtypes(dtype, saved, silent):
    for auto, model_class in zip(
        (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification),
        CLASSES,
        strict=True,
    ):
        folder, model = saved(model_class)
        loaded = auto.from_pretrained(folder, dtype=dtype)
        assert type(loaded) is model_class
        wanted = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, torch.float32)
        for name, parameter in loaded.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name).to(wanted)), name


def test_a_config_of_every_class_is_the_same(saved):
    for model_class in CLASSES:
        folder, model = saved(model_class)
        assert AutoConfig.from_pretrained(folder).to_arguments() == model.config.to_arguments()


@pytest.mark.parametrize("options", [{}, {"use_abs_pos_emb": True, "deepnorm": False}], ids=["default", "positions"])
def test_a_seed_gives_the_weights_of_the_model_without_transformers(options):
    arguments = {"num_tokens": 61, "max_seq_len": 16, "dim": 32, "depth": 2, "dim_head": 16, "heads": 2} | options
    arguments["alibi_num_heads"] = 1
    torch.manual_seed(3)
    expected = andromeda.Andromeda(**arguments)
    config = AndromedaConfig.from_arguments(dataclasses.asdict(expected.config))
    torch.manual_seed(3)
    found = AndromedaForCausalLM(config).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())
