"""AndromedaTokenizer: ids, padding, decoding, saving, training, and what it says without a network."""

import json
import time

import pytest
import torch
from tokenizers import Tokenizer

from andromeda.packing import packing_tokenizer_json
from andromeda.tokenizer import AndromedaTokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n",
    "def f(x):\n\treturn x + 1\n",
    "Zwölf große Boxkämpfer 🥊\r\n",
]


@pytest.fixture(scope="module")
def tokenizer():
    return AndromedaTokenizer.train(TEXTS * 4, vocab_size=300)


def bare(tokenizer):
    """The same merges in a `tokenizers.Tokenizer` without end and padding token."""
    description = json.loads(tokenizer.tokenizer.backend_tokenizer.to_str())
    description["added_tokens"] = []
    del description["model"]["vocab"]["<eos>"], description["model"]["vocab"]["<pad>"]
    ordered = sorted(description["model"]["vocab"], key=description["model"]["vocab"].get)
    description["model"]["vocab"] = {token: index for index, token in enumerate(ordered)}
    return Tokenizer.from_str(json.dumps(description))


@pytest.mark.parametrize("text", [*TEXTS, "", "\x00\x7f unseen: 漢字", "  two  spaces "])
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.tokenize_texts([text])[0]) == text


def test_batch_is_padded_on_the_right(tokenizer):
    ids = tokenizer.tokenize_texts(TEXTS)
    sizes = [len(tokenizer.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert ids.dtype == torch.int64
    assert ids.shape == (3, max(sizes))
    for row, size in zip(ids, sizes, strict=True):
        assert (row[size:] == tokenizer.tokenizer.pad_token_id).all()
        assert tokenizer.tokenizer.eos_token_id not in row
    assert tokenizer.decode(ids) == TEXTS
    assert tokenizer.decode(ids, skip_special_tokens=False)[1].endswith("<pad>")


def test_one_string_is_one_row(tokenizer):
    assert torch.equal(tokenizer.tokenize_texts(TEXTS[0]), tokenizer.tokenize_texts([TEXTS[0]]))


@pytest.mark.parametrize("texts", [[], (), iter([])], ids=["list", "tuple", "iterator"])
def test_no_texts(tokenizer, texts):
    ids = tokenizer.tokenize_texts(texts)
    assert ids.shape == (0, 0)
    assert ids.dtype == torch.int64


def test_empty_texts_have_no_ids(tokenizer):
    ids = tokenizer.tokenize_texts(["", ""])
    assert ids.shape == (2, 0)
    assert ids.dtype == torch.int64


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], r"texts\[1\] must be a string, got None"),
        ([3], r"texts\[0\] must be a string, got int 3"),
        ([b"a"], r"texts\[0\] must be a string, got bytes"),
        (None, "must be a list of strings, got NoneType"),
        (b"a", "must be a list of strings, got bytes"),
        (7, "must be a list of strings, got int"),
    ],
    ids=["none", "int", "bytes-item", "nothing", "bytes", "number"],
)
def test_not_strings(tokenizer, texts, message):
    with pytest.raises(TypeError, match=message):
        tokenizer.tokenize_texts(texts)


def test_cut_at_model_max_length(tokenizer):
    short = AndromedaTokenizer(tokenizer.tokenizer, model_max_length=5)
    assert short.tokenize_texts(TEXTS).shape == (3, 5)
    assert tokenizer.tokenize_texts(TEXTS).shape[1] > 5  # the original is a tokenizer of its own


def test_decode_takes_rows_and_batches(tokenizer):
    ids = tokenizer.tokenize_texts([TEXTS[0]])
    assert tokenizer.decode(ids[0]) == tokenizer.decode(ids[0].tolist()) == TEXTS[0]
    assert tokenizer.decode(ids[0].numpy()) == TEXTS[0]
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == tokenizer.decode([ids[0]]) == [TEXTS[0]]
    assert tokenizer.decode(ids[0, 0]) == tokenizer.decode(int(ids[0, 0])) == tokenizer.decode([int(ids[0, 0])]) != ""
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([len(tokenizer) + 5]) == ""


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([5, -100], ValueError, r"ids\[1\] must be in 0 ... 2\*\*32 - 1, got -100"),
        ([[5], [1.5]], TypeError, r"ids\[0\] must be an integer, got 1.5"),
        (torch.tensor([0.5]), TypeError, r"ids\[0\] must be an integer, got 0.5"),
    ],
    ids=["label", "float", "float-tensor"],
)
def test_decode_refuses(tokenizer, ids, error, message):
    with pytest.raises(error, match=message):
        tokenizer.decode(ids)


