"""gpu.json: the results of tests/gpu.sh, rewritten after every step, and during a step after every benchmark case.

    gpu_report.py facts                                   # the GPU and the installed packages, as JSON
    gpu_report.py begin STEP...                           # at the start of a call of gpu.sh
    gpu_report.py watch STEP LIMIT PARENT                 # beside a step: its clocks, and its results as they come
    gpu_report.py end STEP CODE SECONDS LIMIT             # its result; CODE "skipped": there was no time
    gpu_report.py libraries [FOLDER]                      # the assembler of the library, and of the one in FOLDER
    gpu_report.py show                                    # tables; exit code 1 if a step of this call did not pass

As a plugin of pytest (`-p gpu_report`) it counts the tests while they run; those whose names contain a word of
TESTS_FIRST, a variable of the environment, run before the others. Folders come from the environment: OUT, which holds
gpu.json; SCRATCH, where a step leaves NAME.json files in parts/STEP; and KEEP, for a copy of gpu.json that outlives
OUT. Files of steps are not trusted: one that is not JSON, or has another form, is named and left out.

    environment   the machine, the versions, the commit and a digest of the library's sources
    this_call     the requested steps, and their results
    steps         STEP, of this call or an earlier one: result, seconds, limit, commit, and the clocks while it ran
                  (median, lowest, highest; null where `no_clocks` says why)
    measured      STEP: NAME: rows and notes of a benchmark, counts of tests, libraries
    bars, predictions    the targets of the rows (benchmarks/bars.py), and the expected numbers (predictions.json)
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import predictions  # noqa: E402
import report  # noqa: E402

PACKAGES = (
    "torch", "triton", "transformers", "pytest", "hypothesis", "pybind11", "cmake", "ninja", "flash-attn",
    "liger-kernel", "cut-cross-entropy",
)  # fmt: skip
SOURCES = ("andromeda/**/*.py", "csrc/**/*", "CMakeLists.txt", "setup.py")  # of the results
REHEARSED = "rehearsed: no GPU, tests only collected"
NOT_RUN = 77  # exit code of a step that cannot run here; the last line of its log has the reason
SAME = ("sources", "gpu")  # must be equal for a later call to continue an earlier one
CLOCKS = ("sm_mhz", "memory_mhz", "power_w", "celsius")
CLOCK_QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
LIMIT_QUERY = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current"
MAX_FAILURES = 25


# ---- the file -------------------------------------------------------------------------------------------------------


def out_file() -> Path:
    return Path(os.environ["OUT"]) / "gpu.json"


def kept_file() -> Path:
    return Path(os.environ["KEEP"]) / "gpu.json"


def parts_of(step: str) -> Path:
    return Path(os.environ["SCRATCH"]) / "parts" / step


def clocks_of(step: str) -> Path:
    return Path(os.environ["SCRATCH"]) / f"clocks_{step}.csv"


def log_file() -> Path:
    return Path(os.environ["OUT"]) / "gpu.log"


def strict(value: object) -> object:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load() -> dict:
    return json.loads(out_file().read_text())


def save(data: dict) -> None:
    """Write gpu.json to OUT, then its copy to KEEP."""
    text = json.dumps(strict(data), indent=1, allow_nan=False) + "\n"
    for path in (out_file(), kept_file()):
        report.write_text(path, text)


def tree_digest() -> str:
    """A digest of the sources behind the results: checkouts with the same digest compute the same."""
    digest = hashlib.sha256()
    for pattern in SOURCES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def facts() -> dict:
    """The GPU and the installed packages. The only function that loads torch."""
    import torch

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    found = {
        "gpu": None,
        "python": platform.python_version(),
        "cuda_of_torch": torch.version.cuda,
        "versions": {name: version(name) for name in PACKAGES},
        "triton_ptxas": triton_assemblers(),
        "nvcc": (output_of("nvcc", "--version") or "not on PATH").splitlines()[-1],
        "nvidia_smi": output_of("nvidia-smi", f"--query-gpu={LIMIT_QUERY}", "--format=csv,noheader"),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        found["gpu"] = gpu.name
        found["capability"] = f"{gpu.major}.{gpu.minor}"
        found["multiprocessors"] = gpu.multi_processor_count
        found["memory_mib"] = gpu.total_memory // 2**20
        found["uuid"] = str(getattr(gpu, "uuid", ""))
    return found


def triton_assemblers() -> dict[str, str | None]:
    """The assemblers that Triton brings with it, and their versions."""
    spec = importlib.util.find_spec("triton")
    folders = [] if spec is None else spec.submodule_search_locations or []
    programs = [path for folder in folders for path in Path(folder).glob("backends/nvidia/bin/ptxas*")]
    found = {path.name: re.search(r"V([\d.]+)", output_of(str(path), "--version") or "") for path in programs}
    return {name: None if match is None else match[1] for name, match in sorted(found.items())}


def output_of(*words: str) -> str | None:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def begin(steps: list[str]) -> None:
    """Continue the gpu.json of an earlier call if it has the same sources and GPU; otherwise keep it under another name
    and start a new one."""
    for stale in Path(os.environ["OUT"]).glob(".gpu.json.*"):  # of an interrupted write
        stale.unlink()
    machine = json.loads((Path(os.environ["SCRATCH"]) / "facts.json").read_text())
    environment = {"commit": report.commit(), "sources": tree_digest(), **machine}
    data = {"environment": environment, "steps": {}, "measured": {}}
    earlier = next((path for path in (out_file(), kept_file()) if path.exists()), None)
    if earlier is not None:
        try:
            found = json.loads(earlier.read_text())
            of = found["environment"]
            reasons = [f"has another {name}, {of.get(name)}" for name in SAME if of.get(name) != environment[name]]
            if not reasons:
                data["steps"], data["measured"] = dict(found["steps"]), dict(found["measured"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            of, reasons = {}, [f"cannot be read ({type(error).__name__})"]
        if reasons:
            name = re.sub(r"[^0-9A-Za-z]+", "-", str(of.get("commit", "unreadable")))
            aside = out_file().with_name(f"gpu-{name}.json")
            shutil.copyfile(earlier, aside)
            print(f"{earlier} {' and '.join(reasons)}: starting anew, it is kept as {aside.name}")
        elif data["steps"]:
            print(f"going on with {earlier}, which has {', '.join(data['steps'])} (commit {of['commit']})")
    data["this_call"] = {"steps": steps, "at": time.strftime("%Y-%m-%d %H:%M:%S")}
    save(finish(data))


# ---- a step ---------------------------------------------------------------------------------------------------------


def read_part(path: Path) -> dict:
    """The results that a step left in a file; a dict with `unreadable` if the file has another form."""
    try:
        part = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return {"unreadable": f"{type(error).__name__}: {error}"[:300]}
    rows = part.get("rows", []) if isinstance(part, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return {"unreadable": "not an object with a list of rows"}
    if not isinstance(part.get("notes", []), list):
        return {"unreadable": "notes are not a list"}
    for name in ("bars", "failures"):
        items = part.get(name) or []
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            return {"unreadable": f"{name} are not objects in a list"}
    return part


def merge(data: dict, step: str) -> list[str]:
    """Add the results that the step has written so far; returns the names of unreadable files."""
    parts = {path.stem: read_part(path) for path in sorted(parts_of(step).glob("*.json"))}
    if parts:
        data["measured"][step] = parts
    return [name for name, part in parts.items() if "unreadable" in part]


def finish(data: dict) -> dict:
    """Add the results that follow from the measurements: bars and predictions."""
    parts = [part for step in data["measured"].values() for part in step.values()]
    known = [bar for part in parts for bar in part.get("bars") or [] if bar.get("measured") is not None]
    data["bars"] = list({(bar.get("what"), bar.get("bar")): bar for bar in known}.values())  # the last of each counts
    rows = [row for part in parts for row in part.get("rows", [])]
    try:
        data["predictions"] = predictions.compare(rows, data["environment"].get("gpu") or "")
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:  # malformed rows: no measurement may be lost
        data["predictions"] = []
        data["predictions_failed"] = f"{type(error).__name__}: {error}"
    return data


def watch(step: str, limit: int, parent: int) -> None:
    """Record the clocks and every new result until the step ends, or the process `parent`, which is gpu.sh."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    end = time.monotonic() + limit + 10
    data = load()
    data["steps"][step] = {"result": "begun, did not end", "limit": limit, "commit": data["environment"]["commit"]}
    save(data)
    sampler = start_sampler(step, limit, data["environment"].get("uuid"))
    seen = {}
    while not stop.wait(0.25) and os.getppid() == parent and time.monotonic() < end:
        found = {path: path.stat().st_mtime_ns for path in parts_of(step).glob("*.json") if path.exists()}
        if found != seen:
            seen = found
            merge(data, step)
            save(finish(data))
    if sampler is not None:
        sampler.terminate()  # `timeout` passes it on
        with contextlib.suppress(subprocess.TimeoutExpired):  # a hanging driver must not delay the next step
            sampler.wait(timeout=3)


