"""DatasetBuilder and PackedDataset: rows, labels, document starts; the cache when builds fail, race or are killed."""

import contextlib
import copy
import errno
import fcntl
import hashlib
import json
import os
import pickle
import pwd
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from andromeda import documents, packing
from andromeda.dataset import DatasetBuilder, PackedDataset, _hashed, default_cache_dir, document_starts
from andromeda.files import checksum
from andromeda.tokenizer import AndromedaTokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
TEXTS = [" ".join(WORDS[(i * j) % 10] for j in range(1 + 7 * i % 40)) for i in range(40)] + ["", " \n", "<eos> is text"]
SEQ_LEN = 16


@pytest.fixture(scope="module")
def tokenizer():
    return AndromedaTokenizer.train(TEXTS, vocab_size=290)


@pytest.fixture
def build(tokenizer, tmp_path):
    """DatasetBuilder(...).build_dataset() with a small row, the test's tokenizer and a cache of its own."""

    def build(source=None, seq_len=SEQ_LEN, **options):
        source = datasets.Dataset.from_dict({"text": TEXTS}) if source is None else source
        options = {"tokenizer": tokenizer, "cache_dir": tmp_path / "cache", **options}
        return DatasetBuilder(source, seq_len, **options).build_dataset()

    return build


def stream_of(tokenizer, texts=TEXTS):
    """All tokens of all documents, made one by one."""
    backend = packing.Encoder(
        packing.packing_tokenizer_json(tokenizer.tokenizer.backend_tokenizer), tokenizer.tokenizer.eos_token_id
    )
    return [token for text in texts if text.strip() for token in backend([text])[0]]


def rows_of(dataset):
    return [dataset[index]["input_ids"].tolist() for index in range(len(dataset))]


def cache_entries(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


# Rows


def test_rows_are_the_stream_of_documents(build, tokenizer):
    dataset = build()
    assert isinstance(dataset, torch.utils.data.Dataset)
    stream = stream_of(tokenizer)
    rows = len(stream) // SEQ_LEN
    assert np.concatenate(rows_of(dataset)).tolist() == stream[: rows * SEQ_LEN]
    assert dataset.statistics == {
        "documents": 41,
        "empty_documents": 2,
        "skipped_documents": 0,
        "repaired_documents": 0,
        "byte_order_marks": 0,
        "files": 0,
        "ignored_files": 0,
        "tokens": len(stream),
        "rows": rows,
        "remainder": len(stream) - rows * SEQ_LEN,
        "padding": 0,
    }
    assert len(dataset) == rows
    assert dataset.vocab_size == len(tokenizer)
    assert dataset.eos_token_id == tokenizer.tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["stream", "bfd"])
def test_processes_do_not_change_the_rows(build, monkeypatch, tmp_path, kind):
    monkeypatch.setattr(packing, "MAX_BATCH_CHARS", 300)  # many batches
    files = []
    for count in (None, 1, 2):
        dataset = build(num_cpu=count, packing=kind, cache_dir=tmp_path / str(count))
        files.append((dataset.path.name, (dataset.path / "data.arrow").read_bytes(), dataset.metadata))
    assert files[0] == files[1] == files[2]


def test_one_document_of_many_rows(build, tokenizer):
    text = "long " * 5000
    dataset = build(datasets.Dataset.from_dict({"text": [text]}))
    assert len(dataset) > 100
    assert np.concatenate(rows_of(dataset)).tolist() == stream_of(tokenizer, [text])[: len(dataset) * SEQ_LEN]


def test_best_fit_rows(build, tokenizer):
    dataset = build(packing="bfd", doc_mask=True)
    ids, labels, starts = (torch.stack([dataset[i][name] for i in range(len(dataset))]).numpy() for name in
                           ("input_ids", "labels", "key_start"))  # fmt: skip
    real = labels != -100
    assert sorted(ids[real]) == sorted(stream_of(tokenizer))
    assert (ids[~real] == tokenizer.tokenizer.pad_token_id).all()
    assert (labels[real] == ids[real]).all()
    assert dataset.statistics["padding"] == (~real).sum()
    assert dataset.statistics["remainder"] == 0
    for row, lengths in zip(starts, real.sum(1), strict=True):
        assert (row[lengths:] == lengths).all()  # padding sees padding alone
    assert dataset.hf.column_names == ["input_ids", "length"]


