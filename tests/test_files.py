"""Files and folders that appear whole or not at all, and stay when the machine loses power."""

import json
import os

import pytest

from andromeda import files


class PowerCut(BaseException):
    pass


def cut_power(*_):
    raise PowerCut


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_flush_takes_files_and_folders(tmp_path, disk_log):
    (tmp_path / "file").write_text("text")
    files.flush(tmp_path / "file")
    files.flush(str(tmp_path))
    assert disk_log.events == [("sync", tmp_path / "file"), ("sync", tmp_path)]
    with pytest.raises(FileNotFoundError):
        files.flush(tmp_path / "nothing")


def test_flush_tree_reaches_everything(tmp_path, disk_log):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("")
    (tmp_path / "a" / ".hidden").write_text("")
    files.flush_tree(tmp_path)
    expected = {tmp_path, *tmp_path.rglob("*")}
    assert len(expected) == 5 and {path for _, path in disk_log.events} == expected


def test_write_json_replaces_whole(tmp_path, disk_log):
    target = tmp_path / "figures.json"
    files.write_json(target, {"loss": 1.5})
    disk_log.assert_durable(target)
    with pytest.raises(TypeError):
        files.write_json(target, {"loss": object()})
    assert json.loads(target.read_text()) == {"loss": 1.5}
    assert names(tmp_path) == ["figures.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_leaves_the_old_json(tmp_path, monkeypatch, step):
    target = tmp_path / "figures.json"
    files.write_json(target, 1)
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(os, step, cut_power)
        files.write_json(target, 2)
    assert target.read_text() == "1\n" and names(tmp_path) == ["figures.json"]


def test_a_folder_appears_only_when_it_is_complete(tmp_path, disk_log):
    target = tmp_path / "deep" / "rows"
    with pytest.raises(KeyboardInterrupt), files.whole_folder(target) as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert names(target.parent) == []
    for name in ("first", "second"):
        with files.whole_folder(target) as folder:
            assert folder.parent == target.parent  # one file system, so that a rename is possible
            (folder / "inner").mkdir()
            (folder / "inner" / name).write_text("")
        disk_log.assert_durable(target)
        assert names(target / "inner") == [name]
    assert names(target.parent) == ["rows"]


def test_a_folder_that_cannot_be_synced_replaces_nothing(tmp_path, monkeypatch):
    target = tmp_path / "rows"
    with files.whole_folder(target) as folder:
        (folder / "old").write_text("")
    monkeypatch.setattr(os, "fsync", cut_power)
    with pytest.raises(PowerCut), files.whole_folder(target) as folder:
        (folder / "new").write_text("")
    assert names(tmp_path) == ["rows"] and names(target) == ["old"]


def test_a_folder_never_holds_half_of_the_old_one(tmp_path, monkeypatch):
    """The old folder leaves its name in one step: a crash while its files are removed does not show."""
    target = tmp_path / "rows"
    with files.whole_folder(target) as folder:
        (folder / "old").write_text("")
    seen = []
    monkeypatch.setattr(files.shutil, "rmtree", lambda *_, **__: seen.append(names(target)))
    with files.whole_folder(target) as folder:
        (folder / "new").write_text("")
    assert seen and all(found == ["new"] for found in seen)


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "rows").write_text("text")
    with pytest.raises(NotADirectoryError), files.whole_folder(tmp_path / "rows"):
        pass
    assert (tmp_path / "rows").read_text() == "text" and names(tmp_path) == ["rows"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_json(tmp_path / "figures.json", 1)
        with files.whole_folder(tmp_path / "rows"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "figures.json").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "rows").stat().st_mode & 0o777 == 0o750


def test_checksums_find_every_damage(tmp_path):
    for name, content in (("a", b"one"), ("b/c", b"two" * 1_000_000), ("empty", b"")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    recorded = files.checksums(tmp_path)
    assert list(recorded) == ["a", "b/c", "empty"]
    assert recorded["empty"] == {
        "bytes": 0,
        "xxh3_128": "99aa06d3014798d86001c324468d497f",
    }  # of the XXH3 specification
    assert files.damages(tmp_path, recorded) == []
    flipped = bytearray((tmp_path / "b/c").read_bytes())
    flipped[1_500_000] ^= 1
    (tmp_path / "b/c").write_bytes(flipped)
    (tmp_path / "a").unlink()
    (tmp_path / "empty").write_bytes(b"x")
    assert files.damages(tmp_path, recorded) == [
        "a is missing",
        "b/c has other content than was written (checksum differs)",
        "empty must have 0 bytes, got 1",
    ]
    assert list(files.checksums(tmp_path, ["empty"])) == ["empty"]
