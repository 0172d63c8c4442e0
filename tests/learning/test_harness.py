"""General ability on tasks of lm-evaluation-harness; without it, how its absence is told."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest
import torch

from perpetune import Learner, load_stream
from perpetune.cli import main
from perpetune.core.errors import ConfigError
from perpetune.learning.harness import SOURCE, figures_of, parsed
from perpetune.models.loading import load_language_model
from perpetune.runs.directory import Run
from perpetune.runs.result import Result

pytestmark = pytest.mark.usefixtures("quick_collection")
HERE = importlib.util.find_spec("lm_eval") is not None
harness = pytest.mark.skipif(not HERE, reason="lm-eval is not installed: pip install 'perpetune[lm-eval]'")
TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 5e-2}
WORDS = {"film": ["movie", "film", "great"], "sport": ["team", "game", "good"]}


@pytest.fixture(scope="module")
def stream(word_stream):
    return load_stream(word_stream, tasks=["films", "news"], pose="instruction", train_limit=8, test_limit=3)


@pytest.fixture(scope="module")
def own_words(tmp_path_factory):
    """A task of the harness in a YAML file: which of two words goes on."""
    folder, generator = tmp_path_factory.mktemp("own"), random.Random(0)
    rows = [
        {"text": f"the {generator.choice(words)} of the {generator.choice(words)}", "options": [*WORDS], "right": i}
        for i, words in enumerate(WORDS.values())
        for _ in range(12)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "own_words",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "options",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "own.yaml").write_text(json.dumps(task), encoding="utf-8")
    return folder / "own.yaml", rows


@torch.no_grad()
def by_hand(learner_or_folder, rows):
    """The share of rows whose option has the larger log p, from nothing but tokens and logits."""
    if isinstance(learner_or_folder, Learner):
        backbone = learner_or_folder.backbone
    else:
        backbone = load_language_model(learner_or_folder).eval()
    right = 0
    for row in rows:
        scores = []
        for option in row["options"]:
            prompt = backbone.processor(row["text"]).input_ids
            whole = backbone.processor(f"{row['text']} {option}").input_ids
            log_p = backbone.model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(log_p[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        right += scores[row["right"]] == max(scores)
    return right / len(rows)


def measured(result):
    return {g["task"]: g for g in result.guarantees if g["source"] == SOURCE}


@harness
def test_the_untouched_model_and_the_model_after_each_task(tiny_lm, stream, own_words, tmp_path):
    file, rows = own_words
    settings = {"training": TRAINING, "lm_eval": [str(file)]}
    result = Learner(tiny_lm("gpt2"), "lora", tmp_path / "a", **settings).learn(stream)
    first = Run.read(tmp_path / "a").commits[0].manifest["lm_eval"]
    assert first["tasks"] == [str(file)]
    assert first["figures"] == {"own_words, acc": pytest.approx(by_hand(tiny_lm("gpt2"), rows))}
    found = measured(result)
    assert set(found) == {"films", "news"} and found["news"]["name"] == "own_words, acc"
    assert found["news"]["value"] == pytest.approx(by_hand(Learner.open(tmp_path / "a"), rows))
    assert f"{first['figures']['own_words, acc']:.4g} before the first task; standard error" in found["news"]["note"]
    assert "24 examples" in found["news"]["note"]
    assert {found[t]["value"] for t in found} != {first["figures"]["own_words, acc"]}


@harness
def test_nothing_that_is_learned_depends_on_it_and_a_run_goes_on_to_the_same_figures(
    tiny_lm, stream, own_words, tmp_path, capfd
):
    settings = {"training": TRAINING, "lm_eval": [f"{own_words[0]}:10"]}
    plain = Learner(tiny_lm("llama"), "lora", tmp_path / "plain", training=TRAINING)
    plain.learn(stream)
    whole = Learner(tiny_lm("llama"), "lora", tmp_path / "whole", **settings)
    told = measured(whole.learn(stream))
    a, b = (x.backbone.model.state_dict() for x in (plain, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert whole.backbone.processor.padding_side == plain.backbone.processor.padding_side
    assert not measured(Result(tmp_path / "plain"))
    Learner(tiny_lm("llama"), "lora", tmp_path / "parts", **settings).learn(stream.select(["films"]))
    parts = measured(Learner(tiny_lm("llama"), "lora", tmp_path / "parts", **settings).learn(stream))
    assert parts == told and "10 examples" in told["news"]["note"]
    assert "requests" not in capfd.readouterr().err


@harness
def test_a_run_that_began_without_it_reads_the_untouched_model_again(tiny_lm, stream, own_words, tmp_path):
    file, rows = own_words
    folder = tiny_lm("gpt2")
    Learner(folder, "lora", tmp_path / "r", training=TRAINING).learn(stream.select(["films"]))
    result = Learner(folder, "lora", tmp_path / "r", training=TRAINING, lm_eval=[str(file)]).learn(stream)
    assert set(measured(result)) == {"news"}
    assert f"{by_hand(folder, rows):.4g} before the first task" in measured(result)["news"]["note"]


@harness
def test_from_the_command_line_where_adapters_wrap_tied_weights(tiny_lm, word_stream, own_words, tmp_path):
    arguments = ["run", "--model", tiny_lm("gpt2"), "--stream", word_stream, "--tasks", "films", "--pose"]
    arguments += ["instruction", "--train-limit", 4, "--test-limit", 3, "--out", tmp_path / "r", "--set", "max_steps=1"]
    arguments += ["--recipe", "sequential", "--lm-eval", f"{own_words[0]}:4", "--evaluate-every", 0]
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    assert ended.value.code == 0 and set(measured(Result(tmp_path / "r"))) == {"films"}


@harness
def test_what_cannot_be_evaluated_is_told_before_anything_is_trained(tiny_lm, tiny_bert, stream, own_words, tmp_path):
    def learn(task, model, recipe="lora", rows=stream):
        return Learner(model, recipe, tmp_path / "x", training=TRAINING, lm_eval=[task]).learn(rows)

    with pytest.raises(ConfigError, match="lm_eval: .*none.yaml"):
        learn(str(tmp_path / "none.yaml"), tiny_lm("gpt2"))
    bad = json.loads(own_words[0].read_text(encoding="utf-8"))
    bad["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / "none.jsonl")
    (tmp_path / "bad.yaml").write_text(json.dumps(bad), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"lm_eval: .*none\.jsonl"):
        learn(str(tmp_path / "bad.yaml"), tiny_lm("gpt2"))
    assert not Run.read(tmp_path / "x").commits
    assert not measured(learn(str(own_words[0]), tiny_lm("gpt2"), "color"))


def test_encoders_have_no_use_for_it(tiny_bert, word_stream, tmp_path):
    texts = load_stream(word_stream, tasks=["films"], train_limit=4, test_limit=2)
    with pytest.raises(ConfigError, match="lm_eval: .* is no language model"):
        Learner(tiny_bert(), "lora", tmp_path / "b", training=TRAINING, lm_eval=["arc_easy"]).learn(texts)


def test_without_the_package_it_says_how_to_install_it(tiny_lm, stream, tmp_path, monkeypatch):
    monkeypatch.setattr("perpetune.learning.harness.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'perpetune\[lm-eval\]'"):
        Learner(tiny_lm("gpt2"), "lora", tmp_path / "r", training=TRAINING, lm_eval=["arc_easy"]).learn(stream)


def test_a_task_may_say_how_many_examples():
    assert parsed("arc_easy") == ("arc_easy", None) and parsed("arc_easy:100") == ("arc_easy", 100)
    assert parsed("a:b/own.yaml") == ("a:b/own.yaml", None)
    for wrong in ("", ":5", "arc_easy:0"):
        with pytest.raises(ConfigError, match="names no task"):
            parsed(wrong)


def test_of_a_group_its_own_figures_are_taken():
    row = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 7}
    said = {
        "results": {"g_a": row, "g_b": row, "g": row, "alone": {**row, "em,strict": 0.25, "em_stderr,strict": "N/A"}},
        "groups": {"g": row},
        "group_subtasks": {"g": ["g_a", "g_b"]},
        "n-samples": {"alone": {"effective": 5}},
    }
    found = {each.name: each[1:] for each in figures_of(said)}
    assert found == {"g, acc": (0.5, 0.1, 7), "alone, acc": (0.5, 0.1, 5), "alone, em (strict)": (0.25, None, 5)}
