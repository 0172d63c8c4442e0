"""A task that brings a single new class, as a week does now and then."""

from __future__ import annotations

import json
import random

import pytest

from perpetune import Learner, load_stream
from perpetune.core.progress import Progress
from perpetune.operations.gate import ONE_CLASS, judge

TRAINING = {"num_train_epochs": 6, "per_device_train_batch_size": 8, "learning_rate": 3e-3}
WORDS = {"film": ["movie", "film"], "sport": ["team", "game"], "happy": ["great", "good"]}
WEEKS = {"week-1": ["film"], "week-2": ["sport"], "week-3": ["film", "sport"], "week-4": ["happy"]}


class Heard(Progress):
    def __init__(self):
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def weeks(tmp_path_factory):
    draw, folder = random.Random(0), tmp_path_factory.mktemp("streams") / "weeks"
    for week, labels in WEEKS.items():
        (folder / week).mkdir(parents=True)
        for split, count in (("train", 24), ("test", 8)):
            rows = [
                {
                    "text": " ".join(draw.choices([*WORDS[label], "the", "a"], k=6)) + f" {week}{split}{i}",
                    "label": label,
                }
                for label in labels
                for i in range(count)
            ]
            (folder / week / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert(width=16, layers=1)


@pytest.mark.parametrize(("recipe", "head"), [("lora", "linear"), ("sequential", "label_text"), ("lora", "ncm")])
def test_weeks_of_one_class_are_learned(recipe, head, weeks, model, tmp_path):
    heard = Heard()
    learner = Learner(model, recipe, tmp_path / "r", heads=[head], training=TRAINING, progress=heard)
    result = learner.learn(load_stream(weeks, tasks=["week-1", "week-2"]))
    assert sum("has one class, `film`, and there is no other" in text for text in heard.said) == 1
    assert not any("`sport`, and there is no other" in text for text in heard.said)
    matrix = result.matrix(head, "class").values
    assert matrix[0, 0] == 1.0 and matrix[1, 1] > 0.5
    assert len(result.commits) == 3 and result.commits[2].manifest["classes"] == [0, 1]
    assert Learner.open(tmp_path / "r").predict(["team game team"]) == learner.predict(["team game team"])
    verdict = judge(result, max_forgetting=1, min_gain=0.01)
    if verdict.against == ONE_CLASS:
        assert verdict.reference == 0.0 and verdict.passed


def test_a_new_class_beside_many_does_not_change_their_rows(weeks, model, tmp_path):
    learner = Learner(model, "lora", tmp_path / "r", training=TRAINING)
    learner.learn(load_stream(weeks, tasks=["week-3"]))
    before = learner.heads[0].state()
    learner.learn(load_stream(weeks, tasks=["week-3", "week-4"]))
    after = learner.heads[0].state()
    assert (after["weight"][:2] == before["weight"][:2]).all() and len(after["weight"]) == 3
    assert all(
        g["holds"] is not False for g in learner.learn(load_stream(weeks, tasks=["week-3", "week-4"])).guarantees
    )


def test_a_dual_encoder_tells_one_new_text_from_all_seen(tiny_clip, tmp_path):
    from PIL import Image

    for week, label, shade in (("week-1", "dark", 30), ("week-2", "light", 200)):
        for split in ("train", "test"):
            folder = tmp_path / "images" / week / split / label
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (8, 8), (shade + i, shade, shade)).save(folder / f"{i}.png")
    training = {"num_train_epochs": 1, "per_device_train_batch_size": 4}
    learner = Learner(tiny_clip(width=16), "lora", tmp_path / "r", heads=["contrastive"], training=training)
    result = learner.learn(load_stream(tmp_path / "images"))
    first, second = (event["first_loss"] for event in result.journal if event["event"] == "task")
    assert abs(first) < 1e-6 < 0.01 < second
