"""Sources of documents: kinds of files, columns, names."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import threading
from pathlib import Path, PurePosixPath

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from source_texts import texts_of, texts_of_opened

from andromeda.data.builder import DatasetBuilder
from andromeda.data.decoding import SourceError
from andromeda.data.sources import open_source
from andromeda.data.tokenizer import AndromedaTokenizer

TEXTS = ["first\nline two", "", "zweites Dokument: ü, 🥊", " \t\n", 'with "quotes", commas\r\nand lines']
KEPT = [text for text in TEXTS if text.strip()]


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
    assert texts_of(tmp_path / "Makefile")[0] == ["content of Makefile"]  # text, as a file given by name
    assert texts_of(Path(tmp_path / "b" / ".x.txt"))[0] == ["content of b/.x.txt"]


def test_directory_without_known_files(tmp_path):
    with pytest.raises(ValueError, match="found no files"):
        open_source(tmp_path, None)
    (tmp_path / "a.png").touch()
    (tmp_path / "README").touch()
    with pytest.raises(ValueError, match=r"found 2 of no known kind: README, a.png"):
        open_source(tmp_path, None)


def test_fingerprint_follows_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    seen = [open_source(tmp_path).fingerprint()]
    assert open_source(tmp_path).fingerprint() == seen[0]
    path.write_text("ab")
    seen.append(open_source(tmp_path).fingerprint())
    path.write_text("cd")  # of the same size, at another time
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    seen.append(open_source(tmp_path).fingerprint())
    path.write_text("efg")  # of another size, at the same time
    os.utime(path, ns=(1, json.loads(seen[-1])["files"][0][2]))
    seen.append(open_source(tmp_path).fingerprint())
    (tmp_path / "b.txt").write_text("b")
    seen.append(open_source(tmp_path).fingerprint())
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    seen.append(open_source(tmp_path).fingerprint())
    for options in ({"include": "a*"}, {"exclude": "nothing"}, {"separator": "|"}, {"format": "text"}):
        seen.append(open_source(tmp_path, **options).fingerprint())
    assert len(set(seen)) == len(seen)


def write_files(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))


LINES = '{"content": "a line", "n": 1}\n'
MANY = {f"{i:02}.jsonl": LINES for i in range(12)}  # more files than the first sample


@pytest.mark.parametrize(
    ("files", "expected", "skipped"),
    [
        ({"a.jsonl": LINES, "dataset_info.json": {"description": "x"}}, ["a line"], "descriptions of data sets"),
        ({"a.txt": "text", "state.json": {"step": 3}}, ["text"], "descriptions of data sets: state.json"),
        ({"a.jsonl": LINES, "counts.json": {"files": 3}}, ["a line"], "single JSON objects .*: counts.json"),
        ({"a.jsonl": LINES, "card.json": {"description": "x"}}, ["a line"], "single JSON objects .*: card.json"),
        ({"a.txt": "text", "counts.json": {"files": 3}}, ["text"], "single JSON objects .*: counts.json"),
        ({"a.jsonl": LINES, "b.json": {"content": "an object"}}, ["a line", "an object"], None),
        ({"a.json": {"text": "one"}, "b.json": {"text": "two"}}, ["one", "two"], None),
        ({"a.json": [{"content": "one"}], "z.json": {"x": "y"}}, ["one"], "single JSON objects .*: z.json"),
        ({"a.jsonl": '"just"\n"strings"\n', "b.txt": "text"}, ["just", "strings", "text"], None),
        ({"a.jsonl": LINES, "b.csv": "content\ncsv\n", "c.md": "text"}, ["a line", "csv", "text"], None),
    ],
    ids=["dataset_info", "state", "numbers", "description", "beside-text", "same-column", "objects", "json-list",
         "strings", "formats"],
)  # fmt: skip
def test_folders_of_several_kinds(tmp_path, files, expected, skipped):
    write_files(tmp_path, files)
    source = open_source(tmp_path)
    texts, counts = texts_of_opened(source)
    assert texts == expected
    facts = source.facts()
    assert texts_of_opened(source) == (texts, counts)  # read a second time
    assert source.facts() == facts and sum(facts["formats"].values()) == counts["files"]
    said = source.facts()["skipped"]
    assert len(said) == (skipped is not None)
    assert counts["ignored_files"] == len(said)
    if skipped is not None:
        assert re.search(skipped, said[0])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.jsonl": '{"prompt": "a"}\n', "b.jsonl": '{"completion": "b"}\n'}, "several columns"),
        ({"a.csv": "x\n1\n", "b.jsonl": LINES}, "several columns"),
        ({"a.json": {"x": "1"}, "b.json": {"y": "2"}}, "several columns"),
        ({"a.json": {"text": "1"}, "b.json": {"y": "2"}}, "b.json must have the column 'text'"),
        ({"a.txt": "text", "card.json": {"description": "x"}}, "card.json is one JSON object beside files of text"),
        (
            {**{f"{i:02}.json": {"text": "x"} for i in range(12)}, "z.json": {"y": "z"}},
            "z.json, record 0 must have the",
        ),
        ({**MANY, "z.csv": "content,x\na,b\n"}, "z.csv: 'content' was the only"),
        (
            {**{f"{i:02}.jsonl": LINES for i in range(12)}, "z.jsonl": '{"n": 1}\n'},
            "z.jsonl, line 1 must have the column",
        ),
        ({**{f"{i:02}.jsonl": '"a"\n' for i in range(12)}, "z.csv": "content\na\n"}, "z.csv has columns and the files"),
    ],
    ids=[
        "lines",
        "formats",
        "objects",
        "text-in-one",
        "object-beside-text",
        "late-object",
        "late-csv",
        "late-lines",
        "late-columns",
    ],
)
def test_files_that_disagree(tmp_path, files, message):
    write_files(tmp_path, files)
    with pytest.raises(SourceError, match=message):
        texts_of(tmp_path)


def test_what_a_source_says_of_itself(tmp_path):
    write_files(tmp_path, {"a.jsonl": LINES, "b.txt": "text", "c.bin": "x", ".h": "x"})
    source = open_source(tmp_path, exclude="nothing")
    texts_of_opened(source)
    assert source.facts() == {
        "text_column": "content",
        "formats": {"jsonl": 1, "text": 1},
        "skipped": ["1 hidden: .h", "1 of no known kind: c.bin"],
        "notes": ["the pattern 'nothing' matches nothing"],
    }


def test_formats_and_separators(tmp_path):
    write_files(tmp_path, {"part-0": LINES, "part-1": LINES, "story.log": "one|two"})
    assert texts_of(tmp_path, format="jsonl", include="part-*")[0] == ["a line", "a line"]
    assert texts_of(tmp_path / "part-0")[0] == ["a line"]  # by its content
    assert texts_of(tmp_path / "part-0", format="text")[0] == [LINES]
    assert texts_of(tmp_path / "story.log", separator="|")[0] == ["one", "two"]
    assert open_source(tmp_path / "story.log", separator="|", format="text").num_documents() is None
    with pytest.raises(SourceError, match=r"separator must not be given for .*part-0, which holds no plain text"):
        texts_of(tmp_path / "part-0", separator="|")
    (tmp_path / "c.csv").write_text("text\na\n")
    with pytest.raises(SourceError, match=r"separator must not be given for .*c.csv"):
        open_source(tmp_path / "c.csv", separator="|")  # its name is enough
    with pytest.raises(SourceError, match=r"text_column must be None for .*story.log, which is plain text, got 'x'"):
        texts_of(tmp_path / "story.log", format="text", text_column="x")


def test_packed_rows_are_refused(tmp_path):
    rows = tmp_path / "rows"
    write_files(rows, {"metadata.json": {"seq_len": 8, "packing": "stream", "rows": 1}, "data.arrow": "x"})
    with pytest.raises(SourceError, match="rows must hold documents, got rows that are packed already: give them to"):
        open_source(rows)
    with pytest.raises(SourceError, match="found 1 packed rows: rows/"):
        open_source(tmp_path)


def test_errors_of_the_disk_name_the_file(tmp_path, monkeypatch):
    write_files(tmp_path, {"a.txt": "text", "b.txt": "text"})

    def fail(file, *arguments):
        raise OSError(5, "Input/output error")
        yield

    monkeypatch.setattr("andromeda.data.readers.text_blocks", fail)
    with pytest.raises(OSError, match=r"Input/output error: '.*a.txt'"):
        texts_of(tmp_path)


def test_any_error_of_a_reader_names_the_file(tmp_path, monkeypatch):
    write_files(tmp_path, {"a.txt": "text"})

    def fail(*arguments):
        raise KeyError("unheard of")

    monkeypatch.setattr("andromeda.data.readers.text_blocks", fail)
    with pytest.raises(SourceError, match=r"a.txt cannot be read: KeyError: 'unheard of'"):
        texts_of(tmp_path)


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


def upper(batch):
    return {"text": [text.upper() for text in batch["text"]]}


def test_transforms_are_honoured():
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "n": [1, 2, 3]})
    source = open_source(dataset.with_transform(upper))
    assert texts_of_opened(source)[0] == ["A", "B", "C"]
    assert source.fingerprint() is None  # the results of a function are unknown
    assert texts_of(dataset.with_transform(upper).select([2, 0]))[0] == ["C", "A"]
    assert texts_of(dataset.select([2, 0]).with_transform(upper))[0] == ["C", "A"]
    assert texts_of(dataset.with_transform(lambda batch: {"body": batch["text"], "k": batch["n"]}))[0] == [
        "a",
        "b",
        "c",
    ]
    with pytest.raises(SourceError, match="Dataset, row 0 cannot be read: ZeroDivisionError"):
        texts_of(dataset.with_transform(lambda batch: {"text": 1 / 0}))


@pytest.mark.parametrize("format", ["numpy", "torch", "arrow", "pandas"])
def test_formats_do_not_change_texts(format):
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "other": ["x", "y"]})
    assert texts_of(dataset.with_format(format))[0] == ["a", "b"]
    assert texts_of(dataset.to_iterable_dataset().with_format(format))[0] == ["a", "b"]
    assert texts_of(dataset.with_format(format, columns=["other"]))[0] == ["x", "y"]  # the others are hidden


def test_columns_of_iterable_datasets():
    def records():
        yield {"id": "r1", "content": None}
        yield {"id": "r2", "content": "hello"}

    with pytest.raises(SourceError, match=r"several columns .* content \(null or string\)"):
        texts_of(datasets.IterableDataset.from_generator(records))

    def failing():
        yield {"text": "a"}
        raise KeyError("of the user")

    with pytest.raises(SourceError, match="IterableDataset, row 1 cannot be read: KeyError: 'of the user'"):
        texts_of(datasets.IterableDataset.from_generator(failing))


def test_classes_and_pictures_are_no_text():
    features = datasets.Features(
        {"body": datasets.Value("string"), "label": datasets.ClassLabel(names=["x"]), "picture": datasets.Image()}
    )
    dataset = datasets.Dataset.from_dict({"body": ["a"], "label": [0], "picture": [None]}, features=features)
    assert texts_of(dataset)[0] == ["a"]
    assert texts_of(dataset.to_iterable_dataset())[0] == ["a"]


@pytest.mark.parametrize("iterable", [False, True], ids=["Dataset", "IterableDataset"])
def test_datasets_of_strings_that_are_not_utf8(iterable):
    array = pyarrow.array([b"caf\xe9", b"good", b"a\0"]).view(pyarrow.string())
    dataset = datasets.Dataset(pyarrow.table({"text": array}))
    dataset = dataset.to_iterable_dataset() if iterable else dataset
    assert texts_of(dataset, errors="replace")[0] == ["caf\ufffd", "good", "a\ufffd"]
    texts, counts = texts_of(dataset, errors="skip")
    assert texts == ["good"] and counts["skipped_documents"] == 2
    with pytest.raises(ValueError, match="Dataset, row 0"):
        texts_of(dataset)


@contextlib.contextmanager
def pipe(path, data):
    """A named pipe that `data` is written into once."""
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(data), daemon=True)
    writer.start()
    yield path
    writer.join(5)


@pytest.mark.parametrize(
    ("name", "data", "options", "expected", "format"),
    [
        ("p.txt", b"hello", {}, ["hello"], "text"),
        ("p", b"hello", {}, ["hello"], "text"),
        ("p", LINES.encode() * 3, {}, ["a line"] * 3, "jsonl"),
        ("p", gzip.compress(LINES.encode()), {}, ["a line"], "jsonl"),
        ("p.json", b'["a", "b"]', {}, ["a", "b"], "json"),
        ("p", b"text\na\n", {"format": "csv"}, ["a"], "csv"),
        ("p", b"a|b", {"separator": "|"}, ["a", "b"], "text"),
    ],
    ids=["text", "no-suffix", "lines", "gzip", "json", "csv", "separator"],
)
def test_pipes(tmp_path, name, data, options, expected, format):
    with pipe(tmp_path / name, data) as path:
        source = open_source(path, **options)
        assert source.fingerprint() is None and source.size() is None
        assert texts_of_opened(source)[0] == expected
        assert source.facts()["formats"] == {format: 1}
    with pytest.raises(SourceError, match=f"{name} can be read only once: write it to a file"):
        texts_of_opened(source)


def test_tables_through_pipes(tmp_path):
    write_parquet(tmp_path / "table")
    with pipe(tmp_path / "p", (tmp_path / "table").read_bytes()) as path:
        assert texts_of(path)[0] == KEPT


def test_pipes_are_kept_to_be_read_twice(tmp_path):
    with pipe(tmp_path / "p.jsonl", LINES.encode()) as path:
        source = open_source(path)
        source.keep()
        assert texts_of_opened(source) == texts_of_opened(source)
        assert texts_of_opened(source)[0] == ["a line"]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(LINES.encode())))
    assert texts_of("-")[0] == ["a line"]
    with pytest.raises(ValueError, match="include must not be given for standard input"):
        open_source("-", include="*.txt")


def test_file_descriptors(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b"through a pipe")
    os.close(writing)
    assert texts_of(f"/dev/fd/{reading}")[0] == ["through a pipe"]
    os.close(reading)
    (tmp_path / "a.jsonl").write_text(LINES)
    with open(tmp_path / "a.jsonl", "rb") as file:  # like /dev/stdin after `< a.jsonl`
        source = open_source(f"/dev/fd/{file.fileno()}")
        assert source.name == "a.jsonl" and source.fingerprint() is not None
        assert texts_of_opened(source)[0] == ["a line"]


def test_faults_in_pipes_are_located(tmp_path):
    for name, data, options, message in (
        ("a", b"PK\3\4", {}, "a must be UTF-8 text, got a zip archive"),
        ("b.jsonl", b"{", {}, "b.jsonl, line 1 must be JSON"),
        ("c.jsonl", LINES.encode(), {"separator": "|"}, "separator must be None for .*c.jsonl, which is read as jsonl"),
        ("d.txt", b"x", {"text_column": "x"}, "text_column must be None for .*d.txt, which is read as text"),
    ):
        with pipe(tmp_path / name, data) as path, pytest.raises(SourceError, match=message):
            texts_of(path, **options)


def test_the_builder_passes_the_options_on(tmp_path):
    tokenizer = AndromedaTokenizer.train(["one two three four"] * 3, 300)
    write_files(tmp_path / "src", {"a.log": "one|two|three", "b.log": "four", "c.md": "five", "d.bin": "x"})
    options = {"include": "*.log", "exclude": ["b.*"], "separator": "|", "format": "text"}
    builder = DatasetBuilder(
        tmp_path / "src", 4, tokenizer=tokenizer, packing="bfd", cache_dir=tmp_path / "cache", progress=False, **options
    )
    rows = builder.build_dataset()
    assert (rows.statistics["documents"], rows.statistics["files"], rows.statistics["ignored_files"]) == (3, 1, 3)
    assert rows.metadata["formats"] == {"text": 1} and rows.metadata["text_column"] is None
    assert rows.metadata["skipped"] == ["3 excluded: b.log, c.md, d.bin"]
    assert builder.build_dataset().path == rows.path
    (tmp_path / "src" / "a.log").write_text("six|two|three")  # of the same size
    os.utime(tmp_path / "src" / "a.log", ns=(1, 1))
    assert builder.build_dataset().path != rows.path
    with pytest.raises(ValueError, match="dataset_name must not be empty"):
        DatasetBuilder("", 4, tokenizer=tokenizer)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_without_columns(tmp_path, suffix):
    table, path = pyarrow.table({}), tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(SourceError, match=rf"a.{suffix} must have columns, got none"):
        texts_of(path)


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
    if kind == "csv" and wanted is None:  # all fields are strings, so a column of numbers may be text, too
        columns = {name: values for name, values in columns.items() if name != "n"}
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


@pytest.mark.parametrize(
    "name", ["./missing", "/missing/x", "~/missing-x", "a/b/c", "missing.txt", "missing.jsonl.gz", Path("missing")]
)
def test_missing_path(name):
    with pytest.raises(FileNotFoundError, match="dataset_name must be an existing path"):
        open_source(name, None)


@pytest.mark.parametrize("name", ["", " ", "\t\n", Path(""), Path("."), PurePosixPath("")], ids=repr)
def test_empty_names(name, tmp_path, monkeypatch):
    """An unset variable must not mean the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private.txt").write_text("private")
    with pytest.raises(ValueError, match="dataset_name must not be"):
        open_source(name)
    assert texts_of(".")[0] == ["private"]
    assert open_source(".").name == tmp_path.name


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"format": "xml"}, ValueError, "format must be one of text, json, .*, got 'xml'"),
        ({"separator": ""}, TypeError, "separator must be a non-empty string or None, got ''"),
        ({"include": ""}, TypeError, "include must be patterns such as .*, got ''"),
        ({"exclude": [3]}, TypeError, "exclude must be patterns such as .*, got 3"),
    ],
    ids=["format", "separator", "include", "exclude"],
)
def test_wrong_options(tmp_path, options, error, message):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(error, match=message):
        open_source(tmp_path, **options)


def test_options_that_a_source_does_not_have(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match=r"exclude must not be given for a single file, got \('b',\)"):
        open_source(tmp_path / "a.txt", exclude="b")
    dataset = datasets.Dataset.from_dict({"text": ["a"]})
    for option in ("include", "exclude", "separator", "format"):
        with pytest.raises(ValueError, match=f"{option} must not be given for a data set"):
            open_source(dataset, **{option: "text"})


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
