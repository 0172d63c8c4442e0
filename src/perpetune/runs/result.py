"""What a run found: read from its commits and its journal, computed on demand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..core.environment import uncollected
from ..metrics.accuracy import AccuracyMatrix, class_scores, summary
from ..metrics.flips import flips_share, score_flips
from ..metrics.per_class import ClassAccuracy, class_accuracies, final_accuracy_macro, worst_first
from ..metrics.records import ResultRecord, make_record
from ..metrics.routing import Routing
from ..metrics.uncertainty import sizes_told
from .commit import Commit, active, reverted
from .directory import Run, read_journal

# Predictions on the tasks of a commit before they were learned: by the model before, and, for tasks that joined the
# stream after the first commit, by the untouched one.
BEFORE, JOINED = "before/", "untouched/"
SCORE = "score/"  # of examples without classes; those with classes are scored by their predicted class
MOST_CLASSES = 10  # that a summary names
NO_READING = ("target/", "route/", "asked/", BEFORE, JOINED)  # stored beside the predictions of heads


class Result:
    """The result of a run, from its directory alone.

    Args:
        path: a run directory, finished or not.
        keep: something that must live as long as the directory is read (a temporary directory's owner).

    Raises:
        RunError: no run is there, or it is damaged.
    """

    def __init__(self, path: str | Path, keep: Any = None) -> None:
        self.path, self._keep = Path(path), keep
        run = Run.read(self.path)
        self.config, self.commits = run.config, run.commits
        self.journal = read_journal(self.path)
        self.history = run.history
        self.active, self.reverted = active(self.commits), reverted(self.commits)
        self._once: dict[tuple[str, str, str], Any] = {}  # what was made of all predictions

    @cached_property
    @uncollected()
    def _predictions(self) -> dict[Path, dict[str, dict[str, np.ndarray]]]:
        """By commit, prefix and task, of the commits that count: the untouched model, tasks that were not taken out,
        the two newest."""
        found: dict[Path, dict[str, dict[str, np.ndarray]]] = {}
        for commit in (*self.commits[:1], *self.active, *self.commits[-2:]):
            if commit.path not in found:
                of = found[commit.path] = {}
                for key, stored in commit.arrays("predictions.safetensors").items():
                    prefix, slash, task = key.rpartition("/")
                    of.setdefault(prefix + slash, {})[task] = stored
        return found

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Tasks learned so far and not taken out, in order."""
        return tuple(self.commits[-1].manifest["learned"]) if self.commits else ()

    @cached_property
    def _place(self) -> dict[str, int]:
        """Positions in `tasks`, by name."""
        return {task: i for i, task in enumerate(self.tasks)}

    @cached_property
    def readings(self) -> list[tuple[str, str]]:
        """(head, scenario) pairs that this run was evaluated in."""
        if not self.tasks:
            return []
        stored = [self._predictions[commit.path] for commit in (*self.active, self.commits[-1])]
        prefixes = {prefix for found in stored for prefix in found if not prefix.startswith(NO_READING)}
        keys = {(name[0], name[1]) for name in (prefix.removeprefix(SCORE).split("/") for prefix in prefixes)}
        order = self.commits[-1].manifest.get("heads", [])
        return sorted(keys, key=lambda k: (order.index(k[0]) if k[0] in order else len(order), k[1]))

    @property
    def rejected(self) -> tuple[str, tuple[str, ...]] | None:
        """The task that was thrown away last, and why, where nothing was learned since."""
        newest = self.history[-1].manifest if self.history else {}
        return (newest["undoes"], tuple(newest["reasons"])) if "undoes" in newest else None

    def scores(self, head: str, scenario: str) -> list[dict[str, np.ndarray]]:
        """Per task learned: the score in [0, 1] of every test example (n_j,) of every task evaluated then; rows as in
        `predictions`."""
        if ("scores", head, scenario) not in self._once:
            rows, targets = self.predictions(head, scenario)
            free, _ = self.predictions(f"{SCORE}{head}", scenario)
            both = enumerate(zip(rows, free, strict=True))
            self._once["scores", head, scenario] = [class_scores(a, targets, f"in row {i}") | b for i, (a, b) in both]
        return self._once["scores", head, scenario]

    def scores_at(self, commit: Commit, head: str, scenario: str, prefix: str = "") -> dict[str, np.ndarray]:
        """The scores (n_j,) that a commit stored of each task; with `BEFORE`, those of the model before it."""
        _, targets = self.predictions(head, scenario)
        classes = class_scores(self.found(commit, f"{prefix}{head}/{scenario}/"), targets, f"in {commit.path.name}")
        return classes | self.found(commit, f"{prefix}{SCORE}{head}/{scenario}/")

    def baseline_scores(self, head: str, scenario: str) -> dict[str, np.ndarray]:
        """Scores of the untouched model, for the tasks on which it was evaluated."""
        _, targets = self.predictions(head, scenario)
        classes = class_scores(self.baseline(head, scenario), targets, "of the untouched model")
        return classes | self.baseline(f"{SCORE}{head}", scenario)

    def predictions(self, head: str, scenario: str) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        """Per task learned: predicted class of every test example of every task evaluated then; and the true classes.

        Row i is the state after task i, the last one the newest state; a session that learned several tasks fills the
        row of the last of them. The row before a task also has the predictions on the task right before it was learned,
        which its own commit holds (that of the task before it, in older runs). A task that was taken out has neither
        row nor column; rows before it was taken out are of models that knew it.
        """
        if ("rows", head, scenario) not in self._once:
            self._once["rows", head, scenario] = self._predicted(head, scenario)
        return self._once["rows", head, scenario]

    def _predicted(self, head: str, scenario: str) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        rows: list[dict[str, np.ndarray]] = [{} for _ in self.tasks]
        targets: dict[str, np.ndarray] = {}
        for commit in self.active:
            newest = next(task for task in reversed(commit.manifest["learned"]) if task in self._place)
            rows[self._place[newest]] |= self.found(commit, f"{head}/{scenario}/")
            targets |= self.found(commit, "target/")
            for task, before in self.found(commit, f"{BEFORE}{head}/{scenario}/").items():
                if self._place[task]:  # not the first, now that others were taken out
                    rows[self._place[task] - 1][task] = before
        if rows:
            rows[-1] = self.found(self.commits[-1], f"{head}/{scenario}/")
        return rows, targets

    def found(self, commit: Commit, prefix: str) -> dict[str, np.ndarray]:
        """What a commit stored under this prefix, by task, for tasks that were not taken out.

        Args:
            commit: that of an active task, the first, or one of the two newest.
        """
        stored = self._predictions[commit.path].get(prefix, {})
        whole = stored.keys() <= self._place.keys()
        return stored if whole else {task: v for task, v in stored.items() if task in self._place}

    def baseline(self, head: str, scenario: str) -> dict[str, np.ndarray]:
        """Predictions of the untouched model on each task that it could be evaluated on, when the run began or when the
        task had joined the stream."""
        found = dict(self.found(self.commits[0], f"{head}/{scenario}/"))
        for commit in self.active:
            found |= self.found(commit, f"{JOINED}{head}/{scenario}/")
        return found

    def matrix(self, head: str, scenario: str) -> AccuracyMatrix:
        """a(i, j): accuracy on task j after learning task i."""
        if ("matrix", head, scenario) not in self._once:
            scores, baseline = self.scores(head, scenario), self.baseline_scores(head, scenario)
            sizes = {task: len(found) for row in [baseline, *scores] for task, found in row.items()}
            self._once["matrix", head, scenario] = AccuracyMatrix.from_scores(scores, sizes, self.tasks, baseline)
        return self._once["matrix", head, scenario]

    def per_class(self, head: str, scenario: str, tasks: Sequence[str] | None = None) -> list[ClassAccuracy]:
        """The accuracy at the end of every class (by its text) in the test data of these tasks, or of all; the worst
        first."""
        rows, targets = self.predictions(head, scenario)
        texts = self.config["stream"]["labels"]
        found = class_accuracies(rows[-1] if rows else {}, targets, self.tasks if tasks is None else tasks)
        return worst_first([c._replace(label=texts[int(c.label)]) for c in found])

    def macro(self, head: str, scenario: str) -> float | None:
        """The mean over classes of their accuracy at the end; None where a task was not measured then."""
        rows, targets = self.predictions(head, scenario)
        return final_accuracy_macro(rows[-1] if rows else {}, targets, self.tasks)

    def routing(self) -> Routing | None:
        """Where the router sends the test examples of each task; None where the model has no state for every task."""
        rows: list[dict[str, np.ndarray]] = [{} for _ in self.tasks]
        for commit in (*self.active, *self.commits[-1:]):
            named = commit.manifest["learned"]  # what routes count by
            known = set(named)
            place = np.array([self._place.get(t, -1) for t in named], dtype=int)
            row = max((self._place[t] for t in named if t in self._place), default=None)
            if row is not None:
                rows[row] = {t: place[v] for t, v in self.found(commit, "route/").items() if t in known}
        if not rows or set(rows[-1]) != set(self.tasks):
            return None
        return Routing.from_routes(rows, self.found(self.commits[-1], "asked/"), self.tasks)

    @property
    def guarantees(self) -> list[dict[str, Any]]:
        """Every promise and what was measured of it, after every task that was not taken out, and when one was."""
        counting = {c.path for c in self.active}
        kept = [c for c in self.commits if c.path in counting or "reverts" in c.manifest]
        return [g for commit in kept for g in commit.manifest["guarantees"]]

    @property
    def per_task(self) -> list[dict[str, Any]]:
        """Time, steps, memory and disk of every task that was not taken out, from the journal (the last time it was
        learned)."""
        keys = ("task", "train_seconds", "evaluate_seconds", "steps", "peak_memory_bytes", "disk_bytes")
        last = {e["task"]: {k: e.get(k) for k in keys} for e in self.journal if e["event"] == "task"}
        return [last[c.manifest["task"]] for c in self.active if c.manifest["task"] in last]

    def records(self) -> list[ResultRecord]:
        """One record for every head and scenario."""
        out = []
        per_task, routing = self.per_task, self.routing()
        trainable = self.active[-1].manifest.get("trainable_parameters", 0) if self.active else 0
        for head, scenario in self.readings:
            matrix = self.matrix(head, scenario)
            facts = {
                "recipe": self.config["recipe"]["name"],
                "seed": self.config["seed"],
                "scenario": scenario,
                "head": head,
                "model": str(self.config["model_name"] or self.config["model"]["fingerprint"]),
                "stream": self.config["stream"]["name"],
                "final_accuracy_macro": self.macro(head, scenario),
                "per_class": [c._asdict() for c in self.per_class(head, scenario)],
                "flips": flips_share(score_flips(self.scores(head, scenario), self.tasks)),
                "routing_accuracy": routing.accuracy if routing else None,
                "train_seconds": sum(t["train_seconds"] or 0 for t in per_task),
                "evaluate_seconds": sum(t["evaluate_seconds"] or 0 for t in per_task),
                "steps": sum(t["steps"] or 0 for t in per_task),
                "trainable_parameters": trainable,
                "guarantees": self.guarantees,
                "per_task": per_task,
                "run": str(self.path),
            }
            out.append(make_record(matrix, facts))
        return out

    def geometry(self, tolerance: float) -> dict[str, float | None]:
        """How the tasks' LoRA updates lie to each other, over all layers; formulas in `metrics.geometry`.

        Args:
            tolerance: entries of dW up to this size count as zero in the collision rate (B A has no exact zeros).

        Raises:
            ConfigError: the run has no LoRA adapter of its own for every task.
        """
        from .geometry import geometry

        return geometry(self, tolerance)

    def summary(self) -> str:
        """The accuracy matrix, the metrics and the guarantees, as text."""
        lines = []
        for head, scenario in self.readings:
            matrix = self.matrix(head, scenario)
            lines.append(f"{self.config['recipe']['name']} · head {head} · {scenario}-incremental")
            width = max(len(t) for t in matrix.tasks)
            for i, row in enumerate(matrix.values.tolist()):  # of Python's numbers, which are written faster
                cells = " ".join(f"{100 * x:5.1f}" if x == x else "    –" for x in row[: i + 1])
                if any(x == x for x in row):
                    lines.append(f"  after {matrix.tasks[i]:<{width}}  {cells}")
            figures = [f"{k} {100 * v:.1f}" for k, v in summary(matrix).items() if v is not None and "micro" not in k]
            if (macro := self.macro(head, scenario)) is not None:
                figures.insert(1, f"final_accuracy_macro {100 * macro:.1f}")
            lines.append("  " + ", ".join(figures).replace("_", " "))
            lines.append(f"  {sizes_told(matrix)}")
            if classes := self.per_class(head, scenario):
                shown = [f"{c.label} {100 * c.accuracy:.1f} ({c.examples})" for c in classes[:MOST_CLASSES]]
                more = f" and {len(classes) - MOST_CLASSES} more" if len(classes) > MOST_CLASSES else ""
                lines.append(f"  classes, worst first (test examples): {', '.join(shown)}{more}")
        if routing := self.routing():
            each = zip(routing.tasks, routing.matrix.values[-1], strict=True)
            shares = ", ".join(f"{task} {100 * share:.1f}" for task, share in each)
            mean, pooled = 100 * routing.accuracy, 100 * routing.accuracy_micro
            lines.append(f"  sent to their own task: {mean:.1f} of 100 (each example alike {pooled:.1f}); {shares}")
        if gone := self.commits[-1].manifest.get("not_evaluated") if self.commits else None:
            lines.append(f"  not evaluated any more, since the test data is gone: {', '.join(gone)}")
        lines += [f"  taken out: {task}" for task in self.reverted]
        promises = self.promises()
        lines += [self._promise(*key, found) for key, found in promises.items()]
        broken = [name for (_, name), found in promises.items() if not all(g["holds"] for g in found)]
        if broken:
            what = "; ".join(dict.fromkeys(broken))
            lines.append(f"BROKEN PROMISE: {what}: do not use or export this model before you know why")
        return "\n".join(lines)

    def promises(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """What was measured of every promise, by (source, name), in the order of learning."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for g in self.guarantees:
            if g["bound"] is not None:
                found.setdefault((g["source"], g["name"]), []).append(g)
        return found

    @staticmethod
    def _promise(source: str, name: str, found: list[dict[str, Any]]) -> str:
        broken = [g for g in found if not g["holds"]]
        worst = max(found, key=lambda g: float("inf") if g["value"] is None else g["value"])
        value = "not a number" if worst["value"] is None else f"{worst['value']:.2g}"
        where = f" (broken after {', '.join(g['task'] for g in broken)})" if broken else ""
        mark = "BROKEN" if broken else "kept"
        return f"  {mark}: {source}, {name}: at most {value}, promised {worst['bound']:.2g}{where}"
