"""AndromedaTokenizer: the Hugging Face tokenizer that belongs to a model, with an end and a padding token."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from andromeda import files

if TYPE_CHECKING:
    import tokenizers
    import torch
    from transformers import PreTrainedTokenizerBase

PROBE_SECONDS = 5


class AndromedaTokenizer:
    """Text to token ids and back.

    Args:
        pretrained: name of a repository on the Hugging Face hub, a local directory, the path of a `tokenizer.json`, or
            a tokenizer made by `tokenizers` or `transformers`, which is copied, not changed. A name is looked up in the
            local cache first; the network is asked only for what is not there.
        eos_token: end of a document, written between documents by `DatasetBuilder`. None: the one the tokenizer has.
        pad_token: fills short rows. None: the one the tokenizer has.
        extra_ids: adds this many special tokens `<extra_id_0>`, `<extra_id_1>`, ...
        model_max_length: `tokenize_texts` cuts longer texts to this many ids.

    Tokens that the vocabulary does not have are appended to it in the order eos, pad, extra ids: 50277 and 50278 for
    GPT-NeoX. `len(tokenizer)` counts them: size the embedding of a model with it, rounded up (50304).

    Attributes:
        tokenizer: the `transformers` tokenizer. Its `padding_side` is "right", as training wants it; set "left" before
            batches of prompts for generation.

    Raises:
        OSError: `pretrained` is neither a local tokenizer nor in the cache nor to be had from the hub; says which.
        TypeError, ValueError: an argument is of the wrong kind.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike | tokenizers.Tokenizer | PreTrainedTokenizerBase = "EleutherAI/gpt-neox-20b",
        eos_token: str | None = "<eos>",
        pad_token: str | None = "<pad>",
        extra_ids: int = 0,
        model_max_length: int = 8192,
    ):
        for name, value, least in (("extra_ids", extra_ids, 0), ("model_max_length", model_max_length, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"AndromedaTokenizer: {name} must be an integer, got {value!r}")
            if value < least:
                raise ValueError(f"AndromedaTokenizer: {name} must be at least {least}, got {value}")
        options: dict = {"model_max_length": model_max_length}
        for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
            if token is not None and not (isinstance(token, str) and token):
                raise TypeError(f"AndromedaTokenizer: {name} must be a non-empty string or None, got {token!r}")
            if token is not None:
                options[name] = token
        self.tokenizer = _load(pretrained, options)
        self.tokenizer.padding_side = "right"
        if extra_ids:
            from tokenizers import AddedToken

            names = [f"<extra_id_{index}>" for index in range(extra_ids)]
            added = [AddedToken(name, normalized=False, special=True) for name in names]
            self.tokenizer.add_tokens(added, special_tokens=True)

    def __len__(self) -> int:
        """Number of ids, appended tokens included."""
        return len(self.tokenizer)

    def __repr__(self) -> str:
        special = f"eos_token={self.tokenizer.eos_token!r}, pad_token={self.tokenizer.pad_token!r}"
        return f"{type(self).__name__}({len(self)} ids, {special}, model_max_length={self.tokenizer.model_max_length})"

    def tokenize_texts(self, texts: str | Iterable[str]) -> torch.Tensor:
        """Token ids of several texts, padded on the right to the longest and cut at `model_max_length`.

        Args:
            texts: strings; a single string counts as a list of one. The end token is not appended.

        Returns:
            (len(texts), longest) int64; (0, 0) for no texts.

        Raises:
            TypeError: an item is not a string; names its index.
        """
        import torch

        if isinstance(texts, str):
            texts = [texts]
        elif texts is None or isinstance(texts, (bytes, dict)) or not isinstance(texts, Iterable):
            kind = type(texts).__name__
            raise TypeError(f"AndromedaTokenizer.tokenize_texts: texts must be a list of strings, got {kind}")
        texts = list(texts)
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                got = "None" if text is None else f"{type(text).__name__} {text!r:.80}"
                raise TypeError(f"AndromedaTokenizer.tokenize_texts: texts[{index}] must be a string, got {got}")
        if not texts:
            return torch.zeros((0, 0), dtype=torch.int64)
        padding = self.tokenizer.pad_token is not None or len(texts) > 1
        rows = self.tokenizer(texts, padding=padding, truncation=True)["input_ids"]
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)

    def decode(self, ids, skip_special_tokens: bool = True) -> str | list[str]:
        """Text of token ids.

        Args:
            ids: one row of ids (a tensor, an array, a list, a single id) or a batch of rows.
            skip_special_tokens: leave out end, padding and other special tokens.

        Returns:
            A string for one row, a list of strings for a batch. Ids that the vocabulary does not have (a model's
            embedding may be larger) have no text.

        Raises:
            TypeError, ValueError: an id is not a whole number or is negative, which is how labels mark padding.
        """
        if hasattr(ids, "tolist"):
            ids = ids.tolist()
        if isinstance(ids, int):
            ids = [ids]
        rows = [row.tolist() if hasattr(row, "tolist") else row for row in ids]
        if not any(isinstance(row, (list, tuple)) for row in rows):
            return self._decode_row(rows, skip_special_tokens)
        return [self._decode_row(row, skip_special_tokens) for row in rows]

    def _decode_row(self, ids, skip_special_tokens: bool) -> str:
        for index, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int):
                raise TypeError(f"AndromedaTokenizer.decode: ids[{index}] must be an integer, got {token!r}")
            if not 0 <= token < 2**32:
                raise ValueError(f"AndromedaTokenizer.decode: ids[{index}] must be in 0 ... 2**32 - 1, got {token}")
        return self.tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer to the directory `path`; `AndromedaTokenizer(path)` reads it back.

        Every file is written under a temporary name, synced and renamed.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=path) as temporary:
            self.tokenizer.save_pretrained(temporary)
            # tokenizer.json is what `AndromedaTokenizer(path)` looks for, so it comes last.
            for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "tokenizer.json"):
                files.flush(file)
                os.replace(file, path / file.name)
        files.flush(path)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = 16384,
        *,
        min_frequency: int = 2,
        eos_token: str = "<eos>",
        pad_token: str = "<pad>",
        model_max_length: int = 8192,
        progress: bool = False,
    ) -> AndromedaTokenizer:
        """Train a byte-level BPE tokenizer: any text encodes without unknown tokens and decodes to itself.

        Args:
            texts: documents, read once.
            vocab_size: number of ids at most, end and padding token (ids 0 and 1) and the 256 bytes included.
            min_frequency: a pair of tokens is merged only if it occurs this often.
            eos_token, pad_token, model_max_length: as in the constructor.
            progress: show the progress bars of `tokenizers`.

        Returns:
            The tokenizer; the same texts give the same one.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
            raise TypeError(f"AndromedaTokenizer.train: vocab_size must be an integer, got {vocab_size!r}")
        if vocab_size < len(alphabet) + 2:
            least = f"{len(alphabet) + 2} (every byte, end, padding)"
            raise ValueError(f"AndromedaTokenizer.train: vocab_size must be at least {least}, got {vocab_size}")
        if isinstance(texts, (str, bytes)):
            raise TypeError("AndromedaTokenizer.train: texts must be an iterable of documents, got a single string")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[eos_token, pad_token],
            initial_alphabet=alphabet,
            show_progress=progress,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer, eos_token=eos_token, pad_token=pad_token, model_max_length=model_max_length)


def _load(pretrained, options: dict) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    if isinstance(pretrained, Tokenizer):
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(pretrained.to_str()), **options)
    if isinstance(pretrained, PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(pretrained)
        tokenizer.model_max_length = options["model_max_length"]
        tokenizer.add_special_tokens({name: token for name, token in options.items() if name.endswith("_token")})
        return tokenizer
    if not isinstance(pretrained, (str, os.PathLike)):
        raise TypeError(
            "AndromedaTokenizer: pretrained must be a name, a path or a tokenizer of tokenizers or transformers, "
            f"got {type(pretrained).__name__}"
        )
    path = Path(pretrained).expanduser()
    if path.is_file():
        return _load_file(path, options)
    if path.is_dir():
        return _load_directory(path, options)
    if _looks_like_path(pretrained):
        raise FileNotFoundError(f"AndromedaTokenizer: pretrained must be an existing path, got {str(pretrained)!r}")
    return _load_from_hub(str(pretrained), options)


def _looks_like_path(name: str | os.PathLike) -> bool:
    """Whether a name that does not exist here cannot be meant as `owner/name` on the hub."""
    text = os.fspath(name)
    return (
        not isinstance(name, str) or text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith(".json")
    )


def _load_file(path: Path, options: dict) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also what bad UTF-8 raises
        raise ValueError(f"AndromedaTokenizer: {path} must be the JSON of a tokenizer: {error}") from error
    if not isinstance(description, dict) or "model" not in description:
        raise ValueError(f'AndromedaTokenizer: {path} must be a tokenizer.json of tokenizers, found no "model" in it')
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **options)


def _load_directory(path: Path, options: dict) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if (path / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, **options)
    if (path / "tokenizer.json").is_file():
        return _load_file(path / "tokenizer.json", options)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
    raise FileNotFoundError(
        f"AndromedaTokenizer: {path} must hold tokenizer.json or tokenizer_config.json, found {found}"
    )


def _load_from_hub(name: str, options: dict) -> PreTrainedTokenizerBase:
    """From the cache, else from the network if it answers: transformers alone would retry for 46 seconds."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        cause, problem = error, hub_problem()
    if problem is None:
        try:
            return AutoTokenizer.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            cause, problem = error, f"the hub does not give it: {error}"
    from huggingface_hub import constants

    raise OSError(
        f"AndromedaTokenizer: cannot load {name!r}: it is not a local path, it is not in the cache "
        f"{constants.HF_HUB_CACHE}, and {problem}\n"
        "  * A local tokenizer works without network: AndromedaTokenizer('DIRECTORY') with a tokenizer.json in it, "
        "or AndromedaTokenizer('tokenizer.json').\n"
        f"  * To fill the cache on a machine with network: hf download {name} --include 'tokenizer*' '*.json'; "
        "then copy the cache here, or set HF_HOME to a copy of it."
    ) from cause


def hub_problem() -> str | None:
    """Why the Hugging Face hub cannot be reached, or None if it answers; within PROBE_SECONDS.

    One request without the many retries of huggingface_hub, through the proxies that the environment names.
    """
    import ssl
    import urllib.error
    import urllib.request

    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE=1 forbids asking the hub"
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # an answer, if not a kind one
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except OSError as error:
        reason = getattr(error, "reason", error)
        # Certificates are huggingface_hub's business: it may know other ones.
        return None if isinstance(reason, ssl.SSLError) else f"{constants.ENDPOINT} cannot be reached ({reason})"
    return None
