"""File formats: a reader gives the columns of one file, then its documents, a few at a time."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from operator import itemgetter
from types import TracebackType
from typing import IO, TYPE_CHECKING, BinaryIO, NamedTuple

from andromeda.data.columns import (
    SAMPLE_RECORDS,
    TEXT,
    Choice,
    Columns,
    arrow_kind,
    is_number,
    is_string,
    record_columns,
    schema_columns,
    value_kind,
)
from andromeda.data.decoding import (
    BLOCK_BYTES,
    COMPRESSED_SUFFIXES,
    Decoder,
    Input,
    SourceError,
    check_text,
    end_of_last_character,
    length_of_mark,
    recognise,
    seekable,
)
from andromeda.data.workers import MAX_BATCH_DOCUMENTS

if TYPE_CHECKING:
    import pyarrow

# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".html", ".htm", ".py", ".pyi", ".pyx", ".c", ".h", ".cc",
    ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".java", ".kt", ".scala", ".js", ".jsx", ".ts", ".tsx", ".go", ".rs",
    ".swift", ".cs", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".hs", ".ml", ".sh", ".sql", ".m", ".f90", ".cmake",
    ".toml", ".yaml", ".yml",
})
# fmt: on
FORMAT_OF_SUFFIX = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    **dict.fromkeys(TEXT_SUFFIXES, "text"),
}
FORMATS = ("text", "json", "jsonl", "csv", "tsv", "parquet", "arrow")
MAX_FIELD_CHARS = 1 << 28  # of csv: a quote that is never closed makes a field of the rest of the file
BATCH_BYTES = 16 << 20  # bytes of a table's texts that are held as Python strings at one time
SAMPLE_BYTES = 4 << 20


class Document(NamedTuple):
    """A document or a part of one. The parts of a long text follow each other, and none of them is empty."""

    text: object  # a string if the source is sound, None for a missing value
    where: str  # file or data set, with its line or row
    offset: int = 0  # bytes of `where` before the text, for messages
    continues: bool = False  # whether the next Document continues this one


def suffix_format(path: str | os.PathLike) -> str | None:
    """The format that the name of a file implies; for a compressed file, the format of its content."""
    stem, suffix = os.path.splitext(os.fspath(path))
    if suffix.lower() in COMPRESSED_SUFFIXES:
        suffix = os.path.splitext(stem)[1]
    return FORMAT_OF_SUFFIX.get(suffix.lower())


def content_format(head: bytes) -> str:
    """The format of a file by its first bytes: Parquet, Arrow, JSON lines if the first line is one, else text."""
    kind = recognise(head) or ""
    for name in ("parquet", "arrow"):
        if name in kind.lower():
            return name
    line = head[length_of_mark(head) :].lstrip().partition(b"\n")[0]
    if line.startswith(b"{"):
        try:
            return "jsonl" if isinstance(json.loads(line), dict) else "text"
        except (ValueError, RecursionError):
            pass
    return "text"


def open_reader(
    source: Input, name: str, format: str, errors: str, statistics: Counter[str], separator: str | None = None
) -> Reader:
    """The reader for a file in one of FORMATS; raises if its first bytes are of another kind."""
    reader = _READERS[format](source, name, format, errors, statistics)
    reader.separator = separator
    return reader


class Reader:
    """One file of documents.

    Args:
        source: the open file.
        name: its name, for messages.
        format: one of FORMATS.
        errors: as in `DatasetBuilder`.
        statistics: counts byte order marks.
    """

    separator: str | None = None

    def __init__(self, source: Input, name: str, format: str, errors: str, statistics: Counter[str]):
        self.name = name
        self.format = format
        self._file = source.file
        self._statistics = statistics
        self._decode = Decoder(name, errors)
        self._check(source.head)

    def _check(self, head: bytes) -> None:
        check_text(head, self.name)

    def columns(self, wanted: str | None = None) -> Columns:
        """The columns, as far as a schema or the first records show them; none for text.

        Args:
            wanted: the column that the user asked for.
        """
        return {}

    def is_single_object(self) -> bool:
        """Whether the file is a single JSON object, like settings and descriptions of data sets."""
        return False

    def documents(self, choice: Choice | None) -> Iterator[Document]:
        """All documents; of records, the values of the chosen column. Can be called once."""
        raise NotImplementedError

    def error(self, message: str) -> SourceError:
        return SourceError(f"{self.name}{message}")


class TextReader(Reader):
    """Plain text: one document, or several with a separator between them."""

    def documents(self, choice: Choice | None) -> Iterator[Document]:
        blocks = text_blocks(self._file, self._decode, self._statistics)
        yield from split_text(blocks, self.name, self.separator)


def text_blocks(file: IO[bytes], decode: Decoder, statistics: Counter[str] | None) -> Iterator[tuple[str, int]]:
    """(text, byte offset) of consecutive parts of about BLOCK_BYTES, cut between characters.

    With `statistics`, a byte order mark at the start is left out and counted.
    """
    offset, rest = 0, b""
    while block := file.read(BLOCK_BYTES):
        data = rest + block
        if statistics is not None and offset == 0 and (mark := length_of_mark(data)):
            statistics["byte_order_marks"] += 1
            data, offset = data[mark:], mark
        end = end_of_last_character(data)
        if end:
            yield decode(data[:end], offset), offset
        offset, rest = offset + end, data[end:]
    if rest:
        yield decode(rest, offset), offset


def split_text(blocks: Iterable[tuple[str, int]], where: str, separator: str | None) -> Iterator[Document]:
    """The documents between the separators, or the only one, from consecutive parts of a text; long ones in parts."""
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
    for added, start in blocks:
        text, offset = (text + added, offset) if text else (added, start)
        *whole, text = text.split(separator)
        for piece in whole:
            yield Document(piece, f"{where}, document {number}", offset)
            offset += _num_bytes(piece) + _num_bytes(separator)
            number += 1
        # The text may end with the start of a separator, and the last part of a document must not be empty.
        if len(text) > len(separator):
            part = text[: -len(separator)]
            yield Document(part, f"{where}, document {number}", offset, continues=True)
            offset += _num_bytes(part)
            text = text[-len(separator) :]
    if text or not number:
        yield Document(text, f"{where}, document {number}", offset)


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _lines(file: BinaryIO, decode: Decoder, statistics: Counter[str]) -> Iterator[tuple[str, int]]:
    """(text with its line end, byte offset) of each line, without a byte order mark."""
    offset = good = 0
    for number, line in enumerate(file, 1):
        if number == 1 and (mark := length_of_mark(line)):
            statistics["byte_order_marks"] += 1
            line = line[mark:]
            offset = mark
        try:
            text = line.decode()
            good += len(line)
        except UnicodeDecodeError:
            decode.count_good(good)
            good = 0
            text = decode(line, offset, f", line {number}")
        yield text, offset
        offset += len(line)


class JsonLinesReader(Reader):
    """A JSON object or string on each line."""

    _unit = "line"

    def __init__(self, source: Input, name: str, format: str, errors: str, statistics: Counter[str]):
        super().__init__(source, name, format, errors, statistics)
        self._records = self._read()
        self._first: list[tuple[object, int, int]] | None = None  # the records that `columns` has read

    def columns(self, wanted: str | None = None) -> Columns:
        self._first = []
        size = 0
        for record in itertools.islice(self._records, SAMPLE_RECORDS):
            self._first.append(record)
            size += record[2]
            if size > SAMPLE_BYTES and len(self._first) > 1:
                break
        return record_columns(record for record, _, _ in self._first)

    def documents(self, choice: Choice | None) -> Iterator[Document]:
        where = f"{self.name}, {self._unit} "
        column, guessed = (None, False) if choice is None else choice
        end = f", column {column!r}"
        for record, number, _ in itertools.chain(self._first or (), self._records):
            if isinstance(record, dict):
                if column is None:
                    raise SourceError(f"{where}{number} must be a string as the records before it, got an object")
                if guessed:
                    check_record(record, column, f"{where}{number}")
                if column not in record:
                    raise missing_column(record, column, f"{where}{number}")
                yield Document(record[column], f"{where}{number}{end}")
            elif isinstance(record, str):
                yield Document(record, f"{where}{number}")
            else:
                raise SourceError(f"{where}{number} must be an object or a string, got {type(record).__name__}")

    def _read(self) -> Iterator[tuple[object, int, int]]:
        """(record, number, length of its text) of each record."""
        lines = _lines(self._file, self._decode, self._statistics)
        for number, (line, offset) in enumerate(lines, 1):
            if line.isspace():
                continue
            try:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    raise
                except ValueError:  # an integer of thousands of digits
                    record = _WITH_HUGE_NUMBERS.decode(line)
            except (ValueError, RecursionError) as error:
                raise self._json_error(error, line, offset, f", line {number}") from error
            yield record, number, len(line)

    def _json_error(self, error: Exception, text: str, offset: int, place: str) -> SourceError:
        if isinstance(error, json.JSONDecodeError):
            position = offset + _num_bytes(text[: error.pos])
            hint = ""
            if place == ", line 1" and text.strip() in ("[", "{"):
                hint = "; a file that is one list, or has records of several lines, must be named .json"
            return self.error(f"{place} must be JSON: {error.msg} at byte {position}{hint}")
        if isinstance(error, RecursionError):
            return self.error(f"{place} must be JSON with fewer lists and objects inside each other")
        return self.error(f"{place} must be JSON: {error}")


# By default Python refuses integers of thousands of digits. Any number may stand for one here: it is not text.
_WITH_HUGE_NUMBERS = json.JSONDecoder(parse_int=float)
_DECODE = json.JSONDecoder().raw_decode
_SPACE = re.compile(r"[ \t\r\n]*")


class JsonReader(JsonLinesReader):
    """One list of records, or records one after the other, on any number of lines."""

    _unit = "record"
    _has_list = False

    def is_single_object(self) -> bool:
        if self._first is None:
            self.columns()
        assert self._first is not None
        return not self._has_list and len(self._first) == 1 and isinstance(self._first[0][0], dict)

    def _read(self) -> Iterator[tuple[object, int, int]]:
        text = _Text(text_blocks(self._file, self._decode, self._statistics))
        number, in_list = 0, False
        while start := text.next_character():
            if start == "[" and not in_list:
                self._has_list = True
                text.position += 1
                in_list = text.next_character() != "]"
                text.position += not in_list
                continue
            record, length = self._value(text, number)
            yield record, number, length
            text.position += length
            number += 1
            if in_list:
                if (mark := text.next_character()) not in (",", "]"):
                    raise self.error(f" must be JSON: Expecting ',' or ']' at byte {text.place()}")
                text.position += 1
                in_list = mark == ","
        if in_list:
            raise self.error(f" must be JSON: Expecting a value at byte {text.place()}")

    def _value(self, text: _Text, number: int) -> tuple[object, int]:
        """The value at the current position and the length of its text; the position does not move."""
        decode = _DECODE
        while True:
            try:
                record, end = decode(text.held, text.position)
            except (ValueError, RecursionError) as error:
                if not isinstance(error, (json.JSONDecodeError, RecursionError)) and decode is _DECODE:
                    decode = _WITH_HUGE_NUMBERS.raw_decode
                elif not (text.may_go_on(error) and text.read_more()):
                    raise self._json_error(error, text.held, text.offset, f", record {number}") from error
                continue
            length = end - text.position
            # A number at the end of the text read so far may continue.
            if end < len(text.held) or isinstance(record, (dict, str, list)) or not text.read_more():
                return record, length


class _Text:
    """A text that is read in blocks; the part before a position is dropped."""

    def __init__(self, blocks: Iterator[tuple[str, int]]):
        self._blocks = blocks
        self.held = ""
        self.offset = 0  # bytes before `held`
        self.position = 0  # in `held`

    def read_more(self) -> bool:
        """Read at least as much again as is held, so that a long value is not parsed too often; False at the end."""
        block = next(self._blocks, None)
        if block is None:
            return False
        rest = self.held[self.position :]
        self.offset = block[1] - _num_bytes(rest)
        self.position = 0
        parts, size = [rest, block[0]], len(block[0])
        while size < len(rest) and (block := next(self._blocks, None)):
            parts.append(block[0])
            size += len(block[0])
        self.held = "".join(parts)
        return True

    def next_character(self) -> str:
        """The next character that is not white space; the position moves to it. "" at the end."""
        while True:
            space = _SPACE.match(self.held, self.position)
            assert space is not None  # the pattern also matches an empty string
            self.position = space.end()
            if self.position < len(self.held):
                return self.held[self.position]
            if not self.read_more():
                return ""

    def place(self) -> int:
        """Byte offset of the position."""
        return self.offset + _num_bytes(self.held[: self.position])

    def may_go_on(self, error: Exception) -> bool:
        """Whether the parser may succeed with more text."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.pos >= len(self.held) - 16 or error.msg.startswith("Unterminated string")


