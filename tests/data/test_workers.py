"""The tokenizer and its processes: results in order, and no process outlives its work."""

import os
import signal
import subprocess
import sys
from itertools import chain

import pytest

from andromeda.data import workers
from andromeda.data.tokenizer import AndromedaTokenizer

EOS = 0


def test_batches_are_bounded(monkeypatch):
    monkeypatch.setattr(workers, "MAX_BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(workers, "MAX_BATCH_CHARS", 10)
    texts = ["a"] * 7 + ["b" * 25, "c" * 6, "d" * 4, "e"]
    batches = list(workers.document_batches(texts))
    assert list(chain.from_iterable(batches)) == texts
    assert [len(batch) for batch in batches] == [3, 3, 1, 1, 2, 1]


@pytest.fixture(scope="module")
def tokenizer():
    return AndromedaTokenizer.train(["the end of a document", "is <eos> not the end"] * 5, vocab_size=280)


@pytest.fixture(scope="module")
def description(tokenizer):
    return workers.packing_tokenizer_json(tokenizer.tokenizer.backend_tokenizer)


def test_encoder_ends_documents_and_nothing_else(tokenizer, description):
    texts = ["the end", "", "a <eos> in text <pad>"]
    ids, lengths = workers.Encoder(description, EOS)(texts)
    assert len(ids) == sum(lengths)
    assert lengths[1] == 0
    assert [i for i, token in enumerate(ids) if token == EOS] == [lengths[0] - 1, len(ids) - 1]
    assert 1 not in ids
    first, last = ids[: lengths[0] - 1], ids[lengths[0] : -1]
    assert tokenizer.decode(list(first)) == texts[0]
    assert tokenizer.decode(list(last), skip_special_tokens=False) == texts[2]


def test_state_of_the_tokenizer_does_not_matter(tokenizer, description):
    tokenizer.tokenize_texts(["turns padding and truncation on", "now"])
    backend = tokenizer.tokenizer.backend_tokenizer
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    assert workers.packing_tokenizer_json(backend) == description


def batches_of(count):
    return [[f"document {index} of them", "", "ü" * index] for index in range(count)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_are_in_order(description, processes):
    encode = workers.Encoder(description, EOS)
    with workers.Tokenization(description, EOS, processes) as tokenization:
        results = list(tokenization.map(batches_of(12)))
    assert results == [(batch, *encode(batch)) for batch in batches_of(12)]


@pytest.fixture
def started(monkeypatch):
    """The processes of the workers that were started."""
    processes = []

    class Recorded(workers._Worker):
        def __init__(self):
            super().__init__()
            processes.append(self._process)

    monkeypatch.setattr(workers, "_Worker", Recorded)
    return processes


def test_dead_worker(description, started):
    with (
        workers.Tokenization(description, EOS, 2) as tokenization,
        pytest.raises(RuntimeError, match="killed by signal 9"),
    ):
        for number, _ in enumerate(tokenization.map(batches_of(200))):
            if number == 3:
                os.kill(started[0].pid, signal.SIGKILL)
    assert [process.poll() is not None for process in started] == [True, True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_error_outside_ends_the_workers(description, started, error):
    with pytest.raises(error), workers.Tokenization(description, EOS, 2) as tokenization:
        for _ in tokenization.map(batches_of(200)):
            raise error
    assert [process.poll() is not None for process in started] == [True, True]


@pytest.mark.parametrize("processes", [1, 2])
def test_error_in_the_source_is_passed_on(description, started, processes):
    def source():
        yield ["fine"]
        raise ValueError("unreadable")

    with pytest.raises(ValueError, match="unreadable"), workers.Tokenization(description, EOS, processes) as tokens:
        list(tokens.map(source()))
    assert all(process.poll() is not None for process in started)


def test_worker_that_cannot_start(started):
    with (
        pytest.raises(RuntimeError, match="a tokenizer process exited with status 1"),
        workers.Tokenization("{}", EOS, 2) as tokenization,
    ):
        list(tokenization.map(batches_of(3)))
    assert all(process.poll() is not None for process in started)


def test_worker_processes_load_neither_torch_nor_the_package():
    """Workers load the file by its path, in a tenth of a second."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print({'andromeda', 'numpy', 'torch'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code, workers.__file__], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
