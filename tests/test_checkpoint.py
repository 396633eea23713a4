"""Saved models, and weights of every version of x-transformers (API 2, SPEC 12)."""

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


def test_wrong_keys_are_all_named(tmp_path):
    small().save(tmp_path)
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
    ],
    ids=["newer", "unknown_argument", "incomplete"],
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
    """Written with score scale tau, a_q and a_k: today's model of the same function has a_q and a_k larger."""
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
    """Then channel t was paired with t + r/2: the same function has its rows where our pairs are."""
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
