from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpetune.report.data import read_records
from perpetune.report.summary import (
    Stat,
    forgot,
    groups,
    guessing,
    learned_and_now,
    points,
    recipe_bars,
    role,
)
from perpetune.report.tables import costs_by_recipe, costs_by_task, promises
from perpetune.report.words import figure, percent, seconds, size


@given(st.lists(st.none() | st.floats(0, 1), max_size=8))
def test_mean_and_spread_are_over_what_is_known(values):
    known = [v for v in values if v is not None]
    stat = Stat.of(values)
    assert stat.count == len(known)
    assert (stat.mean is None) == (not known)
    if known:
        assert stat.mean == pytest.approx(sum(known) / len(known))
    assert stat.spread == (pytest.approx(statistics.stdev(known)) if len(known) > 1 else None)


def test_undefined_for_one_seed_is_undefined(result):
    records = [result("lora", seed=s, forgetting=f) for s, f in enumerate((0.2, None))]
    row = groups(read_records(records), "class")[0].rows[0]
    assert row.mean("forgetting") is None and row.mean("plasticity") == pytest.approx(0.9)


def test_rows_are_ranked_and_controls_are_marked(result):
    finals = {
        "lora": 0.5,
        "joint": 0.9,
        "sequential": 0.2,
        "frozen_ridge": 0.6,
        "tfidf_ridge": 0.4,
        "pixels_ridge": 0.1,
    }
    group = groups(read_records([result(r, final_accuracy=f) for r, f in finals.items()]), "class")[0]
    assert [(b.label, b.role) for b in recipe_bars(group)] == [
        ("joint", "bound"),
        ("frozen_ridge", "control"),
        ("lora", "method"),
        ("tfidf_ridge", "control"),
        ("sequential", "control"),
        ("pixels_ridge", "control"),
    ]
    assert role("sequential_lora") == "method" and role("frozen_label_text") == "control"


def test_a_control_with_another_head_is_a_guest_and_makes_no_reading_of_its_own(result):
    records = [result(r, head=h) for r in ("sequential", "lora") for h in ("ridge", "linear")]
    records.append(result("frozen_ncm", head="ncm"))
    found = groups(read_records(records), "class")
    assert {g.head for g in found} == {"ridge", "linear"}
    for group in found:
        guest = next(row for row in group.rows if row.guest)
        assert guest.recipe == "frozen_ncm" and guest.badge == "control, ncm head"


RECIPES = st.sampled_from(["lora", "sequential", "joint", "frozen_ncm", "frozen_ridge", "tfidf_ridge"])
READINGS = st.tuples(RECIPES, st.sampled_from(["class", "task"]), st.sampled_from(["ridge", "linear", "ncm"]))


@given(st.lists(READINGS, min_size=1, max_size=12, unique=True))
def test_no_recipe_gets_lost(chosen):
    records = [{"recipe": r, "scenario": s, "head": h, "tasks": ["a"], "matrix": [[0.5]]} for r, s, h in chosen]
    found = groups(read_records(records), "class")
    assert {(g.scenario, row.recipe) for g in found for row in g.rows} == {(s, r) for r, s, _ in chosen}
    own = [(g.scenario, g.head, row.recipe) for g in found for row in g.rows if not row.guest]
    assert len(own) == len(set(own)) and {(r, s, h) for s, h, r in own} <= set(chosen)


def test_a_single_control_is_shown_all_the_same(result):
    (group,) = groups(read_records([result("frozen_ncm", head="ncm")]), "class")
    assert group.by_task and group.rows[0].recipe == "frozen_ncm"


def test_mean_matrix_and_what_is_left_of_each_task(result):
    two = [result("lora", seed=s) for s in (0, 1)]
    two[1]["matrix"] = [[v and v - 0.1 for v in row] for row in two[1]["matrix"]]
    row = groups(read_records(two), "class")[0].rows[0]
    expected = [("a", 0.85, 0.45), ("b", 0.85, 0.65), ("c", 0.85, 0.85)]
    for (name, learned, now), (n, a, b) in zip(learned_and_now(row), expected, strict=True):
        assert (name, learned, now) == (n, pytest.approx(a), pytest.approx(b))


def test_scatter_of_recipes_leaves_out_the_bound_and_draws_it_as_a_line(result):
    group = groups(read_records([result("lora"), result("joint")]), "class")[0]
    marks, bound = points(group)
    assert [(m.label, m.learned) for m in marks] == [("lora", 0.9)] and bound == pytest.approx(0.7)


def test_blind_guessing(result):
    labels = {"a": ["x", "y"], "b": ["z", "w", "v", "u"], "c": ["x", "t"]}
    by_class, by_task = (groups(read_records([result("lora", scenario=s)]), s)[0] for s in ("class", "task"))
    assert guessing(by_class, labels) == pytest.approx(1 / 7)
    assert guessing(by_task, labels) == pytest.approx((1 / 2 + 1 / 4 + 1 / 2) / 3)
    assert guessing(by_class, {"a": ["x"]}) is None


def test_promises_keep_the_worst_figure(result, promise):
    records = [result("lora", seed=s, guarantees=[promise(v, 1.0, task=t) for t, v in (("a", 0.2), ("b", 0.9 + s))])
               for s in (0, 1)]  # fmt: skip
    (line,) = promises(read_records(records))
    assert (line.promise.value, line.checks, line.broken, line.state) == (1.9, 4, 1, "broken")


def test_observed_figures_and_promises_of_one_name_stay_apart(result, promise):
    records = [result("lora", guarantees=[promise(9.0, None), promise(0.5, 1.0)])]
    assert [line.state for line in promises(read_records(records))] == ["kept", "observed"]


def test_costs_count_a_training_once(result):
    records = [result("lora", head=h, seed=s, train_seconds=10.0 * (s + 1)) for h in ("x", "y") for s in (0, 1)]
    table = costs_by_recipe(read_records(records))
    assert table.columns[0] == "training" and table.lines[0].cells[0].text == "15 s"
    ((recipe, by_task),) = costs_by_task(read_records(records))
    assert recipe == "lora" and [line.label for line in by_task.lines] == ["a", "b", "c"]
    assert "peak memory" not in by_task.columns and by_task.lines[0].cells[-1].text == "2 MB"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (figure(3.1e-7, "relative"), "3.1e−7 relative"),
        (figure(0.0), "0"),
        (figure(float("nan")), "not a number"),
        (figure(None), "not a number"),
        (figure(float("inf")), "∞"),
        (figure(2048, "bytes"), "2.05 kB"),
        (seconds(3.21), "3.2 s"),
        (seconds(125), "2 min 05 s"),
        (seconds(7260), "2 h 01 min"),
        (size(1.2e9), "1.2 GB"),
        (forgot(0.231), "forgot 23"),
        (forgot(-0.021), "gained 2"),
        (forgot(0.001), "forgot nothing"),
        (str(percent(Stat(-0.251, None, 1), "")), "−25.1"),
        (str(percent(Stat(-0.0001, None, 1), "")), "0.0"),
    ],
)
def test_figures_are_written_for_people(written, expected):
    assert written == expected
