"""Whole and damaged checkpoints: which one a run continues from, and which ones it keeps."""

import shutil
from pathlib import Path

import pytest
from tiny_run import SIZES, Killed, Rows, assert_same, flip, new_model, settings, weights

from andromeda import Andromeda
from andromeda.training import MANIFEST, check_saved_model, latest_checkpoint, train
from andromeda.training.checkpoints import defects_of


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "optimizer.pt").write_bytes(b"half"),
        lambda folder: (folder / "trainer_state.json").unlink(),
        lambda folder: (folder / MANIFEST).unlink(),
    ],
    ids=["truncated file", "missing file", "no manifest"],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, uninterrupted, damage):
    train(new_model(), Rows(), settings(tmp_path, keep=9))
    for step in (6, 8):
        damage(tmp_path / f"checkpoint-{step}")
    assert Path(latest_checkpoint(tmp_path)).name == "checkpoint-4"
    model = new_model()
    train(model, Rows(), settings(tmp_path, keep=9), resume=True)
    assert_same(weights(model), uninterrupted)


def test_nothing_whole_to_continue_from(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    assert latest_checkpoint(tmp_path) is None
    with pytest.raises(ValueError, match=r"has none\s+checkpoint-7: andromeda_checkpoint.json is missing"):
        train(new_model(), Rows(), settings(tmp_path), resume=True)


def test_a_folder_with_checkpoints_is_refused(tmp_path):
    train(new_model(), Rows(), settings(tmp_path))
    with pytest.raises(ValueError, match=r"must not hold checkpoints of another run.*checkpoint-8; resume"):
        train(new_model(), Rows(), settings(tmp_path))


def test_another_run_is_not_continued(tmp_path):
    train(new_model(), Rows(), settings(tmp_path))
    with pytest.raises(
        ValueError, match=r"(?s)these differ:.*learning_rate: was 0.01, is 0.02.*data rows: was 24, is 20"
    ):
        train(new_model(), Rows(20), settings(tmp_path, learning_rate=2e-2), resume=True)
    other = Andromeda(**{**SIZES, "dim": 24})
    with pytest.raises(ValueError, match="model dim: was 16, is 24"):
        train(other, Rows(), settings(tmp_path), resume=True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"])
def test_one_flipped_bit_makes_a_resumed_run_take_the_checkpoint_before(
    tmp_path, checkpoints, uninterrupted, capsys, name
):
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    for step in (6, 8):
        flip(tmp_path / f"checkpoint-{step}" / name)
    model = new_model()
    result = train(model, Rows(), settings(tmp_path, keep=1), resume=True)
    assert_same(weights(model), uninterrupted)
    assert result.damaged == [
        f"checkpoint-{step}: {name} has other content than was written (checksum differs)" for step in (8, 6)
    ]
    said = capsys.readouterr().err
    assert "continues from checkpoint-4, the newest checkpoint that is as it was written:" in said
    assert f"checkpoint-8: {name} has other content" in said
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


def test_damaged_checkpoints_do_not_count_among_those_to_keep(tmp_path, checkpoints):
    """A run that continues before damaged ones must not delete its own in place of theirs."""
    for step in (2, 6, 8):
        shutil.copytree(checkpoints / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    for step in (6, 8):
        flip(tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    rows = Rows(fail_at=8)
    with pytest.raises(Killed):
        train(new_model(), rows, settings(tmp_path, keep=1), resume=True, on_start=rows.begin)
    assert defects_of(tmp_path / "checkpoint-4", contents=True) == []


def test_without_any_good_checkpoint_the_damages_are_listed(tmp_path, checkpoints):
    for step in (2, 4):
        shutil.copytree(checkpoints / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    flip(tmp_path / "checkpoint-2" / "model.safetensors")
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    text = r"(?s)has none\s+checkpoint-4: optimizer.pt is missing\s+checkpoint-2: model.safetensors has other content"
    with pytest.raises(ValueError, match=text):
        train(new_model(), Rows(), settings(tmp_path), resume=True)


def test_a_checkpoint_without_the_state_of_the_optimiser_is_not_continued(tmp_path):
    options = {"trainer": {"save_only_model": True}}
    with pytest.raises(Killed):
        rows = Rows(fail_at=10)
        train(new_model(), rows, settings(tmp_path, **options), on_start=rows.begin)
    with pytest.raises(ValueError, match=r"has none\s+checkpoint-\d: the state of the optimiser is not in it"):
        train(new_model(), Rows(), settings(tmp_path, **options), resume=True)


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_what_has_the_name_of_a_checkpoint_and_is_no_folder_is_refused(tmp_path, kind):
    """At the start, not when training reaches this step."""
    path = tmp_path / "checkpoint-4"
    path.write_text("") if kind == "file" else path.symlink_to(tmp_path / "nowhere")
    for resume in (False, True):
        with pytest.raises(ValueError, match="checkpoint-4 must be a folder"):
            train(new_model(), Rows(), settings(tmp_path), resume=resume)


def test_half_checkpoints_neither_count_nor_go(tmp_path):
    """Another program left them behind: `keep` counts whole ones only."""
    train(new_model(), Rows(), settings(tmp_path, steps=2, save_every=0))
    half = tmp_path / "checkpoint-1"
    shutil.copytree(tmp_path / "checkpoint-2", half)
    (half / "optimizer.pt").unlink()
    torn = tmp_path / "checkpoint-3"
    torn.mkdir()
    options = {"steps": 2, "save_every": 0}
    with pytest.raises(ValueError, match="was 2, is 8"):
        train(new_model(), Rows(), settings(tmp_path), resume=True)
    shutil.rmtree(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="has none"):
        train(new_model(), Rows(), settings(tmp_path, **options), resume=True)
    for path in (half, torn):
        path.rename(tmp_path / f"kept-{path.name}")
    rows = Rows()

    def leave_half_ones():
        for path in (half, torn):
            (tmp_path / f"kept-{path.name}").rename(path)

    train(new_model(), rows, settings(tmp_path, keep=2, save_every=4), on_start=leave_half_ones)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
        "checkpoint-8",
    }


def test_a_saved_model_is_checked(tmp_path, checkpoints):
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    for name in ("model", "checkpoint-8", "checkpoint-6"):
        check_saved_model(tmp_path / name)
    flip(tmp_path / "checkpoint-6" / "optimizer.pt")  # the model is whole without it
    check_saved_model(tmp_path / "checkpoint-6")
    for name in ("model", "checkpoint-8"):
        flip(tmp_path / name / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{name} is damaged: model.safetensors has other content.*checkpoint-4"):
            check_saved_model(tmp_path / name)
    (tmp_path / "model" / MANIFEST).unlink()
    check_saved_model(tmp_path / "model")
