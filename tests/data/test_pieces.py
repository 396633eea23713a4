"""Long documents in pieces: the tokens are those of the whole document, wherever it is cut."""

from itertools import chain, count, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from andromeda import files
from andromeda.data import packing, pieces, workers

EOS = 0
FRAGMENTS = [
    "a", "the", "Word", "don't", "x1", "3", "1234567", "ü", "e\u0301", "a\u0323\u0307", "漢字", "字", "。", "カタ",
    "한국", "ع", "👩‍👩‍👧", "🏽", "🇩🇪", ".", ", ", "...", "<eos>", "<pad>", "_", "\n", "\r\n", "\t", " ", "  ", " " * 9,
    "\n\n\n", "\xa0", "\u3000", "\u200b", "- ", " (", ") ", "'s", "▁", "Ġ",
]  # fmt: skip
DOCUMENTS = st.lists(st.sampled_from(FRAGMENTS), min_size=1, max_size=60).map("".join)


def make_tokenizers():
    """Tokenizers that find words in different ways, all trained on the fragments."""
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
        # Tokens that are recognised before words are split; not normalized, because normalization might delete them.
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("  ", " (", "Word the")])
        trained[name] = workers.packing_tokenizer_json(tokenizer)
    return trained


@pytest.fixture(scope="module")
def tokenizer_of():
    return make_tokenizers()


CUTS = {  # whether a long text of words gets cut
    **dict.fromkeys(("byte-level", "prefix-space", "metaspace", "metaspace-first", "whitespace", "bert"), True),
    **dict.fromkeys(("no-regex", "metaspace-whole", "prepend", "none"), False),
    "strip": True,
}


def as_parts(text, cuts):
    """The text in consecutive parts, cut at these places."""
    places = [0, *sorted({cut % len(text) for cut in cuts} - {0}), len(text)]
    return [workers.Unfinished(text[begin:end]) for begin, end in pairwise(places[:-1])] + [text[places[-2] :]]


@pytest.mark.parametrize("name", CUTS)
@given(documents=st.lists(DOCUMENTS, min_size=1, max_size=3), cuts=st.lists(st.integers(0, 999), max_size=4),
       size=st.integers(2, 40), look=st.sampled_from([12, 256]))  # fmt: skip
