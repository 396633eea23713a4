"""Finds and loads the models, devices, prompts, tokenizers and rows that the command line names."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from andromeda.cli.console import UsageError, say
from andromeda.files import whole_folder

if TYPE_CHECKING:
    import torch

    from andromeda import AndromedaTokenizer
    from andromeda.data.packed import PackedDataset
    from andromeda.data.sources import Source
    from andromeda.training.saved_model import SavedModel


def _existing(path: str, what: str) -> Path:
    found = Path(path)
    if not found.exists():
        raise UsageError(f"{what} {path} does not exist")
    return found


def find_model(path: str) -> Path:
    """The folder of a saved model: the path itself, the `model` inside a run, or its newest whole checkpoint."""
    from andromeda.training import latest_checkpoint

    folder = _existing(path, "checkpoint")
    newest = latest_checkpoint(folder)
    inside = (folder, folder / "model", *([] if newest is None else [Path(newest)]))
    for candidate in inside:
        if any((candidate / name).is_file() for name in ("config.json", "andromeda.json")):
            return candidate
    raise UsageError(
        f"checkpoint {path} is no saved model: neither it nor a model/ or checkpoint-N/ inside it has a config.json "
        "(save_pretrained) or andromeda.json (Andromeda.save)"
    )


def read_device(name: str | None) -> torch.device:
    """The device that --device names; None means a GPU if there is one, else the CPU.

    Raises:
        UsageError: this machine has no such device; the message lists its devices and says why there is no GPU.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if gpus else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind == "cuda" and gpus and (name == kind or (index.isdecimal() and index.isascii() and int(index) < gpus)):
        return torch.device(name)
    here = ["cpu", *(f"cuda:{number}" for number in range(gpus))]
    raise UsageError(
        f"--device must be {' or '.join(here)}, got {name!r}{'' if gpus else '; ' + _why_no_gpu()}; "
        "leave --device out to take the best there is"
    )


def _why_no_gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    hidden = "" if visible is None else f", CUDA_VISIBLE_DEVICES is {visible!r}"
    return f"torch {torch.__version__} sees no NVIDIA GPU{hidden}"


def training_device(name: str | None) -> str | None:
    """The device that --device names, as `TrainSettings.device`: "cpu", or None for the first visible GPU.

    Raises:
        UsageError: there is no such device, or it is a GPU other than the first one.
    """
    device = read_device(name)
    if name is None or device.type == "cpu":
        return name
    if device.index:
        raise UsageError(
            f"--device must be cpu or cuda here, got {name!r}; CUDA_VISIBLE_DEVICES={device.index} chooses among GPUs"
        )
    return None


def read_prompt(text: str | None, file: str | None) -> str:
    """The text of --prompt or of --prompt-file, one of which is given; "-" is standard input.

    Raises:
        UsageError: there is no such file, or its content is not UTF-8; the message names the file and the position.
    """
    if text is not None:
        return _decoded(os.fsencode(text), "--prompt") if any("\udc80" <= char <= "\udcff" for char in text) else text
    assert file is not None
    if file == "-":
        if sys.stdin is None:
            raise UsageError("--prompt-file - needs standard input, which is closed")
        return _decoded(sys.stdin.buffer.read(), "--prompt-file: standard input")
    path = _existing(file, "--prompt-file")
    if path.is_dir():
        raise UsageError(f"--prompt-file must be a file, got the folder {file}")
    return _decoded(path.read_bytes(), f"--prompt-file: {file}")


