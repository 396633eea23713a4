"""What the commands share: model sizes, and the folders they read and write (rows, models, tokenizers, JSON files)."""

import contextlib
import json
import os
import sys
from collections import Counter
from pathlib import Path

from andromeda.files import whole_folder

# Sizes to start from; every constructor argument has an option of its own on top.
SIZES = {
    "tiny": {"dim": 128, "depth": 4, "heads": 4, "dim_head": 32, "alibi_num_heads": 2},
    "small": {"dim": 768, "depth": 12, "heads": 12, "dim_head": 64, "alibi_num_heads": 6},
    "medium": {"dim": 1536, "depth": 24, "heads": 12, "dim_head": 128, "alibi_num_heads": 6},
    "full": {},
}


class UsageError(Exception):
    """The command line asks for something that makes no sense here: exit code 2."""


def say(text: str = ""):
    """A message, to stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def existing(path: str, what: str) -> Path:
    found = Path(path)
    if not found.exists():
        raise UsageError(f"{what} {path} does not exist")
    return found


def find_model(path: str) -> Path:
    """The folder of a saved model: the path itself, the `model` inside a run, or its newest whole checkpoint."""
    from andromeda.training import latest_checkpoint

    folder = existing(path, "checkpoint")
    newest = latest_checkpoint(folder)
    inside = (folder, folder / "model", *([] if newest is None else [Path(newest)]))
    for candidate in inside:
        if any((candidate / name).is_file() for name in ("config.json", "andromeda.json")):
            return candidate
    raise UsageError(
        f"checkpoint {path} is no saved model: neither it nor a model/ or checkpoint-N/ inside it has a config.json "
        "(save_pretrained) or andromeda.json (Andromeda.save)"
    )


def load_model(folder: Path, device: str | None, dtype: str | None):
    import torch
    from huggingface_hub.errors import StrictDataclassError

    from andromeda import Andromeda
    from andromeda.huggingface import AndromedaForCausalLM

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, dtype or "float32")
    if (folder / "andromeda.json").is_file():
        return AndromedaForCausalLM.from_andromeda(Andromeda.load(folder, device=device, dtype=dtype)).eval()
    try:
        with _transformers_quietly():
            return AndromedaForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    except StrictDataclassError as error:
        raise ValueError(f"{folder / 'config.json'} describes no model: {error}") from error


@contextlib.contextmanager
def _transformers_quietly():
    """No progress bars and no advice from transformers: a command has its own messages."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def load_tokenizer(source: str | Path):
    from andromeda import AndromedaTokenizer

    if Path(source, "tokenizer.json").is_file():
        # A saved tokenizer has its own end and padding tokens; the defaults would be appended to it.
        return AndromedaTokenizer(str(source), eos_token=None, pad_token=None)
    return AndromedaTokenizer(str(source))


def tokenizer_of(folder: Path, override: str | None):
    """The tokenizer named on the command line, or the one saved with a model or data set."""
    if override:
        return load_tokenizer(override)
    for candidate in (folder, folder / "tokenizer"):
        if (candidate / "tokenizer.json").is_file():
            return load_tokenizer(candidate)
    if not folder.exists():
        raise UsageError(f"{folder} does not exist (the name of a data set on the hub needs --tokenizer)")
    raise UsageError(f"{folder} has no tokenizer.json: say which tokenizer with --tokenizer")


def open_rows(source: str, *, tokenizer, seq_len: int, doc_mask: bool):
    """Packed rows: those in a folder of `build-dataset`, or a text source packed now (and kept in the cache)."""
    from andromeda.dataset import METADATA_FILE, PackedDataset

    if (Path(source) / METADATA_FILE).is_file():
        rows = PackedDataset(source, doc_mask=doc_mask)
        _check_same_tokenizer(Path(source), tokenizer)
        return rows
    from andromeda import DatasetBuilder

    return DatasetBuilder(source, seq_len=seq_len, tokenizer=tokenizer, doc_mask=doc_mask).build_dataset()


def _check_same_tokenizer(folder: Path, tokenizer):
    """Rows packed with another tokenizer than the one in hand would be read as other text, without any error."""
    from andromeda.packing import packing_tokenizer_json

    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        return
    packed_with = load_tokenizer(folder / "tokenizer").tokenizer.backend_tokenizer
    if packing_tokenizer_json(packed_with) != packing_tokenizer_json(tokenizer.tokenizer.backend_tokenizer):
        raise UsageError(f"the rows in {folder} were packed with another tokenizer; pack the text with the one in use")


def texts_of(source, text_column: str | None = None, split: str | None = None, errors: str = "strict", **options):
    """The documents of a source, as the packing will see them; long ones in parts."""
    from andromeda.documents import clean, open_source

    opened = open_source(source, split, text_column=text_column, errors=errors, **options)
    counts: Counter = Counter()
    return (document.text for document in clean(opened.documents(counts), errors, counts))


def pack(source, target: Path, tokenizer, **options):
    """Pack a source into the folder `target`, with the tokenizer inside: whole or absent."""
    from andromeda import DatasetBuilder
    from andromeda.dataset import DATA_FILE, METADATA_FILE, PackedDataset

    with whole_folder(target) as folder:
        built = DatasetBuilder(source, tokenizer=tokenizer, cache_dir=folder, **options).build_dataset()
        for name in (DATA_FILE, METADATA_FILE):
            os.replace(built.path / name, folder / name)
        built.path.rmdir()
        tokenizer.save(folder / "tokenizer")
    return PackedDataset(target)


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `value`."""
    return -(-value // step) * step


def parameter_count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
