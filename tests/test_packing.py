"""Packing and the tokenizer processes: no token is lost, made or moved, however the work is cut."""

import os
import signal
from array import array
from itertools import chain, pairwise

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from andromeda import files, packing
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


# Long documents in pieces


FRAGMENTS = [
    *(
        "a",
        "the",
        "Word",
        "don't",
        "x1",
        "3",
        "1234567",
        "ü",
        "e\u0301",
        "a\u0323\u0307",
        "漢字",
        "字",
        "。",
        "カタ",
        "한국",
        "ع",
    ),
    *(
        "👩‍👩‍👧",
        "🏽",
        "🇩🇪",
        ".",
        ", ",
        "...",
        "<eos>",
        "<pad>",
        "_",
        "\n",
        "\r\n",
        "\t",
        " ",
        "  ",
        " " * 9,
        "\n\n\n",
        "\xa0",
    ),
    *("\u3000", "\u200b", "- ", " (", ") ", "'s", "▁", "Ġ"),
]
DOCUMENTS = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=60).map("".join)


def make_tokenizers():
    """Tokenizers that differ in how words are found, all trained on the fragments."""
    corpus = [" ".join(FRAGMENTS), "".join(FRAGMENTS), "the Word don't " * 3] * 3
    byte_level = pre_tokenizers.ByteLevel
    kinds = {
        "byte-level": (models.BPE(), None, byte_level(add_prefix_space=False)),
        "prefix-space": (models.BPE(), normalizers.NFC(), byte_level(add_prefix_space=True)),
        "no-regex": (models.BPE(), None, byte_level(add_prefix_space=False, use_regex=False)),
        "metaspace": (models.BPE(unk_token="<unk>"), None, pre_tokenizers.Metaspace()),
        "metaspace-first": (models.BPE(unk_token="<unk>"), None, pre_tokenizers.Metaspace(prepend_scheme="first")),
        "metaspace-whole": (models.BPE(unk_token="<unk>"), None, pre_tokenizers.Metaspace(split=False)),
        "prepend": (models.BPE(unk_token="<unk>"), normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
        "none": (models.BPE(unk_token="<unk>"), None, None),
        "whitespace": (models.WordLevel(unk_token="<unk>"), normalizers.Lowercase(), pre_tokenizers.Whitespace()),
        "bert": (models.WordPiece(unk_token="<unk>"), normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()),
        "strip": (models.Unigram(), normalizers.Strip(), pre_tokenizers.WhitespaceSplit()),
    }  # fmt: skip
    trained = {}
    for name, (model, normalizer, pre_tokenizer) in kinds.items():
        tokenizer = Tokenizer(model)
        if normalizer is not None:
            tokenizer.normalizer = normalizer
        if pre_tokenizer is not None:
            tokenizer.pre_tokenizer = pre_tokenizer
        trainer_of = {"Unigram": trainers.UnigramTrainer, "BPE": trainers.BpeTrainer}
        trainer_of |= {"WordLevel": trainers.WordLevelTrainer, "WordPiece": trainers.WordPieceTrainer}
        options = {"unk_token": "<unk>"} if type(model).__name__ == "Unigram" else {}
        trainer = trainer_of[type(model).__name__](
            vocab_size=400, special_tokens=["<eos>", "<pad>", "<unk>"], show_progress=False, **options
        )
        tokenizer.train_from_iterator(corpus, trainer)
        # Read before words are found, and only where nothing normalizes them to nothing.
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("  ", " (", "Word the")])
        trained[name] = packing.packing_tokenizer_json(tokenizer)
    return trained


@pytest.fixture(scope="module")
def tokenizer_of():
    return make_tokenizers()


CUTS = {  # whether a long text of words is cut
    **dict.fromkeys(("byte-level", "prefix-space", "metaspace", "metaspace-first", "whitespace", "bert"), True),
    **dict.fromkeys(("no-regex", "metaspace-whole", "prepend", "none"), False),
    "strip": True,
}


def as_parts(text, cuts):
    """The text in consecutive parts, cut at these places."""
    places = [0, *sorted({cut % len(text) for cut in cuts} - {0}), len(text)]
    return [packing.Unfinished(text[begin:end]) for begin, end in pairwise(places[:-1])] + [text[places[-2] :]]


@pytest.mark.parametrize("name", CUTS)
@given(documents=st.lists(DOCUMENTS, min_size=1, max_size=3), cuts=st.lists(st.integers(0, 999), max_size=4),
       size=st.integers(2, 40), look=st.sampled_from([12, 256]))  # fmt: skip
