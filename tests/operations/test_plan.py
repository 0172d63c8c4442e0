"""The plan is the loop itself on a share of the data: what it counts, and that it agrees with the run."""

from __future__ import annotations

import pytest

import perpetune as pt
from perpetune.operations.plan import make_plan, reads

SMALLER = {"name": "default", "features": 64}
TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 16}


@pytest.fixture(scope="module")
def sessions(word_stream):
    return pt.make_recipe("lora").consolidation.schedule(pt.load_stream(word_stream))


def test_all_tasks_so_far_are_read_where_the_model_moves(sessions):
    sizes = [len(session.tasks[0].test) for session in sessions]
    assert reads(sessions, 1, True) == [sum(sizes[: i + 1]) for i in range(3)]
    assert reads(sessions, 0, True) == [*sizes[:2], sum(sizes)]
    assert reads(sessions, 1, False) == sizes


@pytest.mark.parametrize(
    "recipe",
    ["lora", "pegp_lora_fresh", "sotu", "routed", "routed_layers", SMALLER, "replay", "joint", "frozen_ridge"],
    ids=str,
)
def test_disk_is_that_of_the_run(recipe, word_stream, tiny_bert, tmp_path):
    model, stream = tiny_bert(), pt.load_stream(word_stream, tasks=["films", "news"])
    options = {"recipe": recipe, "training": TRAINING, "heads": None if recipe == "frozen_ridge" else ["linear"]}
    plan = make_plan(pt.Learner(model, **options), stream)
    result = pt.Learner(model, run=tmp_path / "run", **options).learn(stream)
    assert plan.disk == pytest.approx(sum(commit.size for commit in result.commits), rel=0.02)
    assert plan.steps == sum(task["steps"] for task in result.per_task)
    assert plan.seconds > 0 and plan.memory > 1e8


def test_nothing_of_it_is_kept(word_stream, tiny_bert, tmp_path):
    learner = pt.Learner(tiny_bert(), "lora", tmp_path / "run", training=TRAINING)
    make_plan(learner, pt.load_stream(word_stream))
    assert not (tmp_path / "run").exists()
    with pytest.raises(pt.ConfigError, match="nothing is learned yet"):
        learner.predict(["a film"])