def start_sampler(step: str, limit: int, uuid: str | None) -> subprocess.Popen | None:
    """nvidia-smi, which writes a line four times a second; `timeout` ends it even if this process is gone."""
    which = [f"--id=GPU-{uuid.removeprefix('GPU-')}"] if uuid else []
    command = ["timeout", str(limit + 10), "nvidia-smi", f"--query-gpu=timestamp,{CLOCK_QUERY}"]
    command += ["--format=csv,noheader,nounits", "-lms", "250", *which]
    try:
        with open(clocks_of(step), "w") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    except OSError:
        return None


def read_clocks(path: Path) -> list[tuple[float, dict[str, float]]]:
    """(seconds since 1970, the known values of `CLOCKS`) for each line; other lines are left out."""
    samples = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        moment, *values = (field.strip() for field in line.split(","))
        try:
            base, _, fraction = moment.partition(".")
            seconds = time.mktime(time.strptime(base, "%Y/%m/%d %H:%M:%S")) + float(f"0.{fraction or 0}")
        except ValueError:
            continue
        known = {}
        for name, value in zip(CLOCKS, values, strict=False):
            try:
                known[name] = float(value)
            except ValueError:  # "[N/A]", as of a part of a GPU
                continue
        if known:
            samples.append((seconds, known))
    return samples


