"""Accuracy of single classes against scikit-learn's, and what it shows of a rare one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import recall_score

from perpetune.metrics.per_class import class_accuracies, final_accuracy_macro, worst_first


def test_recall_of_each_class_and_their_mean_over_all_tasks():
    draw = np.random.default_rng(0)
    targets = {"a": draw.integers(0, 4, 60), "b": draw.integers(2, 7, 50)}
    predictions = {t: np.where(draw.random(len(y)) < 0.6, y, draw.integers(0, 7, len(y))) for t, y in targets.items()}
    y, p = (np.concatenate([of["a"], of["b"]]) for of in (targets, predictions))
    known = sorted(set(y.tolist()))
    expected = recall_score(y, p, average=None, labels=known)
    found = class_accuracies(predictions, targets, ["a", "b"])
    assert [c.label for c in found] == known and sum(c.examples for c in found) == 110
    assert [c.accuracy for c in found] == pytest.approx(expected)
    assert final_accuracy_macro(predictions, targets, ["a", "b"]) == pytest.approx(expected.mean())


def test_a_rare_class_that_is_never_predicted_shows():
    target = np.array([0] * 300 + [1] * 8)
    predictions = {"w": np.zeros(308, dtype=int)}
    assert final_accuracy_macro(predictions, {"w": target}, ["w"]) == 0.5
    assert worst_first(class_accuracies(predictions, {"w": target}, ["w"])) == [(1, 0.0, 8), (0, 1.0, 300)]


def test_what_was_not_measured_is_undefined():
    target = {"w": np.array([0, 1]), "v": np.array([1, 1])}
    found = {"w": np.array([0, 0])}
    assert final_accuracy_macro(found, target, ["w", "v"]) is None and final_accuracy_macro({}, {}, []) is None
    assert class_accuracies(found, target, ["w", "v"]) == [(0, 1.0, 1), (1, 0.0, 1)]
    assert class_accuracies({}, target, ["w"]) == []