def test_tokens_are_appended(tokenizer):
    base = bare(tokenizer)
    size = base.get_vocab_size()
    made = AndromedaTokenizer(base, extra_ids=2)
    assert made.tokenizer.eos_token_id == size
    assert made.tokenizer.pad_token_id == size + 1
    assert made.tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_1>"]) == [size + 2, size + 3]
    assert len(made) == size + 4
    assert base.get_vocab_size() == size
    ids = made.tokenize_texts(["ab<extra_id_1>cd"])
    assert size + 3 in ids
    assert made.decode(ids) == ["abcd"]
    assert made.decode(ids, skip_special_tokens=False) == ["ab<extra_id_1>cd"]


def test_own_tokens_are_kept_on_request(tokenizer):
    other = AndromedaTokenizer(tokenizer.tokenizer, eos_token="</s>", pad_token=None)
    assert other.tokenizer.eos_token == "</s>"
    assert other.tokenizer.pad_token == "<pad>"
    assert AndromedaTokenizer(other.tokenizer, eos_token=None).tokenizer.eos_token == "</s>"
    assert tokenizer.tokenizer.eos_token == "<eos>"


def test_save_and_load(tokenizer, tmp_path):
    made = AndromedaTokenizer(bare(tokenizer), extra_ids=3, model_max_length=64)
    made.save(tmp_path / "a" / "b")
    made.save(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    expected = made.tokenize_texts([*TEXTS, "<extra_id_2>"])
    alone = tmp_path / "alone" / "tokenizer.json"
    alone.parent.mkdir()
    alone.write_bytes((tmp_path / "a" / "b" / "tokenizer.json").read_bytes())
    for path in (tmp_path / "a" / "b", str(tmp_path / "a" / "b"), alone, alone.parent):
        loaded = AndromedaTokenizer(path, extra_ids=3)
        assert len(loaded) == len(made)
        assert loaded.tokenizer.eos_token_id == made.tokenizer.eos_token_id
        assert torch.equal(loaded.tokenize_texts([*TEXTS, "<extra_id_2>"]), expected)


def test_training_is_deterministic(tokenizer):
    again = AndromedaTokenizer.train(iter(TEXTS * 4), vocab_size=300)
    descriptions = [packing_tokenizer_json(made.tokenizer.backend_tokenizer) for made in (tokenizer, again)]
    assert descriptions[0] == descriptions[1]
    assert len(tokenizer) == 300
    assert (tokenizer.tokenizer.eos_token_id, tokenizer.tokenizer.pad_token_id) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": "one text"}, TypeError, "must be an iterable of documents"),
        ({"texts": [], "vocab_size": 10}, ValueError, "vocab_size must be at least 258"),
        ({"texts": [], "vocab_size": 1e4}, TypeError, "vocab_size must be an integer"),
    ],
    ids=["string", "small", "float"],
)
def test_training_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        AndromedaTokenizer.train(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"extra_ids": -1}, ValueError, "extra_ids must be at least 0, got -1"),
        ({"extra_ids": True}, TypeError, "extra_ids must be an integer, got True"),
        ({"model_max_length": 0}, ValueError, "model_max_length must be at least 1"),
        ({"eos_token": ""}, TypeError, "eos_token must be a non-empty string or None"),
        ({"pretrained": 3}, TypeError, "pretrained must be a name, a path or a tokenizer"),
        ({"pretrained": "./missing"}, FileNotFoundError, "existing path, got './missing'"),
        ({"pretrained": "missing.json"}, FileNotFoundError, "existing path, got 'missing.json'"),
    ],
    ids=lambda value: next(iter(value)) + repr(*value.values()) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        AndromedaTokenizer(**arguments)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("tokenizer.json", "{", ValueError, "must be the JSON of a tokenizer"),
        ("tokenizer.json", "[1]", ValueError, 'found no "model"'),
        ("other.txt", "", FileNotFoundError, "found other.txt"),
    ],
    ids=["truncated", "other-json", "no-tokenizer"],
)
def test_not_a_tokenizer(tmp_path, name, content, error, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        AndromedaTokenizer(tmp_path)


@pytest.mark.parametrize("offline", [True, False], ids=["offline-mode", "no-answer"])
def test_no_network(monkeypatch, capfd, offline):
    """The hub is a port of this machine where nobody listens: no test asks the network."""
    from huggingface_hub import constants

    for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    begin = time.monotonic()
    with pytest.raises(OSError, match="cannot load 'andromeda-tests/absent'") as caught:
        AndromedaTokenizer("andromeda-tests/absent")
    assert time.monotonic() - begin < 20  # the retries that this avoids take 46 seconds
    assert "Retrying" not in capfd.readouterr().err
    message = str(caught.value)
    assert ("HF_HUB_OFFLINE=1" if offline else "http://127.0.0.1:9 cannot be reached") in message
    assert constants.HF_HUB_CACHE in message
    assert "AndromedaTokenizer('tokenizer.json')" in message
    assert "hf download andromeda-tests/absent" in message