def summarise(samples: list[tuple[float, dict[str, float]]]) -> dict | None:
    """Median, lowest and highest of each."""
    summary = {"samples": len(samples)}
    for name in CLOCKS:
        values = [known[name] for _, known in samples if name in known]
        summary[name] = [statistics.median(values), min(values), max(values)] if values else None
    return summary if samples else None


def add_clocks(data: dict, step: str) -> None:
    """Add the clocks of the whole step, and to each row those of the seconds in which it was measured."""
    samples = read_clocks(clocks_of(step))
    data["steps"][step]["clocks"] = summarise(samples)
    if not samples:
        data["steps"][step]["no_clocks"] = "nvidia-smi gave none" if clocks_of(step).exists() else "not looked at"
    for part in data["measured"].get(step, {}).values():
        for row in part.get("rows", []):
            if isinstance(row.get("measured_at"), list) and len(row["measured_at"]) == 2:
                first, last = row["measured_at"]
                row["clocks"] = summarise([sample for sample in samples if first <= sample[0] <= last])


def result_of(code: str, seconds: int, limit: int) -> str:
    """The result in words. `timeout` returns 124, or 137 when it had to kill; 128 + n is the end by signal n."""
    if code == "0":
        return REHEARSED if os.environ.get("REHEARSE") else "passed"
    if code == "skipped":
        return "out of time before it began"
    number = int(code)
    if number == NOT_RUN:
        return f"not run: {last_line()}"
    if number == 124 or (number in (137, 143) and seconds >= limit):
        return f"out of time after {limit} s"
    if number > 128:
        try:
            return f"failed, ended by {signal.Signals(number - 128).name}"
        except ValueError:
            pass
    return f"failed, exit code {number}"


