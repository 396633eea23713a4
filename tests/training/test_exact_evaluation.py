"""Likelihood of whole documents."""

import json
import math

import pytest
import torch
from tiny_run import SIZES, TEXTS, Rows, new_model

from andromeda import Andromeda, AndromedaTokenizer, DatasetBuilder
from andromeda.data import pieces, workers
from andromeda.data.readers import Document
from andromeda.data.sources import Source, open_source
from andromeda.huggingface import AndromedaForCausalLM
from andromeda.training import evaluate_documents

WINDOW = SIZES["max_seq_len"]
LINES = ["a", "", TEXTS[0], " \n ", TEXTS[1] * 3, "naïve café ☕" * 5, "b" * 16, "b" * 17, "b" * 32, "b" * 33]


def letters():
    """A tokenizer whose tokens are bytes, so that lengths are known."""
    return AndromedaTokenizer.train([], 258)


def tokens_of(tokenizer, text):
    return tokenizer.encode_prompt(text) if text else []


def nats_of(model, ids, prefix, window=WINDOW, stride=None):
    """The sum over tokens of -log p(token | those before it in its window), each by an unbatched forward."""
    stride = window if stride is None else stride
    every = [prefix, *ids]  # every[i + 1] is token i
    total, first, end = 0.0, 0, 0
    while end < len(ids):
        first, end = end, min(len(ids), end + (stride if end else window))
        visible = every[max(0, end - window) : end]
        logits = model(torch.tensor([visible]))[0].double().log_softmax(-1)
        for token in range(first, end):
            total -= logits[token - end, ids[token]].item()  # the last of the logits predicts token end - 1
    return total


@pytest.mark.parametrize("stride", [None, 1, 5])
@pytest.mark.parametrize("flags", [{}, {"use_abs_pos_emb": True, "deepnorm": False, "shift_tokens": 2}], ids=str)
def test_each_document_has_the_likelihood_of_the_formula(tokenizer, flags, stride):
    torch.manual_seed(1)
    model = Andromeda(**{**SIZES, **flags})
    found = []
    result = evaluate_documents(
        model, LINES, tokenizer=tokenizer, stride=stride, batch_size=3, on_document=found.append
    )
    assert [document.index for document in found] == list(range(len(LINES)))
    for document, text in zip(found, LINES, strict=True):
        ids = tokens_of(tokenizer, text)
        assert (document.tokens, document.bytes) == (len(ids), len(text.encode()))
        expected = nats_of(model, ids, tokenizer.tokenizer.eos_token_id, stride=stride)
        assert document.nll == pytest.approx(expected, rel=1e-5)
        if text:
            assert document.bits_per_byte == pytest.approx(expected / math.log(2) / len(text.encode()), rel=1e-5)
    nats = sum(document.nll for document in found)
    size = sum(len(text.encode()) for text in LINES)
    assert result.tokens == sum(len(tokens_of(tokenizer, text)) for text in LINES)
    assert result.bytes == size and result.documents == 9
    assert (result.empty_documents, result.empty, found[1].bits_per_byte) == (1, ("document 1",), None)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size)
    assert result.loss == pytest.approx(nats / result.tokens)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert (result.window, result.stride) == (WINDOW, WINDOW if stride is None else stride)


def test_no_window_is_longer_than_asked_and_the_batch_changes_nothing():
    tokenizer, model = letters(), new_model()
    documents = ["x" * length for length in (1, 7, 8, 9, 15, 16, 17, 40)]
    alone = [nats_of(model, tokens_of(tokenizer, text), 0, 8) for text in documents]
    for batch_size in (1, 4, 100):
        found = []
        result = evaluate_documents(
            model, documents, tokenizer=tokenizer, window=8, batch_size=batch_size, on_document=found.append
        )
        assert [document.nll for document in found] == pytest.approx(alone, rel=1e-5)
        assert result.windows == sum(math.ceil(len(text) / 8) for text in documents)
    longest = []
    model.transformer.token_emb.register_forward_hook(lambda module, inputs, output: longest.append(output.shape[1]))
    evaluate_documents(model, documents, tokenizer=tokenizer, window=8)
    assert max(longest) == 8


