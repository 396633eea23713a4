"""`history.jsonl`: the figures of a run, one JSON object per line."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from andromeda import files


class History:
    """The file, open during the run. It begins with the entries stored in a checkpoint."""

    _FIGURES = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "error")

    def __init__(self, path: Path, entries: Iterable[Mapping[str, object]]) -> None:
        files.write_text(path, "".join(map(self._line, entries)))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def write(self, entry: Mapping[str, object]) -> None:
        self.file.write(self._line(entry))
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    def _line(self, entry: Mapping[str, object]) -> str:
        """One line; nothing for an entry without a loss or an error, such as the total time at the end."""
        if not entry.keys() & {"loss", "eval_loss", "error"}:
            return ""
        figures = {name: entry[name] for name in self._FIGURES if name in entry}
        infinite = {name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)}
        return json.dumps(figures | dict.fromkeys(infinite)) + "\n"