def test_fewer_tokens_than_a_row(build, tmp_path):
    source = datasets.Dataset.from_dict({"text": ["short", "", "two"]})
    with pytest.raises(
        ValueError, match=r"at least seq_len=512 tokens, got \d+ in 2 documents; 1 empty.*packing='bfd'"
    ):
        build(source, 512)
    assert cache_entries(tmp_path) == []
    dataset = build(source, 512, packing="bfd")
    assert len(dataset) == 1
    assert dataset.statistics["padding"] == 512 - dataset.statistics["tokens"]


@pytest.mark.parametrize("kind", ["stream", "bfd"])
@pytest.mark.parametrize("texts", [[], ["", None, " "]], ids=["none", "empty"])
def test_no_documents(build, texts, kind):
    features = datasets.Features({"text": datasets.Value("string")})
    with pytest.raises(ValueError, match="must hold documents, found none with text"):
        build(datasets.Dataset.from_dict({"text": texts}, features=features), packing=kind)


@pytest.mark.parametrize(("size", "dtype"), [(65535, "uint16"), (65536, "uint32")])
def test_width_follows_the_vocabulary(build, tokenizer, size, dtype):
    made = AndromedaTokenizer(tokenizer.tokenizer, extra_ids=size - len(tokenizer))
    dataset = build(tokenizer=made)
    assert dataset.hf.features["input_ids"] == datasets.List(datasets.Value(dtype), length=SEQ_LEN)
    assert dataset.vocab_size == size
    assert np.concatenate(rows_of(dataset)).tolist() == stream_of(tokenizer)[: len(dataset) * SEQ_LEN]


@pytest.mark.parametrize("kind", ["stream", "bfd"])
def test_documents_without_tokens_are_empty(build, kind):
    made = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizers.Replace("x", ""), pre_tokenizers.WhitespaceSplit()
    dataset = build(datasets.Dataset.from_dict({"text": ["a a", "xxx", "a b"]}), 3, tokenizer=made, packing=kind)
    assert rows_of(dataset) == [[3, 3, 0], [3, 2, 0]]
    assert (dataset.statistics["documents"], dataset.statistics["empty_documents"]) == (2, 1)


@pytest.mark.parametrize("kind", ["stream", "bfd"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "stream"])
def test_long_documents_are_cut_without_a_trace(build, tokenizer, monkeypatch, tmp_path, kind, name):
    """Read in parts, tokenised in pieces, by one process and by two: the same rows as of whole documents."""
    texts = ["alpha beta, gamma\n" * 400 + "漢字。" * 50, " ".join(TEXTS)][: 1 if name == "a.txt" else 2]
    path = tmp_path / name
    if name == "stream":
        path = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
    else:
        path.write_text(texts[0] if name == "a.txt" else "".join(json.dumps({"text": text}) + "\n" for text in texts))
    built = [build(path, packing=kind, cache_dir=tmp_path / "whole")]
    monkeypatch.setattr(documents, "BLOCK_BYTES", 500, raising=False)
    monkeypatch.setattr(packing, "PIECE_CHARS", 700)
    monkeypatch.setattr(packing, "MAX_BATCH_CHARS", 1500)
    built += [build(path, num_cpu=count, packing=kind, cache_dir=tmp_path / str(count)) for count in (1, 2)]
    assert len({dataset.content_checksum for dataset in built}) == 1
    assert built[0].statistics == built[1].statistics == built[2].statistics
    assert built[0].statistics["documents"] == len(texts)
    if kind == "stream":
        rows = np.concatenate(rows_of(built[0])).tolist()
        assert rows == stream_of(tokenizer, texts)[: len(rows)] and len(rows) > 1000


# Items


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


# Tokenizers


