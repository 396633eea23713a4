"""DatasetBuilder: documents to cached rows of token ids."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from andromeda import files
from andromeda.data import cache
from andromeda.data.cleaning import clean
from andromeda.data.packed import PackedDataset
from andromeda.data.packing import BestFitPacker, Packer, RowWriter, StreamPacker
from andromeda.data.pieces import Seams, in_parts, pieces
from andromeda.data.sources import Source, check_name, glob_patterns, open_source
from andromeda.data.tokenizer import AndromedaTokenizer
from andromeda.data.workers import Tokenization, Unfinished, document_batches, packing_tokenizer_json

if TYPE_CHECKING:
    import datasets
    import tokenizers
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerBase

    TokenizerLike = str | os.PathLike | AndromedaTokenizer | tokenizers.Tokenizer | PreTrainedTokenizerBase

_OTHER_PLACE = "Another place can be chosen with cache_dir, ANDROMEDA_CACHE or --out"
_log = logging.getLogger(__name__)


class DatasetBuilder:
    """Pack documents into rows of `seq_len` token ids and keep them in a cache.

        dataset = DatasetBuilder("books/", seq_len=8192, tokenizer="tokenizer/").build_dataset()
        dataset[0]["input_ids"]  # (8192,) int64

    Args:
        dataset_name: the documents to pack.
            * a directory: all files of known kinds below it, in the order of their names, without hidden ones;
              links are followed, and a file is read once. Plain text and source code are one document per file. A
              directory that `Dataset.save_to_disk` wrote is opened as that data set.
            * a file: json, jsonl, parquet, csv, tsv or arrow with one document per record; anything else is one
              document of plain text, unless its content is a table or JSON lines. gzip, bzip2, xz and zstd are
              unpacked on the way. Archives, pictures and other binary files are refused.
            * a pipe, or "-" for standard input, read once and therefore not looked up in the cache first.
            * the name of a data set on the Hugging Face hub.
            * a `datasets.Dataset`, or an `IterableDataset`, which every build reads again.
        seq_len: ids per row.
        num_cpu: processes that tokenise. None or 1: this process, whose tokenizer uses all cores by itself; more: that
            many workers of one thread each. The rows do not depend on it.
        hf_account_repo: repository on the hub, `owner/name`, to upload the rows to.
        tokenizer: name, directory or tokenizer.json, read as `AndromedaTokenizer` does; or a tokenizer object, which
            must have an end-of-sequence token and is not changed.
        text_column: column that holds the documents. Default: `text`, else the only column that may be text. This is a
            column of strings, categories, lists or objects, or one that is empty in the first records, but not of
            numbers or times. All files of a source must have the column.
        split: split of a hub data set or `DatasetDict` (default "train").
        packing: "stream" cuts rows from the stream of all documents: no padding, only the last remainder (< seq_len
            ids) is left out. "bfd" keeps documents whole where they fit into a row (best-fit decreasing) and pads.
        doc_mask: items also hold `key_start`, with which attention does not look beyond the start of a document.
        label_first_token: whether the first token of a document should be predicted from the end of the previous
            document; if not, its label is -100.
        errors: treatment of bytes that are not UTF-8, NUL characters and lone surrogates. "strict" raises with file and
            position; "replace" puts U+FFFD in their place, "skip" leaves the document out, and both count such
            documents. More than 5 % of such bytes in a file are an error in any case.
        include, exclude: patterns as in a shell, or one, for the files of a directory: `*.py` for a name, `tests` for
            a folder, `docs/*.md` for a path below the directory. With `include`, only matching files are read, whatever
            their kind.
        separator: text between two documents in plain text, such as "<|endoftext|>".
        format: "text", "json", "jsonl", "csv", "tsv", "parquet" or "arrow": the format of all files, whatever their
            names.
        cache_dir: the folder of built data sets. Default: $ANDROMEDA_CACHE/datasets, else
            $XDG_CACHE_HOME/andromeda/datasets, else ~/.cache/andromeda/datasets. Relative paths, here and in the other
            arguments, start at the directory that is current when the builder is made.
        progress: show a progress bar if stderr is a terminal.

    The end-of-sequence id follows each document and occurs nowhere else: text that spells that token, or another
    special token, stays text, as in `AndromedaTokenizer`. Empty and white-space documents are dropped and counted, and
    a byte order mark at the start of a file is removed.

    The cache key consists of the source (paths, sizes and modification times, or the fingerprint of a `Dataset`), the
    tokenizer and the arguments that change rows. A build appears in the cache complete or not at all; a later build
    removes the files of an interrupted one. A data set whose bytes have changed is built again, with a warning. Memory
    holds a few megabytes of text, never the corpus, and a whole long document only if the tokenizer treats it as one
    word (`andromeda.data.pieces.Seams`).

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    def __init__(
        self,
        dataset_name: str | os.PathLike | datasets.Dataset | datasets.IterableDataset | datasets.DatasetDict,
        seq_len: int = 8192,
        num_cpu: int | None = None,
        hf_account_repo: str | None = None,
        tokenizer: TokenizerLike = "EleutherAI/gpt-neox-20b",
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
        for name, count in (("seq_len", seq_len), ("num_cpu", 1 if num_cpu is None else num_cpu)):
            if isinstance(count, bool) or not isinstance(count, int):
                raise TypeError(f"DatasetBuilder: {name} must be an integer, got {count!r}")
            if count < 1:
                raise ValueError(f"DatasetBuilder: {name} must be at least 1, got {count}")
        for name, choice, known in (
            ("packing", packing, ("stream", "bfd")),
            ("errors", errors, ("strict", "replace", "skip")),
        ):
            if choice not in known:
                raise ValueError(f"DatasetBuilder: {name} must be one of {', '.join(known)}, got {choice!r}")
        for name, text in (("hf_account_repo", hf_account_repo), ("text_column", text_column), ("split", split)):
            if text is not None and not (isinstance(text, str) and text):
                raise TypeError(f"DatasetBuilder: {name} must be a non-empty string or None, got {text!r}")
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
        self.include = glob_patterns(include, "include")
        self.exclude = glob_patterns(exclude, "exclude")
        self.separator = separator
        self.format = format
        self.cache_dir = (
            cache.default_cache_dir() if cache_dir is None else cache.absolute(cache_dir, "DatasetBuilder: cache_dir")
        )
        self.progress = progress
        self._needed_bytes = 0  # space on the disk, estimated during a build

    def build_dataset(self) -> PackedDataset:
        """Open the data set from the cache, build it first if it is not there, and upload it if a repository is given.

        Returns:
            `PackedDataset`, a `torch.utils.data.Dataset`; its `statistics` count the kept and dropped documents.

        Raises:
            ValueError: the source has fewer tokens than one row (with packing "stream"), no documents, no unambiguous
                text column, or malformed text or records; names file and position.
            FileNotFoundError: there is no such path.
            OSError: by an estimate made first, the disk is too small for the rows; the cache cannot be written; the hub
                cannot be reached; or the upload failed. In the last case the data set is complete in the cache, and
                another call only uploads it.
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
            "format": cache.FORMAT,
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
            warnings.warn(f"DatasetBuilder: a damaged data set in the cache is built again: {error}", stacklevel=3)
            return None

    def _build(self, source: Source, settings: _TokenizerSettings, fingerprint: str | None) -> PackedDataset:
        with self._write_errors():
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with files.temporary_folder(self.cache_dir, cache.BUILDING) as temporary:
                fingerprint = self._write(source, settings, fingerprint, temporary)
                path = self._cache_path(source, settings, fingerprint)
                if not _is_complete(path):  # another builder may have finished first
                    cache.install(temporary, path)
        return PackedDataset(path, doc_mask=self.doc_mask, label_first_token=self.label_first_token)

    def _write(self, source: Source, settings: _TokenizerSettings, fingerprint: str | None, directory: Path) -> str:
        """Write the data and its metadata into `directory`.

        Returns:
            The fingerprint; if there is none, a hash of the texts.
        """
        from tqdm import tqdm

        statistics: Counter[str] = Counter()
        digest = hashlib.sha256()
        texts = in_parts(clean(source.documents(statistics), self.errors, statistics))
        if fingerprint is None:
            texts = _hashed(texts, digest)
        texts = pieces(texts, Seams(settings.json))
        writer = RowWriter(directory / cache.DATA_FILE, self.seq_len, settings.dtype, self.packing == "bfd")
        packer: Packer
        if self.packing == "bfd":
            packer = BestFitPacker(writer, directory / "tokens", settings.pad_token_id)
        else:
            packer = StreamPacker(writer)
        bar = tqdm(
            total=source.num_documents(),
            desc=f"packing {source.name}",
            unit="doc",
            unit_scale=True,
            disable=None if self.progress else True,
        )
        try:
            with bar:
                self._pack(source, settings, texts, packer, statistics, bar)
                remainder = packer.finish()
            checksum = writer.close()
        except BaseException:
            writer.abandon()
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
        metadata: dict[str, Any] = {
            "format": cache.FORMAT,
            "source": source.name,
            "seq_len": self.seq_len,
            "packing": self.packing,
            "dtype": settings.dtype,
            "rows": writer.rows,
            "rows_per_batch": writer.rows_per_batch,
            "data_bytes": (directory / cache.DATA_FILE).stat().st_size,
            "xxh3_128": checksum,
            "vocab_size": settings.vocab_size,
            "eos_token_id": settings.eos_token_id,
            "pad_token_id": settings.pad_token_id,
            "tokenizer_hash": settings.hash,
            "statistics": counts,
            **source.facts(),
        }
        metadata["metadata_xxh3_128"] = cache.metadata_checksum(metadata)
        (directory / cache.METADATA_FILE).write_text(json.dumps(metadata, indent=1), encoding="utf-8")
        files.flush_tree(directory)
        summary = f"packed {source.name}: " + ", ".join(f"{value} {name}" for name, value in counts.items() if value)
        _log.info(summary)
        if not bar.disable:
            print(summary.replace("_", " "), file=sys.stderr)
        return digest.hexdigest() if fingerprint is None else fingerprint

    def _pack(
        self,
        source: Source,
        settings: _TokenizerSettings,
        texts: Iterable[str],
        packer: Packer,
        statistics: Counter[str],
        bar: tqdm,
    ) -> None:
        """Tokenise the texts and hand the ids to the packer; count documents and tokens."""
        begin = time.monotonic()
        with (
            Tokenization(settings.json, settings.eos_token_id, self.num_cpu or 1) as tokenization,
            contextlib.closing(tokenization.map(document_batches(texts))) as results,
        ):
            for batch, ids, lengths in results:
                if not statistics["tokens"]:
                    self._check_space(source, batch, len(ids), settings.dtype)
                unfinished = {i for i, text in enumerate(batch) if isinstance(text, Unfinished)}
                packer.add(ids, lengths, unfinished)
                ended = len(batch) - len(unfinished)
                empty = sum(not length and i not in unfinished for i, length in enumerate(lengths))
                statistics["documents"] += ended - empty
                statistics["empty_documents"] += empty
                statistics["tokens"] += len(ids)
                rate = statistics["tokens"] / (time.monotonic() - begin)
                bar.set_postfix_str(f"{statistics['tokens'] / 1e6:.1f} M tokens, {rate:.0f} tok/s", refresh=False)
                bar.update(ended)

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
        """Raise unless the disk has room for the whole source, assuming that the rest resembles the first batch."""
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
        """Explain errors of writing in the block: the space needed, the space free, and the remedy."""
        hidden = files.is_temporary(self.cache_dir.name)  # the folder of a command, which explains its own errors
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
        problem = "no space" if number == errno.ENOSPC else "the disk quota leaves no space"
        text = (
            f"DatasetBuilder: {problem} for the packed rows, {need} needed, {free:.1f} MB free; nothing was kept. Make "
            f"room there. {_OTHER_PLACE}"
        )
        place = self.cache_dir.parent if files.is_temporary(self.cache_dir.name) else self.cache_dir
        error = OSError(number, text, str(place))
        error.is_explained = True  # type: ignore[attr-defined]  # the mark that files.writing looks for
        return error

    def _upload(self, dataset: PackedDataset) -> None:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HfHubHTTPError

        # The bases of HfHubHTTPError are the errors of its HTTP client.
        failures: tuple[type[Exception], ...] = (OSError, ValueError, *HfHubHTTPError.__bases__)
        try:
            # The hub stores by content: files that it already has, even from an interrupted upload, are not sent again.
            dataset.hf.push_to_hub(self.hf_account_repo)
        except failures as error:
            token = "" if get_token() else " There is no access token: `hf auth login` stores one, or set HF_TOKEN."
            raise OSError(
                f"DatasetBuilder: cannot upload to {self.hf_account_repo}: {error}.{token} The data set is complete in "
                f"{dataset.path}: build_dataset() again only uploads, and without hf_account_repo opens it"
            ) from error


_Name = TypeVar("_Name")


def _from_here(name: _Name) -> _Name | str | Path:
    """An existing path as an absolute one, because the current directory may change before it is read."""
    given: object = name
    if isinstance(given, (str, os.PathLike)) and os.fspath(given) not in ("", "-") and os.path.exists(given):
        path = os.path.abspath(given)
        return path if isinstance(given, str) else Path(path)
    return name


def _is_complete(path: Path) -> bool:
    try:
        PackedDataset(path).verify()
    except (OSError, ValueError):
        return False
    return True


class _TokenizerSettings(NamedTuple):
    json: str
    hash: str
    eos_token_id: int
    pad_token_id: int  # the end-of-sequence id if there is no padding token
    vocab_size: int
    dtype: str


def _tokenizer_settings(tokenizer: TokenizerLike) -> _TokenizerSettings:
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
    text = packing_tokenizer_json(backend)
    vocab_size = max(len(tokenizer), max(backend.get_vocab().values()) + 1)
    return _TokenizerSettings(
        json=text,
        hash=hashlib.sha256(f"{eos} {tokenizer.pad_token_id} {text}".encode()).hexdigest(),
        eos_token_id=eos,
        pad_token_id=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        vocab_size=vocab_size,
        dtype="uint16" if vocab_size <= 65535 else "uint32",
    )


def _hashed(texts: Iterable[str], digest: hashlib._Hash) -> Iterator[str]:
    """The texts, each added to `digest` on the way, with its length and whether it is `Unfinished`."""
    for text in texts:
        data = text.encode()
        digest.update((len(data) | isinstance(text, Unfinished) << 63).to_bytes(8, "little"))
        digest.update(data)
        yield text
