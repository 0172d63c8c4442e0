from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perpetune.core.errors import ConfigError, RunError
from perpetune.metrics import accuracy
from perpetune.metrics.accuracy import FORMULAS, AccuracyMatrix, intransigence, summary
from perpetune.metrics.flips import flips, flips_share

NAN = float("nan")


def matrix(rows: list[list[float]], sizes: list[int] | None = None, baseline: list[float] | None = None):
    T = len(rows)
    values = np.full((T, T), NAN)
    for i, row in enumerate(rows):
        values[i, : len(row)] = row
    tasks = tuple(f"t{j + 1}" for j in range(T))
    return AccuracyMatrix(values, np.array(sizes or [10] * T), np.array(baseline or [NAN] * T), tasks)


def by_the_sheet(a: np.ndarray, n: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    """Every formula of the sheet, letter by letter, 1-based: A(i, j) is a[i - 1, j - 1]."""
    T = len(n)

    def A(i: int, j: int) -> float:
        return float(a[i - 1, j - 1])

    def N(j: int) -> int:
        return int(n[j - 1])

    def mean(terms: list[float]) -> float | None:
        return sum(terms) / len(terms) if terms else None

    all_j, old, new = range(1, T + 1), range(1, T), range(2, T + 1)
    return {
        "final_accuracy": mean([A(T, j) for j in all_j]),
        "final_accuracy_micro": sum(N(j) * A(T, j) for j in all_j) / sum(N(j) for j in all_j),
        "average_incremental_accuracy": mean([mean([A(i, j) for j in range(1, i + 1)]) for i in all_j]),
        "average_incremental_accuracy_micro": mean(
            [sum(N(j) * A(i, j) for j in range(1, i + 1)) / sum(N(j) for j in range(1, i + 1)) for i in all_j]
        ),
        "forgetting": mean([max(A(i, j) for i in range(j, T)) - A(T, j) for j in old]),
        "backward_transfer": mean([A(T, j) - A(j, j) for j in old]),
        "forward_transfer": mean([A(j - 1, j) - float(b[j - 1]) for j in new]),
        "plasticity": mean([A(j, j) for j in all_j]),
    }


@st.composite
def full_runs(draw: st.DrawFn, smallest: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    T = draw(st.integers(smallest, 5))
    share = st.floats(0, 1)
    a = np.array(draw(st.lists(st.lists(share, min_size=T, max_size=T), min_size=T, max_size=T)))
    n = np.array(draw(st.lists(st.integers(1, 500), min_size=T, max_size=T)))
    return a, n, np.array(draw(st.lists(share, min_size=T, max_size=T)))


@settings(max_examples=50)
@given(full_runs())
def test_every_figure_is_its_formula(run):
    a, n, b = run
    found = summary(AccuracyMatrix(a, n, b, tuple(f"t{j}" for j in range(len(n)))))
    for name, value in by_the_sheet(a, n, b).items():
        assert found[name] == (None if value is None else pytest.approx(value, abs=1e-12)), name


@settings(max_examples=50)
@given(full_runs(smallest=2), st.data())
def test_what_was_not_measured_makes_undefined_and_never_zero(run, data):
    """Removing the entry (i, j) makes exactly those figures undefined whose formula reads it."""
    a, n, b = run
    T = len(n)
    i, j = data.draw(st.tuples(st.integers(1, T), st.integers(1, T)))
    a = a.copy()
    a[i - 1, j - 1] = NAN
    found = summary(AccuracyMatrix(a, n, b, tuple(f"t{k}" for k in range(T))))
    reads = {
        "final_accuracy": i == T,
        "final_accuracy_micro": i == T,
        "average_incremental_accuracy": j <= i,
        "average_incremental_accuracy_micro": j <= i,
        "forgetting": j < T and j <= i,
        "backward_transfer": j < T and i in (j, T),
        "forward_transfer": j == i + 1,
        "plasticity": i == j,
    }
    assert {name: found[name] is None for name in reads} == reads


def test_joint_training_has_a_final_accuracy_and_nothing_else():
    joint = matrix([[], [], [0.5, 0.7, 0.9]])
    defined = {k: v for k, v in summary(joint).items() if v is not None}
    assert defined == {"final_accuracy": pytest.approx(0.7), "final_accuracy_micro": pytest.approx(0.7)}


def test_a_single_task_has_no_forgetting_and_no_transfer():
    found = summary(matrix([[0.8]], baseline=[0.1]))
    assert found["final_accuracy"] == found["plasticity"] == found["average_incremental_accuracy"] == 0.8
    assert found["forgetting"] is found["backward_transfer"] is found["forward_transfer"] is None


def test_forgetting_is_negative_where_a_task_gains_from_later_ones():
    assert accuracy.forgetting(matrix([[0.5], [0.6, 0.9], [0.8, 0.9, 0.9]])) == pytest.approx(-0.1)


def test_forgetting_counts_from_the_best_point_before_the_end_not_from_the_first():
    assert accuracy.forgetting(matrix([[0.5], [0.9, 0.9], [0.4, 0.9, 0.9]])) == pytest.approx(0.25)


def test_forward_transfer_needs_a_baseline_for_every_task_after_the_first():
    full = [[0.9, 0.4, 0.1], [0.9, 0.9, 0.5], [0.9, 0.9, 0.9]]
    assert accuracy.forward_transfer(matrix(full, baseline=[NAN, 0.2, 0.2])) == pytest.approx(0.25)
    assert accuracy.forward_transfer(matrix(full, baseline=[0.2, NAN, 0.2])) is None


def test_intransigence_against_a_joint_run():
    m = matrix([[0.7], [0.6, 0.5]])
    assert intransigence(m, {"t1": 0.9, "t2": 0.6}) == pytest.approx(0.15)
    assert intransigence(m, {"t1": 0.9}) is intransigence(m, None) is None
    assert summary(m, {"t1": 0.9, "t2": 0.6})["intransigence"] == pytest.approx(0.15)


def test_every_figure_carries_its_formula():
    assert set(summary(matrix([[0.5]]))) | {"flips", "routing_accuracy", "final_accuracy_macro"} == set(FORMULAS)


TARGETS = {"a": np.array([0, 0, 1, 1]), "b": np.array([2, 3])}


def test_from_predictions_counts_what_was_right():
    rows = [{"a": np.array([0, 0, 1, 0])}, {"a": np.array([0, 2, 2, 1]), "b": np.array([2, 2])}]
    m = AccuracyMatrix.from_predictions(rows, TARGETS, ["a", "b"], {"a": np.array([0, 0, 0, 0])})
    np.testing.assert_array_equal(m.values, [[0.75, NAN], [0.5, 0.5]])
    np.testing.assert_array_equal(m.baseline, [0.5, NAN])
    assert m.test_sizes.tolist() == [4, 2] and m.tasks == ("a", "b")


def test_an_unfinished_run_has_rows_missing_at_the_end_and_a_finished_beginning():
    m = AccuracyMatrix.from_predictions([{"a": np.array([0, 0, 1, 0])}], TARGETS, ["a", "b"])
    assert np.isnan(m.values[1]).all() and summary(m)["final_accuracy"] is None
    assert summary(m.upto(1))["final_accuracy"] == 0.75


def test_a_joint_run_has_empty_rows_first():
    m = AccuracyMatrix.from_predictions([{}, {"a": TARGETS["a"], "b": TARGETS["b"]}], TARGETS, ["a", "b"])
    assert summary(m)["final_accuracy"] == 1.0 and summary(m)["plasticity"] is None


@pytest.mark.parametrize(
    ("rows", "tasks", "says"),
    [
        ([{"a": np.array([0, 0, 1])}], ["a", "b"], r"after task `a` for `a` have shape \(3,\)"),
        ([{"a": np.array([[0], [0], [1], [1]])}], ["a", "b"], "shape"),  # would broadcast to 4 x 4
        ([{"c": np.array([0])}], ["a", "b"], "unknown task `c`"),
        ([], ["a", "c"], "no test labels for task `c`"),
        ([{}, {}, {}], ["a", "b"], "after 3 tasks"),
    ],
)
def test_predictions_that_do_not_fit_are_refused(rows, tasks, says):
    with pytest.raises(RunError, match=says):
        AccuracyMatrix.from_predictions(rows, TARGETS, tasks)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"values": np.array([[62.3]])}, "not percent"),
        ({"values": np.zeros((2, 2))}, "1 tasks need"),
        ({"test_sizes": np.array([0])}, "needs test examples"),
        ({"tasks": ()}, "tasks"),
    ],
)
def test_a_matrix_that_makes_no_sense_is_refused(change, says):
    fields = {"values": [[0.5]], "test_sizes": [4], "baseline": [NAN], "tasks": ("a",)} | change
    with pytest.raises(ConfigError, match=says):
        AccuracyMatrix(**fields)


