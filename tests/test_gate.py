"""The gate, on runs whose predictions are written by hand: nothing is trained."""

from __future__ import annotations

import json

import pytest
import torch
from test_cli import call

from perpetune import ConfigError, Result, RunError
from perpetune.gate import judge
from perpetune.run import Run

LABELS = ["a0", "a1", "b0", "b1", "c0", "c1"]
TASKS = {"old": [0] * 50 + [1] * 50, "mid": [2] * 5 + [3] * 5, "new": [4] * 10 + [5] * 10}
LIMITS = {"max_forgetting": 0.02, "min_gain": 0.01}
BROKEN = {"name": "drift", "value": 0.5, "bound": 1e-6, "source": "SubspaceProjection", "holds": False}


def answers(task, wrong):
    """The right classes, but for the first `wrong` examples, which are called by the other class of the task."""
    return torch.tensor([c ^ 1 if i < wrong else c for i, c in enumerate(TASKS[task])], dtype=torch.int32)


def write(path, rows, *, broken=(), learned=(["old"], ["old", "mid"], ["old", "mid", "new"]), scenario="class"):
    """rows[i][task]: how many examples are wrong at point i; point 0 is the untouched model."""
    config = {
        "model_name": None,
        "model": {"fingerprint": "f"},
        "stream": {"name": "s", "scenario": scenario, "labels": LABELS, "tasks": list(TASKS)},
        "recipe": {"name": "r"},
        "seed": 0,
    }
    run = Run.open(path, config)
    for i, (row, known) in enumerate(zip(rows, [[], *learned], strict=False)):
        predictions = {f"target/{t}": answers(t, 0) for t in row}
        kinds = ("class", "task") if scenario == "class" else (scenario,)
        predictions |= {f"linear/{kind}/{t}": answers(t, wrong) for t, wrong in row.items() for kind in kinds}
        classes = sorted({c for t in known for c in TASKS[t]})
        facts = {"learned": known, "classes": classes, "heads": ["linear"], "guarantees": []}
        if i == len(rows) - 1:
            facts["guarantees"] = list(broken)
        run.commit(known[-1] if known else "untouched", {"predictions.safetensors": predictions}, facts)
    run.close()
    return Result(path)


GOOD = [{}, {"old": 10}, {"old": 10, "mid": 1}, {"old": 12, "mid": 1, "new": 2}]


def test_limits_are_met_where_they_are_met_exactly(tmp_path):
    """a(T-1, j) - a(T, j) = 0.90 - 0.88 is 0.02, whatever floating point makes of it."""
    verdict = judge(write(tmp_path / "r", GOOD), **LIMITS)
    assert 0.90 - 0.88 > 0.02 and verdict.passed
    assert [(t.name, round(t.drop, 9), t.flips) for t in verdict.tasks] == [("old", 0.02, 2), ("mid", 0, 0)]
    assert verdict.gain == pytest.approx(0.9 - 1 / 6) and verdict.against == "chance"
    assert not judge(Result(tmp_path / "r"), max_forgetting=0.019, min_gain=0.01).passed
    edge = {"max_forgetting": 0.02, "scenario": "task"}
    assert judge(Result(tmp_path / "r"), min_gain=0.4, **edge).passed  # 0.9 against the chance of two classes
    assert not judge(Result(tmp_path / "r"), min_gain=0.41, **edge).passed


def test_gain_is_over_the_model_before_then_over_the_untouched_one(tmp_path):
    untouched = [{"new": 12}, *GOOD[1:]]
    verdict = judge(write(tmp_path / "b", untouched), **LIMITS)
    assert (verdict.reference, verdict.against) == (0.4, "the untouched model")
    ahead = [untouched[0], untouched[1], {**GOOD[2], "new": 2}, GOOD[3]]
    verdict = judge(write(tmp_path / "a", ahead), **LIMITS)
    assert (verdict.reference, verdict.against, verdict.gain) == (0.9, "the model before it", 0)
    assert verdict.failures == ("`new` gained 0.0 points over the model before it, asked for are 1",)


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
