"""A run in other people's terms, so that a published table can be matched.

Names are those that the other code (or paper) uses; values are fractions, as everywhere here, where some of that code
prints percent and rounds to two decimals on the way. A figure over nothing (one task, an entry that was not measured)
is None, where some of that code prints 0 or nan.

Read from the released code of PILOT, Mammoth, Avalanche, GEM and LibContinual; GEM's own formulas and those of
Diaz-Rodriguez et al. (1810.13166) from the papers; TRACE recalled, its released code has no backward transfer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from ..core.errors import ConfigError, nearest
from .accuracy import (
    FORMULAS,
    AccuracyMatrix,
    average_incremental_accuracy,
    average_incremental_accuracy_micro,
    backward_transfer,
    final_accuracy,
    final_accuracy_micro,
    forward_transfer,
    measured_mean,
)


class Figure(NamedTuple):
    """One figure of one convention: how it is computed, in words and in code."""

    formula: str
    compute: Callable[[AccuracyMatrix], float | None]


def _max_with_last(matrix: AccuracyMatrix) -> float | None:
    """Never negative: a task that ends better than ever counts as 0, so that transfer is hidden."""
    a, T = matrix.values, len(matrix.tasks)
    return measured_mean([a[j:, j].max() - a[-1, j] for j in range(T - 1)])


def _mammoth_forgetting(matrix: AccuracyMatrix) -> float | None:
    """As above, but Mammoth also evaluates a task just before learning it, and that value enters the maximum."""
    a, T = matrix.values, len(matrix.tasks)
    before = [a[j - 1, j] if j and not np.isnan(a[j - 1, j]) else 0.0 for j in range(T)]
    return measured_mean([np.maximum(a[j:, j].max(), before[j]) - a[-1, j] for j in range(T - 1)])


def _mammoth_forward(matrix: AccuracyMatrix) -> float | None:
    """Identically 0: its baseline is measured on the very model that a(j-1, j) is measured on."""
    return 0.0 if len(matrix.tasks) > 1 else None


def _first_minus_last(matrix: AccuracyMatrix) -> float | None:
    bwt = backward_transfer(matrix)
    return None if bwt is None else -bwt


def _over_T(figure: Callable[[AccuracyMatrix], float | None]) -> Callable[[AccuracyMatrix], float | None]:
    """A mean over T - 1 tasks, divided by T instead."""

    def divided(matrix: AccuracyMatrix) -> float | None:
        value, T = figure(matrix), len(matrix.tasks)
        return None if value is None else value * (T - 1) / T

    return divided


def _below(matrix: AccuracyMatrix, gap: int = 1) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), 0-based, with j <= i - gap."""
    return ((i, j) for i in range(len(matrix.tasks)) for j in range(i - gap + 1))


def _all_pairs_accuracy(matrix: AccuracyMatrix) -> float | None:
    return measured_mean([matrix.values[i, j] for i, j in _below(matrix, gap=0)])


def _all_pairs_backward(matrix: AccuracyMatrix) -> float | None:
    a = matrix.values
    return measured_mean([a[i, j] - a[j, j] for i, j in _below(matrix)])


def _all_pairs_forward(matrix: AccuracyMatrix) -> float | None:
    return measured_mean([matrix.values[j, i] for i, j in _below(matrix)])


def _clipped(sign: int, offset: float) -> Callable[[AccuracyMatrix], float | None]:
    def clipped(matrix: AccuracyMatrix) -> float | None:
        value = _all_pairs_backward(matrix)
        return None if value is None else offset + sign * max(sign * value, 0.0)

    return clipped


def _libcontinual_forgetting(matrix: AccuracyMatrix) -> float | None:
    """The task just before the last is left out of the sum, but not of the divisor."""
    a, T = matrix.values, len(matrix.tasks)
    mean = measured_mean(a.diagonal()[: T - 2] - a[-1, : T - 2]) if T > 2 else None
    return None if mean is None else mean * (T - 2) / (T - 1)


def _libcontinual_readme(matrix: AccuracyMatrix) -> float | None:
    """Row T - 1 instead of row T, and the sign of backward transfer."""
    a, T = matrix.values, len(matrix.tasks)
    mean = measured_mean(a[-2, : T - 2] - a.diagonal()[: T - 2]) if T > 2 else None
    return None if mean is None else mean * (T - 2) / (T - 1)


def _libcontinual_backward(matrix: AccuracyMatrix) -> float | None:
    """The task learned just before is left out of the sum, but not of the divisor."""
    a, T = matrix.values, len(matrix.tasks)
    gaps = [a[i, j] - a[j, j] for i, j in _below(matrix, gap=2)]
    mean = measured_mean(gaps)
    return None if mean is None else mean * len(gaps) / (T * (T - 1) / 2)


