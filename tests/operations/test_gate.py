"""The gate, on runs whose predictions are written by hand: nothing is trained."""

from __future__ import annotations

import json

import pytest
import torch

from perpetune import ConfigError, Result, RunError
from perpetune.operations.gate import MAJORITY, NOT_EVALUATED, judge
from perpetune.runs.directory import Run
from tests.calling import call

LABELS = ["a0", "a1", "b0", "b1", "c0", "c1"]
TASKS = {"old": [0] * 50 + [1] * 50, "mid": [2] * 5 + [3] * 5, "new": [4] * 10 + [5] * 10}
AGAIN = {"again": [0] * 5 + [1] * 5}  # a task without a class of its own
CONFIG = {
    "model_name": None,
    "model": {"fingerprint": "f"},
    "stream": {"name": "s", "scenario": "domain", "labels": LABELS, "tasks": list(TASKS)},
    "recipe": {"name": "r"},
    "seed": 0,
}
LIMITS = {"max_forgetting": 0.02, "min_gain": 0.01}
BROKEN = {"name": "drift", "value": 0.5, "bound": 1e-6, "source": "SubspaceProjection", "holds": False}


def answers(task, wrong):
    """The right classes, but for the first `wrong` examples, which are called by the other class of the task."""
    truth = (TASKS | AGAIN)[task]
    return torch.tensor([c ^ 1 if i < wrong else c for i, c in enumerate(truth)], dtype=torch.int32)


def write(
    path, rows, *, broken=(), learned=(["old"], ["old", "mid"], ["old", "mid", "new"]), scenario="class", losses=()
):
    """rows[i][task]: how many examples are wrong at point i; point 0 is the untouched model; a task may be called
    `before/TASK` or `untouched/TASK`. losses[i][task]: the loss on its responses."""
    run = Run.open(path, {**CONFIG, "stream": {**CONFIG["stream"], "scenario": scenario}})
    for i, (row, known) in enumerate(zip(rows, [[], *learned], strict=False)):
        predictions = {f"target/{t}": answers(t, 0) for t in row if "/" not in t}
        kinds = ("class", "task") if scenario == "class" else (scenario,)
        for name, wrong in row.items():
            *when, t = name.split("/")
            predictions |= {"/".join([*when, "linear", kind, t]): answers(t, wrong) for kind in kinds}
        classes = sorted({c for t in known for c in (TASKS | AGAIN)[t]})
        facts = {"learned": known, "classes": classes, "heads": ["linear"], "guarantees": []}
        if i == len(rows) - 1:
            facts["guarantees"] = list(broken)
        if i < len(losses):
            parts = [[t, loss, None] for t, loss in losses[i].items()]
            facts["guarantees"] = [{**BROKEN, "holds": None, "name": "loss on the responses", "parts": parts}]
        run.commit(known[-1] if known else "untouched", {"predictions.safetensors": predictions}, facts)
    run.close()
    return Result(path)


GOOD = [{}, {"old": 10}, {"old": 10, "mid": 1}, {"old": 12, "mid": 1, "new": 2}]


def test_limits_are_met_where_they_are_met_exactly(tmp_path):
    """a(T-1, j) - a(T, j) = 0.90 - 0.88 is 0.02, whatever floating point makes of it."""
    verdict = judge(write(tmp_path / "r", GOOD), **LIMITS)
    assert 0.90 - 0.88 > 0.02 and verdict.passed
    assert [(t.name, round(t.drop, 9), t.flips) for t in verdict.tasks] == [("old", 0.02, 2), ("mid", 0, 0)]
    assert verdict.gain == pytest.approx(0.9 - 1 / 2) and verdict.against == MAJORITY
    assert not judge(Result(tmp_path / "r"), max_forgetting=0.019, min_gain=0.01).passed
    edge = {"max_forgetting": 0.02, "scenario": "task"}
    assert judge(Result(tmp_path / "r"), min_gain=0.4, **edge).passed  # 0.9 against the larger of two equal classes
    assert not judge(Result(tmp_path / "r"), min_gain=0.41, **edge).passed


