"""AndromedaTokenizer: the Hugging Face tokenizer that belongs to a model, with an end and a padding token."""

from __future__ import annotations

import contextlib
import copy
import json
import operator
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from andromeda import files
from andromeda.data import workers
from andromeda.data.pieces import Seams, pieces

if TYPE_CHECKING:
    import numpy as np
    import tokenizers
    import torch
    from transformers import PreTrainedTokenizerBase

PROBE_SECONDS = 5


def check_texts(texts: Iterable[object], name: str) -> Iterator[str]:
    """Yield the texts one after the other, each after a check.

    Args:
        texts: items; each must be a string that UTF-8 can express.
        name: of the function and its argument, as in "AndromedaTokenizer.train: texts".

    Raises:
        TypeError, ValueError: an item is not a string or holds a lone surrogate; names its index and the character.
    """
    for index, text in enumerate(texts):
        yield check_text(text, f"{name}[{index}]")


def check_text(text: object, name: str) -> str:
    """`check_texts` for a single text."""
    if not isinstance(text, str):
        got = "None" if text is None else f"{type(text).__name__} {text!r:.80}"
        raise TypeError(f"{name} must be a string, got {got}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = text[error.start]
        hint = ""
        if "\udc80" <= found <= "\udcff":
            byte = ord(found) - 0xDC00
            hint = f"; it stands for the byte 0x{byte:02x} of a text that is not UTF-8: read it in its own encoding"
        raise ValueError(
            f"{name} must be text that UTF-8 can express, got the lone surrogate {found!r} at character "
            f"{error.start}{hint}"
        ) from None
    return text


class AndromedaTokenizer:
    """Text to token ids and back.

    Text stays text: `tokenize_texts`, `encode_prompt` and `DatasetBuilder` do not read characters that spell the end
    token, the padding token or another special token as that token, so no text can end a document. Only the tokens of
    `extra_ids` are read wherever a text spells them, because they are made for that.

    Args:
        pretrained: name of a repository on the Hugging Face hub, a local directory, the path of a `tokenizer.json`, or
            a tokenizer made by `tokenizers` or `transformers`, which is copied, not changed. A name is looked up in the
            local cache first, and on the hub only if it is not there.
        eos_token: end of a document; `DatasetBuilder` writes it after each. None: the tokenizer's own.
        pad_token: fills short rows. None: the tokenizer's own.
        extra_ids: adds this many tokens `<extra_id_0>`, `<extra_id_1>`, ... for use in texts.
        model_max_length: `tokenize_texts` cuts longer texts to this many ids.

    Tokens missing from the vocabulary are appended to it in the order eos, pad, extra ids: 50277 and 50278 for
    GPT-NeoX. `len(tokenizer)` counts them; rounded up (50304), it is the size for the embedding of a model.

    Attributes:
        tokenizer: the `transformers` tokenizer. Its `padding_side` is "right", as training needs it; set "left" before
            batches of prompts for generation. Called directly, it reads special tokens in texts, as usual in
            transformers; `split_special_tokens=True` makes it follow the rule above.

    Raises:
        OSError: `pretrained` is neither a local tokenizer nor in the cache, and the hub does not give it; says why.
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
        options: dict[str, Any] = {"model_max_length": model_max_length}
        for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
            if token is not None and not (isinstance(token, str) and token):
                raise TypeError(f"AndromedaTokenizer: {name} must be a non-empty string or None, got {token!r}")
            if token is not None:
                options[name] = token
        self.tokenizer = _load(pretrained, options)
        self.tokenizer.padding_side = "right"
        if extra_ids:
            self._add_extra_ids([f"<extra_id_{index}>" for index in range(extra_ids)])

    def _add_extra_ids(self, names: list[str]) -> None:
        from tokenizers import AddedToken, Tokenizer

        added = self.tokenizer.added_tokens_decoder.values()
        were_special = any(token.special and token.content in names for token in added)
        # Texts are read without special tokens, so these must not be special.
        self.tokenizer.add_tokens([AddedToken(name, normalized=False, special=False) for name in names])
        if were_special:  # tokenizers drops that property only when it reads the tokenizer again
            self.tokenizer._tokenizer = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())

    def __len__(self) -> int:
        """Number of ids, appended tokens included."""
        return len(self.tokenizer)

    def __repr__(self) -> str:
        special = f"eos_token={self.tokenizer.eos_token!r}, pad_token={self.tokenizer.pad_token!r}"
        return f"{type(self).__name__}({len(self)} ids, {special}, model_max_length={self.tokenizer.model_max_length})"

    def tokenize_texts(self, texts: str | Iterable[str], *, special_tokens: bool = False) -> torch.Tensor:
        """Token ids of several texts, padded on the right to the longest and cut at `model_max_length`.

        Args:
            texts: strings; a single string counts as a list of one. The end token is not appended.
            special_tokens: read the special tokens that a text spells, as prompts for chat models require.

        Returns:
            (len(texts), longest) int64; (0, 0) for no texts.

        Raises:
            TypeError, ValueError: an item is not a string that UTF-8 can express; names its index.
        """
        import torch

        if isinstance(texts, str):
            texts = [texts]
        rows = self._token_ids(texts, "AndromedaTokenizer.tokenize_texts", special_tokens)
        if not rows:
            return torch.zeros((0, 0), dtype=torch.int64)
        longest = max(map(len, rows))
        if any(len(row) < longest for row in rows) and self.tokenizer.pad_token_id is None:
            raise ValueError(
                "AndromedaTokenizer.tokenize_texts: texts must have the same number of tokens, because the tokenizer "
                f"has no padding token, got {min(map(len, rows))} to {longest}; give it a pad_token"
            )
        left = self.tokenizer.padding_side == "left"
        for row in rows:
            padding = [self.tokenizer.pad_token_id] * (longest - len(row))
            row[:] = padding + row if left else row + padding
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1)

    def _token_ids(self, texts: Iterable[str], caller: str, special_tokens: bool) -> list[list[int]]:
        if texts is None or isinstance(texts, (str, bytes, dict)) or not isinstance(texts, Iterable):
            raise TypeError(f"{caller}: texts must be a list of strings, got {type(texts).__name__}")
        texts = list(check_texts(texts, f"{caller}: texts"))
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=not special_tokens,
            truncation=True,
            return_attention_mask=False,
        )["input_ids"]

    def encode_prompt(self, prompt: str, *, special_tokens: bool = False) -> list[int]:
        """Token ids of one text for `generate`, however long, read as `tokenize_texts` reads it.

        Raises:
            TypeError, ValueError: `prompt` is not a string that UTF-8 can express.
        """
        return token_ids(self.tokenizer, prompt, special_tokens, name="AndromedaTokenizer.encode_prompt: prompt")

    def decode(
        self, ids: int | Iterable[Any] | torch.Tensor | np.ndarray, skip_special_tokens: bool = True
    ) -> str | list[str]:
        """Text of token ids.

        Args:
            ids: one row of ids (a tensor, an array, a list, a single id) or a batch of rows.
            skip_special_tokens: leave out end, padding and other special tokens, and those of `extra_ids`.

        Returns:
            A string for one row, a list of strings for a batch. Ids beyond the vocabulary (a model's embedding may be
            larger) have no text.

        Raises:
            TypeError, ValueError: an id is not a whole number, or is negative like the labels of padding; names its
                position.
        """
        rows = _to_lists(ids)
        if not isinstance(rows, list):
            rows = [rows]
        if not any(isinstance(row, list) for row in rows):
            return self._decode_row(rows, "ids", skip_special_tokens)
        return [self._decode_row(row, f"row {index}: ids", skip_special_tokens) for index, row in enumerate(rows)]

    def _decode_row(self, row: object, name: str, skip_special_tokens: bool) -> str:
        if not isinstance(row, list):
            raise TypeError(
                f"AndromedaTokenizer.decode: {name} must be a row of ids as the others are, got {row!r:.80}"
            )
        ids = [_check_id(token, f"{name}[{index}]") for index, token in enumerate(row)]
        if skip_special_tokens and (extra := self._extra_ids()):
            ids = [token for token in ids if token not in extra]
        text = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # the text of one row
        return text

    def _extra_ids(self) -> set[int]:
        """The ids of the tokens of `extra_ids`."""
        added = self.tokenizer.added_tokens_decoder.items()
        return {index for index, token in added if _EXTRA_ID.fullmatch(token.content)}

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer to the directory `path`; `AndromedaTokenizer(path)` reads it back.

        Every file is written under a temporary name, synced and renamed.

        Raises:
            OSError: a file could not be written; names the cause and the remedy.
        """
        if not os.fspath(path):
            raise ValueError("AndromedaTokenizer.save: path must not be empty; '.' is the current directory")
        path = Path(os.path.abspath(path))
        with files.writing(path, "the tokenizer"):
            path.mkdir(parents=True, exist_ok=True)
            with files.temporary_folder(path, ".tokenizer-") as temporary:
                self.tokenizer.save_pretrained(temporary)
                # `AndromedaTokenizer(path)` looks for tokenizer.json, so this file is written last.
                for file in sorted(temporary.iterdir(), key=lambda file: file.name == "tokenizer.json"):
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

        A separate process does the work; an exception in this process (Ctrl-C, or one that `texts` raises) ends it at
        once.

        Args:
            texts: documents, read once and not kept in memory.
            vocab_size: largest number of ids, with the end and padding tokens (ids 0 and 1) and the 256 bytes.
            min_frequency: a pair of tokens is merged only if it occurs at least this often.
            eos_token, pad_token: two different strings; neither may be a single character that stands for a byte.
            model_max_length: as in the constructor.
            progress: show the progress bars of `tokenizers`.

        Returns:
            The tokenizer; the same texts give the same tokenizer.

        Raises:
            TypeError, ValueError: an argument or one of the texts is wrong; names it, and the index of the text.
            RuntimeError: the training process died, for example because memory ran out; says how.
        """
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        least = len(alphabet) + 2
        for name, value, low in (
            ("vocab_size", vocab_size, least),
            ("min_frequency", min_frequency, 0),
            ("model_max_length", model_max_length, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"AndromedaTokenizer.train: {name} must be an integer, got {value!r}")
            if value < low:
                reason = " (every byte, end, padding)" if name == "vocab_size" else ""
                raise ValueError(f"AndromedaTokenizer.train: {name} must be at least {low}{reason}, got {value}")
        for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
            if not isinstance(token, str) or not token:
                raise TypeError(f"AndromedaTokenizer.train: {name} must be a non-empty string, got {token!r}")
            check_text(token, f"AndromedaTokenizer.train: {name}")
            if token in alphabet:
                raise ValueError(
                    f"AndromedaTokenizer.train: {name} must not be a single character that stands for a byte, got "
                    f"{token!r}; texts would be full of it"
                )
        if eos_token == pad_token:
            raise ValueError(f"AndromedaTokenizer.train: pad_token must differ from eos_token, got {pad_token!r} twice")
        if isinstance(texts, (str, bytes)):
            raise TypeError("AndromedaTokenizer.train: texts must be an iterable of documents, got a single string")
        if texts is None or isinstance(texts, dict) or not isinstance(texts, Iterable):
            raise TypeError(
                f"AndromedaTokenizer.train: texts must be an iterable of documents, got {type(texts).__name__}"
            )
        # The alphabet is needed to find seams in long texts; the trainer builds its own vocabulary.
        tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        options = {
            "vocab_size": vocab_size,
            "min_frequency": min_frequency,
            "special_tokens": [eos_token, pad_token],
            "initial_alphabet": alphabet,
            "show_progress": bool(progress),
        }
        checked = check_texts(texts, "AndromedaTokenizer.train: texts")
        description = tokenizer.to_str()
        trained = workers.train_tokenizer(pieces(checked, Seams(description)), description, options)
        return cls(
            Tokenizer.from_str(trained), eos_token=eos_token, pad_token=pad_token, model_max_length=model_max_length
        )


def token_ids(
    tokenizer: PreTrainedTokenizerBase, text: str, special_tokens: bool = False, *, name: str = "prompt"
) -> list[int]:
    """Ids of one text by the rule of `AndromedaTokenizer`, for a tokenizer of `transformers`.

    Raises:
        TypeError, ValueError: `text` is not a string that UTF-8 can express; the message calls it `name`.
    """
    encoded = tokenizer(
        check_text(text, name), add_special_tokens=False, split_special_tokens=not special_tokens, truncation=False
    )
    return encoded["input_ids"]


_EXTRA_ID = re.compile(r"<extra_id_\d+>")


def _to_lists(ids: Any) -> Any:
    """Nested lists from a tensor, an array, or a sequence of them; a value that is not a sequence stays as it is."""
    if hasattr(ids, "tolist"):
        return ids.tolist()
    if isinstance(ids, (str, bytes, dict)) or not isinstance(ids, Iterable):
        return ids
    return [_to_lists(row) for row in ids]


def _check_id(token: Any, name: str) -> int:
    try:
        if isinstance(token, bool):
            raise TypeError
        token = operator.index(token)
    except TypeError:
        raise TypeError(f"AndromedaTokenizer.decode: {name} must be an integer, got {token!r:.80}") from None
    if not 0 <= token < 2**32:
        raise ValueError(f"AndromedaTokenizer.decode: {name} must be in 0 ... 2**32 - 1, got {token}")
    return token


def _load(
    pretrained: str | os.PathLike | tokenizers.Tokenizer | PreTrainedTokenizerBase, options: dict[str, Any]
) -> PreTrainedTokenizerBase:
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
    """Whether a name that is not an existing path cannot be `owner/name` on the hub."""
    text = os.fspath(name)
    return (
        not isinstance(name, str) or text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith(".json")
    )


def _load_file(path: Path, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad UTF-8 also raises it
        raise ValueError(f"AndromedaTokenizer: {path} must be the JSON of a tokenizer: {error}") from error
    if not isinstance(description, dict) or "model" not in description:
        raise ValueError(f'AndromedaTokenizer: {path} must be a tokenizer.json of tokenizers, found no "model" in it')
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **options)


# Beside a tokenizer there may be a model with code of its own: transformers would ask whether to run it, and wait.
_NO_CODE: dict[str, Any] = {"trust_remote_code": False}


def _load_directory(path: Path, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if (path / "tokenizer_config.json").is_file():
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, **_NO_CODE, **options)
    if (path / "tokenizer.json").is_file():
        return _load_file(path / "tokenizer.json", options)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
    raise FileNotFoundError(
        f"AndromedaTokenizer: {path} must hold tokenizer.json or tokenizer_config.json, found {found}"
    )


def _load_from_hub(name: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """A tokenizer from the cache, else from the hub if that answers: transformers would retry for 46 seconds."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, **_NO_CODE, **options)
    except (OSError, ValueError) as error:
        cause, problem = error, hub_problem()
    if problem is None:
        try:
            return AutoTokenizer.from_pretrained(name, **_NO_CODE, **options)
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
    """The reason why the Hugging Face hub cannot be reached, or None if it answers within PROBE_SECONDS.

    One request, without the many retries of huggingface_hub, goes through the proxies that the environment names.
    """
    import ssl
    import urllib.error
    import urllib.request

    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return "HF_HUB_OFFLINE=1 forbids asking the hub"
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with contextlib.suppress(urllib.error.HTTPError):  # an error of HTTP is an answer
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except OSError as error:
        reason = getattr(error, "reason", error)
        # huggingface_hub checks certificates itself, and may know others.
        return None if isinstance(reason, ssl.SSLError) else f"{constants.ENDPOINT} cannot be reached ({reason})"
    return None
