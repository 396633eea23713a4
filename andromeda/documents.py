"""Where documents come from: files, directories, `datasets` objects and the hub; each as a stream of clean texts."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from andromeda.packing import MAX_BATCH_DOCUMENTS
from andromeda.tokenizer import hub_problem

# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".py", ".pyi", ".pyx", ".c", ".h", ".cc",
    ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".go", ".rs",
    ".swift", ".cs", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".sh", ".sql", ".m", ".f90", ".cmake",
    ".toml", ".yaml", ".yml",
})
# fmt: on
RECORD_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".arrow"})
BLOCK_BYTES = 1 << 20  # longer text files arrive in parts of this size
COMPRESSED_SUFFIXES = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


class Source:
    """Where documents come from."""

    name: str
    text_column: str | None = None
    errors: str = "strict"

    def fingerprint(self) -> str | None:
        """Changes with the documents; None if only reading them all would tell."""
        raise NotImplementedError

    def size(self) -> int | None:
        """About how many bytes of text there are; None if that is not known."""
        raise NotImplementedError

    def num_documents(self) -> int | None:
        raise NotImplementedError

    def documents(self, statistics: Counter) -> Iterator[Document]:
        raise NotImplementedError


def open_source(name, split: str | None = None, *, text_column: str | None = None, errors: str = "strict") -> Source:
    """The source that a path, a name on the hub or an object of `datasets` stands for."""
    source = _open_source(name, split)
    source.text_column, source.errors = text_column, errors
    return source


def _open_source(name, split: str | None) -> Source:
    datasets = sys.modules.get("datasets")  # who holds an object of it has loaded it
    if datasets is not None and isinstance(
        name, (datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)
    ):
        return _hf_source(name, split, type(name).__name__)
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(
            "DatasetBuilder: dataset_name must be a path, a name on the hub, a datasets.Dataset or an IterableDataset, "
            f"got {type(name).__name__}"
        )
    path = Path(name).expanduser()
    if any((path / marker).is_file() for marker in ("state.json", "dataset_dict.json")):  # made by save_to_disk
        import datasets

        return _hf_source(datasets.load_from_disk(str(path)), split, path.name)
    if path.exists():
        if split is not None:
            raise ValueError(f"DatasetBuilder: split must be None for files, got {split!r}; name the right files")
        return _Files(path)
    text = os.fspath(name)
    if not isinstance(name, str) or text.startswith((".", "/", "~")) or text.count("/") > 1 or _is_known(path):
        raise FileNotFoundError(f"DatasetBuilder: dataset_name must be an existing path, got {text!r}")
    return _hf_source(_load_from_hub(text, split or "train"), None, text)


def _hf_source(dataset, split: str | None, name: str) -> Source:
    import datasets

    if isinstance(dataset, dict):
        chosen = split or "train"
        if chosen not in dataset:
            raise ValueError(f"DatasetBuilder: split must be one of {', '.join(dataset)}, got {chosen!r}")
        dataset = dataset[chosen]
    elif split is not None and str(dataset.split) != split:
        raise ValueError(f"DatasetBuilder: split must be that of the data set, {dataset.split}, got {split!r}")
    return _Rows(dataset, name) if isinstance(dataset, datasets.Dataset) else _Stream(dataset, name)


def _load_from_hub(name: str, split: str):
    import datasets
    import huggingface_hub.constants

    # Without network, datasets retries for 23 seconds before it looks into its cache; in offline mode it looks at once.
    problem = hub_problem()
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = before or problem is not None
    try:
        return datasets.load_dataset(name, split=split)
    except OSError as error:
        reason = f"it is not in the cache {datasets.config.HF_DATASETS_CACHE}, and {problem}" if problem else str(error)
        raise OSError(
            f"DatasetBuilder: cannot load {name!r}: it is not a local path, and from the hub: {reason}\n"
            "  * Local data works without network: pass a file (txt, jsonl, parquet, csv), a directory or a Dataset.\n"
            '  * To fill the cache on a machine with network: python -c "import datasets; '
            f"datasets.load_dataset('{name}', split='{split}')\"; then copy the cache here, or set HF_HOME to a copy."
        ) from error
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


class _Rows(Source):
    """A `datasets.Dataset`."""

    def __init__(self, dataset, name: str):
        self._dataset = dataset
        self.name = name

    def fingerprint(self) -> str:
        return f"dataset {self._dataset._fingerprint}"

    def size(self) -> int | None:
        table = self._dataset.data  # all rows, the dataset may have chosen some of them
        return table.column(self._column()).nbytes * len(self._dataset) // len(table) if len(table) else None

    def num_documents(self) -> int:
        return len(self._dataset)

    def _column(self) -> str:
        columns = {name: _feature_kind(feature) for name, feature in self._dataset.features.items()}
        return _choose_column(columns, self.text_column, self.name)

    def documents(self, statistics) -> Iterator[Document]:
        column = self._column()
        table = self._dataset.select_columns([column]).with_format("arrow")
        row = 0
        for batch in table.iter(batch_size=MAX_BATCH_DOCUMENTS):
            for text in batch.column(0).to_pylist():
                yield Document(text, f"{self.name}, row {row}, column {column!r}")
                row += 1


class _Stream(Source):
    """A `datasets.IterableDataset`: known only by reading it."""

    def __init__(self, dataset, name: str):
        self._dataset = dataset
        self.name = name

    def fingerprint(self) -> None:
        return None

    def size(self) -> None:
        return None

    def num_documents(self) -> None:
        return None

    def documents(self, statistics) -> Iterator[Document]:
        column = None
        for row, record in enumerate(self._dataset):
            if column is None:
                column = _choose_column(_record_kinds(record), self.text_column, self.name)
            yield _field(record, column, f"{self.name}, row {row}")


def _feature_kind(feature) -> str:
    kind = getattr(feature, "dtype", type(feature).__name__)
    return "string" if kind in ("string", "large_string", "string_view") else str(kind)


def _record_kinds(record: dict) -> dict[str, str]:
    return {name: "string" if isinstance(value, str) else type(value).__name__ for name, value in record.items()}


def _field(record: dict, column: str, where: str, offset: int = 0) -> Document:
    if column not in record:
        got = ", ".join(record) or "no columns"
        raise ValueError(f"DatasetBuilder: {where} must have the column {column!r}, got {got}")
    return Document(record[column], f"{where}, column {column!r}", offset)


class _Files(Source):
    """A file, or all files of known kinds below a directory."""

    def __init__(self, path: Path):
        self.name = path.name or str(path.absolute())
        self._root = path
        self._ignored: Counter = Counter()
        self._files = [path] if path.is_file() else self._walk(path)
        if not self._files:
            listing = ", ".join(f"{count} x {suffix or 'no suffix'}" for suffix, count in self._ignored.most_common(8))
            raise ValueError(
                f"DatasetBuilder: {path} must hold files of a known kind (text, source code, json, jsonl, parquet, "
                f"csv, arrow), found {listing or 'no files'}"
            )

    def _walk(self, root: Path) -> list[Path]:
        found = []
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = Path(folder, name)
                if name.startswith(".") or not path.is_file():
                    continue
                if _is_known(path):
                    found.append(path)
                else:
                    self._ignored[path.suffix.lower()] += 1
        return found

    def fingerprint(self) -> str:
        stats = [(str(path.absolute()), path.stat()) for path in self._files]
        return json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])

    def size(self) -> int:
        def text_bytes(path: Path) -> int:
            packed = path.suffix.lower() in COMPRESSED_SUFFIXES  # text, to about a quarter
            return path.stat().st_size * (4 if packed else 1)

        return sum(map(text_bytes, self._files))

    def num_documents(self) -> int | None:
        return len(self._files) if all(_kind(path) == ".txt" for path in self._files) else None

    def documents(self, statistics) -> Iterator[Document]:
        statistics["ignored_files"] = self._ignored.total()
        for path in self._files:
            statistics["files"] += 1
            with _open(path) as file:
                yield from _READERS[_kind(path)](file, str(path), self.text_column, self.errors, statistics)


def _inner_suffix(path: Path) -> str:
    """The suffix in lower case, that of the content for a compressed file."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED_SUFFIXES else suffix


