"""Results in order: evaluations (scenario and head), recipes within them, mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from .charts import Bar, Point
from .data import Matrix, Record, is_joint

CONTROLS = {
    "sequential": "tunes all weights and does nothing against forgetting",
    "tfidf_ridge": "word counts and ridge regression, no network",
    "pixels_ridge": "raw pixels and ridge regression, no network",
}


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation (n - 1) over seeds; both None where nothing is defined."""

    mean: float | None
    spread: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Stat:
        known = [v for v in values if v is not None]
        if not known:
            return cls(None, None, 0)
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are defined; None where none is."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class Row:
    """One recipe in one evaluation: its records are the seeds. A guest has another head than the group."""

    recipe: str
    records: tuple[Record, ...]
    guest: bool = False

    @property
    def role(self) -> str:
        """ "bound" for joint training, "control" for a baseline that every method should beat, else "method"."""
        return role(self.recipe)

    @property
    def badge(self) -> str:
        kind = {"bound": "upper bound", "control": "control", "method": ""}[self.role]
        kind = "keeps examples" if self.keeps_examples else kind
        return f"{kind}, {self.records[0].head} head" if self.guest else kind

    @property
    def keeps_examples(self) -> bool:
        """Whether training sees data of old tasks: often not allowed, so such a recipe is never the headline."""
        return self.recipe == "replay"

    why = property(lambda self: why(self.recipe))

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.records[0].tasks

    @cached_property
    def same_order(self) -> bool:
        """Whether all seeds saw the same tasks in the same order, so that their matrices have a mean."""
        return len({r.tasks for r in self.records}) == 1

    def stat(self, metric: str) -> Stat:
        """Over seeds; undefined where it is undefined for any seed, since a mean over some of them would flatter."""
        values = [r.figures.get(metric) for r in self.records]
        return Stat(None, None, 0) if None in values else Stat.of(values)

    def mean(self, metric: str) -> float | None:
        return self.stat(metric).mean

    @cached_property
    def matrix(self) -> Matrix:
        """Mean over seeds (T x T), cell by cell over the seeds that measured it."""
        if len(self.records) == 1 or not self.same_order:
            return self.records[0].matrix
        rows = zip(*(r.matrix for r in self.records), strict=True)
        return tuple(tuple(mean(cell) for cell in zip(*row, strict=True)) for row in rows)

    @cached_property
    def baseline(self) -> tuple[float | None, ...]:
        known = [r.baseline for r in self.records if len(r.baseline) == len(self.tasks) and r.tasks == self.tasks]
        return tuple(mean(cell) for cell in zip(*known, strict=True))

    def error(self, j: int) -> float | None:
        """Of the accuracy of a task at the end: the spread over seeds, or of one seed the standard error."""
        several = len(self.records) > 1 and self.same_order
        return Stat.of(r.matrix[-1][j] for r in self.records).spread if several else self.records[0].error(j)

    @cached_property
    def has_history(self) -> bool:
        """False for joint training, which is only evaluated at the end."""
        return any(v is not None for row in self.matrix[:-1] for v in row)


@dataclass(frozen=True)
class Group:
    """All recipes, evaluated with one head in one scenario."""

    scenario: str
    head: str
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        head = f", {self.head} head" if self.head else ""
        return f"{self.scenario}-incremental{head}"

    @property
    def ranked(self) -> list[Row]:
        return sorted(self.rows, key=lambda row: -_or(row.mean("final_accuracy"), -1.0))

    @property
    def by_task(self) -> bool:
        """Whether there is a single recipe, which is shown task by task."""
        return len({row.recipe for row in self.rows}) == 1

    @property
    def seeds(self) -> int:
        return max(len({r.seed for r in row.records}) for row in self.rows)


def role(recipe: str) -> str:
    if is_joint(recipe):
        return "bound"
    return "control" if recipe in CONTROLS or recipe.startswith("frozen_") else "method"


def why(recipe: str) -> str:
    """What makes a recipe a control or a bound, in a few words."""
    if is_joint(recipe):
        return "trains on all tasks at once"
    if recipe.startswith("frozen_"):
        return "never trains the network"
    return CONTROLS.get(recipe, "")


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def groups(records: Sequence[Record], scenario: str, headline: tuple[str, str] | None = None) -> list[Group]:
    """Evaluations, the one to show first at the head.

    A control or bound that was evaluated with another head only is a guest in every evaluation of its scenario.
    First comes `headline`; else the stream's own scenario, the evaluation with most recipes, and of those the one in
    which a recipe that learns task by task does best.
    """
    cells: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in records:
        cells.setdefault((record.scenario, record.head), {}).setdefault(record.recipe, []).append(record)
    shared = {key for key, rows in cells.items() if len(rows) > 1 or any(role(r) == "method" for r in rows)}
    kept = {key for key in cells if key in shared or not any(other[0] == key[0] for other in shared)}
    found = [
        Group(
            key[0],
            key[1],
            tuple(Row(recipe, tuple(seeds)) for recipe, seeds in rows.items())
            + tuple(_guests(key[0], set(rows), cells)),
        )
        for key, rows in cells.items()
        if key in kept
    ]

    def order(group: Group) -> tuple[bool, bool, int, float]:
        own = [row for row in group.rows if not row.guest]
        best = max((_or(row.mean("final_accuracy"), -1.0) for row in own if row.role != "bound"), default=-1.0)
        chosen = headline is not None and (group.scenario, group.head) == tuple(headline)
        return (not chosen, group.scenario != scenario, -len(own), -best)

    return sorted(found, key=order)


