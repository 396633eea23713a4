"""Texts to token ids, in threads of this process or in worker processes; and tokenizers trained in a separate process.

    texts -> document_batches -> Tokenization (threads here, or worker processes) -> token ids

The order of the tokens depends only on the order of the documents: any worker may tokenise a batch, but the results are
taken in the order of the batches.

Nothing here imports torch: a worker process loads this file by its path, not as part of the package, and is ready in
a tenth of a second. Scripts therefore also need no `if __name__ == "__main__"` guard, which multiprocessing requires.
Tokenizers are also trained in such a process: a process can be ended at any moment, a call of `tokenizers` cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import threading
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_BATCH_DOCUMENTS = 1000
MAX_BATCH_CHARS = 1 << 20  # about 0.3 M tokens; the tokenizer needs about 150 bytes per token while it works
_FRAME = struct.Struct("<QQ")  # bytes of lengths, bytes of payload


class Unfinished(str):
    """A part of a document; the next text continues the document."""

    __slots__ = ()


def document_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive lists of at most MAX_BATCH_DOCUMENTS texts and, unless one text alone is longer, MAX_BATCH_CHARS."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        if batch and (len(batch) == MAX_BATCH_DOCUMENTS or chars + len(text) > MAX_BATCH_CHARS):
            yield batch
            batch, chars = [], 0
        batch.append(text)
        chars += len(text)
    if batch:
        yield batch


def packing_tokenizer_json(tokenizer: Tokenizer) -> str:
    """The JSON of a tokenizer without the state that would change the tokens of a document.

    Truncation and padding stay switched on after a call that used them, and BPE dropout draws random numbers.
    """
    description = json.loads(tokenizer.to_str())
    description["truncation"] = description["padding"] = None
    if "dropout" in description["model"]:
        description["model"]["dropout"] = None
    return json.dumps(description, ensure_ascii=False, separators=(",", ":"))


def plain_tokenizer(tokenizer_json: str) -> Tokenizer:
    """A tokenizer that reads a special token spelled in a text as ordinary text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    return tokenizer


class Encoder:
    """Token ids of documents, each followed by the end-of-sequence id.

    Text that spells a special token stays text: only the ids added here mark the end of a document.
    """

    def __init__(self, tokenizer_json: str, eos_token_id: int):
        self._tokenizer = plain_tokenizer(tokenizer_json)
        self._eos_token_id = eos_token_id

    def __call__(self, texts: list[str]) -> tuple[array[int], array[int]]:
        """Ids of all texts (uint32) and the number of ids of each.

        No end-of-sequence id follows an `Unfinished` text or a document without tokens.
        """
        ids, lengths = array("I"), array("I")
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings, strict=True):
            # One array per document: array("I", list) takes 8 ns per id, numpy takes 19, and the list with its integers
            # is freed while it is still in the processor's cache.
            document = array("I", encoding.ids)
            if document and not isinstance(text, Unfinished):
                document.append(self._eos_token_id)
            ids.extend(document)
            lengths.append(len(document))
        return ids, lengths


class Tokenization:
    """Tokenises batches of documents in parallel and gives the results in order. A context manager.

    Args:
        tokenizer_json: made by `packing_tokenizer_json`.
        eos_token_id: id written after each document.
        num_processes: 1 tokenises in this process, with the threads that the tokenizers package starts itself; a
            larger number starts that many worker processes of one thread each. The results are the same.
    """

    def __init__(self, tokenizer_json: str, eos_token_id: int, num_processes: int):
        self._workers: list[_Worker] = []
        if num_processes == 1:
            # Two threads: while one batch becomes arrays, which holds the interpreter's lock, and its last documents
            # keep one core busy, the tokenizer works on the next batch. This reaches 0.97 of the tokenizer's own rate;
            # one thread reaches 0.88.
            self._num_threads = 2
            self._encode: Callable[[list[str]], tuple[array[int], array[int]]] = Encoder(tokenizer_json, eos_token_id)
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, even busy ones."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _encode_in_worker(self, texts: list[str]) -> tuple[array[int], array[int]]:
        worker = self._idle.get()
        try:
            return worker.encode(texts)
        finally:
            self._idle.put(worker)  # even a dead one: the next thread must fail, not wait

    def map(self, batches: Iterable[list[str]]) -> Generator[tuple[list[str], array[int], array[int]], None, None]:
        """Yield (texts, ids, lengths) per batch, in the order of `batches`; at most a few batches are read ahead."""
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="andromeda-tokenize")
        pending: deque[tuple[list[str], Future[tuple[array[int], array[int]]]]] = deque()
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
                self.close()  # a thread that waits for a worker continues when the worker ends
            pool.shutdown()


