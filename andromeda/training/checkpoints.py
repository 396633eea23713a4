"""Checkpoints on the disk: which are whole, which one to continue from, and which to remove.

A checkpoint is written under `.partial/`, flushed, listed in a manifest with the checksum of each file, and renamed.
A folder named `checkpoint-<step>` is therefore whole, unless something outside this package has damaged it.
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from andromeda import files
from andromeda.huggingface.model_card import CARD
from andromeda.training.manifest import MANIFEST, read_manifest
from andromeda.training.messages import say

MODEL = "model"  # folder of the trained model in the output folder
HISTORY = "history.jsonl"  # the figures of the run in the output folder
PARTIAL = ".partial"  # folder of a checkpoint or model that is being written
LEFT_BY_A_START = (HISTORY, PARTIAL)  # everything a run writes before its first checkpoint; a new run overwrites it


def latest_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """The whole checkpoint with the most steps in `output_dir`, or None. Compares only the sizes of the files."""
    found = [path for path in checkpoints_in(Path(output_dir)) if not defects_of(path)]
    return str(found[-1]) if found else None


def check_saved_model(folder: str | os.PathLike[str]) -> None:
    """ValueError if a model that `train` saved, in `model/` or a checkpoint, has changed since.

    Files that only training needs (optimiser, random state) are not read. A folder without a manifest passes.
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
    """Every entry in `folder` with the name of a checkpoint, sorted by steps."""
    return sorted(filter(_has_checkpoint_name, folder.glob("checkpoint-*")), key=step_of)


def _has_checkpoint_name(path: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def defects_of(path: Path, *, contents: bool = False, of_training: bool = True) -> list[str]:
    """The defects of a checkpoint folder, one line each; an empty list for a whole one.

    contents: read the files and compare their checksums, not only their sizes.
    of_training: also check the files that only a continuation needs.
    """
    if not (path / MANIFEST).is_file():
        return [f"{MANIFEST} is missing"]
    try:
        manifest = read_manifest(path)
        if _has_checkpoint_name(path) and manifest["step"] != step_of(path):
            return [f"{path / MANIFEST} must be of step {step_of(path)}, got {manifest['step']!r}"]
        recorded = manifest["files"]
        if not of_training:
            recorded = {name: entry for name, entry in recorded.items() if not name.endswith((".pt", ".pth"))}
        recorded = {name: entry for name, entry in recorded.items() if name != CARD}  # the user may write into it
        if contents and not any(isinstance(entry, int) for entry in recorded.values()):
            return files.damages(path, recorded)
        sizes = {name: entry if isinstance(entry, int) else entry["bytes"] for name, entry in recorded.items()}
        found = {name: (path / name).stat().st_size if (path / name).is_file() else None for name in sizes}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [str(error) if isinstance(error, OSError | ValueError) else f"{path / MANIFEST} is damaged: {error!r}"]
    return [
        f"{name}: {size} bytes expected, {'none' if found[name] is None else found[name]} found"
        for name, size in sizes.items()
        if found[name] != size
    ]


def starting_point(folder: Path, resume: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, or None for a new run, and the defects of newer checkpoints.

    Raises:
        ValueError: there are checkpoints and `resume` is off, or there is no whole one and it is on.
    """
    present = checkpoints_in(folder)
    for path in present:
        if not path.is_dir():  # the run would fail when it reaches this step
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
    damaged: list[str] = []
    for path in reversed(present):
        defects = defects_of(path, contents=True) or _missing_for_continuation(path)
        if not defects:
            if damaged:
                lines = "".join(f"\n    {line}" for line in damaged)
                say(f"train: continues from {path.name}, the newest checkpoint that is as it was written:{lines}")
            return path, damaged
        damaged.append(f"{path.name}: {'; '.join(defects[:3])}")
    seen = "".join(f"\n    {line}" for line in damaged)
    raise ValueError(f"train: output_dir must hold a whole checkpoint to resume from, {folder} has none{seen}")


def _missing_for_continuation(path: Path) -> list[str]:
    """State for a continuation that a whole checkpoint lacks: Trainer would silently begin without it."""
    names = read_manifest(path)["files"]
    wanted = {"trainer_state.json": "the state of the run", "optimizer": "the state of the optimiser"}
    return [f"{state} is not in it" for prefix, state in wanted.items() if not any(n.startswith(prefix) for n in names)]


def check_identity(checkpoint: Path, identity: Mapping[str, Mapping[str, Any]]) -> None:
    """ValueError if `checkpoint` belongs to another run than this one; names every difference."""
    manifest = read_manifest(checkpoint)
    was, now = (
        {f"{part} {name}": value for part, values in run.items() for name, value in values.items()}
        for run in (manifest["run"], identity)
    )
    if manifest["format"] == 1:  # that format had no checksum of the data
        now.pop("data content", None)
    different = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if different:
        lines = [f"\n    {name}: was {was.get(name)!r}, is {now.get(name)!r}" for name in different]
        raise ValueError(
            f"train: settings and data must be those of {checkpoint.name} to resume it exactly, these differ:"
            + "".join(lines)
        )


def install(partial: Path, target: Path) -> None:
    """Give a finished folder its final name, replacing an older one, and remove `.partial/`."""
    files.replace_folder(partial, target)
    shutil.rmtree(partial.parent, ignore_errors=True)


def remove_old(folder: Path, *, step: int, keep: int, best: str | None) -> None:
    """Remove all but the newest `keep` whole checkpoints up to `step`, and never the one at `best`.

    Damaged checkpoints do not count and stay. Later ones do not count either: a resumed run skipped them, because they
    are damaged.
    """
    whole = [path for path in checkpoints_in(folder) if step_of(path) <= step and not defects_of(path)]
    for path in whole[:-keep]:
        if best is None or path != Path(best):
            # A partly removed checkpoint must not have the name of a checkpoint.
            trash = folder / PARTIAL / path.name
            trash.parent.mkdir(exist_ok=True)
            os.rename(path, trash)
            shutil.rmtree(trash.parent)
