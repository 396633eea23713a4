"""DatasetBuilder: its rows, and the state of the disk after a build that failed or was killed."""

import copy
import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from built_rows import SEQ_LEN, TEXTS, builder, cache_entries, rows_of, stream_of, train_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from andromeda.data import packing, pieces, readers, sources, workers
from andromeda.data.builder import DatasetBuilder, _hashed
from andromeda.data.packed import PackedDataset
from andromeda.data.tokenizer import AndromedaTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer()


@pytest.fixture
def build(tokenizer, tmp_path):
    return builder(tokenizer, tmp_path / "cache")


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
    monkeypatch.setattr(workers, "MAX_BATCH_CHARS", 300)  # many batches
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
        assert (row[lengths:] == lengths).all()  # padding sees only padding
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
    """Documents read in parts and tokenised in pieces, by one or two processes, give the rows of whole documents."""
    texts = ["alpha beta, gamma\n" * 400 + "漢字。" * 50, " ".join(TEXTS)][: 1 if name == "a.txt" else 2]
    path = tmp_path / name
    if name == "stream":
        path = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
    else:
        path.write_text(texts[0] if name == "a.txt" else "".join(json.dumps({"text": text}) + "\n" for text in texts))
    built = [build(path, packing=kind, cache_dir=tmp_path / "whole")]
    monkeypatch.setattr(readers, "BLOCK_BYTES", 500)
    monkeypatch.setattr(pieces, "PIECE_CHARS", 700)
    monkeypatch.setattr(workers, "MAX_BATCH_CHARS", 1500)
    built += [build(path, num_cpu=count, packing=kind, cache_dir=tmp_path / str(count)) for count in (1, 2)]
    assert len({dataset.content_checksum for dataset in built}) == 1
    assert built[0].statistics == built[1].statistics == built[2].statistics
    assert built[0].statistics["documents"] == len(texts)
    if kind == "stream":
        rows = np.concatenate(rows_of(built[0])).tolist()
        assert rows == stream_of(tokenizer, texts)[: len(rows)] and len(rows) > 1000


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


def test_parts_of_one_document_are_not_two_documents():
    digests = set()
    for texts in (["ab", "c"], [workers.Unfinished("ab"), "c"], ["a", "bc"], ["abc"]):
        digest = hashlib.sha256()
        assert list(_hashed(texts, digest)) == texts
        digests.add(digest.digest())
    assert len(digests) == 4


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
    """SIGKILL during a build leaves nothing readable and no orphans; the next build succeeds and cleans up."""
    tokenizer.save(tmp_path / "tokenizer")
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    code = """if True:
        import sys, time
        from andromeda.data import packing, workers
        from andromeda.data.builder import DatasetBuilder
        pids = []
        class Recorded(workers._Worker):
            def __init__(self):
                super().__init__()
                pids.append(self._process.pid)
        workers._Worker = Recorded
        def wait(*_):
            print(*pids, flush=True)
            time.sleep(600)
        packing.StreamPacker.add = wait
        DatasetBuilder(sys.argv[1], 16, 2, tokenizer=sys.argv[2], cache_dir=sys.argv[3]).build_dataset()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code, source, tmp_path / "tokenizer", tmp_path / "cache"],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(is_running, pids))
    (left,) = (tmp_path / "cache").iterdir()
    an_hour_ago = time.time() - 3600
    os.utime(left, (an_hour_ago, an_hour_ago))
    build(source, 8)  # another build does not disturb a running one
    assert left.exists()
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, pids))
    assert left.name.startswith(".building-")
    with pytest.raises(ValueError, match=r"must hold metadata\.json"):
        PackedDataset(left)
    os.utime(left, (an_hour_ago, an_hour_ago))
    dataset = build(source)
    assert np.concatenate(rows_of(dataset)).tolist() == stream_of(tokenizer)[: len(dataset) * SEQ_LEN]
    assert not left.exists()


def test_killed_worker(build, monkeypatch, tmp_path):
    class Mortal(workers._Worker):
        def encode(self, texts):
            os.kill(self._process.pid, signal.SIGKILL)
            return super().encode(texts)

    monkeypatch.setattr(workers, "_Worker", Mortal)
    with pytest.raises(RuntimeError, match=r"tokenizer process was killed by signal 9.*num_cpu=1"):
        build(num_cpu=2)
    assert cache_entries(tmp_path) == []


def test_script_without_main_guard(tokenizer, tmp_path):
    """Worker processes do not run the calling script again."""
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text(" ".join(TEXTS))
    script = tmp_path / "script.py"
    script.write_text("""if True:
        import sys
        from andromeda.data.builder import DatasetBuilder
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
@pytest.mark.parametrize("part", ["rows", "spool", "metadata"])
def test_disk_fills_up(build, monkeypatch, tmp_path, number, message, part):
    def full(*_, **__):
        raise OSError(number, os.strerror(number))

    owner, name = {
        "rows": (packing._HashedFile, "write"),
        "spool": (packing, "_write_all"),
        "metadata": (Path, "write_text"),
    }[part]
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


def test_errors_of_the_source_stay_what_they_are(build, monkeypatch, tmp_path):
    def unreadable(*_):
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/corpus.txt")
        yield

    monkeypatch.setattr(sources._Rows, "documents", unreadable, raising=False)
    with pytest.raises(PermissionError, match="Permission denied: '/elsewhere/corpus"):
        build()


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


def test_relative_paths_are_those_of_the_start(tokenizer, monkeypatch, tmp_path):
    """All relative paths still mean the same files after a change of the directory."""
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
