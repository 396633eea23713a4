"""Folders that other programs open, that are never half written, and the way to the hub."""

import errno
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard, errors
from transformers import Trainer, TrainingArguments, dynamic_module_utils

import andromeda.huggingface
from andromeda import Andromeda, AndromedaTokenizer, files
from andromeda.huggingface import AndromedaConfig, AndromedaForCausalLM, saving
from andromeda.huggingface.saving import AUTO_MAP, STUB, explained_push

SIZES = {"num_tokens": 300, "max_seq_len": 32, "dim": 16, "depth": 2, "dim_head": 8, "heads": 2, "alibi_num_heads": 1}
MODEL_FILES = {"config.json", "generation_config.json", "model.safetensors", STUB}


def new_model(seed=0, **options):
    torch.manual_seed(seed)
    return AndromedaForCausalLM.from_andromeda(Andromeda(**SIZES | options)).eval()


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    new_model().save_pretrained(folder)
    AndromedaTokenizer.train(["def add(a, b): return a + b"] * 20, 280).save(folder)
    return folder


# ---- opened by programs that do not know this package


def test_automatic_classes_and_pipeline_in_a_process_that_never_imported_the_package(folder, tmp_path):
    code = f"""
import json, sys
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

folder, found = {str(folder)!r}, []
assert "andromeda" not in sys.modules
try:
    AutoConfig.from_pretrained(folder)
except ValueError as error:
    found.append("trust_remote_code=True" in str(error))
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
found += [type(config).__module__, config.auto_map]
for automatic in (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification):
    model = automatic.from_pretrained(folder, trust_remote_code=True)
    found += [type(model).__module__, type(model).__name__]
writer = pipeline("text-generation", folder, trust_remote_code=True)
found.append(len(writer("def", max_new_tokens=3, return_full_text=False)[0]["generated_text"]) > 0)
writer.model.save_pretrained(folder + "-again")
print()
print(json.dumps(found))
"""
    variables = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr
    models = [f"Andromeda{name}" for name in ("Model", "ForCausalLM", "ForSequenceClassification")]
    assert json.loads(result.stdout.splitlines()[-1]) == [
        True,
        "andromeda.huggingface.configuration_andromeda",
        AUTO_MAP,
        *(part for name in models for part in ("andromeda.huggingface.modeling_andromeda", name)),
        True,
    ]
    again = folder.with_name("model-again")
    assert {path.name for path in again.iterdir()} == MODEL_FILES  # no copies of the package's files
    assert (again / "config.json").read_text() == (folder / "config.json").read_text()


def test_where_the_package_is_missing_the_error_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setitem(sys.modules, "andromeda", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "andromeda.huggingface", None)
    with pytest.raises(ImportError) as caught:
        dynamic_module_utils.get_class_from_dynamic_module(AUTO_MAP["AutoConfig"], folder)
    text = str(caught.value)
    assert text.startswith("this is an Andromeda model, and its classes are in the package andromeda-kernels")
    assert "pip install --upgrade andromeda-kernels" in text and "\n" not in text


def test_every_name_in_the_map_is_registered_with_its_automatic_class(folder):
    config = AndromedaConfig.from_pretrained(folder)
    assert config.auto_map == AUTO_MAP
    namespace = {}
    exec((folder / STUB).read_text(), namespace)
    for automatic, reference in AUTO_MAP.items():
        module, name = reference.split(".")
        assert f"{module}.py" == STUB and namespace[name] is getattr(andromeda.huggingface, name)
        if automatic != "AutoConfig":
            registered = getattr(transformers, automatic)._model_mapping[AndromedaConfig]
            assert registered is namespace[name]


