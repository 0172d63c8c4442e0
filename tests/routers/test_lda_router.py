"""Discriminant analysis as a router, with ridge of the same sums and without."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from perpetune.heads.holdout import TEMPERATURES
from perpetune.heads.lda import LDAHead
from perpetune.heads.lda_ridge import SCALE
from perpetune.heads.moments import in_holdout
from perpetune.routers import LDARouter

LABELS = [f"letter {i:02d}" for i in range(12)]
LAYERS, WIDTH = 3, 6


def samples(task, n=160, seed=0):
    """Three layers side by side, of which one knows the classes."""
    g = torch.Generator().manual_seed(1000 * (seed + 1) + task)
    y = torch.randint(4 * task, 4 * task + 4, (n,), generator=g)
    centres = 2 * torch.randn(len(LABELS), WIDTH, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(n, LAYERS * WIDTH, generator=g)
    noise[:, WIDTH : 2 * WIDTH] = centres[y] + 0.7 * noise[:, WIDTH : 2 * WIDTH]
    return noise, y, [f"{task}-{seed}-{i}" for i in range(n)]


def made():
    return LDARouter(20, map="kernel_normalised", gamma=0.3, ridge=True)


def opened(router, order=(0, 1, 2)):
    router.layers = LAYERS
    router.open(LAYERS * WIDTH, LABELS, seed=3)
    for task in order:
        router.observe(task, *samples(task))
    return router


def linear(h, y, ids, head, ridge):
    """Theta and offsets by hand, of the train fold at the strengths of the head."""
    train = torch.tensor([not in_holdout(i, 0.2) for i in ids])
    Y = F.one_hot(y, int(y.max()) + 1).double()[train]
    G, Q, n = h[train].T @ h[train], h[train].T @ Y, Y.sum(0)
    m, a, eye = Q / n, head.fit()[2], torch.eye(h.shape[1], dtype=h.dtype)
    S = (G - m @ Q.T) / (float(n.sum()) - len(n))
    Theta = torch.linalg.solve((1 - a) * S + a * S.diagonal().mean() * eye, m)
    offset = -0.5 * (m * Theta).sum(0)
    if not ridge:
        return Theta, offset
    penalty, tau_L, tau_R = head._with_ridge
    r = SCALE * torch.linalg.solve(G + penalty * G.diagonal().mean() * eye, Q)
    return (Theta / tau_L + r / tau_R) / 2, offset / (2 * tau_L)


@pytest.mark.parametrize("ridge", [False, True])
def test_the_temperature_has_the_least_expected_log_loss_under_the_train_fold(ridge):
    router = opened(LDARouter(ridge=ridge))
    head, _, class_of, tau = router.fit()
    f, y = (torch.cat([samples(t)[k] for t in range(3)]) for k in (0, 1))
    columns = torch.stack([(class_of == c).nonzero()[0, 0] for c in y])
    h = head.expand(f.double())[0] * head.unit
    found = linear(h, columns, [i for t in range(3) for i in samples(t)[2]], head, ridge)
    losses = head.holdout_moments(range(len(class_of))).log_losses(found)
    assert tau == float(TEMPERATURES[losses.argmin()])


@pytest.mark.parametrize("ridge", [False, True])
def test_the_joint_posterior_is_that_of_tasks_times_that_within_them(ridge):
    router, x = opened(LDARouter(20, map="kernel_normalised", ridge=ridge)), samples(1, seed=5)[0]
    log_p, task_of, class_of = router.log_joint(x)
    log_t = router.log_posterior(x)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(len(x), dtype=log_p.dtype), atol=1e-12, rtol=0)
    for t in range(3):
        own = task_of == t
        expected = log_t[:, [t]] + router.log_within(x, t)[:, class_of[own]]
        torch.testing.assert_close(log_p[:, own], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:3])
def test_the_order_of_tasks_changes_no_bit(order):
    x = samples(0, seed=5)[0]
    assert torch.equal(opened(made(), order).log_posterior(x), opened(made()).log_posterior(x))


def test_alone_a_task_is_predicted_by_its_own_train_fold():
    """Discriminant analysis of a head that never saw the hold-out fold, nor another task."""
    router, (f, y, ids) = opened(LDARouter()), samples(1)
    log_p = router.alone(f, 1)
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
    assert min(abs(tau / t - 1) for t in TEMPERATURES.tolist()) < 1e-6
    assert (log_p[:, :4] == -torch.inf).all()


def test_other_tasks_change_no_bit_of_what_a_task_predicts_alone():
    x = samples(1, seed=4)[0]
    assert torch.equal(opened(made()).alone(x, 1), opened(made(), (1,)).alone(x, 1))
