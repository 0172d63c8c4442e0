"""The router that chooses between two discriminant analyses."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from perpetune.heads.holdout import TEMPERATURES, HoldoutMoments
from perpetune.heads.lda import LDAHead
from perpetune.heads.moments import in_holdout
from perpetune.routers import ChosenRouter, LDARouter
from perpetune.routers.chosen import GAMMA

LABELS = [f"letter {i:02d}" for i in range(12)]
LAYERS, WIDTH = 3, 6


def samples(task, n=160, seed=0, knowing="middle"):
    """Three layers side by side, of which one knows the classes."""
    g = torch.Generator().manual_seed(1000 * (seed + 1) + task)
    y = torch.randint(4 * task, 4 * task + 4, (n,), generator=g)
    centres = 2 * torch.randn(len(LABELS), WIDTH, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(n, LAYERS * WIDTH, generator=g)
    first = WIDTH if knowing == "middle" else 2 * WIDTH
    noise[:, first : first + WIDTH] = centres[y] + 0.7 * noise[:, first : first + WIDTH]
    return noise, y, [f"{task}-{seed}-{i}" for i in range(n)]


def opened(router, order=(0, 1, 2), layers=LAYERS, **how):
    router.layers = layers
    router.open(LAYERS * WIDTH, LABELS, seed=3)
    for task in order:
        router.observe(task, *samples(task, **how))
    return router


@pytest.mark.parametrize(("knowing", "expected"), [("middle", "layers"), ("last", "kernel")])
def test_it_predicts_as_the_expert_with_the_less_expected_loss(knowing, expected):
    router = opened(ChosenRouter(64), knowing=knowing)
    x = samples(1, seed=5, knowing=knowing)[0]
    kernel = LDARouter(64, map="kernel_normalised", gamma=GAMMA)
    kernel.open(WIDTH, LABELS, seed=3)
    for task in range(3):
        f, *rest = samples(task, knowing=knowing)
        kernel.observe(task, f[:, -WIDTH:], *rest)
    experts = {"layers": (opened(LDARouter(), knowing=knowing), x), "kernel": (kernel, x[:, -WIDTH:])}
    losses = {name: expert.expected_loss() for name, (expert, _) in experts.items()}
    assert router.chosen == min(losses, key=losses.__getitem__) == expected
    expert, read = experts[expected]
    assert torch.equal(router.log_posterior(x), expert.log_posterior(read))
    assert torch.equal(router.log_classes(x), expert.log_classes(read))
    assert torch.equal(router.log_within(x, 2), expert.log_within(read, 2))
    assert torch.equal(router.route(x), expert.route(read))


def test_the_expected_loss_is_that_of_drawn_scores_at_the_temperature():
    router = opened(LDARouter())
    head, task_of, class_of, tau = router.fit()
    H = [head.expand(samples(t)[0].double())[0] * head.unit for t in range(3)]
    y = torch.cat([samples(t)[1] for t in range(3)])
    held = torch.tensor([in_holdout(i, 0.2) for t in range(3) for i in samples(t)[2]])
    h, columns = torch.cat(H), torch.stack([(class_of == c).nonzero()[0, 0] for c in y])
    Y = F.one_hot(columns, len(class_of)).double()
    G, Q, n = h[~held].T @ h[~held], h[~held].T @ Y[~held], Y[~held].sum(0)
    m = Q / n
    S = (G - m @ Q.T) / (float(n.sum()) - len(n))
    a = head.fit()[2]
    S_a = (1 - a) * S + a * S.diagonal().mean() * torch.eye(len(S), dtype=S.dtype)
    Theta = torch.linalg.solve(S_a, m)
    offset = -0.5 * (m * Theta).sum(0)
    moments = head.holdout_moments(range(len(class_of)))
    assert isinstance(moments, HoldoutMoments)
    total = torch.zeros((), dtype=torch.float64)
    for s, own, weight in moments._drawn((Theta, offset)):
        log_p = (s / tau).log_softmax(2)
        total += -(log_p.gather(2, own[:, None, None].expand(-1, s.shape[1], 1))[..., 0].mean(1) * weight).sum()
    assert router.expected_loss() == pytest.approx(float(total / held.sum()), rel=1e-6)
    assert tau in TEMPERATURES.tolist()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:3])
def test_the_order_of_tasks_changes_no_bit(order):
    x = samples(0, seed=5)[0]
    assert torch.equal(opened(ChosenRouter(20), order).log_posterior(x), opened(ChosenRouter(20)).log_posterior(x))


def test_alone_a_task_is_predicted_by_its_own_train_fold():
    """Discriminant analysis of a head that never saw the hold-out fold, nor another task."""
    router, (f, y, ids) = opened(LDARouter()), samples(1)
    log_p, loss = router.alone(f, 1)
    train = torch.tensor([not in_holdout(i, 0.2) for i in ids])
    both = LDAHead("normalised")
    both.open(f.shape[1], LABELS, seed=3)
    both.observe(f, y, ids)
    head = LDAHead("normalised", shrinkage=both.fit()[2])
    head.open(f.shape[1], LABELS, seed=3)
    head.observe(f[train], y[train], [i for i, kept in zip(ids, train.tolist(), strict=True) if kept])
    own = torch.arange(4, 8)
    s = head.scores(f)[:, own].double()
    ratio = s.log_softmax(1) - s.log_softmax(1)[:, :1]
    found = log_p[:, own] - log_p[:, own[:1]]
    tau = float(ratio[:, 1:].sum() / found[:, 1:].sum())
    torch.testing.assert_close(log_p[:, own], (s / tau).log_softmax(1), atol=1e-9, rtol=0)
    assert min(abs(tau / t - 1) for t in TEMPERATURES.tolist()) < 1e-6 and 0 < loss < 1.5
    assert (log_p[:, :4] == -torch.inf).all()


def test_other_tasks_change_no_bit_of_what_a_task_predicts_alone():
    x = samples(1, seed=4)[0]
    assert torch.equal(opened(ChosenRouter(20)).alone(x, 1), opened(ChosenRouter(20), (1,)).alone(x, 1))
