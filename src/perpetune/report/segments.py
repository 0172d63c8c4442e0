"""Where the tasks of a stream without boundaries begin, and where that was detected: a strip for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from .svg import short, tag

WIDTH, LEFT, ROW = 860, 60, 34
COLOURS = 6  # of the theme


def strips_svg(drift: Mapping[str, Any]) -> Markup:
    """A strip of the true segments, and one of those detected, coloured by the task of most of their examples.

    Args:
        drift: see `ReportData.drift`.
    """
    true, found = drift["true"], drift["parts"]
    names = list(dict.fromkeys(segment["task"] for segment in true))
    scale = (WIDTH - LEFT) / max(segment["stop"] for segment in true)
    marks = [tag("title", "True segments above, detected ones below; a tick marks when a boundary was detected")]
    for segment in true:
        marks += _box(segment, names.index(segment["task"]), segment["task"], 0, scale)
    for part in found:
        shared = [min(s["stop"], part["stop"]) - max(s["start"], part["start"]) for s in true]
        most = true[shared.index(max(shared))]["task"]
        marks += _box(part, names.index(most), f"task {part['task'] + 1}", 1, scale)
        x, y = LEFT + scale * part["detected_at"], ROW + ROW - 6
        if part["start"]:
            marks.append(tag("path", class_="whisker", d=f"M{x:.1f} {y}v-8"))
    marks += [tag("text", word, class_="soft", x=0, y=row * ROW + 18) for row, word in enumerate(("true", "found"))]
    marks.append(tag("text", "0", class_="soft small", x=LEFT, y=2 * ROW + 12))
    marks.append(tag("text", f"{true[-1]['stop']} examples", class_="soft small end", x=WIDTH, y=2 * ROW + 12))
    return tag("svg", *marks, class_="strips", role="img", width="100%", viewBox=f"0 0 {WIDTH} {2 * ROW + 18}")


def _box(segment: Mapping[str, Any], task: int, label: str, row: int, scale: float) -> list[Markup]:
    x, y, width = LEFT + scale * segment["start"], row * ROW, scale * (segment["stop"] - segment["start"])
    colour = f"var(--task-{task % COLOURS})"
    where = tag("title", f"{label}: examples {segment['start']} to {segment['stop'] - 1}")
    box = tag("rect", where, x=x, y=y, width=width, height=ROW - 6, fill=colour, stroke=colour, fill_opacity=0.25)
    return [box, tag("text", short(label, max(1, int(width / 6.5))), class_="small", x=x + 4, y=y + 18)]
