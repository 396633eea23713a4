"""Packing: no token is lost, added or moved."""

import errno
import os
from array import array
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data import packing

DOCUMENT_LENGTHS = st.lists(st.one_of(st.integers(0, 9), st.integers(10, 70)), max_size=40)


def feed(packer, lengths, batch):
    """Give the packer documents of these lengths, `batch` at a time; their ids count up. Return the number of ids."""
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
    """A function that gives a new path in one directory."""
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
    # The pieces in order: whole documents; full rows and a rest of documents longer than a row.
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


def test_spool_that_somebody_cut_short(folder):
    spool = folder()
    packer = packing.BestFitPacker(packing.RowWriter(folder(), 8, "uint16", with_length=True), spool, 1)
    feed(packer, [5, 9], 2)
    os.truncate(spool, 8)
    with pytest.raises(OSError, match="somebody cut the file of tokens short"):
        packer.finish()


def test_full_disk_is_reported_by_the_writer(monkeypatch, tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")

    def open_full(*_):
        return Path("/dev/full").open("wb")

    monkeypatch.setattr(packing, "open", open_full, raising=False)
    writer = packing.RowWriter(tmp_path / "rows", 64, "uint16")
    with pytest.raises(OSError) as caught:
        writer.write(np.zeros((writer.rows_per_batch, 64), dtype=np.uint16))
        writer.close()
    assert caught.value.errno == errno.ENOSPC
    writer.abandon()