def test_a_matrix_cannot_be_changed_through_its_arrays():
    source = np.array([[0.5]])
    m = AccuracyMatrix(source, [4], [NAN], ("a",))
    source[0, 0] = 0.1
    assert m.values[0, 0] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        m.values[0, 0] = 0.2


def test_flips_are_the_examples_right_once_and_wrong_at_the_end():
    rows = [
        {"a": np.array([0, 9, 9, 9])},
        {"a": np.array([9, 0, 9, 1]), "b": np.array([9, 9])},
        {"a": np.array([9, 9, 9, 1]), "b": np.array([2, 9])},  # 0 and 1 were right, 2 never was, 3 still is
    ]
    found = flips(rows, TARGETS, ["a", "b"])
    assert found["a"].indices.tolist() == [0, 1] and found["a"].share == 0.5
    assert found["b"].indices.tolist() == [] and found["b"].share == 0.0
    assert flips_share(found) == 0.25


def test_flips_are_undefined_without_an_earlier_point_or_without_the_end():
    both = {"a": TARGETS["a"], "b": TARGETS["b"]}
    joint, absent = (flips(rows, TARGETS, ["a", "b"]) for rows in ([{}, both], [both, {"a": TARGETS["a"]}]))
    assert joint["a"].share is joint["b"].share is flips_share(joint) is None
    assert absent["b"].share is None and flips_share(absent) == absent["a"].share == 0.0
    assert flips([], TARGETS, ["a", "b"])["a"].share is None