class _Process:
    """A process that runs a function of this file; frames of bytes go in and out through pipes."""

    def __init__(self, function: str, environment: dict[str, str] | None = None):
        start = f"import runpy, sys; sys.path[:] = sys.argv[2:]; runpy.run_path(sys.argv[1])['{function}']()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, os.path.abspath(__file__), *map(os.path.abspath, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches only this process, which then ends its workers
            env={**os.environ, **(environment or {})},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout

    def _read(self) -> tuple[bytes, bytes]:
        try:
            return _read_frame(self._replies)
        except EOFError:
            self._raise_dead()

    def _send(self, lengths: bytes, payload: bytes) -> None:
        try:
            _write_frame(self._requests, lengths, payload)
        except BrokenPipeError:
            self._raise_dead()

    def _raise_dead(self) -> NoReturn:
        code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"exited with status {code}"
        raise RuntimeError(self._death_notice(how)) from None

    def _death_notice(self, how: str) -> str:
        raise NotImplementedError

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(BrokenPipeError):  # nobody reads the bytes that are still unsent
                pipe.close()


class _Worker(_Process):
    """A process that tokenises. It ends when its input ends."""

    def __init__(self) -> None:
        super().__init__("serve", {"TOKENIZERS_PARALLELISM": "false"})

    def configure(self, tokenizer_json: str, eos_token_id: int) -> None:
        self._send(struct.pack("<q", eos_token_id), tokenizer_json.encode())

    def encode(self, texts: list[str]) -> tuple[array[int], array[int]]:
        self._send(*_pack_texts(texts))
        frame = self._read()
        ids, lengths = array("I"), array("I")
        lengths.frombytes(frame[0])
        ids.frombytes(frame[1])
        return ids, lengths

    def _death_notice(self, how: str) -> str:
        return (
            f"DatasetBuilder: a tokenizer process {how}; its own message, if any, is on stderr. "
            "Fewer processes need less memory: num_cpu=1 starts none"
        )


class _Trainer(_Process):
    """A process that trains one tokenizer."""

    def __init__(self) -> None:
        super().__init__("serve_training")

    def train(self, texts: Iterable[str], tokenizer_json: str, trainer: dict[str, Any]) -> str:
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
        with contextlib.suppress(EOFError):  # the process may have reported why it stopped reading
            problem, _ = _read_frame(self._replies)
            raise RuntimeError(f"AndromedaTokenizer.train: {problem.decode()}") from None
        super()._raise_dead()

    def _death_notice(self, how: str) -> str:
        return (
            f"AndromedaTokenizer.train: the process that trains {how}; its own message, if any, is on stderr. The "
            "system kills processes when memory runs out: train on a sample of the texts"
        )


def train_tokenizer(texts: Iterable[str], tokenizer_json: str, trainer: dict[str, Any]) -> str:
    """The JSON of a `tokenizers.Tokenizer` trained on `texts` in a separate process.

    Python handles no signal during a call of `tokenizers`, which takes minutes for large texts. A process can be ended:
    Ctrl-C, or any other exception in this function, ends it at once. It also ends when this process ends.

    Args:
        texts: documents, or pieces of them (`Unfinished`).
        tokenizer_json: the tokenizer to train, with its pre-tokenizer.
        trainer: arguments of `tokenizers.trainers.BpeTrainer`.

    Raises:
        RuntimeError: the process died or `tokenizers` failed; gives the cause.
    """
    process = _Trainer()
    try:
        return process.train(texts, tokenizer_json, trainer)
    finally:
        process.kill()


def _pack_texts(texts: list[str]) -> tuple[bytes, bytes]:
    """A frame of texts: for each, twice its number of bytes, plus one if it is `Unfinished`; then the bytes of all."""
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


def _write_frame(stream: IO[bytes], lengths: bytes, payload: bytes) -> None:
    stream.write(_FRAME.pack(len(lengths), len(payload)))
    stream.write(lengths)
    stream.write(payload)
    stream.flush()


def _read_frame(stream: IO[bytes]) -> tuple[bytes, bytes]:
    sizes = _FRAME.unpack(_read_exactly(stream, _FRAME.size))
    return _read_exactly(stream, sizes[0]), _read_exactly(stream, sizes[1])


def _read_exactly(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) != count:
        raise EOFError
    return data


def serve() -> None:
    """Body of a worker process: tokenise the texts that arrive on stdin until stdin ends."""
    requests, replies = _own_pipes()
    with contextlib.suppress(EOFError, BrokenPipeError):
        eos_token_id, tokenizer_json = _read_frame(requests)
        encode = Encoder(tokenizer_json.decode(), *struct.unpack("<q", eos_token_id))
        while True:
            ids, lengths = encode(_unpack_texts(*_read_frame(requests)))
            _write_frame(replies, lengths.tobytes(), ids.tobytes())


def serve_training() -> None:
    """Body of a process that trains a tokenizer on the texts that arrive on stdin, up to an empty frame."""
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
        except Exception as error:  # tokenizers raises this class itself
            reply = f"{type(error).__name__}: {error}".encode(errors="replace"), b""
        _write_frame(replies, *reply)


def _own_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """stdin and stdout for frames; the output of libraries goes to stderr, not between the frames."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return sys.stdin.buffer, replies


def _end_with_stdin() -> None:
    """Exit when nobody can write to stdin any more: the process that wanted the result has ended."""
    waiting = select.poll()
    waiting.register(0, 0)  # poll reports a pipe without writers even if no event is requested
    waiting.poll()
    os._exit(1)