@settings(max_examples=4 * settings().max_examples)
def test_pieces_have_the_tokens_of_the_document(tokenizer_of, name, documents, cuts, size, look):
    encode = workers.Encoder(tokenizer_of[name], EOS)
    whole = [encode([text])[0].tolist() for text in documents]
    parts = [part for text in documents for part in as_parts(text, cuts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARS", size)
        patch.setattr(pieces, "SEAM_CHARS", look)
        cut = list(pieces.pieces(parts, pieces.Seams(tokenizer_of[name])))
    ids, _ = encode(cut)
    assert ids.tolist() == list(chain.from_iterable(whole))
    texts = "".join(text + ("" if isinstance(text, workers.Unfinished) else "\0") for text in cut)
    assert texts == "".join(text + "\0" for text in documents)


@pytest.mark.parametrize(("name", "cuts"), CUTS.items())
def test_which_tokenizers_have_seams(tokenizer_of, monkeypatch, name, cuts):
    monkeypatch.setattr(pieces, "PIECE_CHARS", 100)
    text = "a line of 字。" * 200
    cut = list(pieces.pieces([text], pieces.Seams(tokenizer_of[name])))
    assert "".join(cut) == text
    assert (max(map(len, cut)) <= 100) if cuts else (cut == [text])


@pytest.mark.parametrize("word", ["ACGT", " ", "\n", "0", "字"], ids=ascii)
def test_text_without_a_seam_stays_whole(tokenizer_of, monkeypatch, word):
    text = word * 8000
    monkeypatch.setattr(pieces, "PIECE_CHARS", 100)
    seams = pieces.Seams(tokenizer_of["byte-level"])
    assert (*pieces.pieces([text], seams),) == (text,)
    # Later text with seams is cut again, and the search does not take longer and longer.
    tries = []
    monkeypatch.setattr(seams, "_is_seam", lambda *_: tries.append(1))
    parts = [workers.Unfinished(text[begin : begin + 50]) for begin in range(0, len(text), 50)]
    assert "".join(pieces.pieces([*parts, "end"], seams)) == text + "end"
    assert len(tries) <= 600


def test_pieces_are_short_again_after_a_long_one(tokenizer_of, monkeypatch):
    monkeypatch.setattr(pieces, "PIECE_CHARS", 100)
    stretch = "0" * 1000
    text = "a line of it " * 30 + stretch + " and a line" * 100
    for parts in ([text], as_parts(text, range(0, len(text), 37))):
        sizes = [len(piece) for piece in pieces.pieces(parts, pieces.Seams(tokenizer_of["byte-level"]))]
        assert sum(sizes) == len(text)
        assert sum(size > 100 for size in sizes) == 1


def test_a_seam_waits_for_the_text_behind_it(tokenizer_of, monkeypatch):
    """Tokens that are recognised before words may contain a space; the end of a part must not hide that."""
    monkeypatch.setattr(pieces, "SEAM_CHARS", 12)
    text = "of Word the end, " * 12
    encode, seams = workers.Encoder(tokenizer_of["byte-level"], EOS), pieces.Seams(tokenizer_of["byte-level"])
    expected = encode([text])[0].tolist()
    for size in range(4, 40, 5):
        monkeypatch.setattr(pieces, "PIECE_CHARS", size)
        for step in range(1, 60, 3):
            cut = list(pieces.pieces(as_parts(text, range(0, len(text), step)), seams))
            assert encode(cut)[0].tolist() == expected


def test_pieces_are_made_while_the_text_is_read(tokenizer_of, monkeypatch):
    """For documents of any length, the text that is read but not yet passed on is little more than a piece."""
    monkeypatch.setattr(pieces, "PIECE_CHARS", 500)
    read = made = 0

    def parts():
        nonlocal read
        for _ in range(300):
            read += 90
            assert read - made <= 500 + pieces.SEAM_CHARS + 2 * 90
            yield workers.Unfinished("the Word, the " * 6 + "字。 xy ")
        yield "end"

    for piece in pieces.pieces(parts(), pieces.Seams(tokenizer_of["byte-level"])):
        made += len(piece)
    assert made == 300 * len("the Word, the " * 6 + "字。 xy ") + 3


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("make", [packing.StreamPacker, packing.BestFitPacker])
def test_rows_do_not_depend_on_the_pieces(tokenizer_of, monkeypatch, tmp_path, make, processes):
    documents = ["short", "the Word don't " * 90, "x " * 7, " ", "字。the " * 150, "end"]
    written, names = [], map(str, count())
    for size in (40, 1 << 20):
        monkeypatch.setattr(pieces, "PIECE_CHARS", size)
        monkeypatch.setattr(workers, "MAX_BATCH_CHARS", 3 * size)
        path, best_fit = tmp_path / next(names), make is packing.BestFitPacker
        writer = packing.RowWriter(path, 16, "uint16", with_length=best_fit)
        packer = make(writer, tmp_path / next(names), 1) if best_fit else make(writer)
        texts = pieces.pieces(documents, pieces.Seams(tokenizer_of["byte-level"]))
        with workers.Tokenization(tokenizer_of["byte-level"], EOS, processes) as tokenization:
            for batch, ids, lengths in tokenization.map(workers.document_batches(texts)):
                packer.add(ids, lengths, {i for i, text in enumerate(batch) if isinstance(text, workers.Unfinished)})
        packer.finish()
        assert writer.close() == files.checksum(path)
        written.append(files.checksum(path))
        assert writer.rows > 30
    assert written[0] == written[1]