def _is_known(path: Path) -> bool:
    return _inner_suffix(path) in TEXT_SUFFIXES | RECORD_SUFFIXES


def _kind(path: Path) -> str:
    suffix = _inner_suffix(path)
    return suffix if suffix in RECORD_SUFFIXES else ".txt"


@contextlib.contextmanager
def _open(path: Path) -> Iterator[io.BufferedIOBase]:
    unpack = COMPRESSED_SUFFIXES.get(path.suffix.lower(), open)
    try:
        with unpack(path, "rb") as file:
            yield file
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"DatasetBuilder: {path} must be a complete compressed file: {error}") from error


def _lines(file, where: str, errors: str, statistics: Counter) -> Iterator[tuple[str, int, int]]:
    """(text with its line end, line number from 1, byte offset) of each line."""
    offset = 0
    for number, line in enumerate(file, 1):
        mark = len(codecs.BOM_UTF8) if number == 1 and line.startswith(codecs.BOM_UTF8) else 0
        statistics["byte_order_marks"] += bool(mark)
        yield _decode(line[mark:], f"{where}, line {number}", offset + mark, errors), number, offset + mark
        offset += len(line)


def _blocks(file, where: str, errors: str, statistics: Counter) -> Iterator[tuple[str, int]]:
    """(text, byte offset) of consecutive parts of a text file of about BLOCK_BYTES, cut between characters."""
    offset, rest = 0, b""
    while block := file.read(BLOCK_BYTES):
        data = rest + block
        if offset == 0 and not rest and data.startswith(codecs.BOM_UTF8):
            statistics["byte_order_marks"] += 1
            offset = len(codecs.BOM_UTF8)
            data = data[offset:]
        end = _end_of_last_character(data)
        if end:
            yield _decode(data[:end], where, offset, errors), offset
        offset, rest = offset + end, data[end:]
    if rest:
        yield _decode(rest, where, offset, errors), offset


