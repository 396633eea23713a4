"""Saved models, and weights of every version of x-transformers (docs/model.md#12)."""

import json

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import largest, small

import andromeda.checkpoint
import andromeda.files
from andromeda import Andromeda
from andromeda.checkpoint import SETTINGS, WEIGHTS, x_transformers_names

TOKENS = torch.arange(20)[None] % 23


def snapshot(model) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


# ---- save and load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("flags", [{}, dict(deepnorm=False, use_abs_pos_emb=True), dict(qk_norm=False)], ids=str)
def test_round_trip(tmp_path, dtype, flags):
    model = small(**flags).to(dtype)
    model.save(tmp_path / "model")
    loaded = Andromeda.load(tmp_path / "model")
    assert loaded.config == model.config
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert {path.name for path in (tmp_path / "model").iterdir()} == {WEIGHTS, SETTINGS}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_load_into_another_dtype(tmp_path):
    model = small()
    model.save(tmp_path)
    loaded = Andromeda.load(tmp_path, dtype=torch.float64)
    assert all(parameter.dtype == torch.float64 for parameter in loaded.parameters())
    assert largest(loaded(TOKENS), model(TOKENS)) <= 2e-5
    loaded(TOKENS, return_loss=True).backward()
    with pytest.raises(TypeError, match=r"dtype must be a floating-point torch\.dtype"):
        Andromeda.load(tmp_path, dtype="float16")


def test_crash_while_saving_keeps_the_old_one(tmp_path, monkeypatch):
    old, new = small(), small()
    old.save(tmp_path / "model")
    for module, victim in ((andromeda.checkpoint, "save_file"), (andromeda.files, "flush")):
        with monkeypatch.context() as patch:

            def crash(*args, **kwargs):
                raise KeyboardInterrupt

            patch.setattr(module, victim, crash)
            with pytest.raises(KeyboardInterrupt):
                new.save(tmp_path / "model")
        assert_unchanged(Andromeda.load(tmp_path / "model"), snapshot(old))
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_save_is_on_the_disk(tmp_path, disk_log):
    small().save(tmp_path / "model")
    disk_log.assert_durable(tmp_path / "model")
    small().save(tmp_path / "model")
    for name in (WEIGHTS, SETTINGS):
        disk_log.assert_durable(tmp_path / "model" / name)


def test_crash_between_the_two_files(tmp_path, monkeypatch):
    """Weights carry their settings: a save interrupted between its two renames gives the new model, not a mixture."""
    old, new = small(), small(deepnorm=False, heads=3)
    old.save(tmp_path)
    replace = andromeda.checkpoint.os.replace

    def crash_at_settings(source, target):
        if target.name == SETTINGS:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(andromeda.checkpoint.os, "replace", crash_at_settings)
    with pytest.raises(KeyboardInterrupt):
        new.save(tmp_path)
    loaded = Andromeda.load(tmp_path)
    assert loaded.config == new.config
    assert_unchanged(loaded, snapshot(new))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Andromeda.load(tmp_path / "nowhere")
    small().save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS} is missing"):
        Andromeda.load(tmp_path)


@pytest.mark.parametrize("cut", [3, 100, -1])
def test_truncated_weights(tmp_path, cut):
    small().save(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:cut])
    with pytest.raises(ValueError, match=rf"{WEIGHTS}.*bytes"):
        Andromeda.load(tmp_path)


