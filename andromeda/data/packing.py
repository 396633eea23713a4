"""From token ids to rows: pack, write Arrow.

    token ids -> StreamPacker | BestFitPacker -> RowWriter

What does not fill a row is carried to the next batch.
"""

from __future__ import annotations

import contextlib
import errno
import os
from array import array
from collections.abc import Collection

BLOCK_BYTES = 4 << 20  # rows are written, and later mapped, in record batches of about this size


def row_schema(seq_len: int, dtype: str, with_length: bool):
    """The `pyarrow.Schema` of rows; see `RowWriter`."""
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
        self._arrow = pyarrow
        self._schema = row_schema(seq_len, dtype, with_length)
        self._file = _HashedFile(path)
        self._stream = pyarrow.ipc.new_stream(self._file, self._schema)

    def write(self, rows, lengths=None) -> None:
        """Append `rows` (count, seq_len), a dense numpy array of the writer's dtype, as one record batch.

        All batches but the last must have `rows_per_batch` rows: readers find a row by division.
        """
        columns = [self._arrow.FixedSizeListArray.from_arrays(self._arrow.array(rows.reshape(-1)), self.seq_len)]
        if lengths is not None:
            columns.append(self._arrow.array(lengths))
        self._stream.write_batch(self._arrow.record_batch(columns, schema=self._schema))
        self.rows += len(rows)

    def close(self) -> str:
        """Finish the stream and hand it to the disk. Returns the XXH3-128 of what was written, in hexadecimal."""
        self._stream.close()
        return self._file.finish()

    def abandon(self) -> None:
        """Close the file of a build that failed; it is to be deleted."""
        with contextlib.suppress(OSError):  # the failure may be that nothing can be written
            self._file.close()


class _HashedFile:
    """A new file that knows the checksum of what was written: damage on the way to the disk shows later."""

    def __init__(self, path: str | os.PathLike):
        import xxhash

        self._file = open(path, "xb")  # noqa: SIM115 (closed by close)
        self._state = xxhash.xxh3_128()
        self.close = self._file.close
        self.flush = self._file.flush

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, data) -> int:
        self._state.update(data)
        return self._file.write(data)

    def finish(self) -> str:
        self.flush()
        os.fsync(self._file.fileno())
        self.close()
        return self._state.hexdigest()


class StreamPacker:
    """Rows cut from one endless stream of documents: no padding, nothing lost but what does not fill the last row."""

    padding = 0

    def __init__(self, writer: RowWriter):
        import numpy

        self._writer = writer
        self._block = numpy.empty((writer.rows_per_batch, writer.seq_len), dtype=writer.dtype)
        self._flat = self._block.reshape(-1)
        self._filled = 0
        self._numpy = numpy

    def add(self, ids: array, lengths: array, unfinished: Collection[int] = ()) -> None:
        ids = self._numpy.frombuffer(ids, dtype="uint32")
        while len(ids):
            count = min(len(ids), len(self._flat) - self._filled)
            self._flat[self._filled : self._filled + count] = ids[:count]
            self._filled += count
            ids = ids[count:]
            if self._filled == len(self._flat):
                self._writer.write(self._block)
                self._filled = 0

    def finish(self) -> int:
        """Write the last full rows; return how many ids were left over."""
        rows, remainder = divmod(self._filled, self._writer.seq_len)
        if rows:
            self._writer.write(self._block[:rows])
        return remainder


