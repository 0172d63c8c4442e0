"""What a report is made of: results as they come, checked and normalised once, at the door."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..core.errors import RunError
from ..metrics.record_parts import finite_or_none
from ..metrics.uncertainty import mean_error, standard_error

FIGURES = (
    "final_accuracy",
    "final_accuracy_micro",
    "final_accuracy_macro",
    "average_incremental_accuracy",
    "average_incremental_accuracy_micro",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "plasticity",
    "intransigence",
    "flips",
    "routing_accuracy",
)
COSTS = ("train_seconds", "evaluate_seconds", "steps", "peak_memory_bytes", "disk_bytes")

Matrix = tuple[tuple["float | None", ...], ...]


@dataclass(frozen=True)
class ReportData:
    """Everything that one page shows.

    Attributes:
        title: heading of the page.
        kind: "run" (one recipe) or "compare" (several recipes, seeds).
        records: results, as mappings or as objects with `model_dump()`; accuracies are fractions from 0 to 1 and None
            stands for "undefined". Keys: recipe, seed, scenario, head, tasks, matrix (row i: after task i, column j:
            accuracy on task j; a joint run has only the last row), baseline, the metrics, train_seconds,
            evaluate_seconds, steps, trainable_parameters, guarantees, per_task, run.
        stream, scenario: name of the stream, and how it was built ("class", "domain" or "task").
        tasks: task names in the order of learning.
        reverted: tasks that were learned and taken out again; they have no figures.
        labels: task name -> label texts of its classes; used for the guessing line and the list of tasks.
        model: name of the pre-trained model.
        command: the exact command line.
        versions: package -> version.
        created: ISO date, or None where the page must not depend on the clock.
        formulas: metric name -> formula, shown with the figures; empty: those that the records carry.
        flips: examples that were right once and are wrong at the end, {task, text | image, label, was, now}; `image` is
            a base64 `data:image/...` URI.
        routes: where a recipe finds out the task of an input, of each run {recipe, tasks, accuracy, accuracy_micro,
            asked, confusion}; see `metrics.routing.Routing`.
        drift: of a stream whose boundaries were not told: `true` segments {start, stop, task}, `parts` found {start,
            stop, task (a number), detected_at}, `told`, `window`, and `figures`, see `metrics.boundaries`.
        headline: (scenario, head) to show first; None lets the page choose.
        losses: of the tasks of a run that were trained, {task, steps, points: (step, training loss)}.
        answers: of language models to test questions of one task, {task, titles: of the states that answered, lines:
            {question, expected, answers: {text, score} of each state}}.
    """

    title: str
    kind: Literal["run", "compare"]
    records: Sequence[Any]
    stream: str
    scenario: str
    tasks: Sequence[str]
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    reverted: Sequence[str] = ()
    model: str = ""
    command: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str | None = None
    formulas: Mapping[str, str] = field(default_factory=dict)
    flips: Sequence[Mapping[str, Any]] | None = None
    routes: Sequence[Mapping[str, Any]] = ()
    drift: Mapping[str, Any] | None = None
    headline: tuple[str, str] | None = None
    losses: Sequence[Mapping[str, Any]] = ()
    answers: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Promise:
    """One measured figure of one promise, in one record."""

    name: str
    value: float | None
    bound: float | None
    unit: str
    source: str
    note: str
    task: str
    parts: tuple[tuple[str, float | None, float | None], ...] = ()

    @property
    def holds(self) -> bool | None:
        """None where nothing was promised; a missing or NaN figure never keeps a promise."""
        if self.bound is None:
            return None
        return self.value is not None and not math.isnan(self.value) and self.value <= self.bound


@dataclass(frozen=True)
class Record:
    """One result: one recipe, one seed, one reading (scenario and head). `matrix` is T x T."""

    recipe: str
    seed: int | None
    scenario: str
    head: str
    tasks: tuple[str, ...]
    matrix: Matrix
    baseline: tuple[float | None, ...]
    figures: Mapping[str, float | None]
    costs: Mapping[str, float | None]
    trainable_parameters: int | None
    promises: tuple[Promise, ...]
    per_task: tuple[Mapping[str, Any], ...]
    run: str
    formulas: Mapping[str, str]
    test_sizes: tuple[int, ...] = ()

    def error(self, j: int) -> float | None:
        """Standard error of the accuracy of a task at the end."""
        return standard_error(self._last[j], self.test_sizes[j]) if self.test_sizes else None

    @property
    def final_error(self) -> float | None:
        """Standard error of the mean over all tasks at the end."""
        return mean_error(self._last, self.test_sizes) if self.test_sizes else None

    @property
    def _last(self) -> tuple[float | None, ...]:
        measured = (row for row in reversed(self.matrix) if any(v is not None for v in row))
        return next(measured, (None,) * len(self.tasks))

    @property
    def work(self) -> tuple[str, int | None, str]:
        """Identifies the training behind the record: several readings share one."""
        return (self.recipe, self.seed, self.run)


def number(value: Any) -> float | None:
    """A finite float, or None."""
    return float(value) if value is not None and math.isfinite(value) else None


def read_records(records: Sequence[Any]) -> list[Record]:
    """Normalise results.

    Raises:
        RunError: there are none, or one lacks a recipe, tasks or a matrix, or its matrix does not fit its tasks.
    """
    if not records:
        raise RunError("nothing to report: there are no results yet; let `run` or `compare` finish a task first")
    return [_read(i, record) for i, record in enumerate(records)]


def _read(index: int, record: Any) -> Record:
    row: Mapping[str, Any] = record.model_dump() if hasattr(record, "model_dump") else record
    if missing := [key for key in ("recipe", "tasks", "matrix") if row.get(key) is None]:
        raise RunError(f"result {index} has no `{missing[0]}`: was it written by another version of perpetune?")
    tasks = tuple(str(t) for t in row["tasks"])
    costs = {key: number(row.get(key)) for key in COSTS}
    return Record(
        recipe=str(row["recipe"]),
        seed=row.get("seed"),
        scenario=str(row.get("scenario") or "class"),
        head=str(row.get("head") or ""),
        tasks=tasks,
        matrix=_square(index, row["matrix"], len(tasks), joint=is_joint(str(row["recipe"]))),
        baseline=tuple(number(b) for b in row.get("baseline") or ()),
        figures={key: number(row.get(key)) for key in FIGURES},
        costs=costs,
        trainable_parameters=row.get("trainable_parameters"),
        promises=tuple(_promise(g, tasks) for g in row.get("guarantees") or ()),
        per_task=tuple(_plain(p) for p in row.get("per_task") or ()),
        run=str(row.get("run") or ""),
        formulas=dict(row.get("formulas") or {}),
        test_sizes=tuple(row.get("test_sizes") or ()),
    )


def is_joint(recipe: str) -> bool:
    return recipe == "joint" or recipe.startswith("joint_")


def _square(index: int, rows: Sequence[Any], size: int, joint: bool) -> Matrix:
    """T x T: a run that was stopped lacks the last rows; a joint run has nothing but the last one."""
    rows = [[None] * size if row is None else list(row) for row in rows]
    if len(rows) > size or any(len(row) != size for row in rows):
        shape = f"{len(rows)} x {max((len(r) for r in rows), default=0)}"
        raise RunError(f"result {index}: a matrix of {shape} does not fit {size} tasks")
    absent: list[list[Any]] = [[None] * size for _ in range(size - len(rows))]
    rows = absent + rows if joint else rows + absent
    known = np.array(rows, dtype=float).reshape(size, size)
    return tuple(map(tuple, finite_or_none(known)))


def _plain(item: Any) -> Mapping[str, Any]:
    return item.model_dump() if hasattr(item, "model_dump") else item


def _promise(item: Any, tasks: Sequence[str]) -> Promise:
    row = item.to_dict() if hasattr(item, "to_dict") else _plain(item)
    task = row.get("task")
    if isinstance(task, int):
        task = tasks[task] if 0 <= task < len(tasks) else str(task)
    value, bound = row.get("value"), row.get("bound")
    return Promise(
        name=str(row.get("name") or ""),
        value=None if value is None else float(value),
        bound=None if bound is None else float(bound),
        unit=str(row.get("unit") or ""),
        source=str(row.get("source") or ""),
        note=str(row.get("note") or ""),
        task="" if task is None else str(task),
        parts=tuple((str(name), number(v), number(b)) for name, v, b in row.get("parts") or ()),
    )
