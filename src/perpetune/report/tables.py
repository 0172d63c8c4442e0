"""The tables of the report: promises and what was measured of them, time and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .data import COSTS, Promise, Record, number
from .summary import Stat
from .words import count, figure, seconds, size

SHOWN_BROKEN = 100
WRITE: dict[str, Callable[[float], str]] = {
    "train_seconds": seconds,
    "evaluate_seconds": seconds,
    "steps": count,
    "trainable_parameters": count,
    "peak_memory_bytes": size,
    "disk_bytes": size,
}
COST_TITLES = {
    "train_seconds": "training",
    "evaluate_seconds": "evaluation",
    "steps": "optimizer steps",
    "trainable_parameters": "trainable parameters",
    "peak_memory_bytes": "peak memory",
    "disk_bytes": "on disk",
}


@dataclass(frozen=True)
class Kept:
    """A promise over all tasks and seeds: its worst figure. state: "broken", "kept" or "observed"."""

    recipe: str
    promise: Promise
    checks: int
    broken: int

    @property
    def state(self) -> str:
        return "observed" if self.promise.bound is None else "broken" if self.broken else "kept"

    @property
    def measured(self) -> str:
        return figure(self.promise.value, self.promise.unit)

    @property
    def bound(self) -> str:
        return "" if self.promise.bound is None else f"≤ {figure(self.promise.bound, self.promise.unit)}"


def unique_promises(records: Iterable[Record]) -> list[tuple[Record, Promise]]:
    """Each measured figure once: several readings of one training repeat what the training promised."""
    seen: set[Any] = set()
    found = []
    for record in records:
        for promise in record.promises:
            key = (record.work, promise.source, promise.name, promise.task, str(promise.value), promise.bound)
            if key not in seen:
                seen.add(key)
                found.append((record, promise))
    return found


def promises(records: Sequence[Record]) -> list[Kept]:
    """One line per recipe and promise: broken ones first, then kept, then what was only observed."""
    gathered: dict[tuple[str, ...], list[Promise]] = {}
    for record, promise in unique_promises(records):
        promised = "bound" if promise.bound is not None else ""
        key = (record.recipe, promise.source, promise.name, promise.unit, promised)
        gathered.setdefault(key, []).append(promise)
    lines = [
        Kept(key[0], max(every, key=_badness), len(every), sum(p.holds is False for p in every))
        for key, every in gathered.items()
    ]
    return sorted(lines, key=lambda line: ("broken", "kept", "observed").index(line.state))


def _badness(promise: Promise) -> tuple[bool, float]:
    if promise.value is None or promise.value != promise.value:
        return (True, 0.0)
    return (promise.holds is False, promise.value - (promise.bound or 0.0))


def broken(records: Sequence[Record]) -> list[str]:
    """Every broken promise, one sentence each."""
    lines = []
    for record, promise in unique_promises(records):
        if promise.holds is False:
            seed = "" if record.seed is None else f", seed {record.seed}"
            task = f", task {promise.task}" if promise.task else ""
            measured, bound = figure(promise.value, promise.unit), figure(promise.bound, promise.unit)
            lines.append(f"{record.recipe}{seed}{task}: {promise.name} is {measured}, promised at most {bound}")
    return lines


@dataclass(frozen=True)
class CostCell:
    text: str | None  # None: not measured
    share: float  # of the largest in the column, for the bar


@dataclass(frozen=True)
class CostLine:
    label: str
    cells: tuple[CostCell, ...]


@dataclass(frozen=True)
class CostTable:
    columns: tuple[str, ...]
    lines: tuple[CostLine, ...]


def _table(rows: Sequence[tuple[str, dict[str, float | None]]], keys: Sequence[str]) -> CostTable | None:
    """Columns in which something was measured."""
    used = [key for key in keys if any(values.get(key) is not None for _, values in rows)]
    if not used:
        return None
    most = {key: max(values.get(key) or 0.0 for _, values in rows) or 1.0 for key in used}

    def cell(key: str, value: float | None) -> CostCell:
        return CostCell(None, 0.0) if value is None else CostCell(WRITE[key](value), value / most[key])

    lines = tuple(CostLine(label, tuple(cell(key, values.get(key)) for key in used)) for label, values in rows)
    return CostTable(tuple(COST_TITLES[key] for key in used), lines)


def trainings(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Per recipe, one record per training."""
    found: dict[str, dict[Any, Record]] = {}
    for record in records:
        found.setdefault(record.recipe, {}).setdefault(record.work, record)
    return {recipe: list(every.values()) for recipe, every in found.items()}


def costs_by_recipe(records: Sequence[Record]) -> CostTable | None:
    """Mean over seeds of one whole run; memory is the peak over its tasks, disk their sum."""
    rows = []
    for recipe, every in trainings(records).items():
        values = {key: Stat.of(_total(r, key) for r in every).mean for key in COSTS}
        values["trainable_parameters"] = Stat.of(r.trainable_parameters for r in every).mean
        rows.append((recipe, values))
    return _table(rows, (*COSTS[:3], "trainable_parameters", *COSTS[3:]))


def _total(record: Record, key: str) -> float | None:
    if record.costs.get(key) is not None:
        return record.costs[key]
    per_task = [v for p in record.per_task if (v := number(p.get(key))) is not None]
    if not per_task:
        return None
    return max(per_task) if key == "peak_memory_bytes" else sum(per_task)


def costs_by_task(records: Sequence[Record]) -> list[tuple[str, CostTable]]:
    """Per recipe: mean over seeds, task by task."""
    found = []
    for recipe, every in trainings(records).items():
        gathered: dict[str, list[Any]] = {}
        for record in every:
            for j, part in enumerate(record.per_task):
                name = part.get("task", j)
                name = record.tasks[name] if isinstance(name, int) and name < len(record.tasks) else str(name)
                gathered.setdefault(name, []).append(part)
        rows = [
            (name, {key: Stat.of(number(p.get(key)) for p in parts).mean for key in COSTS})
            for name, parts in gathered.items()
        ]
        if rows and (table := _table(rows, COSTS)) is not None:
            found.append((recipe, table))
    return found