class BestFitPacker:
    """Rows of whole documents, padded at the end: best-fit decreasing (Ding et al. 2024, arXiv:2404.10830).

    A document longer than a row is cut into full rows and a rest. Ids wait in a file next to the writer's until all
    lengths are known. Rows follow the order of their first document.
    """

    def __init__(self, writer: RowWriter, spool_path: str | os.PathLike, pad_token_id: int):
        import numpy

        self.padding = 0
        self._writer = writer
        self._pad_token_id = pad_token_id
        self._spool = open(spool_path, "x+b", buffering=0)  # noqa: SIM115 (closed by finish)
        self._lengths = array("q")  # of documents
        self._started = 0  # ids of a document that is not finished
        self._numpy = numpy

    def add(self, ids: array, lengths: array, unfinished: Collection[int] = ()) -> None:
        """Take documents and pieces of them. `unfinished`: indices of those that the next one continues."""
        _write_all(self._spool, self._numpy.frombuffer(ids, dtype="uint32").astype(self._writer.dtype).tobytes())
        for index, length in enumerate(lengths):
            self._started += length
            if index not in unfinished and self._started:
                self._lengths.append(self._started)
                self._started = 0

    def finish(self) -> int:
        """Write all rows; return how many ids were left over: none."""
        numpy, seq_len = self._numpy, self._writer.seq_len
        if not self._lengths:
            self._spool.close()
            return 0
        starts, sizes = cut_documents(numpy.frombuffer(self._lengths, dtype="int64"), seq_len)
        row_of_piece = best_fit_decreasing(sizes, seq_len)
        order = numpy.argsort(row_of_piece, kind="stable")  # the pieces of each row, in the order of the documents
        pieces_per_row = numpy.bincount(row_of_piece)
        del row_of_piece
        end_of_row = numpy.cumsum(pieces_per_row)
        begin_of_row = end_of_row - pieces_per_row
        row_order = numpy.argsort(order[begin_of_row])
        per_batch = self._writer.rows_per_batch
        for first in range(0, len(row_order), per_batch):
            chosen = row_order[first : first + per_batch]
            rows = numpy.full((len(chosen), seq_len), self._pad_token_id, dtype=self._writer.dtype)
            lengths = numpy.zeros(len(chosen), dtype="int32")
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

    def _read_ids(self, start: int, out) -> None:
        """Fill `out` with ids of the spool. A mapped file would count as memory of this process."""
        view = memoryview(out).cast("B")
        self._spool.seek(start * out.itemsize)
        while view:
            count = self._spool.readinto(view)
            if not count:
                raise OSError(errno.EIO, "DatasetBuilder: somebody cut the file of tokens short", self._spool.name)
            view = view[count:]

    def abandon(self) -> None:
        """Close the file of a build that failed; it is to be deleted."""
        with contextlib.suppress(OSError):
            self._spool.close()


def _write_all(file, data: bytes) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def cut_documents(lengths, capacity: int):
    """Cut consecutive documents of the given lengths into pieces of at most `capacity`.

    Args:
        lengths: (documents,) int64, > 0.
        capacity: size of a row.

    Returns:
        starts, sizes: (pieces,) int64, in order; only the last piece of a document is smaller than `capacity`.
    """
    import numpy

    pieces = -(-lengths // capacity)
    document = numpy.repeat(numpy.arange(len(lengths)), pieces)
    index_in_document = numpy.arange(len(document)) - numpy.repeat(numpy.cumsum(pieces) - pieces, pieces)
    offset = index_in_document * capacity
    sizes = numpy.minimum(lengths[document] - offset, capacity)
    starts = (numpy.cumsum(lengths) - lengths)[document] + offset
    return starts, sizes


def best_fit_decreasing(sizes, capacity: int):
    """The bin of each item: from the largest item down, the fullest bin that has room, else a new one.

    Args:
        sizes: (items,) integers, 1 <= size <= capacity.
        capacity: size of a bin.

    Returns:
        (items,) int64 numbers of bins, counted from 0.
    """
    import numpy

    sizes = numpy.asarray(sizes, dtype="int64")
    bins = numpy.empty(len(sizes), dtype="int64")
    full = sizes == capacity  # most pieces of long documents; they come first, each in a bin of its own
    num_bins = int(numpy.count_nonzero(full))
    bins[full] = numpy.arange(num_bins)
    bins_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when some bin has room r: the best fit is the lowest set bit from `size` on
    order = numpy.argsort(-sizes, kind="stable")[num_bins:]
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