def test_no_question_whether_to_run_code_when_the_package_is_imported(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert type(transformers.AutoConfig.from_pretrained(folder)) is AndromedaConfig
    assert type(transformers.AutoModelForCausalLM.from_pretrained(folder)) is AndromedaForCausalLM
    AndromedaTokenizer(folder, eos_token=None, pad_token=None)


def test_a_folder_without_a_map_loads_and_gets_one(folder, tmp_path):
    model = AndromedaForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    (tmp_path / STUB).unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(model, again)
    again.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP and (tmp_path / STUB).is_file()


def test_a_config_alone_names_its_classes(tmp_path):
    AndromedaConfig(hidden_size=32).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", STUB}
    assert AndromedaConfig.from_pretrained(tmp_path).auto_map == AUTO_MAP


def test_a_class_of_the_users_own_is_copied_as_transformers_does(tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_text(
        "from andromeda.huggingface import AndromedaForCausalLM\n\n\nclass Own(AndromedaForCausalLM):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import own_model

    own_model.Own.register_for_auto_class("AutoModelForCausalLM")
    own_model.Own(new_model().config).save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "own_model.py").is_file()
    found = json.loads((tmp_path / "model" / "config.json").read_text())["auto_map"]
    assert found == AUTO_MAP | {"AutoModelForCausalLM": "own_model.Own"}


def test_checkpoints_of_trainer_hold_the_stub(tmp_path):
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    Trainer(new_model(), arguments, train_dataset=rows).train()
    assert {path.name for path in (tmp_path / "checkpoint-1").iterdir()} >= MODEL_FILES


# ---- written whole


def test_other_files_stay_and_weights_of_an_earlier_model_go(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "model-notes.txt").write_text("mine")
    models = [new_model(seed) for seed in range(4)]
    for model, size in zip(models, ("50GB", "10kB", "5kB", "50GB"), strict=True):
        model.save_pretrained(tmp_path, max_shard_size=size)
        weights = sorted(path.name for path in tmp_path.glob("model*safetensors*"))
        assert (weights == ["model.safetensors"]) == (size == "50GB"), weights
        assert same(AndromedaForCausalLM.from_pretrained(tmp_path), model)
    assert {path.name for path in tmp_path.iterdir()} == MODEL_FILES | {"README.md", "model-notes.txt"}


def test_a_variant_leaves_the_other_weights(tmp_path):
    one, other = new_model(1), new_model(2)
    one.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path, variant="other", max_shard_size="10kB")
    assert same(AndromedaForCausalLM.from_pretrained(tmp_path), one)
    assert same(AndromedaForCausalLM.from_pretrained(tmp_path, variant="other"), other)


def test_what_a_killed_save_left_is_removed_and_nothing_else(tmp_path):
    left, notes = tmp_path / ".model.0123456789abcdef", tmp_path / ".model.notes"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    notes.write_text("mine")
    for path in (left, notes):
        os.utime(path, (1, 1))
    new_model().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == MODEL_FILES | {notes.name}


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["transformers.modeling_utils.safe_save_file", "andromeda.files.flush_tree"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch, place, existing):
    target = tmp_path / "model"
    if existing:
        new_model(1).save_pretrained(target)
    before = files.checksums(tmp_path)
    monkeypatch.setattr(place, full_disk)
    with pytest.raises(OSError, match=r"cannot write .*model: No space left.*Make room there"):
        new_model(2).save_pretrained(target, max_shard_size="10kB")
    assert files.checksums(tmp_path) == before and target.exists() == existing
    assert [path for path in tmp_path.rglob("*") if files.is_temporary(path.name)] == []


def test_killed_between_two_files_no_mixture_looks_like_a_model(tmp_path, monkeypatch):
    """After every move: the old model, the new one, or a folder that does not load."""
    old, new = new_model(1), new_model(2)
    refusals = []

    def move(source, target):
        os.rename(source, target)
        try:
            found = AndromedaForCausalLM.from_pretrained(tmp_path)
        except OSError as error:
            refusals.append(str(error))
        else:
            assert same(found, old) or same(found, new)

    for old_size, new_size in (("10kB", "10kB"), ("50GB", "10kB"), ("10kB", "50GB")):
        old.save_pretrained(tmp_path, max_shard_size=old_size)
        with monkeypatch.context() as patch:
            patch.setattr(saving.os, "replace", move)
            new.save_pretrained(tmp_path, max_shard_size=new_size)
        assert same(AndromedaForCausalLM.from_pretrained(tmp_path), new)
    assert refusals and all("no file named" in error for error in refusals)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(NotADirectoryError, match="it is no folder"):
        new_model().save_pretrained(tmp_path / "model")


def test_a_process_that_does_not_write(tmp_path):
    new_model(1).save_pretrained(tmp_path)
    before = files.checksums(tmp_path)
    new_model(2).save_pretrained(tmp_path, is_main_process=False)
    assert files.checksums(tmp_path) == before


# ---- to the hub


@pytest.fixture
def hub(monkeypatch):
    """A hub that keeps what is committed."""
    hub = SimpleNamespace(files={}, card=None, branches=[], messages=[])

    def commit(self, repo_id, operations, *, commit_message, **options):
        hub.messages.append((repo_id, commit_message))
        for operation in operations:
            with operation.as_file() as file:
                hub.files[operation.path_in_repo] = file.read()
        return commit_message

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=f"me/{repo_id}"))
    monkeypatch.setattr(HfApi, "create_branch", lambda self, repo_id, *, branch, **_: hub.branches.append(branch))
    monkeypatch.setattr(HfApi, "file_exists", lambda *_, **__: hub.card is not None)
    monkeypatch.setattr(HfApi, "create_commit", commit)
    monkeypatch.setattr(ModelCard, "load", lambda *_, **__: ModelCard(hub.card))
    return hub


