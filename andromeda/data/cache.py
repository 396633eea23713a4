"""The cache of built data sets: its location, the metadata of a data set, and the final name of a finished one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import xxhash

from andromeda import files

FORMAT = 1  # part of the cache key: raised when a change alters the rows
DATA_FILE = "data.arrow"
METADATA_FILE = "metadata.json"
BUILDING = ".building-"  # prefix of the names of unfinished data sets
_METADATA_KEYS = {
    *("seq_len", "packing", "dtype", "rows", "rows_per_batch", "data_bytes", "statistics"),
    *("vocab_size", "eos_token_id", "pad_token_id", "tokenizer_hash"),
}


def default_cache_dir() -> Path:
    """The default of `cache_dir`, the folder of data sets, as an absolute path; see `DatasetBuilder`.

    Raises:
        ValueError: the folder would be in the home directory, but that is not known.
    """
    if chosen := os.environ.get("ANDROMEDA_CACHE"):
        return absolute(chosen, "DatasetBuilder: ANDROMEDA_CACHE") / "datasets"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    if not os.path.isabs(base) and not base.startswith("~"):
        # The specification of that variable demands this.
        warnings.warn(f"XDG_CACHE_HOME must be an absolute path, got {base!r}: it is not used", stacklevel=2)
        base = "~/.cache"
    return absolute(base, "DatasetBuilder: the cache") / "andromeda" / "datasets"


def absolute(path: str | os.PathLike, name: str) -> Path:
    """The absolute path, with `~` resolved; a relative one starts at the directory that is current now.

    Args:
        path: as the user gave it.
        name: of the argument, for messages.
    """
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{name} must be a path, got {path!r:.80}")
    text = os.fspath(path)
    if not text:
        raise ValueError(f"{name} must not be empty; '.' is the current directory")
    head, slash, tail = text.partition("/")
    if head == "~":
        head = os.environ.get("HOME") or _home_of_account()
        if not os.path.isabs(head):
            raise ValueError(
                f"{name} is in the home directory ({text}), which is not known: HOME is not set to an absolute path "
                "and this user has no account; set ANDROMEDA_CACHE, or pass an absolute path as cache_dir"
            )
    elif head.startswith("~"):
        account, head = head, os.path.expanduser(head)
        if head == account:
            raise ValueError(
                f"{name} must be in the home directory of an account that there is, got {text!r}; a "
                f"folder of that name is './{text}'"
            )
    return Path(os.path.abspath(head + slash + tail))


def _home_of_account() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        return ""


def read_metadata(path: Path) -> dict[str, Any]:
    """The checked metadata of the data set in the folder `path`.

    Raises:
        ValueError: the folder does not hold a complete data set of this version.
    """
    try:
        metadata = json.loads((path / METADATA_FILE).read_text(encoding="utf-8"))
        size = (path / DATA_FILE).stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"PackedDataset: {path} must hold {METADATA_FILE} and {DATA_FILE}: {error}") from error
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8 also raise ValueError
        raise ValueError(f"PackedDataset: {path / METADATA_FILE} must be JSON: {error}") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        found = metadata.get("format") if isinstance(metadata, dict) else metadata
        raise ValueError(f"PackedDataset: {path / METADATA_FILE} must have format {FORMAT}, got {found!r:.80}")
    if missing := _METADATA_KEYS - metadata.keys():
        raise ValueError(f"PackedDataset: {path / METADATA_FILE} must have {', '.join(sorted(missing))}, got none")
    if size != metadata["data_bytes"]:
        raise ValueError(f"PackedDataset: {path / DATA_FILE} must have {metadata['data_bytes']} bytes, got {size}")
    _check_metadata(metadata, path / METADATA_FILE)
    return metadata


def _check_metadata(metadata: dict[str, Any], path: Path) -> None:
    """Raise unless every value is in its range: a wrong number would give wrong rows without an error."""

    def check(name: str, is_right: bool, requirement: str) -> None:
        if not is_right:
            raise ValueError(f"PackedDataset: {path}: {name} must be {requirement}, got {metadata[name]!r:.80}")

    def is_integer(name: str, least: int, most: int) -> bool:
        value = metadata[name]
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    for name in ("seq_len", "rows_per_batch", "vocab_size"):
        check(name, is_integer(name, 1, 2**32), "an integer from 1 to 2**32")
    check("rows", is_integer("rows", 1, 2**62), "an integer from 1")
    for name in ("eos_token_id", "pad_token_id"):
        check(name, is_integer(name, 0, metadata["vocab_size"] - 1), f"in 0 ... {metadata['vocab_size'] - 1}")
    check("dtype", metadata["dtype"] in ("uint16", "uint32"), "uint16 or uint32")
    check("packing", metadata["packing"] in ("stream", "bfd"), "stream or bfd")
    check("statistics", isinstance(metadata["statistics"], dict), "an object")
    check("tokenizer_hash", isinstance(metadata["tokenizer_hash"], str), "a string")


def metadata_checksum(metadata: dict[str, Any]) -> str:
    """XXH3-128 of all metadata except this checksum."""
    rest = {name: value for name, value in metadata.items() if name != "metadata_xxh3_128"}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())


def install(temporary: Path, path: Path) -> None:
    """Give a complete directory its final name. Builders with the same name wrote the same rows, so any may win."""
    for _ in range(10):
        try:
            os.rename(temporary, path)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        # The folder with this name is damaged, or another builder has just written it: move it out of the way.
        with files.temporary_folder(path.parent, BUILDING) as trash, contextlib.suppress(FileNotFoundError):
            os.rename(path, trash / "replaced")
    else:
        raise OSError(errno.EEXIST, "DatasetBuilder: other processes keep replacing the data set", str(path))
    files.flush(path.parent)
