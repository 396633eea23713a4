"""Small data sets for tests: texts, a tokenizer, a function that builds rows, functions that read or change them."""

import json

import datasets

from andromeda.data import workers
from andromeda.data.builder import DatasetBuilder
from andromeda.data.tokenizer import AndromedaTokenizer

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]

TEXTS = [" ".join(WORDS[(i * j) % 10] for j in range(1 + 7 * i % 40)) for i in range(40)] + ["", " \n", "<eos> is text"]

SEQ_LEN = 16


def train_tokenizer():
    return AndromedaTokenizer.train(TEXTS, vocab_size=290)


def builder(tokenizer, cache_dir):
    """DatasetBuilder(...).build_dataset() with a small row, this tokenizer and this cache."""

    def build(source=None, seq_len=SEQ_LEN, **options):
        source = datasets.Dataset.from_dict({"text": TEXTS}) if source is None else source
        options = {"tokenizer": tokenizer, "cache_dir": cache_dir, **options}
        return DatasetBuilder(source, seq_len, **options).build_dataset()

    return build


def stream_of(tokenizer, texts=TEXTS):
    """The tokens of all documents, tokenised one by one."""
    backend = workers.Encoder(
        workers.packing_tokenizer_json(tokenizer.tokenizer.backend_tokenizer), tokenizer.tokenizer.eos_token_id
    )
    return [token for text in texts if text.strip() for token in backend([text])[0]]


def rows_of(dataset):
    return [dataset[index]["input_ids"].tolist() for index in range(len(dataset))]


def cache_entries(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def change_metadata(path, **values):
    metadata = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps({**metadata, **values}))


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
