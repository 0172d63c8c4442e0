"""Examples that were right once and are wrong at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .accuracy import Predictions, class_scores, cut, measured_mean

RIGHT = 0.5  # a score from which on an example counts as right


class Flips(NamedTuple):
    """Examples of one task that were right at some point since it was learned and are wrong at the end.

    Attributes:
        share: of the task's test examples; None where the task was not evaluated both since and at the end.
        indices: positions in the task's test set, ascending.
    """

    share: float | None
    indices: np.ndarray


def flips(predictions: Predictions, targets: Mapping[str, np.ndarray], tasks: Sequence[str]) -> dict[str, Flips]:
    """`score_flips` of predicted classes.

    Args:
        predictions: as for `AccuracyMatrix.from_predictions`; the last entry is the end.
        targets: the true classes of every task, (n_j,).
        tasks: names, in the order of learning.

    Raises:
        RunError: predictions of another number of examples than there are targets.
    """
    return score_flips([class_scores(x, targets, f"in row {i}") for i, x in enumerate(predictions)], tasks)


def score_flips(scores: Sequence[Mapping[str, np.ndarray]], tasks: Sequence[str]) -> dict[str, Flips]:
    """Per task, the examples right at some point since it was learned (any stored one) and wrong at the last.

    An example is right where its score is at least `RIGHT`. Predictions from before a task was learned do not
    count: what is right by chance cannot be forgotten.

    Args:
        scores: as for `AccuracyMatrix.from_scores`; the last entry is the end.
    """
    *earlier, last = scores or [{}]
    ever: dict[str, np.ndarray] = {}  # whether right at some point
    for i, found in enumerate(earlier):
        measured = [task for task in tasks[: i + 1] if task in found]
        if not measured:
            continue
        right = np.concatenate([found[task] for task in measured]) >= RIGHT
        for task, now in zip(measured, cut(right, [len(found[task]) for task in measured]), strict=True):
            if task in ever:
                np.logical_or(ever[task], now, out=ever[task])
            else:
                ever[task] = now.copy()
    out = {}
    for task in tasks:
        if task not in last or task not in ever:
            out[task] = Flips(None, np.array([], dtype=int))
            continue
        flipped = ever[task] & (last[task] < RIGHT)
        out[task] = Flips(float(flipped.mean()), np.flatnonzero(flipped))
    return out


def flips_share(flipped: Mapping[str, Flips]) -> float | None:
    """The figure `flips`: mean of the shares, over the tasks that have one; None where none has."""
    return measured_mean([f.share for f in flipped.values() if f.share is not None])
