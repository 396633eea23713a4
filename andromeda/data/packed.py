"""PackedDataset: rows of token ids on the disk, read as a data set of torch."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from andromeda import files
from andromeda.data.cache import DATA_FILE, METADATA_FILE, absolute, metadata_checksum, read_metadata
from andromeda.data.packing import row_schema

if TYPE_CHECKING:
    import datasets

IGNORED_LABEL = -100


class PackedDataset(torch.utils.data.Dataset):
    """Rows that `DatasetBuilder` packed, mapped from the disk.

    An item is a dict of tensors of shape (seq_len,):
        input_ids: int64.
        labels: int64, equal to input_ids (a model shifts them); -100 for padding and, with `label_first_token=False`,
            for tokens that follow the end of a document.
        key_start: int32, only with `doc_mask`: the position in the row at which the document of this token starts, in
            the form that `attention` and the models take.

    Args:
        path: directory of the data set in the cache.
        doc_mask, label_first_token: as in `DatasetBuilder`.

    Attributes:
        path: the directory.
        metadata: the content of its metadata.json.
        statistics: counts of documents, dropped documents, tokens, rows, left-over tokens and padding.
        seq_len, vocab_size, eos_token_id, pad_token_id, tokenizer_hash: `vocab_size` is the smallest number of
            embeddings that is enough for all ids of the tokenizer.
        content_checksum: XXH3-128 of the file of rows, which identifies the data set.
        hf: the same rows as a `datasets.Dataset`.

    Opening a data set reads no rows; `verify` compares all of them with the checksum taken while they were written.

    Raises:
        ValueError: the directory does not hold a complete data set of this version.
    """

    def __init__(self, path: str | os.PathLike, *, doc_mask: bool = False, label_first_token: bool = True):
        self.path = absolute(path, "PackedDataset: path")
        self.doc_mask = doc_mask
        self.label_first_token = label_first_token
        self.metadata = read_metadata(self.path)
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
        """Compare all bytes of the folder with the checksums in it.

        Returns:
            False if the folder has no checksums, as in older versions, else True.

        Raises:
            ValueError: the content of a file has changed since it was written; names the file.
            OSError: a file cannot be read.
        """
        if "xxh3_128" not in self.metadata:
            return False
        recorded = {DATA_FILE: {"bytes": self.metadata["data_bytes"], "xxh3_128": self.metadata["xxh3_128"]}}
        damages = files.damages(self.path, recorded)
        if self.metadata.get("metadata_xxh3_128") != metadata_checksum(self.metadata):
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

    def __reduce__(self) -> tuple[Callable[[Path, bool, bool], PackedDataset], tuple[Path, bool, bool]]:
        # A worker of a DataLoader maps the file again; the rows are not sent to it.
        return _reopen, (self.path, self.doc_mask, self.label_first_token)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Iterable[int]) -> list[dict[str, torch.Tensor]]:
        """Several items at once; a `DataLoader` calls this for a batch."""
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
            # The first token of a row keeps its label, which no model uses: nothing in the row precedes that token.
            labels[:, 1:][ids[:, :-1] == self.eos_token_id] = IGNORED_LABEL
        if self._lengths is not None:
            lengths = self._lengths[indices]
            labels[np.arange(self.seq_len) >= lengths[:, None]] = IGNORED_LABEL
        return labels


def document_starts(ids: np.ndarray, eos_token_id: int) -> np.ndarray:
    """The start of the document of each position: the position after the last `eos_token_id` before it, or 0.

    Args:
        ids: (rows, seq_len) integers.
        eos_token_id: the id that ends a document and belongs to it.

    Returns:
        (rows, seq_len) int32, non-decreasing along a row: the `key_start` of `attention`.
    """
    is_start = np.ones(ids.shape, dtype=bool)
    np.equal(ids[:, :-1], eos_token_id, out=is_start[:, 1:])
    starts = np.flatnonzero(is_start)  # of documents, in the concatenation of all rows
    lengths = np.diff(starts, append=ids.size)
    return np.repeat((starts % ids.shape[1]).astype(np.int32), lengths).reshape(ids.shape)


def _reopen(path: Path, doc_mask: bool, label_first_token: bool) -> PackedDataset:
    return PackedDataset(path, doc_mask=doc_mask, label_first_token=label_first_token)


def _map_rows(path: Path, metadata: dict[str, Any]) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Views (rows, seq_len) of the ids of each record batch, and the lengths of padded rows."""
    import pyarrow

    expected = row_schema(metadata["seq_len"], metadata["dtype"], metadata["packing"] == "bfd")
    try:
        reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
        if not reader.schema.equals(expected):
            raise ValueError(f"PackedDataset: {path} must have the columns {expected}, got {reader.schema}")
        batches = list(reader)
        for batch in batches:
            batch.validate()  # with a wrong length, reads beyond the file would end the process
        rows = [batch.column(0).flatten().to_numpy().reshape(-1, metadata["seq_len"]) for batch in batches]
        lengths = None
        if metadata["packing"] == "bfd":
            lengths = np.concatenate([np.empty(0, np.int32), *(batch.column("length").to_numpy() for batch in batches)])
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # a disk error; errors of Arrow have no number
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
