"""`history.jsonl`: the figures of a run."""

import json
import math
from pathlib import Path

from andromeda import files


class History:
    """`history.jsonl`: begun anew with what a checkpoint remembers, then appended to line by line."""

    _FIGURES = ("step", "loss", "eval_loss", "learning_rate", "grad_norm", "tokens_per_second", "error")

    def __init__(self, path: Path, entries: list[dict]):
        files.write_text(path, "".join(map(self._line, entries)))
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def write(self, entry: dict):
        self.file.write(self._line(entry))
        self.file.flush()

    def close(self):
        self.file.close()

    def _line(self, entry: dict) -> str:
        """One line; nothing for an entry without a figure of ours, such as the total time at the end."""
        if not entry.keys() & {"loss", "eval_loss", "error"}:
            return ""
        figures = {name: entry[name] for name in self._FIGURES if name in entry}
        infinite = {name for name, value in figures.items() if isinstance(value, float) and not math.isfinite(value)}
        return json.dumps(figures | dict.fromkeys(infinite)) + "\n"
