"""The README is correct: its code runs, its commands exist, its numbers and its figure are generated from JSON."""

import importlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not part of this copy")


def blocks(language):
    """Code blocks of the README in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), flags=re.M | re.S)


def words_of(line):
    """The commands of one line, joined by &&, as lists of words."""
    found = [[]]
    for word in shlex.split(line, comments=True):
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return [command for command in found if command]


COMMANDS = [
    command
    for block in (blocks("bash") if README.exists() else [])
    for line in block.splitlines()
    for command in words_of(line)
]
PYTHON = blocks("python") if README.exists() else []


@pytest.fixture
def report(monkeypatch):
    folder = ROOT / "benchmarks"
    if not folder.exists():
        pytest.skip("the benchmarks are not part of this copy")
    monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module("report")


def test_a_stranger_sees_code_early_and_reads_a_page():
    lines = README.read_text().splitlines()
    assert len(lines) <= 120
    assert any(line.startswith("```") for line in lines[:12])
    assert len(PYTHON) == 2


@pytest.mark.parametrize("code", PYTHON, ids=[f"block {index}" for index in range(len(PYTHON))])
def test_python_runs_as_it_stands(code, tmp_path):
    """Each block runs in its own process, in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], cwd=tmp_path, env=environment, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_installing_is_what_the_gate_does():
    gate = [
        words_of(line) for line in (ROOT / ".ci" / "run").read_text().splitlines() if "'" in line or '"' not in line
    ]
    executed = [[word for word in command if word != "--quiet"] for line in gate for command in line]
    [plain, development] = [command for command in COMMANDS if command[:4] == ["python", "-m", "pip", "install"]]
    assert development in executed
    assert ["python", "-m", "pytest"] in COMMANDS
    # The gate runs the same tests in two processes, and some of them later, when it has installed more.
    beside, later = (["tests/emulator", "tests/triton_kernels"], ["tests/data", "tests/huggingface"]), "tests/ecosystem"
    ignored = [word for part in (*beside[0], *beside[1], later) for word in ("--ignore", part)]
    for arguments in (*beside, ignored):
        assert ["python", "-m", "pytest", *arguments] in executed
    assert f"python -m pytest {later} " in (ROOT / ".ci" / "run").read_text()
    # The first command differs from the second only in the installed package.
    assert plain[:-1] == development[:-2]
    assert (plain[-1], development[-2:]) == (".", ["-e", ".[test]"])
    assert (ROOT / plain[plain.index("-c") + 1]).exists()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "andromeda"], ids=" ".join)
def test_commands_exist(command):
    arguments = command[1:] if "--help" in command else [*command[1:], "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "andromeda", *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert f"andromeda {command[1]}" in result.stdout


def test_every_command_is_installed_or_checked():
    for command in COMMANDS:
        assert command[0] == "andromeda" or command[:3] in (["python", "-m", "pip"], ["python", "-m", "pytest"])


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README.read_text()):
        assert "://" in target or (ROOT / target).exists(), target


def test_numbers_are_those_of_the_json_files(report):
    for path in report.DOCUMENTS:
        text = path.read_text()
        assert report.filled(text) == text, f"{path} is not what `python benchmarks/report.py` makes"
    assert report.FIGURE.read_text() == report.scaling_figure()


def test_the_readme_has_few_numbers(report):
    """Targets and complete tables belong in docs/benchmarks.md."""
    text = README.read_text()
    assert len(report.HIGHLIGHTS) == 6
    assert "missed" not in text
    assert "<!-- results" not in text


# ---- the figure -----------------------------------------------------------------------------------------------------


def scaling_data(**more):
    """Data in the form that benchmarks/scaling.py writes on a GPU."""
    rows = [
        {
            "backend": name, "seqlen": 1024 << power, "median_ms": slow * 4.0**power, "p20_ms": slow * 3.9**power,
            "p80_ms": slow * 4.1**power, "peak_memory_mb": slow * 20 * 2.0**power, "dtype": "bfloat16",
        }
        for name, slow, powers in (
            ("andromeda", 0.1, range(8)),
            ("sdpa, bias tensor", 0.3, range(6)),
            ("flex_attention", 0.2, (1, 4, 7)),
            ("flex_attention, windows", 0.15, (1, 4, 7)),
        )
        for power in powers
    ]  # fmt: skip
    environment = {"gpu": "NVIDIA <H200>", "processor": "p", "threads": 2, "torch": "2.11.0+cu130", "commit": "0123abc"}
    notes = ["sdpa, bias tensor ends before 65536 tokens: OutOfMemoryError: CUDA out of memory."]
    return {"rows": rows, "environment": environment, "notes": notes, **more}


