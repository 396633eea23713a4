"""The files below a folder, and the reasons why some are left out."""

from __future__ import annotations

import fnmatch
import json
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

MAX_NAMES = 20  # names that are kept for each reason to leave a file out

# Files that `datasets` writes beside the data; they hold no documents.
DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_ROWS_FILES = ("data.arrow", "metadata.json")  # of a folder of packed rows


class Skipped:
    """The files and folders that were left out: their number for each reason, and the names of the first ones.

    Attributes:
        notes: other remarks on the choice of files.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._names: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, reason: str) -> None:
        names = self._names.setdefault(reason, [])
        self._counts[reason] = self._counts.get(reason, 0) + 1
        if len(names) < MAX_NAMES:
            names.append(name)

    def total(self) -> int:
        return sum(self._counts.values())

    def lines(self) -> list[str]:
        """A line for each reason, such as "2 of no known kind: a.png, b.bin"."""
        return [
            f"{count:,} {reason}: {', '.join(self._names[reason])}"
            + (f" and {count - MAX_NAMES:,} more" if count > MAX_NAMES else "")
            for reason, count in self._counts.items()
        ]


def walk(
    root: Path, is_known: Callable[[str], object], include: Iterable[str], exclude: Iterable[str], skipped: Skipped
) -> list[Path]:
    """Files below a folder, in the order of their names; the files of a folder come before its subfolders.

    Links are followed; a file or folder with several paths is taken once. Hidden files and folders are left out.

    Args:
        root: the folder.
        is_known: whether the kind of a file with this name is known.
        include: patterns; if there are any, exactly the matching files are taken, whatever their kind.
        exclude: patterns of files and folders to leave out.
        skipped: receives all files and folders that are left out.

    Raises:
        OSError: a folder below cannot be read.
    """
    include, exclude = tuple(include), tuple(exclude)
    unused = {*include, *exclude}
    found: list[Path] = []
    seen: dict[tuple[int, int], str] = {_identity(os.stat(root)): "the folder itself"}

    def matches(name: str, patterns: tuple[str, ...]) -> bool:
        matching = [pattern for pattern in patterns if _matches(name, pattern)]
        unused.difference_update(matching)
        return bool(matching)

    def is_first(entry: os.stat_result, name: str) -> bool:
        first = seen.setdefault(_identity(entry), name)
        if first != name:
            skipped.add(f"{name} ({first})", "already read by another name")
        return first == name

    def fail(error: OSError) -> NoReturn:
        raise error

    for folder, folders, files in os.walk(root, onerror=fail, followlinks=True):
        below = os.path.relpath(folder, root)
        prefix = "" if below == "." else f"{below}/"
        kept = []
        for entry in sorted(folders):
            path, name = os.path.join(folder, entry), f"{prefix}{entry}/"
            if matches(name, exclude):
                skipped.add(name, "excluded")
            elif entry.startswith("."):
                skipped.add(name, "hidden")
            elif is_rows(Path(path)):
                skipped.add(name, "packed rows")
            elif is_first(os.stat(path), name):
                kept.append(entry)
        folders[:] = kept
        for entry in sorted(files):
            path, name = os.path.join(folder, entry), prefix + entry
            try:
                status = os.stat(path)
            except OSError as error:  # for example a link to nothing, or to itself
                if not os.path.islink(path):
                    raise
                skipped.add(name, f"broken links ({error.strerror})")
                continue
            included = matches(name, include)
            if matches(name, exclude) or (include and not included):
                skipped.add(name, "excluded")
            elif entry.startswith("."):
                skipped.add(name, "hidden")
            elif not stat.S_ISREG(status.st_mode):
                skipped.add(name, "pipes, sockets or devices")
            elif entry in DESCRIPTIONS and not any(pattern.endswith(entry) for pattern in include):
                skipped.add(name, "descriptions of data sets")
            elif not included and not is_known(entry):
                skipped.add(name, "of no known kind")
            elif status.st_size == 0:
                skipped.add(name, "empty")
            elif is_first(status, name):
                found.append(Path(path))
    skipped.notes += [f"the pattern {pattern!r} matches nothing" for pattern in sorted(unused)]
    return found


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a path below the root; without a slash, it is compared with the last part only."""
    name, pattern = name.rstrip("/"), pattern.rstrip("/")
    if "/" not in pattern:
        return fnmatch.fnmatchcase(name.rpartition("/")[2], pattern)
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(f"/{name}", pattern)


def is_rows(folder: Path) -> bool:
    """Whether a folder holds packed rows, as `build-dataset` writes them."""
    if not all((folder / name).is_file() for name in _ROWS_FILES):
        return False
    description = _read_object(folder / "metadata.json")
    return {"seq_len", "packing", "rows"} <= description.keys()


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder; the file names alone do not show this."""
    if (folder / "dataset_info.json").is_file() and "_data_files" in _read_object(folder / "state.json"):
        return True
    splits = _read_object(folder / "dataset_dict.json").get("splits")
    if not isinstance(splits, list) or not splits:
        return False
    return all(isinstance(split, str) and (folder / split / "state.json").is_file() for split in splits)


def _read_object(path: Path) -> dict[str, Any]:
    """A small JSON object; {} if the file holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