def test_a_window_beyond_the_table_of_positions_is_refused():
    tokenizer = letters()
    model = Andromeda(**{**SIZES, "use_abs_pos_emb": True})
    with pytest.raises(ValueError, match=r"window must be at most max_seq_len=16, .* absolute positions, got 17"):
        evaluate_documents(model, ["x" * 40], tokenizer=tokenizer, window=17)
    assert evaluate_documents(new_model(), ["x" * 40], tokenizer=tokenizer, window=17).windows == 3


def test_a_document_in_pieces_has_the_ids_of_the_whole(tokenizer, tmp_path, monkeypatch):
    """Documents longer than a piece, longer than a part of a file, and of white space for a long time."""
    words = " ".join(f"name_{number} = {number % 17}" for number in range(150))
    texts = [words, " " * 3000 + words[:100], words[:50], "\n" * 2500]
    monkeypatch.setattr(pieces, "PIECE_CHARS", 512)
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = []
    model = new_model()
    evaluate_documents(model, path, tokenizer=tokenizer, on_document=found.append, batch_size=64)
    assert [document.tokens for document in found] == [len(tokens_of(tokenizer, text)) for text in texts]
    expected = nats_of(model, tokens_of(tokenizer, words), tokenizer.tokenizer.eos_token_id)
    assert found[0].nll == pytest.approx(expected, rel=1e-5)
    assert [document.where for document in found] == [f"{path}, line {n}, column 'text'" for n in (1, 2, 3, 4)]


def test_sources(tokenizer, tmp_path):
    import datasets

    texts = [TEXTS[0], "", TEXTS[1], "naïve"]
    model = new_model()
    expected = evaluate_documents(model, texts, tokenizer=tokenizer)
    (tmp_path / "files").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "files" / f"{number}.txt").write_text(text)
    made = [tmp_path / "files", datasets.Dataset.from_dict({"text": texts}), (text for text in texts)]
    (tmp_path / "all.txt").write_text("\N{COMBINING CYRILLIC MILLIONS SIGN}".join(texts))
    made.append(open_source(tmp_path / "all.txt", separator="\N{COMBINING CYRILLIC MILLIONS SIGN}"))
    for source in made:
        found = evaluate_documents(model, source, tokenizer=tokenizer)
        assert (found.tokens, found.bytes, found.documents) == (expected.tokens, expected.bytes, 3)
        assert found.loss == pytest.approx(expected.loss)
    assert evaluate_documents(model.double(), texts, tokenizer=tokenizer).loss == pytest.approx(expected.loss, rel=1e-5)


def test_bad_characters_are_refused_or_counted(tokenizer, tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "good"}\n{"text": "a\\u0000b"}\n{"text": "fine"}\n')
    with pytest.raises(ValueError, match="a NUL character at byte 1"):
        evaluate_documents(new_model(), path, tokenizer=tokenizer)
    found = evaluate_documents(new_model(), open_source(path, errors="skip"), tokenizer=tokenizer)
    assert (found.documents, found.skipped_documents, found.bytes) == (2, 1, 8)


def test_first_documents(tokenizer):
    model, read = new_model(), []

    def texts():
        for text in LINES:
            read.append(text)
            yield text

    found = evaluate_documents(model, texts(), tokenizer=tokenizer, max_documents=3)
    assert (found.documents, found.empty_documents) == (2, 1)
    assert read == LINES[:3]
    assert found.bytes == len("a") + len(TEXTS[0].encode())


def test_the_prefix_is_that_of_lm_eval(tokenizer):
    model = new_model()
    ids = tokens_of(tokenizer, TEXTS[0])
    end = tokenizer.tokenizer.eos_token_id
    assert evaluate_documents(model, TEXTS[:1], tokenizer=tokenizer).prefix_token_id == end
    other = AndromedaTokenizer(tokenizer.tokenizer)
    other.tokenizer.bos_token = "a"
    found = evaluate_documents(model, TEXTS[:1], tokenizer=other)
    assert found.prefix_token_id == other.tokenizer.bos_token_id != end
    assert found.loss * found.tokens == pytest.approx(nats_of(model, ids, found.prefix_token_id), rel=1e-5)
    given = evaluate_documents(model, TEXTS[:1], tokenizer=other, prefix_token_id=end)
    assert given.loss * given.tokens == pytest.approx(nats_of(model, ids, end), rel=1e-5)


