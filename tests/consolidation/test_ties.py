"""TIES as a row of `DeltaMerge`: a run of it resumes, loses a task, is exported and scaled; hooks of one's own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import yaml

import perpetune as pt
from perpetune.consolidation.delta_merge import SETTINGS, VALUES
from perpetune.deltas.combination import Combination
from perpetune.deltas.delta import Delta
from perpetune.deltas.keep import Keep, Kept
from perpetune.models.loading import load_backbone
from perpetune.operations.tune_scale import accuracy_by_scale
from perpetune.recipes import make_recipe
from perpetune.runs.directory import Run
from tests.deltas.test_combination import ties_merging

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3}


def learner_of(model, path, recipe="ties", **options):
    return pt.Learner(model, recipe, path, training=TRAINING, **options)


def weights(learner):
    return {name: t.clone() for name, t in learner.backbone.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def learned(word_stream, tiny_bert, tmp_path_factory):
    """A run of `ties`, its stream and model."""
    stream, path, model = pt.load_stream(word_stream), tmp_path_factory.mktemp("ties") / "run", tiny_bert()
    learner_of(model, path).learn(stream)
    return stream, path, model


def test_the_model_is_the_base_plus_the_merge_of_the_trimmed_deltas(learned):
    stream, path, model = learned
    base = load_backbone(model, "text").model.state_dict()
    floats = [name for name, t in base.items() if t.is_floating_point()]
    deltas = [Delta.from_tensors(c.tensors(VALUES), c.json(SETTINGS)) for c in Run.read(path).commits[1:]]
    entries = sum(base[name].numel() for name in floats)
    assert all(abs(delta.count - int(0.2 * entries)) <= 2 for delta in deltas)  # ties aside
    flat = torch.cat([base[name].reshape(-1) for name in floats])
    kept = [torch.cat([(d.dense(n) if n in d.parts else base[n] * 0).reshape(-1) for n in floats]) for d in deltas]
    tuned = [flat.double() + tau.double() for tau in kept]
    found = weights(pt.Learner.open(path))
    expected = ties_merging(flat, tuned, 1.0, 1.0)
    torch.testing.assert_close(
        torch.cat([found[name].reshape(-1) for name in floats]).double(), expected, rtol=1e-6, atol=1e-7
    )


def test_it_resumes_to_the_bit(learned, tmp_path):
    stream, path, model = learned
    first = replace(stream, tasks=stream.tasks[:1], labels=[stream.labels[c] for c in stream.tasks[0].classes])
    learner_of(model, tmp_path / "parts").learn(first)
    learner_of(model, tmp_path / "parts").learn(stream)
    assert same(weights(pt.Learner.open(path)), weights(pt.Learner.open(tmp_path / "parts")))


def test_a_task_taken_out_or_left_out_has_never_been(learned, word_stream, tmp_path):
    stream, path, model = learned
    out = stream.tasks[1].name
    left = pt.load_stream(word_stream, tasks=[task.name for task in stream if task.name != out])
    learner_of(model, tmp_path / "never").learn(left)
    never = weights(pt.Learner.open(tmp_path / "never"))
    exported = pt.Learner.open(path).export(tmp_path / "exported", without=[out])
    assert same(load_backbone(exported, "text").model.state_dict(), never)
    shutil.copytree(path, tmp_path / "cut")
    learner_of(model, tmp_path / "cut").revert(left, out)
    assert same(weights(pt.Learner.open(tmp_path / "cut")), never)


def test_its_scale_is_chosen_on_validation_data(word_stream, tiny_bert, tmp_path):
    stream = pt.load_stream(word_stream, validation_share=0.3).on_validation()
    learner_of(tiny_bert(), tmp_path / "run").learn(stream)
    found = accuracy_by_scale(tmp_path / "run", stream, [0.5, 1.0])
    assert list(found) == [0.5, 1.0] and all(0 <= value <= 1 for value in found.values())


def test_a_run_that_calls_it_sparse_sum_goes_on(word_stream, tiny_bert, tmp_path):
    """run.yaml as it was written before there were hooks."""
    stream, model = pt.load_stream(word_stream), tiny_bert()
    first = replace(stream, tasks=stream.tasks[:2], labels=stream.labels[:4])
    recipe = {"name": "sotu_disjoint", "keep": 0.25}
    for path in ("then", "now"):
        learner_of(model, tmp_path / path, recipe).learn(first)
    config = yaml.safe_load((tmp_path / "then" / "run.yaml").read_text(encoding="utf-8"))
    config["recipe"]["consolidation"] = {
        "type": "SparseSum", "keep": 0.25, "scheme": "disjoint", "scale": 1.0, "sequential": False,
        "vectors": "masked", "storage": "fp32", "seed": 0,
    }  # fmt: skip
    (tmp_path / "then" / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    assert pt.Learner.open(tmp_path / "then").recipe.consolidation == make_recipe(recipe).consolidation
    for path in ("then", "now"):
        learner_of(model, tmp_path / path, recipe).learn(stream)
    assert same(weights(pt.Learner.open(tmp_path / "then")), weights(pt.Learner.open(tmp_path / "now")))
    with pytest.raises(pt.RunError, match="share"):
        learner_of(model, tmp_path / "then", {"name": "sotu_disjoint", "keep": 0.5}).learn(stream)


@dataclass
class Positive(Keep):
    """Entries that grew by more than `least`."""

    least: float = 0.0

    def __call__(self, theta_0, theta_t):
        return Kept(masks={n: theta_t[n] - t > self.least for n, t in theta_0.items() if t.is_floating_point()})


@dataclass
class Largest(Combination):
    """The largest value of any task."""

    def __call__(self, chunks, size):
        change = np.zeros(size, dtype=np.float32)
        for chunk in chunks:
            change[chunk.positions] = np.maximum(change[chunk.positions], chunk.values)
        return change


def test_hooks_of_ones_own_are_written_down_and_found_again(stream, model, tmp_path):
    recipe = pt.Recipe(
        pt.AllWeights(), [], pt.DeltaMerge(Positive(1e-5), Largest()), pt.PrototypeHead(), training=TRAINING
    )
    learner = pt.Learner(model, recipe, tmp_path / "run")
    learner.learn(stream)
    base = load_backbone(model, "text").model.state_dict()
    found = weights(learner)
    assert all((found[n] >= t).all() for n, t in base.items()) and not same(found, base)
    again = pt.Learner.open(tmp_path / "run")
    assert again.recipe.consolidation == recipe.consolidation and same(weights(again), found)
