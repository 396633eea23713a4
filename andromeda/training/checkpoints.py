"""Checkpoints on the disk: the manifest and its seal, defects, and where a run starts or continues."""

import json
import re
from pathlib import Path

import xxhash

from andromeda import files
from andromeda.training.messages import say

MANIFEST = "andromeda_checkpoint.json"  # the last file written into a checkpoint: settings, checksums of all others
MODEL = "model"  # folder of the trained model in the output folder
HISTORY = "history.jsonl"  # the figures of the run in the output folder
PARTIAL = ".partial"  # folder of what is being written
LEFT_BY_A_START = (HISTORY, PARTIAL)  # what a run without a checkpoint has written, which a new one writes anew
FORMAT = 2  # 1 had sizes in place of checksums, and no seal
_SEAL = "xxh3_128"  # key of a JSON object that holds the checksum of all others


def latest_checkpoint(output_dir) -> str | None:
    """The whole checkpoint with the most steps below `output_dir`, or None. Looks at the sizes of the files only."""
    found = [path for path in checkpoints_in(Path(output_dir)) if not defects_of(path)]
    return str(found[-1]) if found else None


def check_saved_model(folder) -> None:
    """ValueError if a model that `train` saved, in `model/` or a checkpoint, is not as it was written.

    What belongs to the training alone (optimiser, random state) is not read. A folder without a manifest of this module
    passes.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).exists():
        return
    defects = defects_of(folder, contents=True, of_training=False)
    if defects:
        others = [path.name for path in checkpoints_in(folder.parent) if path != folder and not defects_of(path)]
        raise ValueError(
            f"{folder} is damaged: {'; '.join(defects)}; "
            + (f"use another one ({', '.join(others)}), " if others else "")
            + f"restore it, or remove {MANIFEST} in it if it was changed on purpose"
        )


def checkpoints_in(folder: Path) -> list[Path]:
    """Everything with the name of a checkpoint in `folder`, by steps."""
    return sorted((path for path in folder.glob("checkpoint-*") if step_of(path) is not None), key=step_of)


def step_of(path: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", Path(path).name)
    return int(match.group(1)) if match else None


def defects_of(path: Path, *, contents=False, of_training=True) -> list[str]:
    """What is wrong with a checkpoint folder, one line each; an empty list for a whole one.

    contents: read the files and compare their checksums, not only their sizes.
    of_training: look also at the files that only a continuation needs.
    """
    manifest = path / MANIFEST
    if not manifest.is_file():
        return [f"{MANIFEST} is missing"]
    try:
        recorded = read_manifest(path)["files"]
        if not of_training:
            recorded = {name: entry for name, entry in recorded.items() if not name.endswith((".pt", ".pth"))}
        if contents and not any(isinstance(entry, int) for entry in recorded.values()):
            return files.damages(path, recorded)
        sizes = {name: entry if isinstance(entry, int) else entry["bytes"] for name, entry in recorded.items()}
        found = {name: (path / name).stat().st_size if (path / name).is_file() else None for name in sizes}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [str(error) if isinstance(error, OSError | ValueError) else f"{manifest} is damaged: {error!r}"]
    return [
        f"{name}: {size} bytes expected, {'none' if found[name] is None else found[name]} found"
        for name, size in sizes.items()
        if found[name] != size
    ]


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint or a saved model; OSError or ValueError if it is not what this module wrote."""
    path = folder / MANIFEST
    manifest = files.read_json(path, ("format", "step", "run", "files"))
    if manifest["format"] not in (1, FORMAT):
        raise ValueError(f"{path} must have format 1 or {FORMAT}, got {manifest['format']!r}")
    if manifest["format"] == FORMAT:
        _check_seal(path, manifest)
    if not isinstance(manifest["files"], dict) or not isinstance(manifest["run"], dict):
        raise ValueError(f"{path} is damaged: files and run must be JSON objects")
    if step_of(folder) not in (None, manifest["step"]):
        raise ValueError(f"{path} must be of step {step_of(folder)}, got {manifest['step']!r}")
    return manifest


def sealed(value: dict) -> dict:
    """`value` with a checksum of itself, which `read_sealed` compares."""
    return {**value, _SEAL: _seal_of(value)}


def read_sealed(path: Path, keys=()) -> dict:
    """A JSON object from a file; ValueError, with its name, if it is damaged. One without a checksum is taken as it is.

    keys: names that it must have.
    """
    value = files.read_json(path, keys)
    if _SEAL in value:
        _check_seal(path, value)
    return value


def _check_seal(path: Path, value: dict):
    rest = {name: item for name, item in value.items() if name != _SEAL}
    if value.get(_SEAL) != _seal_of(rest):
        raise ValueError(f"{path} is damaged: it has other content than was written (checksum differs)")


def _seal_of(value: dict) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def starting_point(folder: Path, resume: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, or None to begin, and what is wrong with newer ones; refuses to guess."""
    present = checkpoints_in(folder)
    for path in present:
        if not path.is_dir():  # the run would fail when it comes to this step
            raise ValueError(
                f"train: {path} must be a folder, as a checkpoint is; remove it or choose another output_dir"
            )
    if not resume:
        if present:
            raise ValueError(
                f"train: output_dir must not hold checkpoints of another run, got {folder} with {present[-1].name}; "
                "resume that run (resume=True, --resume) or choose another folder"
            )
        return None, []
    damaged = []
    for path in reversed(present):
        defects = defects_of(path, contents=True) or _not_to_continue(path)
        if not defects:
            if damaged:
                lines = "".join(f"\n    {line}" for line in damaged)
                say(f"train: continues from {path.name}, the newest checkpoint that is as it was written:{lines}")
            return path, damaged
        damaged.append(f"{path.name}: {'; '.join(defects[:3])}")
    seen = "".join(f"\n    {line}" for line in damaged)
    raise ValueError(f"train: output_dir must hold a whole checkpoint to resume from, {folder} has none{seen}")


def _not_to_continue(path: Path) -> list[str]:
    """What a whole checkpoint lacks for a continuation: Trainer would begin it anew without a word."""
    names = read_manifest(path)["files"]
    wanted = {"trainer_state.json": "the state of the run", "optimizer": "the state of the optimiser"}
    return [f"{what} is not in it" for name, what in wanted.items() if not any(n.startswith(name) for n in names)]


def check_identity(checkpoint: Path, identity: dict):
    """Refuse to continue a run as another one, naming every difference."""
    manifest = read_manifest(checkpoint)
    stored = manifest["run"]
    was, now = (
        {f"{part} {name}": value for part, values in run.items() for name, value in values.items()}
        for run in (stored, identity)
    )
    if manifest["format"] == 1:  # knew less of the data
        now.pop("data content", None)
    different = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if different:
        lines = [f"\n    {name}: was {was.get(name)!r}, is {now.get(name)!r}" for name in different]
        raise ValueError(
            f"train: settings and data must be those of {checkpoint.name} to resume it exactly, these differ:"
            + "".join(lines)
        )