def check_record(record: dict[str, object], column: str, where: str) -> None:
    """Raise if a column other than the guessed one may hold text."""
    for name, value in record.items():
        if name != column and value is not None and not is_number(value):
            raise SourceError(
                f"{where}: {column!r} was the only column that may be text so far, and now {name!r} is one, too "
                f"({value_kind(value).name}); choose with text_column"
            )


def missing_column(record: Iterable[str], column: str, where: str) -> SourceError:
    return SourceError(
        f"{where} must have the column {column!r}, got {', '.join(record) or 'no columns'}; choose one that all "
        "records have with text_column"
    )


class CsvReader(Reader):
    """Fields between commas or tabs; the first row names the columns. Blank rows are left out."""

    def __init__(self, source: Input, name: str, format: str, errors: str, statistics: Counter[str]):
        super().__init__(source, name, format, errors, statistics)
        self._delimiter = "\t" if self.format == "tsv" else ","
        lines = _lines(self._file, self._decode, self._statistics)
        self._csv = csv.reader(map(itemgetter(0), lines), delimiter=self._delimiter, strict=True)
        self._rows = self._read()
        self._line, self._header = next(self._rows, (0, []))

    def columns(self, wanted: str | None = None) -> Columns:
        header = self._header
        marks = [mark for mark in ",;\t|" if mark != self._delimiter and mark in "".join(header)]
        if len(header) == 1 and marks and wanted != header[0]:
            other = marks[0]
            names = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
            remedy = {"\t": "name the file .tsv or choose format='tsv'", ",": "name it .csv or choose format='csv'"}
            raise self.error(
                f", line {self._line} must name columns with {names[self._delimiter]} between them, got {header[0]!r}, "
                f"with {names[other]}: {remedy.get(other, 'convert it')}; or choose text_column={header[0]!r}"
            )
        twice = [name for name, count in Counter(header).items() if name and count > 1]
        if twice:
            raise self.error(f", line {self._line} must name each column once, got {twice[0]!r} twice")
        # All fields are strings, and even one that looks like a number may be text.
        return dict.fromkeys(header, TEXT)

    def documents(self, choice: Choice | None) -> Iterator[Document]:
        header = self._header
        if not header:
            return
        assert choice is not None  # a header gives columns, and columns give a choice
        if choice.column not in header:
            raise missing_column(dict.fromkeys(header), choice.column, self.name)
        column = header.index(choice.column)
        for line, row in self._rows:
            place = f"{self.name}, line {line}, column {choice.column!r}"
            if len(row) != len(header):
                raise SourceError(f"{place}: must have {len(header)} fields as the header, got {len(row)}")
            yield Document(row[column], place)

    def _read(self) -> Iterator[tuple[int, list[str]]]:
        """(number of the last line, fields) of each row that is not blank."""
        begin = 1
        while True:
            # The limit belongs to the process, and other code may have changed it since the last row.
            before = csv.field_size_limit(MAX_FIELD_CHARS)
            try:
                row = next(self._csv, None)
            except csv.Error as error:
                lines = f"line {begin}" if begin >= self._csv.line_num else f"lines {begin} to {self._csv.line_num}"
                hint = "; a quote is not closed" if "unexpected end" in str(error) or "limit" in str(error) else ""
                raise self.error(f", {lines} must be {self.format}: {error}{hint}") from error
            finally:
                csv.field_size_limit(before)
            if row is None:
                return
            # Blank lines and lines of spaces are not rows; an empty quoted field is a row of a table with one column.
            if row and not (len(row) == 1 and row[0].isspace()):
                yield self._csv.line_num, row
            begin = self._csv.line_num + 1


