"""What a task adds to a run does not grow with the tasks before it: files, what is read again, what is held."""

from __future__ import annotations

import gc
import json
import weakref

import peft
import pytest
import torch

import perpetune as pt
from perpetune.consolidation import DeltaMerge, Merge
from perpetune.heads import make_head
from perpetune.heads.increments import combined, increment
from perpetune.learning import evaluator
from perpetune.runs.directory import Run
from perpetune.tuners import AllWeights, PeftTuner

TASKS = 6
LORA = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"])
TRAINING = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 5e-3}

pytestmark = pytest.mark.usefixtures("quick_collection")


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert(width=16, layers=1)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    for t in range(TASKS):
        (folder / f"t{t}").mkdir()
        for split, n in (("train", 12), ("test", 4)):
            rows = [{"text": f"{t} {'ab'[i % 2]} {i} {split}", "label": f"{t}{'ab'[i % 2]}"} for i in range(n)]
            (folder / f"t{t}" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return pt.load_stream(folder, scenario="class")


def learned(model, stream, recipe, path, heads=("linear", "ncm", "ridge"), every=0):
    learner = pt.Learner(model, recipe, path, heads=list(heads), training=TRAINING, evaluate_every=every)
    learner.learn(stream)
    return learner


@pytest.fixture(scope="module")
def lora(model, stream, tmp_path_factory):
    recipe = pt.Recipe(LORA, [], Merge(), training=TRAINING)
    return learned(model, stream, recipe, tmp_path_factory.mktemp("runs") / "lora")


def states(learner):
    return {f"{n}.{k}": t for n, head in learner.state.named_heads() for k, t in head.state().items()}


def test_a_commit_holds_what_its_task_added_to_the_heads(lora):
    for file in ("head_added.safetensors", "head_sums.safetensors", "adapter_model.safetensors"):
        sizes = [(commit.path / file).stat().st_size for commit in Run.read(lora.path).commits[1:]]
        assert max(sizes) <= sizes[1] + 16, (file, sizes)  # names of tasks get longer


def test_heads_put_together_from_commits_have_the_bits_of_those_that_learned(lora):
    opened = pt.Learner.open(lora.path)
    ours, theirs = states(opened), states(lora)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_run_that_was_stopped_goes_on_with_increments(lora, model, stream, tmp_path):
    recipe = pt.Recipe(LORA, [], Merge(), training=TRAINING)
    learned(model, pt.Stream(**{**vars(stream), "tasks": stream.tasks[:3]}), recipe, tmp_path / "run")
    learned(model, stream, recipe, tmp_path / "run")
    ours, theirs = (Run.read(path).commits[1:] for path in (tmp_path / "run", lora.path))
    for file in ("head_added.safetensors", "head_sums.safetensors"):
        assert [c.manifest["files"][file] for c in ours] == [c.manifest["files"][file] for c in theirs]


def test_rows_that_change_again_and_classes_in_any_order():
    """A class that reappears replaces its row; new classes may stand before old ones."""
    labels = ("a", "b", "c", "d")
    head, again = make_head("linear"), make_head("linear")
    for each in (head, again):
        each.open(3, labels, seed=0)
    before, added = {}, []
    for task, classes in enumerate([[2, 3], [0, 2], [1], [3]]):
        head.begin_task(classes)
        with torch.no_grad():
            head.active_weight.add_(task + 1)
        head.end_task()
        after = head.state()
        more, sums = increment(head, before, after)
        assert len(more["weight"]) == len(classes)
        added, before = [*added, more], after
    again.load_state(combined(again, added, sums))
    assert all(torch.equal(t, again.state()[key]) for key, t in head.state().items())


def test_merge_opens_with_one_adapter_and_writes_every_weight_once(lora, monkeypatch):
    calls = {"attach": 0, "load": 0, "detach": 0}
    for name in calls:
        method = getattr(PeftTuner, name)

        def counted(self, *args, _name=name, _method=method):
            calls[_name] += 1
            return _method(self, *args)

        monkeypatch.setattr(PeftTuner, name, counted)
    written = []
    monkeypatch.setattr(Merge, "_write", lambda self, names, w=Merge._write: (written.extend(names), w(self, names)))
    opened = pt.Learner.open(lora.path)
    # once to find out what kind of change it makes, once for all commits
    assert calls == {"attach": 2, "load": 0, "detach": 2}
    assert len(written) == len(set(written)) == 2
    ours, theirs = (dict(x.backbone.model.named_parameters()) for x in (opened, lora))
    assert all(torch.equal(ours[k], p) for k, p in theirs.items())


def test_deltas_are_let_go_of_once_they_are_on_disk(model, stream, tmp_path, monkeypatch):
    held: list[weakref.ref] = []
    committed = DeltaMerge.committed

    def watched(self, commit):
        held.extend(weakref.ref(part.values) for part in self._deltas[-1].parts.values())
        committed(self, commit)

    monkeypatch.setattr(DeltaMerge, "committed", watched)
    recipe = pt.Recipe(AllWeights(), [], DeltaMerge(), training=TRAINING)
    learner = learned(model, stream, recipe, tmp_path / "run", heads=["ncm"])
    gc.collect()
    assert len(held) >= TASKS and not any(ref() is not None for ref in held)
    merge = learner.recipe.consolidation
    copies = sum(t.numel() for t in {t.data_ptr(): t for t in merge._base.values()}.values())
    assert copies == sum(t.numel() for t in {t.data_ptr(): t for t in merge._state().values()}.values())
    assert merge._start is merge._base  # one copy of the base, and no other
    bits = sum(b.nbytes for b in merge._meetings._bits.values())
    assert bits <= 0.07 * 4 * copies


def test_counting_where_deltas_meet_reads_each_once(model, stream, tmp_path, monkeypatch):
    from perpetune.deltas import overlap

    added = []
    monkeypatch.setattr(
        overlap.Meetings,
        "add",
        lambda self, delta, add=overlap.Meetings.add: (added.append(delta.task_key), add(self, delta)),
    )
    recipe = pt.Recipe(AllWeights(), [], DeltaMerge(), training=TRAINING)
    learner = learned(model, stream, recipe, tmp_path / "run", heads=["ncm"])
    assert len(added) == len(set(added)) == TASKS
    merge = learner.recipe.consolidation
    every = overlap.overlap(merge._deltas)
    assert (merge._meetings.kept, merge._meetings.met) == (int(every.hits[1:].sum()), every.collisions)


def test_of_many_tasks_no_more_than_some_test_examples_are_held_and_predictions_are_the_same(
    lora, model, stream, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluator, "KEPT", 10)  # of two tasks with four each
    recipe = pt.Recipe(LORA, [], Merge(), training=TRAINING)
    learner = learned(model, stream, recipe, tmp_path / "run")
    held = learner.state.evaluator._examples
    assert sum(map(len, held.values())) == 8 < sum(len(task.test) for task in stream)
    files = "predictions.safetensors", "commit.json"
    names = [c.path.name for c in Run.read(lora.path).commits]
    assert all(
        (lora.path / "commits" / n / f).read_bytes() == (tmp_path / "run/commits" / n / f).read_bytes()
        for n in names
        for f in files
    )