def test_padded_weights(tmp_path):
    small().save(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    with open(tmp_path / WEIGHTS, "ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(ValueError, match=f"must hold {size} bytes as its header says, found {size + 8}"):
        Andromeda.load(tmp_path)


def test_damaged_header(tmp_path):
    small().save(tmp_path)
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[8:12] = b"xxxx"
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match="header is damaged"):
        Andromeda.load(tmp_path)


def without_checksums(path, **changes):
    """Change a saved model into the form of an older version."""
    save_file(load_file(path / WEIGHTS) | changes, path / WEIGHTS, metadata={"format": "pt"})
    settings = json.loads((path / SETTINGS).read_text())
    for name in ("files", "ties", "other_dtypes"):
        settings.pop(name, None)
    (path / SETTINGS).write_text(json.dumps(settings))


def test_wrong_keys_are_all_named(tmp_path):
    small().save(tmp_path)
    without_checksums(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    state["extra"] = torch.zeros(1)
    del state["transformer.to_logits.weight"]
    state["transformer.token_emb.weight"] = torch.zeros(2, 2)
    save_file(state, tmp_path / WEIGHTS)
    with pytest.raises(ValueError) as error:
        Andromeda.load(tmp_path)
    for name in (
        "missing: transformer.to_logits.weight",
        "unexpected: extra",
        "transformer.token_emb.weight must have",
    ):
        assert name in str(error.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s | {"format": 99}, "format 1 or older, got 99"),
        (lambda s: s | {"arguments": s["arguments"] | {"colour": 1}}, "colour"),
        (lambda s: {"format": 1}, "damaged"),
        (lambda s: [s], "damaged"),
        (lambda s: s | {"arguments": s["arguments"] | {"max_seq_len": 9}}, "copy .* differs in arguments, max_seq_len"),
        (lambda s: s | {"files": 3}, "checksums .* are damaged"),
        (lambda s: {key: value for key, value in s.items() if key != "files"}, "checksums .* are damaged"),
    ],
    ids=["newer", "unknown_argument", "incomplete", "list", "other_argument", "no_checksums", "files_missing"],
)
def test_wrong_settings(tmp_path, change, match):
    small().save(tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps(change(settings)))
    with pytest.raises(ValueError, match=match):
        Andromeda.load(tmp_path)


def test_save_onto_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="file"):
        small().save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_custom_provider_must_be_given_again(tmp_path):
    class Provider:
        def get_embedding(self, num_tokens, dim):
            return torch.nn.Embedding(num_tokens, dim)

    model = Andromeda(**oracle.SMALL, embedding_provider=Provider())
    model.save(tmp_path)
    with pytest.raises(ValueError, match=r"embedding_provider must be given.*Provider"):
        Andromeda.load(tmp_path)
    assert torch.equal(Andromeda.load(tmp_path, embedding_provider=Provider())(TOKENS), model(TOKENS))


# ---- checksums


def test_no_flipped_byte_is_loaded(tmp_path):
    """For any byte of either file: load names the file in its error, or loads the same model."""
    model = small()
    model.save(tmp_path)
    expected = snapshot(model)
    for name in (WEIGHTS, SETTINGS):
        data = (tmp_path / name).read_bytes()
        # Testing all bytes of settings and header would take too long: a sample of each part, and the ends.
        places = {0, 1, 7, 8, len(data) - 1, *torch.randint(len(data), (60,)).tolist(), *range(9, 1600, 23)}
        refused = 0
        for place in places:
            changed = bytearray(data)
            changed[place % len(data)] ^= 1 << (place % 8)
            (tmp_path / name).write_bytes(changed)
            try:
                loaded = Andromeda.load(tmp_path)
            except ValueError as error:
                assert name in str(error)
                refused += 1
            else:
                assert name == SETTINGS and loaded.config == model.config
                assert_unchanged(loaded, expected)
        (tmp_path / name).write_bytes(data)
        assert refused >= (len(places) if name == WEIGHTS else len(places) // 2)
    assert_unchanged(Andromeda.load(tmp_path), expected)


def interrupted(old, new, path, monkeypatch):
    """A save of `new` over `old` that ended between its two renames."""
    old.save(path)
    replace = andromeda.checkpoint.os.replace

    def crash_at_settings(source, target):
        if target.name == SETTINGS:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(andromeda.checkpoint.os, "replace", crash_at_settings)
        new.save(path)


@pytest.mark.parametrize("place", [9, 300, -1, -4000])
def test_flipped_bytes_after_an_interrupted_save(place, tmp_path, monkeypatch):
    """The checksum in the settings belongs to other weights, but the weights carry their own."""
    new = small(max_seq_len=77)
    interrupted(small(), new, tmp_path, monkeypatch)
    assert_unchanged(Andromeda.load(tmp_path), snapshot(new))
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[place] ^= 16
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=WEIGHTS):
        Andromeda.load(tmp_path)


