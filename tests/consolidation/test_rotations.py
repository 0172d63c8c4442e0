from __future__ import annotations

import functools

import peft
import pytest
import torch

import perpetune as pt
from perpetune.consolidation import Continue, Merge
from perpetune.core.errors import ConfigError
from perpetune.recipes.recipe import Recipe
from perpetune.tuners import GivensConfig
from perpetune.tuners.rotations import ROUNDING, turns

TRAINING = {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 2e-2}
TUNERS = {
    "oft": lambda: peft.OFTConfig(oft_block_size=16, use_cayley_neumann=False, target_modules=["query", "dense"]),
    "strict": lambda: GivensConfig(target_modules=["query", "dense"]),
    "norm": lambda: GivensConfig(form="norm", target_modules=["query", "dense"]),
    "quasi": lambda: GivensConfig(form="quasi", target_modules=["query", "dense"]),
}


def learn(model, stream, kind, consolidation, path=None):
    recipe = Recipe(TUNERS[kind](), consolidation=consolidation, name=kind)
    learner = pt.Learner(model, recipe, run=path, training=TRAINING)
    return learner, learner.learn(stream)


@pytest.fixture(scope="module")
def learned(model, stream):
    """`learned(kind, Merge)`: the learner of three tasks and its result."""
    return functools.cache(lambda kind, consolidation: learn(model, stream, kind, consolidation()))


def rotations(learner, stream):
    """By task, of every rotated weight, R in fp64: from the stored adapters alone."""
    from perpetune.runs.directory import Run

    tuner, found = learner.recipe.tuner, []
    for commit in Run.read(learner.path).commits[1:]:
        base, _ = learner.fresh()
        attached = tuner.attach(base.model)
        tuner.load(attached, commit.tensors("adapter_model.safetensors"))
        found.append({t.name: t.rotation() for t in turns(attached)})
    return found


@pytest.mark.parametrize("kind", ["oft", "strict"])
def test_merged_weights_are_the_base_times_the_rotations_of_all_tasks_in_order(kind, learned, stream):
    learner, _ = learned(kind, Merge)
    base, _ = learner.fresh()
    before, after = base.model.state_dict(), learner.backbone.model.state_dict()
    turned = rotations(learner, stream)
    assert len(turned) == 3 and turned[0]
    for name in turned[0]:
        W = before[name].double()
        for task in turned:
            W = W @ task[name].T
        assert (after[name].double() - W).abs().max() < 1e-5 * W.abs().max()
        assert (after[name] - before[name]).abs().max() > 1e-3  # it learned something
    assert all(torch.equal(after[n], before[n]) for n in before if n not in turned[0])


@pytest.mark.parametrize("consolidation", [Merge, Continue])
@pytest.mark.parametrize("kind", list(TUNERS))
def test_every_promise_is_measured_and_rotations_keep_theirs(kind, consolidation, learned):
    _, result = learned(kind, consolidation)
    found = [g for g in result.guarantees if g["source"] in ("OFTConfig", "GivensConfig")]
    names = {g["name"] for g in found}
    assert len(found) == 9 and len(names) == 3  # three figures after each of three tasks
    exact = kind in ("oft", "strict")
    assert all(g["bound"] == (ROUNDING if exact else None) for g in found)
    assert all(g["holds"] is (True if exact else None) for g in found)
    if kind in ("norm", "quasi"):
        assert max(g["value"] for g in found if "row norms" in g["name"]) > 1e-3


def test_what_accumulates_is_measured_against_the_untouched_weights(learned):
    learner, result = learned("norm", Merge)
    norms = [g["value"] for g in result.guarantees if "row norms" in g["name"]]
    base, _ = learner.fresh()
    old, new = base.model.state_dict(), learner.backbone.model.state_dict()
    rotated = [n for n in old if (old[n] != new[n]).any()]
    worst = max(float((new[n].double().norm(dim=1) / old[n].double().norm(dim=1) - 1).abs().max()) for n in rotated)
    assert norms[-1] == pytest.approx(worst, rel=1e-4)


def test_a_neumann_series_that_is_no_rotation_breaks_the_promise(model, stream):
    tuner = peft.OFTConfig(oft_block_size=16, use_cayley_neumann=True, target_modules=["query", "dense"])
    recipe = Recipe(tuner, consolidation=Merge(), name="neumann")
    result = pt.Learner(model, recipe, training={**TRAINING, "learning_rate": 0.1}).learn(stream)
    assert any(g["holds"] is False and "R R^T" in g["name"] for g in result.guarantees)


def test_a_stopped_run_goes_on_to_the_same_weights(learned, model, stream, tmp_path):
    whole, _ = learned("strict", Merge)
    first = stream.select([task.name for task in stream.tasks[:2]])
    learn(model, first, "strict", Merge(), tmp_path / "part")
    part, _ = learn(model, stream, "strict", Merge(), tmp_path / "part")
    a, b = part.backbone.model.state_dict(), whole.backbone.model.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_no_rotation_can_be_left_out_of_the_product(learned, tmp_path):
    learner, _ = learned("strict", Merge)
    with pytest.raises(ConfigError, match="follow one another"):
        learner.export(tmp_path / "some", without=["news"])
    learner.export(tmp_path / "all")


def test_rotations_of_embeddings_are_not_lost_in_a_merge(model, stream):
    tuner = peft.OFTConfig(oft_block_size=16, use_cayley_neumann=False, target_modules=["word_embeddings"])
    with pytest.raises(pt.ModelError, match="embeddings"):
        pt.Learner(model, Recipe(tuner, consolidation=Merge(), name="oft"), training=TRAINING).learn(stream)
