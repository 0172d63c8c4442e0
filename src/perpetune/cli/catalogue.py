"""What there is to choose from, read from the pieces themselves."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from rich.table import Table

    from ..runs.result import Result


def catalogue(what: str) -> list[tuple[str, str, str]]:
    """(name, first paragraph of the docstring, settings with defaults) of all recipes, tuners, rules, consolidations,
    routers, heads, streams or published benchmarks.

    Raises:
        ConfigError: an unknown kind.
    """
    from ..consolidation import CONSOLIDATIONS
    from ..heads import HEADS
    from ..recipes import RECIPES
    from ..routers import ROUTERS
    from ..rules import RULES
    from ..streams import BUILTINS
    from ..streams.benchmarks import BENCHMARKS

    kinds: dict[str, Any] = {
        "recipes": RECIPES,
        "tuners": _tuners() if what == "tuners" else {},
        "rules": RULES,
        "consolidations": CONSOLIDATIONS,
        "routers": ROUTERS,
        "heads": HEADS,
        "streams": BUILTINS,
        "benchmarks": BENCHMARKS,
    }
    if what not in kinds:
        raise ConfigError(f"there is no list of `{what}`: {nearest(what, kinds)}")
    rows = []
    for name, piece in kinds[what].items():
        if what == "streams":
            rows.append((name, piece.about, ""))
            continue
        if what == "benchmarks":
            rows.append((name, f"{piece.summary} ({piece.paper})", "data"))
            continue
        inherited = _inherited(piece) if what == "tuners" else ()
        settings = [
            f"{p.name}={p.default!r}" if p.default is not p.empty else p.name
            for p in inspect.signature(piece).parameters.values()
            if p.name not in inherited
        ]
        text = inspect.getdoc(piece)
        rows.append((name, " ".join((text or "").split("\n\n")[0].split()), ", ".join(settings)))
    return rows


def _inherited(piece: Any) -> set[str]:
    """What every configuration of peft has besides."""
    from peft import PeftConfig

    return set(inspect.signature(PeftConfig).parameters) if issubclass(piece, PeftConfig) else set()


def _tuners() -> dict[str, Any]:
    """Ours; any configuration of peft may stand in their place."""
    from .. import tuners

    return {**tuners.TUNERS, **{name: getattr(tuners, name) for name in tuners.OWN_CONFIGS}}


def log_table(result: Result) -> Table:
    """The history of a run: one line a task, and one where a task was taken out."""
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
    return table
