"""AndromedaTokenizer: ids, padding, decoding, saving, training, and its errors without a network."""

import errno
import json
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from andromeda.data import pieces, workers
from andromeda.data.tokenizer import AndromedaTokenizer, check_texts, token_ids
from andromeda.data.workers import Encoder, packing_tokenizer_json

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


SURROGATE = r"must be text that UTF-8 can express, got the lone surrogate '\\udce9' at character 3; .*byte 0xe9"


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (["ok", "caf\udce9"], ValueError, r"x\[1\] " + SURROGATE),
        (["ok", "a", "\ud83d only half"], ValueError, r"x\[2\] must be text .* '\\ud83d' at character 0$"),
        (["ok", None], TypeError, r"x\[1\] must be a string, got None"),
        ([b"ok"], TypeError, r"x\[0\] must be a string, got bytes b'ok'"),
    ],
    ids=["byte", "half-pair", "none", "bytes"],
)
def test_check_texts(texts, error, message):
    assert list(check_texts(["a", "", "🥊"], "x")) == ["a", "", "🥊"]
    with pytest.raises(error, match=message):
        list(check_texts(texts, "x"))


def test_texts_that_cannot_be_encoded(tokenizer):
    with pytest.raises(ValueError, match=r"AndromedaTokenizer.tokenize_texts: texts\[1\] " + SURROGATE):
        tokenizer.tokenize_texts(["ok", "caf\udce9"])
    with pytest.raises(ValueError, match=r"AndromedaTokenizer.encode_prompt: prompt " + SURROGATE):
        tokenizer.encode_prompt("caf\udce9")
    with pytest.raises(TypeError, match="prompt must be a string, got None"):
        tokenizer.encode_prompt(None)
    with pytest.raises(ValueError, match=r"^sample_prompt " + SURROGATE):
        token_ids(tokenizer.tokenizer, "caf\udce9", name="sample_prompt")
    with pytest.raises(ValueError, match=r"AndromedaTokenizer.train: texts\[2\] " + SURROGATE):
        AndromedaTokenizer.train(iter(["ok", "fine", "caf\udce9"]), 300)


# Special tokens in texts

SPELLED = ["hello<eos>world", "<pad>", "<eos>", "a <pad><eos> b", "x<extra_id_1>y", "<extra_id_7>", "<s>in</s>"]


