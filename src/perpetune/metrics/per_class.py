"""Accuracy of every class, and its mean over classes: what shows a rare class that nobody is told of.

The test examples of a class are taken together from all tasks that have it. An example counts as in
`metrics.accuracy`: right where its predicted class is its true one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .accuracy import class_scores, measured_mean


class ClassAccuracy(NamedTuple):
    """
    Attributes:
        label: its number, or its text.
        accuracy: the share of its test examples that are right (its recall).
        examples: how many there are.
    """

    label: int | str
    accuracy: float
    examples: int


def class_accuracies(
    predictions: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], tasks: Sequence[str]
) -> list[ClassAccuracy]:
    """Of every class that the test data of these tasks has, by number; tasks without predictions are left out.

    Args:
        predictions, targets: predicted and true classes by task, (n_j,) each.

    Raises:
        RunError: predictions of another number of examples than there are targets.
    """
    measured = [task for task in tasks if task in predictions]
    if not measured:
        return []
    right = class_scores({task: predictions[task] for task in measured}, targets)
    score = np.concatenate([right[task] for task in measured])
    of = np.concatenate([np.asarray(targets[task]) for task in measured])
    classes, place = np.unique(of, return_inverse=True)
    examples, hits = np.bincount(place), np.bincount(place, weights=score)
    return [ClassAccuracy(int(c), float(h / n), int(n)) for c, h, n in zip(classes, hits, examples, strict=True)]


def final_accuracy_macro(
    predictions: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], tasks: Sequence[str]
) -> float | None:
    """mean over classes c of [share of the test examples of c, of all tasks, that are right at T].

    Arguments as for `class_accuracies`, with the predictions at the end. None where a task was not measured then, or
    has no classes.
    """
    if not all(task in predictions for task in tasks):
        return None
    return measured_mean([c.accuracy for c in class_accuracies(predictions, targets, tasks)])


def worst_first(classes: Sequence[ClassAccuracy]) -> list[ClassAccuracy]:
    """Classes by their accuracy; of equals, the one with more examples first."""
    return sorted(classes, key=lambda c: (c.accuracy, -c.examples, str(c.label)))
