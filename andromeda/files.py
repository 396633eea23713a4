"""Files and folders that appear whole or not at all, even if the machine loses power.

New files are written under a temporary name on the same file system and synced to the disk; then they are renamed, and
the folder that holds the name is synced. A link stays, and its target, a file or a folder, is replaced. A pipe, a
terminal or `/dev/stdout`, which is not an ordinary file, is written to directly. The functions, in this order:

    check_output, check_output_folder                       before the work: can the output be written?
    write_bytes, write_text, write_json, read_json          files
    whole_file                                              a file that is written piece by piece
    whole_folder, replace_folder, temporary_folder, flush   folders
    writing, explained                                      errors that explain why something could not be written
    checksum, checksums, damages                            checksums
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

_BLOCK_BYTES = 1 << 20
_STALE_SECONDS = 60  # a temporary folder this young may belong to a process that has not locked it yet
_MAX_LINKS = 40  # as in Linux
_unfinished: set[Path] = set()  # the temporary names that are being written at this moment


def check_output(path: str | os.PathLike) -> None:
    """Raise if the file `path` could not be written, as far as can be known without writing it.

    It leaves nothing behind. An existing file may be replaced; pipes, terminals and the like are accepted.

    Raises:
        ValueError: the name is empty.
        OSError: its folder is missing or not writable, it is a folder, or it is write-protected.
    """
    _check_name(path)
    with _explaining(path):
        target, special = _resolve(path)
        if special:
            _check_special(target)
            return
        if target.is_dir() or os.fspath(path).endswith("/"):
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(target))
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "the file is write-protected", str(target))
        _try_to_make_a_file_in(target)


def check_output_folder(path: str | os.PathLike) -> None:
    """Raise if nothing could be written into the folder `path`. It and the folders above it need not exist yet.

    It leaves nothing behind.

    Raises:
        ValueError: the name is empty.
        OSError: it, or the existing path above it, is not a folder or not writable.
    """
    _check_name(path)
    with _explaining(path):
        target, special = _resolve(path)
        folder = target
        while not special and not os.path.lexists(folder):
            folder = folder.parent
        if special or not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is no folder", str(folder))
        _try_to_make_a_file_in(folder / "x")


def _check_name(path: str | os.PathLike) -> None:
    if not os.fspath(path):
        raise ValueError("the name of what to write must not be empty, got ''")


def _try_to_make_a_file_in(path: Path) -> None:
    """Only a trial reveals permissions, read-only or full file systems, quotas, access lists and too long names."""
    new = _other_name(path)
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(new)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file; an existing one is replaced, and its permissions are kept.

    If `path` is a link, its target is replaced. A pipe, a terminal, `/dev/stdout` or another descriptor in `/dev/fd` is
    written to directly.

    Raises:
        OSError: it could not be written; names the cause, the data that is left and a remedy.
    """
    _check_name(path)
    with _explaining(path, whole=_what_is_left(path)):
        target, special = _resolve(path)
        if special:
            _write_into(target, data)
        else:
            _replace_file(target, data)


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[IO[bytes]]:
    """A binary file to write into; it becomes `path`, as by `write_bytes`, if the block ends without an error.

    A pipe, a terminal or a descriptor receives the bytes as they are written.

    Raises:
        OSError: something could not be written; names the cause, the data that is left and a remedy.
    """
    _check_name(path)
    with writing(path):
        target, special = _resolve(path)
        with _opened(target) if special else _replacing(target) as file:
            yield file


