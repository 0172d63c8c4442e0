import pytest
import torch

from perpetune.core.errors import ConfigError, HeadError
from perpetune.heads import ContrastiveHead

LABELS = ["ant", "bee", "cat", "dog"]
E = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))


def opened(**settings):
    head = ContrastiveHead(**settings)
    head.open(6, LABELS, seed=0)
    return head


def test_scores_are_products_with_the_texts_that_were_given():
    f = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    head = opened()
    assert (head.scores(f) == -torch.inf).all() and head.knows([0, 1, 2, 3])
    head.embed([3, 1], E[[3, 1]])
    scores = head.scores(f)
    assert torch.allclose(scores[:, [1, 3]], f @ E[[1, 3]].T, atol=1e-6)
    assert (scores[:, [0, 2]] == -torch.inf).all()
    assert head.scores(f * torch.nan)[:, 1].isnan().all()  # a broken model does not look like an unknown text


def test_loss_is_the_mean_negative_log_likelihood_of_the_own_texts():
    head = opened()
    head.begin_task([0, 1])
    features = torch.cat([torch.randn(3, 12), torch.tensor([[-1.0], [-2.0], [-6.0]])], 1).requires_grad_()
    loss = head.loss(features, torch.tensor([0, 1, 1]))
    assert torch.allclose(loss, torch.tensor(3.0))
    loss.backward()
    assert torch.equal(features.grad[:, -1], torch.full((3,), -1 / 3)) and not features.grad[:, :-1].any()
    assert list(head.parameters()) == [] and head.trains and head.trainer() is head


def test_it_measures_how_far_texts_of_earlier_tasks_move():
    head = opened()
    head.embed(range(4), E)
    head.begin_task([0, 1])
    head.end_task()
    head.embed(range(4), 2 * E)
    assert head.guarantee() == []  # all were new
    head.begin_task([2, 3])
    head.end_task()
    moved = 2 * E + torch.tensor([[0.0], [1.0], [9.0], [9.0]]) * E
    head.embed([0], moved[:1])
    head.embed([1, 2, 3], moved[1:])
    (measured,) = head.guarantee()
    assert measured.value == pytest.approx(0.5) and measured.bound is None


def test_template_makes_the_texts_to_embed():
    assert opened().label_prompts(["ant"]) == ["ant"]
    assert opened(template="a photo of a {}.").label_prompts(["ant"]) == ["a photo of a ant."]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="contrastive head: template='label'"):
        ContrastiveHead(template="label")
    for wrong in (E[:3], E[:, :5], E * torch.nan):
        with pytest.raises(HeadError, match="expected finite label embeddings"):
            opened().embed(range(4), wrong)
    with pytest.raises(HeadError, match="no task has begun"):
        opened().loss(torch.zeros(2, 13), torch.tensor([0, 1]))
