"""How far an accuracy may be off because its test set is small."""

from __future__ import annotations

import numpy as np
import pytest

from perpetune.metrics.accuracy import AccuracyMatrix
from perpetune.metrics.uncertainty import coarseness, mean_error, sizes_told, standard_error


def test_the_standard_error_is_that_of_drawn_test_sets():
    """By simulation: 20 000 test sets of 50 examples, each right with probability 0.8; and means of two tasks."""
    drawn = np.random.default_rng(0).random((20_000, 2, 50)) < 0.8
    accuracies = drawn.mean(2)
    assert standard_error(0.8, 50) == pytest.approx(accuracies[:, 0].std(), rel=0.02)
    assert mean_error([0.8, 0.8], [50, 50]) == pytest.approx(accuracies.mean(1).std(), rel=0.02)


def test_of_scores_between_0_and_1_it_is_an_upper_bound():
    scores = np.random.default_rng(1).beta(2, 1, size=(5_000, 40))
    assert scores.mean(1).std() < standard_error(float(scores.mean()), 40)


def test_all_right_is_not_certain():
    assert standard_error(1.0, 50) == pytest.approx((0.99 * 0.01 / 50) ** 0.5)
    assert standard_error(0.0, 50) == pytest.approx(standard_error(1.0, 50))
    assert standard_error(1.0, 1) == 0.5


def test_nothing_measured_has_no_error():
    assert standard_error(None, 10) is None and standard_error(float("nan"), 10) is None
    assert mean_error([0.5, None], [10, 10]) is None and mean_error([], []) is None


@pytest.mark.parametrize(
    ("limit", "accuracy", "examples", "told"),
    [
        (0.02, 0.5, 20, "one example is 5 and one standard error 11 points"),
        (0.02, 0.9, 100, "one standard error 3 points"),
        (0.02, 1.0, 40, "one example is 2.5 points"),
        (0.02, 0.9, 1000, None),
        (0.0, 0.5, 20, None),
        (-1, 0.5, 20, None),
    ],
)
def test_a_limit_finer_than_its_test_set(limit, accuracy, examples, told):
    assert coarseness(limit, accuracy, examples) == told


def test_sizes_are_told_in_a_line():
    matrix = AccuracyMatrix(np.array([[1.0, np.nan], [0.5, 0.5]]), np.array([25, 100]), np.full(2, np.nan), ("a", "b"))
    assert (
        sizes_told(matrix) == "test examples: a 25, b 100; one standard error: 5.6 points of the final accuracy, "
        "up to 10.0 of a task's"
    )