def test_every_byte_of_the_seal_counts(tmp_path, monkeypatch):
    interrupted(small(), small(), tmp_path, monkeypatch)
    data = (tmp_path / WEIGHTS).read_bytes()
    begin = data.index(b'"checksum":"') + 12
    for place in range(begin, begin + 32):
        changed = bytearray(data)
        changed[place] ^= 1
        (tmp_path / WEIGHTS).write_bytes(changed)
        with pytest.raises(ValueError, match=WEIGHTS):
            Andromeda.load(tmp_path)


def test_older_saves_load(tmp_path):
    model = small()
    model.save(tmp_path)
    without_checksums(tmp_path)
    assert_unchanged(Andromeda.load(tmp_path), snapshot(model))


def test_saved_files_may_be_read_alike(tmp_path):
    small().save(tmp_path / "model")
    assert (tmp_path / "model" / WEIGHTS).stat().st_mode == (tmp_path / "model" / SETTINGS).stat().st_mode


# ---- parameters that are one, or overlap


def tie(model):
    model.transformer.to_logits.weight = model.transformer.token_emb.weight
    return model


def share_a_layer(model):
    layers = model.transformer.attn_layers.layers
    layers[2] = layers[0]
    return model


def share_a_vector(model):
    """Two parameters that share memory."""
    first, second = (layer.norm.gamma for layer in list(model.transformer.attn_layers.layers)[:2])
    second.data = first.data
    return model


@pytest.mark.parametrize("share", [tie, share_a_layer, share_a_vector, lambda m: share_a_layer(tie(m))])
def test_what_is_one_parameter_is_saved_as_one(share, tmp_path):
    model = share(small(depth=2))
    names = list(model.state_dict())
    model.save(tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) < len(names)
    loaded = Andromeda.load(tmp_path)
    assert torch.equal(loaded(TOKENS), model(TOKENS)) and list(loaded.state_dict()) == names
    ours, theirs = (list(dict(m.named_parameters(remove_duplicate=False)).values()) for m in (model, loaded))
    for i in range(len(ours)):
        for j in range(i):
            assert (ours[i].data_ptr() == ours[j].data_ptr()) == (theirs[i] is theirs[j])
    loaded(TOKENS, return_loss=True).backward()
    loaded.save(tmp_path / "again")
    assert_unchanged(Andromeda.load(tmp_path / "again", dtype=torch.float64).float(), snapshot(model))


def test_pieces_of_one_buffer_are_saved_apart(tmp_path):
    model = small()
    parameters = list(model.parameters())
    buffer = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, piece in zip(parameters, buffer.split([p.numel() for p in parameters]), strict=True):
        parameter.data = piece.view(parameter.shape)
    model.save(tmp_path)
    assert_unchanged(Andromeda.load(tmp_path), snapshot(model))
    assert (tmp_path / WEIGHTS).stat().st_size < 2 * buffer.numel() * 4


def test_overlapping_parameters_are_refused_before_anything_is_written(tmp_path):
    model = small()
    model.save(tmp_path / "model")
    before = (tmp_path / "model" / WEIGHTS).read_bytes()
    memory = torch.zeros(25)
    first, second = (layer.norm.gamma for layer in model.transformer.attn_layers.layers)
    first.data, second.data = memory[:24], memory[1:]
    with pytest.raises(ValueError, match=r"layers\.0\.norm\.gamma and .*layers\.1\.norm\.gamma must not overlap"):
        model.save(tmp_path / "model")
    assert (tmp_path / "model" / WEIGHTS).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def add_a_parameter(model):
    model.transformer.to_logits.register_parameter("bias", torch.nn.Parameter(torch.zeros(23)))


def parametrize(model):
    torch.nn.utils.parametrizations.weight_norm(model.transformer.to_logits)


