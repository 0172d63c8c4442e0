"""The pictures of the report as inline SVG: bars, lines, scatter. Accuracies are fractions from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from .data import Matrix
from .heat_maps import MOST_CELLS, sampled
from .svg import short, tag

NAMED_LINES = 12  # more lines than this are drawn alike: nobody can tell them apart by colour
NUMBERED_LINES = 15
NAMED_POINTS = 40  # more labels than this would lie on top of each other
MOST_LINES, MOST_STEPS = 50, 200  # lines, and points of each, of the picture over time


@dataclass(frozen=True)
class Bar:
    """One row of a bar picture.

    Attributes:
        label: the recipe or task.
        now: accuracy at the end; None where it was not measured.
        learned: accuracy right after learning, drawn behind `now`; None where unknown.
        spread: standard deviation over seeds of `now`.
        role: "method", "control" or "bound".
        badge: what kind of control, one or two words.
        note: shown beside the bar ("forgot 77").
    """

    label: str
    now: float | None
    learned: float | None = None
    spread: float | None = None
    role: str = "method"
    badge: str = ""
    note: str = ""


@dataclass(frozen=True)
class Point:
    """One mark of the scatter: accuracy right after learning (x) and at the end (y)."""

    label: str
    learned: float
    kept: float
    role: str = "method"


def share(value: float) -> str:
    """A fraction as a width in percent, clipped to the picture."""
    return f"{100 * min(max(value, 0.0), 1.0):.2f}%"


def bar_marks(bar: Bar, height: int = 18, guess: float | None = None) -> Markup:
    """Inside of one bar, as wide as its container: what is kept, what was lost, spread, and chance level."""
    marks = [tag("rect", class_="track", width="100%", height=height, rx=3)]
    if bar.learned is not None and bar.now is not None and bar.learned > bar.now:
        marks.append(tag("rect", class_="lost", width=share(bar.learned), height=height, rx=3))
    if bar.now is not None:
        marks.append(tag("rect", class_=bar.role, width=share(bar.now), height=height, rx=3))
        if bar.spread:
            low, high, middle = share(bar.now - bar.spread), share(bar.now + bar.spread), height / 2
            marks.append(tag("line", class_="whisker", x1=low, x2=high, y1=middle, y2=middle))
            for end in (low, high):
                marks.append(tag("line", class_="whisker", x1=end, x2=end, y1=middle - 4, y2=middle + 4))
    if guess is not None:
        marks.append(tag("line", class_="guess", x1=share(guess), x2=share(guess), y1=-2, y2=height + 2))
    return Markup("").join(marks)


def bar_svg(bar: Bar, guess: float | None = None) -> Markup:
    """One bar as an inline picture of full width."""
    now = "not measured" if bar.now is None else f"{100 * bar.now:.1f} of 100 right"
    before = "" if bar.learned is None else f", right after learning {100 * bar.learned:.1f}"
    title = tag("title", f"{bar.label}: {now}{before}")
    return tag("svg", title, bar_marks(bar, guess=guess), class_="bar", role="img", width="100%", height=18)


def change_svg(label: str, value: float | None, low: float, high: float, spread: float | None = None) -> Markup:
    """One signed bar of points lost (to the right) or gained (to the left), on the range low <= 0 <= high."""
    range_ = (high - low) or 1.0
    zero = -low / range_
    marks = [tag("title", f"{label}: " + ("undefined" if value is None else f"{100 * value:.1f} points forgotten"))]
    if value is not None:
        start, end = sorted((zero, zero + value / range_))
        kind = "fall" if value > 0 else "good"
        marks.append(tag("rect", class_=kind, x=share(start), width=share(end - start), height=14, y=2, rx=2))
        if spread:
            at = zero + value / range_
            low_, high_ = share(at - spread / range_), share(at + spread / range_)
            marks.append(tag("line", class_="whisker", x1=low_, x2=high_, y1=9, y2=9))
    marks.append(tag("line", class_="grid", x1=share(zero), x2=share(zero), y1=0, y2=18))
    return tag("svg", *marks, class_="bar", role="img", width="100%", height=18)


def small_bar_svg(value: float) -> Markup:
    """A thin bar beneath a figure in a table; decoration, so hidden from screen readers."""
    mark = tag("rect", class_="control", width=share(value), height=4, rx=2)
    return tag("svg", mark, class_="bar", width="100%", height=4, aria_hidden="true")


def lines_svg(matrix: Matrix, tasks: Sequence[str], title: str) -> Markup:
    """Accuracy of every task from the moment it is learned, and the mean over the tasks learned so far (bold)."""
    width, height, left, right, top, bottom = 340, 220, 32, 14, 16, 34
    size = len(tasks)
    step = (width - left - right) / max(size - 1, 1)
    span = height - top - bottom

    def at(i: int, value: float) -> tuple[float, float]:
        return (left + i * step if size > 1 else left + (width - left - right) / 2, top + span * (1 - value))

    marks: list[Markup] = [tag("title", title)]
    for level in (0, 25, 50, 75, 100):
        y = top + span * (1 - level / 100)
        marks.append(tag("line", class_="grid", x1=left, x2=width - right, y1=y, y2=y))
        marks.append(tag("text", level, class_="soft small end", x=left - 6, y=y + 4))
    for i in sampled(size, 10):
        marks.append(tag("text", i + 1, class_="soft small mid", x=at(i, 0)[0], y=height - bottom + 15))
    marks.append(
        tag("text", "number of tasks learned", class_="soft small mid", x=(left + width - right) / 2, y=height - 4)
    )
    starts: list[Markup] = []
    steps = sorted({*sampled(size, MOST_STEPS), size - 1})
    for j in sampled(size, MOST_LINES) if size > MOST_CELLS else range(size):
        name, since = tasks[j], sorted({j, *(i for i in steps if i > j)})
        column = [at(i, value) for i in since for value in [matrix[i][j]] if value is not None]
        if not column:
            continue
        stroke = f"var(--task-{j % 6})" if size <= NAMED_LINES else "var(--control)"
        dash = " dash" if size <= NAMED_LINES and j >= 6 else ""
        thin = None if size <= NAMED_LINES else 0.55
        hover = tag("title", f"task {j + 1}, {name}")
        marks.append(tag("polyline", hover, class_="line" + dash, points=_path(column), stroke=stroke, opacity=thin))
        x, y = column[0]
        starts.append(tag("circle", hover, cx=x, cy=y, r=3.4 if thin is None else 2.2, fill=stroke))
        if size <= NUMBERED_LINES:
            starts.append(tag("text", j + 1, class_="small strong mid", x=x, y=y - 6 if y > top + 8 else y + 14))
    if size > 1:
        means = [(i, [v for v in matrix[i][: i + 1] if v is not None]) for i in steps]
        path = [at(i, sum(seen) / len(seen)) for i, seen in means if len(seen) == i + 1]
        hover = tag("title", "mean over the tasks learned so far")
        marks.append(tag("polyline", hover, class_="mean", points=_path(path)))
    return tag("svg", *marks, *starts, class_="panel", role="img", viewBox=f"0 0 {width} {height}")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def scatter_svg(points: Sequence[Point], title: str, bound: float | None = None) -> Markup:
    """How well things were learned against how well they are kept; on the diagonal nothing was forgotten."""
    width, side, left, top = 476, 300, 40, 14
    right, bottom = left + side, top + side
    values = [v for p in points for v in (p.kept, p.learned)] + ([] if bound is None else [bound])
    low = max(0.0, math.floor(10 * min(values) - 0.3) / 10)
    high = min(1.0, math.ceil(10 * max(values) + 0.3) / 10)

    def at(learned: float, kept: float) -> tuple[float, float]:
        return left + side * (learned - low) / (high - low), bottom - side * (kept - low) / (high - low)

    marks: list[Markup] = [tag("title", title)]
    tenths = range(round(10 * low), round(10 * high) + 1)
    for tenth in tenths if len(tenths) <= 7 else [t for t in tenths if t % 2 == 0]:
        x, y = at(tenth / 10, tenth / 10)
        marks.append(tag("line", class_="grid", x1=left, x2=right, y1=y, y2=y))
        marks.append(tag("line", class_="grid", x1=x, x2=x, y1=top, y2=bottom))
        marks.append(tag("text", 10 * tenth, class_="soft small end", x=left - 6, y=y + 4))
        marks.append(tag("text", 10 * tenth, class_="soft small mid", x=x, y=bottom + 15))
    marks.append(tag("line", class_="guess", x1=left, x2=right, y1=bottom, y2=top))
    middle = top + side / 2
    marks.append(tag("text", "learned: right after each task →", class_="soft mid", x=left + side / 2, y=bottom + 36))
    turn = f"rotate(-90 11 {middle:.0f})"
    marks.append(tag("text", "kept: at the end →", class_="soft mid", x=11, y=middle, transform=turn))
    if bound is not None:
        y = at(low, bound)[1]
        marks.append(tag("line", class_="whisker", x1=left, x2=right, y1=y, y2=y))
        marks.append(tag("text", "all at once (upper bound)", class_="small", x=left + 5, y=y - 5))
    ranked = sorted(points, key=lambda p: -p.kept)
    places = [at(p.learned, p.kept) for p in ranked]
    heights = _spread([y for _, y in places], top + 6, bottom)
    for p, (x, y), level in zip(ranked, places, heights, strict=True) if len(points) <= NAMED_POINTS else ():
        path = f"{x:.1f},{y:.1f} {right + 4},{level:.1f} {right + 10},{level:.1f}"
        marks.append(tag("polyline", class_="leader", points=path))
        marks.append(tag("text", short(p.label, 17), class_="small", x=right + 13, y=level + 3.5))
    for p, (x, y) in zip(ranked, places, strict=True):
        hover = tag("title", f"{p.label}: learned {100 * p.learned:.1f}, kept {100 * p.kept:.1f}")
        if p.role == "control":
            marks.append(tag("rect", hover, class_="control", x=x - 4.5, y=y - 4.5, width=9, height=9))
        else:
            marks.append(tag("circle", hover, class_=p.role, cx=x, cy=y, r=5.0))
    return tag("svg", *marks, class_="scatter", role="img", viewBox=f"0 0 {width} {bottom + 44}")


def _spread(wanted: Sequence[float], low: float, high: float) -> list[float]:
    """Heights of labels: in order, as near as possible to the wanted ones (ascending), none on top of another."""
    gap = min(14.0, (high - low) / max(len(wanted) - 1, 1))
    placed: list[float] = []
    for i, y in enumerate(wanted):
        y = min(y, high - gap * (len(wanted) - 1 - i))
        placed.append(max(y, placed[-1] + gap if placed else low))
    return placed
