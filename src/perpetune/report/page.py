"""One self-contained HTML page per run and per comparison: no script, nothing loaded from anywhere."""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..core.errors import RunError
from . import charts, heat_maps, losses, routes, segments, summary, svg, tables, words
from .data import Record, ReportData, read_records

SEED_CELLS = 40_000  # matrices of single seeds are left out of a page that would hold more cells than this
SHOWN_FLIPS = 60
SHOWN_PROMISES = 400
_IMAGE = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=\s]+")


def write_report(path: Path, data: ReportData) -> Path:
    """Write the page that shows `data` to `path` (`index.html` in it, where it is a folder); returns the file.

    Raises:
        RunError: there are no results, one of them is malformed, or the file cannot be written.
    """
    path = Path(path)
    path = path / "index.html" if path.is_dir() or not path.suffix else path
    return write_text(path, render(data))


def write_picture(path: Path, records: Sequence[Any], title: str = "", scenario: str = "class") -> Path:
    """Write recipes ranked by final accuracy, with forgetting, as an .svg file that stands alone; returns the file.

    Raises:
        RunError: as `write_report`.
    """
    group = summary.groups(read_records(records), scenario)[0]
    bars = summary.task_bars(group.rows[0]) if group.by_task else summary.recipe_bars(group)
    title = title or f"Final accuracy, {group.title}"
    return write_text(Path(path), bars_svg(bars, title))


def bars_svg(bars: Sequence[charts.Bar], title: str, guess: float | None = None) -> str:
    """The bar picture as the text of an .svg file: label, bar, final accuracy, what was forgotten."""
    width, right, row, top = 760, 170, 30, 46
    left = 32 + max((int(7.2 * len(svg.short(bar.label, 30)) + 6 * len(bar.badge)) for bar in bars), default=0)
    marks = [svg.tag("text", title, class_="strong", x=16, y=26, style="font-size:15px")]
    for i, bar in enumerate(bars):
        y = top + i * row
        badge = svg.tag("tspan", f"  {bar.badge}", class_="soft small") if bar.badge else ""
        marks.append(svg.tag("text", svg.short(bar.label, 30), badge, x=16, y=y + 14))
        inner = charts.bar_marks(bar, guess=guess)
        span = width - left - right
        marks.append(svg.tag("svg", inner, x=left, y=y, width=span, height=18, overflow="visible"))
        spread = "" if bar.spread is None else f" ± {100 * bar.spread:.1f}"
        now = "–" if bar.now is None else f"{100 * bar.now:.1f}"
        value = (svg.tag("tspan", now, class_="strong"), svg.tag("tspan", spread, class_="soft small"))
        marks.append(svg.tag("text", *value, x=width - right + 12, y=y + 14))
        marks.append(svg.tag("text", bar.note, class_="soft end", x=width - 16, y=y + 14))
    foot = top + len(bars) * row + 16
    legend = "of 100 test examples right after the last task; pale: right when it was learned, lost since"
    marks.append(svg.tag("text", legend, class_="soft small", x=16, y=foot))
    return svg.standalone(Markup("").join(marks), width, foot + 16, title)


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; free space or choose another place") from error
    return path


def render(data: ReportData) -> str:
    """The page as text.

    Raises:
        RunError: there are no results, or one of them is malformed.
    """
    records = read_records(data.records)
    groups = summary.groups(records, data.scenario, data.headline)
    headline, notes = words.verdict(groups[0])
    promises = tables.promises(records)
    broken = tables.broken(records)
    flips = list(data.flips or ())
    return _template().render(
        data=data,
        groups=groups,
        headline=headline,
        notes=notes,
        broken=broken[: tables.SHOWN_BROKEN],
        broken_count=len(broken),
        routes=routes.routes(data.routes),
        confusions=routes.MOST_TASKS,
        strips=segments.strips_svg(data.drift) if data.drift else None,
        losses=losses.losses_svg(data.losses) if data.losses else None,
        sizes=dict(zip(records[0].tasks, records[0].test_sizes, strict=False)),
        promises=promises,
        measured=_measured(records),
        costs=tables.costs_by_recipe(records),
        task_costs=tables.costs_by_task(records),
        flips=[_flip(example) for example in flips[:SHOWN_FLIPS]],
        flips_count=len(flips),
        formulas=dict(data.formulas) or records[0].formulas,
        shown_metrics=_shown(records),
        seed_matrices=sum(len(r.tasks) ** 2 for r in records) <= SEED_CELLS,
        chart_style=Markup(svg.CHART_STYLE),
        light=svg.theme(svg.LIGHT),
        dark=svg.theme(svg.DARK),
    )


@functools.lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        charts=charts, heat_maps=heat_maps, summary=summary, words=words, Stat=summary.Stat, short=svg.short
    )
    return environment.get_template("report.html.j2")


def _measured(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Every single measurement, where there are not too many to read."""
    every = tables.unique_promises(records)
    if len(every) > SHOWN_PROMISES:
        return []
    return [{"record": record, "promise": promise, "write": words.figure} for record, promise in every]


def _shown(records: Sequence[Record]) -> list[words.Metric]:
    return [m for m in words.METRICS if m.always or any(r.figures.get(m.key) is not None for r in records)]


def _flip(example: Mapping[str, Any]) -> dict[str, str]:
    """An example for display; an image that is not embedded data is never shown, since it would be fetched."""
    image = str(example.get("image") or "")
    text = svg.short(svg.clean(example.get("text") or ""), 400)
    shown = {key: svg.clean(example.get(key, "")) for key in ("task", "label", "was", "now")}
    return {**shown, "text": text, "image": image if _IMAGE.fullmatch(image) else ""}
