"""What a run found does not depend on whether its tasks were given at once or joined its stream one after the other."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from perpetune import Learner, Result, load_stream
from perpetune.metrics.accuracy import FORMULAS
from perpetune.operations.gate import MAJORITY, judge
from perpetune.runs.directory import Run
from perpetune.runs.result import BEFORE, JOINED

TRAINING = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01}
TASKS = ["films", "news", "mood"]
PREDICTIONS = "predictions.safetensors"


@pytest.fixture(scope="module")
def texts(word_stream):
    return load_stream(word_stream, tasks=TASKS, train_limit=8, test_limit=6)


@pytest.fixture(scope="module")
def prompts(word_stream):
    return load_stream(word_stream, tasks=TASKS[:2], pose="instruction", train_limit=4, test_limit=3)


@pytest.fixture(scope="module")
def shops(tmp_path_factory):
    """A domain-incremental stream: the classes of the first task are those of all."""
    folder = tmp_path_factory.mktemp("shops")
    for task, words in {"films": "movie film", "music": "band song", "books": "page story"}.items():
        (folder / task).mkdir()
        for split, count in (("train", 8), ("test", 6)):
            rows = [
                {"text": f"{word} {words} {split} {i}", "label": label}
                for word, label in (("great", "good"), ("awful", "bad"))
                for i in range(count)
            ]
            (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load_stream(folder, tasks=["films", "music", "books"])


def both(learn, stream):
    """The results of a run that was given all tasks at once, and of one whose stream grew by a task at a time."""
    names = [task.name for task in stream]
    for i in range(1, len(names)):
        learn("grown", stream.select(names[:i]))
    return learn("whole", stream), learn("grown", stream)


def check(whole, grown):
    """The same figures, verdicts and files; only what the untouched model said lies elsewhere."""
    for a, b in zip(whole.records(), grown.records(), strict=True):
        assert {name: getattr(a, name) for name in FORMULAS} == {name: getattr(b, name) for name in FORMULAS}
    for head, scenario in whole.readings:
        a, b = (result.matrix(head, scenario) for result in (whole, grown))
        assert np.array_equal(a.values, b.values, equal_nan=True)
        assert np.array_equal(a.baseline, b.baseline, equal_nan=True)
        limits = {"max_forgetting": 0.02, "min_gain": 0.01, "head": head, "scenario": scenario}
        assert judge(whole, **limits) == judge(grown, **limits)
    for a, b in zip(whole.commits[1:], grown.commits[1:], strict=True):
        one, other = ({k: v for k, v in c.manifest["files"].items() if k != PREDICTIONS} for c in (a, b))
        assert one == other
        one, other = (c.tensors(PREDICTIONS) for c in (a, b))
        other = {k: v for k, v in other.items() if not k.startswith(JOINED)}
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("recipe", ["lora", "sotu", "color_oracle"])
def test_encoders_that_know_classes_by_their_names(recipe, texts, tiny_bert, tmp_path):
    model, options = tiny_bert(), {"heads": ["linear", "label_text"], "training": TRAINING}
    whole, grown = both(lambda name, s: Learner(model, recipe, tmp_path / name, **options).learn(s), texts)
    check(whole, grown)
    assert not np.isnan(grown.matrix("label_text", "class").baseline).any()
    routed = recipe == "color_oracle"  # no adapter of an earlier task knows the classes
    by_name, linear = (judge(grown, max_forgetting=1, min_gain=-1, head=head) for head in ("label_text", "linear"))
    assert by_name.against == ("the untouched model" if routed else "the model before it")
    assert linear.against == MAJORITY
    assert (grown.records()[-1].forward_transfer is None) == routed


@pytest.mark.parametrize("recipe", ["lora", "routed"])
def test_a_domain_stream(recipe, shops, tiny_bert, tmp_path):
    """Every head knows the classes once the first task is learned; nothing is known of the untouched model."""
    model = tiny_bert()
    whole, grown = both(lambda name, s: Learner(model, recipe, tmp_path / name, training=TRAINING).learn(s), shops)
    check(whole, grown)
    assert judge(grown, max_forgetting=1, min_gain=-1).against == "the model before it"
    assert not any(k.startswith(JOINED) for c in grown.commits for k in c.tensors(PREDICTIONS))


@pytest.mark.parametrize("recipe", ["lora", "routed"])
def test_language_models(recipe, prompts, tiny_lm, tmp_path):
    heads = ["language", {"type": "language_generated", "longest": 4}]
    model, options = tiny_lm("llama"), {"heads": heads, "training": TRAINING}
    check(*both(lambda name, s: Learner(model, recipe, tmp_path / name, **options).learn(s), prompts))


def test_tasks_are_asked_about_before_they_are_learned_however_seldom_others_are(shops, tiny_bert, tmp_path):
    model = tiny_bert()
    found = [
        Learner(model, "lora", tmp_path / str(k), training=TRAINING, evaluate_every=k).learn(shops) for k in (1, 0)
    ]
    often, seldom = (r.matrix("linear", "domain") for r in found)
    assert np.array_equal(often.values.diagonal(1), seldom.values.diagonal(1))
    assert not np.isnan(often.values.diagonal(1)).any() and np.isnan(seldom.values[1, 0])


def test_a_grown_run_that_was_stopped_has_the_bits_of_one_that_was_not(texts, tiny_bert, tmp_path, monkeypatch):
    model, original = tiny_bert(), Run.commit

    def learn(name, stream):
        return Learner(model, "lora", tmp_path / name, heads=["label_text"], training=TRAINING).learn(stream)

    def stop_after(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise KeyboardInterrupt

    for name in ("whole", "parts"):
        learn(name, texts.select(["films"]))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "commit", stop_after)
        with pytest.raises(KeyboardInterrupt):
            learn("parts", texts)
    a, b = learn("whole", texts).commits, learn("parts", texts).commits
    assert [c.manifest for c in a] == [c.manifest for c in b]  # digests of all files
    keys = a[-1].tensors(PREDICTIONS)
    assert {f"{BEFORE}label_text/class/mood", f"{JOINED}label_text/class/mood"} <= keys.keys()


def test_the_model_before_is_the_one_that_a_task_was_taken_out_of(shops, tiny_bert, tmp_path):
    """The next task is asked about after that; the answers are those of the model that then learns it."""
    learner = Learner(tiny_bert(), "lora", tmp_path / "r", training=TRAINING)
    learner.learn(shops.select(["films", "music"]))
    learner.revert(shops.select(["films"]), "music")
    asked = learner.predict(shops.tasks[2].test["text"][:])
    result = learner.learn(shops)
    assert result.tasks == ("films", "books")
    said = result.predictions("linear", "domain")[0][0]["books"]
    assert [shops.labels[c] for c in said] == asked
    verdict, truth = judge(result, max_forgetting=1, min_gain=-1), shops.tasks[2].test["label"]
    assert verdict.against == "the model before it"
    assert verdict.reference == np.mean([a == shops.labels[c] for a, c in zip(asked, truth, strict=True)])


def test_runs_of_older_versions_hold_what_was_said_of_a_task_in_the_commit_before(shops, tiny_bert, tmp_path):
    """Their files, made of new ones: the same figures."""
    new = Learner(tiny_bert(), "lora", tmp_path / "new", training=TRAINING).learn(shops)
    config = {k: v for k, v in new.config.items() if k != "versions"}
    old, predictions = Run.open(tmp_path / "old", config), [c.tensors(PREDICTIONS) for c in new.commits]
    for commit, own, after in zip(new.commits, predictions, [*predictions[1:], {}], strict=True):
        kept = {k: v for k, v in own.items() if not k.startswith(BEFORE)}
        ahead = {k.removeprefix(BEFORE): v for k, v in after.items() if k.startswith(BEFORE)}
        facts = {k: commit.manifest[k] for k in ("learned", "classes", "heads", "guarantees") if k in commit.manifest}
        old.commit(commit.manifest["task"], {PREDICTIONS: {**kept, **ahead}}, facts)
    old.close()
    again = Result(tmp_path / "old")
    assert judge(again, max_forgetting=1, min_gain=-1) == judge(new, max_forgetting=1, min_gain=-1)
    a, b = again.matrix("linear", "domain"), new.matrix("linear", "domain")
    assert np.array_equal(a.values, b.values, equal_nan=True)
    assert again.records()[0].flips == new.records()[0].flips and again.readings == new.readings
