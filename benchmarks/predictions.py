"""Compares the predictions in predictions.json, made before any measurement on a GPU, with measurements.

    python benchmarks/predictions.py FILE.json ...   # of benchmarks, or gpu.json of tests/gpu.sh

A prediction names a row (op, pass, shape, dtype, backend), its GPUs, one of the row's columns (`metric`), the expected
range and the reason. `speedup` is not a column: it is the time of the row `against` divided by the row's. `of_middle`
is the measurement divided by the middle of the range. A measurement outside the range shows an error in the reason:
find it before any tuning, and correct the entry.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import report

FILE = Path(__file__).with_name("predictions.json")
KEY = ("op", "pass", "shape", "dtype", "backend")
FIELDS = {*KEY, "gpus", "metric", "low", "high", "why"}  # and, of a speedup, `against`
COLUMNS = ("what", "metric", "low", "high", "measured", "of_middle", "verdict")


def load() -> list[dict]:
    return json.loads(FILE.read_text())


def compare(rows: list[dict], gpu: str, known: list[dict] | None = None) -> list[dict]:
    """One line of COLUMNS, and the reason, for each prediction for this GPU. If several rows match, the last counts."""
    by_key = {tuple(row.get(name) for name in KEY): row for row in rows}
    lines = []
    for prediction in load() if known is None else known:
        if not any(name in gpu for name in prediction["gpus"]):
            continue
        measured = figure(prediction, by_key)
        low, high = prediction["low"], prediction["high"]
        verdict = "not measured"
        if measured is not None:
            verdict = "below" if measured < low else "above" if measured > high else "as expected"
        line = {
            "what": " ".join(str(prediction[name]) for name in KEY),
            "metric": prediction["metric"] + (f" over {prediction['against']}" if "against" in prediction else ""),
            "low": low,
            "high": high,
            "measured": measured,
            "of_middle": None if measured is None or low <= 0 else measured / ((low + high) / 2),
            "verdict": verdict,
            "why": prediction["why"],
        }
        lines.append(line)
    return lines


def figure(prediction: dict, by_key: dict[tuple, dict]) -> float | None:
    row = by_key.get(tuple(prediction[name] for name in KEY))
    if row is None:
        return None
    if prediction["metric"] != "speedup":
        return row.get(prediction["metric"])
    other = by_key.get(tuple({**prediction, "backend": prediction["against"]}[name] for name in KEY))
    if other is None or other.get("measured_at") != row.get("measured_at"):  # from other rounds: clocks may differ
        return None
    return other["median_ms"] / row["median_ms"]


def main(paths: list[str]) -> None:
    for path in paths:
        data = json.loads(Path(path).read_text())
        measured = data.get("measured")
        parts = [data] if measured is None else [part for step in measured.values() for part in step.values()]
        rows = [row for part in parts for row in part.get("rows", [])]
        print(report.table(compare(rows, data["environment"].get("gpu") or ""), COLUMNS))


if __name__ == "__main__":
    main(sys.argv[1:])
