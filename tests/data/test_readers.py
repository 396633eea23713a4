"""File formats: records, positions, errors; and files are not read far ahead of the requested documents."""

import csv
import io
import itertools
import json
from collections import Counter

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from andromeda.data import readers
from andromeda.data.columns import Choice, choose
from andromeda.data.decoding import HEAD_BYTES, Input, SourceError
from andromeda.data.readers import Document, content_format, open_reader, split_text, suffix_format


class Counted(io.BytesIO):
    """A file of bytes that counts how many of them were read."""

    taken = 0

    def read(self, size=-1):
        data = super().read(size)
        self.taken += len(data)
        return data

    def readline(self, size=-1):
        line = super().readline(size)
        self.taken += len(line)
        return line

    def __iter__(self):
        return iter(self.readline, b"")


def reader_of(data, format, errors="replace", separator=None, file=None):
    data = data.encode() if isinstance(data, str) else data
    source = Input(file or io.BytesIO(data), data[:HEAD_BYTES])
    return open_reader(source, f"a.{format}", format, errors, Counter(), separator)


def documents_of(data, format, wanted=None, **options):
    reader = reader_of(data, format, **options)
    columns = reader.columns(wanted)
    return list(reader.documents(choose([(reader.name, columns)], wanted) if columns else None))


def texts_of(data, format, wanted=None, **options):
    return [document.text for document in documents_of(data, format, wanted, **options)]


def lines_of(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


# Formats


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.txt", "text"),
        ("a.PY", "text"),
        ("a.jsonl.zst", "jsonl"),
        ("a.NDJSON.gz", "jsonl"),
        ("a.csv.bz2", "csv"),
        ("a.parquet", "parquet"),
        ("a.zst", None),
        ("a.tar.gz", None),
        (".txt", None),
        ("folder.txt/a", None),
    ],
)
def test_format_by_name(name, format):
    assert suffix_format(name) == format


@pytest.mark.parametrize(
    ("head", "format"),
    [
        (b'{"text": "a"}\n{"text"', "jsonl"),
        (b'\xef\xbb\xbf\n {"text": "a"}', "jsonl"),
        (b"{not json}\n", "text"),
        (b'{"text":\n"a"}', "text"),
        (b"[" * 100_000, "text"),
        (b'{"a":' + b"[" * 60_000, "text"),
        (b"", "text"),
        (b"PAR1\x15", "parquet"),
        (b"ARROW1\0\0", "arrow"),
        (b"plain", "text"),
    ],
    ids=range(10),
)
def test_format_by_content(head, format):
    assert content_format(head) == format


# Text in parts


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_text_comes_in_parts(monkeypatch, size):
    monkeypatch.setattr(readers, "BLOCK_BYTES", size)
    text = "a ü € 🥊 " * 9 + "end"
    parts = documents_of("\N{BYTE ORDER MARK}" + text, "text")
    assert "".join(part.text for part in parts) == text
    assert all(part.text for part in parts)
    assert [part.continues for part in parts] == [True] * (len(parts) - 1) + [False]
    assert len(parts) > 1 or size == 1000
    for index, part in enumerate(parts):
        assert part.offset == 3 + len("".join(part.text for part in parts[:index]).encode())
    assert documents_of("", "text") == [Document("", "a.text")]


@pytest.mark.parametrize("size", [1, 2, 5, 8, 1000])
def test_separator(monkeypatch, size):
    monkeypatch.setattr(readers, "BLOCK_BYTES", size)
    texts = ["one ü", "", "a longer story, with <|end in it", "last"]
    data = "<|end|>".join(texts)
    found, starts = [""], {}
    for document in documents_of(data, "text", separator="<|end|>"):
        starts.setdefault(document.where, document.offset)
        found[-1] += document.text
        if not document.continues:
            found.append("")
    assert found == [*texts, ""]
    assert list(starts) == [f"a.text, document {index}" for index in range(4)]
    assert list(starts.values()) == [len("<|end|>".join([*texts[:index], ""]).encode()) for index in range(4)]
    ended = [part.text for part in documents_of(data + "<|end|>", "text", separator="<|end|>") if not part.continues]
    assert len(ended) == 4  # nothing follows the last separator


def test_no_part_is_empty(monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 3)
    for text in ("aaab", "aab", "abab", "aabb", "b", "ab"):
        for part in documents_of(text * 3, "text", separator="ab"):
            assert part.text or not part.continues
        parts = list(split_text(((letter, i) for i, letter in enumerate(text)), "a", "ab"))
        for before, part in itertools.pairwise(parts):
            assert part.text or not before.continues


