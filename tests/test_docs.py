"""docs/: every citation in the code exists, and the pages' statements about the code are true."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from andromeda import Andromeda

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("tests/*/README.md")]
)
ATTENTION = (ROOT / "docs" / "attention.md").read_text()

ANCHOR = r"#[\w.-]+\w"
CITATION = re.compile(rf"docs/(\w+)\.md((?:{ANCHOR}(?:, {ANCHOR})*)?)")
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]+)?\)")


def relative(path):
    return path.relative_to(ROOT).as_posix()


def texts():
    """Files under version control, or of a source distribution, that may contain citations (no data files)."""
    try:
        listed = subprocess.run(
            ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=True
        ).stdout
        paths = [ROOT / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in ROOT.rglob("*") if path.is_file() and "build" not in path.parts]
    kinds = {".py", ".pyi", ".h", ".cuh", ".cu", ".cpp", ".in", ".txt", ".toml", ".md", ".sh", ".yml", ".yaml", ""}
    return [path for path in paths if path.suffix in kinds and path.is_file() and path != Path(__file__).resolve()]


def anchors(page):
    """Anchors of a page: explicit ones, and those that GitHub makes from headings."""
    text = page.read_text()
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)"', text))


def test_every_citation_is_there():
    missing, found = [], 0
    for path in texts():
        for page, places in CITATION.findall(path.read_text(errors="replace")):
            found += 1
            target = ROOT / "docs" / f"{page}.md"
            known = anchors(target) if target.exists() else set()
            wanted = [place.strip().removeprefix("#") for place in places.split(",") if place]
            if not target.exists() or not known.issuperset(wanted):
                missing.append(f"{relative(path)}: docs/{page}.md{places}")
    assert missing == []
    assert found > 50, "the pattern no longer finds citations"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page):
    for target, place in LINK.findall(re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        if place and file.suffix == ".md":
            assert place.removeprefix("#") in anchors(file), f"{target}{place}"


def test_nothing_is_cited_that_is_not_here():
    outside = re.compile(
        r"\b(SPEC|DECISIONS?|STYLE|API) \d|\b(SPEC|DECISIONS|STYLE|API)\.md|gpu_kernels|\bdesign/\w+\.md"
    )
    found = [relative(path) for path in texts() if outside.search(path.read_text(errors="replace"))]
    assert found == []


def test_windows_are_those_of_the_formula():
    table = ATTENTION.split("Windows in tokens for the slopes")[1].split("\n\n")[1]
    rows = re.findall(r"^\|(.*)\|$", table, re.M)
    bounds = [[float(cell) for cell in row.split("|")] for row in rows[2:]]
    model = Andromeda(num_tokens=8, max_seq_len=8, dim=16, depth=1, dim_head=8, heads=24)
    slopes = sorted((slope for slope in model.config.alibi_slopes if slope > 0), reverse=True)
    assert len(slopes) == 12
    for bound, *windows in bounds:
        assert windows == [math.ceil((2 * bound + 24 * math.log(2)) / slope) for slope in slopes]
    assert [float(cell) for cell in rows[0].split("|")[1:]] == pytest.approx(slopes, abs=5e-4, rel=8e-3)


# ---- the way of key_start -------------------------------------------------------------------------------------------

WALK = re.sub(r"\s+", " ", ATTENTION.split("**How `key_start` travels.**")[1].split("\n\n")[0])
# A name, and the file that the page says it is in: `Decoder.forward` ... (`andromeda/model.py`).
STOPS = re.findall(r"`([\w.:]+)(?:\([^`]*\))?` \((`[^`]+`)\)|`(\w+)` in (`[^`]+`)", WALK)
STOPS = [(a or c, (b or d).strip("`")) for a, b, c, d in STOPS]


def test_the_walk_has_stops():
    assert len(STOPS) >= 8
    assert {name.rpartition(".")[2] for _, name in STOPS} >= {"py", "cpp", "h", "cuh"}


@pytest.mark.parametrize("name, file", STOPS, ids=str)
def test_every_stop_of_the_walk_is_where_the_page_says(name, file):
    text = (ROOT / file).read_text()
    last = re.split(r"\.|::", name)[-1]
    assert "key_start" in text
    if last == "key_start":
        assert re.search(r"\bkey_start;", text), "a field"
    else:
        assert re.search(rf"(def|class|struct|Row|bool|m\.def\(\") ?{last}\b", text), f"{last} is not defined in {file}"


def test_the_walk_is_the_way_of_a_call():
    """The Python functions of the page receive key_start, in the order of the page, when a model is called."""
    files = {str(ROOT / file): file for _, file in STOPS if file.endswith(".py")}
    met = []

    def watch(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename in files and frame.f_locals.get("key_start") is not None:
            met.append((code.co_name, files[code.co_filename]))

    model = Andromeda(num_tokens=8, max_seq_len=8, dim=16, depth=1, dim_head=8, heads=2, alibi_num_heads=1)
    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        model(torch.tensor([[1, 2, 3, 4]]), key_start=torch.tensor([[0, 0, 2, 2]]))
    finally:
        sys.setprofile(before)
    wanted = [(re.split(r"\.", name)[-1], file) for name, file in STOPS if file.endswith(".py")]
    wanted = [stop for stop in wanted if stop[0] != "begin"]  # only calls with a cache
    position = 0
    for stop in wanted:
        assert stop in met[position:], f"{stop} is not met after {met[:position][-1:]}"
        position = met.index(stop, position) + 1