def _over_stages(figure: Callable[[AccuracyMatrix], float | None]) -> Callable[[AccuracyMatrix], float | None]:
    """Mean of the figure over the streams that end with task 3, 4, ..., T."""

    def overall(matrix: AccuracyMatrix) -> float | None:
        stages = [figure(matrix.upto(t)) for t in range(3, len(matrix.tasks) + 1)]
        return measured_mean(np.array(stages, dtype=float))

    return overall


CONVENTIONS: dict[str, dict[str, Figure]] = {
    "pilot": {
        "Average Accuracy (CNN)": Figure(
            FORMULAS["average_incremental_accuracy_micro"], average_incremental_accuracy_micro
        ),
        "Forgetting (CNN)": Figure("mean over j < T of [max over j <= i <= T of a(i, j) - a(T, j)]", _max_with_last),
    },
    "mammoth": {
        "Accuracy": Figure(FORMULAS["final_accuracy"], final_accuracy),
        "Backward Transfer": Figure(FORMULAS["backward_transfer"], backward_transfer),
        "Forgetting": Figure("mean over j < T of [max over j-1 <= i <= T of a(i, j) - a(T, j)]", _mammoth_forgetting),
        "Forward Transfer": Figure("mean over j >= 2 of [a(j-1, j) - a(j-1, j)]", _mammoth_forward),
    },
    "avalanche": {
        "Top1_Acc_Stream": Figure(FORMULAS["final_accuracy_micro"], final_accuracy_micro),
        "StreamForgetting": Figure("mean over j < T of [a(j, j) - a(T, j)]", _first_minus_last),
        "StreamBWT": Figure(FORMULAS["backward_transfer"], backward_transfer),
        "StreamForwardTransfer": Figure(FORMULAS["forward_transfer"], forward_transfer),
    },
    "gem": {
        "ACC": Figure(FORMULAS["final_accuracy"], final_accuracy),
        "BWT": Figure(FORMULAS["backward_transfer"], backward_transfer),
        "FWT": Figure(FORMULAS["forward_transfer"], forward_transfer),
        "Backward (released code)": Figure("1/T sum over j < T of [a(T, j) - a(j, j)]", _over_T(backward_transfer)),
        "Forward (released code)": Figure("1/T sum over j >= 2 of [a(j-1, j) - b_j]", _over_T(forward_transfer)),
    },
    "trace": {
        "OP": Figure(FORMULAS["final_accuracy"], final_accuracy),
        "BWT": Figure("1/T sum over j < T of [a(T, j) - a(j, j)]", _over_T(backward_transfer)),
    },
    "libcontinual": {
        "[Batch] Last Average Acc": Figure(FORMULAS["final_accuracy_micro"], final_accuracy_micro),
        "[Task] Last Average Acc": Figure(FORMULAS["final_accuracy"], final_accuracy),
        "[Batch] Overall Avg Acc": Figure(
            FORMULAS["average_incremental_accuracy_micro"], average_incremental_accuracy_micro
        ),
        "[Task] Overall Avg Acc": Figure(FORMULAS["average_incremental_accuracy"], average_incremental_accuracy),
        "Forgetting": Figure("1/(T-1) sum over j <= T-2 of [a(j, j) - a(T, j)]", _libcontinual_forgetting),
        "Forgetting (README)": Figure("1/(T-1) sum over j <= T-2 of [a(T-1, j) - a(j, j)]", _libcontinual_readme),
        "Backward Transfer": Figure(
            "2/(T(T-1)) sum over i >= 3, j <= i-2 of [a(i, j) - a(j, j)]", _libcontinual_backward
        ),
        "Overall Frgt": Figure("mean over t >= 3 of Forgetting at T = t", _over_stages(_libcontinual_forgetting)),
        "Overall BwT": Figure("mean over t >= 3 of Backward Transfer at T = t", _over_stages(_libcontinual_backward)),
    },
    "diaz-rodriguez": {
        "A": Figure("2/(T(T+1)) sum over j <= i of a(i, j)", _all_pairs_accuracy),
        "BWT": Figure("2/(T(T-1)) sum over j < i of [a(i, j) - a(j, j)]", _all_pairs_backward),
        "BWT+": Figure("max(BWT, 0)", _clipped(1, 0.0)),
        "REM": Figure("1 - |min(BWT, 0)|", _clipped(-1, 1.0)),
        "FWT": Figure("2/(T(T-1)) sum over i < j of a(i, j)", _all_pairs_forward),
    },
}


def convention(name: str) -> dict[str, Figure]:
    """The figures of a convention, with their formulas.

    Raises:
        ConfigError: no such convention.
    """
    if name not in CONVENTIONS:
        raise ConfigError(f"no convention is called `{name}`: {nearest(name, CONVENTIONS)}")
    return CONVENTIONS[name]


def in_convention(matrix: AccuracyMatrix, name: str) -> dict[str, float | None]:
    """What somebody else's code would report of this run, under its own names, as fractions.

    Args:
        name: pilot, mammoth, avalanche, gem, trace, libcontinual or diaz-rodriguez.

    Raises:
        ConfigError: no such convention.
    """
    return {key: figure.compute(matrix) for key, figure in convention(name).items()}
