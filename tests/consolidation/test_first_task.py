"""One adaptation, then statistics."""

from __future__ import annotations

import peft
import pytest
import torch

import perpetune as pt
from perpetune.consolidation import FirstTask
from perpetune.core.errors import ConfigError
from perpetune.heads import LDAHead, PrototypeHead

TRAINING = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 5e-3}


def lora():
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])


def learned(model, stream, path, consolidation, head):
    learner = pt.Learner(model, pt.Recipe(lora(), [], consolidation, head), path, training=TRAINING, max_length=16)
    return learner, learner.learn(stream)


def test_the_model_is_trained_once_and_then_stays(model, stream, tmp_path):
    learner, result = learned(model, stream, tmp_path / "run", FirstTask(), LDAHead())
    first, *rest = [commit.manifest for commit in result.commits[1:]]
    assert first["trainable_parameters"] > 0 and all(m["trainable_parameters"] == 0 for m in rest)
    for manifest in (first, *rest):
        found = {m["name"]: m for m in manifest["guarantees"]}
        assert found["change of the settled weights"]["value"] == 0
        assert "tasks with stale statistics" not in found or found["tasks with stale statistics"]["value"] == 0
    base, _ = learner.fresh()
    examples = learner.backbone.prepare(stream.tasks[1].test.select(range(4)))
    assert not torch.equal(base.features(examples, 4), learner.backbone.features(examples, 4))
    assert not any("adapter_model.safetensors" in commit.manifest["files"] for commit in result.commits[2:])


def test_features_without_and_with_the_adapter_stand_side_by_side(model, stream, tmp_path):
    learner, _ = learned(model, stream, tmp_path / "run", FirstTask(concatenate=True), PrototypeHead())
    (head,), backbone = learner.heads, learner.backbone
    assert head.width == 2 * backbone.width
    rows = stream.tasks[0].train
    examples = backbone.prepare(rows)
    with learner.recipe.consolidation.view(None):
        frozen = backbone.features(examples, 8)
    both = torch.cat([frozen, backbone.features(examples, 8)], 1)
    c = rows["label"][0]
    mean = both[torch.tensor(rows["label"][:]) == c].double().sum(0)
    assert torch.allclose(head.statistics["sums"][c] * 2.0**-18, mean, atol=1e-2)


def test_an_adapter_that_does_not_help_is_dropped(model, stream, tmp_path):
    """Two steps at a rate of 0 change nothing, which is not better."""
    recipe = pt.Recipe(lora(), [], FirstTask("better"), LDAHead())
    training = {**TRAINING, "learning_rate": 0.0}
    learner = pt.Learner(model, recipe, tmp_path / "run", training=training, max_length=16)
    result = learner.learn(stream)
    assert "adapter_model.safetensors" not in result.commits[1].manifest["files"]
    assert not hasattr(learner.backbone.model, "peft_config")
    again = pt.Learner.open(tmp_path / "run")
    texts = [text for task in stream for text in task.test["text"][:3]]
    assert again.predict(texts) == learner.predict(texts)


def test_what_cannot_be_switched_off_and_heads_that_train_are_refused(model, stream, tmp_path):
    for tuner, consolidation, head in (
        (pt.AllWeights(), FirstTask("better"), LDAHead()),
        (lora(), FirstTask(concatenate=True), pt.LinearHead()),
    ):
        learner = pt.Learner(model, pt.Recipe(tuner, [], consolidation, head), tmp_path / head.name, training=TRAINING)
        with pytest.raises(ConfigError):
            learner.learn(stream)
    for wrong in ({"keep": "never"}, {"holdout": 0.0}):
        with pytest.raises(ConfigError):
            FirstTask(**wrong)
