"""Sources of documents: kinds of files, columns, and text that is not clean."""

import bz2
import csv
import gzip
import json
import lzma
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from andromeda.documents import clean, open_source, whole_texts

TEXTS = ["first\nline two", "", "zweites Dokument: ü, 🥊", " \t\n", 'with "quotes", commas\r\nand lines']
KEPT = [text for text in TEXTS if text.strip()]


def texts_of(source, errors="strict", text_column=None, split=None):
    """The documents of a source and the counts."""
    counts = Counter()
    documents = open_source(source, split, text_column=text_column, errors=errors).documents(counts)
    return list(whole_texts(clean(documents, errors, counts))), counts


def write_json_lines(path):
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)))


def write_json_strings(path):
    path.write_text("\n\n".join(json.dumps(text, ensure_ascii=False) for text in TEXTS), encoding="utf-8")


def write_json_list(path):
    path.write_text(json.dumps([{"n": 1, "body": text} for text in TEXTS], indent=2))


def write_json_objects(path):
    path.write_text("\n".join(json.dumps({"text": text}, indent=1) for text in TEXTS))


def write_separated(path):
    delimiter = "\t" if path.suffix == ".tsv" else ","
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", "text"], *enumerate(TEXTS)])


def arrow_table():
    return pyarrow.table({"id": range(len(TEXTS)), "body": pyarrow.array(TEXTS, pyarrow.large_string())})


def write_parquet(path):
    pyarrow.parquet.write_table(arrow_table(), path, row_group_size=2)


def write_arrow(path):
    with open(path, "wb") as file, pyarrow.ipc.new_stream(file, arrow_table().schema) as stream:
        stream.write_table(arrow_table())


def write_arrow_file(path):
    with open(path, "wb") as file, pyarrow.ipc.new_file(file, arrow_table().schema) as stream:
        stream.write_table(arrow_table(), max_chunksize=2)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_json_lines),
        ("a.ndjson", write_json_strings),
        ("a.json", write_json_list),
        ("objects.json", write_json_objects),
        ("lines.json", write_json_lines),
        ("a.csv", write_separated),
        ("a.tsv", write_separated),
        ("a.parquet", write_parquet),
        ("stream.arrow", write_arrow),
        ("file.arrow", write_arrow_file),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_record_files(tmp_path, name, write):
    write(tmp_path / name)
    for source in (tmp_path / name, str(tmp_path / name), tmp_path):
        texts, counts = texts_of(source)
        assert texts == KEPT
        assert counts["empty_documents"] == 2
        assert counts["files"] == 1


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_files(tmp_path, suffix, pack):
    (tmp_path / f"a.txt{suffix}").write_bytes(pack(b"one document\n"))
    (tmp_path / f"b.JSONL{suffix}").write_bytes(pack(b'{"text": "another"}\n'))
    (tmp_path / f"c.bin{suffix}").write_bytes(pack(b"of no known kind"))
    texts, counts = texts_of(tmp_path)
    assert texts == ["one document\n", "another"]
    assert (counts["files"], counts["ignored_files"]) == (2, 1)
    whole = (tmp_path / f"a.txt{suffix}").read_bytes()
    (tmp_path / f"a.txt{suffix}").write_bytes(whole[:-6])
    with pytest.raises(ValueError, match=r"must be a whole .* file, it is damaged after 13 bytes"):
        texts_of(tmp_path)


def test_directory_is_read_in_order_of_names(tmp_path):
    for name in ("b/z.py", "b/a.txt", "a.md", ".hidden/x.txt", "b/.x.txt", "image.png", "c.cu", "Makefile"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"content of {name}")
    texts, counts = texts_of(tmp_path)
    assert texts == [f"content of {name}" for name in ("a.md", "c.cu", "b/a.txt", "b/z.py")]
    assert counts["ignored_files"] == 4
    assert open_source(tmp_path, None).num_documents() == 4
    assert texts_of(tmp_path / "Makefile")[0] == ["content of Makefile"]  # named: a text whatever its suffix
    assert texts_of(Path(tmp_path / "b" / ".x.txt"))[0] == ["content of b/.x.txt"]


