"""DatasetBuilder: documents to cached rows of token ids, and the `torch` data set that reads them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import operator
import os
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import xxhash

from andromeda import files, packing
from andromeda.documents import Source, check_name, clean, open_source
from andromeda.tokenizer import AndromedaTokenizer

if TYPE_CHECKING:
    import datasets

FORMAT = 1  # part of the cache key: raised when a change alters the rows
DATA_FILE = "data.arrow"
METADATA_FILE = "metadata.json"
IGNORED_LABEL = -100

_BUILDING = ".building-"  # start of the names of unfinished data sets
_OTHER_PLACE = "Another place can be chosen with cache_dir, ANDROMEDA_CACHE or --out"

_METADATA_KEYS = {
    *("seq_len", "packing", "dtype", "rows", "rows_per_batch", "data_bytes", "statistics"),
    *("vocab_size", "eos_token_id", "pad_token_id", "tokenizer_hash"),
}

_log = logging.getLogger(__name__)


class DatasetBuilder:
    """Packs documents into rows of `seq_len` token ids and keeps them in a cache.

        dataset = DatasetBuilder("books/", seq_len=8192, tokenizer="tokenizer/").build_dataset()
        dataset[0]["input_ids"]  # (8192,) int64

    Args:
        dataset_name: what to pack.
            * a directory: all files below it whose kind is known, in the order of their names, without hidden ones;
              links are followed, and a file is read once. Plain text and source code are one document per file. Or
              what `Dataset.save_to_disk` wrote.
            * a file: json, jsonl, parquet, csv, tsv or arrow with one document per record; anything else is one
              document of plain text, unless its content is a table or JSON lines. gzip, bzip2, xz and zstd are
              unpacked on the way. Archives, pictures and other binary files are refused.
            * a pipe, or "-" for standard input, read once and therefore not looked up in the cache first.
            * the name of a data set on the Hugging Face hub.
            * a `datasets.Dataset`, or an `IterableDataset`, which is read anew by every build.
        seq_len: ids per row.
        num_cpu: processes that tokenise. None or 1: this one, whose tokenizer uses all cores by itself; more: that many
            workers of one thread each. The rows do not depend on it.
        hf_account_repo: repository on the hub, `owner/name`, to upload the rows to.
        tokenizer: name, directory or tokenizer.json, read as `AndromedaTokenizer` does; or a tokenizer object, which
            must have an end-of-sequence token and is not changed.
        text_column: column that holds the documents. Default: `text`, else the only one that may: a column of strings,
            categories, lists or objects, or one that is empty in the first records, may be text, one of numbers or
            times may not. All files of a source must have the column.
        split: split of a hub data set or `DatasetDict` (default "train").
        packing: "stream" cuts rows from the stream of all documents: no padding, only the last remainder (< seq_len
            ids) is left out. "bfd" keeps documents whole where they fit a row (best-fit decreasing) and pads.
        doc_mask: items also hold `key_start`, with which attention does not look beyond the start of a document.
        label_first_token: whether the first token of a document is to be predicted, from the end of the one before; if
            not, its label is -100.
        errors: what to do with bytes that are not UTF-8, NUL characters and lone surrogates: "strict" raises with file
            and position, "replace" puts U+FFFD in their place, "skip" leaves the document out. Both count. More than
            5 % of such bytes in a file are an error in any case.
        include, exclude: patterns as of a shell, or one, for the files of a directory: `*.py` for a name, `tests` for
            a folder, `docs/*.md` for a path below the directory. With `include`, only what matches it is read, of
            whatever kind.
        separator: text between two documents in plain text, such as "<|endoftext|>".
        format: "text", "json", "jsonl", "csv", "tsv", "parquet" or "arrow": read all files so, whatever their names.
        cache_dir: where built data sets are kept. Default: $ANDROMEDA_CACHE/datasets, else
            $XDG_CACHE_HOME/andromeda/datasets, else ~/.cache/andromeda/datasets. Relative paths, here and in the other
            arguments, are those of the moment when the builder is made.
        progress: show a progress bar if stderr is a terminal.

    A document is followed by the end-of-sequence id, and only by it: text that spells that token, or another special
    token, stays text, as in `AndromedaTokenizer`. Empty and white-space documents are dropped and counted, and a byte
    order mark at the start of a file is removed.

    The cache key is made of the source (paths, sizes and times of change, or the fingerprint of a `Dataset`), the
    tokenizer and the arguments that change rows. A build appears in the cache complete or not at all; what an
    interrupted one left is removed by a later one, and one whose bytes have changed since is said and built again. A
    few megabytes of text are in memory, never the corpus nor a long document, unless its tokenizer makes one word of
    all of it (`packing.Seams`).

    Raises:
        TypeError, ValueError: an argument is wrong. FileNotFoundError: there is no such path.
    """

    def __init__(
        self,
        dataset_name: str | os.PathLike | datasets.Dataset | datasets.IterableDataset,
        seq_len: int = 8192,
        num_cpu: int | None = None,
        hf_account_repo: str | None = None,
        tokenizer="EleutherAI/gpt-neox-20b",
        *,
        text_column: str | None = None,
        split: str | None = None,
        packing: str = "stream",
        doc_mask: bool = False,
        label_first_token: bool = True,
        errors: str = "strict",
        include: str | Iterable[str] = (),
        exclude: str | Iterable[str] = (),
        separator: str | None = None,
        format: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        progress: bool = True,
    ):
        for name, value in (("seq_len", seq_len), ("num_cpu", 1 if num_cpu is None else num_cpu)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"DatasetBuilder: {name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"DatasetBuilder: {name} must be at least 1, got {value}")
        for name, value, known in (
            ("packing", packing, ("stream", "bfd")),
            ("errors", errors, ("strict", "replace", "skip")),
        ):
            if value not in known:
                raise ValueError(f"DatasetBuilder: {name} must be one of {', '.join(known)}, got {value!r}")
        for name, value in (("hf_account_repo", hf_account_repo), ("text_column", text_column), ("split", split)):
            if value is not None and not (isinstance(value, str) and value):
                raise TypeError(f"DatasetBuilder: {name} must be a non-empty string or None, got {value!r}")
        check_name(dataset_name)
        self.dataset_name = _from_here(dataset_name)
        self.seq_len = seq_len
        self.num_cpu = num_cpu
        self.hf_account_repo = hf_account_repo
        self.tokenizer = _from_here(tokenizer)
        self.text_column = text_column
        self.split = split
        self.packing = packing
        self.doc_mask = doc_mask
        self.label_first_token = label_first_token
        self.errors = errors
        self.include = (include,) if isinstance(include, str) else tuple(include)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self.separator = separator
        self.format = format
        self.cache_dir = default_cache_dir() if cache_dir is None else _absolute(cache_dir, "DatasetBuilder: cache_dir")
        self.progress = progress
        self._needed_bytes = 0  # on the disk, estimated during a build

    def build_dataset(self) -> PackedDataset:
        """Open the data set from the cache, building it first if it is not there; upload it if a repository is given.

        Returns:
            `PackedDataset`, a `torch.utils.data.Dataset`; its `statistics` say what became of the documents.

        Raises:
            ValueError: fewer tokens than one row (with packing "stream"), no documents, no clear text column, or
                malformed text or records; names file and position.
            OSError: the disk is too small, which is estimated first, or the cache cannot be written; the hub cannot be
                reached; the upload failed, after which the data set is complete in the cache and another call only
                uploads.
            RuntimeError: a tokenizer process died.
        """
        settings = _tokenizer_settings(self.tokenizer)
        source = open_source(
            self.dataset_name,
            self.split,
            text_column=self.text_column,
            errors=self.errors,
            include=self.include,
            exclude=self.exclude,
            separator=self.separator,
            format=self.format,
        )
        fingerprint = source.fingerprint()
        dataset = None
        if fingerprint is not None:
            dataset = self._open_cached(self._cache_path(source, settings, fingerprint))
        if dataset is None:
            dataset = self._build(source, settings, fingerprint)
        if self.hf_account_repo is not None:
            self._upload(dataset)
        return dataset

    def _cache_path(self, source: Source, settings: _TokenizerSettings, fingerprint: str) -> Path:
        decisive = {
            "format": FORMAT,
            "source": fingerprint,
            "text_column": self.text_column,
            "errors": self.errors,
            "tokenizer": settings.hash,
            "seq_len": self.seq_len,
            "packing": self.packing,
        }
        key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:32]
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", source.name)[-60:].strip("-.") or "dataset"
        return self.cache_dir / f"{stem}-{key}"

    def _open_cached(self, path: Path) -> PackedDataset | None:
        if not path.exists():
            return None
        try:
            dataset = PackedDataset(path, doc_mask=self.doc_mask, label_first_token=self.label_first_token)
            dataset.verify()
            return dataset
        except (OSError, ValueError) as error:
            warnings.warn(f"DatasetBuilder: building again what is damaged in the cache: {error}", stacklevel=3)
            return None

    def _build(self, source: Source, settings: _TokenizerSettings, fingerprint: str | None) -> PackedDataset:
        with self._write_errors():
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with files.temporary_folder(self.cache_dir, _BUILDING) as temporary:
                content_hash = self._write(source, settings, fingerprint, temporary)
                path = self._cache_path(source, settings, fingerprint or content_hash)
                if not _is_complete(path):  # another builder may have been faster
                    _install(temporary, path)
        return PackedDataset(path, doc_mask=self.doc_mask, label_first_token=self.label_first_token)

    def _write(
        self, source: Source, settings: _TokenizerSettings, fingerprint: str | None, directory: Path
    ) -> str | None:
        """Write the data and its metadata into `directory`. Returns a hash of the texts if there is no fingerprint."""
        from tqdm import tqdm

        begin = time.monotonic()
        statistics: Counter = Counter()
        texts = packing.in_parts(clean(source.documents(statistics), self.errors, statistics))
        digest = hashlib.sha256() if fingerprint is None else None
        if digest is not None:
            texts = _hashed(texts, digest)
        texts = packing.pieces(texts, packing.Seams(settings.json))
        writer = packing.RowWriter(directory / DATA_FILE, self.seq_len, settings.dtype, self.packing == "bfd")
        packer: packing.StreamPacker | packing.BestFitPacker
        if self.packing == "bfd":
            packer = packing.BestFitPacker(writer, directory / "tokens", settings.pad_token_id)
        else:
            packer = packing.StreamPacker(writer)
        bar = tqdm(
            total=source.num_documents(),
            desc=f"packing {source.name}",
            unit="doc",
            unit_scale=True,
            disable=None if self.progress else True,
        )
        try:
            with bar, packing.Tokenization(settings.json, settings.eos_token_id, self.num_cpu or 1) as tokenization:
                with contextlib.closing(tokenization.map(packing.document_batches(texts))) as results:
                    for batch, ids, lengths in results:
                        if not statistics["tokens"]:
                            self._check_space(source, batch, len(ids), writer.dtype)
                        unfinished = {i for i, text in enumerate(batch) if isinstance(text, packing.Unfinished)}
                        packer.add(ids, lengths, unfinished)
                        ended = len(batch) - len(unfinished)
                        empty = sum(not length and i not in unfinished for i, length in enumerate(lengths))
                        statistics["documents"] += ended - empty
                        statistics["empty_documents"] += empty
                        statistics["tokens"] += len(ids)
                        rate = statistics["tokens"] / (time.monotonic() - begin)
                        bar.set_postfix_str(
                            f"{statistics['tokens'] / 1e6:.1f} M tokens, {rate:.0f} tok/s", refresh=False
                        )
                        bar.update(ended)
                remainder = packer.finish()
            checksum = writer.close()
        except BaseException:
            writer.abandon()
            if self.packing == "bfd":
                packer.abandon()
            raise
        (directory / "tokens").unlink(missing_ok=True)
        counts = {
            "documents": statistics["documents"],
            "empty_documents": statistics["empty_documents"],
            "skipped_documents": statistics["skipped_documents"],
            "repaired_documents": statistics["repaired_documents"],
            "byte_order_marks": statistics["byte_order_marks"],
            "files": statistics["files"],
            "ignored_files": statistics["ignored_files"],
            "tokens": statistics["tokens"],
            "rows": writer.rows,
            "remainder": remainder,
            "padding": packer.padding,
        }
        self._check_balance(source, counts)
        metadata = {
            "format": FORMAT,
            "source": source.name,
            "seq_len": self.seq_len,
            "packing": self.packing,
            "dtype": settings.dtype,
            "rows": writer.rows,
            "rows_per_batch": writer.rows_per_batch,
            "data_bytes": (directory / DATA_FILE).stat().st_size,
            "xxh3_128": checksum,
            "vocab_size": settings.vocab_size,
            "eos_token_id": settings.eos_token_id,
            "pad_token_id": settings.pad_token_id,
            "tokenizer_hash": settings.hash,
            "statistics": counts,
            **source.facts(),
        }
        metadata["metadata_xxh3_128"] = _metadata_checksum(metadata)
        (directory / METADATA_FILE).write_text(json.dumps(metadata, indent=1), encoding="utf-8")
        files.flush_tree(directory)
        summary = f"packed {source.name}: " + ", ".join(f"{value} {name}" for name, value in counts.items() if value)
        _log.info(summary)
        if not bar.disable:
            print(summary.replace("_", " "), file=sys.stderr)
        return digest.hexdigest() if digest is not None else None

    def _check_balance(self, source: Source, counts: dict[str, int]) -> None:
        dropped = f"{counts['empty_documents']} empty and {counts['skipped_documents']} skipped ones were left out"
        if not counts["documents"]:
            raise ValueError(f"DatasetBuilder: {source.name} must hold documents, found none with text; {dropped}")
        if not counts["rows"]:
            raise ValueError(
                f"DatasetBuilder: {source.name} must hold at least seq_len={self.seq_len} tokens, got "
                f"{counts['tokens']} in {counts['documents']} documents; {dropped}. Choose a smaller seq_len, or "
                "packing='bfd', which pads"
            )
        if counts["tokens"] != counts["rows"] * self.seq_len - counts["padding"] + counts["remainder"]:
            raise RuntimeError(f"DatasetBuilder: the count of tokens does not add up, please report this: {counts}")

    def _check_space(self, source: Source, batch: list[str], tokens: int, dtype: str) -> None:
        """Compare the free space with what the whole source will need if it is like its first batch."""
        size = source.size()
        if size is None:
            return
        copies = 2 if self.packing == "bfd" else 1
        self._needed_bytes = (
            int(size * tokens / sum(len(text.encode()) for text in batch)) * np.dtype(dtype).itemsize * copies
        )
        if self._needed_bytes > shutil.disk_usage(self.cache_dir).free:
            raise self._no_space(errno.ENOSPC)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """In the block, what could not be written is said in words: what is needed, what is free, what to do."""
        hidden = files.is_temporary(self.cache_dir.name)  # of a command, which says itself what it cannot write
        explaining = files.writing(self.cache_dir, "packed rows", whole="nothing was kept", remedy=_OTHER_PLACE)
        with contextlib.nullcontext() if hidden else explaining:
            try:
                yield
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or getattr(error, "is_explained", False):
                    raise
                raise self._no_space(error.errno) from error

    def _no_space(self, number: int) -> OSError:
        need = f"about {self._needed_bytes / 1e6:.1f} MB" if self._needed_bytes else "an unknown amount"
        free = shutil.disk_usage(self.cache_dir).free / 1e6
        what = "no space" if number == errno.ENOSPC else "the disk quota leaves no space"
        text = (
            f"DatasetBuilder: {what} for the packed rows, {need} needed, {free:.1f} MB free; nothing was kept. Make "
            f"room there. {_OTHER_PLACE}"
        )
        place = self.cache_dir.parent if files.is_temporary(self.cache_dir.name) else self.cache_dir
        error = OSError(number, text, str(place))
        error.is_explained = True  # type: ignore[attr-defined] (for files.writing)
        return error

    def _upload(self, dataset: PackedDataset) -> None:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError

        try:
            # The hub stores by content: files that it has from an earlier or interrupted upload are not sent again.
            dataset.hf.push_to_hub(self.hf_account_repo)
        except (OSError, ValueError, *HfHubHTTPError.__bases__) as error:  # the bases: the errors of its HTTP client
            token = "" if get_token() else " There is no access token: `hf auth login` stores one, or set HF_TOKEN."
            raise OSError(
                f"DatasetBuilder: cannot upload to {self.hf_account_repo}: {error}.{token} The data set is complete in "
                f"{dataset.path}: build_dataset() again only uploads, and without hf_account_repo opens it"
            ) from error


class PackedDataset(torch.utils.data.Dataset):
    """Rows that `DatasetBuilder` packed, mapped from the disk.

    An item is a dict of tensors of shape (seq_len,):
        input_ids: int64.
        labels: int64, equal to input_ids (a model shifts them); -100 for padding and, with `label_first_token=False`,
            for tokens that follow the end of a document.
        key_start: int32, only with `doc_mask`: the position at which the document of this token starts in the row, as
            `attention` and the models take it.

    Args:
        path: directory of the data set in the cache.
        doc_mask, label_first_token: as in `DatasetBuilder`.

    Attributes:
        path: the directory.
        metadata: what is known about the data set, as in its metadata.json.
        statistics: counts of documents, dropped documents, tokens, rows, left-over tokens and padding.
        seq_len, vocab_size, eos_token_id, pad_token_id, tokenizer_hash: `vocab_size` is the smallest number of
            embeddings that serves all ids of the tokenizer.
        content_checksum: XXH3-128 of the file of rows, which tells data sets apart.
        hf: the same rows as a `datasets.Dataset`.

    Opening it reads no rows: `verify` compares them with the checksum that was taken while they were written.

    Raises:
        ValueError: the directory does not hold a complete data set of this version.
    """

    def __init__(self, path: str | os.PathLike, *, doc_mask: bool = False, label_first_token: bool = True):
        self.path = _absolute(path, "PackedDataset: path")
        self.doc_mask = doc_mask
        self.label_first_token = label_first_token
        self.metadata = _read_metadata(self.path)
        self.statistics: dict[str, int] = self.metadata["statistics"]
        self.seq_len: int = self.metadata["seq_len"]
        self.vocab_size: int = self.metadata["vocab_size"]
        self.eos_token_id: int = self.metadata["eos_token_id"]
        self.pad_token_id: int = self.metadata["pad_token_id"]
        self.tokenizer_hash: str = self.metadata["tokenizer_hash"]
        self._rows_per_batch: int = self.metadata["rows_per_batch"]
        self._batches, self._lengths = _map_rows(self.path / DATA_FILE, self.metadata)

    @cached_property
    def content_checksum(self) -> str:
        return self.metadata.get("xxh3_128") or files.checksum(self.path / DATA_FILE)

    def verify(self) -> bool:
        """Whether the folder records checksums (those of older versions do not); all its bytes are compared with them.

        Raises:
            ValueError: a file has other content than was written; names it. OSError: it cannot be read.
        """
        if "xxh3_128" not in self.metadata:
            return False
        recorded = {DATA_FILE: {"bytes": self.metadata["data_bytes"], "xxh3_128": self.metadata["xxh3_128"]}}
        damages = files.damages(self.path, recorded)
        if self.metadata.get("metadata_xxh3_128") != _metadata_checksum(self.metadata):
            damages.append(f"{METADATA_FILE} has other content than was written (checksum differs)")
        if damages:
            raise ValueError(f"PackedDataset: {self.path} is damaged: {'; '.join(damages)}; build it again")
        return True

    @cached_property
    def hf(self) -> datasets.Dataset:
        import datasets

        return datasets.Dataset.from_file(str(self.path / DATA_FILE))

    def __len__(self) -> int:
        return self.metadata["rows"]

    def __repr__(self) -> str:
        return f"PackedDataset({len(self)} rows of {self.seq_len} ids, {str(self.path)!r})"

    def __reduce__(self):
        # A worker of a DataLoader maps the file again instead of receiving the rows.
        return _reopen, (self.path, self.doc_mask, self.label_first_token)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, torch.Tensor]]:
        """Several items; what a `DataLoader` calls for a batch."""
        indices = [self._check_index(index) for index in indices]
        if not indices:
            return []
        ids = np.empty((len(indices), self.seq_len), dtype=np.int64)
        for row, index in zip(ids, indices, strict=True):
            row[:] = self._row(index)
        columns = {"input_ids": ids, "labels": self._labels(ids, indices)}
        if self.doc_mask:
            columns["key_start"] = document_starts(ids, self.eos_token_id)
        tensors = {name: torch.from_numpy(column).unbind() for name, column in columns.items()}
        return [dict(zip(tensors, row, strict=True)) for row in zip(*tensors.values(), strict=True)]

    def _check_index(self, index: int) -> int:
        position = operator.index(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"PackedDataset: index must be in {-len(self)} ... {len(self) - 1}, got {index}")
        return position

    def _row(self, index: int) -> np.ndarray:
        batch, row = divmod(index, self._rows_per_batch)
        return self._batches[batch][row]

    def _labels(self, ids: np.ndarray, indices: list[int]) -> np.ndarray:
        labels = ids.copy()
        if not self.label_first_token:
            # The first token of a row has no label to speak of: nothing in the row precedes it.
            labels[:, 1:][ids[:, :-1] == self.eos_token_id] = IGNORED_LABEL
        if self._lengths is not None:
            lengths = self._lengths[indices]
            labels[np.arange(self.seq_len) >= lengths[:, None]] = IGNORED_LABEL
        return labels


def document_starts(ids: np.ndarray, eos_token_id: int) -> np.ndarray:
    """For each position, where its document starts: after the last `eos_token_id` before it, else at 0.

    Args:
        ids: (rows, seq_len) integers.
        eos_token_id: the id that ends a document and belongs to it.

    Returns:
        (rows, seq_len) int32, non-decreasing along a row: the `key_start` of `attention`.
    """
    is_start = np.ones(ids.shape, dtype=bool)
    np.equal(ids[:, :-1], eos_token_id, out=is_start[:, 1:])
    starts = np.flatnonzero(is_start)  # of documents, in all rows one after the other
    lengths = np.diff(starts, append=ids.size)
    return np.repeat((starts % ids.shape[1]).astype(np.int32), lengths).reshape(ids.shape)


def default_cache_dir() -> Path:
    """Where data sets are kept if `cache_dir` is not given, an absolute path; see `DatasetBuilder`.

    Raises:
        ValueError: it would be in the home directory, which is not known.
    """
    if chosen := os.environ.get("ANDROMEDA_CACHE"):
        return _absolute(chosen, "DatasetBuilder: ANDROMEDA_CACHE") / "datasets"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    if not os.path.isabs(base) and not base.startswith("~"):
        # So says the specification of that variable.
        warnings.warn(f"XDG_CACHE_HOME must be an absolute path, got {base!r}: it is not used", stacklevel=2)
        base = "~/.cache"
    return _absolute(base, "DatasetBuilder: the cache") / "andromeda" / "datasets"


def _absolute(path: str | os.PathLike, name: str) -> Path:
    """An absolute path, with `~` resolved; what it is relative to is the current directory of now."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{name} must be a path, got {path!r:.80}")
    text = os.fspath(path)
    if not text:
        raise ValueError(f"{name} must not be empty; '.' is the current directory")
    head, slash, tail = text.partition("/")
    if head == "~":
        head = os.environ.get("HOME") or _home_of_account()
        if not os.path.isabs(head):
            raise ValueError(
                f"{name} is in the home directory ({text}), which is not known: HOME is not set to an absolute path "
                "and this user has no account; set ANDROMEDA_CACHE, or pass an absolute path as cache_dir"
            )
    elif head.startswith("~"):
        account, head = head, os.path.expanduser(head)
        if head == account:
            raise ValueError(
                f"{name} must be in the home directory of an account that there is, got {text!r}; a "
                f"folder of that name is './{text}'"
            )
    return Path(os.path.abspath(head + slash + tail))


