"""How far an accuracy may be off because its test set is small."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .accuracy import AccuracyMatrix

NAMED = 10  # tasks whose test sizes are told one by one


def standard_error(accuracy: float | None, examples: int) -> float | None:
    """sqrt(a (1 - a) / n), the binomial standard error of a mean of n scores that are 0 or 1; of scores in between it
    is the most that theirs can be. 0 and 1 are taken for half an example short of it, for n examples tell no more. None
    where nothing was measured."""
    if accuracy is None or accuracy != accuracy or examples < 1:
        return None
    half = 1 / (2 * examples)
    a = min(max(accuracy, half), 1 - half)
    return math.sqrt(a * (1 - a) / examples)


def mean_error(accuracies: Sequence[float | None], sizes: Sequence[int]) -> float | None:
    """Standard error of the mean of the accuracies of T tasks with test sets of their own: sqrt(sum of squares) / T."""
    errors = [standard_error(a, n) for a, n in zip(accuracies, sizes, strict=False)]
    known = [e for e in errors if e is not None]
    return math.sqrt(sum(e * e for e in known)) / len(known) if known and len(known) == len(errors) else None


def coarseness(limit: float, accuracy: float, examples: int) -> str | None:
    """What a limit on a difference of accuracies is finer than: one test example, or one standard error; None where it
    is neither."""
    one, error = 1 / examples, standard_error(accuracy, examples) or 0.0
    if not 0 < limit < max(one, error):
        return None
    what = f"one example is {100 * one:.2g}" if limit < one else ""
    spread = f"one standard error {100 * error:.2g}" if limit < error else ""
    return " and ".join(part for part in (what, spread) if part) + " points"


def sizes_told(matrix: AccuracyMatrix) -> str:
    """How many test examples the figures of a run rest on, and what that leaves open, in a line."""
    sizes, last = matrix.test_sizes.tolist(), matrix.values[-1].tolist()
    each = ", ".join(f"{task} {n}" for task, n in zip(matrix.tasks, sizes, strict=True))
    told = each if len(sizes) <= NAMED else f"{min(sizes)} to {max(sizes)} a task"
    errors = [e for e in (standard_error(a, n) for a, n in zip(last, sizes, strict=True)) if e is not None]
    mean = mean_error([a for a in last if a == a], [n for a, n in zip(last, sizes, strict=True) if a == a])
    if mean is None:
        return f"test examples: {told}"
    return (
        f"test examples: {told}; one standard error: {100 * mean:.1f} points of the final accuracy, up to "
        f"{100 * max(errors):.1f} of a task's"
    )
