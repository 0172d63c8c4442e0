"""The language head reads answers: its loss, its scores, and what it keeps."""

import pytest
import torch

from perpetune.core.errors import ConfigError, HeadError
from perpetune.heads import LanguageHead, make_head

LABELS = ["good", "very bad", "Good!", "?"]
LENGTHS = torch.tensor([[2.0], [4.0], [3.0], [2.0]])


def opened(name="language", width=4, labels=LABELS, **settings):
    head = make_head(name, **settings)
    head.open(width, labels, seed=0, label_embeddings=LENGTHS[: len(labels)])
    return head


def test_the_loss_is_the_mean_over_the_tokens_of_the_responses():
    head = opened()
    head.begin_task([0])  # one class is no choice, and a response all the same
    log_p = torch.tensor([-2.0, -6.0, -1.0], dtype=torch.float64, requires_grad=True)
    features = torch.stack([log_p, torch.tensor([2.0, 4.0, 3.0], dtype=torch.float64)], 1)
    loss = head.loss(features, torch.tensor([0, 1, 0]))
    assert loss.item() == pytest.approx(9 / 9)
    loss.backward()
    assert torch.equal(log_p.grad, torch.full_like(log_p, -1 / 9))
    head.end_task()
    with pytest.raises(HeadError, match="no task has begun"):
        head.loss(features, torch.tensor([0, 0, 0]))
    assert not list(head.parameters())


def test_options_are_scored_by_their_log_likelihood():
    features = torch.tensor([[-4.0, -6.0, -torch.inf, -3.0]])
    assert torch.equal(opened().scores(features), features)
    per_token = opened(length_normalised=True).scores(features)
    assert torch.equal(per_token, torch.tensor([[-2.0, -1.5, -torch.inf, -1.5]]))
    assert opened().knows([0, 1, 2, 3])


def test_a_generated_answer_scores_the_classes_of_its_text():
    head = opened("language_generated", width=1)
    scores = head.scores(torch.tensor([[0.0], [1.0], [-1.0]]))
    hit = [[True, False, True, False], [False, True, False, False], [False] * 4]  # "good" is "Good!" normalised
    assert (scores == 0).tolist() == hit and ((scores == 0) | (scores == -torch.inf)).all()
    both = opened("language_generated", width=5)
    assert torch.equal(both.scores(torch.tensor([[-1.0, -2.0, -3.0, -4.0, 1.0]])), scores[1:2])


def test_a_saved_head_goes_on_in_a_stream_that_has_grown():
    head = opened(width=2, labels=LABELS[:2])
    head.begin_task([1])
    head.end_task()
    grown = opened()
    grown.load_state(head.state())
    assert grown.seen.tolist() == [False, True, False, False]
    grown.forget(0, [1], {}, {})
    assert not grown.seen.any()


def test_settings_and_what_it_is_given_are_checked():
    for name, read in (("language", "options"), ("language_generated", "generate")):
        head = make_head(name)
        assert head.name == name and head.read == read
        again = make_head({"type": "LanguageHead", **head.config()})
        assert again.name == name and again.config() == head.config()
    with pytest.raises(ConfigError, match="read='likelihood'"):
        LanguageHead("likelihood")
    with pytest.raises(ConfigError, match="have no likelihood"):
        LanguageHead("generate", length_normalised=True)
    with pytest.raises(ConfigError, match="301 different answers, too many"):
        LanguageHead().open(301, [str(i) for i in range(301)], seed=0, label_embeddings=torch.ones(301, 1))
    with pytest.raises(HeadError, match="needs the lengths of the answers"):
        LanguageHead().open(4, LABELS, seed=0)