def write_text(path: str | os.PathLike, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as JSON into the file `path`, as `write_bytes` does."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike, keys: Iterable[str] = ()) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: the file.
        keys: names that the object must have.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a JSON object or lacks a key; names the file, and the key or the position.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError also for bytes that are not UTF-8
        raise ValueError(f"{path} is damaged: it must be JSON, {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it must be a JSON object, got {type(value).__name__}")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{path} is damaged: it must have the key {', '.join(map(repr, missing))}, got none")
    return value


def _resolve(path: str | os.PathLike) -> tuple[Path, bool]:
    """The final target of all links, and whether it is written to directly instead of being replaced.

    `/dev/stdout` leads to a descriptor that is already open, perhaps of an ordinary file: replacing it would lose the
    text that was written to it before.
    """
    name = os.path.abspath(path)
    for _ in range(_MAX_LINKS):
        folder = os.path.realpath(os.path.dirname(name))
        name = os.path.join(folder, os.path.basename(name))
        if re.fullmatch(r"/proc/\d+(/task/\d+)?/fd|/dev/fd", folder):
            return Path(name), True
        if not os.path.islink(name):
            break
        name = os.path.join(folder, os.readlink(name))
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    try:
        mode = os.stat(name).st_mode
    except FileNotFoundError:
        return Path(name), False
    return Path(name), not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _own_descriptor(target: Path) -> int | None:
    """The number of a descriptor of this process, by its name in /proc."""
    found = re.fullmatch(rf"(?:/proc/{os.getpid()}(?:/task/\d+)?|/dev)/fd/(\d+)", str(target))
    return int(found[1]) if found else None


def _check_special(target: Path) -> None:
    descriptor = _own_descriptor(target)
    if descriptor is not None:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "it is open for reading only", str(target))
        return
    mode = os.stat(target).st_mode
    if stat.S_ISSOCK(mode) or stat.S_ISBLK(mode):
        raise OSError(errno.EINVAL, f"it is a {'socket' if stat.S_ISSOCK(mode) else 'disk'}", str(target))
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))


def _write_into(target: Path, data: bytes) -> None:
    with _opened(target) as file:
        file.write(data)


def _opened(target: Path) -> IO[bytes]:
    """A pipe, a terminal or a descriptor, open for writing."""
    _check_special(target)
    descriptor = _own_descriptor(target)
    if descriptor is not None:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()  # earlier output comes first
        descriptor = os.dup(descriptor)  # shares the position, so this writes after them
    return open(target if descriptor is None else descriptor, "wb")  # waits for the reader of a pipe


def _replace_file(target: Path, data: bytes) -> None:
    with _replacing(target) as file:
        file.write(data)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[IO[bytes]]:
    """A new file to write into; it replaces `target` if the block ends without an error."""
    _remove_stale(target.parent, _prefix(target), target)
    new = _other_name(target)
    _unfinished.add(new)
    try:
        with open(new, "xb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
            file.flush()
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(os.stat(target).st_mode))
            os.fsync(file.fileno())
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)
        _unfinished.discard(new)
    flush(target.parent)


def flush(path: str | os.PathLike) -> None:
    """fsync a file; or a folder, which syncs the names in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """fsync a folder and everything below it."""
    for path in (*folder.rglob("*"), folder):
        flush(path)


def replace_folder(new: Path, target: Path) -> None:
    """Sync the folder `new` and rename it to `target`, replacing an existing folder.

    If `target` is a link, the folder behind it is replaced. Between two renames `target` may be absent, but it never
    holds a part of the old or of the new folder. The old one becomes `<new>.old` and is removed.
    """
    target = Path(os.path.realpath(target))
    with writing(target):
        flush_tree(new)
        old = new.with_name(f"{new.name}.old")
        if target.is_dir():
            os.rename(target, old)
        os.rename(new, target)
        flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def whole_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A folder to write into; it becomes `target`, replacing an existing one, if the block ends without an error.

    If `target` is a link, the folder behind it is made or replaced. Temporary folders of processes that were
    killed in the block are removed.

    Raises:
        OSError: something could not be written; names the cause, the data that is left and a remedy.
    """
    _check_name(target)
    target = Path(os.path.realpath(target))
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(target.parent, _prefix(target), target) as new:
            yield new
            replace_folder(new, target)


@contextlib.contextmanager
def temporary_folder(parent: Path, prefix: str, target: Path | None = None) -> Iterator[Path]:
    """A new folder `<prefix><random>` in `parent`, locked while in use; removed at the end unless it was renamed.

    Folders with this prefix that killed processes left behind are removed first. `target`: its final name.
    """
    _remove_stale(parent, prefix, target)
    new = parent / f"{prefix}{secrets.token_hex(8)}"
    _unfinished.add(new)
    try:
        new.mkdir()
        with _locked(new):
            yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)
        _unfinished.discard(new)


