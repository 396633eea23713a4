"""From documents to rows of token ids: tokenise in order, pack, write Arrow.

    texts -> pieces -> batches -> Tokenization (threads here, or worker processes) -> StreamPacker | BestFitPacker
    -> RowWriter

The order of the tokens depends on the order of the documents alone: a batch may be tokenised anywhere, its result is
taken in turn, and what does not fill a row is carried to the next batch. Long documents are cut into pieces where that
changes no token, so the memory that a build takes does not depend on the length of a document.

Nothing here imports torch: a worker process loads this file by its path, not as part of the package, and is ready in
a tenth of a second. That also spares scripts the `if __name__ == "__main__"` guard that multiprocessing asks for.
Tokenizers are trained in such a process, too: it can be ended at any moment, which a call of `tokenizers` cannot.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import select
import struct
import subprocess
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from queue import SimpleQueue
from typing import NoReturn

MAX_BATCH_DOCUMENTS = 1000
MAX_BATCH_CHARS = 1 << 20  # about 0.3 M tokens; the tokenizer needs some 150 bytes for each while it works
PIECE_CHARS = 1 << 17  # longer documents are tokenised in pieces of about this size
SEAM_CHARS = 256  # a pre-tokenizer may look this far on either side of a seam
BLOCK_BYTES = 4 << 20  # rows are written, and later mapped, in record batches of about this size

_FRAME = struct.Struct("<QQ")  # bytes of lengths, bytes of payload


class Unfinished(str):
    """A part of a document that goes on with the next text."""

    __slots__ = ()


def in_parts(documents: Iterable) -> Iterator[str]:
    """The texts of `andromeda.documents.Document`s; one that the next continues is `Unfinished`."""
    for document in documents:
        yield Unfinished(document.text) if document.continues else document.text


def pieces(texts: Iterable[str], seams: Seams) -> Iterator[str]:
    """Texts of which the longer ones are cut, at seams, into pieces of about PIECE_CHARS.

    Args:
        texts: documents, or consecutive parts of them (`Unfinished`), which may be cut anywhere between characters.
        seams: of the tokenizer.

    Yields:
        Documents and pieces of them (all but the last `Unfinished`). Each piece has tokens, and together they are the
        tokens of the document. Where no seam is found a piece grows as long as needed, up to the whole document.
    """
    parts: list[str] = []
    chars, size = 0, PIECE_CHARS
    for text in texts:
        finished = not isinstance(text, Unfinished)
        parts.append(text)
        chars += len(text)
        if finished and chars <= PIECE_CHARS:
            yield text if len(parts) == 1 else "".join(parts)
        elif finished or chars > size + SEAM_CHARS:
            rest = parts[0] if len(parts) == 1 else "".join(parts)
            parts.clear()  # they need not stay in memory beside what they make
            begin = 0
            while len(rest) - begin > size + (0 if finished else SEAM_CHARS):
                seam = seams.last(rest, begin + size // 2, begin + size)
                if seam is None:
                    size *= 2
                    continue
                yield Unfinished(rest[begin:seam])
                begin, size = seam, PIECE_CHARS
            if not finished:
                parts, chars = [rest[begin:]], len(rest) - begin
                continue
            yield rest[begin:]
        else:
            continue
        parts, chars, size = [], 0, PIECE_CHARS


class Seams:
    """Where a text can be cut so that the tokens of both sides, made separately, are the tokens of the whole.

    A model encodes each word that its pre-tokenizer makes by itself, so the start of a word is a seam if the
    pre-tokenizer finds the same words without the text beyond it. Normalizers and pre-tokenizers look at a few
    characters around a place, which is why it is enough to compare there: SEAM_CHARS on either side are encoded
    together and apart, and the place is taken only if the ids are the same and a word starts there. A tokenizer that
    makes one word of everything (without a pre-tokenizer, or with one that does not split) has no seams.
    """

    # Where to try: before a space between two letters first, where nearly all pre-tokenizers cut.
    _CANDIDATES = (
        re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])"),
        re.compile(r"(?<=\w)(?=[^\w\s]\w)|(?<=\n)(?=\S)|(?<=\S)(?=\s\S)"),
    )
    _TRIES = 24  # for each of them, before a longer piece is tried
    _STRETCH = 4096

    def __init__(self, tokenizer_json: str):
        self._json = tokenizer_json

    @cached_property
    def _tokenizer(self):
        return _plain_tokenizer(self._json)

    def last(self, text: str, begin: int, end: int) -> int | None:
        """The last seam found in begin < position <= end; None if none was found."""
        for candidates in self._CANDIDATES:
            tries = 0
            for stop in range(end, begin, -self._STRETCH):
                start = max(begin, stop - self._STRETCH) + 1
                found = [match.start() for match in candidates.finditer(text, start, stop)]
                for position in reversed(found[-4:]):
                    if self._is_seam(text, position):
                        return position
                    tries += 1
                if tries >= self._TRIES:
                    break
        return None

    def _is_seam(self, text: str, position: int) -> bool:
        before, after = text[max(0, position - SEAM_CHARS) : position], text[position : position + SEAM_CHARS]
        whole = self._tokenizer.encode(before + after, add_special_tokens=False)
        left = self._tokenizer.encode(before, add_special_tokens=False).ids
        right = self._tokenizer.encode(after, add_special_tokens=False).ids
        if not left or not right or whole.ids != left + right:
            return False
        return whole.word_ids[len(left) - 1] != whole.word_ids[len(left)]


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


def _plain_tokenizer(tokenizer_json: str):
    """A `tokenizers.Tokenizer` for which text that spells a special token is text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    return tokenizer


