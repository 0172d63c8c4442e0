"""Tasks with too few samples for moments of their own: what the hold-outs of all of them say together."""

from __future__ import annotations

import itertools

import pytest
import torch

from perpetune.heads.holdout import HoldoutMoments
from perpetune.heads.ridge import in_holdout
from perpetune.routers import ClassRouter, LDARouter, PooledRouter, RidgeRouter, RouterError

WIDTH, TASKS, OF_TASK, N = 8, 12, 2, 24  # about five held-out samples a task
LABELS = [f"letter {i:02d}" for i in range(TASKS * OF_TASK)]
CENTRES = 2 * torch.randn(len(LABELS), WIDTH, generator=torch.Generator().manual_seed(0))
KINDS = [
    lambda **s: RidgeRouter(many_tasks=True, **s),
    lambda **s: ClassRouter(64, many_tasks=True, **s),
    lambda **s: LDARouter(many_tasks=True, **s),
    lambda **s: LDARouter(32, many_tasks=True, map="kernel_normalised", ridge=True, **s),
    lambda **s: PooledRouter(64, many_tasks=True, **s),
    lambda **s: PooledRouter(64, many_tasks=True, discriminants=True, **s),
]
NAMES = ["tasks", "classes", "lda", "lda_ridge", "pool", "pool of three"]


def samples(task, n=N, seed=0):
    """Two classes with centres of their own: tasks have nothing in common but their classes."""
    g = torch.Generator().manual_seed(1000 * (seed + 1) + task)
    labels = OF_TASK * task + torch.arange(n) % OF_TASK
    return CENTRES[labels] + 0.6 * torch.randn(n, WIDTH, generator=g), labels, [f"{task}-{seed}-{i}" for i in range(n)]


def router_of(router, tasks=range(TASKS), n=N):
    router.open(WIDTH, LABELS, seed=3)
    for task in tasks:
        router.observe(task, *samples(task, n))
    return router


QUERIES = torch.cat([samples(t, 20, seed=9)[0] for t in range(TASKS)])
HOME = torch.arange(TASKS).repeat_interleave(20)


def right(routes):
    return float((routes == HOME).double().mean())


def test_the_temperature_has_the_least_expected_log_loss_of_the_task_on_all_holdouts():
    router = router_of(ClassRouter(64, many_tasks=True, together=True))
    head, task_of, class_of, tau = router.fit()
    found, loss = router.tempered()
    assert found == tau and not router.enough
    given = [samples(t) for t in range(TASKS)]
    H = head.expand(torch.cat([g[0] for g in given]).double())[0] * head.unit
    v = torch.tensor([in_holdout(i, 0.2) for g in given for i in g[2]])
    y = torch.cat([g[1] for g in given])
    Y = (y[:, None] == class_of).double()
    A = H[~v].T @ H[~v] + head.fit()[2] * torch.eye(H.shape[1], dtype=H.dtype)
    s, held = H[v] @ torch.linalg.solve(A, H[~v].T @ Y[~v]), Y[v]
    n = held.sum(0)
    centres = held.T @ s / n.clamp(min=1)[:, None]  # (K x K)
    S = (s - held @ centres).T @ (s - held @ centres) / (len(s) - int((n > 0).sum()))
    d, U = torch.linalg.eigh(S)
    noise = (
        torch.randn(4000, len(n), generator=torch.Generator().manual_seed(5)).double() @ (U * d.clamp(min=0).sqrt()).T
    )
    own = task_of[:, None] == task_of

    def expected(tau):
        total = torch.zeros(())
        for c in (n > 0).nonzero().flatten().tolist():
            log_p = ((centres[c] + noise) / tau).log_softmax(1)
            total = total - n[c] * log_p[:, own[c]].logsumexp(1).mean()
        return float(total / n.sum())

    assert loss == pytest.approx(expected(tau), rel=0.1)
    assert expected(tau) < min(expected(0.7 * tau), expected(1.4 * tau))
    log_p = router.log_posterior(QUERIES)
    p = (head.scores(QUERIES.double()) / tau).softmax(1)
    torch.testing.assert_close(log_p.exp(), torch.stack([p[:, task_of == t].sum(1) for t in range(TASKS)], 1))


def test_the_log_loss_of_groups_is_that_of_their_sums():
    g = torch.Generator().manual_seed(0)
    n, Q = torch.tensor([6.0, 5.0, 8.0]), torch.randn(4, 3, generator=g, dtype=torch.float64)
    root = torch.randn(40, 4, generator=g, dtype=torch.float64)
    moments = HoldoutMoments(root.T @ root + Q / n @ Q.T, Q, n)
    linear = torch.randn(4, 3, generator=g, dtype=torch.float64), None
    each, whole = torch.arange(3), torch.zeros(3).long()
    torch.testing.assert_close(moments.log_losses(linear, groups=each), moments.log_losses(linear))
    assert moments.log_losses(linear, groups=whole).abs().max() < 1e-12
    two = moments.log_losses(linear, groups=torch.tensor([0, 0, 1]))
    assert (two < moments.log_losses(linear)).all() and (two > 0).all()
    assert moments.calibrated(linear)[0] == moments.temperature(linear)
    first = moments.log_losses(linear, shown=1)  # of the first class alone
    assert not torch.allclose(first, moments.log_losses(linear)) and (first > 0).all()


