"""Token ids to rows of equal length, written as an Arrow stream.

token ids -> StreamPacker | BestFitPacker -> RowWriter
"""

from __future__ import annotations

import contextlib
import errno
import os
from array import array
from collections.abc import Collection
from io import FileIO
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import pyarrow

BLOCK_BYTES = 4 << 20  # rows are written, and later mapped, in record batches of about this size


def row_schema(seq_len: int, dtype: str, with_length: bool) -> pyarrow.Schema:
    """The schema of the rows of a `RowWriter`."""
    import pyarrow

    fields = {"input_ids": pyarrow.list_(pyarrow.type_for_alias(dtype), seq_len)}
    if with_length:
        fields["length"] = pyarrow.int32()
    return pyarrow.schema(fields)


class RowWriter:
    """Writes rows of `seq_len` ids to an Arrow stream with one column `input_ids`, a list of fixed size.

    Args:
        path: file to create.
        seq_len: ids per row.
        dtype: "uint16" or "uint32".
        with_length: add a column `length` (int32), the number of ids before the padding.
    """

    def __init__(self, path: str | os.PathLike, seq_len: int, dtype: str, with_length: bool = False):
        import pyarrow

        self.seq_len = seq_len
        self.dtype = dtype
        self.rows = 0
        self.rows_per_batch = max(1, BLOCK_BYTES // (seq_len * 2))
        self._schema = row_schema(seq_len, dtype, with_length)
        self._file = _HashedFile(path)
        self._stream = pyarrow.ipc.new_stream(self._file, self._schema)

    def write(self, rows: np.ndarray, lengths: np.ndarray | None = None) -> None:
        """Append rows as one record batch.

        Args:
            rows: (count, seq_len) of the writer's dtype, dense. All batches but the last must have `rows_per_batch`
                rows, because readers find a row by division.
            lengths: (count,) int32, with `with_length`.
        """
        import pyarrow

        columns = [pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), self.seq_len)]
        if lengths is not None:
            columns.append(pyarrow.array(lengths))
        self._stream.write_batch(pyarrow.record_batch(columns, schema=self._schema))
        self.rows += len(rows)

    def close(self) -> str:
        """Finish the stream and sync it to the disk. Returns the XXH3-128 of the file, in hexadecimal."""
        self._stream.close()
        return self._file.finish()

    def abandon(self) -> None:
        """Close the file of a failed build; the caller deletes it."""
        with contextlib.suppress(OSError):  # the build may have failed because nothing can be written
            self._file.close()


class _HashedFile:
    """A new file and the checksum of the bytes written to it, which later reveals damage on the way to the disk."""

    def __init__(self, path: str | os.PathLike):
        import xxhash

        self._file = open(path, "xb")  # noqa: SIM115 (closed by close)
        self._state = xxhash.xxh3_128()
        self.close = self._file.close
        self.flush = self._file.flush

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data: bytes | memoryview) -> int:
        self._state.update(data)
        return self._file.write(data)

    def finish(self) -> str:
        self.flush()
        os.fsync(self._file.fileno())
        self.close()
        return self._state.hexdigest()


class Packer(Protocol):
    """Makes rows from the ids of documents.

    Attributes:
        padding: ids of padding written so far.
    """

    padding: int

    def add(self, ids: array[int], lengths: array[int], unfinished: Collection[int] = ()) -> None:
        """Take documents and pieces of documents.

        Args:
            ids: uint32, all documents one after the other.
            lengths: ids of each document or piece.
            unfinished: indices of the pieces that are continued by the next one.
        """

    def finish(self) -> int:
        """Write the remaining rows; return the number of ids that are left out."""

    def abandon(self) -> None:
        """Close the files of a failed build; the caller deletes them."""


class StreamPacker:
    """A `Packer`: rows cut from one endless stream of documents, without padding.

    Ids that do not fill a row wait for the next batch; only those that do not fill the last row are left out.
    """

    padding = 0

    def __init__(self, writer: RowWriter):
        self._writer = writer
        self._block = np.empty((writer.rows_per_batch, writer.seq_len), dtype=writer.dtype)
        self._flat = self._block.reshape(-1)
        self._filled = 0

    def add(self, ids: array[int], lengths: array[int], unfinished: Collection[int] = ()) -> None:
        rest = np.frombuffer(ids, dtype="uint32")
        while len(rest):
            count = min(len(rest), len(self._flat) - self._filled)
            self._flat[self._filled : self._filled + count] = rest[:count]
            self._filled += count
            rest = rest[count:]
            if self._filled == len(self._flat):
                self._writer.write(self._block)
                self._filled = 0

    def finish(self) -> int:
        rows, remainder = divmod(self._filled, self._writer.seq_len)
        if rows:
            self._writer.write(self._block[:rows])
        return remainder

    def abandon(self) -> None:
        pass  # this packer has no file of its own


