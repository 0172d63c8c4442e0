"""The accuracy matrix a(i, j), and every figure that is computed from it.

a(i, j): accuracy on task j after learning task i; T tasks, 1-based in formulas; n_j: test size of task j; b_j: accuracy
on task j of the untouched model. All figures are fractions in [0, 1] (differences in [-1, 1]). A figure whose formula
needs an entry that was not measured is undefined: None, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..core.errors import ConfigError, RunError, nearest

Predictions = Sequence["Mapping[str, np.ndarray] | None"]

FORMULAS: dict[str, str] = {
    "final_accuracy": "mean over j of a(T, j)",
    "final_accuracy_micro": "sum over j of n_j a(T, j) / sum over j of n_j",
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
        values: (T, T), row i is the state after task i; nan where not measured. Entries above the diagonal may be
            measured; only forward transfer reads them.
        test_sizes: (T,) number of test examples n_j.
        baseline: (T,) accuracy b_j of the untouched model; nan where its head cannot name the classes.
        tasks: names, in the order of learning.

    Raises:
        ConfigError: shapes that do not fit, accuracies outside [0, 1], or a test size below 1.
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
        if (self.test_sizes < 1).any():
            raise ConfigError(f"accuracy matrix: every task needs test examples, got {self.test_sizes.tolist()}")

    @classmethod
    def from_predictions(
        cls,
        predictions: Predictions,
        targets: Mapping[str, np.ndarray],
        tasks: Sequence[str],
        baseline: Mapping[str, np.ndarray] | None = None,
    ) -> AccuracyMatrix:
        """Count what was right.

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
        values = np.full((len(tasks), len(tasks)), np.nan)
        for i, found in enumerate(predictions):
            values[i] = _accuracies(found, targets, tasks, f"after task `{tasks[i]}`")
        b = _accuracies(baseline, targets, tasks, "of the untouched model")
        return cls(values, np.array([len(targets[t]) for t in tasks]), b, tuple(tasks))

    def upto(self, count: int) -> AccuracyMatrix:
        """The matrix of the first `count` tasks, as if the stream had ended there."""
        n = slice(0, count)
        return AccuracyMatrix(self.values[n, n], self.test_sizes[n], self.baseline[n], self.tasks[n])


def _accuracies(
    found: Mapping[str, np.ndarray] | None, targets: Mapping[str, np.ndarray], tasks: Sequence[str], when: str
) -> np.ndarray:
    row = np.full(len(tasks), np.nan)
    for task, predicted in (found or {}).items():
        if task not in tasks:
            raise RunError(f"predictions {when} name an unknown task `{task}`: {nearest(task, tasks)}")
        row[list(tasks).index(task)] = _right(predicted, targets[task], f"{when} for `{task}`").mean()
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
    a, n = matrix.values, matrix.test_sizes
    return np.array([np.average(a[i, : i + 1], weights=n[: i + 1] if micro else None) for i in range(len(n))])


def final_accuracy(matrix: AccuracyMatrix) -> float | None:
    """mean over j of a(T, j): every task counts the same."""
    return measured_mean(matrix.values[-1])


def final_accuracy_micro(matrix: AccuracyMatrix) -> float | None:
    """sum over j of n_j a(T, j) / sum over j of n_j: every test example counts the same."""
    return measured_mean(np.average(matrix.values[-1], weights=matrix.test_sizes))


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


class Flips(NamedTuple):
    """Examples of one task that were right at some point since it was learned and are wrong at the end.

    Attributes:
        share: of the task's test examples; None where the task was not evaluated both since and at the end.
        indices: positions in the task's test set, ascending.
    """

    share: float | None
    indices: np.ndarray


def flips(predictions: Predictions, targets: Mapping[str, np.ndarray], tasks: Sequence[str]) -> dict[str, Flips]:
    """Per task, the examples right at some point since it was learned (any stored one) and wrong at the last.

    Predictions on a task before it was learned do not count: an example that was right by chance cannot be forgotten.

    Args:
        predictions: as for `AccuracyMatrix.from_predictions`; the last entry is the end.
        targets: the true classes of every task, (n_j,).
        tasks: names, in the order of learning.

    Raises:
        RunError: predictions of another number of examples than there are targets.
    """
    out = {}
    for j, task in enumerate(tasks):
        *earlier, last = [
            None if not found or task not in found else _right(found[task], targets[task], f"in row {i} for `{task}`")
            for i, found in enumerate(predictions or [None])
        ]
        known = [right for right in earlier[j:] if right is not None]
        if last is None or not known:
            out[task] = Flips(None, np.array([], dtype=int))
            continue
        flipped = np.any(known, axis=0) & ~last
        out[task] = Flips(float(flipped.mean()), np.flatnonzero(flipped))
    return out


def flips_share(flipped: Mapping[str, Flips]) -> float | None:
    """The figure `flips`: mean of the shares, over the tasks that have one; None where none has."""
    return measured_mean([f.share for f in flipped.values() if f.share is not None])
