"""Where the router sends the test examples of each task: one entry for each recipe with a router, over its seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .data import Matrix
from .summary import Stat, mean

MOST_TASKS = 30  # with more, the confusion matrix would be most of the page


@dataclass(frozen=True)
class Line:
    """One task: the share of its examples that go to it, and the most frequent wrong task (None: there is none)."""

    task: str
    own: float
    instead: str | None
    share: float


@dataclass(frozen=True)
class Routes:
    """One recipe. `shares` (T x T): of the test examples of each task (row), how many go to each task (column)."""

    recipe: str
    accuracy: Stat
    pooled: Stat
    asked: Stat
    tasks: tuple[str, ...]
    shares: Matrix

    @property
    def lines(self) -> list[Line]:
        found = []
        for j, task in enumerate(self.tasks):
            row = [share or 0.0 for share in self.shares[j]]
            others = [k for k in range(len(row)) if k != j]
            most = max(others, key=lambda k: row[k], default=j)
            wrong = row[most] > 0 and most != j
            found.append(Line(task, row[j], self.tasks[most] if wrong else None, row[most] if wrong else 0.0))
        return found


def routes(found: Sequence[Mapping[str, Any]]) -> list[Routes]:
    """Recipes, best first.

    Args:
        found: see `ReportData.routes`. Seeds that learned the tasks in another order count in the figures, not in the
            shares.
    """
    of: dict[str, list[Mapping[str, Any]]] = {}
    for one in found:
        of.setdefault(one["recipe"], []).append(one)
    every = []
    for recipe, seeds in of.items():
        tasks = tuple(seeds[0]["tasks"])
        alike = [_shares(one["confusion"]) for one in seeds if tuple(one["tasks"]) == tasks]
        shares = tuple(tuple(mean(cell) for cell in zip(*row, strict=True)) for row in zip(*alike, strict=True))
        figures = {
            key: Stat.of(one[name] for one in seeds)
            for key, name in (("accuracy", "accuracy"), ("pooled", "accuracy_micro"), ("asked", "asked"))
        }
        every.append(Routes(recipe, **figures, tasks=tasks, shares=shares))
    return sorted(every, key=lambda one: -(one.accuracy.mean or 0.0))


def _shares(confusion: Sequence[Sequence[int]]) -> list[list[float]]:
    totals = [sum(row) for row in confusion]
    return [[count / total for count in row] for row, total in zip(confusion, totals, strict=True)]