class Encoder:
    """Token ids of documents, each followed by the end-of-sequence id.

    Text that spells a special token stays text: only the ids added here mark the end of a document.
    """

    def __init__(self, tokenizer_json: str, eos_token_id: int):
        self._tokenizer = _plain_tokenizer(tokenizer_json)
        self._eos_token_id = eos_token_id

    def __call__(self, texts: list[str]) -> tuple[array, array]:
        """Ids of all texts (uint32) and the number of ids of each.

        No end follows an `Unfinished` text, nor a document without tokens.
        """
        ids, lengths = array("I"), array("I")
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            # One array per document: array("I", list) takes 8 ns per id where numpy takes 19, and the list with its
            # integers is freed while it is still in the cache.
            document = array("I", encoding.ids)
            if document and not isinstance(text, Unfinished):
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


class _Process:
    """A process that runs a function of this file; frames of bytes go in and out through pipes."""

    def __init__(self, function: str, environment: dict[str, str] | None = None):
        start = f"import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1])['{function}']()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, os.path.abspath(__file__), *map(os.path.abspath, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches this process, which then ends its workers
            env={**os.environ, **(environment or {})},
        )

    def _read(self) -> tuple[bytes, bytes]:
        try:
            return _read_frame(self._process.stdout)
        except EOFError:
            self._raise_dead()

    def _send(self, lengths: bytes, payload: bytes) -> None:
        try:
            _write_frame(self._process.stdin, lengths, payload)
        except BrokenPipeError:
            self._raise_dead()

    def _raise_dead(self) -> NoReturn:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        raise RuntimeError(self._what_died(how)) from None

    def _what_died(self, how: str) -> str:
        raise NotImplementedError

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what was still to be sent has no reader any more
                pipe.close()


class _Worker(_Process):
    """A process that tokenises. It ends when its input does."""

    def __init__(self):
        super().__init__("serve", {"TOKENIZERS_PARALLELISM": "false"})

    def configure(self, tokenizer_json: str, eos_token_id: int) -> None:
        self._send(struct.pack("<q", eos_token_id), tokenizer_json.encode())

    def encode(self, texts: list[str]) -> tuple[array, array]:
        self._send(*_pack_texts(texts))
        frame = self._read()
        ids, lengths = array("I"), array("I")
        lengths.frombytes(frame[0])
        ids.frombytes(frame[1])
        return ids, lengths

    def _what_died(self, how: str) -> str:
        return (
            f"DatasetBuilder: a tokenizer process {how}; its own message, if any, is on stderr. "
            "Fewer processes need less memory: num_cpu=1 starts none"
        )