class TableReader(Reader):
    """Base of the readers whose tables pyarrow reads: `_schema` and `_values` differ."""

    kind = ""  # of the file, for messages, with its article

    def columns(self, wanted: str | None = None) -> Columns:
        with _ArrowErrors(self.name, self.kind):
            schema = self._schema()
            return schema_columns(schema.names, map(arrow_kind, schema.types), self.name)

    def documents(self, choice: Choice | None) -> Iterator[Document]:
        if choice is None:
            raise self.error(" must have columns, got none")
        self.columns()
        rows = itertools.count()
        with _ArrowErrors(self.name, self.kind):
            for values in self._values(choice.column):
                yield from arrow_documents(values, choice.column, self.name, rows, self._decode)
        self._decode.finish()

    def _schema(self) -> pyarrow.Schema:
        raise NotImplementedError

    def _values(self, column: str) -> Iterator[pyarrow.Array]:
        """The values of a column, batch after batch."""
        raise NotImplementedError


class ParquetReader(TableReader):
    """A column of a Parquet file."""

    kind = "a Parquet"

    def __init__(self, source: Input, name: str, format: str, errors: str, statistics: Counter[str]):
        import pyarrow.parquet

        super().__init__(source, name, format, errors, statistics)
        with _ArrowErrors(self.name, self.kind):
            file = seekable(source.file)
            self._table = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK_BYTES)

    def _check(self, head: bytes) -> None:
        if not head.startswith(b"PAR1"):
            raise self.error(f" must be a Parquet file, got {recognise(head) or _other(head)}")

    def _schema(self) -> pyarrow.Schema:
        return self._table.schema_arrow

    def _values(self, column: str) -> Iterator[pyarrow.Array]:
        for batch in self._table.iter_batches(batch_size=self._batch_size(), columns=[column]):
            yield batch.column(0)

    def _batch_size(self) -> int:
        """Rows of about BATCH_BYTES."""
        metadata = self._table.metadata
        # The sizes of single columns are not requested: in a damaged file, that call of pyarrow ends the process.
        size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
        return batch_rows(size, metadata.num_rows)