def last_line() -> str:
    lines = log_file().read_text(errors="replace").splitlines() if log_file().exists() else []
    return next((line for line in reversed(lines) if line.strip()), "no reason given")


def end(step: str, code: str, seconds: int, limit: int) -> None:
    data = load()
    result = result_of(code, seconds, limit)
    unreadable = merge(data, step)
    if unreadable and code == "0":
        result = f"failed, results unreadable: {', '.join(unreadable)}"
    data["this_call"].setdefault("results", {})[step] = result
    if code != "skipped" or step not in data["steps"]:  # a step without time does not overwrite that of an earlier call
        data["steps"][step] = {
            "result": result,
            "seconds": seconds,
            "limit": limit,
            "commit": data["environment"]["commit"],
            "at": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
    if code != "skipped":
        add_clocks(data, step)
    save(finish(data))
    print(result)


def libraries(folder: str | None) -> None:
    """Add the assemblers of the library in place, and of the one in a folder, to the results of the step `build`."""
    found = {"default": assembler_of(ROOT)}
    note = "no second library"
    if folder is not None and Path(folder).exists():
        found["second"] = assembler_of(Path(folder))
        if found["second"] == found["default"]:
            del found["second"]
            shutil.rmtree(folder)
            note = f"only one assembler here ({found['default']}): `smoke` runs with it alone"
        else:
            note = f"two assemblers: {found['default']} and {found['second']}"
            (Path(folder) / "complete").touch()
    print(note)
    report.write_text(parts_of("build") / "libraries.json", json.dumps({"ptxas": found, "notes": [note]}))


def assembler_of(folder: Path) -> str:
    code = "from andromeda.ops import _select; print(_select.extension.build_info().get('ptxas') or 'unknown')"
    found = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    return found.stdout.strip() or f"cannot be loaded: {(found.stderr.strip() or 'no reason').splitlines()[-1]}"


# ---- tables ---------------------------------------------------------------------------------------------------------

ROW_COLUMNS = (
    "op", "pass", "shape", "dtype", "backend", "median_ms", "tflops", "effective_tflops", "gbps", "tokens_per_s", "mfu",
    "ratio", "of_matmul", "of_copy", "peak_memory_mb", "sm_mhz", "shared_per_tile", "hmma_per_tile",
    "gmma_per_tile", "slots_per_tile", "conflicts", "shared_share", "hmma_share", "tensor_share", "xu_share", "issued",
    "dram_of_least",
)  # fmt: skip


def show() -> int:
    """Print the least important results first, because a reader sees the end of a long output."""
    data = load()
    for step, parts in data["measured"].items():
        for name, part in parts.items():
            if rows := part.get("rows"):
                print(f"\n{step}, {name}")
                print(report.table([{**row, "sm_mhz": median_clock(row)} for row in rows], ROW_COLUMNS))
            for note in part.get("notes") or []:
                print(f"{step}, {name}: {note}")
    for step, name, part in tests_of(data):
        for failure in part["failures"]:
            print(f"\n{step}, {name}: {failure.get('test')}\n{str(failure.get('text'))[-1200:]}")
    tests = [
        {"step": step, "tests": name, **{key: part.get(key) for key in TEST_COLUMNS[2:]}}
        for step, name, part in tests_of(data)
    ]
    if tests:
        print(f"\n{report.table(tests, TEST_COLUMNS)}")
    if data["bars"]:
        print(f"\n{report.table(data['bars'], report.BAR_COLUMNS)}")
    if data["predictions"]:
        print(f"\n{report.table(data['predictions'], predictions.COLUMNS)}")
    steps = [{"step": name, **step, "sm_mhz": median_clock(step)} for name, step in data["steps"].items()]
    print(f"\n{report.table(steps, ('step', 'seconds', 'limit', 'sm_mhz', 'commit', 'result'))}")
    machine = data["environment"]
    print(machine.get("gpu") or "no GPU", f"torch {machine['versions']['torch']}", sep=", ", end=", ")
    print(f"commit {machine['commit']}; gpu.json and logs in {os.environ['OUT']}")
    ended = data["this_call"].get("results", {})
    results = [ended.get(step, "did not end") for step in data["this_call"]["steps"]]
    return int(not all(result in ("passed", REHEARSED) or result.startswith("not run") for result in results))


TEST_COLUMNS = ("step", "tests", "ptxas", "passed", "failed", "skipped", "finished", "seconds")


def tests_of(data: dict):
    for step, parts in data["measured"].items():
        for name, part in parts.items():
            if isinstance(part.get("failures"), list):
                yield step, name, part


def median_clock(entry: dict) -> float | None:
    clocks = entry.get("clocks")
    return clocks["sm_mhz"][0] if isinstance(clocks, dict) and clocks.get("sm_mhz") else None


# ---- a plugin of pytest ---------------------------------------------------------------------------------------------


class Counter:
    """Keeps counts in the file PART, a variable of the environment, so that an interrupted run leaves its counts."""

    def __init__(self, path: Path):
        self.path = path
        self.begin = self.written = time.monotonic()
        self.found = {"passed": 0, "failed": 0, "skipped": 0, "finished": False, "failures": [], "skips": {}}

    def pytest_sessionstart(self, session):
        from andromeda.ops import _select

        build = {} if _select.extension is None else _select.extension.build_info()
        self.found["ptxas"] = build.get("ptxas") or "unknown"
        library = getattr(_select.extension, "__file__", None)
        self.found["library"] = library and os.path.relpath(library, ROOT)
        self.write()

    def pytest_runtest_logreport(self, report):
        outcome = report.outcome
        if outcome == "passed" and report.when != "call":
            return
        self.found[outcome] += 1
        if outcome == "failed" and len(self.found["failures"]) < MAX_FAILURES:
            text = getattr(report, "longreprtext", str(report.longrepr))
            self.found["failures"].append({"test": report.nodeid, "text": text[-4000:]})
        elif outcome == "skipped":
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)[:200]
            self.found["skips"][reason] = self.found["skips"].get(reason, 0) + 1
        if outcome == "failed" or time.monotonic() - self.written > 1:
            self.write()

    def pytest_sessionfinish(self, session, exitstatus):
        self.found["finished"] = True
        self.write()
        if self.found["passed"] == 0 and exitstatus == 0 and not session.config.option.collectonly:
            print("\ngpu_report: no test passed, so nothing is known")
            session.exitstatus = 1

    def write(self):
        self.written = time.monotonic()
        self.found["seconds"] = round(self.written - self.begin, 1)
        report.write_text(self.path, json.dumps(self.found))


