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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from andromeda import files
from andromeda.data import cache
from andromeda.data.cleaning import clean
from andromeda.data.packed import PackedDataset
from andromeda.data.packing import BestFitPacker, RowWriter, StreamPacker
from andromeda.data.pieces import Seams, in_parts, pieces
from andromeda.data.sources import Source, check_name, glob_patterns, open_source
from andromeda.data.tokenizer import AndromedaTokenizer
from andromeda.data.workers import Tokenization, Unfinished, document_batches, packing_tokenizer_json

if TYPE_CHECKING:
    import datasets

_OTHER_PLACE = "Another place can be chosen with cache_dir, ANDROMEDA_CACHE or --out"
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
    all of it (`andromeda.data.pieces.Seams`).

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
        self.include = glob_patterns(include, "include")
        self.exclude = glob_patterns(exclude, "exclude")
        self.separator = separator
        self.format = format
        self.cache_dir = (
            cache.default_cache_dir() if cache_dir is None else cache.absolute(cache_dir, "DatasetBuilder: cache_dir")
        )
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
            warnings.warn(f"DatasetBuilder: building again what is damaged in the cache: {error}", stacklevel=3)
            return None

    def _build(self, source: Source, settings: _TokenizerSettings, fingerprint: str | None) -> PackedDataset:
        with self._write_errors():
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            with files.temporary_folder(self.cache_dir, cache.BUILDING) as temporary:
                content_hash = self._write(source, settings, fingerprint, temporary)
                path = self._cache_path(source, settings, fingerprint or content_hash)
                if not _is_complete(path):  # another builder may have been faster
                    cache.install(temporary, path)
        return PackedDataset(path, doc_mask=self.doc_mask, label_first_token=self.label_first_token)

    def _write(
        self, source: Source, settings: _TokenizerSettings, fingerprint: str | None, directory: Path
    ) -> str | None:
        """Write the data and its metadata into `directory`. Returns a hash of the texts if there is no fingerprint."""
        from tqdm import tqdm

        begin = time.monotonic()
        statistics: Counter = Counter()
        texts = in_parts(clean(source.documents(statistics), self.errors, statistics))
        digest = hashlib.sha256() if fingerprint is None else None
        if digest is not None:
            texts = _hashed(texts, digest)
        texts = pieces(texts, Seams(settings.json))
        writer = RowWriter(directory / cache.DATA_FILE, self.seq_len, settings.dtype, self.packing == "bfd")
        packer: StreamPacker | BestFitPacker
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
            with bar, Tokenization(settings.json, settings.eos_token_id, self.num_cpu or 1) as tokenization:
                with contextlib.closing(tokenization.map(document_batches(texts))) as results:
                    for batch, ids, lengths in results:
                        if not statistics["tokens"]:
                            self._check_space(source, batch, len(ids), writer.dtype)
                        unfinished = {i for i, text in enumerate(batch) if isinstance(text, Unfinished)}
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


def _from_here(name):
    """A relative path that exists, as an absolute one: the current directory may be another when it is read."""
    if isinstance(name, (str, os.PathLike)) and os.fspath(name) not in ("", "-") and os.path.exists(name):
        return type(name)(os.path.abspath(name)) if isinstance(name, (str, Path)) else Path(os.path.abspath(name))
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


def _hashed(texts: Iterable[str], digest) -> Iterator[str]:
    for text in texts:
        data = text.encode()
        digest.update((len(data) | isinstance(text, Unfinished) << 63).to_bytes(8, "little"))
        digest.update(data)
        yield text