def test_directory_without_known_files(tmp_path):
    with pytest.raises(ValueError, match="found no files"):
        open_source(tmp_path, None)
    (tmp_path / "a.png").touch()
    (tmp_path / "README").touch()
    with pytest.raises(ValueError, match=r"found 2 of no known kind: README, a.png"):
        open_source(tmp_path, None)


def test_fingerprint_follows_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    before = open_source(tmp_path, None).fingerprint()
    assert open_source(tmp_path, None).fingerprint() == before
    (tmp_path / "a.txt").write_text("ab")
    after = open_source(tmp_path, None).fingerprint()
    (tmp_path / "b.txt").write_text("b")
    assert len({before, after, open_source(tmp_path, None).fingerprint()}) == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda columns: datasets.Dataset.from_dict(columns),
        lambda columns: datasets.Dataset.from_dict(columns).to_iterable_dataset(),
        lambda columns: datasets.DatasetDict(train=datasets.Dataset.from_dict(columns)),
    ],
    ids=["Dataset", "IterableDataset", "DatasetDict"],
)
def test_dataset_objects(make):
    texts, counts = texts_of(make({"n": list(range(6)), "text": [*TEXTS, None]}))
    assert texts == KEPT
    assert counts["empty_documents"] == 3


def test_dataset_with_selected_rows():
    dataset = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(3000)]}).select(range(2999, 0, -2))
    assert texts_of(dataset)[0] == [f"t{i}" for i in range(2999, 0, -2)]
    source = open_source(dataset, None)
    assert source.num_documents() == 1500
    assert source.fingerprint() != open_source(dataset.select(range(10)), None).fingerprint()


def test_saved_dataset(tmp_path):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "one")
    assert texts_of(tmp_path / "one")[0] == KEPT
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "two")
    assert texts_of(tmp_path / "two")[0] == ["train"]
    assert texts_of(tmp_path / "two", split="test")[0] == ["test"]
    with pytest.raises(ValueError, match="split must be one of train, test, got 'dev'"):
        open_source(tmp_path / "two", "dev")


# Columns


@pytest.mark.parametrize(
    ("columns", "wanted", "expected"),
    [
        ({"body": ["b"], "text": ["t"]}, None, ["t"]),
        ({"body": ["b"], "n": [1]}, None, ["b"]),
        ({"body": ["b"], "text": ["t"]}, "body", ["b"]),
    ],
    ids=["named-text", "only-one", "asked-for"],
)
@pytest.mark.parametrize("kind", ["dataset", "jsonl", "parquet", "csv"])
def test_column_choice(tmp_path, kind, columns, wanted, expected):
    if kind == "csv" and wanted is None:  # all of its fields are strings: a number may be a text
        columns.pop("n", None)
    dataset = datasets.Dataset.from_dict(columns)
    source = dataset
    if kind != "dataset":
        source = tmp_path / f"a.{kind}"
        {"jsonl": dataset.to_json, "parquet": dataset.to_parquet, "csv": dataset.to_csv}[kind](source)
    assert texts_of(source, text_column=wanted)[0] == expected


@pytest.mark.parametrize(
    ("columns", "wanted", "message"),
    [
        (
            {"a": ["x"], "b": ["y"]},
            None,
            r"several columns that may be text and none named 'text'.*a \(string\), b \(string\)",
        ),
        ({"n": [1]}, None, r"no column of strings.*n \(int"),
        ({"a": ["x"]}, "b", r"text_column must be a column of .*, got 'b'; there are: a \(string\)"),
    ],
    ids=["several", "none", "missing"],
)
@pytest.mark.parametrize("kind", ["dataset", "jsonl"])
def test_no_column(tmp_path, kind, columns, wanted, message):
    source = datasets.Dataset.from_dict(columns)
    if kind == "jsonl":
        source.to_json(tmp_path / "a.jsonl")
        source = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match=message):
        texts_of(source, text_column=wanted)


