"""Heat maps of T x T shares as inline SVG: the accuracy matrix, and where a router sends the examples of each task.

Beyond `MOST_CELLS` tasks a heat map has one pixel for each value and no figures: a picture of bounded size.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from PIL import Image

from .data import Matrix
from .svg import short, tag

MOST_CELLS = 100  # tasks whose figures are written into a heat map
PIXEL = (58, 138, 208)  # colour where there are no figures: visible on the ground of both themes


def matrix_svg(matrix: Matrix, tasks: Sequence[str], title: str, baseline: Sequence[float | None] = ()) -> Markup:
    """The accuracy matrix (T x T) as a heat map of fixed size: rows are time, columns are tasks, diagonal outlined.

    `baseline` (T): accuracies of the untouched model, a row above.
    """
    history = any(v is not None for row in matrix[:-1] for v in row) or len(tasks) == 1
    rows: list[tuple[int | None, str, Sequence[float | None]]] = [(None, "untouched model", baseline)]
    for step, (name, line) in enumerate(zip(tasks, matrix, strict=True)):
        rows.append((step, f"after {step + 1} {short(name, 13)}", line) if history else (None, "all at once", line))
    rows = [entry for entry in rows if any(v is not None for v in entry[2])]
    return _heat_map(rows, tasks, title, "accuracy on task")


def confusion_svg(shares: Matrix, tasks: Sequence[str], title: str) -> Markup:
    """Shares (T x T) of the examples of each task (row) that go to each task (column); zeros stay empty."""
    rows: list[tuple[int | None, str, Sequence[float | None]]] = [
        (j, f"{j + 1} {short(tasks[j], 20)}", [share or None for share in row]) for j, row in enumerate(shares)
    ]
    return _heat_map(rows, tasks, title, "sent to task")


def _heat_map(
    rows: Sequence[tuple[int | None, str, Sequence[float | None]]], tasks: Sequence[str], title: str, above: str
) -> Markup:
    """Rows (which column is outlined, label, values) of cells, a column for each task."""
    if len(tasks) > MOST_CELLS:
        return _pixels([row for _, _, row in rows], title, above)
    width, height = (46, 34) if len(tasks) <= 6 else (38, 30) if len(tasks) <= 12 else (28, 24)
    left, top = 14 + max((int(6.6 * len(label)) for _, label, _ in rows), default=0), 40
    marks: list[Markup] = [tag("title", title), tag("text", above, class_="soft", x=left, y=14)]
    for j, name in enumerate(tasks):
        hover = tag("title", name)
        marks.append(tag("text", hover, str(j + 1), class_="mid strong", x=left + (j + 0.5) * width, y=32))
    for at, (i, label, row) in enumerate(rows):
        y = top + at * height
        marks.append(tag("text", label, class_="end", x=left - 8, y=y + height / 2 + 4))
        for j, value in enumerate(row):
            if value is not None:
                marks.append(_cell(left + j * width, y, width - 2, height - 2, value))
        if i is not None:
            just = {"x": left + i * width, "y": y, "width": width - 2, "height": height - 2}
            marks.append(tag("rect", class_="just", rx=3, **just))
    size = {"width": left + max(len(tasks) * width, 104) + 2, "height": top + len(rows) * height + 2}
    return tag("svg", *marks, class_="matrix", role="img", **size)


def heat(value: float) -> tuple[float, str]:
    """Opacity of a cell, and the class of the figure on it: each theme has a readable colour for each class."""
    return 0.04 + 0.96 * value, "light" if value < 0.52 else "middle" if value < 0.74 else "heavy"


def _cell(x: float, y: float, width: float, height: float, value: float) -> Markup:
    """Written without `tag`, which takes ten times as long: there are T x T cells, with nothing but numbers in them."""
    opacity, weight = heat(value)
    return Markup(
        f'<rect class="heat" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" '
        f'fill-opacity="{opacity:.2f}"></rect><text class="mid cell {weight}" x="{x + width / 2:g}" '
        f'y="{y + height / 2 + 4:g}">{100 * value:.0f}</text>'
    )


def _pixels(rows: Sequence[Sequence[float | None]], title: str, above: str) -> Markup:
    """A heat map of one pixel for each value (R x T), with numbers of tasks along its edges."""
    values = np.array(rows, dtype=float)
    pixels = np.zeros((*values.shape, 4), dtype=np.uint8)
    pixels[..., :3] = PIXEL
    pixels[..., 3] = np.nan_to_num(255 * (0.04 + 0.96 * values)).round()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    left, top, side = 40, 36, 600
    size, skipped = values.shape[1], values.shape[0] - values.shape[1]  # a row of the untouched model comes first
    where = {"x": left, "y": top, "width": side, "height": side}
    marks = [tag("title", title), tag("text", above, class_="soft", x=left, y=13)]
    marks.append(tag("image", href=picture, preserveAspectRatio="none", **where))
    for i in sampled(size, 10):
        x, y = left + (i + 0.5) * side / size, top + (i + 0.5 + skipped) * side / len(rows)
        marks.append(tag("text", i + 1, class_="soft small mid", x=x, y=top - 6))
        marks.append(tag("text", i + 1, class_="soft small end", x=left - 6, y=y + 4))
    return tag("svg", *marks, class_="pixels", role="img", viewBox=f"0 0 {left + side + 8} {top + side + 8}")


def sampled(size: int, most: int) -> range:
    """Every k-th of `size` positions, so that there are at most `most`."""
    return range(0, size, max(1, -(-size // most)))
