"""What there is to choose from, read from the pieces themselves and from what installed packages add."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core import plugins
from ..core.errors import ConfigError, nearest
from .kinds import KINDS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..runs.result import Result


@dataclass(frozen=True)
class Row:
    """One thing to choose: its name, the first paragraph of its docstring, its settings with their defaults."""

    name: str
    about: str
    settings: str = ""


def tables(kind: str | None) -> Iterator[RenderableType]:
    """What `perpetune list` prints: what this kind is, its rows, and how to use it. Without a kind, all kinds in a line
    each, and the recipes.

    Raises:
        ConfigError: an unknown kind.
    """
    from rich.table import Table
    from rich.text import Text

    if kind is None:
        yield Text("A recipe fills four slots: a tuner, rules, a consolidation and a head.\n")
        overview = Table("perpetune list …", "what it is", box=None)
        for name, each in KINDS.items():
            overview.add_row(name, each.about)
        yield overview
        yield Text()
    kind = kind or "recipes"
    rows = catalogue(kind)
    yield Text(f"{kind}: {KINDS[kind].about}\n")
    table = Table("name", "what it is", "settings", box=None)
    for row in rows:
        # as Text, for which [ ] are no markup
        table.add_row(*map(Text, (row.name, row.about, row.settings)))
    yield table
    yield Text(f"\n{KINDS[kind].use}")


def catalogue(kind: str) -> list[Row]:
    """All of a kind (a name in `KINDS`): perpetune's own, then those of installed packages.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"there is no list of `{kind}`: {nearest(kind, KINDS)}")
    if kind == "streams":
        from ..streams import BUILTINS

        return [Row(name, stream.about) for name, stream in BUILTINS.items()]
    if kind == "benchmarks":
        from ..streams.benchmarks import BENCHMARKS

        return [Row(name, f"{b.summary} ({b.paper})", "data") for name, b in BENCHMARKS.items()]
    own, bases = _PIECES[kind]()
    rows = [_row(name, piece) for name, piece in own.items()]
    for point in plugins.installed(plugins.PIECES if bases else plugins.RECIPES):
        try:
            piece = plugins.load(point)
            if bases and not (inspect.isclass(piece) and issubclass(piece, bases)):
                continue  # of another slot
            plugins.with_installed(own, point.name, *bases, group=point.group)  # its name is nobody else's
        except ConfigError as error:
            rows.append(Row(point.name, str(error)))
            continue
        row = _row(point.name, piece)
        rows.append(Row(row.name, f"{row.about} (from the package {plugins.package(point)})".lstrip(), row.settings))
    return rows


def _row(name: str, piece: Any) -> Row:
    inherited = _inherited(piece) if inspect.isclass(piece) else set()
    settings = [
        f"{p.name}={p.default!r}" if p.default is not p.empty else p.name
        for p in inspect.signature(piece).parameters.values()
        if p.name not in inherited and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    return Row(name, " ".join((inspect.getdoc(piece) or "").split("\n\n")[0].split()), ", ".join(settings))


def _inherited(piece: type) -> set[str]:
    """What every configuration of peft has besides."""
    from peft import PeftConfig

    return set(inspect.signature(PeftConfig).parameters) if issubclass(piece, PeftConfig) else set()


def _recipes() -> tuple[dict[str, Any], tuple[type, ...]]:
    from ..recipes import RECIPES

    return RECIPES, ()


def _tuners() -> tuple[dict[str, Any], tuple[type, ...]]:
    from peft import PeftConfig

    from .. import tuners

    own = {**tuners.TUNERS, **{name: getattr(tuners, name) for name in tuners.OWN_CONFIGS}}
    return own, (tuners.Tuner, PeftConfig)


def _rules() -> tuple[dict[str, Any], tuple[type, ...]]:
    from ..rules import RULES, Rule

    return {**RULES}, (Rule,)


def _consolidations() -> tuple[dict[str, Any], tuple[type, ...]]:
    from ..consolidation import CONSOLIDATIONS, Consolidation

    return {**CONSOLIDATIONS}, (Consolidation,)


def _routers() -> tuple[dict[str, Any], tuple[type, ...]]:
    from ..routers import ROUTERS, Router

    return {**ROUTERS}, (Router,)


def _heads() -> tuple[dict[str, Any], tuple[type, ...]]:
    from ..heads import HEADS, Head

    return {**HEADS}, (Head,)


# perpetune's own of each kind, and the base classes of an installed piece of it
_PIECES: dict[str, Callable[[], tuple[dict[str, Any], tuple[type, ...]]]] = {
    "recipes": _recipes,
    "tuners": _tuners,
    "rules": _rules,
    "consolidations": _consolidations,
    "routers": _routers,
    "heads": _heads,
}


def log_table(result: Result) -> Table:
    """The history of a run: one line a task, and one where a task was taken out, or was not kept."""
    from rich.table import Table

    table = Table(title=str(result.path), box=None)
    for column in ("#", "task", "steps", "seconds", "disk", "then", "now", "promises"):
        table.add_column(column)
    times = {e["task"]: e for e in result.journal if e["event"] in ("task", "revert")}
    reading = result.readings[0] if result.readings else None
    matrix = result.matrix(*reading).values if reading else None
    for index, commit in enumerate(result.commits[1:]):
        task = commit.manifest["task"]
        facts = times.get(task, {})
        held = [g["holds"] for g in commit.manifest["guarantees"] if g["holds"] is not None]
        then, now = "–", "taken out" if task in result.reverted else "–"
        if matrix is not None and task in result.tasks:
            j = result.tasks.index(task)
            then, now = (f"{100 * x:.1f}" if x == x else "–" for x in (matrix[j, j], matrix[len(matrix) - 1, j]))
        table.add_row(
            str(index + 1),
            task,
            str(facts.get("steps", "")),
            f"{(facts.get('train_seconds') or 0) + (facts.get('evaluate_seconds') or 0):.1f}",
            f"{(facts.get('disk_bytes') or 0) / 1e6:.1f} MB",
            then,
            now,
            "–" if not held else "kept" if all(held) else "BROKEN",
        )
    for number, commit in enumerate(result.history):
        if "undoes" in commit.manifest:
            why = "; ".join(commit.manifest["reasons"])
            table.add_row(
                "–", commit.manifest["undoes"], "", "", "", "–", f"not kept (commit {number - 1}): {why}", "–"
            )
    return table
