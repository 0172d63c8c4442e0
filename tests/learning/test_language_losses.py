"""What is measured of a language model besides right and wrong."""

from __future__ import annotations

import math
from importlib.resources import files

import pytest
import torch

from perpetune import Learner, load_stream
from perpetune.learning.language_losses import cross_entropy, general_loss, passages
from perpetune.metrics.text import rouge_l
from perpetune.models.loading import load_language_model
from perpetune.operations.gate import judge

TRAINING = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
LOSS, GENERAL, ALIKE = "loss on the responses", "change of cross-entropy on texts of no task", "ROUGE-L of the answers"


@pytest.fixture(scope="module")
def stream(word_stream):
    return load_stream(word_stream, tasks=["films", "news"], pose="instruction", train_limit=4, test_limit=3)


def measured(result, name):
    return {g["task"]: g for g in result.guarantees if g["name"] == name}


def test_cross_entropy_is_by_tokens():
    """Two answers of 1 and 3 tokens, e^-1 and e^-5: 6 nats over 4 tokens."""
    assert cross_entropy(torch.tensor([[-1.0, 1.0], [-5.0, 3.0]])) == pytest.approx(1.5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_halves_are_continued_without_an_end(tiny_lm, kind):
    """The likelihood of the tokens of the second half after those of the first, by the model itself."""
    backbone = load_language_model(tiny_lm(kind), max_length=64)
    backbone.open(["yes", "no"], ["options"])
    (example,) = backbone.halves(["red fish blue fish"])
    prompt, answer = list(example["input_ids"]), list(example["answer"])
    assert backbone.tokens.end not in answer
    with torch.no_grad():
        if kind == "t5":
            inputs = {"decoder_input_ids": torch.tensor([[backbone.start, *answer[:-1]]])}
            logits = backbone.model(input_ids=torch.tensor([prompt]), **inputs).logits[0]
        else:
            logits = backbone.model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    own = logits.log_softmax(-1)[torch.arange(len(answer)), answer]
    found = backbone.responses([example], 2)
    torch.testing.assert_close(found, torch.tensor([[own.sum(), len(answer)]]))


def test_passages_have_two_halves_and_a_model_without_room_reads_none(tiny_lm, monkeypatch):
    assert len(passages()) == 6 and all(len(p.split()) >= 30 for p in passages())
    assert "passages.txt" in {f.name for f in files("perpetune.learning").iterdir()}
    backbone = load_language_model(tiny_lm("llama"))
    backbone.open(["yes", "no"], ["options"])
    assert general_loss(backbone, 4) > 0
    monkeypatch.setattr(backbone.model.config, "max_position_embeddings", 40)
    assert general_loss(backbone, 4) is None


@pytest.mark.parametrize("heads", [["language"], [{"type": "language_generated", "rouge_l": True}]])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_losses_and_general_ability_are_measured_after_every_task(tiny_lm, stream, heads, kind, tmp_path):
    learner = Learner(tiny_lm(kind), "lora", tmp_path / "r", heads=heads, training={**TRAINING, "learning_rate": 0.01})
    result = learner.learn(stream)
    backbone = learner.backbone
    losses = measured(result, LOSS)
    assert [name for name, _, _ in losses["films"]["parts"]] == ["films"]
    assert [name for name, _, _ in losses["news"]["parts"]] == ["films", "news"]
    for (_, found, _), task in zip(losses["news"]["parts"], stream, strict=True):
        responses = backbone.responses(backbone.prepare(task.test), 4)
        assert found == pytest.approx(cross_entropy(responses), rel=1e-5)
    assert losses["news"]["value"] == pytest.approx(sum(v for _, v, _ in losses["news"]["parts"]) / 2)

    untouched = load_language_model(tiny_lm(kind))
    untouched.open(stream.labels, ["options"])
    change = general_loss(backbone, 4) - general_loss(untouched, 4)
    assert measured(result, GENERAL)["news"]["value"] == pytest.approx(change, abs=1e-5)
    assert change != 0 and math.isfinite(change)

    alike = measured(result, ALIKE)
    if heads == ["language"]:
        assert not alike
    else:
        task = stream.tasks[0]
        answers = backbone.answers(backbone.prepare(task.test), 4)
        expected = [rouge_l(a, stream.labels[y]) for a, y in zip(answers, task.test["label"], strict=True)]
        assert alike["news"]["parts"][0][1] == pytest.approx(sum(expected) / len(expected))


def test_losses_are_measured_anew_when_a_task_is_taken_out(tiny_lm, stream, tmp_path):
    """The gate then judges what that did to the other tasks."""
    learner = Learner(tiny_lm("llama"), "lora", tmp_path / "r", training=TRAINING)
    learner.learn(stream)
    result = learner.revert(stream.select(["news"]), "films")
    ((name, now, _),) = measured(result, LOSS)["revert-films"]["parts"]
    task = stream.tasks[1]
    responses = learner.backbone.responses(learner.backbone.prepare(task.test), 4)
    assert name == "news" and now == pytest.approx(cross_entropy(responses), rel=1e-5)
    (loss,) = judge(result, max_forgetting=1, min_gain=-1).losses
    learned = dict((n, v) for n, v, _ in measured(result, LOSS)["news"]["parts"])
    assert (loss.name, loss.learned, loss.now) == ("news", learned["news"], now)
    assert judge(result, max_forgetting=1, min_gain=-1, max_loss_increase=loss.rise).passed
    assert not judge(result, max_forgetting=1, min_gain=-1, max_loss_increase=loss.rise - 1e-3).passed


def test_a_frozen_model_keeps_its_general_ability_to_the_bit(tiny_lm, stream, tmp_path):
    result = Learner(tiny_lm("llama"), "frozen_label_text", tmp_path / "r", training=TRAINING).learn(stream)
    assert measured(result, GENERAL)["news"]["value"] == 0.0


def test_an_encoder_says_nothing(tiny_bert, word_stream, tmp_path):
    two = load_stream(word_stream, tasks=["films", "news"], train_limit=4, test_limit=3)
    result = Learner(tiny_bert(), "lora", tmp_path / "r", training=TRAINING).learn(two)
    assert not measured(result, LOSS) and not measured(result, GENERAL)
