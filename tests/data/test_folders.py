"""The files of a folder: those that are read, and remarks on all others."""

import json
import os

import datasets
import pytest

from andromeda.data import folders
from andromeda.data.folders import Skipped, is_rows, is_saved_dataset, walk


def make(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("content")


def found(root, include=(), exclude=()):
    """The names of the files that are read, and the remarks on the others."""
    skipped = Skipped()
    files = walk(root, lambda name: name.endswith(".txt"), include, exclude, skipped)
    return [path.relative_to(root).as_posix() for path in files], skipped


def test_order_and_what_is_left_out(tmp_path):
    make(tmp_path, "b.txt", "a.txt", "b/z.txt", "b/a.txt", "a/x.txt", ".h.txt", ".git/a.txt", "a.png", "b/state.json")
    (tmp_path / "empty.txt").touch()
    files, skipped = found(tmp_path)
    assert files == ["a.txt", "b.txt", "a/x.txt", "b/a.txt", "b/z.txt"]
    assert sorted(skipped.lines()) == [
        "1 descriptions of data sets: b/state.json",
        "1 empty: empty.txt",
        "1 of no known kind: a.png",
        "2 hidden: .git/, .h.txt",
    ]
    assert skipped.total() == 5


def test_links_are_followed(tmp_path):
    root, other = tmp_path / "src", tmp_path / "other"
    make(root, "a.txt")
    make(other, "b.txt", "deep/c.txt")
    os.symlink(other, root / "linked")
    os.symlink(other / "b.txt", tmp_path / "src" / "one.txt")
    assert found(root)[0] == ["a.txt", "one.txt", "linked/deep/c.txt"]  # b.txt has two names
    assert found(root)[1].lines() == ["1 already read by another name: linked/b.txt (one.txt)"]


def test_what_has_several_names_is_read_once(tmp_path):
    make(tmp_path, "a.txt", "s/b.txt")
    os.symlink("..", tmp_path / "s" / "up")
    os.symlink("s", tmp_path / "again")
    os.symlink("a.txt", tmp_path / "z.txt")
    os.link(tmp_path / "a.txt", tmp_path / "hard.txt")
    files, skipped = found(tmp_path)
    assert files == ["a.txt", "again/b.txt"]
    (line,) = skipped.lines()
    assert line == (
        "4 already read by another name: s/ (again/), hard.txt (a.txt), z.txt (a.txt), again/up/ (the folder itself)"
    )


def test_links_to_nothing_and_special_files(tmp_path):
    make(tmp_path, "a.txt")
    os.symlink("nowhere", tmp_path / "dead.txt")
    os.symlink("self.txt", tmp_path / "self.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    files, skipped = found(tmp_path)
    assert files == ["a.txt"]
    assert skipped.lines() == [
        "1 broken links (No such file or directory): dead.txt",
        "1 pipes, sockets or devices: pipe.txt",
        "1 broken links (Too many levels of symbolic links): self.txt",
    ]


def test_folders_that_cannot_be_read_are_an_error(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "closed/b.txt")
    scan = os.scandir

    def denied(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="closed"):
        found(tmp_path)


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*.log"], [], ["b.log", "d/e.log"]),
        (["d/*"], [], ["d/c.txt", "d/e.log"]),
        (["**/c.txt", "a.txt"], [], ["a.txt", "d/c.txt"]),
        ([], ["d"], ["a.txt"]),
        ([], ["d/"], ["a.txt"]),
        ([], ["c.*"], ["a.txt"]),
        ([], ["/a.txt"], ["d/c.txt"]),
        (["*.txt"], ["d/c*"], ["a.txt"]),
        (["[ab].*"], [], ["a.txt", "b.log"]),
        (["state.json"], [], ["d/state.json"]),
    ],
)
def test_patterns(tmp_path, include, exclude, expected):
    make(tmp_path, "a.txt", "b.log", "d/c.txt", "d/e.log", "d/state.json")
    files, skipped = found(tmp_path, include, exclude)
    assert files == expected
    assert any("excluded" in line for line in skipped.lines())


def test_patterns_that_match_nothing_are_told(tmp_path):
    make(tmp_path, "a.txt")
    files, skipped = found(tmp_path, exclude=["heldout*", "a*", "*.bin"])
    assert files == []
    assert skipped.lines() == ["1 excluded: a.txt"]
    assert skipped.notes == ["the pattern '*.bin' matches nothing", "the pattern 'heldout*' matches nothing"]


def test_long_lists_are_cut(monkeypatch):
    monkeypatch.setattr(folders, "MAX_NAMES", 3)
    skipped = Skipped()
    for index in range(1203):
        skipped.add(f"{index}.bin", "of no known kind")
    assert skipped.lines() == ["1,203 of no known kind: 0.bin, 1.bin, 2.bin and 1,200 more"]


def write_rows(folder):
    folder.mkdir(parents=True)
    (folder / "data.arrow").write_bytes(b"rows")
    (folder / "metadata.json").write_text(json.dumps({"seq_len": 8, "packing": "stream", "rows": 1}))


def test_packed_rows_are_no_documents(tmp_path):
    write_rows(tmp_path / "rows" / "train")
    make(tmp_path, "a.txt", "other/data.arrow", "other/metadata.json", "other/b.txt")
    assert is_rows(tmp_path / "rows" / "train") and not is_rows(tmp_path / "other") and not is_rows(tmp_path)
    files, skipped = found(tmp_path)
    assert files == ["a.txt", "other/b.txt"]
    assert "1 packed rows: rows/train/" in skipped.lines()


def test_saved_datasets_are_told_from_files_of_such_names(tmp_path):
    data = datasets.Dataset.from_dict({"text": ["a"]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "dict")
    assert is_saved_dataset(tmp_path / "one") and is_saved_dataset(tmp_path / "dict")
    for name, content in (
        ("state.json", {"step": 3}),
        ("state.json", {"_data_files": []}),
        ("state.json", [1]),
        ("dataset_dict.json", {"splits": []}),
        ("dataset_dict.json", {"splits": ["train"]}),
        ("dataset_dict.json", {"splits": "train"}),
        ("dataset_info.json", {"features": {}}),
    ):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        make(folder, "a.txt", "train/a.txt")
        (folder / name).write_text(json.dumps(content))
        assert not is_saved_dataset(folder), (name, content)
    (folder / "state.json").write_bytes(b"\xff{")
    assert not is_saved_dataset(folder)
