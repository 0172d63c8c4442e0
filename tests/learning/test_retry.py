"""A task that is tried, and thrown away: by a judge, or to be learned with other settings."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import perpetune as pt
from perpetune.core.errors import ConfigError, RunError
from perpetune.learning.retry import with_settings
from perpetune.operations.gate import judge
from perpetune.runs.directory import Run
from perpetune.runs.result import Result

pytestmark = pytest.mark.usefixtures("quick_collection")

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
LESS = {"learning_rate": 1e-3, "num_train_epochs": 2}


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert()


@pytest.fixture(scope="module")
def stream(word_stream):
    return pt.load_stream(word_stream, tasks=["films", "news", "mood"], train_limit=16, test_limit=8)


def digests(run):
    """The files of the commits that count, by task."""
    return {c.manifest["task"]: c.manifest["files"] for c in Run.read(run).commits}


@pytest.mark.parametrize("recipe", ["lora", "pegp_lora_fresh", "sotu", "color", "frozen_ridge"])
def test_a_run_that_tried_equals_one_that_never_did(model, stream, recipe, tmp_path):
    """To the bit: weights, heads, rules, predictions; also of what is learned afterwards."""
    two = stream.select(["films", "news"])
    learner = pt.Learner(model, recipe, tmp_path / "tried", training=TRAINING)
    learner.learn(two)
    first = digests(tmp_path / "tried")
    learner.retry(two, "news", LESS)
    pt.Learner(model, recipe, tmp_path / "tried", training=TRAINING).learn(stream)
    never = pt.Learner(model, recipe, tmp_path / "never", training=TRAINING)
    never.learn(with_settings(two, "news", LESS))
    never.learn(with_settings(stream, "news", LESS))

    assert digests(tmp_path / "tried") == digests(tmp_path / "never")
    if recipe != "frozen_ridge":
        assert first["news"] != digests(tmp_path / "tried")["news"]
    assert len(Run.read(tmp_path / "tried").history) == len(Run.read(tmp_path / "never").history) + 2
    a, b = Result(tmp_path / "tried"), Result(tmp_path / "never")
    assert a.summary() == b.summary() and a.tasks == b.tasks == ("films", "news", "mood")
    if recipe != "sotu":  # several earlier tasks that were not evaluated between: see the gate's own tests
        assert judge(a, max_forgetting=1, min_gain=-1) == judge(b, max_forgetting=1, min_gain=-1)


def test_the_only_task_is_tried_again(model, stream, tmp_path):
    one = stream.select(["films"])
    learner = pt.Learner(model, "lora", tmp_path / "tried", training=TRAINING)
    learner.learn(one)
    learner.retry(one, "films", LESS)
    pt.Learner(model, "lora", tmp_path / "never", training=TRAINING).learn(with_settings(one, "films", LESS))
    assert digests(tmp_path / "tried") == digests(tmp_path / "never")


def test_settings_of_a_retried_task_need_not_be_given_again_but_others_are_refused(model, stream, tmp_path):
    two = stream.select(["films", "news"])
    learner = pt.Learner(model, "lora", tmp_path / "r", training=TRAINING)
    learner.learn(two)
    learner.retry(two, "news", LESS)
    assert Run.read(tmp_path / "r").commits[-1].manifest["training"] == {"news": LESS}
    learner.learn(two)
    with pytest.raises(RunError, match="was learned with training settings"):
        learner.learn(with_settings(two, "news", {"learning_rate": 1.0}))


def test_the_newest_task_alone_is_learned_again(model, stream, tmp_path):
    two = stream.select(["films", "news"])
    learner = pt.Learner(model, "lora", tmp_path / "r", training=TRAINING)
    with pytest.raises(ConfigError, match="it has learned none"):
        learner.retry(two, "news")
    learner.learn(two)
    with pytest.raises(ConfigError, match="that is `news`"):
        learner.retry(two, "films")
    with pytest.raises(ConfigError, match="has no task `mood`"):
        learner.retry(two, "mood")
    with pytest.raises(ConfigError, match="no `learning_rat`"):
        learner.retry(two, "news", {"learning_rat": 1})
    assert len(Run.read(tmp_path / "r").history) == 3  # nothing was thrown away
    learner.revert(stream.select(["news"]), "films")
    with pytest.raises(ConfigError, match="`films` was taken out since"):
        learner.retry(stream.select(["news"]), "news")


def test_a_retry_that_is_stopped_is_taken_up_again(model, stream, tmp_path, monkeypatch):
    two = stream.select(["films", "news"])
    learner = pt.Learner(model, "lora", tmp_path / "tried", training=TRAINING)
    learner.learn(two)
    before = digests(tmp_path / "tried")["films"]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("perpetune.learning.session.train_task", stop)
        with pytest.raises(KeyboardInterrupt):
            learner.retry(two, "news", LESS)
    assert Result(tmp_path / "tried").tasks == ("films",) and digests(tmp_path / "tried")["films"] == before
    pt.Learner(model, "lora", tmp_path / "tried", training=TRAINING).retry(two, "news", LESS)
    pt.Learner(model, "lora", tmp_path / "never", training=TRAINING).learn(with_settings(two, "news", LESS))
    assert digests(tmp_path / "tried") == digests(tmp_path / "never")


def test_a_task_that_is_not_accepted_leaves_the_run_as_it_was(model, stream, tmp_path):
    """The learner too; the try is told, and no later task is learned."""
    learner = pt.Learner(model, "lora", tmp_path / "r", training=TRAINING)
    learner.learn(stream.select(["films"]))
    inputs = stream.tasks[0].test["text"][:]
    weights, kept = {k: v.clone() for k, v in learner.backbone.state_dict().items()}, learner.predict(inputs)

    result = learner.learn(stream, accept=lambda found: [f"{found.tasks[-1]} is no good"])
    assert result.tasks == ("films",) and result.rejected == ("news", ("news is no good",))
    assert learner.predict(inputs) == kept
    for name, tensor in learner.backbone.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    events = [(e["event"], e.get("task")) for e in result.journal if e["event"] in ("task", "undo")]
    assert events == [("task", "films"), ("task", "news"), ("undo", "news")]
    assert result.journal[-1]["reasons"] == ["news is no good"]

    judged = []
    result = learner.learn(stream, accept=lambda found: judged.append(found.tasks[-1]) or [])
    assert judged == ["news", "mood"] and result.rejected is None
    pt.Learner(model, "lora", tmp_path / "never", training=TRAINING).learn(stream)
    assert digests(tmp_path / "r") == digests(tmp_path / "never")


def test_a_task_that_cannot_be_judged_does_not_stay(model, stream, tmp_path):
    learner = pt.Learner(model, "lora", tmp_path / "r", training=TRAINING)
    with pytest.raises(ConfigError, match="no head `nobody`"):
        learner.learn(stream, accept=lambda found: judge(found, head="nobody").failures)
    assert Result(tmp_path / "r").tasks == ()
    with pytest.raises(ConfigError, match="all at once"):
        pt.Learner(model, "joint", tmp_path / "j", training=TRAINING).learn(stream, accept=lambda found: [])
    assert Result(tmp_path / "j").tasks == ()


def test_run_with_a_gate_and_again_on_the_command_line(model, word_stream, tmp_path, capsys):
    from perpetune.cli import main

    def command(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["run", str(tmp_path / "week.yaml"), *arguments])
        return ended.value.code, capsys.readouterr()

    stream = {"source": str(word_stream), "tasks": ["films", "news"], "train_limit": 16, "test_limit": 8}
    week = {"model": str(model), "stream": stream, "recipe": "lora", "out": str(tmp_path / "r"), "training": TRAINING}
    (tmp_path / "week.yaml").write_text(yaml.safe_dump(week), encoding="utf-8")
    code, said = command("--gate", "--min-gain", "-1", "--max-forgetting", "1")
    assert code == 0 and "PASS" in said.out
    code, said = command("--gate", "--min-gain", "1", "--retry", "news", "--set", "learning_rate=1e-3")
    assert code == 1 and "FAIL" in said.out and "`news` did not pass and was not kept" in said.err
    assert "--retry news" in said.err
    assert Result(tmp_path / "r").tasks == ("films",)
    code, _ = command("--retry", "news", "--set", "learning_rate=1e-3")
    assert code == 0
    newest = Run.read(tmp_path / "r").commits[-1].manifest
    assert float(newest["training"]["news"]["learning_rate"]) == 1e-3
    assert yaml.safe_load((tmp_path / "r" / "run.yaml").read_text())["training"]["learning_rate"] == 1e-2
    assert command("--max-flips", "3")[0] == 2 and command("--retry", "films")[0] == 2
    assert json.loads((tmp_path / "r" / "journal.jsonl").read_text().splitlines()[-1])["event"] == "task"
    with pytest.raises(SystemExit):
        main(["log", str(tmp_path / "r")])
    assert "not kept" in capsys.readouterr().out
