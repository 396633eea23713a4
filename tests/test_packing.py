"""Packing and the tokenizer processes: no token is lost, made or moved, however the work is cut."""

import os
import signal
from array import array
from itertools import chain

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda import packing
from andromeda.tokenizer import AndromedaTokenizer

EOS = 0
DOCUMENT_LENGTHS = st.lists(st.one_of(st.integers(0, 9), st.integers(10, 70)), max_size=40)


def feed(packer, lengths, batch):
    """Give the packer documents of these lengths, `batch` at a time, whose ids count up; return the number of ids."""
    begin = 0
    for first in range(0, len(lengths), batch):
        part = array("I", lengths[first : first + batch])
        packer.add(array("I", range(begin, begin + sum(part))), part)
        begin += sum(part)
    return begin


def read(path, seq_len):
    table = pyarrow.ipc.open_stream(path.read_bytes()).read_all()
    lengths = table["length"].to_pylist() if "length" in table.column_names else None
    return np.array(table["input_ids"].to_pylist(), dtype=np.int64).reshape(-1, seq_len), lengths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory whose files each test gives names of their own."""
    directory = tmp_path_factory.mktemp("rows")
    return lambda: directory / os.urandom(8).hex()


@given(lengths=DOCUMENT_LENGTHS, seq_len=st.integers(1, 20), batch=st.integers(1, 9), rows_per_batch=st.integers(1, 3))
def test_stream_keeps_every_token_in_order(folder, lengths, seq_len, batch, rows_per_batch):
    path = folder()
    writer = packing.RowWriter(path, seq_len, "uint16")
    writer.rows_per_batch = rows_per_batch
    packer = packing.StreamPacker(writer)
    total = feed(packer, lengths, batch)
    remainder = packer.finish()
    writer.close()
    rows, _ = read(path, seq_len)
    assert writer.rows == len(rows) == total // seq_len
    assert remainder == total % seq_len
    assert rows.reshape(-1).tolist() == list(range(total - remainder))


@given(lengths=DOCUMENT_LENGTHS, seq_len=st.integers(1, 20), batch=st.integers(1, 9), rows_per_batch=st.integers(1, 3))
def test_best_fit_keeps_documents_whole(folder, lengths, seq_len, batch, rows_per_batch):
    path, pad = folder(), 60000
    writer = packing.RowWriter(path, seq_len, "uint16", with_length=True)
    writer.rows_per_batch = rows_per_batch
    packer = packing.BestFitPacker(writer, folder(), pad)
    total = feed(packer, lengths, batch)
    assert packer.finish() == 0
    writer.close()
    rows, row_lengths = read(path, seq_len)
    assert writer.rows == len(rows)
    assert packer.padding == rows.size - total
    # The pieces of documents, in order: whole ones, and rows full of one document that is longer than a row.
    pieces, begin = {}, 0
    for length in lengths:
        for cut in range(0, length, seq_len):
            pieces[begin + cut] = list(range(begin + cut, begin + min(cut + seq_len, length)))
        begin += length
    for row, length in zip(rows.tolist(), row_lengths, strict=True):
        assert row[length:] == [pad] * (seq_len - length)
        end = 0
        while end < length:
            piece = pieces.pop(row[end])
            assert row[end : end + len(piece)] == piece
            end += len(piece)
        assert row[:length] == sorted(row[:length])
    assert not pieces
    assert rows[:, 0].tolist() == sorted(rows[:, 0])


@given(sizes=st.lists(st.integers(1, 30), max_size=80), capacity=st.integers(30, 40))
def test_best_fit_decreasing_is_what_its_name_says(sizes, capacity):
    bins = packing.best_fit_decreasing(np.array(sizes, dtype=np.int64), capacity)
    room = {}
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        fitting = [space for space in room.values() if space >= sizes[item]]
        if fitting:
            assert room[bins[item]] == min(fitting)
        else:
            assert bins[item] not in room
        room[bins[item]] = room.get(bins[item], capacity) - sizes[item]
    assert sorted(room) == list(range(len(room)))
    assert all(space >= 0 for space in room.values())


@given(lengths=st.lists(st.integers(1, 50), max_size=20), capacity=st.integers(1, 12))
def test_cut_documents(lengths, capacity):
    starts, sizes = packing.cut_documents(np.array(lengths, dtype=np.int64), capacity)
    expected, begin = [], 0
    for length in lengths:
        expected += [(begin + cut, min(capacity, length - cut)) for cut in range(0, length, capacity)]
        begin += length
    assert list(zip(starts.tolist(), sizes.tolist(), strict=True)) == expected


def test_batches_are_bounded(monkeypatch):
    monkeypatch.setattr(packing, "MAX_BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(packing, "MAX_BATCH_CHARS", 10)
    texts = ["a"] * 7 + ["b" * 25, "c" * 6, "d" * 4, "e"]
    batches = list(packing.document_batches(texts))
    assert list(chain.from_iterable(batches)) == texts
    assert [len(batch) for batch in batches] == [3, 3, 1, 1, 2, 1]


# The tokenizer and its processes


@pytest.fixture(scope="module")
def tokenizer():
    return AndromedaTokenizer.train(["the end of a document", "is <eos> not the end"] * 5, vocab_size=280)


@pytest.fixture(scope="module")
def description(tokenizer):
    return packing.packing_tokenizer_json(tokenizer.tokenizer.backend_tokenizer)


def test_encoder_ends_documents_and_nothing_else(tokenizer, description):
    texts = ["the end", "", "a <eos> in text <pad>"]
    ids, lengths = packing.Encoder(description, EOS)(texts)
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
    assert packing.packing_tokenizer_json(backend) == description


def batches_of(count):
    return [[f"document {index} of them", "", "ü" * index] for index in range(count)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_are_in_order(description, processes):
    encode = packing.Encoder(description, EOS)
    with packing.Tokenization(description, EOS, processes) as tokenization:
        results = list(tokenization.map(batches_of(12)))
    assert results == [(batch, *encode(batch)) for batch in batches_of(12)]


@pytest.fixture
def workers(monkeypatch):
    """The workers that are started, as processes."""
    started = []

    class Recorded(packing._Worker):
        def __init__(self):
            super().__init__()
            started.append(self._process)

    monkeypatch.setattr(packing, "_Worker", Recorded)
    return started


def test_dead_worker(description, workers):
    with (
        packing.Tokenization(description, EOS, 2) as tokenization,
        pytest.raises(RuntimeError, match="killed by signal 9"),
    ):
        for number, _ in enumerate(tokenization.map(batches_of(200))):
            if number == 3:
                os.kill(workers[0].pid, signal.SIGKILL)
    assert [process.poll() is not None for process in workers] == [True, True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_error_outside_ends_the_workers(description, workers, error):
    with pytest.raises(error), packing.Tokenization(description, EOS, 2) as tokenization:
        for _ in tokenization.map(batches_of(200)):
            raise error
    assert [process.poll() is not None for process in workers] == [True, True]


@pytest.mark.parametrize("processes", [1, 2])
def test_error_in_the_source_is_passed_on(description, workers, processes):
    def source():
        yield ["fine"]
        raise ValueError("unreadable")

    with pytest.raises(ValueError, match="unreadable"), packing.Tokenization(description, EOS, processes) as tokens:
        list(tokens.map(source()))
    assert all(process.poll() is not None for process in workers)


def test_worker_that_cannot_start(workers):
    with (
        pytest.raises(RuntimeError, match="a tokenizer process exited with status 1"),
        packing.Tokenization("{}", EOS, 2) as tokenization,
    ):
        list(tokenization.map(batches_of(3)))
    assert all(process.poll() is not None for process in workers)
