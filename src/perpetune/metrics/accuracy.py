"""The accuracy matrix a(i, j), and every figure that is computed from it.

Every example has a score in [0, 1]: 1 where a predicted class is right and 0 where it is wrong, or what the metric of
its task gives a free text. a(i, j): mean score on task j after learning task i; T tasks, 1-based in formulas; n_j: test
size of task j; b_j: mean score on task j of the untouched model. All figures are fractions in [0, 1] (differences in
[-1, 1]). A figure whose formula needs an entry that was not measured is undefined: None, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.errors import ConfigError, RunError, nearest

Predictions = Sequence["Mapping[str, np.ndarray] | None"]

FORMULAS: dict[str, str] = {
    "final_accuracy": "mean over j of a(T, j)",
    "final_accuracy_micro": "sum over j of n_j a(T, j) / sum over j of n_j",
    "final_accuracy_macro": "mean over classes c of the share of the test examples of c, in all tasks, right at T",
    "average_incremental_accuracy": "mean over i of [mean over j <= i of a(i, j)]",
    "average_incremental_accuracy_micro": "mean over i of [sum over j <= i of n_j a(i, j) / sum over j <= i of n_j]",
    "forgetting": "mean over j < T of [max over j <= i < T of a(i, j) - a(T, j)]",
    "backward_transfer": "mean over j < T of [a(T, j) - a(j, j)]",
    "forward_transfer": "mean over j >= 2 of [a(j-1, j) - b_j]",
    "plasticity": "mean over j of a(j, j)",
    "intransigence": "mean over j of [a*(j) - a(j, j)], a* from a joint or single-task run",
    "flips": "mean over j < T of the share of examples of task j right after some task i, j <= i < T, and wrong at T",
    "routing_accuracy": "mean over j of the share of test examples of task j that the router sends to task j at T",
}


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    """Accuracies of one run, read by one head in one scenario. The arrays are read-only.

    Attributes:
        values: (T, T), row i after task i; nan where not measured; above the diagonal only forward transfer reads.
        test_sizes: (T,) number of test examples n_j.
        baseline: (T,) accuracy b_j of the untouched model; nan where its head cannot name the classes.
        tasks: names, in the order of learning.

    Raises:
        ConfigError: shapes that do not fit, accuracies outside [0, 1], or a test size below 1 of what was measured.
    """

    values: np.ndarray
    test_sizes: np.ndarray
    baseline: np.ndarray
    tasks: tuple[str, ...]

    def __post_init__(self) -> None:
        T = len(self.tasks)
        object.__setattr__(self, "tasks", tuple(self.tasks))
        for name, dtype, shape in (("values", float, (T, T)), ("test_sizes", int, (T,)), ("baseline", float, (T,))):
            array = np.array(getattr(self, name), dtype=dtype)
            if array.shape != shape:
                raise ConfigError(f"accuracy matrix: `{name}` is {array.shape}, but {T} tasks need {shape}")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if len(set(self.tasks)) != T or T == 0:
            raise ConfigError(f"accuracy matrix: needs tasks, each with a name of its own, got {list(self.tasks)}")
        for name in ("values", "baseline"):
            measured = getattr(self, name)[~np.isnan(getattr(self, name))]
            if ((measured < 0) | (measured > 1)).any():
                raise ConfigError(f"accuracy matrix: `{name}` must be fractions from 0 to 1, not percent")
        if ((self.test_sizes < 1) & ~np.isnan([*self.values, self.baseline]).all(0)).any():
            raise ConfigError(f"accuracy matrix: what is measured needs test examples, got {self.test_sizes.tolist()}")

    @classmethod
    def from_predictions(
        cls,
        predictions: Predictions,
        targets: Mapping[str, np.ndarray],
        tasks: Sequence[str],
        baseline: Mapping[str, np.ndarray] | None = None,
    ) -> AccuracyMatrix:
        """Count what was right: `from_scores` where an example is scored by its class.

        Args:
            predictions: predictions[i][task] are the predicted classes, (n_j,), after task i. A task that was not
                evaluated then is absent; a state that was not evaluated at all is empty or None. Fewer rows than
                tasks: the run is not finished.
            targets: the true classes of every task, (n_j,).
            tasks: names, in the order of learning.
            baseline: predictions of the untouched model, for the tasks whose classes its head can name.

        Raises:
            RunError: a task without targets, predictions of an unknown task or of another number of examples.
        """
        if missing := [t for t in tasks if t not in targets]:
            raise RunError(f"no test labels for task `{missing[0]}`: {nearest(missing[0], targets)}")
        if len(predictions) > len(tasks):
            raise RunError(f"predictions after {len(predictions)} tasks, but the stream has {len(tasks)}")
        scores = [class_scores(x, targets, f"after task `{t}`") for t, x in zip(tasks, predictions, strict=False)]
        sizes = {task: len(target) for task, target in targets.items()}
        return cls.from_scores(scores, sizes, tasks, class_scores(baseline, targets, "of the untouched model"))

    @classmethod
    def from_scores(
        cls,
        scores: Sequence[Mapping[str, np.ndarray]],
        sizes: Mapping[str, int],
        tasks: Sequence[str],
        baseline: Mapping[str, np.ndarray] | None = None,
    ) -> AccuracyMatrix:
        """Mean scores.

        Args:
            scores: scores[i][task] are those of its test examples, (n_j,) in [0, 1], after task i; a task that was not
                evaluated then is absent. Fewer rows than tasks: the run is not finished.
            sizes: n_j of every task; one that was never evaluated may be absent.
            tasks: names, in the order of learning.
            baseline: scores of the untouched model, where it has any.

        Raises:
            RunError: scores of an unknown task or of another number of examples.
        """
        values = np.full((len(tasks), len(tasks)), np.nan)
        for i, (task, found) in enumerate(zip(tasks, scores, strict=False)):
            values[i] = _means(found, sizes, tasks, f"after task `{task}`")
        b = _means(baseline or {}, sizes, tasks, "of the untouched model")
        return cls(values, np.array([sizes.get(t, 0) for t in tasks]), b, tuple(tasks))

    def upto(self, count: int) -> AccuracyMatrix:
        """The matrix of the first `count` tasks, as if the stream had ended there."""
        n = slice(0, count)
        return AccuracyMatrix(self.values[n, n], self.test_sizes[n], self.baseline[n], self.tasks[n])


def class_scores(
    found: Mapping[str, np.ndarray] | None, targets: Mapping[str, np.ndarray], when: str = ""
) -> dict[str, np.ndarray]:
    """Scores of predicted classes, (n_j,) by task: 1 for the true class, else 0.

    Raises:
        RunError: predictions of an unknown task or of another number of examples than there are targets.
    """
    for task in found or {}:
        if task not in targets:
            raise RunError(f"predictions {when} name an unknown task `{task}`: {nearest(task, targets)}")
    if not found:
        return {}
    known = [targets[task] for task in found]
    fits = [
        getattr(x, "shape", None) == t.shape and t.ndim == 1 and len(t)
        for x, t in zip(found.values(), known, strict=True)
    ]
    if not all(fits):
        return {task: _right(x, targets[task], f"{when} for `{task}`").astype(float) for task, x in found.items()}
    right = (np.concatenate(list(found.values())) == np.concatenate(known)).astype(float)
    return dict(zip(found, cut(right, [len(t) for t in known]), strict=True))


def cut(joined: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
    """Views of the parts that were concatenated."""
    ends = np.cumsum(sizes).tolist()
    return [joined[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _means(found: Mapping[str, np.ndarray], sizes: Mapping[str, int], tasks: Sequence[str], when: str) -> np.ndarray:
    place, row = {task: j for j, task in enumerate(tasks)}, np.full(len(tasks), np.nan)
    for task, scores in found.items():
        if task not in place:
            raise RunError(f"predictions {when} name an unknown task `{task}`: {nearest(task, tasks)}")
        if scores.shape != (sizes[task],):
            raise RunError(f"scores {when} of `{task}` have shape {scores.shape}, it has {sizes[task]} test examples")
    if found:
        counts = np.array([len(scores) for scores in found.values()])
        starts = np.cumsum(counts) - counts
        row[[place[task] for task in found]] = np.add.reduceat(np.concatenate(list(found.values())), starts) / counts
    return row


def _right(predicted: Any, target: Any, where: str) -> np.ndarray:
    """(n,) whether each prediction is right."""
    predicted, target = np.asarray(predicted), np.asarray(target)
    if predicted.shape != target.shape or target.ndim != 1 or not len(target):
        raise RunError(
            f"predictions {where} have shape {predicted.shape}, its test labels {target.shape}: "
            "were they made with another stream or limit?"
        )
    return predicted == target


def measured_mean(values: Any) -> float | None:
    """The mean; None where there is nothing to average or an entry was not measured."""
    values = np.asarray(values, dtype=float)
    return None if not values.size or np.isnan(values).any() else float(values.mean())


def stage_accuracy(matrix: AccuracyMatrix, *, micro: bool = False) -> np.ndarray:
    """(T,) accuracy over the tasks seen after each task, mean over tasks, or over samples (`micro`); nan if unknown."""
    n = np.maximum(matrix.test_sizes, 1) if micro else np.ones_like(matrix.test_sizes)  # without examples: nan anyway
    return np.array([np.average(row[: i + 1], weights=n[: i + 1]) for i, row in enumerate(matrix.values)])


def final_accuracy(matrix: AccuracyMatrix) -> float | None:
    """mean over j of a(T, j): every task counts the same."""
    return measured_mean(matrix.values[-1])


def final_accuracy_micro(matrix: AccuracyMatrix) -> float | None:
    """sum over j of n_j a(T, j) / sum over j of n_j: every test example counts the same."""
    return measured_mean(stage_accuracy(matrix, micro=True)[-1])


def average_incremental_accuracy(matrix: AccuracyMatrix) -> float | None:
    """mean over i of [mean over j <= i of a(i, j)]: accuracy over the tasks seen so far, averaged over time."""
    return measured_mean(stage_accuracy(matrix))


def average_incremental_accuracy_micro(matrix: AccuracyMatrix) -> float | None:
    """mean over i of [sum over j <= i of n_j a(i, j) / sum over j <= i of n_j]."""
    return measured_mean(stage_accuracy(matrix, micro=True))


def forgetting(matrix: AccuracyMatrix) -> float | None:
    """mean over j < T of [max over j <= i < T of a(i, j) - a(T, j)]: never clipped, negative means transfer."""
    a, T = matrix.values, len(matrix.tasks)
    return measured_mean([a[j : T - 1, j].max() - a[-1, j] for j in range(T - 1)])


def backward_transfer(matrix: AccuracyMatrix) -> float | None:
    """mean over j < T of [a(T, j) - a(j, j)]."""
    return measured_mean((matrix.values[-1] - matrix.values.diagonal())[:-1])


def forward_transfer(matrix: AccuracyMatrix) -> float | None:
    """mean over j >= 2 of [a(j-1, j) - b_j]: undefined where the head cannot name the classes yet."""
    return measured_mean(matrix.values.diagonal(1) - matrix.baseline[1:])


def plasticity(matrix: AccuracyMatrix) -> float | None:
    """mean over j of a(j, j): how well tasks are learned at all."""
    return measured_mean(matrix.values.diagonal())


def intransigence(matrix: AccuracyMatrix, reference: Mapping[str, float | None] | None) -> float | None:
    """mean over j of [a*(j) - a(j, j)]: what keeping the past costs the new tasks.

    Args:
        reference: a*(j) by task name, from a joint or single-task run; None or incomplete: undefined.
    """
    best = [(reference or {}).get(task) for task in matrix.tasks]
    return measured_mean(np.array(best, dtype=float) - matrix.values.diagonal())


def summary(matrix: AccuracyMatrix, reference: Mapping[str, float | None] | None = None) -> dict[str, float | None]:
    """Every figure of the matrix by the name under which `FORMULAS` has it (`flips` needs the predictions,
    `routing_accuracy` the routes)."""
    figures = (
        final_accuracy,
        final_accuracy_micro,
        average_incremental_accuracy,
        average_incremental_accuracy_micro,
        forgetting,
        backward_transfer,
        forward_transfer,
        plasticity,
    )
    return {f.__name__: f(matrix) for f in figures} | {"intransigence": intransigence(matrix, reference)}
