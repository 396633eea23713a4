"""PackedDataset: items, labels, document starts, checksums; no file on the disk is trusted without a check."""

import contextlib
import json
import pickle
import struct

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from built_rows import SEQ_LEN, builder, change_metadata, flip, rows_of, train_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from andromeda.data import packing
from andromeda.data.packed import PackedDataset, document_starts
from andromeda.files import checksum


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def build(tokenizer, tmp_path):
    return builder(tokenizer, tmp_path / "cache")


@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=4))
def test_document_starts(rows):
    expected = []
    for row in rows:
        start, starts = 0, []
        for index, token in enumerate(row):
            starts.append(start)
            if token == 0:
                start = index + 1
        expected.append(starts)
    starts = document_starts(np.array(rows), 0)
    assert starts.dtype == np.int32
    assert starts.tolist() == expected


def test_items(build, tokenizer):
    dataset = build(doc_mask=True, label_first_token=False)
    item = dataset[3]
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in item.items()} == {
        "input_ids": (torch.int64, (SEQ_LEN,)),
        "labels": (torch.int64, (SEQ_LEN,)),
        "key_start": (torch.int32, (SEQ_LEN,)),
    }
    ends = 0
    for index in range(len(dataset)):
        item = dataset[index]
        after_end = torch.zeros(SEQ_LEN, dtype=torch.bool)
        after_end[1:] = item["input_ids"][:-1] == tokenizer.tokenizer.eos_token_id
        ends += after_end.sum()
        assert torch.equal(item["labels"], torch.where(after_end, -100, item["input_ids"]))
        assert torch.equal(item["key_start"], torch.from_numpy(document_starts(item["input_ids"].numpy()[None], 0)[0]))
    assert ends > 0
    plain = build()[3]
    assert sorted(plain) == ["input_ids", "labels"]
    assert torch.equal(plain["labels"], plain["input_ids"])
    plain["labels"].zero_()
    assert plain["input_ids"].any()
    assert build()[3]["labels"].any()


def test_indices(build):
    dataset = build()
    last = len(dataset) - 1
    assert torch.equal(dataset[-1]["input_ids"], dataset[last]["input_ids"])
    assert torch.equal(dataset[np.int64(2)]["input_ids"], dataset[torch.tensor(2)]["input_ids"])
    batch = dataset.__getitems__([5, 0, 5])
    assert [item["input_ids"].tolist() for item in batch] == [dataset[i]["input_ids"].tolist() for i in (5, 0, 5)]
    assert dataset.__getitems__([]) == []
    for index in (last + 1, -last - 2):
        with pytest.raises(IndexError, match=rf"must be in {-last - 1} \.\.\. {last}, got {index}"):
            dataset[index]
    with pytest.raises(TypeError):
        dataset["input_ids"]
    assert len(list(dataset)) == len(dataset)


def test_data_loader_and_pickle(build):
    dataset = build(doc_mask=True)
    copy = pickle.loads(pickle.dumps(dataset))
    assert rows_of(copy) == rows_of(dataset)
    assert "key_start" in copy[0]
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=4))
    assert batches[0]["input_ids"].shape == (4, SEQ_LEN)
    assert torch.cat([batch["input_ids"] for batch in batches]).tolist() == rows_of(dataset)