def test_kinds_of_tokenizer(build, tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer" / "tokenizer.json"), eos_token="<eos>")
    kinds = [tokenizer, tokenizer.tokenizer, tokenizer.tokenizer.backend_tokenizer, fast, tmp_path / "tokenizer"]
    kinds += [str(tmp_path / "tokenizer"), tmp_path / "tokenizer" / "tokenizer.json"]
    expected = rows_of(build(tokenizer=kinds[0]))
    for number, kind in enumerate(kinds):
        assert rows_of(build(tokenizer=kind, cache_dir=tmp_path / str(number))) == expected
    fast.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an end-of-sequence token"):
        build(tokenizer=fast)
    with pytest.raises(TypeError, match=r"tokenizer must be a name, a path or a tokenizer of .*, got int"):
        build(tokenizer=3)


def test_truncation_left_behind_is_ignored(build, tokenizer, tmp_path):
    expected = rows_of(build())
    tokenizer.tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.tokenizer.backend_tokenizer.enable_padding(length=50)
    try:
        assert rows_of(build(cache_dir=tmp_path / "other")) == expected
        assert tokenizer.tokenizer.backend_tokenizer.truncation["max_length"] == 3
    finally:
        tokenizer.tokenizer.backend_tokenizer.no_truncation()
        tokenizer.tokenizer.backend_tokenizer.no_padding()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seq_len": 0}, ValueError, "seq_len must be at least 1, got 0"),
        ({"seq_len": 8.0}, TypeError, "seq_len must be an integer, got 8.0"),
        ({"num_cpu": -1}, ValueError, "num_cpu must be at least 1, got -1"),
        ({"packing": "tight"}, ValueError, "packing must be one of stream, bfd, got 'tight'"),
        ({"errors": "ignore"}, ValueError, "errors must be one of strict, replace, skip, got 'ignore'"),
        ({"hf_account_repo": 3}, TypeError, "hf_account_repo must be a non-empty string or None, got 3"),
        ({"seq_length": 8}, TypeError, "seq_length"),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        DatasetBuilder("corpus", **arguments)


# The cache


def test_cache_is_used(build, monkeypatch, tmp_path):
    first = build()
    monkeypatch.setattr(DatasetBuilder, "_write", None)
    again = build(doc_mask=True, num_cpu=2)
    assert again.path == first.path
    assert rows_of(again) == rows_of(first)
    assert cache_entries(tmp_path) == [first.path.name]


def test_cache_key(build, tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" ".join(TEXTS))
    other = AndromedaTokenizer(tokenizer.tokenizer, extra_ids=1)
    variants = [{}, {"seq_len": 8}, {"packing": "bfd"}, {"errors": "skip"}, {"tokenizer": other}]
    variants += [
        {"separator": " beta "},
        {"format": "text"},
        {"tokenizer": AndromedaTokenizer(tokenizer.tokenizer, "</s>")},
    ]
    variants += [{"tokenizer": AndromedaTokenizer(tokenizer.tokenizer, pad_token="<fill>")}]
    paths = [build(path, **variant).path for variant in variants]
    assert len(set(paths)) == len(variants)
    assert paths[0].name.startswith("a.txt-")
    assert build(path).path == paths[0]
    path.write_text(" ".join(TEXTS[::-1]) + " more")
    assert build(path).path not in paths


def test_stream_of_records_is_keyed_by_content(build, tmp_path):
    source = datasets.Dataset.from_dict({"text": TEXTS})
    first = build(source.to_iterable_dataset())
    again = build(source.to_iterable_dataset())
    assert first.path == again.path
    assert rows_of(again) == rows_of(build(source))
    assert build(source.select(range(30)).to_iterable_dataset()).path != first.path
    assert len(cache_entries(tmp_path)) == 3


def test_parts_of_one_document_are_not_two_documents():
    digests = set()
    for texts in (["ab", "c"], [packing.Unfinished("ab"), "c"], ["a", "bc"], ["abc"]):
        digest = hashlib.sha256()
        assert list(_hashed(texts, digest)) == texts
        digests.add(digest.digest())
    assert len(digests) == 4


def damage_truncate(path):
    with open(path / "data.arrow", "rb+") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 100)