def _remove_stale(parent: Path, prefix: str, target: Path | None) -> None:
    """Remove files and folders with a temporary name of this prefix that no process has locked for writing."""
    with contextlib.suppress(OSError):  # the folder may be unreadable
        for path in parent.iterdir():
            if not path.name.startswith(prefix):
                continue
            if target is not None and not re.fullmatch(r"[0-9a-f]{16}(\.old)?", path.name[len(prefix) :]):
                continue  # it belongs to another target or to the user
            if target is not None and path.suffix == ".old" and not target.exists():
                continue  # a process was killed between two renames, and this is all that is left of the target
            with contextlib.suppress(OSError):  # locked: it is in use; gone: another process removed it
                if time.time() - path.stat().st_mtime < _STALE_SECONDS:
                    continue
                with _locked(path, fcntl.LOCK_NB):
                    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[None]:
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(lock)


def remove_unfinished() -> None:
    """Remove the files and folders that this process is writing now; for a process that ends without its clean-up."""
    for path in list(_unfinished):
        with contextlib.suppress(OSError):
            _remove(path)


def is_temporary(name: str) -> bool:
    """Whether this is a temporary name of this module: a killed process did not finish the file or folder."""
    return re.fullmatch(r"\..*\.[0-9a-f]{16}(\.old)?", name, re.DOTALL) is not None


def _other_name(path: Path) -> Path:
    """A hidden name beside `path` that no other process uses."""
    return path.with_name(f"{_prefix(path)}{secrets.token_hex(8)}")


def _prefix(path: Path) -> str:
    """The beginning of the temporary names of `path`: its own name, cut so that they are not too long."""
    return f".{os.fsdecode(os.fsencode(path.name)[:200])}."


_REMEDIES = {
    errno.ENOSPC: "Make room there or choose another place",
    errno.EDQUOT: "Make room there, ask for a larger quota or choose another place",
    errno.EFBIG: "Raise the limit (`ulimit -f`) or choose a file system that takes files of this size",
    errno.EROFS: "The file system is mounted read-only: choose another place",
    errno.EACCES: "Choose another place, or change the permissions",
    errno.EPERM: "Choose another place, or change the permissions",
    errno.ENOENT: "Make the folder first, or choose another place",
    errno.ENOTDIR: "Choose a place inside a folder",
    errno.EISDIR: "Give the name of a file in it",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "The links lead in a circle: choose another place",
    errno.EBUSY: "It is in use, as the mount point of a file system is: choose a place inside it",
    errno.EXDEV: "It leads to another file system in the middle: choose a place inside one",
    errno.EPIPE: "Its reader has gone",
    errno.EIO: "Look at the disk and at the limit of file sizes (`ulimit -f`), or choose another place",
}
# Only writing gives these errors, so in a block that also reads they concern its output.
_OF_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EXDEV}


@contextlib.contextmanager
def writing(path: str | os.PathLike, what: str = "", *, whole: str = "", remedy: str = "") -> Iterator[None]:
    """In the block, an error of writing to `path` becomes an OSError that explains it.

    These are the errors that only writing gives (a full disk, a quota, a read-only file system, a limit of file size),
    also as safetensors, tokenizers and torch report them, and all others that name `path`, a file in it or a temporary
    one beside it. The error keeps its class and `errno`. Every other error passes as it is.

    Args:
        path: file or folder that is written.
        what: a noun for it, such as "the checkpoint of step 500".
        whole: a clause about the data that is still whole, such as "checkpoint-400 is whole". Default: whether a file
            was there before.
        remedy: advice, in addition to the advice for this kind of error.
    """
    whole = whole or _what_is_left(path)
    try:
        yield
    except Exception as error:
        number = _error_number(error, Path(os.path.abspath(path)))
        if number is None:
            raise
        raise explained(error, number, path, what, whole, remedy) from error