def _decoded(data: bytes, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        begin = error.start + (3 if data.startswith(b"\xef\xbb\xbf") else 0)
        raise UsageError(
            f"{where} must be text in UTF-8, got the byte 0x{data[begin]:02x} at offset {begin}; "
            "convert it first, as `iconv -f LATIN1 -t UTF-8` does"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")  # as Python reads text


def load_model(
    folder: Path, device: str | torch.device | None, dtype: str | None, *, finite: bool = False
) -> SavedModel:
    """The model in a folder that `find_model` found, in evaluation mode.

    If the folder has a manifest, the files are compared with it first.

    Args:
        device: None for a GPU if there is one.
        dtype: of the weights; None is float32.
        finite: refuse weights that are NaN or infinite; otherwise these only cause a warning.

    Raises:
        ValueError: files are damaged, do not describe a model, or hold weights that are refused; names the files.
    """
    import torch

    from andromeda.training import first_few, load_saved_model, nonfinite_parameters

    device = read_device(None) if device is None else device
    model = load_saved_model(folder, device, getattr(torch, "float32" if dtype is None else dtype))
    if odd := nonfinite_parameters(model):
        text = f"{len(odd)} of {len(list(model.parameters()))} parameters of {folder} are not finite: {first_few(odd)}"
        if finite:
            raise ValueError(f"{text}; the training diverged, take an earlier checkpoint")
        say(f"andromeda: warning: {text}; the training diverged, and the text of this model means nothing")
    return model


def load_tokenizer(source: str | Path) -> AndromedaTokenizer:
    """The tokenizer of that name on the hub, or in that folder or file."""
    from andromeda import AndromedaTokenizer

    if Path(source, "tokenizer.json").is_file():
        # A saved tokenizer has its own end and padding tokens; the defaults would be appended to it.
        return AndromedaTokenizer(str(source), eos_token=None, pad_token=None)
    return AndromedaTokenizer(str(source))


def tokenizer_of(folder: Path, override: str | None) -> AndromedaTokenizer:
    """The tokenizer that --tokenizer names (`override`), or the one saved with the model or the rows in `folder`."""
    if override is not None:
        return load_tokenizer(override)
    for candidate in (folder, folder / "tokenizer"):
        if (candidate / "tokenizer.json").is_file():
            return load_tokenizer(candidate)
    if not folder.exists():
        raise UsageError(f"{folder} does not exist (the name of a data set on the hub needs --tokenizer)")
    raise UsageError(f"{folder} has no tokenizer.json: say which tokenizer with --tokenizer")


def open_rows(
    source: str, *, tokenizer: AndromedaTokenizer, seq_len: int, doc_mask: bool, verify: bool = True
) -> PackedDataset:
    """Packed rows: those in a folder of `build-dataset`, or a text source, which is packed now and kept in the cache.

    Args:
        verify: compare the rows of a folder with their checksums, which reads all of them.
    """
    from andromeda.data.cache import METADATA_FILE
    from andromeda.data.packed import PackedDataset

    if (Path(source) / METADATA_FILE).is_file():
        rows = PackedDataset(source, doc_mask=doc_mask)
        if verify and not rows.verify():
            say(f"andromeda: {source} is of an older version and has no checksums: damage would not be noticed")
        _check_same_tokenizer(Path(source), tokenizer)
        return rows
    from andromeda import DatasetBuilder

    return DatasetBuilder(source, seq_len=seq_len, tokenizer=tokenizer, doc_mask=doc_mask).build_dataset()


def _check_same_tokenizer(folder: Path, tokenizer: AndromedaTokenizer) -> None:
    """Refuse rows packed with another tokenizer: their ids would silently stand for other text."""
    from andromeda.data.workers import packing_tokenizer_json

    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        return
    packed_with = load_tokenizer(folder / "tokenizer").tokenizer.backend_tokenizer
    if packing_tokenizer_json(packed_with) != packing_tokenizer_json(tokenizer.tokenizer.backend_tokenizer):
        raise UsageError(f"the rows in {folder} were packed with another tokenizer; pack the text with the one in use")


def texts_of(source: str | Path | Source, errors: str = "strict") -> Iterator[str]:
    """The documents of a source, as packing will read them, long ones in parts."""
    from andromeda.data.cleaning import clean
    from andromeda.data.pieces import in_parts
    from andromeda.data.sources import open_source

    opened = open_source(source, errors=errors)
    counts: Counter[str] = Counter()
    return in_parts(clean(opened.documents(counts), errors, counts))


def pack(source: str | Path | Source, target: Path, tokenizer: AndromedaTokenizer, **options: Any) -> PackedDataset:
    """Pack a source into the folder `target`, with the tokenizer inside; the folder appears whole or not at all.

    Args:
        options: those of `DatasetBuilder`.
    """
    from andromeda import DatasetBuilder
    from andromeda.data.cache import DATA_FILE, METADATA_FILE
    from andromeda.data.packed import PackedDataset

    with whole_folder(target) as folder:
        built = DatasetBuilder(source, tokenizer=tokenizer, cache_dir=folder, **options).build_dataset()
        for name in (DATA_FILE, METADATA_FILE):
            os.replace(built.path / name, folder / name)
        built.path.rmdir()
        tokenizer.save(folder / "tokenizer")
    return PackedDataset(target)
