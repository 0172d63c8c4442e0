"""One adapter per task on a language model: routes by the states of the prompts, answers under the task's adapter."""

from __future__ import annotations

import functools
import json

import pytest
import torch

import perpetune as pt
from perpetune import Learner, load_stream
from perpetune.learning.prediction import frozen_features
from perpetune.models.loading import load_language_model
from perpetune.routers import Detector

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
TRAINING["learning_rate"] = 0.01
BOTH = ["language", "language_generated"]
HEADS = ["language", {"type": "language_generated", "longest": 4}]  # untrained, a model does not stop


@pytest.fixture(scope="module")
def source(word_stream):
    @functools.cache
    def load(*tasks):
        return load_stream(word_stream, tasks=tasks, pose="instruction", train_limit=4, test_limit=2)

    return load


def prompts(stream):
    return [prompt for task in stream for prompt in task.test["prompt"]]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_an_input_is_the_mean_state_of_its_prompt(kind, source, tiny_lm):
    """Of each prompt alone, without padding, the answer not read."""
    backbone, stream = load_language_model(tiny_lm(kind)), source("films", "news")
    backbone.open(stream.labels, ["options"])
    examples = [e for task in stream for e in backbone.prepare(task.test)]
    pooled = backbone.pooled(examples, 4)
    assert pooled.shape == (len(examples), backbone.pooled_width)
    for example, found in zip(examples, pooled, strict=True):
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            if kind == "t5":
                hidden = backbone.model.encoder(input_ids=ids).last_hidden_state
            else:
                hidden = backbone.model.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(found, hidden[0].mean(0), rtol=1e-4, atol=1e-5)


ROUTED = [
    ("routed", "llama"),
    ({"name": "default", "features": 64}, "llama"),
    ("routed", "t5"),
]  # architectures differ in what is read, and recipes do not


@pytest.mark.parametrize(
    ("recipe", "kind"), [*((name, "llama") for name in ("color", "color_adapted", "color_oracle")), *ROUTED]
)
def test_recipes_with_a_router_learn_resume_and_open_again(recipe, kind, source, tiny_lm, tmp_path):
    model, options = tiny_lm(kind, layers=1), {"heads": HEADS, "training": TRAINING}
    Learner(model, recipe, tmp_path / "r", **options).learn(source("films"))
    learner, stream = Learner(model, recipe, tmp_path / "r", **options), source("films", "news")
    result = learner.learn(stream)
    assert [e["task"] for e in result.journal if e["event"] == "task"] == ["films", "news"]
    whole = Learner(model, recipe, tmp_path / "whole", **options).learn(stream)
    digests = [r.commits[-1].manifest["files"] for r in (result, whole)]
    predictions = "predictions.safetensors"  # see tests/runs/test_result.py
    assert digests[0].pop(predictions) and digests[1].pop(predictions) and digests[0] == digests[1]
    again, asked = Learner.open(tmp_path / "r", heads=HEADS), prompts(stream)
    told = {"task": "news"} if recipe == "color_oracle" else {}
    for head in BOTH:
        said = learner.predict(asked, head=head, **told)
        assert again.predict(asked, head=head, **told) == said
        assert said[::2] == [learner.predict([prompt], head=head, **told)[0] for prompt in asked[::2]]
    assert all(g["holds"] is not False for g in result.guarantees)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_what_later_tasks_leave_of_a_task_is_all_of_it(kind, source, tiny_lm, tmp_path):
    """Told the task, the likelihoods of its answers have the same bits before and after another one was learned."""
    learner = Learner(tiny_lm(kind), "color", tmp_path / "r", training=TRAINING)

    def likelihoods():
        consolidation, backbone = learner.recipe.consolidation, learner.backbone
        with consolidation.view(0):
            return backbone.outputs(backbone.prepare(source("films").tasks[0].test), 4, classes=[0, 1])[:, :2]

    learner.learn(source("films"))
    before, untouched = likelihoods(), load_language_model(tiny_lm(kind))
    untouched.open(learner.backbone.labels, ["options"])
    assert not torch.equal(untouched.outputs(untouched.prepare(source("films").tasks[0].test), 4), before)
    learner.learn(source("films", "news"))
    assert torch.equal(likelihoods(), before)


def test_an_answer_that_names_none_of_the_classes_is_none(source, tiny_lm, tmp_path, monkeypatch):
    learner, stream = (
        Learner(tiny_lm("llama"), "color", tmp_path / "r", heads=HEADS, training=TRAINING),
        source("films"),
    )
    learner.learn(stream)
    good = stream.labels[stream.tasks[0].classes[0]]
    monkeypatch.setattr(learner.backbone, "_answers", lambda examples, *a, **k: ["nonsense", good][: len(examples)])
    prompts = stream.tasks[0].test["prompt"][:1] * 2
    assert learner.predict(prompts, head="language_generated") == ["nonsense", good]
    assert learner.predict(prompts, head="language_generated", classes=stream.labels[:2]) == ["", good]


def test_free_answers_are_generated_under_the_adapter_of_their_task(tiny_lm, tmp_path):
    """Two tasks that answer the same question in their own words; what the prompt is about tells them apart."""
    for task, word in (("films", "movie film"), ("news", "market team")):
        for split, count in (("train", 12), ("test", 4)):
            lines = [{"prompt": f"{word} {i % 3}", "response": f"{task} {i % 3}"} for i in range(count)]
            (tmp_path / "s" / task).mkdir(parents=True, exist_ok=True)
            (tmp_path / "s" / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    stream = load_stream(tmp_path / "s")
    options = {
        "heads": [{"type": "language_generated", "longest": 8}],
        "training": {**TRAINING, "num_train_epochs": 20},
    }
    recipe = {"name": "color", "target": "all-linear", "rank": 16}
    learner = Learner(tiny_lm("llama"), recipe, tmp_path / "r", **options)
    result = learner.learn(stream)
    assert result.routing().accuracy == 1
    matrix = result.matrix("language_generated", "class").values
    assert matrix[1, 0] == matrix[0, 0] >= 0.75 and matrix[1, 1] >= 0.75


def test_boundaries_are_found_on_prompts(source, tiny_lm, tmp_path):
    """By the same states; the parts are those of the same detector on the same features."""
    stream = load_stream(source("films").source["source"], tasks=["films", "news"], pose="instruction")
    drift = pt.drift(stream, 2, (16, 20), seed=0)
    learner = Learner(tiny_lm("llama"), "color", tmp_path / "r", training=TRAINING)
    result = pt.learn_drift(learner, drift, Detector(level=0.05, length=8))
    features = frozen_features(learner.setup, drift.rows, "language", stream.labels)
    backbone = load_language_model(tiny_lm("llama"))
    backbone.open(stream.labels, [])
    assert torch.equal(features, backbone.pooled(backbone.prepare(drift.rows), 4))
    expected = Detector(level=0.05, length=8).read(features)
    assert len(result.tasks) == len(expected) >= 2