def prune(model):
    model.transformer.attn_layers.layers = model.transformer.attn_layers.layers[:1]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (add_a_parameter, r"unexpected: transformer\.to_logits\.bias"),
        (parametrize, r"missing: transformer\.to_logits\.weight"),
        (prune, r"missing: transformer\.attn_layers\.layers\.1"),
    ],
)
def test_what_load_could_not_make_is_not_saved(change, name, tmp_path):
    model = small()
    change(model)
    with pytest.raises(ValueError, match=rf"Andromeda\.save: .*state_dict(?s:.*){name}"):
        model.save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_put_in_afterwards_must_be_given_to_load(tmp_path):
    class Doubled(torch.nn.Embedding):
        def forward(self, tokens):
            return 2 * super().forward(tokens)

    model = small()
    model.transformer.token_emb = Doubled(23, 24)
    model.save(tmp_path)
    with pytest.raises(ValueError, match=r"embedding_provider must be given.*Doubled"):
        Andromeda.load(tmp_path)
    provider = type("Provider", (), {"get_embedding": staticmethod(Doubled)})()
    assert torch.equal(Andromeda.load(tmp_path, embedding_provider=provider)(TOKENS), model(TOKENS))


# ---- what loading finds in the weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_that_are_not_finite_are_named(dtype, value, tmp_path):
    model = small().to(dtype)
    with torch.no_grad():
        model.transformer.attn_layers.layers[1].norm.gamma[3:5] = value
    model.save(tmp_path)
    with pytest.warns(UserWarning, match=r"not finite.* 1 parameters, .*layers\.1\.norm\.gamma \(2 of 24\)"):
        Andromeda.load(tmp_path)
    with pytest.warns(UserWarning, match="not finite"):
        Andromeda.load(tmp_path, dtype=torch.float32)


def test_finite_weights_give_no_warning(tmp_path, recwarn):
    small().save(tmp_path)
    Andromeda.load(tmp_path)
    small().load_x_transformers(checkpoint({}))
    assert not [warning for warning in recwarn if "finite" in str(warning.message)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_tensors_of_another_dtype_are_named(dtype, tmp_path):
    name = "transformer.attn_layers.layers.1.norm.gamma"
    small().save(tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    del settings["files"]
    without_checksums(tmp_path, **{name: torch.zeros(24).to(dtype)})
    if dtype == torch.float64:  # older saves did not record the dtype of each
        Andromeda.load(tmp_path, dtype=torch.float32)
        (tmp_path / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"dtype: {name} must be "):
        Andromeda.load(tmp_path)


def test_a_model_of_several_dtypes(tmp_path):
    model = small()
    model.transformer.attn_layers.bfloat16()
    model.save(tmp_path)
    for name, tensor in Andromeda.load(tmp_path).state_dict().items():
        assert tensor.dtype == (torch.bfloat16 if "layers" in name else torch.float32)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"depth": 10**7}, "depth 10000000 needs 20000000 sub-layers, found 2"),
        ({"depth": 2}, "depth 2 needs 4 sub-layers, found 2"),
        ({"heads": 10**9, "alibi_num_heads": None}, "1000000000 heads"),
        ({"num_tokens": 10**9}, "to_logits"),
        ({"dim": 10**8}, "misshapen"),
        ({"depth": "1"}, "depth must be an int"),
        ({"dim_head": 9}, "dim_head"),
    ],
    ids=str,
)
def test_settings_of_another_size_are_refused_at_once(arguments, text, tmp_path):
    small().save(tmp_path)
    without_checksums(tmp_path)
    settings = json.loads((tmp_path / SETTINGS).read_text())
    settings["arguments"] |= arguments
    (tmp_path / SETTINGS).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=text):
        Andromeda.load(tmp_path)


# ---- names of wrappers


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_inside(model):
    layers = model.transformer.attn_layers.layers
    for index in range(len(layers)):
        layers[index] = compiled(layers[index])
    model.transformer.token_emb = compiled(model.transformer.token_emb)
    return model


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = model.transformer.attn_layers.layers
    for index in range(len(layers)):
        layers[index] = checkpoint_wrapper(layers[index])
    return model