def _home_of_account() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def _from_here(name):
    """A relative path that exists, as an absolute one: the current directory may be another when it is read."""
    if isinstance(name, (str, os.PathLike)) and os.fspath(name) not in ("", "-") and os.path.exists(name):
        return type(name)(os.path.abspath(name)) if isinstance(name, (str, Path)) else Path(os.path.abspath(name))
    return name


def _reopen(path: Path, doc_mask: bool, label_first_token: bool) -> PackedDataset:
    return PackedDataset(path, doc_mask=doc_mask, label_first_token=label_first_token)


def _read_metadata(path: Path) -> dict:
    try:
        metadata = json.loads((path / METADATA_FILE).read_text(encoding="utf-8"))
        size = (path / DATA_FILE).stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"PackedDataset: {path} must hold {METADATA_FILE} and {DATA_FILE}: {error}") from error
    except (ValueError, RecursionError) as error:  # also of bytes that are not UTF-8
        raise ValueError(f"PackedDataset: {path / METADATA_FILE} must be JSON: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise ValueError(f"PackedDataset: {path / METADATA_FILE} must have format {FORMAT}, got {found!r:.80}")
    if missing := _METADATA_KEYS - metadata.keys():
        raise ValueError(f"PackedDataset: {path / METADATA_FILE} must have {', '.join(sorted(missing))}, got none")
    if size != metadata["data_bytes"]:
        raise ValueError(f"PackedDataset: {path / DATA_FILE} must have {metadata['data_bytes']} bytes, got {size}")
    _check_metadata(metadata, path / METADATA_FILE)
    return metadata


def _check_metadata(metadata: dict, path: Path) -> None:
    """Every number in its range: a wrong one would be read as other rows, or as none, without an error."""

    def check(name: str, is_right: bool, what: str) -> None:
        if not is_right:
            raise ValueError(f"PackedDataset: {path}: {name} must be {what}, got {metadata[name]!r:.80}")

    def is_integer(name: str, least: int, most: int) -> bool:
        value = metadata[name]
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    for name in ("seq_len", "rows_per_batch", "vocab_size"):
        check(name, is_integer(name, 1, 2**32), "an integer from 1 to 2**32")
    check("rows", is_integer("rows", 1, 2**62), "an integer from 1")
    for name in ("eos_token_id", "pad_token_id"):
        check(name, is_integer(name, 0, metadata["vocab_size"] - 1), f"in 0 ... {metadata['vocab_size'] - 1}")
    check("dtype", metadata["dtype"] in ("uint16", "uint32"), "uint16 or uint32")
    check("packing", metadata["packing"] in ("stream", "bfd"), "stream or bfd")
    check("statistics", isinstance(metadata["statistics"], dict), "an object")
    check("tokenizer_hash", isinstance(metadata["tokenizer_hash"], str), "a string")


def _metadata_checksum(metadata: dict) -> str:
    """XXH3-128 of all of it but this checksum itself."""
    rest = {name: value for name, value in metadata.items() if name != "metadata_xxh3_128"}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())


