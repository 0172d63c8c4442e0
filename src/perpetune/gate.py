"""Whether the newest task of a run may stay: judged by the predictions in its commits; no model is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError, RunError, nearest
from .results import Result

if TYPE_CHECKING:
    from rich.console import Group

ROUNDING = 1e-9  # accuracies are quotients of whole numbers: far apart, but a difference of two may miss 0.02 by a bit
MOST_CLASSES, MOST_TASKS = 5, 10


@dataclass(frozen=True)
class Before:
    """Accuracy of a task, or of one class of it, before and after the newest task.

    Attributes:
        name: of the task, or "task: class". examples: in its test set.
        flips: examples that were right and are wrong now.
    """

    name: str
    before: float
    now: float
    flips: int
    examples: int

    @property
    def drop(self) -> float:
        return self.before - self.now


@dataclass(frozen=True)
class Verdict:
    """
    Attributes:
        task: the newest. accuracy: of it. reference, against: what it must beat, and what that is.
        tasks: every earlier task, the one that lost most first. classes: the worst, as far as they lost.
        broken: promises of the newest commit that were not kept. failures: why the gate is closed; none opens it.
    """

    task: str
    head: str
    scenario: str
    accuracy: float
    reference: float
    against: str
    tasks: tuple[Before, ...]
    classes: tuple[Before, ...]
    broken: tuple[str, ...]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def gain(self) -> float:
        return self.accuracy - self.reference

    @property
    def flips(self) -> int:
        return sum(t.flips for t in self.tasks)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        lists = {k: [{**asdict(b), "drop": b.drop} for b in getattr(self, k)] for k in ("tasks", "classes")}
        return {"passed": self.passed, **asdict(self), **lists, "gain": self.gain, "flips": self.flips}

    def table(self) -> Group:
        """For a terminal: who got worse, and the verdict."""
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        losers = [t for t in self.tasks if t.drop > 0 or t.flips]
        table = Table("", "before", "now", "worse by", "right before, wrong now", box=None)
        for entry in (*losers[:MOST_TASKS], *self.classes):
            points = (f"{100 * x:.1f}" for x in (entry.before, entry.now, entry.drop))
            table.add_row(escape(entry.name), *points, f"{entry.flips} of {entry.examples}")
        lines = [f"newest task `{self.task}`, read by {self.head}, {self.scenario}-incremental"]
        if len(losers) > MOST_TASKS:
            lines.append(f"{len(losers) - MOST_TASKS} more earlier tasks got worse, by no more")
        if not losers:
            lines.append("no earlier task got worse" if self.tasks else "there is no earlier task")
        lines.append(
            f"`{self.task}`: {100 * self.accuracy:.1f}, {100 * self.gain:+.1f} against {self.against} "
            f"({100 * self.reference:.1f}); examples of earlier tasks right before and wrong now: {self.flips}"
        )
        lines += [f"FAIL: {reason}" for reason in self.failures] or ["PASS"]
        return Group(*([table] if losers else []), *map(escape, lines))


def judge(
    result: Result,
    *,
    max_forgetting: float,
    min_gain: float,
    max_flips: int | None = None,
    head: str | None = None,
    scenario: str | None = None,
) -> Verdict:
    """Judge the newest of T tasks.

    With a(i, j) as in `metrics.accuracy`: a(T-1, j) - a(T, j) <= max_forgetting for every earlier task j, and
    a(T, T) - r >= min_gain, where r is a(T-1, T) if the head could name the classes then, else the accuracy b_T of the
    untouched model, else chance.

    Args:
        max_forgetting, min_gain: fractions, 0.02 is two points.
        max_flips: examples of all earlier tasks together that may be wrong now and were right before.
        head, scenario: which reading; None takes the first head, and the scenario of the stream.

    Raises:
        ConfigError: settings out of range, an unknown head or scenario, or tasks that were learned all at once.
        RunError: nothing is learned yet.
    """
    for name, value in (("max-forgetting", max_forgetting), ("min-gain", min_gain)):
        if not -1 <= value <= 1:
            raise ConfigError(f"{name} is a fraction, 0.02 for two points, not {value}")
    if max_flips is not None and max_flips < 0:
        raise ConfigError(f"max-flips is a number of examples, not {max_flips}")
    if len(result.commits) < 2:
        raise RunError(f"{result.path} has learned no task yet: there is nothing to judge")
    head, scenario = _reading(result, head, scenario)
    newest, earlier = result.commits[-1].manifest, result.commits[-2].manifest["learned"]
    task, T = result.tasks[-1], len(result.tasks)
    if len(earlier) != T - 1:
        raise ConfigError(f"{result.path} learned its tasks all at once: there is no newest task to judge")
    matrix = result.matrix(head, scenario)
    rows, targets = result.predictions(head, scenario)
    accuracy = float(matrix.values[-1, -1])
    chance = 1 / (len(set(targets[task].tolist())) if scenario == "task" else len(newest["classes"]))
    references = (
        (float(matrix.values[T - 2, T - 1]) if T > 1 else np.nan, "the model before it"),
        (float(matrix.baseline[-1]), "the untouched model"),
        (chance, "chance"),
    )
    reference, against = next((r, what) for r, what in references if not np.isnan(r))
    tasks, classes = [], []
    for j in earlier:
        target = targets[j]
        was, now = rows[T - 2][j] == target, rows[T - 1][j] == target
        tasks.append(_before(j, was, now))
        for c in np.unique(target):
            name = f"{j}: {result.config['stream']['labels'][c]}"
            classes.append(_before(name, was[target == c], now[target == c]))
    tasks.sort(key=lambda b: (-b.drop, -b.flips, b.name))
    classes.sort(key=lambda b: (-b.drop, -b.flips, b.name))
    broken = [g for g in newest["guarantees"] if g["holds"] is False]
    verdict = Verdict(
        task,
        head,
        scenario,
        accuracy,
        reference,
        against,
        tuple(tasks),
        tuple(c for c in classes[:MOST_CLASSES] if c.drop > 0),
        tuple(f"{g['source']}, {g['name']}: {_figure(g['value'])}, promised {_figure(g['bound'])}" for g in broken),
        (),
    )
    return replace(verdict, failures=_failures(verdict, max_forgetting, min_gain, max_flips))


def _failures(v: Verdict, max_forgetting: float, min_gain: float, max_flips: int | None) -> tuple[str, ...]:
    found = [
        f"`{t.name}` got worse by {100 * t.drop:.1f} points, allowed are {100 * max_forgetting:g}"
        for t in v.tasks
        if t.drop > max_forgetting + ROUNDING
    ]
    if v.gain < min_gain - ROUNDING:
        found.append(f"`{v.task}` gained {100 * v.gain:.1f} points over {v.against}, asked for are {100 * min_gain:g}")
    if max_flips is not None and v.flips > max_flips:
        found.append(f"{v.flips} examples were right before and are wrong now, allowed are {max_flips}")
    return (*found, *(f"broken promise: {text}" for text in v.broken))


def _before(name: str, was: np.ndarray, now: np.ndarray) -> Before:
    return Before(name, float(was.mean()), float(now.mean()), int((was & ~now).sum()), len(now))


def _figure(value: float | None) -> str:
    return "not a number" if value is None else f"{value:.2g}"


def _reading(result: Result, head: str | None, scenario: str | None) -> tuple[str, str]:
    readings = result.readings
    heads = list(dict.fromkeys(h for h, _ in readings))
    if head is not None and head not in heads:
        raise ConfigError(f"this run reads no head `{head}`: {nearest(head, heads)}")
    head = head or heads[0]
    kinds = [s for h, s in readings if h == head]
    if scenario is not None and scenario not in kinds:
        raise ConfigError(f"this run has no scenario `{scenario}`: {nearest(scenario, kinds)}")
    return head, scenario or result.config["stream"]["scenario"]
