"""From documents to rows of token ids: tokenise in order, pack, write Arrow.

    texts -> batches -> Tokenization (threads here, or worker processes) -> StreamPacker | BestFitPacker -> RowWriter

The order of the tokens depends on the order of the documents alone: a batch may be tokenised anywhere, its result is
taken in turn, and what does not fill a row is carried to the next batch.

Nothing here imports torch: a worker process loads this file by its path, not as part of the package, and is ready in
a tenth of a second. That also spares scripts the `if __name__ == "__main__"` guard that multiprocessing asks for.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

MAX_BATCH_DOCUMENTS = 1000
MAX_BATCH_CHARS = 1 << 20  # about 0.3 M tokens; the tokenizer needs some 150 bytes for each while it works
BLOCK_BYTES = 4 << 20  # rows are written, and later mapped, in record batches of about this size

_FRAME = struct.Struct("<QQ")  # bytes of lengths, bytes of payload


def document_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive lists of at most MAX_BATCH_DOCUMENTS texts and, unless one text alone is longer, MAX_BATCH_CHARS."""
    batch, chars = [], 0
    for text in texts:
        if batch and (len(batch) == MAX_BATCH_DOCUMENTS or chars + len(text) > MAX_BATCH_CHARS):
            yield batch
            batch, chars = [], 0
        batch.append(text)
        chars += len(text)
    if batch:
        yield batch


def packing_tokenizer_json(tokenizer) -> str:
    """The JSON of a `tokenizers.Tokenizer` without the state that would change what a document encodes to.

    Truncation and padding stay switched on after a call that used them, and BPE dropout draws random numbers.
    """
    description = json.loads(tokenizer.to_str())
    description["truncation"] = description["padding"] = None
    if "dropout" in description["model"]:
        description["model"]["dropout"] = None
    return json.dumps(description, ensure_ascii=False, separators=(",", ":"))


class Encoder:
    """Token ids of documents, each followed by the end-of-sequence id.

    Text that spells a special token stays text: only the ids added here mark the end of a document.
    """

    def __init__(self, tokenizer_json: str, eos_token_id: int):
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(tokenizer_json)
        self._tokenizer.encode_special_tokens = True
        self._eos_token_id = eos_token_id

    def __call__(self, texts: list[str]) -> tuple[array, array]:
        """Ids of all documents (uint32) and the number of ids of each; a document without tokens has no end either."""
        ids, lengths = array("I"), array("I")
        for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            # One array per document: array("I", list) takes 8 ns per id where numpy takes 19, and the list with its
            # integers is freed while it is still in the cache.
            document = array("I", encoding.ids)
            if document:
                document.append(self._eos_token_id)
                ids.extend(document)
            lengths.append(len(document))
        return ids, lengths


class Tokenization:
    """Tokenises batches of documents in parallel and gives the results in order. A context manager.

    Args:
        tokenizer_json: as from `packing_tokenizer_json`.
        eos_token_id: id written after each document.
        num_processes: 1 tokenises in this process, with the threads that the tokenizers package starts by itself;
            more starts that many worker processes of one thread each. The results are the same.
    """

    def __init__(self, tokenizer_json: str, eos_token_id: int, num_processes: int):
        self._workers: list[_Worker] = []
        if num_processes == 1:
            # Two threads: one batch becomes arrays, which takes the interpreter, and the last documents of it keep one
            # core busy, while the tokenizer is at work on the next. 0.97 of the tokenizer's own rate, one thread 0.88.
            self._num_threads = 2
            self._encode: Callable = Encoder(tokenizer_json, eos_token_id)
        else:
            self._num_threads = num_processes
            self._encode = self._encode_in_worker
            self._idle: SimpleQueue[_Worker] = SimpleQueue()
            try:
                for _ in range(num_processes):
                    self._workers.append(_Worker())
                for worker in self._workers:
                    worker.configure(tokenizer_json, eos_token_id)
                    self._idle.put(worker)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Tokenization:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _encode_in_worker(self, texts: list[str]) -> tuple[array, array]:
        worker = self._idle.get()
        try:
            return worker.encode(texts)
        finally:
            self._idle.put(worker)  # a dead one too: who takes it must fail, not wait

    def map(self, batches: Iterable[list[str]]) -> Iterator[tuple[list[str], array, array]]:
        """Yield (texts, ids, lengths) per batch, in the order of `batches`, reading at most a few batches ahead."""
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="andromeda-tokenize")
        pending: deque = deque()
        try:
            for texts in batches:
                pending.append((texts, pool.submit(self._encode, texts)))
                if len(pending) > self._num_threads + 1:
                    texts, result = pending.popleft()
                    yield texts, *result.result()
            while pending:
                texts, result = pending.popleft()
                yield texts, *result.result()
        finally:
            for _, result in pending:
                result.cancel()
            if pending:
                self.close()  # a thread that waits for a worker is released by the worker's end
            pool.shutdown()


