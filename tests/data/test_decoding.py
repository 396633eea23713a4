"""Recognising files by their first bytes, unpacking, and UTF-8 with and without errors."""

import bz2
import gzip
import io
import lzma
import pickle
import sqlite3
import tarfile
import zipfile

import numpy
import pyarrow
import pyarrow.parquet
import pytest

from andromeda.data import decoding
from andromeda.data.decoding import (
    Decoder,
    SourceError,
    check_text,
    end_of_last_character,
    open_input,
    recognise,
    seekable,
)


def zstandard(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = [
    pytest.param(".gz", gzip.compress, id="gzip"),
    pytest.param(".bz2", bz2.compress, id="bzip2"),
    pytest.param(".xz", lzma.compress, id="xz"),
    pytest.param(".lzma", lambda data: lzma.compress(data, lzma.FORMAT_ALONE), id="lzma"),
    pytest.param(".zst", zstandard, id="zstd"),
]


def content(path, stream=None):
    with open_input(path, path.name, stream) as source:
        return source.file.read()


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
def test_unpacking(tmp_path, suffix, pack, monkeypatch):
    """Files are unpacked by their content, whatever the name: several streams in a row, read in pieces of any size."""
    monkeypatch.setattr(decoding, "HEAD_BYTES", 64)
    data = bytes(range(256)) * 40
    for name in ("a" + suffix, "a.txt"):
        (tmp_path / name).write_bytes(pack(data))
        assert content(tmp_path / name) == data
    if suffix != ".lzma":  # this format has no end mark
        (tmp_path / "two").write_bytes(pack(data) + pack(b"more"))
        assert content(tmp_path / "two") == data + b"more"
    with open_input(tmp_path / "a.txt", "a") as source:
        assert source.head == data[:64]
        assert source.file.read(100) == data[:100]


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
def test_damage_is_located(tmp_path, suffix, pack):
    """A file that is cut or changed at any place, in its first stream or a later one, is an error."""
    data = numpy.random.default_rng(0).integers(0, 256, 3000, dtype=numpy.uint8).tobytes().hex().encode()
    whole = pack(data)
    path = tmp_path / f"a.txt{suffix}"
    damaged = [whole[:end] for end in (1, 5, len(whole) // 2, len(whole) - 1)]
    if suffix != ".lzma":  # this format has no checksum and may end anywhere
        damaged += [pack(b"good") + whole[:-3], whole + b"not packed"]
    if suffix not in (".lzma", ".zst"):
        damaged += [whole[:100] + bytes([whole[100] ^ 0x55]) + whole[101:]]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(SourceError, match=r"a\.txt.*must be an? .*(gzip|bzip2|xz|Zstandard) file"):
            content(path)


def test_zeros_after_streams_are_padding(tmp_path):
    (tmp_path / "a.xz").write_bytes(lzma.compress(b"one") + bytes(8) + lzma.compress(b"two") + bytes(4))
    assert content(tmp_path / "a.xz") == b"onetwo"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"plain", "must be a gzip file, as its name says, got a file that is not compressed"),
        (b"", "must be a gzip file, as its name says, got an empty file"),
        (b"%PDF-1.7", "must be a gzip file, as its name says, got a PDF document"),
        (gzip.compress(lzma.compress(b"")), "must be compressed once, got an xz file in a gzip file"),
    ],
    ids=["text", "empty", "pdf", "twice"],
)
def test_what_a_suffix_promises(tmp_path, data, message):
    (tmp_path / "a.txt.gz").write_bytes(data)
    with pytest.raises(SourceError, match=message):
        content(tmp_path / "a.txt.gz")


def test_streams_that_cannot_be_wound_back(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "HEAD_BYTES", 16)

    class Pipe(io.BytesIO):
        def seekable(self):
            return False

        def read(self, size=-1):
            return super().read(min(size, 3) if size > 0 else size)  # at most three bytes, as a slow pipe gives them

    data = b"0123456789" * 10
    assert content(tmp_path / "a", Pipe(data)) == data
    assert content(tmp_path / "a", Pipe(gzip.compress(data))) == data
    with seekable(Pipe(data)) as copy:
        copy.seek(95)
        assert copy.read() == b"56789"
    file = io.BytesIO()
    assert seekable(file) is file


def zip_file():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", "hello")
    return buffer.getvalue()


def tar_file():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return buffer.getvalue()


def parquet_file():
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), sink)
    return sink.getvalue().to_pybytes()


def arrow_file(new):
    sink = pyarrow.BufferOutputStream()
    table = pyarrow.table({"text": ["a"]})
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def sqlite_file():
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (text)")
    return connection.serialize() if hasattr(connection, "serialize") else b"SQLite format 3\0"


def numpy_file():
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.zeros(3))
    return buffer.getvalue()


def safetensors_file():
    import safetensors.numpy

    return safetensors.numpy.save({"weight": numpy.zeros(3)})


