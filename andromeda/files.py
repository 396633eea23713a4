"""Files and folders that appear whole or not at all, also when the machine loses power.

What is new is written under another name on the same file system and synced to the disk; then it is renamed, and the
folder that holds the name is synced.
"""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import xxhash

_BLOCK_BYTES = 1 << 20


def flush(path: str | os.PathLike) -> None:
    """fsync a file or a folder, which holds the names of what is in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """fsync a folder and all that is below it."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def replace_folder(new: Path, target: Path) -> None:
    """Sync the folder `new` and rename it to `target`, in place of a folder that is there.

    Between two renames `target` may be absent, but it is never half of the old one or of the new one. The old one
    becomes `<new>.old` and is removed.
    """
    flush_tree(new)
    old = new.with_name(f"{new.name}.old")
    if target.is_dir():
        os.rename(target, old)
    os.rename(new, target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into; becomes `target`, replacing one that is there, if the block ends without an error."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = _other_name(target)
    new.mkdir()
    try:
        yield new
        replace_folder(new, target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_json(path: str | os.PathLike, value) -> None:
    """Write `value` as JSON into the file `path`, replacing one that is there."""
    path = Path(path)
    new = _other_name(path)
    try:
        new.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        flush(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
    flush(path.parent)


def checksum(path: str | os.PathLike) -> str:
    """XXH3-128 of a file's bytes, in hexadecimal: it finds what disks and copies damage, not what somebody forges."""
    state = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def checksums(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict]:
    """{name: {"bytes": size, "xxh3_128": checksum}} of files in `folder`, by names relative to it; default: all."""
    if names is None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: {"bytes": (folder / name).stat().st_size, "xxh3_128": checksum(folder / name)} for name in names}


def damages(folder: Path, recorded: dict[str, dict]) -> list[str]:
    """One line per file of `folder` that is not as `checksums` recorded it; empty if all are."""
    found = []
    for name, entry in recorded.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != entry["bytes"]:
            found.append(f"{name} must have {entry['bytes']} bytes, got {size}")
        elif checksum(path) != entry["xxh3_128"]:
            found.append(f"{name} has other content than was written (checksum differs)")
    return found


def _other_name(path: Path) -> Path:
    """A hidden name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")
