from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

import perpetune as pt
from perpetune.core.errors import ConfigError
from perpetune.learning.task_free import (
    accuracy_by_true_task,
    drift_facts,
    drift_summary,
    parts,
    told_segments,
)
from perpetune.routers import Detector
from perpetune.runs.directory import Run

TRAINING = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Three tasks of two classes, long enough to come twice; few words in common, so that a random model tells them."""
    words = {"films": ["movie", "film"], "news": ["market", "team"], "mood": ["great", "awful"]}
    draw, folder = random.Random(0), tmp_path_factory.mktemp("stream")
    for task, own in words.items():
        (folder / task).mkdir()
        for split, count in (("train", 60), ("test", 8)):
            rows = [
                {"text": " ".join(draw.choices([word, word, word, own[0], "the", "a"], k=6)), "label": word}
                for word in own
                for _ in range(count)
            ]
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return pt.load_stream(folder, tasks=list(words))


@pytest.fixture(scope="module")
def drift(stream):
    return pt.drift(stream, 5, (40, 56), seed=2)


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert()


def learner(model, recipe="color", **options):
    return pt.Learner(model, recipe=recipe, training=TRAINING, max_length=16, **options)


def detector():
    return Detector(level=0.01, length=16)


def learned(model, drift, run, **options):
    return pt.learn_drift(learner(model, run=run), drift, detector(), **options)


@pytest.fixture(scope="module")
def found(model, drift, tmp_path_factory):
    """A run that found its boundaries."""
    return learned(model, drift, tmp_path_factory.mktemp("found") / "run")


def test_boundaries_are_found_learned_and_measured(found, drift):
    facts = drift_facts(found)
    assert [part["task"] for part in facts["parts"]] == [s.task for s in told_segments(drift)]
    figures = facts["figures"]
    assert figures["precision"] == figures["recall"] == 1 and figures["purity"] > 0.9
    assert figures["tasks_found"] == figures["tasks_true"] == 3 and 0 < figures["delay"] <= 16
    assert found.tasks == tuple(f"part-{i:02d}" for i in range(1, 6))
    right = accuracy_by_true_task(found, "linear", "class")
    assert set(right) == {"films", "news", "mood"}
    newest = {next(iter(p["tested"])): p["name"] for p in facts["parts"]}
    matrix = found.matrix("linear", "class")
    assert right == {t: pytest.approx(matrix.values[-1][found.tasks.index(p)]) for t, p in newest.items()}
    assert "precision 1" in drift_summary(found)[0]


def test_a_reopened_task_has_one_adapter_and_one_place_in_the_router(found, drift, model):
    opened = pt.Learner.open(found.path)
    consolidation = opened.recipe.consolidation
    segments = told_segments(drift)
    newest = {s.task: i for i, s in enumerate(segments)}
    assert consolidation.router.tasks == sorted(newest.values())
    for i, segment in enumerate(segments):
        assert consolidation.reads(i, len(segments) - 1) == newest[segment.task]
    again = next(i for i, s in enumerate(segments) if s.task in [e.task for e in segments[:i]])
    earlier = consolidation.goes_on_from(consolidation.schedule(parts(drift, segments))[again])
    assert segments[earlier].task == segments[again].task
    before, after = consolidation._adapters[earlier], consolidation._adapters[again]
    assert set(before) == set(after) and any(not torch.equal(before[k], after[k]) for k in before)
    routing = found.routing()
    assert routing.accuracy > 0.9 and (np.diag(routing.confusion) > 0).all()


def test_training_of_a_reopened_task_starts_where_it_ended(model, drift, tmp_path):
    told = told_segments(drift)
    stream = parts(drift, told)
    still = {**TRAINING, "learning_rate": 0.0, "head_learning_rate": 0.0}
    own = pt.Learner(model, recipe="color", run=tmp_path, training=still)
    own.learn(stream)
    consolidation = own.recipe.consolidation
    head = own.heads[0]
    for i, task in enumerate(stream):
        if task.reopens:
            earlier = [t.name for t in stream].index(task.reopens)
            assert all(
                torch.equal(v, consolidation._adapters[i][k]) for k, v in consolidation._adapters[earlier].items()
            )
            for a, b in zip(head.tasks[earlier], head.tasks[i], strict=True):
                assert torch.equal(a, b)


def test_a_stopped_run_goes_on_to_the_bit(found, drift, model, tmp_path, monkeypatch):
    commit, stops = Run.commit, 4  # the untouched model, and three parts

    def stopping(self, *args):
        if len(self.commits) == stops:
            raise KeyboardInterrupt
        return commit(self, *args)

    monkeypatch.setattr(Run, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        learned(model, drift, tmp_path / "run")
    monkeypatch.undo()
    again = learned(model, drift, tmp_path / "run")
    assert [c.manifest for c in again.commits] == [c.manifest for c in found.commits]


def test_told_boundaries_are_the_true_ones(drift):
    stream = parts(drift, told_segments(drift), told=True)
    figures = stream.source["drift"]["figures"]
    assert figures["precision"] == figures["recall"] == figures["purity"] == 1 and figures["delay"] == 0
    assert [len(task.train) for task in stream] == [stop - start for start, stop, _ in drift.segments]


def test_classes_of_a_part_are_those_that_its_task_has_had(drift):
    told = told_segments(drift)
    stream = parts(drift, told)
    had: dict[int, set[int]] = {}
    for segment, task in zip(told, stream, strict=True):
        had.setdefault(segment.task, set()).update(task.train["label"])
        assert set(task.classes) == had[segment.task]


def test_every_true_task_is_measured_however_the_stream_is_cut(drift):
    from perpetune.routers import Segment

    one = parts(drift, [Segment(0, len(drift), 0, 0)])
    tested = one.source["drift"]["parts"][0]["tested"]
    assert set(tested) == {"films", "news", "mood"} and len(one.tasks[0].test) == sum(tested.values())
    assert one.source["drift"]["figures"]["precision"] is None
    cuts = [*range(0, len(drift), 10), len(drift)]
    many = parts(drift, [Segment(a, b, i, a) for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False))])
    assert all(len(task.test) for task in many)
    assert {t for p in many.source["drift"]["parts"] for t in p["tested"]} == {"films", "news", "mood"}


def test_a_part_that_was_gone_on_with_cannot_be_missing(found):
    from perpetune.runs.commit import active

    opened = pt.Learner.open(found.path)
    consolidation = pt.Learner.described(found.path).recipe.consolidation
    consolidation.open(opened.fresh()[0], opened.recipe.tuner, found.config["stream"]["labels"])
    commits = active(found.commits)
    gone = next(c.json("classes.json")["reopens"] for c in commits if c.json("classes.json")["reopens"])
    with pytest.raises(ConfigError, match="not there"):
        consolidation.restore([c for c in commits if c.manifest["task"] != gone])