def test_values_that_are_not_text():
    with pytest.raises(TypeError, match="row 1, column 'text' must be a string, got int 3"):
        texts_of(datasets.IterableDataset.from_generator(lambda: ({"text": value} for value in ("a", 3))))
    with pytest.raises(TypeError, match="row 0, column 'text' must be a string, got list"):
        texts_of(datasets.Dataset.from_dict({"text": [["a"]]}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"other": "a"}\n', r"a.jsonl, line 2 must have the column 'text', got other"),
        ("a.jsonl", '{"text": "a"}\n{"text": "ü" x}\n', r"a.jsonl, line 2 must be JSON: .* at byte 28"),
        ("a.jsonl", "[1]\n", r"a.jsonl, line 1 must be an object or a string, got list"),
        ("a.json", '[{"text": "a"}', r"a.json must be JSON: .* at byte 14"),
        ("a.csv", 'text\n"unclosed\n', r"a.csv, line 2 must be csv"),
        ("a.csv", "id,text\n1,a,b\n", r"a.csv, line 2, column 'text': must have 2 fields as the header, got 3"),
        ("a.parquet", "text", r"a.parquet must be a Parquet file"),
        ("a.arrow", "text", r"a.arrow must be an Arrow file"),
    ],
    ids=["column", "json-line", "list-line", "json", "quote", "fields", "parquet", "arrow"],
)
def test_malformed_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        texts_of(tmp_path / name)


# Text that is not clean


DIRTY = [
    ("latin.txt", "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n".encode("latin-1"), "byte 0xfc at byte 2", "gr\ufffdn"),
    ("nul.txt", "ü\0x".encode(), "a NUL character at byte 2", "ü\ufffdx"),
    ("bom-nul.txt", b"\xef\xbb\xbfa\0", "a NUL character at byte 4", "a\ufffd"),
    ("a.jsonl", b'{"text": "ok"}\n{"text": "\xff"}\n', "line 2 must be UTF-8, got byte 0xff at byte 25", "\ufffd"),
    ("nul.jsonl", b'{"text": "a\\u0000"}\n', "column 'text' must be text, got a NUL character at byte 1", "a\ufffd"),
    ("lone.jsonl", b'{"text": "a\\ud800"}\n', r"the lone surrogate U\+D800 at byte 1", "a\ufffd"),
    ("a.csv", b"id,text\n1,\xe9\n", "line 2 must be UTF-8, got byte 0xe9 at byte 10", "\ufffd"),
]


@pytest.mark.parametrize(("name", "data", "message", "repaired"), DIRTY, ids=[case[0] for case in DIRTY])
def test_bad_text(tmp_path, name, data, message, repaired):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}.*{message}.*errors='replace'"):
        texts_of(path)
    texts, counts = texts_of(path, errors="skip")
    assert texts == (["ok"] if name == "a.jsonl" else [])
    assert (counts["skipped_documents"], counts["repaired_documents"]) == (1, 0)
    texts, counts = texts_of(path, errors="replace")
    assert texts[-1] == repaired
    assert (counts["skipped_documents"], counts["repaired_documents"]) == (0, 1)


def test_byte_order_mark_is_removed(tmp_path):
    for name, text in (("a.txt", "text"), ("b.jsonl", '{"text": "record"}\n'), ("c.json", '["item"]')):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    texts, counts = texts_of(tmp_path)
    assert texts == ["text", "record", "item"]
    assert counts["byte_order_marks"] == 3


# Names


@pytest.mark.parametrize(
    "name", ["./missing", "/missing/x", "~/missing-x", "a/b/c", "missing.txt", "missing.jsonl.gz", Path("missing")]
)
def test_missing_path(name):
    with pytest.raises(FileNotFoundError, match="dataset_name must be an existing path"):
        open_source(name, None)


@pytest.mark.parametrize("name", [None, 3, ["a.txt"]])
def test_not_a_source(name):
    with pytest.raises(TypeError, match=f"a datasets.Dataset or an IterableDataset, got {type(name).__name__}"):
        open_source(name, None)


def test_split_of_files(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ValueError, match="split must be None for files, got 'train'"):
        open_source(tmp_path, "train")


def test_hub_without_network(monkeypatch, capfd):
    from huggingface_hub import constants

    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="cannot load 'andromeda-tests/absent'") as caught:
        open_source("andromeda-tests/absent", None)
    assert "http://127.0.0.1:9 cannot be reached" in str(caught.value)
    assert "pass a file (txt, jsonl, parquet, csv)" in str(caught.value)
    assert "load_dataset('andromeda-tests/absent', split='train')" in str(caught.value)
    assert "Retrying" not in capfd.readouterr().err