def test_the_figure_is_small_well_formed_and_always_the_same(report):
    text = report.figure.scaling(scaling_data())
    assert text == report.figure.scaling(scaling_data())
    assert len(text) < 60_000
    root = xml.etree.ElementTree.fromstring(text)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for name in ("this library", "SDPA, bias tensor", "FlexAttention", "FlexAttention, windows", "64k: out of memory"):
        assert words.count(name) == 2  # in both panels
    assert any("NVIDIA <H200>, bfloat16, torch 2.11.0." in word for word in words)
    published = report.FIGURE.read_text()
    assert len(published) < 60_000
    xml.etree.ElementTree.fromstring(published)
    assert str(report.FIGURE.relative_to(ROOT)) in README.read_text()


def test_names_of_curves_do_not_overlap(report):
    root = xml.etree.ElementTree.fromstring(report.figure.scaling(scaling_data()))
    labels = [e for e in root.iter("{http://www.w3.org/2000/svg}text") if e.get("font-weight") == "600"]
    places = {}
    for label in labels:
        if label.get("text-anchor") == "start" and label.get("fill") != report.figure.GREY:
            places.setdefault(label.get("x"), []).append(float(label.get("y")))
    assert len(places) == 2
    for heights in places.values():
        heights.sort()
        assert all(below - above >= 16 for above, below in itertools.pairwise(heights))


def test_colours_are_legible_on_light_and_dark_pages(report):
    def luminance(colour):
        parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    figure = report.figure
    for page in ("#ffffff", "#0d1117"):
        assert contrast(figure.GREY, page) >= 4
        assert all(contrast(colour, page) >= 3 for _, colour in figure.COLOURS.values())


@pytest.mark.parametrize(
    ("note", "expected"),
    [
        ("sdpa, bias tensor ends before 65536 tokens: OutOfMemoryError: CUDA out of memory.", "64k: out of memory"),
        ("The curve of sdpa, bias tensor ends before 16384 tokens: a pass would take about 96 s.", "16k: too slow"),
        ("The curve of sdpa, bias tensor ends before 16384 tokens: it would need 26 GiB.", "16k: out of memory"),
        ("sdpa, bias tensor ends before 300 tokens: RuntimeError: no kernel.", "300: failed"),
        ("andromeda ends before 300 tokens: RuntimeError: no kernel.", ""),
    ],
)  # fmt: skip
def test_why_a_curve_ends(report, note, expected):
    assert report.figure.why_it_ends("sdpa, bias tensor", [note]) == expected


# ---- documents from JSON --------------------------------------------------------------------------------------------