def test_special_tokens_in_a_text_are_text(tokenizer):
    found = evaluate_documents(new_model(), ["<eos><pad>"], tokenizer=tokenizer)
    assert found.tokens > 2 and found.bytes == 10


def test_the_mode_of_the_model_is_restored(tokenizer):
    model = AndromedaForCausalLM.from_andromeda(new_model()).train()
    seen = []
    evaluate_documents(model, ["a"], tokenizer=tokenizer, on_document=lambda _: seen.append(model.training))
    assert seen == [False] and model.training
    evaluate_documents(model.eval(), ["a"], tokenizer=tokenizer)
    assert not model.training


def test_documents_are_read_as_they_are_evaluated(tokenizer, monkeypatch):
    """Memory holds a few documents, and a part of a long one."""
    monkeypatch.setattr(workers, "MAX_BATCH_DOCUMENTS", 2)
    monkeypatch.setattr(pieces, "PIECE_CHARS", 256)
    found, ahead = [], []

    def texts():
        for number in range(150):
            ahead.append(number - len(found))
            yield "a"

    evaluate_documents(new_model(), texts(), tokenizer=tokenizer, on_document=found.append, batch_size=2)
    assert len(found) == 150 and max(ahead) <= 75

    class Long(Source):
        name, parts = "long", 0

        def num_documents(self):
            return 1

        def documents(self, statistics):
            for self.parts in range(1, 41):
                yield Document("words of\n" * 20, "long", 0, continues=self.parts < 40)

    source, seen = Long(None, "strict"), []
    model = new_model()
    model.transformer.token_emb.register_forward_hook(lambda *_: seen.append(source.parts))
    found = evaluate_documents(model, source, tokenizer=tokenizer, batch_size=2)
    assert found.bytes == 40 * 20 * 9 and found.documents == 1
    assert seen[0] < 30


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"stride": 17}, ValueError, "stride must be at most window=16, got 17"),
        ({"stride": 0}, ValueError, "stride must be"),
        ({"window": 1.5}, TypeError, "window must be a whole number"),
        ({"batch_size": 0}, ValueError, "batch_size must be"),
        ({"max_documents": 0}, ValueError, "max_documents must be"),
        ({"prefix_token_id": 320}, ValueError, "prefix_token_id must be"),
    ],
)
def test_wrong_arguments_are_named(tokenizer, options, error, text):
    with pytest.raises(error, match=f"evaluate_documents: {text}"):
        evaluate_documents(new_model(), ["a"], tokenizer=tokenizer, **options)


def test_what_cannot_be_evaluated_is_refused(tokenizer, tmp_path):
    model = new_model()
    with pytest.raises(ValueError, match="documents must hold text, got 2 documents without a token"):
        evaluate_documents(model, ["", ""], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="documents must hold text, got 0 documents"):
        evaluate_documents(model, [], tokenizer=tokenizer)
    with pytest.raises(TypeError, match="must be a string, got int"):
        evaluate_documents(model, ["a", 3], tokenizer=tokenizer)
    (tmp_path / "text.txt").write_text("".join(TEXTS))
    rows = DatasetBuilder(tmp_path / "text.txt", 16, tokenizer=tokenizer, cache_dir=tmp_path).build_dataset()
    with pytest.raises(TypeError, match=r"documents must be text, got packed rows; .* `evaluate`, which takes rows"):
        evaluate_documents(model, rows, tokenizer=tokenizer)
    for other in (Rows(), {"text": ["a"]}, b"a"):
        with pytest.raises(TypeError, match=r"documents must be a path, .* or an iterable of strings, got"):
            evaluate_documents(model, other, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="rows that are packed already"):
        evaluate_documents(model, rows.path, tokenizer=tokenizer)
    with pytest.raises(TypeError, match="model must be"):
        evaluate_documents(torch.nn.Linear(2, 2), ["a"], tokenizer=tokenizer)
    without = AndromedaTokenizer(tokenizer.tokenizer)
    without.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have a BOS or an end token"):
        evaluate_documents(model, ["a"], tokenizer=without)
    with torch.no_grad():
        model.transformer.to_logits.weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match=r"the likelihood must be finite, got (nan|inf) in document 0"):
        evaluate_documents(model, ["a"], tokenizer=tokenizer)
