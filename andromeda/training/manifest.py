"""The manifest of a checkpoint or a saved model: the checksum of each file, and the run that it belongs to.

The manifest is sealed: it holds a checksum of itself. Other small files of a run are sealed in the same way.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from andromeda import files

MANIFEST = "andromeda_checkpoint.json"  # the last file written into a checkpoint
_FORMAT = 2  # format 1 had sizes in place of checksums, and no seal
_SEAL = "xxh3_128"  # key of a JSON object under which the checksum of all its other entries is written


def write_manifest(folder: Path, *, step: int, identity: Mapping[str, Any], interval: list[float] | None) -> None:
    """Write the checksums of all files in `folder`, and the state that a continuation needs.

    identity: settings, model and data of the run, see `check_identity`.
    interval: `StepRecord.interval`, the sums so far for the next figure.
    """
    manifest = {
        "format": _FORMAT,
        "step": step,
        "run": identity,
        "interval": interval,
        "files": files.checksums(folder),
    }
    files.write_json(folder / MANIFEST, sealed(manifest))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint or a saved model; OSError or ValueError if it is damaged or of another kind."""
    path = folder / MANIFEST
    manifest = files.read_json(path, ("format", "step", "run", "files"))
    if manifest["format"] not in (1, _FORMAT):
        raise ValueError(f"{path} must have format 1 or {_FORMAT}, got {manifest['format']!r}")
    if manifest["format"] == _FORMAT:
        _check_seal(path, manifest)
    if not isinstance(manifest["files"], dict) or not isinstance(manifest["run"], dict):
        raise ValueError(f"{path} is damaged: files and run must be JSON objects")
    return manifest


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with a checksum of itself, which `read_sealed` compares."""
    return {**value, _SEAL: _seal_of(value)}


def read_sealed(path: Path, keys: Iterable[str] = ()) -> dict[str, Any]:
    """A JSON object from a file; ValueError, naming it, if it is damaged. One without a checksum is not checked.

    keys: names that it must have.
    """
    value = files.read_json(path, keys)
    if _SEAL in value:
        _check_seal(path, value)
    return value


def _check_seal(path: Path, value: Mapping[str, Any]) -> None:
    rest = {name: item for name, item in value.items() if name != _SEAL}
    if value.get(_SEAL) != _seal_of(rest):
        raise ValueError(f"{path} is damaged: it has other content than was written (checksum differs)")


def _seal_of(value: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())