class _Worker:
    """A process that runs `serve`; frames of bytes go in and out through pipes. It ends when its input does."""

    def __init__(self):
        start = "import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1])['serve']()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, os.path.abspath(__file__), *map(os.path.abspath, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches this process, which then ends its workers
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )

    def configure(self, tokenizer_json: str, eos_token_id: int) -> None:
        self._send(struct.pack("<q", eos_token_id), tokenizer_json.encode())

    def encode(self, texts: list[str]) -> tuple[array, array]:
        documents = [text.encode() for text in texts]
        self._send(array("Q", map(len, documents)).tobytes(), b"".join(documents))
        try:
            frame = _read_frame(self._process.stdout)
        except EOFError:
            self._raise_dead()
        ids, lengths = array("I"), array("I")
        lengths.frombytes(frame[0])
        ids.frombytes(frame[1])
        return ids, lengths

    def _send(self, lengths: bytes, payload: bytes) -> None:
        try:
            _write_frame(self._process.stdin, lengths, payload)
        except BrokenPipeError:
            self._raise_dead()

    def _raise_dead(self):
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        raise RuntimeError(
            f"DatasetBuilder: a tokenizer process {how}; its own message, if any, is on stderr. "
            "Fewer processes need less memory: num_cpu=1 starts none"
        ) from None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what was still to be sent has no reader any more
                pipe.close()


def _write_frame(stream, lengths: bytes, payload: bytes) -> None:
    stream.write(_FRAME.pack(len(lengths), len(payload)))
    stream.write(lengths)
    stream.write(payload)
    stream.flush()


def _read_frame(stream) -> tuple[bytes, bytes]:
    sizes = _FRAME.unpack(_read_exactly(stream, _FRAME.size))
    return _read_exactly(stream, sizes[0]), _read_exactly(stream, sizes[1])


def _read_exactly(stream, count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError
    return data


def serve() -> None:
    """Body of a worker process: tokenise what arrives on stdin until it ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing printed by a library gets between the frames
    requests = sys.stdin.buffer
    with contextlib.suppress(EOFError, BrokenPipeError):
        eos_token_id, tokenizer_json = _read_frame(requests)
        encode = Encoder(tokenizer_json.decode(), *struct.unpack("<q", eos_token_id))
        while True:
            sizes, payload = _read_frame(requests)
            texts, end = [], 0
            for size in array("Q", sizes):
                texts.append(payload[end : end + size].decode())
                end += size
            ids, lengths = encode(texts)
            _write_frame(replies, lengths.tobytes(), ids.tobytes())


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
        fields = {"input_ids": pyarrow.list_(pyarrow.type_for_alias(dtype), seq_len)}
        if with_length:
            fields["length"] = pyarrow.int32()
        self._schema = pyarrow.schema(fields)
        self._file = open(path, "xb")  # noqa: SIM115 (closed by close)
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

    def close(self) -> None:
        """Finish the stream and hand it to the disk."""
        self._stream.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        """Close the file of a build that failed; it is to be deleted."""
        with contextlib.suppress(OSError):  # the failure may be that nothing can be written
            self._file.close()


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

    def add(self, ids: array, lengths: array) -> None:
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
        self._spool_path = spool_path
        self._spool = open(spool_path, "xb")  # noqa: SIM115 (closed by finish)
        self._lengths = array("q")
        self._numpy = numpy

    def add(self, ids: array, lengths: array) -> None:
        self._spool.write(self._numpy.frombuffer(ids, dtype="uint32").astype(self._writer.dtype))
        self._lengths.extend(length for length in lengths if length)

    def finish(self) -> int:
        """Write all rows; return how many ids were left over: none."""
        numpy, seq_len = self._numpy, self._writer.seq_len
        self._spool.close()
        if not self._lengths:
            return 0
        tokens = numpy.memmap(self._spool_path, dtype=self._writer.dtype, mode="r")
        starts, sizes = cut_documents(numpy.frombuffer(self._lengths, dtype="int64"), seq_len)
        row_of_piece = best_fit_decreasing(sizes, seq_len)
        order = numpy.argsort(row_of_piece, kind="stable")  # the pieces of each row, in the order of the documents
        pieces_per_row = numpy.bincount(row_of_piece)
        first_piece = order[numpy.cumsum(pieces_per_row) - pieces_per_row]
        pieces_of_row = numpy.split(order, numpy.cumsum(pieces_per_row)[:-1])
        row_order = numpy.argsort(first_piece)
        per_batch = self._writer.rows_per_batch
        for begin in range(0, len(row_order), per_batch):
            chosen = row_order[begin : begin + per_batch]
            rows = numpy.full((len(chosen), seq_len), self._pad_token_id, dtype=self._writer.dtype)
            lengths = numpy.zeros(len(chosen), dtype="int32")
            for index, row in enumerate(chosen.tolist()):
                end = 0
                for piece in pieces_of_row[row].tolist():
                    size = int(sizes[piece])
                    start = int(starts[piece])
                    rows[index, end : end + size] = tokens[start : start + size]
                    end += size
                lengths[index] = end
            self._writer.write(rows, lengths)
            self.padding += len(chosen) * seq_len - int(lengths.sum())
        return 0

    def abandon(self) -> None:
        """Close the file of a build that failed; it is to be deleted."""
        with contextlib.suppress(OSError):
            self._spool.close()


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

    bins = numpy.empty(len(sizes), dtype="int64")
    bins_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when some bin has room r: the best fit is the lowest set bit from `size` on
    num_bins = 0
    order = numpy.argsort(-numpy.asarray(sizes, dtype="int64"), kind="stable")
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
