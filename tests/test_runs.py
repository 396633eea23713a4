"""Where commands look for models, and what they make of folders that hold none."""

import json

import pytest

from andromeda import runs


@pytest.mark.parametrize("inside", [".", "model"])
@pytest.mark.parametrize("file", ["config.json", "andromeda.json"])
def test_a_model_is_found_in_a_run(tmp_path, inside, file):
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    (folder / file).write_text("{}")
    assert runs.find_model(str(tmp_path)) == folder


def test_no_model(tmp_path):
    with pytest.raises(runs.UsageError, match="is no saved model"):
        runs.find_model(str(tmp_path))
    with pytest.raises(runs.UsageError, match="does not exist"):
        runs.find_model(str(tmp_path / "nowhere"))


def test_a_config_that_describes_no_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "andromeda", "hidden_size": 0}))
    with pytest.raises(ValueError, match=r"config.json describes no model: .*"):
        runs.load_model(tmp_path, "cpu", None)


@pytest.mark.parametrize("value, expected", [(1, 128), (128, 128), (129, 256)])
def test_round_up(value, expected):
    assert runs.round_up(value, 128) == expected