class _Trainer(_Process):
    """A process that trains one tokenizer."""

    def __init__(self):
        super().__init__("serve_training")

    def train(self, texts: Iterable[str], tokenizer_json: str, trainer: dict) -> str:
        options = json.dumps({"tokenizer": tokenizer_json, "trainer": trainer})
        self._send(b"", options.encode())
        for batch in document_batches(texts):
            self._send(*_pack_texts(batch))
        self._send(b"", b"")
        problem, trained = self._read()
        if problem:
            raise RuntimeError(f"AndromedaTokenizer.train: {problem.decode()}")
        return trained.decode()

    def _raise_dead(self) -> NoReturn:
        with contextlib.suppress(EOFError):  # it may have said why it stopped reading
            problem, _ = _read_frame(self._process.stdout)
            raise RuntimeError(f"AndromedaTokenizer.train: {problem.decode()}") from None
        super()._raise_dead()

    def _what_died(self, how: str) -> str:
        return (
            f"AndromedaTokenizer.train: the process that trains {how}; its own message, if any, is on stderr. The "
            "system kills processes when memory runs out: train on a sample of the texts"
        )


def train_tokenizer(texts: Iterable[str], tokenizer_json: str, trainer: dict) -> str:
    """The JSON of a `tokenizers.Tokenizer` trained on `texts`, in a process of its own.

    While it works, which is minutes for large texts, a call of `tokenizers` lets no signal through. A process can be
    ended: Ctrl-C, or any other exception that reaches this function, ends it at once. It ends with this one, too.

    Args:
        texts: documents, or parts of them (`Unfinished`).
        tokenizer_json: of a tokenizer with the pre-tokenizer and an alphabet for every text, which finds the seams.
        trainer: arguments of `tokenizers.trainers.BpeTrainer`.

    Raises:
        RuntimeError: the process died or `tokenizers` failed; says how.
    """
    process = _Trainer()
    try:
        return process.train(pieces(texts, Seams(tokenizer_json)), tokenizer_json, trainer)
    finally:
        process.kill()


def _pack_texts(texts: list[str]) -> tuple[bytes, bytes]:
    """A frame of texts: twice the size of each, one more if it is `Unfinished`; their bytes."""
    encoded = [text.encode() for text in texts]
    marks = (isinstance(text, Unfinished) for text in texts)
    sizes = array("Q", (2 * len(data) + mark for data, mark in zip(encoded, marks, strict=True)))
    return sizes.tobytes(), b"".join(encoded)


def _unpack_texts(sizes: bytes, payload: bytes) -> list[str]:
    texts, end = [], 0
    for size in array("Q", sizes):
        text = payload[end : end + size // 2].decode()
        texts.append(Unfinished(text) if size % 2 else text)
        end += size // 2
    return texts


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
    requests, replies = _own_pipes()
    with contextlib.suppress(EOFError, BrokenPipeError):
        eos_token_id, tokenizer_json = _read_frame(requests)
        encode = Encoder(tokenizer_json.decode(), *struct.unpack("<q", eos_token_id))
        while True:
            ids, lengths = encode(_unpack_texts(*_read_frame(requests)))
            _write_frame(replies, lengths.tobytes(), ids.tobytes())


def serve_training() -> None:
    """Body of a process that trains a tokenizer on what arrives on stdin, up to an empty frame."""
    from tokenizers import Tokenizer, trainers

    requests, replies = _own_pipes()
    threading.Thread(target=_end_with_stdin, daemon=True).start()

    def texts() -> Iterator[str]:
        while any(frame := _read_frame(requests)):
            yield from _unpack_texts(*frame)

    with contextlib.suppress(EOFError, BrokenPipeError):
        options = json.loads(_read_frame(requests)[1])
        try:
            tokenizer = Tokenizer.from_str(options["tokenizer"])
            tokenizer.train_from_iterator(texts(), trainers.BpeTrainer(**options["trainer"]))
            reply = b"", tokenizer.to_str().encode()
        except EOFError:
            raise
        except Exception as error:  # tokenizers raises Exception itself
            reply = f"{type(error).__name__}: {error}".encode(errors="replace"), b""
        _write_frame(replies, *reply)


def _own_pipes():
    """stdin and stdout for frames; what a library prints goes to stderr and does not get between them."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return sys.stdin.buffer, replies


def _end_with_stdin() -> None:
    """Leave when nobody can write to stdin any more: who wanted the result has gone."""
    waiting = select.poll()
    waiting.register(0, 0)  # a pipe that nobody writes to is always reported
    waiting.poll()
    os._exit(1)


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