def _map_rows(path: Path, metadata: dict) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Views (rows, seq_len) of the ids of each record batch, and the lengths of padded rows."""
    import pyarrow

    expected = packing.row_schema(metadata["seq_len"], metadata["dtype"], metadata["packing"] == "bfd")
    try:
        reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        if not reader.schema.equals(expected):
            raise ValueError(f"PackedDataset: {path} must have the columns {expected}, got {reader.schema}")
        batches = list(reader)
        for batch in batches:
            batch.validate()  # a length that is not true would lead beyond the file, and the process to its end
        rows = [batch.column(0).flatten().to_numpy().reshape(-1, metadata["seq_len"]) for batch in batches]
        lengths = None
        if metadata["packing"] == "bfd":
            lengths = np.concatenate([np.empty(0, np.int32), *(batch.column("length").to_numpy() for batch in batches)])
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the disk; Arrow's own have none
            raise
        raise ValueError(f"PackedDataset: {path} must be an Arrow stream: {error}") from error
    found = sum(map(len, rows))
    if found != metadata["rows"] or any(len(batch) != metadata["rows_per_batch"] for batch in rows[:-1]):
        raise ValueError(f"PackedDataset: {path} must hold {metadata['rows']} rows, got {found}")
    if lengths is not None and not (
        len(lengths) == found and 0 < lengths.min() <= lengths.max() <= metadata["seq_len"]
    ):
        raise ValueError(f"PackedDataset: {path} must have lengths of 1 to {metadata['seq_len']} in each row")
    return rows, lengths


# The cache: locks and names


def _install(temporary: Path, path: Path) -> None:
    """Give a complete directory its name. Two builders of one name wrote the same: either may win."""
    for _ in range(10):
        try:
            os.rename(temporary, path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # What has the name is damaged, or has just been written by another builder: out of the way with it.
        with files.temporary_folder(path.parent, _BUILDING) as trash, contextlib.suppress(FileNotFoundError):
            os.rename(path, trash / "replaced")
    else:
        raise OSError(errno.EEXIST, "DatasetBuilder: other processes keep replacing the data set", str(path))
    files.flush(path.parent)


def _is_complete(path: Path) -> bool:
    try:
        PackedDataset(path).verify()
    except (OSError, ValueError):
        return False
    return True


# Helpers of the build


class _TokenizerSettings(NamedTuple):
    json: str
    hash: str
    eos_token_id: int
    pad_token_id: int  # the end-of-sequence id where there is no padding token
    vocab_size: int
    dtype: str


def _tokenizer_settings(tokenizer) -> _TokenizerSettings:
    import tokenizers
    from transformers import PreTrainedTokenizerBase

    if isinstance(tokenizer, (str, os.PathLike, tokenizers.Tokenizer)):
        tokenizer = AndromedaTokenizer(tokenizer)
    if isinstance(tokenizer, AndromedaTokenizer):
        tokenizer = tokenizer.tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            "DatasetBuilder: tokenizer must be a name, a path or a tokenizer of andromeda, transformers or tokenizers, "
            f"got {type(tokenizer).__name__}"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(
            f"DatasetBuilder: tokenizer must be a fast one (of the tokenizers package), got {type(tokenizer).__name__}"
        )
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            "DatasetBuilder: tokenizer must have an end-of-sequence token, got none; set its eos_token, or pass "
            "AndromedaTokenizer(tokenizer), which adds <eos>"
        )
    text = packing.packing_tokenizer_json(backend)
    vocab_size = max(len(tokenizer), max(backend.get_vocab().values()) + 1)
    return _TokenizerSettings(
        json=text,
        hash=hashlib.sha256(f"{eos} {tokenizer.pad_token_id} {text}".encode()).hexdigest(),
        eos_token_id=eos,
        pad_token_id=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        vocab_size=vocab_size,
        dtype="uint16" if vocab_size <= 65535 else "uint32",
    )


def _hashed(texts: Iterable[str], digest) -> Iterator[str]:
    for text in texts:
        data = text.encode()
        digest.update((len(data) | isinstance(text, packing.Unfinished) << 63).to_bytes(8, "little"))
        digest.update(data)
        yield text