@pytest.mark.parametrize(
    ("format", "make"),
    [
        ("text", lambda record: record["text"] + "|"),
        ("jsonl", lambda record: json.dumps(record) + "\n"),
        ("csv", lambda record: f"{record['text']}\n"),
    ],
    ids=["text", "jsonl", "csv"],
)
def test_reading_is_not_ahead(monkeypatch, format, make):
    """Memory does not depend on the size of a file."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    monkeypatch.setattr(readers, "SAMPLE_BYTES", 100)
    data = ("text\n" + "".join(make({"text": f"document {i}"}) for i in range(2000))).encode()
    data = data if format == "csv" else data[5:]
    file = Counted(data)
    documents = reader_of(data, format, separator="|" if format == "text" else None, file=file).documents(
        Choice("text")
    )
    for index in range(10):
        assert next(documents).text.strip() == f"document {index}"
    assert file.taken < 1000


def test_a_json_list_is_not_read_ahead(monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    monkeypatch.setattr(readers, "SAMPLE_BYTES", 100)
    data = json.dumps([{"text": f"document {i}"} for i in range(2000)]).encode()
    file = Counted(data)
    reader = reader_of(data, "json", file=file)
    assert list(reader.columns()) == ["text"]
    documents = reader.documents(Choice("text"))
    assert [next(documents).text for _ in range(10)] == [f"document {i}" for i in range(10)]
    assert file.taken < 1000


# JSON

RECORDS = [
    {"text": 'ü🥊 "quoted" \\ \n x', "n": [1, 2.5e3, None, True, {"a": "]}"}]},
    {"text": "two", "n": -1.5e-7},
    {"n": {"x": [[]]}, "text": "tru"},
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 1 << 20])
@pytest.mark.parametrize(
    "write",
    [
        lambda records: json.dumps(records),
        lambda records: json.dumps(records, indent=2, ensure_ascii=False),
        lambda records: "\r\n" + "\n\n".join(json.dumps(record, indent=1) for record in records),
        lambda records: json.dumps(records[:1]) + json.dumps(records[1]) + json.dumps(records[2:]) + " [ ]\n",
    ],
    ids=["list", "indented", "objects", "mixed"],
)
def test_json_in_blocks_of_any_size(monkeypatch, write, size):
    monkeypatch.setattr(readers, "BLOCK_BYTES", size)
    assert texts_of(write(RECORDS), "json") == [record["text"] for record in RECORDS]


@pytest.mark.parametrize("size", [1, 4, 1 << 20])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('[{"text": "a"}', r"a.json must be JSON: Expecting ',' or '\]' at byte 14"),
        ('[{"text": "ü"} {"text": "b"}]', r"must be JSON: Expecting ',' or '\]' at byte 16"),
        ('[{"text": "ü"}, {"text": x}]', "record 1 must be JSON: Expecting value at byte 26"),
        ('[{"text": "a"},]', "record 1 must be JSON: Expecting value at byte 15"),
        ('[{"text": "a"}] x', "record 1 must be JSON: Expecting value at byte 16"),
        ('{"text": "never ends', "record 0 must be JSON: Unterminated string starting at at byte 9"),
        ('{"text": "a\\', "record 0 must be JSON: Unterminated string"),
        ('[["a"]]', "record 0 must be an object or a string, got list"),
        ("[1234567]", "record 0 must be an object or a string, got int"),
        ("nul", "record 0 must be JSON"),
        ('{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "record 0 must be JSON with fewer lists"),
    ],
    ids=range(11),
)
def test_json_faults(monkeypatch, size, data, message):
    if len(data) > 1000 and size < 1000:
        size = 10_000
    monkeypatch.setattr(readers, "BLOCK_BYTES", size)
    with pytest.raises(SourceError, match=message):
        texts_of(data, "json")


@pytest.mark.parametrize("format", ["json", "jsonl"])
def test_integers_of_thousands_of_digits(monkeypatch, format):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    huge = '{"text": "b", "n": ' + "9" * 5000 + "}"
    assert texts_of(f'{{"text": "a"}}\n{huge}\n{{"text": "c"}}\n', format) == ["a", "b", "c"]
    with pytest.raises(SourceError, match=f"a.{format}, (line 1|record 0) must be JSON"):
        texts_of(huge[:-1], format)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ('{"text": "a"}\n{"text": "ü" x}\n', "line 2 must be JSON: .* at byte 28"),
        ('{"text": "a"}\n\n[1]\n', "line 3 must be an object or a string, got list"),
        ('{"text": "a"}\n{"body": "b"}\n', "line 2 must have the column 'text', got body"),
        ('{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n", "line 1 must be JSON with fewer lists"),
        ('[\n{"text": "a"}\n]\n', "line 1 must be JSON: .* must be named .json"),
        ('{\n"text": "a"\n}\n', "line 1 must be JSON: .* must be named .json"),
        ('{"text": "a"}{"text": "b"}\n', "line 1 must be JSON: Extra data at byte 13"),
    ],
    ids=range(7),
)
def test_json_lines_faults(data, message):
    with pytest.raises(SourceError, match=f"a.jsonl, {message}"):
        texts_of(data, "jsonl")


def test_blank_lines_and_line_ends():
    assert texts_of('\n{"text": "a"}\r\n \t\r\n"b"\n\n', "jsonl") == ["a", "b"]


def test_a_guessed_column_is_watched_to_the_end():
    many = [{"id": f"r{i}", "n": i} for i in range(150)]
    assert texts_of(lines_of(*many), "jsonl") == [record["id"] for record in many]
    for late in ({"id": "x", "n": "text"}, {"id": "x", "new": "text"}, {"id": "x", "new": ["text"]}):
        with pytest.raises(SourceError, match=r"line 151: 'id' was the only column .* now '(n|new)' is one, too"):
            texts_of(lines_of(*many, late), "jsonl")
        assert texts_of(lines_of(*many, late), "jsonl", "id")[-1] == "x"
    assert texts_of(lines_of(*many, {"id": "x", "new": None, "n": None}), "jsonl")[-1] == "x"


def test_single_objects():
    for data, single in (
        ('{"a": 1}', True),
        ('[{"a": 1}]', False),
        ('{"a": 1}{"a": 2}', False),
        ('"a"', False),
        ("", False),
    ):
        reader = reader_of(data, "json")
        assert reader.is_single_object() == single
        assert not reader_of(data, "jsonl").is_single_object()


# CSV


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("text\n\na\n   \nb\n\n", ["a", "b"]),
        ("\n\ntext,id\n\na,1\n  \n\nb,2\n\n", ["a", "b"]),
        ('text,id\n"two\n\nlines",1\n', ["two\n\nlines"]),
        ('text\n""\na\n', ["", "a"]),
        ("text,id\n,1\n", [""]),
        ("text,,\na,,\n", ["a"]),
        ("\N{BYTE ORDER MARK}text,id\na,1", ["a"]),
        ("text\n", []),
        ("", []),
    ],
    ids=range(9),
)
def test_csv(data, expected, end):
    expected = [text.replace("\n", end) for text in expected]
    assert texts_of(data.replace("\n", end), "csv") == expected
    assert texts_of(data.replace("\n", end).replace(",", "\t"), "tsv") == expected


@pytest.mark.parametrize(
    ("data", "format", "message"),
    [
        (
            "text;id\na;1\n",
            "csv",
            "line 1 must name columns with a comma between them, got 'text;id', with a semicolon",
        ),
        ("\ntext\tid\na\t1\n", "csv", r"line 2 must name .* with a tab: name the file .tsv or choose format='tsv'"),
        ("text|id\na|1\n", "csv", "with a vertical bar"),
        ("text,id\na,1\n", "tsv", "with a tab between them, got 'text,id', with a comma: name it .csv"),
        ("text;id\na;1\n", "tsv", "with a semicolon"),
        ("text,text\na,b\n", "csv", "line 1 must name each column once, got 'text' twice"),
        ("text,id\na\n", "csv", "line 2, column 'text': must have 2 fields as the header, got 1"),
        ('text,id\n"a\nb",1\nb,2,c\n', "csv", "line 4, column 'text': must have 2 fields as the header, got 3"),
        ('text,id\na,1\n"open,2\nmore,3\n', "csv", "lines 3 to 4 must be csv: .*; a quote is not closed"),
        ('text,id\n"a"b,1\n', "csv", "line 2 must be csv: ',' expected after '\"'"),
        ("text,id\ra,1\r", "csv", "line 1 must be csv: new-line character"),
        ("a,b\n1,x\n", "csv", r"several columns that may be text .* a \(string\), b \(string\)"),
    ],
    ids=range(12),
)
def test_csv_faults(data, format, message):
    with pytest.raises(SourceError, match=message):
        texts_of(data, format)


def test_csv_separator_in_a_name_that_is_meant():
    assert texts_of("text;id\na;1\n", "csv", "text;id") == ["a;1"]


def test_a_quote_that_is_never_closed_does_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(readers, "MAX_FIELD_CHARS", 1000)
    before = csv.field_size_limit()
    data = ('text\nfine\n"' + "open\n" * 5000).encode()
    file = Counted(data)
    documents = reader_of(data, "csv", file=file).documents(Choice("text"))
    assert next(documents).text == "fine"
    with pytest.raises(SourceError, match=r"lines 3 to .* must be csv: field larger .*; a quote is not closed"):
        next(documents)
    assert file.taken < 2000
    assert csv.field_size_limit() == before


# Arrow and Parquet

TEXTS = ["first", None, "zweites: ü🥊", ""]


def stream(table, new=pyarrow.ipc.new_stream):
    sink = pyarrow.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue().to_pybytes()


def parquet(table):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, row_group_size=3)
    return sink.getvalue().to_pybytes()


WRITERS = {
    "arrow": stream,
    "arrow file": lambda table: stream(table, pyarrow.ipc.new_file),
    "parquet": parquet,
}
COLUMNS = {
    "string": lambda array: array,
    "large_string": lambda array: array.cast(pyarrow.large_string()),
    "string_view": lambda array: array.cast(pyarrow.string_view()),
    "categories": lambda array: array.dictionary_encode(),
    "binary": lambda array: array.view(pyarrow.binary()),
}


@pytest.mark.parametrize("kind", COLUMNS)
@pytest.mark.parametrize("writer", WRITERS)
def test_tables(monkeypatch, writer, kind):
    monkeypatch.setattr(readers, "BATCH_BYTES", 20)  # a few rows at a time
    table = pyarrow.table({"n": range(4), "body": COLUMNS[kind](pyarrow.array(TEXTS))})
    documents = documents_of(WRITERS[writer](table), writer.split()[0])
    assert [document.text for document in documents] == TEXTS
    assert documents[3].where == f"a.{writer.split()[0]}, row 3, column 'body'"


def bad_strings():
    offsets = pyarrow.py_buffer(numpy.array([0, 5, 11, 13], dtype="int32"))
    return pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, offsets, pyarrow.py_buffer(b"caf\xe9!hello\xffok")])


@pytest.mark.parametrize("kind", ["string", "categories", "binary"])
@pytest.mark.parametrize("writer", WRITERS)
def test_strings_that_are_not_utf8(writer, kind):
    array = bad_strings()
    if kind == "categories":
        array = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0, 1, 2]), array)
    elif kind == "binary":
        array = array.view(pyarrow.binary())
    data, format = WRITERS[writer](pyarrow.table({"text": array})), writer.split()[0]
    if (writer, kind) == ("parquet", "categories"):  # pyarrow reads these only as a whole
        with pytest.raises(SourceError, match=r"a.parquet must be .*: Invalid UTF8 payload"):
            texts_of(data, format)
        return
    assert texts_of(data, format) == ["caf\udce9!", "hello\udcff", "ok"]
    with pytest.raises(SourceError, match=f"a.{format}, row 0, column 'text' must be UTF-8, got byte 0xe9 at byte 3"):
        texts_of(data, format, errors="strict")


@pytest.mark.parametrize("writer", WRITERS)
def test_tables_of_another_encoding(writer):
    array = pyarrow.array(["привет".encode("cp1251")] * 5).view(pyarrow.string())
    with pytest.raises(SourceError, match=r"30 of 30 bytes \(100%\) are NUL or not UTF-8"):
        texts_of(WRITERS[writer](pyarrow.table({"text": array})), writer.split()[0])


@pytest.mark.parametrize("writer", WRITERS)
def test_a_name_twice(writer):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    with pytest.raises(SourceError, match=f"a.{writer.split()[0]} must name each column once, got 'text' twice"):
        texts_of(WRITERS[writer](table), writer.split()[0])


@pytest.mark.parametrize("kind", ["string", "string_view", "categories"])
@pytest.mark.parametrize("writer", WRITERS)
def test_damage_is_an_error_or_seen_in_the_text(writer, kind):
    """Damage never ends the process, and every error names the file."""
    texts = [f"document {i}" for i in range(20)]
    data = WRITERS[writer](pyarrow.table({"text": COLUMNS[kind](pyarrow.array(texts))}))
    random = numpy.random.default_rng(0)
    failed = 0
    for _ in range(40):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 3):
            damaged[place] ^= int(random.integers(1, 256))
        try:
            texts_of(bytes(damaged[: random.integers(len(data) // 2, len(data) * 2)]), writer.split()[0])
        except SourceError as error:
            failed += 1
            assert f"a.{writer.split()[0]}" in str(error)
    assert failed > 10


@pytest.mark.parametrize(
    ("format", "data", "message"),
    [
        ("parquet", b"text", "must be a Parquet file, got a file that begins with b'text'"),
        ("parquet", b"", "must be a Parquet file, got an empty file"),
        ("parquet", b"PK\3\4", "must be a Parquet file, got a zip archive"),
        ("parquet", b"PAR1\x15garbagePAR1", "a.parquet must be a Parquet file"),
        ("arrow", b"PAR1\x15", "must be an Arrow file, got a Parquet file"),
        ("arrow", b"text", "must be an Arrow file"),
        ("text", b"PAR1\x15", "must be UTF-8 text, got a Parquet file; format='parquet' reads it"),
        ("jsonl", b"PK\3\4", "a.jsonl must be UTF-8 text, got a zip archive"),
        ("csv", bytes(100), "a.csv must be UTF-8 text: 100 of 100 bytes"),
    ],
)
def test_files_of_another_kind(format, data, message):
    with pytest.raises(SourceError, match=message):
        texts_of(data, format)
