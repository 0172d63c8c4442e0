"""Machine-readable results: one flat record per run, head and scenario; their mean and spread; tables of them."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..core.errors import ConfigError, RunError, nearest
from .accuracy import FORMULAS, AccuracyMatrix, summary
from .record_parts import ClassShare, TaskCost, plain

if TYPE_CHECKING:
    from rich.table import Table

COSTS = ("train_seconds", "evaluate_seconds", "steps", "trainable_parameters")
ROUTED, ROUTES = "routing_accuracy", "sent to its own task"  # a metric, and the heading of its column
NO_LOSS = ("forgetting", ROUTED)  # metrics that forgetting is not told beside


class ResultRecord(BaseModel):
    """One run, read by one head in one scenario. Accuracies are fractions; None is undefined, never 0 and never NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    recipe: str
    seed: int
    scenario: str
    head: str
    model: str
    stream: str
    tasks: list[str]
    matrix: list[list[float | None]]
    baseline: list[float | None]
    test_sizes: list[int]
    final_accuracy: float | None
    final_accuracy_micro: float | None
    final_accuracy_macro: float | None = None
    average_incremental_accuracy: float | None
    average_incremental_accuracy_micro: float | None
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    plasticity: float | None
    intransigence: float | None = None
    flips: float | None = None
    routing_accuracy: float | None = None
    train_seconds: float
    evaluate_seconds: float
    steps: int
    trainable_parameters: int
    guarantees: list[dict[str, Any]] = Field(default_factory=list)
    per_task: list[TaskCost] = Field(default_factory=list)
    per_class: list[ClassShare] = Field(default_factory=list)
    run: str | None = None
    formulas: dict[str, str] = Field(default_factory=lambda: dict(FORMULAS))

    @field_validator("*", mode="before")
    @classmethod
    def _json_able(cls, value: Any) -> Any:
        return plain(value)

    @model_validator(mode="after")
    def _square(self) -> ResultRecord:
        sizes = {len(self.matrix), len(self.baseline), len(self.test_sizes), *map(len, self.matrix)}
        if sizes != {len(self.tasks)}:
            raise ValueError(f"matrix, baseline and test_sizes must all have the size of tasks, {len(self.tasks)}")
        return self

    def accuracy_matrix(self) -> AccuracyMatrix:
        """The matrix again, for instance for `conventions.in_convention`."""
        values, baseline = (np.array(x, dtype=float) for x in (self.matrix, self.baseline))
        return AccuracyMatrix(values, np.array(self.test_sizes), baseline, tuple(self.tasks))


def make_record(
    matrix: AccuracyMatrix, facts: Mapping[str, Any], *, reference: Mapping[str, float | None] | None = None
) -> ResultRecord:
    """One run's matrix and facts as a record; every figure of `summary(matrix)` is computed here.

    Args:
        facts: the remaining fields: recipe, seed, scenario, head, model, stream, train_seconds, evaluate_seconds,
            steps, trainable_parameters, and where there are any guarantees (`Measurement`s or their dicts), per_task,
            per_class, final_accuracy_macro, flips and routing_accuracy (shares), run.
        reference: a*(j) by task name, for intransigence.

    Raises:
        ConfigError: a fact is missing, unknown or of the wrong kind.
    """
    measured = {
        "tasks": matrix.tasks,
        "matrix": matrix.values,
        "baseline": matrix.baseline,
        "test_sizes": matrix.test_sizes,
        **summary(matrix, reference),
    }
    if twice := sorted(measured.keys() & facts.keys()):
        raise ConfigError(f"`{twice[0]}` of a record is computed from its matrix: leave it out of the facts")
    return _validated({**measured, **facts}, "this record")


def _validated(fields: Any, what: str) -> ResultRecord:
    try:
        return ResultRecord.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "a record"
        raise ConfigError(f"{what}: `{where}`: {first['msg']}") from error


def write_records(path: str | Path, records: Iterable[ResultRecord]) -> None:
    """Write a JSON list of records: the whole file is there, or the old one still is.

    Raises:
        RunError: the file cannot be written.
    """
    path = Path(path)
    text = json.dumps([r.model_dump(mode="json") for r in records], indent=1, allow_nan=False) + "\n"
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise RunError(f"cannot write {path}: {error.strerror}; give another file, or make room") from error