def _end_of_last_character(data: bytes) -> int:
    """How many bytes of UTF-8 there are before a character that is not whole at the end."""
    for back in range(1, min(4, len(data)) + 1):
        lead = data[-back]
        if lead & 0xC0 != 0x80:  # not one of the bytes that continue a character
            size = 1 if lead < 0xC0 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return len(data) - back if size > back else len(data)
    return len(data)


def _split_text(blocks: Iterable[tuple[str, int]], where: str, separator: str | None) -> Iterator[Document]:
    """One document, or those between the separators, from consecutive parts of a text; long ones in parts."""
    if separator is None:
        before = None
        for block in blocks:
            if before is not None:
                yield Document(before[0], where, before[1], continues=True)
            before = block
        text, offset = before or ("", 0)
        yield Document(text, where, offset)
        return
    number, text, offset = 0, "", 0
    for block, start in blocks:
        text, offset = (text + block, offset) if text else (block, start)
        *whole, text = text.split(separator)
        for piece in whole:
            yield Document(piece, f"{where}, document {number}", offset)
            offset += _num_bytes(piece) + _num_bytes(separator)
            number += 1
        # The end may be the start of a separator, and the last part of a document must not be empty.
        if len(text) > len(separator):
            part = text[: -len(separator)]
            yield Document(part, f"{where}, document {number}", offset, continues=True)
            offset += _num_bytes(part)
            text = text[-len(separator) :]
    if text or not number:
        yield Document(text, f"{where}, document {number}", offset)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _read_all(file, where: str, errors: str, statistics: Counter) -> tuple[str, int]:
    """The text of a whole file and the byte offset at which it starts."""
    data = file.read()
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    statistics["byte_order_marks"] += bool(mark)
    return _decode(data[mark:] if mark else data, where, mark, errors), mark


def _read_text(file, where, text_column, errors, statistics) -> Iterator[Document]:
    yield from _split_text(_blocks(file, where, errors, statistics), where, None)


def _read_json_lines(file, where, text_column, errors, statistics) -> Iterator[Document]:
    records = _Records(where, text_column)
    for line, number, offset in _lines(file, where, errors, statistics):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            position = offset + len(line[: error.pos].encode("utf-8", "surrogateescape"))
            raise ValueError(f"DatasetBuilder: {place} must be JSON: {error.msg} at byte {position}") from error
        yield records.document(record, place)


def _read_json(file, where, text_column, errors, statistics) -> Iterator[Document]:
    """One list of records, or records one after the other."""
    records = _Records(where, text_column)
    text, offset = _read_all(file, where, errors, statistics)
    decoder = json.JSONDecoder()
    white_space = re.compile(r"\s*")
    position = white_space.match(text).end()
    number = 0
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            place = offset + len(text[: error.pos].encode("utf-8", "surrogateescape"))
            raise ValueError(f"DatasetBuilder: {where} must be JSON: {error.msg} at byte {place}") from error
        for record in value if isinstance(value, list) else [value]:
            yield records.document(record, f"{where}, record {number}")
            number += 1
        position = white_space.match(text, position).end()


