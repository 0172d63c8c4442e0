"""Weights of classes: as scikit-learn has them, in the loss of heads, and refused where they would do nothing."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from perpetune import ConfigError, Learner, LinearHead, load_stream
from perpetune.learning.class_weights import class_weights
from perpetune.metrics.records import read_records, write_records
from perpetune.operations.gate import judge
from perpetune.runs.config_file import read_config
from tests.calling import call

TRAINING = {"num_train_epochs": 3, "per_device_train_batch_size": 16, "learning_rate": 5e-3, "head_learning_rate": 1e-2}


def test_balanced_is_as_in_scikit_learn():
    drawn = [0] * 30 + [2] * 8 + [3] * 2
    found = class_weights("balanced", drawn, ["a", "b", "c", "d"])
    expected = compute_class_weight("balanced", classes=np.array([0, 2, 3]), y=np.array(drawn))
    assert found[[0, 2, 3]].tolist() == pytest.approx(expected.tolist()) and found[1] == 1
    assert found[drawn].mean().item() == pytest.approx(1.0)
    assert class_weights({"d": 5.0}, drawn, ["a", "b", "c", "d"]).tolist() == [1, 1, 1, 5]


def test_the_loss_is_the_weighted_mean_of_single_losses():
    head = LinearHead()
    head.open(6, ["a", "b", "c"], seed=0)
    head.begin_task([0, 2])
    f, y = torch.randn(10, 6), torch.tensor([0] * 7 + [2] * 3)
    each = torch.nn.functional.cross_entropy(
        f @ head.active_weight.T + head.active_bias, torch.tensor([0] * 7 + [1] * 3), reduction="none"
    )
    assert torch.allclose(head.loss(f, y), each.mean())
    head.weigh(torch.tensor([0.5, 9.0, 4.0]))
    assert torch.allclose(head.loss(f, y), (each * torch.tensor([0.5] * 7 + [4.0] * 3)).sum() / 10)
    head.end_task()
    head.begin_task([0, 2])
    assert head.weights is None  # of one task alone


@pytest.fixture(scope="module")
def rare(tmp_path_factory):
    draw, folder = random.Random(0), tmp_path_factory.mktemp("streams") / "rare"
    (folder / "w1").mkdir(parents=True)
    for split, counts in (("train", (150, 5)), ("test", (60, 4))):
        rows = [
            {"text": " ".join(draw.choices([word, word, "the"], k=5)) + f" {i}", "label": label}
            for label, word, count in (("World", "world", counts[0]), ("Sports", "team", counts[1]))
            for i in range(count)
        ]
        (folder / "w1" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert(layers=1)


def test_a_rare_class_is_told_and_told_of(rare, model, tmp_path, monkeypatch, capsys):
    stream = load_stream(rare)
    plain = Learner(model, "lora", tmp_path / "plain", training=TRAINING).learn(stream)
    balanced = Learner(model, "lora", tmp_path / "b", training={**TRAINING, "class_weights": "balanced"}).learn(stream)
    (before,), (after,) = ([r for r in x.records() if r.scenario == "class"] for x in (plain, balanced))
    assert before.final_accuracy > 0.9 and before.final_accuracy_macro == 0.5
    assert before.per_class == [
        {"label": "Sports", "accuracy": 0.0, "examples": 4},
        {"label": "World", "accuracy": 1.0, "examples": 60},
    ]
    assert after.final_accuracy_macro > before.final_accuracy_macro
    assert "final accuracy macro 50.0" in plain.summary()
    assert "classes, worst first (test examples): Sports 0.0 (4), World 100.0 (60)" in plain.summary()
    code, out, _ = call(monkeypatch, capsys, "gate", tmp_path / "plain")
    assert code == 1 and "mean over its classes 50.0, none right of Sports" in " ".join(out.split())
    assert judge(plain, max_forgetting=0, min_gain=-1).passed
    low = judge(plain, max_forgetting=0, min_gain=-1, min_class_accuracy=0.5)
    assert not low.passed and "of class `Sports` of `w1` 0.0 % are right (4 examples)" in low.failures[0]
    assert read_config(tmp_path / "b")["training"]["class_weights"] == "balanced"
    assert "class_weights" not in read_config(tmp_path / "plain")["training"]  # such runs open as before


def test_records_of_before_are_read(rare, model, tmp_path):
    record = Learner(model, "frozen_ncm", tmp_path / "r").learn(load_stream(rare)).records()[0]
    write_records(tmp_path / "new.json", [record])
    assert read_records(tmp_path / "new.json") == [record]
    (fields,) = json.loads((tmp_path / "new.json").read_text(encoding="utf-8"))
    del fields["final_accuracy_macro"], fields["per_class"]
    (tmp_path / "old.json").write_text(json.dumps([fields]), encoding="utf-8")
    (old,) = read_records(tmp_path / "old.json")
    assert old.final_accuracy_macro is None and old.per_class == [] and old.matrix == record.matrix


@pytest.mark.parametrize(
    ("recipe", "heads", "value", "message"),
    [
        ("lora", None, "balancd", "balanced, none, or weights by label"),
        ("lora", None, {"Sports": 0}, "of `Sports` must be a number above 0"),
        ("lora", None, {"Sprots": 2}, "names no class of this stream, `Sprots`.*Sports"),
        ("frozen_ncm", None, "balanced", "nothing is trained with one here"),
        ("lora", ["ridge"], "balanced", "no effect on head `ridge`: its sums over samples are exact"),
    ],
)
def test_what_would_have_no_effect_is_refused(recipe, heads, value, message, rare, model, tmp_path):
    with pytest.raises(ConfigError, match=message):
        Learner(model, recipe, tmp_path / "r", heads=heads, training={"class_weights": value}).learn(load_stream(rare))


def test_none_takes_the_weights_of_a_run_away(model):
    def kept(**given):
        return Learner(model, "lora", training=given).setup.training.get("class_weights")

    assert kept(class_weights="none") is kept(class_weights=None) is kept() is None
    assert kept(class_weights={1: 2}) == {"1": 2.0} and kept(class_weights="balanced", max_steps=3) == "balanced"
