"""One adapter a task, features side by side."""

from __future__ import annotations

import pytest
import torch

import perpetune as pt

TRAINING = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 5e-3}


def learn(model, stream, run=None, **options):
    learner = pt.Learner(model, "ease", run, training=TRAINING, max_length=16, **options)
    return learner, learner.learn(stream)


def test_heads_read_what_each_adapter_makes_of_an_input(model, stream):
    learner, _ = learn(model, stream)
    head, texts = learner.heads[0], list(stream.tasks[0].test["text"])
    backbone, states = learner.backbone, learner.recipe.consolidation.states
    examples = backbone.prepare(stream.tasks[0].test)
    blocks = []
    for t in range(3):
        with states.view(t):
            blocks.append(backbone.features(examples, 8))
    assert not torch.equal(blocks[0], blocks[1])
    best = head.scores(torch.cat(blocks, 1)).argmax(1)
    assert learner.predict(texts) == [stream.labels[c] for c in best.tolist()]


def test_old_tasks_read_the_same_adapters_whatever_follows(model, stream):
    _, result = learn(model, stream)
    drift = [g["value"] for g in result.guarantees if g["name"].startswith("change of features")]
    assert drift and max(drift) < 1e-6


def test_a_task_can_be_taken_out_and_the_others_stay(model, stream, tmp_path):
    learner, _ = learn(model, stream, tmp_path / "run")
    out = stream.tasks[1].name
    learner.revert(stream.select([t.name for t in stream if t.name != out]), out)
    left = {label for task in stream if task.name != out for label in stream.label_texts(task.classes)}
    assert set(learner.predict(list(stream.tasks[0].test["text"]))) <= left
    opened = pt.Learner.open(tmp_path / "run")
    texts = [x for task in stream for x in task.test["text"]]
    assert opened.predict(texts) == learner.predict(texts)


@pytest.mark.parametrize(
    ("recipe", "heads", "message"), [("ease", ["linear"], "use the head ease"), ("lora", ["ease"], "recipe ease")]
)
def test_heads_that_do_not_fit_are_refused_before_anything_is_trained(recipe, heads, message, model, stream):
    with pytest.raises(pt.ConfigError, match=message):
        pt.Learner(model, recipe, heads=heads, training=TRAINING).learn(stream)