class ArrowReader(TableReader):
    """A column of an Arrow stream or file."""

    kind = "an Arrow"

    def __init__(self, source: Input, name: str, format: str, errors: str, statistics: Counter[str]):
        import pyarrow

        super().__init__(source, name, format, errors, statistics)
        self._is_file = source.head.startswith(b"ARROW1")
        with _ArrowErrors(self.name, self.kind):
            if self._is_file:
                self._table = pyarrow.ipc.open_file(seekable(source.file))
            else:
                self._table = pyarrow.ipc.open_stream(source.file)

    def _check(self, head: bytes) -> None:
        kind = recognise(head)
        if kind is not None and "Arrow" not in kind:
            raise self.error(f" must be an Arrow file, got {kind}")

    def _schema(self) -> pyarrow.Schema:
        return self._table.schema

    def _values(self, column: str) -> Iterator[pyarrow.Array]:
        table = self._table
        batches = map(table.get_batch, range(table.num_record_batches)) if self._is_file else table
        for batch in batches:
            yield batch.column(column)


class _ArrowErrors:
    """A context manager that turns errors of pyarrow into ones with the name of the file."""

    def __init__(self, name: str, kind: str):
        self._name, self._kind = name, kind

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import pyarrow

        # A damaged length may ask for more memory than there is.
        known = isinstance(error, (pyarrow.ArrowException, UnicodeDecodeError, MemoryError))
        # An OSError without a number means that pyarrow cannot read the file; one with a number comes from the disk.
        if known or (isinstance(error, OSError) and error.errno is None):
            raise SourceError(
                f"{self._name} must be {self._kind} file, it is damaged or something else: "
                f"{error or type(error).__name__}"
            ) from error


