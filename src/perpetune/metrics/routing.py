"""Where a router sends the test examples of each task: read off the stored routes, like accuracies off predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .accuracy import AccuracyMatrix


@dataclass(frozen=True, eq=False)
class Routing:
    """Routes of one run, whose T tasks stand in the order of learning.

    Attributes:
        matrix: its a(i, j) is the share of the test examples of task j that are sent to task j after task i.
        confusion: (T, T) test examples of task j (row) that are sent to task t (column) at the end.
        asked: adapters that an input is shown to at the end, mean over all test examples; None where it is not known.
    """

    matrix: AccuracyMatrix
    confusion: np.ndarray
    asked: float | None

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.matrix.tasks

    @property
    def accuracy(self) -> float:
        """mean over j of the share of task j that is sent to task j at the end."""
        return float(self.matrix.values[-1].mean())

    @property
    def accuracy_micro(self) -> float:
        """The same, each test example counting alike."""
        return float(np.average(self.matrix.values[-1], weights=self.matrix.test_sizes))

    @classmethod
    def from_routes(
        cls, routes: Sequence[Mapping[str, np.ndarray]], asked: Mapping[str, np.ndarray], tasks: Sequence[str]
    ) -> Routing:
        """
        Args:
            routes: routes[i][task] are the positions in `tasks` that the task's test examples are sent to after task i,
                (n_j,); -1 for a task that is not one of them. Tasks that were not learned then are left out; the last
                entry has all of them, and nowhere -1.
            asked: of each task, how many adapters each of its examples is shown to at the end, (n_j,); may be empty.
            tasks: names, in the order of learning.
        """
        last = routes[-1]
        own = {task: np.full(len(last[task]), j) for j, task in enumerate(tasks)}
        confusion = np.stack([np.bincount(last[task], minlength=len(tasks)) for task in tasks])
        mean = float(np.concatenate([asked[task] for task in tasks]).mean()) if asked else None
        return cls(AccuracyMatrix.from_predictions(routes, own, tasks), confusion, mean)