def with_beginning(tokenizer):
    """A tokenizer whose post-processor would write <s> before and </s> after each text."""
    backend = Tokenizer.from_str(tokenizer.tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<s>", "</s>"])
    marks = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    return backend


@pytest.mark.parametrize("extra_ids", [0, 2])
def test_one_rule_for_special_tokens_in_texts(tokenizer, tmp_path, extra_ids):
    """Text stays text, except for extra ids: in `tokenize_texts`, prompts and the packer, now and after saving."""
    made = AndromedaTokenizer(with_beginning(tokenizer), extra_ids=extra_ids)
    made.save(tmp_path)
    loaded = AndromedaTokenizer(tmp_path, None, None)
    by_transformers = AutoTokenizer.from_pretrained(tmp_path)
    special = set(made.tokenizer.all_special_ids)
    for text in SPELLED:
        ids = made.tokenize_texts([text])[0].tolist()
        assert not special & set(ids)
        assert made.decode(ids, skip_special_tokens=False) == text
        assert made.encode_prompt(text) == loaded.encode_prompt(text) == ids
        assert loaded.tokenize_texts([text])[0].tolist() == ids
        assert token_ids(by_transformers, text) == ids
        for any_tokenizer in (made.tokenizer, loaded.tokenizer, by_transformers):
            encode = Encoder(packing_tokenizer_json(any_tokenizer.backend_tokenizer), 999)
            assert encode([text])[0].tolist() == [*ids, 999]
    ids = made.tokenize_texts(["x<extra_id_1>y"])[0].tolist()
    assert (len(ids) == 3) == (extra_ids == 2)


def test_special_tokens_on_request(tokenizer):
    eos = tokenizer.tokenizer.eos_token_id
    before = tokenizer.tokenize_texts(["hello<eos>world"])
    assert eos in tokenizer.tokenize_texts(["hello<eos>world"], special_tokens=True)
    assert tokenizer.encode_prompt("<eos>", special_tokens=True) == [eos]
    assert torch.equal(tokenizer.tokenize_texts(["hello<eos>world"]), before)  # the option holds for one call


def test_extra_ids_that_were_special(tokenizer):
    """Extra ids that are special tokens of the vocabulary are also read from texts once they are requested."""
    backend = Tokenizer.from_str(tokenizer.tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<extra_id_0>"])
    for extra_ids, count in ((0, 12), (1, 1)):
        made = AndromedaTokenizer(backend, extra_ids=extra_ids)
        ids = made.encode_prompt("<extra_id_0>")
        assert len(ids) == count
        assert (
            Encoder(packing_tokenizer_json(made.tokenizer.backend_tokenizer), 0)(["<extra_id_0>"])[0].tolist()[:-1]
            == ids
        )


def test_padding_side_and_no_padding_token(tokenizer):
    made = AndromedaTokenizer(tokenizer.tokenizer)
    made.tokenizer.padding_side = "left"
    assert made.tokenize_texts(["a", "abc"])[0, 0] == made.tokenizer.pad_token_id
    without = AndromedaTokenizer(bare(tokenizer), pad_token=None)
    assert without.tokenize_texts(["ab", "cd"]).shape[0] == 2
    with pytest.raises(ValueError, match=r"same number of tokens, .*no padding token, got 1 to 3; give it a pad_token"):
        without.tokenize_texts(["a", "xyz"])


def test_cut_at_model_max_length(tokenizer):
    short = AndromedaTokenizer(tokenizer.tokenizer, model_max_length=5)
    assert short.tokenize_texts(TEXTS).shape == (3, 5)
    assert tokenizer.tokenize_texts(TEXTS).shape[1] > 5  # the original is not changed


def test_decode_takes_rows_and_batches(tokenizer):
    ids = tokenizer.tokenize_texts([TEXTS[0]])
    assert tokenizer.decode(ids[0]) == tokenizer.decode(ids[0].tolist()) == TEXTS[0]
    assert tokenizer.decode(ids[0].numpy()) == TEXTS[0]
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == tokenizer.decode([ids[0]]) == [TEXTS[0]]
    assert tokenizer.decode(ids[0, 0]) == tokenizer.decode(int(ids[0, 0])) == tokenizer.decode([int(ids[0, 0])]) != ""
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode(list(ids[0].numpy())) == tokenizer.decode(list(ids[0])) == TEXTS[0]
    assert tokenizer.decode([len(tokenizer) + 5]) == ""


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([5, -100], ValueError, r"ids\[1\] must be in 0 ... 2\*\*32 - 1, got -100"),
        ([[5], [1.5]], TypeError, r"ids\[0\] must be an integer, got 1.5"),
        (torch.tensor([0.5]), TypeError, r"ids\[0\] must be an integer, got 0.5"),
        ([[5], [6, 2**32]], ValueError, r"row 1: ids\[1\] must be in 0 ... 2\*\*32 - 1, got 4294967296"),
        ("text", TypeError, r"ids\[0\] must be an integer, got 'text'"),
        (None, TypeError, r"ids\[0\] must be an integer, got None"),
        ([True], TypeError, r"ids\[0\] must be an integer, got True"),
        ([[5], 6], TypeError, r"row 1: ids must be a row of ids as the others are, got 6"),
        ([[[5]]], TypeError, r"row 0: ids\[0\] must be an integer, got \[5\]"),
    ],
    ids=["label", "float", "float-tensor", "large", "string", "none", "bool", "mixed", "deep"],
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


@pytest.mark.parametrize("limit", [0, 500, 5000])
def test_a_save_that_does_not_fit(tokenizer, tmp_path, limit):
    """tokenizers reports the failure as a bare Exception; the tokenizer saved earlier stays."""
    tokenizer.save(tmp_path / "tokenizer")
    before = {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()}
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(
        OSError, match=r"cannot write the tokenizer to .*tokenizer: File too large.*ulimit -f"
    ) as caught:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
        try:
            AndromedaTokenizer(tokenizer.tokenizer, extra_ids=3).save(tmp_path / "tokenizer")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert caught.value.errno == errno.EFBIG
    assert {path.name: path.read_bytes() for path in (tmp_path / "tokenizer").iterdir()} == before


@pytest.mark.parametrize("name", ["/proc/tokenizer", "/dev/null/tokenizer", ""])
def test_save_where_nothing_can_be_written(tokenizer, name):
    with pytest.raises((OSError, ValueError), match=f"cannot write the tokenizer to {name}: |path must not be empty"):
        tokenizer.save(name)


def test_training_is_deterministic(tokenizer):
    again = AndromedaTokenizer.train(iter(TEXTS * 4), vocab_size=300)
    descriptions = [packing_tokenizer_json(made.tokenizer.backend_tokenizer) for made in (tokenizer, again)]
    assert descriptions[0] == descriptions[1]
    assert len(tokenizer) == 300
    assert (tokenizer.tokenizer.eos_token_id, tokenizer.tokenizer.pad_token_id) == (0, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": "one text"}, TypeError, "texts must be an iterable of documents"),
        ({"texts": None}, TypeError, "texts must be an iterable of documents, got NoneType"),
        ({"texts": {"a": "b"}}, TypeError, "texts must be an iterable of documents, got dict"),
        ({"vocab_size": 10}, ValueError, "vocab_size must be at least 258"),
        ({"vocab_size": 1e4}, TypeError, "vocab_size must be an integer"),
        ({"min_frequency": -1}, ValueError, "min_frequency must be at least 0, got -1"),
        ({"min_frequency": 1.5}, TypeError, "min_frequency must be an integer, got 1.5"),
        ({"model_max_length": 0}, ValueError, "model_max_length must be at least 1, got 0"),
        ({"eos_token": None}, TypeError, "eos_token must be a non-empty string, got None"),
        ({"pad_token": ""}, TypeError, "pad_token must be a non-empty string, got ''"),
        ({"eos_token": b"<eos>"}, TypeError, "eos_token must be a non-empty string, got b'<eos>'"),
        ({"eos_token": "<\udce9>"}, ValueError, r"eos_token must be text .* '\\udce9' at character 1"),
        ({"eos_token": "a"}, ValueError, "eos_token must not be a single character that stands for a byte, got 'a'"),
        ({"pad_token": "Ġ"}, ValueError, "pad_token must not be a single character that stands for a byte, got 'Ġ'"),
        ({"pad_token": "<eos>"}, ValueError, "pad_token must differ from eos_token, got '<eos>' twice"),
    ],
    ids=lambda value: ascii(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_training_refuses(monkeypatch, arguments, error, message):
    monkeypatch.setattr(workers, "train_tokenizer", None)  # arguments are checked before the work begins
    with pytest.raises(error, match=f"AndromedaTokenizer.train: {message}"):
        AndromedaTokenizer.train(**{"texts": []} | arguments)


# Training in a process


def trained_here(texts, **options):
    """The JSON of a tokenizer that `tokenizers` trains in this process, on whole texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": ["<eos>", "<pad>"], "initial_alphabet": alphabet, "show_progress": False} | options
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options))
    return packing_tokenizer_json(AndromedaTokenizer(tokenizer).tokenizer.backend_tokenizer)


def test_trained_as_in_one_process(monkeypatch):
    """The result is the same if a document is long, arrives in parts, or fills several frames."""
    monkeypatch.setattr(pieces, "PIECE_CHARS", 300)
    monkeypatch.setattr(workers, "MAX_BATCH_CHARS", 1000)
    long = Path(workers.__file__).read_text()[:12000]
    texts = [*TEXTS, long, "", "one more " * 9]
    expected = trained_here(texts, vocab_size=500, min_frequency=3)
    parts = [workers.Unfinished(long[begin : begin + 71]) for begin in range(0, len(long) - 71, 71)]
    in_parts = [*TEXTS, *parts, long[71 * len(parts) :], "", "one more " * 9]
    for given_texts in (texts, iter(in_parts)):
        made = AndromedaTokenizer.train(given_texts, 500, min_frequency=3)
        assert packing_tokenizer_json(made.tokenizer.backend_tokenizer) == expected


@pytest.fixture
def trainer(monkeypatch):
    """The class of training processes: `act` is called once the texts are sent, `started` lists the processes."""
    started = []

    class Recorded(workers._Trainer):
        act = staticmethod(lambda process: None)

        def __init__(self):
            super().__init__()
            started.append(self._process)

        def _read(self):
            Recorded.act(self._process)
            return super()._read()

    monkeypatch.setattr(workers, "_Trainer", Recorded)
    Recorded.started = started
    return Recorded


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_while_it_trains(trainer, number):
    """A signal ends training even if the training process is stopped and would never answer."""

    def stop(process):
        process.send_signal(signal.SIGSTOP)
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()

    def leave(*_):
        raise KeyboardInterrupt

    trainer.act = staticmethod(stop)
    before = signal.signal(number, leave)
    try:
        with pytest.raises(KeyboardInterrupt):
            AndromedaTokenizer.train(TEXTS, 300)
    finally:
        signal.signal(number, before)
    assert [process.poll() for process in trainer.started] == [-signal.SIGKILL]


def test_a_process_that_dies_while_it_trains(trainer):
    trainer.act = staticmethod(lambda process: process.kill())
    with pytest.raises(RuntimeError, match=r"train: the process that trains was killed by signal 9.*memory runs out"):
        AndromedaTokenizer.train(TEXTS, 300)
    assert [process.poll() for process in trainer.started] == [-signal.SIGKILL]


def test_a_process_that_dies_while_texts_are_sent(trainer):
    def texts():
        while True:
            trainer.started[0].kill()
            yield "text " * 10000

    with pytest.raises(RuntimeError, match="the process that trains was killed by signal 9"):
        AndromedaTokenizer.train(texts(), 300)


def test_a_process_that_nobody_waits_for_ends():
    """The pipe closes, as if this process were killed, while the other one still has a second of work."""
    random = np.random.default_rng(0)
    words = random.integers(ord("a"), ord("z"), (40_000, 12), dtype=np.uint8).tobytes().decode()
    texts = [" ".join(words[begin : begin + 12] for begin in range(0, len(words), 12))]
    process = workers._Trainer()
    try:
        options = {"vocab_size": 20_000, "show_progress": False}
        process._send(b"", json.dumps({"tokenizer": tokenizer_json(), "trainer": options}).encode())
        process._send(*workers._pack_texts(texts))
        process._send(b"", b"")
        process._process.stdin.close()
        assert process._process.wait(60) == 1
    finally:
        process.kill()


def test_errors_of_the_texts_and_of_the_trainer(trainer):
    def texts():
        yield "fine"
        raise ZeroDivisionError("unreadable")

    with pytest.raises(ZeroDivisionError, match="unreadable"):
        AndromedaTokenizer.train(texts(), 300)
    description = tokenizer_json()
    endless = iter(lambda: "text " * 10000, None)
    with pytest.raises(RuntimeError, match=r"AndromedaTokenizer\.train: TypeError: .* as an integer"):
        workers.train_tokenizer(endless, description, {"vocab_size": "many"})
    with pytest.raises(RuntimeError, match=r"AndromedaTokenizer\.train: .*expected ident at line 1"):
        workers.train_tokenizer([], "no json", {})
    assert [process.poll() is not None for process in trainer.started] == [True] * 3


def tokenizer_json():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return tokenizer.to_str()


def test_training_in_threads(tokenizer):
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: AndromedaTokenizer.train(TEXTS * 4, 300), range(2)))
    expected = packing_tokenizer_json(tokenizer.tokenizer.backend_tokenizer)
    assert [packing_tokenizer_json(one.tokenizer.backend_tokenizer) for one in made] == [expected] * 2


@pytest.mark.parametrize("progress", [True, False])
def test_progress_bars_are_those_of_tokenizers(monkeypatch, capfd, progress):
    train, options = workers.train_tokenizer, {}
    monkeypatch.setattr(workers, "train_tokenizer", lambda *given: options.update(given[2]) or train(*given))
    AndromedaTokenizer.train(TEXTS, 300, progress=progress)
    assert options["show_progress"] is progress
    assert capfd.readouterr().out == ""  # stdout of that process carries the answer


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
    """The hub is a port of this machine without a listener, so no test uses the network."""
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
