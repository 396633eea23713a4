"""The cache of built data sets: keys, damage, races, locations."""

import fcntl
import json
import os
import pwd
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from built_rows import TEXTS, builder, cache_entries, change_metadata, flip, rows_of, train_tokenizer

from andromeda.data import packing
from andromeda.data.builder import DatasetBuilder
from andromeda.data.cache import default_cache_dir
from andromeda.data.packed import PackedDataset
from andromeda.data.tokenizer import AndromedaTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def build(tokenizer, tmp_path):
    return builder(tokenizer, tmp_path / "cache")


def test_cache_is_used(build, monkeypatch, tmp_path):
    first = build()
    monkeypatch.setattr(DatasetBuilder, "_write", None)
    again = build(doc_mask=True, num_cpu=2)
    assert again.path == first.path
    assert rows_of(again) == rows_of(first)
    assert cache_entries(tmp_path) == [first.path.name]


def test_cache_key(build, tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" ".join(TEXTS))
    other = AndromedaTokenizer(tokenizer.tokenizer, extra_ids=1)
    variants = [{}, {"seq_len": 8}, {"packing": "bfd"}, {"errors": "skip"}, {"tokenizer": other}]
    variants += [
        {"separator": " beta "},
        {"format": "text"},
        {"tokenizer": AndromedaTokenizer(tokenizer.tokenizer, "</s>")},
    ]
    variants += [{"tokenizer": AndromedaTokenizer(tokenizer.tokenizer, pad_token="<fill>")}]
    paths = [build(path, **variant).path for variant in variants]
    assert len(set(paths)) == len(variants)
    assert paths[0].name.startswith("a.txt-")
    assert build(path).path == paths[0]
    path.write_text(" ".join(TEXTS[::-1]) + " more")
    assert build(path).path not in paths


def test_stream_of_records_is_keyed_by_content(build, tmp_path):
    source = datasets.Dataset.from_dict({"text": TEXTS})
    first = build(source.to_iterable_dataset())
    again = build(source.to_iterable_dataset())
    assert first.path == again.path
    assert rows_of(again) == rows_of(build(source))
    assert build(source.select(range(30)).to_iterable_dataset()).path != first.path
    assert len(cache_entries(tmp_path)) == 3


def damage_truncate(path):
    with open(path / "data.arrow", "rb+") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 100)


def damage_overwrite(path):
    size = (path / "data.arrow").stat().st_size
    (path / "data.arrow").write_bytes(b"\0" * size)


def damage_rows(path):
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps({**metadata, "rows": metadata["rows"] + 1}))


def damage_format(path):
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps({**metadata, "format": 0}))


DAMAGES = [
    (damage_truncate, r"data.arrow must have \d+ bytes, got \d+"),
    (damage_overwrite, "must be an Arrow stream|must hold"),
    (damage_rows, r"must hold \d+ rows, got \d+"),
    (damage_format, "must have format 1, got 0"),
    (lambda path: (path / "metadata.json").write_text("{"), "metadata.json must be JSON"),
    (lambda path: (path / "metadata.json").write_text("[]"), "must have format 1"),
    (lambda path: (path / "metadata.json").write_text('{"format": 1}'), "must have data_bytes, dtype, .*, got none"),
    (lambda path: (path / "metadata.json").unlink(), "must hold metadata.json and data.arrow"),
    (lambda path: (path / "data.arrow").unlink(), "must hold metadata.json and data.arrow"),
]


@pytest.mark.parametrize(
    ("damage", "message"),
    DAMAGES,
    ids=["truncated", "zeros", "rows", "format", "half-json", "other-json", "no-keys", "no-metadata", "no-data"],
)
def test_damaged_cache_is_built_again(build, tmp_path, damage, message):
    whole = build()
    expected = rows_of(whole)
    damage(whole.path)
    with pytest.raises(ValueError, match=f"PackedDataset: .*({message})"):
        PackedDataset(whole.path)
    with pytest.warns(UserWarning, match="a damaged data set in the cache is built again"):
        repaired = build()
    assert rows_of(repaired) == expected
    assert cache_entries(tmp_path) == [repaired.path.name]


def test_metadata_knows_its_checksum(build, tmp_path):
    dataset = build()
    change_metadata(dataset.path, eos_token_id=dataset.eos_token_id + 1)
    changed = PackedDataset(dataset.path)
    with pytest.raises(ValueError, match=r"is damaged: metadata.json has other content than was written"):
        changed.verify()
    with pytest.warns(
        UserWarning, match=r"a damaged data set in the cache is built again: .* metadata.json has other content"
    ):
        assert build().eos_token_id == dataset.eos_token_id


def test_damaged_bytes_in_the_cache_are_said_and_built_again(build, tmp_path):
    dataset = build()
    expected, content = rows_of(dataset), (dataset.path / "data.arrow").read_bytes()
    flip(dataset.path / "data.arrow", content.index(b"".join(np.uint16(expected[5]))) + 2)
    assert rows_of(PackedDataset(dataset.path)) != expected
    with pytest.warns(
        UserWarning, match=r"a damaged data set in the cache is built again: .*data.arrow has other content"
    ):
        repaired = build()
    assert rows_of(repaired) == expected
    assert repaired.verify()
    assert cache_entries(tmp_path) == [repaired.path.name]


