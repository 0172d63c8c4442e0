"""A run whose head carries its statistics along while the model is tuned on."""

from __future__ import annotations

import pytest
import torch

import perpetune as pt
from perpetune.core.errors import PerpetuneError
from perpetune.heads import Carried

TRAINING = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def word_stream(many_words):
    return many_words


@pytest.fixture(scope="module")
def stream(word_stream):
    return pt.load_stream(word_stream, tasks=["films", "news", "mood"])


@pytest.fixture(scope="module")
def model(tiny_bert):
    return tiny_bert()


@pytest.fixture(scope="module")
def run(model, stream, tmp_path_factory):
    learner = pt.Learner(
        model, "sequential_sldc", tmp_path_factory.mktemp("sldc") / "run", training=TRAINING, max_length=16
    )
    return learner, learner.learn(stream)


def test_sums_are_carried_from_the_features_before_to_those_after(run, model, stream):
    """By hand: the same training with `lda`, and the map of the second task's features."""
    learner, result = run
    plain = pt.Learner(model, "sequential_lora", heads=["linear"], training=TRAINING, max_length=16)
    backbone, head = None, Carried("lda")
    features = {}
    for count in (1, 2):
        plain.learn(stream.select([task.name for task in stream.tasks[:count]]))
        backbone = plain.backbone
        for task in stream.tasks[:2]:
            features[count, task.name] = backbone.features(backbone.prepare(task.train), 16)
    head.open(backbone.width, stream.labels, seed=learner.setup.seed)
    first, second = stream.tasks[:2]
    head.observe(features[1, first.name], torch.tensor(first.train["label"]), first.train["id"])
    head.carry(features[1, second.name], features[2, second.name])
    head.observe(features[2, second.name], torch.tensor(second.train["label"]), second.train["id"])
    stored = result.commits[2].tensors("head_sums.safetensors")
    ours = {key.split(".", 1)[1]: t for key, t in stored.items() if key.startswith("lda_carried.")}
    assert ours.keys() == head.state().keys()
    for key, value in head.state().items():
        torch.testing.assert_close(ours[key].to(value), value, rtol=1e-6, atol=1e-6)


def test_it_opens_and_goes_on_to_the_bit_and_says_what_it_is(run, model, stream, same_bits_when_stopped, tmp_path):
    learner, result = run
    texts = [text for task in stream for text in task.test["text"][:6]]
    assert pt.Learner.open(result.path).predict(texts) == learner.predict(texts)
    options = {"training": TRAINING, "max_length": 16}
    same_bits_when_stopped(
        lambda name: pt.Learner(model, "sequential_sldc", tmp_path / name, **options).learn(stream), result.path
    )
    names = {g["name"] for g in result.guarantees if g["source"] == "Carried"}
    assert "statistics that are estimates: maps" in names
    assert not any(g["name"] == "tasks with stale statistics" for g in result.guarantees)


def test_nothing_is_taken_out_of_estimates(model, stream, tmp_path):
    """Also where the consolidation could: the run stays as it was."""
    learner = pt.Learner(model, "lora", tmp_path / "run", heads=["lda_carried"], training=TRAINING, max_length=16)
    learner.learn(stream.select(["films", "news"]))
    with pytest.raises(PerpetuneError, match="estimates"):
        learner.revert(stream.select(["news"]), "films")
    assert len(list((tmp_path / "run" / "commits").iterdir())) == 3