def test_push_to_hub_sends_the_stub_and_a_card(hub):
    new_model().push_to_hub("tiny", tags=["toy"], max_shard_size="10kB", revision="next")
    assert {"config.json", STUB, "model.safetensors.index.json", "README.md"} <= hub.files.keys()
    card = ModelCard(hub.files["README.md"].decode())
    assert {"andromeda", "toy"} <= {*card.data.tags} and card.data.library_name == "transformers"
    assert 'from_pretrained("me/tiny"' in card.text
    assert hub.branches == ["next"] and hub.messages == [("me/tiny", "Upload AndromedaForCausalLM")]


def test_push_to_hub_keeps_the_card_of_the_repository(hub):
    hub.card = "---\nlicense: mit\ntags:\n- old\n---\nWritten by hand.\n"
    new_model().push_to_hub("tiny", tags="toy")
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.license == "mit" and card.data.tags == ["old", "toy"] and "Written by hand." in card.text


def test_save_pretrained_pushes_what_it_saved(hub, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "secret.txt").write_text("not for others")
    new_model().save_pretrained(tmp_path, push_to_hub=True, repo_id="tiny", commit_message="first")
    assert {*hub.files} == MODEL_FILES | {"README.md"} and hub.files["README.md"] == b"mine"
    assert hub.messages == [("me/tiny", "first")]
    AndromedaConfig().save_pretrained(tmp_path / "config", push_to_hub=True)
    assert hub.messages[1] == ("me/config", "Upload AndromedaConfig")


def refused(status):
    response = errors.Response(status, request=SimpleNamespace())
    return errors.HfHubHTTPError(f"{status} Client Error: no.\n\nmore", response=response)


@pytest.mark.parametrize(
    "error, remedy",
    [
        (errors.OfflineModeIsEnabled("Cannot reach https://hub: offline mode is enabled."), "unset HF_HUB_OFFLINE"),
        (errors.LocalTokenNotFoundError("Token is required"), "log in"),
        (refused(401), "log in"),
        (refused(403), "log in"),
        (refused(500), "look at the network"),
        (errors.HTTPError("[Errno -3] Temporary failure in name resolution"), "look at the network"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_without_the_hub_one_line_says_what_to_do_and_nothing_is_lost(tmp_path, monkeypatch, error, remedy):
    def create_repo(*args, **kwargs):
        raise error

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    model = new_model()
    for push, kept in (
        (lambda: model.push_to_hub("tiny"), "save_pretrained keeps the model"),
        (lambda: model.save_pretrained(tmp_path / "model", push_to_hub=True), "the model is in"),
        (lambda: model.config.push_to_hub("tiny"), "save_pretrained keeps the config"),
        (lambda: model.config.save_pretrained(tmp_path / "config", push_to_hub=True), "the config is in"),
    ):
        with pytest.raises(ConnectionError) as caught:
            push()
        text = str(caught.value)
        assert "\n" not in text and text.startswith(f"{'Config' if 'config' in kept else 'ForCausalLM'}", 9), text
        assert "cannot push to http" in text and kept in text and f"To push, {remedy}" in text
    assert same(AndromedaForCausalLM.from_pretrained(tmp_path / "model"), model)


def test_other_errors_of_a_push_pass():
    with pytest.raises(ValueError, match=r"^mine$"), explained_push("x", "y"):
        raise ValueError("mine")
    with pytest.raises(FileNotFoundError), explained_push("x", "y"):
        os.stat("/nowhere/at/all")
