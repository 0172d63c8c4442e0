"""An adapter for every task, the surest of them, and beside it the merge of all (TUNA)."""

from __future__ import annotations

import math

import pytest
import torch

import perpetune as pt
from perpetune.consolidation import SharedBranch
from perpetune.consolidation.shared_branch import merged_adapter
from perpetune.consolidation.states import Reading, only
from perpetune.core.errors import ConfigError

TRAINING = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 5e-3}


def test_the_merged_adapter_has_the_elected_sign_and_the_largest_of_its_magnitudes():
    adapters = [{"a": torch.randn(3, 4), "b": torch.randn(5)} for _ in range(3)]
    merged = merged_adapter(adapters)
    for name in adapters[0]:
        v = torch.stack([adapter[name] for adapter in adapters])
        sign = v.sum(0).sign()
        expected = sign * torch.where(v.sign() == sign, v.abs(), 0).amax(0)
        assert torch.equal(merged[name], expected)
    alone = merged_adapter(adapters[:1])
    assert all(torch.equal(alone[name], adapters[0][name]) for name in alone)


class Fixed:
    """Scores of two examples under two adapters and the merged one (-2), as features."""

    SCORES = {
        0: [[4.0, 0.0, 0.0], [1.0, 0.9, 0.8]],
        1: [[0.5, 0.4, 0.3], [0.0, 3.0, -1.0]],
        -2: [[0.0, 1.0, 6.0], [0.0, 2.0, 0.0]],
    }

    def read(self, task, rows):
        return torch.tensor(self.SCORES[task])[rows]

    def scores(self, features, task=None):
        return features


def scored(consolidation, weights=None):
    consolidation._adapters, consolidation._reopened = [{}, {}], [None, None]
    fixed = Fixed()
    reading = Reading(2, fixed.read)
    weights = consolidation.weights(reading) if weights is None else weights
    return consolidation.scores(fixed, 3, reading, weights).exp()


def softmax(task, row):
    return torch.tensor(Fixed.SCORES[task][row]).double().softmax(0)


def test_the_surest_adapter_and_the_merged_one_are_added():
    found = scored(SharedBranch())
    for row, surest in ((0, 0), (1, 1)):
        torch.testing.assert_close(found[row], (softmax(surest, row) + softmax(-2, row)) / 2)
    given = scored(SharedBranch(), only(1, 2, 2))  # the task is given: its adapter, however unsure
    torch.testing.assert_close(given[0], (softmax(1, 0) + softmax(-2, 0)) / 2)


def test_only_where_it_is_unsure_if_that_is_asked_for():
    def entropy(p):
        return float(-(p * p.log()).sum()) / math.log(3)

    sure, less = entropy(softmax(0, 0)), entropy(softmax(1, 1))
    assert sure < less
    found = scored(SharedBranch("instead", unsure=(sure + less) / 2))
    torch.testing.assert_close(found[0], softmax(0, 0))
    torch.testing.assert_close(found[1], softmax(-2, 1))


def test_an_adapter_that_a_later_task_took_up_is_asked_no_more():
    consolidation = SharedBranch()
    consolidation._adapters, consolidation._reopened = [{}, {}, {}], [None, None, 0]
    weights = consolidation.weights(Reading(1, lambda task, rows: torch.zeros(1, 1)))
    assert (weights > -torch.inf).tolist() == [[False, True, True]]


@pytest.fixture(scope="module")
def run(model, stream, tmp_path_factory):
    learner = pt.Learner(model, "tuna", tmp_path_factory.mktemp("tuna") / "run", training=TRAINING, max_length=16)
    return learner, learner.learn(stream)


def test_a_run_predicts_by_the_equation(run, stream):
    learner, _ = run
    states, backbone, head = learner.recipe.consolidation.states, learner.backbone, learner.heads[0]
    examples = backbone.prepare(stream.tasks[0].test)
    p = {}
    for view in (0, 1, 2, -3):
        with states.view(view):
            p[view] = head.scores(backbone.features(examples, 8)).double().softmax(1)
    entropies = torch.stack([-(p[t] * p[t].clamp(min=1e-300).log()).sum(1) for t in range(3)])
    best = torch.stack([p[t] for t in range(3)])[entropies.argmin(0), torch.arange(len(examples))]
    expected = (best + p[-3]).argmax(1)
    assert learner.predict(list(stream.tasks[0].test["text"])) == [stream.labels[c] for c in expected.tolist()]
    assert states.task_classes(-3) == tuple(range(len(stream.labels)))


def test_a_task_starts_from_the_adapter_before_it_or_all_alike(run, model, stream):
    still = {**TRAINING, "learning_rate": 0.0}
    alike = pt.Learner(model, {"name": "tuna", "start": "shared"}, training=still, max_length=16)
    first, *others = (c.tensors("adapter_model.safetensors") for c in alike.learn(stream).commits[1:])
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    with pytest.raises(ConfigError, match="taken out"):
        run[0].revert(stream.select(["news", "mood"]), "films")


def test_what_does_not_fit_is_refused():
    for settings, message in (({"asked": "always"}, "together"), ({"start": "x"}, "shared"), ({"unsure": 2}, "unsure")):
        with pytest.raises(ConfigError, match=message):
            SharedBranch(**settings)