def _guests(
    scenario: str, present: set[str], cells: Mapping[tuple[str, str], Mapping[str, list[Record]]]
) -> Iterable[Row]:
    for (other, _), rows in cells.items():
        for recipe, seeds in rows.items():
            if other == scenario and recipe not in present and role(recipe) != "method":
                present = present | {recipe}
                yield Row(recipe, tuple(seeds), guest=True)


def shown_first(rows: Sequence[Row], count: int) -> tuple[list[Row], list[Row]]:
    """The rows to show, and those to fold away: `sequential`, the common reference, and the best are shown."""
    plain = [row for row in rows if row.recipe == "sequential"]
    best = sorted((row for row in rows if row.recipe != "sequential"), key=lambda r: (r.guest, r.role != "method"))
    first = plain + best[: count - len(plain)]
    return [row for row in rows if row in first], [row for row in rows if row not in first]


def learned_and_now(row: Row) -> list[tuple[str, float | None, float | None]]:
    """Per task: name, accuracy right after learning it, accuracy after the last task that was measured."""
    matrix = row.matrix
    measured = [i for i, line in enumerate(matrix) if any(v is not None for v in line)]
    last = measured[-1] if measured else 0
    return [(name, matrix[j][j] if row.has_history else None, matrix[last][j]) for j, name in enumerate(row.tasks)]


def recipe_bars(group: Group) -> list[Bar]:
    """Recipes, best first."""
    bars = []
    for row in group.ranked:
        final = row.stat("final_accuracy")
        note = forgot(row.mean("forgetting"))
        spread = final.spread if len(row.records) > 1 else row.records[0].final_error
        bars.append(Bar(row.recipe, final.mean, row.mean("plasticity"), spread, row.role, row.badge, note))
    return bars


def task_bars(row: Row) -> list[Bar]:
    """Tasks in the order of learning."""
    bars = []
    for j, (name, learned, now) in enumerate(learned_and_now(row)):
        change = None if learned is None or now is None else learned - now
        note = forgot(change) if j + 1 < len(row.tasks) else ""
        bars.append(Bar(f"{j + 1} {name}", now, learned, row.error(j), note=note))
    return bars


def forgot(value: float | None) -> str:
    """Forgetting in two or three words."""
    if value is None:
        return ""
    points = round(100 * value)
    return f"forgot {points}" if points > 0 else f"gained {-points}" if points < 0 else "forgot nothing"


@dataclass(frozen=True)
class Loss:
    """One row of the picture of forgetting; `low` and `high` are what its bar needs of the common range."""

    label: str
    badge: str
    value: float
    spread: float | None = None

    @property
    def low(self) -> float:
        return min(0.0, self.value - (self.spread or 0.0))

    @property
    def high(self) -> float:
        return max(0.05, self.value + (self.spread or 0.0))


def forgetting(group: Group) -> list[Loss]:
    """Recipes, least forgetting first; or the tasks of a single recipe, all but the last."""
    if group.by_task:
        every = learned_and_now(group.rows[0])[:-1]
        return [
            Loss(f"{j + 1} {name}", "", a - b)
            for j, (name, a, b) in enumerate(every)
            if a is not None and b is not None
        ]
    stats = [(row, row.stat("forgetting")) for row in group.rows]
    rows = [Loss(row.recipe, row.badge, s.mean, s.spread) for row, s in stats if s.mean is not None]
    return sorted(rows, key=lambda row: row.value)


def points(group: Group) -> tuple[list[Point], float | None]:
    """Learned against kept: recipes of a comparison, or the tasks of a single recipe; and the upper bound."""
    if group.by_task:
        every = learned_and_now(group.rows[0])
        named = [
            Point(f"{j + 1} {name}" if len(every) <= 12 else f"{j + 1}", a, b)
            for j, (name, a, b) in enumerate(every)
            if a is not None and b is not None
        ]
        return named, None
    found = []
    for row in group.ranked:
        learned, kept = row.mean("plasticity"), row.mean("final_accuracy")
        if row.role != "bound" and not row.guest and learned is not None and kept is not None:
            found.append(Point(row.recipe, learned, kept, row.role))
    bounds = [row.mean("final_accuracy") for row in group.rows if row.role == "bound"]
    return found, bounds[0] if bounds else None


def guessing(group: Group, labels: Mapping[str, Sequence[str]]) -> float | None:
    """Chance level at the end: 1 / classes to choose from, averaged over tasks; None without the labels."""
    tasks = group.rows[0].tasks
    if not all(labels.get(t) for t in tasks):
        return None
    if group.scenario == "task":
        return statistics.fmean(1 / len(set(labels[t])) for t in tasks)
    return 1 / len({label for t in tasks for label in labels[t]})
