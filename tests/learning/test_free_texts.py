"""Responses that are free texts: scored by the metric that a task names, never classes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import perpetune as pt
from perpetune.cli import main
from perpetune.core.errors import ConfigError, RunError
from perpetune.learning import evaluator
from perpetune.learning.usual import usual_metrics
from perpetune.metrics.text import METRICS, contains, decided, exact_match, graded, token_f1
from perpetune.models import answer_scoring
from perpetune.operations.gate import judge
from perpetune.streams.free_texts import check_classes
from tests.weeks import write

TRAINING = {"num_train_epochs": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
FAQ = {"where is my parcel": "it is on the way", "can i pay later": "yes within thirty days"}
DATES = {"monday the first": "01 06 2026", "friday the fifth": "05 06 2026"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("free")
    for task, pairs in {"faq": FAQ, "dates": DATES}.items():
        (root / task).mkdir()
        for split, times in (("train", 8), ("test", 3)):
            rows = [{"prompt": f"{p} {i % 2}", "response": r} for i in range(times) for p, r in pairs.items()]
            (root / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (root / "dates" / "task.json").write_text(json.dumps({"metric": "exact_match"}), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def model(tiny_lm):
    words = " ".join([*FAQ, *FAQ.values(), *DATES, *DATES.values()]).split()
    return tiny_lm("llama", words)


def test_a_response_is_a_text_and_no_class(folder):
    stream = pt.load_stream(folder, metric={"faq": "token_f1"})
    assert stream.labels == () and [task.classes for task in stream] == [(), ()]
    assert [task.metric for task in stream] == ["exact_match", "token_f1"] and stream.tasks[0].name == "dates"
    assert set(stream.tasks[1].test["response"][:]) == set(FAQ.values()) and set(stream.tasks[1].test["label"][:]) == {
        -1
    }
    again = pt.load_stream(**stream.source)
    assert [task.metric for task in again] == ["exact_match", "token_f1"]


def test_tasks_of_classes_and_of_free_texts_stand_in_one_stream(folder):
    stream = pt.load_stream(folder)
    dates, faq = stream
    assert dates.metric == "exact_match" and dates.classes == ()
    assert sorted(stream.label_texts(faq.classes)) == sorted(stream.labels) == sorted(FAQ.values())
    assert [stream.labels[y] for y in faq.test["label"][:]] == [FAQ[p[:-2]] for p in faq.test["prompt"][:]]


@pytest.mark.parametrize("recipe", ["lora", "color", "pegp_lora_fresh"])
def test_scores_go_through_matrix_gate_and_report(recipe, folder, model, tmp_path):
    stream = pt.load_stream(folder, metric="token_f1")
    learner = pt.Learner(model, recipe, tmp_path / "run", training=TRAINING)
    result = learner.learn(stream)
    assert result.readings == [("language", "domain")]
    matrix = result.matrix("language", "domain")
    assert (matrix.values.diagonal() > matrix.baseline).all()
    assert result.records()[0].final_accuracy == pytest.approx(matrix.values[-1].mean())
    assert judge(result, max_forgetting=1, min_gain=0.01).task == "faq"
    prompts = [f"{p} 0" for p in FAQ]
    answers = pt.Learner.open(tmp_path / "run").predict(prompts)
    assert answers == learner.predict(prompts) and all(answers)
    assert result.config["stream"]["labels"] == []


def test_a_run_resumes_to_the_same_bits(folder, model, same_bits_when_stopped, tmp_path):
    stream = pt.load_stream(folder, metric="exact_match")
    three = pt.Stream("three", (*stream.tasks, _named(stream.tasks[0], "more")), (), "domain", stream.inputs)
    training = {**TRAINING, "num_train_epochs": 1}
    same_bits_when_stopped(lambda name: pt.Learner(model, "lora", tmp_path / name, training=training).learn(three))


def _named(task, name):
    from dataclasses import replace

    return replace(task, name=name)


def test_metrics():
    assert exact_match("It IS on, the way.", "it is on the way") == 1 and exact_match("on the way", "the way") == 0
    assert contains("well, it is on the way!", "on the way") == 1 and contains("online", "on") == 0
    assert token_f1("a b c", "b c d") == pytest.approx(2 / 3) and token_f1("", "a") == 0


@given(
    st.text("aAbB .,'ΑΣß\u0130\n", max_size=30),
    st.text("aAbB .,'ΑΣß\u0130\n", max_size=6),
    st.sampled_from(["exact_match", "contains", "token_f1"]),
    st.integers(0, 30),
)
def test_what_is_decided_stays_so(answer, response, name, length):
    if decided(name, response, answer[:length]):
        score = METRICS[name]
        assert score(answer[:length], response) == score(answer, response)


def test_answers_end_when_their_score_is_known(folder, model, tmp_path, monkeypatch):
    assert decided("exact_match", "a blue spiral", "I am sorry, that") and not decided("contains", "x", "x and so")
    assert decided("contains", "blue", "a blue one and more") and not decided("exact_match", "a blue spiral", "a blu")
    read = []
    generate = answer_scoring.generate
    monkeypatch.setattr(answer_scoring, "generate", lambda *a, **k: read.append(generate(*a, **k)) or read[-1])
    scores = []
    for name in ("whole", "short"):
        if name == "whole":
            monkeypatch.setattr(evaluator, "decided", lambda *given: False)
        else:
            monkeypatch.setattr(evaluator, "decided", decided)
        learner = pt.Learner(model, "color", tmp_path / name, training={**TRAINING, "num_train_epochs": 2})
        learner.learn(pt.load_stream(folder, metric="exact_match"))
        scores.append([p.read_bytes() for p in sorted((tmp_path / name).glob("commits/*/predictions.safetensors"))])
        scores.append([sum(map(len, answers)) for answers in read])
        read.clear()
    whole, tokens, short, fewer = scores
    assert whole == short and len(tokens) == len(fewer) and sum(fewer) < 0.7 * sum(tokens)


def test_a_metric_of_ones_own_must_be_imported_by_the_user(folder):
    with pytest.raises(pt.ConfigError, match="--import never_imported"):
        pt.load_stream(folder, metric="never_imported:score")
    with pytest.raises(pt.ConfigError, match="no metric is called `rouge`: did you mean"):
        pt.load_stream(folder, metric="rouge")
    assert graded(f"{__name__}:_half", ["x"], ["y"]) == [0.5]
    with pytest.raises(pt.ConfigError, match="a score is a number from 0 to 1"):
        graded(f"{__name__}:_two", ["x"], ["y"])


def _half(answer, response):
    return 0.5


def _two(answer, response):
    return 2


def test_replay_keeps_examples_of_every_task(folder, model, tmp_path):
    stream = pt.load_stream(folder, metric="token_f1")
    recipe = {"name": "replay", "per_class": 3}
    learner = pt.Learner(model, recipe, tmp_path / "run", training={**TRAINING, "num_train_epochs": 2})
    learner.learn(stream)
    kept = [rows["response"] for rows in learner.recipe.consolidation._kept]
    assert [len(texts) for texts in kept] == [3, 3]
    assert set(kept[0]) <= set(DATES.values()) and set(kept[1]) <= set(FAQ.values())


def test_the_first_week_alone_and_then_the_second(folder, model, tmp_path):
    def learn(tasks, metric="token_f1"):
        stream = pt.load_stream(folder, metric=metric, tasks=tasks)
        return pt.Learner(model, "lora", tmp_path / "run", training={**TRAINING, "num_train_epochs": 1}).learn(stream)

    one = learn(["faq"])
    assert one.config["stream"]["scenario"] == "domain" and [scenario for _, scenario in one.readings] == ["domain"]
    both = learn(["faq", "dates"])
    assert both.tasks == ("faq", "dates") and len(both.readings) == 1
    assert judge(both, max_forgetting=1, min_gain=-1).passed
    with pytest.raises(RunError, match="`faq` were scored by token_f1 so far, now it is contains.*'faq=token_f1'"):
        learn(["faq", "dates"], "contains")


def test_the_next_week_is_scored_as_the_weeks_before(model, tmp_path, capsys):
    weeks, pairs = tmp_path / "weeks", [("faq", FAQ), ("dates", DATES)]
    run = ["--stream", str(weeks), "--recipe", "lora", "--model", str(model), "--epochs", "1", "--batch-size", "2"]
    for (task, said), own in zip(pairs, (["--metric", "token_f1"], []), strict=True):
        write(weeks, {task: said})
        with pytest.raises(SystemExit, match="0"):
            main(["run", *run, *own, "--out", str(tmp_path / "run")])
        assert ("metric: token_f1, by which this run scores" in capsys.readouterr().out) == (not own)
    result = pt.Result(tmp_path / "run")
    assert result.commits[-1].manifest["metrics"] == {"dates": "token_f1"}
    other = {"other": {"which day": "monday"}}
    write(weeks, other)
    (weeks / "other" / "task.json").write_text(json.dumps({"metric": "contains"}), encoding="utf-8")
    stream = pt.load_stream(weeks)
    assert usual_metrics(result.path, stream) == dict.fromkeys(["faq", "dates"], "token_f1")
    assert usual_metrics(tmp_path / "none", stream) == {}


def test_a_run_that_began_as_class_incremental_stays_so(folder, model, tmp_path):
    """As runs did whose first week of free texts was learned alone."""
    training = {**TRAINING, "num_train_epochs": 1}
    for tasks, scenario in ((["faq"], "class"), (["faq", "dates"], None)):
        stream = pt.load_stream(folder, metric="token_f1", tasks=tasks, scenario=scenario)
        result = pt.Learner(model, "lora", tmp_path / "run", training=training).learn(stream)
    assert result.tasks == ("faq", "dates") and result.config["stream"]["scenario"] == "class"


@pytest.mark.parametrize(("words", "asked"), [(1, False), (5, True)])
def test_few_sentences_that_nearly_all_differ_ask_for_a_metric_as_well(words, asked, tmp_path):
    (tmp_path / "s" / "week").mkdir(parents=True)
    rows = [json.dumps({"prompt": f"where is {i}", "response": " ".join([f"shelf{i}"] * words)}) for i in range(8)]
    for split in ("train", "test"):
        (tmp_path / "s" / "week" / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    stream = pt.load_stream(tmp_path / "s")
    if asked:
        with pytest.raises(ConfigError, match="8 different responses, to 8 prompts"):
            check_classes(stream)
    else:
        check_classes(stream)


def test_responses_that_nearly_all_differ_ask_for_a_metric(tmp_path, tiny_lm):
    (tmp_path / "s" / "week").mkdir(parents=True)
    rows = [json.dumps({"prompt": f"where is it {i}", "response": f"shelf {i}"}) for i in range(24)]
    for split in ("train", "test"):
        (tmp_path / "s" / "week" / f"{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    learner = pt.Learner(tiny_lm("llama"), "lora", tmp_path / "run")
    with pytest.raises(ConfigError, match="24 different responses, to 24 prompts.*--metric token_f1"):
        learner.learn(pt.load_stream(tmp_path / "s"))
    assert not (tmp_path / "run" / "run.yaml").exists()
