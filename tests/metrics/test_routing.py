from __future__ import annotations

import numpy as np
import pytest

from perpetune.metrics.accuracy import FORMULAS, AccuracyMatrix
from perpetune.metrics.records import aggregate, make_record, markdown_table
from perpetune.metrics.routing import Routing

FACTS = {
    "scenario": "class",
    "head": "linear",
    "model": "minilm",
    "stream": "words",
    "train_seconds": 1.0,
    "evaluate_seconds": 1.0,
    "steps": 1,
    "trainable_parameters": 1,
}


def routes(**sent):
    return {task: np.array(found) for task, found in sent.items()}


def record(recipe, seed, routing=None, head="linear"):
    matrix = AccuracyMatrix([[0.8, np.nan], [0.6, 0.9]], [10, 30], [np.nan, np.nan], ("a", "b"))
    return make_record(matrix, {**FACTS, "recipe": recipe, "seed": seed, "routing_accuracy": routing, "head": head})


def test_routes_are_counted_by_hand():
    # after a: all to a; after b: 1 of 2 of a to itself, 3 of 4 of b
    rows = [routes(a=[0, 0]), routes(a=[0, 1], b=[1, 1, 0, 1])]
    routing = Routing.from_routes(rows, routes(a=[1, 3], b=[1, 1, 1, 2]), ("a", "b"))
    assert routing.confusion.tolist() == [[1, 1], [1, 3]]
    assert routing.matrix.values[1].tolist() == [0.5, 0.75] and routing.matrix.values[0, 0] == 1
    assert np.isnan(routing.matrix.values[0, 1])
    assert routing.accuracy == pytest.approx(0.625) and routing.accuracy_micro == pytest.approx(4 / 6)
    assert routing.asked == pytest.approx(9 / 6)


def test_a_task_that_was_taken_out_is_nobodys_own():
    rows = [routes(a=[0, -1]), routes(a=[0, 1], b=[1])]
    routing = Routing.from_routes(rows, {}, ("a", "b"))
    assert routing.matrix.values[0, 0] == 0.5 and routing.confusion.sum() == 3 and routing.asked is None


def test_tables_have_a_column_of_routes_where_any_recipe_routes():
    routed = [record("color", s, r, head) for s, r in ((0, 0.5), (1, 0.7)) for head in ("linear", "ncm")]
    rows = aggregate([*routed, record("lora", 0)])
    lines = markdown_table(rows, "class").splitlines()
    assert lines[0] == "| recipe | linear | ncm | sent to its own task |"
    assert lines[2].endswith("| 60.0 ± 14.1 |") and lines[3].endswith("| – | – |")
    assert FORMULAS["routing_accuracy"] in lines[-1] and "f is forgetting" in lines[-1]
    assert "own task |" not in markdown_table(rows, "class", "plasticity")
    assert "own task" not in markdown_table(aggregate([record("lora", 0)]), "class")


def test_routes_are_a_metric_of_their_own():
    lines = markdown_table(aggregate([record("color", 0, 0.5)]), "class", "routing_accuracy").splitlines()
    assert lines[2] == "| color | 50.0 |"
