from __future__ import annotations

import math

import numpy as np
import pytest

from perpetune.core.errors import ConfigError
from perpetune.metrics.accuracy import AccuracyMatrix, summary
from perpetune.metrics.conventions import CONVENTIONS, convention, in_convention

NAN = float("nan")
PRINTED = [[100], [93.2, 92.6], [93.2, 91.4, 100], [89.0, 86.4, 78.5, 100], [61.6, 58.0, 87.3, 85.2, 90.8]]
# The sheet prints rounded percent and no test sizes: these are the smallest ones for which whole numbers of right
# answers round to every printed entry and to every printed average.
SIZES = [73, 81, 79, 88, 76]


def build(rows: list[list[float]], sizes: list[int]) -> AccuracyMatrix:
    T = len(rows)
    values = np.full((T, T), NAN)
    for i, row in enumerate(rows):
        values[i, : len(row)] = row
    return AccuracyMatrix(values, np.array(sizes), np.full(T, NAN), tuple(f"t{j + 1}" for j in range(T)))


@pytest.fixture(scope="module")
def sheet() -> AccuracyMatrix:
    rows = [[round(x * n / 100) / n for x, n in zip(row, SIZES, strict=False)] for row in PRINTED]
    for row, printed in zip(rows, PRINTED, strict=True):
        assert [round(100 * x, 1) for x in row] == printed
    return build(rows, SIZES)


@pytest.mark.parametrize(
    ("name", "figure", "percent"),
    [
        ("mammoth", "Accuracy", 76.61),
        ("gem", "ACC", 76.61),
        ("trace", "OP", 76.61),
        ("libcontinual", "[Task] Last Average Acc", 76.61),
        ("avalanche", "Top1_Acc_Stream", 76.83),
        ("libcontinual", "[Batch] Last Average Acc", 76.83),
        ("libcontinual", "[Task] Overall Avg Acc", 90.56),
        ("pilot", "Average Accuracy (CNN)", 90.66),
        ("libcontinual", "[Batch] Overall Avg Acc", 90.66),
        ("pilot", "Forgetting (CNN)", 25.09),  # max including T
        ("mammoth", "Forgetting", 25.09),  # max including T
        ("avalanche", "StreamForgetting", 25.09),  # first value
        ("libcontinual", "Forgetting (README)", -9.66),
        ("libcontinual", "Forgetting", 21.40),
        ("gem", "BWT", -25.09),
        ("mammoth", "Backward Transfer", -25.09),
        ("avalanche", "StreamBWT", -25.09),
        ("trace", "BWT", -20.07),  # divided by T
        ("gem", "Backward (released code)", -20.07),
        ("diaz-rodriguez", "BWT", -15.39),  # all pairs
        ("libcontinual", "Backward Transfer", -10.96),
    ],
)
def test_the_printed_values_of_the_sheet(sheet, name, figure, percent):
    assert round(100 * in_convention(sheet, name)[figure], 2) == percent


def test_our_own_names_for_the_same_run(sheet):
    printed = {
        "final_accuracy": 76.61,
        "final_accuracy_micro": 76.83,
        "average_incremental_accuracy": 90.56,
        "average_incremental_accuracy_micro": 90.66,
        "forgetting": 25.09,
        "backward_transfer": -25.09,
    }
    found = summary(sheet)
    assert {k: round(100 * found[k], 2) for k in printed} == printed


def test_where_a_task_improves_at_the_end_the_three_forgettings_differ():
    run = build([[0.6], [0.5, 0.8], [0.9, 0.7, 0.9]], [10, 10, 10])
    assert summary(run)["forgetting"] == pytest.approx((-0.3 + 0.1) / 2)  # max before T
    assert in_convention(run, "pilot")["Forgetting (CNN)"] == pytest.approx((0.0 + 0.1) / 2)  # including T
    assert in_convention(run, "avalanche")["StreamForgetting"] == pytest.approx((-0.3 + 0.1) / 2)  # first value
    better_in_between = build([[0.5], [0.7, 0.8], [0.4, 0.8, 0.9]], [10, 10, 10])
    assert in_convention(better_in_between, "avalanche")["StreamForgetting"] == pytest.approx(0.05)
    assert in_convention(better_in_between, "pilot")["Forgetting (CNN)"] == pytest.approx(0.15)