def test_rows_in_several_record_batches(build, monkeypatch, tmp_path):
    expected = {kind: rows_of(build(packing=kind)) for kind in ("stream", "bfd")}
    monkeypatch.setattr(packing, "BLOCK_BYTES", 3 * SEQ_LEN * 2)
    for kind, rows in expected.items():
        dataset = build(packing=kind, cache_dir=tmp_path / "small")
        assert len(dataset._batches) == -(-len(dataset) // 3)
        assert rows_of(dataset) == rows


def test_underlying_dataset(build):
    dataset = build()
    assert isinstance(dataset.hf, datasets.Dataset)
    assert dataset.hf["input_ids"][:] == rows_of(dataset)


@pytest.mark.parametrize("kind", ["stream", "bfd"])
def test_rows_know_their_checksums(build, kind):
    dataset = build(packing=kind)
    assert dataset.verify() is True
    assert dataset.content_checksum == checksum(dataset.path / "data.arrow")
    assert dataset.content_checksum != build(seq_len=8, packing=kind).content_checksum
    size = (dataset.path / "data.arrow").stat().st_size
    for offset in (0, size // 3, size // 2, size - 1):
        flip(dataset.path / "data.arrow", offset)
        with pytest.raises(ValueError, match=r"is damaged: data.arrow has other content than was written .*build it"):
            dataset.verify()
        flip(dataset.path / "data.arrow", offset)
    assert dataset.verify() is True
    (dataset.path / "data.arrow").unlink()
    with pytest.raises(ValueError, match=r"is damaged: data.arrow is missing"):
        dataset.verify()


def test_rows_of_older_versions_stay_readable(build):
    dataset = build()
    metadata = json.loads((dataset.path / "metadata.json").read_text())
    kept = {name: value for name, value in metadata.items() if "xxh3" not in name}
    assert len(metadata) - len(kept) == 2
    (dataset.path / "metadata.json").write_text(json.dumps(kept))
    older = build()  # from the cache
    assert older.verify() is False
    assert rows_of(older) == rows_of(dataset)
    assert older.content_checksum == dataset.content_checksum


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seq_len": 0}, "seq_len must be an integer from 1 to"),
        ({"seq_len": 16.0}, "seq_len must be an integer from 1 to"),
        ({"seq_len": 17}, "must have the columns"),
        ({"rows": -1}, "rows must be an integer from 1"),
        ({"rows": True}, "rows must be an integer from 1"),
        ({"rows_per_batch": 0}, "rows_per_batch must be an integer from 1"),
        ({"vocab_size": "290"}, "vocab_size must be an integer from 1"),
        ({"eos_token_id": 290}, r"eos_token_id must be in 0 ... 289, got 290"),
        ({"pad_token_id": None}, r"pad_token_id must be in 0 ... 289, got None"),
        ({"dtype": "uint32"}, "must have the columns"),
        ({"dtype": "float16"}, "dtype must be uint16 or uint32, got 'float16'"),
        ({"packing": "bfd"}, "must have the columns"),
        ({"packing": []}, r"packing must be stream or bfd, got \[\]"),
        ({"statistics": 3}, "statistics must be an object, got 3"),
        ({"tokenizer_hash": 3}, "tokenizer_hash must be a string, got 3"),
        ({"format": {}}, "must have format 1, got {}"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_metadata_is_checked(build, values, message):
    path = build().path
    change_metadata(path, **values)
    with pytest.raises(ValueError, match=f"PackedDataset: .*metadata.json.*{message}|data.arrow {message}"):
        PackedDataset(path)


def write_rows(path, columns, **values):
    """Give the data set another file of rows, with metadata that lets it be opened."""
    batch = pyarrow.record_batch(columns)
    with pyarrow.OSFile(str(path / "data.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, batch.schema) as stream:
        stream.write_batch(batch)
    change_metadata(path, data_bytes=(path / "data.arrow").stat().st_size, **values)


def ids_column(kind, width=SEQ_LEN, rows=3):
    return pyarrow.array([[7] * width] * rows, type=pyarrow.list_(kind, width))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": ids_column(pyarrow.uint32())}, "must have the columns"),
        ({"ids": ids_column(pyarrow.uint16())}, "must have the columns"),
        ({"input_ids": ids_column(pyarrow.uint16(), 8)}, "must have the columns"),
        ({"input_ids": pyarrow.array([[7] * 16] * 3, pyarrow.list_(pyarrow.uint16()))}, "must have the columns"),
        (
            {"input_ids": pyarrow.array([[7] * 16, None, [7] * 16], pyarrow.list_(pyarrow.uint16(), 16))},
            "3 rows, got 2",
        ),
        ({"input_ids": pyarrow.array([[7] * 15 + [None]] * 3, pyarrow.list_(pyarrow.uint16(), 16))}, "an Arrow stream"),
        ({"input_ids": ids_column(pyarrow.uint16(), rows=4)}, "3 rows, got 4"),
    ],
    ids=["dtype", "name", "width", "list", "null-row", "null-id", "rows"],
)
def test_other_arrow_files(build, columns, message):
    path = build().path
    write_rows(path, columns, rows=3)
    with pytest.raises(ValueError, match=f"PackedDataset: .*data.arrow must (be|have|hold) .*|{message}") as caught:
        PackedDataset(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("lengths", [[0, 3, 4], [3, 4, 17], [-1, 3, 4], [3, None, 4]], ids=str)
def test_lengths_of_padded_rows_are_checked(build, lengths):
    path = build(packing="bfd").path
    columns = {"input_ids": ids_column(pyarrow.uint16()), "length": pyarrow.array(lengths, pyarrow.int32())}
    write_rows(path, columns, rows=3)
    with pytest.raises(ValueError, match=r"data.arrow must (have lengths of 1 to 16|be an Arrow stream)"):
        PackedDataset(path)


@pytest.mark.parametrize("kind", ["stream", "bfd"])
@pytest.mark.parametrize("factor", [20_000, -1, 0])
def test_forged_lengths(build, kind, factor):
    """Reading items of such rows would access memory outside the file and end the process."""
    dataset = build(packing=kind)
    content = (dataset.path / "data.arrow").read_bytes()
    for length in (len(dataset) * SEQ_LEN, len(dataset)):
        assert struct.pack("<q", length) in content
        content = content.replace(struct.pack("<q", length), struct.pack("<q", length * factor))
    (dataset.path / "data.arrow").write_bytes(content)
    change_metadata(dataset.path, rows=max(1, len(dataset) * factor), rows_per_batch=10**8)
    with pytest.raises(ValueError, match=r"data.arrow must (be an Arrow stream|hold \d+ rows)"):
        PackedDataset(dataset.path)


@pytest.mark.parametrize("kind", ["stream", "bfd"])
def test_any_damage_is_refused_or_harmless_to_open(build, kind):
    """After damage to any byte of the headers, opening gives a ValueError or rows and never ends the process."""
    dataset = build(packing=kind)
    content = (dataset.path / "data.arrow").read_bytes()
    random = np.random.default_rng(0)
    for offset in [*range(0, 900, 3), *range(len(content) - 8, len(content))]:
        damaged = bytearray(content)
        damaged[offset] = random.choice([0, 1, 0x7F, 0x80, 0xFF, damaged[offset] ^ 1])
        (dataset.path / "data.arrow").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            opened = PackedDataset(dataset.path)
            assert len(rows_of(opened)) == len(dataset)
        if damaged != content:
            with pytest.raises(ValueError, match=r"data\.arrow has other content"):
                dataset.verify()