class _Records:
    """Finds the text in the JSON records of one file: the record itself if it is a string, else one of its columns."""

    def __init__(self, where: str, text_column: str | None):
        self._where = where
        self._wanted = text_column
        self._column: str | None = None

    def document(self, record, where: str) -> Document:
        if isinstance(record, str):
            return Document(record, where)
        if not isinstance(record, dict):
            raise ValueError(f"DatasetBuilder: {where} must be an object or a string, got {type(record).__name__}")
        if self._column is None:
            self._column = _choose_column(_record_kinds(record), self._wanted, self._where)
        return _field(record, self._column, where)


def _read_separated(file, where, text_column, errors, statistics, delimiter: str) -> Iterator[Document]:
    lines = (line for line, _, _ in _lines(file, where, errors, statistics))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    before = csv.field_size_limit(sys.maxsize)  # documents are longer than the fields csv expects
    try:
        header = next(reader, None)
        if header is None:
            return
        rows = iter(reader)
        first = next(rows, None)
        if first is None:
            return
        # In a table of numbers and words everything is a string: what reads as a number is not counted as text.
        kinds = {
            name: "string" if not _is_number(value) else "number" for name, value in zip(header, first, strict=False)
        }
        column = header.index(_choose_column(kinds, text_column, where))
        row: list[str] | None = first
        while row is not None:
            if row:
                place = f"{where}, line {reader.line_num}, column {header[column]!r}"
                if len(row) != len(header):
                    raise ValueError(f"DatasetBuilder: {place}: must have {len(header)} fields, got {len(row)}")
                yield Document(row[column], place)
            row = next(rows, None)
    except csv.Error as error:
        raise ValueError(f"DatasetBuilder: {where}, line {reader.line_num} must be csv: {error}") from error
    finally:
        csv.field_size_limit(before)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _read_csv(file, where, text_column, errors, statistics) -> Iterator[Document]:
    yield from _read_separated(file, where, text_column, errors, statistics, ",")


def _read_tsv(file, where, text_column, errors, statistics) -> Iterator[Document]:
    yield from _read_separated(file, where, text_column, errors, statistics, "\t")


def _read_parquet(file, where, text_column, errors, statistics) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        column = _choose_column(_arrow_kinds(table.schema_arrow), text_column, where)
        batches = table.iter_batches(batch_size=MAX_BATCH_DOCUMENTS, columns=[column])
        yield from _arrow_documents(batches, column, where)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"DatasetBuilder: {where} must be a Parquet file with UTF-8 text: {error}") from error


def _read_arrow(file, where, text_column, errors, statistics) -> Iterator[Document]:
    import pyarrow

    try:
        magic = file.read(6)
        file.seek(0)
        if magic == b"ARROW1":
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            reader = batches = pyarrow.ipc.open_stream(file)
        column = _choose_column(_arrow_kinds(reader.schema), text_column, where)
        yield from _arrow_documents(batches, column, where)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"DatasetBuilder: {where} must be an Arrow file with UTF-8 text: {error}") from error


def _arrow_kinds(schema) -> dict[str, str]:
    return {
        field.name: "string" if str(field.type) in ("string", "large_string", "string_view") else str(field.type)
        for field in schema
    }


def _arrow_documents(batches, column: str, where: str) -> Iterator[Document]:
    row = 0
    for batch in batches:
        for text in batch.column(column).to_pylist():
            yield Document(text, f"{where}, row {row}, column {column!r}")
            row += 1


_READERS = {
    ".txt": _read_text,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}


# Text and columns


class Document(NamedTuple):
    """A document, or a part of one: the parts of a long text follow each other, and none of them is empty."""

    text: str | None
    where: str  # file or data set, with line or row
    offset: int = 0  # bytes of `where` before the text, for messages
    continues: bool = False  # the next Document continues this one


def clean(documents: Iterable[Document], errors: str, statistics: Counter) -> Iterator[Document]:
    """The documents that are to be packed; what is left out or repaired is counted.

    A document in parts stays in parts (`continues`), and is kept, repaired or left out as a whole.
    """
    documents = iter(documents)
    for document in documents:
        if document.continues:
            yield from _clean_parts(document, documents, errors, statistics)
            continue
        text, where, _, _ = document
        if text is None or text == "":
            statistics["empty_documents"] += 1
            continue
        if not isinstance(text, str):
            raise TypeError(f"DatasetBuilder: {where} must be a string, got {type(text).__name__} {text!r:.60}")
        bad = _first_bad_character(text)
        if bad is not None:
            if errors == "strict":
                raise _bad_character(document, bad)
            if errors == "skip":
                statistics["skipped_documents"] += 1
                continue
            statistics["repaired_documents"] += 1
            document = document._replace(text=_BAD_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text))
        if document.text.isspace():
            statistics["empty_documents"] += 1
            continue
        yield document