@settings(max_examples=4 * settings().max_examples)
def test_pieces_have_the_tokens_of_the_document(tokenizer_of, name, documents, cuts, size, look):
    encode = packing.Encoder(tokenizer_of[name], EOS)
    whole = [encode([text])[0].tolist() for text in documents]
    parts = [part for text in documents for part in as_parts(text, cuts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PIECE_CHARS", size)
        patch.setattr(packing, "SEAM_CHARS", look)
        cut = list(packing.pieces(parts, packing.Seams(tokenizer_of[name])))
    ids, _ = encode(cut)
    assert ids.tolist() == list(chain.from_iterable(whole))
    texts = "".join(text + ("" if isinstance(text, packing.Unfinished) else "\0") for text in cut)
    assert texts == "".join(text + "\0" for text in documents)


@pytest.mark.parametrize(("name", "cuts"), CUTS.items())
def test_which_tokenizers_have_seams(tokenizer_of, monkeypatch, name, cuts):
    monkeypatch.setattr(packing, "PIECE_CHARS", 100)
    text = "a line of 字。" * 200
    cut = list(packing.pieces([text], packing.Seams(tokenizer_of[name])))
    assert "".join(cut) == text
    assert (max(map(len, cut)) <= 100) if cuts else (cut == [text])


@pytest.mark.parametrize("word", ["ACGT", " ", "\n", "0", "字"], ids=ascii)
def test_text_without_a_seam_stays_whole(tokenizer_of, monkeypatch, word):
    text = word * 8000
    monkeypatch.setattr(packing, "PIECE_CHARS", 100)
    seams = packing.Seams(tokenizer_of["byte-level"])
    assert (*packing.pieces([text], seams),) == (text,)
    # It is cut again where that is possible, and the search does not take longer and longer.
    tries = []
    monkeypatch.setattr(seams, "_is_seam", lambda *_: tries.append(1))
    parts = [packing.Unfinished(text[begin : begin + 50]) for begin in range(0, len(text), 50)]
    assert "".join(packing.pieces([*parts, "end"], seams)) == text + "end"
    assert len(tries) <= 600


def test_pieces_are_short_again_after_a_long_one(tokenizer_of, monkeypatch):
    monkeypatch.setattr(packing, "PIECE_CHARS", 100)
    stretch = "0" * 1000
    text = "a line of it " * 30 + stretch + " and a line" * 100
    for parts in ([text], as_parts(text, range(0, len(text), 37))):
        sizes = [len(piece) for piece in packing.pieces(parts, packing.Seams(tokenizer_of["byte-level"]))]
        assert sum(sizes) == len(text)
        assert sum(size > 100 for size in sizes) == 1


def test_a_seam_waits_for_the_text_behind_it(tokenizer_of, monkeypatch):
    """What is read before words are found reaches over a space: no end of a part may hide that."""
    monkeypatch.setattr(packing, "SEAM_CHARS", 12)
    text = "of Word the end, " * 12
    encode, seams = packing.Encoder(tokenizer_of["byte-level"], EOS), packing.Seams(tokenizer_of["byte-level"])
    expected = encode([text])[0].tolist()
    for size in range(4, 40, 5):
        monkeypatch.setattr(packing, "PIECE_CHARS", size)
        for step in range(1, 60, 3):
            cut = list(packing.pieces(as_parts(text, range(0, len(text), step)), seams))
            assert encode(cut)[0].tolist() == expected


def test_pieces_are_made_while_the_text_is_read(tokenizer_of, monkeypatch):
    """A document of any length: what is read and not yet handed on is little more than a piece."""
    monkeypatch.setattr(packing, "PIECE_CHARS", 500)
    read = made = 0

    def parts():
        nonlocal read
        for _ in range(300):
            read += 90
            assert read - made <= 500 + packing.SEAM_CHARS + 2 * 90
            yield packing.Unfinished("the Word, the " * 6 + "字。 xy ")
        yield "end"

    for piece in packing.pieces(parts(), packing.Seams(tokenizer_of["byte-level"])):
        made += len(piece)
    assert made == 300 * len("the Word, the " * 6 + "字。 xy ") + 3


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("make", [packing.StreamPacker, packing.BestFitPacker])
def test_rows_do_not_depend_on_the_pieces(tokenizer_of, monkeypatch, folder, make, processes):
    documents = ["short", "the Word don't " * 90, "x " * 7, " ", "字。the " * 150, "end"]
    written = []
    for size in (40, 1 << 20):
        monkeypatch.setattr(packing, "PIECE_CHARS", size)
        monkeypatch.setattr(packing, "MAX_BATCH_CHARS", 3 * size)
        path, best_fit = folder(), make is packing.BestFitPacker
        writer = packing.RowWriter(path, 16, "uint16", with_length=best_fit)
        packer = make(writer, folder(), 1) if best_fit else make(writer)
        texts = packing.pieces(documents, packing.Seams(tokenizer_of["byte-level"]))
        with packing.Tokenization(tokenizer_of["byte-level"], EOS, processes) as tokenization:
            for batch, ids, lengths in tokenization.map(packing.document_batches(texts)):
                packer.add(ids, lengths, {i for i, text in enumerate(batch) if isinstance(text, packing.Unfinished)})
        packer.finish()
        assert writer.close() == files.checksum(path)
        written.append(files.checksum(path))
        assert writer.rows > 30
    assert written[0] == written[1]


def test_spool_that_somebody_cut_short(folder):
    spool = folder()
    packer = packing.BestFitPacker(packing.RowWriter(folder(), 8, "uint16", with_length=True), spool, 1)
    feed(packer, [5, 9], 2)
    os.truncate(spool, 8)
    with pytest.raises(OSError, match="somebody cut the file of tokens short"):
        packer.finish()


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
