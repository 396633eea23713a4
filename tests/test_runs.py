"""Folders and files that appear whole or not at all; where commands look for models."""

import json

import pytest

from andromeda import runs


def test_write_json_replaces_whole(tmp_path):
    target = tmp_path / "figures.json"
    runs.write_json(target, {"loss": 1.5})
    with pytest.raises(TypeError):
        runs.write_json(target, {"loss": object()})
    assert json.loads(target.read_text()) == {"loss": 1.5}
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "deep" / "rows"
    with pytest.raises(KeyboardInterrupt), runs.whole_folder(target) as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []
    for name in ("first", "second"):
        with runs.whole_folder(target) as folder:
            (folder / name).write_text("")
    assert [path.name for path in target.iterdir()] == ["second"]
    assert target.stat().st_mode & 0o777 == 0o755


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
