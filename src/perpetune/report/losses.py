"""The training loss, task after task, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .svg import short, tag

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 220, 52, 12, 14, 34
COLOURS = 6  # of the theme
NAMED = 12  # tasks whose names are written below their curves


def losses_svg(tasks: Sequence[Mapping[str, Any]]) -> Markup:
    """One curve a task, one behind the other, over optimizer steps.

    Args:
        tasks: {task, steps, points: (step, loss)}, of those that were trained.
    """
    total = sum(t["steps"] for t in tasks)
    values = [loss for t in tasks for _, loss in t["points"]]
    low, high = min(0.0, *values), max(values)
    high = high if high > low else low + 1.0

    def at(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / total
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    marks = [tag("title", "Training loss over optimizer steps, one curve a task")]
    for level in _levels(low, high):
        y = at(0, level)[1]
        marks.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y))
        marks.append(tag("text", f"{level:g}", class_="soft small end", x=LEFT - 6, y=y + 4))
    before = 0
    for i, t in enumerate(tasks):
        points = " ".join("{:.1f},{:.1f}".format(*at(before + step, loss)) for step, loss in t["points"])
        last = t["points"][-1][1]
        hover = tag("title", f"loss of {t['task']}, step 1 to {t['steps']}: {last:.4g} at the end")
        marks.append(tag("polyline", hover, class_="line", points=points, stroke=f"var(--task-{i % COLOURS})"))
        if before:
            x = at(before, 0)[0]
            marks.append(tag("line", class_="guess", x1=x, x2=x, y1=TOP, y2=HEIGHT - BOTTOM))
        if len(tasks) <= NAMED:
            x = at(before + t["steps"] / 2, 0)[0]
            letters = max(1, int((WIDTH - LEFT) / len(tasks) / 6.5))
            marks.append(tag("text", short(t["task"], letters), class_="small mid", x=x, y=HEIGHT - BOTTOM + 15))
        before += t["steps"]
    marks.append(tag("text", f"{total} optimizer steps", class_="soft small end", x=WIDTH - RIGHT, y=HEIGHT - 4))
    return tag("svg", *marks, class_="strips", role="img", width="100%", viewBox=f"0 0 {WIDTH} {HEIGHT}")


def _levels(low: float, high: float) -> list[float]:
    """Round figures between them, three to seven."""
    rough = (high - low) / 4
    scale = 10 ** math.floor(math.log10(rough))
    step = next(f * scale for f in (1, 2, 5, 10) if f * scale >= rough)
    return [round(k * step, 10) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
