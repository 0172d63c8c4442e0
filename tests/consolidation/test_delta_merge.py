"""The model is the base plus the sum of the tasks' masked deltas, to the bit, whatever was learned in between."""

from __future__ import annotations

import peft
import pytest
import torch

import perpetune as pt
from perpetune.consolidation.delta_merge import SETTINGS, VALUES
from perpetune.deltas.combine import merge
from perpetune.deltas.delta import Delta
from perpetune.deltas.overlap import overlap
from perpetune.models.loading import load_backbone
from perpetune.runs.directory import Run

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3}


def learn(model, stream, path, consolidation, tuner=None, heads=("ncm",)):
    recipe = pt.Recipe(tuner or pt.AllWeights(), [], consolidation, [pt.LinearHead()], training=TRAINING)
    learner = pt.Learner(model, recipe, path, heads=["linear", *heads])
    learner.learn(stream)
    return learner


def base_of(model):
    backbone = load_backbone(model, "text")
    return {n: t.clone() for n, t in backbone.model.state_dict().items()}, backbone.fingerprint


def deltas_of(path):
    commits = Run.read(path).commits[1:]
    return [Delta.from_tensors(c.tensors(VALUES), c.json(SETTINGS)) for c in commits]


def weights(learner):
    return learner.backbone.model.state_dict()


@pytest.mark.parametrize("scheme", ["bernoulli", "stratified", "disjoint"])
@pytest.mark.parametrize("scale", [1.0, "1/keep"])
def test_the_model_is_the_base_plus_the_stored_deltas(scheme, scale, stream, model, tmp_path):
    learner = learn(model, stream, tmp_path / "r", pt.SparseSum(0.25, scheme, scale))
    base, fingerprint = base_of(model)
    deltas = deltas_of(tmp_path / "r")
    scales = [1.0 if scale == 1.0 else 4.0] * 3
    expected = dict(merge(base, deltas, scales, fingerprint=fingerprint))
    found = weights(learner)
    assert all(torch.equal(found[name], expected[name]) for name in base)
    assert any(not torch.equal(base[name], expected[name]) for name in base)
    again = pt.Learner.open(tmp_path / "r")
    assert all(torch.equal(weights(again)[name], expected[name]) for name in base)
    for delta in deltas:
        kept = delta.count / sum(part.size for part in delta.parts.values())
        assert 0.2 < kept < 0.3
    assert (overlap(deltas).collisions == 0) == (scheme == "disjoint")


def test_every_task_starts_from_the_base(word_stream, stream, model, tmp_path):
    """The delta of a task is the same whatever was learned before it."""
    learn(model, stream, tmp_path / "all", pt.SparseSum(0.5))
    alone = pt.load_stream(word_stream, tasks=["films", "mood"])
    learn(model, alone, tmp_path / "two", pt.SparseSum(0.5))
    (a, _, _), (b, _) = deltas_of(tmp_path / "all"), deltas_of(tmp_path / "two")
    assert a.task_key == b.task_key and a.parts.keys() == b.parts.keys()
    assert all(torch.equal(a.parts[name].values, b.parts[name].values) for name in a.parts)


def test_soup_is_the_average_of_the_tuned_models(stream, model, tmp_path):
    learner = learn(model, stream, tmp_path / "r", pt.SparseSum(1.0, scale="1/T"))
    base, _ = base_of(model)
    deltas = deltas_of(tmp_path / "r")
    for name, theta_0 in base.items():
        tuned = [theta_0 + d.dense(name) if name in d.parts else theta_0 for d in deltas]
        torch.testing.assert_close(weights(learner)[name], torch.stack(tuned).mean(0), rtol=1e-5, atol=1e-6)


def test_sequential_deltas_are_the_change_since_the_tasks_before(stream, model, tmp_path):
    """With nothing masked, the sum is what plain sequential tuning ends with."""
    summed = learn(model, stream, tmp_path / "sum", pt.SparseSum(1.0, sequential=True))
    plain = learn(model, stream, tmp_path / "plain", pt.Continue())
    base, _ = base_of(model)
    flat = [torch.cat([w[n].flatten() for n in base]) for w in (base, weights(plain), weights(summed))]
    assert (flat[1] - flat[2]).norm() < 1e-2 * (flat[1] - flat[0]).norm()  # the sum rounds, and Adam amplifies


def test_a_lora_leaves_a_delta_too(stream, model, tmp_path):
    tuner = peft.LoraConfig(r=2, target_modules=["query", "value"])
    learner = learn(model, stream, tmp_path / "r", pt.SparseSum(1.0), tuner)
    merged = learn(model, stream, tmp_path / "m", pt.Merge(), tuner)
    changed = {name for d in deltas_of(tmp_path / "r") for name in d.parts}
    assert changed and all("query" in n or "value" in n for n in changed)
    assert merged.backbone.model.state_dict().keys() == weights(learner).keys()


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_values_can_be_stored_smaller(storage, stream, model, tmp_path):
    learn(model, stream, tmp_path / "fp32", pt.SparseSum(0.25))
    learn(model, stream, tmp_path / storage, pt.SparseSum(0.25, storage=storage))
    sizes = [sum(t.nbytes for t in deltas_of(tmp_path / s)[0].to_tensors().values()) for s in ("fp32", storage)]
    assert sizes[1] < sizes[0] * (0.51 if storage == "bf16" else 0.27)


def test_vectors_can_be_kept_whole(stream, model, tmp_path):
    learn(model, stream, tmp_path / "r", pt.SparseSum(0.25, vectors="dense"))
    parts = deltas_of(tmp_path / "r")[0].parts
    assert {part.mask for part in parts.values() if len(part.shape) == 1} == {"dense"}
    assert {part.mask for part in parts.values() if len(part.shape) == 2} == {"seed"}


def test_settings_and_tuners_are_checked(stream, model, tmp_path):
    for settings in ({"keep": 0}, {"keep": 0.3, "scheme": "disjoint"}, {"scale": "T"}, {"vectors": "some"}):
        with pytest.raises(pt.ConfigError):
            pt.SparseSum(**settings)
    with pytest.raises(pt.ConfigError, match="use Continue"):
        learn(
            model,
            stream,
            tmp_path / "r",
            pt.SparseSum(),
            peft.IA3Config(target_modules=["key"], feedforward_modules=[]),
        )
    with pytest.raises(pt.ConfigError, match="disjoint"):
        learn(model, stream, tmp_path / "d", pt.SparseSum(0.5, "disjoint"))


def test_refreshed_statistics_are_those_of_the_features_now(stream, model, tmp_path):
    learner = learn(model, stream, tmp_path / "r", pt.SparseSum(0.5), heads=("ncm", "ncm_refresh", "ridge_refresh"))
    by_name = {head.name: head for head in learner.heads}
    fresh = pt.PrototypeHead()
    fresh.open(learner.backbone.width, stream.labels, seed=0)
    for task in stream:
        features = learner.backbone.features(learner.backbone.prepare(task.train), 64)
        fresh.observe(features, torch.tensor(task.train["label"]), task.train["id"])
    assert torch.equal(by_name["ncm_refresh"].statistics["sums"], fresh.statistics["sums"])
    assert not torch.equal(by_name["ncm"].statistics["sums"], fresh.statistics["sums"])
    stale = [g for g in pt.Result(tmp_path / "r").guarantees if g["name"] == "tasks with stale statistics"]
    assert len(stale) == 3  # of `ncm` alone
    again = pt.Learner.open(tmp_path / "r")
    texts = stream.tasks[0].test["text"][:6]
    assert again.predict(texts, head="ridge_refresh") == learner.predict(texts, head="ridge_refresh")
