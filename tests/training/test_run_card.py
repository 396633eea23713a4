"""The card that a run writes, and the way of its model to the hub."""

import json
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from tiny_run import Rows, new_model, settings

from andromeda.huggingface import AndromedaForCausalLM
from andromeda.training import check_saved_model, run_card, train


def row(card, name):
    (line,) = [line for line in card.text.splitlines() if line.startswith(f"| {name} |")]
    return line.split("|")[2].strip()


def test_figures_of_a_run(tmp_path, tokenizer):
    rows = Rows(count=24, seqlen=12)
    rows.metadata = {"source": str(tmp_path / "private" / "books")}  # readers of the card need not know where it was
    history = [
        {"step": 4, "loss": 2.5},
        {"step": 4, "eval_loss": 3.5},
        {"step": 8, "loss": 1.5},
        {"train_runtime": 1.0},
    ]
    model = AndromedaForCausalLM.from_andromeda(new_model())
    options = settings(tmp_path / "mine", gradient_accumulation=3, trainer={"hub_model_id": "me/tiny"})
    card = run_card(
        model, options, rows, steps=8, history=history, processes=2, tokenizer=tokenizer.tokenizer, eval_dataset=rows
    )
    assert (
        row(card, "steps") == "8" and row(card, "rows per step") == "12" and row(card, "tokens") == f"{8 * 12 * 12:,}"
    )
    assert row(card, "data") == "books, 24 rows of 12 tokens"
    assert row(card, "tokenizer") == f"BPE, {len(tokenizer)} ids"
    assert row(card, "last training loss") == "1.5" and row(card, "loss") == "3.5" and "me/tiny" in card.text
    assert card.data.eval_results[0].dataset_name == "books"


def test_the_model_of_a_run_has_a_card_that_the_user_may_change(tmp_path, tokenizer):
    options = settings(tmp_path / "mine", steps=2)
    result = train(new_model(), Rows(), options, eval_dataset=Rows(4), tokenizer=tokenizer, evaluate_at_end=True)
    folder = tmp_path / "mine" / "model"
    card = ModelCard.load(folder / "README.md")
    assert card.text.lstrip().startswith("# mine\n") and row(card, "steps") == "2" and "Rows, 24 rows" in card.text
    assert row(card, "last training loss") == f"{result.loss:.4g}"
    assert result.evaluation.tokens == 44 and row(card, "loss") == f"{result.evaluation.loss:.4g}"
    assert row(card, "bits per byte") == f"{result.evaluation.bits_per_byte:.4g}"
    assert (folder / "modeling_andromeda.py").is_file()
    assert not list((tmp_path / "mine" / "checkpoint-2").glob("README.md"))

    (folder / "README.md").write_text("Mine.")
    check_saved_model(folder)  # a changed card is no damage
    train(new_model(), Rows(), options, eval_dataset=Rows(4), tokenizer=tokenizer, evaluate_at_end=True, resume=True)
    assert (folder / "README.md").read_text() == "Mine."
    for checkpoint in (tmp_path / "mine").glob("checkpoint-*"):
        checkpoint.rename(tmp_path / checkpoint.name)
    train(new_model(), Rows(), options)  # another run in this folder replaces the model, whole
    assert (folder / "README.md").read_text() == "Mine."
    check_saved_model(folder)


@pytest.fixture
def hub(monkeypatch):
    """A hub that notes which folder is pushed."""
    pushed = []

    def upload(self, *, repo_id, folder_path, token=None, **options):
        pushed.append((repo_id, sorted(path.name for path in folder_path.iterdir()), token))

    monkeypatch.setattr(HfApi, "whoami", lambda self, token=None: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=f"me/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return pushed


def test_the_finished_model_is_pushed_and_nothing_else(hub, tmp_path):
    push = {"push_to_hub": True, "hub_token": "secret"}
    train(new_model(), Rows(), settings(tmp_path / "tiny", steps=4, trainer=push))
    ((repository, names, token),) = hub
    assert repository == "me/tiny" and token == "secret"
    assert {"README.md", "config.json", "model.safetensors", "modeling_andromeda.py"} <= {*names}
    written = [path for path in (tmp_path / "tiny").rglob("*") if path.is_file() and b"secret" in path.read_bytes()]
    assert written == []


def test_a_run_that_could_not_push_pushes_when_it_is_resumed(hub, tmp_path, monkeypatch):
    def upload(self, **options):
        raise OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled.")

    push = {"push_to_hub": True, "hub_model_id": "tiny"}
    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", upload)
        with pytest.raises(ConnectionError, match=r"the model is in .*model, and `hf upload me/tiny .*` pushes it"):
            train(new_model(), Rows(), settings(tmp_path, steps=2, trainer=push))
    check_saved_model(tmp_path / "model")
    train(new_model(), Rows(), settings(tmp_path, steps=2, trainer=push), resume=True)
    assert [repository for repository, *_ in hub] == ["me/tiny"]
    train(new_model(), Rows(), settings(tmp_path, steps=2), resume=True)  # where it is pushed does not identify a run
    assert len(hub) == 1


def test_without_the_hub_nothing_is_trained(tmp_path, monkeypatch):
    def whoami(self, token=None):
        raise OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled.")

    monkeypatch.setattr(HfApi, "whoami", whoami)
    with pytest.raises(ConnectionError, match=r"nothing was trained\. To push, unset HF_HUB_OFFLINE"):
        train(new_model(), Rows(), settings(tmp_path / "run", trainer={"push_to_hub": True}))
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_not_pushed(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\['hub_strategy'\] must be 'end', got 'every_save'"):
        settings(tmp_path, trainer={"push_to_hub": True, "hub_strategy": "every_save"}).training_arguments()


def test_the_manifest_names_the_new_files(tmp_path):
    train(new_model(), Rows(), settings(tmp_path, steps=2))
    for folder in ("model", "checkpoint-2"):
        manifest = json.loads((tmp_path / folder / "andromeda_checkpoint.json").read_text())
        assert "modeling_andromeda.py" in manifest["files"]
    (tmp_path / "model" / "modeling_andromeda.py").write_text("")
    with pytest.raises(ValueError, match=r"modeling_andromeda.py must have \d+ bytes, got 0"):
        check_saved_model(tmp_path / "model")
