"""Draws docs/results/sparsity.svg: what is kept of every task's delta, against accuracy and collisions.

python docs/make_sparsity.py "Omniglot" runs/sparse-omniglot/results.json "Text" runs/sparse-text/results.json
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from perpetune.metrics.records import ResultRecord, read_records
from perpetune.report.svg import standalone, tag

KEPT, MET = "entries kept of a task's delta", "kept entries in which tasks meet"
HEADS = {"ridge_refresh": "task-0", "ridge": "task-1", "ncm_refresh": "task-2"}
WIDE, HIGH, LEFT, TOP, GAP = 330, 210, 60, 48, 120
Points = list[tuple[float, float]]


def last(record: ResultRecord, name: str) -> float | None:
    found: list[Any] = [g["value"] for g in record.guarantees if g["name"] == name]
    return found[-1] if found else None


def means(records: Sequence[ResultRecord], head: str, value: Any) -> Points:
    """(share kept, mean over seeds of a value) of every `sotu` in the comparison, by the share kept."""
    by_name: dict[str, list[ResultRecord]] = {}
    for r in records:
        if r.recipe.startswith("sotu") and "disjoint" not in r.recipe and r.scenario == "class" and r.head == head:
            by_name.setdefault(r.recipe, []).append(r)
    mean = statistics.mean
    return sorted((mean(last(r, KEPT) or 0 for r in rs), mean(value(r) for r in rs)) for rs in by_name.values())


def control(records: Sequence[ResultRecord], recipe: str, head: str) -> float | None:
    found = [r.final_accuracy for r in records if (r.recipe, r.head, r.scenario) == (recipe, head, "class")]
    return 100 * statistics.mean(found) if found else None


class Panel:
    """Axes with lines: x is the share kept, 0 to 0.35."""

    def __init__(self, x: int, y: int, title: str, low: float, high: float, ticks: Sequence[float]) -> None:
        self.x, self.y, self.low, self.high = x, y, low, high
        self.marks = [tag("text", title, x=x, y=y - 12, class_="strong")]
        for value in ticks:
            h = self.at(0, value)[1]
            self.marks += [tag("line", class_="grid", x1=x, x2=x + WIDE, y1=h, y2=h)]
            self.marks += [tag("text", f"{value:g}", x=x - 8, y=h + 4, class_="end soft")]
        for share in (0, 0.1, 0.2, 0.3):
            self.marks += [tag("text", f"{share:g}", x=self.at(share, low)[0], y=y + HIGH + 18, class_="mid soft")]
        self.marks += [tag("text", "share kept", x=x + WIDE, y=y + HIGH + 18, class_="end soft")]

    def at(self, share: float, value: float) -> tuple[float, float]:
        return self.x + WIDE * share / 0.35, self.y + HIGH * (self.high - value) / (self.high - self.low)

    def line(self, points: Points, colour: str, label: str) -> None:
        at = [self.at(*p) for p in points]
        self.marks += [
            tag(
                "polyline", class_="line", stroke=f"var(--{colour})", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in at)
            )
        ]
        self.marks += [tag("circle", cx=a, cy=b, r=3, fill=f"var(--{colour})") for a, b in at]
        self.label(at[-1][0] + 6, at[-1][1], label)

    def level(self, value: float, label: str) -> None:
        h = self.at(0, value)[1]
        self.marks += [tag("line", class_="grid dash", x1=self.x, x2=self.x + WIDE, y1=h, y2=h, stroke="var(--bound)")]
        self.label(self.x + WIDE + 6, h, label)

    def label(self, x: float, y: float, text: str) -> None:
        self.marks += [tag("text", text, x=x, y=y + 4, class_="small")]


def main(arguments: Sequence[str]) -> None:
    names, files = arguments[::2], arguments[1::2]
    marks: list[Markup] = []
    for row, (name, file) in enumerate(zip(names, files, strict=True)):
        records, y = read_records(Path(file)), TOP + row * (HIGH + 70)
        accuracy = Panel(LEFT, y, f"{name}: final accuracy, %", 40, 80, (40, 50, 60, 70, 80))
        for head, colour in HEADS.items():
            accuracy.line(means(records, head, lambda r: 100 * r.final_accuracy), colour, head)
        for recipe, head in (("soup", "ridge_refresh"), ("joint", "ridge"), ("frozen_ridge", "ridge")):
            value = control(records, recipe, head)
            if value is not None:
                accuracy.level(value, recipe)
        met = Panel(LEFT + WIDE + GAP, y, "share of kept entries in which tasks meet", 0, 0.5, (0, 0.1, 0.2, 0.3, 0.4))
        met.line(means(records, "ridge", lambda r: last(r, MET) or 0.0), "task-0", "random masks")
        met.line([(1 / 5, 0.0)], "task-1", "disjoint")
        marks += [*accuracy.marks, *met.marks]
    width, height = LEFT + 2 * WIDE + 2 * GAP, TOP + len(names) * (HIGH + 70)
    picture = standalone(Markup("").join(marks), width, height, "Sparsity of SoTU against accuracy and collisions")
    (Path(__file__).parent / "results" / "sparsity.svg").write_text(picture)


if __name__ == "__main__":
    main(sys.argv[1:])
