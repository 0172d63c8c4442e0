from __future__ import annotations

import numpy as np
import pytest

from perpetune.metrics.boundaries import boundary_figures

TRUTH = np.repeat([0, 1, 0], [100, 50, 50])


def parts(*cuts):
    """(start, task, detected_at) of each part."""
    stops = [cut[0] for cut in cuts[1:]] + [200]
    keys = ("start", "task", "detected_at")
    return [{**dict(zip(keys, cut, strict=True)), "stop": stop} for cut, stop in zip(cuts, stops, strict=True)]


def test_figures_by_hand():
    figures = boundary_figures(parts((0, 0, 0), (60, 1, 70), (98, 2, 120), (155, 0, 170)), TRUTH, within=10)
    assert figures["precision"] == pytest.approx(2 / 3) and figures["recall"] == 1
    assert figures["delay"] == pytest.approx((20 + 20) / 2) and figures["misplaced"] == pytest.approx((2 + 5) / 2)
    # part 0 and 3: 60 + 45 of task 0; part 1: 38 of 0; part 2: 2 + 5 of 0 and 50 of 1
    assert figures["purity"] == pytest.approx((105 + 38 + 50) / 200)
    assert (figures["tasks_found"], figures["tasks_true"]) == (3, 2)


def test_each_boundary_counts_once():
    figures = boundary_figures(parts((0, 0, 0), (97, 1, 99), (102, 2, 110)), TRUTH, within=10)
    assert figures["precision"] == 0.5 and figures["recall"] == 0.5 and figures["misplaced"] == 2


def test_what_is_not_there_is_undefined():
    none = boundary_figures(parts((0, 0, 0)), TRUTH, within=10)
    assert none["precision"] is None and none["recall"] == 0 and none["delay"] is None and none["purity"] == 0.75
    assert boundary_figures(parts((0, 0, 0)), TRUTH * 0, within=10)["recall"] is None