def test_gain_is_over_the_model_before_then_over_the_untouched_one(tmp_path):
    untouched = [{"new": 12}, *GOOD[1:]]
    verdict = judge(write(tmp_path / "b", untouched), **LIMITS)
    assert (verdict.reference, verdict.against) == (0.4, "the untouched model")
    ahead = [untouched[0], untouched[1], {**GOOD[2], "new": 2}, GOOD[3]]
    verdict = judge(write(tmp_path / "a", ahead), **LIMITS)
    assert (verdict.reference, verdict.against, verdict.gain) == (0.9, "the model before it", 0)
    assert verdict.failures == ("`new` gained 0.0 points over the model before it, asked for are 1",)


def test_the_model_before_is_asked_about_a_task_that_joined_later(tmp_path):
    """Its answers lie in the commit of the task; and so do those of the untouched model."""
    joined = [*GOOD[:3], {**GOOD[3], "before/new": 4, "untouched/new": 12}]
    result = write(tmp_path / "a", joined)
    verdict = judge(result, **LIMITS)
    assert (verdict.reference, verdict.against) == (0.8, "the model before it")
    matrix = result.matrix("linear", "class")
    assert (matrix.values[1, 2], matrix.baseline[2]) == (0.8, 0.4) and result.readings == [
        ("linear", "class"),
        ("linear", "task"),
    ]
    verdict = judge(write(tmp_path / "b", [*GOOD[:3], {**GOOD[3], "untouched/new": 12}]), **LIMITS)
    assert (verdict.reference, verdict.against) == (0.4, "the untouched model")


def test_where_the_model_before_was_never_asked_it_is_said(tmp_path):
    """In runs of older versions: the head could have named the classes, since it could before anything was learned, or
    since an earlier task has them."""
    by_name = judge(write(tmp_path / "a", [{"old": 40, "mid": 9}, *GOOD[1:]]), **LIMITS)
    steps = [*GOOD[:2], {"old": 10, "again": 2}]
    known = judge(write(tmp_path / "b", steps, learned=[["old"], ["old", "again"]]), **LIMITS)
    for verdict in (by_name, known):
        assert verdict.against == NOT_EVALUATED and verdict.reference == 1 / 2
    assert judge(write(tmp_path / "c", GOOD), **LIMITS).against == MAJORITY


def test_an_imbalanced_task_is_not_passed_for_its_largest_class(tmp_path, monkeypatch):
    """300 of one class and 8 of another: all of the 8 wrong is no gain over predicting the 300 alone."""
    monkeypatch.setitem(TASKS, "new", [5] * 8 + [4] * 300)
    verdict = judge(write(tmp_path / "r", [*GOOD[:3], {"old": 10, "mid": 1, "new": 8}]), **LIMITS)
    assert verdict.accuracy == verdict.reference == 300 / 308 and not verdict.passed
    assert judge(write(tmp_path / "s", [*GOOD[:3], {"old": 10, "mid": 1, "new": 1}]), **LIMITS).passed


def test_free_texts_are_judged_by_their_scores(tmp_path):
    """Scores of a metric go through the same matrix, forgetting, flips and gate as classes."""
    rows = [{}, {"old": [0.9, 0.6]}, {"old": [0.7, 0.4], "new": [1.0, 0.5]}]
    run = Run.open(tmp_path / "r", {**CONFIG, "stream": {**CONFIG["stream"], "labels": [], "tasks": ["old", "new"]}})
    for row, known in zip(rows, ([], ["old"], ["old", "new"]), strict=True):
        scores = {f"score/language_generated/domain/{t}": torch.tensor(x) for t, x in row.items()}
        facts = {"learned": known, "classes": [], "heads": ["language_generated"], "guarantees": []}
        run.commit(known[-1] if known else "untouched", {"predictions.safetensors": scores}, facts)
    run.close()
    result = Result(tmp_path / "r")
    assert result.readings == [("language_generated", "domain")]
    matrix = result.matrix("language_generated", "domain")
    assert matrix.values[-1].tolist() == pytest.approx([0.55, 0.75]) and matrix.values[0, 0] == pytest.approx(0.75)
    verdict = judge(result, max_forgetting=0.1, min_gain=0.7, scenario="domain")
    assert [(t.name, round(t.drop, 6), t.flips) for t in verdict.tasks] == [("old", 0.2, 1)]
    assert verdict.gain == pytest.approx(0.75) and verdict.against == "no answer" and not verdict.passed
    assert judge(result, max_forgetting=0.21, min_gain=0.7, scenario="domain").passed


