"""What every consolidation promises; a new one joins with one line in `CASES`."""

from __future__ import annotations

import shutil

import peft
import pytest
import torch

import perpetune as pt
from perpetune.consolidation import (
    CONSOLIDATIONS,
    Concatenate,
    Continue,
    DeltaMerge,
    FactorMerge,
    FirstTask,
    Joint,
    Merge,
    PerTask,
    ProjectedMerge,
    Replay,
    SharedBranch,
    Stack,
    WeighedPerTask,
)
from perpetune.core.errors import ConfigError
from perpetune.heads import LDAHead
from perpetune.routers import KMeansRouter, PooledRouter

TRAINING = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 5e-3}
HEADS = ("head_added.safetensors", "head_sums.safetensors")
BESIDE = (*HEADS, "rules.safetensors", "predictions.safetensors", "commit.json")  # not the consolidation's


def lora():
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])


CASES = {
    "Continue": lambda: pt.Recipe(lora(), [], Continue()),
    "Merge": lambda: pt.Recipe(lora(), [], Merge()),
    "Stack": lambda: pt.Recipe(lora(), [], Stack()),
    "DeltaMerge": lambda: pt.Recipe(pt.AllWeights(), [], DeltaMerge()),
    "FactorMerge": lambda: pt.Recipe(lora(), [], FactorMerge()),
    "ProjectedMerge": lambda: pt.Recipe(lora(), [], ProjectedMerge(), pt.PrototypeHead()),
    "PerTask": lambda: pt.Recipe(lora(), [], PerTask(KMeansRouter(2))),
    "PerTask, two layers": lambda: pt.Recipe(
        lora(), [], PerTask(PooledRouter(64, many_tasks=True, discriminants=True), 3, frozen=1.0, layers=2)
    ),
    "WeighedPerTask": lambda: pt.Recipe(
        lora(), [], WeighedPerTask(pt.LDARouter(64, many_tasks=True, map="kernel", ridge=True), holdout=0.2)
    ),
    "SharedBranch": lambda: pt.Recipe(lora(), [], SharedBranch(), LDAHead()),
    "SharedBranch, alike": lambda: pt.Recipe(lora(), [], SharedBranch(start="shared"), LDAHead()),
    "Concatenate": lambda: pt.Recipe(lora(), [], Concatenate(), pt.SubspaceHead()),
    "FirstTask": lambda: pt.Recipe(lora(), [], FirstTask(), [pt.RidgeHead(0), pt.PrototypeHead()]),
    "FirstTask, two blocks": lambda: pt.Recipe(lora(), [], FirstTask("better", True), pt.PrototypeHead()),
    "Replay": lambda: pt.Recipe(lora(), [], Replay(per_class=2)),
    "Joint": lambda: pt.Recipe(lora(), [], Joint()),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, model, stream, tmp_path_factory):
    """(recipe, learner, result) of three tasks."""
    path = tmp_path_factory.mktemp("contract") / request.param
    learner = pt.Learner(model, CASES[request.param](), path, training=TRAINING, max_length=16)
    return CASES[request.param], learner, learner.learn(stream)


def texts(stream):
    return [text for task in stream for text in task.test["text"][:6]]


def test_every_consolidation_is_here():
    assert {type(make().consolidation).__name__ for make in CASES.values()} == {*CONSOLIDATIONS} - {
        "SparseSum"
    }  # an older name


def test_the_state_is_the_base_and_the_commits(case, stream):
    """Opened again, a run predicts the same, and stands where it stood to the bit."""
    _, learner, result = case
    opened = pt.Learner.open(result.path)
    assert opened.predict(texts(stream)) == learner.predict(texts(stream))
    ours, theirs = (dict(x.backbone.model.named_parameters()) for x in (learner, opened))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_that_is_stopped_ends_in_the_same_bits(case, model, stream, same_bits_when_stopped, tmp_path):
    make, _, result = case
    if len(result.commits) == 2:
        pytest.skip("all tasks at once: there is nothing between them")
    options = {"training": TRAINING, "max_length": 16}
    same_bits_when_stopped(
        lambda name: pt.Learner(model, make(), tmp_path / name, **options).learn(stream), result.path
    )


def test_what_a_task_leaves_does_not_grow_with_the_tasks_before(case):
    _, _, result = case
    own = [sum((c.path / f).stat().st_size for f in c.manifest["files"] if f not in BESIDE) for c in result.commits[1:]]
    assert all(size <= 1.1 * own[0] + 200 for size in own)
    kinds = {file.suffix for commit in result.commits for file in commit.path.iterdir()}
    assert kinds <= {".safetensors", ".json", ".parquet"}


def test_a_task_is_taken_out_or_that_is_refused_before_anything_is_written(case, model, stream, tmp_path):
    make, learner, result = case
    out, consolidation = stream.tasks[0].name, learner.recipe.consolidation
    rest = stream.select([task.name for task in stream if task.name != out])
    again = pt.Learner(model, make(), shutil.copytree(result.path, tmp_path / "run"), training=TRAINING, max_length=16)
    count = len(result.commits)
    if consolidation.separable(learner.recipe.tuner) and count > 2:
        assert len(again.revert(rest, out).commits) == count + 1
        assert pt.Learner.open(tmp_path / "run").predict(texts(rest)) == again.predict(texts(rest))
    else:
        with pytest.raises(ConfigError, match="taken out"):
            again.revert(rest, out)
        assert len(list((tmp_path / "run" / "commits").iterdir())) == count


def test_tasks_are_composed_or_that_is_refused(case, stream, tmp_path):
    _, learner, result = case
    last = result.commits[-1].manifest["task"]
    try:
        learner.export(tmp_path / "model", only=[last])
    except ConfigError as error:
        assert "SparseSum" in str(error) or "DeltaMerge" in str(error) or "no task" in str(error)
    else:
        from transformers import AutoModel

        assert AutoModel.from_pretrained(tmp_path / "model").config.hidden_size == learner.backbone.width


def test_states_are_views_that_leave_the_model_as_it_was(case, stream):
    _, learner, _ = case
    consolidation, backbone = learner.recipe.consolidation, learner.backbone
    if consolidation.states is None:
        pytest.skip("one state for all tasks")
    examples = backbone.prepare(stream.tasks[0].test.select(range(4)))
    base, _ = learner.fresh()
    with consolidation.states.view(None):
        assert torch.equal(backbone.features(examples, 4), base.features(examples, 4))
    seen = []
    for _ in range(2):
        for t in range(3):
            with consolidation.states.view(t):
                seen.append(backbone.features(examples, 4))
    assert all(torch.equal(a, b) for a, b in zip(seen[:3], seen[3:], strict=True))
    if isinstance(consolidation, FirstTask):  # one state, of the first task, and the base
        assert torch.equal(seen[0], seen[1])
        return
    assert not torch.equal(seen[0], seen[1])
    classes = [consolidation.states.task_classes(t) for t in range(3)]
    assert classes == [task.classes for task in stream]