def damage_overwrite(path):
    size = (path / "data.arrow").stat().st_size
    (path / "data.arrow").write_bytes(b"\0" * size)


def damage_rows(path):
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps({**metadata, "rows": metadata["rows"] + 1}))


def damage_format(path):
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps({**metadata, "format": 0}))


DAMAGES = [
    (damage_truncate, r"data.arrow must have \d+ bytes, got \d+"),
    (damage_overwrite, "must be an Arrow stream|must hold"),
    (damage_rows, r"must hold \d+ rows, got \d+"),
    (damage_format, "must have format 1, got 0"),
    (lambda path: (path / "metadata.json").write_text("{"), "metadata.json must be JSON"),
    (lambda path: (path / "metadata.json").write_text("[]"), "must have format 1"),
    (lambda path: (path / "metadata.json").write_text('{"format": 1}'), "must have data_bytes, dtype, .*, got none"),
    (lambda path: (path / "metadata.json").unlink(), "must hold metadata.json and data.arrow"),
    (lambda path: (path / "data.arrow").unlink(), "must hold metadata.json and data.arrow"),
]


@pytest.mark.parametrize(
    ("damage", "message"),
    DAMAGES,
    ids=["truncated", "zeros", "rows", "format", "half-json", "other-json", "no-keys", "no-metadata", "no-data"],
)
def test_damaged_cache_is_built_again(build, tmp_path, damage, message):
    whole = build()
    expected = rows_of(whole)
    damage(whole.path)
    with pytest.raises(ValueError, match=f"PackedDataset: .*({message})"):
        PackedDataset(whole.path)
    with pytest.warns(UserWarning, match="building again what is damaged"):
        repaired = build()
    assert rows_of(repaired) == expected
    assert cache_entries(tmp_path) == [repaired.path.name]


# Checksums


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


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


def change_metadata(path, **values):
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps({**metadata, **values}))


def test_metadata_knows_its_checksum(build, tmp_path):
    dataset = build()
    change_metadata(dataset.path, eos_token_id=dataset.eos_token_id + 1)
    changed = PackedDataset(dataset.path)
    with pytest.raises(ValueError, match=r"is damaged: metadata.json has other content than was written"):
        changed.verify()
    with pytest.warns(UserWarning, match=r"building again what is damaged .* metadata.json has other content"):
        assert build().eos_token_id == dataset.eos_token_id


def test_damaged_bytes_in_the_cache_are_said_and_built_again(build, tmp_path):
    dataset = build()
    expected, content = rows_of(dataset), (dataset.path / "data.arrow").read_bytes()
    flip(dataset.path / "data.arrow", content.index(b"".join(np.uint16(expected[5]))) + 2)
    assert rows_of(PackedDataset(dataset.path)) != expected
    with pytest.warns(
        UserWarning, match=r"building again what is damaged in the cache: .*data.arrow has other content"
    ):
        repaired = build()
    assert rows_of(repaired) == expected
    assert repaired.verify()
    assert cache_entries(tmp_path) == [repaired.path.name]


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


# What is read from the disk is checked before it is believed


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
    """Give the data set another file of rows, with the metadata that it needs to be looked at."""
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
    """An item of them would be read outside the file, which ends the process."""
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
    """Bytes of the headers, one after the other: an error or rows, never another exception or the end."""
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