@pytest.fixture
def results(report, monkeypatch, tmp_path):
    """An empty folder in place of benchmarks/results; call it to write a file."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)

    def write(name, data):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))

    return write


FACTS = {"processor": "p", "threads": 2, "torch": "2.13", "command": "python x.py --json /tmp/a/x.json --quick"}


@pytest.mark.parametrize("commit", ["0123abc+changes", "unknown", None])
@pytest.mark.parametrize("block", ["results: x", "bars: x", "predictions: x"])
def test_results_of_changed_sources_are_refused(report, results, tmp_path, commit, block):
    facts = {**FACTS, **({} if commit is None else {"commit": commit})}
    results("x", {"environment": facts, "rows": [], "notes": [], "bars": [], "predictions": []})
    with pytest.raises(SystemExit) as error:
        report.filled(f"<!-- {block} -->\n<!-- end -->")
    message = str(error.value)
    assert str(tmp_path / "x.json") in message
    assert (commit or "unknown") in message
    assert f"commit, then measure again with `{FACTS['command']}`" in message


def test_nothing_is_written_when_one_file_is_refused(report, results, monkeypatch, tmp_path):
    good, bad = tmp_path / "good.md", tmp_path / "bad.md"
    results("good", {"environment": {**FACTS, "commit": "0123abc"}, "rows": [{"op": "data", "pass": "p"}]})
    results("bad", {"environment": {**FACTS, "commit": "0123abc+changes"}, "rows": []})
    good.write_text("<!-- results: good -->\n<!-- end -->\n")
    bad.write_text("<!-- results: bad -->\n<!-- end -->\n")
    monkeypatch.setattr(report, "DOCUMENTS", (good, bad))
    with pytest.raises(SystemExit):
        report.update_readme()
    assert good.read_text() == "<!-- results: good -->\n<!-- end -->\n"


def test_a_block_is_filled(report, results):
    rows = [
        {"op": "attention", "pass": "decode", "backend": "a", "median_ms": 2.0},
        {"op": "matmul", "pass": "decode", "backend": "matmul 2048^3 float32", "median_ms": 53.0},
        {"op": "copy", "pass": "decode", "backend": "memory copy", "median_ms": 1.0},
    ]
    bars = [
        {"what": "w", "bar": ">= 1", "measured": 0.5, "rounds": [0.4, 0.6], "verdict": "missed"},
        {"what": "other", "bar": ">= 1", "measured": None, "rounds": None, "verdict": "not measured"},
    ]
    facts = {**FACTS, "commit": "0123abc"}
    results("x", {"environment": facts, "rows": rows, "notes": ["A note."], "bars": bars})
    text = "before\n<!-- results: x pass backend median_ms -->\nold\n<!-- end -->\nafter\n"
    made = report.filled(text)
    assert report.filled(made) == made
    assert made.startswith("before\n<!-- results: x pass backend median_ms -->\n| pass ")
    assert made.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in made
    assert "| decode | a " in made
    assert "matmul" not in made  # a matrix product is not a decode step
    assert "copy" not in made
    assert "missed" in made
    assert "other" not in made
    assert "A note." in made
    assert "Measured with `python x.py --json x.json --quick` on p, 2 threads, torch 2.13, commit 0123abc." in made


def test_a_step_is_taken_from_the_newest_file_that_has_it(report, results):
    def file(commit, steps):
        part = {"environment": {**FACTS, "commit": commit}, "rows": [{"op": "o", "pass": commit}], "notes": []}
        measured = {step: {"attn": part} for step in steps}
        return {"measured": measured, "steps": {step: {"at": at} for step, at in steps.items()}}

    without_the_part = file("aaaaaaa", {"quick": "2026-11-03"})
    without_the_part["measured"]["bench"] = {"model_before": {}}
    results("gpu", without_the_part)
    results("gpu-bbbbbbb", file("bbbbbbb", {"quick": "2026-11-01", "bench": "2026-11-01"}))
    results("gpu-ccccccc", file("ccccccc", {"bench": "2026-11-02"}))
    assert report.read_results("gpu:quick:attn").rows[0]["pass"] == "aaaaaaa"
    assert report.read_results("gpu:bench:attn").rows[0]["pass"] == "ccccccc"
    for part in ("host:attn", "bench:model"):
        with pytest.raises(SystemExit, match=f"has '{part.partition(':')[2]}' of the step '{part.partition(':')[0]}'"):
            report.read_results(f"gpu:{part}")


def test_a_forecast_leaves_out_what_was_measured(report, results, monkeypatch):
    import predictions

    entry = {"op": "attention", "pass": "forward", "shape": "s", "dtype": "bfloat16", "backend": "andromeda"}
    entry |= {"gpus": ["H200"], "metric": "tflops", "high": 2, "why": "Because."}
    monkeypatch.setattr(predictions, "load", lambda: [{**entry, "low": low} for low in (0.25, 0.5, 0.75)])
    lines = [
        {"what": "attention forward s bfloat16 andromeda", "metric": "tflops", "low": low, "high": 2}
        for low in (0.25, 0.5)
    ]
    results("gpu-old", {"predictions": [{**lines[0], "measured": 1}, {**lines[1], "measured": None}]})
    made = report.filled("<!-- forecast: H200 -->\nold\n<!-- end -->\n")
    assert " 0.5 |" in made and " 0.75 |" in made and "Because." in made
    assert "0.25" not in made and "old" not in made
    assert "Because." not in report.filled("<!-- forecast: A100 -->\n<!-- end -->\n")


def test_results_do_not_make_a_tree_dirty(report, monkeypatch, tmp_path):
    """A command that rewrites its results measures the commit, not its own file."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    monkeypatch.setattr(report, "ROOT", tmp_path)
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "x.json").write_text("1")
    (tmp_path / "source.py").write_text("1")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True, env={**os.environ, "GIT_CONFIG_GLOBAL": os.devnull})
    clean = report.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (folder / "x.json").write_text("2")
    assert report.commit() == clean
    (tmp_path / "source.py").write_text("2")
    assert report.commit() == f"{clean}+changes"