LOSSES = [{}, {"old": 1.0}, {"old": 0.9, "mid": 2.0}, {"old": 1.25, "mid": 2.0, "new": 3.0}]


def test_losses_on_responses_are_judged_where_that_is_asked(tmp_path, monkeypatch, capsys):
    """Since a task was learned, not since the last commit; the limit itself is allowed."""
    result = write(tmp_path / "r", GOOD, losses=LOSSES)
    assert [(x.name, x.learned, x.now, x.rise) for x in judge(result, **LIMITS).losses] == [
        ("old", 1.0, 1.25, 0.25),
        ("mid", 2.0, 2.0, 0.0),
    ]
    assert judge(result, **LIMITS).passed and judge(result, **LIMITS, max_loss_increase=0.25).passed
    verdict = judge(result, **LIMITS, max_loss_increase=0.2)
    assert verdict.failures == (
        "the loss of `old` rose from 1.000 to 1.250 nats a token since it was learned, allowed are 0.2 more",
    )
    code, out, _ = call(monkeypatch, capsys, "gate", tmp_path / "r", "--max-loss-increase", "0.2")
    assert code == 1 and "FAIL: the loss of `old`" in out and "nats a token" in out
    code, out, _ = call(monkeypatch, capsys, "gate", tmp_path / "r", "--max-loss-increase", "0.3", "--json")
    assert code == 0 and json.loads(out)["losses"][0] == {"name": "old", "learned": 1.0, "now": 1.25, "rise": 0.25}
    gone = judge(
        write(tmp_path / "n", GOOD, losses=[*LOSSES[:3], {**LOSSES[3], "mid": None}]), **LIMITS, max_loss_increase=9.0
    )
    assert gone.failures[0].startswith("the loss of `mid` rose from 2.000 to not a number")
    assert gone.to_dict()["losses"][0]["rise"] is None and gone.table()


def test_losses_that_were_not_measured_cannot_be_judged(tmp_path):
    for name, losses in (("none", ()), ("some", [*LOSSES[:2], {}, {"old": 1.0}])):
        result = write(tmp_path / name, GOOD, losses=losses)
        assert judge(result, **LIMITS).passed
        with pytest.raises(ConfigError, match="did not measure the loss"):
            judge(result, **LIMITS, max_loss_increase=0.1)
    with pytest.raises(ConfigError, match="number of nats"):
        judge(result, **LIMITS, max_loss_increase=float("nan"))


def test_who_got_worse(tmp_path):
    result = write(tmp_path / "r", [{}, {"old": 0}, {"old": 0, "mid": 10}, {"old": 60, "mid": 7, "new": 0}])
    verdict = judge(result, **LIMITS)
    assert [t.name for t in verdict.tasks] == ["old", "mid"] and verdict.flips == 60
    assert [(c.name, round(c.drop, 9), c.flips, c.examples) for c in verdict.classes] == [
        ("old: a0", 1.0, 50, 50),
        ("old: a1", 0.2, 10, 50),
    ]
    assert verdict.failures == ("`old` got worse by 60.0 points, allowed are 2",)
    assert judge(result, max_forgetting=0.6, min_gain=0.0, max_flips=60).passed
    assert not judge(result, max_forgetting=0.6, min_gain=0.0, max_flips=59).passed


def test_the_first_task_has_nothing_to_forget(tmp_path):
    result = write(tmp_path / "r", GOOD[:2])
    assert judge(result, **LIMITS).passed and judge(result, **LIMITS).tasks == ()
    assert judge(result, **LIMITS).reference == 0.5


def test_a_broken_promise_closes_the_gate(tmp_path):
    verdict = judge(write(tmp_path / "r", GOOD, broken=[BROKEN, {**BROKEN, "holds": True}]), **LIMITS)
    assert verdict.failures == ("broken promise: SubspaceProjection, drift: 0.5, promised 1e-06",)