def read_records(path: str | Path) -> list[ResultRecord]:
    """Read what `write_records` wrote.

    Raises:
        ConfigError: the file cannot be read, is not a JSON list, or one of its records is malformed (which, and where).
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
    except OSError as error:
        raise ConfigError(f"cannot read results {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not a JSON list of results: {error}; was it cut short or edited?") from error
    if not isinstance(found, list):
        raise ConfigError(f"{path} is not a JSON list of results, but a {type(found).__name__}")
    return [_validated(fields, f"{path}, record {i}") for i, fields in enumerate(found)]


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def aggregate(records: Iterable[ResultRecord]) -> list[dict[str, Any]]:
    """Mean and spread over seeds.

    Returns:
        One entry per (recipe, scenario, head), in order of first appearance: these three, `model`, `stream`, `seeds`
        (how many), and for every metric and cost {"mean", "std"}: std is the sample standard deviation (divisor n - 1),
        None for one seed; both are None where the metric is undefined for any seed.

    Raises:
        ConfigError: a seed twice in a group, or a group that mixes models or streams: its mean would mean nothing.
    """
    groups: dict[tuple[str, str, str], list[ResultRecord]] = {}
    for r in records:
        groups.setdefault((r.recipe, r.scenario, r.head), []).append(r)
    return [_spread(group) for group in groups.values()]


def _spread(group: Sequence[ResultRecord]) -> dict[str, Any]:
    first = group[0]
    where = f"results of `{first.recipe}`, {first.scenario}-incremental, head {first.head}"
    seeds = [r.seed for r in group]
    if twice := [s for s in seeds if seeds.count(s) > 1]:
        raise ConfigError(f"{where}: seed {twice[0]} is there twice; give every run once")
    for key, kinds in (
        ("model", {r.model for r in group}),
        ("stream", {r.stream for r in group}),
        ("set of tasks", {" + ".join(sorted(r.tasks)) for r in group}),  # the order may change with the seed
    ):
        if len(kinds) > 1:
            raise ConfigError(f"{where}: more than one {key} ({', '.join(sorted(kinds))}); compare them apart")
    entry: dict[str, Any] = {k: getattr(first, k) for k in ("recipe", "scenario", "head", "model", "stream")}
    entry["seeds"] = len(group)
    for name in (*FORMULAS, *COSTS):
        values = [getattr(r, name) for r in group]
        known = None not in values
        entry[name] = {
            "mean": statistics.fmean(values) if known else None,
            "std": statistics.stdev(values) if known and len(values) > 1 else None,
        }
    return entry


def _grid(aggregated: Sequence[Mapping[str, Any]], scenario: str, metric: str) -> tuple[list[str], list[list[str]]]:
    """(columns, rows): a row is the recipe and a cell per head; beside final accuracy, where it was routed how well."""
    if metric not in FORMULAS:
        raise ConfigError(f"no metric is called `{metric}`: {nearest(metric, FORMULAS)}")
    chosen = {(e["recipe"], e["head"]): e for e in aggregated if e["scenario"] == scenario}
    if not chosen:
        known = {e["scenario"] for e in aggregated}
        raise ConfigError(
            f"no results are {scenario}-incremental: {nearest(scenario, known) if known else 'none at all'}"
        )
    recipes = list(dict.fromkeys(recipe for recipe, _ in chosen))
    heads = list(dict.fromkeys(head for _, head in chosen))
    rows = [[r, *(_cell(chosen.get((r, h)), metric) for h in heads)] for r in recipes]
    if metric == "final_accuracy" and any(e[ROUTED]["mean"] is not None for e in chosen.values()):
        of = {recipe: entry for (recipe, _), entry in chosen.items()}  # whatever head reads it, the routes are the same
        rows = [[*row, _share(of[row[0]], ROUTED)] for row in rows]
        heads = [*heads, ROUTES]
    return heads, rows


def _cell(entry: Mapping[str, Any] | None, metric: str) -> str:
    if entry is None or entry[metric]["mean"] is None:
        return "–"
    lost = entry["forgetting"]["mean"]
    text = _share(entry, metric)
    if lost is None or metric in NO_LOSS:
        return text
    return f"{text} (f {round(100 * lost, 1) + 0.0:.1f})"  # no -0.0


def _share(entry: Mapping[str, Any], metric: str) -> str:
    mean, std = entry[metric]["mean"], entry[metric]["std"]
    return "–" if mean is None else f"{100 * mean:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def _caption(metric: str, columns: Sequence[str]) -> str:
    text = f"{metric} in %: {FORMULAS[metric]}; ± is the standard deviation over seeds"
    if metric not in NO_LOSS:
        text += f"; f is forgetting in points: {FORMULAS['forgetting']}"
    return f"{text}; {ROUTES}: {FORMULAS[ROUTED]}" if ROUTES in columns else text


def table(aggregated: Sequence[Mapping[str, Any]], scenario: str, metric: str = "final_accuracy") -> Table:
    """Recipes as rows, heads as columns, cells like "62.3 ± 1.2 (f 4.1)" in percent, "–" where undefined.

    Beside final accuracy a last column says how many test examples were sent to their own task, where any were.

    Args:
        aggregated: from `aggregate`.
        scenario: "class", "domain" or "task".
        metric: a name of `accuracy.FORMULAS`.

    Raises:
        ConfigError: no such metric, or no results in that scenario.
    """
    from rich.table import Table
    from rich.text import Text

    heads, rows = _grid(aggregated, scenario, metric)
    out = Table(title=f"{scenario}-incremental", caption=Text(_caption(metric, heads)))
    out.add_column("recipe")
    for head in heads:
        out.add_column(Text(head), justify="right")
    for row in rows:
        out.add_row(*(Text(cell) for cell in row))  # Text: brackets in a recipe's name are not markup
    return out


def markdown_table(aggregated: Sequence[Mapping[str, Any]], scenario: str, metric: str = "final_accuracy") -> str:
    """The same table and caption in Markdown. Raises as `table` does."""
    heads, rows = _grid(aggregated, scenario, metric)
    lines = [["recipe", *heads], ["---", *("---:" for _ in heads)], *rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"{text}\n\n{_caption(metric, heads)}.\n"