def under(prefix):
    """The state dict with this prefix in its names."""
    return lambda model: {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


WRAPPINGS = {
    "compiled": lambda model: compiled(model).state_dict(),
    "compiled inside": lambda model: compiled_inside(model).state_dict(),
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).state_dict(),
    "parallel": under("module."),
    "compiled and parallel": under("_orig_mod.module."),
    "sharded": lambda model: {
        f"_fsdp_wrapped_module.{name.replace('fn.', 'fn._fsdp_wrapped_module.')}": tensor
        for name, tensor in model.state_dict().items()
    },
    "averaged, with counters": lambda model: under("ema_model.")(model) | {"step": torch.ones(1)},
    "held": under("model."),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_names_of_wrappers_are_left_out(wrapping):
    model = small(depth=2)
    expected = snapshot(model)
    state = WRAPPINGS[wrapping](model)
    assert set(state) != set(expected)
    plain = small(depth=2)
    assert not plain.load_state_dict(state).missing_keys
    assert_unchanged(plain, expected)
    wrapped = compiled_inside(small(depth=2))  # the state dict also fits a model inside wrappers
    wrapped.load_state_dict(state)
    for ours, theirs in zip(wrapped.state_dict().values(), expected.values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "_orig_mod.module.", "module._orig_mod.net.", "ema_model.module.net.", "_fsdp_wrapped_module."],
)
def test_prefixes_of_wrappers(prefix):
    state = checkpoint({})
    inside = {key.replace("layers.1.", "layers.1._checkpoint_wrapped_module."): value for key, value in state.items()}
    model = loaded({prefix + key: value for key, value in inside.items()} | {"n_averaged": torch.tensor(3)})
    assert torch.equal(model(TOKENS), loaded(state)(TOKENS))


