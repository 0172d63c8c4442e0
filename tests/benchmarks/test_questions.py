"""The questions on a tiny model: the equations of what is measured, and that every command answers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from torch import nn

import perpetune as pt
from benchmarks import questions, zero_shot
from benchmarks.questions import ChangeL1, main
from docs import make_questions

TASKS = ["0-1", "2-3"]
HEADS = ["linear", {"type": "ridge", "features": 16}]
TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 32, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def digits(tiny_vit):
    return ["--model", str(tiny_vit(layers=1)), "--stream", "digits", "--tasks", *TASKS]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(questions, "TRAINING", TRAINING)
    monkeypatch.setattr(questions, "HEADS", HEADS)


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


def test_the_penalty_makes_changes_small(digits, tmp_path):
    config = tmp_path / "sweep.yaml"
    rule = {"type": "ChangeL1", "module": "benchmarks.questions", "strength": 1.0}
    free = {"name": "free", "tuner": {"type": "AdapterConfig", "bottleneck": 4}}
    fresh = {
        "name": "fresh",
        "tuner": {"type": "LoraConfig", "r": 2, "target_modules": "all-linear"},
        "consolidation": {"type": "Merge"},
    }
    recipes = [free, {**free, "name": "held", "rules": [rule]}, fresh]
    config.write_text(yaml.safe_dump({"recipes": recipes}), encoding="utf-8")
    free, held, merged = main(["sweep", *digits, "--config", str(config), "--seeds", "0"])
    assert held["l1 of a change"] < 0.2 * free["l1 of a change"]
    assert all(0 <= row["met"] <= row["changed"] <= 1 for row in (free, held, merged)) and free["met"] > 0


def test_masks_scale_cosines_and_runs_are_read(tiny_vit, tmp_path, capsys):
    stream = pt.load_stream("digits").select(TASKS)
    for name in ("soup", "lora"):
        run = tmp_path / name / "seed-0" / "linear"
        pt.Learner(tiny_vit(layers=1), name, run, heads=["linear"], training=TRAINING).learn(stream)
    for row in main(["masking", str(tmp_path), "--only", "soup"]):
        assert abs(row["cosine after"] - row["keep x cosine"]) < 0.05
    by_tolerance = main(["collisions", str(tmp_path), "--only", "lora"])[0]
    rates = [by_tolerance[f"met > {t:g}"] for t in questions.TOLERANCES]
    assert rates == sorted(rates, reverse=True) and rates[0] > 0
    assert {row["recipe"] for row in main(["figures", str(tmp_path)])} == {"soup", "lora"}
    assert all(row["kB a task"] > 0 for row in main(["cost", str(tmp_path)]))
    held_out = ["--model", str(tiny_vit(layers=1)), "--stream", "digits", "--held-out", "6-7", "8-9"]
    base, *others = main(["representation", str(tmp_path), *held_out])
    assert base["recipe"] == "base" and len(others) == 2 and all(0 <= row["ridge"] <= 100 for row in others)
    assert "| soup | 1 |" in capsys.readouterr().out


def test_beta_0_is_the_rule_and_more_moves_more(digits, monkeypatch):
    monkeypatch.setattr(questions, "BETAS", (0.0, 1.0))
    ruled, free = main(["beta", *digits, "--seeds", "0"])
    assert ruled["moved"] < free["moved"]


def test_a_space_is_its_own_neighbour(digits):
    rows = main(["angles", *digits, "--seeds", "0"])
    assert len(rows) == 2 * (len(TASKS) - 1)
    assert all(0 < row[what] <= 1 + 1e-9 for row in rows for what in ("near", "same", "held"))


def test_a_clip_is_pretrained_and_learns_on(tmp_path, monkeypatch):
    looks = replace(zero_shot.LOOKS, image_size=8, patch_size=4, width=32, depth=1, heads=2)
    monkeypatch.setattr(zero_shot, "LOOKS", looks)
    fast = ["--pretraining-epochs", "1", "--epochs", "1", "--seeds", "0"]
    fast += ["--recipes", "lora", "pegp_lora_fresh, observe"]
    named = ["--stream", "digits", "--seen", "0-1", "2-3", "--tasks", "4-5"]
    free, held = zero_shot.main([*named, *fast, "--model", str(tmp_path / "clip")])
    assert free["zero-shot before"] == held["zero-shot before"]
    assert all(0 <= row[what] <= 100 for row in (free, held) for what in ("zero-shot after", "all tasks at the end"))


def test_the_page_takes_its_tables_from_records():
    page = "<!-- table one: f (ridge) -->\nold\n<!-- /table -->\n<!-- table two: x -->\nkept\n<!-- /table -->"
    rows = [{"recipe": "lora", "seed": seed, "f (ridge)": value} for seed, value in ((0, 2.0), (1, 4.0))]
    made = make_questions.filled(page, {"one": rows})
    assert "| lora | 2 | 3.0 ± 1.4 |" in made and "old" not in made and "kept" in made
    assert make_questions.filled(made, {"one": rows}) == made


def test_a_question_without_runs_says_what_to_give(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["figures", str(tmp_path)])
    assert "give the folder" in capsys.readouterr().err