def test_flips_do_not_count_what_was_said_before_a_task_was_learned():
    """So that they do not depend on whether the next task was asked about ahead."""
    a, nothing = TARGETS["a"], np.array([9, 9])
    rows = [{"a": a, "b": TARGETS["b"]}, {"a": a, "b": nothing}, {"a": a, "b": nothing}]
    found = flips(rows, TARGETS, ["a", "b"])
    assert found["b"].share == 0.0 and flips_share(found) == 0.0
    ahead, alone = (flips(found, TARGETS, ["a", "b"]) for found in (rows[:2], [{"a": a}, rows[1]]))
    assert ahead["b"].share is alone["b"].share is None and flips_share(ahead) == flips_share(alone) == 0.0


@given(st.data())
def test_flips_are_at_least_the_fall_of_the_accuracy(data):
    """|right once and wrong now| / n >= max over i of a(i) - a(T): forgetting cannot exceed the flips."""
    T, n = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 8))
    draw = st.lists(st.integers(0, 1), min_size=n, max_size=n)
    states = [np.array(data.draw(draw)) for _ in range(T)]
    (found,) = flips([{"a": s} for s in states], {"a": np.ones(n, dtype=int)}, ["a"]).values()
    assert found.share >= max(s.mean() for s in states[:-1]) - states[-1].mean() - 1e-12