@pytest.mark.parametrize("wrap", [compiled_inside, checkpointed])
def test_a_wrapped_model_is_saved_under_plain_names(wrap, tmp_path):
    model = small(depth=2)
    names, expected = list(model.state_dict()), snapshot(model)
    wrap(model).save(tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == set(names)
    assert_unchanged(Andromeda.load(tmp_path), expected)


def test_saved_names_of_wrappers_are_left_out(tmp_path):
    model = small()
    model.save(tmp_path)
    without_checksums(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file({name.replace("former.", "former._orig_mod."): t for name, t in state.items()}, tmp_path / WEIGHTS)
    assert_unchanged(Andromeda.load(tmp_path), snapshot(model))


def test_one_name_with_two_values_is_ambiguous():
    model, state = small(), small().state_dict()
    both = {f"{prefix}.{name}": tensor for prefix in ("ema_model", "online_model") for name, tensor in state.items()}
    model.load_state_dict(both)
    assert_unchanged(model, state)
    both["online_model.transformer.to_logits.weight"] = torch.ones(23, 24)
    with pytest.raises(ValueError, match=r"ambiguous: online_model\.transformer\.to_logits\.weight"):
        model.load_state_dict(both)
    assert_unchanged(model, state)


def test_unknown_names_are_those_of_torch():
    with pytest.raises(RuntimeError, match=r"Missing key.*to_logits(?s:.*)Unexpected key.*other"):
        small().load_state_dict({"_orig_mod.other.weight": torch.ones(1)})
    result = small().load_state_dict({"module.transformer.to_logits.weight": torch.ones(23, 24)}, strict=False)
    assert "transformer.to_logits.weight" not in result.missing_keys and not result.unexpected_keys


def test_parts_of_names_in_an_embedding_of_ones_own_stay(tmp_path):
    class Held(torch.nn.Module):
        def __init__(self, num_tokens, dim):
            super().__init__()
            self.module = torch.nn.Embedding(num_tokens, dim)

        def forward(self, tokens):
            return self.module(tokens)

    provider = type("Provider", (), {"get_embedding": staticmethod(Held)})()
    model, other = small(embedding_provider=provider), small(embedding_provider=provider)
    other.load_state_dict({f"module.{name}": tensor for name, tensor in model.state_dict().items()})
    assert torch.equal(other(TOKENS), model(TOKENS))
    model.save(tmp_path)
    assert torch.equal(Andromeda.load(tmp_path, embedding_provider=provider)(TOKENS), model(TOKENS))


def test_a_tied_model_takes_one_value_from_x_transformers():
    state = checkpoint({})
    model = tie(small())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"tied: .*are one parameter of this model"):
        model.load_x_transformers(state)
    assert_unchanged(model, before)
    state["to_logits.weight"] = state["token_emb.emb.weight"]
    model.load_x_transformers(state)
    assert torch.equal(model.transformer.to_logits.weight, state["to_logits.weight"])


def test_weights_of_x_transformers_that_are_not_finite():
    state = checkpoint({})
    state["to_logits.weight"][0, 0] = torch.inf
    with pytest.warns(UserWarning, match=r"to_logits\.weight \(1 of 552\)"):
        small().load_x_transformers(state)


# ---- x-transformers


def checkpoint(flags) -> dict:
    theirs = oracle.build_oracle(flags)
    oracle.perturb(theirs)
    return theirs.net.state_dict()


def loaded(state, version="2.31.10", **flags) -> Andromeda:
    model = small(**flags)
    model.load_x_transformers(state, version=version)
    return model.double()


@pytest.mark.parametrize("prefix", ["net.", "module.", "module.net.", "decoder.net."])
def test_prefixes(prefix):
    state = checkpoint({})
    model = loaded({prefix + key: value for key, value in state.items()})
    assert torch.equal(model(TOKENS), loaded(state)(TOKENS))


@pytest.mark.parametrize("flags", [{}, dict(deepnorm=False, shift_tokens=0), dict(qk_norm=False)], ids=str)
def test_names_cover_the_checkpoint(flags):
    state = checkpoint(flags)
    tables = {key for key in state if "rotary_pos_emb" in key or key.endswith("slopes")}
    assert set(x_transformers_names(small(**flags))) == set(state) - tables


def test_refusal_changes_nothing_and_names_everything():
    state = checkpoint({})
    state["attn_layers.layers.7.1.to_q.weight"] = torch.zeros(1)
    del state["to_logits.weight"]
    state["token_emb.emb.weight"] = torch.zeros(3, 3)
    model = small()
    before = snapshot(model)
    with pytest.raises(ValueError) as error:
        model.load_x_transformers(state)
    for text in (
        "missing: to_logits.weight",
        "unexpected: attn_layers.layers.7",
        "token_emb.emb.weight must have shape",
    ):
        assert text in str(error.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize("version", ["", "two", 2, "2.x", "2"])
def test_wrong_versions(version):
    with pytest.raises(ValueError, match="version must be like"):
        small().load_x_transformers(checkpoint({}), version=version)


WIDE = dict(dim_head=64, heads=2)


def with_scales(state, function) -> dict:
    return {key: function(value) if "qk_norm_" in key else value for key, value in state.items()}


@pytest.mark.parametrize(
    ("version", "tau", "flash"),
    [("2.17.0", 10.0, True), ("1.40.0", 10.0, True), ("1.22.22", 10.0, False), ("1.22.22", 1 / (10 * 64), True)],
)
def test_scores_of_older_versions(version, tau, flash):
    """An old model with its own score scale, a_q and a_k equals a new one with larger a_q and a_k."""
    flags = WIDE | dict(rotary_xpos=False, attn_flash=flash)
    state = checkpoint(flags)
    state = {key: value - 1 if key.endswith("gamma") else value for key, value in state.items()}
    written = {
        key: value + 1 if key.endswith("gamma") and version < "1.31.3" else value for key, value in state.items()
    }
    old = loaded(written, version, **flags)
    factor = (tau / 64**-0.5) ** 0.5
    assert largest(old(TOKENS), loaded(with_scales(state, lambda scale: scale * factor), **flags)(TOKENS)) <= 1e-6


@pytest.mark.parametrize("version", ["2.17.1", "2.25.4"])
def test_scales_without_effect(version):
    flags = WIDE
    state = checkpoint(flags)
    cosine = with_scales(state, lambda scale: torch.full_like(scale, (1000 * 64**0.5) ** 0.5))
    assert largest(loaded(state, version, **flags)(TOKENS), loaded(cosine, **flags)(TOKENS)) <= 1e-6


def test_scales_since_2_25_5_are_taken_as_they_are():
    state = checkpoint(WIDE)
    assert torch.equal(loaded(state, "2.25.5", **WIDE)(TOKENS), loaded(state, **WIDE)(TOKENS))


def test_gains_before_1_31_3():
    flags = WIDE | dict(deepnorm=False, qk_norm=False)
    state = checkpoint(flags)
    old = {}
    for key, value in state.items():
        if key.endswith("gamma"):
            old[key.replace("gamma", "weight")] = value + 1
            old[key.replace("gamma", "bias")] = torch.zeros_like(value)
        else:
            old[key] = value
    assert largest(loaded(old, "1.31.2", **flags)(TOKENS), loaded(state, **flags)(TOKENS)) <= 1e-6
    old["attn_layers.final_norm.bias"] = torch.ones(24)
    with pytest.raises(ValueError, match=r"final_norm\.bias must be zero"):
        loaded(old, "1.31.2", **flags)


def test_rotary_halves_before_1_30_0():
    """Old versions paired channel t with t + r/2: for the same function, rows move to the new pairs."""
    flags = WIDE | dict(attn_qk_norm_dim_scale=True, deepnorm=False)
    state = checkpoint(flags)
    state = {key: value * 0 if key.endswith("gamma") else value for key, value in state.items()}
    r, d = 32, 64
    position = torch.arange(d)
    # New channel 2t was t and 2t + 1 was t + r/2; so old channel c is found at:
    old_of = torch.cat((torch.arange(r).view(2, r // 2).T.flatten(), position[r:]))
    old = {}
    for key, value in state.items():
        value = value.clone()
        if key.endswith(("to_q.weight", "to_k.weight")):
            heads = value.view(-1, d, value.shape[-1])
            value = torch.empty_like(heads).index_copy_(1, old_of, heads).flatten(0, 1)
        elif "qk_norm_" in key:
            value = torch.empty_like(value).index_copy_(2, old_of, value) / (10 * d**0.5) ** 0.5
        elif key.endswith("gamma"):
            value = value + 1
        old[key] = value
    assert largest(loaded(old, "1.29.2", **flags)(TOKENS), loaded(state, **flags)(TOKENS)) <= 1e-6


def test_logit_bias_before_1_27_0():
    flags = WIDE | dict(deepnorm=False, qk_norm=False, rotary_xpos=False)
    state = checkpoint(flags) | {"to_logits.bias": torch.zeros(23)}
    loaded(state, "1.26.6", **flags)
    state["to_logits.bias"][3] = 0.5
    with pytest.raises(ValueError, match=r"to_logits\.bias must be zero"):
        loaded(state, "1.26.6", **flags)


def test_narrow_heads_before_1_42_18():
    with pytest.raises(ValueError, match="at least 32 channels were rotated"):
        loaded(checkpoint({}), "1.42.17")
    loaded(checkpoint(WIDE), "1.42.17", **WIDE)


def test_key_scale_per_query_head():
    state = checkpoint(WIDE)
    key = next(key for key in state if key.endswith("qk_norm_k_scale"))
    wide = state | {key: state[key].repeat(2, 1, 1)}
    assert torch.equal(loaded(wide, "1.40.0", **WIDE)(TOKENS), loaded(state, "1.40.0", **WIDE)(TOKENS))
    wide[key][1] += 1
    with pytest.raises(ValueError, match="qk_norm_k_scale must have equal rows"):
        loaded(wide, "1.40.0", **WIDE)


def test_inverted_scale_without_learned_scales_is_refused():
    flags = WIDE | dict(attn_qk_norm_dim_scale=False)
    with pytest.raises(ValueError, match=r"before 1\.22\.23"):
        loaded(checkpoint(flags), "1.22.22", **flags)


def test_not_a_tensor():
    with pytest.raises(TypeError, match=r"to_logits\.weight must be a tensor, got list"):
        small().load_x_transformers({"to_logits.weight": [1]})