def test_mammoth_also_counts_the_value_just_before_a_task():
    run = build([[0.6, 0.9], [0.6, 0.7, 0.0], [0.6, 0.5, 0.9]], [10, 10, 10])
    assert in_convention(run, "mammoth")["Forgetting"] == pytest.approx((0.0 + 0.4) / 2)
    assert in_convention(run, "pilot")["Forgetting (CNN)"] == pytest.approx((0.0 + 0.2) / 2)
    assert in_convention(run, "mammoth")["Forward Transfer"] == 0.0


def test_forward_transfer_in_every_convention_that_has_one():
    values = np.array([[0.9, 0.4, 0.3], [0.8, 0.9, 0.6], [0.7, 0.8, 0.9]])
    run = AccuracyMatrix(values, np.array([10, 10, 10]), np.array([0.1, 0.2, 0.2]), ("a", "b", "c"))
    assert in_convention(run, "gem")["FWT"] == pytest.approx(0.3)
    assert in_convention(run, "gem")["Forward (released code)"] == pytest.approx(0.2)
    assert in_convention(run, "avalanche")["StreamForwardTransfer"] == pytest.approx(0.3)
    assert in_convention(run, "diaz-rodriguez")["FWT"] == pytest.approx((0.4 + 0.3 + 0.6) / 3)


def test_all_pairs_by_hand():
    run = build([[0.5], [0.7, 0.8], [0.6, 0.6, 0.9]], [10, 10, 10])
    found = in_convention(run, "diaz-rodriguez")
    assert found["A"] == pytest.approx((0.5 + 0.7 + 0.8 + 0.6 + 0.6 + 0.9) / 6)
    assert found["BWT"] == found["BWT+"] == pytest.approx((0.2 + 0.1 - 0.2) / 3)
    assert found["REM"] == 1.0
    worse = in_convention(build([[0.5], [0.2, 0.8]], [10, 10]), "diaz-rodriguez")
    assert worse["BWT+"] == 0.0 and worse["REM"] == pytest.approx(0.7)


def test_libcontinual_over_time():
    run = build([[0.9], [0.8, 0.9], [0.7, 0.8, 0.9], [0.5, 0.6, 0.7, 0.9]], [10] * 4)
    found = in_convention(run, "libcontinual")
    assert found["Forgetting"] == pytest.approx((0.4 + 0.3) / 3)
    assert found["Overall Frgt"] == pytest.approx((0.2 / 2 + 0.7 / 3) / 2)
    assert found["Backward Transfer"] == pytest.approx((-0.2 - 0.4 - 0.3) / 6)
    assert found["Overall BwT"] == pytest.approx((-0.2 / 3 - 0.9 / 6) / 2)


@pytest.mark.parametrize("name", sorted(CONVENTIONS))
def test_one_task_and_joint_training_have_no_forgetting_in_any_convention(name):
    averages = ("acc", "a", "op")  # what is defined of a single task starts with one of these
    single, joint = build([[0.5]], [10]), build([[], [0.5, 0.7]], [10, 10])
    for figure, value in in_convention(single, name).items():
        is_average = figure.lower().startswith(averages) or "acc" in figure.lower()
        assert value == (0.5 if is_average else None), figure
    for figure, value in in_convention(joint, name).items():
        assert value is None or value == pytest.approx(0.6) or (name, figure) == ("mammoth", "Forward Transfer")
        assert value is None or not math.isnan(value)


@pytest.mark.parametrize("name", sorted(CONVENTIONS))
def test_every_figure_says_its_formula(name):
    assert all(figure.formula for figure in convention(name).values())


def test_an_unknown_convention_names_the_nearest(sheet):
    with pytest.raises(ConfigError, match="`mamoth`.*did you mean `mammoth`"):
        in_convention(sheet, "mamoth")