def test_a_promise_that_an_earlier_task_broke_keeps_the_gate_closed(tmp_path):
    """And the run says so in its last line."""
    measured = {**BROKEN, "task": "old"}
    config = {
        "model_name": None,
        "model": {"fingerprint": "f"},
        "stream": {"name": "s", "scenario": "class", "labels": LABELS, "tasks": list(TASKS)},
        "recipe": {"name": "r"},
        "seed": 0,
    }
    run = Run.open(tmp_path / "r", config)
    for known in ([], ["old"], ["old", "mid"]):
        predictions = {f"target/{t}": answers(t, 0) for t in known}
        predictions |= {f"linear/class/{t}": answers(t, 1) for t in known}
        classes = sorted({c for t in known for c in TASKS[t]})
        facts = {"learned": known, "classes": classes, "heads": ["linear"]}
        facts["guarantees"] = [measured] if known == ["old"] else []
        run.commit(known[-1] if known else "untouched", {"predictions.safetensors": predictions}, facts)
    run.close()
    result = Result(tmp_path / "r")
    assert judge(result, **LIMITS).failures == (
        "broken promise: SubspaceProjection, drift: 0.5, promised 1e-06, after task `old`",
    )
    assert result.summary().splitlines()[-1].startswith("BROKEN PROMISE: drift: do not use or export this model")


def test_what_cannot_be_judged(tmp_path):
    result = write(tmp_path / "r", GOOD)
    with pytest.raises(ConfigError, match="no head `liner`: did you mean `linear`"):
        judge(result, **LIMITS, head="liner")
    with pytest.raises(ConfigError, match="no scenario `domain`"):
        judge(result, **LIMITS, scenario="domain")
    with pytest.raises(ConfigError, match="is a fraction"):
        judge(result, max_forgetting=2, min_gain=0)
    with pytest.raises(RunError, match="no task yet"):
        judge(write(tmp_path / "empty", [{}]), **LIMITS)
    joint = write(tmp_path / "joint", [{}, GOOD[3]], learned=[["old", "mid", "new"]])
    with pytest.raises(ConfigError, match="all at once"):
        judge(joint, **LIMITS)


def test_the_command(tmp_path, monkeypatch, capsys):
    write(tmp_path / "good", GOOD)
    write(tmp_path / "bad", [*GOOD[:3], {"old": 60, "mid": 1, "new": 2}], broken=[BROKEN])
    code, out, _ = call(monkeypatch, capsys, "gate", tmp_path / "good", "--max-forgetting", "0.02")
    assert code == 0 and "PASS" in out and "old" in out and "2 of 100" in out
    code, out, _ = call(monkeypatch, capsys, "gate", tmp_path / "bad")
    assert code == 1 and "FAIL: `old` got worse by 50.0 points" in out and "broken promise" in out and "old: a0" in out
    code, out, _ = call(monkeypatch, capsys, "gate", tmp_path / "bad", "--json", "--max-flips", "3")
    found = json.loads(out)
    assert code == 1 and not found["passed"] and len(found["failures"]) == 3 and found["tasks"][0]["drop"] == 0.5
    code, _, err = call(monkeypatch, capsys, "gate", tmp_path / "nowhere")
    assert code == 2 and err.count("\n") == 1 and "is no run" in err
    code, out, _ = call(monkeypatch, capsys, "gate", "--help")
    assert code == 0 and "exit code 0" in out


def test_a_limit_finer_than_its_test_set_says_so_and_decides_nothing(tmp_path, monkeypatch, capsys):
    """Two points of ten examples: one is ten points. With limits that the test sets can tell nothing is said."""
    result = write(tmp_path / "r", GOOD)
    verdict = judge(result, **LIMITS)
    assert verdict.passed and verdict.to_dict()["coarse"] == verdict.coarse
    assert verdict.coarse.startswith("max-forgetting of 2 points is finer than the test set of `mid` can tell (10 exam")
    assert "one example is 10 and one standard error 9.5 points; so it is for 2 more" in verdict.coarse
    assert judge(result, max_forgetting=0.2, min_gain=0.2).coarse == ""
    code, said = call(monkeypatch, capsys, "gate", tmp_path / "r")[:2]
    assert code == 0 and "NOTE: max-forgetting of 2 points" in said