def _clean_parts(first: Document, rest: Iterator[Document], errors: str, statistics: Counter) -> Iterator[Document]:
    """`clean` for the parts of one document: `first` and as many of those that follow as belong to it.

    Parts wait, in a file if they are many, while they are all white space; and with errors="skip" all of them do,
    because the last may be the bad one.
    """
    with tempfile.SpooledTemporaryFile(max_size=16 * BLOCK_BYTES) as waiting:
        blank, skipped, repaired = True, False, False
        part = first
        while True:
            text = part.text
            bad = None if skipped else _first_bad_character(text)
            if bad is not None:
                if errors == "strict":
                    raise _bad_character(part, bad)
                skipped = errors == "skip"
                repaired = True
                text = _BAD_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text)
            blank = blank and text.isspace()
            waits = blank or errors == "skip"
            if waits and not skipped:
                waiting.write(text.encode())
            elif not skipped:
                yield from _read_back(waiting, part, continues=True)
                yield part._replace(text=text)
            if not part.continues:
                break
            part = next(rest)
        if skipped:
            statistics["skipped_documents"] += 1
        elif blank:
            statistics["empty_documents"] += 1
        else:
            yield from _read_back(waiting, part, continues=False)
        statistics["repaired_documents"] += repaired and not skipped


def _read_back(waiting, like: Document, continues: bool) -> Iterator[Document]:
    """The parts that were written to `waiting`, which is empty afterwards."""
    if not waiting.tell():
        return
    waiting.seek(0)
    for part in _split_text(_blocks(waiting, like.where, "strict", Counter()), like.where, None):
        yield part._replace(continues=part.continues or continues)
    waiting.seek(0)
    waiting.truncate()


def whole_texts(documents: Iterable[Document]) -> Iterator[str]:
    """The texts of documents; the parts of one are joined, which holds all of it in memory."""
    parts = []
    for document in documents:
        parts.append(document.text)
        if not document.continues:
            yield "".join(parts)
            parts.clear()


def _bad_character(document: Document, index: int) -> ValueError:
    text, where, offset, _ = document
    kind = "a NUL character" if text[index] == "\0" else f"the lone surrogate U+{ord(text[index]):04X}"
    position = offset + len(text[:index].encode())
    return ValueError(f"DatasetBuilder: {where} must be text, got {kind} at byte {position}; {_REMEDY}")


_BAD_CHARACTERS = re.compile("[\0\ud800-\udfff]")
_REMEDY = "errors='replace' puts U+FFFD in its place, errors='skip' leaves the document out"


def _first_bad_character(text: str) -> int | None:
    """Index of the first NUL or surrogate; surrogates stand for bytes that are not UTF-8, too."""
    if "\0" not in text:
        if text.isascii():
            return None
        try:
            text.encode()
            return None
        except UnicodeEncodeError:
            pass
    match = _BAD_CHARACTERS.search(text)
    return match.start() if match else None


def _decode(data: bytes, where: str, offset: int, errors: str) -> str:
    """UTF-8 to text. Unless `errors` is "strict", bad bytes become surrogates, which `clean` deals with."""
    if errors != "strict":
        return data.decode("utf-8", "surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        hint = ""
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            hint = " (the file looks like UTF-16: convert it)"
        position = offset + error.start
        raise ValueError(
            f"DatasetBuilder: {where} must be UTF-8, got byte 0x{data[error.start]:02x} at byte {position}: "
            f"{error.reason}{hint}; {_REMEDY}"
        ) from None


def _choose_column(columns: dict[str, str], wanted: str | None, where: str) -> str:
    """The column of documents: the one asked for, else `text`, else the only one of strings.

    Args:
        columns: name -> kind; "string" marks text.
    """
    there = "there are: " + (", ".join(f"{name} ({kind})" for name, kind in columns.items()) or "none")
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(f"DatasetBuilder: text_column must be a column of {where}, got {wanted!r}; {there}")
        return wanted
    if "text" in columns:
        return "text"
    strings = [name for name, kind in columns.items() if kind == "string"]
    if len(strings) != 1:
        found = "several columns" if strings else "no column"
        raise ValueError(
            f"DatasetBuilder: {where} has {found} of strings and none named 'text': choose with text_column; {there}"
        )
    return strings[0]
