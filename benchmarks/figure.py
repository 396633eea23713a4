"""The figure of scaling.py's results: time and memory over sequence lengths, as an SVG file without dependencies.

Text and lines have colours that are legible on white and on black, since the background is transparent and a page that
shows the file may be either. The same data give the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from xml.sax.saxutils import escape

# Contrast with white and with GitHub's dark grey: at least 4 for text, 3 for curves.
GREY = "#768088"
COLOURS = {
    "andromeda": ("this library", "#2f7de0"),
    "sdpa, bias tensor": ("SDPA, bias tensor", "#d4611b"),
    "flex_attention": ("FlexAttention", "#a35bd6"),
    "flex_attention, windows": ("FlexAttention, windows", "#1b9382"),
}
WIDTH, HEIGHT = 970, 396
TOP, BOTTOM = 62, 340  # edges of both panels
PANELS = ((66, 306), (540, 780))  # left and right edges; the names of curves are to the right
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@dataclasses.dataclass(frozen=True)
class Axis:
    """A logarithmic axis: values from `low` to `high` between two positions in the picture."""

    low: float
    high: float
    first: float
    last: float

    def place(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.first + share * (self.last - self.first)


def scaling(data: dict) -> str:
    """The SVG text of a JSON file of scaling.py."""
    rows, facts = data["rows"], data["environment"]
    title = f"A training pass of attention over sequence lengths: time and peak memory on {device_of(facts)}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" font-family="{FONT}" font-size="13" fill="{GREY}">',
        f"<title>{escape(title)}</title>",
        *panel(PANELS[0], data, "median_ms", "Time of a pass, forward and backward"),
        *panel(PANELS[1], data, "peak_memory_mb", "Peak memory of the pass, beyond its inputs"),
        text(14, HEIGHT - 8, caption(rows, facts), size=12),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def device_of(facts: dict) -> str:
    return facts.get("gpu") or f"{facts['processor']}, {facts['threads']} threads"


def caption(rows: list[dict], facts: dict) -> str:
    torch = facts["torch"].partition("+")[0]
    return (
        f"{device_of(facts)}, {rows[0]['dtype']}, torch {torch}. Causal attention with ALiBi on 12 of 24 heads, "
        "one key head, head_dim 128."
    )


def milliseconds(value: float) -> str:
    return f"{value / 1000:g} s" if value >= 1000 else f"{value:g} ms"


def mebibytes(value: float) -> str:
    return f"{value / 1024:g} GiB" if value >= 1024 else f"{value:g} MiB"


def tokens(value: int) -> str:
    return f"{value // 1024}k" if value % 1024 == 0 else str(value)


UNITS: dict[str, Callable[[float], str]] = {"median_ms": milliseconds, "peak_memory_mb": mebibytes}


def panel(edges: tuple[float, float], data: dict, column: str, title: str) -> list[str]:
    """One picture: grid, curves, and the names of the curves at their ends."""
    rows = [row for row in data["rows"] if row.get(column)]
    lengths = sorted({row["seqlen"] for row in rows})
    values = [row[column] for row in rows]
    ticks = ticks_around(min(values), max(values), 4 if column == "peak_memory_mb" else 10)
    x, y = Axis(lengths[0], lengths[-1], *edges), Axis(ticks[0], ticks[-1], BOTTOM, TOP)
    parts = [text(edges[0] - 52, TOP - 38, title, weight="600", size=14)]
    for tick in ticks:
        parts.append(line(edges[0], y.place(tick), edges[1], y.place(tick), opacity=0.3))
        parts.append(text(edges[0] - 8, y.place(tick) + 4, UNITS[column](tick), anchor="end", size=11))
    for length in lengths:
        parts.append(line(x.place(length), BOTTOM, x.place(length), BOTTOM + 5))
        parts.append(text(x.place(length), BOTTOM + 19, tokens(length), anchor="middle", size=11))
    parts.append(text(edges[1] + 22, BOTTOM + 19, "tokens", size=11))
    ends = []
    for name, (label, colour) in reversed(COLOURS.items()):  # this library's curve lies above the others
        curve = [row for row in rows if row["backend"] == name]
        if not curve:
            continue
        points = [(x.place(row["seqlen"]), y.place(row[column])) for row in curve]
        if column == "median_ms":  # the range from p20 to p80
            low, high = ([(x.place(row["seqlen"]), y.place(row[p])) for row in curve] for p in ("p20_ms", "p80_ms"))
            parts.append(f'<polygon points="{joined(low + high[::-1])}" fill="{colour}" fill-opacity="0.25"/>')
        width = 3 if name == "andromeda" else 2
        parts.append(f'<polyline points="{joined(points)}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{width + 0.5:.1f}" fill="{colour}"/>' for a, b in points]
        ends.append((*points[-1], label, colour, why_it_ends(name, data["notes"])))
    return parts + names_of(ends, edges[1])


def why_it_ends(name: str, notes: list[str]) -> str:
    """The reason in a few words, from the note of scaling.py; empty if there is none."""
    for note in notes:
        found = re.search(rf"(?:^|of ){re.escape(name)} ends before (\d+) tokens: (.*)", note)
        if found:
            length, reason = tokens(int(found[1])), found[2]
            if re.search("memory|GiB|alloc", reason):
                return f"{length}: out of memory"
            return f"{length}: too slow" if "would take" in reason else f"{length}: failed"
    return ""


def ticks_around(low: float, high: float, step: int) -> list[float]:
    """Powers of `step` that enclose the values: the ends of an axis and the lines between."""
    first, last = math.floor(math.log(low, step) + 1e-9), math.ceil(math.log(high, step) - 1e-9)
    return [float(step) ** power for power in range(first, max(last, first + 1) + 1)]


def names_of(ends: list[tuple[float, float, str, str, str]], right: float) -> list[str]:
    """Names of the curves. A curve that reaches the right edge has its name next to it, apart from other names. A curve
    that ends earlier has its name and the reason above and to the left of its end, where rising curves leave room."""
    parts = []
    lowest = math.inf
    for x, y, label, colour, reason in sorted(ends, key=lambda end: -end[1]):
        if x < right - 1:
            parts.append(text(x - 4, y - 23, label, anchor="end", colour=colour, weight="600"))
            parts.append(text(x - 4, y - 9, reason, anchor="end", colour=colour, size=11))
            continue
        place = min(y + 4, lowest - 16)
        lowest = place
        parts.append(text(x + 11, place, label, colour=colour, weight="600"))
    return parts


def joined(points: list[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def line(x1: float, y1: float, x2: float, y2: float, *, opacity: float = 1.0) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{GREY}" stroke-opacity="{opacity:g}"/>'


def text(
    x: float, y: float, words: str, *, anchor: str = "start", colour: str = GREY, weight: str = "400", size: int = 13
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}"'
    style = f'text-anchor="{anchor}" font-weight="{weight}" font-size="{size}" fill="{colour}"'
    return f"<text {place} {style}>{escape(words)}</text>"
