"""The questions on a tiny model: the equations of what is measured, and that every command answers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import perpetune as pt
from benchmarks import questions
from benchmarks.questions import ChangeL1, main

TASKS = ["0-1", "2-3", "4-5"]


@pytest.fixture(scope="module")
def digits(tiny_vit):
    return ["--model", str(tiny_vit()), "--stream", "digits", "--tasks", *TASKS]


@pytest.fixture(scope="module")
def short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(questions, "TRAINING", {**questions.TRAINING, "num_train_epochs": 1, "learning_rate": 0.01})
        yield


def test_the_penalty_is_the_gradient_of_the_l1_norm_of_the_change():
    model, rule = nn.Linear(5, 3).double(), ChangeL1(0.3)
    start = [p.detach().clone() for p in model.parameters()]
    rule.begin_task(pt.TaskContext(model, 0))
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)
            p.grad = torch.zeros_like(p)
    rule.on_gradient()
    penalty = 0.3 * sum((p - s).abs().sum() for p, s in zip(model.parameters(), start, strict=True))
    for p, g in zip(model.parameters(), torch.autograd.grad(penalty, list(model.parameters())), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=0)


def test_the_penalty_makes_changes_small(tiny_vit, tmp_path):
    stream = pt.load_stream("digits").select(TASKS)
    for strength in (0.0, 1.0):
        recipe = pt.Recipe(pt.AdapterConfig(bottleneck=4), [ChangeL1(strength)], name=f"adapter_{strength:g}")
        run = tmp_path / recipe.name / "seed-0" / "linear"
        pt.Learner(tiny_vit(), recipe, run, training={"num_train_epochs": 1, "learning_rate": 0.01}).learn(stream)
    free, held = main(["changes", str(tmp_path)])
    assert held["l1 of a change"] < 0.2 * free["l1 of a change"]
    assert 0 <= held["met"] <= held["changed"] <= 1 and free["met"] > 0


def test_masks_scale_cosines_and_runs_are_read(tiny_vit, tmp_path, capsys):
    stream = pt.load_stream("digits").select(TASKS)
    for name in ("soup", "lora"):
        training = {"num_train_epochs": 1, "learning_rate": 0.01}
        pt.Learner(tiny_vit(), name, tmp_path / name / "seed-0" / "linear", training=training).learn(stream)
    soup, lora = (tmp_path / name for name in ("soup", "lora"))
    for row in main(["masking", str(tmp_path), "--only", "soup"]):
        assert abs(row["cosine after"] - row["keep x cosine"]) < 0.05
    by_tolerance = main(["collisions", str(tmp_path), "--only", "lora"])[0]
    rates = [by_tolerance[f"met > {t:g}"] for t in questions.TOLERANCES]
    assert rates == sorted(rates, reverse=True) and rates[0] > 0
    assert {row["recipe"] for row in main(["figures", str(tmp_path)])} == {"soup", "lora"}
    assert all(row["kB a task"] > 0 for row in main(["cost", str(tmp_path)]))
    held_out = ["--model", str(tiny_vit()), "--stream", "digits", "--held-out", "6-7", "8-9"]
    base, *others = main(["representation", str(tmp_path), *held_out])
    assert base["recipe"] == "base" and len(others) == 2 and all(0 <= row["ridge"] <= 100 for row in others)
    assert "| soup | 1 |" in capsys.readouterr().out and soup != lora


def test_beta_0_is_the_rule_and_more_moves_more(digits, short, monkeypatch):
    monkeypatch.setattr(questions, "BETAS", (0.0, 1.0))
    ruled, free = main(["beta", *digits, "--seeds", "0"])
    assert ruled["moved"] < free["moved"]


def test_a_space_is_its_own_neighbour(digits, short):
    rows = main(["angles", *digits, "--seeds", "0"])
    assert len(rows) == 2 * (len(TASKS) - 1)
    assert all(0 < row[what] <= 1 + 1e-9 for row in rows for what in ("near", "same", "held"))


def test_a_question_without_runs_says_what_to_give(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["figures", str(tmp_path)])
    assert "give the folder" in capsys.readouterr().err