def test_what_killed_builds_left(build, tmp_path):
    """Unless a process holds their locks, or they are so young that their builder may not have a lock yet."""
    cache, minutes_ago = tmp_path / "cache", time.time() - 61
    cache.mkdir()
    for name in (".building-young", ".building-stale", ".building-locked", "other", ".other"):
        (cache / name).mkdir()
        (cache / name / "data.arrow").write_text("")
        if name != ".building-young":
            os.utime(cache / name, (minutes_ago, minutes_ago))
    lock = os.open(cache / ".building-locked", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        dataset = build()
    finally:
        os.close(lock)
    assert cache_entries(tmp_path) == sorted(
        [".building-young", ".building-locked", "other", ".other", dataset.path.name]
    )
    build(seq_len=8)
    assert ".building-locked" not in cache_entries(tmp_path)


def test_two_builders_of_the_same(build, monkeypatch, tmp_path):
    """The second builder finishes while the first is running: both get whole data sets, and no other files remain."""
    finish = packing.StreamPacker.finish
    datasets_built = []

    def meet(self):
        monkeypatch.setattr(packing.StreamPacker, "finish", finish)
        datasets_built.append(build())
        return finish(self)

    monkeypatch.setattr(packing.StreamPacker, "finish", meet)
    first = build()
    assert first.path == datasets_built[0].path
    assert rows_of(first) == rows_of(datasets_built[0])
    assert cache_entries(tmp_path) == [first.path.name]


@pytest.mark.parametrize("place", ["/proc/rows", "/dev/null/rows"])
def test_cache_that_cannot_be_made(build, place):
    with pytest.raises(
        OSError, match=f"cannot write packed rows to {place}: .*Another place can be chosen with cache_dir"
    ):
        build(cache_dir=place)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ANDROMEDA_CACHE": "/a", "XDG_CACHE_HOME": "/x"}, "/a/datasets"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/andromeda/datasets"),
        ({"HOME": "/h"}, "/h/.cache/andromeda/datasets"),
    ],
    ids=["ANDROMEDA_CACHE", "XDG_CACHE_HOME", "HOME"],
)
def test_default_cache_dir(monkeypatch, environment, expected):
    for name in ("ANDROMEDA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_cache_dir() == Path(expected)
    assert DatasetBuilder("corpus").cache_dir == Path(expected)


@pytest.fixture
def no_account(monkeypatch):
    """A user without an entry in the user database, and no variable that names a location for the cache."""

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("ANDROMEDA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("home", [None, "", "relative"])
@pytest.mark.parametrize("options", [{}, {"cache_dir": "~/rows"}, {"cache_dir": Path("~")}], ids=str)
def test_no_home(no_account, monkeypatch, home, options):
    if home is not None:
        monkeypatch.setenv("HOME", home)
    with pytest.raises(
        ValueError, match=r"home directory .* not known: HOME .*; set ANDROMEDA_CACHE, or pass .*cache_dir"
    ):
        DatasetBuilder("corpus", **options)


def test_no_home_is_needed(no_account, monkeypatch, tmp_path):
    assert DatasetBuilder("corpus", cache_dir=tmp_path).cache_dir == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_dir() == Path("/x/andromeda/datasets")
    monkeypatch.setenv("ANDROMEDA_CACHE", "/a")
    assert default_cache_dir() == Path("/a/datasets")


def test_home_of_the_account(monkeypatch):
    for name in ("ANDROMEDA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    expected = Path(pwd.getpwuid(os.getuid()).pw_dir, ".cache/andromeda/datasets")
    monkeypatch.setenv("HOME", "")
    assert default_cache_dir() == expected
    monkeypatch.delenv("HOME")
    assert default_cache_dir() == expected


def test_relative_names_of_caches(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("XDG_CACHE_HOME", "x")
    monkeypatch.delenv("ANDROMEDA_CACHE", raising=False)
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME must be an absolute path, got 'x': it is not used"):
        assert default_cache_dir() == Path("/h/.cache/andromeda/datasets")
    monkeypatch.setenv("ANDROMEDA_CACHE", "a")
    assert default_cache_dir() == tmp_path / "a" / "datasets"
    monkeypatch.setenv("ANDROMEDA_CACHE", "~/a")
    assert default_cache_dir() == Path("/h/a/datasets")
    for name, expected in (("cache", tmp_path / "cache"), ("~/rows", Path("/h/rows")), (".", tmp_path)):
        assert DatasetBuilder("corpus", cache_dir=name).cache_dir == expected


@pytest.mark.parametrize(
    ("cache_dir", "error", "message"),
    [
        ("", ValueError, "cache_dir must not be empty"),
        (b"rows", TypeError, "cache_dir must be a path, got b'rows'"),
        (7, TypeError, "cache_dir must be a path, got 7"),
        ("~nobody-of-this-name/x", ValueError, "cache_dir must be in the home directory of an account that there is"),
    ],
    ids=str,
)
def test_bad_cache_dir(cache_dir, error, message):
    with pytest.raises(error, match=f"DatasetBuilder: {message}"):
        DatasetBuilder("corpus", cache_dir=cache_dir)
