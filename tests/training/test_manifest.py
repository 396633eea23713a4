"""Manifests that are damaged, unrelated, or from an older version."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import Rows, assert_same, new_model, settings, weights

from andromeda.training import MANIFEST, latest_checkpoint, sealed, train
from andromeda.training.checkpoints import defects_of


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "{}", '{"format": 2}', b"\xff\xfe\x00", "[" * 100_000],
    ids=["empty", "half", "list", "null", "number", "no keys", "few keys", "binary", "nested"],
)
def test_a_manifest_that_is_damaged_is_a_defect(tmp_path, checkpoints, text):
    shutil.copytree(checkpoints / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    manifest = tmp_path / "checkpoint-4" / MANIFEST
    manifest.write_bytes(text if isinstance(text, bytes) else text.encode())
    (defect,) = defects_of(tmp_path / "checkpoint-4")
    assert str(manifest) in defect and "is damaged" in defect
    assert Path(latest_checkpoint(tmp_path)).name == "checkpoint-2"


@pytest.mark.parametrize(
    "change, text",
    [
        ({"format": 99}, "must have format 1 or 2, got 99"),
        ({"step": 6}, "must be of step 4, got 6"),
        ({"files": []}, "files and run must be JSON objects"),
        ({"run": None}, "files and run must be JSON objects"),
        ({"files": {"config.json": None}}, "is damaged"),
        ({"files": {"config.json": {}}}, "is damaged"),
        ({"files": {"config.json": {"bytes": 3}}}, "config.json: 3 bytes expected"),
    ],
    ids=str,
)
def test_a_manifest_of_something_else_is_a_defect(tmp_path, checkpoints, change, text):
    shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / MANIFEST
    manifest = json.loads(path.read_text()) | change
    path.write_text(json.dumps(manifest))
    assert defects_of(path.parent, contents=True) != []  # the checksum of the manifest itself
    del manifest["xxh3_128"]
    path.write_text(json.dumps(sealed(manifest)))
    assert any(text in defect for defect in defects_of(path.parent))


def test_a_flipped_bit_in_a_manifest_is_found(tmp_path, checkpoints):
    shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / MANIFEST
    data = path.read_text()
    path.write_text(data.replace('"learning_rate": 0.01', '"learning_rate": 0.03'))
    assert "has other content than was written" in defects_of(path.parent)[0]


def test_checkpoints_of_format_1_are_resumed(tmp_path, checkpoints, uninterrupted):
    """They have sizes instead of checksums, and a hash of three rows of the data."""
    shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / MANIFEST
    manifest = json.loads(path.read_text())
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    run = manifest["run"] | {"data": {name: manifest["run"]["data"][name] for name in ("rows", "sha256")}}
    path.write_text(json.dumps({"format": 1, "step": 4, "run": run, "files": sizes}))
    model = new_model()
    train(model, Rows(), settings(tmp_path), resume=True)
    assert_same(weights(model), uninterrupted)