class BestFitPacker:
    """A `Packer`: rows of whole documents, padded at the end.

    Best-fit decreasing (Ding et al. 2024, arXiv:2404.10830) chooses the documents of each row. A document longer than a
    row is cut into full rows and a rest. Ids wait in the file `spool_path` until all lengths are known. Rows are in the
    order of their first documents.
    """

    def __init__(self, writer: RowWriter, spool_path: str | os.PathLike, pad_token_id: int):
        self.padding = 0
        self._writer = writer
        self._pad_token_id = pad_token_id
        self._spool = open(spool_path, "x+b", buffering=0)  # noqa: SIM115 (closed by finish)
        self._lengths = array("q")  # of documents
        self._started = 0  # ids so far of the unfinished document

    def add(self, ids: array[int], lengths: array[int], unfinished: Collection[int] = ()) -> None:
        _write_all(self._spool, np.frombuffer(ids, dtype="uint32").astype(self._writer.dtype).tobytes())
        for index, length in enumerate(lengths):
            self._started += length
            if index not in unfinished and self._started:
                self._lengths.append(self._started)
                self._started = 0

    def finish(self) -> int:
        """Write all rows; return 0, because no id is left out."""
        seq_len = self._writer.seq_len
        if not self._lengths:
            self._spool.close()
            return 0
        starts, sizes = cut_documents(np.frombuffer(self._lengths, dtype="int64"), seq_len)
        row_of_piece = best_fit_decreasing(sizes, seq_len)
        order = np.argsort(row_of_piece, kind="stable")  # the pieces of each row, in the order of the documents
        pieces_per_row = np.bincount(row_of_piece)
        del row_of_piece
        end_of_row = np.cumsum(pieces_per_row)
        begin_of_row = end_of_row - pieces_per_row
        row_order = np.argsort(order[begin_of_row])
        per_batch = self._writer.rows_per_batch
        for first in range(0, len(row_order), per_batch):
            chosen = row_order[first : first + per_batch]
            rows = np.full((len(chosen), seq_len), self._pad_token_id, dtype=self._writer.dtype)
            lengths = np.zeros(len(chosen), dtype="int32")
            for index, row in enumerate(chosen.tolist()):
                end = 0
                for piece in order[begin_of_row[row] : end_of_row[row]].tolist():
                    size = int(sizes[piece])
                    self._read_ids(int(starts[piece]), rows[index, end : end + size])
                    end += size
                lengths[index] = end
            self._writer.write(rows, lengths)
            self.padding += len(chosen) * seq_len - int(lengths.sum())
        self._spool.close()
        return 0

    def _read_ids(self, start: int, out: np.ndarray) -> None:
        """Fill `out` with ids of the spool. A mapping of the spool would count as memory of this process."""
        view = out.data.cast("B")
        self._spool.seek(start * out.itemsize)
        while view:
            count = self._spool.readinto(view)
            if not count:
                raise OSError(errno.EIO, "DatasetBuilder: somebody cut the file of tokens short", self._spool.name)
            view = view[count:]

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._spool.close()


def _write_all(file: FileIO, data: bytes) -> None:
    """Write all data to an unbuffered file, whose `write` may take only a part of it."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def cut_documents(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut consecutive documents of the given lengths into pieces of at most `capacity`.

    Args:
        lengths: (documents,) int64, > 0.
        capacity: size of a row.

    Returns:
        starts, sizes: (pieces,) int64, in order; only the last piece of a document is smaller than `capacity`.
    """
    pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    index_in_document = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = index_in_document * capacity
    sizes = np.minimum(lengths[document] - offset, capacity)
    starts = (np.cumsum(lengths) - lengths)[document] + offset
    return starts, sizes


def best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each item: from the largest item down, the fullest bin that has room, or a new one.

    Args:
        sizes: (items,) integers, 1 <= size <= capacity.
        capacity: size of a bin.

    Returns:
        (items,) int64 numbers of bins, counted from 0.
    """
    sizes = np.asarray(sizes, dtype="int64")
    bins = np.empty(len(sizes), dtype="int64")
    full = sizes == capacity  # most pieces of long documents; each gets its own bin, before the others
    num_bins = int(np.count_nonzero(full))
    bins[full] = np.arange(num_bins)
    bins_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when some bin has room r: the best fit is the lowest set bit from `size` on
    order = np.argsort(-sizes, kind="stable")[num_bins:]
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            bin_number = bins_with_room[room].pop()
            if not bins_with_room[room]:
                rooms ^= 1 << room
        else:
            room, bin_number = capacity, num_bins
            num_bins += 1
        bins[item] = bin_number
        if room > size:
            bins_with_room[room - size].append(bin_number)
            rooms |= 1 << (room - size)
    return bins
