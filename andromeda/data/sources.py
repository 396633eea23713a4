"""Sources of documents: files, directories, pipes, objects of `datasets`, the hub. Each gives a stream of documents."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, BinaryIO

from andromeda.data.columns import (
    SAMPLE_FILES,
    SAMPLE_RECORDS,
    Choice,
    Columns,
    Kind,
    arrow_kind,
    check,
    choose,
    listing,
    record_columns,
    schema_columns,
)
from andromeda.data.decoding import BLOCK_BYTES, COMPRESSED_SUFFIXES, Decoder, SourceError, open_input
from andromeda.data.folders import Skipped, is_rows, is_saved_dataset, walk
from andromeda.data.readers import (
    FORMATS,
    Document,
    Reader,
    arrow_documents,
    batch_rows,
    check_record,
    content_format,
    missing_column,
    open_reader,
    suffix_format,
)
from andromeda.data.tokenizer import hub_problem
from andromeda.data.workers import MAX_BATCH_DOCUMENTS

if TYPE_CHECKING:
    import datasets


class Source:
    """A source of documents.

    Attributes:
        name: for messages and for the name in the cache.
        column: the column of documents, once it is chosen; None for plain text.
        skipped: the files that were left out.
    """

    name: str
    column: str | None = None

    def __init__(self, text_column: str | None, errors: str):
        self.text_column = text_column
        self.errors = errors
        self.skipped = Skipped()
        self._formats: Counter[str] = Counter()

    def fingerprint(self) -> str | None:
        """A string that changes with the documents; None if it would require reading all of them."""
        raise NotImplementedError

    def size(self) -> int | None:
        """The approximate number of bytes of text; None if it is not known."""
        raise NotImplementedError

    def num_documents(self) -> int | None:
        """The number of documents; None if it is not known."""
        raise NotImplementedError

    def documents(self, statistics: Counter[str]) -> Iterator[Document]:
        """All documents as they are in the source, not yet cleaned (`cleaning.clean`). Long ones come in parts."""
        raise NotImplementedError

    def keep(self) -> None:
        """Make sure that the documents can be read more than once."""

    def facts(self) -> dict[str, Any]:
        """Facts for the user about a source that has been read: column, formats of files, skipped files."""
        return {
            "text_column": self.column,
            "formats": dict(self._formats),
            "skipped": self.skipped.lines(),
            "notes": self.skipped.notes,
        }


def check_name(name: object) -> None:
    """Raise if the name of a source is empty: such a path would mean the current directory."""
    text = os.fspath(name) if isinstance(name, os.PathLike) else name
    if isinstance(text, str) and not text.strip():
        raise ValueError(
            f"DatasetBuilder: dataset_name must not be empty, got {text!r}; name a file, a folder or a data set"
        )
    if isinstance(name, PurePath) and text == ".":  # Path("") is Path(".")
        raise ValueError(
            "DatasetBuilder: dataset_name must not be Path('') or Path('.'), which are the same; for the current "
            "directory say '.' or Path.cwd()"
        )


def open_source(
    name: str | os.PathLike | datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict | Source,
    split: str | None = None,
    *,
    text_column: str | None = None,
    errors: str = "strict",
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    separator: str | None = None,
    format: str | None = None,
) -> Source:
    """The source behind a path, a name on the hub or an object of `datasets`; a `Source` is returned unchanged.

    The arguments are those of `DatasetBuilder`.
    """
    if isinstance(name, Source):
        return name
    check_name(name)
    include, exclude = glob_patterns(include, "include"), glob_patterns(exclude, "exclude")
    if format is not None and format not in FORMATS:
        raise ValueError(f"DatasetBuilder: format must be one of {', '.join(FORMATS)} or None, got {format!r}")
    if separator is not None and not (isinstance(separator, str) and separator):
        raise TypeError(f"DatasetBuilder: separator must be a non-empty string or None, got {separator!r}")

    def refuse(source: str, **given: object) -> None:
        for argument, value in given.items():
            if value:
                raise ValueError(f"DatasetBuilder: {argument} must not be given for {source}, got {value!r}")

    if _is_hf_object(name):
        refuse("a data set", include=include, exclude=exclude, separator=separator, format=format)
        return _hf_source(name, split, type(name).__name__, text_column, errors)
    if not isinstance(name, (str, os.PathLike)):
        raise TypeError(
            "DatasetBuilder: dataset_name must be a path, a name on the hub, a datasets.Dataset or an IterableDataset, "
            f"got {type(name).__name__}"
        )
    text = os.fspath(name)
    if text == "-":
        refuse("standard input", split=split, include=include, exclude=exclude)
        return _Pipe(None, text_column, errors, separator, format)
    path = Path(name).expanduser()
    if path.is_dir() and is_saved_dataset(path):
        from datasets import load_from_disk

        refuse("a saved data set", include=include, exclude=exclude, separator=separator, format=format)
        return _hf_source(load_from_disk(str(path)), split, path.name, text_column, errors)
    if path.exists():
        if split is not None:
            raise ValueError(f"DatasetBuilder: split must be None for files, got {split!r}; name the right files")
        if path.is_dir():
            return _Files(path, text_column, errors, separator, format, include, exclude)
        refuse("a single file", include=include, exclude=exclude)
        if not path.is_file():
            return _Pipe(path, text_column, errors, separator, format)
        if path.absolute().is_relative_to("/dev"):  # /dev/stdin may be a file, whose own name is more informative
            path = path.resolve()
        return _Files(path, text_column, errors, separator, format)
    if not isinstance(name, str) or text.startswith((".", "/", "~")) or text.count("/") > 1 or suffix_format(path):
        raise FileNotFoundError(f"DatasetBuilder: dataset_name must be an existing path, got {text!r}")
    refuse("a data set on the hub", include=include, exclude=exclude, separator=separator, format=format)
    return _hf_source(_load_from_hub(text, split or "train"), None, text, text_column, errors)


def glob_patterns(patterns: str | Iterable[str] | None, argument: str) -> tuple[str, ...]:
    """One pattern of names or several, as a tuple; raises if one is not a string or is empty."""
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns or ())
    for pattern in patterns:
        if not (isinstance(pattern, str) and pattern.strip()):
            raise TypeError(f"DatasetBuilder: {argument} must be patterns such as '*.txt', got {pattern!r}")
    return patterns


def _is_hf_object(name: object) -> bool:
    """Whether a name is an object of `datasets`; if that package is not loaded, there can be no such object."""
    datasets = sys.modules.get("datasets")
    if datasets is None:
        return False
    kinds = (datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict)
    return isinstance(name, kinds)


def _hf_source(dataset: Any, split: str | None, name: str, text_column: str | None, errors: str) -> Source:
    import datasets

    if isinstance(dataset, dict):
        chosen = split or "train"
        if chosen not in dataset:
            raise ValueError(f"DatasetBuilder: split must be one of {', '.join(dataset)}, got {chosen!r}")
        dataset = dataset[chosen]
    elif split is not None and str(dataset.split) != split:
        raise ValueError(f"DatasetBuilder: split must be that of the data set, {dataset.split}, got {split!r}")
    # The records that a transform makes are only known once they are read.
    has_rows = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    return (_Rows if has_rows else _Stream)(dataset, name, text_column, errors)


def _load_from_hub(name: str, split: str) -> datasets.Dataset:
    import datasets
    import huggingface_hub.constants

    # Without a network, datasets retries for 23 seconds before it checks its cache; in offline mode it checks at once.
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
    """A `datasets.Dataset` without a transform: its table holds its texts."""

    column: str

    def __init__(self, dataset: datasets.Dataset, name: str, text_column: str | None, errors: str):
        super().__init__(text_column, errors)
        self._dataset = dataset
        self.name = name
        columns = _feature_columns(dataset.features, name)
        shown = dataset.format["columns"]  # set_format(columns=...) hides the other columns
        self.column = choose([(name, {name: columns[name] for name in shown})], text_column).column

    def fingerprint(self) -> str:
        return f"dataset {self._dataset._fingerprint} {self.column}"

    def size(self) -> int | None:
        table = self._dataset.data  # all rows; the data set may have selected some of them
        return table.column(self.column).nbytes * len(self._dataset) // len(table) if len(table) else None

    def num_documents(self) -> int:
        return len(self._dataset)

    def documents(self, statistics: Counter[str]) -> Iterator[Document]:
        table = self._dataset.with_format(None).select_columns([self.column]).with_format("arrow")
        decode = Decoder(self.name, self.errors)
        rows = itertools.count()
        with _located(self.name):
            for batch in table.iter(batch_size=batch_rows(self.size() or 0, len(table))):
                for chunk in batch.column(0).chunks:
                    yield from arrow_documents(chunk, self.column, self.name, rows, decode)
        decode.finish()


class _Stream(Source):
    """Records that are only known once they are read: an `IterableDataset`, or a `Dataset` with a transform."""

    def __init__(
        self, dataset: datasets.Dataset | datasets.IterableDataset, name: str, text_column: str | None, errors: str
    ):
        import datasets

        super().__init__(text_column, errors)
        self._features = None
        if isinstance(dataset, datasets.IterableDataset):
            dataset = dataset.with_format(None)  # the records depend on the format, the texts do not
            self._features = dataset.features
        self._dataset = dataset
        self.name = name

    def fingerprint(self) -> None:
        return None

    def size(self) -> None:
        return None

    def num_documents(self) -> int | None:
        return len(self._dataset) if hasattr(self._dataset, "__len__") else None

    def documents(self, statistics: Counter[str]) -> Iterator[Document]:
        known = None if self._features is None else _feature_columns(self._features, self.name)
        decode = Decoder(self.name, self.errors)
        if known is not None and self.errors != "strict":  # strings that are not UTF-8 cannot be Python objects
            self.column = choose([(self.name, known)], self.text_column).column
            rows = itertools.count()
            with _located(self.name):
                for batch in self._dataset.with_format("arrow").iter(batch_size=MAX_BATCH_DOCUMENTS):
                    for chunk in batch.column(self.column).chunks:
                        yield from arrow_documents(chunk, self.column, self.name, rows, decode)
            decode.finish()
            return
        records = self._records()
        first = list(itertools.islice(records, SAMPLE_RECORDS))
        if not first:
            return
        choice = choose([(self.name, known or record_columns(first))], self.text_column)
        self.column = column = choice.column
        for row, record in enumerate(itertools.chain(first, records)):
            place = f"{self.name}, row {row}"
            if choice.guessed and known is None:
                check_record(record, column, place)
            if column not in record:
                raise missing_column(record, column, place)
            text = record[column]
            if isinstance(text, bytes):
                text = decode(text, 0, f", row {row}, column {column!r}")
            yield Document(text, f"{place}, column {column!r}")
        decode.finish()

    def _records(self) -> Iterator[dict[str, Any]]:
        row, records = 0, iter(self._dataset)
        while True:
            try:
                record = next(records, None)
                if record is None:
                    return
                record = dict(record)
            except OSError:
                raise
            except Exception as error:  # raised by the user's generator or transform
                message = f"{self.name}, row {row} cannot be read: {type(error).__name__}: {error}"
                raise SourceError(message) from error
            yield record
            row += 1


def _feature_columns(features: datasets.Features, where: str) -> Columns:
    """Columns by the features of a data set. Pictures and sounds are objects with bytes, but never text."""
    media = ("Image", "Audio", "Video", "Pdf", "Nifti")
    kinds = (
        Kind(type(feature).__name__, may_be_text=False) if type(feature).__name__ in media else arrow_kind(field.type)
        for feature, field in zip(features.values(), features.arrow_schema, strict=True)
    )
    return schema_columns(features, kinds, where)


class _Files(Source):
    """A file, or the files of known kinds below a directory."""

    def __init__(
        self,
        path: Path,
        text_column: str | None,
        errors: str,
        separator: str | None = None,
        format: str | None = None,
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ):
        super().__init__(text_column, errors)
        self.name = path.name or path.absolute().name or "files"
        self._root = path
        self._separator = separator
        self._format = format
        self._options = {"include": include, "exclude": exclude, "separator": separator, "format": format}
        self._skips_objects = False  # whether a file of one JSON object without the column counts as a description
        self._objects: set[Path] = set()  # the files that were skipped as descriptions
        if path.is_dir():
            if is_rows(path):
                raise SourceError(
                    f"{path} must hold documents, got rows that are packed already: give them to `andromeda train` or "
                    "`andromeda eval`, or open them with andromeda.data.packed.PackedDataset"
                )
            is_known = (lambda name: True) if format else suffix_format
            files = walk(path, is_known, include, exclude, self.skipped)
        else:
            files = [path]
        self._files = [(file, format or suffix_format(file)) for file in files]  # None: by its content
        if not self._files:
            raise SourceError(
                f"{path} must hold files of a known kind (text, source code, json, jsonl, parquet, csv, arrow), "
                f"found {'; '.join(self.skipped.lines() + self.skipped.notes) or 'no files'}"
            )
        if separator is not None and not any(format in ("text", None) for _, format in self._files):
            raise self._no_text()

    def _no_text(self) -> SourceError:
        return SourceError(f"separator must not be given for {self._root}, which holds no plain text")

    def fingerprint(self) -> str:
        stats = [(str(path.absolute()), path.stat()) for path, _ in self._files]
        files = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return json.dumps({"files": files, **self._options})

    def size(self) -> int:
        def text_bytes(path: Path) -> int:
            is_compressed = path.suffix.lower() in COMPRESSED_SUFFIXES  # text shrinks to about a quarter
            return path.stat().st_size * (4 if is_compressed else 1)

        return sum(text_bytes(path) for path, _ in self._files)

    def num_documents(self) -> int | None:
        formats = {format for _, format in self._files}
        return len(self._files) if formats == {"text"} and self._separator is None else None

    def documents(self, statistics: Counter[str]) -> Iterator[Document]:
        choice = self._choose()
        self.column = None if choice is None else choice.column
        self._formats.clear()
        statistics["ignored_files"] = self.skipped.total()
        for path, format in self._files:
            with self._open(path, format, statistics) as reader:
                if not self._has_documents(reader, choice, path):
                    statistics["ignored_files"] = self.skipped.total()
                    continue
                statistics["files"] += 1
                self._formats[reader.format] += 1
                yield from reader.documents(choice)
        if self._separator is not None and not self._formats["text"]:
            raise self._no_text()

    @contextlib.contextmanager
    def _open(self, path: Path, format: str | None, statistics: Counter[str]) -> Iterator[Reader]:
        name = str(path)
        with _located(name), open_input(path, name) as source:
            format = format or content_format(source.head)
            yield open_reader(source, name, format, self.errors, statistics, self._separator)

    def _choose(self) -> Choice | None:
        """The column of documents, one for all files; None if no file has records with columns."""
        wanted = self.text_column
        # Only json files can be single JSON objects, so samples of both groups are examined.
        groups = [
            [file for file in self._files if (file[1] == "json") == is_json and file[1] != "text"]
            for is_json in (False, True)
        ]
        tables: list[tuple[str, Columns]] = []
        objects: list[tuple[str, Columns]] = []
        num_texts = len(self._files) - sum(map(len, groups))
        for path, format in [*groups[0][:SAMPLE_FILES], *groups[1][:SAMPLE_FILES]]:
            with self._open(path, format, Counter()) as reader:
                columns = reader.columns(wanted)
                if reader.format == "text":
                    num_texts += 1
                if columns:
                    (objects if reader.is_single_object() else tables).append((str(path), columns))
        if tables or not objects:
            self._skips_objects = True
            if tables:
                return choose(tables, wanted)
            if wanted is not None:
                reason = "is plain text" if num_texts == len(self._files) else "has no columns"
                raise SourceError(f"text_column must be None for {self._root}, which {reason}, got {wanted!r}")
            return None
        if num_texts and wanted is None and not any("text" in columns for _, columns in objects):
            for name, columns in objects:
                if not any(kind.may_be_text for kind in columns.values()):
                    continue
                raise SourceError(
                    f"{name} is one JSON object beside files of text; to read it, choose with text_column; to leave "
                    f"it out, exclude it; {listing(columns)}"
                )
            self._skips_objects = True
            return None
        return choose(objects, wanted)

    def _has_documents(self, reader: Reader, choice: Choice | None, path: Path) -> bool:
        """Whether to read a file; raises if its columns do not match the source."""
        if reader.format in ("text", "jsonl"):  # the jsonl reader checks each record
            return True
        columns = reader.columns(self.text_column)
        if self._skips_objects and reader.is_single_object() and (choice is None or choice.column not in columns):
            name = str(path.relative_to(self._root)) if path != self._root else str(path)
            if path not in self._objects:
                self._objects.add(path)
                self.skipped.add(name, "single JSON objects without the text column")
            return False
        if columns and choice is None:
            raise SourceError(f"{path} has columns and the files before it have none; choose with text_column")
        if columns and choice is not None and reader.format != "json":
            check(choice, columns, str(path))
        return True


class _Pipe(Source):
    """Standard input, a named pipe, or another file that can be read only once."""

    def __init__(
        self, path: Path | None, text_column: str | None, errors: str, separator: str | None, format: str | None
    ):
        super().__init__(text_column, errors)
        self.name = "standard input" if path is None else str(path)
        self._path = path
        self._separator = separator
        self._format = format
        self._copy: BinaryIO | None = None
        self._was_read = False

    def fingerprint(self) -> None:
        return None

    def size(self) -> None:
        return None

    def num_documents(self) -> None:
        return None

    def keep(self) -> None:
        if self._copy is None:
            with self._open() as stream:
                self._copy = tempfile.TemporaryFile()  # noqa: SIM115 (removed with this object)
                while block := stream.read(BLOCK_BYTES):
                    self._copy.write(block)

    def _open(self) -> contextlib.AbstractContextManager[BinaryIO]:
        if self._was_read:
            raise SourceError(f"{self.name} can be read only once: write it to a file first")
        self._was_read = True
        if self._path is None:
            return contextlib.nullcontext(sys.stdin.buffer)
        return open(self._path, "rb")

    def documents(self, statistics: Counter[str]) -> Iterator[Document]:
        if self._copy is not None:
            self._copy.seek(0)
        path = self._path or Path("-")
        with (
            _located(self.name),
            self._open() if self._copy is None else contextlib.nullcontext(self._copy) as stream,
            open_input(path, self.name, stream) as source,
        ):
            format = self._format or suffix_format(path) or content_format(source.head)
            reader = open_reader(source, self.name, format, self.errors, statistics, self._separator)
            columns = reader.columns(self.text_column)
            choice = choose([(self.name, columns)], self.text_column) if columns else None
            for argument, value in (("text_column", self.text_column), ("separator", self._separator)):
                if value is not None and (format == "text") == (argument == "text_column"):
                    raise SourceError(f"{argument} must be None for {self.name}, which is read as {format}")
            self.column = None if choice is None else choice.column
            self._formats = Counter({format: 1})
            yield from reader.documents(choice)


@contextlib.contextmanager
def _located(name: str) -> Iterator[None]:
    """Every error in the block names the source."""
    try:
        yield
    except (SourceError, MemoryError):
        raise
    except OSError as error:
        if error.filename is None:
            error.filename = name
        raise
    except Exception as error:
        raise SourceError(f"{name} cannot be read: {type(error).__name__}: {error}") from error