BINARY = {
    "zip": (zip_file, "a zip archive"),
    "empty zip": (lambda: b"PK\5\6" + bytes(18), "a zip archive"),
    "tar": (tar_file, "a tar archive"),
    "7z": (lambda: b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
    "rar": (lambda: b"Rar!\x1a\7\1\0", "a rar archive"),
    "lz4": (lambda: b"\4\x22\x4d\x18\x64", "compressed in a way not known here"),
    "pdf": (lambda: b"%PDF-1.4\n", "a PDF document"),
    "png": (lambda: b"\x89PNG\r\n\x1a\n", "an image"),
    "jpeg": (lambda: b"\xff\xd8\xff\xe0\0\x10JFIF", "an image"),
    "gif": (lambda: b"GIF89a\1\0\1\0\x80", "an image"),
    "elf": (lambda: b"\x7fELF\2\1\1", "a program"),
    "mp4": (lambda: b"\0\0\0\x18ftypmp42", "audio or video"),
    "pickle": (lambda: pickle.dumps({"a": 1}), "a Python pickle"),
    "old pickle": (lambda: pickle.dumps(["a"], protocol=0), "a Python pickle"),
    "sqlite": (sqlite_file, "an SQLite database"),
    "hdf5": (lambda: b"\x89HDF\r\n\x1a\n\0", "an HDF5"),
    "numpy": (numpy_file, "a NumPy array"),
    "safetensors": (safetensors_file, "a safetensors file"),
    "parquet": (parquet_file, "a Parquet file"),
    "arrow file": (lambda: arrow_file(pyarrow.ipc.new_file), "an Arrow file"),
    "arrow stream": (lambda: arrow_file(pyarrow.ipc.new_stream), "an Arrow file"),
    "utf-16": (lambda: "text".encode("utf-16"), "text in UTF-16"),
    "utf-32": (lambda: "text".encode("utf-32"), "text in UTF-32"),
    "zstd": (lambda: zstandard(b"text"), "a Zstandard file"),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_files_are_named(name):
    make, kind = BINARY[name]
    assert kind in recognise(make())
    with pytest.raises(SourceError, match=f"a.txt must be UTF-8 text, got .*{kind}") as caught:
        check_text(make(), "a.txt")
    assert "errors=" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "PARENTS", "PAR1 is a code", "BMW", "MZ", "BZh9 and more", "GIF89a is a format", "ARROW1", "ggml runs models",
     "RIFFRAFF", "(lpr)", "%PDF", "Rar! he said", "ORCHID", "PK", "II. part", "\N{BYTE ORDER MARK}a", "[\n]"],
)  # fmt: skip
def test_text_is_not_taken_for_something_else(text):
    assert recognise(text.encode()) is None
    check_text(text.encode(), "a.txt")


@pytest.mark.parametrize("errors", ["strict", "replace", "skip"])
@pytest.mark.parametrize(
    "data",
    [bytes(range(256)), "привет мир".encode("cp1251"), ("hello " * 3).encode("utf-16-le"), b"\xff" * 8],
    ids=["binary", "cp1251", "utf-16 without mark", "least"],
)
def test_too_many_bad_bytes_are_an_error_in_any_case(data, errors):
    decode = Decoder("a.txt", errors)
    with pytest.raises(SourceError, match=r"a.txt must be UTF-8.*looks like a binary file") as caught:
        for begin in range(0, len(data), 50):
            decode(data[begin : begin + 50])
        decode.finish()
    assert "errors=" not in str(caught.value)
    with pytest.raises(SourceError, match="looks like a binary file"):
        check_text(data, "a.txt")


def test_few_bad_bytes_become_surrogates():
    decode = Decoder("a.txt", "replace")
    assert decode(b"caf\xe9") == "caf\udce9"
    assert decode(b"\xff" * 7) == "\udcff" * 7  # 8 of 11 bytes: too many, but more text may follow
    with pytest.raises(SourceError):
        decode.finish()
    decode.count_good(200)
    decode.finish()


def test_the_share_is_looked_at_while_a_long_file_is_read(monkeypatch):
    monkeypatch.setattr(decoding, "HEAD_BYTES", 100)
    decode = Decoder("a.txt", "replace")
    for _ in range(10):
        decode(b"good text ")
    with pytest.raises(SourceError, match=r"a.txt must be UTF-8 text: 8 of 108 bytes \(7%\)"):
        decode(b"\xff" * 8)


def test_strict_decoding_names_the_place():
    with pytest.raises(
        SourceError, match=r"a.txt, line 3 must be UTF-8, got byte 0xe9 at byte 103: .*errors='replace'"
    ):
        Decoder("a.txt", "strict")(b"caf\xe9", 100, ", line 3")


@pytest.mark.parametrize("text", ["a", "aü", "ü", "€", "a🥊", "🥊"])
def test_text_is_cut_between_characters(text):
    data = text.encode()
    for end in range(len(data) + 1):
        whole = end_of_last_character(data[:end])
        data[:whole].decode()
        assert data[whole:end] == b"" or end < len(data)
        assert end - whole < 4


def test_a_head_that_ends_in_a_character_is_text(monkeypatch):
    monkeypatch.setattr(decoding, "HEAD_BYTES", 9)
    monkeypatch.setattr(decoding, "MIN_BAD_BYTES", 1)
    check_text("aaaaaaaü".encode()[:9], "a.txt")
    check_text("aaaaaa🥊".encode()[:9], "a.txt")
