"""Tables, JSON and plots of benchmark rows, and all numbers in the documents, which are generated only from JSON.

    python benchmarks/report.py   # fills README.md and docs/benchmarks.md, and draws docs/scaling.svg

A document has blocks between `<!-- results: ... -->` and `<!-- end -->`, whose contents are rewritten:

    results: NAME columns...   the table of results/NAME.json, its notes, its bars and its machine
    bars: NAME                 only the bars of results/NAME.json
    predictions: NAME          predictions and measurements
    forecast: GPU              predictions of predictions.json for a GPU that no file of results has a measurement for
    highlights                 the rows of HIGHLIGHTS: this library compared with another, in the same rounds

NAME may be FILE:STEP:PART for a file of tests/gpu.sh; if FILE.json does not have the step, the newest FILE-*.json with
it is used. Results whose commit has the mark "+changes" come from a tree that nobody can check out and are refused.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import figure

if TYPE_CHECKING:
    from timing import Timing

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

COLUMNS = (
    "op", "pass", "shape", "dtype", "device", "backend", "median_ms", "p20_ms", "p80_ms",
    "tflops", "effective_tflops", "gbps", "tokens_per_s", "ratio", "of_matmul", "of_copy", "mfu", "peak_memory_mb",
    "workspace_mb",
)  # fmt: skip
BAR_COLUMNS = ("what", "bar", "measured", "rounds", "verdict")
Spread = tuple[float, float, float]  # median, lowest and highest of the rounds


def make_row(
    measured: Timing,
    *,
    op: str,
    step: str,
    shape: str,
    dtype: str,
    device: str,
    backend: str,
    flops: float | None = None,
    bytes_moved: float | None = None,
    tokens: int | None = None,
    spreads: dict[str, Spread] | None = None,
    peak_memory_mb: float | None = None,
    **more: object,
) -> dict:
    """One row of the table and of the JSON file.

    flops, bytes_moved, tokens: the work of one call; the row shows it per second.
    spreads: columns that are compared round by round; NAME becomes `NAME` (the median) and `NAME_range` (JSON only).
    more: further columns, unchanged.

    `measured_at` (JSON only) is the time of the rounds: other records of that time, such as clocks, belong to them.
    """
    seconds = measured.median_ms / 1e3
    row = {
        "op": op,
        "pass": step,
        "shape": shape,
        "dtype": dtype,
        "device": device,
        "backend": backend,
        "median_ms": measured.median_ms,
        "p20_ms": measured.p20_ms,
        "p80_ms": measured.p80_ms,
        "tflops": None if flops is None else flops / seconds / 1e12,
        "gbps": None if bytes_moved is None else bytes_moved / seconds / 1e9,
        "tokens_per_s": None if tokens is None else tokens / seconds,
        "ratio": None,
        "peak_memory_mb": peak_memory_mb,
    }
    for name, (median, low, high) in (spreads or {}).items():
        row[name] = median
        row[f"{name}_range"] = [low, high]
    if measured.interval is not None:
        row["measured_at"] = [round(moment, 3) for moment in measured.interval]
    return {**row, **more, "samples_ms": [round(sample, 6) for sample in measured.samples_ms]}


def commit() -> str:
    """The commit of this checkout, with a mark when tracked files other than results differ from it.

    COMMIT in the environment takes precedence, because a copy of a checkout may lack git's data.
    """
    if given := os.environ.get("COMMIT"):
        return given
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        status = [*git, "status", "--porcelain", "-uno", "--", ".", ":(exclude)benchmarks/results"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
        return name.strip() + ("+changes" if changed.stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(device: str) -> dict:
    """Everything a reader needs to repeat a measurement."""
    import torch

    import andromeda
    from andromeda.ops import _select

    facts = {
        "commit": commit(),
        "command": " ".join(["python", *(os.path.relpath(a, ROOT) if os.path.exists(a) else a for a in sys.argv)]),
        "andromeda": andromeda.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cpu_isa": _select.extension.cpu_isa() if _select.extension is not None else None,
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
    return facts


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def format_cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):  # lowest and highest
        return " to ".join(map(format_cell, value))
    return str(value)


def table(rows: list[dict], columns: tuple[str, ...] = COLUMNS) -> str:
    """A table in Markdown that also reads well in a terminal. Columns without any value are left out."""
    columns = tuple(c for c in columns if any(row.get(c) is not None for row in rows))
    cells = [list(columns)] + [[format_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [all(isinstance(row.get(c), (int, float, type(None))) for row in rows) for c in columns]

    def draw(line: list[str]) -> str:
        padded = [x.rjust(w) if n else x.ljust(w) for x, w, n in zip(line, widths, numeric, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True)) + "|"
    return "\n".join([draw(cells[0]), rule, *map(draw, cells[1:])])


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, sync and rename, so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_json(
    path: str | os.PathLike, rows: list[dict], facts: dict, notes: list[str], extra: dict | None = None
) -> None:
    rows = [{**row, "commit": facts["commit"]} for row in rows]
    data = {"environment": facts, "notes": notes, **(extra or {}), "rows": rows}
    write_text(Path(path), json.dumps(data, indent=1) + "\n")


def write_plot(path: str | os.PathLike, rows: list[dict], title: str) -> None:
    """Horizontal bars of the median with the 20-80 % range, one panel per shape."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Products and copies do other work: next to a product of 50 ms, a decode step of 2 ms would be invisible.
    timed = [row for row in rows if row.get("median_ms") is not None and row["op"] not in ("matmul", "copy")]
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in timed:
        groups.setdefault((row["pass"], row["shape"], row["dtype"]), []).append(row)
    heights = [0.4 * len(group) + 0.5 for group in groups.values()]
    figure, axes = plt.subplots(
        len(groups), 1, figsize=(9, sum(heights) + 0.9), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, ((step, shape, dtype), group) in zip(axes[:, 0], groups.items(), strict=True):
        names = [row["backend"] for row in group]
        medians = [row["median_ms"] for row in group]
        spread = [
            [row["median_ms"] - row["p20_ms"] for row in group],
            [row["p80_ms"] - row["median_ms"] for row in group],
        ]
        colours = ["#3b6fb6" if name.startswith("andromeda") else "#b0b7c0" for name in names]
        bars = axis.barh(names, medians, color=colours, xerr=spread, error_kw={"ecolor": "#444", "lw": 1})
        labels = [f"  {row['median_ms']:.4g} ms" for row in group]
        axis.bar_label(bars, labels, padding=6, fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, max(row["p80_ms"] for row in group) * 1.18)
        axis.set_title(f"{step}, {shape}, {dtype}", loc="left", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[-1, 0].set_xlabel("milliseconds, median with 20-80 % range; less is better", fontsize=8)
    figure.suptitle(title, fontsize=10)
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part{path.suffix}")
    figure.savefig(temporary, dpi=140)
    os.replace(temporary, path)
    plt.close(figure)


def usable_device(name: str) -> str:
    """The type of `--device`: for cuda, there must be a GPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU here; --device cpu runs the CPU kernels")
    return name


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    import torch

    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, choices=("cpu", "cuda"), default=default)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small sizes and few repetitions: does it run?")
    parser.add_argument("--json", metavar="FILE", help="write rows, versions and commit")
    parser.add_argument("--plot", metavar="FILE", help="write a bar chart (.png, .svg, .pdf)")


def save_unfinished(
    args: argparse.Namespace, rows: list[dict], *, device: str, notes: list[str], bars: list[dict] | None = None
) -> None:
    """Write the rows so far to the file of `--json`, after every case, so that a killed process loses only one case."""
    if args.json:
        extra = {"bars": bars} if bars else {}
        write_json(args.json, rows, environment(device), notes, {"unfinished": True, **extra})


def finish(
    args: argparse.Namespace,
    rows: list[dict],
    *,
    device: str,
    title: str,
    notes: list[str],
    bars: list[dict] | None = None,
) -> None:
    """Print the table, the notes and the bars (bars.py); write the files that the command line asks for."""
    facts = environment(device)
    print(table(rows))
    for note in notes:
        print(note)
    if bars:
        print(table(bars, BAR_COLUMNS))
    where = facts.get("gpu", facts["processor"])
    print(f"{where}, {facts['threads']} threads, {facts['cpu_isa']}, torch {facts['torch']}, commit {facts['commit']}")
    if args.json:
        write_json(args.json, rows, facts, notes, {"bars": bars} if bars else None)
    if args.plot:
        write_plot(args.plot, rows, f"{title} - {where}")


@dataclasses.dataclass(frozen=True)
class Results:
    """The part of a results file that belongs to one table."""

    path: Path
    rows: list[dict]
    notes: list[str]
    bars: list[dict]
    facts: dict

    @property
    def machine(self) -> str:
        return self.facts.get("gpu") or self.facts["processor"]

    @property
    def source(self) -> str:
        facts = self.facts
        text = f"Measured with `{command_of(facts)}` on {self.machine}, {facts['threads']} threads, "
        return text + f"torch {facts['torch']}, commit {facts['commit']}."


def command_of(facts: dict) -> str:
    """The command without the folder of its results, which may have been temporary."""
    return re.sub(r"--json \S*?(\w+\.json)", r"--json \1", facts["command"])


def read_results(name: str) -> Results:
    """The results of NAME.json, or of FILE:STEP:PART."""
    file, *inside = name.split(":")
    if not inside:
        path = RESULTS / f"{file}.json"
        data = json.loads(path.read_text())
        bars = data.get("bars") or []
    else:
        step, part = inside
        path, whole = file_with(file, step, part)
        data = whole["measured"][step][part]
        bars = []  # the whole file has the bars, for a block of their own
    check_commit(path, data["environment"])
    return Results(path, data["rows"], data.get("notes", []), bars, data["environment"])


def file_with(file: str, step: str, part: str) -> tuple[Path, dict]:
    """FILE.json if it has this part of a step of tests/gpu.sh, otherwise the newest FILE-COMMIT.json that has it."""
    found = []
    for path in [RESULTS / f"{file}.json", *RESULTS.glob(f"{file}-*.json")]:
        data = json.loads(path.read_text())
        if part in data["measured"].get(step, {}):
            if path.name == f"{file}.json":
                return path, data
            found.append((data["steps"][step]["at"], path, data))
    if not found:
        raise SystemExit(f"no {file}.json or {file}-*.json in {RESULTS} has {part!r} of the step {step!r}")
    return max(found, key=lambda entry: entry[0])[1:]


def check_commit(path: Path, facts: dict) -> None:
    """Refuse results that nobody can repeat, because their sources were never committed."""
    commit = facts.get("commit", "unknown")
    if re.fullmatch("[0-9a-f]{7,40}", commit) is None:
        command = f" with `{facts['command']}`" if "command" in facts else ""
        raise SystemExit(
            f"{path}: measured at commit {commit!r}, which nobody can check out: commit, then measure again{command}"
        )


@dataclasses.dataclass(frozen=True)
class Highlight:
    """A row of this library and one of another in the same rounds."""

    what: str
    source: str  # as in a block
    step: str
    other: str  # the backend
    name: str  # of the other, as shown to readers
    dtype: str = "bfloat16"

    def rows(self, rows: list[dict]) -> tuple[dict, dict]:
        """Our row and the other, at the last shape of the results."""
        found = {row["backend"]: row for row in rows if (row["pass"], row["dtype"]) == (self.step, self.dtype)}
        return found["andromeda"], found[self.other]


HIGHLIGHTS = (
    Highlight("attention, forward, 8192 tokens", "gpu:bench:attn_forward", "forward", "sdpa, bias tensor", "SDPA"),
    Highlight("attention, backward, 8192 tokens", "gpu:bench:attn_backward", "backward", "sdpa, bias tensor", "SDPA"),
    Highlight(
        "attention, forward, 8192 tokens", "gpu:bench:flex_forward", "forward", "flex_attention, windows",
        "FlexAttention, windows",
    ),
    Highlight("attention, one token, 131072 keys", "gpu:bench:attn_decode", "decode", "sdpa, bias tensor", "SDPA"),
    Highlight(
        "residual, norm and token shift, forward", "gpu:bench:token_shift_norm", "forward", "torch.compile",
        "torch.compile",
    ),
    Highlight("model, training step, 8192 tokens", "model", "training", "x-transformers", "x-transformers", "float32"),
)  # fmt: skip
HIGHLIGHT_COLUMNS = ("machine", "what", "this library", "beside", "its time", "ratio")


def highlights() -> str:
    lines, sources = [], {}
    for highlight in HIGHLIGHTS:
        results = read_results(highlight.source)
        ours, other = highlight.rows(results.rows)
        pairs = zip(other["samples_ms"], ours["samples_ms"], strict=True)
        line = {
            "machine": results.machine.removeprefix("NVIDIA "),
            "what": highlight.what,
            "this library": format_time(ours["median_ms"]),
            "beside": highlight.name,
            "its time": format_time(other["median_ms"]),
            "ratio": f"{statistics.median(theirs / own for theirs, own in pairs):.2f}",
        }
        lines.append(line)
        where = f"{results.machine}, torch {results.facts['torch']}, commit {results.facts['commit']}"
        sources.setdefault(where, []).append(f"`{results.path.name}`")
    measured = "; ".join(f"{where} ({', '.join(dict.fromkeys(files))})" for where, files in sources.items())
    return f"{table(lines, HIGHLIGHT_COLUMNS)}\n\nMeasured on {measured}."


def format_time(ms: float) -> str:
    return f"{ms / 1000:.2f} s" if ms >= 1000 else f"{ms:.3g} ms" if ms >= 1 else f"{ms * 1000:.3g} us"


def results_block(name: str, *columns: str) -> str:
    """The table of a file. It leaves out the matrix products and copies to which shares refer."""
    results = read_results(name)
    rows = [row for row in results.rows if row.get("op") not in ("matmul", "copy")]
    paragraphs = [table(rows, columns or COLUMNS), *results.notes]
    if results.bars:
        paragraphs.append(bar_table(results.bars))
    return "\n\n".join([*paragraphs, results.source])


def bars_block(name: str) -> str:
    path = RESULTS / f"{name}.json"
    data = json.loads(path.read_text())
    check_commit(path, data["environment"])
    return f"{bar_table(data['bars'])}\n\n{data['environment']['gpu']}, commit {data['environment']['commit']}."


def bar_table(bars: list[dict]) -> str:
    return table([bar for bar in bars if bar["measured"] is not None], BAR_COLUMNS)


def predictions_block(name: str) -> str:
    path = RESULTS / f"{name}.json"
    data = json.loads(path.read_text())
    check_commit(path, data["environment"])
    known = [line for line in data["predictions"] if line["measured"] is not None]
    counts = collections.Counter(line["verdict"] for line in known)
    summary = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    columns = ("what", "metric", "low", "high", "measured", "verdict")
    where = f"{data['environment']['gpu']}, commit {data['environment']['commit']}"
    return f"{table(known, columns)}\n\n{len(known)} predictions: {summary}. {where}."


def forecast_block(gpu: str) -> str:
    import predictions  # it imports this file

    known = set()
    for path in RESULTS.glob("gpu*.json"):
        for line in json.loads(path.read_text()).get("predictions") or []:
            if line["measured"] is not None:
                known.add((line["what"], line["metric"], line["low"], line["high"]))
    lines = [line for line in predictions.compare([], gpu) if tuple(line[name] for name in FORECAST_KEY) not in known]
    return table(lines, (*FORECAST_KEY, "why"))


FORECAST_KEY = ("what", "metric", "low", "high")
BLOCKS: dict[str, Callable[..., str]] = {
    "results": results_block,
    "bars": bars_block,
    "predictions": predictions_block,
    "forecast": forecast_block,
    "highlights": highlights,
}
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
FIGURE = ROOT / "docs" / "scaling.svg"


def filled(text: str) -> str:
    """A document with the contents of its blocks generated again."""

    def fill(match: re.Match[str]) -> str:
        made = BLOCKS[match["kind"]](*(match["spec"] or "").split())
        return f"{match['opening']}\n{made}\n<!-- end -->"

    kinds = "|".join(BLOCKS)
    pattern = rf"(?P<opening><!-- (?P<kind>{kinds})(?:: (?P<spec>.*?))? -->)\n.*?<!-- end -->"
    return re.sub(pattern, fill, text, flags=re.S)


def scaling_figure() -> str:
    """The figure of the GPU's results, or of a CPU's if there are none."""
    path = next(path for name in ("scaling", "scaling_cpu") if (path := RESULTS / f"{name}.json").exists())
    data = json.loads(path.read_text())
    check_commit(path, data["environment"])
    return figure.scaling(data)


def update_readme() -> None:
    """Generate the numbers of all documents, and the figure, from the JSON files."""
    made = {path: filled(path.read_text()) for path in DOCUMENTS} | {FIGURE: scaling_figure()}
    for path, text in made.items():  # only after all were generated
        write_text(path, text)


if __name__ == "__main__":
    update_readme()