# Builds that fail


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, MemoryError])
@pytest.mark.parametrize("kind", ["stream", "bfd"])
@pytest.mark.parametrize("count", [1, 2])
def test_failed_build_leaves_nothing(build, monkeypatch, tmp_path, error, kind, count):
    def fail(*_):
        raise error

    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(packing.RowWriter, "write", fail)
        build(packing=kind, num_cpu=count)
    assert cache_entries(tmp_path) == []
    assert len(build(packing=kind)) > 10


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to see which processes run")
def test_killed_build(build, tokenizer, tmp_path):
    """SIGKILL in the middle: nothing readable, no orphans; the next build succeeds and tidies up."""
    tokenizer.save(tmp_path / "tokenizer")
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    code = """if True:
        import sys, time
        from andromeda import packing
        from andromeda.dataset import DatasetBuilder
        workers = []
        class Recorded(packing._Worker):
            def __init__(self):
                super().__init__()
                workers.append(self._process.pid)
        packing._Worker = Recorded
        def wait(*_):
            print(*workers, flush=True)
            time.sleep(600)
        packing.StreamPacker.add = wait
        DatasetBuilder(sys.argv[1], 16, 2, tokenizer=sys.argv[2], cache_dir=sys.argv[3]).build_dataset()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code, source, tmp_path / "tokenizer", tmp_path / "cache"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(is_running, workers))
    (left,) = (tmp_path / "cache").iterdir()
    an_hour_ago = time.time() - 3600
    os.utime(left, (an_hour_ago, an_hour_ago))
    build(source, 8)  # another build does not disturb a running one
    assert left.exists()
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))
    assert left.name.startswith(".building-")
    with pytest.raises(ValueError, match=r"must hold metadata\.json"):
        PackedDataset(left)
    os.utime(left, (an_hour_ago, an_hour_ago))
    dataset = build(source)
    assert np.concatenate(rows_of(dataset)).tolist() == stream_of(tokenizer)[: len(dataset) * SEQ_LEN]
    assert not left.exists()


def test_what_killed_builds_left(build, tmp_path):
    """Removed if no process has locked it, unless it is so young that its builder may not have come to that yet."""
    cache, minutes_ago = tmp_path / "cache", time.time() - 61
    cache.mkdir()
    for name in (".building-young", ".building-stale", ".building-locked", "other", ".other"):
        (cache / name).mkdir()
        (cache / name / "data.arrow").write_text("")
        if name != ".building-young":
            os.utime(cache / name, (minutes_ago, minutes_ago))
    lock = os.open(cache / ".building-locked", os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        dataset = build()
    finally:
        os.close(lock)
    assert cache_entries(tmp_path) == sorted(
        [".building-young", ".building-locked", "other", ".other", dataset.path.name]
    )
    build(seq_len=8)
    assert ".building-locked" not in cache_entries(tmp_path)


def test_killed_worker(build, monkeypatch, tmp_path):
    class Mortal(packing._Worker):
        def encode(self, texts):
            os.kill(self._process.pid, signal.SIGKILL)
            return super().encode(texts)

    monkeypatch.setattr(packing, "_Worker", Mortal)
    with pytest.raises(RuntimeError, match=r"tokenizer process was killed by signal 9.*num_cpu=1"):
        build(num_cpu=2)
    assert cache_entries(tmp_path) == []


def test_two_builders_of_the_same(build, monkeypatch, tmp_path):
    """The second builder finishes while the first is at work; both get whole data sets, nothing else is left."""
    finish = packing.StreamPacker.finish
    datasets_built = []

    def meet(self):
        monkeypatch.setattr(packing.StreamPacker, "finish", finish)
        datasets_built.append(build())
        return finish(self)

    monkeypatch.setattr(packing.StreamPacker, "finish", meet)
    first = build()
    assert first.path == datasets_built[0].path
    assert rows_of(first) == rows_of(datasets_built[0])
    assert cache_entries(tmp_path) == [first.path.name]


def test_script_without_main_guard(tokenizer, tmp_path):
    """Worker processes do not run the calling script again."""
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text(" ".join(TEXTS))
    script = tmp_path / "script.py"
    script.write_text("""if True:
        import sys
        from andromeda.dataset import DatasetBuilder
        print(len(DatasetBuilder(sys.argv[1], 16, 2, tokenizer=sys.argv[2], cache_dir=sys.argv[3]).build_dataset()))
    """)
    result = subprocess.run(
        [sys.executable, script, tmp_path / "a.txt", tmp_path / "tokenizer", tmp_path / "cache"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert int(result.stdout) > 10


# Disk and hub


def test_disk_space_is_estimated_first(build, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50))
    with pytest.raises(OSError, match=r"no space for the packed rows, about 0.0 MB needed") as caught:
        build()
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "cache")
    assert cache_entries(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            r"no space for the packed rows, about \d+.\d MB needed, \d+.\d MB free; nothing was kept. Make.*cache'",
        ),
        (
            errno.EDQUOT,
            r"the disk quota leaves no space for the packed rows, about .* needed, .* free; nothing was kept",
        ),
        (errno.EFBIG, "cannot write packed rows to .*/cache: File too large; nothing was kept.*cache_dir.*ulimit -f"),
        (
            errno.EROFS,
            "cannot write packed rows to .*/cache: Read-only file system; nothing was kept.*cache_dir.*mounted",
        ),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
@pytest.mark.parametrize("what", ["rows", "spool", "metadata"])
def test_disk_fills_up(build, monkeypatch, tmp_path, number, message, what):
    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    owner, name = {
        "rows": (packing._HashedFile, "write"),
        "spool": (packing, "_write_all"),
        "metadata": (Path, "write_text"),
    }[what]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(OSError, match=message) as caught:
        build(packing="bfd")
    assert caught.value.errno == number
    assert cache_entries(tmp_path) == []


@pytest.mark.parametrize("kind", ["stream", "bfd"])
@pytest.mark.parametrize("limit", [0, 1000, 2000])
def test_a_real_limit(build, tmp_path, kind, limit):
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(OSError, match=r"cannot write packed rows to .*/cache: File too large.*ulimit -f") as caught:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            build(packing=kind)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert caught.value.errno == errno.EFBIG
    assert cache_entries(tmp_path) == []
    assert len(build(packing=kind)) > 10


@pytest.mark.parametrize("place", ["/proc/rows", "/dev/null/rows"])
def test_cache_that_cannot_be_made(build, place):
    with pytest.raises(
        OSError, match=f"cannot write packed rows to {place}: .*Another place can be chosen with cache_dir"
    ):
        build(cache_dir=place)


def test_errors_of_the_source_stay_what_they_are(build, monkeypatch, tmp_path):
    def unreadable(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/corpus.txt")
        yield

    monkeypatch.setattr(documents._Rows, "documents", unreadable, raising=False)
    with pytest.raises(PermissionError, match="Permission denied: '/elsewhere/corpus"):
        build()


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


def test_upload(build, monkeypatch):
    uploads = []

    def push(self, repository):
        uploads.append((repository, len(self), self.features))
        if len(uploads) == 1:
            raise ConnectionError("the line is down")

    monkeypatch.setattr(datasets.Dataset, "push_to_hub", push)
    with pytest.raises(OSError, match=r"cannot upload to me/rows: the line is down.*complete in .*again only uploads"):
        build(hf_account_repo="me/rows")
    monkeypatch.setattr(DatasetBuilder, "_write", None)  # a second build would fail
    dataset = build(hf_account_repo="me/rows")
    assert uploads[0] == uploads[1]
    assert uploads[1] == ("me/rows", len(dataset), dataset.hf.features)
    build()
    assert len(uploads) == 2


def test_upload_without_network_or_token(build, monkeypatch):
    import huggingface_hub

    for proxy in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    offline = huggingface_hub.errors.OfflineModeIsEnabled("no network in this test")

    def push(self, repository):
        raise offline

    monkeypatch.setattr(datasets.Dataset, "push_to_hub", push)
    with pytest.raises(OSError, match=r"no network in this test.*hf auth login.*The data set is complete in") as caught:
        build(hf_account_repo="me/rows")
    assert caught.value.__cause__ is offline
    assert len(build()) > 10


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ANDROMEDA_CACHE": "/a", "XDG_CACHE_HOME": "/x"}, "/a/datasets"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/andromeda/datasets"),
        ({"HOME": "/h"}, "/h/.cache/andromeda/datasets"),
    ],
    ids=["ANDROMEDA_CACHE", "XDG_CACHE_HOME", "HOME"],
)
def test_default_cache_dir(monkeypatch, environment, expected):
    for name in ("ANDROMEDA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_cache_dir() == Path(expected)
    assert DatasetBuilder("corpus").cache_dir == Path(expected)


@pytest.fixture
def no_account(monkeypatch):
    """A user without an entry in the table of accounts, and nothing that says where a cache may be."""

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("ANDROMEDA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("home", [None, "", "relative"])
@pytest.mark.parametrize("options", [{}, {"cache_dir": "~/rows"}, {"cache_dir": Path("~")}], ids=str)
def test_no_home(no_account, monkeypatch, home, options):
    if home is not None:
        monkeypatch.setenv("HOME", home)
    with pytest.raises(
        ValueError, match=r"home directory .* not known: HOME .*; set ANDROMEDA_CACHE, or pass .*cache_dir"
    ):
        DatasetBuilder("corpus", **options)


def test_no_home_is_needed(no_account, monkeypatch, tmp_path):
    assert DatasetBuilder("corpus", cache_dir=tmp_path).cache_dir == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache_dir() == Path("/x/andromeda/datasets")
    monkeypatch.setenv("ANDROMEDA_CACHE", "/a")
    assert default_cache_dir() == Path("/a/datasets")


def test_home_of_the_account(monkeypatch):
    for name in ("ANDROMEDA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    expected = Path(pwd.getpwuid(os.getuid()).pw_dir, ".cache/andromeda/datasets")
    monkeypatch.setenv("HOME", "")
    assert default_cache_dir() == expected
    monkeypatch.delenv("HOME")
    assert default_cache_dir() == expected


def test_relative_names_of_caches(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("XDG_CACHE_HOME", "x")
    monkeypatch.delenv("ANDROMEDA_CACHE", raising=False)
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME must be an absolute path, got 'x': it is not used"):
        assert default_cache_dir() == Path("/h/.cache/andromeda/datasets")
    monkeypatch.setenv("ANDROMEDA_CACHE", "a")
    assert default_cache_dir() == tmp_path / "a" / "datasets"
    monkeypatch.setenv("ANDROMEDA_CACHE", "~/a")
    assert default_cache_dir() == Path("/h/a/datasets")
    for name, expected in (("cache", tmp_path / "cache"), ("~/rows", Path("/h/rows")), (".", tmp_path)):
        assert DatasetBuilder("corpus", cache_dir=name).cache_dir == expected


@pytest.mark.parametrize(
    ("cache_dir", "error", "message"),
    [
        ("", ValueError, "cache_dir must not be empty"),
        (b"rows", TypeError, "cache_dir must be a path, got b'rows'"),
        (7, TypeError, "cache_dir must be a path, got 7"),
        ("~nobody-of-this-name/x", ValueError, "cache_dir must be in the home directory of an account that there is"),
    ],
    ids=str,
)
def test_bad_cache_dir(cache_dir, error, message):
    with pytest.raises(error, match=f"DatasetBuilder: {message}"):
        DatasetBuilder("corpus", cache_dir=cache_dir)


def test_relative_paths_are_those_of_the_start(tokenizer, monkeypatch, tmp_path):
    """Everything that was given as a relative path is found after a change of the directory."""
    monkeypatch.chdir(tmp_path)
    tokenizer.save("tokenizer")
    Path("a.txt").write_text(" ".join(TEXTS))
    builder = DatasetBuilder("a.txt", SEQ_LEN, tokenizer="tokenizer", cache_dir="cache")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    rows = builder.build_dataset()
    assert rows.path.parent == tmp_path / "cache"
    monkeypatch.chdir(tmp_path)
    again = PackedDataset(rows.path.relative_to(tmp_path), doc_mask=True)
    monkeypatch.chdir("/")
    assert list(tmp_path.glob("elsewhere/*")) == []
    for dataset in (rows, again, copy.deepcopy(again), pickle.loads(pickle.dumps(again)), copy.copy(again)):
        assert rows_of(dataset) == rows_of(rows)
        assert dataset.path == rows.path
        assert dataset.verify()
        assert len(dataset.hf) == len(rows)
    with pytest.raises(ValueError, match="PackedDataset: path must not be empty"):
        PackedDataset("")