def test_ridge_on_small_tasks_is_a_softmax_of_its_scores():
    router = router_of(RidgeRouter(many_tasks=True, together=True))
    fit, (tau, _) = router.fit(), router.tempered()
    s = fit.head.scores(QUERIES.double())
    expected = torch.empty_like(s)
    expected[:, fit.order] = (s / tau).log_softmax(1)
    assert fit.density is None and torch.equal(router.log_posterior(QUERIES), expected)


def test_experts_count_by_the_log_loss_that_is_expected_of_them():
    pool = router_of(PooledRouter(64, many_tasks=True, together=True))
    experts = [router_of(kind(together=True)) for kind in KINDS[:2]]
    weight = torch.tensor([e.tempered()[1] ** -2 for e in experts], dtype=torch.float64)
    weight /= weight.sum()
    expected = sum(w * e.log_posterior(QUERIES) for w, e in zip(weight, experts, strict=True)).log_softmax(1)
    torch.testing.assert_close(pool.log_posterior(QUERIES), expected, atol=1e-9, rtol=0)
    assert weight[1] > 2 * weight[0]  # only their classes tell these tasks apart


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_the_order_of_tasks_changes_no_bit_and_a_task_taken_out_leaves_none(kind):
    ours = router_of(kind(together=True), range(6))
    expected = ours.log_posterior(QUERIES)
    for order in itertools.islice(itertools.permutations(range(6)), 1, 720, 300):
        assert torch.equal(router_of(kind(together=True), order).log_posterior(QUERIES), expected)
    ours.observe(7, *samples(7))
    assert not torch.equal(ours.log_posterior(QUERIES)[:, :6], expected)
    ours.forget(7)
    assert torch.equal(ours.log_posterior(QUERIES), expected)
    again = router_of(kind(together=True), [])
    again.load_state(ours.state())
    assert torch.equal(again.log_posterior(QUERIES), expected)


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_small_tasks_get_a_posterior_that_is_as_sure_as_it_is_right(kind):
    router, without = router_of(kind(together=True)), router_of(kind())
    log_p = router.log_posterior(QUERIES)
    assert router.calibrated and not without.calibrated
    assert torch.allclose(log_p.exp().sum(1), torch.ones(len(QUERIES)).double())
    assert torch.equal(router.route(QUERIES), log_p.argmax(1))
    assert abs(float(log_p.exp().amax(1).mean()) - right(log_p.argmax(1))) < 0.15


def test_the_pool_finds_the_task_about_as_often_as_the_best_class_does():
    ridge, classes = (router_of(kind()) for kind in KINDS[:2])
    pool, before = (router_of(PooledRouter(64, many_tasks=True, together=t)) for t in (True, False))
    assert right(before.route(QUERIES)) == right(ridge.route(QUERIES)) < right(classes.route(QUERIES)) - 0.05
    assert right(pool.route(QUERIES)) > right(classes.route(QUERIES)) - 0.02


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_with_too_few_samples_of_all_tasks_there_is_no_posterior(kind):
    few = router_of(kind(together=True), range(2), n=8)
    assert not few.calibrated and few.route(QUERIES).shape == HOME.shape
    with pytest.raises(RouterError):
        few.log_posterior(QUERIES)
    one = router_of(kind(together=True), [3], n=8)
    assert (one.route(QUERIES) == 3).all()


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_tasks_with_samples_enough_do_not_share_and_a_small_one_does_not_change_that(kind):
    def observed(together):
        router = router_of(kind(together=together), range(3), n=120)
        router.observe(3, *samples(3, 8))
        return router.log_posterior(QUERIES)

    assert torch.equal(observed(True), observed(False))


def test_of_very_many_tasks_moments_of_their_own_need_more_samples(monkeypatch):
    """A mean has as many entries as there are tasks."""
    monkeypatch.setattr("perpetune.routers.sums.FEWEST", 2)
    for n, enough in ((N, False), (60, True)):
        router = router_of(RidgeRouter(many_tasks=True, together=True), n=n)
        held = router._folds()[:, 1]
        assert (2 * int((held >= TASKS / 2).sum()) >= TASKS) == enough == router.enough
        assert (router.fit().density is not None) == enough and router.calibrated