@contextlib.contextmanager
def _explaining(path: str | os.PathLike, whole: str = "") -> Iterator[None]:
    """`writing` for a block in which every error is about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or _is_explained(error):
            raise
        raise explained(error, error.errno, path, whole=whole) from error


def explained(
    error: Exception, number: int, path: str | os.PathLike, what: str = "", whole: str = "", remedy: str = ""
) -> OSError:
    """The error that `writing` raises, for callers that catch errors themselves. `number`: its `errno`."""
    path = os.fspath(path)
    own = error if isinstance(error, OSError) and error.errno == number else None
    text = f"cannot write {what + ' to ' if what else ''}{path}: {(own and own.strerror) or os.strerror(number)}"
    if own is not None and isinstance(own.filename, str | bytes):
        place = Path(os.fsdecode(own.filename))
        place = place.parent if is_temporary(place.name) else place  # the user does not know a temporary name
        text += f" ({place})" if place != Path(path) else ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        text += f", {_free(path) / 1e6:,.1f} MB free"
    text += f"; {whole}" if whole else ""
    text += "".join(f". {part}" for part in (remedy, _REMEDIES.get(number, "")) if part)
    # The class is Python's own for this number. A BrokenPipeError would be taken for one of stdout.
    result = OSError(text) if number == errno.EPIPE else type(OSError(number, ""))(text)
    result.errno = number
    vars(result)["is_explained"] = True
    return result


def _is_explained(error: BaseException) -> bool:
    return getattr(error, "is_explained", False)


def _error_number(error: Exception, path: Path) -> int | None:
    """The `errno` of an error of writing to `path`; None if the error has another cause or is already explained."""
    if _is_explained(error):
        return None
    if isinstance(error, OSError):
        if type(error).__module__ != "builtins":  # a network error, for instance
            return None
        if error.errno in _OF_WRITING or any(_belongs_to(name, path) for name in (error.filename, error.filename2)):
            return error.errno
    seen: BaseException | None = error
    while seen is not None and not _is_explained(seen):
        text = str(seen)
        if isinstance(seen, OSError):
            if seen.errno in _OF_WRITING:
                return seen.errno
        elif found := re.search(r"\(os error (\d+)\)", text):  # libraries written in Rust
            if int(found[1]) in _OF_WRITING:
                return int(found[1])
        elif "PytorchStreamWriter failed" in text or ("inline_container" in text and "unexpected pos" in text):
            return errno.ENOSPC if _free(path) < 16 << 20 else errno.EIO
        seen = seen.__cause__ or seen.__context__
    return None


def _belongs_to(name: str | bytes | int | None, path: Path) -> bool:
    """Whether the file that an error names is `path`, in it, above it, or a temporary one beside it."""
    if not isinstance(name, str | bytes):
        return False
    named = Path(os.path.abspath(os.fsdecode(name)))
    whole = (named, *named.parents)
    beside = [part for part in whole if part.parent == path.parent and is_temporary(part.name)]
    return path in whole or named in path.parents or bool(beside)


def _what_is_left(path: str | os.PathLike) -> str:
    if not os.path.lexists(path):
        return "nothing is left there"
    return "what was there before is unchanged" if os.path.isfile(path) or os.path.isdir(path) else ""


def _free(path: str | os.PathLike) -> int:
    """Bytes free for this user in the file system of `path`, or of the folder that is to hold it."""
    folder = Path(os.path.realpath(path))
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def checksum(path: str | os.PathLike) -> str:
    """XXH3-128 of a file's bytes, in hexadecimal: it detects damage by disks and copies, but not forgery."""
    state = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def checksums(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """{name: {"bytes": size, "xxh3_128": checksum}} of files in `folder`, by names relative to it; default: all."""
    if names is None:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: {"bytes": (folder / name).stat().st_size, "xxh3_128": checksum(folder / name)} for name in names}


def damages(folder: Path, recorded: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each file of `folder` that differs from the record of `checksums`; empty if none does."""
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