def _other(head: bytes) -> str:
    return "an empty file" if not head else f"a file that begins with {head[:8]!r}"


def batch_rows(size: int, rows: int) -> int:
    """The number of rows of a column to read at once: a thousand, or fewer if their texts are long."""
    return max(1, min(MAX_BATCH_DOCUMENTS, BATCH_BYTES * rows // size if size else MAX_BATCH_DOCUMENTS))


def arrow_documents(
    array: pyarrow.Array, column: str, name: str, rows: Iterator[int], decode: Decoder
) -> Iterator[Document]:
    """The documents in a column of a record batch.

    Args:
        array: the column; the file may be damaged.
        column, name: for messages.
        rows: an iterator of row numbers, for messages; it advances by one for each row of this batch.
        decode: the decoder of the whole file.
    """
    array = _sound(array)
    step = batch_rows(array.nbytes, len(array))
    is_text = is_string(array.type)
    for begin in range(0, len(array), step):
        values = array.slice(begin, step).to_pylist()
        if is_text:
            decode.count_good(sum(map(len, filter(None, values))))
        for value, row in zip(values, rows, strict=False):
            if isinstance(value, bytes):
                value = decode(value, 0, f", row {row}, column {column!r}")
            yield Document(value, f"{name}, row {row}, column {column!r}")


def _sound(array: pyarrow.Array) -> pyarrow.Array:
    """The array, checked for offsets that point outside it; as bytes if it holds strings that are not UTF-8."""
    import pyarrow

    try:
        array.validate(full=True)
        return array
    except pyarrow.ArrowInvalid:
        array = _as_bytes(array)
        array.validate(full=True)
        return array


def _as_bytes(array: pyarrow.Array) -> pyarrow.Array:
    """An array of strings, or of categories that are strings, as an array of bytes; other arrays unchanged."""
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(array.type):
        return pyarrow.DictionaryArray.from_arrays(array.indices, _as_bytes(array.dictionary))
    for is_kind, kind in (
        (types.is_string, pyarrow.binary()),
        (types.is_large_string, pyarrow.large_binary()),
        (types.is_string_view, pyarrow.binary_view()),
    ):
        if is_kind(array.type):
            return array.view(kind)
    return array


_READERS: dict[str, type[Reader]] = {
    "text": TextReader,
    "json": JsonReader,
    "jsonl": JsonLinesReader,
    "csv": CsvReader,
    "tsv": CsvReader,
    "parquet": ParquetReader,
    "arrow": ArrowReader,
}