def pytest_configure(config):
    wanted = os.environ.get("LIBRARY")  # the folder that the library must come from, where it matters
    if wanted and not hasattr(config, "workerinput"):
        from andromeda.ops import _select

        where = Path(getattr(_select.extension, "__file__", "nowhere")).resolve()
        if not where.is_relative_to(Path(wanted).resolve()):
            import pytest

            raise pytest.UsageError(f"the library must come from {wanted}, got {where}")
    if os.environ.get("PART") and not hasattr(config, "workerinput"):  # of the processes of xdist the first one counts
        config.pluginmanager.register(Counter(Path(os.environ["PART"])), "gpu_counter")


def pytest_collection_modifyitems(items):
    words = os.environ.get("TESTS_FIRST", "").split()
    items.sort(key=lambda item: not any(word in item.name for word in words))


def main(argv: list[str]) -> int:
    command, *rest = argv
    if command == "facts":
        print(json.dumps(facts()))
    elif command == "begin":
        begin(rest)
    elif command == "watch":
        watch(rest[0], int(rest[1]), int(rest[2]))
    elif command == "end":
        end(rest[0], rest[1], int(rest[2]), int(rest[3]))
    elif command == "libraries":
        libraries(*rest or [None])
    elif command == "show":
        return show()
    else:
        raise SystemExit(f"gpu_report.py: unknown command {command!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
